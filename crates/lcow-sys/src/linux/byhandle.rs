//! Access to a mounted ext4 by inode number.
//!
//! ```text
//!   device ─fsopen, fsmount─► a detached mount ─open_by_handle_at(inode)─► descriptor ─► statx, getdents, FIEMAP …
//! ```
//!
//! The mount is read-only, nosuid, nodev and noexec, and not attached anywhere; it ends with the [`Tree`] and the last file
//! opened from it. An inode is opened by the handle that an NFS server would use, with generation 0, which ext4 accepts
//! for any generation. Needs `CAP_SYS_ADMIN`, `CAP_DAC_READ_SEARCH` and /proc. Called by `svm-agent` in a guest.

use super::{Context, SysError};
use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, RawDir, StatxAttributes, StatxFlags},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
        fsmount, fsopen,
    },
};
use std::{
    fs::File,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

/// `FILEID_INO32_GEN`, include/linux/exportfs.h.
const FILEID_INO32_GEN: i32 = 1;
/// `FS_IOC_FIEMAP`, include/uapi/linux/fs.h.
const FS_IOC_FIEMAP: u64 = 0xC020_660B;
/// `FIEMAP_EXTENT_LAST`.
const EXTENT_LAST: u32 = 1;
/// `FIEMAP_EXTENT_UNWRITTEN`.
const EXTENT_UNWRITTEN: u32 = 0x800;
/// Extents requested in one call.
const EXTENTS: usize = 64;
/// Size of the buffer for directory entries, in bytes.
const NAMES: usize = 64 << 10;
/// `XATTR_SIZE_MAX` and `XATTR_LIST_MAX`.
const XATTR_MAX: usize = 64 << 10;

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// `struct file_handle` with an inode and its generation.
#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    ino: u32,
    generation: u32,
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap` with room for extents.
#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [FiemapExtent; EXTENTS],
}

const _: () = assert!(size_of::<Handle>() == 16 && size_of::<FiemapExtent>() == 56);
const _: () = assert!(size_of::<Fiemap>() == 32 + EXTENTS * size_of::<FiemapExtent>());

/// An inode's metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Type and permission bits (`st_mode`).
    pub mode: u16,
    /// Number of hard links.
    pub links: u32,
    /// User id of the owner.
    pub uid: u32,
    /// Group id of the owner.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Last change of data: seconds since 1970, nanoseconds.
    pub mtime: (i64, u32),
    /// Last change of the inode: seconds since 1970, nanoseconds.
    pub ctime: (i64, u32),
    /// Major and minor number of a device.
    pub rdev: (u32, u32),
    /// Its content is encrypted, so the kernel cannot show it.
    pub encrypted: bool,
}

/// An entry of a directory.
#[derive(Debug)]
pub struct Name<'a> {
    /// Its name.
    pub name: &'a [u8],
    /// Its inode number.
    pub ino: u64,
    /// Its type; unknown if the directory does not record it.
    pub kind: FileType,
}

/// A mounted file system.
#[derive(Debug)]
pub struct Tree {
    /// Its root directory: the descriptor of the mount itself accepts no lookups.
    root: OwnedFd,
    _mount: Option<OwnedFd>,
}

impl Tree {
    /// Mounts the ext4 on `device`. The kernel replays its journal to the device.
    ///
    /// # Errors
    /// [`SysError::Os`]; the kernel log has the details.
    pub fn mount(device: &Path) -> Result<Self, SysError> {
        let action = "mount ext4 from";
        let fs = fsopen("ext4", FsOpenFlags::FSOPEN_CLOEXEC).context(action, device)?;
        fsconfig_set_string(fs.as_fd(), "source", device).context(action, device)?;
        fsconfig_set_flag(fs.as_fd(), "ro").context(action, device)?;
        // Overrides an on-disk `errors=panic`, which would take the guest down.
        fsconfig_set_string(fs.as_fd(), "errors", "remount-ro").context(action, device)?;
        fsconfig_create(fs.as_fd()).context(action, device)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOATIME;
        let mount = fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).context(action, device)?;
        let root =
            rustix::fs::openat(&mount, c".", DIRECTORY, Mode::empty()).context("open the root of", device)?;
        Ok(Self { root, _mount: Some(mount) })
    }

    /// The ext4 that contains `directory`.
    ///
    /// # Errors
    /// [`SysError::Os`].
    pub fn of(directory: &Path) -> Result<Self, SysError> {
        let root = rustix::fs::open(directory, DIRECTORY, Mode::empty()).context("open", directory)?;
        Ok(Self { root, _mount: None })
    }

    fn open(&self, ino: u32, flags: OFlags) -> io::Result<OwnedFd> {
        let mut handle = Handle { bytes: 8, kind: FILEID_INO32_GEN, ino, generation: 0 };
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        // SAFETY: `handle` has the layout of a file_handle whose size field names the eight bytes behind its head; the
        // kernel reads it during the call and keeps nothing.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                self.root.as_raw_fd(),
                &raw mut handle,
                flags.bits() as libc::c_int,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// An inode's metadata.
    ///
    /// # Errors
    /// `ESTALE` if there is no such inode, `EUCLEAN` or `EBADMSG` if it is damaged.
    pub fn stat(&self, ino: u32) -> io::Result<Stat> {
        let node = self.open(ino, OFlags::PATH)?;
        let stat = rustix::fs::statx(&node, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
        Ok(Stat {
            mode: stat.stx_mode,
            links: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            size: stat.stx_size,
            mtime: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            ctime: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
            rdev: (stat.stx_rdev_major, stat.stx_rdev_minor),
            encrypted: stat.stx_attributes.contains(StatxAttributes::ENCRYPTED),
        })
    }

    /// Calls `visit` for each entry of a directory except `.` and `..`.
    ///
    /// # Errors
    /// Errors of opening and reading the directory, as `E`; the first error of `visit`.
    pub fn visit_dir<E: From<io::Error>>(
        &self,
        ino: u32,
        mut visit: impl FnMut(Name<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let directory = self.open(ino, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut buffer = vec![MaybeUninit::uninit(); NAMES];
        let mut names = RawDir::new(&directory, &mut buffer);
        while let Some(entry) = names.next() {
            let entry = entry.map_err(io::Error::from)?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            if entry.file_type() == FileType::Directory {
                // Opening a directory by its number makes the kernel search all entries of its parent, unless a lookup by
                // name has put it into the dentry cache. If this lookup fails, so does opening the directory later.
                let _ = rustix::fs::statx(&directory, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::INO);
            }
            visit(Name { name: name.to_bytes(), ino: entry.ino(), kind: entry.file_type() })?;
        }
        Ok(())
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// As [`Tree::stat`]; `ENOENT` if the inode is not a symbolic link.
    pub fn read_link(&self, ino: u32) -> io::Result<Vec<u8>> {
        let node = self.open(ino, OFlags::PATH)?;
        Ok(rustix::fs::readlinkat(&node, c"", Vec::new())?.into_bytes())
    }

    /// All extended attributes: names and values.
    ///
    /// # Errors
    /// As [`Tree::stat`]; a file system error while attributes are read.
    pub fn xattrs(&self, ino: u32) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let node = self.open(ino, OFlags::PATH)?;
        // An O_PATH descriptor supports these calls only through its name in /proc, which denotes the inode itself, also
        // if that is a symbolic link.
        let path = format!("/proc/self/fd/{}", node.as_raw_fd());
        let mut names = vec![0; XATTR_MAX];
        let len = rustix::fs::listxattr(&*path, &mut names[..])?;
        let (mut value, mut found) = (vec![0; XATTR_MAX], Vec::new());
        for name in names[..len].split_inclusive(|b| *b == 0) {
            let name = std::ffi::CStr::from_bytes_with_nul(name).map_err(io::Error::other)?;
            let len = rustix::fs::getxattr(&*path, name, &mut value[..])?;
            found.push((name.to_bytes().to_vec(), value[..len].to_vec()));
        }
        Ok(found)
    }

    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// As [`Tree::stat`].
    pub fn open_file(&self, ino: u32) -> io::Result<File> {
        self.open(ino, OFlags::RDONLY).map(File::from)
    }
}

/// The ranges (offset, length) of an ext4 file that hold data, at most `most`. Unwritten extents hold none. `SEEK_DATA` is
/// not used, because it reports unwritten extents as data once they have been read.
///
/// # Errors
/// The error of `FS_IOC_FIEMAP`; `FileTooLarge` for more ranges.
pub fn data_ranges(file: &File, most: usize) -> io::Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut start = 0;
    loop {
        let mut map = Fiemap {
            start,
            length: u64::MAX - start,
            flags: 0,
            mapped: 0,
            count: EXTENTS as u32,
            reserved: 0,
            extents: [FiemapExtent::default(); EXTENTS],
        };
        // SAFETY: `map` has the layout of a fiemap whose count names the extents that follow; it lives through the call.
        let r = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as libc::Ioctl, &raw mut map) };
        if r < 0 {
            return Err(io::Error::last_os_error());
        }
        let extents = map.extents.get(..map.mapped as usize).unwrap_or(&[]);
        for extent in extents {
            if extent.flags & EXTENT_UNWRITTEN == 0 {
                found.push((extent.logical, extent.length));
            }
            start = extent.logical.saturating_add(extent.length);
        }
        if found.len() > most {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        if extents.last().is_none_or(|last| last.flags & EXTENT_LAST != 0 || last.length == 0) {
            return Ok(found);
        }
    }
}
