//! Inodes: 160 known bytes of a slot of 256 or 512.
#![expect(missing_docs, reason = "fields bear the kernel's names; Documentation/filesystems/ext4/inodes.rst")]

use super::checksum::{crc32c, inode_seed};
use bitflags::bitflags;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32},
};

/// Size of the part that every ext4 has (`EXT4_GOOD_OLD_INODE_SIZE`).
pub const GOOD_OLD_SIZE: usize = 128;
/// Size of `i_block`.
pub const I_BLOCK_SIZE: usize = 60;
/// `i_extra_isize` up to and with `i_crtime_extra`: all that this crate writes.
pub const EXTRA_ISIZE: u16 = 24;

/// File type bits of `i_mode`.
pub const S_IFMT: u16 = 0o170_000;
pub const S_IFSOCK: u16 = 0o140_000;
pub const S_IFLNK: u16 = 0o120_000;
pub const S_IFREG: u16 = 0o100_000;
pub const S_IFBLK: u16 = 0o060_000;
pub const S_IFDIR: u16 = 0o040_000;
pub const S_IFCHR: u16 = 0o020_000;
pub const S_IFIFO: u16 = 0o010_000;

bitflags! {
    /// `i_flags`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct InodeFlags: u32 {
        const SECRM = 0x1;
        const UNRM = 0x2;
        const COMPR = 0x4;
        const SYNC = 0x8;
        const IMMUTABLE = 0x10;
        const APPEND = 0x20;
        const NODUMP = 0x40;
        const NOATIME = 0x80;
        const ENCRYPT = 0x800;
        const INDEX = 0x1000;
        const JOURNAL_DATA = 0x4000;
        const NOTAIL = 0x8000;
        const DIRSYNC = 0x1_0000;
        const TOPDIR = 0x2_0000;
        const HUGE_FILE = 0x4_0000;
        const EXTENTS = 0x8_0000;
        const VERITY = 0x10_0000;
        const EA_INODE = 0x20_0000;
        const DAX = 0x200_0000;
        const INLINE_DATA = 0x1000_0000;
        const PROJINHERIT = 0x2000_0000;
        const CASEFOLD = 0x4000_0000;
        const _ = !0;
    }
}

/// `struct ext4_inode`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawInode {
    pub i_mode: U16,
    pub i_uid: U16,
    pub i_size_lo: U32,
    pub i_atime: U32,
    pub i_ctime: U32,
    pub i_mtime: U32,
    pub i_dtime: U32,
    pub i_gid: U16,
    pub i_links_count: U16,
    pub i_blocks_lo: U32,
    pub i_flags: U32,
    pub i_version: U32,
    pub i_block: [u8; I_BLOCK_SIZE],
    pub i_generation: U32,
    pub i_file_acl_lo: U32,
    pub i_size_high: U32,
    pub i_obso_faddr: U32,
    pub i_blocks_high: U16,
    pub i_file_acl_high: U16,
    pub i_uid_high: U16,
    pub i_gid_high: U16,
    pub i_checksum_lo: U16,
    pub i_reserved: U16,
    pub i_extra_isize: U16,
    pub i_checksum_hi: U16,
    pub i_ctime_extra: U32,
    pub i_mtime_extra: U32,
    pub i_atime_extra: U32,
    pub i_crtime: U32,
    pub i_crtime_extra: U32,
    pub i_version_hi: U32,
    pub i_projid: U32,
}

/// Bytes of an inode that [`RawInode`] names.
pub const RAW_INODE_SIZE: usize = size_of::<RawInode>();
const _: () = assert!(RAW_INODE_SIZE == 160);

impl RawInode {
    /// `i_size` of both halves.
    pub fn size(&self) -> u64 {
        u64::from(self.i_size_lo.get()) | u64::from(self.i_size_high.get()) << 32
    }

    /// Sets both halves of `i_size`.
    pub fn set_size(&mut self, bytes: u64) {
        self.i_size_lo.set(bytes as u32);
        self.i_size_high.set((bytes >> 32) as u32);
    }

