//! Directories: inline, one linear block, or a hash tree.
//!
//! ```text
//!   logical block 0: root │ 1 … i: inner nodes, upper level first │ then leaves in hash order, filled up
//! ```
//!
//! Names of one hash may span leaves: the index entry of a leaf that goes on with the hash of the leaf before has bit 0
//! set, at every level. A directory too large for the tree's three levels is linear.

use super::{
    ImageWriter, NodeId, Result,
    extents::{self, Extent},
    inodes,
    tree::{Payload, Tree, WrittenDir},
};
use crate::layout::{
    checksum::inode_seed,
    dir::{
        DIR_TAIL_SIZE, DX_ENTRY_SIZE, DX_NODE_OFFSET, DX_ROOT_OFFSET, DxEntry, DxRootInfo, EXT4_FT_DIR,
        HEAD_SIZE, dx_limit, entry_size, file_type, put_entry, seal_dx, seal_leaf,
    },
    extent::looks_like_root,
    hash::{DX_HASH_HALF_MD4, half_md4},
    inode::I_BLOCK_SIZE,
};
use disk_io::WriteAt;
use zerocopy::{IntoBytes, little_endian::U32};

/// Bytes of entries in `i_block` of an inline directory: the parent's number comes first.
const INLINE_FIRST: usize = I_BLOCK_SIZE - 4;
/// "." and ".." at the start of a directory's first block.
const DOTS: usize = 24;
/// Levels of inner nodes below the root, with feature large_dir.
const MAX_LEVELS: usize = 2;

/// A name on its way into blocks.
struct Name<'a> {
    hash: u32,
    bytes: &'a [u8],
    ino: u32,
    file_type: u8,
}

/// First name of each leaf.
fn split_leaves(names: &[Name], first_room: usize, room: usize) -> Vec<usize> {
    let (mut starts, mut left) = (vec![0], first_room);
    for (i, n) in names.iter().enumerate() {
        let need = entry_size(n.bytes.len());
        if need > left {
            starts.push(i);
            left = room;
        }
        left -= need;
    }
    starts
}

/// Writes names into `area` from `at`, the last one reaching its end.
fn fill(area: &mut [u8], mut at: usize, names: &[Name]) {
    if names.is_empty() && at < area.len() {
        let len = area.len() - at;
        put_entry(&mut area[at..], 0, len, b"", 0);
    }
    for (i, n) in names.iter().enumerate() {
        let len = if i + 1 == names.len() { area.len() - at } else { entry_size(n.bytes.len()) };
        put_entry(&mut area[at..], n.ino, len, n.bytes, n.file_type);
        at += len;
    }
}

fn put_dx(block: &mut [u8], offset: usize, children: &[(u32, u32)], seed: u32) {
    for (i, (hash, child)) in children.iter().enumerate() {
        let at = offset + i * DX_ENTRY_SIZE;
        let e = DxEntry { hash: U32::new(*hash), block: U32::new(*child) };
        block[at..at + DX_ENTRY_SIZE].copy_from_slice(e.as_bytes());
    }
    seal_dx(seed, block, offset, children.len());
}

/// Inner levels of a tree over `leaves` nodes, lowest first, as numbers of nodes; `None` if three levels do not do.
fn levels(leaves: usize, bs: usize) -> Option<Vec<usize>> {
    let (root, node) = (dx_limit(bs, DX_ROOT_OFFSET), dx_limit(bs, DX_NODE_OFFSET));
    let (mut out, mut n) = (Vec::new(), leaves);
    while n > root {
        n = n.div_ceil(node);
        out.push(n);
    }
    (out.len() <= MAX_LEVELS).then_some(out)
}

/// Names of a directory in order of creation.
fn names_of(tree: &Tree, dir: u32) -> Vec<Name<'_>> {
    tree.children(dir)
        .map(|(name, node)| Name {
            hash: 0,
            bytes: name,
            ino: inodes::ino_of(node),
            file_type: file_type(tree.nodes[node as usize].mode),
        })
        .collect()
}

