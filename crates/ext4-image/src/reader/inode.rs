//! Inodes: where they stand, their checksum, their fields.
//!
//! ```text
//!   0        100        128          128+i_extra_isize            inode_size
//!   │ fixed  │ gen, hi  │ extra: ns, crtime │ 0xEA020000 xattrs …  │
//!            └ i_block at 40..100: extents, block map, symlink, inline data
//! ```
//!
//! Called by the reader for each look-up and by the checker for each slot of the inode tables.

use super::{
    bytes::{chksum, u16_at, u32_at, wide},
    corrupt,
    superblock::{Geometry, incompat},
};
use crate::{Ext4Error, Timestamp};

/// `i_flags` bits used here.
pub(crate) mod flags {
    pub(crate) const INDEX: u32 = 0x1000;
    pub(crate) const HUGE_FILE: u32 = 0x4_0000;
    pub(crate) const EXTENTS: u32 = 0x8_0000;
    pub(crate) const EA_INODE: u32 = 0x20_0000;
    pub(crate) const INLINE_DATA: u32 = 0x1000_0000;
    pub(crate) const ENCRYPT: u32 = 0x800;
    pub(crate) const COMPRESSED: u32 = 0x4;
}

/// The smallest inode on disk.
const GOOD_OLD: usize = 128;

/// What kind of thing an inode is (the top four bits of `i_mode`).
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
        Some(match mode & 0o170_000 {
            0o100_000 => Self::File,
            0o040_000 => Self::Directory,
            0o120_000 => Self::Symlink,
            0o020_000 => Self::CharDevice,
            0o060_000 => Self::BlockDevice,
            0o010_000 => Self::Fifo,
            0o140_000 => Self::Socket,
            _ => return None,
        })
    }

    /// From a directory entry's `file_type`; `None` for unknown.
    pub(crate) fn from_dirent(file_type: u8) -> Option<Self> {
        Some(match file_type {
            1 => Self::File,
            2 => Self::Directory,
            3 => Self::CharDevice,
            4 => Self::BlockDevice,
            5 => Self::Fifo,
            6 => Self::Socket,
            7 => Self::Symlink,
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
    /// `i_flags`.
    pub flags: u32,
    /// `i_generation`.
    pub generation: u32,
    /// `i_version`, bumped by the kernel on changes.
    pub version: u64,
    /// `i_file_acl`: the block with more xattrs, or 0.
    pub file_acl: u64,
    /// The inode as it is on disk.
    pub(crate) raw: Box<[u8]>,
}

/// Splits a stored time and its extra bits (2 bits of epoch, 30 of nanoseconds).
fn timestamp(secs: u32, extra: Option<u32>) -> Timestamp {
    let extra = extra.unwrap_or(0);
    let secs = i64::from(secs as i32) + (i64::from(extra & 3) << 32);
    Timestamp { secs, nanos: (extra >> 2).min(999_999_999) }
}

impl Inode {
    /// Parses the bytes of inode `ino`.
    ///
    /// # Errors
    /// `Corrupt` for a wrong checksum, an unknown type or fields that cannot be.
    pub(crate) fn parse(ino: u32, raw: &[u8], geometry: &Geometry) -> Result<Self, Ext4Error> {
        let bad = |reason: &'static str| corrupt(format!("inode {ino}"), reason);
        if raw.len() < GOOD_OLD {
            return Err(bad("it is cut off"));
        }
        let mode = u16_at(raw, 0);
        let Some(kind) = FileKind::from_mode(mode) else {
            return Err(bad("unknown file type"));
        };
        let extra_isize = if raw.len() > GOOD_OLD { usize::from(u16_at(raw, 128)) } else { 0 };
        if GOOD_OLD + extra_isize > raw.len() || !extra_isize.is_multiple_of(4) {
            return Err(bad("i_extra_isize is out of range"));
        }
        if geometry.metadata_csum() && !checksum_matches(ino, raw, geometry) {
            return Err(bad("checksum does not match"));
        }
        let extra = |at: usize| (GOOD_OLD + extra_isize >= at + 4).then(|| u32_at(raw, at));
        let size_high = match kind {
            FileKind::File => u32_at(raw, 108),
            FileKind::Directory if geometry.has(incompat::LARGEDIR) => u32_at(raw, 108),
            _ => 0,
        };
        let size = wide(u32_at(raw, 4), size_high);
        if size > i64::MAX as u64 {
            return Err(bad("its size is negative"));
        }
        let rdev = match kind {
            FileKind::CharDevice | FileKind::BlockDevice => decode_rdev(u32_at(raw, 40), u32_at(raw, 44)),
            _ => (0, 0),
        };
        Ok(Self {
            ino,
            mode,
            kind,
            uid: u32::from(u16_at(raw, 2)) | u32::from(u16_at(raw, 120)) << 16,
            gid: u32::from(u16_at(raw, 24)) | u32::from(u16_at(raw, 122)) << 16,
            size,
            atime: timestamp(u32_at(raw, 8), extra(140)),
            ctime: timestamp(u32_at(raw, 12), extra(132)),
            mtime: timestamp(u32_at(raw, 16), extra(136)),
            crtime: extra(144).map(|secs| timestamp(secs, extra(148))),
            links: u16_at(raw, 26),
            rdev,
            flags: u32_at(raw, 32),
            generation: u32_at(raw, 100),
            version: wide(u32_at(raw, 36), extra(152).unwrap_or(0)),
            file_acl: wide(u32_at(raw, 104), u32::from(u16_at(raw, 118))),
            raw: raw.into(),
        })
    }

    /// An inode that a kernel tells of, not a disk: number and mode; all else is zero, for the caller to fill in. `None` for
    /// a type that is none.
    pub fn told(ino: u32, mode: u16) -> Option<Self> {
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
            flags: 0,
            generation: 0,
            version: 0,
            file_acl: 0,
            raw: Box::default(),
        })
    }

    /// `i_block`: 60 bytes.
    pub(crate) fn i_block(&self) -> &[u8] {
        self.raw.get(40..100).unwrap_or(&[])
    }

    /// The room for xattrs inside the inode.
    pub(crate) fn xattr_area(&self) -> &[u8] {
        if self.raw.len() <= GOOD_OLD {
            return &[];
        }
        self.raw.get(GOOD_OLD + usize::from(u16_at(&self.raw, 128))..).unwrap_or(&[])
    }

    /// `i_blocks` in units of 512 bytes (or of blocks where the inode's HUGE_FILE flag says so).
    pub(crate) fn i_blocks(&self) -> u64 {
        wide(u32_at(&self.raw, 28), u32::from(u16_at(&self.raw, 116)))
    }

    /// Whether `bit` of `i_flags` is set.
    pub(crate) fn has(&self, bit: u32) -> bool {
        self.flags & bit != 0
    }

    /// Whether it is the device 0/0 that overlayfs takes for a whiteout.
    pub fn is_whiteout(&self) -> bool {
        self.kind == FileKind::CharDevice && self.rdev == (0, 0)
    }

    /// Seed of the checksums of this inode's blocks.
    pub(crate) fn seed(&self, geometry: &Geometry) -> u32 {
        seed(self.ino, self.generation, geometry)
    }
}

