//! Mounts and unmounts, syncs, and reads free space.
//!
//! ```text
//!   /dev/loopN ──mount_ext4──► l/<n> ──overlay──► <id>/merged
//! ```
//!
//! Called by `driver` and `cli`. Freezing is in `freeze`.

use super::{Context, SysError};
use rustix::{
    fs::{Mode, OFlags},
    mount::{MountFlags, OpenTreeFlags, UnmountFlags},
};
use std::{ffi::CString, io, os::fd::OwnedFd, path::Path, time::Duration};

/// How an ext4 is mounted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ext4Options {
    /// Read-only. The kernel still replays a dirty journal, unless `noload` is set.
    pub read_only: bool,
    /// Discard deleted blocks, so that a sparse backing file shrinks.
    pub discard: bool,
    /// Do not replay the journal (useful only with `read_only`).
    pub noload: bool,
    /// Do not write access times.
    pub noatime: bool,
    /// Device nodes do not work (through *this* mount; an overlay on it has its own flags).
    pub nodev: bool,
    /// Set-user-id bits have no effect (through *this* mount).
    pub nosuid: bool,
}

/// Mounts the ext4 on block device `device` at the directory `target`.
///
/// # Errors
/// [`SysError::Os`]: `EUCLEAN` and `EINVAL` mean that the kernel refuses the file system.
pub fn mount_ext4(device: &Path, target: &Path, options: Ext4Options) -> Result<(), SysError> {
    let mut flags = MountFlags::empty();
    for (on, flag) in [
        (options.read_only, MountFlags::RDONLY),
        (options.noatime, MountFlags::NOATIME),
        (options.nodev, MountFlags::NODEV),
        (options.nosuid, MountFlags::NOSUID),
    ] {
        if on {
            flags |= flag;
        }
    }
    // After an error, the host must neither panic (errors=panic in a hostile super block) nor continue to write.
    let mut data = vec!["errors=remount-ro"];
    if options.discard {
        data.push("discard");
    }
    if options.noload {
        data.push("noload");
    }
    let data = CString::new(data.join(",")).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let data = data.context("mount ext4 on", target)?;
    rustix::mount::mount(device, target, c"ext4", flags, Some(data.as_c_str()))
        .context("mount ext4 on", target)
}

/// Retries of a busy unmount, and the pause between them: a child between fork and exec briefly holds copies of all
/// descriptors, which does not mean that the mount is in use.
const BUSY_ATTEMPTS: u32 = 20;
const BUSY_PAUSE: Duration = Duration::from_millis(2);

/// Unmounts `target`. With `detach` it disappears from the tree immediately, and ends with its last user; without, a busy
/// mount is retried for at most 40 ms.
///
/// # Errors
/// [`SysError::Os`]: `EBUSY` while in use (without `detach`), `EINVAL` if it is not a mount point.
pub fn umount(target: &Path, detach: bool) -> Result<(), SysError> {
    let mut flags = UnmountFlags::NOFOLLOW;
    if detach {
        flags |= UnmountFlags::DETACH;
    }
    for _ in 0..BUSY_ATTEMPTS {
        match rustix::mount::unmount(target, flags) {
            Err(rustix::io::Errno::BUSY) => std::thread::sleep(BUSY_PAUSE),
            other => return other.context("unmount", target),
        }
    }
    rustix::mount::unmount(target, flags).context("unmount", target)
}

/// Bind-mounts `source` at `target`.
///
/// # Errors
/// [`SysError::Os`].
pub fn bind(source: &Path, target: &Path) -> Result<(), SysError> {
    rustix::mount::mount_bind(source, target).context("bind-mount on", target)
}

/// A second mount of what is mounted at `target`, attached nowhere: it keeps the file system alive until it is closed.
///
/// # Errors
/// [`SysError::Os`]: `ENOSYS` before Linux 5.2.
pub fn reference(target: &Path) -> Result<OwnedFd, SysError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(rustix::fs::CWD, target, flags).context("clone the mount", target)
}

pub(super) fn open_directory(path: &Path) -> Result<OwnedFd, SysError> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .context("open", path)
}

/// Writes all dirty data of the file system at `path` to its device.
///
/// # Errors
/// [`SysError::Os`], also for write-back errors.
pub fn syncfs(path: &Path) -> Result<(), SysError> {
    rustix::fs::syncfs(open_directory(path)?).context("sync", path)
}

/// Size and free space of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Total bytes.
    pub total: u64,
    /// Free bytes, including those reserved for root.
    pub free: u64,
    /// Bytes available to an ordinary user.
    pub available: u64,
    /// Total inodes; 0 if the file system has no fixed number.
    pub inodes: u64,
    /// Free inodes.
    pub inodes_free: u64,
}

/// Size and free space of the file system at `path`.
///
/// # Errors
/// [`SysError::Os`].
pub fn space(path: &Path) -> Result<Space, SysError> {
    let s = rustix::fs::statvfs(path).context("read free space of", path)?;
    let unit = if s.f_frsize == 0 { s.f_bsize } else { s.f_frsize };
    Ok(Space {
        total: s.f_blocks.saturating_mul(unit),
        free: s.f_bfree.saturating_mul(unit),
        available: s.f_bavail.saturating_mul(unit),
        inodes: s.f_files,
        inodes_free: s.f_ffree,
    })
}
