//! Parses and serializes headers, region tables and metadata. No I/O.
//!
//! Input is untrusted: every count, offset and length is checked before it is used.

use super::{
    VhdxError,
    layout::{
        Guid, HAS_PARENT, HEADER_OFFSETS, HEADER_SIGNATURE, HEADER_SIZE, Header, IS_REQUIRED, IS_USER,
        IS_VIRTUAL_DISK, ITEM_DISK_ID, ITEM_DISK_SIZE, ITEM_FILE_PARAMETERS, ITEM_LOGICAL_SECTOR,
        ITEM_PARENT_LOCATOR, ITEM_PHYSICAL_SECTOR, LEAVE_BLOCKS_ALLOCATED, MAX_BLOCK, MAX_DISK,
        MAX_TABLE_ENTRIES, METADATA_SIGNATURE, MIB, MIN_BLOCK, MetadataEntry, MetadataHeader, REGION_BAT,
        REGION_METADATA, REGION_SIGNATURE, REGION_TABLE_OFFSETS, RegionEntry, RegionTableHeader, TABLE_SIZE,
        VERSION, checksum,
    },
};
use std::ops::Range;
use zerocopy::{
    FromBytes, IntoBytes,
    little_endian::{U16, U32, U64},
};

/// The properties of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the virtual disk in bytes.
    pub disk_bytes: u64,
    /// Size of a payload block in bytes.
    pub block_size: u32,
    /// Logical sector size: 512 or 4096 bytes.
    pub logical_sector: u32,
    /// Physical sector size: 512 or 4096 bytes.
    pub physical_sector: u32,
    /// Identity of the disk, which a guest sees in SCSI page 83.
    pub disk_id: uuid::Uuid,
    /// A fixed disk: all blocks stay allocated.
    pub fixed: bool,
}

impl Geometry {
    /// Checks the limits of the format; the error is the reason.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if !(MIN_BLOCK..=MAX_BLOCK).contains(&self.block_size) || !self.block_size.is_power_of_two() {
            return Err("a block size that is not a power of two from 1 MiB to 256 MiB");
        }
        if ![512, 4096].contains(&self.logical_sector) || ![512, 4096].contains(&self.physical_sector) {
            return Err("sectors of neither 512 nor 4096 bytes");
        }
        if self.disk_bytes == 0
            || self.disk_bytes > MAX_DISK
            || !self.disk_bytes.is_multiple_of(u64::from(self.logical_sector))
        {
            return Err("a disk size that is not a multiple of its sectors, up to 64 TiB");
        }
        Ok(())
    }

    /// Number of payload blocks.
    pub(super) fn blocks(&self) -> u64 {
        self.disk_bytes.div_ceil(u64::from(self.block_size))
    }
}

/// The newer valid one of the two headers, with its index.
pub(super) fn choose_header(copies: [&[u8]; 2]) -> Result<(usize, Header), VhdxError> {
    let parse = |bytes: &[u8]| {
        let (header, _) = Header::read_from_prefix(bytes).ok()?;
        let valid = bytes.len() == HEADER_SIZE
            && header.signature == HEADER_SIGNATURE
            && header.checksum.get() == checksum(bytes);
        valid.then_some(header)
    };
    let at = HEADER_OFFSETS[0];
    let (index, header) = match copies.map(parse) {
        [None, None] => return Err(VhdxError::corrupt("neither header is valid", at)),
        [Some(one), None] => (0, one),
        [None, Some(two)] => (1, two),
        [Some(one), Some(two)] => match one.sequence_number.get().cmp(&two.sequence_number.get()) {
            std::cmp::Ordering::Greater => (0, one),
            std::cmp::Ordering::Less => (1, two),
            // Some creators write the same header twice.
            std::cmp::Ordering::Equal if one.as_bytes() == two.as_bytes() => (0, one),
            std::cmp::Ordering::Equal => {
                return Err(VhdxError::corrupt("two different headers are equally new", at));
            }
        },
    };
    let at = HEADER_OFFSETS[index];
    if header.version.get() != VERSION {
        return Err(VhdxError::Unsupported("header version"));
    }
    if header.log_guid != [0; 16] && header.log_version.get() != 0 {
        return Err(VhdxError::Unsupported("log version"));
    }
    let (offset, length) = (header.log_offset.get(), u64::from(header.log_length.get()));
    if !offset.is_multiple_of(MIB)
        || !length.is_multiple_of(MIB)
        || (length > 0 && offset < MIB)
        || offset.checked_add(length).is_none()
    {
        return Err(VhdxError::corrupt(
            "the log is not aligned to 1 MiB, or overlaps the header section",
            at,
        ));
    }
    Ok((index, header))
}

