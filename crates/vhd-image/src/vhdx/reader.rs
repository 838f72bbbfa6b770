//! Opens and reads a VHDX.
//!
//! ```text
//!   headers ─► newer one ─► log in use? ─► Overlay ─┐
//!   region tables ─► BAT, metadata ◄── View = file + Overlay
//!   read(offset) ─► block = offset / block size ─► BAT entry ─► View, or zeros
//! ```
//!
//! Invariants: nothing is written; every block of the BAT lies in the file, after the header section, and overlaps no region
//! and no other block; the BAT takes at most [`MAX_BAT_BYTES`] of memory.

use super::{
    Geometry, VhdxError,
    layout::{
        BatEntry, BlockState, FILE_SIGNATURE, HEADER_OFFSETS, HEADER_SIZE, Header, MIB, REGION_TABLE_OFFSETS,
        TABLE_SIZE, bat_entries, bat_index, chunk_ratio,
    },
    log::{self, Overlay},
    tables::{Regions, choose_header, choose_regions, parse_metadata},
};
use disk_io::ReadAt;
use std::{io, ops::Range};

/// Largest BAT that is read into memory, in bytes: enough for 8 TiB in blocks of 1 MiB, or 64 TiB in blocks of 8 MiB.
pub const MAX_BAT_BYTES: u64 = 64 << 20;

/// The file as it is after a replay of its log.
#[derive(Debug)]
pub(super) struct View<D> {
    pub(super) disk: D,
    pub(super) overlay: Option<Overlay>,
    /// Size in bytes, including what the log adds.
    pub(super) size: u64,
}

impl<D: ReadAt> View<D> {
    /// Reads `buf` at `offset`; bytes between the end of the file and `size` are zeros.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let Some(overlay) = &self.overlay else { return self.disk.read_exact_at(buf, offset) };
        let mut done = 0;
        while done < buf.len() {
            match self.disk.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) if offset + buf.len() as u64 <= self.size => {
                    buf[done..].fill(0);
                    break;
                }
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        overlay.cover(buf, offset);
        Ok(())
    }
}

/// A parsed file.
#[derive(Debug)]
pub(super) struct Opened<D> {
    pub(super) view: View<D>,
    /// Which of the two headers is the newer one.
    pub(super) header_index: usize,
    pub(super) header: Header,
    pub(super) geometry: Geometry,
    /// Offset of the BAT in the file.
    pub(super) bat_offset: u64,
    /// Length of the region of the BAT in bytes.
    pub(super) bat_length: u64,
    /// Offset of the metadata region in the file.
    pub(super) metadata_offset: u64,
    /// End of header section, log and regions, in bytes.
    pub(super) floor: u64,
    /// Entries of the payload blocks, in order.
    pub(super) bat: Vec<BatEntry>,
    /// End of everything that the file holds, a multiple of 1 MiB; the rest is free.
    pub(super) used_end: u64,
}

fn read_vec<D: ReadAt>(disk: &D, offset: u64, len: usize) -> Result<Vec<u8>, VhdxError> {
    let mut bytes = vec![0; len];
    disk.read_exact_at(&mut bytes, offset).map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => VhdxError::corrupt("the file ends too early", offset),
        _ => VhdxError::Io { action: "read", source },
    })?;
    Ok(bytes)
}

