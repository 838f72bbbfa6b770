//! Inode table, bitmaps, descriptors, super block.
//!
//! All groups' tables are one table, and all bitmaps follow it. The number of groups is what the tool's arithmetic
//! (32 bits) gives: the fewest groups, and of the inodes per group that give so few the fewest.

use super::{
    BLOCK, Content, GROUP_BLOCKS, HcsshimWriter, INODE_SIZE, INODE_USED, Node, Result, attrs, extents,
    ino_of, refuse,
};
use crate::{
    Ext4Error,
    layout::{
        EXT4_GOOD_OLD_FIRST_INO,
        group::GroupDesc,
        inode::{EXTRA_ISIZE, I_BLOCK_SIZE, InodeFlags, RawInode},
        superblock::{self, Compat, Incompat, RoCompat, SUPERBLOCK_OFFSET, Superblock},
    },
    writer::ImageSummary,
};
use disk_io::WriteAt;
use zerocopy::{FromZeros, IntoBytes};

/// Size of a descriptor.
const DESCRIPTOR_SIZE: usize = 32;
/// Descriptors in a block.
pub(super) const DESCRIPTORS_PER_BLOCK: u64 = BLOCK / DESCRIPTOR_SIZE as u64;
/// Inodes in a block of the table.
const INODES_PER_BLOCK: u32 = BLOCK as u32 / INODE_SIZE as u32;
/// Most inodes of a group: the bits of its bitmap.
const MAX_INODES_PER_GROUP: u32 = BLOCK as u32 * 8;
/// `s_log_groups_per_flex`.
const LOG_GROUPS_PER_FLEX: u8 = 31;
/// `s_log_block_size`.
const LOG_BLOCK_SIZE: u32 = 2;

/// Groups, and inodes in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    groups: u32,
    inodes_per_group: u32,
}

/// The groups for `blocks` of data and `inodes`, with 32-bit numbers that wrap as the tool's do.
fn group_count(blocks: u32, inodes: u32, inodes_per_group: u32) -> u32 {
    let data_per_group = GROUP_BLOCKS - inodes_per_group / INODES_PER_BLOCK - 2;
    let least = ((inodes - 1) / inodes_per_group).wrapping_mul(data_per_group).wrapping_add(1);
    blocks.max(least).wrapping_add(data_per_group - 1) / data_per_group
}

fn shape(blocks: u32, inodes: u32) -> Shape {
    let mut best = Shape { groups: u32::MAX, inodes_per_group: 0 };
    for inodes_per_group in (INODES_PER_BLOCK..=MAX_INODES_PER_GROUP).step_by(INODES_PER_BLOCK as usize) {
        let groups = group_count(blocks, inodes, inodes_per_group);
        if groups < best.groups {
            best = Shape { groups, inodes_per_group };
        }
    }
    best
}

fn set(bitmap: &mut [u8], bit: u32) {
    bitmap[(bit / 8) as usize] |= 1 << (bit % 8);
}

/// Sets bits `from` to before `to`.
fn set_range(bitmap: &mut [u8], from: u32, to: u32) {
    let mut bit = from;
    while bit < to {
        if bit.is_multiple_of(8) && to - bit >= 8 {
            bitmap[(bit / 8) as usize] = 0xff;
            bit += 8;
        } else {
            set(bitmap, bit);
            bit += 1;
        }
    }
}

