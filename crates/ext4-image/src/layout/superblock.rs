//! The super block, 1024 bytes at byte 1024 of the disk, and the feature flags.
//!
//! The flags are written in full, as in `Incompat::EXT4_FEATURE_INCOMPAT_EXTENTS`, so that a search for the kernel's name
//! finds every use. The writer, the formatter, the reader, the checker, profile hcsshim and `layer inspect` share them.
#![expect(
    missing_docs,
    reason = "fields bear the kernel's names; Documentation/filesystems/ext4/super.rst explains each"
)]

use super::{
    EXT4_GOOD_OLD_FIRST_INO,
    group::DESC_SIZE,
    halves::{join, split},
    hash::DX_HASH_HALF_MD4,
};
use bitflags::{Flags, bitflags};
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

/// Byte offset of the super block on the disk.
pub(crate) const SUPERBLOCK_OFFSET: u64 = 1024;
/// Size of the super block in bytes.
pub(crate) const SUPERBLOCK_SIZE: usize = 1024;
/// `s_magic`.
pub(crate) const EXT4_SUPER_MAGIC: u16 = 0xEF53;
/// `s_state`: cleanly unmounted.
pub(crate) const EXT4_VALID_FS: u16 = 1;
/// `s_state`: the kernel found errors.
pub(crate) const EXT4_ERROR_FS: u16 = 2;
/// `s_default_mount_opts`: `user_xattr`.
pub(crate) const EXT4_DEFM_XATTR_USER: u32 = 0x4;
/// `s_default_mount_opts`: `acl`.
pub(crate) const EXT4_DEFM_ACL: u32 = 0x8;
/// `s_errors`: continue after an error.
pub(crate) const EXT4_ERRORS_CONTINUE: u16 = 1;
/// `s_rev_level` with variable inode sizes.
pub(crate) const EXT4_DYNAMIC_REV: u32 = 1;
/// `s_checksum_type`: crc32c.
pub(crate) const EXT4_CRC32C_CHKSUM: u8 = 1;
/// `s_flags`: directory hashes take bytes as unsigned.
pub(crate) const EXT2_FLAGS_UNSIGNED_HASH: u32 = 2;

