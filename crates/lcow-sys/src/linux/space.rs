//! Room of mounted file systems: more of it, and what is not used given back.
//!
//! ```text
//!   longer file ─► loop device (`LoopDevice::set_sizelimit`) ─► EXT4_IOC_RESIZE_FS      more blocks, while it is mounted
//!   free blocks ─► FITRIM ─► loop device ─► holes in the file
//! ```
//!
//! Called by `driver`.

use super::{Context, SysError, mount::open_directory};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::Path,
};

/// `EXT4_IOC_RESIZE_FS`, `_IOW('f', 16, __u64)`, `fs/ext4/ext4.h`.
const EXT4_IOC_RESIZE_FS: u64 = 0x4008_6610;
/// `FITRIM`, `_IOWR('X', 121, struct fstrim_range)`, `include/uapi/linux/fs.h`.
const FITRIM: u64 = 0xC018_5879;

/// `struct fstrim_range`.
#[repr(C)]
struct FstrimRange {
    start: u64,
    len: u64,
    minlen: u64,
}

const _: () = assert!(size_of::<FstrimRange>() == 24);

fn resize(directory: BorrowedFd<'_>, blocks: u64) -> io::Result<()> {
    // SAFETY: EXT4_IOC_RESIZE_FS reads a `__u64`, which is live.
    let r =
        unsafe { libc::ioctl(directory.as_raw_fd(), EXT4_IOC_RESIZE_FS as libc::Ioctl, &raw const blocks) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets the ext4 that is mounted on `directory` have `blocks` blocks; its device must be that large.
///
/// # Errors
/// [`SysError::Os`]: `EPERM` without `CAP_SYS_RESOURCE`, `EOPNOTSUPP` for a file system with sparse_super2.
pub fn resize_ext4(directory: &Path, blocks: u64) -> Result<(), SysError> {
    let opened = open_directory(directory)?;
    resize(opened.as_fd(), blocks).context("enlarge the file system on", directory)
}

/// Gives the blocks that the file system mounted on `directory` does not use back to its device. Returns how many bytes
/// it told the device of: those that it has told before may be left out.
///
/// # Errors
/// [`SysError::Os`]: `EOPNOTSUPP` if the device cannot take blocks back.
pub fn trim(directory: &Path) -> Result<u64, SysError> {
    let opened = open_directory(directory)?;
    let mut range = FstrimRange { start: 0, len: u64::MAX, minlen: 0 };
    // SAFETY: FITRIM reads and writes a `struct fstrim_range`, which is live and referenced only here.
    let r = unsafe { libc::ioctl(opened.as_fd().as_raw_fd(), FITRIM as libc::Ioctl, &raw mut range) };
    if r < 0 {
        return Err(io::Error::last_os_error()).context("give unused space back from", directory);
    }
    Ok(range.len)
}
