//! Copies of files that share their blocks (reflinks) on XFS and btrfs, made in constant time.
//!
//! ```text
//!   sandbox.vhd ──FICLONE──► a file of the same file system; later writes to one do not affect the other
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
/// `EOPNOTSUPP` if the file system has no reflinks, `EXDEV` for two file systems, `ENOSPC`.
pub fn clone_file(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the argument of FICLONE is a descriptor; the kernel accesses no memory of this process.
    let r = unsafe { libc::ioctl(to.as_raw_fd(), FICLONE as libc::Ioctl, from.as_raw_fd()) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Creates an unnamed file on the file system of `directory`, for reading and writing; it disappears when it is closed.
///
/// # Errors
/// [`SysError::Os`]: `EOPNOTSUPP` if the file system does not support such files.
pub fn nameless(directory: &Path) -> Result<File, SysError> {
    use rustix::fs::{Mode, OFlags, open};
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(open(directory, flags, Mode::RUSR | Mode::WUSR).context("make a temporary file in", directory)?.into())
}

/// Whether files on the file system of `directory` can be cloned.
pub fn works_in(directory: &Path) -> bool {
    use std::os::fd::AsFd;
    let (Ok(from), Ok(to)) = (nameless(directory), nameless(directory)) else { return false };
    clone_file(from.as_fd(), to.as_fd()).is_ok()
}