bitflags! {
    /// `s_feature_compat`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Compat: u32 {
        const EXT4_FEATURE_COMPAT_DIR_PREALLOC = 0x1;
        const EXT4_FEATURE_COMPAT_IMAGIC_INODES = 0x2;
        const EXT4_FEATURE_COMPAT_HAS_JOURNAL = 0x4;
        const EXT4_FEATURE_COMPAT_EXT_ATTR = 0x8;
        const EXT4_FEATURE_COMPAT_RESIZE_INODE = 0x10;
        const EXT4_FEATURE_COMPAT_DIR_INDEX = 0x20;
        const EXT4_FEATURE_COMPAT_SPARSE_SUPER2 = 0x200;
        const EXT4_FEATURE_COMPAT_FAST_COMMIT = 0x400;
        const EXT4_FEATURE_COMPAT_STABLE_INODES = 0x800;
        const EXT4_FEATURE_COMPAT_ORPHAN_FILE = 0x1000;
        const _ = !0;
    }

    /// `s_feature_incompat`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Incompat: u32 {
        const EXT4_FEATURE_INCOMPAT_COMPRESSION = 0x1;
        const EXT4_FEATURE_INCOMPAT_FILETYPE = 0x2;
        const EXT4_FEATURE_INCOMPAT_RECOVER = 0x4;
        const EXT4_FEATURE_INCOMPAT_JOURNAL_DEV = 0x8;
        const EXT4_FEATURE_INCOMPAT_META_BG = 0x10;
        const EXT4_FEATURE_INCOMPAT_EXTENTS = 0x40;
        const EXT4_FEATURE_INCOMPAT_64BIT = 0x80;
        const EXT4_FEATURE_INCOMPAT_MMP = 0x100;
        const EXT4_FEATURE_INCOMPAT_FLEX_BG = 0x200;
        const EXT4_FEATURE_INCOMPAT_EA_INODE = 0x400;
        const EXT4_FEATURE_INCOMPAT_DIRDATA = 0x1000;
        const EXT4_FEATURE_INCOMPAT_CSUM_SEED = 0x2000;
        const EXT4_FEATURE_INCOMPAT_LARGEDIR = 0x4000;
        const EXT4_FEATURE_INCOMPAT_INLINE_DATA = 0x8000;
        const EXT4_FEATURE_INCOMPAT_ENCRYPT = 0x1_0000;
        const EXT4_FEATURE_INCOMPAT_CASEFOLD = 0x2_0000;
        const _ = !0;
    }

    /// `s_feature_ro_compat`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct RoCompat: u32 {
        const EXT4_FEATURE_RO_COMPAT_SPARSE_SUPER = 0x1;
        const EXT4_FEATURE_RO_COMPAT_LARGE_FILE = 0x2;
        const EXT4_FEATURE_RO_COMPAT_BTREE_DIR = 0x4;
        const EXT4_FEATURE_RO_COMPAT_HUGE_FILE = 0x8;
        const EXT4_FEATURE_RO_COMPAT_GDT_CSUM = 0x10;
        const EXT4_FEATURE_RO_COMPAT_DIR_NLINK = 0x20;
        const EXT4_FEATURE_RO_COMPAT_EXTRA_ISIZE = 0x40;
        const EXT4_FEATURE_RO_COMPAT_QUOTA = 0x100;
        const EXT4_FEATURE_RO_COMPAT_BIGALLOC = 0x200;
        const EXT4_FEATURE_RO_COMPAT_METADATA_CSUM = 0x400;
        const EXT4_FEATURE_RO_COMPAT_READONLY = 0x1000;
        const EXT4_FEATURE_RO_COMPAT_PROJECT = 0x2000;
        const EXT4_FEATURE_RO_COMPAT_VERITY = 0x8000;
        const EXT4_FEATURE_RO_COMPAT_ORPHAN_PRESENT = 0x1_0000;
        const _ = !0;
    }
}

