//! The superblock, parsed into what the rest of the reader needs.
//!
//! ```text
//!  byte 1024: counts, sizes ─► Geometry { block_size, groups, inode_size, … }
//!             s_feature_*   ─► refused if unknown, else kept as bits
//! ```
//!
//! Invariant of [`Geometry`]: every count is checked against the size of the disk, every divisor is non-zero and
//! `blocks_count * block_size` does not overflow. Called by [`super::Ext4::open`] and by the checker.

use super::{
    bytes::{chksum, u8_at, u16_at, u32_at, wide},
    corrupt, unsupported,
};
use crate::Ext4Error;

/// Where the primary superblock stands, in bytes.
pub(crate) const SUPERBLOCK_OFFSET: u64 = 1024;
/// Its length, in bytes.
pub(crate) const SUPERBLOCK_LEN: usize = 1024;
const MAGIC: u16 = 0xEF53;

/// `s_feature_compat`: the bits this program knows (include/uapi of the kernel: `EXT4_FEATURE_COMPAT_*`).
pub(crate) mod compat {
    pub(crate) const HAS_JOURNAL: u32 = 0x4;
    pub(crate) const EXT_ATTR: u32 = 0x8;
    pub(crate) const DIR_INDEX: u32 = 0x20;
    pub(crate) const SPARSE_SUPER2: u32 = 0x200;
    pub(crate) const FAST_COMMIT: u32 = 0x400;
}

/// `s_feature_incompat`.
pub(crate) mod incompat {
    pub(crate) const FILETYPE: u32 = 0x2;
    pub(crate) const RECOVER: u32 = 0x4;
    pub(crate) const META_BG: u32 = 0x10;
    pub(crate) const EXTENTS: u32 = 0x40;
    pub(crate) const BIT64: u32 = 0x80;
    pub(crate) const FLEX_BG: u32 = 0x200;
    pub(crate) const EA_INODE: u32 = 0x400;
    pub(crate) const CSUM_SEED: u32 = 0x2000;
    pub(crate) const LARGEDIR: u32 = 0x4000;
    pub(crate) const INLINE_DATA: u32 = 0x8000;
    /// What the reader understands.
    pub(crate) const KNOWN: u32 = FILETYPE
        | RECOVER
        | META_BG
        | EXTENTS
        | BIT64
        | FLEX_BG
        | EA_INODE
        | CSUM_SEED
        | LARGEDIR
        | INLINE_DATA;
}

