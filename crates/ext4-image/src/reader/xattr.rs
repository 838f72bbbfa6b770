//! Extended attributes: inside the inode, in one block, and with values in inodes of their own.
//!
//! ```text
//!  inode:  0xEA020000 │ entries ► … ◄ values      offsets from the first entry
//!  block:  header 32  │ entries ► … ◄ values      offsets from the start of the block
//!  entry:  name_len, name_index, value_offs, value_inum, value_size, hash, name (padded to 4)
//! ```
//!
//! POSIX ACLs are converted from their disk form to what `getxattr` returns. The value of one attribute is at most
//! 64 KiB and all values of an inode at most [`MAX_TOTAL`], as many entries may name one inode.
//! Called by [`super::Ext4::xattrs`]; [`entries`] also by the checker.

use super::{
    Ext4,
    inode::{FileKind, Inode},
    source::Block,
};
use crate::{
    Ext4Error, Place, Xattr,
    error::XattrFault,
    layout::{
        acl,
        inode::InodeFlags,
        xattr::{
            BLOCK_HEADER_SIZE, EXT4_XATTR_INDEX_POSIX_ACL_ACCESS, EXT4_XATTR_INDEX_POSIX_ACL_DEFAULT,
            EXT4_XATTR_INDEX_SYSTEM, EXT4_XATTR_MAGIC, EXT4_XATTR_SYSTEM_DATA, INODE_HEADER_SIZE,
            XATTR_SIZE_MAX, XattrEntry, XattrHeader, name_prefix, xattr_block_checksum, xattr_entry_size,
        },
    },
};
use disk_io::{ReadAt, steps};
use zerocopy::FromBytes;

/// The most bytes of all values of one inode.
const MAX_TOTAL: usize = 16 << 20;

/// An entry inside a buffer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawXattr<'a> {
    pub(crate) index: u8,
    pub(crate) name: &'a [u8],
    /// Offset of the value from the base of offsets; 0 where an inode holds it.
    pub(crate) value_offset: usize,
    pub(crate) value_inum: u32,
    pub(crate) value_size: u32,
    pub(crate) hash: u32,
    /// The value, empty where an inode holds it.
    pub(crate) value: &'a [u8],
}

impl RawXattr<'_> {
    /// Whether it is the rest of inline data, which no system call shows.
    pub(crate) fn is_inline_data(&self) -> bool {
        self.index == EXT4_XATTR_INDEX_SYSTEM && self.name == EXT4_XATTR_SYSTEM_DATA
    }
}

/// A rule that a list of entries breaks, and the byte of the buffer.
pub(crate) type BrokenList = (XattrFault, usize);

/// Parses the entries that start at `buf[first]`; value offsets count from `buf[0]`. Gives also the end of the list.
pub(crate) fn entries(buf: &[u8], first: usize) -> Result<(Vec<RawXattr<'_>>, usize), BrokenList> {
    let mut found = Vec::new();
    let mut at = first;
    loop {
        steps::add(1);
        let rest = buf.get(at..).unwrap_or(&[]);
        match rest.first_chunk() {
            None => return Err((XattrFault::Unterminated, at)),
            // `IS_LAST_ENTRY`: a word of zeros.
            Some([0, 0, 0, 0]) => return Ok((found, at + 4)),
            Some(_) => {}
        }
        let Ok((entry, after)) = XattrEntry::ref_from_prefix(rest) else {
            return Err((XattrFault::NameCutOff, at));
        };
        let Some(name) = after.get(..usize::from(entry.e_name_len)) else {
            return Err((XattrFault::NameCutOff, at));
        };
        let (value_inum, value_size) = (entry.e_value_inum.get(), entry.e_value_size.get());
        let value_offset = usize::from(entry.e_value_offs.get());
        if value_size as usize > XATTR_SIZE_MAX {
            return Err((XattrFault::ValueTooLong, at));
        }
        let value = if value_inum == 0 {
            buf.get(value_offset..)
                .and_then(|b| b.get(..value_size as usize))
                .ok_or((XattrFault::ValueCutOff, at))?
        } else {
            &[]
        };
        found.push(RawXattr {
            index: entry.e_name_index,
            name,
            value_offset,
            value_inum,
            value_size,
            hash: entry.e_hash.get(),
            value,
        });
        at += xattr_entry_size(name.len());
    }
}

/// The bytes of the entries inside an inode, from which their offsets count; `None` where it has none.
pub(crate) fn inode_area(inode: &Inode) -> Option<&[u8]> {
    let (magic, entries) = inode.xattr_area().split_first_chunk::<INODE_HEADER_SIZE>()?;
    (u32::from_le_bytes(*magic) == EXT4_XATTR_MAGIC).then_some(entries)
}

/// The entries inside an inode; empty where it has none.
pub(crate) fn inode_entries(inode: &Inode) -> Result<Vec<RawXattr<'_>>, Ext4Error> {
    match inode_area(inode) {
        Some(area) if area.len() >= 4 => Ok(entries(area, 0).map_err(|broken| in_inode(inode, broken))?.0),
        _ => Ok(Vec::new()),
    }
}

/// The error for a list inside an inode.
pub(crate) fn in_inode(inode: &Inode, (fault, at): BrokenList) -> Ext4Error {
    let start = inode.raw.len() - inode.xattr_area().len() + INODE_HEADER_SIZE;
    Ext4Error::corrupt(fault, Place::inode(inode.ino).at_offset((start + at) as u64))
}

/// The error for a list in the xattr block of an inode.
pub(crate) fn in_block(inode: &Inode, (fault, at): BrokenList) -> Ext4Error {
    Ext4Error::corrupt(fault, Place::inode(inode.ino).at_block(inode.file_acl).at_offset(at as u64))
}

