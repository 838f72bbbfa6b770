//! Bytes of enemies: typed errors, never a panic, never much memory.

use super::super::{
    Vhdx, VhdxError, VhdxWriter,
    layout::{HEADER_OFFSETS, MIB, REGION_TABLE_OFFSETS, checksum},
};
use super::{disk_of, read_all};
use disk_io::{MemDisk, ReadAt, WriteAt};
use proptest::prelude::*;

fn sample() -> Vec<u8> {
    disk_of(6 << 20, &[(1 << 20, vec![1; 100]), (4 << 20, vec![2; 100])]).to_vec()
}

/// Opens and reads all that can be read; a disk of 64 TiB is read at its ends.
fn try_all(bytes: Vec<u8>) -> Result<(), VhdxError> {
    let disk = MemDisk::from(bytes);
    let vhdx = Vhdx::open(&disk)?;
    let size = vhdx.size().unwrap();
    if size <= 64 << 20 {
        read_all(&vhdx);
    } else {
        vhdx.read_at(&mut [0; 4096], size - 4096).unwrap();
    }
    vhdx.allocated();
    drop(VhdxWriter::open(&disk)?);
    Ok(())
}

/// Changes bytes and makes the sums of headers and region tables right again.
fn changed(at: usize, with: &[u8]) -> Vec<u8> {
    let mut bytes = sample();
    bytes[at..at + with.len()].copy_from_slice(with);
    for (offset, len) in HEADER_OFFSETS
        .map(|o| (o as usize, 4096))
        .into_iter()
        .chain(REGION_TABLE_OFFSETS.map(|o| (o as usize, 65536)))
    {
        let sum = checksum(&bytes[offset..offset + len]);
        bytes[offset + 4..offset + 8].copy_from_slice(&sum.to_le_bytes());
    }
    bytes
}

#[test]
fn each_lie_has_its_error() {
    let le = u64::to_le_bytes;
    let bat = 3 * MIB as usize;
    let (head, regi, meta) = (128 << 10, 192 << 10, 2 << 20);
    let item = meta + (64 << 10);
    let corrupt: &[(&str, usize, Vec<u8>)] = &[
        ("file identifier", 0, vec![b'x']),
        ("log offset", head + 72, le(4096).to_vec()),
        ("log over a region", head + 72, le(2 << 20).to_vec()),
        ("log beyond all", head + 72, le(u64::MAX << 20).to_vec()),
        // Found by fuzzing: a writer made the file so long that it reached behind the log.
        ("log beyond the file", head + 72, le(1 << 63).to_vec()),
        ("log guid without log", head + 48, vec![1]),
        ("many regions", regi + 8, vec![0xFF; 4]),
        ("no regions", regi + 8, vec![0; 4]),
        ("bat region at 0", regi + 32, le(0).to_vec()),
        ("bat region beyond all", regi + 32, le(u64::MAX << 20).to_vec()),
        ("bat region beyond the file", regi + 32, le(64 << 20).to_vec()),
        ("bat over metadata", regi + 32, le(2 << 20).to_vec()),
        ("bat of no size", regi + 40, vec![0; 4]),
        ("metadata signature", meta, vec![0]),
        ("many items", meta + 10, vec![0xFF; 2]),
        ("no items", meta + 10, vec![0; 2]),
        ("item outside", meta + 32 + 16, vec![0xFF; 4]),
        ("item of a wrong length", meta + 32 + 20, vec![4]),
        ("item twice", meta + 64, {
            let bytes = sample();
            bytes[meta + 32..meta + 48].to_vec()
        }),
        ("block size", item, vec![1]),
        ("block size 0", item, vec![0; 4]),
        ("disk of 0 bytes", item + 8, le(0).to_vec()),
        ("disk of 2^63 bytes", item + 8, le(1 << 63).to_vec()),
        ("disk larger than its bat", item + 8, le(1 << 40).to_vec()),
        ("sector size", item + 32, vec![1]),
        ("state 7", bat + 8, vec![7]),
        ("state 4", bat + 8, vec![4]),
        ("block at 0", bat, le(6).to_vec()),
        ("block in the log", bat, le(6 | 1 << 20).to_vec()),
        ("block beyond the file", bat, le(6 | 1 << 40).to_vec()),
        ("block beyond all", bat, le(6 | u64::MAX << 20).to_vec()),
        ("two blocks in one place", bat, le(6 | 4 << 20).to_vec()),
    ];
    try_all(changed(8, &[])).unwrap();
    for (what, at, with) in corrupt {
        let outcome = try_all(changed(*at, with));
        assert!(matches!(outcome, Err(VhdxError::Corrupt { .. })), "{what}: {outcome:?}");
    }
    let unsupported: &[(&str, usize, Vec<u8>)] = &[
        ("version", head + 66, vec![2]),
        ("a required region", regi + 16, vec![0xEE; 16]),
        ("a parent", item + 4, vec![2]),
        ("a required item", meta + 32, vec![0xEE; 16]),
    ];
    for (what, at, with) in unsupported {
        let outcome = try_all(changed(*at, with));
        assert!(matches!(outcome, Err(VhdxError::Unsupported(_))), "{what}: {outcome:?}");
    }
}

