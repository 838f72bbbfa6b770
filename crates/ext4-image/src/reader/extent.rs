//! Where the blocks of an inode are: extent trees, and the block maps of ext2.
//!
//! ```text
//!  i_block: header, 4 slots ─► index block ─► … ─► leaf block: (logical, length, physical)*
//! ```
//!
//! Loops and shared blocks cannot occupy the reader: a node other than the root has at least one entry, and logical
//! block numbers must rise over the whole walk, so no leaf is visited twice; the depth is at most five, and the number
//! of extents and of nodes is capped. Called by [`super::Ext4::extents`] and, with its visitor, by the checker.

use super::{inode::Inode, source::Source};
use crate::{
    Ext4Error, Place,
    error::ExtentFault,
    layout::{
        extent::{
            ENTRY_SIZE, EXT4_EXT_MAGIC, EXT4_MAX_EXTENT_DEPTH, ExtentHeader, RawExtent, RawIndex, TAIL_SIZE,
            node_checksum, tail_offset,
        },
        inode::{I_BLOCK_SIZE, InodeFlags},
    },
};
use disk_io::ReadAt;
use zerocopy::{FromBytes, little_endian::U32};

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

/// Receives what the walk finds.
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
            let what = format!("an inode of more than {MAX_EXTENTS} extents");
            return Err(Ext4Error::unsupported(what, Place::block(extent.physical_block)));
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
    if inode.has(InodeFlags::EXT4_EXTENTS_FL) {
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

/// A node below the root: its block, and the depth that its parent demands.
type Below = Option<(u64, u16)>;

impl<R: ReadAt> Tree<'_, R> {
    /// A broken rule at byte `offset` of the node.
    fn bad<T>(&self, fault: ExtentFault, node: Below, offset: usize) -> Result<T, Ext4Error> {
        let place = Place::inode(self.inode.ino).at_offset(offset as u64);
        Err(Ext4Error::corrupt(fault, node.map_or(place, |(block, _)| place.at_block(block))))
    }

    /// Walks one node; `limit` is where its range ends.
    fn node(&mut self, bytes: &[u8], below: Below, limit: u64) -> Result<(), Ext4Error> {
        let Ok((header, rest)) = ExtentHeader::ref_from_prefix(bytes) else {
            return self.bad(ExtentFault::Magic, below, 0);
        };
        let (max, depth) = (header.eh_max.get(), header.eh_depth.get());
        let entries = usize::from(header.eh_entries.get());
        if header.eh_magic.get() != EXT4_EXT_MAGIC {
            return self.bad(ExtentFault::Magic, below, 0);
        }
        let room = rest.len() / ENTRY_SIZE;
        if usize::from(max) > room || max == 0 || entries > usize::from(max) {
            return self.bad(ExtentFault::Counts, below, 0);
        }
        if self.visitor.strict() && usize::from(max) != room {
            return self.bad(ExtentFault::Capacity, below, 0);
        }
        // Both kinds of entries begin with their logical block.
        let Ok((leaves, _)) = <[RawExtent]>::ref_from_prefix_with_elems(rest, entries) else {
            return self.bad(ExtentFault::Counts, below, 0);
        };
        match below {
            None if depth > EXT4_MAX_EXTENT_DEPTH => return self.bad(ExtentFault::TooDeep, below, 0),
            None => {}
            Some((block, demanded)) => {
                if depth != demanded || entries == 0 {
                    return self.bad(ExtentFault::Depth, below, 0);
                }
                if self.source.geometry.metadata_csum() && !node_checksum_matches(self.seed, bytes, max) {
                    return self.bad(ExtentFault::NodeChecksum, below, tail_offset(max));
                }
                if self.visitor.strict()
                    && leaves.first().is_none_or(|first| u64::from(first.ee_block.get()) != self.next)
                {
                    return self.bad(ExtentFault::NodeStart, below, ENTRY_SIZE);
                }
                self.visitor.node(block)?;
                self.source.visit(1)?;
            }
        }
        if depth == 0 {
            for (i, extent) in leaves.iter().enumerate() {
                self.leaf(extent, below, (1 + i) * ENTRY_SIZE, limit)?;
            }
            return Ok(());
        }
        let Ok((children, _)) = <[RawIndex]>::ref_from_prefix_with_elems(rest, entries) else {
            return self.bad(ExtentFault::Counts, below, 0);
        };
        for (i, index) in children.iter().enumerate() {
            let (logical, child) = (u64::from(index.ei_block.get()), index.leaf());
            let at = (1 + i) * ENTRY_SIZE;
            if logical < self.next || logical >= limit {
                return self.bad(ExtentFault::Order, below, at);
            }
            if !self.source.geometry.holds(child, 1) {
                return self.bad(ExtentFault::NodeOutside, below, at);
            }
            self.next = logical;
            let limit = children.get(i + 1).map_or(limit, |next| limit.min(u64::from(next.ei_block.get())));
            let block = self.source.block(child)?;
            self.node(&block, Some((child, depth - 1)), limit)?;
        }
        Ok(())
    }

    /// Takes one extent, at byte `at` of its node.
    fn leaf(&mut self, extent: &RawExtent, node: Below, at: usize, limit: u64) -> Result<(), Ext4Error> {
        disk_io::steps::add(1);
        let logical_block = extent.ee_block.get();
        let (physical_block, blocks) = (extent.start(), extent.blocks());
        let logical = u64::from(logical_block);
        if logical < self.next || logical >= limit {
            return self.bad(ExtentFault::Order, node, at);
        }
        let end = logical + u64::from(blocks);
        if blocks == 0 || end > limit {
            return self.bad(ExtentFault::Length, node, at);
        }
        if !self.source.geometry.holds(physical_block, u64::from(blocks)) {
            return self.bad(ExtentFault::Outside, node, at);
        }
        self.next = end;
        self.visitor.extent(Extent {
            logical_block,
            physical_block,
            blocks,
            unwritten: extent.is_unwritten(),
        })
    }
}