/// The 4096 bytes of a header, with its checksum.
pub(super) fn header_bytes(mut header: Header) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_SIZE];
    header.checksum = U32::ZERO;
    bytes[..size_of::<Header>()].copy_from_slice(header.as_bytes());
    let sum = checksum(&bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// The two regions that every file has, and all regions for the check of overlaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Regions {
    pub(super) bat: Range<u64>,
    pub(super) metadata: Range<u64>,
    pub(super) all: Vec<Range<u64>>,
}

/// Parses the first valid one of the two region tables.
pub(super) fn choose_regions(copies: [&[u8]; 2]) -> Result<Regions, VhdxError> {
    let valid = |bytes: &&[u8]| {
        RegionTableHeader::read_from_prefix(bytes).is_ok_and(|(header, _)| {
            bytes.len() == TABLE_SIZE
                && header.signature == REGION_SIGNATURE
                && header.checksum.get() == checksum(bytes)
        })
    };
    let at = REGION_TABLE_OFFSETS[0];
    let corrupt = |what| VhdxError::corrupt(what, at);
    let bytes = copies.into_iter().find(valid).ok_or_else(|| corrupt("neither region table is valid"))?;
    let (header, rest) =
        RegionTableHeader::ref_from_prefix(bytes).map_err(|_| corrupt("the region table is short"))?;
    let count = header.entry_count.get() as usize;
    if count > MAX_TABLE_ENTRIES {
        return Err(corrupt("too many regions"));
    }
    let (entries, _) = <[RegionEntry]>::ref_from_prefix_with_elems(rest, count)
        .map_err(|_| corrupt("the region table is short"))?;
    let (mut bat, mut metadata, mut all) = (None, None, Vec::new());
    for entry in entries {
        let (start, length) = (entry.file_offset.get(), u64::from(entry.length.get()));
        let end = start.checked_add(length);
        let (Some(end), true) =
            (end, start >= MIB && start.is_multiple_of(MIB) && length.is_multiple_of(MIB) && length > 0)
        else {
            return Err(corrupt("a region is not aligned to 1 MiB, or overlaps the header section"));
        };
        let known = match entry.guid {
            REGION_BAT => &mut bat,
            REGION_METADATA => &mut metadata,
            _ if entry.required.get() & 1 != 0 => return Err(VhdxError::Unsupported("a required region")),
            _ => &mut None,
        };
        if known.replace(start..end).is_some() {
            return Err(corrupt("a region is listed twice"));
        }
        all.push(start..end);
    }
    let (Some(bat), Some(metadata)) = (bat, metadata) else {
        return Err(corrupt("the bat or the metadata region is missing"));
    };
    Ok(Regions { bat, metadata, all })
}

