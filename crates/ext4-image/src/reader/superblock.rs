//! The superblock, parsed into what the rest of the reader needs.
//!
//! ```text
//!  byte 1024: counts, sizes ─► Geometry { block_size, groups, inode_size, … }
//!             s_feature_*   ─► Unsupported if unknown, else kept as flags
//! ```
//!
//! Invariant of [`Geometry`]: every count is checked against the size of the disk, every divisor is non-zero and
//! `blocks_count * block_size` does not overflow. Called by [`super::Ext4::open`] and by the checker.

use crate::{
    Ext4Error, Place,
    error::SuperblockFault,
    layout::{
        group::DESC_SIZE,
        inode::EXT4_GOOD_OLD_INODE_SIZE,
        superblock::{
            Compat, EXT4_CRC32C_CHKSUM, EXT4_DYNAMIC_REV, EXT4_SUPER_MAGIC, Incompat, RoCompat,
            SUPERBLOCK_OFFSET, Superblock, feature_names, sparse_super_has_copy,
        },
    },
};
use zerocopy::little_endian::U32;

/// The incompatible features that the reader understands.
pub(crate) const KNOWN_INCOMPAT: Incompat = Incompat::EXT4_FEATURE_INCOMPAT_FILETYPE
    .union(Incompat::EXT4_FEATURE_INCOMPAT_RECOVER)
    .union(Incompat::EXT4_FEATURE_INCOMPAT_META_BG)
    .union(Incompat::EXT4_FEATURE_INCOMPAT_EXTENTS)
    .union(Incompat::EXT4_FEATURE_INCOMPAT_64BIT)
    .union(Incompat::EXT4_FEATURE_INCOMPAT_FLEX_BG)
    .union(Incompat::EXT4_FEATURE_INCOMPAT_EA_INODE)
    .union(Incompat::EXT4_FEATURE_INCOMPAT_CSUM_SEED)
    .union(Incompat::EXT4_FEATURE_INCOMPAT_LARGEDIR)
    .union(Incompat::EXT4_FEATURE_INCOMPAT_INLINE_DATA);

/// Largest `s_log_block_size`: blocks of 64 KiB (`EXT4_MAX_BLOCK_LOG_SIZE`).
const MAX_LOG_BLOCK_SIZE: u32 = 6;
/// Fewest blocks of a group that the kernel mounts.
const MIN_BLOCKS_PER_GROUP: u32 = 256;
/// Size of a group descriptor without feature 64bit (`EXT4_MIN_DESC_SIZE`).
const MIN_DESC_SIZE: u16 = 32;
/// Largest group descriptor.
const MAX_DESC_SIZE: u32 = 1024;

/// The file system's shape, checked against the disk.
#[derive(Debug, Clone)]
pub struct Geometry {
    /// Bytes in a block: 1024 to 65536.
    pub block_size: u32,
    /// Blocks of the whole file system.
    pub blocks_count: u64,
    /// Number of the block that holds the superblock: 1 for 1 KiB blocks, else 0.
    pub first_data_block: u32,
    /// Blocks in a group.
    pub blocks_per_group: u32,
    /// Inodes in a group.
    pub inodes_per_group: u32,
    /// Inodes of the whole file system.
    pub inodes_count: u32,
    /// Bytes of an inode on disk: 128 to the block size.
    pub inode_size: u16,
    /// Bytes of a group descriptor.
    pub desc_size: u16,
    /// Block groups.
    pub groups: u32,
    /// `s_first_ino`: the first inode that is not reserved.
    pub first_ino: u32,
    /// Compatible features; unknown bits are kept.
    pub s_feature_compat: Compat,
    /// Incompatible features; all of them are known.
    pub s_feature_incompat: Incompat,
    /// Features that allow reading only; unknown bits are kept.
    pub s_feature_ro_compat: RoCompat,
    /// `s_first_meta_bg`: the first descriptor block in meta_bg's places.
    pub first_meta_bg: u32,
    /// `s_uuid`.
    pub uuid: [u8; 16],
    /// Seed of all metadata checksums.
    pub checksum_seed: u32,
    /// `s_hash_seed`.
    pub hash_seed: [u32; 4],
    /// `s_flags`: signed or unsigned directory hash.
    pub flags: u32,
    /// `s_journal_inum`.
    pub journal_inum: u32,
    /// `s_backup_bgs` of sparse_super2.
    pub backup_bgs: [u32; 2],
}