/// The part of inline data that `i_block` does not hold.
pub(crate) fn inline_data(inode: &Inode) -> Result<Option<&[u8]>, Ext4Error> {
    let found = inode_entries(inode)?;
    Ok(found.iter().find(|x| x.is_inline_data()).map(|x| x.value))
}

/// The header of an xattr block.
pub(crate) fn block_header(block: &[u8]) -> Option<&XattrHeader> {
    XattrHeader::ref_from_prefix(block).ok().map(|(header, _)| header)
}

impl<R: ReadAt> Ext4<R> {
    /// The xattr block of `inode`, checked; `None` if it has none.
    pub(crate) fn xattr_block(&self, inode: &Inode) -> Result<Option<Block>, Ext4Error> {
        let number = inode.file_acl;
        if number == 0 {
            return Ok(None);
        }
        let bad = |fault| Err(Ext4Error::corrupt(fault, Place::inode(inode.ino).at_block(number)));
        if !self.geometry().holds(number, 1) {
            return bad(XattrFault::BlockOutside);
        }
        let block = self.source.block(number)?;
        let header = match block_header(&block) {
            Some(h) if h.h_magic.get() == EXT4_XATTR_MAGIC && h.h_blocks.get() == 1 => h,
            _ => return bad(XattrFault::BlockHeader),
        };
        let seed = self.geometry().checksum_seed;
        if self.geometry().metadata_csum()
            && xattr_block_checksum(seed, number, &block) != header.h_checksum.get()
        {
            return bad(XattrFault::BlockChecksum);
        }
        Ok(Some(block))
    }

    /// All extended attributes of `inode`, in stored order, ACLs in the form of `getxattr`.
    ///
    /// # Errors
    /// `Corrupt` where the format is broken.
    pub fn xattrs(&self, inode: &Inode) -> Result<Vec<Xattr>, Ext4Error> {
        let mut out = Vec::new();
        let mut total = 0;
        for raw in inode_entries(inode)? {
            self.push(inode, &raw, &mut out, &mut total)?;
        }
        if let Some(block) = self.xattr_block(inode)? {
            let (found, _) = entries(&block, BLOCK_HEADER_SIZE).map_err(|broken| in_block(inode, broken))?;
            for raw in found {
                self.push(inode, &raw, &mut out, &mut total)?;
            }
        }
        Ok(out)
    }

    fn push(
        &self,
        inode: &Inode,
        raw: &RawXattr<'_>,
        out: &mut Vec<Xattr>,
        total: &mut usize,
    ) -> Result<(), Ext4Error> {
        if raw.is_inline_data() {
            return Ok(());
        }
        let place = Place::inode(inode.ino);
        let bad = |fault| Ext4Error::corrupt(fault, place);
        let Some(prefix) = name_prefix(raw.index) else {
            return Err(bad(XattrFault::Index));
        };
        if raw.name.contains(&0) {
            return Err(bad(XattrFault::Name));
        }
        let value = if raw.value_inum == 0 { raw.value.to_vec() } else { self.ea_value(inode, raw)? };
        *total += value.len();
        if *total > MAX_TOTAL {
            let what = format!("an inode with more than {MAX_TOTAL} bytes of xattr values");
            return Err(Ext4Error::unsupported(what, place));
        }
        let value = match raw.index {
            EXT4_XATTR_INDEX_POSIX_ACL_ACCESS | EXT4_XATTR_INDEX_POSIX_ACL_DEFAULT => {
                acl::from_disk(&value).ok_or_else(|| bad(XattrFault::Acl))?
            }
            _ => value,
        };
        out.push(Xattr { name: [prefix, raw.name].concat(), value });
        Ok(())
    }

    /// Reads a value that has an inode of its own.
    fn ea_value(&self, owner: &Inode, raw: &RawXattr<'_>) -> Result<Vec<u8>, Ext4Error> {
        let inode = self.inode(raw.value_inum)?;
        if inode.kind != FileKind::File
            || !inode.has(InodeFlags::EXT4_EA_INODE_FL)
            || inode.size != u64::from(raw.value_size)
            || inode.has(InodeFlags::EXT4_INLINE_DATA_FL)
        {
            return Err(Ext4Error::corrupt(XattrFault::ValueInode, Place::inode(owner.ino)));
        }
        self.source.visit(1)?;
        let mut value = vec![0; raw.value_size as usize];
        self.read_file_at(&inode, 0, &mut value)?;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acl_entries_get_their_ids() {
        let disk = [1, 0, 0, 0, 1, 0, 6, 0, 2, 0, 7, 0, 0xE8, 3, 0, 0];
        let kernel = [2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 7, 0, 0xE8, 3, 0, 0];
        assert_eq!(acl::from_disk(&disk).unwrap(), kernel);
        assert_eq!(acl::from_disk(&disk[..14]), None);
        assert_eq!(acl::from_disk(&[2, 0, 0, 0]), None);
        assert_eq!(acl::from_disk(&[1, 0, 0, 0, 9, 0, 0, 0]), None);
    }

    #[test]
    fn lists_without_an_end_and_values_outside_are_refused() {
        assert!(entries(&[1; 12], 0).is_err());
        assert!(entries(&[], 0).is_err());
        let mut entry = [0u8; 24];
        entry[..4].copy_from_slice(&[1, 1, 30, 0]);
        entry[8] = 4;
        entry[16] = b'a';
        assert!(entries(&entry, 0).is_err());
        entry[2] = 20;
        assert_eq!(entries(&entry, 0).unwrap().0.len(), 1);
    }
}
