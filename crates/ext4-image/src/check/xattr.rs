//! Xattrs: layout without overlap, hashes, order in blocks, shared blocks, values in inodes, overlayfs' own.
//!
//! Called by [`super::Checker::inode`].

use super::{Checker, Layout};
use crate::{
    Ext4Error, FileKind, Inode, Place,
    error::XattrFault,
    layout::{
        SECTOR, acl,
        inode::{InodeFlags, RawInode},
        xattr::{
            BLOCK_HEADER_SIZE, EXT4_XATTR_INDEX_POSIX_ACL_ACCESS, EXT4_XATTR_INDEX_POSIX_ACL_DEFAULT,
            EXT4_XATTR_INDEX_SECURITY, EXT4_XATTR_INDEX_SYSTEM, EXT4_XATTR_INDEX_TRUSTED,
            EXT4_XATTR_INDEX_USER, XATTR_SIZE_MAX, block_hash, ea_inode_hash, entry_hash, value_words,
        },
    },
    reader::xattr::{BrokenList, RawXattr, block_header, entries, in_block, in_inode, inode_area},
};
use disk_io::ReadAt;
use zerocopy::IntoBytes;

/// Most inodes that share an xattr block (`EXT4_XATTR_REFCOUNT_MAX`).
const REFCOUNT_MAX: u32 = 1024;
const OVERLAY: &[u8] = b"overlay.";

/// Whether the bytes that pad a value to whole words are zero: they count in its hash.
fn padded_with_zeros(base: &[u8], x: &RawXattr<'_>) -> bool {
    let len = x.value.len();
    let (end, padded) = (x.value_offset + len, x.value_offset + len.next_multiple_of(4));
    base.get(end..padded).is_some_and(|rest| rest.iter().all(|b| *b == 0))
}

/// Whether `e_hash` of an entry whose offsets count from the start of `base` fits name and value.
fn hash_matches(base: &[u8], x: &RawXattr<'_>) -> bool {
    x.hash == entry_hash(x.name, value_words(x.value)) && padded_with_zeros(base, x)
}

