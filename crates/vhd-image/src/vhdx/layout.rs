//! Structures of a VHDX as they lie in the file: little-endian, checksums CRC-32C (Castagnoli).
//!
//! Source: \[MS-VHDX\] v20180912, sections 2.2 to 2.6. Field names are those of the specification. No I/O, no checks.

use uuid::Uuid;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

/// Regions, the log and blocks begin at multiples of this.
pub(super) const MIB: u64 = 1 << 20;
/// Unit of the log.
pub(super) const LOG_SECTOR: usize = 4096;
/// Size of a header that its checksum covers.
pub(super) const HEADER_SIZE: usize = 4096;
/// Size of a region table that its checksum covers, and of the metadata table.
pub(super) const TABLE_SIZE: usize = 64 << 10;
/// Where the two headers are.
pub(super) const HEADER_OFFSETS: [u64; 2] = [64 << 10, 128 << 10];
/// Where the two region tables are.
pub(super) const REGION_TABLE_OFFSETS: [u64; 2] = [192 << 10, 256 << 10];
/// Most entries of a region table or a metadata table.
pub(super) const MAX_TABLE_ENTRIES: usize = 2047;
/// Sectors that one sector-bitmap block describes: with the sector size, the size of a chunk.
pub(super) const SECTORS_PER_CHUNK: u64 = 1 << 23;
/// Smallest payload block in bytes.
pub const MIN_BLOCK: u32 = 1 << 20;
/// Largest payload block in bytes.
pub const MAX_BLOCK: u32 = 256 << 20;
/// Largest virtual disk in bytes: 64 TiB.
pub const MAX_DISK: u64 = 64 << 40;

pub(super) const FILE_SIGNATURE: [u8; 8] = *b"vhdxfile";
pub(super) const HEADER_SIGNATURE: [u8; 4] = *b"head";
pub(super) const REGION_SIGNATURE: [u8; 4] = *b"regi";
pub(super) const METADATA_SIGNATURE: [u8; 8] = *b"metadata";
pub(super) const ENTRY_SIGNATURE: [u8; 4] = *b"loge";
pub(super) const ZERO_SIGNATURE: [u8; 4] = *b"zero";
pub(super) const DATA_SIGNATURE: [u8; 4] = *b"desc";
pub(super) const SECTOR_SIGNATURE: [u8; 4] = *b"data";
/// `Version` of the only header there is.
pub(super) const VERSION: u16 = 1;

/// A GUID as it lies in the file.
pub(super) type Guid = [u8; 16];

const fn guid(value: u128) -> Guid {
    Uuid::from_u128(value).to_bytes_le()
}
pub(super) const REGION_BAT: Guid = guid(0x2DC2_7766_F623_4200_9D64_115E_9BFD_4A08);
pub(super) const REGION_METADATA: Guid = guid(0x8B7C_A206_4790_4B9A_B8FE_575F_050F_886E);
pub(super) const ITEM_FILE_PARAMETERS: Guid = guid(0xCAA1_6737_FA36_4D43_B3B6_33F0_AA44_E76B);
pub(super) const ITEM_DISK_SIZE: Guid = guid(0x2FA5_4224_CD1B_4876_B211_5DBE_D83B_F4B8);
pub(super) const ITEM_DISK_ID: Guid = guid(0xBECA_12AB_B2E6_4523_93EF_C309_E000_C746);
pub(super) const ITEM_LOGICAL_SECTOR: Guid = guid(0x8141_BF1D_A96F_4709_BA47_F233_A8FA_AB5F);
pub(super) const ITEM_PHYSICAL_SECTOR: Guid = guid(0xCDA3_48C7_445D_4471_9CC9_E988_5251_C556);
pub(super) const ITEM_PARENT_LOCATOR: Guid = guid(0xA8D3_5F2D_B30B_454D_ABF7_D3D8_4834_AB0C);

/// 2.2.2; the rest of the 4096 bytes is reserved, but summed.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    pub(super) signature: [u8; 4],
    pub(super) checksum: U32,
    pub(super) sequence_number: U64,
    pub(super) file_write_guid: Guid,
    pub(super) data_write_guid: Guid,
    pub(super) log_guid: Guid,
    pub(super) log_version: U16,
    pub(super) version: U16,
    pub(super) log_length: U32,
    pub(super) log_offset: U64,
}
const _: () = assert!(size_of::<Header>() == 80);

/// 2.2.3.1.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RegionTableHeader {
    pub(super) signature: [u8; 4],
    pub(super) checksum: U32,
    pub(super) entry_count: U32,
    pub(super) reserved: U32,
}
const _: () = assert!(size_of::<RegionTableHeader>() == 16);

/// 2.2.3.2.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RegionEntry {
    pub(super) guid: Guid,
    pub(super) file_offset: U64,
    pub(super) length: U32,
    /// Bit 0: required.
    pub(super) required: U32,
}
const _: () = assert!(size_of::<RegionEntry>() == 32);

