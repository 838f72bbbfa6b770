//! Extended attributes: block header, entries, name spaces and hashes.
//!
//! ```text
//!   block:    header 32 │ entry entry … 0u32 │ free │ … value value    offsets from the block's start
//!   in inode: magic 4   │ entry entry … 0u32 │ free │ … value value    offsets from the first entry
//! ```
#![expect(missing_docs, reason = "fields bear the kernel's names; fs/ext4/xattr.h")]

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32},
};

/// `h_magic`, of blocks and of the part in the inode.
pub const XATTR_MAGIC: u32 = 0xEA02_0000;
/// Size of the block header.
pub const BLOCK_HEADER_SIZE: usize = 32;
/// Size of the header in the inode.
pub const INODE_HEADER_SIZE: usize = 4;
/// Size of the fixed part of an entry.
pub const XATTR_ENTRY_SIZE: usize = 16;
/// Longest name without its name space.
pub const XATTR_NAME_MAX: usize = 255;
/// Longest value that the system call interface can return (`XATTR_SIZE_MAX`).
pub const XATTR_SIZE_MAX: usize = 65_536;
/// Name of the entry that holds inline data, in name space [`INDEX_SYSTEM`].
pub const INLINE_DATA_NAME: &[u8] = b"data";

pub const INDEX_USER: u8 = 1;
pub const INDEX_POSIX_ACL_ACCESS: u8 = 2;
pub const INDEX_POSIX_ACL_DEFAULT: u8 = 3;
pub const INDEX_TRUSTED: u8 = 4;
pub const INDEX_SECURITY: u8 = 6;
pub const INDEX_SYSTEM: u8 = 7;
pub const INDEX_RICHACL: u8 = 8;

/// `struct ext4_xattr_header`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct XattrHeader {
    pub h_magic: U32,
    pub h_refcount: U32,
    pub h_blocks: U32,
    pub h_hash: U32,
    pub h_checksum: U32,
    pub h_reserved: [U32; 3],
}

/// `struct ext4_xattr_entry`; the name follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct XattrEntry {
    pub e_name_len: u8,
    pub e_name_index: u8,
    pub e_value_offs: U16,
    pub e_value_inum: U32,
    pub e_value_size: U32,
    pub e_hash: U32,
}

const _: () = assert!(size_of::<XattrHeader>() == 32 && size_of::<XattrEntry>() == 16);

/// Name spaces whose name goes on after the prefix.
const PREFIXES: [(&[u8], u8); 3] =
    [(b"user.", INDEX_USER), (b"trusted.", INDEX_TRUSTED), (b"security.", INDEX_SECURITY)];
/// Attributes that are a name space of their own.
const WHOLE: [(&[u8], u8); 3] = [
    (b"system.posix_acl_access", INDEX_POSIX_ACL_ACCESS),
    (b"system.posix_acl_default", INDEX_POSIX_ACL_DEFAULT),
    (b"system.richacl", INDEX_RICHACL),
];

/// Splits a full name into `e_name_index` and the name that is stored; `None` if ext4 cannot hold it.
pub fn split_name(full: &[u8]) -> Option<(u8, &[u8])> {
    if let Some((_, index)) = WHOLE.iter().find(|(name, _)| *name == full) {
        return Some((*index, b""));
    }
    PREFIXES.iter().find_map(|(prefix, index)| {
        full.strip_prefix(*prefix).filter(|rest| !rest.is_empty()).map(|rest| (*index, rest))
    })
}

/// The full name of a stored entry; `None` for name spaces that the system call interface does not show.
pub fn full_name(index: u8, name: &[u8]) -> Option<Vec<u8>> {
    if let Some((whole, _)) = WHOLE.iter().find(|(_, i)| *i == index) {
        return name.is_empty().then(|| whole.to_vec());
    }
    let (prefix, _) = PREFIXES.iter().find(|(_, i)| *i == index)?;
    (!name.is_empty()).then(|| [prefix, name].concat())
}

/// Bytes that an entry with a stored name of `name_len` bytes takes.
pub const fn xattr_entry_size(name_len: usize) -> usize {
    (XATTR_ENTRY_SIZE + name_len + 3) & !3
}

/// Bytes that a value takes.
pub const fn value_size(len: usize) -> usize {
    (len + 3) & !3
}

/// `e_hash`: the stored name, then the value in words (padded with zeros). For a value in its own inode, `words` is the
/// one word [`ea_inode_hash`]. Bytes of the name count as unsigned.
pub fn entry_hash(name: &[u8], words: impl IntoIterator<Item = u32>) -> u32 {
    let hash = name.iter().fold(0u32, |h, &b| h.rotate_left(5) ^ u32::from(b));
    words.into_iter().fold(hash, |h, word| h.rotate_left(16) ^ word)
}

/// The words of a value, for [`entry_hash`].
pub fn value_words(value: &[u8]) -> impl Iterator<Item = u32> + '_ {
    value.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_le_bytes(word)
    })
}

/// `h_hash` of a block: all entries' `e_hash` in order; 0 (never shared) if one of them is 0.
pub fn block_hash(entry_hashes: impl IntoIterator<Item = u32>) -> u32 {
    let mut hash = 0u32;
    for e in entry_hashes {
        if e == 0 {
            return 0;
        }
        hash = hash.rotate_left(16) ^ e;
    }
    hash
}

/// Hash of a value in its own inode; also kept in that inode's `i_atime`.
pub fn ea_inode_hash(fs_seed: u32, value: &[u8]) -> u32 {
    super::checksum::crc32c(fs_seed, value)
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
            assert_eq!(full_name(index, name).as_deref(), Some(full));
        }
        for bad in [&b"user."[..], b"system.data", b"com.apple.x", b"", b"user"] {
            assert_eq!(split_name(bad), None);
        }
        assert_eq!(full_name(INDEX_SYSTEM, b"data"), None);
    }
}