/// Checks that values are after the entries and do not overlap.
fn layout(found: &[RawXattr<'_>], entries_end: usize) -> Result<(), BrokenList> {
    let mut spans: Vec<(usize, usize)> = found
        .iter()
        .filter(|x| x.value_inum == 0 && x.value_size > 0)
        .map(|x| (x.value_offset, x.value_offset + (x.value_size as usize).next_multiple_of(4)))
        .collect();
    spans.sort_unstable();
    let mut end = entries_end;
    for (from, to) in spans {
        if from < end || !from.is_multiple_of(4) {
            return Err((XattrFault::Overlap, from));
        }
        end = to;
    }
    Ok(())
}

impl<R: ReadAt> Checker<R> {
    /// Checks all xattrs of an inode; gives the 512-byte sectors that they add to its count.
    pub(super) fn xattrs(&mut self, inode: &Inode) -> Result<u64, Ext4Error> {
        let bad = |fault| Ext4Error::corrupt(fault, Place::inode(inode.ino));
        let block_size = u64::from(self.fs.geometry().block_size);
        let mut sectors = 0;
        let mut names: Vec<(u8, Vec<u8>)> = Vec::new();
        let mut inline = false;
        if let Some(area) = inode_area(inode) {
            let broken = |broken| in_inode(inode, broken);
            let (found, end) = entries(area, 0).map_err(broken)?;
            layout(&found, end).map_err(broken)?;
            for x in &found {
                inline |= x.is_inline_data();
                if x.value_inum == 0 && x.hash != 0 && !hash_matches(area, x) {
                    return Err(bad(XattrFault::Hash));
                }
                sectors += self.xattr(inode, x, true)?;
                names.push((x.index, x.name.to_vec()));
            }
        } else if inode.xattr_area().iter().any(|b| *b != 0) {
            return Err(bad(XattrFault::NotXattrs));
        }
        if inline != inode.has(InodeFlags::EXT4_INLINE_DATA_FL) {
            return Err(bad(XattrFault::InlineData));
        }
        if let Some(block) = self.fs.xattr_block(inode)? {
            let place = Place::inode(inode.ino).at_block(inode.file_acl);
            let bad = |fault| Ext4Error::corrupt(fault, place);
            let broken = |broken| in_block(inode, broken);
            sectors += block_size / SECTOR;
            let (found, end) = entries(&block, BLOCK_HEADER_SIZE).map_err(broken)?;
            let first = !self.shared.contains_key(&inode.file_acl);
            if first {
                layout(&found, end).map_err(broken)?;
                self.blocks.claim(inode.file_acl, 1, place)?;
                let header = block_header(&block).ok_or_else(|| bad(XattrFault::BlockHeader))?;
                let count = header.h_refcount.get();
                if count == 0 || count > REFCOUNT_MAX {
                    return Err(bad(XattrFault::BlockOwners));
                }
                self.shared.insert(inode.file_acl, count);
                let hash = match self.layout {
                    Layout::Default => block_hash(found.iter().map(|x| x.hash)),
                    // 0: never shared.
                    Layout::Hcsshim => 0,
                };
                if header.h_hash.get() != hash || header.h_reserved.as_bytes().iter().any(|b| *b != 0) {
                    return Err(bad(XattrFault::BlockHash));
                }
                if !found
                    .is_sorted_by(|a, b| (a.index, a.name.len(), a.name) < (b.index, b.name.len(), b.name))
                {
                    return Err(bad(XattrFault::Unsorted));
                }
            }
            match self.shared.get_mut(&inode.file_acl) {
                Some(left) if *left > 0 => *left -= 1,
                _ => return Err(bad(XattrFault::BlockShared)),
            }
            for x in &found {
                if x.index == EXT4_XATTR_INDEX_SYSTEM {
                    return Err(bad(XattrFault::InlineDataInBlock));
                }
                if x.value_inum == 0 && !hash_matches(&block, x) {
                    return Err(bad(XattrFault::Hash));
                }
                // A shared block counts as one user of the values in inodes of their own.
                sectors += self.xattr(inode, x, first)?;
                names.push((x.index, x.name.to_vec()));
            }
        }
        names.sort_unstable();
        if names.windows(2).any(|pair| matches!(pair, [a, b] if a == b)) {
            return Err(bad(XattrFault::Duplicate));
        }
        Ok(sectors)
    }

    /// Checks one entry; gives the sectors of a value in its own inode, whose users are counted if this is a new one.
    fn xattr(&mut self, inode: &Inode, x: &RawXattr<'_>, count: bool) -> Result<u64, Ext4Error> {
        let bad = |fault| Err(Ext4Error::corrupt(fault, Place::inode(inode.ino)));
        match x.index {
            EXT4_XATTR_INDEX_POSIX_ACL_ACCESS | EXT4_XATTR_INDEX_POSIX_ACL_DEFAULT
                if x.name.is_empty() && x.value_inum == 0 =>
            {
                if acl::from_disk(x.value).is_none() || inode.kind == FileKind::Symlink {
                    return bad(XattrFault::Acl);
                }
            }
            EXT4_XATTR_INDEX_USER | EXT4_XATTR_INDEX_TRUSTED | EXT4_XATTR_INDEX_SECURITY
                if !x.name.is_empty() && !x.name.contains(&0) => {}
            _ if x.is_inline_data() && x.value_inum == 0 => {}
            _ => return bad(XattrFault::Name),
        }
        if inode.has(InodeFlags::EXT4_EA_INODE_FL) {
            return bad(XattrFault::Forbidden);
        }
        if x.index == EXT4_XATTR_INDEX_TRUSTED
            && x.name.starts_with(OVERLAY)
            && !(x.name == b"overlay.opaque" && x.value == b"y" && inode.kind == FileKind::Directory)
        {
            return bad(XattrFault::Overlayfs);
        }
        if x.value_inum == 0 {
            return Ok(0);
        }
        if x.value_offset != 0 || x.value_size == 0 {
            return bad(XattrFault::ValuePlace);
        }
        let holder = self.fs.inode(x.value_inum)?;
        if holder.kind != FileKind::File
            || !holder.has(InodeFlags::EXT4_EA_INODE_FL)
            || holder.size != u64::from(x.value_size)
        {
            return bad(XattrFault::ValueInode);
        }
        let mut value = vec![0; (x.value_size as usize).min(XATTR_SIZE_MAX)];
        self.fs.read_file_at(&holder, 0, &mut value)?;
        let hash = ea_inode_hash(self.fs.geometry().checksum_seed, &value);
        // The kernel keeps the hash in the access time of the value's inode.
        if RawInode::from_slot(&holder.raw).i_atime.get() != hash || x.hash != entry_hash(x.name, [hash]) {
            return bad(XattrFault::ValueHash);
        }
        let block_size = u64::from(self.fs.geometry().block_size);
        let Some(node) = self.node(x.value_inum) else { return bad(XattrFault::ValueInode) };
        node.parent_or_names = node.parent_or_names.saturating_add(u32::from(count));
        Ok(u64::from(x.value_size).next_multiple_of(block_size) / SECTOR)
    }
}
