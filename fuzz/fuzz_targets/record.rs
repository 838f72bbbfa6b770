//! Any bytes as an exact record, and changed ones of a sound record, against a sound image: the tar or an error.
//!
//! ```text
//!   input:  0 │ record                or   1 │ u16 offset │ u8 value │ u16 offset │ u8 value │ …
//! ```
#![no_main]

use bound::{Counted, Limit};
use disk_io::MemDisk;
use layer_codec::{
    apply::{ApplyOptions, NoLowers, apply},
    record,
};
use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

mod bound;

/// A record names bytes of the image again and again, some kilobytes with some bytes; it can't give more than the size
/// that it says, nor more than it has instructions for.
const LIMIT: Limit =
    Limit { held: (16 << 20, 256), asked: (32 << 20, 65536), disk: (16 << 20, 65536), steps: (64 << 10, 64) };

struct Sample {
    tar: Vec<u8>,
    image: MemDisk,
    record: Vec<u8>,
}

static SAMPLE: LazyLock<Sample> = LazyLock::new(|| {
    // Made by GNU tar: folders, files, a link, a long name, an xattr.
    let tar = include_bytes!("../corpus/tar_apply/gnu.tar").to_vec();
    let (image, exact) = (MemDisk::new(), MemDisk::new());
    let options = ApplyOptions::default();
    apply(tar.as_slice(), &image, &exact, &mut NoLowers, &options).expect("a sound tar");
    Sample { tar, image, record: exact.to_vec() }
});

fuzz_target!(|input: &[u8]| {
    LazyLock::force(&SAMPLE);
    LIMIT.hold(input.len(), || one(input));
});

fn one(input: &[u8]) {
    let sample = &*SAMPLE;
    let record = match input.split_first() {
        Some((0, record)) => record.to_vec(),
        Some((_, changes)) => {
            let mut record = sample.record.clone();
            for change in changes.chunks_exact(3) {
                let offset = usize::from(u16::from_le_bytes([change[0], change[1]])) % record.len();
                record[offset] = change[2];
            }
            record
        }
        None => return,
    };
    let sound = record == sample.record;
    let mut back = Vec::new();
    match record::replay(Counted(&sample.image), Counted(MemDisk::from(record)), &mut back) {
        // Whatever a record says, its digest holds it to the tar that it says it is of.
        Ok(summary) => assert!(back.len() as u64 == summary.tar_bytes && (!sound || back == sample.tar)),
        Err(error) => assert!(!sound, "{error}"),
    }
}
