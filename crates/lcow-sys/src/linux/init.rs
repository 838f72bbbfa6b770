//! The first process of a container: the duties of pid 1, and a `/dev` with loop devices.
//!
//! ```text
//!   engine ──SIGTERM──► pid 1: supervise ──forwards──► this program again, as an ordinary process
//!                         │ reaps every orphan
//!                         └─ ends with the status of that process (and the container with it)
//! ```
//!
//! Pid 1 inherits every process that loses its parent, and the kernel drops signals to it that have no handler. A small
//! process with one thread takes care of both, because the program itself reaps its children by their descriptors, and a
//! `wait` for any child would interfere. Called by `cli::serve`.

use super::{Context, SysError};
use rustix::{
    fs::{Dev, makedev, stat},
    mount::MountFlags,
};
use std::{
    io, mem,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    ptr,
};

/// Signals that a user or an engine sends to the container; pid 1 forwards them.
const FORWARDED: [libc::c_int; 6] =
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];
/// Major and minor number of `/dev/loop-control` (`include/linux/miscdevice.h`).
const LOOP_CONTROL: (u32, u32) = (10, 237);

/// Whether this is the first process of its pid namespace.
pub fn is_first_process() -> bool {
    std::process::id() == 1
}

/// Makes loop devices usable: if `/dev` has no `loop-control`, as in a container, mounts devtmpfs over it. Returns whether
/// that was necessary.
///
/// # Errors
/// [`SysError::Os`] without `CAP_SYS_ADMIN`; [`SysError::Usage`] if the kernel has no loop driver.
pub fn furnish_dev() -> Result<bool, SysError> {
    let control = Path::new("/dev/loop-control");
    if is_loop_control(control) {
        return Ok(false);
    }
    // There is no use for programs and set-user-id bits in it. nodev would make it useless.
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    rustix::mount::mount("devtmpfs", "/dev", "devtmpfs", flags, None).context("mount devtmpfs on", "/dev")?;
    if is_loop_control(control) {
        return Ok(true);
    }
    Err(SysError::usage(
        "find",
        control,
        "the kernel of the host has no loop driver; load it with: modprobe loop",
    ))
}

/// A small mount below a shared directory, which shows whether mounts made in that directory still reach the host.
///
/// An engine with live-restore that stops while no container runs leaves a managed plugin running, but unmounts everything
/// below the plugin's directory, including the shared directory itself (moby `plugin/manager_linux.go`, `Shutdown`). Later
/// mounts of the plugin are visible only to itself. No table that this process can read shows that: both sides of a broken
/// propagation look the same. But this mount disappears with the others.
#[derive(Debug)]
pub struct Canary {
    mount: PathBuf,
    directory: PathBuf,
}

impl Canary {
    /// Its name in the shared directory; no layer can have it.
    const NAME: &str = ".propagation";

    /// Mounts it, unless an earlier process has.
    ///
    /// # Errors
    /// [`SysError::Os`]: the directory cannot be created, or nothing can be mounted.
    pub fn set(directory: &Path) -> Result<(), SysError> {
        let canary = Self { mount: directory.join(Self::NAME), directory: directory.to_owned() };
        if canary.stands() {
            return Ok(());
        }
        std::fs::create_dir_all(&canary.mount).context("create", &canary.mount)?;
        let flags = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV | MountFlags::RDONLY;
        rustix::mount::mount("lcow", &canary.mount, "tmpfs", flags, Some(c"size=4k"))
            .context("mount tmpfs on", &canary.mount)
    }

    /// The one in this directory, if there is one.
    pub fn find(directory: &Path) -> Option<Self> {
        let canary = Self { mount: directory.join(Self::NAME), directory: directory.to_owned() };
        canary.stands().then_some(canary)
    }

    /// Waits until it is no longer mounted, by polling the mount table, which reports each change (proc_pid_mountinfo(5)).
    ///
    /// # Errors
    /// [`SysError::Os`] if the mount table cannot be opened or polled.
    pub fn wait_until_gone(&self) -> Result<(), SysError> {
        const TABLE: &str = "/proc/self/mountinfo";
        let table = std::fs::File::open(TABLE).context("open", TABLE)?;
        while self.stands() {
            let mut watched = [rustix::event::PollFd::new(&table, rustix::event::PollFlags::PRI)];
            match rustix::event::poll(&mut watched, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("watch", TABLE),
            }
        }
        Ok(())
    }

