//! Inodes: their checksum and their fields.
//!
//! ```text
//!   0        100        128          128+i_extra_isize            inode_size
//!   │ fixed  │ gen, hi  │ extra: ns, crtime │ 0xEA020000 xattrs …  │
//!            └ i_block at 40..100: extents, block map, symlink, inline data
//! ```
//!
//! Called by the reader for each look-up and by the checker for each slot of the inode tables.

use super::superblock::Geometry;
use crate::{
    Ext4Error, Place, Timestamp,
    error::InodeFault,
    layout::{
        checksum::inode_seed,
        dir::{
            EXT4_FT_BLKDEV, EXT4_FT_CHRDEV, EXT4_FT_DIR, EXT4_FT_FIFO, EXT4_FT_REG_FILE, EXT4_FT_SOCK,
            EXT4_FT_SYMLINK,
        },
        inode::{
            EXT4_GOOD_OLD_INODE_SIZE, I_BLOCK_SIZE, InodeFlags, RawInode, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO,
            S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK, decode_device, inode_checksum,
        },
        superblock::Incompat,
    },
};
use std::mem::offset_of;
use zerocopy::little_endian::U32;

/// The type of an inode (the top four bits of `i_mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileKind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
    /// Socket.
    Socket,
}

impl FileKind {
    /// From `i_mode`.
    pub fn from_mode(mode: u16) -> Option<Self> {
        Some(match mode & S_IFMT {
            S_IFREG => Self::File,
            S_IFDIR => Self::Directory,
            S_IFLNK => Self::Symlink,
            S_IFCHR => Self::CharDevice,
            S_IFBLK => Self::BlockDevice,
            S_IFIFO => Self::Fifo,
            S_IFSOCK => Self::Socket,
            _ => return None,
        })
    }

    /// From a directory entry's `file_type`; `None` for unknown.
    pub(crate) fn from_dirent(file_type: u8) -> Option<Self> {
        Some(match file_type {
            EXT4_FT_REG_FILE => Self::File,
            EXT4_FT_DIR => Self::Directory,
            EXT4_FT_CHRDEV => Self::CharDevice,
            EXT4_FT_BLKDEV => Self::BlockDevice,
            EXT4_FT_FIFO => Self::Fifo,
            EXT4_FT_SOCK => Self::Socket,
            EXT4_FT_SYMLINK => Self::Symlink,
            _ => return None,
        })
    }
}

/// An inode in memory, together with its bytes on disk.
#[derive(Debug, Clone)]
pub struct Inode {
    /// Its number.
    pub ino: u32,
    /// `i_mode`: type and permissions.
    pub mode: u16,
    /// What it is.
    pub kind: FileKind,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of data.
    pub mtime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
    /// Creation, where the inode is large enough to hold it.
    pub crtime: Option<Timestamp>,
    /// Number of names.
    pub links: u16,
    /// Major and minor number of a device, else zeros.
    pub rdev: (u32, u32),
    /// `i_flags`; unknown bits are kept.
    pub flags: InodeFlags,
    /// `i_generation`.
    pub generation: u32,
    /// `i_version`, bumped by the kernel on changes.
    pub version: u64,
    /// `i_file_acl`: the block with more xattrs, or 0.
    pub file_acl: u64,
    /// The inode as it is on disk.
    pub(crate) raw: Box<[u8]>,
}

/// A stored time; nanoseconds beyond a second are cut.
fn timestamp(secs: u32, extra: u32) -> Timestamp {
    let time = Timestamp::decode(secs, extra);
    Timestamp { nanos: time.nanos.min(999_999_999), ..time }
}

/// End of `i_crtime` in the part that `i_extra_isize` counts.
const CRTIME_END: usize = offset_of!(RawInode, i_crtime) + 4 - EXT4_GOOD_OLD_INODE_SIZE;

