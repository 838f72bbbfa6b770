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
//! slice of sufficient length. Field names are the kernel's. Sources: Documentation/filesystems/ext4, fs/ext4/ext4.h,
//! ext4_extents.h, xattr.h, acl.h. Called by `ext4::{writer, format, reader, check}` only.

pub mod acl;
pub mod checksum;
pub mod dir;
pub mod extent;
pub mod group;
pub mod hash;
pub mod inode;
pub mod journal;
pub mod superblock;
pub mod time;
pub mod xattr;

pub use time::Timestamp;

/// Inode number of the bad-blocks file.
pub const BAD_INO: u32 = 1;
/// Inode number of the root directory.
pub const ROOT_INO: u32 = 2;
/// Inode number of the internal journal.
pub const JOURNAL_INO: u32 = 8;
/// First inode number that is not reserved.
pub const FIRST_INO: u32 = 11;
/// Most names that an inode may have (`EXT4_LINK_MAX`).
pub const LINK_MAX: u32 = 65_000;
/// Longest name of a directory entry, in bytes.
pub const NAME_MAX: usize = 255;
/// Size of a sector in bytes: the unit of `i_blocks`.
pub const SECTOR: u64 = 512;

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
