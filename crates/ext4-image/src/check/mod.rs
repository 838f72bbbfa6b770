//! A strict checker of applied images: what no writer of this crate would write is refused before the host mounts it.
//!
//! The worker that parsed a hostile tar may have been taken over, so its image is hostile too, and the host's kernel is
//! about to mount it. This runs in a fresh worker that never saw the tar.
//!
//! ```text
//!  superblock ─► group descriptors ─► inode tables, front to back ─┬─ every block claimed once (one bit a block)
//!                                                                  ├─ directories: entries, `.`, `..`, hash tree
//!                                                                  └─ xattrs: layout, hashes, overlayfs' own
//!  then: links and parents (16 bytes an inode) ─► bitmaps and counts against what was found
//! ```
//!
//! Invariants: at least as strict as `e2fsck -fn`, and stricter: only the features, flags and fields of this crate's
//! writers; no journal, no orphans, no mount options; of `trusted.overlay.*` only `opaque=y` on directories. File data
//! are not read. No panic, and memory within [`CheckLimits`]: one bit a block, 16 bytes an inode, one directory's names.
//! Every [`Ext4Error::Corrupt`] names one rule and its place. Called by `svm-agent` and `layer verify`.

mod blocks;
mod dir;
mod group;
mod inode;
mod sandbox;
mod superblock;
#[cfg(test)]
mod tests;
mod tree;
mod xattr;

pub use sandbox::{SandboxShape, check_sandbox};

use super::{Ext4Error, Place, error::SuperblockFault, layout::dir::EXT4_FT_DIR, reader::Ext4};
use blocks::Blocks;
use disk_io::ReadAt;
use std::collections::HashMap;

/// Limits of an image, so that memory is bounded before anything in it is trusted.
#[derive(Debug, Clone, Copy)]
pub struct CheckLimits {
    /// Blocks; one bit each.
    pub max_blocks: u64,
    /// Inodes; 16 bytes each.
    pub max_inodes: u32,
    /// The version of the writer that made the image: version 1 made inline data that look like an extent tree, and
    /// devices with several names whose number may lead to a block that looks like a directory. [`WRITER`] for a new
    /// image.
    pub writer: u32,
}

/// The version of [`crate::writer`] whose images must keep every rule.
pub const WRITER: u32 = 2;

impl Default for CheckLimits {
    /// 2^33 blocks would be 1 GiB of bits; here 2^31 (2 TiB of 1 KiB blocks, 256 MiB of bits) and 2^25 inodes (512 MiB).
    fn default() -> Self {
        Self { max_blocks: 1 << 31, max_inodes: 1 << 25, writer: WRITER }
    }
}

impl CheckLimits {
    fn hold<R: ReadAt>(&self, fs: &Ext4<R>) -> Result<(), Ext4Error> {
        let geometry = fs.geometry();
        if geometry.blocks_count <= self.max_blocks && geometry.inodes_count <= self.max_inodes {
            return Ok(());
        }
        Err(Ext4Error::unsupported(
            format!(
                "{} blocks and {} inodes (at most {} and {})",
                geometry.blocks_count, geometry.inodes_count, self.max_blocks, self.max_inodes
            ),
            Place::default(),
        ))
    }
}

/// What a good image contains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Bytes of the file system.
    pub image_bytes: u64,
    /// The writer that made it.
    pub layout: Layout,
    /// Inodes in use, reserved ones included.
    pub inodes: u64,
    /// Directories.
    pub directories: u64,
    /// Blocks in use.
    pub blocks_used: u64,
    /// `s_uuid`.
    pub uuid: [u8; 16],
}

/// What the walk has found out about an inode.
#[derive(Debug, Clone, Copy, Default)]
struct Node {
    /// Directory: the one that names it. Else: number of names found (EA inodes: of entries).
    parent_or_names: u32,
    /// Directory: the inode of `..`. Else unused.
    dotdot: u32,
    /// `i_links_count` (EA inodes: the reference count).
    links: u32,
    /// Directories: subdirectories found.
    subdirs: u16,
    /// The file type that directory entries gave it; 0: none yet.
    named_as: u8,
    /// [`kind`] values; 0: free.
    kind: u8,
}

/// Values of [`Node::kind`]: `EXT4_FT_…` of directory entries, and two more.
mod kind {
    pub(super) const DIRECTORY: u8 = super::EXT4_FT_DIR;
    /// Has the value of an xattr.
    pub(super) const EA: u8 = 0xEA;
    /// Reserved and empty.
    pub(super) const RESERVED: u8 = 0xEB;
}

/// The writer that made the image: the super block alone decides between the two, before anything else.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Layout {
    /// [`super::writer`]'s.
    #[default]
    Default,
    /// [`super::hcsshim`]'s: no checksums, and some fields as hcsshim's `tar2ext4` writes them.
    Hcsshim,
}

struct Checker<R> {
    fs: Ext4<R>,
    layout: Layout,
    writer: u32,
    blocks: Blocks,
    /// By inode number.
    nodes: Vec<Node>,
    /// xattr blocks: references still expected.
    shared: HashMap<u64, u32>,
    report: CheckReport,
    /// Scratch: hashes of one directory's names.
    names: Vec<u64>,
}

/// Checks all metadata of an applied image.
///
/// # Errors
/// `Corrupt` for a broken rule, `Unsupported` for what no writer of this crate makes or what exceeds the limits, `Io`.
pub fn check<R: ReadAt>(disk: R, limits: CheckLimits) -> Result<CheckReport, Ext4Error> {
    let fs = Ext4::open_without_recovery(disk)?;
    limits.hold(&fs)?;
    let geometry = fs.geometry();
    let mut checker = Checker {
        blocks: Blocks::new(geometry.blocks_count),
        nodes: vec![Node::default(); geometry.inodes_count as usize + 1],
        shared: HashMap::new(),
        report: CheckReport {
            image_bytes: geometry.blocks_count * u64::from(geometry.block_size),
            layout: Layout::of(geometry),
            uuid: geometry.uuid,
            ..CheckReport::default()
        },
        names: Vec::new(),
        layout: Layout::of(geometry),
        writer: limits.writer,
        fs,
    };
    let sb = checker.superblock()?;
    checker.around_superblock()?;
    checker.claim_fixed()?;
    let mut totals = group::Totals::default();
    for number in 0..checker.fs.geometry().groups {
        checker.inode_table(number, &mut totals)?;
    }
    checker.tree()?;
    for number in 0..checker.fs.geometry().groups {
        checker.block_bitmap(number, &mut totals)?;
    }
    if sb.free_blocks_count() != totals.free_blocks
        || u64::from(sb.s_free_inodes_count.get()) != totals.free_inodes
    {
        return Err(superblock::bad(SuperblockFault::FreeCounts));
    }
    checker.report.blocks_used = checker.blocks.used;
    Ok(checker.report)
}

impl<R: ReadAt> Checker<R> {
    fn node(&mut self, ino: u32) -> Option<&mut Node> {
        self.nodes.get_mut(ino as usize).filter(|_| ino != 0)
    }
}
