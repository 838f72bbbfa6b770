//! Worker processes: starts, watches and kills them; finds out whether a file has writers.
//!
//! ```text
//!   spawner thread ── posix_spawn(program worker), descriptor 0 = control socket, 2 = pipe ──► child
//!   WorkerProcess { pidfd } ── poll: ended? ── kill ── reap          (never by number, which could be reused)
//! ```
//!
//! All workers are started by one thread that runs as long as this process: a worker is killed when its parent *thread*
//! ends (`PR_SET_PDEATHSIG`), and the threads of a runtime come and go. Called by `svm::embedded`.

use super::fdpass;
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid},
};
use std::{
    ffi::OsString,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    process::{ChildStderr, Command, Stdio},
    sync::{OnceLock, mpsc},
};

/// A worker to start.
#[derive(Debug, Clone)]
pub struct WorkerCommand {
    /// Path of the program; `/proc/self/exe` for this one.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Its complete environment.
    pub env: Vec<(OsString, OsString)>,
}

/// A started worker. Dropping it kills and reaps the process.
#[derive(Debug)]
pub struct WorkerProcess {
    pid: Pid,
    pidfd: OwnedFd,
    reaped: bool,
    /// The daemon's end of the control socket ([`fdpass::message_pair`]); the other end is the worker's descriptor 0.
    pub control: Option<OwnedFd>,
    /// The worker's standard error, unless it has this process's.
    pub stderr: Option<ChildStderr>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this status.
    Exit(i32),
    /// It was ended by this signal.
    Signal(i32),
    /// Unknown, because something else reaped it.
    Unknown,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exit(status) => write!(f, "exit status {status}"),
            Self::Signal(libc::SIGSYS) => f.write_str("killed by its system-call filter (SIGSYS)"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Unknown => f.write_str("ended"),
        }
    }
}

type Order = (WorkerCommand, Box<dyn FnOnce(io::Result<WorkerProcess>) + Send>);

/// Starts a worker on the spawner thread; `done` is called there with the result.
///
/// # Errors
/// Only if the spawner thread cannot be started; all other errors go to `done`.
pub fn spawn_worker(
    command: WorkerCommand,
    done: impl FnOnce(io::Result<WorkerProcess>) + Send + 'static,
) -> io::Result<()> {
    static SPAWNER: OnceLock<mpsc::Sender<Order>> = OnceLock::new();
    let sender = if let Some(s) = SPAWNER.get() {
        s
    } else {
        let (sender, orders) = mpsc::channel::<Order>();
        std::thread::Builder::new().name("svm-spawner".into()).spawn(move || {
            for (command, done) in orders {
                done(start(&command, false));
            }
        })?;
        // The thread of a concurrent first call ends when its sender is dropped here.
        SPAWNER.get_or_init(|| sender)
    };
    sender.send((command, Box::new(done))).map_err(|_| io::Error::other("the spawner thread is gone"))
}

/// Starts a worker with this process's standard output and error. It is killed when the calling thread ends, so that this is
/// for commands, which wait for it where they started it.
///
/// # Errors
/// The program cannot be started, or there are no descriptors.
pub fn start_attached(command: &WorkerCommand) -> io::Result<WorkerProcess> {
    start(command, true)
}

fn start(command: &WorkerCommand, attached: bool) -> io::Result<WorkerProcess> {
    let (ours, theirs) = fdpass::message_pair()?;
    let stdio = |own: Stdio| if attached { Stdio::inherit() } else { own };
    let mut child = Command::new(&command.program)
        .args(&command.args)
        .env_clear()
        .envs(command.env.iter().map(|(k, v)| (k, v)))
        .current_dir("/")
        .stdin(Stdio::from(theirs))
        .stdout(stdio(Stdio::null()))
        .stderr(stdio(Stdio::piped()))
        .spawn()?;
    let stderr = child.stderr.take();
    let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else {
        let _ = child.kill();
        let _ = child.wait();
        return Err(io::Error::other("process without a number"));
    };
    match pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(pidfd) => Ok(WorkerProcess { pid, pidfd, reaped: false, control: Some(ours), stderr }),
        Err(e) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(e.into())
        }
    }
}

impl WorkerProcess {
    /// Its process id, for logs and tests.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// A descriptor that becomes readable when the process has ended.
    ///
    /// # Errors
    /// No descriptor is available (`EMFILE`).
    pub fn end_watch(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// Kills it, if it has not ended.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Reaps it and returns how it ended, if it has.
    pub fn try_reap(&mut self) -> Option<Ended> {
        if self.reaped {
            return Some(Ended::Unknown);
        }
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
            Ok(None) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => None,
            Ok(Some(status)) => {
                self.reaped = true;
                Some(match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => Ended::Exit(code),
                    (_, Some(signal)) => Ended::Signal(signal),
                    _ => Ended::Unknown,
                })
            }
            Err(_) => {
                self.reaped = true;
                Some(Ended::Unknown)
            }
        }
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Ended {
        loop {
            if let Some(ended) = self.try_reap() {
                return ended;
            }
            // Interrupted or not, the next turn looks again.
            let _ = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], None);
        }
    }

    /// Kills it and waits for its end.
    pub fn kill_and_reap(&mut self) -> Ended {
        self.kill();
        self.wait()
    }
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        if !self.reaped {
            self.kill_and_reap();
        }
    }
}