fn encode(node: &Node, slot: &mut [u8; INODE_SIZE]) {
    let mut raw = RawInode::new_zeroed();
    raw.i_mode.set(node.mode);
    raw.set_owner(node.uid, node.gid);
    raw.set_size(node.size);
    raw.i_links_count.set(node.links as u16);
    raw.i_blocks_lo.set(node.blocks);
    raw.i_flags.set(node.flags | InodeFlags::EXT4_HUGE_FILE_FL.bits());
    raw.i_file_acl_lo.set(node.xattr_block);
    raw.i_extra_isize.set(EXTRA_ISIZE);
    raw.i_atime.set(node.atime.low());
    raw.i_atime_extra.set(node.atime.extra());
    raw.i_ctime.set(node.ctime.low());
    raw.i_ctime_extra.set(node.ctime.extra());
    raw.i_mtime.set(node.mtime.low());
    raw.i_mtime_extra.set(node.mtime.extra());
    raw.i_crtime.set(node.mtime.low());
    raw.i_crtime_extra.set(node.mtime.extra());
    let mut inline_data = node.flags & InodeFlags::EXT4_INLINE_DATA_FL.bits() != 0;
    let mut rest: &[u8] = &[];
    match &node.content {
        Content::None => {}
        Content::Bytes(bytes) => {
            let (head, tail) = bytes.split_at(bytes.len().min(I_BLOCK_SIZE));
            raw.i_block[..head.len()].copy_from_slice(head);
            rest = tail;
        }
        Content::Run { start, blocks } => {
            raw.i_block = extents::root(*start, *blocks);
            inline_data = false;
        }
        Content::Device(number) => raw.i_block[4..8].copy_from_slice(&number.to_le_bytes()),
    }
    slot[..INODE_USED].copy_from_slice(&raw.as_bytes()[..INODE_USED]);
    attrs::put_in_inode(node.attrs.as_deref(), inline_data.then_some(rest), &mut slot[INODE_USED..]);
}

impl<W: WriteAt> HcsshimWriter<W> {
    /// Writes all metadata and sets the image's size. Does not sync. The UUID is zero, as that tool's.
    ///
    /// # Errors
    /// `Full` if the image exceeds the maximum disk size, `Unsupported` where the tool's arithmetic overflows, `Io`.
    pub fn finish(mut self) -> Result<ImageSummary> {
        if self.open.is_some() {
            return Err(Ext4Error::usage("a file is still open"));
        }
        self.write_directories()?;
        let table = self.out.block();
        let inodes = ino_of(self.nodes.len() as u32 - 1);
        let shape = shape(table, inodes);
        let Shape { groups, inodes_per_group } = shape;
        let slots = u64::from(groups) * u64::from(inodes_per_group);
        if slots < u64::from(inodes) || slots * INODE_SIZE as u64 > u64::from(u32::MAX) {
            return Err(refuse(format!("{inodes} inodes (the arithmetic of hcsshim's tar2ext4 overflows)")));
        }
        self.write_table(slots)?;
        let bitmaps = self.out.block();
        let valid = bitmaps + 2 * groups;
        let disk = valid.max((groups - 1) * GROUP_BLOCKS + 1);
        let descriptor_blocks = (groups - 1) / DESCRIPTORS_PER_BLOCK as u32 + 1;
        if descriptor_blocks > self.descriptor_blocks {
            return Err(Ext4Error::Full {
                limit: u64::from(self.descriptor_blocks)
                    * DESCRIPTORS_PER_BLOCK
                    * u64::from(GROUP_BLOCKS)
                    * BLOCK,
            });
        }
        let unused = 1 + descriptor_blocks..1 + self.descriptor_blocks;
        let mut descriptors = Vec::with_capacity(groups as usize * DESCRIPTOR_SIZE);
        let (mut used_blocks, mut used_inodes) = (0, 0);
        let mut both = vec![0; 2 * BLOCK as usize];
        for group in 0..groups {
            both.fill(0);
            let (block_bitmap, inode_bitmap) = both.split_at_mut(BLOCK as usize);
            let first = group * GROUP_BLOCKS;
            set_range(block_bitmap, 0, valid.saturating_sub(first).min(GROUP_BLOCKS));
            if group == 0 {
                for block in unused.clone() {
                    block_bitmap[(block / 8) as usize] &= !(1 << (block % 8));
                }
            }
            if group == groups - 1 {
                set_range(block_bitmap, (disk - first).min(GROUP_BLOCKS), GROUP_BLOCKS);
            }
            let base = group * inodes_per_group;
            let end = inodes.saturating_sub(base).min(inodes_per_group);
            set_range(inode_bitmap, 0, end);
            let dirs = (base..base + end).filter(|i| self.by_ino(i + 1).is_some_and(Node::is_dir)).count();
            let blocks = ones(block_bitmap);
            used_blocks += blocks;
            used_inodes += end;
            self.out.write(&both)?;
            let mut desc = GroupDesc::new_zeroed();
            desc.bg_block_bitmap_lo.set(bitmaps + 2 * group);
            desc.bg_inode_bitmap_lo.set(bitmaps + 2 * group + 1);
            desc.bg_inode_table_lo.set(table + group * (inodes_per_group / INODES_PER_BLOCK));
            desc.bg_free_blocks_count_lo.set((GROUP_BLOCKS - blocks) as u16);
            desc.bg_free_inodes_count_lo.set((inodes_per_group - end) as u16);
            desc.bg_used_dirs_count_lo.set(dirs as u16);
            descriptors.extend_from_slice(&desc.as_bytes()[..DESCRIPTOR_SIZE]);
        }
        self.out.zeros(u64::from(disk - valid) * BLOCK)?;
        let free_blocks = groups * GROUP_BLOCKS - used_blocks;
        let free_inodes = groups * inodes_per_group - used_inodes;
        self.out.rewrite(1, &descriptors)?;
        let mut block = vec![0; BLOCK as usize];
        let super_block = self.superblock(shape, disk, free_blocks, free_inodes);
        let at = SUPERBLOCK_OFFSET as usize;
        block[at..at + size_of::<Superblock>()].copy_from_slice(super_block.as_bytes());
        self.out.rewrite(0, &block)?;
        let image_bytes = self.out.close()?;
        Ok(ImageSummary {
            image_bytes,
            uuid: [0; 16],
            inodes: u64::from(used_inodes),
            blocks_used: u64::from(disk - free_blocks),
            blocks: u64::from(disk),
        })
    }

