//! Extended attributes: block header, entries, namespaces and hashes.
//!
//! ```text
//!   block:    header 32 │ entry entry … 0u32 │ free │ … value value    offsets from the block's start
//!   in inode: magic 4   │ entry entry … 0u32 │ free │ … value value    offsets from the first entry
//! ```

use super::checksum::{crc32c, crc32c_without};
use std::mem::offset_of;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32},
};

/// `h_magic`, of blocks and of the part in the inode.
pub(crate) const EXT4_XATTR_MAGIC: u32 = 0xEA02_0000;
/// Size of the block header.
pub(crate) const BLOCK_HEADER_SIZE: usize = 32;
/// Size of the header in the inode.
pub(crate) const INODE_HEADER_SIZE: usize = 4;
/// Size of the fixed part of an entry.
pub(crate) const XATTR_ENTRY_SIZE: usize = 16;
/// Longest name without its namespace.
pub(crate) const XATTR_NAME_MAX: usize = 255;
/// Longest value that the system call interface can return (`XATTR_SIZE_MAX`).
pub(crate) const XATTR_SIZE_MAX: usize = 65_536;
/// Name of the entry that holds inline data, in namespace [`EXT4_XATTR_INDEX_SYSTEM`].
pub(crate) const EXT4_XATTR_SYSTEM_DATA: &[u8] = b"data";

pub(crate) const EXT4_XATTR_INDEX_USER: u8 = 1;
pub(crate) const EXT4_XATTR_INDEX_POSIX_ACL_ACCESS: u8 = 2;
pub(crate) const EXT4_XATTR_INDEX_POSIX_ACL_DEFAULT: u8 = 3;
pub(crate) const EXT4_XATTR_INDEX_TRUSTED: u8 = 4;
pub(crate) const EXT4_XATTR_INDEX_SECURITY: u8 = 6;
pub(crate) const EXT4_XATTR_INDEX_SYSTEM: u8 = 7;
pub(crate) const EXT4_XATTR_INDEX_RICHACL: u8 = 8;

/// `struct ext4_xattr_header`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct XattrHeader {
    pub(crate) h_magic: U32,
    pub(crate) h_refcount: U32,
    pub(crate) h_blocks: U32,
    pub(crate) h_hash: U32,
    pub(crate) h_checksum: U32,
    pub(crate) h_reserved: [U32; 3],
}

/// `struct ext4_xattr_entry`; the name follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct XattrEntry {
    pub(crate) e_name_len: u8,
    pub(crate) e_name_index: u8,
    pub(crate) e_value_offs: U16,
    pub(crate) e_value_inum: U32,
    pub(crate) e_value_size: U32,
    pub(crate) e_hash: U32,
}

const _: () = assert!(size_of::<XattrHeader>() == 32 && size_of::<XattrEntry>() == 16);

/// Namespaces: a name follows the prefix.
const PREFIXES: [(&[u8], u8); 3] = [
    (b"user.", EXT4_XATTR_INDEX_USER),
    (b"trusted.", EXT4_XATTR_INDEX_TRUSTED),
    (b"security.", EXT4_XATTR_INDEX_SECURITY),
];
/// Attributes that are a namespace of their own.
const WHOLE: [(&[u8], u8); 3] = [
    (b"system.posix_acl_access", EXT4_XATTR_INDEX_POSIX_ACL_ACCESS),
    (b"system.posix_acl_default", EXT4_XATTR_INDEX_POSIX_ACL_DEFAULT),
    (b"system.richacl", EXT4_XATTR_INDEX_RICHACL),
];

/// Splits a full name into `e_name_index` and the name that is stored; `None` if ext4 cannot hold it.
pub(crate) fn split_name(full: &[u8]) -> Option<(u8, &[u8])> {
    if let Some((_, index)) = WHOLE.iter().find(|(name, _)| *name == full) {
        return Some((*index, b""));
    }
    PREFIXES.iter().find_map(|(prefix, index)| {
        full.strip_prefix(*prefix).filter(|rest| !rest.is_empty()).map(|rest| (*index, rest))
    })
}

/// The beginning of a full name that `e_name_index` stands for; `None` for unknown ones.
pub(crate) fn name_prefix(index: u8) -> Option<&'static [u8]> {
    if index == EXT4_XATTR_INDEX_SYSTEM {
        return Some(b"system.");
    }
    PREFIXES.iter().chain(&WHOLE).find(|(_, known)| *known == index).map(|(prefix, _)| *prefix)
}

/// Bytes that an entry with a stored name of `name_len` bytes takes.
pub(crate) const fn xattr_entry_size(name_len: usize) -> usize {
    (XATTR_ENTRY_SIZE + name_len + 3) & !3
}

/// Bytes that a value takes.
pub(crate) const fn value_size(len: usize) -> usize {
    (len + 3) & !3
}

/// `e_hash`: the stored name, then the value in words (padded with zeros). For a value in its own inode, `words` is the
/// one word [`ea_inode_hash`]. Bytes of the name count as unsigned.
pub(crate) fn entry_hash(name: &[u8], words: impl IntoIterator<Item = u32>) -> u32 {
    let hash = name.iter().fold(0u32, |h, &b| h.rotate_left(5) ^ u32::from(b));
    words.into_iter().fold(hash, |h, word| h.rotate_left(16) ^ word)
}

/// The words of a value, for [`entry_hash`].
pub(crate) fn value_words(value: &[u8]) -> impl Iterator<Item = u32> + '_ {
    value.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_le_bytes(word)
    })
}

/// `h_hash` of a block: all entries' `e_hash` in order; 0 (never shared) if one of them is 0.
pub(crate) fn block_hash(entry_hashes: impl IntoIterator<Item = u32>) -> u32 {
    let mut hash = 0u32;
    for e in entry_hashes {
        if e == 0 {
            return 0;
        }
        hash = hash.rotate_left(16) ^ e;
    }
    hash
}

/// Checksum of the xattr block `block` of the file system; the stored one (`h_checksum`) counts as zero.
pub(crate) fn xattr_block_checksum(fs_seed: u32, block: u64, bytes: &[u8]) -> u32 {
    let seed = crc32c(fs_seed, &block.to_le_bytes());
    crc32c_without(seed, bytes, offset_of!(XattrHeader, h_checksum), 4)
}

/// Hash of a value in its own inode; also kept in that inode's `i_atime`.
pub(crate) fn ea_inode_hash(fs_seed: u32, value: &[u8]) -> u32 {
    crc32c(fs_seed, value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_split_and_join() {
        for (full, index, name) in [
            (&b"user.a"[..], 1, &b"a"[..]),
            (b"trusted.overlay.opaque", 4, b"overlay.opaque"),
            (b"security.capability", 6, b"capability"),
            (b"system.posix_acl_access", 2, b""),
            (b"system.posix_acl_default", 3, b""),
            (b"system.richacl", 8, b""),
        ] {
            assert_eq!(split_name(full), Some((index, name)));
            assert_eq!([name_prefix(index).unwrap(), name].concat(), full);
        }
        for bad in [&b"user."[..], b"system.data", b"com.apple.x", b"", b"user"] {
            assert_eq!(split_name(bad), None);
        }
        assert_eq!(name_prefix(EXT4_XATTR_INDEX_SYSTEM), Some(&b"system."[..]));
        assert_eq!(name_prefix(5), None);
    }
}