/// `struct ext4_super_block`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct Superblock {
    pub(crate) s_inodes_count: U32,
    pub(crate) s_blocks_count_lo: U32,
    pub(crate) s_r_blocks_count_lo: U32,
    pub(crate) s_free_blocks_count_lo: U32,
    pub(crate) s_free_inodes_count: U32,
    pub(crate) s_first_data_block: U32,
    pub(crate) s_log_block_size: U32,
    pub(crate) s_log_cluster_size: U32,
    pub(crate) s_blocks_per_group: U32,
    pub(crate) s_clusters_per_group: U32,
    pub(crate) s_inodes_per_group: U32,
    pub(crate) s_mtime: U32,
    pub(crate) s_wtime: U32,
    pub(crate) s_mnt_count: U16,
    pub(crate) s_max_mnt_count: U16,
    pub(crate) s_magic: U16,
    pub(crate) s_state: U16,
    pub(crate) s_errors: U16,
    pub(crate) s_minor_rev_level: U16,
    pub(crate) s_lastcheck: U32,
    pub(crate) s_checkinterval: U32,
    pub(crate) s_creator_os: U32,
    pub(crate) s_rev_level: U32,
    pub(crate) s_def_resuid: U16,
    pub(crate) s_def_resgid: U16,
    pub(crate) s_first_ino: U32,
    pub(crate) s_inode_size: U16,
    pub(crate) s_block_group_nr: U16,
    pub(crate) s_feature_compat: U32,
    pub(crate) s_feature_incompat: U32,
    pub(crate) s_feature_ro_compat: U32,
    pub(crate) s_uuid: [u8; 16],
    pub(crate) s_volume_name: [u8; 16],
    pub(crate) s_last_mounted: [u8; 64],
    pub(crate) s_algorithm_usage_bitmap: U32,
    pub(crate) s_prealloc_blocks: u8,
    pub(crate) s_prealloc_dir_blocks: u8,
    pub(crate) s_reserved_gdt_blocks: U16,
    pub(crate) s_journal_uuid: [u8; 16],
    pub(crate) s_journal_inum: U32,
    pub(crate) s_journal_dev: U32,
    pub(crate) s_last_orphan: U32,
    pub(crate) s_hash_seed: [U32; 4],
    pub(crate) s_def_hash_version: u8,
    pub(crate) s_jnl_backup_type: u8,
    pub(crate) s_desc_size: U16,
    pub(crate) s_default_mount_opts: U32,
    pub(crate) s_first_meta_bg: U32,
    pub(crate) s_mkfs_time: U32,
    pub(crate) s_jnl_blocks: [U32; 17],
    pub(crate) s_blocks_count_hi: U32,
    pub(crate) s_r_blocks_count_hi: U32,
    pub(crate) s_free_blocks_count_hi: U32,
    pub(crate) s_min_extra_isize: U16,
    pub(crate) s_want_extra_isize: U16,
    pub(crate) s_flags: U32,
    pub(crate) s_raid_stride: U16,
    pub(crate) s_mmp_interval: U16,
    pub(crate) s_mmp_block: U64,
    pub(crate) s_raid_stripe_width: U32,
    pub(crate) s_log_groups_per_flex: u8,
    pub(crate) s_checksum_type: u8,
    pub(crate) s_encryption_level: u8,
    pub(crate) s_reserved_pad: u8,
    pub(crate) s_kbytes_written: U64,
    pub(crate) s_snapshot_inum: U32,
    pub(crate) s_snapshot_id: U32,
    pub(crate) s_snapshot_r_blocks_count: U64,
    pub(crate) s_snapshot_list: U32,
    pub(crate) s_error_count: U32,
    /// `s_first_error_time` to `s_last_error_func`.
    pub(crate) s_error_info: [u8; 104],
    pub(crate) s_mount_opts: [u8; 64],
    pub(crate) s_usr_quota_inum: U32,
    pub(crate) s_grp_quota_inum: U32,
    pub(crate) s_overhead_clusters: U32,
    pub(crate) s_backup_bgs: [U32; 2],
    pub(crate) s_encrypt_algos: [u8; 4],
    pub(crate) s_encrypt_pw_salt: [u8; 16],
    pub(crate) s_lpf_ino: U32,
    pub(crate) s_prj_quota_inum: U32,
    pub(crate) s_checksum_seed: U32,
    pub(crate) s_wtime_hi: u8,
    pub(crate) s_mtime_hi: u8,
    pub(crate) s_mkfs_time_hi: u8,
    pub(crate) s_lastcheck_hi: u8,
    pub(crate) s_first_error_time_hi: u8,
    pub(crate) s_last_error_time_hi: u8,
    pub(crate) s_first_error_errcode: u8,
    pub(crate) s_last_error_errcode: u8,
    pub(crate) s_encoding: U16,
    pub(crate) s_encoding_flags: U16,
    pub(crate) s_orphan_file_inum: U32,
    pub(crate) s_reserved: [U32; 94],
    pub(crate) s_checksum: U32,
}

const _: () = assert!(size_of::<Superblock>() == SUPERBLOCK_SIZE);

/// Names that `tune2fs` does not derive from the kernel's.
const TUNE2FS_NAMES: [(&str, &str); 5] = [
    ("EXT4_FEATURE_INCOMPAT_RECOVER", "needs_recovery"),
    ("EXT4_FEATURE_INCOMPAT_CSUM_SEED", "metadata_csum_seed"),
    ("EXT4_FEATURE_INCOMPAT_LARGEDIR", "large_dir"),
    ("EXT4_FEATURE_RO_COMPAT_GDT_CSUM", "uninit_bg"),
    ("EXT4_FEATURE_RO_COMPAT_READONLY", "read-only"),
];