impl<D: ReadAt> Opened<D> {
    pub(super) fn open(disk: D) -> Result<Self, VhdxError> {
        if read_vec(&disk, 0, FILE_SIGNATURE.len())? != FILE_SIGNATURE {
            return Err(VhdxError::corrupt("no vhdx file identifier", 0));
        }
        let headers = [
            read_vec(&disk, HEADER_OFFSETS[0], HEADER_SIZE)?,
            read_vec(&disk, HEADER_OFFSETS[1], HEADER_SIZE)?,
        ];
        let (header_index, header) = choose_header([&headers[0], &headers[1]])?;
        let size = disk.size().map_err(VhdxError::io("measure"))?;
        let log = header.log_offset.get()..header.log_offset.get() + u64::from(header.log_length.get());
        if log.end > size && !log.is_empty() {
            return Err(VhdxError::corrupt(
                "the log lies beyond the end of the file",
                HEADER_OFFSETS[header_index],
            ));
        }
        let overlay = if header.log_guid == [0; 16] {
            None
        } else {
            if log.end - log.start > log::MAX_LOG {
                return Err(VhdxError::Unsupported("a log in use of more than 64 MiB"));
            }
            let bytes = read_vec(&disk, log.start, (log.end - log.start) as usize)?;
            Some(log::active(&bytes, log.start, header.log_guid, size)?)
        };
        let size = overlay.as_ref().map_or(size, |o| o.file_end);
        let view = View { disk, overlay, size };

        let table = |at: u64| {
            let mut bytes = vec![0; TABLE_SIZE];
            view.read(&mut bytes, at).map(|()| bytes)
        };
        let tables = (table(REGION_TABLE_OFFSETS[0]), table(REGION_TABLE_OFFSETS[1]));
        let regions = match &tables {
            (Ok(one), Ok(two)) => choose_regions([one, two])?,
            (Ok(one), Err(_)) => choose_regions([one, &[]])?,
            _ => return Err(VhdxError::corrupt("the file ends too early", REGION_TABLE_OFFSETS[0])),
        };
        let taken = taken(&regions, log)?;
        let Regions { bat: bat_region, metadata, .. } = regions;
        let within = |range: &Range<u64>, what| {
            if range.end <= view.size { Ok(()) } else { Err(VhdxError::corrupt(what, range.start)) }
        };
        within(&metadata, "the metadata region lies beyond the file")?;
        let read = |buf: &mut [u8], at| view.read(buf, at).map_err(VhdxError::io("read"));
        let mut table = vec![0; TABLE_SIZE];
        read(&mut table, metadata.start)?;
        let geometry =
            parse_metadata(&table, metadata.start, metadata.end - metadata.start, |offset, into| {
                read(into, metadata.start + offset)
            })?;

        let ratio = chunk_ratio(geometry.logical_sector, geometry.block_size);
        let bytes = bat_entries(geometry.blocks(), ratio) * 8;
        if bytes > bat_region.end - bat_region.start {
            return Err(VhdxError::corrupt("the bat is too small for the disk", bat_region.start));
        }
        if bytes > MAX_BAT_BYTES {
            return Err(VhdxError::Unsupported("a bat of more than 64 MiB"));
        }
        within(&(bat_region.start..bat_region.start + bytes), "the bat lies beyond the file")?;
        let mut raw = vec![0; bytes as usize];
        read(&mut raw, bat_region.start)?;
        let entry = |index: u64| {
            let at = index as usize * 8;
            BatEntry(raw[at..at + 8].iter().rev().fold(0, |value, &b| value << 8 | u64::from(b)))
        };
        let bat: Vec<BatEntry> = (0..geometry.blocks()).map(|b| entry(bat_index(b, ratio))).collect();
        let used_end = check_blocks(&bat, &geometry, &taken, bat_region.start, ratio, view.size)?;
        Ok(Self {
            view,
            header_index,
            header,
            geometry,
            bat_offset: bat_region.start,
            bat_length: bat_region.end - bat_region.start,
            metadata_offset: metadata.start,
            floor: taken.last().map_or(MIB, |last| last.end),
            bat,
            used_end,
        })
    }

    /// A range of the disk as pieces that each lie in one block: block, offset in it, length.
    pub(super) fn pieces(&self, offset: u64, len: usize) -> Vec<(usize, u64, usize)> {
        let size = u64::from(self.geometry.block_size);
        let end = offset.saturating_add(len as u64).min(self.geometry.disk_bytes);
        let mut at = offset;
        let mut pieces = Vec::new();
        while at < end {
            let inside = at % size;
            let n = (size - inside).min(end - at);
            pieces.push(((at / size) as usize, inside, n as usize));
            at += n;
        }
        pieces
    }

    pub(super) fn read_at(&self, bat: &[BatEntry], buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        for (block, inside, n) in self.pieces(offset, buf.len()) {
            let into = &mut buf[done..done + n];
            if bat[block].is_present() {
                self.view.read(into, bat[block].offset() + inside)?;
            } else {
                into.fill(0);
            }
            done += n;
        }
        Ok(done)
    }

