//! One directory: every entry, `.` and `..`, checksums, and the hash tree with its bounds.
//!
//! Called by [`super::Checker::inode`] for each directory.

use super::{Checker, Layout, kind};
use crate::{
    Ext4Error, Inode, Place,
    error::DirFault,
    layout::{
        dir::{
            DIR_TAIL_SIZE, DX_NODE_OFFSET, DX_ROOT_OFFSET, DirEntryHead, DxRootInfo, EXT4_FT_REG_FILE,
            EXT4_FT_SYMLINK, INLINE_DOTDOT_SIZE, dx_countlimit, dx_entries, dx_limit, entry_size,
        },
        hash::{DX_HASH_HALF_MD4, half_md4},
        inode::{I_BLOCK_SIZE, InodeFlags, RawInode},
        superblock::Incompat,
    },
    reader::{dir, xattr},
};
use disk_io::ReadAt;
use std::hash::{BuildHasher, RandomState};
use zerocopy::FromBytes;

/// Length of the entry `.`, which is always 12: `..` follows.
const DOT_LEN: usize = entry_size(1);
/// Where `struct dx_root_info` is in the first block of a hashed directory.
const DX_ROOT_INFO_AT: usize = DOT_LEN + entry_size(2);
/// The byte after the name `.` in a directory's first block, and that after `..` in the entry that follows.
const DOT_END: usize = 9;
const DOTDOT_END: usize = 22;

/// Bounds that the hash tree gives to a leaf: from, to (inclusive).
type Bounds = (u32, u32);

impl<R: ReadAt> Checker<R> {
    pub(super) fn directory(&mut self, inode: &Inode) -> Result<(), Ext4Error> {
        let geometry = self.fs.geometry().clone();
        let place = Place::inode(inode.ino);
        let bad = |fault| Err(Ext4Error::corrupt(fault, place));
        self.names.clear();
        // Random keys, so that names that collide cannot be made on purpose.
        let keys = RandomState::new();
        if inode.has(InodeFlags::EXT4_INLINE_DATA_FL) {
            let [parent, ..] = RawInode::from_slot(&inode.raw).i_block_words();
            if let Some(node) = self.node(inode.ino) {
                node.dotdot = parent;
            }
            let rest = xattr::inline_data(inode)?.unwrap_or(&[]);
            if inode.size != (I_BLOCK_SIZE + rest.len()) as u64 {
                return bad(DirFault::InlineSize);
            }
            let head = inode.i_block().get(INLINE_DOTDOT_SIZE..).unwrap_or(&[]);
            for part in [head, rest] {
                self.block(inode, part, 0, place, &keys, None)?;
            }
            return self.unique(inode);
        }
        let block_size = geometry.block_size as usize;
        if inode.size == 0 || !inode.size.is_multiple_of(u64::from(geometry.block_size)) {
            return bad(DirFault::Size);
        }
        if inode.size > dir::MAX_DIR_BYTES {
            return bad(DirFault::TooLarge);
        }
        let count = (inode.size / u64::from(geometry.block_size)) as usize;
        let mut map = Vec::with_capacity(count);
        for extent in self.fs.extents(inode)? {
            if extent.logical_block as usize != map.len() {
                return bad(DirFault::Hole);
            }
            map.extend((0..u64::from(extent.blocks)).map(|i| extent.physical_block + i));
        }
        if map.len() != count {
            return bad(DirFault::BlocksCount);
        }
        let indexed = inode.has(InodeFlags::EXT4_INDEX_FL);
        let bounds = if indexed { Some(self.tree_bounds(inode, &map)?) } else { None };
        let seed = inode.seed(&geometry);
        for (i, number) in map.iter().enumerate() {
            let block = self.fs.source.block(*number)?;
            let place = place.at_block(*number);
            if indexed && i == 0 {
                self.dots(inode, &block, place, Some(block_size))?;
                continue;
            }
            let limits = match &bounds {
                None => None,
                Some(bounds) => match bounds.get(i).copied().flatten() {
                    Some(Role::Node) => continue,
                    Some(Role::Leaf(limits)) => Some(limits),
                    None => return Err(Ext4Error::corrupt(DirFault::TreeMissing, place)),
                },
            };
            // Without checksums the entries reach the end of the block.
            let tail = if self.layout == Layout::Hcsshim { 0 } else { DIR_TAIL_SIZE };
            if tail > 0 && !dir::checksum_matches(&block, None, seed) {
                return Err(Ext4Error::corrupt(DirFault::Checksum, place));
            }
            let entries = block.get(..block_size - tail).unwrap_or(&[]);
            let start = if i == 0 { self.dots(inode, entries, place, None)? } else { 0 };
            self.block(inode, entries, start, place, &keys, limits)?;
        }
        self.unique(inode)
    }