    /// Whether it is mounted.
    pub fn stands(&self) -> bool {
        match (stat(&self.mount), stat(&self.directory)) {
            (Ok(mount), Ok(directory)) => mount.st_dev != directory.st_dev,
            _ => false,
        }
    }
}

fn is_loop_control(path: &Path) -> bool {
    let number: Dev = makedev(LOOP_CONTROL.0, LOOP_CONTROL.1);
    stat(path).is_ok_and(|s| s.st_rdev == number)
}

/// Starts `command` and acts as pid 1 until it ends: forwards signals, reaps orphans. The signals stay blocked afterwards.
///
/// # Errors
/// The process has more than one thread (a blocked signal would go to another, and its children would be reaped); the
/// command cannot be started.
pub fn supervise(command: &mut Command) -> io::Result<ExitStatus> {
    super::single_thread()?;
    let wanted = signals()?;
    // Blocked before the child exists, so that no signal is lost or has its default action.
    // SAFETY: `wanted` is an initialized set; the old mask is not requested.
    let r = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const wanted, ptr::null_mut()) };
    if r != 0 {
        return Err(io::Error::from_raw_os_error(r));
    }
    let none = empty_set()?;
    let unblock = move || {
        // SAFETY: `none` is an initialized set; the old mask is not requested. sigprocmask may be called after fork.
        match unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: the closure makes one system call, which is sound between fork and exec, and allocates nothing.
    unsafe { command.pre_exec(unblock) };
    let child = command.spawn()?;
    let pid = libc::pid_t::try_from(child.id()).map_err(io::Error::other)?;
    loop {
        let mut signal = 0;
        // SAFETY: `wanted` is an initialized set, `signal` a live integer.
        let r = unsafe { libc::sigwait(&raw const wanted, &raw mut signal) };
        match r {
            0 => {}
            libc::EINTR => continue,
            e => return Err(io::Error::from_raw_os_error(e)),
        }
        if signal != libc::SIGCHLD {
            // SAFETY: kill takes plain numbers. The child has not been waited for, so the number is its own.
            unsafe { libc::kill(pid, signal) };
            continue;
        }
        if let Some(status) = reap(pid)? {
            return Ok(status);
        }
    }
}

/// Reaps all children that have ended, and returns the status if `pid` is among them. One SIGCHLD may stand for several.
fn reap(pid: libc::pid_t) -> io::Result<Option<ExitStatus>> {
    use std::os::unix::process::ExitStatusExt;
    let mut status = None;
    loop {
        let mut raw = 0;
        // SAFETY: `raw` is a live integer.
        match unsafe { libc::waitpid(-1, &raw mut raw, libc::WNOHANG) } {
            0 => return Ok(status),
            n if n == pid => status = Some(ExitStatus::from_raw(raw)),
            n if n > 0 => {}
            _ => {
                let e = io::Error::last_os_error();
                return match e.raw_os_error() {
                    // No child is left.
                    Some(libc::ECHILD) => Ok(status),
                    Some(libc::EINTR) => continue,
                    _ => Err(e),
                };
            }
        }
    }
}

fn empty_set() -> io::Result<libc::sigset_t> {
    // SAFETY: a signal set is plain bits; sigemptyset then gives it its defined empty value.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: `set` is live for the call.
    let r = unsafe { libc::sigemptyset(&raw mut set) };
    if r == 0 { Ok(set) } else { Err(io::Error::last_os_error()) }
}

fn signals() -> io::Result<libc::sigset_t> {
    let mut set = empty_set()?;
    let mut r = 0;
    for signal in FORWARDED.into_iter().chain([libc::SIGCHLD]) {
        // SAFETY: `set` is live and initialized; the numbers are constants of the system.
        r |= unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    if r == 0 { Ok(set) } else { Err(io::Error::last_os_error()) }
}
