//! Extended attributes: sets kept once, and where each attribute goes.
//!
//! In order: the inode's slot, then one block, and what does not fit there as a value in an inode of its own.

use super::{Result, tree::NONE};
use crate::{
    Ext4Error, Place, Xattr,
    layout::{
        acl,
        xattr::{
            BLOCK_HEADER_SIZE, EXT4_XATTR_INDEX_POSIX_ACL_ACCESS, EXT4_XATTR_INDEX_POSIX_ACL_DEFAULT,
            XATTR_ENTRY_SIZE, XATTR_NAME_MAX, XATTR_SIZE_MAX, XattrEntry, entry_hash, split_name, value_size,
            value_words, xattr_entry_size,
        },
    },
};
use std::{collections::HashMap, sync::Arc};
use zerocopy::{
    IntoBytes,
    little_endian::{U16, U32},
};

/// Zero word after the last entry.
const TERMINATOR: usize = 4;

/// All distinct sets of attributes; nodes hold an index. Layers repeat few sets (labels, capabilities) many times.
#[derive(Debug, Default)]
pub(super) struct Sets {
    sets: Vec<Arc<[Xattr]>>,
    index: HashMap<Arc<[Xattr]>, u32>,
}

impl Sets {
    pub(super) fn get(&self, set: u32) -> &[Xattr] {
        self.sets.get(set as usize).map_or(&[], |s| s)
    }

    /// Checks and keeps a set; the last of equal names counts.
    pub(super) fn add(&mut self, mut xattrs: Vec<Xattr>, block_size: usize) -> Result<u32> {
        if xattrs.is_empty() {
            return Ok(NONE);
        }
        xattrs.sort_by(|a, b| a.name.cmp(&b.name));
        xattrs.reverse();
        // Stable sort, then reversed: of equal names the last given comes first, and `dedup` keeps the first.
        xattrs.dedup_by(|a, b| a.name == b.name);
        xattrs.reverse();
        if let Some(i) = self.index.get(xattrs.as_slice()) {
            return Ok(*i);
        }
        let items = items(&xattrs)?;
        let entries: usize = items.iter().map(|i| xattr_entry_size(i.name.len())).sum();
        let bytes = BLOCK_HEADER_SIZE + entries + TERMINATOR;
        if bytes > block_size {
            return Err(Ext4Error::AttributeNames {
                count: items.len(),
                bytes: bytes as u64,
                most: block_size as u32,
            });
        }
        let set: Arc<[Xattr]> = xattrs.into();
        let i = self.sets.len() as u32;
        self.sets.push(Arc::clone(&set));
        self.index.insert(set, i);
        Ok(i)
    }
}

/// An attribute in its on-disk form.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub(super) index: u8,
    pub(super) name: Vec<u8>,
    pub(super) value: Vec<u8>,
    /// Inode of the value and the value's hash.
    pub(super) ea: Option<(u32, u32)>,
}

impl Item {
    fn size(&self) -> usize {
        xattr_entry_size(self.name.len()) + if self.ea.is_some() { 0 } else { value_size(self.value.len()) }
    }

    fn hash(&self) -> u32 {
        match self.ea {
            Some((_, hash)) => entry_hash(&self.name, [hash]),
            None => entry_hash(&self.name, value_words(&self.value)),
        }
    }
}

/// On-disk form of a set, in the order that ext4 keeps in blocks.
pub(super) fn items(xattrs: &[Xattr]) -> Result<Vec<Item>> {
    let mut out = Vec::with_capacity(xattrs.len());
    for x in xattrs {
        let shown = || String::from_utf8_lossy(&x.name).into_owned();
        let unsupported = |what: String| Ext4Error::unsupported(what, Place::default());
        let (index, name) = split_name(&x.name)
            .ok_or_else(|| unsupported(format!("name space of extended attribute {:?}", shown())))?;
        if name.len() > XATTR_NAME_MAX {
            return Err(unsupported(format!("name of extended attribute {:?} over 255 bytes", shown())));
        }
        if x.value.len() > XATTR_SIZE_MAX {
            return Err(unsupported(format!("value of extended attribute {:?} over 64 KiB", shown())));
        }
        let value = if matches!(index, EXT4_XATTR_INDEX_POSIX_ACL_ACCESS | EXT4_XATTR_INDEX_POSIX_ACL_DEFAULT)
        {
            acl::to_disk(&x.value).ok_or_else(|| Ext4Error::usage(format!("malformed acl in {}", shown())))?
        } else {
            x.value.clone()
        };
        out.push(Item { index, name: name.to_vec(), value, ea: None });
    }
    out.sort_by(|a, b| (a.index, a.name.len(), &a.name).cmp(&(b.index, b.name.len(), &b.name)));
    Ok(out)
}

/// Which items go where; each list keeps the order.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) inode: Vec<Item>,
    pub(super) block: Vec<Item>,
    /// Indices into `block` of the items whose value needs an inode of its own.
    pub(super) ea: Vec<usize>,
}

/// Distributes a set over `room` bytes in the inode (entries, values and terminator) and a block.
pub(super) fn plan(xattrs: &[Xattr], room: usize, block_size: usize) -> Result<Plan> {
    let mut plan = Plan::default();
    let mut left = room.saturating_sub(TERMINATOR);
    for item in items(xattrs)? {
        if item.size() <= left {
            left -= item.size();
            plan.inode.push(item);
        } else {
            plan.block.push(item);
        }
    }
    let mut need = BLOCK_HEADER_SIZE + TERMINATOR + plan.block.iter().map(Item::size).sum::<usize>();
    while need > block_size {
        let largest = (0..plan.block.len())
            .filter(|i| !plan.ea.contains(i))
            .max_by_key(|&i| plan.block[i].value.len())
            .ok_or_else(|| {
                Ext4Error::unsupported("extended attributes beyond one block", Place::default())
            })?;
        need -= value_size(plan.block[largest].value.len());
        plan.ea.push(largest);
    }
    plan.ea.sort_unstable();
    Ok(plan)
}

/// Lays entries into `area` from `at`, their values from its end downwards; offsets count from the area's start. Gives
/// the entries' hashes.
pub(super) fn lay(area: &mut [u8], mut at: usize, items: &[Item]) -> Vec<u32> {
    let mut end = area.len();
    let mut hashes = Vec::with_capacity(items.len());
    for item in items {
        let offset = if item.ea.is_some() || item.value.is_empty() {
            0
        } else {
            end -= value_size(item.value.len());
            area[end..end + item.value.len()].copy_from_slice(&item.value);
            end
        };
        let hash = item.hash();
        let entry = XattrEntry {
            e_name_len: item.name.len() as u8,
            e_name_index: item.index,
            e_value_offs: U16::new(offset as u16),
            e_value_inum: U32::new(item.ea.map_or(0, |(ino, _)| ino)),
            e_value_size: U32::new(item.value.len() as u32),
            e_hash: U32::new(hash),
        };
        area[at..at + XATTR_ENTRY_SIZE].copy_from_slice(entry.as_bytes());
        area[at + XATTR_ENTRY_SIZE..at + XATTR_ENTRY_SIZE + item.name.len()].copy_from_slice(&item.name);
        at += xattr_entry_size(item.name.len());
        hashes.push(hash);
    }
    hashes
}