    /// Checks `.` and `..`; gives where the next entry is. `end` is where `..` must end, if the block is an index.
    fn dots(
        &mut self,
        inode: &Inode,
        block: &[u8],
        place: Place,
        end: Option<usize>,
    ) -> Result<usize, Ext4Error> {
        let geometry = self.fs.geometry();
        let bad = |fault| Ext4Error::corrupt(fault, place);
        let dot = dir::entry(block, 0, geometry).map_err(bad)?;
        let dotdot = dir::entry(block, DOT_LEN, geometry).map_err(bad)?;
        // Programs that search the names by their end (e2fsck) expect it there, whatever the length says.
        if [DOT_END, DOTDOT_END].iter().any(|at| block.get(*at).is_some_and(|b| *b != 0)) {
            return Err(bad(DirFault::DotEnd));
        }
        if dot.name != b"."
            || dot.ino != inode.ino
            || dot.rec_len != DOT_LEN
            || dot.file_type != kind::DIRECTORY
        {
            return Err(bad(DirFault::Dot));
        }
        if dotdot.name != b".." || dotdot.ino == 0 || dotdot.file_type != kind::DIRECTORY {
            return Err(bad(DirFault::DotDot));
        }
        let next = dotdot.at + dotdot.rec_len;
        if end.is_some_and(|end| next != end) {
            return Err(bad(DirFault::DotDotLength));
        }
        let parent = dotdot.ino;
        if let Some(node) = self.node(inode.ino) {
            node.dotdot = parent;
        }
        Ok(next)
    }

