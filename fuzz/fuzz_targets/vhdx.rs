//! A VHDX with any changes, its checksums put right: opened, its log replayed, read, written, read again.
//!
//! ```text
//!   input:  options │ u32 offset │ u8 length │ bytes │ u32 offset │ u8 length │ bytes │ …
//! ```
#![no_main]

use bound::{Counted, Limit};
use disk_io::{MemDisk, ReadAt, WriteAt};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use vhd_image::vhdx::{CreateOptions, Vhdx, VhdxWriter, create};

mod bound;

/// The disk is the sample's, with the input's changes: its log and tables are read, its log replayed (at most 16 GiB of
/// zeros in a file that has them; here the file's own length), some sectors read and written.
const LIMIT: Limit =
    Limit { held: (96 << 20, 16), asked: (512 << 20, 1024), disk: (256 << 20, 1024), steps: (64 << 10, 16) };

/// What carries a CRC-32C in its bytes 4–7 ([MS-VHDX] 2.2.2, 2.2.3): headers and region tables.
const SUMMED: [(usize, usize); 4] =
    [(64 << 10, 4096), (128 << 10, 4096), (192 << 10, 65536), (256 << 10, 65536)];
/// Where the writer puts the log, and the size of its entries' sectors.
const LOG: usize = 1 << 20;
const DISK: u64 = 8 << 20;

fn put_sum(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let sum = crc32c::crc32c(bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// The disks before the changes, by sector size and block size.
static DISKS: LazyLock<[Vec<u8>; 4]> = LazyLock::new(|| {
    [(512, 1 << 20), (4096, 1 << 20), (512, 4 << 20), (4096, 2 << 20)].map(|(logical_sector, block_size)| {
        let options = CreateOptions {
            logical_sector,
            block_size,
            ..CreateOptions::new(DISK, uuid::Uuid::from_u128(7))
        };
        let disk = MemDisk::new();
        create(&disk, &options, &[(0, vec![1; 4096]), (5 << 20, vec![2; 70_000])]).expect("a disk");
        disk.to_vec()
    })
});

fuzz_target!(|input: &[u8]| {
    LazyLock::force(&DISKS);
    LIMIT.hold(input.len(), || one(input));
});

fn one(input: &[u8]) {
    let Some((&flags, mut rest)) = input.split_first() else { return };
    let mut bytes = DISKS[usize::from(flags & 3)].clone();
    while let Some((head, tail)) = rest.split_first_chunk::<5>() {
        let [a, b, c, d, len] = *head;
        let (part, tail) = tail.split_at(usize::from(len).min(tail.len()));
        let offset = u32::from_le_bytes([a, b, c, d]) as usize % bytes.len();
        let n = part.len().min(bytes.len() - offset);
        bytes[offset..offset + n].copy_from_slice(&part[..n]);
        rest = tail;
    }
    if flags & 0x80 == 0 {
        for (offset, len) in SUMMED {
            put_sum(&mut bytes[offset..offset + len]);
        }
        // A log entry says its own length, of which the sum is made ([MS-VHDX] 2.3.1.1).
        let mut at = LOG;
        while bytes.get(at..at + 4) == Some(b"loge".as_slice()) {
            let len = u32::from_le_bytes(bytes[at + 8..at + 12].try_into().expect("four bytes")) as usize;
            if len < 64 || !len.is_multiple_of(4096) || at + len > bytes.len() {
                break;
            }
            put_sum(&mut bytes[at..at + len]);
            at += len;
        }
    }
    let mut sector = vec![0; 4096];
    if let Ok(disk) = Vhdx::open(Counted(MemDisk::from(bytes.clone()))) {
        let size = disk.size().expect("a size");
        for offset in [0, 5 << 20, size.saturating_sub(4096)] {
            let _ = disk.read_at(&mut sector, offset);
        }
        let _ = disk.allocated();
    }
    let Ok(disk) = VhdxWriter::open(Counted(MemDisk::from(bytes))) else { return };
    let size = disk.size().expect("a size");
    for offset in [4096, 3 << 20] {
        if offset + 4096 <= size && disk.write_at(&[flags; 4096], offset).is_ok_and(|n| n == 4096) {
            disk.read_at(&mut sector, offset).expect("what was written");
            assert!(sector == [flags; 4096], "other bytes came back");
        }
    }
}