impl<W: WriteAt> ImageWriter<W> {
    /// Bytes of entries that an inline directory holds in its value (beyond `i_block`), if the names fit. The root is
    /// never inline: the kernel mounts no root without blocks.
    pub(super) fn inline_directory(&self, dir: u32) -> Option<usize> {
        let room = self.inline_room(self.tree.nodes[dir as usize].xattrs) as usize;
        if room < I_BLOCK_SIZE || dir == 0 {
            return None;
        }
        if self.parent_and_child_look_like_root(dir) {
            return None;
        }
        let (mut first, mut second) = (INLINE_FIRST, 0);
        for (name, _) in self.tree.children(dir) {
            let need = entry_size(name.len());
            if second == 0 && need <= first {
                first -= need;
            } else {
                second += need;
            }
            if second > room - I_BLOCK_SIZE {
                return None;
            }
        }
        Some(second)
    }

    /// Whether the numbers that an inline directory begins with look like the root of an extent tree: that of its
    /// parent has the magic number in its low half, and that of its first name few entries.
    fn parent_and_child_look_like_root(&self, dir: u32) -> bool {
        let Payload::Dir { parent, .. } = self.tree.nodes[dir as usize].payload else { return false };
        let mut head = [0; I_BLOCK_SIZE];
        head[..4].copy_from_slice(&inodes::ino_of(parent).to_le_bytes());
        if let Some((_, first)) = self.tree.children(dir).next() {
            head[4..8].copy_from_slice(&inodes::ino_of(first).to_le_bytes());
        }
        looks_like_root(&head)
    }

    /// `i_block` and value of an inline directory.
    pub(super) fn inline_directory_bytes(&self, dir: u32, parent: u32, second: usize) -> (Vec<u8>, Vec<u8>) {
        let names = names_of(&self.tree, dir);
        let split = *split_leaves(&names, INLINE_FIRST, usize::MAX).get(1).unwrap_or(&names.len());
        let mut block = vec![0; I_BLOCK_SIZE];
        block[..4].copy_from_slice(&inodes::ino_of(parent).to_le_bytes());
        fill(&mut block[4..], 0, &names[..split]);
        let mut value = vec![0; second];
        fill(&mut value, 0, &names[split..]);
        (block, value)
    }