/// The names of the flags that are set, from the lowest bit up, as `tune2fs -l` has them; hexadecimal without a name.
pub(crate) fn feature_names<F: Flags<Bits = u32> + Copy>(flags: F) -> impl Iterator<Item = String> {
    let bits = flags.bits();
    (0..u32::BITS).map(|n| 1 << n).filter(move |bit| bits & bit != 0).map(|bit| {
        let flag = F::FLAGS.iter().find(|flag| flag.is_named() && flag.value().bits() == bit);
        flag.map_or_else(|| format!("{bit:#x}"), |flag| tune2fs_name(flag.name()))
    })
}

fn tune2fs_name(kernel: &str) -> String {
    if let Some((_, name)) = TUNE2FS_NAMES.iter().find(|(known, _)| *known == kernel) {
        return (*name).to_owned();
    }
    let kinds = ["EXT4_FEATURE_RO_COMPAT_", "EXT4_FEATURE_INCOMPAT_", "EXT4_FEATURE_COMPAT_"];
    kinds.iter().find_map(|kind| kernel.strip_prefix(kind)).unwrap_or(kernel).to_lowercase()
}

/// Whether feature sparse_super puts a copy of the super block into a group other than the first: group 1, and the powers
/// of 3, 5 and 7 (`ext4_bg_has_super`).
pub(crate) fn sparse_super_has_copy(group: u64) -> bool {
    group == 1
        || [3u64, 5, 7].iter().any(|base| {
            let mut power = *base;
            while power < group {
                power *= base;
            }
            power == group
        })
}

/// Size and features of a new file system.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) blocks_count: u64,
    pub(crate) free_blocks_count: u64,
    pub(crate) inodes_count: u32,
    pub(crate) free_inodes_count: u32,
    pub(crate) first_data_block: u32,
    pub(crate) log_block_size: u32,
    pub(crate) blocks_per_group: u32,
    pub(crate) inodes_per_group: u32,
    pub(crate) inode_size: u16,
    /// `s_min_extra_isize` and `s_want_extra_isize`.
    pub(crate) extra_isize: u16,
    pub(crate) compat: Compat,
    pub(crate) incompat: Incompat,
    pub(crate) ro_compat: RoCompat,
}

impl Superblock {
    /// A cleanly unmounted file system of revision 1; all fields that `shape` does not cover are zero.
    pub(crate) fn new(shape: &Shape) -> Self {
        let mut sb = Self::new_zeroed();
        sb.s_inodes_count.set(shape.inodes_count);
        sb.set_blocks_count(shape.blocks_count);
        sb.set_free_blocks_count(shape.free_blocks_count);
        sb.s_free_inodes_count.set(shape.free_inodes_count);
        sb.s_first_data_block.set(shape.first_data_block);
        sb.s_log_block_size.set(shape.log_block_size);
        sb.s_log_cluster_size.set(shape.log_block_size);
        sb.s_blocks_per_group.set(shape.blocks_per_group);
        sb.s_clusters_per_group.set(shape.blocks_per_group);
        sb.s_inodes_per_group.set(shape.inodes_per_group);
        sb.s_magic.set(EXT4_SUPER_MAGIC);
        sb.s_state.set(EXT4_VALID_FS);
        sb.s_errors.set(EXT4_ERRORS_CONTINUE);
        sb.s_rev_level.set(EXT4_DYNAMIC_REV);
        sb.s_first_ino.set(EXT4_GOOD_OLD_FIRST_INO);
        sb.s_inode_size.set(shape.inode_size);
        sb.s_feature_compat.set(shape.compat.bits());
        sb.s_feature_incompat.set(shape.incompat.bits());
        sb.s_feature_ro_compat.set(shape.ro_compat.bits());
        sb.s_min_extra_isize.set(shape.extra_isize);
        sb.s_want_extra_isize.set(shape.extra_isize);
        sb
    }

