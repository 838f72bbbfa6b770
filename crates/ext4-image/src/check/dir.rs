//! One directory: every entry, `.` and `..`, checksums, and the hash tree with its bounds.
//!
//! Called by [`super::Checker::inode`] for each directory.

use super::{Checker, Layout, kind};
use crate::{
    Ext4Error, Inode,
    layout::{dir::dx_limit, hash::half_md4},
    reader::{
        bytes::{u8_at, u16_at, u32_at},
        corrupt, dir,
        inode::flags,
        superblock::incompat,
        xattr,
    },
};
use disk_io::ReadAt;
use std::hash::{BuildHasher, RandomState};

/// Where the byte behind the name `.` stands in a directory's first block, and that behind `..` in the entry after it.
const DOT_END: usize = 9;
const DOTDOT_END: usize = 22;

/// Bounds that the hash tree gives to a leaf: from, to (inclusive).
type Bounds = (u32, u32);

impl<R: ReadAt> Checker<R> {
    pub(super) fn directory(&mut self, inode: &Inode) -> Result<(), Ext4Error> {
        let geometry = self.fs.geometry().clone();
        let place = || format!("inode {}, directory", inode.ino);
        let bad = |reason: &'static str| corrupt(place(), reason);
        self.names.clear();
        // Keyed by chance, so that nobody can make names that collide.
        let keys = RandomState::new();
        if inode.has(flags::INLINE_DATA) {
            let parent = u32_at(inode.i_block(), 0);
            if let Some(node) = self.node(inode.ino) {
                node.dotdot = parent;
            }
            let rest = xattr::inline_data(inode)?.unwrap_or(&[]).to_vec();
            if inode.size != 60 + rest.len() as u64 {
                return Err(bad("its inline size is wrong"));
            }
            let head = inode.i_block().get(4..).unwrap_or(&[]).to_vec();
            for part in [head, rest] {
                self.block(inode, &part, 0, &keys, None)?;
            }
            return self.unique(inode);
        }
        let block_size = geometry.block_size as usize;
        if inode.size == 0 || !inode.size.is_multiple_of(u64::from(geometry.block_size)) {
            return Err(bad("its size is no whole number of blocks"));
        }
        if inode.size > dir::MAX_DIR_BYTES {
            return Err(bad("it is too large"));
        }
        let count = (inode.size / u64::from(geometry.block_size)) as usize;
        let mut map = Vec::with_capacity(count);
        for extent in self.fs.extents(inode)? {
            if extent.logical_block as usize != map.len() {
                return Err(bad("it has a hole"));
            }
            map.extend((0..u64::from(extent.blocks)).map(|i| extent.physical_block + i));
        }
        if map.len() != count {
            return Err(bad("its blocks do not fit its size"));
        }
        let indexed = inode.has(flags::INDEX);
        let bounds = if indexed { Some(self.tree_bounds(inode, &map)?) } else { None };
        let seed = inode.seed(&geometry);
        for (i, number) in map.iter().enumerate() {
            let block = self.fs.source.block(*number)?.to_vec();
            if indexed && i == 0 {
                self.dots(inode, &block, block_size)?;
                continue;
            }
            let limits = match &bounds {
                None => None,
                Some(bounds) => match bounds.get(i).copied().flatten() {
                    Some(Place::Node) => continue,
                    Some(Place::Leaf(limits)) => Some(limits),
                    None => return Err(bad("a block that its hash tree does not name")),
                },
            };
            // Without checksums the entries reach the end of the block.
            let tail = if self.layout == Layout::Hcsshim { 0 } else { 12 };
            if tail > 0 && !dir::checksum_matches(&block, None, seed) {
                return Err(bad("checksum of a block does not match"));
            }
            let entries = block.get(..block_size - tail).unwrap_or(&[]);
            let start = if i == 0 { self.dots(inode, entries, 12)? } else { 0 };
            self.block(inode, entries, start, &keys, limits)?;
        }
        self.unique(inode)
    }

    /// Checks `.` and `..`; gives where the next entry is. `end` is where `..` must end, if the block is an index.
    fn dots(&mut self, inode: &Inode, block: &[u8], end: usize) -> Result<usize, Ext4Error> {
        let geometry = self.fs.geometry().clone();
        let bad = |reason: &'static str| corrupt(format!("inode {}, directory", inode.ino), reason);
        let dot = dir::entry(block, 0, &geometry).map_err(bad)?;
        let dotdot = dir::entry(block, 12, &geometry).map_err(bad)?;
        // Programs that look for the names by their end (e2fsck) want it there, whatever the length says.
        if u8_at(block, DOT_END) != 0 || u8_at(block, DOTDOT_END) != 0 {
            return Err(bad("its entry `.` or `..` has no end"));
        }
        if dot.name != b"." || dot.ino != inode.ino || dot.rec_len != 12 || dot.file_type != kind::DIRECTORY {
            return Err(bad("its entry `.` is wrong"));
        }
        if dotdot.name != b".." || dotdot.ino == 0 || dotdot.file_type != kind::DIRECTORY {
            return Err(bad("its entry `..` is wrong"));
        }
        let next = dotdot.at + dotdot.rec_len;
        if end > 12 && next != end {
            return Err(bad("its entry `..` does not hide the hash tree"));
        }
        if let Some(node) = self.node(inode.ino) {
            node.dotdot = dotdot.ino;
        }
        Ok(next)
    }