/// Whether the other end of a socket is closed, or will send no more.
pub fn peer_gone(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut fds, Some(&now)), Ok(n) if n > 0)
        && fds[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)
}

/// Whether `file` is open for writing.
///
/// # Errors
/// fcntl(2).
pub fn is_writable(file: BorrowedFd<'_>) -> io::Result<bool> {
    use rustix::fs::OFlags;
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(flags & OFlags::RWMODE != OFlags::RDONLY)
}

/// Opens the inode of an open file again, read-only, whatever its path is now.
///
/// # Errors
/// There is no /proc, or no permission to read the file.
pub fn reopen_read_only(file: BorrowedFd<'_>) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// fcntl(2); libc lacks it.
const F_SETSIG: libc::c_int = 10;

/// Whether any process (including this one) has the inode of `file` open for writing. The kernel refuses a read lease while
/// there is a writer, fcntl(2) `F_SETLEASE`; a granted lease is returned immediately. Requires ownership of the file or
/// `CAP_LEASE`.
///
/// # Errors
/// `EINVAL` if the file system has no leases, `EACCES` without permission; as [`reopen_read_only`].
pub fn has_writers(file: &File) -> io::Result<bool> {
    // A read lease needs a descriptor that is not writable.
    let probe = reopen_read_only(file.as_fd())?;
    // If something opens the file for writing meanwhile, the kernel signals the lease holder: by default with SIGIO, which
    // ends a process. SIGURG is ignored by default.
    // SAFETY: F_SETSIG takes a plain number; `probe` is open for the whole call.
    if unsafe { libc::fcntl(probe.as_raw_fd(), F_SETSIG, libc::SIGURG) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: F_SETLEASE takes a plain number; `probe` is open for the whole call.
    let r = unsafe { libc::fcntl(probe.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) };
    if r < 0 {
        let e = io::Error::last_os_error();
        return if e.raw_os_error() == Some(libc::EAGAIN) { Ok(true) } else { Err(e) };
    }
    // SAFETY: as above.
    unsafe { libc::fcntl(probe.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
    Ok(false)
}

/// Whether the inode of `file` is open anywhere but in the open file description of `file`, which must be writable. The
/// kernel refuses a write lease then, fcntl(2) `F_SETLEASE`; a granted lease is returned immediately.
///
/// # Errors
/// As [`has_writers`].
pub fn is_open_elsewhere(file: &File) -> io::Result<bool> {
    // As in `has_writers`: no process ends by the kernel's signal.
    // SAFETY: F_SETSIG takes a plain number; `file` is open for the whole call.
    if unsafe { libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: F_SETLEASE takes a plain number; `file` is open for the whole call.
    let r = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) };
    if r < 0 {
        let e = io::Error::last_os_error();
        return if e.raw_os_error() == Some(libc::EAGAIN) { Ok(true) } else { Err(e) };
    }
    // SAFETY: as above.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_file_that_is_open_twice_is_open_elsewhere() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let first = File::options().read(true).write(true).open(file.path()).unwrap();
        assert!(is_open_elsewhere(&first).unwrap(), "the temporary file's own descriptor");
        let path = file.into_temp_path();
        // A child that another test has just forked may hold a descriptor for a moment.
        let begin = std::time::Instant::now();
        while is_open_elsewhere(&first).unwrap() {
            assert!(begin.elapsed() < std::time::Duration::from_mins(1));
            std::thread::yield_now();
        }
        let shared = first.try_clone().unwrap();
        let second = File::open(&path).unwrap();
        assert!(is_open_elsewhere(&first).unwrap(), "a reader");
        drop((second, shared));
    }

    #[test]
    fn a_writer_that_comes_while_the_lease_is_held_ends_no_process() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let held = reopen_read_only(file.as_file().as_fd()).unwrap();
        let done = AtomicBool::new(false);
        let path = file.into_temp_path();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                use std::os::unix::fs::OpenOptionsExt;
                // Non-blocking: the open fails with EWOULDBLOCK where it breaks a lease, and the holder is signalled.
                let mut options = File::options();
                options.write(true).custom_flags(libc::O_NONBLOCK);
                while !done.load(Ordering::Relaxed) {
                    drop(options.open(&path));
                }
            });
            for _ in 0..5_000 {
                has_writers(&held).unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
        // No writer, then one in this process.
        assert!(!has_writers(&held).unwrap());
        let writer = File::options().write(true).open(&path).unwrap();
        assert!(has_writers(&held).unwrap());
        drop(writer);
    }
}
