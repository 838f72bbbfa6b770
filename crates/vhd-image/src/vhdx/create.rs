//! Creates dynamic disks.
//!
//! ```text
//!   0     64K    128K   192K    256K         1M     2M         3M    3M+b
//!   │ id │ head │ head │ regi │ regi │ …    │ log  │ metadata │ BAT │ block │ block │ …
//! ```
//!
//! Content that is known at creation is written at once, with the BAT in its final form: nothing is synced, no header is
//! written twice, and blocks that are written only in part stay sparse. The identifier at 0 is written last, so a file
//! whose creation was interrupted is not a VHDX.

use super::{
    Geometry, VhdxError,
    layout::{
        BatEntry, FILE_SIGNATURE, HEADER_OFFSETS, HEADER_SIGNATURE, Header, MIB, REGION_BAT, REGION_METADATA,
        REGION_TABLE_OFFSETS, VERSION, bat_entries, bat_index, chunk_ratio,
    },
    reader::MAX_BAT_BYTES,
    tables::{header_bytes, metadata_bytes, region_table_bytes},
};
use crate::zeros::{nonzero_runs, read_padded, touched};
use disk_io::{ReadAt, WriteAt};
use std::{collections::BTreeMap, ops::Range};
use zerocopy::{
    FromZeros,
    little_endian::{U16, U32, U64},
};

const LOG_OFFSET: u64 = MIB;
const LOG_BYTES: u64 = MIB;
const METADATA_OFFSET: u64 = LOG_OFFSET + LOG_BYTES;
const METADATA_BYTES: u64 = MIB;
const BAT_OFFSET: u64 = METADATA_OFFSET + METADATA_BYTES;
/// `Creator` of the file identifier: informational, and part of the bytes that stay the same.
const CREATOR: &str = "lcow-graphdriver";

/// Properties of the disk to create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the virtual disk in bytes: a multiple of the logical sector, up to 64 TiB.
    pub disk_bytes: u64,
    /// Size of a payload block in bytes: a power of two from 1 MiB to 256 MiB.
    pub block_size: u32,
    /// Logical sector size: 512 or 4096 bytes.
    pub logical_sector: u32,
    /// Physical sector size: 512 or 4096 bytes.
    pub physical_sector: u32,
    /// Identity of the disk in SCSI page 83, and the initial write ids of the file. Equal ids yield equal bytes.
    pub disk_id: uuid::Uuid,
}

impl CreateOptions {
    /// A disk of `disk_bytes` with blocks of 1 MiB, logical sectors of 512 and physical sectors of 4096 bytes, as Hyper-V
    /// creates for sandboxes of Linux containers on Windows.
    pub fn new(disk_bytes: u64, disk_id: uuid::Uuid) -> Self {
        Self { disk_bytes, block_size: 1 << 20, logical_sector: 512, physical_sector: 4096, disk_id }
    }
}

/// Creates a dynamic disk in `out`, replacing its content, with `content` at the given offsets and zeros elsewhere.
///
/// Returns the length of the file in bytes. Nothing is synced.
///
/// # Errors
/// [`VhdxError::Usage`] for options that no VHDX can have, or for content beyond the end of the disk; [`VhdxError::Io`].
pub fn create<W: WriteAt>(
    out: W,
    options: &CreateOptions,
    content: &[(u64, Vec<u8>)],
) -> Result<u64, VhdxError> {
    let (geometry, bat_end) = geometry_of(options)?;
    let block_size = u64::from(options.block_size);

    // Blocks in the order of their first use, so that the file grows with its content.
    let mut places: BTreeMap<u64, u64> = BTreeMap::new();
    let mut end = bat_end;
    let mut pieces: Vec<(u64, &[u8])> = Vec::new();
    for (offset, bytes) in content {
        if offset.checked_add(bytes.len() as u64).is_none_or(|stop| stop > options.disk_bytes) {
            return Err(VhdxError::Usage(format!("content of {} bytes at {offset}", bytes.len())));
        }
        let (mut at, mut rest) = (*offset, bytes.as_slice());
        while !rest.is_empty() {
            let inside = at % block_size;
            let (now, later) = rest.split_at(rest.len().min((block_size - inside) as usize));
            let place = *places.entry(at / block_size).or_insert_with(|| {
                end += block_size;
                end - block_size
            });
            pieces.push((place + inside, now));
            (at, rest) = (at + now.len() as u64, later);
        }
    }
    let write = |bytes: &[u8], at| out.write_all_at(bytes, at).map_err(VhdxError::io("write"));
    out.set_len(0).and_then(|()| out.set_len(end)).map_err(VhdxError::io("allocate space for"))?;
    for (at, bytes) in pieces {
        write(bytes, at)?;
    }
    describe(&out, &geometry, &places, bat_end)?;
    Ok(end)
}

