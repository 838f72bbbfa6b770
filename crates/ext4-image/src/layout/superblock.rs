//! The super block: 1024 bytes at byte 1024 of the disk.
#![expect(
    missing_docs,
    reason = "fields bear the kernel's names; Documentation/filesystems/ext4/super.rst explains each"
)]

use bitflags::bitflags;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

/// Byte offset of the super block on the disk.
pub const SUPERBLOCK_OFFSET: u64 = 1024;
/// Size of the super block in bytes.
pub const SUPERBLOCK_SIZE: usize = 1024;
/// `s_magic`.
pub const MAGIC: u16 = 0xEF53;
/// `s_state`: cleanly unmounted.
pub const STATE_VALID: u16 = 1;
/// `s_errors`: go on after an error.
pub const ERRORS_CONTINUE: u16 = 1;
/// `s_rev_level` with variable inode sizes.
pub const REV_DYNAMIC: u32 = 1;
/// `s_checksum_type`: crc32c.
pub const CHECKSUM_CRC32C: u8 = 1;
/// `s_flags`: directory hashes take bytes as signed.
pub const FLAG_SIGNED_HASH: u32 = 1;
/// `s_flags`: directory hashes take bytes as unsigned.
pub const FLAG_UNSIGNED_HASH: u32 = 2;

bitflags! {
    /// `s_feature_compat`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Compat: u32 {
        const DIR_PREALLOC = 0x1;
        const IMAGIC_INODES = 0x2;
        const HAS_JOURNAL = 0x4;
        const EXT_ATTR = 0x8;
        const RESIZE_INODE = 0x10;
        const DIR_INDEX = 0x20;
        const SPARSE_SUPER2 = 0x200;
        const FAST_COMMIT = 0x400;
        const STABLE_INODES = 0x800;
        const ORPHAN_FILE = 0x1000;
        const _ = !0;
    }

    /// `s_feature_incompat`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Incompat: u32 {
        const COMPRESSION = 0x1;
        const FILETYPE = 0x2;
        const RECOVER = 0x4;
        const JOURNAL_DEV = 0x8;
        const META_BG = 0x10;
        const EXTENTS = 0x40;
        const BIT64 = 0x80;
        const MMP = 0x100;
        const FLEX_BG = 0x200;
        const EA_INODE = 0x400;
        const DIRDATA = 0x1000;
        const CSUM_SEED = 0x2000;
        const LARGEDIR = 0x4000;
        const INLINE_DATA = 0x8000;
        const ENCRYPT = 0x1_0000;
        const CASEFOLD = 0x2_0000;
        const _ = !0;
    }

    /// `s_feature_ro_compat`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct RoCompat: u32 {
        const SPARSE_SUPER = 0x1;
        const LARGE_FILE = 0x2;
        const BTREE_DIR = 0x4;
        const HUGE_FILE = 0x8;
        const GDT_CSUM = 0x10;
        const DIR_NLINK = 0x20;
        const EXTRA_ISIZE = 0x40;
        const QUOTA = 0x100;
        const BIGALLOC = 0x200;
        const METADATA_CSUM = 0x400;
        const READONLY = 0x1000;
        const PROJECT = 0x2000;
        const VERITY = 0x8000;
        const ORPHAN_PRESENT = 0x1_0000;
        const _ = !0;
    }
}

/// `struct ext4_super_block`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Superblock {
    pub s_inodes_count: U32,
    pub s_blocks_count_lo: U32,
    pub s_r_blocks_count_lo: U32,
    pub s_free_blocks_count_lo: U32,
    pub s_free_inodes_count: U32,
    pub s_first_data_block: U32,
    pub s_log_block_size: U32,
    pub s_log_cluster_size: U32,
    pub s_blocks_per_group: U32,
    pub s_clusters_per_group: U32,
    pub s_inodes_per_group: U32,
    pub s_mtime: U32,
    pub s_wtime: U32,
    pub s_mnt_count: U16,
    pub s_max_mnt_count: U16,
    pub s_magic: U16,
    pub s_state: U16,
    pub s_errors: U16,
    pub s_minor_rev_level: U16,
    pub s_lastcheck: U32,
    pub s_checkinterval: U32,
    pub s_creator_os: U32,
    pub s_rev_level: U32,
    pub s_def_resuid: U16,
    pub s_def_resgid: U16,
    pub s_first_ino: U32,
    pub s_inode_size: U16,
    pub s_block_group_nr: U16,
    pub s_feature_compat: U32,
    pub s_feature_incompat: U32,
    pub s_feature_ro_compat: U32,
    pub s_uuid: [u8; 16],
    pub s_volume_name: [u8; 16],
    pub s_last_mounted: [u8; 64],
    pub s_algorithm_usage_bitmap: U32,
    pub s_prealloc_blocks: u8,
    pub s_prealloc_dir_blocks: u8,
    pub s_reserved_gdt_blocks: U16,
    pub s_journal_uuid: [u8; 16],
    pub s_journal_inum: U32,
    pub s_journal_dev: U32,
    pub s_last_orphan: U32,
    pub s_hash_seed: [U32; 4],
    pub s_def_hash_version: u8,
    pub s_jnl_backup_type: u8,
    pub s_desc_size: U16,
    pub s_default_mount_opts: U32,
    pub s_first_meta_bg: U32,
    pub s_mkfs_time: U32,
    pub s_jnl_blocks: [U32; 17],
    pub s_blocks_count_hi: U32,
    pub s_r_blocks_count_hi: U32,
    pub s_free_blocks_count_hi: U32,
    pub s_min_extra_isize: U16,
    pub s_want_extra_isize: U16,
    pub s_flags: U32,
    pub s_raid_stride: U16,
    pub s_mmp_interval: U16,
    pub s_mmp_block: U64,
    pub s_raid_stripe_width: U32,
    pub s_log_groups_per_flex: u8,
    pub s_checksum_type: u8,
    pub s_encryption_level: u8,
    pub s_reserved_pad: u8,
    pub s_kbytes_written: U64,
    pub s_snapshot_inum: U32,
    pub s_snapshot_id: U32,
    pub s_snapshot_r_blocks_count: U64,
    pub s_snapshot_list: U32,
    pub s_error_count: U32,
    /// `s_first_error_time` to `s_last_error_func`.
    pub s_error_info: [u8; 104],
    pub s_mount_opts: [u8; 64],
    pub s_usr_quota_inum: U32,
    pub s_grp_quota_inum: U32,
    pub s_overhead_clusters: U32,
    pub s_backup_bgs: [U32; 2],
    pub s_encrypt_algos: [u8; 4],
    pub s_encrypt_pw_salt: [u8; 16],
    pub s_lpf_ino: U32,
    pub s_prj_quota_inum: U32,
    pub s_checksum_seed: U32,
    pub s_wtime_hi: u8,
    pub s_mtime_hi: u8,
    pub s_mkfs_time_hi: u8,
    pub s_lastcheck_hi: u8,
    pub s_first_error_time_hi: u8,
    pub s_last_error_time_hi: u8,
    pub s_first_error_errcode: u8,
    pub s_last_error_errcode: u8,
    pub s_encoding: U16,
    pub s_encoding_flags: U16,
    pub s_orphan_file_inum: U32,
    pub s_reserved: [U32; 94],
    pub s_checksum: U32,
}

