//! Any bytes as a tar: an error, or an image that is sound and gives the same bytes back.
#![no_main]

use bound::{Counted, Limit};
use disk_io::{MemDisk, SubDisk};
use ext4_image::check;
use layer_codec::{
    LayerKind, LayerSource, NoHooks,
    apply::{ApplyOptions, NoLowers, apply},
    export, record,
};
use libfuzzer_sys::fuzz_target;

mod bound;

/// Larger images (sparse files of terabytes cost the writer nothing) would only fill the fuzzer's memory.
const MAX_IMAGE: u64 = 16 << 20;

/// The image may be as large as its bound whatever the tar: sparse files and deep names. It is written, checked, hashed and
/// exported.
const LIMIT: Limit = Limit {
    held: (12 * MAX_IMAGE, 16),
    asked: (64 * MAX_IMAGE, 256),
    disk: (32 * MAX_IMAGE, 64),
    steps: (1 << 20, 64),
};

fuzz_target!(|tar: &[u8]| LIMIT.hold(tar.len(), || one(tar)));

fn one(tar: &[u8]) {
    let image = Counted(MemDisk::new());
    let exact = Counted(MemDisk::new());
    let options = ApplyOptions {
        max_image_bytes: MAX_IMAGE,
        verity: tar.len().is_multiple_of(2),
        ..ApplyOptions::default()
    };
    let Ok(summary) = apply(tar, &image, &exact, &mut NoLowers, &options) else { return };
    assert_eq!(summary.tar_bytes, tar.len() as u64);
    let mut back = Vec::new();
    record::replay(&image, &exact, &mut back).expect("the record of an applied tar");
    assert!(back == tar, "other bytes came back");
    let disk = SubDisk::new(&image, 0, summary.image_bytes);
    check::check(&disk, check::CheckLimits::default()).expect("an applied image");
    let layers = [LayerSource::new(&disk, LayerKind::Applied)];
    export(&layers, None, &Default::default(), &mut NoHooks, &mut std::io::sink()).expect("a canonical diff");
}
