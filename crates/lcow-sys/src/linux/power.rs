//! What the tests of power cuts and of failing calls ask of the kernel.
//!
//! ```text
//!   thread ─► own_mounts      a mount namespace for this thread, its later threads and processes
//!          ─► cut             a file system stops at once: nothing that was not synced gets to its device any more
//!   thread ─► Calls::watch    its later processes ask before each of some calls ─► Calls::serve: do it │ do nothing,
//!          ─► Syncs::watch    the same for syncs                                                │ return 0 or an error
//! ```
//!
//! Only for tests (feature `testing`). Sources: `fs/ext4/ioctl.c`, `fs/xfs/xfs_ioctl.c`, seccomp_unotify(2).

use super::{Context, SysError};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{FileType, Timespec},
    mount::{MountPropagationFlags, mount_change},
    thread::{UnshareFlags, set_no_new_privs},
};
use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

/// `EXT4_IOC_SHUTDOWN` and `XFS_IOC_GOINGDOWN`: both `_IOR('X', 125, __u32)`.
const SHUTDOWN: u64 = 0x8004_587D;
/// `EXT4_GOING_FLAGS_NOLOGFLUSH` and `XFS_FSOP_GOING_FLAGS_NOLOGFLUSH`: the log is not flushed. With 0 the file system
/// is frozen first, which writes everything; with 1 the log is, which hides a missing sync of a directory.
const NO_LOG_FLUSH: u32 = 2;

/// Stops the file system (ext4 or XFS) that `within` is on, as a power cut would. It must be unmounted and mounted again.
///
/// # Errors
/// [`SysError::Os`]: `ENOTTY` for other file systems, `EPERM` without `CAP_SYS_ADMIN`.
pub fn cut(within: &File, shown: &Path) -> Result<(), SysError> {
    let flags = NO_LOG_FLUSH;
    // SAFETY: the request reads a u32, which is live.
    let r = unsafe { libc::ioctl(within.as_raw_fd(), SHUTDOWN as libc::Ioctl, &raw const flags) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        .context("shut down the file system of", shown)
}

/// Gives the calling thread mounts of its own: what it, its later threads and its later processes mount ends with the
/// last of them, and is seen by no other process.
///
/// # Errors
/// [`SysError::Os`]: `EPERM` without `CAP_SYS_ADMIN`.
pub fn own_mounts() -> Result<(), SysError> {
    // SAFETY: the root and working directory are unshared, which no other thread relies on; descriptors stay shared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }
        .context("unshare the mounts of", "this thread")?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("make private", "/")
}

/// A sync that a watched process asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// `fsync` or `fdatasync` of a regular file or a device.
    File,
    /// `fsync` or `fdatasync` of a directory.
    Directory,
    /// `sync`, `syncfs`, `sync_file_range` or `msync`.
    Other,
}

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The kernel does it.
    Done,
    /// It is not done and returns 0: the process believes that it was done.
    Skipped,
    /// It is not done by the kernel and returns this number: who decides has done it in its place, or a part of it.
    Returned(usize),
    /// It is not done and fails with this error number.
    Failed(i32),
}

/// A call that a watched process asks for; the process waits meanwhile.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// The call's number.
    pub number: libc::c_long,
    /// The thread that makes it, as this process numbers threads.
    pub thread: u32,
    /// Its arguments.
    pub arguments: [u64; 6],
}

/// The receiver of the calls of watched processes.
#[derive(Debug)]
pub struct Calls(OwnedFd);

/// The receiver of the syncs of watched processes.
#[derive(Debug)]
pub struct Syncs(Calls);

const SYNC_CALLS: [libc::c_long; 6] = [
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync,
    libc::SYS_syncfs,
    libc::SYS_sync_file_range,
    libc::SYS_msync,
];

/// `SECCOMP_IOCTL_NOTIF_RECV`, `_IOWR('!', 0, struct seccomp_notif)`.
const NOTIF_RECV: u64 = 0xC050_2100;
/// `SECCOMP_IOCTL_NOTIF_SEND`, `_IOWR('!', 1, struct seccomp_notif_resp)`.
const NOTIF_SEND: u64 = 0xC018_2101;

/// The offset of the call's number in `struct seccomp_data`.
const NUMBER_AT: u32 = 0;

/// `load number; one of the calls? → USER_NOTIF; ALLOW`. Without a check of the architecture: this is no protection.
fn program(calls: &[libc::c_long]) -> Vec<libc::sock_filter> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut filter = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, NUMBER_AT)];
    for (n, call) in calls.iter().enumerate() {
        // To the last instruction, behind the remaining comparisons and ALLOW.
        let jt = (calls.len() - n) as u8;
        filter.push(libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt,
            jf: 0,
            k: *call as u32,
        });
    }
    filter.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    filter.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF));
    filter
}

impl Calls {
    /// Most calls that can be watched: the filter's jumps are that far.
    pub const MOST: usize = 255;

