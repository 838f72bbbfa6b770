//! Damaged tars and full disks: an error, never a panic and never other bytes.

use crate::{
    build::Tar,
    layer::{apply_ok, options, try_apply},
};
use disk_io::{FaultDisk, MemDisk, ReadAt, WriteAt};
use layer_codec::{
    DiffError,
    apply::{ApplyOptions, NoLowers, apply},
    record,
};
use proptest::prelude::*;

/// A tar with a bit of everything.
fn mixed() -> Vec<u8> {
    Tar::new()
        .dir("./", 0o755)
        .dir("d", 0o755)
        .file("d/small", b"small")
        .file("d/block", &[1; 4096])
        .pax(&[("path", b"d/\xff"), ("SCHILY.xattr.user.x", b"\0\n"), ("mtime", b"-1.5")])
        .file("x", &[7; 9000])
        .link("later", "z")
        .symlink("s", "d")
        .file("s/through", b"1")
        .file(".wh.gone", b"")
        .file("d/.wh..wh..opq", b"")
        .device("null", b'3', 1, 3)
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"holes"),
            ("GNU.sparse.realsize", b"100000"),
        ])
        .file("GNUSparseFile.0/holes", &[&b"1\n50000\n100\n"[..], &[0; 500], &[9; 100]].concat())
        .file("d/small", b"again")
        .file("z", b"the end")
        .end()
}

/// Applies in memory; what came back if it was taken.
fn outcome(tar: &[u8], options: &ApplyOptions) -> Result<Vec<u8>, DiffError> {
    let (image, kept) = (MemDisk::new(), MemDisk::new());
    let summary = apply(tar, &image, &kept, &mut NoLowers, options)?;
    assert_eq!(summary.file_bytes, image.size().expect("a size"));
    let mut back = Vec::new();
    record::replay(&image, &kept, &mut back)?;
    Ok(back)
}

#[test]
fn odd_but_legal_streams_come_back() {
    let plain = mixed();
    let mut padded = plain.clone();
    // The padding of `d/small`, behind its header at 1024.
    padded[1024 + 512 + 5..1024 + 1024].fill(0xaa);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("no end blocks", plain[..plain.len() - 1024].to_vec()),
        ("one end block", plain[..plain.len() - 512].to_vec()),
        ("padding that is not zero", padded),
        ("garbage behind the end", [&plain[..], b"garbage"].concat()),
        ("much behind the end", [&plain[..], &vec![5; 3 << 20]].concat()),
        ("another archive behind the end", [&plain[..], &plain].concat()),
        ("blocked", [&plain[..], &[0; 9000]].concat()),
        ("empty layer", vec![0; 1024]),
    ];
    for (what, tar) in cases {
        let applied = apply_ok(&tar);
        let (image, kept) = (applied.image().expect("an image"), applied.record().expect("a record"));
        assert_eq!(
            record::replay(&image, &kept, std::io::sink()).expect(what).tar_bytes,
            tar.len() as u64,
            "{what}"
        );
    }
}

#[test]
fn every_truncation_is_an_error_or_a_shorter_archive() {
    let tar = mixed();
    let mut legal = 0;
    for len in 0..tar.len() {
        match outcome(&tar[..len], &options()) {
            Ok(back) => {
                assert!(back == tar[..len]);
                assert_eq!(len % 512, 0, "only whole entries make an archive");
                legal += 1;
            }
            Err(DiffError::Tar(_)) => {}
            // A link whose target is cut off.
            Err(DiffError::Entry { .. }) => assert_eq!(len % 512, 0),
            Err(e) => panic!("{len}: {e}"),
        }
    }
    assert!((3..20).contains(&legal), "{legal}");
}

#[test]
fn full_disks_are_reported_as_such() {
    let tar = mixed();
    let applied = try_apply(&tar, &mut NoLowers, &options()).expect("the tar is good");
    let (file, kept) = (applied.summary.file_bytes, applied.summary.record_bytes);
    for i in 0..40 {
        let image = FaultDisk::full_after(MemDisk::new(), file * i / 60);
        if let Err(e) = apply(&tar[..], &image, MemDisk::new(), &mut NoLowers, &options()) {
            assert_eq!(e.io_kind(), Some(std::io::ErrorKind::StorageFull), "{e:?}");
        } else {
            assert!(i > 0, "something is written");
        }
        let kept = FaultDisk::full_after(MemDisk::new(), kept * i / 40);
        let e = apply(&tar[..], MemDisk::new(), &kept, &mut NoLowers, &options())
            .expect_err("the record's disk is full");
        assert_eq!(e.io_kind(), Some(std::io::ErrorKind::StorageFull), "{e:?}");
    }
}

#[test]
fn a_damaged_image_never_gives_other_bytes() {
    let tar = mixed();
    let (image, kept) = (MemDisk::new(), MemDisk::new());
    apply(&tar[..], &image, &kept, &mut NoLowers, &options()).expect("the tar is good");
    let at = image.to_vec().windows(64).position(|w| w == [7; 64]).expect("the data of x");
    image.write_all_at(&[8], at as u64 + 10).expect("written");
    let mut out = Vec::new();
    let e = record::replay(&image, &kept, &mut out).expect_err("the damage is found");
    assert!(matches!(e, DiffError::Corrupt { .. }), "{e}");
    assert!(out.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Damage with and without a right checksum: an error, or exactly these bytes back.
    #[test]
    fn mutated_tars_are_refused_or_come_back(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        reseal in any::<bool>(),
    ) {
        let mut tar = mixed();
        for (at, byte) in changes {
            let at = at.index(tar.len());
            tar[at] = byte;
            let block = at / 512 * 512;
            if reseal && tar[block + 257..].starts_with(b"ustar") {
                tar[block + 148..block + 156].fill(b' ');
                let sum: u32 = tar[block..block + 512].iter().map(|&b| u32::from(b)).sum();
                tar[block + 148..block + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        if let Ok(back) = outcome(&tar, &options()) {
            prop_assert!(back == tar);
        }
    }
}
