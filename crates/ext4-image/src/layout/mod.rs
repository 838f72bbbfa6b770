//! The on-disk layout of ext4: structs, constants, checksums and hashes; no I/O and no policy.
//!
//! ```text
//!   block 0/1        super block (1024 bytes at byte 1024)
//!   then             group descriptors (64 bytes each), block and inode bitmaps, inode tables, data
//!   inode            128 + extra_isize bytes, then in-inode xattrs to the end of the slot
//!   i_block          60 bytes: extent root │ fast symlink │ device number │ inline data
//! ```
//!
//! All numbers are little-endian and unaligned (`zerocopy::little_endian`), so every struct can be laid over any byte
//! slice of sufficient length. Names of fields, flags and constants are the kernel's, so that a search for
//! `EXT4_FEATURE_INCOMPAT_EXTENTS` or `s_feature_incompat` finds every use: the writers, the formatter, the reader and the
//! checker have no second description. That both sides agree with the kernel, and not only with each other, is what
//! `e2fsck` and kernel mounts prove in the tests. Sources: Documentation/filesystems/ext4, fs/ext4/ext4.h,
//! ext4_extents.h, xattr.h, acl.h, include/linux/jbd2.h.
#![expect(
    clippy::struct_field_names,
    reason = "fields have the kernel's names, which have a prefix for each structure"
)]

pub(crate) mod acl;
pub(crate) mod checksum;
pub(crate) mod dir;
pub(crate) mod extent;
pub(crate) mod group;
mod halves;
pub(crate) mod hash;
pub(crate) mod inode;
pub(crate) mod journal;
pub(crate) mod superblock;
pub(crate) mod time;
pub(crate) mod xattr;

pub use time::Timestamp;

/// Inode number of the bad-blocks file.
pub(crate) const EXT4_BAD_INO: u32 = 1;
/// Inode number of the root directory.
pub(crate) const EXT4_ROOT_INO: u32 = 2;
/// Inode number of the internal journal.
pub(crate) const EXT4_JOURNAL_INO: u32 = 8;
/// First inode number that is not reserved.
pub(crate) const EXT4_GOOD_OLD_FIRST_INO: u32 = 11;
/// Most names that an inode may have (`EXT4_LINK_MAX`).
pub const EXT4_LINK_MAX: u32 = 65_000;
/// Longest name of a directory entry, in bytes.
pub(crate) const EXT4_NAME_LEN: usize = 255;
/// Size of a sector in bytes: the unit of `i_blocks`.
pub(crate) const SECTOR: u64 = 512;

/// Size of a file system block. Larger ones than 4 KiB cannot be mounted on common machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum BlockSize {
    /// 1024 bytes: least waste for small files, hence the writer's default (measured there).
    #[default]
    B1024,
    /// 2048 bytes.
    B2048,
    /// 4096 bytes.
    B4096,
}

impl BlockSize {
    /// The largest that all kernels mount.
    pub const LARGEST: Self = Self::B4096;

    /// Size in bytes.
    pub const fn bytes(self) -> u32 {
        1024 << self.log()
    }

    /// `s_log_block_size`: log2 of the size, less 10.
    pub const fn log(self) -> u32 {
        match self {
            Self::B1024 => 0,
            Self::B2048 => 1,
            Self::B4096 => 2,
        }
    }

    /// The block size of a given number of bytes.
    pub fn from_bytes(bytes: u32) -> Option<Self> {
        [Self::B1024, Self::B2048, Self::B4096].into_iter().find(|b| b.bytes() == bytes)
    }

    /// `s_first_data_block`: the block that holds the super block.
    pub const fn first_data_block(self) -> u32 {
        matches!(self, Self::B1024) as u32
    }
}
