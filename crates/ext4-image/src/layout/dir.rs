//! Directory blocks: linear entries, their checksum tail, and the nodes of the hash tree.
//!
//! ```text
//!   leaf   entry entry … entry(rec_len reaches the tail) │ tail 12: 0, 12, 0, 0xDE, crc
//!   root   "." (12) ".." (rec_len = rest) │ info 8 │ limit,count,block │ (hash, block) … │ tail 8
//!   node   fake entry 8 (inode 0, rec_len = block) │ limit,count,block │ (hash, block) … │ tail 8
//!   inline i_block: parent u32, entries in 56 bytes; then entries in the value of system.data
//! ```

use super::{
    checksum::crc32c,
    inode::{S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK},
};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32},
};

/// `file_type` values.
pub(crate) const EXT4_FT_UNKNOWN: u8 = 0;
pub(crate) const EXT4_FT_REG_FILE: u8 = 1;
pub(crate) const EXT4_FT_DIR: u8 = 2;
pub(crate) const EXT4_FT_CHRDEV: u8 = 3;
pub(crate) const EXT4_FT_BLKDEV: u8 = 4;
pub(crate) const EXT4_FT_FIFO: u8 = 5;
pub(crate) const EXT4_FT_SOCK: u8 = 6;
pub(crate) const EXT4_FT_SYMLINK: u8 = 7;
/// `file_type` of the checksum tail.
pub(crate) const EXT4_FT_DIR_CSUM: u8 = 0xDE;

/// `file_type` of the entries of an inode with this `i_mode`.
pub(crate) fn file_type(mode: u16) -> u8 {
    match mode & S_IFMT {
        S_IFREG => EXT4_FT_REG_FILE,
        S_IFDIR => EXT4_FT_DIR,
        S_IFCHR => EXT4_FT_CHRDEV,
        S_IFBLK => EXT4_FT_BLKDEV,
        S_IFIFO => EXT4_FT_FIFO,
        S_IFSOCK => EXT4_FT_SOCK,
        S_IFLNK => EXT4_FT_SYMLINK,
        _ => EXT4_FT_UNKNOWN,
    }
}

/// Fixed part of an entry; the name follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct DirEntryHead {
    pub(crate) inode: U32,
    pub(crate) rec_len: U16,
    pub(crate) name_len: u8,
    pub(crate) file_type: u8,
}

/// `struct ext4_dir_entry_tail`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct DirTail {
    pub(crate) det_reserved_zero1: U32,
    pub(crate) det_rec_len: U16,
    pub(crate) det_reserved_zero2: u8,
    pub(crate) det_reserved_ft: u8,
    pub(crate) det_checksum: U32,
}

/// `struct dx_root_info`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct DxRootInfo {
    pub(crate) reserved_zero: U32,
    pub(crate) hash_version: u8,
    pub(crate) info_length: u8,
    pub(crate) indirect_levels: u8,
    pub(crate) unused_flags: u8,
}

/// `struct dx_entry`; the first one's `hash` is overlaid by limit and count.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct DxEntry {
    pub(crate) hash: U32,
    pub(crate) block: U32,
}

/// `struct dx_tail`, the checksum after the entries of a hash tree node.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct DxTail {
    pub(crate) dt_reserved: U32,
    pub(crate) dt_checksum: U32,
}

/// Size of the fixed part of an entry.
pub(crate) const HEAD_SIZE: usize = size_of::<DirEntryHead>();
/// Size of the checksum tail of a leaf.
pub(crate) const DIR_TAIL_SIZE: usize = size_of::<DirTail>();
/// Size of the checksum tail of a hash tree node.
pub(crate) const DX_TAIL_SIZE: usize = size_of::<DxTail>();
/// Size of a hash tree entry.
pub(crate) const DX_ENTRY_SIZE: usize = size_of::<DxEntry>();
/// Size of the parent's number, with which an inline directory begins (`EXT4_INLINE_DOTDOT_SIZE`).
pub(crate) const INLINE_DOTDOT_SIZE: usize = 4;
/// Where the entries of a hash tree root begin (after ".", ".." and the info).
pub(crate) const DX_ROOT_OFFSET: usize = 32;
/// Where the entries of an inner hash tree node begin.
pub(crate) const DX_NODE_OFFSET: usize = 8;
const _: () = assert!(HEAD_SIZE == 8 && DIR_TAIL_SIZE == 12 && size_of::<DxRootInfo>() == 8);

/// Bytes that an entry with a name of `name_len` bytes needs.
pub(crate) const fn entry_size(name_len: usize) -> usize {
    (HEAD_SIZE + name_len + 3) & !3
}

/// Entries that a hash tree node takes whose entries begin at `offset`.
pub(crate) const fn dx_limit(block_size: usize, offset: usize) -> usize {
    (block_size - offset - DX_TAIL_SIZE) / DX_ENTRY_SIZE
}

