//! What writer 2 makes of a tar: these bytes are what layers of this release are, and must not change without a new number.
//!
//! The tars are those of `tests/golden/store-v1.tar.xz`, where writer 1's images of them lie as well;
//! `tests/protocol/upgrade.rs` holds this program to those.

use crate::layer::{options, run};
use disk_io::{MemDisk, ReadAt};
use layer_codec::{
    DigestKind, TarDigest,
    apply::{NoLowers, apply},
};
use std::{env, fmt::Write, fs, path::Path, process::Command};

#[test]
fn the_images_of_writer_2_are_the_golden_ones() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let folder = tempfile::tempdir().expect("a folder can be made");
    run(Command::new("tar").arg("-xJSf").arg(golden.join("store-v1.tar.xz")).arg("-C").arg(folder.path()));
    let mut found = String::new();
    for name in ["base", "top", "noted"] {
        let tar = fs::read(folder.path().join(name).with_extension("tar")).expect("a tar of release 1");
        let (image, record) = (MemDisk::new(), MemDisk::new());
        let summary = apply(&tar[..], &image, &record, &mut NoLowers, &options()).expect("it goes in");
        let mut bytes = vec![0; summary.file_bytes as usize];
        image.read_exact_at(&mut bytes, 0).expect("an image");
        writeln!(found, "{name} {}", TarDigest::of(DigestKind::Blake3, &bytes)).expect("a string");
        if name == "base" {
            let old = fs::read(folder.path().join("home/base/layer.vhd")).expect("writer 1's image");
            assert!(old != bytes, "writer 1 made the same of what writer 2 takes otherwise");
        }
    }
    let path = golden.join("writer-v2.txt");
    if env::var_os("LCOW_WRITE_GOLDEN").is_some() {
        fs::write(&path, &found).expect("the golden file can be written");
    }
    assert_eq!(
        found,
        fs::read_to_string(&path).expect("the golden file"),
        "a new image of an old tar is writer 3's"
    );
}
