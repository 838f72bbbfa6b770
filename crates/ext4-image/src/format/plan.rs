//! Where everything of a blank is.
//!
//! ```text
//!   group   0                1                 2          3 …
//!           █ bitmaps, tables│█ tables, journal│ …        │█            █ first blocks: super block, descriptors, or the
//!           └────────── packed ──────────┘ end              places of their copies; the packed metadata leaves them out
//! ```
//!
//! No I/O. Called by [`super::blank_of`].

use super::{
    BLOCK, BYTES_PER_INODE, BlankVersion, GROUP, INODE_SIZE, MAX_BYTES, MAX_JOURNAL, MIN_BYTES, MIN_JOURNAL,
};
use crate::{
    Ext4Error,
    layout::{
        EXT4_GOOD_OLD_FIRST_INO,
        extent::{EXT_INIT_MAX_LEN, ROOT_MAX},
        group::DESC_SIZE,
    },
};
use std::ops::Range;

/// Descriptors of a block: the groups of a meta group.
const PER_BLOCK: u64 = BLOCK / DESC_SIZE as u64;

/// A last group of fewer blocks is left out: it may have to hold copies of super block and descriptors.
const LEAST_LAST: u64 = 64;

/// Whether a group begins with a copy of the super block (feature sparse_super).
fn has_copy(group: u64) -> bool {
    let power_of = |base: u64| {
        let mut power = base;
        while power < group {
            power *= base;
        }
        power == group
    };
    group <= 1 || [3, 5, 7].into_iter().any(power_of)
}

/// Where everything is, in blocks.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) version: BlankVersion,
    pub(super) blocks: u64,
    pub(super) groups: u64,
    pub(super) inodes_per_group: u64,
    pub(super) block_bitmaps: Vec<u64>,
    pub(super) inode_bitmaps: Vec<u64>,
    pub(super) directories: u64,
    pub(super) tables: Vec<u64>,
    /// First block and number of blocks of each piece.
    pub(super) journal: Vec<(u64, u64)>,
    /// What is in use, ascending, without the first blocks of groups beyond `end`.
    used: Vec<Range<u64>>,
    /// End of the packed metadata.
    end: u64,
}

/// Takes block after block from the front of the disk.
struct Cursor<'a> {
    head: &'a dyn Fn(u64) -> u64,
    at: u64,
    used: Vec<Range<u64>>,
}

impl Cursor<'_> {
    /// `wanted` adjacent blocks, behind the first blocks of a group if those would be among them.
    fn take(&mut self, wanted: u64) -> u64 {
        loop {
            let (start, free) = self.next_run(wanted);
            if free >= wanted {
                self.mark(start..start + wanted);
                return start;
            }
            self.at = start + free;
        }
    }

    /// `wanted` blocks in as few pieces as there are.
    fn take_pieces(&mut self, mut wanted: u64) -> Vec<(u64, u64)> {
        let mut pieces = Vec::new();
        while wanted > 0 {
            let (start, free) = self.next_run(wanted);
            let n = free.min(wanted);
            self.mark(start..start + n);
            pieces.push((start, n));
            wanted -= n;
        }
        pieces
    }

    /// The next free block, and how many follow before the first blocks of a group; more than `enough` are not counted.
    fn next_run(&mut self, enough: u64) -> (u64, u64) {
        loop {
            let group = self.at / GROUP;
            let head_end = group * GROUP + (self.head)(group);
            if self.at >= head_end {
                break;
            }
            self.mark(self.at..head_end);
        }
        let mut end = (self.at / GROUP + 1) * GROUP;
        while end < self.at + enough && (self.head)(end / GROUP) == 0 {
            end += GROUP;
        }
        (self.at, end - self.at)
    }

    fn mark(&mut self, range: Range<u64>) {
        self.at = range.end;
        match self.used.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.used.push(range),
        }
    }
}

