//! Opens and writes a VHDX.
//!
//! ```text
//!   open   log in use ─► write zeros and sectors ─► sync ─► header without log ─► sync
//!   write  1st: new write ids in the older header ─► sync
//!          present block: write in place.  Absent block: file grows ─► write data ─► entry stays pending in memory
//!   sync   sync data ─► write the pending BAT entries ─► sync
//! ```
//!
//! Written data is as safe as on a disk with a write cache: synced data survives, other data may be lost, and the file
//! can be opened after a crash that cut a write at any byte. This needs no log: new BAT entries replace only entries of
//! absent blocks, and each is written twice, first its offset and then its state, so a torn entry is an absent block.
//! Dropping a writer writes the pending entries without a sync, as closing a file would.

use super::{
    Geometry, VhdxError,
    layout::{BatEntry, HEADER_OFFSETS, MIB, bat_index, chunk_ratio},
    log::Overlay,
    reader::Opened,
    tables::header_bytes,
};
use disk_io::{ReadAt, WriteAt};
use parking_lot::RwLock;
use std::{collections::BTreeSet, io, ops::Range};
use zerocopy::little_endian::U64;

/// Most bytes that a log may zero in the file; a log that zeroes more is considered hostile.
const MAX_ZEROED: u64 = 16 << 30;

/// A VHDX opened for writing: the virtual disk behind [`WriteAt`]. Its size is fixed.
#[derive(Debug)]
pub struct VhdxWriter<D: WriteAt> {
    opened: Opened<D>,
    state: RwLock<State>,
}

#[derive(Debug)]
struct State {
    bat: Vec<BatEntry>,
    /// Blocks whose entries are in `bat` but not yet in the file.
    pending: BTreeSet<usize>,
    /// Place of the next block, and end of the file.
    end: u64,
    /// New write ids are in the header.
    begun: bool,
}

impl<D: WriteAt> VhdxWriter<D> {
    /// Opens a dynamic or fixed VHDX. A log in use is replayed into the file; otherwise the file does not change before
    /// the first write.
    ///
    /// # Errors
    /// As [`super::Vhdx::open`].
    pub fn open(disk: D) -> Result<Self, VhdxError> {
        let mut opened = open_replayed(disk)?;
        let bat = std::mem::take(&mut opened.bat);
        let end = if opened.geometry.fixed {
            // A fixed disk is never made shorter, even where blocks are missing.
            opened.used_end.max(opened.view.size.next_multiple_of(MIB))
        } else {
            opened.used_end
        };
        let state = State { bat, pending: BTreeSet::new(), end, begun: false };
        Ok(Self { opened, state: RwLock::new(state) })
    }

    /// Size, sectors, block size and id.
    pub fn geometry(&self) -> &Geometry {
        &self.opened.geometry
    }

    /// Byte ranges of the virtual disk that have space in the file, ascending; all others read as zeros.
    pub fn allocated(&self) -> Vec<Range<u64>> {
        self.opened.allocated(&self.state.read().bat)
    }

    /// Gives the file new write ids, once, before anything changes (2.2.2.1).
    fn begin(&self) -> Result<(), VhdxError> {
        if self.state.read().begun {
            return Ok(());
        }
        let mut state = self.state.write();
        if state.begun {
            return Ok(());
        }
        let disk = &self.opened.view.disk;
        let mut header = self.opened.header;
        header.file_write_guid = uuid::Uuid::new_v4().to_bytes_le();
        header.data_write_guid = uuid::Uuid::new_v4().to_bytes_le();
        header.sequence_number = U64::new(header.sequence_number.get().wrapping_add(1));
        disk.write_all_at(&header_bytes(header), HEADER_OFFSETS[1 - self.opened.header_index])
            .and_then(|()| disk.sync())
            // Remains of an interrupted writer are useless, and new blocks must begin as zeros.
            .and_then(|()| disk.set_len(state.end))
            .map_err(VhdxError::io("write"))?;
        state.begun = true;
        Ok(())
    }

    /// Writes into one block.
    fn write_piece(&self, block: usize, inside: u64, data: &[u8]) -> io::Result<()> {
        let disk = &self.opened.view.disk;
        let entry = self.state.read().bat[block];
        if entry.is_present() {
            return disk.write_all_at(data, entry.offset() + inside);
        }
        if data.iter().all(|&b| b == 0) {
            return Ok(());
        }
        let mut state = self.state.write();
        let entry = state.bat[block];
        if entry.is_present() {
            return disk.write_all_at(data, entry.offset() + inside);
        }
        let place = state.end;
        let end = place + u64::from(self.opened.geometry.block_size);
        disk.set_len(end)?;
        if let Err(error) = disk.write_all_at(data, place + inside) {
            // The half-written space must not become another block: truncate it, or leave it unused.
            if disk.set_len(place).is_err() {
                state.end = end;
            }
            return Err(error);
        }
        state.end = end;
        state.bat[block] = BatEntry::present(place);
        state.pending.insert(block);
        Ok(())
    }

