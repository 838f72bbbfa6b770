//! What can be checked of a sandbox before a kernel mounts it.
//!
//! A kernel wrote it, so its contents have every form that ext4 knows, and the strict rules for images of our writer do
//! not hold. Its shape can be held against what `mkfs.ext4` and our own blank make, which bounds what a mount costs.
//!
//! Called by `cli`.

use super::{
    super::reader::{
        Ext4, corrupt,
        superblock::{SUPERBLOCK_LEN, SUPERBLOCK_OFFSET, compat, incompat},
        unsupported,
    },
    CheckLimits, Ext4Error,
};
use crate::{
    FileKind,
    reader::bytes::{u16_at, u32_at},
};
use disk_io::ReadAt;

/// `EXT4_JOURNAL_INO`.
const JOURNAL_INO: u32 = 8;

/// What is known of a sandbox whose shape is sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SandboxShape {
    /// It was not unmounted: a mount replays its journal.
    pub needs_recovery: bool,
}

/// Checks the super block, all group descriptors, and that the root is a folder. Nothing is replayed.
///
/// # Errors
/// `Corrupt` for what is wrong, `Unsupported` for what no sandbox has or exceeds the limits, `Io`.
pub fn check_sandbox<R: ReadAt>(disk: R, limits: CheckLimits) -> Result<SandboxShape, Ext4Error> {
    let fs = Ext4::open_without_recovery(disk)?;
    let geometry = fs.geometry().clone();
    if geometry.blocks_count > limits.max_blocks || geometry.inodes_count > limits.max_inodes {
        return Err(unsupported(format!(
            "{} blocks and {} inodes, more than the checker's limits",
            geometry.blocks_count, geometry.inodes_count
        )));
    }
    // The kernel keeps something in memory for each group as long as it is mounted.
    if geometry.blocks_per_group != geometry.block_size * 8 {
        return Err(unsupported(format!(
            "groups of {} blocks, which no mkfs makes",
            geometry.blocks_per_group
        )));
    }
    let mut sb = vec![0; SUPERBLOCK_LEN];
    fs.source.read(SUPERBLOCK_OFFSET, &mut sb)?;
    if geometry.feature_compat & compat::HAS_JOURNAL == 0
        || geometry.journal_inum != JOURNAL_INO
        || u32_at(&sb, 0xE4) != 0
    {
        return Err(unsupported("a sandbox whose journal is not its inode 8"));
    }
    // An error that a kernel noted: what it says of the contents is no longer to be believed.
    if u16_at(&sb, 0x3A) & 2 != 0 || u32_at(&sb, 0x194) != 0 {
        return Err(corrupt("superblock", "a kernel found errors in it (see `e2fsck -fn`)"));
    }
    if sb.get(0x200..0x240).is_none_or(|options| options.iter().any(|b| *b != 0)) {
        return Err(unsupported("a file system with mount options of its own"));
    }
    for number in 0..geometry.groups {
        fs.group(number)?;
        let (_, raw) = fs.raw_descriptor(number)?;
        let wide = |low, high| {
            u64::from(u32_at(&raw, low))
                | if raw.len() >= 64 { u64::from(u32_at(&raw, high)) << 32 } else { 0 }
        };
        if !geometry.holds(wide(0, 0x20), 1) || !geometry.holds(wide(4, 0x24), 1) {
            return Err(corrupt(format!("group {number}"), "its bitmaps lie outside the file system"));
        }
    }
    if fs.inode(fs.root())?.kind != FileKind::Directory {
        return Err(corrupt("inode 2", "the root is no directory"));
    }
    Ok(SandboxShape { needs_recovery: geometry.has(incompat::RECOVER) })
}
