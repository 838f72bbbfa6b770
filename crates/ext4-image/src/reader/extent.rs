//! Where the blocks of an inode are: extent trees, and the block maps of ext2.
//!
//! ```text
//!  i_block: header, 4 slots ─► index block ─► … ─► leaf block: (logical, length, physical)*
//! ```
//!
//! Loops and shared blocks can't hold the reader: a node other than the root holds at least one entry, and logical
//! block numbers must rise over the whole walk, so no leaf is visited twice; the depth is at most five, and the number
//! of extents and of nodes is capped. Called by [`super::Ext4::extents`] and, with its visitor, by the checker.

use super::{
    bytes::{chksum, u16_at, u32_at},
    corrupt,
    inode::{Inode, flags},
    source::Source,
    unsupported,
};
use crate::Ext4Error;
use disk_io::ReadAt;

/// `EXT4_EXT_MAGIC`.
const MAGIC: u16 = 0xF30A;
/// `EXT4_MAX_EXTENT_DEPTH`.
const MAX_DEPTH: u16 = 5;
/// Longer than this is an unwritten extent (`EXT_INIT_MAX_LEN`).
const INIT_MAX_LEN: u32 = 32768;
/// Most extents taken of one inode: 96 MiB of memory.
const MAX_EXTENTS: usize = 4 << 20;

/// A run of blocks of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First block in the file.
    pub logical_block: u32,
    /// First block on the disk.
    pub physical_block: u64,
    /// Number of blocks, at least 1.
    pub blocks: u32,
    /// Allocated, but reads as zeros.
    pub unwritten: bool,
}

/// What the walk meets, for the checker.
pub(crate) trait Visitor {
    /// A block that holds part of the tree.
    fn node(&mut self, block: u64) -> Result<(), Ext4Error>;
    /// Whether to refuse what the kernel tolerates but the writer never makes.
    fn strict(&self) -> bool {
        false
    }
    /// An extent as stored.
    fn extent(&mut self, extent: Extent) -> Result<(), Ext4Error>;
}

impl Visitor for Vec<Extent> {
    fn node(&mut self, _block: u64) -> Result<(), Ext4Error> {
        Ok(())
    }

    fn extent(&mut self, extent: Extent) -> Result<(), Ext4Error> {
        if let Some(last) = self.last_mut()
            && u64::from(last.logical_block) + u64::from(last.blocks) == u64::from(extent.logical_block)
            && last.physical_block + u64::from(last.blocks) == extent.physical_block
            && last.unwritten == extent.unwritten
            && let Some(blocks) = last.blocks.checked_add(extent.blocks)
        {
            last.blocks = blocks;
            return Ok(());
        }
        if self.len() >= MAX_EXTENTS {
            return Err(unsupported(format!("an inode of more than {MAX_EXTENTS} extents")));
        }
        self.push(extent);
        Ok(())
    }
}

/// Walks all extents of `inode` in logical order.
pub(crate) fn walk<R: ReadAt>(
    source: &Source<R>,
    inode: &Inode,
    visitor: &mut dyn Visitor,
) -> Result<(), Ext4Error> {
    if inode.has(flags::EXTENTS) {
        let mut tree = Tree { source, inode, seed: inode.seed(&source.geometry), next: 0, visitor };
        tree.node(inode.i_block(), None, u64::from(u32::MAX) + 1)
    } else {
        BlockMap { source, inode, left: source.geometry.blocks_count, end: 0, visitor }.run()
    }
}

struct Tree<'a, R> {
    source: &'a Source<R>,
    inode: &'a Inode,
    seed: u32,
    /// The first logical block that may come next.
    next: u64,
    visitor: &'a mut dyn Visitor,
}

