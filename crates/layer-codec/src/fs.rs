//! The file system of one layer: read by `ext4-image`, or by a kernel that has mounted it.
//!
//! ```text
//!                    ┌─ Own      ext4_image::Ext4 on the layer's disk    everything that this project writes
//!   view, export ─► Fs
//!                    └─ Foreign  a mount made by the caller's Mounter     a sandbox that the reader does not support
//! ```
//!
//! Both are addressed by inode number and give equal results, so a diff does not depend on the reader. A foreign one is
//! used only if the layer is a sandbox, the reader reported *unsupported* when it opened it (never *corrupt*), the sandbox
//! is not in use, and the caller gave a [`Mounter`]. Its results are untrusted, like a disk's.
//! Called by [`super::view`], [`super::export`] and [`super::stream`].

use super::DiffError;
use disk_io::ReadAt;
use ext4_image::{Ext4, Ext4Error, FileKind, Inode, Xattr};
use std::{fmt, fs::File, sync::Arc};

/// Takes a name of a directory: name, inode and, if the directory records it, file type.
pub type VisitName<'a> = &'a mut dyn FnMut(&[u8], u32, Option<FileKind>) -> Result<(), DiffError>;

/// A mounted file system, addressed by inode number. Dropping it unmounts it.
#[allow(
    clippy::missing_errors_doc,
    reason = "all fail alike: `Corrupt`, `Unsupported` or `Io`, as the kernel reports"
)]
pub trait ForeignFs: fmt::Debug {
    /// The root directory's inode.
    fn root(&self) -> u32;
    /// An inode's metadata; made by [`Inode::reported`].
    fn inode(&self, ino: u32) -> Result<Inode, DiffError>;
    /// All names of a directory but `.` and `..`, in any order.
    fn visit_dir(&self, ino: u32, visit: VisitName<'_>) -> Result<(), DiffError>;
    /// All extended attributes, in any order, ACLs in the form of `getxattr`.
    fn xattrs(&self, ino: u32) -> Result<Vec<Xattr>, DiffError>;
    /// What a symbolic link points to.
    fn symlink_target(&self, ino: u32) -> Result<Vec<u8>, DiffError>;
    /// The ranges (offset, length) of a file that hold data, in order; neither holes nor what is only reserved.
    fn data_map(&self, ino: u32) -> Result<Vec<(u64, u64)>, DiffError>;
    /// Fills `buf` with bytes of a file from `offset`.
    fn read(&self, ino: u32, offset: u64, buf: &mut [u8]) -> Result<(), DiffError>;
}

/// Mounts a disk whose file system the reader does not support.
pub trait Mounter<R>: fmt::Debug + Send + Sync {
    /// Mounts it, read-only; the disk itself is never written.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported` or `Io`, as the kernel reports.
    fn mount(&self, disk: &R) -> Result<Box<dyn ForeignFs>, DiffError>;
}

/// What to do with a sandbox whose file system the reader does not support.
#[derive(Debug)]
pub enum Foreign<R> {
    /// Refuse it; the error contains this advice.
    Refused(&'static str),
    /// Mount it.
    Mounted(Arc<dyn Mounter<R>>),
}

/// Bytes of a file on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) disk: u64,
}

/// The file system of a layer; `D` is its disk.
#[derive(Debug)]
pub(super) enum Fs<D> {
    Own(Ext4<D>),
    Foreign(Box<dyn ForeignFs>),
}

impl<'a, R: ReadAt> Fs<&'a R> {
    /// Opens a sandbox's file system; `live`: it is in use.
    pub(super) fn open_sandbox(disk: &'a R, foreign: &Foreign<R>, live: bool) -> Result<Self, DiffError> {
        let refused = match Ext4::open(disk) {
            Ok(own) => return Ok(Self::Own(own)),
            Err(refused @ Ext4Error::Unsupported { .. }) => refused,
            Err(other) => return Err(other.into()),
        };
        match foreign {
            Foreign::Refused(advice) => Err(DiffError::Foreign { advice, source: refused }),
            // A second mount would replay the journal of a file system in use and miss what its kernel has not written yet.
            Foreign::Mounted(_) if live => Err(DiffError::Foreign {
                advice: "it cannot be mounted a second time while it is in use; stop its container first",
                source: refused,
            }),
            Foreign::Mounted(mounter) => mounter.mount(disk).map(Self::Foreign),
        }
    }
}

impl<D: ReadAt> Fs<D> {
    pub(super) fn root(&self) -> u32 {
        match self {
            Self::Own(fs) => fs.root(),
            Self::Foreign(fs) => fs.root(),
        }
    }

    pub(super) fn inode(&self, ino: u32) -> Result<Inode, DiffError> {
        match self {
            Self::Own(fs) => Ok(fs.inode(ino)?),
            Self::Foreign(fs) => fs.inode(ino),
        }
    }