/// 2.6.1.1.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct MetadataHeader {
    pub(super) signature: [u8; 8],
    pub(super) reserved: U16,
    pub(super) entry_count: U16,
    pub(super) reserved2: [u8; 20],
}
const _: () = assert!(size_of::<MetadataHeader>() == 32);

/// 2.6.1.2.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct MetadataEntry {
    pub(super) item_id: Guid,
    pub(super) offset: U32,
    pub(super) length: U32,
    /// [`IS_USER`], [`IS_VIRTUAL_DISK`], [`IS_REQUIRED`].
    pub(super) flags: U32,
    pub(super) reserved2: U32,
}
const _: () = assert!(size_of::<MetadataEntry>() == 32);

pub(super) const IS_USER: u32 = 1;
pub(super) const IS_VIRTUAL_DISK: u32 = 2;
pub(super) const IS_REQUIRED: u32 = 4;

/// Flag of the file parameters: a fixed disk.
pub(super) const LEAVE_BLOCKS_ALLOCATED: u32 = 1;
/// Flag of the file parameters: a differencing disk.
pub(super) const HAS_PARENT: u32 = 2;

/// 2.3.1.1.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct LogEntryHeader {
    pub(super) signature: [u8; 4],
    pub(super) checksum: U32,
    pub(super) entry_length: U32,
    pub(super) tail: U32,
    pub(super) sequence_number: U64,
    pub(super) descriptor_count: U32,
    pub(super) reserved: U32,
    pub(super) log_guid: Guid,
    pub(super) flushed_file_offset: U64,
    pub(super) last_file_offset: U64,
}
const _: () = assert!(size_of::<LogEntryHeader>() == 64);

/// 2.3.1.2 and 2.3.1.3, told apart by the signature.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct LogDescriptor {
    pub(super) signature: [u8; 4],
    /// Data: the last four bytes of the sector.
    pub(super) trailing_bytes: [u8; 4],
    /// Zero: length in bytes. Data: the first eight bytes of the sector.
    pub(super) leading_bytes: [u8; 8],
    pub(super) file_offset: U64,
    pub(super) sequence_number: U64,
}
const _: () = assert!(size_of::<LogDescriptor>() == 32);

/// 2.3.1.4.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct LogDataSector {
    pub(super) signature: [u8; 4],
    pub(super) sequence_high: U32,
    pub(super) data: [u8; 4084],
    pub(super) sequence_low: U32,
}
const _: () = assert!(size_of::<LogDataSector>() == LOG_SECTOR);

/// CRC-32C of `bytes` with zeros for the four bytes at offset 4, the place of every checksum of the format.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    let (head, rest) = bytes.split_at(4);
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(head), &[0; 4]), &rest[4..])
}

/// State of a payload block (2.5.1.1), the low three bits of its BAT entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockState {
    /// Not present, undefined, zero or unmapped: all read as zeros.
    Absent,
    Present,
}

/// A payload entry of the BAT: state, and the file offset in MiB from bit 20 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BatEntry(pub(super) u64);

/// Low bits of a present block's entry.
const FULLY_PRESENT: u64 = 6;

impl BatEntry {
    /// A present block at `offset`, a multiple of a MiB.
    pub(super) fn present(offset: u64) -> Self {
        debug_assert!(offset.is_multiple_of(MIB));
        Self(offset | FULLY_PRESENT)
    }

    /// The state; `None` for values that a disk without a parent never has.
    pub(super) fn state(self) -> Option<BlockState> {
        match self.0 & 7 {
            // 5 was "unmapped" in version 0.95 of the specification, and QEMU still accepts it.
            0..=3 | 5 => Some(BlockState::Absent),
            FULLY_PRESENT => Some(BlockState::Present),
            _ => None,
        }
    }

    /// Where the block lies in the file, in bytes.
    pub(super) fn offset(self) -> u64 {
        self.0 & !(MIB - 1)
    }

    pub(super) fn is_present(self) -> bool {
        self.state() == Some(BlockState::Present)
    }
}

/// Payload blocks between two sector-bitmap entries of the BAT.
pub(super) fn chunk_ratio(logical_sector: u32, block_size: u32) -> u64 {
    SECTORS_PER_CHUNK * u64::from(logical_sector) / u64::from(block_size)
}

/// Number of BAT entries of a disk without a parent: the last entry is that of the last payload block.
pub(super) fn bat_entries(blocks: u64, chunk_ratio: u64) -> u64 {
    blocks + blocks.saturating_sub(1) / chunk_ratio
}

/// Index in the BAT of a payload block.
pub(super) fn bat_index(block: u64, chunk_ratio: u64) -> u64 {
    block + block / chunk_ratio
}
