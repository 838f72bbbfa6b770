//! A strict checker of applied images: what our writer would not write is refused before the host mounts it.
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
//! Invariants: at least as strict as `e2fsck -fn`, and stricter: only the features, flags and fields of our writer; no
//! journal, no orphans, no mount options; of `trusted.overlay.*` only `opaque=y` on directories. File data are not
//! read. No panic, and memory within [`CheckLimits`]: one bit a block, 16 bytes an inode, one directory's names.
//! Called by `agent`.

mod dir;
mod group;
mod inode;
mod sandbox;
#[cfg(test)]
mod tests;
mod tree;
mod xattr;

pub use sandbox::{SandboxShape, check_sandbox};

use super::{
    Ext4Error, FileKind,
    reader::{
        Ext4, ROOT_INO,
        bytes::{u8_at, u16_at, u32_at, wide},
        corrupt,
        superblock::{Geometry, SUPERBLOCK_LEN, SUPERBLOCK_OFFSET, incompat},
        unsupported,
    },
    writer::GROUP_BLOCKS,
};
use disk_io::ReadAt;
use std::collections::HashMap;

/// What an image may at most be, so that memory is bounded before anything in it is believed.
#[derive(Debug, Clone, Copy)]
pub struct CheckLimits {
    /// Blocks; one bit each.
    pub max_blocks: u64,
    /// Inodes; 16 bytes each.
    pub max_inodes: u32,
    /// The version of the writer whose image it is: version 1 made inline data that look like an extent tree, and
    /// devices of several names whose number may lead to a block that looks like a folder. [`WRITER`] for a new image.
    pub writer: u32,
}

/// The version of our writer whose images must keep every rule.
pub const WRITER: u32 = 2;

impl Default for CheckLimits {
    /// 2^33 blocks would be 1 GiB of bits; here 2^31 (2 TiB of 1 KiB blocks, 256 MiB of bits) and 2^25 inodes (512 MiB).
    fn default() -> Self {
        Self { max_blocks: 1 << 31, max_inodes: 1 << 25, writer: WRITER }
    }
}

/// What a good image holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Bytes of the file system.
    pub image_bytes: u64,
    /// Whose layout it has.
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

/// Features of our writer; `COMPAT`: ext_attr, dir_index, sparse_super2.
const COMPAT: u32 = 0x8 | 0x20 | 0x200;
/// All that the reader knows but recovery.
const INCOMPAT: u32 = incompat::KNOWN & !incompat::RECOVER;
/// sparse_super, large_file, huge_file, dir_nlink, extra_isize, metadata_csum, read-only.
const RO_COMPAT: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400 | 0x1000;
/// Features of an image of profile hcsshim: exactly these (inline_data may be on too).
/// ext_attr, sparse_super2; filetype, extents, flex_bg; large_file, huge_file, extra_isize, read-only.
const HCSSHIM: (u32, u32, u32) = (0x208, 0x242, 0x104A);
/// Features without which images are not ours: filetype, extents; metadata_csum.
const INCOMPAT_NEEDED: u32 = incompat::FILETYPE | incompat::EXTENTS;
const RO_COMPAT_NEEDED: u32 = 0x400;
/// `s_default_mount_opts`: xattrs and ACLs.
const DEFAULT_MOUNT_OPTS: u32 = 0xC;
/// More inodes than fit a group whatever its size (`EXT2_MAX_INODES_PER_GROUP`).
const MAX_INODES_PER_GROUP: u32 = 65_536;
/// `EXT4_GOOD_OLD_FIRST_INO`.
const FIRST_INO: u32 = 11;

/// What is known of an inode while the image is walked.
#[derive(Debug, Clone, Copy, Default)]
struct Node {
    /// Directory: the one that names it. Else: number of names found (EA inodes: of entries).
    parent_or_names: u32,
    /// Directory: what `..` says. Else unused.
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

/// Values of [`Node::kind`]: directory entry types, and one of our own.
mod kind {
    pub(super) const DIRECTORY: u8 = 2;
    /// Holds the value of an xattr.
    pub(super) const EA: u8 = 0xEA;
    /// Reserved and empty.
    pub(super) const RESERVED: u8 = 0xEB;
}

fn file_type(kind: FileKind) -> u8 {
    match kind {
        FileKind::File => 1,
        FileKind::Directory => kind::DIRECTORY,
        FileKind::CharDevice => 3,
        FileKind::BlockDevice => 4,
        FileKind::Fifo => 5,
        FileKind::Socket => 6,
        FileKind::Symlink => 7,
    }
}

/// One bit for each block.
#[derive(Debug)]
struct Blocks {
    bits: Vec<u64>,
    used: u64,
}

impl Blocks {
    fn new(blocks: u64) -> Self {
        Self { bits: vec![0; (blocks.div_ceil(64)) as usize], used: 0 }
    }

