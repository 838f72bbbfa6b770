//! jbd2's blocks (include/linux/jbd2.h). All fields are **big-endian**, unlike the rest of ext4.
//!
//! ```text
//!  superblock │ descriptor, data…, [revoke], commit │ descriptor, … │ (wraps round to s_first)
//!  every block but data:  JournalHeader (12)
//!  descriptor:            header │ tag (+ uuid 16) … │ tail 4: checksum (features csum_v2, csum_v3)
//!  revoke:                header │ r_count │ block numbers up to byte r_count │ tail 4
//! ```
//!
//! Structures and constants only; [`crate::reader`]'s recovery and [`crate::format`] use them.

use bitflags::bitflags;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    big_endian::{U16, U32},
};

/// `h_magic`.
pub(crate) const JBD2_MAGIC_NUMBER: u32 = 0xC03B_3998;

/// `h_blocktype`: describes the data blocks that follow.
pub(crate) const JBD2_DESCRIPTOR_BLOCK: u32 = 1;
/// `h_blocktype`: ends a transaction.
pub(crate) const JBD2_COMMIT_BLOCK: u32 = 2;
/// `h_blocktype`: the journal's superblock, first version.
pub(crate) const JBD2_SUPERBLOCK_V1: u32 = 3;
/// `h_blocktype`: the journal's superblock, second version.
pub(crate) const JBD2_SUPERBLOCK_V2: u32 = 4;
/// `h_blocktype`: blocks that must not be replayed from earlier transactions.
pub(crate) const JBD2_REVOKE_BLOCK: u32 = 5;

bitflags! {
    /// `s_feature_compat` of the journal.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub(crate) struct JournalCompat: u32 {
        /// A commit block holds a CRC-32 of its transaction (checksums of the first version).
        const JBD2_FEATURE_COMPAT_CHECKSUM = 0x1;
        const _ = !0;
    }

    /// `s_feature_incompat` of the journal.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub(crate) struct JournalIncompat: u32 {
        const JBD2_FEATURE_INCOMPAT_REVOKE = 0x1;
        const JBD2_FEATURE_INCOMPAT_64BIT = 0x2;
        /// Commit blocks may reach the disk before their data.
        const JBD2_FEATURE_INCOMPAT_ASYNC_COMMIT = 0x4;
        /// Checksums, 16 bits for a data block.
        const JBD2_FEATURE_INCOMPAT_CSUM_V2 = 0x8;
        /// Checksums, 32 bits for a data block.
        const JBD2_FEATURE_INCOMPAT_CSUM_V3 = 0x10;
        const JBD2_FEATURE_INCOMPAT_FAST_COMMIT = 0x20;
        const _ = !0;
    }

    /// Flags of a tag.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct TagFlags: u32 {
        /// The data block began with the magic number, which was replaced by zeros.
        const JBD2_FLAG_ESCAPE = 1;
        /// No UUID follows the tag.
        const JBD2_FLAG_SAME_UUID = 2;
        const JBD2_FLAG_DELETED = 4;
        /// The last tag of its descriptor.
        const JBD2_FLAG_LAST_TAG = 8;
        const _ = !0;
    }
}

/// `struct journal_header_s`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct JournalHeader {
    pub(crate) h_magic: U32,
    pub(crate) h_blocktype: U32,
    pub(crate) h_sequence: U32,
}

impl JournalHeader {
    /// The header of a block of type `h_blocktype` in transaction `h_sequence`.
    pub(crate) fn new(h_blocktype: u32, h_sequence: u32) -> Self {
        Self {
            h_magic: U32::new(JBD2_MAGIC_NUMBER),
            h_blocktype: U32::new(h_blocktype),
            h_sequence: U32::new(h_sequence),
        }
    }
}

/// `struct journal_superblock_s`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct JournalSuperblock {
    pub(crate) s_header: JournalHeader,
    pub(crate) s_blocksize: U32,
    pub(crate) s_maxlen: U32,
    pub(crate) s_first: U32,
    pub(crate) s_sequence: U32,
    pub(crate) s_start: U32,
    pub(crate) s_errno: U32,
    pub(crate) s_feature_compat: U32,
    pub(crate) s_feature_incompat: U32,
    pub(crate) s_feature_ro_compat: U32,
    pub(crate) s_uuid: [u8; 16],
    pub(crate) s_nr_users: U32,
    pub(crate) s_dynsuper: U32,
    pub(crate) s_max_transaction: U32,
    pub(crate) s_max_trans_data: U32,
    pub(crate) s_checksum_type: u8,
    pub(crate) s_padding2: [u8; 3],
    pub(crate) s_num_fc_blks: U32,
    pub(crate) s_head: U32,
    pub(crate) s_padding: [U32; 40],
    pub(crate) s_checksum: U32,
    pub(crate) s_users: [u8; 768],
}

/// `struct journal_block_tag_s`; `t_blocknr_high` is there with feature 64bit only, and csum_v2 adds two bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct JournalBlockTag {
    pub(crate) t_blocknr: U32,
    pub(crate) t_checksum: U16,
    pub(crate) t_flags: U16,
    pub(crate) t_blocknr_high: U32,
}

/// `struct journal_block_tag3_s` (feature csum_v3).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct JournalBlockTag3 {
    pub(crate) t_blocknr: U32,
    pub(crate) t_flags: U32,
    pub(crate) t_blocknr_high: U32,
    pub(crate) t_checksum: U32,
}

/// `struct commit_header`, up to its first checksum.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct CommitHeader {
    pub(crate) h_header: JournalHeader,
    pub(crate) h_chksum_type: u8,
    pub(crate) h_chksum_size: u8,
    pub(crate) h_padding: [u8; 2],
    pub(crate) h_chksum: U32,
}

/// `struct jbd2_journal_revoke_header_s`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RevokeHeader {
    pub(crate) r_header: JournalHeader,
    /// Bytes used in the block, the header included.
    pub(crate) r_count: U32,
}

/// Bytes of the UUID after a tag without [`TagFlags::JBD2_FLAG_SAME_UUID`].
pub(crate) const TAG_UUID_SIZE: usize = 16;
/// `struct jbd2_journal_block_tail`: the checksum at the end of descriptor and revoke blocks.
pub(crate) const BLOCK_TAIL_SIZE: usize = 4;
/// `h_chksum_type`.
pub(crate) const JBD2_CRC32_CHKSUM: u8 = 1;
/// `h_chksum_size` of a CRC-32.
pub(crate) const JBD2_CRC32_CHKSUM_SIZE: u8 = 4;

const _: () = assert!(
    size_of::<JournalSuperblock>() == 1024
        && size_of::<JournalBlockTag>() == 12
        && size_of::<JournalBlockTag3>() == 16
        && size_of::<CommitHeader>() == 20
        && size_of::<RevokeHeader>() == 16
);

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn fields_are_where_the_kernel_puts_them() {
        assert_eq!(offset_of!(JournalSuperblock, s_maxlen), 0x10);
        assert_eq!(offset_of!(JournalSuperblock, s_start), 0x1C);
        assert_eq!(offset_of!(JournalSuperblock, s_feature_incompat), 0x28);
        assert_eq!(offset_of!(JournalSuperblock, s_uuid), 0x30);
        assert_eq!(offset_of!(JournalSuperblock, s_nr_users), 0x40);
        assert_eq!(offset_of!(JournalSuperblock, s_checksum), 0xFC);
        assert_eq!(offset_of!(CommitHeader, h_chksum), 16);
    }
}