    pub(super) fn allocated(&self, bat: &[BatEntry]) -> Vec<Range<u64>> {
        let size = u64::from(self.geometry.block_size);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (block, _) in bat.iter().enumerate().filter(|(_, entry)| entry.is_present()) {
            let start = block as u64 * size;
            let end = (start + size).min(self.geometry.disk_bytes);
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }
}

/// The header section, the log and the regions, ascending, if they do not overlap.
fn taken(regions: &Regions, log: Range<u64>) -> Result<Vec<Range<u64>>, VhdxError> {
    let mut taken = regions.all.clone();
    taken.push(0..MIB);
    if !log.is_empty() {
        taken.push(log);
    }
    taken.sort_by_key(|range| range.start);
    match taken.windows(2).find(|pair| pair[0].end > pair[1].start) {
        Some(pair) => Err(VhdxError::corrupt("two regions overlap", pair[1].start)),
        None => Ok(taken),
    }
}

/// Checks the places of all blocks; returns the end of everything in use.
fn check_blocks(
    bat: &[BatEntry],
    geometry: &Geometry,
    taken: &[Range<u64>],
    bat_offset: u64,
    ratio: u64,
    file_bytes: u64,
) -> Result<u64, VhdxError> {
    let size = u64::from(geometry.block_size);
    let mut end = taken.last().map_or(MIB, |last| last.end);
    let mut present = Vec::new();
    for (block, entry) in bat.iter().enumerate() {
        let corrupt = |what| VhdxError::corrupt(what, bat_offset + bat_index(block as u64, ratio) * 8);
        match entry.state() {
            None => return Err(corrupt("a block in a state that a disk without a parent cannot have")),
            // The offset may be a leftover of an earlier allocation; nothing depends on it.
            Some(BlockState::Absent) => {}
            Some(BlockState::Present) => {
                let start = entry.offset();
                let stop = start.checked_add(size).filter(|&stop| stop <= file_bytes);
                let Some(stop) = stop else { return Err(corrupt("a block beyond the end of the file")) };
                let next = taken.partition_point(|range| range.start < stop);
                if taken[..next].last().is_some_and(|range| range.end > start) {
                    return Err(corrupt("a block inside a region"));
                }
                end = end.max(stop);
                present.push(start);
            }
        }
    }
    present.sort_unstable();
    match present.windows(2).find(|pair| pair[0] + size > pair[1]) {
        Some(pair) => Err(VhdxError::corrupt("two blocks overlap", pair[1])),
        None => Ok(end),
    }
}

/// A VHDX opened for reading: the virtual disk behind [`ReadAt`].
///
/// A log in use is replayed in memory; the file is not touched.
#[derive(Debug)]
pub struct Vhdx<D> {
    pub(super) opened: Opened<D>,
}

impl<D: ReadAt> Vhdx<D> {
    /// Opens a dynamic or fixed VHDX.
    ///
    /// # Errors
    /// [`VhdxError::Corrupt`]; [`VhdxError::Unsupported`] for differencing disks, unknown required regions or metadata
    /// items, and tables beyond [`MAX_BAT_BYTES`]; [`VhdxError::Io`].
    pub fn open(disk: D) -> Result<Self, VhdxError> {
        Ok(Self { opened: Opened::open(disk)? })
    }

    /// Size, sectors, block size and id.
    pub fn geometry(&self) -> &Geometry {
        &self.opened.geometry
    }

    /// Whether the log is in use: the last writer did not close the file.
    pub fn is_dirty(&self) -> bool {
        self.opened.view.overlay.is_some()
    }

    /// Byte ranges of the virtual disk that have space in the file, ascending; all others read as zeros.
    pub fn allocated(&self) -> Vec<Range<u64>> {
        self.opened.allocated(&self.opened.bat)
    }
}

impl<D: ReadAt> ReadAt for Vhdx<D> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.opened.read_at(&self.opened.bat, buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.opened.geometry.disk_bytes)
    }
}