    /// Sets what features metadata_csum, 64bit and dir_index need, except the checksum itself ([`Self::seal`]), and the
    /// mount count that no mount reaches.
    pub(crate) fn set_checksums_and_hash(&mut self, hash_seed: [U32; 4]) {
        self.s_hash_seed = hash_seed;
        self.s_def_hash_version = DX_HASH_HALF_MD4;
        self.s_desc_size.set(DESC_SIZE as u16);
        self.s_flags.set(EXT2_FLAGS_UNSIGNED_HASH);
        self.s_checksum_type = EXT4_CRC32C_CHKSUM;
        self.s_max_mnt_count.set(u16::MAX);
    }

    /// `s_blocks_count` of both halves.
    pub(crate) fn blocks_count(&self) -> u64 {
        join(self.s_blocks_count_lo, self.s_blocks_count_hi)
    }

    /// Sets both halves of `s_blocks_count`.
    pub(crate) fn set_blocks_count(&mut self, n: u64) {
        (self.s_blocks_count_lo, self.s_blocks_count_hi) = split(n);
    }

    /// `s_free_blocks_count` of both halves.
    pub(crate) fn free_blocks_count(&self) -> u64 {
        join(self.s_free_blocks_count_lo, self.s_free_blocks_count_hi)
    }

    /// `s_r_blocks_count` of both halves.
    pub(crate) fn r_blocks_count(&self) -> u64 {
        join(self.s_r_blocks_count_lo, self.s_r_blocks_count_hi)
    }

    /// Sets both halves of `s_r_blocks_count`.
    pub(crate) fn set_r_blocks_count(&mut self, n: u64) {
        (self.s_r_blocks_count_lo, self.s_r_blocks_count_hi) = split(n);
    }

    /// Sets both halves of `s_free_blocks_count`.
    pub(crate) fn set_free_blocks_count(&mut self, n: u64) {
        (self.s_free_blocks_count_lo, self.s_free_blocks_count_hi) = split(n);
    }

    /// Compatible features; unknown bits are kept.
    pub(crate) fn compat(&self) -> Compat {
        Compat::from_bits_retain(self.s_feature_compat.get())
    }

    /// Incompatible features; unknown bits are kept.
    pub(crate) fn incompat(&self) -> Incompat {
        Incompat::from_bits_retain(self.s_feature_incompat.get())
    }

    /// Features that allow reading only; unknown bits are kept.
    pub(crate) fn ro_compat(&self) -> RoCompat {
        RoCompat::from_bits_retain(self.s_feature_ro_compat.get())
    }

    /// Seed of all metadata checksums.
    pub(crate) fn checksum_seed(&self) -> u32 {
        if self.incompat().contains(Incompat::EXT4_FEATURE_INCOMPAT_CSUM_SEED) {
            self.s_checksum_seed.get()
        } else {
            super::checksum::crc32c(!0, &self.s_uuid)
        }
    }

    /// The checksum that `s_checksum` should hold.
    pub(crate) fn computed_checksum(&self) -> u32 {
        super::checksum::crc32c(!0, &self.as_bytes()[..SUPERBLOCK_SIZE - 4])
    }

    /// Stores the right checksum.
    pub(crate) fn seal(&mut self) {
        self.s_checksum = U32::new(self.computed_checksum());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn features_have_the_names_of_tune2fs_and_unknown_ones_their_bit() {
        let names = |flags: Incompat| feature_names(flags).collect::<Vec<_>>();
        assert_eq!(
            names(Incompat::from_bits_retain(0x8000_00C2)),
            ["filetype", "extents", "64bit", "0x80000000"]
        );
        assert_eq!(
            names(Incompat::from_bits_retain(0x6004)),
            ["needs_recovery", "metadata_csum_seed", "large_dir"]
        );
        let ro = RoCompat::from_bits_retain(0x1411);
        assert_eq!(
            feature_names(ro).collect::<Vec<_>>(),
            ["sparse_super", "uninit_bg", "metadata_csum", "read-only"]
        );
    }

    #[test]
    fn fields_are_where_the_kernel_puts_them() {
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
