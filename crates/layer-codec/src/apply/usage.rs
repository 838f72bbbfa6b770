//! What a layer would take as the upper directory of an overlay, on an ext4 in blocks of 4 KiB: the size that containerd's
//! overlayfs snapshotter reports.
//!
//! ```text
//!   write_data ─► Blocks (of the open file) ─► holes: only files whose blocks do not follow from their size
//!   nodes, names at the end ─► sum of st_blocks × 512, number of inodes, the root included
//! ```
//!
//! containerd's `fs.DiskUsage` (continuity, fs/du_unix.go) walks the directory from its root, which it counts, and adds
//! `st_blocks × 512` of each inode once. The file system assumed here is what mke2fs makes by default for a disk: 4 KiB
//! blocks, inodes of 256 bytes, metadata checksums, no inline data, data in as few extents as there are ranges.
//!
//! | inode | blocks |
//! |---|---|
//! | file | those that hold data, and those of an extent tree of more than 4 extents |
//! | directory | 1; beyond one block of names those of a hash tree, estimated: where the kernel splits its leaves depends on a random seed |
//! | symlink of at most 59 bytes | 0, a longer one 1 |
//! | device, pipe, socket, whiteout | 0 |
//! | attributes that do not fit the inode | 1 more |
//!
//! Pure: no I/O. Called by `tree` and `layer`.

use disk_io::WriteAt;
use ext4_image::{
    Xattr,
    writer::{ImageWriter, NodeId, Shape},
};
use std::collections::HashMap;

/// Bytes of a block.
const BLOCK: u64 = 4096;
/// The most blocks of an extent (`EXT_INIT_MAX_LEN`).
const EXTENT_BLOCKS: u64 = 32768;
/// Extents, or index entries, in an inode.
const INODE_EXTENTS: u64 = 4;
/// Extents, or index entries, in a block: 12 bytes each, after a header of 12 and before a checksum of 4.
const BLOCK_EXTENTS: u64 = (BLOCK - 16) / 12;
/// Longest target of a symbolic link that is kept in the inode.
const FAST_SYMLINK: u64 = 59;
/// Bytes of names in the only block of a directory: without `.`, `..` and the checksum.
const ONLY_BLOCK: u64 = BLOCK - 24 - 12;
/// Bytes of names in a leaf of a directory's hash tree.
const LEAF: u64 = BLOCK - 12;
/// Entries in the root of a directory's hash tree.
const ROOT_ENTRIES: u64 = 507;
/// Entries in an inner node of a directory's hash tree: between half full after a split and full.
const INNER_ENTRIES: u64 = 510 * 3 / 4;
/// Bytes of attributes in an inode of 256 bytes: behind its fields (128 + 32) and the magic number, before the last zeros.
const INODE_XATTRS: usize = 256 - 160 - 4 - 4;
/// Bytes of an attribute beside its name and value (`struct ext4_xattr_entry`).
const XATTR_ENTRY: usize = 16;

/// Blocks and inodes of a layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// Sum of the allocated bytes.
    pub(super) bytes: u64,
    /// Inodes, the root's included.
    pub(super) inodes: u64,
}

/// The blocks of a file while it is written, from its start to its end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Blocks {
    /// The block after the last that holds data.
    end: u64,
    data: u64,
    extents: u64,
    /// Blocks of the range that `end` ends.
    run: u64,
}

impl Blocks {
    /// `len` bytes at `offset`, which is not before the end of earlier data.
    pub(super) fn write(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let (first, end) = (offset / BLOCK, (offset + len).div_ceil(BLOCK));
        if end <= self.end {
            return;
        }
        if first > self.end {
            self.run = 0;
        }
        let added = end - first.max(self.end);
        self.extents -= self.run.div_ceil(EXTENT_BLOCKS);
        self.run += added;
        self.extents += self.run.div_ceil(EXTENT_BLOCKS);
        self.data += added;
        self.end = end;
    }

    /// A file of `size` bytes without holes.
    fn dense(size: u64) -> Self {
        let mut blocks = Self::default();
        blocks.write(0, size);
        blocks
    }

    /// Blocks of data, and of the extent tree beyond the inode.
    fn count(&self) -> u64 {
        let (mut entries, mut count) = (self.extents, self.data);
        while entries > INODE_EXTENTS {
            entries = entries.div_ceil(BLOCK_EXTENTS);
            count += entries;
        }
        count
    }

    /// The blocks of a file of this size that is complete, if they do not follow from its size.
    pub(super) fn with_holes(&self, size: u64) -> Option<u64> {
        (*self != Self::dense(size)).then(|| self.count())
    }
}

/// Blocks of a directory with these lengths of names.
fn directory_blocks(lengths: impl Iterator<Item = usize>) -> u64 {
    /// Bytes of an entry before its name; entries begin at multiples of 4.
    const ENTRY_HEAD: u64 = 8;
    /// Leaves split in halves where names come at random: on average they are full to ln 2. Measured on Linux 6: 0.61 to
    /// 0.86 with up to ten leaves, 0.66 to 0.75 with more.
    const FILLED: (u64, u64) = (7, 10);
    let names: u64 = lengths.map(|len| (ENTRY_HEAD + len as u64).next_multiple_of(4)).sum();
    if names <= ONLY_BLOCK {
        return 1;
    }
    let leaves = names.saturating_mul(FILLED.1).div_ceil(LEAF * FILLED.0).max(2);
    let inner = if leaves > ROOT_ENTRIES { leaves.div_ceil(INNER_ENTRIES) } else { 0 };
    1 + inner + leaves
}