    pub(super) fn visit_dir(
        &self,
        dir: &Inode,
        mut visit: impl FnMut(&[u8], u32, Option<FileKind>) -> Result<(), DiffError>,
    ) -> Result<(), DiffError> {
        match self {
            Self::Own(fs) => fs.visit_dir(dir, visit),
            Self::Foreign(fs) => fs.visit_dir(dir.ino, &mut visit),
        }
    }

    pub(super) fn xattrs(&self, inode: &Inode) -> Result<Vec<Xattr>, DiffError> {
        match self {
            Self::Own(fs) => Ok(fs.xattrs(inode)?),
            Self::Foreign(fs) => fs.xattrs(inode.ino),
        }
    }

    pub(super) fn symlink_target(&self, inode: &Inode) -> Result<Vec<u8>, DiffError> {
        match self {
            Self::Own(fs) => Ok(fs.symlink_target(inode)?),
            Self::Foreign(fs) => fs.symlink_target(inode.ino),
        }
    }

    /// The bytes of a file that are inside its inode, where it is ours to know.
    pub(super) fn inline_bytes(&self, inode: &Inode) -> Result<Option<Vec<u8>>, DiffError> {
        match self {
            Self::Own(fs) => Ok(fs.inline_bytes(inode)?),
            Self::Foreign(_) => Ok(None),
        }
    }

    /// The places of a file's bytes: on the disk, or, of a foreign one, in the file itself.
    pub(super) fn ranges(&self, inode: &Inode, out: &mut Vec<Range>) -> Result<(), DiffError> {
        match self {
            Self::Own(fs) => {
                for range in fs.data_map(inode)? {
                    if let Some(disk) = range.disk_offset {
                        out.push(Range { offset: range.offset, len: range.len, disk });
                    }
                }
            }
            Self::Foreign(fs) => {
                for (offset, len) in fs.data_map(inode.ino)? {
                    if offset < inode.size {
                        out.push(Range { offset, len: len.min(inode.size - offset), disk: offset });
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads bytes of file `ino` at a place that [`Fs::ranges`] gave.
    pub(super) fn read(&self, ino: u32, place: u64, buf: &mut [u8]) -> Result<(), DiffError> {
        match self {
            Self::Own(fs) => Ok(fs.read_disk(place, buf)?),
            Self::Foreign(fs) => fs.read(ino, place, buf),
        }
    }

    /// Where an open file holds the bytes that [`Fs::read`] would give, if one does.
    pub(super) fn in_file(&self, place: u64, len: u64) -> Option<(&File, u64)> {
        match self {
            Self::Own(fs) => fs.in_file(place, len),
            Self::Foreign(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use disk_io::{MemDisk, WriteAt};
    use ext4_image::format::{BlankOptions, blank};
    use std::sync::atomic::{AtomicU32, Ordering};

    /// Counts who asks.
    #[derive(Debug, Default)]
    struct Asked(AtomicU32);

    impl Mounter<MemDisk> for Asked {
        fn mount(&self, _: &MemDisk) -> Result<Box<dyn ForeignFs>, DiffError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Err(DiffError::Usage("mounted".to_owned()))
        }
    }

    /// A file system with a word of its superblock changed; 0x60 are the incompatible features. It has no checksums then.
    fn disk(word: u64, value: u32) -> MemDisk {
        let disk = MemDisk::new();
        disk.set_len(16 << 20).unwrap();
        for (offset, bytes) in blank(16 << 20, &BlankOptions::default()).unwrap() {
            disk.write_all_at(&bytes, offset).unwrap();
        }
        disk.write_all_at(&0u32.to_le_bytes(), 1024 + 0x64).unwrap();
        disk.write_all_at(&value.to_le_bytes(), 1024 + word).unwrap();
        disk
    }

    #[test]
    fn only_what_is_unsupported_is_mounted_and_only_with_permission() {
        let asked = Arc::new(Asked::default());
        let open = |disk: &MemDisk, allowed: bool, live: bool| {
            let foreign =
                if allowed { Foreign::Mounted(asked.clone() as _) } else { Foreign::Refused("ask") };
            let error = Fs::open_sandbox(disk, &foreign, live).err();
            (error, asked.0.swap(0, Ordering::Relaxed))
        };
        let unknown = disk(0x60, 0x1_0042);
        assert!(matches!(open(&unknown, true, false), (Some(DiffError::Usage(_)), 1)));
        let (error, asked) = open(&unknown, false, false);
        assert!(matches!(error, Some(DiffError::Foreign { advice: "ask", .. })) && asked == 0, "{error:?}");
        let (error, asked) = open(&unknown, true, true);
        let Some(DiffError::Foreign { advice, source }) = error else { panic!("{error:?}") };
        assert!(advice.contains("in use") && asked == 0);
        assert!(source.to_string().contains("0x10000"), "{source}");
        let corrupt = disk(0x38, 0);
        assert!(matches!(open(&corrupt, true, false), (Some(DiffError::Ext4(Ext4Error::Corrupt { .. })), 0)));
    }
}