    fn is_used(&self, block: u64) -> bool {
        self.bits.get((block / 64) as usize).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// Takes blocks for one owner.
    fn claim(&mut self, first: u64, count: u64, owner: &dyn Fn() -> String) -> Result<(), Ext4Error> {
        let mut block = first;
        let end = first.saturating_add(count);
        while block < end {
            let (at, bit) = ((block / 64) as usize, block % 64);
            let n = (64 - bit).min(end - block);
            let mask = (u64::MAX >> (64 - n)) << bit;
            match self.bits.get_mut(at) {
                Some(word) if *word & mask == 0 => *word |= mask,
                _ => {
                    return Err(corrupt(
                        owner(),
                        format!("block {block} or one next to it has another owner"),
                    ));
                }
            }
            block += n;
        }
        self.used += count;
        Ok(())
    }
}

/// Whose image it is: what may differ between the two is decided by the super block alone, before anything else.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Layout {
    /// [`super::writer`]'s.
    #[default]
    Default,
    /// [`super::hcsshim`]'s: no checksums, and some fields as hcsshim's `tar2ext4` writes them.
    Hcsshim,
}

impl Layout {
    /// Exactly the features of that profile, in its only geometry.
    fn of(geometry: &Geometry) -> Self {
        let incompat = geometry.feature_incompat & !incompat::INLINE_DATA;
        let hcsshim = (geometry.feature_compat, incompat, geometry.feature_ro_compat) == HCSSHIM
            && (geometry.block_size, geometry.blocks_per_group, geometry.inode_size) == (4096, 32_768, 256)
            && geometry.uuid == [0; 16]
            && geometry.desc_size == 32;
        if hcsshim { Self::Hcsshim } else { Self::Default }
    }
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
/// `Corrupt` for what is wrong, `Unsupported` for what our writer does not make or exceeds the limits, `Io`.
pub fn check<R: ReadAt>(disk: R, limits: CheckLimits) -> Result<CheckReport, Ext4Error> {
    let fs = Ext4::open_without_recovery(disk)?;
    let geometry = fs.geometry();
    if geometry.blocks_count > limits.max_blocks || geometry.inodes_count > limits.max_inodes {
        return Err(unsupported(format!(
            "{} blocks and {} inodes, more than the checker's limits",
            geometry.blocks_count, geometry.inodes_count
        )));
    }
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
    checker.beside_superblock()?;
    checker.claim_fixed()?;
    let mut totals = group::Totals::default();
    for number in 0..checker.fs.geometry().groups {
        checker.inode_table(number, &mut totals)?;
    }
    checker.tree()?;
    for number in 0..checker.fs.geometry().groups {
        checker.block_bitmap(number, &mut totals)?;
    }
    let free_blocks = wide(u32_at(&sb, 0x0C), u32_at(&sb, 0x158));
    if free_blocks != totals.free_blocks || u64::from(u32_at(&sb, 0x10)) != totals.free_inodes {
        return Err(corrupt("superblock", "its free counts are wrong"));
    }
    checker.report.blocks_used = checker.blocks.used;
    Ok(checker.report)
}

impl<R: ReadAt> Checker<R> {
    /// Checks what [`super::reader::Geometry`] does not.
    fn superblock(&self) -> Result<Vec<u8>, Ext4Error> {
        let mut sb = vec![0; SUPERBLOCK_LEN];
        self.fs.source.read(SUPERBLOCK_OFFSET, &mut sb)?;
        let geometry = self.fs.geometry();
        let bad = |reason: &str| Err(corrupt("superblock", reason));
        let strange =
            |what: String| Err(unsupported(format!("an image with {what}, which is not our writer's")));
        let hcsshim = self.layout == Layout::Hcsshim;
        let checksums = if hcsshim { 0 } else { RO_COMPAT_NEEDED };
        for (name, have, known, needed) in [
            ("compatible", geometry.feature_compat, COMPAT, 0),
            ("incompatible", geometry.feature_incompat, INCOMPAT, INCOMPAT_NEEDED),
            ("read-only compatible", geometry.feature_ro_compat, RO_COMPAT, checksums),
        ] {
            if have & !known != 0 || have & needed != needed {
                return strange(format!("{name} feature bits {have:#x}"));
            }
        }
        if u16_at(&sb, 0x3A) != 1 {
            return bad("it is not marked clean");
        }
        // Orphans, journal, quota, snapshots, MMP, errors, encryption, casefolding: all must be absent.
        for (name, at, len) in [
            ("an orphan list", 0xE8, 4),
            ("a journal", 0xD0, 24),
            ("a journal backup", 0x10C, 68),
            ("reserved descriptor blocks", 0xCE, 2),
            ("preallocation", 0xCC, 2),
            ("multi-mount protection", 0x166, 10),
            ("encryption", 0x176, 1),
            ("a snapshot", 0x180, 20),
            ("recorded errors", 0x194, 108),
            ("mount options", 0x200, 64),
            ("quota files", 0x240, 8),
            ("encryption keys", 0x254, 20),
            ("a project quota file", 0x26C, 4),
            ("an encoding", 0x27C, 4),
            ("an orphan file", 0x280, 4),
        ] {
            if sb.get(at..at + len).is_none_or(|field| field.iter().any(|b| *b != 0)) {
                return strange(name.to_owned());
            }
        }
        if u32_at(&sb, 0x24) != geometry.blocks_per_group {
            return bad("clusters per group differ from blocks per group");
        }
        if u32_at(&sb, 0x48) != 0 || u32_at(&sb, 0x100) & !DEFAULT_MOUNT_OPTS != 0 {
            return strange("another creator or other default mount options".to_owned());
        }
        if geometry.first_ino != FIRST_INO || geometry.inodes_count < FIRST_INO {
            return bad("its first inode is not 11");
        }
        if !(256..=1024).contains(&geometry.inode_size) {
            return strange(format!("inodes of {} bytes", geometry.inode_size));
        }
        let room = geometry.inode_size - 128;
        // 0: not said; else at least up to the high half of the checksum.
        let extra = |at| matches!(u16_at(&sb, at), size if size == 0 || size >= 4 && size <= room && size.is_multiple_of(4));
        if !extra(0x15C) || !extra(0x15E) {
            return bad("its extra inode sizes are out of range");
        }
        // A smaller group makes the kernel keep more in memory for each mount, and no writer of ours has one.
        if !hcsshim && u64::from(geometry.blocks_per_group) != GROUP_BLOCKS {
            return strange(format!("groups of {} blocks", geometry.blocks_per_group));
        }
        let per_block = geometry.block_size / u32::from(geometry.inode_size);
        let most = (per_block * (geometry.blocks_per_group - 4)).min(MAX_INODES_PER_GROUP - per_block);
        if !(per_block..=most).contains(&geometry.inodes_per_group) {
            return bad("its inodes per group are out of range");
        }
        // Without hash trees there is no hash.
        let hash = if hcsshim { (0, 0) } else { (1, 2) };
        if (u8_at(&sb, 0xFC), u32_at(&sb, 0x160)) != hash {
            return strange("another directory hash".to_owned());
        }
        if wide(u32_at(&sb, 8), u32_at(&sb, 0x154)) > geometry.blocks_count / 2 {
            return bad("it reserves too many blocks");
        }
        if u8_at(&sb, 0x174) > 31 {
            return bad("its flexible groups are too large");
        }
        let desc_size = u16_at(&sb, 0xFE);
        if desc_size != 0 && !desc_size.is_power_of_two() || desc_size > 1024 {
            return bad("its descriptor size is out of range");
        }
        let desc_blocks = geometry.groups.div_ceil(geometry.block_size / u32::from(geometry.desc_size));
        if geometry.first_meta_bg > desc_blocks {
            return bad("its first meta group is out of range");
        }
        if u16_at(&sb, 0x5A) != 0 {
            return bad("it is not the primary copy");
        }
        Ok(sb)
    }

    /// Before the super block, and behind it up to the end of its block, nothing stands: other programs look there for
    /// disks and boot code of their own kinds.
    fn beside_superblock(&self) -> Result<(), Ext4Error> {
        let end = u64::from(self.fs.geometry().block_size);
        for (from, to) in [(0, SUPERBLOCK_OFFSET), (SUPERBLOCK_OFFSET + SUPERBLOCK_LEN as u64, end)] {
            let mut bytes = vec![0; to.saturating_sub(from) as usize];
            self.fs.source.read(from, &mut bytes)?;
            if bytes.iter().any(|b| *b != 0) {
                return Err(corrupt("boot block", "the bytes beside the superblock are not zero"));
            }
        }
        Ok(())
    }

    fn node(&mut self, ino: u32) -> Option<&mut Node> {
        self.nodes.get_mut(ino as usize).filter(|_| ino != 0)
    }
}
