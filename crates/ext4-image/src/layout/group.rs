//! Group descriptors of 64 bytes (feature 64bit).
#![expect(
    missing_docs,
    reason = "fields bear the kernel's names; Documentation/filesystems/ext4/group_descr.rst"
)]

use super::{
    checksum::crc32c,
    superblock::{join, split},
};
use bitflags::bitflags;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32},
};

/// `s_desc_size` of a 64bit file system.
pub const DESC_SIZE: usize = 64;

bitflags! {
    /// `bg_flags`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct GroupFlags: u16 {
        /// Inode bitmap and table are not initialised.
        const INODE_UNINIT = 1;
        /// Block bitmap is not initialised.
        const BLOCK_UNINIT = 2;
        /// The inode table is zeroed.
        const INODE_ZEROED = 4;
        const _ = !0;
    }
}

/// `struct ext4_group_desc`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct GroupDesc {
    pub bg_block_bitmap_lo: U32,
    pub bg_inode_bitmap_lo: U32,
    pub bg_inode_table_lo: U32,
    pub bg_free_blocks_count_lo: U16,
    pub bg_free_inodes_count_lo: U16,
    pub bg_used_dirs_count_lo: U16,
    pub bg_flags: U16,
    pub bg_exclude_bitmap_lo: U32,
    pub bg_block_bitmap_csum_lo: U16,
    pub bg_inode_bitmap_csum_lo: U16,
    pub bg_itable_unused_lo: U16,
    pub bg_checksum: U16,
    pub bg_block_bitmap_hi: U32,
    pub bg_inode_bitmap_hi: U32,
    pub bg_inode_table_hi: U32,
    pub bg_free_blocks_count_hi: U16,
    pub bg_free_inodes_count_hi: U16,
    pub bg_used_dirs_count_hi: U16,
    pub bg_itable_unused_hi: U16,
    pub bg_exclude_bitmap_hi: U32,
    pub bg_block_bitmap_csum_hi: U16,
    pub bg_inode_bitmap_csum_hi: U16,
    pub bg_reserved: U32,
}

const _: () = assert!(size_of::<GroupDesc>() == DESC_SIZE);

/// Getter and setter of a number whose halves are two fields.
macro_rules! halves {
    ($($get:ident, $set:ident, $lo:ident, $hi:ident, $half:ident, $whole:ty, $bits:literal;)*) => {
        impl GroupDesc {$(
            #[doc = concat!("`", stringify!($lo), "` with its high half.")]
            pub fn $get(&self) -> $whole {
                <$whole>::from(self.$lo.get()) | <$whole>::from(self.$hi.get()) << $bits
            }

            #[doc = concat!("Sets `", stringify!($lo), "` and its high half.")]
            pub fn $set(&mut self, value: $whole) {
                self.$lo.set(value as $half);
                self.$hi.set((value >> $bits) as $half);
            }
        )*}
    };
}

halves! {
    free_blocks, set_free_blocks, bg_free_blocks_count_lo, bg_free_blocks_count_hi, u16, u32, 16;
    free_inodes, set_free_inodes, bg_free_inodes_count_lo, bg_free_inodes_count_hi, u16, u32, 16;
    used_dirs, set_used_dirs, bg_used_dirs_count_lo, bg_used_dirs_count_hi, u16, u32, 16;
    itable_unused, set_itable_unused, bg_itable_unused_lo, bg_itable_unused_hi, u16, u32, 16;
    block_bitmap_csum, set_block_bitmap_csum, bg_block_bitmap_csum_lo, bg_block_bitmap_csum_hi, u16, u32, 16;
    inode_bitmap_csum, set_inode_bitmap_csum, bg_inode_bitmap_csum_lo, bg_inode_bitmap_csum_hi, u16, u32, 16;
}

impl GroupDesc {
    /// Block of the block bitmap.
    pub fn block_bitmap(&self) -> u64 {
        join(self.bg_block_bitmap_lo, self.bg_block_bitmap_hi)
    }

    /// Block of the inode bitmap.
    pub fn inode_bitmap(&self) -> u64 {
        join(self.bg_inode_bitmap_lo, self.bg_inode_bitmap_hi)
    }

    /// First block of the inode table.
    pub fn inode_table(&self) -> u64 {
        join(self.bg_inode_table_lo, self.bg_inode_table_hi)
    }

    /// Sets where block bitmap, inode bitmap and inode table are.
    pub fn set_places(&mut self, block_bitmap: u64, inode_bitmap: u64, inode_table: u64) {
        (self.bg_block_bitmap_lo, self.bg_block_bitmap_hi) = split(block_bitmap);
        (self.bg_inode_bitmap_lo, self.bg_inode_bitmap_hi) = split(inode_bitmap);
        (self.bg_inode_table_lo, self.bg_inode_table_hi) = split(inode_table);
    }

    /// `bg_flags`; unknown bits are kept.
    pub fn flags(&self) -> GroupFlags {
        GroupFlags::from_bits_retain(self.bg_flags.get())
    }

    /// The checksum that `bg_checksum` should hold, of descriptor `group` (feature metadata_csum).
    pub fn computed_checksum(&self, seed: u32, group: u32) -> u16 {
        let mut copy = *self;
        copy.bg_checksum.set(0);
        crc32c(crc32c(seed, &group.to_le_bytes()), copy.as_bytes()) as u16
    }

    /// Stores the right checksum.
    pub fn seal(&mut self, seed: u32, group: u32) {
        self.bg_checksum.set(self.computed_checksum(seed, group));
    }
}