impl Plan {
    pub(super) fn new(
        version: BlankVersion,
        size_bytes: u64,
        directories: u64,
        journal_bytes: Option<u64>,
    ) -> Result<Self, Ext4Error> {
        if !(MIN_BYTES..=MAX_BYTES).contains(&size_bytes) {
            return Err(Ext4Error::usage(format!(
                "a blank file system of {size_bytes} bytes: the size must be {MIN_BYTES} to {MAX_BYTES}"
            )));
        }
        let mut blocks = size_bytes / BLOCK;
        let last = blocks % GROUP;
        if version == BlankVersion::Second && blocks > GROUP && last < LEAST_LAST {
            blocks -= last;
        }
        let journal_blocks = match (journal_bytes, size_bytes >> 20) {
            (Some(bytes), _) => bytes / BLOCK,
            (None, ..128) => 1024,
            (None, ..1024) => 4096,
            (None, ..2048) => 8192,
            (None, ..131_072) => 16_384,
            (None, _) => 32_768,
        };
        if !(MIN_JOURNAL..=MAX_JOURNAL).contains(&journal_blocks) {
            return Err(Ext4Error::usage(format!("a journal of {journal_blocks} blocks")));
        }
        let groups = blocks.div_ceil(GROUP);
        let per_block = BLOCK / INODE_SIZE as u64;
        let inodes_per_group = (size_bytes / BYTES_PER_INODE / groups).max(64).next_multiple_of(per_block);
        let table_blocks = inodes_per_group / per_block;
        let head = |group| head_blocks(version, groups, group);
        let mut cursor = Cursor { head: &head, at: 0, used: Vec::new() };
        let block_bitmaps = (0..groups).map(|_| cursor.take(1)).collect();
        let inode_bitmaps = (0..groups).map(|_| cursor.take(1)).collect();
        // The directories and the first table are one write.
        let first_directory = cursor.take(directories + 1 + table_blocks);
        let first_table = std::iter::once(first_directory + directories + 1);
        let tables = first_table.chain((1..groups).map(|_| cursor.take(table_blocks))).collect();
        let journal = cursor.take_pieces(journal_blocks);
        if journal.iter().map(|(_, n)| n.div_ceil(u64::from(EXT_INIT_MAX_LEN))).sum::<u64>()
            > u64::from(ROOT_MAX)
        {
            return Err(Ext4Error::usage(format!(
                "a journal of {journal_blocks} blocks, which takes more than {ROOT_MAX} extents"
            )));
        }
        let (end, used) = (cursor.at, cursor.used);
        if end + end / 8 > blocks {
            return Err(Ext4Error::usage(format!(
                "a blank file system of {size_bytes} bytes has no room for its own {} bytes of journal and tables",
                end * BLOCK
            )));
        }
        if u64::from(EXT4_GOOD_OLD_FIRST_INO) + directories > inodes_per_group {
            return Err(Ext4Error::usage(format!("{directories} directories in a blank file system")));
        }
        Ok(Self {
            version,
            blocks,
            groups,
            inodes_per_group,
            block_bitmaps,
            inode_bitmaps,
            directories: first_directory,
            tables,
            journal,
            used,
            end,
        })
    }

    /// Blocks of a group: the last one may be short.
    pub(super) fn group_blocks(&self, group: u64) -> u64 {
        GROUP.min(self.blocks - group * GROUP)
    }

    /// The blocks in use in a group, as ranges from its first block.
    fn used_in(&self, group: u64) -> Vec<Range<u64>> {
        let first = group * GROUP;
        if first >= self.end {
            return std::iter::once(0..head_blocks(self.version, self.groups, group)).collect();
        }
        let inside = |range: &Range<u64>| {
            let (start, end) = (range.start.max(first), range.end.min(first + GROUP));
            (start < end).then(|| start - first..end - first)
        };
        self.used.iter().filter_map(inside).collect()
    }

    /// Blocks of a group that are in use.
    pub(super) fn used(&self, group: u64) -> u64 {
        self.used_in(group).iter().map(|range| range.end - range.start).sum()
    }

    /// Whether the block bitmap of a group is on the disk: where metadata lies, and the last one, whose end is marked.
    pub(super) fn has_bitmap(&self, group: u64) -> bool {
        group * GROUP < self.end || group + 1 == self.groups
    }

    pub(super) fn block_bitmap(&self, group: u64) -> Vec<u8> {
        let mut bits = vec![0; BLOCK as usize];
        for range in self.used_in(group) {
            set_bits(&mut bits, range);
        }
        set_bits(&mut bits, self.group_blocks(group)..8 * BLOCK);
        bits
    }

    /// The block of a group's descriptor, and the byte in it.
    pub(super) fn descriptor_place(&self, group: u64) -> (u64, usize) {
        let (nr, at) = (group / PER_BLOCK, (group % PER_BLOCK) as usize * DESC_SIZE);
        match self.version {
            BlankVersion::First => (1 + nr, at),
            BlankVersion::Second => {
                let first = nr * PER_BLOCK;
                (first * GROUP + u64::from(has_copy(first)), at)
            }
        }
    }
}

/// Blocks at the begin of a group that are not for bitmaps and tables: super block, descriptors, and the places of their
/// copies.
fn head_blocks(version: BlankVersion, groups: u64, group: u64) -> u64 {
    match version {
        BlankVersion::First if group == 0 => 1 + groups.div_ceil(PER_BLOCK),
        BlankVersion::First => 0,
        BlankVersion::Second if group >= groups => 0,
        BlankVersion::Second => {
            let descriptors = [0, 1, PER_BLOCK - 1].contains(&(group % PER_BLOCK));
            u64::from(has_copy(group)) + u64::from(descriptors)
        }
    }
}

/// Sets bits of a bitmap.
pub(super) fn set_bits(bitmap: &mut [u8], range: Range<u64>) {
    let (first, last) = (range.start.next_multiple_of(8).min(range.end), range.end / 8 * 8);
    for bit in (range.start..first).chain(last.max(first)..range.end) {
        bitmap[(bit / 8) as usize] |= 1 << (bit % 8);
    }
    if first < last {
        bitmap[(first / 8) as usize..(last / 8) as usize].fill(0xff);
    }
}
