//! Inodes: 160 known bytes of a slot of 256 or 512.
#![expect(missing_docs, reason = "fields bear the kernel's names; Documentation/filesystems/ext4/inodes.rst")]

use super::checksum::{crc32c, crc32c_without, inode_seed};
use bitflags::bitflags;
use std::mem::offset_of;
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32},
};

/// Size of the part that every ext4 has (`EXT4_GOOD_OLD_INODE_SIZE`).
pub(crate) const EXT4_GOOD_OLD_INODE_SIZE: usize = 128;
/// Size of `i_block`.
pub(crate) const I_BLOCK_SIZE: usize = 60;
/// `i_extra_isize` up to and with `i_crtime_extra`: all that this crate writes.
pub(crate) const EXTRA_ISIZE: u16 = 24;

/// File type bits of `i_mode`.
pub(crate) const S_IFMT: u16 = 0o170_000;
pub(crate) const S_IFSOCK: u16 = 0o140_000;
pub(crate) const S_IFLNK: u16 = 0o120_000;
pub(crate) const S_IFREG: u16 = 0o100_000;
pub(crate) const S_IFBLK: u16 = 0o060_000;
pub(crate) const S_IFDIR: u16 = 0o040_000;
pub(crate) const S_IFCHR: u16 = 0o020_000;
pub(crate) const S_IFIFO: u16 = 0o010_000;

bitflags! {
    /// `i_flags`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct InodeFlags: u32 {
        const EXT4_SECRM_FL = 0x1;
        const EXT4_UNRM_FL = 0x2;
        const EXT4_COMPR_FL = 0x4;
        const EXT4_SYNC_FL = 0x8;
        const EXT4_IMMUTABLE_FL = 0x10;
        const EXT4_APPEND_FL = 0x20;
        const EXT4_NODUMP_FL = 0x40;
        const EXT4_NOATIME_FL = 0x80;
        const EXT4_ENCRYPT_FL = 0x800;
        const EXT4_INDEX_FL = 0x1000;
        const EXT4_JOURNAL_DATA_FL = 0x4000;
        const EXT4_NOTAIL_FL = 0x8000;
        const EXT4_DIRSYNC_FL = 0x1_0000;
        const EXT4_TOPDIR_FL = 0x2_0000;
        const EXT4_HUGE_FILE_FL = 0x4_0000;
        const EXT4_EXTENTS_FL = 0x8_0000;
        const EXT4_VERITY_FL = 0x10_0000;
        const EXT4_EA_INODE_FL = 0x20_0000;
        const EXT4_DAX_FL = 0x200_0000;
        const EXT4_INLINE_DATA_FL = 0x1000_0000;
        const EXT4_PROJINHERIT_FL = 0x2000_0000;
        const EXT4_CASEFOLD_FL = 0x4000_0000;
        const _ = !0;
    }
}

/// `struct ext4_inode`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawInode {
    pub(crate) i_mode: U16,
    pub(crate) i_uid: U16,
    pub(crate) i_size_lo: U32,
    pub(crate) i_atime: U32,
    pub(crate) i_ctime: U32,
    pub(crate) i_mtime: U32,
    pub(crate) i_dtime: U32,
    pub(crate) i_gid: U16,
    pub(crate) i_links_count: U16,
    pub(crate) i_blocks_lo: U32,
    pub(crate) i_flags: U32,
    pub(crate) i_version: U32,
    pub(crate) i_block: [u8; I_BLOCK_SIZE],
    pub(crate) i_generation: U32,
    pub(crate) i_file_acl_lo: U32,
    pub(crate) i_size_high: U32,
    pub(crate) i_obso_faddr: U32,
    pub(crate) i_blocks_high: U16,
    pub(crate) i_file_acl_high: U16,
    pub(crate) i_uid_high: U16,
    pub(crate) i_gid_high: U16,
    pub(crate) i_checksum_lo: U16,
    pub(crate) i_reserved: U16,
    pub(crate) i_extra_isize: U16,
    pub(crate) i_checksum_hi: U16,
    pub(crate) i_ctime_extra: U32,
    pub(crate) i_mtime_extra: U32,
    pub(crate) i_atime_extra: U32,
    pub(crate) i_crtime: U32,
    pub(crate) i_crtime_extra: U32,
    pub(crate) i_version_hi: U32,
    pub(crate) i_projid: U32,
}

