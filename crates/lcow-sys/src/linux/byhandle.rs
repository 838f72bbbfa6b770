//! A mounted ext4, looked at by inode number.
//!
//! ```text
//!   device ─fsopen, fsmount─► a mount without a place ─open_by_handle_at(inode)─► descriptor ─► statx, getdents, FIEMAP …
//! ```
//!
//! The mount is read-only, nosuid, nodev and noexec, and nowhere in the tree of names; it goes with the [`Tree`] and the
//! last file opened from it. An inode is opened by the handle that an NFS server would use, with generation 0, which
//! ext4 takes for any. Needs `CAP_SYS_ADMIN`, `CAP_DAC_READ_SEARCH` and /proc. Called by `agent::mount` in a guest.

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
/// Extents asked for at once.
const EXTENTS: usize = 64;
/// Bytes of names asked for at once.
const NAMES: usize = 64 << 10;
/// `XATTR_SIZE_MAX` and `XATTR_LIST_MAX`.
const XATTR_MAX: usize = 64 << 10;

const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

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

/// An inode's metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Type and permissions.
    pub mode: u16,
    /// Names.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Last change of data: seconds since 1970, nanoseconds.
    pub mtime: (i64, u32),
    /// Last change of the inode.
    pub ctime: (i64, u32),
    /// Major and minor number of a device.
    pub rdev: (u32, u32),
    /// The kernel can't show what is in it: it is encrypted.
    pub encrypted: bool,
}

/// A name of a folder.
#[derive(Debug)]
pub struct Name<'a> {
    /// Its bytes.
    pub name: &'a [u8],
    /// Its inode.
    pub ino: u64,
    /// Its type; unknown where the folder does not tell.
    pub kind: FileType,
}

/// A mounted file system.
#[derive(Debug)]
pub struct Tree {
    /// Its root: what stands for the mount itself takes no look-ups.
    root: OwnedFd,
    _mount: Option<OwnedFd>,
}

impl Tree {
    /// Mounts the ext4 on `device`. Its journal is replayed, to the device.
    ///
    /// # Errors
    /// [`SysError::Os`]: what the kernel says; its log says more.
    pub fn mount(device: &Path) -> Result<Self, SysError> {
        let action = "mount ext4 from";
        let fs = fsopen("ext4", FsOpenFlags::FSOPEN_CLOEXEC).context(action, device)?;
        fsconfig_set_string(fs.as_fd(), "source", device).context(action, device)?;
        fsconfig_set_flag(fs.as_fd(), "ro").context(action, device)?;
        // What its super block asks for (`errors=panic`) is not to be had.
        fsconfig_set_string(fs.as_fd(), "errors", "remount-ro").context(action, device)?;
        fsconfig_create(fs.as_fd()).context(action, device)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOATIME;
        let mount = fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).context(action, device)?;
        let root =
            rustix::fs::openat(&mount, c".", FOLDER, Mode::empty()).context("open the root of", device)?;
        Ok(Self { root, _mount: Some(mount) })
    }

    /// The ext4 in which `folder` lies.
    ///
    /// # Errors
    /// [`SysError::Os`].
    pub fn of(folder: &Path) -> Result<Self, SysError> {
        let root = rustix::fs::open(folder, FOLDER, Mode::empty()).context("open", folder)?;
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
        // SAFETY: the kernel just gave this descriptor, and nobody else has it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    /// An inode's metadata.
    ///
    /// # Errors
    /// `ESTALE` if there is none of this number, `EUCLEAN` and `EBADMSG` if it is damaged.
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

    /// Calls `visit` for each name of a folder but `.` and `..`.
    ///
    /// # Errors
    /// What the kernel says, as `E`; what `visit` gives back.
    pub fn visit_dir<E: From<io::Error>>(
        &self,
        ino: u32,
        mut visit: impl FnMut(Name<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let folder = self.open(ino, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut buffer = vec![MaybeUninit::uninit(); NAMES];
        let mut names = RawDir::new(&folder, &mut buffer);
        while let Some(entry) = names.next() {
            let entry = entry.map_err(io::Error::from)?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            if entry.file_type() == FileType::Directory {
                // A folder that the kernel has never met by its name is searched for in its parent when it is opened by its
                // number, through all names; met once, it is known. One that can't be met fails when it is opened.
                let _ = rustix::fs::statx(&folder, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::INO);
            }
            visit(Name { name: name.to_bytes(), ino: entry.ino(), kind: entry.file_type() })?;
        }
        Ok(())
    }

    /// What a symbolic link points to.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read_link(&self, ino: u32) -> io::Result<Vec<u8>> {
        let node = self.open(ino, OFlags::PATH)?;
        Ok(rustix::fs::readlinkat(&node, c"", Vec::new())?.into_bytes())
    }

    /// All extended attributes: names and values.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn xattrs(&self, ino: u32) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let node = self.open(ino, OFlags::PATH)?;
        // Such a descriptor takes no calls but through its name here, which leads to the inode itself, links included.
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

    /// Opens a regular file.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open_file(&self, ino: u32) -> io::Result<File> {
        self.open(ino, OFlags::RDONLY).map(File::from)
    }
}

/// The ranges (offset, length) of an ext4 file that hold data, at most `most`; what is only reserved holds none. Not
/// `SEEK_DATA`: that takes reserved blocks for data once somebody has read them.
///
/// # Errors
/// What the kernel says; `FileTooLarge` for more ranges.
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
