//! The blocks that a dirty journal holds in a newer version than the disk: the result of recovery in memory.
//!
//! Places, not bytes: 32 bytes for each distinct block in the journal. Filled by [`super::journal`], read by
//! [`super::source`].

use std::collections::HashMap;

/// Where the journal's newest copy of a block is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Copy {
    /// Block of the disk.
    pub(crate) block: u64,
    /// Its first four bytes are jbd2's magic number, stored as zeros.
    pub(crate) escaped: bool,
}

/// Blocks that the journal has newer than the disk.
#[derive(Debug, Default)]
pub(crate) struct Overlay(HashMap<u64, Copy>);

impl Overlay {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn get(&self, block: u64) -> Option<Copy> {
        self.0.get(&block).copied()
    }

    /// The blocks, in no order.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = u64> {
        self.0.keys().copied()
    }

    pub(crate) fn insert(&mut self, block: u64, copy: Copy) {
        self.0.insert(block, copy);
    }
}