impl Inode {
    /// Parses inode `ino` in its slot on disk.
    ///
    /// # Errors
    /// `Corrupt` for a wrong checksum, an unknown type or impossible fields.
    pub(crate) fn parse(ino: u32, slot: &[u8], geometry: &Geometry) -> Result<Self, Ext4Error> {
        let bad = |fault| Err(Ext4Error::corrupt(fault, Place::inode(ino)));
        if slot.len() < EXT4_GOOD_OLD_INODE_SIZE {
            return bad(InodeFault::CutOff);
        }
        let raw = RawInode::from_slot(slot);
        let mode = raw.i_mode.get();
        let Some(kind) = FileKind::from_mode(mode) else {
            return bad(InodeFault::FileType);
        };
        let extra_isize = usize::from(raw.i_extra_isize.get());
        if EXT4_GOOD_OLD_INODE_SIZE + extra_isize > slot.len() || !extra_isize.is_multiple_of(4) {
            return bad(InodeFault::ExtraSize);
        }
        if geometry.metadata_csum() && !checksum_matches(ino, slot, &raw, geometry) {
            return bad(InodeFault::Checksum);
        }
        let has_size_high = match kind {
            FileKind::File => true,
            FileKind::Directory => geometry.has(Incompat::EXT4_FEATURE_INCOMPAT_LARGEDIR),
            _ => false,
        };
        let size = if has_size_high { raw.size() } else { u64::from(raw.i_size_lo.get()) };
        if size > i64::MAX as u64 {
            return bad(InodeFault::NegativeSize);
        }
        let rdev = match kind {
            FileKind::CharDevice | FileKind::BlockDevice => {
                let [old, new, ..] = raw.i_block_words();
                decode_device([old, new])
            }
            _ => (0, 0),
        };
        let time = |secs: U32, extra: U32| timestamp(secs.get(), extra.get());
        Ok(Self {
            ino,
            mode,
            kind,
            uid: raw.uid(),
            gid: raw.gid(),
            size,
            atime: time(raw.i_atime, raw.i_atime_extra),
            ctime: time(raw.i_ctime, raw.i_ctime_extra),
            mtime: time(raw.i_mtime, raw.i_mtime_extra),
            crtime: raw.has_extra(CRTIME_END).then(|| time(raw.i_crtime, raw.i_crtime_extra)),
            links: raw.i_links_count.get(),
            rdev,
            flags: raw.flags(),
            generation: raw.i_generation.get(),
            version: raw.version(),
            file_acl: raw.file_acl(),
            raw: slot.into(),
        })
    }

    /// An inode of a mounted file system, of which the kernel reports number and mode; all else is zero, for the caller to
    /// fill in. `None` if `mode` has an unknown type.
    pub fn reported(ino: u32, mode: u16) -> Option<Self> {
        let zero = Timestamp { secs: 0, nanos: 0 };
        Some(Self {
            ino,
            mode,
            kind: FileKind::from_mode(mode)?,
            uid: 0,
            gid: 0,
            size: 0,
            atime: zero,
            mtime: zero,
            ctime: zero,
            crtime: None,
            links: 0,
            rdev: (0, 0),
            flags: InodeFlags::empty(),
            generation: 0,
            version: 0,
            file_acl: 0,
            raw: Box::default(),
        })
    }

    /// `i_block`: 60 bytes.
    pub(crate) fn i_block(&self) -> &[u8] {
        const AT: usize = offset_of!(RawInode, i_block);
        self.raw.get(AT..AT + I_BLOCK_SIZE).unwrap_or(&[])
    }

    /// The room for xattrs inside the inode.
    pub(crate) fn xattr_area(&self) -> &[u8] {
        if self.raw.len() <= EXT4_GOOD_OLD_INODE_SIZE {
            return &[];
        }
        let extra = RawInode::from_slot(&self.raw).i_extra_isize.get();
        self.raw.get(EXT4_GOOD_OLD_INODE_SIZE + usize::from(extra)..).unwrap_or(&[])
    }

    /// Whether a flag of `i_flags` is set.
    pub(crate) fn has(&self, flag: InodeFlags) -> bool {
        self.flags.contains(flag)
    }

    /// Whether it is the device 0/0 that overlayfs takes for a whiteout.
    pub fn is_whiteout(&self) -> bool {
        self.kind == FileKind::CharDevice && self.rdev == (0, 0)
    }

    /// Seed of the checksums of this inode's blocks.
    pub(crate) fn seed(&self, geometry: &Geometry) -> u32 {
        inode_seed(geometry.checksum_seed, self.ino, self.generation)
    }
}

/// Checks `i_checksum` (`ext4_inode_csum` of `fs/ext4/inode.c`).
pub(crate) fn checksum_matches(ino: u32, slot: &[u8], raw: &RawInode, geometry: &Geometry) -> bool {
    let stored = if raw.has_checksum_hi() { raw.checksum() } else { u32::from(raw.i_checksum_lo.get()) };
    inode_checksum(geometry.checksum_seed, ino, slot) == stored
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_and_after_2038_are_kept() {
        assert_eq!(timestamp(0xFFFF_FFFF, 0), Timestamp { secs: -1, nanos: 0 });
        assert_eq!(timestamp(0, 1), Timestamp { secs: 1 << 32, nanos: 0 });
        assert_eq!(timestamp(5, 0b1_1100), Timestamp { secs: 5, nanos: 7 });
        assert_eq!(timestamp(5, !3).nanos, 999_999_999);
    }

    #[test]
    fn device_numbers_of_both_forms() {
        assert_eq!(decode_device([0x0103, 0]), (1, 3));
        assert_eq!(decode_device([0, 0x1230_4556]), (0x45, 0x1_2356));
        assert_eq!(decode_device([0, 0]), (0, 0));
    }
}