    /// The node of an inode, `None` for free and reserved ones.
    fn by_ino(&self, ino: u32) -> Option<&Node> {
        match ino {
            super::EXT4_ROOT_INO => self.nodes.first(),
            EXT4_GOOD_OLD_FIRST_INO.. => self.nodes.get((ino - EXT4_GOOD_OLD_FIRST_INO + 1) as usize),
            _ => None,
        }
    }

    fn write_table(&mut self, slots: u64) -> Result<()> {
        let used = ino_of(self.nodes.len() as u32 - 1);
        for ino in 1..=used {
            let mut slot = [0; INODE_SIZE];
            if let Some(node) = self.by_ino(ino) {
                encode(node, &mut slot);
            }
            self.out.write(&slot)?;
        }
        self.out.zeros((slots - u64::from(used)) * INODE_SIZE as u64)
    }

    fn superblock(&self, shape: Shape, disk: u32, free_blocks: u32, free_inodes: u32) -> Superblock {
        let mut incompat = Incompat::EXT4_FEATURE_INCOMPAT_FILETYPE
            | Incompat::EXT4_FEATURE_INCOMPAT_EXTENTS
            | Incompat::EXT4_FEATURE_INCOMPAT_FLEX_BG;
        incompat.set(Incompat::EXT4_FEATURE_INCOMPAT_INLINE_DATA, self.inline_data);
        let compat = Compat::EXT4_FEATURE_COMPAT_SPARSE_SUPER2 | Compat::EXT4_FEATURE_COMPAT_EXT_ATTR;
        let ro = RoCompat::EXT4_FEATURE_RO_COMPAT_LARGE_FILE
            | RoCompat::EXT4_FEATURE_RO_COMPAT_HUGE_FILE
            | RoCompat::EXT4_FEATURE_RO_COMPAT_EXTRA_ISIZE
            | RoCompat::EXT4_FEATURE_RO_COMPAT_READONLY;
        let mut sb = Superblock::new(&superblock::Shape {
            blocks_count: u64::from(disk),
            free_blocks_count: u64::from(free_blocks),
            inodes_count: shape.groups * shape.inodes_per_group,
            free_inodes_count: free_inodes,
            first_data_block: 0,
            log_block_size: LOG_BLOCK_SIZE,
            blocks_per_group: GROUP_BLOCKS,
            inodes_per_group: shape.inodes_per_group,
            inode_size: INODE_SIZE as u16,
            extra_isize: EXTRA_ISIZE,
            compat,
            incompat,
            ro_compat: ro,
        });
        sb.s_lpf_ino.set(EXT4_GOOD_OLD_FIRST_INO);
        sb.s_log_groups_per_flex = LOG_GROUPS_PER_FLEX;
        sb
    }
}

fn ones(bitmap: &[u8]) -> u32 {
    bitmap.iter().map(|b| b.count_ones()).sum()
}