    /// Sets both halves of user and group id.
    pub fn set_owner(&mut self, uid: u32, gid: u32) {
        self.i_uid.set(uid as u16);
        self.i_uid_high.set((uid >> 16) as u16);
        self.i_gid.set(gid as u16);
        self.i_gid_high.set((gid >> 16) as u16);
    }

    /// `i_file_acl` of both halves: the block of extended attributes, 0 if there is none.
    pub fn file_acl(&self) -> u64 {
        u64::from(self.i_file_acl_lo.get()) | u64::from(self.i_file_acl_high.get()) << 32
    }

    /// User id of both halves.
    pub fn uid(&self) -> u32 {
        u32::from(self.i_uid.get()) | u32::from(self.i_uid_high.get()) << 16
    }

    /// Group id of both halves.
    pub fn gid(&self) -> u32 {
        u32::from(self.i_gid.get()) | u32::from(self.i_gid_high.get()) << 16
    }

    /// `i_flags`; unknown bits are kept.
    pub fn flags(&self) -> InodeFlags {
        InodeFlags::from_bits_retain(self.i_flags.get())
    }

    /// `i_checksum` of both halves.
    pub fn checksum(&self) -> u32 {
        u32::from(self.i_checksum_lo.get()) | u32::from(self.i_checksum_hi.get()) << 16
    }
}

/// The checksum of inode `ino` in its whole `slot` (`s_inode_size` bytes, at least 160); the stored checksum is left out
/// of the sum. The high half counts only if `i_extra_isize` reaches it (4 or more).
pub fn inode_checksum(fs_seed: u32, ino: u32, slot: &[u8]) -> u32 {
    const LO: usize = 0x7C;
    const HI: usize = 0x82;
    let generation = u32::from_le_bytes([slot[0x64], slot[0x65], slot[0x66], slot[0x67]]);
    let extra = u16::from_le_bytes([slot[0x80], slot[0x81]]);
    let mut sum = inode_seed(fs_seed, ino, generation);
    sum = crc32c(sum, &slot[..LO]);
    sum = crc32c(sum, &[0; 2]);
    sum = crc32c(sum, &slot[LO + 2..GOOD_OLD_SIZE]);
    sum = crc32c(sum, &slot[GOOD_OLD_SIZE..HI]);
    if extra >= 4 {
        sum = crc32c(sum, &[0; 2]);
        return crc32c(sum, &slot[HI + 2..]);
    }
    crc32c(sum, &slot[HI..]) & 0xffff
}

/// Stores the checksum of inode `ino` in its slot (`i_extra_isize` at least 4).
pub fn seal_inode(fs_seed: u32, ino: u32, slot: &mut [u8]) {
    let sum = inode_checksum(fs_seed, ino, slot).to_le_bytes();
    slot[0x7C..0x7E].copy_from_slice(&sum[..2]);
    slot[0x82..0x84].copy_from_slice(&sum[2..]);
}

/// The two words of `i_block` that hold a device number, or `None` if it is out of range (major 12 bits, minor 20).
pub fn encode_device(major: u32, minor: u32) -> Option<[u32; 2]> {
    match (major, minor) {
        (0..=0xff, 0..=0xff) => Some([major << 8 | minor, 0]),
        (0..=0xfff, 0..=0xf_ffff) => Some(encode_large_device(major, minor)),
        _ => None,
    }
}

/// As [`encode_device`], in the form for large numbers, which the kernel reads for all. Major below 2^12, minor below
/// 2^20.
pub fn encode_large_device(major: u32, minor: u32) -> [u32; 2] {
    [0, minor & 0xff | major << 8 | (minor & !0xff) << 12]
}

/// Major and minor number from the first two words of `i_block`.
pub fn decode_device(words: [u32; 2]) -> (u32, u32) {
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
    fn fields_stand_where_the_kernel_puts_them() {
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
