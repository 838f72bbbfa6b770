//! Linux: loop devices, mounts, the jail, processes and descriptors.
//!
//! ```text
//!   driver ──► loopdev   file → /dev/loopN          svm::embedded ──► process  start, watch and kill a worker
//!          ──► mount     ext4, bind, sync …                        ──► fdpass   SCM_RIGHTS over a socketpair
//!          ──► freeze    stops a file system, and thaws it
//!          ──► reflink   a copy of a file that shares its blocks
//!          ──► overlay   many lowers, two ways       agent (worker) ──► jail     what a worker does to itself
//!          ──► idmap     shifted views of a mount                  ──► seccomp  its system-call filter
//!          ──► mountinfo the kernel's mount table                  ──► probe    tries what the jail forbids
//!   store  ──► tree      deletes folders, never what is mounted
//!   cli ─────► init      pid 1 of a container           svm::qemu ────► launch   confines a VM's process, then starts it
//!                                                   lcow-agent ───► guest    what the first process of a guest does
//!                                                              ───► vsock    its way to a host that is Hyper-V
//!                                                              ───► nbd      a block device out of this process
//!                                                              ───► byhandle a mounted ext4 by inode number
//! ```
//!
//! Errors are [`SysError`]: what was tried, on what, and the kernel's answer.

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
pub mod probe;
pub mod process;
pub mod reflink;
mod seccomp;
pub mod tree;
pub mod vsock;

use std::{
    io,
    path::{Path, PathBuf},
};

/// A system call that failed: what was tried, on which object, and the kernel's answer.
#[derive(Debug, thiserror::Error)]
pub enum SysError {
    /// The kernel said no.
    #[error("{action} {}", subject.display())]
    Os {
        /// What was tried, as a verb phrase ("mount ext4 on").
        action: &'static str,
        /// The path or name it was tried on.
        subject: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The request can't be put to the kernel at all (too long, a NUL in a name, …).
    #[error("{action} {}: {reason}", subject.display())]
    Usage {
        /// What was asked for.
        action: &'static str,
        /// The path or name it was asked for.
        subject: PathBuf,
        /// Why it can't be done.
        reason: String,
    },
}

impl SysError {
    /// The kernel's error number, if the kernel was asked.
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

/// Adds what was tried to a bare system error.
pub(crate) trait Context<T> {
    fn context(self, action: &'static str, subject: impl AsRef<Path>) -> Result<T, SysError>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, action: &'static str, subject: impl AsRef<Path>) -> Result<T, SysError> {
        self.map_err(|e| SysError::Os { action, subject: subject.as_ref().into(), source: e.into() })
    }
}
