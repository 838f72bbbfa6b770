//! Which bytes of the disk a file system does not use.
//!
//! ```text
//!   group with a bitmap   ─► its clear bits
//!   group without one     ─► all its blocks, but for the first ones and the bitmaps and tables of all groups
//! ```
//!
//! What is found here is given back to the host, so a bitmap that contradicts its checksum or its count is an error, never
//! an approximation. Called by `layer compact`, which has replayed the journal.

use crate::{
    Ext4Error, Place,
    error::GroupFault,
    layout::{
        checksum::crc32c,
        group::{DESC_SIZE, GroupFlags},
        superblock::Incompat,
    },
    reader::Ext4,
};
use disk_io::ReadAt;
use std::ops::Range;

/// The byte ranges that the file system on `disk` does not use, ascending and not adjacent; what lies behind the file system
/// is not among them.
///
/// # Errors
/// `Unsupported` if its journal is in use; `Corrupt`, `Io`.
pub fn free_space<R: ReadAt>(disk: R) -> Result<Vec<Range<u64>>, Ext4Error> {
    let fs = Ext4::open_without_recovery(disk)?;
    let geometry = fs.geometry();
    if geometry.has(Incompat::EXT4_FEATURE_INCOMPAT_RECOVER) {
        return Err(Ext4Error::unsupported("a journal in use", Place::inode(geometry.journal_inum)));
    }
    find(&fs)
}

/// As [`free_space`], as it is after a replay of the journal, and whether there is something to replay: then a kernel may
/// have the file system mounted, and the answer is only an estimate.
///
/// # Errors
/// `Corrupt`, `Unsupported`, `Io`.
pub fn estimate_free_space<R: ReadAt>(disk: R) -> Result<(Vec<Range<u64>>, bool), Ext4Error> {
    let fs = Ext4::open(disk)?;
    let in_use = fs.geometry().has(Incompat::EXT4_FEATURE_INCOMPAT_RECOVER);
    Ok((find(&fs)?, in_use))
}

fn find<R: ReadAt>(fs: &Ext4<R>) -> Result<Vec<Range<u64>>, Ext4Error> {
    let geometry = fs.geometry();
    let table = u64::from(geometry.inode_table_blocks());
    let mut fixed = Vec::new();
    for group in 0..geometry.groups {
        let desc = fs.group(group)?;
        for (start, count) in
            [(desc.block_bitmap(), 1), (desc.inode_bitmap(), 1), (desc.inode_table(), table)]
        {
            if !geometry.holds(start, count) {
                return Err(Ext4Error::corrupt(GroupFault::PlacesOutside, Place::group(group)));
            }
            fixed.push(start..start + count);
        }
    }
    fixed.sort_unstable_by_key(|range| range.start);
    let mut free = Ranges { block_size: u64::from(geometry.block_size), found: Vec::new() };
    for group in 0..geometry.groups {
        let desc = fs.group(group)?;
        let first = geometry.group_first_block(group);
        let blocks = u64::from(geometry.group_blocks(group));
        if desc.flags().contains(GroupFlags::EXT4_BG_BLOCK_UNINIT) {
            let mut at = first + geometry.group_head_blocks(group);
            let end = first + blocks;
            let from = fixed.partition_point(|range| range.end <= at);
            for range in fixed[from..].iter().take_while(|range| range.start < end) {
                free.add(at..range.start.max(at));
                at = at.max(range.end);
            }
            free.add(at..end.max(at));
            continue;
        }
        let place = Place::group(group).at_block(desc.block_bitmap());
        let bitmap = fs.source.block(desc.block_bitmap())?;
        let covered = bitmap.get(..geometry.blocks_per_group as usize / 8).unwrap_or(&[]);
        if geometry.metadata_csum() {
            let (sum, stored) = (crc32c(geometry.checksum_seed, covered), desc.block_bitmap_csum());
            let mask = if usize::from(geometry.desc_size) >= DESC_SIZE { !0 } else { 0xFFFF };
            if sum & mask != stored & mask {
                return Err(Ext4Error::corrupt(GroupFault::BlockBitmapChecksum, place));
            }
        }
        let mut count = 0;
        let is_free = |n: u64| covered.get((n / 8) as usize).is_some_and(|byte| byte >> (n % 8) & 1 == 0);
        let mut at = 0;
        while at < blocks {
            if !is_free(at) {
                at += 1;
                continue;
            }
            let start = at;
            while at < blocks && is_free(at) {
                at += 1;
            }
            free.add(first + start..first + at);
            count += at - start;
        }
        if count != u64::from(desc.free_blocks()) {
            return Err(Ext4Error::corrupt(GroupFault::FreeBlocks, place));
        }
    }
    Ok(free.found)
}

/// Byte ranges, neighbors joined.
struct Ranges {
    block_size: u64,
    found: Vec<Range<u64>>,
}

impl Ranges {
    fn add(&mut self, blocks: Range<u64>) {
        let (start, end) = (blocks.start * self.block_size, blocks.end * self.block_size);
        if start >= end {
            return;
        }
        match self.found.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => self.found.push(start..end),
        }
    }
}
