//! Verifies an image against its tree, block by block.
//!
//! ```text
//!   top level ──► hashes of the next level's blocks ──► … ──► leaves ──► data blocks
//! ```
//!
//! Trust goes from the top down: a block of hashes that does not match the level above is damaged, and the blocks below it
//! cannot be verified.

use super::{
    BLOCK, HASH, Hash, Levels, PER_BLOCK, SuperBlock, VerityError, find, hash_block,
    superblock::SUPERBLOCK_BYTES,
};
use disk_io::ReadAt;
use std::ops::Range;

/// Most damaged ranges that are listed.
const MAX_RANGES: usize = 1024;

/// The result of a check.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// The root hash, computed from the top level of the tree.
    pub root: Hash,
    /// Number of data blocks of 4096 bytes.
    pub data_blocks: u64,
    /// Number of data blocks that do not match their leaf.
    pub bad_blocks: u64,
    /// Byte ranges of the disk that do not match, ascending, adjacent ones joined; at most 1024.
    pub damaged: Vec<Range<u64>>,
    /// Byte ranges of the tree that do not match, in the order of checking (top level first); at most 1024.
    pub damaged_tree: Vec<Range<u64>>,
}

impl CheckReport {
    /// Whether data and tree match. The caller must still compare [`CheckReport::root`] with the expected root.
    pub fn is_sound(&self) -> bool {
        self.bad_blocks == 0 && self.damaged_tree.is_empty()
    }
}

fn note(ranges: &mut Vec<Range<u64>>, at: u64) {
    let end = at + BLOCK as u64;
    let room = ranges.len() < MAX_RANGES;
    match ranges.last_mut() {
        Some(last) if last.end == at => last.end = end,
        _ if room => ranges.push(at..end),
        _ => {}
    }
}

/// Computes the root hash from the top level alone, without verifying anything below it.
///
/// # Errors
/// [`VerityError::Io`] if the disk fails or ends before the tree.
pub fn root<D: ReadAt + ?Sized>(disk: &D, superblock: &SuperBlock) -> Result<Hash, VerityError> {
    // The top level is first; without levels, the only data block is the top.
    let levels = Levels::new(superblock.data_blocks);
    let at = if levels.levels.is_empty() { 0 } else { superblock.offset + BLOCK as u64 };
    let mut block = [0; BLOCK];
    disk.read_exact_at(&mut block, at).map_err(VerityError::io("reading the hash tree", at))?;
    Ok(hash_block(&superblock.salt, &block))
}

/// Reads every block of the tree and of the data. `progress` is called with the number of data bytes read so far.
///
/// # Errors
/// [`VerityError::Io`] if the disk fails, [`VerityError::Corrupt`] if it ends inside the tree. Damaged blocks are not an
/// error; they are in the report.
pub fn check<D: ReadAt + ?Sized>(
    disk: &D,
    superblock: &SuperBlock,
    progress: &mut dyn FnMut(u64),
) -> Result<CheckReport, VerityError> {
    let levels = Levels::new(superblock.data_blocks);
    let tree = superblock.offset + BLOCK as u64;
    let size = disk.size().map_err(VerityError::io("measuring the disk", tree))?;
    if size.saturating_sub(tree) / (BLOCK as u64) < levels.blocks() {
        let reason = format!("the disk ends inside a tree of {} blocks", levels.blocks());
        return Err(VerityError::Corrupt { offset: size, reason });
    }
    let salt = &superblock.salt;
    let mut report = CheckReport { data_blocks: superblock.data_blocks, ..CheckReport::default() };
    let mut buffer = vec![0; PER_BLOCK as usize * BLOCK];
    let mut node = [0; BLOCK];
    // Hashes of the level's blocks, from the level above. `None`: the block above is damaged.
    let mut expected: Vec<Option<Hash>> = Vec::new();
    for (depth, &(first, count)) in levels.levels.iter().enumerate().rev() {
        let top = depth + 1 == levels.levels.len();
        let mut below = Vec::new();
        for number in 0..count {
            let at = tree + (first + number) * BLOCK as u64;
            disk.read_exact_at(&mut node, at).map_err(VerityError::io("reading the hash tree", at))?;
            let found = hash_block(salt, &node);
            if top {
                report.root = found;
            }
            let sound = top || expected.get(number as usize).copied().flatten() == Some(found);
            if !sound {
                note(&mut report.damaged_tree, at);
            }
            if depth > 0 {
                below.extend(node.chunks_exact(HASH).map(|h| if sound { h.try_into().ok() } else { None }));
            } else if sound {
                let from = number * PER_BLOCK * BLOCK as u64;
                let len = (superblock.offset - from).min(buffer.len() as u64) as usize;
                disk.read_exact_at(&mut buffer[..len], from)
                    .map_err(VerityError::io("reading the image", from))?;
                for (i, (block, leaf)) in
                    buffer[..len].chunks_exact(BLOCK).zip(node.chunks_exact(HASH)).enumerate()
                {
                    if hash_block(salt, block) != *leaf {
                        report.bad_blocks += 1;
                        note(&mut report.damaged, from + (i * BLOCK) as u64);
                    }
                }
                progress(from + len as u64);
            }
        }
        expected = below;
    }
    if levels.levels.is_empty() {
        disk.read_exact_at(&mut node, 0).map_err(VerityError::io("reading the image", 0))?;
        report.root = hash_block(salt, &node);
    }
    Ok(report)
}

/// Checks that all bytes around the tree are zero: between the end of the file system and the super block, after the used
/// part of the super block, and after the tree up to the end of the disk. If `tree` is set, there must be a tree;
/// otherwise all bytes after the file system must be zero.
///
/// # Errors
/// [`VerityError::Corrupt`] for a byte that is not zero, or a missing tree; [`VerityError::Io`] if the disk fails.
pub fn check_around<D: ReadAt + ?Sized>(disk: &D, fs_bytes: u64, tree: bool) -> Result<(), VerityError> {
    let size = disk.size().map_err(VerityError::io("measuring the disk", fs_bytes))?;
    if !tree {
        return zeros(disk, fs_bytes..size);
    }
    let Some(superblock) = find(disk, fs_bytes)? else {
        let reason = "no hash tree follows the file system".into();
        return Err(VerityError::Corrupt { offset: fs_bytes, reason });
    };
    let levels = superblock.offset + BLOCK as u64;
    let end = levels + Levels::new(superblock.data_blocks).blocks() * BLOCK as u64;
    zeros(disk, fs_bytes..superblock.offset)?;
    zeros(disk, superblock.offset + SUPERBLOCK_BYTES..levels)?;
    zeros(disk, end..size)
}

fn zeros<D: ReadAt + ?Sized>(disk: &D, range: Range<u64>) -> Result<(), VerityError> {
    let mut buffer = vec![0; 64 << 10];
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(buffer.len() as u64) as usize;
        let part = &mut buffer[..len];
        disk.read_exact_at(part, at).map_err(VerityError::io("reading after the file system", at))?;
        if let Some(found) = part.iter().position(|b| *b != 0) {
            let reason = "a byte outside of file system and hash tree is not zero".into();
            return Err(VerityError::Corrupt { offset: at + found as u64, reason });
        }
        at += len as u64;
    }
    Ok(())
}
