//! The log: updates of the file that are committed but perhaps not yet written to their places.
//!
//! ```text
//!   log (a ring)   … │ entry n-1 │ entry n (tail) │ entry n+1 │ entry n+2 (head; its Tail points to n) │ stale …
//!   entry          header 64 │ descriptors 32 each │ pad to 4096 │ data sector 4096 │ …
//! ```
//!
//! [`active`] finds the newest complete sequence (2.3.3) and folds it into an [`Overlay`]: the content of the file after a
//! replay. A reader looks through it; a writer first writes it into the file. No I/O. Bounded: the log is read into memory
//! up to [`MAX_LOG`], each of its bytes is checksummed at most [`MAX_PASSES`] times, and the number of entries visited is
//! what that many passes over the log would visit.

use super::{
    VhdxError,
    layout::{
        DATA_SIGNATURE, ENTRY_SIGNATURE, Guid, LOG_SECTOR, LogDataSector, LogDescriptor, LogEntryHeader,
        SECTOR_SIGNATURE, ZERO_SIGNATURE,
    },
};
use std::{collections::BTreeMap, ops::Range};
use zerocopy::FromBytes;

/// Largest log that is replayed; all known writers create logs of 1 MiB.
pub(super) const MAX_LOG: u64 = 64 << 20;
/// How often the whole log may be checksummed: overlapping entries cost more than they hold.
const MAX_PASSES: u64 = 16;
/// Upper bound of all offsets in a log: a disk of 64 TiB with all its tables.
const MAX_FILE: u64 = 128 << 40;

const SECTOR: u64 = LOG_SECTOR as u64;

/// The content that the log adds to the file.
#[derive(Debug, Default)]
pub(super) struct Overlay {
    /// Sectors of 4096 bytes by their file offset; they win over `zeros`.
    sectors: BTreeMap<u64, Box<[u8; LOG_SECTOR]>>,
    /// Disjoint zeroed ranges: start to end.
    zeros: BTreeMap<u64, u64>,
    /// The file is at least this long.
    pub(super) file_end: u64,
}

impl Overlay {
    fn put_zeros(&mut self, range: Range<u64>) {
        let covered: Vec<u64> = self.sectors.range(range.clone()).map(|(&at, _)| at).collect();
        for at in covered {
            self.sectors.remove(&at);
        }
        let Range { mut start, mut end } = range;
        // Ranges that touch the new one become part of it.
        while let Some((&s, &e)) = self.zeros.range(..=end).next_back()
            && e >= start
        {
            start = start.min(s);
            end = end.max(e);
            self.zeros.remove(&s);
        }
        self.zeros.insert(start, end);
    }

    /// Applies the updates to `buf`, which was read from the file at `offset`.
    pub(super) fn cover(&self, buf: &mut [u8], offset: u64) {
        let end = offset.saturating_add(buf.len() as u64);
        let part = |range: Range<u64>| {
            (range.start.max(offset) - offset) as usize..(range.end.min(end).max(offset) - offset) as usize
        };
        for (&from, &to) in self.zeros.range(..end).rev().take_while(|&(_, &to)| to > offset) {
            buf[part(from..to)].fill(0);
        }
        let first = offset - offset % SECTOR;
        for (&at, sector) in self.sectors.range(first..end) {
            let skip = offset.saturating_sub(at) as usize;
            let target = &mut buf[part(at..at + SECTOR)];
            let len = target.len();
            target.copy_from_slice(&sector[skip..skip + len]);
        }
    }

    /// Zeroed ranges, ascending.
    pub(super) fn zeros(&self) -> impl Iterator<Item = Range<u64>> {
        self.zeros.iter().map(|(&start, &end)| start..end)
    }

    /// Sectors, ascending; to be written after the zeros.
    pub(super) fn sectors(&self) -> impl Iterator<Item = (u64, &[u8; LOG_SECTOR])> {
        self.sectors.iter().map(|(&at, sector)| (at, &**sector))
    }
}

/// An entry that is valid by itself.
#[derive(Debug, Clone, Copy)]
struct Entry {
    offset: u64,
    length: u64,
    descriptors: u64,
    sequence: u64,
    tail: u64,
    flushed: u64,
    last: u64,
}

/// The result of parsing an entry at a sector of the log.
#[derive(Debug, Clone, Copy)]
enum Seen {
    NotYet,
    NoEntry,
    Entry(Entry),
}

/// The log as a ring, and the remaining budget for it.
struct Ring<'a> {
    log: &'a [u8],
    guid: Guid,
    budget: u64,
    /// Entries that may still be visited.
    steps: u64,
    /// The result for each sector, since scans visit a sector many times.
    seen: Vec<Seen>,
}