/// Bytes of an inode that [`RawInode`] names.
pub(crate) const RAW_INODE_SIZE: usize = size_of::<RawInode>();
const _: () = assert!(RAW_INODE_SIZE == 160);

impl RawInode {
    /// The known fields of an inode in its slot on disk. Those beyond `i_extra_isize` are zero, and so are all that lie
    /// outside a slot that is too short.
    pub(crate) fn from_slot(slot: &[u8]) -> Self {
        let mut raw = Self::new_zeroed();
        let extra_end = offset_of!(Self, i_extra_isize) + 2;
        let known = match slot.get(EXT4_GOOD_OLD_INODE_SIZE..extra_end) {
            Some(field) => {
                EXT4_GOOD_OLD_INODE_SIZE + usize::from(u16::from_le_bytes([field[0], field[1]])).max(2)
            }
            None => EXT4_GOOD_OLD_INODE_SIZE,
        };
        let n = known.min(slot.len()).min(RAW_INODE_SIZE);
        raw.as_mut_bytes()[..n].copy_from_slice(&slot[..n]);
        raw
    }

    /// Whether the fields up to `end` bytes after the first 128 are in use.
    pub(crate) fn has_extra(&self, end: usize) -> bool {
        usize::from(self.i_extra_isize.get()) >= end
    }

    /// Whether `i_checksum_hi` is in use.
    pub(crate) fn has_checksum_hi(&self) -> bool {
        self.has_extra(4)
    }

    /// `i_blocks` of both halves, in units of 512 bytes (of blocks with flag `EXT4_HUGE_FILE_FL`).
    pub(crate) fn blocks(&self) -> u64 {
        u64::from(self.i_blocks_lo.get()) | u64::from(self.i_blocks_high.get()) << 32
    }

    /// `i_version` of both halves.
    pub(crate) fn version(&self) -> u64 {
        u64::from(self.i_version.get()) | u64::from(self.i_version_hi.get()) << 32
    }

