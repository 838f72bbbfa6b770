//! Replays a journal into the file system, as the kernel would at its next mount.
//!
//! ```text
//!   newest copies ─► their places ─flush─► super block ─flush─► s_start = 0 ─flush─► needs_recovery cleared ─flush
//! ```
//!
//! A cut before the last flush leaves a journal that is replayed again, with the same result. Inodes that were unlinked
//! while they were open stay on the orphan list, which the next mount works off. Called by [`super`]'s other operations, and
//! directly before a disk is compacted or cloned.

use super::{
    flush,
    log::{self, Log},
    superblock, write,
};
use crate::{
    Ext4Error,
    layout::superblock::{Incompat, Superblock},
    reader::Ext4,
};
use disk_io::WriteAt;

/// What a replay has found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Replayed {
    /// The file system was not unmounted: its journal was in use.
    pub was_dirty: bool,
    /// Blocks that the journal had newer than the disk.
    pub blocks: u64,
}

/// Brings a file system up to date whose journal is in use; others stay as they are.
///
/// # Errors
/// `Corrupt`, `Unsupported` (fast commits, a journal on another disk) or `Io`. Then, too, the file system is what it was, as
/// long as the journal is kept.
pub fn replay<D: WriteAt>(disk: &D) -> Result<Replayed, Ext4Error> {
    let old = superblock::read(disk)?;
    if !old.incompat().contains(Incompat::EXT4_FEATURE_INCOMPAT_RECOVER) {
        return Ok(Replayed::default());
    }
    let fs = Ext4::open(disk)?;
    let block_size = u64::from(fs.geometry().block_size);
    let mut blocks: Vec<u64> = fs.source.overlay.blocks().collect();
    blocks.sort_unstable();
    let log = Log::open(&fs)?;
    // The primary super block comes last, whole.
    let new = recovered(&fs)?;
    let first = u64::from(fs.geometry().first_data_block);
    for &block in &blocks {
        let mut bytes = vec![0; block_size as usize];
        fs.source.read(block * block_size, &mut bytes)?;
        if block == first {
            let at = log::superblock_in_block(fs.geometry());
            bytes[at..at + size_of::<Superblock>()].copy_from_slice(zerocopy::IntoBytes::as_bytes(&old));
        }
        write(disk, &bytes, block * block_size)?;
    }
    if !blocks.is_empty() {
        flush(disk)?;
    }
    let new = superblock::commit(disk, &old, new)?;
    log.clear(disk)?;
    let mut clean = new;
    let flags = new.incompat() - Incompat::EXT4_FEATURE_INCOMPAT_RECOVER;
    clean.s_feature_incompat.set(flags.bits());
    superblock::commit(disk, &new, clean)?;
    Ok(Replayed { was_dirty: true, blocks: blocks.len() as u64 })
}

/// The super block after the replay, still marked. A kernel keeps the counts of free blocks and inodes up to date in the groups only.
fn recovered<D: WriteAt>(fs: &Ext4<&D>) -> Result<Superblock, Ext4Error> {
    let mut sb = fs.source.superblock()?;
    let (mut blocks, mut inodes) = (0, 0);
    for group in 0..fs.geometry().groups {
        let desc = fs.group(group)?;
        blocks += u64::from(desc.free_blocks());
        inodes += desc.free_inodes();
    }
    sb.set_free_blocks_count(blocks);
    sb.s_free_inodes_count.set(inodes);
    let flags = sb.incompat() | Incompat::EXT4_FEATURE_INCOMPAT_RECOVER;
    sb.s_feature_incompat.set(flags.bits());
    Ok(sb)
}
