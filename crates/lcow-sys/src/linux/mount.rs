//! Mounting and unmounting, propagation, syncing.
//!
//! ```text
//!   /dev/loopN ──mount_ext4──► l/<n> ──overlay──► <id>/merged
//! ```
//!
//! Called by `driver`; `freeze` has what stops a mounted file system.

use super::{Context, SysError};
use rustix::{
    fs::{Mode, OFlags},
    mount::{MountFlags, MountPropagationFlags, UnmountFlags},
};
use std::{ffi::CString, io, os::fd::OwnedFd, path::Path, time::Duration};

/// How an ext4 is mounted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ext4Options {
    /// Read-only; with a dirty journal the kernel still replays it, unless `noload`.
    pub read_only: bool,
    /// Deleted blocks are discarded, so a sparse backing file shrinks.
    pub discard: bool,
    /// The journal is not replayed (only sensible read-only).
    pub noload: bool,
    /// Access times are not written.
    pub noatime: bool,
    /// Device nodes on it don't work (through *this* mount; an overlay above has flags of its own).
    pub nodev: bool,
    /// Set-user-id bits on it don't work (through *this* mount).
    pub nosuid: bool,
    /// Programs on it can't be started (through *this* mount).
    pub noexec: bool,
}

/// Mounts the ext4 on block device `device` at the folder `target`.
///
/// # Errors
/// [`SysError::Os`]; `EUCLEAN`/`EINVAL` mean that the kernel refuses the file system.
pub fn mount_ext4(device: &Path, target: &Path, options: Ext4Options) -> Result<(), SysError> {
    let mut flags = MountFlags::empty();
    for (on, flag) in [
        (options.read_only, MountFlags::RDONLY),
        (options.noatime, MountFlags::NOATIME),
        (options.nodev, MountFlags::NODEV),
        (options.nosuid, MountFlags::NOSUID),
        (options.noexec, MountFlags::NOEXEC),
    ] {
        if on {
            flags |= flag;
        }
    }
    // An error on a container's disk must neither stop the host (errors=panic in a hostile super block) nor go on.
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

/// How often and how long apart a busy mount is tried again: a child between fork and exec holds copies of all our
/// descriptors for a moment, and a mount is not in use because of that.
const BUSY_ATTEMPTS: u32 = 20;
const BUSY_PAUSE: Duration = Duration::from_millis(2);

/// Unmounts `target`. With `detach` it vanishes from the tree at once, and for good when its last user is gone;
/// without, a busy one is tried again for at most 40 ms.
///
/// # Errors
/// [`SysError::Os`]: `EBUSY` while in use (without `detach`), `EINVAL` if it is no mount point.
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

/// Makes the mount at `target` read-only or read-write without touching its file system.
///
/// # Errors
/// [`SysError::Os`].
pub fn remount_read_only(target: &Path, read_only: bool) -> Result<(), SysError> {
    let mut flags = MountFlags::BIND;
    if read_only {
        flags |= MountFlags::RDONLY;
    }
    rustix::mount::mount_remount(target, flags, c"").context("remount", target)
}

/// No mount event leaves or enters `target`.
///
/// # Errors
/// [`SysError::Os`]: `EINVAL` if it is no mount point.
pub fn make_private(target: &Path) -> Result<(), SysError> {
    rustix::mount::mount_change(target, MountPropagationFlags::PRIVATE).context("make private", target)
}

/// Mount events below `target` go to all its peers.
///
/// # Errors
/// As [`make_private`].
pub fn make_shared(target: &Path) -> Result<(), SysError> {
    rustix::mount::mount_change(target, MountPropagationFlags::SHARED).context("make shared", target)
}

/// Mount events come in from the former peers but none go out.
///
/// # Errors
/// As [`make_private`].
pub fn make_slave(target: &Path) -> Result<(), SysError> {
    rustix::mount::mount_change(target, MountPropagationFlags::DOWNSTREAM).context("make slave", target)
}

pub(super) fn open_folder(path: &Path) -> Result<OwnedFd, SysError> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .context("open", path)
}

/// Writes all dirty data of the file system at `path` to its device.
///
/// # Errors
/// [`SysError::Os`], write-back errors included.
pub fn syncfs(path: &Path) -> Result<(), SysError> {
    rustix::fs::syncfs(open_folder(path)?).context("sync", path)
}

/// Room of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes in all.
    pub total: u64,
    /// Bytes free, those kept for root included.
    pub free: u64,
    /// Bytes that an ordinary user may still write.
    pub available: u64,
    /// Inodes in all (0 where the file system has no fixed number).
    pub inodes: u64,
    /// Inodes free.
    pub inodes_free: u64,
}

/// How much room the file system at `path` has.
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