/// Creates a dynamic disk in `out`, replacing its content, with the bytes of `source`, which is read at the ranges `data`
/// (ascending, not overlapping) and zero elsewhere. Blocks of zeros get no space, and runs of zeros inside of the others
/// are not written, so equal disks give equal files however their zeros are stored.
///
/// Returns the length of the file in bytes. Nothing is synced.
///
/// # Errors
/// As [`create`]; [`VhdxError::Io`] also where `source` cannot be read.
pub fn create_from<W: WriteAt, R: ReadAt + ?Sized>(
    out: W,
    options: &CreateOptions,
    source: &R,
    data: &[Range<u64>],
) -> Result<u64, VhdxError> {
    let (geometry, bat_end) = geometry_of(options)?;
    let block_size = u64::from(options.block_size);
    let mut places: BTreeMap<u64, u64> = BTreeMap::new();
    let mut end = bat_end;
    out.set_len(0).and_then(|()| out.set_len(end)).map_err(VhdxError::io("allocate space for"))?;
    let mut buffer = vec![0; options.block_size as usize];
    for block in touched(data, block_size, options.disk_bytes) {
        let at = block * block_size;
        let len = (options.disk_bytes - at).min(block_size) as usize;
        read_padded(source, &mut buffer[..len], at).map_err(VhdxError::io("read the source of"))?;
        let grains = nonzero_runs(&buffer[..len]);
        if grains.is_empty() {
            continue;
        }
        for run in grains {
            let place = end + run.start as u64;
            out.write_all_at(&buffer[run], place).map_err(VhdxError::io("write"))?;
        }
        places.insert(block, end);
        end += block_size;
    }
    out.set_len(end).map_err(VhdxError::io("allocate space for"))?;
    describe(&out, &geometry, &places, bat_end)?;
    Ok(end)
}

/// The geometry, and the end of the BAT in the file.
fn geometry_of(options: &CreateOptions) -> Result<(Geometry, u64), VhdxError> {
    let geometry = Geometry {
        disk_bytes: options.disk_bytes,
        block_size: options.block_size,
        logical_sector: options.logical_sector,
        physical_sector: options.physical_sector,
        disk_id: options.disk_id,
        fixed: false,
    };
    geometry.check().map_err(|what| VhdxError::Usage(what.into()))?;
    let ratio = chunk_ratio(options.logical_sector, options.block_size);
    let bat_bytes = bat_entries(geometry.blocks(), ratio) * 8;
    if bat_bytes > MAX_BAT_BYTES {
        let (blocks, block_size) = (geometry.blocks(), options.block_size);
        return Err(VhdxError::Usage(format!("{blocks} blocks of {block_size} bytes; use larger blocks")));
    }
    Ok((geometry, BAT_OFFSET + bat_bytes.next_multiple_of(MIB)))
}

/// Writes everything but the blocks; the identifier last.
fn describe<W: WriteAt>(
    out: &W,
    geometry: &Geometry,
    places: &BTreeMap<u64, u64>,
    bat_end: u64,
) -> Result<(), VhdxError> {
    let write = |bytes: &[u8], at| out.write_all_at(bytes, at).map_err(VhdxError::io("write"));
    for (bytes, at) in bat_runs(places, chunk_ratio(geometry.logical_sector, geometry.block_size)) {
        write(&bytes, at)?;
    }
    write(&metadata_bytes(geometry), METADATA_OFFSET)?;
    let regions = region_table_bytes(&[
        (REGION_BAT, BAT_OFFSET..bat_end),
        (REGION_METADATA, METADATA_OFFSET..METADATA_OFFSET + METADATA_BYTES),
    ]);
    for at in REGION_TABLE_OFFSETS {
        write(&regions, at)?;
    }
    let mut header = Header::new_zeroed();
    header.signature = HEADER_SIGNATURE;
    header.version = U16::new(VERSION);
    header.log_length = U32::new(LOG_BYTES as u32);
    header.log_offset = U64::new(LOG_OFFSET);
    header.file_write_guid = geometry.disk_id.to_bytes_le();
    header.data_write_guid = geometry.disk_id.to_bytes_le();
    for (sequence, at) in HEADER_OFFSETS.into_iter().enumerate() {
        header.sequence_number = U64::new(sequence as u64);
        write(&header_bytes(header), at)?;
    }
    let mut identifier = FILE_SIGNATURE.to_vec();
    identifier.extend(CREATOR.encode_utf16().flat_map(u16::to_le_bytes));
    write(&identifier, 0)
}

/// The BAT entries of the present blocks, adjacent ones joined, with their file offsets; the rest of the BAT is zeros.
fn bat_runs(places: &BTreeMap<u64, u64>, ratio: u64) -> Vec<(Vec<u8>, u64)> {
    let mut runs: Vec<(Vec<u8>, u64)> = Vec::new();
    for (&block, &place) in places {
        let at = BAT_OFFSET + bat_index(block, ratio) * 8;
        let entry = BatEntry::present(place).0.to_le_bytes();
        match runs.last_mut() {
            Some((run, start)) if *start + run.len() as u64 == at => run.extend_from_slice(&entry),
            _ => runs.push((entry.to_vec(), at)),
        }
    }
    runs
}