    /// The 32-bit words of `i_block`.
    pub(crate) fn i_block_words(&self) -> [u32; I_BLOCK_SIZE / 4] {
        let mut words = [0; I_BLOCK_SIZE / 4];
        for (word, bytes) in words.iter_mut().zip(self.i_block.chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        words
    }

    /// `i_size` of both halves.
    pub(crate) fn size(&self) -> u64 {
        u64::from(self.i_size_lo.get()) | u64::from(self.i_size_high.get()) << 32
    }

    /// Sets both halves of `i_size`.
    pub(crate) fn set_size(&mut self, bytes: u64) {
        self.i_size_lo.set(bytes as u32);
        self.i_size_high.set((bytes >> 32) as u32);
    }

    /// Sets both halves of user and group id.
    pub(crate) fn set_owner(&mut self, uid: u32, gid: u32) {
        self.i_uid.set(uid as u16);
        self.i_uid_high.set((uid >> 16) as u16);
        self.i_gid.set(gid as u16);
        self.i_gid_high.set((gid >> 16) as u16);
    }

    /// `i_file_acl` of both halves: the block of extended attributes, 0 if there is none.
    pub(crate) fn file_acl(&self) -> u64 {
        u64::from(self.i_file_acl_lo.get()) | u64::from(self.i_file_acl_high.get()) << 32
    }

    /// User id of both halves.
    pub(crate) fn uid(&self) -> u32 {
        u32::from(self.i_uid.get()) | u32::from(self.i_uid_high.get()) << 16
    }

    /// Group id of both halves.
    pub(crate) fn gid(&self) -> u32 {
        u32::from(self.i_gid.get()) | u32::from(self.i_gid_high.get()) << 16
    }

    /// `i_flags`; unknown bits are kept.
    pub(crate) fn flags(&self) -> InodeFlags {
        InodeFlags::from_bits_retain(self.i_flags.get())
    }

    /// `i_checksum` of both halves.
    pub(crate) fn checksum(&self) -> u32 {
        u32::from(self.i_checksum_lo.get()) | u32::from(self.i_checksum_hi.get()) << 16
    }
}

/// The checksum of inode `ino` in its whole `slot` (`s_inode_size` bytes, at least 128); the stored checksum is left out
/// of the sum. The high half counts only if `i_extra_isize` reaches it (4 or more).
pub(crate) fn inode_checksum(fs_seed: u32, ino: u32, slot: &[u8]) -> u32 {
    const LO: usize = offset_of!(RawInode, i_checksum_lo);
    const HI: usize = offset_of!(RawInode, i_checksum_hi) - EXT4_GOOD_OLD_INODE_SIZE;
    let (old, extra) = slot.split_at(slot.len().min(EXT4_GOOD_OLD_INODE_SIZE));
    let raw = RawInode::from_slot(slot);
    let sum = crc32c_without(inode_seed(fs_seed, ino, raw.i_generation.get()), old, LO, 2);
    if raw.has_checksum_hi() { crc32c_without(sum, extra, HI, 2) } else { crc32c(sum, extra) & 0xffff }
}

/// Stores the checksum of inode `ino` in its slot (`i_extra_isize` at least 4), and gives it.
pub(crate) fn seal_inode(fs_seed: u32, ino: u32, slot: &mut [u8]) -> u32 {
    const LO: usize = offset_of!(RawInode, i_checksum_lo);
    const HI: usize = offset_of!(RawInode, i_checksum_hi);
    let sum = inode_checksum(fs_seed, ino, slot);
    let bytes = sum.to_le_bytes();
    slot[LO..LO + 2].copy_from_slice(&bytes[..2]);
    slot[HI..HI + 2].copy_from_slice(&bytes[2..]);
    sum
}

/// The two words of `i_block` that hold a device number, or `None` if it is out of range (major 12 bits, minor 20).
pub(crate) fn encode_device(major: u32, minor: u32) -> Option<[u32; 2]> {
    match (major, minor) {
        (0..=0xff, 0..=0xff) => Some([major << 8 | minor, 0]),
        (0..=0xfff, 0..=0xf_ffff) => Some(encode_large_device(major, minor)),
        _ => None,
    }
}

/// As [`encode_device`], in the form for large numbers, which the kernel reads for all. Major below 2^12, minor below
/// 2^20.
pub(crate) fn encode_large_device(major: u32, minor: u32) -> [u32; 2] {
    [0, minor & 0xff | major << 8 | (minor & !0xff) << 12]
}

/// Major and minor number from the first two words of `i_block` (`ext4_iget`, `new_decode_dev`).
pub(crate) fn decode_device(words: [u32; 2]) -> (u32, u32) {
    match words {
        [0, new] => (new >> 8 & 0xfff, new & 0xff | new >> 12 & 0xf_ff00),
        [old, _] => (old >> 8 & 0xff, old & 0xff),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn fields_are_where_the_kernel_puts_them() {
        assert_eq!(offset_of!(RawInode, i_block), 0x28);
        assert_eq!(offset_of!(RawInode, i_generation), 0x64);
        assert_eq!(offset_of!(RawInode, i_checksum_lo), 0x7C);
        assert_eq!(offset_of!(RawInode, i_extra_isize), 0x80);
        assert_eq!(offset_of!(RawInode, i_checksum_hi), 0x82);
        assert_eq!(offset_of!(RawInode, i_projid), 0x9C);
    }

    #[test]
    fn device_numbers_in_both_forms() {
        for (major, minor) in
            [(0, 0), (1, 3), (255, 255), (256, 0), (8, 256), (0xfff, 0xf_ffff), (0, 0x12345)]
        {
            let words = encode_device(major, minor).unwrap();
            assert_eq!(decode_device(words), (major, minor));
        }
        assert_eq!(encode_device(0x1000, 0), None);
        assert_eq!(encode_device(0, 0x10_0000), None);
    }
}