impl Geometry {
    /// Parses a superblock of a disk of `disk_bytes`.
    ///
    /// # Errors
    /// `Corrupt` for impossible counts or a wrong checksum, `Unsupported` for features that this crate does not know.
    pub(crate) fn parse(sb: &Superblock, disk_bytes: u64) -> Result<Self, Ext4Error> {
        let bad = |fault| Err(Ext4Error::corrupt(fault, Place::offset(SUPERBLOCK_OFFSET)));
        let unsupported = |what: String| Err(Ext4Error::unsupported(what, Place::offset(SUPERBLOCK_OFFSET)));
        if sb.s_magic.get() != EXT4_SUPER_MAGIC {
            return bad(SuperblockFault::Magic);
        }
        if sb.s_rev_level.get() != EXT4_DYNAMIC_REV {
            return unsupported(format!("revision {}", sb.s_rev_level));
        }
        let (compat, incompat, ro_compat) = (sb.compat(), sb.incompat(), sb.ro_compat());
        if ro_compat.contains(RoCompat::EXT4_FEATURE_RO_COMPAT_METADATA_CSUM) {
            if sb.s_checksum_type != EXT4_CRC32C_CHKSUM {
                return unsupported(format!("checksum type {}", sb.s_checksum_type));
            }
            if sb.computed_checksum() != sb.s_checksum.get() {
                return bad(SuperblockFault::Checksum);
            }
        }
        let unknown = incompat.difference(KNOWN_INCOMPAT).bits();
        if unknown != 0 {
            return unsupported(format!("incompatible feature bits {unknown:#x}"));
        }
        if ro_compat.contains(RoCompat::EXT4_FEATURE_RO_COMPAT_BIGALLOC) {
            return unsupported("feature bigalloc".to_owned());
        }
        let log = sb.s_log_block_size.get();
        if log > MAX_LOG_BLOCK_SIZE {
            return bad(SuperblockFault::BlockSize);
        }
        let block_size = 1024u32 << log;
        let is_64bit = incompat.contains(Incompat::EXT4_FEATURE_INCOMPAT_64BIT);
        let blocks_count = if is_64bit { sb.blocks_count() } else { u64::from(sb.s_blocks_count_lo.get()) };
        let first_data_block = sb.s_first_data_block.get();
        let blocks_per_group = sb.s_blocks_per_group.get();
        let inodes_per_group = sb.s_inodes_per_group.get();
        let inodes_count = sb.s_inodes_count.get();
        let inode_size = sb.s_inode_size.get();
        let desc_size = if is_64bit { sb.s_desc_size.get() } else { MIN_DESC_SIZE };
        let bytes = blocks_count.checked_mul(u64::from(block_size));
        if bytes.is_none_or(|bytes| bytes > disk_bytes) {
            return bad(SuperblockFault::BlocksCount);
        }
        if first_data_block != u32::from(block_size == 1024) || blocks_count <= u64::from(first_data_block) {
            return bad(SuperblockFault::FirstDataBlock);
        }
        if blocks_per_group < MIN_BLOCKS_PER_GROUP
            || blocks_per_group > block_size * 8
            || !blocks_per_group.is_multiple_of(8)
        {
            return bad(SuperblockFault::BlocksPerGroup);
        }
        if sb.s_log_cluster_size.get() != log {
            return bad(SuperblockFault::ClusterSize);
        }
        if !inode_size.is_power_of_two()
            || usize::from(inode_size) < EXT4_GOOD_OLD_INODE_SIZE
            || u32::from(inode_size) > block_size
        {
            return bad(SuperblockFault::InodeSize);
        }
        if !desc_size.is_power_of_two()
            || u32::from(desc_size) > block_size.min(MAX_DESC_SIZE)
            || desc_size < if is_64bit { DESC_SIZE as u16 } else { MIN_DESC_SIZE }
        {
            return bad(SuperblockFault::DescSize);
        }
        if inodes_per_group == 0 || inodes_per_group > block_size * 8 {
            return bad(SuperblockFault::InodesPerGroup);
        }
        let groups = (blocks_count - u64::from(first_data_block)).div_ceil(u64::from(blocks_per_group));
        let Some(groups) = u32::try_from(groups)
            .ok()
            .filter(|g| u64::from(*g) * u64::from(inodes_per_group) == u64::from(inodes_count))
        else {
            return bad(SuperblockFault::InodesCount);
        };
        if u64::from(inodes_count) * u64::from(inode_size) > disk_bytes {
            return bad(SuperblockFault::InodesBeyondDisk);
        }
        Ok(Self {
            block_size,
            blocks_count,
            first_data_block,
            blocks_per_group,
            inodes_per_group,
            inodes_count,
            inode_size,
            desc_size,
            groups,
            first_ino: sb.s_first_ino.get(),
            s_feature_compat: compat,
            s_feature_incompat: incompat,
            s_feature_ro_compat: ro_compat,
            first_meta_bg: sb.s_first_meta_bg.get(),
            uuid: sb.s_uuid,
            checksum_seed: sb.checksum_seed(),
            hash_seed: sb.s_hash_seed.map(U32::get),
            flags: sb.s_flags.get(),
            journal_inum: sb.s_journal_inum.get(),
            backup_bgs: sb.s_backup_bgs.map(U32::get),
        })
    }