/// The 64 KiB of a region table, with its checksum.
pub(super) fn region_table_bytes(entries: &[(Guid, Range<u64>)]) -> Vec<u8> {
    let mut bytes = vec![0; TABLE_SIZE];
    let header = RegionTableHeader {
        signature: REGION_SIGNATURE,
        checksum: U32::ZERO,
        entry_count: U32::new(entries.len() as u32),
        reserved: U32::ZERO,
    };
    bytes[..16].copy_from_slice(header.as_bytes());
    for ((guid, range), slot) in entries.iter().zip(bytes[16..].chunks_exact_mut(32)) {
        let entry = RegionEntry {
            guid: *guid,
            file_offset: U64::new(range.start),
            length: U32::new((range.end - range.start) as u32),
            required: U32::new(1),
        };
        slot.copy_from_slice(entry.as_bytes());
    }
    let sum = checksum(&bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Parses the metadata table. `item` reads a buffer from an offset in the region; `at` is the region's offset in the file,
/// `length` its size.
pub(super) fn parse_metadata(
    table: &[u8],
    at: u64,
    length: u64,
    mut item: impl FnMut(u64, &mut [u8]) -> Result<(), VhdxError>,
) -> Result<Geometry, VhdxError> {
    let corrupt = |what| VhdxError::corrupt(what, at);
    let (header, rest) = MetadataHeader::read_from_prefix(table).map_err(|_| corrupt("no metadata table"))?;
    if header.signature != METADATA_SIGNATURE {
        return Err(corrupt("no metadata table"));
    }
    let count = usize::from(header.entry_count.get());
    if count > MAX_TABLE_ENTRIES {
        return Err(corrupt("too many metadata items"));
    }
    let (entries, _) = <[MetadataEntry]>::ref_from_prefix_with_elems(rest, count)
        .map_err(|_| corrupt("the metadata table is short"))?;
    let (mut parameters, mut size, mut id, mut logical, mut physical) =
        (None::<[u8; 8]>, None::<[u8; 8]>, None::<[u8; 16]>, None::<[u8; 4]>, None::<[u8; 4]>);
    for entry in entries {
        let user = entry.flags.get() & IS_USER != 0;
        let (offset, len) = (u64::from(entry.offset.get()), u64::from(entry.length.get()));
        if len > MIB || (len > 0 && offset < TABLE_SIZE as u64) || offset + len > length {
            return Err(corrupt("a metadata item lies outside of its region"));
        }
        let mut read = |into: &mut [u8]| {
            if into.len() as u64 != len {
                return Err(corrupt("a metadata item of a wrong length"));
            }
            item(offset, into)
        };
        macro_rules! take {
            ($slot:ident, $n:literal) => {{
                let mut bytes = [0; $n];
                read(&mut bytes)?;
                if $slot.replace(bytes).is_some() {
                    return Err(corrupt("a metadata item is listed twice"));
                }
            }};
        }
        match entry.item_id {
            ITEM_FILE_PARAMETERS if !user => take!(parameters, 8),
            ITEM_DISK_SIZE if !user => take!(size, 8),
            ITEM_DISK_ID if !user => take!(id, 16),
            ITEM_LOGICAL_SECTOR if !user => take!(logical, 4),
            ITEM_PHYSICAL_SECTOR if !user => take!(physical, 4),
            ITEM_PARENT_LOCATOR if !user => return Err(VhdxError::Unsupported("a differencing disk")),
            _ if entry.flags.get() & IS_REQUIRED != 0 => {
                return Err(VhdxError::Unsupported("a required metadata item"));
            }
            _ => {}
        }
    }
    let (Some(parameters), Some(size), Some(logical), Some(physical)) = (parameters, size, logical, physical)
    else {
        return Err(corrupt("a metadata item is missing"));
    };
    let (block_size, flags) = parameters.split_at(4);
    let flags = u32::from_le_bytes(flags.try_into().unwrap_or_default());
    if flags & HAS_PARENT != 0 {
        return Err(VhdxError::Unsupported("a differencing disk"));
    }
    let geometry = Geometry {
        disk_bytes: u64::from_le_bytes(size),
        block_size: u32::from_le_bytes(block_size.try_into().unwrap_or_default()),
        logical_sector: u32::from_le_bytes(logical),
        physical_sector: u32::from_le_bytes(physical),
        disk_id: uuid::Uuid::from_bytes_le(id.unwrap_or_default()),
        fixed: flags & LEAVE_BLOCKS_ALLOCATED != 0,
    };
    geometry.check().map_err(corrupt)?;
    Ok(geometry)
}

/// The metadata region of a disk, table and items, up to the last byte that is not zero.
pub(super) fn metadata_bytes(geometry: &Geometry) -> Vec<u8> {
    let mut parameters = geometry.block_size.to_le_bytes().to_vec();
    let flags = if geometry.fixed { LEAVE_BLOCKS_ALLOCATED } else { 0 };
    parameters.extend_from_slice(&flags.to_le_bytes());
    let items: [(Guid, u32, Vec<u8>); 5] = [
        (ITEM_FILE_PARAMETERS, IS_REQUIRED, parameters),
        (ITEM_DISK_SIZE, IS_REQUIRED | IS_VIRTUAL_DISK, geometry.disk_bytes.to_le_bytes().to_vec()),
        (ITEM_DISK_ID, IS_REQUIRED | IS_VIRTUAL_DISK, geometry.disk_id.to_bytes_le().to_vec()),
        (ITEM_LOGICAL_SECTOR, IS_REQUIRED | IS_VIRTUAL_DISK, geometry.logical_sector.to_le_bytes().to_vec()),
        (
            ITEM_PHYSICAL_SECTOR,
            IS_REQUIRED | IS_VIRTUAL_DISK,
            geometry.physical_sector.to_le_bytes().to_vec(),
        ),
    ];
    let header = MetadataHeader {
        signature: METADATA_SIGNATURE,
        reserved: U16::ZERO,
        entry_count: U16::new(items.len() as u16),
        reserved2: [0; 20],
    };
    let mut bytes = vec![0; TABLE_SIZE];
    bytes[..32].copy_from_slice(header.as_bytes());
    for (n, (item_id, flags, value)) in items.into_iter().enumerate() {
        let entry = MetadataEntry {
            item_id,
            offset: U32::new(bytes.len() as u32),
            length: U32::new(value.len() as u32),
            flags: U32::new(flags),
            reserved2: U32::ZERO,
        };
        bytes[32 * (n + 1)..][..32].copy_from_slice(entry.as_bytes());
        bytes.extend_from_slice(&value);
    }
    bytes
}