    /// Checks the entries of a leaf from `at` to its end.
    fn block(
        &mut self,
        inode: &Inode,
        buf: &[u8],
        mut at: usize,
        place: Place,
        keys: &RandomState,
        limits: Option<Bounds>,
    ) -> Result<(), Ext4Error> {
        let geometry = self.fs.geometry().clone();
        while at < buf.len() {
            let place = place.at_offset(at as u64);
            let bad = |fault| Ext4Error::corrupt(fault, place);
            let entry = dir::entry(buf, at, &geometry).map_err(bad)?;
            at += entry.rec_len;
            if entry.ino == 0 {
                continue;
            }
            if entry.name == b"." || entry.name == b".." {
                return Err(bad(DirFault::SecondDot));
            }
            if !(EXT4_FT_REG_FILE..=EXT4_FT_SYMLINK).contains(&entry.file_type) {
                return Err(bad(DirFault::EntryType));
            }
            if let Some((from, to)) = limits {
                let (hash, _) = half_md4(entry.name, &geometry.hash_seed);
                if hash < from || hash > to {
                    return Err(bad(DirFault::TreeBounds));
                }
            }
            self.names.push(keys.hash_one(entry.name));
            let parent = inode.ino;
            let is_directory = entry.file_type == kind::DIRECTORY;
            let Some(node) = self.node(entry.ino) else { return Err(bad(DirFault::EntryInode)) };
            if node.named_as != 0 && node.named_as != entry.file_type {
                return Err(bad(DirFault::EntryTypes));
            }
            node.named_as = entry.file_type;
            if is_directory {
                if node.parent_or_names != 0 {
                    return Err(bad(DirFault::DirectoryNames));
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
            return Err(Ext4Error::corrupt(DirFault::Duplicate, Place::inode(inode.ino)));
        }
        Ok(())
    }

    /// Walks the hash tree; gives the role of each block of the directory.
    fn tree_bounds(&self, inode: &Inode, map: &[u64]) -> Result<Vec<Option<Role>>, Ext4Error> {
        let geometry = self.fs.geometry();
        let mut roles = vec![None; map.len()];
        let number = map.first().copied().unwrap_or(0);
        let bad = |fault| Err(Ext4Error::corrupt(fault, Place::inode(inode.ino).at_block(number)));
        let root = self.fs.source.block(number)?;
        let most = if geometry.has(Incompat::EXT4_FEATURE_INCOMPAT_LARGEDIR) { 2 } else { 1 };
        let levels = match root.get(DX_ROOT_INFO_AT..).map(DxRootInfo::ref_from_prefix) {
            Some(Ok((info, _)))
                if info.reserved_zero.get() == 0
                    && info.hash_version == DX_HASH_HALF_MD4
                    && usize::from(info.info_length) == size_of::<DxRootInfo>()
                    && info.unused_flags == 0 =>
            {
                info.indirect_levels
            }
            _ => return bad(DirFault::TreeRoot),
        };
        if levels > most {
            return bad(DirFault::TreeDepth);
        }
        if let Some(first) = roles.first_mut() {
            *first = Some(Role::Node);
        }
        // Depth-first, so that bounds come in rising order: (block of the directory, level above leaves, bounds).
        let mut todo = vec![(0usize, u32::from(levels), (0u32, u32::MAX))];
        while let Some((index, level, bounds)) = todo.pop() {
            let Some(number) = map.get(index).copied() else { return bad(DirFault::TreeChild) };
            let bad = |fault| Err(Ext4Error::corrupt(fault, Place::inode(inode.ino).at_block(number)));
            let block = self.fs.source.block(number)?;
            let at = if index == 0 { DX_ROOT_OFFSET } else { DX_NODE_OFFSET };
            if index != 0 && !looks_empty(&block) {
                return bad(DirFault::TreeNode);
            }
            let count = match dx_countlimit(&block, at) {
                Some((limit, count)) if limit == dx_limit(block.len(), at) && count > 0 && count <= limit => {
                    count
                }
                _ => return bad(DirFault::TreeCounts),
            };
            if !dir::checksum_matches(&block, Some(at), inode.seed(geometry)) {
                return bad(DirFault::TreeChecksum);
            }
            let Some(entries) = dx_entries(&block, at, count) else { return bad(DirFault::TreeCounts) };
            let mut last = bounds.0;
            for (i, entry) in entries.iter().enumerate() {
                let hash = if i == 0 { bounds.0 } else { entry.hash.get() };
                let child = entry.block.get() as usize;
                let after = entries.get(i + 1).map_or(bounds.1, |next| next.hash.get());
                // Names of one hash may fill several blocks: equal entries then carry the collision bit.
                if i > 0 && (hash < last || hash == last && hash & 1 == 0) || hash > bounds.1 {
                    return bad(DirFault::TreeOrder);
                }
                last = hash;
                // A set lowest bit says that the hash continues from the block before.
                let to = if after == u32::MAX {
                    after
                } else if after & 1 == 1 {
                    after & !1
                } else {
                    after.wrapping_sub(1)
                };
                match roles.get_mut(child) {
                    Some(role @ None) => {
                        *role = Some(if level == 0 { Role::Leaf((hash & !1, to)) } else { Role::Node });
                    }
                    _ => return bad(DirFault::TreeChild),
                }
                if level > 0 {
                    // The child's bounds keep the collision bit of the entry after it.
                    todo.push((child, level - 1, (hash, after)));
                }
            }
        }
        Ok(roles)
    }
}

/// Whether an inner node looks like a block without names, as programs that know no hash trees see it.
fn looks_empty(block: &[u8]) -> bool {
    DirEntryHead::ref_from_prefix(block).is_ok_and(|(head, _)| {
        head.inode.get() == 0
            && usize::from(head.rec_len.get()) == block.len()
            && (head.name_len, head.file_type) == (0, 0)
    })
}

/// What a block of a hashed directory is.
#[derive(Debug, Clone, Copy)]
enum Role {
    Node,
    Leaf(Bounds),
}