/// Whether the attributes of an inode need a block.
fn need_block(xattrs: &[Xattr]) -> bool {
    let bytes: usize = xattrs
        .iter()
        .map(|x| XATTR_ENTRY + stored_name(&x.name).next_multiple_of(4) + stored_value(x).next_multiple_of(4))
        .sum();
    bytes > INODE_XATTRS
}

/// Length of a name as ext4 stores it: the name space is a number.
fn stored_name(name: &[u8]) -> usize {
    const ACL: &[u8] = b"system.posix_acl_";
    if name.starts_with(ACL) {
        return 0;
    }
    name.iter().position(|&b| b == b'.').map_or(name.len(), |dot| name.len() - dot - 1)
}

/// Length of a value as ext4 stores it: an ACL leaves out what its entries do not need.
fn stored_value(xattr: &Xattr) -> usize {
    /// Bytes of the version, and of an entry, in the form of getxattr(2).
    const HEAD: usize = 4;
    const ENTRY: usize = 8;
    /// Tags of entries that have an id.
    const USER: u8 = 0x02;
    const GROUP: u8 = 0x08;
    if !xattr.name.starts_with(b"system.posix_acl_") {
        return xattr.value.len();
    }
    let entries = xattr.value.get(HEAD..).unwrap_or_default().chunks(ENTRY);
    HEAD + entries
        .map(|e| if matches!(e.first(), Some(&(USER | GROUP))) { ENTRY } else { HEAD })
        .sum::<usize>()
}

/// What the tree takes. `holes`: blocks of the files that have holes.
pub(super) fn measure<W: WriteAt>(writer: &ImageWriter<W>, holes: &HashMap<NodeId, u64>) -> Usage {
    let (mut blocks, mut inodes) = (0u64, 0);
    for view in writer.nodes() {
        inodes += 1;
        let own = match view.shape {
            Shape::Directory => directory_blocks(writer.names(view.node).map(|(name, _)| name.len())),
            Shape::File { size: 0 } | Shape::Other => 0,
            Shape::File { size } => match holes.get(&view.node) {
                Some(known) => *known,
                None => Blocks::dense(size).count(),
            },
            Shape::Symlink { len } => u64::from(len > FAST_SYMLINK),
        };
        blocks = blocks.saturating_add(own + u64::from(need_block(view.xattrs)));
    }
    Usage { bytes: blocks.saturating_mul(BLOCK), inodes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_those_that_hold_data() {
        const MIB: u64 = 1 << 20;
        type Case<'a> = (&'a str, u64, &'a [(u64, u64)], Option<u64>);
        let many: Vec<(u64, u64)> = (0..1000).map(|n| (n * 8192, 4096)).collect();
        let cases: &[Case<'_>] = &[
            ("empty", 0, &[], None),
            ("one byte", 1, &[(0, 1)], None),
            ("in pieces", 10_000, &[(0, 100), (100, 4000), (4100, 5900)], None),
            ("holes inside of blocks", 10_000, &[(10, 1), (5000, 1), (9999, 1)], None),
            ("all hole", MIB, &[], Some(0)),
            ("a tail", MIB, &[(0, 5000)], Some(2)),
            ("two ranges", MIB, &[(0, 1), (8192, 1)], Some(2)),
            ("more ranges than the inode has room for", 8000 * 1024, &many, Some(1000 + 3)),
        ];
        for (what, size, writes, want) in cases {
            let mut blocks = Blocks::default();
            for (offset, len) in *writes {
                blocks.write(*offset, *len);
            }
            assert_eq!(blocks.with_holes(*size), *want, "{what}");
        }
        // 128 MiB an extent: four fit the inode, the fifth needs a block.
        assert_eq!(Blocks::dense(512 * MIB).count(), 512 * MIB / BLOCK);
        assert_eq!(Blocks::dense(512 * MIB + 1).count(), 512 * MIB / BLOCK + 2);
    }

    #[test]
    fn attributes_fit_the_inode_or_take_a_block() {
        let attribute =
            |name: &str, len: usize| Xattr { name: name.as_bytes().to_vec(), value: vec![0; len] };
        // Room is 88 bytes: an entry of 16, a name of 4, the value.
        assert!(!need_block(&[]) && !need_block(&[attribute("user.name", 68)]));
        assert!(need_block(&[attribute("user.name", 69)]));
        assert!(!need_block(&[attribute("trusted.overlay.opaque", 1)]));
        let mut acl = attribute("system.posix_acl_access", 4 + 4 * 8);
        for (entry, tag) in acl.value[4..].chunks_mut(8).zip([0x01, 0x02, 0x10, 0x20]) {
            entry[0] = tag;
        }
        assert_eq!((stored_name(&acl.name), stored_value(&acl)), (0, 4 + 4 + 8 + 4 + 4));
    }

    #[test]
    fn a_directory_grows_by_the_bytes_of_its_names() {
        let blocks = |count: usize| directory_blocks(std::iter::repeat_n(8, count));
        // Entries of 16 bytes.
        assert_eq!([0, 1, 253, 254].map(blocks), [1, 1, 1, 3]);
        assert_eq!([1000, 10_000, 100_000, 200_000].map(blocks), [1 + 6, 1 + 56, 1 + 2 + 560, 1 + 3 + 1120]);
    }
}
