//! Extent tree nodes.
//!
//! ```text
//!   node:  header (12) │ entry (12) × eh_max │ tail (4, crc32c; blocks only, not in i_block)
//!   entry: leaf extent (eh_depth 0) or index to a lower node
//! ```

use super::checksum::crc32c;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32},
};

/// `eh_magic`.
pub(crate) const EXT4_EXT_MAGIC: u16 = 0xF30A;
/// Size of a header and of an entry.
pub(crate) const ENTRY_SIZE: usize = 12;
/// Size of the checksum after the entries of a block.
pub(crate) const TAIL_SIZE: usize = 4;
/// Entries of the root in `i_block`.
pub(crate) const ROOT_MAX: u16 = 4;
/// Most blocks of an initialized extent.
pub(crate) const EXT_INIT_MAX_LEN: u32 = 32_768;
/// Deepest tree that the kernel takes (`EXT4_MAX_EXTENT_DEPTH`).
pub(crate) const EXT4_MAX_EXTENT_DEPTH: u16 = 5;

/// Smallest `eh_max` with which checkers (e2fsck) take something for a root.
const ROOT_FEW: u16 = 2;

/// Whether 60 bytes of `i_block` can be taken for the root of an extent tree: an inode that keeps something else there
/// (inline data) and has such bytes is damaged for e2fsck (`ext2fs_extent_header_verify`).
pub(crate) fn looks_like_root(i_block: &[u8]) -> bool {
    ExtentHeader::read_from_prefix(i_block).is_ok_and(|(header, _)| {
        let max = header.eh_max.get();
        header.eh_magic.get() == EXT4_EXT_MAGIC
            && header.eh_entries.get() <= max
            && (ROOT_FEW..=ROOT_MAX).contains(&max)
    })
}

/// `struct ext4_extent_header`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct ExtentHeader {
    pub(crate) eh_magic: U16,
    pub(crate) eh_entries: U16,
    pub(crate) eh_max: U16,
    pub(crate) eh_depth: U16,
    pub(crate) eh_generation: U32,
}

/// `struct ext4_extent`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawExtent {
    pub(crate) ee_block: U32,
    pub(crate) ee_len: U16,
    pub(crate) ee_start_hi: U16,
    pub(crate) ee_start_lo: U32,
}

/// `struct ext4_extent_idx`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawIndex {
    pub(crate) ei_block: U32,
    pub(crate) ei_leaf_lo: U32,
    pub(crate) ei_leaf_hi: U16,
    pub(crate) ei_unused: U16,
}

const _: () =
    assert!(size_of::<ExtentHeader>() == 12 && size_of::<RawExtent>() == 12 && size_of::<RawIndex>() == 12);

impl ExtentHeader {
    /// The header of a node.
    pub(crate) fn new(entries: u16, max: u16, depth: u16) -> Self {
        Self {
            eh_magic: U16::new(EXT4_EXT_MAGIC),
            eh_entries: U16::new(entries),
            eh_max: U16::new(max),
            eh_depth: U16::new(depth),
            eh_generation: U32::ZERO,
        }
    }
}

impl RawExtent {
    /// An initialized extent of 1 to [`EXT_INIT_MAX_LEN`] blocks.
    pub(crate) fn new(logical: u32, start: u64, blocks: u32) -> Self {
        Self {
            ee_block: U32::new(logical),
            ee_len: U16::new(blocks as u16),
            ee_start_hi: U16::new((start >> 32) as u16),
            ee_start_lo: U32::new(start as u32),
        }
    }

    /// First physical block.
    pub(crate) fn start(&self) -> u64 {
        u64::from(self.ee_start_lo.get()) | u64::from(self.ee_start_hi.get()) << 32
    }

    /// Number of blocks, whether initialized or not.
    pub(crate) fn blocks(&self) -> u32 {
        let len = u32::from(self.ee_len.get());
        if len > EXT_INIT_MAX_LEN { len - EXT_INIT_MAX_LEN } else { len }
    }

    /// Allocated but unwritten: reads as zeros.
    pub(crate) fn is_unwritten(&self) -> bool {
        u32::from(self.ee_len.get()) > EXT_INIT_MAX_LEN
    }
}

impl RawIndex {
    /// A pointer to the node in block `leaf`, whose first logical block is `logical`.
    pub(crate) fn new(logical: u32, leaf: u64) -> Self {
        Self {
            ei_block: U32::new(logical),
            ei_leaf_lo: U32::new(leaf as u32),
            ei_leaf_hi: U16::new((leaf >> 32) as u16),
            ei_unused: U16::ZERO,
        }
    }

    /// Block of the lower node.
    pub(crate) fn leaf(&self) -> u64 {
        u64::from(self.ei_leaf_lo.get()) | u64::from(self.ei_leaf_hi.get()) << 32
    }
}

/// `eh_max` of a node in a block of `block_size` bytes.
pub(crate) fn block_max(block_size: usize) -> u16 {
    ((block_size - ENTRY_SIZE - TAIL_SIZE) / ENTRY_SIZE) as u16
}

/// Where the tail of a node with `eh_max` entries begins.
pub(crate) fn tail_offset(eh_max: u16) -> usize {
    ENTRY_SIZE * (usize::from(eh_max) + 1)
}

/// Checksum of a node in a block; `covered` is the block up to its tail.
pub(crate) fn node_checksum(inode_seed: u32, covered: &[u8]) -> u32 {
    crc32c(inode_seed, covered)
}
