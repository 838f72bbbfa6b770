//! Group descriptors: 64 bytes with feature 64bit, the first 32 of them without.

use super::{
    checksum::{CRC16, crc32c, crc32c_without},
    halves::{join, split},
};
use bitflags::bitflags;
use std::mem::offset_of;
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32},
};

/// `s_desc_size` of a 64bit file system.
pub(crate) const DESC_SIZE: usize = 64;

bitflags! {
    /// `bg_flags`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct GroupFlags: u16 {
        /// Inode bitmap and table are not initialized.
        const EXT4_BG_INODE_UNINIT = 1;
        /// Block bitmap is not initialized.
        const EXT4_BG_BLOCK_UNINIT = 2;
        /// The inode table is zeroed.
        const EXT4_BG_INODE_ZEROED = 4;
        const _ = !0;
    }
}

/// `struct ext4_group_desc`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct GroupDesc {
    pub(crate) bg_block_bitmap_lo: U32,
    pub(crate) bg_inode_bitmap_lo: U32,
    pub(crate) bg_inode_table_lo: U32,
    pub(crate) bg_free_blocks_count_lo: U16,
    pub(crate) bg_free_inodes_count_lo: U16,
    pub(crate) bg_used_dirs_count_lo: U16,
    pub(crate) bg_flags: U16,
    pub(crate) bg_exclude_bitmap_lo: U32,
    pub(crate) bg_block_bitmap_csum_lo: U16,
    pub(crate) bg_inode_bitmap_csum_lo: U16,
    pub(crate) bg_itable_unused_lo: U16,
    pub(crate) bg_checksum: U16,
    pub(crate) bg_block_bitmap_hi: U32,
    pub(crate) bg_inode_bitmap_hi: U32,
    pub(crate) bg_inode_table_hi: U32,
    pub(crate) bg_free_blocks_count_hi: U16,
    pub(crate) bg_free_inodes_count_hi: U16,
    pub(crate) bg_used_dirs_count_hi: U16,
    pub(crate) bg_itable_unused_hi: U16,
    pub(crate) bg_exclude_bitmap_hi: U32,
    pub(crate) bg_block_bitmap_csum_hi: U16,
    pub(crate) bg_inode_bitmap_csum_hi: U16,
    pub(crate) bg_reserved: U32,
}

const _: () = assert!(size_of::<GroupDesc>() == DESC_SIZE);

/// Getter and setter of a number whose halves are two fields.
macro_rules! halves {
    ($($get:ident, $set:ident, $lo:ident, $hi:ident, $half:ident, $whole:ty, $bits:literal;)*) => {
        impl GroupDesc {$(
            #[doc = concat!("`", stringify!($lo), "` with its high half.")]
            pub(crate) fn $get(&self) -> $whole {
                <$whole>::from(self.$lo.get()) | <$whole>::from(self.$hi.get()) << $bits
            }

            #[doc = concat!("Sets `", stringify!($lo), "` and its high half.")]
            pub(crate) fn $set(&mut self, value: $whole) {
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
    pub(crate) fn block_bitmap(&self) -> u64 {
        join(self.bg_block_bitmap_lo, self.bg_block_bitmap_hi)
    }

    /// Block of the inode bitmap.
    pub(crate) fn inode_bitmap(&self) -> u64 {
        join(self.bg_inode_bitmap_lo, self.bg_inode_bitmap_hi)
    }

    /// First block of the inode table.
    pub(crate) fn inode_table(&self) -> u64 {
        join(self.bg_inode_table_lo, self.bg_inode_table_hi)
    }

    /// Sets where block bitmap, inode bitmap and inode table are.
    pub(crate) fn set_places(&mut self, block_bitmap: u64, inode_bitmap: u64, inode_table: u64) {
        (self.bg_block_bitmap_lo, self.bg_block_bitmap_hi) = split(block_bitmap);
        (self.bg_inode_bitmap_lo, self.bg_inode_bitmap_hi) = split(inode_bitmap);
        (self.bg_inode_table_lo, self.bg_inode_table_hi) = split(inode_table);
    }

    /// `bg_flags`; unknown bits are kept.
    pub(crate) fn flags(&self) -> GroupFlags {
        GroupFlags::from_bits_retain(self.bg_flags.get())
    }

    /// The descriptor in its slot on disk; what a slot of 32 bytes lacks is zero.
    pub(crate) fn from_slot(slot: &[u8]) -> Self {
        let mut desc = Self::new_zeroed();
        let n = slot.len().min(DESC_SIZE);
        desc.as_mut_bytes()[..n].copy_from_slice(&slot[..n]);
        desc
    }

    /// Stores the right checksum (feature metadata_csum).
    pub(crate) fn seal(&mut self, seed: u32, group: u32) {
        let sum = desc_checksum(seed, group, self.as_bytes());
        self.bg_checksum.set(sum);
    }
}

/// Where `bg_checksum` is in a descriptor, which it does not cover.
const CHECKSUM_AT: usize = offset_of!(GroupDesc, bg_checksum);

/// The checksum that the descriptor of `group` in its whole `slot` should hold, with feature metadata_csum
/// (`ext4_group_desc_csum` of fs/ext4/super.c).
pub(crate) fn desc_checksum(seed: u32, group: u32, slot: &[u8]) -> u16 {
    crc32c_without(crc32c(seed, &group.to_le_bytes()), slot, CHECKSUM_AT, 2) as u16
}

/// The same with feature uninit_bg (`EXT4_FEATURE_RO_COMPAT_GDT_CSUM`).
pub(crate) fn desc_checksum_crc16(uuid: &[u8; 16], group: u32, slot: &[u8]) -> u16 {
    let mut digest = CRC16.digest();
    digest.update(uuid);
    digest.update(&group.to_le_bytes());
    digest.update(slot.get(..CHECKSUM_AT).unwrap_or(slot));
    digest.update(slot.get(CHECKSUM_AT + 2..).unwrap_or(&[]));
    digest.finalize()
}
