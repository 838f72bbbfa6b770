//! A qcow2 with any changes: opened, and some of its clusters read.
//!
//! ```text
//!   input:  u32 offset │ u8 length │ bytes │ u32 offset │ u8 length │ bytes │ …
//! ```
#![no_main]

use bound::Limit;
use disk_io::{MemDisk, ReadAt, WriteAt};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use vhd_image::qcow2::{Qcow2, create_from};

mod bound;

/// An L1 table of at most 32 MiB in the file, tables of clusters that are kept, a compressed cluster and what it becomes.
const LIMIT: Limit =
    Limit { held: (128 << 20, 16), asked: (512 << 20, 1024), disk: (256 << 20, 1024), steps: (64 << 10, 16) };
/// Bytes of the disk.
const DISK: u64 = 9 << 20;
/// Reads of one input.
const READS: u64 = 64;

/// The image before the changes.
static IMAGE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let disk = MemDisk::new();
    disk.set_len(DISK).expect("memory");
    for at in [0, 70_000, 5 << 20] {
        disk.write_all_at(&[7; 3000], at).expect("memory");
    }
    let image = MemDisk::new();
    create_from(&image, DISK, &disk, std::slice::from_ref(&(0..DISK))).expect("an image");
    image.to_vec()
});

fuzz_target!(|input: &[u8]| {
    LazyLock::force(&IMAGE);
    LIMIT.hold(input.len(), || one(input));
});

fn one(mut rest: &[u8]) {
    let mut bytes = IMAGE.clone();
    while let Some((head, tail)) = rest.split_first_chunk::<5>() {
        let [a, b, c, d, len] = *head;
        let (part, tail) = tail.split_at(usize::from(len).min(tail.len()));
        let offset = u32::from_le_bytes([a, b, c, d]) as usize % bytes.len();
        let n = part.len().min(bytes.len() - offset);
        bytes[offset..offset + n].copy_from_slice(&part[..n]);
        rest = tail;
    }
    let Ok(disk) = Qcow2::open(MemDisk::from(bytes)) else { return };
    let size = disk.size().expect("of the header");
    let mut buffer = vec![0; 4096];
    for n in 0..READS {
        // The beginning, and places all over the disk.
        for at in [n << 16, size / READS * n] {
            let _ = disk.read_at(&mut buffer, at);
        }
    }
}
