//! Extents of a run of adjacent blocks: up to four in the inode, else one leaf in the block after the run.

use super::{BLOCK, Content, HcsshimWriter, Result};
use crate::layout::{
    extent::{ENTRY_SIZE, EXT_INIT_MAX_LEN, ExtentHeader, ROOT_MAX, RawExtent, RawIndex},
    inode::{I_BLOCK_SIZE, InodeFlags},
};
use disk_io::WriteAt;
use zerocopy::IntoBytes;

/// Extents in a leaf (no room is left for a checksum).
pub(super) const LEAF_MAX: u32 = (BLOCK as u32) / (ENTRY_SIZE as u32) - 1;

/// Header and extents of a run, in a node of `max` entries.
fn fill(node: &mut [u8], max: u16, start: u32, blocks: u32) {
    let count = blocks.div_ceil(EXT_INIT_MAX_LEN);
    node[..ENTRY_SIZE].copy_from_slice(ExtentHeader::new(count as u16, max, 0).as_bytes());
    for (i, entry) in (0..count).zip(node[ENTRY_SIZE..].chunks_exact_mut(ENTRY_SIZE)) {
        let logical = i * EXT_INIT_MAX_LEN;
        let length = (blocks - logical).min(EXT_INIT_MAX_LEN);
        entry.copy_from_slice(RawExtent::new(logical, u64::from(start + logical), length).as_bytes());
    }
}

fn needs_leaf(blocks: u32) -> bool {
    blocks.div_ceil(EXT_INIT_MAX_LEN) > u32::from(ROOT_MAX)
}

/// `i_block` of a run.
pub(super) fn root(start: u32, blocks: u32) -> [u8; I_BLOCK_SIZE] {
    let mut root = [0; I_BLOCK_SIZE];
    if needs_leaf(blocks) {
        root[..ENTRY_SIZE].copy_from_slice(ExtentHeader::new(1, ROOT_MAX, 1).as_bytes());
        root[ENTRY_SIZE..2 * ENTRY_SIZE]
            .copy_from_slice(RawIndex::new(0, u64::from(start + blocks)).as_bytes());
    } else {
        fill(&mut root, ROOT_MAX, start, blocks);
    }
    root
}

impl<W: WriteAt> HcsshimWriter<W> {
    /// Ends `size` bytes of a node's content that went out last.
    pub(super) fn end_run(&mut self, node: u32, size: u64) -> Result<()> {
        if size == 0 {
            return Ok(());
        }
        self.out.align()?;
        let blocks = size.div_ceil(BLOCK) as u32;
        let start = self.out.block() - blocks;
        let mut used = blocks;
        if needs_leaf(blocks) {
            let mut leaf = vec![0; BLOCK as usize];
            fill(&mut leaf, LEAF_MAX as u16, start, blocks);
            self.out.write(&leaf)?;
            used += 1;
        }
        let node = &mut self.nodes[node as usize];
        node.flags |= InodeFlags::EXT4_EXTENTS_FL.bits();
        node.blocks += used;
        node.content = Content::Run { start, blocks };
        Ok(())
    }
}