/// Writes one entry at the start of `out`, which must hold `rec_len` bytes.
pub(crate) fn put_entry(out: &mut [u8], ino: u32, rec_len: usize, name: &[u8], file_type: u8) {
    let head = DirEntryHead {
        inode: U32::new(ino),
        rec_len: U16::new(rec_len as u16),
        name_len: name.len() as u8,
        file_type,
    };
    out[..HEAD_SIZE].copy_from_slice(head.as_bytes());
    out[HEAD_SIZE..HEAD_SIZE + name.len()].copy_from_slice(name);
}

/// The checksum tail of a leaf block, if it has one.
pub(crate) fn leaf_tail(block: &[u8]) -> Option<&DirTail> {
    let (_, tail) = DirTail::ref_from_suffix(block).ok()?;
    let fits = tail.det_reserved_zero1 == U32::ZERO
        && usize::from(tail.det_rec_len.get()) == DIR_TAIL_SIZE
        && tail.det_reserved_zero2 == 0
        && tail.det_reserved_ft == EXT4_FT_DIR_CSUM;
    fits.then_some(tail)
}

/// Whether a leaf block has a tail with the right checksum.
pub(crate) fn leaf_checksum_matches(inode_seed: u32, block: &[u8]) -> bool {
    leaf_tail(block).is_some_and(|tail| leaf_checksum(inode_seed, block) == tail.det_checksum.get())
}

/// Whether a hash tree node whose entries begin at `offset` has the right checksum.
pub(crate) fn dx_checksum_matches(inode_seed: u32, block: &[u8], offset: usize) -> bool {
    let Some((limit, count)) = dx_countlimit(block, offset) else { return false };
    let tail = block.get(offset + limit * DX_ENTRY_SIZE..).map(DxTail::ref_from_prefix);
    let Some(Ok((tail, _))) = tail else { return false };
    count <= limit
        && dx_checksum(inode_seed, block, offset, count, tail.dt_reserved) == tail.dt_checksum.get()
}

/// `limit` and `count` of a hash tree node whose entries begin at `offset` (`struct dx_countlimit`).
pub(crate) fn dx_countlimit(block: &[u8], offset: usize) -> Option<(usize, usize)> {
    let [a, b, c, d] = *block.get(offset..)?.first_chunk()?;
    Some((u16::from_le_bytes([a, b]).into(), u16::from_le_bytes([c, d]).into()))
}

/// The entries of a hash tree node; the hash of the first one is not one.
pub(crate) fn dx_entries(block: &[u8], offset: usize, count: usize) -> Option<&[DxEntry]> {
    <[DxEntry]>::ref_from_prefix_with_elems(block.get(offset..)?, count).ok().map(|(entries, _)| entries)
}

/// Checksum of a leaf block.
fn leaf_checksum(inode_seed: u32, block: &[u8]) -> u32 {
    crc32c(inode_seed, &block[..block.len() - DIR_TAIL_SIZE])
}

/// Writes the tail of a leaf block.
pub(crate) fn seal_leaf(inode_seed: u32, block: &mut [u8]) {
    let tail = DirTail {
        det_reserved_zero1: U32::ZERO,
        det_rec_len: U16::new(DIR_TAIL_SIZE as u16),
        det_reserved_zero2: 0,
        det_reserved_ft: EXT4_FT_DIR_CSUM,
        det_checksum: U32::new(leaf_checksum(inode_seed, block)),
    };
    let at = block.len() - DIR_TAIL_SIZE;
    block[at..].copy_from_slice(tail.as_bytes());
}

/// Checksum of a hash tree node with `count` entries from `offset`, with `dt_reserved` of its tail.
fn dx_checksum(inode_seed: u32, block: &[u8], offset: usize, count: usize, dt_reserved: U32) -> u32 {
    let sum = crc32c(inode_seed, &block[..offset + count * DX_ENTRY_SIZE]);
    crc32c(crc32c(sum, dt_reserved.as_bytes()), &[0; 4])
}

/// Writes limit and count and the tail of a hash tree node whose entries begin at `offset`.
pub(crate) fn seal_dx(inode_seed: u32, block: &mut [u8], offset: usize, count: usize) {
    let limit = dx_limit(block.len(), offset);
    block[offset..offset + 2].copy_from_slice(&(limit as u16).to_le_bytes());
    block[offset + 2..offset + 4].copy_from_slice(&(count as u16).to_le_bytes());
    let sum = dx_checksum(inode_seed, block, offset, count, U32::ZERO);
    let tail = DxTail { dt_reserved: U32::ZERO, dt_checksum: U32::new(sum) };
    let at = offset + limit * DX_ENTRY_SIZE;
    block[at..at + DX_TAIL_SIZE].copy_from_slice(tail.as_bytes());
}
