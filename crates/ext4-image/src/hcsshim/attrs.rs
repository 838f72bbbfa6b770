//! Xattrs: which go into the inode and which into a block, and their bytes.
//!
//! In the order of their full names each goes into the inode if it fits there, else into the block, else the entry is
//! refused. The inode keeps that order. The block is then sorted, with a comparison that is not an order:
//! `index < or length < or name <`. Where that leaves the block in an order in which Linux does not find its attributes,
//! the entry is refused.

use super::{BLOCK, INODE_EXTRA, Result, refuse};
use crate::{
    Xattr,
    layout::{
        inode::S_IFDIR,
        xattr::{
            BLOCK_HEADER_SIZE, EXT4_XATTR_INDEX_SECURITY, EXT4_XATTR_INDEX_SYSTEM, EXT4_XATTR_INDEX_TRUSTED,
            EXT4_XATTR_INDEX_USER, EXT4_XATTR_MAGIC, EXT4_XATTR_SYSTEM_DATA, INODE_HEADER_SIZE,
            XATTR_NAME_MAX, XattrEntry, XattrHeader, entry_hash, split_name, value_size, value_words,
            xattr_entry_size,
        },
    },
};
use std::collections::BTreeMap;
use zerocopy::{
    FromZeros, IntoBytes,
    little_endian::{U16, U32},
};

/// Up to this many elements Go sorts by insertion.
const GO_INSERTION_SORT: usize = 12;
const OVERLAY_PREFIX: &[u8] = b"trusted.overlay.";
const OVERLAY_OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// The xattrs of a node.
#[derive(Debug, Clone, Default)]
pub(super) struct Attrs {
    /// In the inode, in their order there.
    pub(super) inline: Vec<Xattr>,
    /// In the block, in their order there.
    pub(super) block: Vec<Xattr>,
}

/// What is stored: name space, rest of the name, value.
type Stored<'a> = (u8, &'a [u8], &'a [u8]);

fn stored(x: &Xattr) -> Stored<'_> {
    let (index, name) = split_name(&x.name).unwrap_or((0, &x.name));
    (index, name, &x.value)
}

fn length((_, name, value): Stored<'_>) -> usize {
    xattr_entry_size(name.len()) + value_size(value.len())
}

/// What that tool would write, but Linux could not read, or must not.
fn check(x: &Xattr, file_type: u16) -> Result<()> {
    let name = x.name.escape_ascii();
    match split_name(&x.name) {
        Some((EXT4_XATTR_INDEX_USER | EXT4_XATTR_INDEX_TRUSTED | EXT4_XATTR_INDEX_SECURITY, rest))
            if rest.len() <= XATTR_NAME_MAX => {}
        Some((EXT4_XATTR_INDEX_USER | EXT4_XATTR_INDEX_TRUSTED | EXT4_XATTR_INDEX_SECURITY, _)) => {
            return Err(refuse(format!("xattr \"{name}\" has a name of more than {XATTR_NAME_MAX} bytes")));
        }
        _ => {
            return Err(refuse(format!(
                "xattr \"{name}\" (hcsshim's tar2ext4 writes it in a form that linux does not read)"
            )));
        }
    }
    if x.name.starts_with(OVERLAY_PREFIX)
        && !(x.name == OVERLAY_OPAQUE && x.value == b"y" && file_type == S_IFDIR)
    {
        return Err(refuse(format!("xattr \"{name}\" (overlayfs would follow it)")));
    }
    Ok(())
}

