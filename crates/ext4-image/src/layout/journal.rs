//! jbd2's blocks (include/linux/jbd2.h). All fields are **big-endian**, unlike the rest of ext4.
//!
//! ```text
//!  superblock │ descriptor, data…, [revoke], commit │ descriptor, … │ (wraps round to s_first)
//!  header:      h_magic  h_blocktype  h_sequence
//!  descriptor:  header │ tag (+ uuid) … │ checksum of the block in its last 4 bytes
//! ```
//!
//! Constants and places of fields only; [`crate::reader`]'s recovery reads them.

/// `JBD2_MAGIC_NUMBER`.
pub const MAGIC: u32 = 0xC03B_3998;

/// `h_blocktype`.
pub mod block_type {
    /// Describes the data blocks that follow.
    pub const DESCRIPTOR: u32 = 1;
    /// Ends a transaction.
    pub const COMMIT: u32 = 2;
    /// The journal's superblock, first version.
    pub const SUPERBLOCK_V1: u32 = 3;
    /// The journal's superblock.
    pub const SUPERBLOCK_V2: u32 = 4;
    /// Blocks that must not be replayed from earlier transactions.
    pub const REVOKE: u32 = 5;
}

/// `s_feature_incompat` of the journal.
pub mod feature {
    /// Revoke blocks are used.
    pub const REVOKE: u32 = 0x1;
    /// Block numbers have 64 bits.
    pub const BIT64: u32 = 0x2;
    /// Commit blocks may reach the disk before their data.
    pub const ASYNC_COMMIT: u32 = 0x4;
    /// Checksums, 16 bits for a data block.
    pub const CSUM_V2: u32 = 0x8;
    /// Checksums, 32 bits for a data block.
    pub const CSUM_V3: u32 = 0x10;
    /// What recovery here understands (fast commits are not among them).
    pub const KNOWN: u32 = REVOKE | BIT64 | ASYNC_COMMIT | CSUM_V2 | CSUM_V3;
}

/// `s_feature_compat`: a commit block holds a CRC-32 of its transaction (checksums of the first version).
pub const COMPAT_CHECKSUM: u32 = 0x1;

/// Flags of a tag.
pub mod tag_flag {
    /// The data block began with the magic number, which was replaced by zeros.
    pub const ESCAPE: u32 = 1;
    /// No UUID follows the tag.
    pub const SAME_UUID: u32 = 2;
    /// The last tag of its descriptor.
    pub const LAST: u32 = 8;
}

/// Bytes of a block's header.
pub const HEADER_LEN: usize = 12;
/// Bytes of the superblock that its checksum covers.
pub const SUPERBLOCK_LEN: usize = 1024;
/// Bytes of the header of a revoke block.
pub const REVOKE_HEADER_LEN: usize = 16;
/// Where a commit block keeps its checksum type and checksum.
pub const COMMIT_CHKSUM_AT: usize = 16;
/// `JBD2_CRC32_CHKSUM`.
pub const CRC32_TYPE: u8 = 1;