fn seed(ino: u32, generation: u32, geometry: &Geometry) -> u32 {
    chksum(chksum(geometry.checksum_seed, &ino.to_le_bytes()), &generation.to_le_bytes())
}

/// Checks `i_checksum` (`ext4_inode_csum` of `fs/ext4/inode.c`).
pub(crate) fn checksum_matches(ino: u32, raw: &[u8], geometry: &Geometry) -> bool {
    let mut bytes = raw.to_vec();
    let has_high = raw.len() > GOOD_OLD && u16_at(raw, 128) >= 4;
    let mut stored = u32::from(u16_at(raw, 124));
    if let Some(field) = bytes.get_mut(124..126) {
        field.fill(0);
    }
    if has_high {
        stored |= u32::from(u16_at(raw, 130)) << 16;
        if let Some(field) = bytes.get_mut(130..132) {
            field.fill(0);
        }
    }
    let computed = chksum(seed(ino, u32_at(raw, 100), geometry), &bytes);
    stored == if has_high { computed } else { computed & 0xFFFF }
}

/// Old (16-bit) and new (32-bit) device numbers (`ext4_iget`, `new_decode_dev`).
fn decode_rdev(old: u32, new: u32) -> (u32, u32) {
    if old != 0 {
        (old >> 8 & 0xFF, old & 0xFF)
    } else {
        (new >> 8 & 0xFFF, new & 0xFF | new >> 12 & 0xF_FF00)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_and_after_2038_are_kept() {
        assert_eq!(timestamp(0xFFFF_FFFF, Some(0)), Timestamp { secs: -1, nanos: 0 });
        assert_eq!(timestamp(0, Some(1)), Timestamp { secs: 1 << 32, nanos: 0 });
        assert_eq!(timestamp(5, Some(0b1_1100)), Timestamp { secs: 5, nanos: 7 });
        assert_eq!(timestamp(5, Some(!3)).nanos, 999_999_999);
    }

    #[test]
    fn device_numbers_of_both_forms() {
        assert_eq!(decode_rdev(0x0103, 0), (1, 3));
        assert_eq!(decode_rdev(0, 0x1230_4556), (0x45, 0x1_2356));
        assert_eq!(decode_rdev(0, 0), (0, 0));
    }
}