    /// Checks the entries of a leaf from `at` to its end.
    fn block(
        &mut self,
        inode: &Inode,
        buf: &[u8],
        mut at: usize,
        keys: &RandomState,
        limits: Option<Bounds>,
    ) -> Result<(), Ext4Error> {
        let geometry = self.fs.geometry().clone();
        let bad = |reason: &'static str| corrupt(format!("inode {}, directory", inode.ino), reason);
        while at < buf.len() {
            let entry = dir::entry(buf, at, &geometry).map_err(bad)?;
            at += entry.rec_len;
            if entry.ino == 0 {
                continue;
            }
            if entry.name == b"." || entry.name == b".." {
                return Err(bad("a second `.` or `..`"));
            }
            if !(1..=7).contains(&entry.file_type) {
                return Err(bad("an entry of unknown type"));
            }
            if let Some((from, to)) = limits {
                let (hash, _) = half_md4(entry.name, &geometry.hash_seed);
                if hash < from || hash > to {
                    return Err(bad("a name outside the bounds of its hash tree"));
                }
            }
            self.names.push(keys.hash_one(entry.name));
            let parent = inode.ino;
            let is_directory = entry.file_type == kind::DIRECTORY;
            let Some(node) = self.node(entry.ino) else { return Err(bad("an entry names no inode")) };
            if node.named_as != 0 && node.named_as != entry.file_type {
                return Err(bad("an inode has names of different types"));
            }
            node.named_as = entry.file_type;
            if is_directory {
                if node.parent_or_names != 0 {
                    return Err(bad("a directory has two names"));
                }
                node.parent_or_names = parent;
                if let Some(node) = self.node(parent) {
                    node.subdirs = node.subdirs.saturating_add(1);
                }
            } else {
                node.parent_or_names = node.parent_or_names.saturating_add(1);
            }
        }
        Ok(())
    }

    fn unique(&mut self, inode: &Inode) -> Result<(), Ext4Error> {
        self.names.sort_unstable();
        if self.names.windows(2).any(|pair| matches!(pair, [a, b] if a == b)) {
            return Err(corrupt(format!("inode {}, directory", inode.ino), "a name is there twice"));
        }
        Ok(())
    }

    /// Walks the hash tree; for each block of the directory what it is.
    fn tree_bounds(&self, inode: &Inode, map: &[u64]) -> Result<Vec<Option<Place>>, Ext4Error> {
        let geometry = self.fs.geometry();
        let bad = |reason: &'static str| corrupt(format!("inode {}, hash tree", inode.ino), reason);
        let mut places = vec![None; map.len()];
        let root = self.fs.source.block(map.first().copied().unwrap_or(0))?;
        let levels = u8_at(&root, 30);
        let most = if geometry.has(incompat::LARGEDIR) { 2 } else { 1 };
        if u32_at(&root, 24) != 0 || u8_at(&root, 28) != 1 || u8_at(&root, 29) != 8 || u8_at(&root, 31) != 0 {
            return Err(bad("its root is malformed"));
        }
        if levels > most {
            return Err(bad("it is too deep"));
        }
        if let Some(first) = places.first_mut() {
            *first = Some(Place::Node);
        }
        // Depth-first, so that bounds come in rising order: (block of the directory, level above leaves, bounds).
        let mut todo = vec![(0usize, u32::from(levels), (0u32, u32::MAX))];
        while let Some((index, level, bounds)) = todo.pop() {
            let number =
                map.get(index).copied().ok_or_else(|| bad("it names a block outside the directory"))?;
            let block = self.fs.source.block(number)?;
            let at = if index == 0 { 32 } else { 8 };
            if index != 0
                && (u32_at(&block, 0) != 0
                    || usize::from(u16_at(&block, 4)) != block.len()
                    || u16_at(&block, 6) != 0)
            {
                return Err(bad("a node does not look like an empty block"));
            }
            let limit = usize::from(u16_at(&block, at));
            let count = usize::from(u16_at(&block, at + 2));
            if limit != dx_limit(block.len(), at) || count == 0 || count > limit {
                return Err(bad("a node has impossible counts"));
            }
            if !dir::checksum_matches(&block, Some(at), inode.seed(geometry)) {
                return Err(bad("checksum of a node does not match"));
            }
            let mut last = bounds.0;
            for i in 0..count {
                let hash = if i == 0 { bounds.0 } else { u32_at(&block, at + i * 8) };
                let child = u32_at(&block, at + i * 8 + 4) as usize;
                let after = if i + 1 < count { u32_at(&block, at + (i + 1) * 8) } else { bounds.1 };
                // Names of one hash may fill several blocks: equal entries then carry the collision bit.
                if i > 0 && (hash < last || hash == last && hash & 1 == 0) || hash > bounds.1 {
                    return Err(bad("hashes are out of order"));
                }
                last = hash;
                // A set lowest bit says that the hash goes on from the block before.
                let to = if after == u32::MAX {
                    after
                } else if after & 1 == 1 {
                    after & !1
                } else {
                    after.wrapping_sub(1)
                };
                match places.get_mut(child) {
                    Some(place @ None) => {
                        *place = Some(if level == 0 { Place::Leaf((hash & !1, to)) } else { Place::Node });
                    }
                    _ => return Err(bad("it names a block twice or outside the directory")),
                }
                if level > 0 {
                    // The child's bounds keep the collision bit of the entry after it.
                    todo.push((child, level - 1, (hash, after)));
                }
            }
        }
        Ok(places)
    }
}

/// What a block of a hashed directory is.
#[derive(Debug, Clone, Copy)]
enum Place {
    Node,
    Leaf(Bounds),
}
