//! Extended attributes: inside the inode, in one block, and with values in inodes of their own.
//!
//! ```text
//!  inode:  0xEA020000 │ entries ► … ◄ values      offsets from the first entry
//!  block:  header 32  │ entries ► … ◄ values      offsets from the start of the block
//!  entry:  name_len, name_index, value_offs, value_inum, value_size, hash, name (padded to 4)
//! ```
//!
//! POSIX ACLs are converted from their disk form to what `getxattr` returns. The value of one attribute is at most
//! 64 KiB and all values of an inode at most [`MAX_TOTAL`], as one inode number may stand in many entries.
//! Called by [`super::Ext4::xattrs`]; [`entries`] also by the checker.

use super::{
    Ext4,
    bytes::{chksum, u8_at, u16_at, u32_at},
    corrupt,
    inode::{FileKind, Inode, flags},
    unsupported,
};
use crate::{Ext4Error, Xattr, layout::acl};
use disk_io::{ReadAt, steps};

/// `EXT4_XATTR_MAGIC`.
pub(crate) const MAGIC: u32 = 0xEA02_0000;
/// `XATTR_SIZE_MAX`: the largest value, in bytes.
pub(crate) const MAX_VALUE: u32 = 65536;
/// The most bytes of all values of one inode.
const MAX_TOTAL: usize = 16 << 20;
/// Bytes of a block's header.
pub(crate) const BLOCK_HEADER: usize = 32;
/// `EXT4_XATTR_INDEX_SYSTEM`, under which `data` is the rest of inline data.
pub(crate) const INDEX_SYSTEM: u8 = 7;
const INDEX_ACL_ACCESS: u8 = 2;
const INDEX_ACL_DEFAULT: u8 = 3;

/// The prefix that a name index stands for.
pub(crate) fn prefix(index: u8) -> Option<&'static [u8]> {
    Some(match index {
        1 => b"user.",
        INDEX_ACL_ACCESS => b"system.posix_acl_access",
        INDEX_ACL_DEFAULT => b"system.posix_acl_default",
        4 => b"trusted.",
        6 => b"security.",
        INDEX_SYSTEM => b"system.",
        8 => b"system.richacl",
        _ => return None,
    })
}

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

/// Parses the entries that start at `buf[first]`; value offsets count from `buf[0]`. Gives also the end of the list.
pub(crate) fn entries(buf: &[u8], first: usize) -> Result<(Vec<RawXattr<'_>>, usize), &'static str> {
    let mut found = Vec::new();
    let mut at = first;
    loop {
        steps::add(1);
        if at + 4 > buf.len() {
            return Err("the list of xattrs has no end");
        }
        if u32_at(buf, at) == 0 {
            return Ok((found, at + 4));
        }
        let name_len = usize::from(u8_at(buf, at));
        let Some(name) = buf.get(at + 16..at + 16 + name_len) else {
            return Err("an xattr's name is cut off");
        };
        let value_inum = u32_at(buf, at + 4);
        let value_size = u32_at(buf, at + 8);
        let value_offset = usize::from(u16_at(buf, at + 2));
        if value_size > MAX_VALUE {
            return Err("an xattr's value is too long");
        }
        let value = if value_inum == 0 {
            buf.get(value_offset..)
                .and_then(|b| b.get(..value_size as usize))
                .ok_or("an xattr's value is cut off")?
        } else {
            &[]
        };
        found.push(RawXattr {
            index: u8_at(buf, at + 1),
            name,
            value_offset,
            value_inum,
            value_size,
            hash: u32_at(buf, at + 12),
            value,
        });
        at += 16 + name_len.next_multiple_of(4);
    }
}

/// The entries inside an inode; empty where it has none.
pub(crate) fn inode_entries(inode: &Inode) -> Result<Vec<RawXattr<'_>>, Ext4Error> {
    let area = inode.xattr_area();
    if area.len() < 8 || u32_at(area, 0) != MAGIC {
        return Ok(Vec::new());
    }
    let (found, _) = entries(area.get(4..).unwrap_or(&[]), 0)
        .map_err(|reason| corrupt(format!("inode {}, xattrs", inode.ino), reason))?;
    Ok(found)
}

/// The part of inline data that `i_block` does not hold.
pub(crate) fn inline_data(inode: &Inode) -> Result<Option<&[u8]>, Ext4Error> {
    let found = inode_entries(inode)?;
    Ok(found.iter().find(|x| x.index == INDEX_SYSTEM && x.name == b"data").map(|x| x.value))
}

/// Checks the checksum of xattr block `number`.
pub(crate) fn block_checksum_matches(block: &[u8], number: u64, seed: u32) -> bool {
    let (Some(head), Some(rest)) = (block.get(..16), block.get(20..)) else { return false };
    let crc = chksum(chksum(seed, &number.to_le_bytes()), head);
    chksum(chksum(crc, &[0; 4]), rest) == u32_at(block, 16)
}

impl<R: ReadAt> Ext4<R> {
    /// The xattr block of `inode`, checked; `None` if it has none.
    pub(crate) fn xattr_block(&self, inode: &Inode) -> Result<Option<super::source::Block>, Ext4Error> {
        let number = inode.file_acl;
        if number == 0 {
            return Ok(None);
        }
        let bad = |reason| corrupt(format!("inode {}, xattr block {number}", inode.ino), reason);
        if !self.geometry().holds(number, 1) {
            return Err(bad("it lies outside the file system"));
        }
        let block = self.source.block(number)?;
        if u32_at(&block, 0) != MAGIC || u32_at(&block, 8) != 1 {
            return Err(bad("it has no xattr header"));
        }
        if self.geometry().metadata_csum()
            && !block_checksum_matches(&block, number, self.geometry().checksum_seed)
        {
            return Err(bad("checksum does not match"));
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
            let (found, _) = entries(&block, BLOCK_HEADER)
                .map_err(|reason| corrupt(format!("xattr block {}", inode.file_acl), reason))?;
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
        if raw.index == INDEX_SYSTEM && raw.name == b"data" {
            return Ok(());
        }
        let bad = |reason| corrupt(format!("inode {}, xattrs", inode.ino), reason);
        let Some(prefix) = prefix(raw.index) else {
            return Err(bad("an xattr has an unknown name index"));
        };
        if raw.name.contains(&0) {
            return Err(bad("an xattr's name holds a NUL"));
        }
        let value = if raw.value_inum == 0 { raw.value.to_vec() } else { self.ea_value(inode, raw)? };
        *total += value.len();
        if *total > MAX_TOTAL {
            return Err(unsupported(format!("inode {}: xattrs of more than {MAX_TOTAL} bytes", inode.ino)));
        }
        let value = match raw.index {
            INDEX_ACL_ACCESS | INDEX_ACL_DEFAULT => {
                acl::from_disk(&value).ok_or_else(|| bad("a POSIX ACL is malformed"))?
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
            || !inode.has(flags::EA_INODE)
            || inode.size != u64::from(raw.value_size)
            || inode.has(flags::INLINE_DATA)
        {
            return Err(corrupt(
                format!("inode {}, xattrs", owner.ino),
                "a value's inode is not what the entry says",
            ));
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