/// `s_feature_ro_compat`.
pub(crate) mod ro_compat {
    pub(crate) const SPARSE_SUPER: u32 = 0x1;
    pub(crate) const LARGE_FILE: u32 = 0x2;
    pub(crate) const HUGE_FILE: u32 = 0x8;
    pub(crate) const DIR_NLINK: u32 = 0x20;
    pub(crate) const GDT_CSUM: u32 = 0x10;
    pub(crate) const BIGALLOC: u32 = 0x200;
    pub(crate) const METADATA_CSUM: u32 = 0x400;
}

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
    /// `s_feature_compat`.
    pub feature_compat: u32,
    /// `s_feature_incompat`.
    pub feature_incompat: u32,
    /// `s_feature_ro_compat`.
    pub feature_ro_compat: u32,
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
    /// `Corrupt` for impossible counts or a wrong checksum, `Unsupported` for features that this program does not know.
    pub(crate) fn parse(sb: &[u8], disk_bytes: u64) -> Result<Self, Ext4Error> {
        let bad = |reason: &str| corrupt("superblock", reason);
        if sb.len() < SUPERBLOCK_LEN || u16_at(sb, 0x38) != MAGIC {
            return Err(bad("no ext4 magic number"));
        }
        let feature_compat = u32_at(sb, 0x5C);
        let feature_incompat = u32_at(sb, 0x60);
        let feature_ro_compat = u32_at(sb, 0x64);
        if u32_at(sb, 0x4C) != 1 {
            return Err(unsupported(format!("revision {}", u32_at(sb, 0x4C))));
        }
        let metadata_csum = feature_ro_compat & ro_compat::METADATA_CSUM != 0;
        if metadata_csum {
            if u8_at(sb, 0x175) != 1 {
                return Err(unsupported(format!("checksum type {}", u8_at(sb, 0x175))));
            }
            if chksum(!0, &sb[..0x3FC]) != u32_at(sb, 0x3FC) {
                return Err(bad("checksum does not match"));
            }
        }
        let unknown = feature_incompat & !incompat::KNOWN;
        if unknown != 0 {
            return Err(unsupported(format!("incompatible feature bits {unknown:#x}")));
        }
        if feature_ro_compat & ro_compat::BIGALLOC != 0 {
            return Err(unsupported("bigalloc"));
        }
        let log = u32_at(sb, 0x18);
        if log > 6 {
            return Err(bad("block size is out of range"));
        }
        let block_size = 1024u32 << log;
        let is_64bit = feature_incompat & incompat::BIT64 != 0;
        let blocks_count = wide(u32_at(sb, 4), if is_64bit { u32_at(sb, 0x150) } else { 0 });
        let first_data_block = u32_at(sb, 0x14);
        let blocks_per_group = u32_at(sb, 0x20);
        let inodes_per_group = u32_at(sb, 0x28);
        let inodes_count = u32_at(sb, 0);
        let inode_size = u16_at(sb, 0x58);
        let desc_size = if is_64bit { u16_at(sb, 0xFE) } else { 32 };
        let bytes = blocks_count.checked_mul(u64::from(block_size));
        if bytes.is_none_or(|bytes| bytes > disk_bytes) {
            return Err(bad("more blocks than the disk holds"));
        }
        if first_data_block != u32::from(block_size == 1024) || blocks_count <= u64::from(first_data_block) {
            return Err(bad("first data block is wrong"));
        }
        if blocks_per_group < 256 || blocks_per_group > block_size * 8 || !blocks_per_group.is_multiple_of(8)
        {
            return Err(bad("blocks per group are out of range"));
        }
        if u32_at(sb, 0x1C) != log {
            return Err(bad("cluster size differs from the block size"));
        }
        if !inode_size.is_power_of_two() || inode_size < 128 || u32::from(inode_size) > block_size {
            return Err(bad("inode size is out of range"));
        }
        if !desc_size.is_power_of_two()
            || u32::from(desc_size) > block_size.min(1024)
            || desc_size < if is_64bit { 64 } else { 32 }
        {
            return Err(bad("descriptor size is out of range"));
        }
        if inodes_per_group == 0 || inodes_per_group > block_size * 8 {
            return Err(bad("inodes per group are out of range"));
        }
        let groups = (blocks_count - u64::from(first_data_block)).div_ceil(u64::from(blocks_per_group));
        let Some(groups) = u32::try_from(groups)
            .ok()
            .filter(|g| u64::from(*g) * u64::from(inodes_per_group) == u64::from(inodes_count))
        else {
            return Err(bad("inode count does not fit the groups"));
        };
        if u64::from(inodes_count) * u64::from(inode_size) > disk_bytes {
            return Err(bad("more inodes than the disk holds"));
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&sb[0x68..0x78]);
        let checksum_seed =
            if feature_incompat & incompat::CSUM_SEED != 0 { u32_at(sb, 0x270) } else { chksum(!0, &uuid) };
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
            first_ino: u32_at(sb, 0x54),
            feature_compat,
            feature_incompat,
            feature_ro_compat,
            first_meta_bg: u32_at(sb, 0x104),
            uuid,
            checksum_seed,
            hash_seed: [0, 4, 8, 12].map(|i| u32_at(sb, 0xEC + i)),
            flags: u32_at(sb, 0x160),
            journal_inum: u32_at(sb, 0xE0),
            backup_bgs: [u32_at(sb, 0x24C), u32_at(sb, 0x250)],
        })
    }

    /// Whether metadata carry CRC-32C checksums.
    pub fn metadata_csum(&self) -> bool {
        self.feature_ro_compat & ro_compat::METADATA_CSUM != 0
    }

    /// Whether an incompatible feature is on.
    pub(crate) fn has(&self, bit: u32) -> bool {
        self.feature_incompat & bit != 0
    }

    /// Whether group `group` begins with a copy of the superblock (`ext4_bg_has_super`).
    pub(crate) fn group_has_super(&self, group: u32) -> bool {
        if group == 0 {
            return true;
        }
        if self.feature_compat & compat::SPARSE_SUPER2 != 0 {
            return self.backup_bgs.contains(&group);
        }
        if group == 1 || self.feature_ro_compat & ro_compat::SPARSE_SUPER == 0 {
            return true;
        }
        [3u64, 5, 7].iter().any(|base| {
            let mut power = *base;
            while power < u64::from(group) {
                power *= base;
            }
            power == u64::from(group)
        })
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
        if !self.has(incompat::META_BG) || nr < self.first_meta_bg {
            return (u64::from(self.first_data_block) + 1 + u64::from(nr), at);
        }
        let first = nr * per_block;
        (self.group_first_block(first) + u64::from(self.group_has_super(first)), at)
    }

    /// Blocks of one group's inode table.
    pub(crate) fn inode_table_blocks(&self) -> u32 {
        (u64::from(self.inodes_per_group) * u64::from(self.inode_size)).div_ceil(u64::from(self.block_size))
            as u32
    }

    /// Whether `count` blocks from `first` lie inside the file system, behind the superblock.
    pub(crate) fn holds(&self, first: u64, count: u64) -> bool {
        first > u64::from(self.first_data_block)
            && first.checked_add(count).is_some_and(|end| end <= self.blocks_count)
    }
}