impl<R: ReadAt> Tree<'_, R> {
    fn bad(&self, block: Option<u64>, reason: &'static str) -> Ext4Error {
        let ino = self.inode.ino;
        corrupt(block.map_or(format!("inode {ino}"), |b| format!("inode {ino}, extent block {b}")), reason)
    }

    /// Walks one node; `expect` is the depth that its parent demands, `limit` where its range ends.
    fn node(&mut self, bytes: &[u8], expect: Option<(u64, u16)>, limit: u64) -> Result<(), Ext4Error> {
        let at = expect.map(|(block, _)| block);
        let entries = u16_at(bytes, 2);
        let max = u16_at(bytes, 4);
        let depth = u16_at(bytes, 6);
        if u16_at(bytes, 0) != MAGIC {
            return Err(self.bad(at, "an extent node has no magic number"));
        }
        let room = bytes.len().saturating_sub(12) / 12;
        if usize::from(max) > room || max == 0 || entries > max {
            return Err(self.bad(at, "an extent node has impossible counts"));
        }
        if self.visitor.strict() && usize::from(max) != room {
            return Err(self.bad(at, "an extent node has another capacity than its place"));
        }
        match expect {
            None if depth > MAX_DEPTH => return Err(self.bad(at, "the extent tree is too deep")),
            None => {}
            Some((block, demanded)) => {
                if depth != demanded || entries == 0 {
                    return Err(self.bad(at, "an extent node does not fit its parent"));
                }
                let tail = 12 + 12 * usize::from(max);
                if self.source.geometry.metadata_csum()
                    && bytes.get(..tail).is_none_or(|b| chksum(self.seed, b) != u32_at(bytes, tail))
                {
                    return Err(self.bad(at, "checksum of an extent node does not match"));
                }
                if self.visitor.strict() && u64::from(u32_at(bytes, 12)) != self.next {
                    return Err(self.bad(at, "an extent node does not begin where its parent says"));
                }
                self.visitor.node(block)?;
                self.source.visit(1)?;
            }
        }
        for i in 0..usize::from(entries) {
            let entry = 12 + 12 * i;
            let logical = u32_at(bytes, entry);
            if u64::from(logical) < self.next || u64::from(logical) >= limit {
                return Err(self.bad(at, "extents are out of order"));
            }
            if depth == 0 {
                self.leaf(bytes, entry, logical, at, limit)?;
                continue;
            }
            let child = u64::from(u32_at(bytes, entry + 4)) | u64::from(u16_at(bytes, entry + 8)) << 32;
            if !self.source.geometry.holds(child, 1) {
                return Err(self.bad(at, "an extent node lies outside the file system"));
            }
            self.next = u64::from(logical);
            let limit = if i + 1 < usize::from(entries) {
                limit.min(u64::from(u32_at(bytes, entry + 12)))
            } else {
                limit
            };
            let block = self.source.block(child)?;
            self.node(&block, Some((child, depth - 1)), limit)?;
        }
        Ok(())
    }

    fn leaf(
        &mut self,
        bytes: &[u8],
        entry: usize,
        logical: u32,
        at: Option<u64>,
        limit: u64,
    ) -> Result<(), Ext4Error> {
        disk_io::steps::add(1);
        let stored = u32::from(u16_at(bytes, entry + 4));
        let physical = u64::from(u32_at(bytes, entry + 8)) | u64::from(u16_at(bytes, entry + 6)) << 32;
        let (blocks, unwritten) =
            if stored > INIT_MAX_LEN { (stored - INIT_MAX_LEN, true) } else { (stored, false) };
        let end = u64::from(logical) + u64::from(blocks);
        if blocks == 0 || end > limit {
            return Err(self.bad(at, "an extent has an impossible length"));
        }
        if !self.source.geometry.holds(physical, u64::from(blocks)) {
            return Err(self.bad(at, "an extent lies outside the file system"));
        }
        self.next = end;
        self.visitor.extent(Extent { logical_block: logical, physical_block: physical, blocks, unwritten })
    }
}

/// The block map of ext2 and ext3: 12 direct blocks, then one, two and three levels of indirection.
struct BlockMap<'a, R> {
    source: &'a Source<R>,
    inode: &'a Inode,
    /// Blocks that it may still have: in a sound file system none stands in a map twice.
    left: u64,
    end: u64,
    visitor: &'a mut dyn Visitor,
}

impl<R: ReadAt> BlockMap<'_, R> {
    fn run(mut self) -> Result<(), Ext4Error> {
        let per_block = u64::from(self.source.geometry.block_size) / 4;
        self.end = self.inode.size.div_ceil(u64::from(self.source.geometry.block_size));
        let mut logical = 0u64;
        for slot in 0..15 {
            let pointer = u32_at(self.inode.i_block(), slot * 4);
            let level = if slot < 12 { 0 } else { slot as u32 - 11 };
            self.pointer(pointer, level, logical, per_block)?;
            logical += per_block.pow(level);
        }
        Ok(())
    }

    fn pointer(&mut self, pointer: u32, level: u32, logical: u64, per_block: u64) -> Result<(), Ext4Error> {
        if pointer == 0 || logical >= self.end {
            return Ok(());
        }
        let place = || format!("inode {}, block map", self.inode.ino);
        if !self.source.geometry.holds(u64::from(pointer), 1) {
            return Err(corrupt(place(), "it points outside the file system"));
        }
        let Ok(logical_block) = u32::try_from(logical) else {
            return Err(corrupt(place(), "the file is too long for it"));
        };
        self.left = self
            .left
            .checked_sub(1)
            .ok_or_else(|| corrupt(place(), "it has more blocks than the file system"))?;
        if level == 0 {
            return self.visitor.extent(Extent {
                logical_block,
                physical_block: u64::from(pointer),
                blocks: 1,
                unwritten: false,
            });
        }
        self.source.visit(1)?;
        self.visitor.node(u64::from(pointer))?;
        let block = self.source.block(u64::from(pointer))?;
        disk_io::steps::add(per_block);
        for i in 0..per_block {
            self.pointer(
                u32_at(&block, i as usize * 4),
                level - 1,
                logical + i * per_block.pow(level - 1),
                per_block,
            )?;
        }
        Ok(())
    }
}