impl Ring<'_> {
    fn len(&self) -> u64 {
        self.log.len() as u64
    }

    /// The `n`th sector after `offset`, wrapping around. Sizes are multiples of 4096, so no sector is split.
    fn sector(&self, offset: u64, n: u64) -> &[u8] {
        let at = ((offset + n * SECTOR) % self.len()) as usize;
        &self.log[at..at + LOG_SECTOR]
    }

    /// Descriptor `n` of the entry at `offset`. Descriptors follow the header and are never split: both sizes divide 4096.
    fn descriptor(&self, offset: u64, n: u64) -> LogDescriptor {
        let at = size_of::<LogEntryHeader>() as u64 + n * size_of::<LogDescriptor>() as u64;
        let sector = self.sector(offset, at / SECTOR);
        let bytes = &sector[(at % SECTOR) as usize..][..size_of::<LogDescriptor>()];
        LogDescriptor::read_from_bytes(bytes).expect("32 bytes")
    }

    /// Number of sectors that header and descriptors occupy.
    fn head_sectors(descriptors: u64) -> u64 {
        (size_of::<LogEntryHeader>() as u64 + descriptors * size_of::<LogDescriptor>() as u64)
            .div_ceil(SECTOR)
    }

    /// The entry at `offset`, if all of it is valid.
    fn entry(&mut self, offset: u64) -> Result<Option<Entry>, VhdxError> {
        let index = (offset / SECTOR) as usize;
        match self.seen[index] {
            Seen::NoEntry => return Ok(None),
            Seen::Entry(entry) => return Ok(Some(entry)),
            Seen::NotYet => {}
        }
        let entry = self.parse_entry(offset)?;
        self.seen[index] = entry.map_or(Seen::NoEntry, Seen::Entry);
        Ok(entry)
    }

    fn parse_entry(&mut self, offset: u64) -> Result<Option<Entry>, VhdxError> {
        let (header, _) = LogEntryHeader::read_from_prefix(self.sector(offset, 0)).expect("4096 bytes");
        let entry = Entry {
            offset,
            length: u64::from(header.entry_length.get()),
            descriptors: u64::from(header.descriptor_count.get()),
            sequence: header.sequence_number.get(),
            tail: u64::from(header.tail.get()),
            flushed: header.flushed_file_offset.get(),
            last: header.last_file_offset.get(),
        };
        let plausible = header.signature == ENTRY_SIGNATURE
            && header.log_guid == self.guid
            && entry.length >= SECTOR
            && entry.length.is_multiple_of(SECTOR)
            && entry.length <= self.len()
            && entry.tail.is_multiple_of(SECTOR)
            && entry.tail < self.len()
            && entry.sequence > 0
            && Self::head_sectors(entry.descriptors) * SECTOR <= entry.length;
        if !plausible {
            return Ok(None);
        }
        self.budget = self
            .budget
            .checked_sub(entry.length)
            .ok_or_else(|| VhdxError::corrupt("entries of the log overlap each other", offset))?;
        let mut first = [0; LOG_SECTOR];
        first.copy_from_slice(self.sector(offset, 0));
        first[4..8].fill(0);
        let sum = (1..entry.length / SECTOR)
            .fold(crc32c::crc32c(&first), |sum, n| crc32c::crc32c_append(sum, self.sector(offset, n)));
        if sum != header.checksum.get() {
            return Ok(None);
        }
        let mut data = Self::head_sectors(entry.descriptors);
        for n in 0..entry.descriptors {
            let descriptor = self.descriptor(offset, n);
            let at = descriptor.file_offset.get();
            if descriptor.sequence_number.get() != entry.sequence || !at.is_multiple_of(SECTOR) {
                return Ok(None);
            }
            match descriptor.signature {
                ZERO_SIGNATURE if u64::from_le_bytes(descriptor.leading_bytes).is_multiple_of(SECTOR) => {}
                DATA_SIGNATURE if data * SECTOR < entry.length => {
                    let sector =
                        LogDataSector::ref_from_bytes(self.sector(offset, data)).expect("4096 bytes");
                    let sequence =
                        u64::from(sector.sequence_high.get()) << 32 | u64::from(sector.sequence_low.get());
                    if sector.signature != SECTOR_SIGNATURE || sequence != entry.sequence {
                        return Ok(None);
                    }
                    data += 1;
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(entry))
    }

    /// The longest run of entries from `tail`; whether it contains the tail of its head; and whether it ended because the
    /// next entry does not follow (rather than because the ring was full).
    fn sequence(&mut self, tail: u64) -> Result<(Vec<Entry>, bool, bool), VhdxError> {
        let mut entries: Vec<Entry> = Vec::new();
        let (mut taken, mut ended) = (0, false);
        while taken < self.len() {
            let at = (tail + taken) % self.len();
            disk_io::steps::add(1);
            self.steps = self
                .steps
                .checked_sub(1)
                .ok_or_else(|| VhdxError::corrupt("entries of the log overlap each other", at))?;
            let entry = self.entry(at)?;
            let follows = |e: &Entry| {
                entries.last().is_none_or(|last| last.sequence.checked_add(1) == Some(e.sequence))
            };
            let Some(entry) = entry.filter(follows) else {
                ended = true;
                break;
            };
            if taken + entry.length > self.len() {
                break;
            }
            taken += entry.length;
            entries.push(entry);
        }
        let start = entries.last().and_then(|head| entries.iter().position(|e| e.offset == head.tail));
        let valid = start.is_some();
        // Entries before the tail have already reached their places.
        entries.drain(..start.unwrap_or(0));
        Ok((entries, valid, ended))
    }
}

/// The active sequence of `log`, folded. `file_bytes` is the size of the file; `log_offset` appears only in messages.
///
/// # Errors
/// [`VhdxError::Corrupt`] if there is no such sequence although the header claims a log, or if the file was truncated.
pub(super) fn active(log: &[u8], log_offset: u64, guid: Guid, file_bytes: u64) -> Result<Overlay, VhdxError> {
    let corrupt = |what| VhdxError::corrupt(what, log_offset);
    if log.is_empty() || !log.len().is_multiple_of(LOG_SECTOR) {
        return Err(corrupt("an empty log, or one that is not a multiple of 4096 bytes"));
    }
    let seen = vec![Seen::NotYet; log.len() / LOG_SECTOR];
    let steps = seen.len() as u64 * MAX_PASSES;
    let mut ring = Ring { log, guid, budget: log.len() as u64 * MAX_PASSES, steps, seen };
    let mut best: Vec<Entry> = Vec::new();
    let (mut tail, mut dead) = (0, vec![false; log.len() / LOG_SECTOR]);
    loop {
        if dead[(tail / SECTOR) as usize] {
            tail = (tail + SECTOR) % ring.len();
            if tail == 0 {
                break;
            }
            continue;
        }
        let (entries, valid, ended) = ring.sequence(tail)?;
        let head = entries.last().copied();
        let old = tail;
        match head {
            Some(head) if valid => {
                if best.last().is_none_or(|b| b.sequence < head.sequence) {
                    best = entries;
                }
                tail = (head.offset + head.length) % ring.len();
            }
            _ => {
                // The head's tail is not in this run, hence in no later run with the same head. Without this mark, a log of
                // stale entries would be scanned once for each of them.
                if ended {
                    for entry in &entries {
                        dead[(entry.offset / SECTOR) as usize] = true;
                    }
                }
                tail = (tail + SECTOR) % ring.len();
            }
        }
        if tail <= old {
            break;
        }
    }
    let Some(head) = best.last() else { return Err(corrupt("no complete sequence in a log in use")) };
    if file_bytes < head.flushed {
        return Err(corrupt("the file was truncated"));
    }
    let mut overlay = Overlay { file_end: file_bytes.max(head.last), ..Overlay::default() };
    if head.last > MAX_FILE {
        return Err(corrupt("the log makes the file too long"));
    }
    for entry in &best {
        let mut data = Ring::head_sectors(entry.descriptors);
        for n in 0..entry.descriptors {
            let descriptor = ring.descriptor(entry.offset, n);
            let at = descriptor.file_offset.get();
            let length = if descriptor.signature == ZERO_SIGNATURE {
                u64::from_le_bytes(descriptor.leading_bytes)
            } else {
                SECTOR
            };
            let end = at
                .checked_add(length)
                .filter(|&end| end <= MAX_FILE)
                .ok_or_else(|| corrupt("an update beyond any file"))?;
            overlay.file_end = overlay.file_end.max(end);
            if descriptor.signature == ZERO_SIGNATURE {
                if length > 0 {
                    overlay.put_zeros(at..end);
                }
                continue;
            }
            let sector = LogDataSector::ref_from_bytes(ring.sector(entry.offset, data)).expect("4096 bytes");
            data += 1;
            let mut bytes = Box::new([0; LOG_SECTOR]);
            bytes[..8].copy_from_slice(&descriptor.leading_bytes);
            bytes[8..LOG_SECTOR - 4].copy_from_slice(&sector.data);
            bytes[LOG_SECTOR - 4..].copy_from_slice(&descriptor.trailing_bytes);
            overlay.sectors.insert(at, bytes);
        }
    }
    Ok(overlay)
}