    /// Writes the pending BAT entries to the file, without a sync.
    fn write_pending(&self, state: &mut State) -> io::Result<()> {
        let geometry = &self.opened.geometry;
        let ratio = chunk_ratio(geometry.logical_sector, geometry.block_size);
        for mask in [!7, !0] {
            let mut run: (u64, Vec<u8>) = (0, Vec::new());
            for &block in &state.pending {
                let at = self.opened.bat_offset + bat_index(block as u64, ratio) * 8;
                if at != run.0 + run.1.len() as u64 {
                    self.opened.view.disk.write_all_at(&run.1, run.0)?;
                    run = (at, Vec::new());
                }
                run.1.extend_from_slice(&(state.bat[block].0 & mask).to_le_bytes());
            }
            self.opened.view.disk.write_all_at(&run.1, run.0)?;
        }
        state.pending.clear();
        Ok(())
    }
}

impl<D: WriteAt> ReadAt for VhdxWriter<D> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.opened.read_at(&self.state.read().bat, buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.opened.geometry.disk_bytes)
    }
}

impl<D: WriteAt> WriteAt for VhdxWriter<D> {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let pieces = self.opened.pieces(offset, buf.len());
        if pieces.is_empty() && !buf.is_empty() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.begin()?;
        let mut done = 0;
        for (block, inside, n) in pieces {
            match self.write_piece(block, inside, &buf[done..done + n]) {
                Ok(()) => done += n,
                Err(_) if done > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len == self.opened.geometry.disk_bytes { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.state.write();
        self.opened.view.disk.sync()?;
        if state.pending.is_empty() {
            return Ok(());
        }
        self.write_pending(&mut state)?;
        self.opened.view.disk.sync()
    }
}

impl<D: WriteAt> Drop for VhdxWriter<D> {
    fn drop(&mut self) {
        let mut state = std::mem::replace(
            self.state.get_mut(),
            State { bat: Vec::new(), pending: BTreeSet::new(), end: 0, begun: true },
        );
        if !state.pending.is_empty() {
            // Drop cannot report an error; a caller that needs to know calls `sync`.
            let _ = self.write_pending(&mut state);
        }
    }
}

/// Opens a file; a log in use is replayed into it.
pub(super) fn open_replayed<D: WriteAt>(disk: D) -> Result<Opened<D>, VhdxError> {
    let mut opened = Opened::open(disk)?;
    if let Some(overlay) = opened.view.overlay.take() {
        replay(&opened.view.disk, &overlay, opened.view.size)?;
        opened.header.log_guid = [0; 16];
        write_header(&mut opened)?;
    }
    Ok(opened)
}

/// Writes the content of the log to the file, durably.
fn replay<D: WriteAt>(disk: &D, overlay: &Overlay, file_end: u64) -> Result<(), VhdxError> {
    let size = disk.size().map_err(VhdxError::io("measure"))?;
    // Bytes after the end become zeros with the new length.
    let zeros: Vec<Range<u64>> =
        overlay.zeros().map(|z| z.start..z.end.min(size)).filter(|z| !z.is_empty()).collect();
    if zeros.iter().map(|z| z.end - z.start).sum::<u64>() > MAX_ZEROED {
        return Err(VhdxError::Unsupported("a log that zeroes more than 16 GiB"));
    }
    let empty = vec![0; MIB as usize];
    let write = || {
        if file_end > size {
            disk.set_len(file_end)?;
        }
        for range in zeros {
            for at in range.clone().step_by(empty.len()) {
                let n = (range.end - at).min(MIB) as usize;
                disk.write_all_at(&empty[..n], at)?;
            }
        }
        for (at, sector) in overlay.sectors() {
            disk.write_all_at(sector, at)?;
        }
        disk.sync()
    };
    write().map_err(VhdxError::io("replay the log of"))
}

/// Writes the header in place of the older one, durably, which makes it the newer one.
pub(super) fn write_header<D: WriteAt>(opened: &mut Opened<D>) -> Result<(), VhdxError> {
    let header = &mut opened.header;
    header.sequence_number = U64::new(header.sequence_number.get().wrapping_add(1));
    opened.header_index = 1 - opened.header_index;
    let disk = &opened.view.disk;
    disk.write_all_at(&header_bytes(*header), HEADER_OFFSETS[opened.header_index])
        .and_then(|()| disk.sync())
        .map_err(VhdxError::io("write"))
}
