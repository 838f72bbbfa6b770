//! Logs made by hand: sequences that wrap, are torn, stale or hostile.
#![allow(clippy::single_range_in_vec_init, reason = "an entry has a list of ranges, here often of one")]

use super::super::{
    Vhdx, VhdxError, VhdxWriter,
    layout::{
        DATA_SIGNATURE, ENTRY_SIGNATURE, Guid, HEADER_OFFSETS, Header, LOG_SECTOR, LogDataSector,
        LogDescriptor, LogEntryHeader, MIB, SECTOR_SIGNATURE, ZERO_SIGNATURE, checksum,
    },
    log::{Overlay, active},
    tables::header_bytes,
};
use super::{disk_of, read_all};
use disk_io::{MemDisk, ReadAt, WriteAt};
use std::ops::Range;
use zerocopy::{FromBytes, IntoBytes, little_endian::U32};

const GUID: Guid = [7; 16];
const LOG: usize = 1 << 20;

/// A log entry.
fn entry(
    guid: Guid,
    sequence: u64,
    tail: u32,
    file_end: u64,
    zeros: Option<Range<u64>>,
    sectors: &[(u64, [u8; LOG_SECTOR])],
) -> Vec<u8> {
    let descriptors = usize::from(zeros.is_some()) + sectors.len();
    let head = (64 + 32 * descriptors).next_multiple_of(LOG_SECTOR);
    let mut bytes = vec![0; head + sectors.len() * LOG_SECTOR];
    let header = LogEntryHeader {
        signature: ENTRY_SIGNATURE,
        checksum: U32::ZERO,
        entry_length: U32::new(bytes.len() as u32),
        tail: U32::new(tail),
        sequence_number: sequence.into(),
        descriptor_count: U32::new(descriptors as u32),
        reserved: U32::ZERO,
        log_guid: guid,
        flushed_file_offset: file_end.into(),
        last_file_offset: file_end.into(),
    };
    bytes[..64].copy_from_slice(header.as_bytes());
    let zeros = zeros.into_iter().map(|z| (ZERO_SIGNATURE, z.start, [0; 4], (z.end - z.start).to_le_bytes()));
    let datas = sectors.iter().map(|(at, s)| {
        (DATA_SIGNATURE, *at, s[LOG_SECTOR - 4..].try_into().unwrap(), s[..8].try_into().unwrap())
    });
    for (n, (signature, at, trailing_bytes, leading_bytes)) in zeros.chain(datas).enumerate() {
        let descriptor = LogDescriptor {
            signature,
            trailing_bytes,
            leading_bytes,
            file_offset: at.into(),
            sequence_number: sequence.into(),
        };
        bytes[64 + 32 * n..][..32].copy_from_slice(descriptor.as_bytes());
    }
    for (n, (_, sector)) in sectors.iter().enumerate() {
        let data = LogDataSector {
            signature: SECTOR_SIGNATURE,
            sequence_high: U32::new((sequence >> 32) as u32),
            data: sector[8..LOG_SECTOR - 4].try_into().unwrap(),
            sequence_low: U32::new(sequence as u32),
        };
        bytes[head + n * LOG_SECTOR..][..LOG_SECTOR].copy_from_slice(data.as_bytes());
    }
    let sum = checksum(&bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// A sector full of `byte`, but for its first and last bytes, which take another way through the log.
fn sector(byte: u8) -> [u8; LOG_SECTOR] {
    let mut sector = [byte; LOG_SECTOR];
    sector[..8].fill(byte ^ 0x0F);
    sector[LOG_SECTOR - 4..].fill(byte ^ 0xF0);
    sector
}

/// Lays entries into a ring from `start` on, each of two sectors, the head's tail at the first.
fn ring(start: usize, first_sequence: u64, count: usize) -> Vec<u8> {
    let mut log = vec![0; LOG];
    lay(&mut log, start, first_sequence, count, start);
    log
}

fn lay(log: &mut [u8], start: usize, first_sequence: u64, count: usize, tail: usize) {
    for n in 0..count {
        let at = (4 << 20) + n as u64 * 4096;
        let sequence = first_sequence + n as u64;
        let bytes = entry(GUID, sequence, tail as u32, 8 << 20, None, &[(at, sector(sequence as u8))]);
        for (i, byte) in bytes.iter().enumerate() {
            log[(start + n * 8192 + i) % LOG] = *byte;
        }
    }
}

fn sequences(overlay: &Overlay) -> Vec<u8> {
    overlay.sectors().map(|(_, s)| s[100]).collect()
}

#[test]
fn the_newest_complete_sequence_is_found_wherever_it_lies() {
    for start in [0, 4096, LOG / 2, LOG - 8192, LOG - 4096, LOG - 3 * 8192] {
        let log = ring(start, 5, 6);
        let overlay = active(&log, 0, GUID, 8 << 20).unwrap();
        assert_eq!(sequences(&overlay), [5, 6, 7, 8, 9, 10], "start {start}");
        let (_, first) = overlay.sectors().next().unwrap();
        assert_eq!(*first, sector(5));
    }
}

#[test]
fn a_ring_full_of_one_sequence_is_scanned_once() {
    let log = ring(4096, 1, LOG / 8192);
    assert_eq!(sequences(&active(&log, 0, GUID, 8 << 20).unwrap()).len(), LOG / 8192);
}

#[test]
fn entries_before_the_tail_are_not_replayed() {
    let mut log = ring(0, 1, 4);
    lay(&mut log, 4 * 8192, 5, 2, 4 * 8192);
    assert_eq!(sequences(&active(&log, 0, GUID, 8 << 20).unwrap()), [5, 6]);
}

#[test]
fn torn_and_foreign_entries_end_a_sequence() {
    for (at, what) in
        [(9, "length"), (70, "descriptor"), (4096 + 500, "data"), (8191, "sequence"), (33, "guid")]
    {
        let mut log = ring(0, 1, 5);
        log[4 * 8192 + at] ^= 1;
        assert_eq!(sequences(&active(&log, 0, GUID, 8 << 20).unwrap()), [1, 2, 3, 4], "{what}");
    }
    let mut log = ring(0, 1, 3);
    lay(&mut log, 3 * 8192, 9, 1, 0);
    assert_eq!(sequences(&active(&log, 0, GUID, 8 << 20).unwrap()), [1, 2, 3], "a gap in the numbers");
}

#[test]
fn a_log_without_a_sequence_and_a_cut_file_are_corrupt() {
    let corrupt = |log: &[u8], size| matches!(active(log, 0, GUID, size), Err(VhdxError::Corrupt { .. }));
    assert!(corrupt(&vec![0; LOG], 8 << 20));
    assert!(corrupt(&ring(0, 1, 1), (8 << 20) - 1), "shorter than what was flushed");
    let mut lost = vec![0; LOG];
    lay(&mut lost, 0, 5, 2, 8192 * 9);
    assert!(corrupt(&lost, 8 << 20), "the tail is not there");
    let mut far = vec![0; LOG];
    far[..4096].copy_from_slice(&entry(GUID, 1, 0, 0, Some(u64::MAX - 8191..u64::MAX - 4095), &[]));
    assert!(corrupt(&far, 8 << 20));
}

/// Entries that begin at each sector and all reach over half of the log: their sums alone would take long.
#[test]
fn overlapping_entries_are_refused_in_bounded_time() {
    let mut log = vec![0; 16 << 20];
    let length = (log.len() / 2) as u32;
    for at in (0..log.len()).step_by(LOG_SECTOR) {
        let header = LogEntryHeader {
            signature: ENTRY_SIGNATURE,
            checksum: U32::ZERO,
            entry_length: U32::new(length),
            tail: U32::ZERO,
            sequence_number: 1.into(),
            descriptor_count: U32::ZERO,
            reserved: U32::ZERO,
            log_guid: GUID,
            flushed_file_offset: 0.into(),
            last_file_offset: 0.into(),
        };
        log[at..at + 64].copy_from_slice(header.as_bytes());
    }
    // The budget of bytes that are summed ends it, before the last of the 4096 entries was looked at.
    let error = active(&log, 0, GUID, 1 << 30).unwrap_err();
    assert!(
        matches!(error, VhdxError::Corrupt { what: "entries of the log overlap each other", .. }),
        "{error}"
    );
}

#[test]
fn zeros_and_sectors_cover_each_other_in_order() {
    let mut log = vec![0; LOG];
    let base = 1u64 << 20;
    let entries = [
        entry(GUID, 1, 0, 8 << 20, None, &[(base, sector(1)), (base + 4096, sector(2))]),
        entry(GUID, 2, 0, 8 << 20, Some(base + 4096..base + 3 * 4096), &[]),
        entry(GUID, 3, 0, 8 << 20, Some(base + 3 * 4096..base + 4 * 4096), &[(base + 2 * 4096, sector(3))]),
    ];
    let mut at = 0;
    for entry in &entries {
        log[at..at + entry.len()].copy_from_slice(entry);
        at += entry.len();
    }
    let overlay = active(&log, 0, GUID, 8 << 20).unwrap();
    assert_eq!(
        overlay.zeros().collect::<Vec<_>>(),
        std::iter::once(base + 4096..base + 4 * 4096).collect::<Vec<_>>()
    );
    let mut expected = vec![0xEE; 6 * 4096];
    expected[4096..8192].copy_from_slice(&sector(1));
    expected[8192..5 * 4096].fill(0);
    expected[3 * 4096..4 * 4096].copy_from_slice(&sector(3));
    for (offset, len) in [(0usize, 6 * 4096), (1, 4095), (4000, 9000), (4096 + 7, 1), (3 * 4096 + 5, 5000)] {
        let mut buf = vec![0xEE; len];
        overlay.cover(&mut buf, base - 4096 + offset as u64);
        assert!(buf == expected[offset..offset + len], "{offset} {len}");
    }
}

/// Puts `log` into the file and says in its headers that it is in use.
fn with_log(disk: &MemDisk, log: &[u8]) {
    for (n, at) in HEADER_OFFSETS.into_iter().enumerate() {
        let mut bytes = vec![0; 4096];
        disk.read_exact_at(&mut bytes, at).unwrap();
        let (mut header, _) = Header::read_from_prefix(&bytes).unwrap();
        header.log_guid = GUID;
        header.sequence_number = (50 + n as u64).into();
        disk.write_all_at(&header_bytes(header), at).unwrap();
        disk.write_all_at(log, header.log_offset.get()).unwrap();
    }
}

/// A file with a log in use, and the content of its disk: the BAT, a block behind the end of the file and a zeroed one
/// come from the log alone.
pub(super) fn with_a_log_in_use() -> (Vec<u8>, Vec<u8>) {
    let disk = disk_of(8 << 20, &[(0, vec![1; 2 << 20])]);
    let bat = 3 * MIB;
    let mut page = [0; LOG_SECTOR];
    disk.read_exact_at(&mut page, bat).unwrap();
    let file = disk.size().unwrap();
    page[3 * 8..4 * 8].copy_from_slice(&(file | 6).to_le_bytes());
    let block_one = 5 * MIB;
    let bytes = entry(
        GUID,
        9,
        0,
        file,
        Some(block_one..block_one + MIB / 2),
        &[(bat, page), (file + 4096, sector(9))],
    );
    let mut bytes = bytes;
    bytes[56..64].copy_from_slice(&(file + MIB).to_le_bytes());
    let sum = checksum(&bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
    with_log(&disk, &bytes);

    let mut expected = vec![0; 8 << 20];
    expected[..1 << 20].fill(1);
    expected[3 << 19..2 << 20].fill(1);
    expected[(3 << 20) + 4096..(3 << 20) + 8192].copy_from_slice(&sector(9));
    (disk.to_vec(), expected)
}

#[test]
fn readers_replay_in_memory_and_writers_into_the_file() {
    let (before, mut expected) = with_a_log_in_use();
    let disk = MemDisk::from(before.clone());
    let reader = Vhdx::open(&disk).unwrap();
    assert!(reader.is_dirty());
    assert!(read_all(&reader) == expected);
    assert_eq!(reader.allocated(), [0..2 << 20, 3 << 20..4 << 20]);
    assert!(disk.to_vec() == before, "a reader wrote");

    let writer = VhdxWriter::open(&disk).unwrap();
    assert!(read_all(&writer) == expected);
    writer.write_all_at(b"new", 5 << 20).unwrap();
    writer.sync().unwrap();
    drop(writer);
    expected[5 << 20..(5 << 20) + 3].copy_from_slice(b"new");
    let again = Vhdx::open(&disk).unwrap();
    assert!(!again.is_dirty());
    assert!(read_all(&again) == expected);
}

/// Without an end of the search, each entry of a stale run begins one more walk over the rest of it.
#[test]
fn a_log_of_stale_entries_is_walked_over_a_few_times_and_not_once_for_each() {
    const BIG: usize = 32 << 20;
    let sectors = BIG / LOG_SECTOR;
    let mut log = vec![0; BIG];
    // One run of small entries whose head's tail lies nowhere; behind it the newest sequence.
    let newest = sectors - 4;
    for n in 0..newest {
        let bytes = entry(GUID, 100 + n as u64, (BIG - LOG_SECTOR) as u32, 8 << 20, None, &[]);
        log[n * LOG_SECTOR..][..LOG_SECTOR].copy_from_slice(&bytes);
    }
    let at = newest * LOG_SECTOR;
    let bytes = entry(GUID, 1 << 40, at as u32, 8 << 20, None, &[(4 << 20, sector(7))]);
    log[at..at + bytes.len()].copy_from_slice(&bytes);
    disk_io::steps::taken();
    let overlay = active(&log, 0, GUID, 8 << 20).unwrap();
    assert_eq!(sequences(&overlay), [7]);
    let steps = disk_io::steps::taken();
    assert!(steps <= 3 * sectors as u64, "{steps} steps for {sectors} sectors");
}

/// Runs that begin at different places and share an end can't be told from each other beforehand: they have a budget.
#[test]
fn a_log_whose_entries_lie_inside_each_other_is_refused_before_it_is_walked_over_for_ever() {
    const BIG: usize = 16 << 20;
    let sectors = BIG / LOG_SECTOR;
    let mut log = vec![0; BIG];
    // The last entry reaches around the ring's end, over the first half: each run from there finds the ring full.
    let half = sectors / 2;
    for n in 0..sectors - 1 {
        let bytes = entry(GUID, 1 + n as u64, (BIG - LOG_SECTOR) as u32, 8 << 20, None, &[]);
        log[n * LOG_SECTOR..][..LOG_SECTOR].copy_from_slice(&bytes);
    }
    let mut last = entry(GUID, sectors as u64, 0, 8 << 20, None, &[]);
    let length = (half * LOG_SECTOR) as u32;
    last[8..12].copy_from_slice(&length.to_le_bytes());
    last[4..8].fill(0);
    let sum =
        log[..(half - 1) * LOG_SECTOR].chunks(LOG_SECTOR).fold(crc32c::crc32c(&last), crc32c::crc32c_append);
    last[4..8].copy_from_slice(&sum.to_le_bytes());
    log[BIG - LOG_SECTOR..].copy_from_slice(&last);
    disk_io::steps::taken();
    let outcome = active(&log, 0, GUID, 8 << 20);
    let steps = disk_io::steps::taken();
    assert!(steps <= 17 * sectors as u64, "{steps} steps for {sectors} sectors: {}", outcome.is_ok());
}