/// Checks the checksum after the `max` entries of a node.
fn node_checksum_matches(seed: u32, bytes: &[u8], max: u16) -> bool {
    let Some((covered, tail)) = bytes.split_at_checked(tail_offset(max)) else { return false };
    tail.first_chunk::<TAIL_SIZE>()
        .is_some_and(|sum| node_checksum(seed, covered) == u32::from_le_bytes(*sum))
}

/// Direct blocks of a block map (`EXT4_NDIR_BLOCKS`).
const EXT4_NDIR_BLOCKS: u32 = 12;

/// The pointers of a block map: in `i_block`, or in an indirect block.
fn pointers(bytes: &[u8]) -> &[U32] {
    <[U32]>::ref_from_bytes(bytes).unwrap_or(&[])
}

const _: () = assert!(I_BLOCK_SIZE == (EXT4_NDIR_BLOCKS as usize + 3) * size_of::<U32>());

/// The block map of ext2 and ext3: 12 direct blocks, then one, two and three levels of indirection.
struct BlockMap<'a, R> {
    source: &'a Source<R>,
    inode: &'a Inode,
    /// Blocks that it may still have: in a sound file system none is in a map twice.
    left: u64,
    end: u64,
    visitor: &'a mut dyn Visitor,
}

impl<R: ReadAt> BlockMap<'_, R> {
    fn run(mut self) -> Result<(), Ext4Error> {
        let per_block = u64::from(self.source.geometry.block_size) / 4;
        self.end = self.inode.size.div_ceil(u64::from(self.source.geometry.block_size));
        let mut logical = 0u64;
        for (slot, pointer) in pointers(self.inode.i_block()).iter().enumerate() {
            let level = (slot as u32 + 1).saturating_sub(EXT4_NDIR_BLOCKS);
            self.pointer(pointer.get(), level, logical, per_block)?;
            logical += per_block.pow(level);
        }
        Ok(())
    }

    fn pointer(&mut self, pointer: u32, level: u32, logical: u64, per_block: u64) -> Result<(), Ext4Error> {
        if pointer == 0 || logical >= self.end {
            return Ok(());
        }
        let bad =
            |fault| Ext4Error::corrupt(fault, Place::inode(self.inode.ino).at_block(u64::from(pointer)));
        if !self.source.geometry.holds(u64::from(pointer), 1) {
            return Err(bad(ExtentFault::MapOutside));
        }
        let Ok(logical_block) = u32::try_from(logical) else {
            return Err(bad(ExtentFault::MapTooLong));
        };
        self.left = self.left.checked_sub(1).ok_or_else(|| bad(ExtentFault::MapBlocks))?;
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
        for (i, child) in pointers(&block).iter().enumerate() {
            let logical = logical + i as u64 * per_block.pow(level - 1);
            self.pointer(child.get(), level - 1, logical, per_block)?;
        }
        Ok(())
    }
}