    /// Writes the blocks of a directory that is not inline.
    pub(super) fn write_directory(&mut self, dir: NodeId) -> Result<()> {
        let Payload::Dir { parent, subdirs, .. } = self.tree.nodes[dir.0 as usize].payload else {
            return Ok(());
        };
        if self.inline_directory(dir.0).is_some() {
            return Ok(());
        }
        let bs = self.space.geometry.bs as usize;
        let (ino, parent_ino) = (inodes::ino_of(dir.0), inodes::ino_of(parent));
        let seed = inode_seed(super::CHECKSUM_SEED, ino, 0);
        let room = bs - DIR_TAIL_SIZE;
        let mut names = names_of(&self.tree, dir.0);
        let mut starts = split_leaves(&names, room - DOTS, room);
        let mut inner = None;
        if starts.len() > 1 {
            for n in &mut names {
                n.hash = half_md4(n.bytes, &super::HASH_SEED).0;
            }
            // The names' order of creation decides between equal hashes.
            names.sort_by_key(|n| n.hash);
            let leaves = split_leaves(&names, room, room);
            inner = levels(leaves.len(), bs);
            starts = if inner.is_some() { leaves } else { split_leaves(&names, room - DOTS, room) };
        }
        let above = inner.as_ref().map_or(0, |l| 1 + l.iter().sum::<usize>());
        let total = (above + starts.len()) as u64;
        let mut extents: Vec<Extent> = Vec::new();
        let mut mapped = 0;
        // `names` borrows the tree, so the parts of `self` are named one by one from here on.
        let (space, sink) = (&mut self.space, &mut self.sink);
        while mapped < total {
            let (start, n) = space.take(total - mapped)?;
            extents::append(&mut extents, mapped, start, n);
            mapped += n;
        }
        let mut places = extents.iter().flat_map(|e| e.start..e.start + u64::from(e.blocks));
        let mut emit = |block: &[u8]| match places.next() {
            Some(place) => sink.put(place * bs as u64, block),
            None => Ok(()),
        };
        let mut block = vec![0; bs];
        put_entry(&mut block, ino, 12, b".", EXT4_FT_DIR);
        put_entry(&mut block[12..], parent_ino, 12, b"..", EXT4_FT_DIR);
        if let Some(inner) = &inner {
            put_entry(&mut block[12..], parent_ino, bs - 12, b"..", EXT4_FT_DIR);
            let info = DxRootInfo {
                reserved_zero: U32::ZERO,
                hash_version: DX_HASH_HALF_MD4,
                info_length: 8,
                indirect_levels: inner.len() as u8,
                unused_flags: 0,
            };
            block[DOTS..DOTS + HEAD_SIZE].copy_from_slice(info.as_bytes());
            self.large_dir |= inner.len() == MAX_LEVELS;
            // Logical numbers: root 0, then the inner levels from the top, then the leaves.
            let mut children: Vec<(u32, u32)> = starts
                .iter()
                .enumerate()
                .map(|(i, &s)| {
                    let goes_on = s > 0 && names[s - 1].hash == names[s].hash;
                    (names[s].hash | u32::from(goes_on), (above + i) as u32)
                })
                .collect();
            let mut first = above;
            let mut nodes: Vec<Vec<Vec<(u32, u32)>>> = Vec::new();
            for &count in inner {
                first -= count;
                let level: Vec<Vec<_>> =
                    children.chunks(dx_limit(bs, DX_NODE_OFFSET)).map(<[_]>::to_vec).collect();
                children =
                    level.iter().enumerate().map(|(i, node)| (node[0].0, (first + i) as u32)).collect();
                nodes.push(level);
            }
            put_dx(&mut block, DX_ROOT_OFFSET, &children, seed);
            emit(&block)?;
            for node in nodes.iter().rev().flatten() {
                block.fill(0);
                put_entry(&mut block, 0, bs, b"", 0);
                put_dx(&mut block, DX_NODE_OFFSET, node, seed);
                emit(&block)?;
            }
        }
        for (i, &start) in starts.iter().enumerate() {
            let end = starts.get(i + 1).copied().unwrap_or(names.len());
            let at = if i == 0 && inner.is_none() { DOTS } else { 0 };
            block[at..].fill(0);
            if at > 0 && start == end {
                // ".." is the last entry.
                put_entry(&mut block[12..], parent_ino, room - 12, b"..", EXT4_FT_DIR);
            } else {
                fill(&mut block[..room], at, &names[start..end]);
            }
            seal_leaf(seed, &mut block);
            emit(&block)?;
        }
        let content = extents::store(
            &extents,
            ino,
            super::CHECKSUM_SEED,
            &mut self.space,
            &mut self.sink,
            &mut self.roots,
        )?;
        let size = total * bs as u64;
        self.tree.nodes[dir.0 as usize].payload = Payload::DirDone(self.tree.written_dirs.len() as u32);
        self.tree.written_dirs.push(WrittenDir { size, content, subdirs, indexed: inner.is_some() });
        Ok(())
    }

    /// Bytes that fit in a slot as inline data beside a set of attributes; 0 without the feature.
    pub(super) fn inline_room(&self, xattrs: u32) -> u64 {
        let room = inodes::inline_value_room(self.inode_size, self.sets.get(xattrs));
        if self.options.inline_data { room.map_or(0, |r| (I_BLOCK_SIZE + r) as u64) } else { 0 }
    }
}