    /// Watches the calling thread and the processes that it starts from now on. This cannot be undone: call it in a thread
    /// that starts the process and ends. The first [`Calls::MOST`] of `calls` count.
    ///
    /// # Errors
    /// [`SysError::Os`]: the kernel has no such filters (5.5 has), or another one with a listener is there.
    pub fn watch(calls: &[libc::c_long]) -> Result<Self, SysError> {
        set_no_new_privs(true).context("set no-new-privs for", "this thread")?;
        let mut filter = program(&calls[..calls.len().min(Self::MOST)]);
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: the program is live, and its length is that of the array.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
                &raw const program,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("watch the calls of", "this thread");
        }
        // SAFETY: the kernel has just made this descriptor (with close-on-exec) for this caller.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// Decides about each call, until no watched process is left.
    ///
    /// # Errors
    /// [`SysError::Os`]: the kernel refuses to wait or to answer.
    pub fn serve(&self, mut decide: impl FnMut(&Call) -> Verdict) -> Result<(), SysError> {
        loop {
            let mut wait = [PollFd::new(&self.0, PollFlags::IN)];
            match poll(&mut wait, None::<&Timespec>) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other.context("wait for", "a call")?,
            };
            if !wait[0].revents().contains(PollFlags::IN) {
                return Ok(());
            }
            // SAFETY: all fields are numbers; the kernel demands zeros.
            let mut asked: libc::seccomp_notif = unsafe { std::mem::zeroed() };
            // SAFETY: the request writes a struct seccomp_notif, which is live.
            let r = unsafe { libc::ioctl(self.0.as_raw_fd(), NOTIF_RECV as libc::Ioctl, &raw mut asked) };
            if r < 0 {
                match io::Error::last_os_error() {
                    // It was killed meanwhile.
                    e if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => continue,
                    e => return Err(e).context("receive", "a call"),
                }
            }
            let call = Call { number: asked.data.nr.into(), thread: asked.pid, arguments: asked.data.args };
            let (val, error, flags) = match decide(&call) {
                Verdict::Done => (0, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
                Verdict::Skipped => (0, 0, 0),
                Verdict::Returned(number) => (number as i64, 0, 0),
                Verdict::Failed(number) => (0, -number, 0),
            };
            let answer = libc::seccomp_notif_resp { id: asked.id, val, error, flags };
            // SAFETY: the request reads a struct seccomp_notif_resp, which is live.
            let r = unsafe { libc::ioctl(self.0.as_raw_fd(), NOTIF_SEND as libc::Ioctl, &raw const answer) };
            if r < 0 {
                match io::Error::last_os_error() {
                    e if e.raw_os_error() == Some(libc::ENOENT) => {}
                    e => return Err(e).context("answer", "a call"),
                }
            }
        }
    }
}

impl Syncs {
    /// As [`Calls::watch`], for the calls that sync.
    ///
    /// # Errors
    /// As [`Calls::watch`].
    pub fn watch() -> Result<Self, SysError> {
        Calls::watch(&SYNC_CALLS).map(Self)
    }

    /// Decides about each sync, until no watched process is left.
    ///
    /// # Errors
    /// As [`Calls::serve`].
    pub fn serve(&self, mut decide: impl FnMut(Sync) -> Verdict) -> Result<(), SysError> {
        self.0.serve(|call| decide(kind(call)))
    }
}

/// What is to be synced: the process waits, so its descriptor is still the one that it named.
fn kind(call: &Call) -> Sync {
    if call.number != libc::SYS_fsync && call.number != libc::SYS_fdatasync {
        return Sync::Other;
    }
    let named = format!("/proc/{}/fd/{}", call.thread, call.arguments[0]);
    match rustix::fs::stat(named.as_str()).map(|s| FileType::from_raw_mode(s.st_mode)) {
        Ok(FileType::Directory) => Sync::Directory,
        _ => Sync::File,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn only_syncs_are_asked_about_and_directories_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("f"), b"x").unwrap();
        let run = |path: &Path, verdict| {
            let path = path.to_owned();
            let started = std::thread::spawn(move || {
                let syncs = Syncs::watch().unwrap();
                // coreutils' sync: fsync of each argument.
                let child = Command::new("sync").arg(path).spawn().unwrap();
                (syncs, child)
            });
            let (syncs, mut child) = started.join().unwrap();
            let mut asked = Vec::new();
            syncs
                .serve(|sync| {
                    asked.push(sync);
                    verdict
                })
                .unwrap();
            assert!(child.wait().unwrap().success());
            asked
        };
        for verdict in [Verdict::Done, Verdict::Skipped] {
            assert_eq!(run(folder.path(), verdict), [Sync::Directory]);
            assert_eq!(run(&folder.path().join("f"), verdict), [Sync::File]);
        }
        // A device has none: the call itself would fail, and that it is skipped shows in the status.
        assert_eq!(run(Path::new("/dev/null"), Verdict::Skipped), [Sync::File]);
    }

    #[test]
    fn other_file_systems_are_refused() {
        let proc = File::open("/proc").unwrap();
        assert_eq!(cut(&proc, Path::new("/proc")).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
