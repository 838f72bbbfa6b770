//! Linux: loop devices, mounts, the jail, processes and descriptors.
//!
//! ```text
//!   driver ──► loopdev   file → /dev/loopN        svm::embedded ──► process  starts, watches and kills workers
//!          ──► mount     ext4, bind, sync …                     ──► fdpass   SCM_RIGHTS over a socketpair
//!          ──► freeze    freezes file systems, thaws them
//!          ──► reflink   file copies that share blocks
//!          ──► space     enlarges mounted file systems, gives unused space back
//!          ──► overlay   many lowers, two mount APIs    worker ──► jail     confines a worker from inside
//!          ──► idmap     mounts with shifted ids               ──► seccomp  its system-call filter
//!          ──► mountinfo the kernel's mount table              ──► probe    attempts what the jail forbids
//!   store  ──► tree      deletes directories, but nothing mounted
//!   cli    ──► init      pid 1 of a container        svm::qemu ──► launch   confines a process, then executes QEMU
//!                                                   lcow-agent ──► guest    mounts, modules, clock, entropy, reboot
//!                                                              ──► vsock    connects to the host (Hyper-V, virtio)
//!                                                              ──► nbd      a block device served by this process
//!                                                              ──► byhandle a mounted ext4 by inode number
//!                                               tests/power    ──► power    shuts file systems down, skips syncs
//! ```
//!
//! Errors are [`SysError`]: the attempted action, its object, and the kernel's error.

#[cfg(feature = "tokio")]
pub mod asyncfd;
pub mod byhandle;
pub mod fdpass;
pub mod freeze;
pub mod guest;
pub mod idmap;
pub mod init;
pub mod jail;
pub mod launch;
pub mod loopdev;
pub mod mount;
pub mod mountinfo;
pub mod nbd;
pub mod overlay;
#[cfg(any(test, feature = "testing"))]
pub mod power;
pub mod probe;
pub mod process;
pub mod reflink;
mod seccomp;
pub mod space;
pub mod tree;
pub mod vsock;

use rustix::thread::UnshareFlags;
use std::{
    io,
    path::{Path, PathBuf},
};

/// A failed system call: the attempted action, its object, and the kernel's error.
#[derive(Debug, thiserror::Error)]
pub enum SysError {
    /// The kernel returned an error.
    #[error("{action} {}", subject.display())]
    Os {
        /// The attempted action as a verb phrase ("mount ext4 on").
        action: &'static str,
        /// The path or name of its object.
        subject: PathBuf,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The request cannot be passed to the kernel (too long, a NUL in a name, …).
    #[error("{action} {}: {reason}", subject.display())]
    Usage {
        /// The requested action as a verb phrase.
        action: &'static str,
        /// The path or name of its object.
        subject: PathBuf,
        /// Why it cannot be done.
        reason: String,
    },
}

impl SysError {
    /// The kernel's error number; `None` if there was no system call.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Os { source, .. } => source.raw_os_error(),
            Self::Usage { .. } => None,
        }
    }

    pub(crate) fn usage(action: &'static str, subject: &Path, reason: impl Into<String>) -> Self {
        Self::Usage { action, subject: subject.into(), reason: reason.into() }
    }
}

/// Adds the attempted action and its object to a system error.
pub(crate) trait Context<T> {
    fn context(self, action: &'static str, subject: impl AsRef<Path>) -> Result<T, SysError>;
}

/// Checks that this process has one thread, for functions that are sound only then.
///
/// # Errors
/// There are more threads, or the kernel does not say.
pub(crate) fn single_thread() -> io::Result<()> {
    let several = || io::Error::other("the process has more than one thread");
    match std::fs::read_dir("/proc/self/task") {
        Ok(threads) => match threads.count() {
            1 => Ok(()),
            _ => Err(several()),
        },
        // Without /proc: this flag changes nothing, and the kernel refuses it to a process of several threads.
        // SAFETY: for a process of one thread CLONE_THREAD has no effect, unshare(2).
        Err(_) => {
            match unsafe { rustix::thread::unshare_unsafe(UnshareFlags::from_bits_retain(CLONE_THREAD)) } {
                Err(rustix::io::Errno::INVAL) => Err(several()),
                other => other.map_err(io::Error::from),
            }
        }
    }
}

/// `CLONE_THREAD`, `include/uapi/linux/sched.h`.
const CLONE_THREAD: u32 = libc::CLONE_THREAD.cast_unsigned();

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, action: &'static str, subject: impl AsRef<Path>) -> Result<T, SysError> {
        self.map_err(|e| SysError::Os { action, subject: subject.as_ref().into(), source: e.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_of_several_threads_is_recognized() {
        // The test runner has a thread of its own beside this one.
        assert!(single_thread().unwrap_err().to_string().contains("more than one thread"));
        let error = init::supervise(&mut std::process::Command::new("true")).unwrap_err();
        assert!(error.to_string().contains("more than one thread"), "{error}");
    }
}
