//! Any bytes as a VHD footer: an error, or a footer that says the same when it is written again.
#![no_main]

use bound::Limit;
use libfuzzer_sys::fuzz_target;
use vhd_image::vhd::{FOOTER_SIZE, Footer};

mod bound;

/// A footer is one sector, whatever follows.
const LIMIT: Limit = Limit { held: (64 << 10, 0), asked: (64 << 10, 0), disk: (0, 0), steps: (64, 0) };

/// Where the checksum lies, and what it covers besides (VHD specification 1.0, "Hard Disk Footer Format").
const CHECKSUM: std::ops::Range<usize> = 64..68;

fuzz_target!(|bytes: &[u8]| LIMIT.hold(bytes.len(), || one(bytes)));

fn one(bytes: &[u8]) {
    let _ = Footer::parse(bytes);
    // And with the checksum put right, so that what is behind it is met.
    let Some(mut sector) = bytes.first_chunk::<FOOTER_SIZE>().copied() else { return };
    sector[CHECKSUM].fill(0);
    let sum = !sector.iter().fold(0u32, |sum, b| sum.wrapping_add(u32::from(*b)));
    sector[CHECKSUM].copy_from_slice(&sum.to_be_bytes());
    if let Ok(footer) = Footer::parse(&sector) {
        let again = Footer::parse(&footer.to_bytes()).expect("what was written");
        assert_eq!(again, footer);
    }
}
