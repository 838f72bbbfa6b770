//! Changes of a VHDX's own structure: another size, another id, blocks given back.
//!
//! ```text
//!   update   sectors of 4096 bytes ─► one entry in the log ─flush─► header: log in use ─flush─► their places ─flush─► header
//!   grow     larger BAT at the end of the file, if it does not fit ─flush─► update(region tables, size of the disk)
//!   compact  update(BAT: blocks that nobody needs) ─► last block copied into a gap ─flush─► update(BAT) ─► … ─► truncate
//! ```
//!
//! Invariants: a power cut at any write leaves a file that opens with the old or the new structure and the same content; no
//! block is overwritten before the BAT that no longer names it is durable. Called by `layer grow`, `layer clone` and `layer
//! compact`, which have made sure that nobody else has the file open.

use super::{
    VhdxError,
    layout::{
        BatEntry, DATA_SIGNATURE, ENTRY_SIGNATURE, ITEM_DISK_ID, ITEM_DISK_SIZE, LOG_SECTOR, LogDataSector,
        LogDescriptor, LogEntryHeader, METADATA_SIGNATURE, MIB, MetadataEntry, MetadataHeader, REGION_BAT,
        REGION_SIGNATURE, REGION_TABLE_OFFSETS, RegionEntry, RegionTableHeader, SECTOR_SIGNATURE, TABLE_SIZE,
        bat_entries, bat_index, checksum, chunk_ratio,
    },
    reader::{MAX_BAT_BYTES, Opened},
    writer::{open_replayed, write_header},
};
use disk_io::WriteAt;
use std::{collections::BTreeMap, io};
use zerocopy::{
    FromBytes, IntoBytes,
    little_endian::{U32, U64},
};

const SECTOR: u64 = LOG_SECTOR as u64;
/// Sequence number of the only entry that a log gets here.
const SEQUENCE: u64 = 1;
/// Bytes of blocks that are copied before the BAT is updated.
const BATCH: u64 = 64 << 20;

/// Sectors of the file in a new form, by their offsets.
type Sectors = BTreeMap<u64, Box<[u8; LOG_SECTOR]>>;

/// A VHDX whose structure is changed. Its log is empty.
struct Editor<D: WriteAt> {
    opened: Opened<D>,
}

impl<D: WriteAt> Editor<D> {
    /// Opens a file; a log in use is replayed. The file has new write ids afterwards.
    fn open(disk: D) -> Result<Self, VhdxError> {
        let mut opened = open_replayed(disk)?;
        opened.header.file_write_guid = uuid::Uuid::new_v4().to_bytes_le();
        opened.header.data_write_guid = uuid::Uuid::new_v4().to_bytes_le();
        write_header(&mut opened)?;
        // Remains of an interrupted writer.
        let size = opened.view.disk.size().map_err(VhdxError::io("measure"))?;
        if size < opened.used_end {
            return Err(VhdxError::corrupt("the file ends too early", size));
        }
        Ok(Self { opened })
    }

    fn disk(&self) -> &D {
        &self.opened.view.disk
    }

    fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), VhdxError> {
        self.disk().read_exact_at(buf, at).map_err(VhdxError::io("read"))
    }

    fn flush(&self) -> Result<(), VhdxError> {
        self.disk().sync().map_err(VhdxError::io("sync"))
    }

    /// Puts bytes at `at` into `sectors`, which then hold the sectors around them.
    fn put(&self, sectors: &mut Sectors, at: u64, bytes: &[u8]) -> Result<(), VhdxError> {
        for (n, byte) in bytes.iter().enumerate() {
            let at = at + n as u64;
            let start = at / SECTOR * SECTOR;
            let sector = match sectors.entry(start) {
                std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
                std::collections::btree_map::Entry::Vacant(new) => {
                    let mut sector = Box::new([0; LOG_SECTOR]);
                    self.read(start, &mut *sector)?;
                    new.insert(sector)
                }
            };
            sector[(at - start) as usize] = *byte;
        }
        Ok(())
    }

    /// Replaces sectors, as one step.
    fn update(&mut self, sectors: &Sectors) -> Result<(), VhdxError> {
        if sectors.is_empty() {
            return Ok(());
        }
        let guid = uuid::Uuid::new_v4().to_bytes_le();
        let size = self.disk().size().map_err(VhdxError::io("measure"))?;
        let entry = log_entry(guid, size, sectors);
        let log = self.opened.header.log_offset.get();
        if entry.len() as u64 > u64::from(self.opened.header.log_length.get()) {
            return Err(VhdxError::Unsupported("a change that is larger than the log of the file"));
        }
        self.disk().write_all_at(&entry, log).map_err(VhdxError::io("write the log of"))?;
        self.flush()?;
        self.opened.header.log_guid = guid;
        write_header(&mut self.opened)?;
        for (at, sector) in sectors {
            self.disk().write_all_at(&**sector, *at).map_err(VhdxError::io("write"))?;
        }
        self.flush()?;
        self.opened.header.log_guid = [0; 16];
        write_header(&mut self.opened)
    }

    /// Puts a new value of a metadata item into `sectors`.
    fn put_item(&self, sectors: &mut Sectors, id: [u8; 16], value: &[u8]) -> Result<(), VhdxError> {
        let region = self.opened.metadata_offset;
        let mut table = vec![0; TABLE_SIZE];
        self.read(region, &mut table)?;
        let corrupt = |what| VhdxError::corrupt(what, region);
        let (header, rest) =
            MetadataHeader::read_from_prefix(&table).map_err(|_| corrupt("no metadata table"))?;
        if header.signature != METADATA_SIGNATURE {
            return Err(corrupt("no metadata table"));
        }
        let count = usize::from(header.entry_count.get());
        let (entries, _) = <[MetadataEntry]>::ref_from_prefix_with_elems(rest, count)
            .map_err(|_| corrupt("the metadata table is short"))?;
        let entry = entries.iter().find(|entry| entry.item_id == id);
        match entry {
            Some(entry) if entry.length.get() as usize == value.len() => {
                self.put(sectors, region + u64::from(entry.offset.get()), value)
            }
            _ => Err(corrupt("a metadata item is missing")),
        }
    }

    /// The region tables, the BAT at `offset` and of `length` bytes.
    fn put_regions(&self, sectors: &mut Sectors, offset: u64, length: u64) -> Result<(), VhdxError> {
        // Both copies become that which is valid.
        let mut table = vec![0; TABLE_SIZE];
        for at in REGION_TABLE_OFFSETS {
            self.read(at, &mut table)?;
            if table.starts_with(&REGION_SIGNATURE) && table[4..8] == checksum(&table).to_le_bytes() {
                break;
            }
        }
        let corrupt = || VhdxError::corrupt("the region table is short", REGION_TABLE_OFFSETS[0]);
        let (header, rest) = RegionTableHeader::read_from_prefix(&table).map_err(|_| corrupt())?;
        let count = header.entry_count.get() as usize;
        let (entries, _) = <[RegionEntry]>::ref_from_prefix_with_elems(rest, count).map_err(|_| corrupt())?;
        let index = entries.iter().position(|entry| entry.guid == REGION_BAT).ok_or_else(corrupt)?;
        let entry = RegionEntry {
            file_offset: U64::new(offset),
            length: U32::new(u32::try_from(length).map_err(|_| corrupt())?),
            ..entries[index]
        };
        let place = size_of::<RegionTableHeader>() + index * size_of::<RegionEntry>();
        table[place..place + size_of::<RegionEntry>()].copy_from_slice(entry.as_bytes());
        let sum = checksum(&table);
        table[4..8].copy_from_slice(&sum.to_le_bytes());
        let used = size_of::<RegionTableHeader>() + count * size_of::<RegionEntry>();
        let end = used.next_multiple_of(LOG_SECTOR);
        for at in REGION_TABLE_OFFSETS {
            self.put(sectors, at, &table[..end])?;
        }
        Ok(())
    }

    /// Puts the entries of some blocks into `sectors`.
    fn put_entries(&self, sectors: &mut Sectors, entries: &[(usize, BatEntry)]) -> Result<(), VhdxError> {
        let geometry = &self.opened.geometry;
        let ratio = chunk_ratio(geometry.logical_sector, geometry.block_size);
        for (block, entry) in entries {
            let at = self.opened.bat_offset + bat_index(*block as u64, ratio) * 8;
            self.put(sectors, at, &entry.0.to_le_bytes())?;
        }
        Ok(())
    }

    /// Changes BAT entries, in as many steps as the log needs.
    fn update_entries(&mut self, entries: &[(usize, BatEntry)]) -> Result<(), VhdxError> {
        // Half of the log for data, and at most what one step should hold.
        let most = (u64::from(self.opened.header.log_length.get()) / (2 * SECTOR)).clamp(1, 64) as usize;
        let mut sectors = Sectors::new();
        for (n, (block, entry)) in entries.iter().enumerate() {
            self.put_entries(&mut sectors, &[(*block, *entry)])?;
            self.opened.bat[*block] = *entry;
            if sectors.len() >= most || n + 1 == entries.len() {
                self.update(&sectors)?;
                sectors.clear();
            }
        }
        Ok(())
    }
}

