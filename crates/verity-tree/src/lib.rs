//! dm-verity: a tree of hashes behind a layer's file system, so that every block can be held against one root hash.
//!
//! ```text
//!   0               fs end    hash_offset = fs end rounded up to 4096
//!   ┌───────────────┬────────┬─────────────┬───────────┬─────┬──────────────────┬────────────┐
//!   │ ext4          │ zeros  │ super block │ top level │  …  │ level 0 (leaves) │ VHD footer │
//!   └───────────────┴────────┴──────┬──────┴───────────┴─────┴──────────────────┴────────────┘
//!    └─ data blocks of 4096 bytes ─┘└ 4096 bytes, 512 used    a block of hashes holds 128, the last one zero-padded
//!
//!   leaf = SHA-256(salt ‖ data block)     node = SHA-256(salt ‖ block of hashes)     root = node of the top level's block
//! ```
//!
//! Format: `Documentation/admin-guide/device-mapper/verity.rst` and cryptsetup's `verity` super block, version 1 (salt
//! first), SHA-256, 4096/4096, salt 32 zero bytes: what hcsshim writes, so that equal file systems have equal roots.
//! `veritysetup verify --hash-offset` agrees. The root itself is not in the image: `layer.json` keeps it.
//!
//! * [`TreeDisk`] stands between an image writer and its disk: it hashes on a second thread what passes, in whatever
//!   order it comes, and appends the tree. Nothing is read twice save blocks that were written in two strokes.
//! * [`check`] reads an image with its tree and tells the damaged blocks.
//!
//! Invariants: the tree depends on the bytes of the disk only, never on the order of writes; memory is bounded (see
//! [`TreeDisk`]); what is read is hostile. Called by `diff::apply`, by `agent` for scrub, and by `cli`.

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

/// Bytes of a data block and of a block of hashes.
pub const BLOCK: usize = 4096;
/// Bytes of a hash.
pub const HASH: usize = 32;
/// Hashes in a block.
const PER_BLOCK: u64 = (BLOCK / HASH) as u64;
/// Bytes of the salt, all zero.
const SALT: usize = 32;

/// A hash of the tree.
pub type Hash = [u8; HASH];

/// Hash of one block of data or of hashes.
fn hash_block(salt: &[u8], block: &[u8]) -> Hash {
    Sha256::new().chain_update(salt).chain_update(block).finalize().into()
}

/// Where the levels lie, from the number of data blocks alone.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Levels {
    /// First block (counted from the block behind the super block) and number of blocks; level 0 first.
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
            // The levels above stand before it.
            levels.push((counts[level + 1..].iter().sum(), count));
        }
        Self { levels }
    }

    /// Blocks of the whole tree.
    fn blocks(&self) -> u64 {
        self.levels.iter().map(|(_, count)| count).sum()
    }
}

/// Bytes that the super block and the tree take for a file system of `fs_bytes`.
pub fn tree_bytes(fs_bytes: u64) -> u64 {
    (1 + Levels::new(fs_bytes.div_ceil(BLOCK as u64)).blocks()) * BLOCK as u64
}

/// Where the super block stands behind a file system of `fs_bytes`.
pub fn hash_offset(fs_bytes: u64) -> u64 {
    fs_bytes.next_multiple_of(BLOCK as u64)
}