const _: () = assert!(size_of::<Superblock>() == SUPERBLOCK_SIZE);

impl Superblock {
    /// `s_blocks_count` of both halves.
    pub fn blocks_count(&self) -> u64 {
        join(self.s_blocks_count_lo, self.s_blocks_count_hi)
    }

    /// Sets both halves of `s_blocks_count`.
    pub fn set_blocks_count(&mut self, n: u64) {
        (self.s_blocks_count_lo, self.s_blocks_count_hi) = split(n);
    }

    /// `s_free_blocks_count` of both halves.
    pub fn free_blocks_count(&self) -> u64 {
        join(self.s_free_blocks_count_lo, self.s_free_blocks_count_hi)
    }

    /// Sets both halves of `s_free_blocks_count`.
    pub fn set_free_blocks_count(&mut self, n: u64) {
        (self.s_free_blocks_count_lo, self.s_free_blocks_count_hi) = split(n);
    }

    /// Compatible features; unknown bits are kept.
    pub fn compat(&self) -> Compat {
        Compat::from_bits_retain(self.s_feature_compat.get())
    }

    /// Incompatible features; unknown bits are kept.
    pub fn incompat(&self) -> Incompat {
        Incompat::from_bits_retain(self.s_feature_incompat.get())
    }

    /// Features that allow reading only; unknown bits are kept.
    pub fn ro_compat(&self) -> RoCompat {
        RoCompat::from_bits_retain(self.s_feature_ro_compat.get())
    }

    /// Seed of all metadata checksums.
    pub fn checksum_seed(&self) -> u32 {
        if self.incompat().contains(Incompat::CSUM_SEED) {
            self.s_checksum_seed.get()
        } else {
            super::checksum::crc32c(!0, &self.s_uuid)
        }
    }

    /// The checksum that `s_checksum` should hold.
    pub fn computed_checksum(&self) -> u32 {
        super::checksum::crc32c(!0, &self.as_bytes()[..SUPERBLOCK_SIZE - 4])
    }

    /// Stores the right checksum.
    pub fn seal(&mut self) {
        self.s_checksum = U32::new(self.computed_checksum());
    }
}

/// Joins the halves of a 64-bit number.
pub(crate) fn join(lo: U32, hi: U32) -> u64 {
    u64::from(lo.get()) | u64::from(hi.get()) << 32
}

/// Halves of a 64-bit number, low one first.
pub(crate) fn split(n: u64) -> (U32, U32) {
    (U32::new(n as u32), U32::new((n >> 32) as u32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn fields_stand_where_the_kernel_puts_them() {
        assert_eq!(offset_of!(Superblock, s_magic), 0x38);
        assert_eq!(offset_of!(Superblock, s_uuid), 0x68);
        assert_eq!(offset_of!(Superblock, s_hash_seed), 0xEC);
        assert_eq!(offset_of!(Superblock, s_jnl_blocks), 0x10C);
        assert_eq!(offset_of!(Superblock, s_blocks_count_hi), 0x150);
        assert_eq!(offset_of!(Superblock, s_log_groups_per_flex), 0x174);
        assert_eq!(offset_of!(Superblock, s_error_count), 0x194);
        assert_eq!(offset_of!(Superblock, s_mount_opts), 0x200);
        assert_eq!(offset_of!(Superblock, s_backup_bgs), 0x24C);
        assert_eq!(offset_of!(Superblock, s_checksum_seed), 0x270);
        assert_eq!(offset_of!(Superblock, s_orphan_file_inum), 0x280);
        assert_eq!(offset_of!(Superblock, s_checksum), 0x3FC);
    }
}
