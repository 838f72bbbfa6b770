//! dm-verity hash trees: built while an image is written, and checked block by block against one root hash.
//!
//! ```text
//!   0               fs end    hash_offset = fs end rounded up to 4096
//!   ┌───────────────┬────────┬─────────────┬───────────┬─────┬──────────────────┐
//!   │ file system   │ zeros  │ super block │ top level │  …  │ level 0 (leaves) │  anything (a VHD footer)
//!   └───────────────┴────────┴──────┬──────┴───────────┴─────┴──────────────────┘
//!    └─ data blocks of 4096 bytes ─┘└ 4096 bytes, 512 used    a block holds 128 hashes, the last one zero-padded
//!
//!   leaf = SHA-256(salt ‖ data block)     node = SHA-256(salt ‖ block of hashes)     root = node of the top level's block
//! ```
//!
//! * [`TreeDisk`] sits between an image writer and its disk. It hashes on a second thread whatever is written, in any
//!   order, and appends the tree. Only blocks that were written more than once are read back.
//! * [`find`] reads the super block after a file system, [`check`] verifies the tree and all data, and [`root`] computes the
//!   root hash from the top level.
//!
//! The root hash is not part of the image. Store it where an attacker cannot change it, and compare it with
//! [`CheckReport::root`].
//!
//! Sources: `Documentation/admin-guide/device-mapper/verity.rst` of Linux, and cryptsetup's `lib/verity/verity.c`.
//!
//! # Limits
//!
//! Super block version 1, hash type 1 (salt first), SHA-256, blocks of 4096 bytes; other parameters are reported as
//! [`VerityError::Unsupported`]. No forward error correction. The tree is read from untrusted disks: all numbers are checked
//! before use. Memory is bounded: see [`TreeDisk::hashing`]; a check needs 32 bytes per 512 KiB of data.
//!
//! # Byte stability
//!
//! The tree depends only on the data, and the super block also on the UUID; the salt is 32 zero bytes (as hcsshim writes
//! it), so equal file systems have equal root hashes. `veritysetup verify` accepts the result. All releases with the same
//! major version write the same bytes.

#![forbid(unsafe_code)]

mod build;
mod check;
mod error;
mod leaves;
mod superblock;
#[cfg(test)]
mod tests;

pub use build::{TreeDisk, TreeSummary};
pub use check::{CheckReport, check, check_around, root};
pub use error::VerityError;
pub use superblock::{SuperBlock, find};

use sha2::{Digest, Sha256};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Size of a data block and of a block of hashes, in bytes.
pub const BLOCK: usize = 4096;
/// Size of a hash, in bytes.
pub const HASH: usize = 32;
/// Hashes in a block.
const PER_BLOCK: u64 = (BLOCK / HASH) as u64;
/// Bytes of the salt, all zero.
const SALT: usize = 32;

/// A SHA-256 hash of the tree.
pub type Hash = [u8; HASH];

/// Hash of one block of data or of hashes.
fn hash_block(salt: &[u8], block: &[u8]) -> Hash {
    Sha256::new().chain_update(salt).chain_update(block).finalize().into()
}

/// The places of the levels, which follow from the number of data blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Levels {
    /// First block (0 is the block after the super block) and number of blocks; level 0 first.
    levels: Vec<(u64, u64)>,
}

impl Levels {
    /// One data block needs no level: its hash is the root.
    fn new(data_blocks: u64) -> Self {
        let mut counts = Vec::new();
        let mut below = data_blocks;
        while below > 1 {
            below = below.div_ceil(PER_BLOCK);
            counts.push(below);
        }
        let mut levels = Vec::with_capacity(counts.len());
        for (level, &count) in counts.iter().enumerate() {
            // The levels above precede it.
            levels.push((counts[level + 1..].iter().sum(), count));
        }
        Self { levels }
    }

    /// Number of blocks of the whole tree.
    fn blocks(&self) -> u64 {
        self.levels.iter().map(|(_, count)| count).sum()
    }
}

/// Size of super block and tree for a file system of `fs_bytes`, in bytes.
pub fn tree_bytes(fs_bytes: u64) -> u64 {
    (1 + Levels::new(fs_bytes.div_ceil(BLOCK as u64)).blocks()) * BLOCK as u64
}

/// Offset of the super block after a file system of `fs_bytes`.
pub fn hash_offset(fs_bytes: u64) -> u64 {
    fs_bytes.next_multiple_of(BLOCK as u64)
}
