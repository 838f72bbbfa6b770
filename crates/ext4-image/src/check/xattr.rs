//! Xattrs: layout without overlap, hashes, order in blocks, shared blocks, values in inodes, overlayfs' own.
//!
//! Called by [`super::Checker::inode`].

use super::{Checker, Layout};
pub(super) use crate::reader::xattr::MAX_VALUE;
use crate::{
    Ext4Error, FileKind, Inode,
    layout::acl,
    layout::xattr::{block_hash, entry_hash, value_words},
    reader::{
        bytes::{chksum, u32_at},
        corrupt,
        inode::flags,
        xattr::{BLOCK_HEADER, INDEX_SYSTEM, MAGIC, RawXattr, entries, prefix},
    },
};
use disk_io::ReadAt;

const OVERLAY: &[u8] = b"overlay.";
const INDEX_TRUSTED: u8 = 4;

/// Whether the bytes that fill a value up to whole words are zero: they count in its hash.
fn padded_with_zeros(base: &[u8], x: &RawXattr<'_>) -> bool {
    let len = x.value.len();
    let (end, padded) = (x.value_offset + len, x.value_offset + len.next_multiple_of(4));
    base.get(end..padded).is_some_and(|rest| rest.iter().all(|b| *b == 0))
}

/// Checks that values lie behind the entries and do not overlap.
fn layout(found: &[RawXattr<'_>], entries_end: usize) -> Result<(), &'static str> {
    let mut spans: Vec<(usize, usize)> = found
        .iter()
        .filter(|x| x.value_inum == 0 && x.value_size > 0)
        .map(|x| (x.value_offset, x.value_offset + (x.value_size as usize).next_multiple_of(4)))
        .collect();
    spans.sort_unstable();
    let mut end = entries_end;
    for (from, to) in spans {
        if from < end || !from.is_multiple_of(4) {
            return Err("values of xattrs overlap");
        }
        end = to;
    }
    Ok(())
}

impl<R: ReadAt> Checker<R> {
    /// Checks all xattrs of an inode; gives the 512-byte sectors that they add to its count.
    pub(super) fn xattrs(&mut self, inode: &Inode) -> Result<u64, Ext4Error> {
        let bad = |reason: &'static str| corrupt(format!("inode {}, xattrs", inode.ino), reason);
        let geometry = self.fs.geometry().clone();
        let mut sectors = 0;
        let mut names: Vec<(u8, Vec<u8>)> = Vec::new();
        let mut inline = false;
        let area = inode.xattr_area();
        if area.len() >= 4 && u32_at(area, 0) == MAGIC {
            let area = area.get(4..).unwrap_or(&[]);
            let (found, end) = entries(area, 0).map_err(bad)?;
            layout(&found, end).map_err(bad)?;
            for x in &found {
                inline |= x.index == INDEX_SYSTEM && x.name == b"data";
                if x.value_inum == 0
                    && x.hash != 0
                    && (x.hash != entry_hash(x.name, value_words(x.value)) || !padded_with_zeros(area, x))
                {
                    return Err(bad("hash of an xattr does not match"));
                }
                sectors += self.xattr(inode, x, true)?;
                names.push((x.index, x.name.to_vec()));
            }
        } else if area.iter().any(|b| *b != 0) {
            return Err(bad("bytes behind the inode are not xattrs"));
        }
        if inline != inode.has(flags::INLINE_DATA) {
            return Err(bad("inline data without its flag, or the reverse"));
        }
        if let Some(block) = self.fs.xattr_block(inode)? {
            sectors += u64::from(geometry.block_size) / 512;
            let (found, end) = entries(&block, BLOCK_HEADER).map_err(bad)?;
            let first = !self.shared.contains_key(&inode.file_acl);
            if first {
                layout(&found, end).map_err(bad)?;
                self.blocks.claim(inode.file_acl, 1, &|| format!("inode {}, xattrs", inode.ino))?;
                let count = u32_at(&block, 4);
                if count == 0 || count > 1024 {
                    return Err(bad("an xattr block with an impossible count of owners"));
                }
                self.shared.insert(inode.file_acl, count);
                let hash = match self.layout {
                    Layout::Default => block_hash(found.iter().map(|x| x.hash)),
                    // 0: never shared.
                    Layout::Hcsshim => 0,
                };
                if u32_at(&block, 12) != hash || block.get(20..32).is_none_or(|r| r.iter().any(|b| *b != 0)) {
                    return Err(bad("hash of an xattr block does not match"));
                }
                for pair in found.windows(2) {
                    if let [a, b] = pair
                        && (a.index, a.name.len(), a.name) >= (b.index, b.name.len(), b.name)
                    {
                        return Err(bad("the xattrs of a block are not sorted"));
                    }
                }
            }
            match self.shared.get_mut(&inode.file_acl) {
                Some(left) if *left > 0 => *left -= 1,
                _ => return Err(bad("an xattr block has more owners than it says")),
            }
            for x in &found {
                if x.index == INDEX_SYSTEM {
                    return Err(bad("inline data outside the inode"));
                }
                if x.value_inum == 0
                    && (x.hash != entry_hash(x.name, value_words(x.value)) || !padded_with_zeros(&block, x))
                {
                    return Err(bad("hash of an xattr does not match"));
                }
                // A shared block is one user of the values that lie elsewhere.
                sectors += self.xattr(inode, x, first)?;
                names.push((x.index, x.name.to_vec()));
            }
        }
        names.sort_unstable();
        if names.windows(2).any(|pair| matches!(pair, [a, b] if a == b)) {
            return Err(bad("an xattr is there twice"));
        }
        Ok(sectors)
    }

    /// Checks one entry; gives the sectors of a value in its own inode, whose users are counted if this is a new one.
    fn xattr(&mut self, inode: &Inode, x: &RawXattr<'_>, count: bool) -> Result<u64, Ext4Error> {
        let bad = |reason: &'static str| corrupt(format!("inode {}, xattrs", inode.ino), reason);
        match x.index {
            2 | 3 if x.name.is_empty() && x.value_inum == 0 => {
                if acl::from_disk(x.value).is_none() || inode.kind == FileKind::Symlink {
                    return Err(bad("a POSIX ACL is malformed"));
                }
            }
            1 | INDEX_TRUSTED | 6 if !x.name.is_empty() && !x.name.contains(&0) => {}
            INDEX_SYSTEM if x.name == b"data" && x.value_inum == 0 => {}
            _ => return Err(bad("an xattr has an impossible name")),
        }
        if prefix(x.index).is_none() || inode.has(flags::EA_INODE) {
            return Err(bad("an xattr where none may be"));
        }
        if x.index == INDEX_TRUSTED
            && x.name.starts_with(OVERLAY)
            && !(x.name == b"overlay.opaque" && x.value == b"y" && inode.kind == FileKind::Directory)
        {
            return Err(bad("an xattr of overlayfs that our writer does not write"));
        }
        if x.value_inum == 0 {
            return Ok(0);
        }
        let geometry = self.fs.geometry().clone();
        if x.value_offset != 0 || x.value_size == 0 {
            return Err(bad("a value in an inode and outside it"));
        }
        let holder = self.fs.inode(x.value_inum)?;
        if holder.kind != FileKind::File
            || !holder.has(flags::EA_INODE)
            || holder.size != u64::from(x.value_size)
        {
            return Err(bad("a value's inode is not what the entry says"));
        }
        let mut value = vec![0; x.value_size.min(MAX_VALUE) as usize];
        self.fs.read_file_at(&holder, 0, &mut value)?;
        let hash = chksum(geometry.checksum_seed, &value);
        if u32_at(&holder.raw, 8) != hash || x.hash != entry_hash(x.name, [hash]) {
            return Err(bad("hash of a value in an inode does not match"));
        }
        let Some(node) = self.node(x.value_inum) else { return Err(bad("a value's inode does not exist")) };
        node.parent_or_names = node.parent_or_names.saturating_add(u32::from(count));
        let block = u64::from(geometry.block_size);
        Ok(u64::from(x.value_size).next_multiple_of(block) / 512)
    }
}