    /// Whether metadata carry CRC-32C checksums.
    pub fn metadata_csum(&self) -> bool {
        self.has_ro(RoCompat::EXT4_FEATURE_RO_COMPAT_METADATA_CSUM)
    }

    /// Whether the file system has a journal.
    pub fn has_journal(&self) -> bool {
        self.has_compat(Compat::EXT4_FEATURE_COMPAT_HAS_JOURNAL)
    }

    /// The names of all features, as `tune2fs -l` has them; a bit without a name in hexadecimal.
    pub fn feature_names(&self) -> Vec<String> {
        let compat = feature_names(self.s_feature_compat);
        let incompat = feature_names(self.s_feature_incompat);
        compat.chain(incompat).chain(feature_names(self.s_feature_ro_compat)).collect()
    }

    /// Whether a compatible feature is on.
    pub(crate) fn has_compat(&self, feature: Compat) -> bool {
        self.s_feature_compat.contains(feature)
    }

    /// Whether an incompatible feature is on.
    pub(crate) fn has(&self, feature: Incompat) -> bool {
        self.s_feature_incompat.contains(feature)
    }

    /// Whether a feature that allows reading only is on.
    pub(crate) fn has_ro(&self, feature: RoCompat) -> bool {
        self.s_feature_ro_compat.contains(feature)
    }

    /// Whether group `group` begins with a copy of the superblock (`ext4_bg_has_super`).
    pub(crate) fn group_has_super(&self, group: u32) -> bool {
        if group == 0 {
            return true;
        }
        if self.has_compat(Compat::EXT4_FEATURE_COMPAT_SPARSE_SUPER2) {
            return self.backup_bgs.contains(&group);
        }
        !self.has_ro(RoCompat::EXT4_FEATURE_RO_COMPAT_SPARSE_SUPER) || sparse_super_has_copy(u64::from(group))
    }

    /// The first block of group `group`.
    pub(crate) fn group_first_block(&self, group: u32) -> u64 {
        u64::from(self.first_data_block) + u64::from(group) * u64::from(self.blocks_per_group)
    }

    /// How many blocks group `group` has (the last one may be short).
    pub(crate) fn group_blocks(&self, group: u32) -> u32 {
        let left = self.blocks_count.saturating_sub(self.group_first_block(group));
        left.min(u64::from(self.blocks_per_group)) as u32
    }

    /// The block with the descriptor of group `group`, and the byte in it.
    pub(crate) fn descriptor_place(&self, group: u32) -> (u64, usize) {
        let per_block = self.block_size / u32::from(self.desc_size);
        let nr = group / per_block;
        let at = (group % per_block) as usize * usize::from(self.desc_size);
        if !self.has(Incompat::EXT4_FEATURE_INCOMPAT_META_BG) || nr < self.first_meta_bg {
            return (u64::from(self.first_data_block) + 1 + u64::from(nr), at);
        }
        let first = nr * per_block;
        (self.group_first_block(first) + u64::from(self.group_has_super(first)), at)
    }

    /// Descriptors in a block.
    pub(crate) fn descriptors_per_block(&self) -> u32 {
        self.block_size / u32::from(self.desc_size)
    }

    /// Blocks of descriptors behind each super block: all of them, or those before the first in meta_bg's places.
    pub(crate) fn plain_descriptor_blocks(&self) -> u32 {
        if self.has(Incompat::EXT4_FEATURE_INCOMPAT_META_BG) {
            self.first_meta_bg
        } else {
            self.groups.div_ceil(self.descriptors_per_block())
        }
    }

    /// Whether the descriptor of group `group` is where meta_bg has it.
    pub(crate) fn in_meta_group(&self, group: u32) -> bool {
        self.has(Incompat::EXT4_FEATURE_INCOMPAT_META_BG)
            && group / self.descriptors_per_block() >= self.first_meta_bg
    }

    /// Blocks at the begin of group `group` for super block, descriptors and their copies (`ext4_num_base_meta_clusters`);
    /// reserved descriptor blocks are not counted.
    pub(crate) fn group_head_blocks(&self, group: u32) -> u64 {
        let has_super = u64::from(self.group_has_super(group));
        if self.in_meta_group(group) {
            let per_block = self.descriptors_per_block();
            let within = group % per_block;
            has_super + u64::from(within == 0 || within == 1 || within == per_block - 1)
        } else {
            has_super * (1 + u64::from(self.plain_descriptor_blocks()))
        }
    }

    /// Blocks of one group's inode table.
    pub(crate) fn inode_table_blocks(&self) -> u32 {
        (u64::from(self.inodes_per_group) * u64::from(self.inode_size)).div_ceil(u64::from(self.block_size))
            as u32
    }

    /// Whether `count` blocks from `first` lie inside the file system, after the superblock.
    pub(crate) fn holds(&self, first: u64, count: u64) -> bool {
        first > u64::from(self.first_data_block)
            && first.checked_add(count).is_some_and(|end| end <= self.blocks_count)
    }
}