impl Attrs {
    /// Divides the xattrs of a node of this type. `inline_extra`: the file's data lie in the inode, this many bytes of
    /// them in the xattr `system.data`, which comes first.
    pub(super) fn divide(
        xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
        inline_extra: Option<usize>,
        file_type: u16,
    ) -> Result<Self> {
        let mut attrs = Self::default();
        let mut inode_left = INODE_EXTRA - INODE_HEADER_SIZE - 4;
        let mut block_left = BLOCK as usize - BLOCK_HEADER_SIZE - 4;
        if let Some(extra) = inline_extra {
            // At most all of it: the largest inline file is made so.
            inode_left -= xattr_entry_size(EXT4_XATTR_SYSTEM_DATA.len()) + value_size(extra);
        }
        for (name, value) in xattrs {
            let x = Xattr { name, value };
            check(&x, file_type)?;
            let length = length(stored(&x));
            if inode_left >= length {
                inode_left -= length;
                attrs.inline.push(x);
            } else if block_left >= length {
                block_left -= length;
                attrs.block.push(x);
            } else {
                let name = x.name.escape_ascii();
                return Err(refuse(format!("xattr \"{name}\" does not fit the inode and one block")));
            }
        }
        sort_block(&mut attrs.block)?;
        Ok(attrs)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.inline.is_empty() && self.block.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Xattr> {
        self.inline.iter().chain(&self.block)
    }

    /// The xattr block.
    pub(super) fn block_bytes(&self) -> Vec<u8> {
        let mut header = XattrHeader::new_zeroed();
        header.h_magic.set(EXT4_XATTR_MAGIC);
        header.h_refcount.set(1);
        header.h_blocks.set(1);
        let mut block = vec![0; BLOCK as usize];
        let (head, body) = block.split_at_mut(BLOCK_HEADER_SIZE);
        head.copy_from_slice(header.as_bytes());
        put(self.block.iter().map(stored), body, BLOCK_HEADER_SIZE);
        block
    }
}

/// Whether `a` comes before `b` as Linux has it, and as the tool has it.
fn less(a: &Xattr, b: &Xattr) -> (bool, bool) {
    let ((ai, an, _), (bi, bn, _)) = (stored(a), stored(b));
    ((ai, an.len(), an) < (bi, bn.len(), bn), ai < bi || an.len() < bn.len() || an < bn)
}

fn sort_block(block: &mut [Xattr]) -> Result<()> {
    if block.len() <= GO_INSERTION_SORT {
        for i in 1..block.len() {
            for j in (1..=i).rev() {
                if !less(&block[j], &block[j - 1]).1 {
                    break;
                }
                block.swap(j, j - 1);
            }
        }
    } else {
        // Where the comparison is an order for these names, every way of sorting gives the same.
        block.sort_by(
            |a, b| if less(a, b).0 { std::cmp::Ordering::Less } else { std::cmp::Ordering::Greater },
        );
        let ordered = block.iter().enumerate().all(|(i, a)| block[i + 1..].iter().all(|b| !less(b, a).1));
        if !ordered {
            return Err(refuse(format!(
                "{} xattrs in one block, which hcsshim's tar2ext4 does not sort",
                block.len()
            )));
        }
    }
    if block.windows(2).any(|pair| !less(&pair[0], &pair[1]).0) {
        return Err(refuse(
            "xattrs that hcsshim's tar2ext4 writes in an order in which linux does not find them",
        ));
    }
    Ok(())
}

/// Entries from the front of `area`, values from its end; offsets count from `base` bytes before it.
fn put<'a>(attrs: impl Iterator<Item = Stored<'a>>, area: &mut [u8], base: usize) {
    let (mut at, mut end) = (0, area.len());
    for (index, name, value) in attrs {
        end -= value_size(value.len());
        let entry = XattrEntry {
            e_name_len: name.len() as u8,
            e_name_index: index,
            e_value_offs: U16::new((base + end) as u16),
            e_value_inum: U32::ZERO,
            e_value_size: U32::new(value.len() as u32),
            e_hash: U32::new(entry_hash(name, value_words(value))),
        };
        let bytes = entry.as_bytes();
        area[at..at + bytes.len()].copy_from_slice(bytes);
        area[at + bytes.len()..at + bytes.len() + name.len()].copy_from_slice(name);
        area[end..end + value.len()].copy_from_slice(value);
        at += xattr_entry_size(name.len());
    }
}

/// Fills the end of an inode's slot. `inline_data`: what of the file's data does not fit `i_block`, if they lie in the
/// inode.
pub(super) fn put_in_inode(attrs: Option<&Attrs>, inline_data: Option<&[u8]>, area: &mut [u8]) {
    let inline = attrs.map_or(&[][..], |a| &a.inline);
    if inline.is_empty() && inline_data.is_none() {
        return;
    }
    let (magic, body) = area.split_at_mut(INODE_HEADER_SIZE);
    magic.copy_from_slice(&EXT4_XATTR_MAGIC.to_le_bytes());
    let data = inline_data.map(|value| (EXT4_XATTR_INDEX_SYSTEM, EXT4_XATTR_SYSTEM_DATA, value));
    put(data.into_iter().chain(inline.iter().map(stored)), body, 0);
}
