//! Copies of files that share their blocks (reflinks): of XFS and btrfs, made in a moment whatever the size.
//!
//! ```text
//!   sandbox.vhd ──FICLONE──► a file of the same file system; what is written to either is its own from then on
//! ```
//!
//! Called by `driver`.

use super::{Context, SysError};
use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, BorrowedFd},
    path::Path,
};

/// `_IOW(0x94, 9, int)`, `include/uapi/linux/fs.h`.
const FICLONE: u64 = 0x4004_9409;

/// Makes `to`, an empty file open for writing, a copy of `from` on the same file system. Dirty pages of `from` are
/// written back first.
///
/// # Errors
/// `EOPNOTSUPP` where the file system has no reflinks, `EXDEV` for two file systems, and what the file system says.
pub fn clone_file(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the argument of FICLONE is a number; the kernel touches no memory of ours.
    let r = unsafe { libc::ioctl(to.as_raw_fd(), FICLONE as libc::Ioctl, from.as_raw_fd()) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A new file without a name on the file system of `folder`, for reading and writing; gone when it is closed.
///
/// # Errors
/// [`SysError::Os`]; `EOPNOTSUPP` where the file system can't have such files.
pub fn nameless(folder: &Path) -> Result<File, SysError> {
    use rustix::fs::{Mode, OFlags, open};
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(open(folder, flags, Mode::RUSR | Mode::WUSR).context("make a temporary file in", folder)?.into())
}

/// Whether files of the file system of `folder` can be cloned.
pub fn works_in(folder: &Path) -> bool {
    use std::os::fd::AsFd;
    let (Ok(from), Ok(to)) = (nameless(folder), nameless(folder)) else { return false };
    clone_file(from.as_fd(), to.as_fd()).is_ok()
}
