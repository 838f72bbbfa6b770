//! What can be checked of a sandbox before a kernel mounts it.
//!
//! A kernel wrote it, so its contents may have every form of ext4, and the strict rules for images of this crate's writers
//! do not apply. Its shape is compared with what `mkfs.ext4` and [`crate::format`] make, which bounds the cost of a mount.
//!
//! Called by `layer mount`.

use super::{CheckLimits, superblock};
use crate::{
    Ext4Error, FileKind, Place,
    error::{GroupFault, LinkFault, SuperblockFault},
    layout::{
        EXT4_JOURNAL_INO,
        superblock::{Compat, EXT4_ERROR_FS, Incompat, SUPERBLOCK_OFFSET},
    },
    reader::Ext4,
};
use disk_io::ReadAt;

/// A sandbox whose shape is sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SandboxShape {
    /// It was not unmounted: a mount replays its journal.
    pub needs_recovery: bool,
}

/// Checks the super block, all group descriptors, and that the root is a directory. Nothing is replayed.
///
/// # Errors
/// `Corrupt` for a broken rule, `Unsupported` for what no sandbox has or exceeds the limits, `Io`.
pub fn check_sandbox<R: ReadAt>(disk: R, limits: CheckLimits) -> Result<SandboxShape, Ext4Error> {
    let fs = Ext4::open_without_recovery(disk)?;
    limits.hold(&fs)?;
    let geometry = fs.geometry();
    let foreign = |what: String| Err(Ext4Error::unsupported(what, Place::offset(SUPERBLOCK_OFFSET)));
    // The kernel keeps some memory for each group as long as it is mounted.
    if geometry.blocks_per_group != geometry.block_size * 8 {
        return foreign(format!("groups of {} blocks, which no mkfs makes", geometry.blocks_per_group));
    }
    let sb = fs.source.superblock()?;
    if !geometry.has_compat(Compat::EXT4_FEATURE_COMPAT_HAS_JOURNAL)
        || geometry.journal_inum != EXT4_JOURNAL_INO
        || sb.s_journal_dev.get() != 0
    {
        return foreign(format!("a sandbox with a journal other than inode {EXT4_JOURNAL_INO}"));
    }
    // After an error that a kernel recorded, its statements about the contents can no longer be trusted.
    if sb.s_state.get() & EXT4_ERROR_FS != 0 || sb.s_error_count.get() != 0 {
        return Err(superblock::bad(SuperblockFault::RecordedErrors));
    }
    if sb.s_mount_opts.iter().any(|b| *b != 0) {
        return foreign("a file system with mount options of its own".to_owned());
    }
    for number in 0..geometry.groups {
        let desc = fs.group(number)?;
        if !geometry.holds(desc.block_bitmap(), 1) || !geometry.holds(desc.inode_bitmap(), 1) {
            return Err(Ext4Error::corrupt(GroupFault::PlacesOutside, Place::group(number)));
        }
    }
    if fs.inode(fs.root())?.kind != FileKind::Directory {
        return Err(Ext4Error::corrupt(LinkFault::Root, Place::inode(fs.root())));
    }
    Ok(SandboxShape { needs_recovery: geometry.has(Incompat::EXT4_FEATURE_INCOMPAT_RECOVER) })
}