#[test]
fn one_broken_copy_of_header_and_table_does_no_harm() {
    for at in [HEADER_OFFSETS[0], HEADER_OFFSETS[1], REGION_TABLE_OFFSETS[0], REGION_TABLE_OFFSETS[1]] {
        let mut bytes = sample();
        bytes[at as usize + 40] ^= 1;
        try_all(bytes).unwrap_or_else(|e| panic!("{at}: {e}"));
    }
    for pair in [HEADER_OFFSETS, REGION_TABLE_OFFSETS] {
        let mut bytes = sample();
        for at in pair {
            bytes[at as usize + 40] ^= 1;
        }
        assert!(matches!(try_all(bytes), Err(VhdxError::Corrupt { .. })));
    }
}

#[test]
fn files_cut_anywhere_are_corrupt() {
    let bytes = sample();
    for len in (0..bytes.len()).step_by(60_001).chain([0, 1, 8, 65_536, bytes.len() - 1]) {
        let outcome = try_all(bytes[..len].to_vec());
        assert!(matches!(outcome, Err(VhdxError::Corrupt { .. })), "{len}: {outcome:?}");
    }
}

#[test]
fn differing_headers_of_one_age_are_corrupt() {
    let mut bytes = changed((64 << 10) + 8, &1u64.to_le_bytes());
    try_all(bytes.clone()).unwrap();
    bytes = changed((64 << 10) + 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xEE]);
    assert!(matches!(try_all(bytes), Err(VhdxError::Corrupt { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// Random changes where structures are, sums made right.
    #[test]
    fn random_changes_never_panic(
        at in prop_oneof![
            65_536..65_616usize, 131_072..131_152usize, 196_608..196_704usize,
            (2usize << 20)..(2 << 20) + 200, (2usize << 20) + 65_536..(2 << 20) + 65_576, (3usize << 20)..(3 << 20) + 64
        ],
        with in proptest::collection::vec(any::<u8>(), 1..12),
    ) {
        let _ = try_all(changed(at, &with));
    }
}

/// A sparse file that claims 64 TiB: refused or opened with a bounded table.
#[test]
fn huge_claims_take_no_memory() {
    let file = tempfile::tempfile().unwrap();
    let mut bytes = changed((2 << 20) + (64 << 10) + 8, &(64u64 << 40).to_le_bytes());
    bytes[(192 << 10) + 40..(192 << 10) + 44].copy_from_slice(&(600u32 << 20).to_le_bytes());
    let sum = checksum(&bytes[192 << 10..256 << 10]);
    bytes[(192 << 10) + 4..(192 << 10) + 8].copy_from_slice(&sum.to_le_bytes());
    file.write_all_at(&bytes, 0).unwrap();
    file.set_len(1 << 40).unwrap();
    let outcome = Vhdx::open(&file);
    assert!(matches!(outcome, Err(VhdxError::Unsupported(_))), "{outcome:?}");
}
