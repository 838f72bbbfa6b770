//! Directory blocks: linear entries, their checksum tail, and the nodes of the hash tree.
//!
//! ```text
//!   leaf   entry entry … entry(rec_len reaches the tail) │ tail 12: 0, 12, 0, 0xDE, crc
//!   root   "." (12) ".." (rec_len = rest) │ info 8 │ limit,count,block │ (hash, block) … │ tail 8
//!   node   fake entry 8 (inode 0, rec_len = block) │ limit,count,block │ (hash, block) … │ tail 8
//!   inline i_block: parent u32, entries in 56 bytes; then entries in the value of system.data
//! ```
#![expect(missing_docs, reason = "fields bear the kernel's names; fs/ext4/ext4.h and namei.c")]

use super::{
    checksum::crc32c,
    inode::{S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK},
};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32},
};

/// `file_type` values.
pub const FT_UNKNOWN: u8 = 0;
pub const FT_REG_FILE: u8 = 1;
pub const FT_DIR: u8 = 2;
pub const FT_CHRDEV: u8 = 3;
pub const FT_BLKDEV: u8 = 4;
pub const FT_FIFO: u8 = 5;
pub const FT_SOCK: u8 = 6;
pub const FT_SYMLINK: u8 = 7;
/// `file_type` of the checksum tail.
pub const FT_DIR_CSUM: u8 = 0xDE;

/// `file_type` of the entries of an inode with this `i_mode`.
pub fn file_type(mode: u16) -> u8 {
    match mode & S_IFMT {
        S_IFREG => FT_REG_FILE,
        S_IFDIR => FT_DIR,
        S_IFCHR => FT_CHRDEV,
        S_IFBLK => FT_BLKDEV,
        S_IFIFO => FT_FIFO,
        S_IFSOCK => FT_SOCK,
        S_IFLNK => FT_SYMLINK,
        _ => FT_UNKNOWN,
    }
}

/// Fixed part of an entry; the name follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DirEntryHead {
    pub inode: U32,
    pub rec_len: U16,
    pub name_len: u8,
    pub file_type: u8,
}

/// `struct ext4_dir_entry_tail`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DirTail {
    pub det_reserved_zero1: U32,
    pub det_rec_len: U16,
    pub det_reserved_zero2: u8,
    pub det_reserved_ft: u8,
    pub det_checksum: U32,
}

/// `struct dx_root_info`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DxRootInfo {
    pub reserved_zero: U32,
    pub hash_version: u8,
    pub info_length: u8,
    pub indirect_levels: u8,
    pub unused_flags: u8,
}

/// `struct dx_entry`; the first one's `hash` is overlaid by limit and count.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DxEntry {
    pub hash: U32,
    pub block: U32,
}

/// Size of the fixed part of an entry.
pub const HEAD_SIZE: usize = size_of::<DirEntryHead>();
/// Size of the checksum tail of a leaf.
pub const DIR_TAIL_SIZE: usize = size_of::<DirTail>();
/// Size of the checksum tail of a hash tree node.
pub const DX_TAIL_SIZE: usize = 8;
/// Size of a hash tree entry.
pub const DX_ENTRY_SIZE: usize = size_of::<DxEntry>();
/// Where the entries of a hash tree root begin (after ".", ".." and the info).
pub const DX_ROOT_OFFSET: usize = 32;
/// Where the entries of an inner hash tree node begin.
pub const DX_NODE_OFFSET: usize = 8;
const _: () = assert!(HEAD_SIZE == 8 && DIR_TAIL_SIZE == 12 && size_of::<DxRootInfo>() == 8);

/// Bytes that an entry with a name of `name_len` bytes needs.
pub const fn entry_size(name_len: usize) -> usize {
    (HEAD_SIZE + name_len + 3) & !3
}

/// Entries that a hash tree node takes whose entries begin at `offset`.
pub const fn dx_limit(block_size: usize, offset: usize) -> usize {
    (block_size - offset - DX_TAIL_SIZE) / DX_ENTRY_SIZE
}

/// Writes one entry at the start of `out`, which must hold `rec_len` bytes.
pub fn put_entry(out: &mut [u8], ino: u32, rec_len: usize, name: &[u8], file_type: u8) {
    let head = DirEntryHead {
        inode: U32::new(ino),
        rec_len: U16::new(rec_len as u16),
        name_len: name.len() as u8,
        file_type,
    };
    out[..HEAD_SIZE].copy_from_slice(head.as_bytes());
    out[HEAD_SIZE..HEAD_SIZE + name.len()].copy_from_slice(name);
}

/// Checksum of a leaf block.
pub fn leaf_checksum(inode_seed: u32, block: &[u8]) -> u32 {
    crc32c(inode_seed, &block[..block.len() - DIR_TAIL_SIZE])
}

/// Writes the tail of a leaf block.
pub fn seal_leaf(inode_seed: u32, block: &mut [u8]) {
    let tail = DirTail {
        det_reserved_zero1: U32::ZERO,
        det_rec_len: U16::new(DIR_TAIL_SIZE as u16),
        det_reserved_zero2: 0,
        det_reserved_ft: FT_DIR_CSUM,
        det_checksum: U32::new(leaf_checksum(inode_seed, block)),
    };
    let at = block.len() - DIR_TAIL_SIZE;
    block[at..].copy_from_slice(tail.as_bytes());
}

/// Checksum of a hash tree node with `count` entries from `offset`, whose tail's reserved word is `reserved`.
pub fn dx_checksum(inode_seed: u32, block: &[u8], offset: usize, count: usize, reserved: [u8; 4]) -> u32 {
    let sum = crc32c(inode_seed, &block[..offset + count * DX_ENTRY_SIZE]);
    crc32c(crc32c(sum, &reserved), &[0; 4])
}

/// Writes limit and count and the tail of a hash tree node whose entries begin at `offset`.
pub fn seal_dx(inode_seed: u32, block: &mut [u8], offset: usize, count: usize) {
    let limit = dx_limit(block.len(), offset);
    block[offset..offset + 2].copy_from_slice(&(limit as u16).to_le_bytes());
    block[offset + 2..offset + 4].copy_from_slice(&(count as u16).to_le_bytes());
    let sum = dx_checksum(inode_seed, block, offset, count, [0; 4]);
    let tail = offset + limit * DX_ENTRY_SIZE;
    block[tail..tail + 4].fill(0);
    block[tail + 4..tail + 8].copy_from_slice(&sum.to_le_bytes());
}
