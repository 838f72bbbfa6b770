//! Where blocks go: the geometry of groups, the cursor, and what lies free below it.
//!
//! ```text
//!   meta group = bs/64 groups │ g0: [SB][GDT]… │ g1: [GDT copy]… │ … │ last: [GDT copy]… │ next meta group
//!                                   cursor ────────► ascending, steps over the fixed blocks
//! ```
//!
//! A group has 4096 blocks whatever the block size (ext4 allows up to 8 × the block size): then the most inodes that
//! a group may have (8 × block size) always suffice for inodes of 512 bytes, so that the number of inodes never forces
//! the image to grow. A writable image has the groups that every ext4 has (8 × the block size) and copies of the super
//! block where feature sparse_super has them: kernels refuse to grow what is laid out otherwise (feature sparse_super2).
//! Invariant: every block below the cursor is in use unless it is in `free`; fixed blocks always are.

use super::Result;
use crate::{
    BlockSize, Ext4Error,
    layout::{group::DESC_SIZE, superblock::sparse_super_has_copy},
};

/// `s_blocks_per_group` of an image that is not writable.
pub(crate) const GROUP_BLOCKS: u64 = 4096;

#[derive(Debug, Clone, Copy)]
pub(super) struct Geometry {
    /// Block size in bytes.
    pub(super) bs: u64,
    /// `s_first_data_block`.
    pub(super) first: u64,
    /// Descriptors in a block: groups in a meta group.
    pub(super) per_meta: u64,
    /// `s_blocks_per_group`.
    pub(super) group: u64,
    /// Copies of the super block as feature sparse_super has them, instead of none.
    copies: bool,
}

impl Geometry {
    pub(super) fn new(block_size: BlockSize, writable: bool) -> Self {
        let bs = u64::from(block_size.bytes());
        Self {
            bs,
            first: u64::from(block_size.first_data_block()),
            per_meta: bs / DESC_SIZE as u64,
            group: if writable { 8 * bs } else { GROUP_BLOCKS },
            copies: writable,
        }
    }

    /// Whether a group begins with the super block or a copy of it.
    pub(super) fn has_super(self, group: u64) -> bool {
        group == 0 || self.copies && sparse_super_has_copy(group)
    }

    /// Whether a group has a copy of its meta group's descriptors.
    fn has_descriptors(self, group: u64) -> bool {
        let at = group % self.per_meta;
        at <= 1 || at == self.per_meta - 1
    }

    pub(super) fn group_of(self, block: u64) -> u64 {
        (block - self.first) / self.group
    }

    pub(super) fn group_start(self, group: u64) -> u64 {
        self.first + group * self.group
    }

    /// Fixed blocks at the start of a group: super block and descriptors.
    pub(super) fn fixed(self, group: u64) -> u64 {
        u64::from(self.has_descriptors(group)) + u64::from(self.has_super(group))
    }

    /// First block at or after `block` that is not fixed.
    fn skip_fixed(self, block: u64) -> u64 {
        let group = self.group_of(block);
        block.max(self.group_start(group) + self.fixed(group))
    }

    /// First fixed block after the group of `block`.
    fn next_fixed(self, block: u64) -> u64 {
        let mut next = self.group_of(block) + 1;
        // The last group of each meta group has some.
        while self.fixed(next) == 0 {
            next += 1;
        }
        self.group_start(next)
    }
}

#[derive(Debug, Clone)]
pub(super) struct Space {
    pub(super) geometry: Geometry,
    /// Next block.
    pub(super) cursor: u64,
    /// First fixed block after the cursor.
    limit: u64,
    /// First block that may not be used.
    end: u64,
    max_bytes: u64,
    /// Ranges (start, end) below the cursor that are not in use; may cover fixed blocks, which are in use all the same.
    pub(super) free: Vec<(u64, u64)>,
}

impl Space {
    pub(super) fn new(geometry: Geometry, max_bytes: u64) -> Self {
        let cursor = geometry.skip_fixed(geometry.first);
        Self {
            geometry,
            cursor,
            limit: geometry.next_fixed(cursor),
            // Group numbers are 32 bits wide.
            end: (max_bytes / geometry.bs).min(geometry.group << 31),
            max_bytes,
            free: Vec::new(),
        }
    }

    /// The most bytes that the image may have.
    pub(super) fn most(&self) -> u64 {
        self.max_bytes
    }

    /// A copy to try on where blocks would go; it does not know what is free.
    pub(super) fn trial(&self) -> Self {
        Self { free: Vec::new(), ..*self }
    }

    /// Up to `want` (at least 1) adjacent blocks: first block and number.
    #[inline]
    pub(super) fn take(&mut self, want: u64) -> Result<(u64, u64)> {
        if self.cursor == self.limit {
            self.cursor = self.geometry.skip_fixed(self.cursor);
            self.limit = self.geometry.next_fixed(self.cursor);
        }
        let start = self.cursor;
        let n = want.min(self.limit - start);
        if start + n > self.end {
            return Err(Ext4Error::Full { limit: self.max_bytes });
        }
        self.cursor += n;
        Ok((start, n))
    }

    /// Exactly `want` adjacent blocks (fewer than lie between fixed blocks).
    pub(super) fn take_adjacent(&mut self, want: u64) -> Result<u64> {
        if self.limit - self.cursor < want && self.cursor < self.limit {
            self.free.push((self.cursor, self.limit));
            self.cursor = self.limit;
        }
        // Two fixed groups may be adjacent: at most one group more is left out.
        let (start, n) = self.take(want)?;
        if n == want {
            return Ok(start);
        }
        self.free.push((start, start + n));
        let (start, n) = self.take(want)?;
        if n == want {
            return Ok(start);
        }
        self.free.push((start, start + n));
        let (start, n) = self.take(want)?;
        debug_assert_eq!(n, want, "a stretch between fixed blocks is longer than any table");
        Ok(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_blocks_are_stepped_over() {
        let sizes = [BlockSize::B1024, BlockSize::B2048, BlockSize::B4096];
        for (size, writable) in sizes.into_iter().flat_map(|size| [(size, false), (size, true)]) {
            let g = Geometry::new(size, writable);
            let mut space = Space::new(g, u64::MAX);
            let mut expected = g.first;
            while space.cursor < g.group * (g.per_meta * 2 + 3) {
                let (start, n) = space.take(1000).unwrap();
                while expected - g.group_start(g.group_of(expected)) < g.fixed(g.group_of(expected)) {
                    expected += 1;
                }
                assert_eq!(start, expected);
                for b in start..start + n {
                    let group = g.group_of(b);
                    assert!(b - g.group_start(group) >= g.fixed(group));
                }
                expected = start + n;
            }
        }
    }
}