/// One complete log entry.
fn log_entry(guid: [u8; 16], file_end: u64, sectors: &Sectors) -> Vec<u8> {
    let head = (size_of::<LogEntryHeader>() + size_of::<LogDescriptor>() * sectors.len())
        .next_multiple_of(LOG_SECTOR);
    let mut bytes = vec![0; head + sectors.len() * LOG_SECTOR];
    let header = LogEntryHeader {
        signature: ENTRY_SIGNATURE,
        checksum: U32::ZERO,
        entry_length: U32::new(bytes.len() as u32),
        tail: U32::ZERO,
        sequence_number: SEQUENCE.into(),
        descriptor_count: U32::new(sectors.len() as u32),
        reserved: U32::ZERO,
        log_guid: guid,
        flushed_file_offset: file_end.into(),
        last_file_offset: file_end.into(),
    };
    bytes[..size_of::<LogEntryHeader>()].copy_from_slice(header.as_bytes());
    for (n, (at, sector)) in sectors.iter().enumerate() {
        let (leading, rest) = sector.split_at(8);
        let (middle, trailing) = rest.split_at(LOG_SECTOR - 12);
        let mut descriptor = LogDescriptor {
            signature: DATA_SIGNATURE,
            trailing_bytes: [0; 4],
            leading_bytes: [0; 8],
            file_offset: (*at).into(),
            sequence_number: SEQUENCE.into(),
        };
        descriptor.leading_bytes.copy_from_slice(leading);
        descriptor.trailing_bytes.copy_from_slice(trailing);
        let place = size_of::<LogEntryHeader>() + n * size_of::<LogDescriptor>();
        bytes[place..place + size_of::<LogDescriptor>()].copy_from_slice(descriptor.as_bytes());
        let mut data = LogDataSector {
            signature: SECTOR_SIGNATURE,
            sequence_high: U32::new((SEQUENCE >> 32) as u32),
            data: [0; 4084],
            sequence_low: U32::new(SEQUENCE as u32),
        };
        data.data.copy_from_slice(middle);
        let place = head + n * LOG_SECTOR;
        bytes[place..place + LOG_SECTOR].copy_from_slice(data.as_bytes());
    }
    let sum = checksum(&bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Makes the virtual disk larger, durably; new bytes read as zeros. The same size changes nothing.
///
/// # Errors
/// [`VhdxError::Usage`] for a size that is smaller, not a multiple of the sectors, or beyond [`super::MAX_DISK`];
/// [`VhdxError::Unsupported`] for a fixed disk, and for a BAT of more than [`MAX_BAT_BYTES`]; otherwise as
/// [`super::Vhdx::open`].
pub fn grow<D: WriteAt>(disk: D, bytes: u64) -> Result<(), VhdxError> {
    let mut editor = Editor::open(disk)?;
    let old = editor.opened.geometry;
    let new = super::Geometry { disk_bytes: bytes, ..old };
    new.check().map_err(|what| VhdxError::Usage(what.into()))?;
    if bytes == old.disk_bytes {
        return Ok(());
    }
    if bytes < old.disk_bytes {
        return Err(VhdxError::Usage(format!("{bytes} bytes: it has {} and cannot shrink", old.disk_bytes)));
    }
    if old.fixed {
        return Err(VhdxError::Unsupported(
            "growing a fixed disk, whose blocks all have space; make it dynamic with `layer convert`",
        ));
    }
    let ratio = chunk_ratio(new.logical_sector, new.block_size);
    let bat_bytes = bat_entries(new.blocks(), ratio) * 8;
    if bat_bytes > MAX_BAT_BYTES {
        return Err(VhdxError::Unsupported("a bat of more than 64 MiB; use larger blocks"));
    }
    let old_bytes = bat_entries(old.blocks(), ratio) * 8;
    let mut sectors = Sectors::new();
    let io = |e: io::Error| VhdxError::Io { action: "write", source: e };
    if bat_bytes <= editor.opened.bat_length {
        // What lies behind the entries so far may be anything.
        let at = editor.opened.bat_offset;
        editor.disk().write_all_at(&vec![0; (bat_bytes - old_bytes) as usize], at + old_bytes).map_err(io)?;
    } else {
        let (place, length) = (editor.opened.used_end, bat_bytes.next_multiple_of(MIB));
        let mut bat = vec![0; old_bytes as usize];
        editor.read(editor.opened.bat_offset, &mut bat)?;
        // What an interrupted writer left there goes.
        editor.disk().set_len(place).and_then(|()| editor.disk().set_len(place + length)).map_err(io)?;
        editor.disk().write_all_at(&bat, place).map_err(io)?;
        editor.put_regions(&mut sectors, place, length)?;
    }
    editor.flush()?;
    editor.put_item(&mut sectors, ITEM_DISK_SIZE, &bytes.to_le_bytes())?;
    editor.update(&sectors)
}

/// Gives the disk another identity (SCSI page 83), durably, so that it can be attached beside the one it was copied from.
///
/// # Errors
/// As [`super::Vhdx::open`].
pub fn set_disk_id<D: WriteAt>(disk: D, id: uuid::Uuid) -> Result<(), VhdxError> {
    let mut editor = Editor::open(disk)?;
    let mut sectors = Sectors::new();
    editor.put_item(&mut sectors, ITEM_DISK_ID, &id.to_bytes_le())?;
    editor.update(&sectors)
}

/// Makes the file shorter, in place and durably: blocks for which `needed` is false lose their space and read as zeros,
/// others are moved to the front. `needed` gets the range of a block in the disk; what it says about one that is needed is
/// believed. Returns the length of the file in bytes before and afterwards.
///
/// # Errors
/// [`VhdxError::Unsupported`] for a fixed disk; an error of `needed`; otherwise as [`super::Vhdx::open`].
pub fn compact<D: WriteAt>(
    disk: D,
    mut needed: impl FnMut(&dyn disk_io::ReadAt, std::ops::Range<u64>) -> io::Result<bool>,
) -> Result<(u64, u64), VhdxError> {
    let before = disk.size().map_err(VhdxError::io("measure"))?;
    let mut editor = Editor::open(disk)?;
    if editor.opened.geometry.fixed {
        return Err(VhdxError::Unsupported("compacting a fixed disk"));
    }
    let size = u64::from(editor.opened.geometry.block_size);
    let disk_bytes = editor.opened.geometry.disk_bytes;
    let mut dropped = Vec::new();
    for block in 0..editor.opened.bat.len() {
        if !editor.opened.bat[block].is_present() {
            continue;
        }
        let start = block as u64 * size;
        let view = Content { opened: &editor.opened };
        if !needed(&view, start..(start + size).min(disk_bytes)).map_err(VhdxError::io("read"))? {
            dropped.push((block, BatEntry(0)));
        }
    }
    editor.update_entries(&dropped)?;

    // Gaps in ascending order, and blocks from the last one: each moves into the first gap before it.
    let floor = editor.opened.floor;
    let mut places: BTreeMap<u64, usize> = BTreeMap::new();
    for (block, entry) in editor.opened.bat.iter().enumerate().filter(|(_, entry)| entry.is_present()) {
        places.insert(entry.offset(), block);
    }
    let mut gap = floor;
    let mut moves: Vec<(usize, u64, u64)> = Vec::new();
    let mut batch = 0;
    loop {
        while let Some(block) = places.get(&gap) {
            debug_assert!(editor.opened.bat[*block].is_present());
            gap += size;
        }
        let last = places.last_key_value().map(|(at, block)| (*at, *block));
        // Blocks of other writers need not lie at multiples of the block size: the gap must be as long as a block.
        let blocked = places.range(gap..).next().is_some_and(|(at, _)| *at < gap + size);
        if blocked {
            gap = places.range(gap..).next().map_or(gap, |(at, _)| *at + size);
            continue;
        }
        match last {
            Some((at, block)) if at > gap => {
                moves.push((block, at, gap));
                places.remove(&at);
                places.insert(gap, block);
                batch += size;
                if batch < BATCH {
                    continue;
                }
            }
            _ => {
                move_blocks(&mut editor, &moves, size)?;
                break;
            }
        }
        move_blocks(&mut editor, &moves, size)?;
        moves.clear();
        batch = 0;
    }
    let end = places.last_key_value().map_or(floor, |(at, _)| (at + size).max(floor));
    let now = editor.disk().size().map_err(VhdxError::io("measure"))?;
    if end < now {
        editor.disk().set_len(end).map_err(VhdxError::io("shorten"))?;
        editor.flush()?;
    }
    Ok((before, end.min(now)))
}

/// Copies blocks to free places, durably, and then names those in the BAT.
fn move_blocks<D: WriteAt>(
    editor: &mut Editor<D>,
    moves: &[(usize, u64, u64)],
    size: u64,
) -> Result<(), VhdxError> {
    if moves.is_empty() {
        return Ok(());
    }
    let mut buffer = vec![0; MIB as usize];
    for (_, from, to) in moves {
        for at in (0..size).step_by(buffer.len()) {
            editor.read(from + at, &mut buffer)?;
            editor.disk().write_all_at(&buffer, to + at).map_err(VhdxError::io("write"))?;
        }
    }
    editor.flush()?;
    let entries: Vec<_> = moves.iter().map(|(block, _, to)| (*block, BatEntry::present(*to))).collect();
    editor.update_entries(&entries)
}

/// The virtual disk while it is compacted.
struct Content<'a, D> {
    opened: &'a Opened<D>,
}

impl<D: WriteAt> disk_io::ReadAt for Content<'_, D> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.opened.read_at(&self.opened.bat, buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.opened.geometry.disk_bytes)
    }
}
