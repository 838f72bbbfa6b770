//! Which blocks are in use: one bit each, and each claimed by one owner.
//!
//! Filled while groups, inodes and xattrs are checked, then compared with the block bitmaps.

use crate::{Ext4Error, Place, error::BlockFault};

/// A set of numbers below a limit, one bit each.
#[derive(Debug)]
pub(super) struct Bits(Vec<u64>);

impl Bits {
    pub(super) fn new(limit: u64) -> Self {
        Self(vec![0; limit.div_ceil(64) as usize])
    }

    pub(super) fn contains(&self, n: u64) -> bool {
        self.0.get((n / 64) as usize).is_some_and(|word| word >> (n % 64) & 1 == 1)
    }

    pub(super) fn insert(&mut self, n: u64) {
        if let Some(word) = self.0.get_mut((n / 64) as usize) {
            *word |= 1 << (n % 64);
        }
    }
}

/// The blocks that have an owner.
#[derive(Debug)]
pub(super) struct Blocks {
    bits: Bits,
    /// How many.
    pub(super) used: u64,
}

impl Blocks {
    pub(super) fn new(blocks: u64) -> Self {
        Self { bits: Bits::new(blocks), used: 0 }
    }

    pub(super) fn is_used(&self, block: u64) -> bool {
        self.bits.contains(block)
    }

    /// Takes `count` blocks for one owner, which `place` names.
    pub(super) fn claim(&mut self, first: u64, count: u64, place: Place) -> Result<(), Ext4Error> {
        let mut block = first;
        let end = first.saturating_add(count);
        while block < end {
            let (at, bit) = ((block / 64) as usize, block % 64);
            let n = (64 - bit).min(end - block);
            let mask = (u64::MAX >> (64 - n)) << bit;
            let Some(word) = self.bits.0.get_mut(at) else {
                return Err(Ext4Error::corrupt(BlockFault::Outside, place.at_block(block)));
            };
            let taken = *word & mask;
            if taken != 0 {
                let taken = block - bit + u64::from(taken.trailing_zeros());
                return Err(Ext4Error::corrupt(BlockFault::TwoOwners, place.at_block(taken)));
            }
            *word |= mask;
            block += n;
        }
        self.used += count;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::CorruptKind;

    #[test]
    fn a_second_claim_names_the_block() {
        let mut blocks = Blocks::new(1000);
        blocks.claim(70, 5, Place::inode(12)).unwrap();
        assert!(blocks.is_used(74) && !blocks.is_used(75) && blocks.used == 5);
        let Err(Ext4Error::Corrupt { kind, place }) = blocks.claim(10, 63, Place::inode(13)) else {
            panic!()
        };
        assert_eq!(kind, CorruptKind::Block(BlockFault::TwoOwners));
        assert_eq!(place, Place::inode(13).at_block(70));
    }
}
