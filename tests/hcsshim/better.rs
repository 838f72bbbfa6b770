//! Every fault of that tool, and what the default profile makes of the same tar: one test a fault.

use crate::{
    image::{Image, hcsshim, in_hcsshim, make, make_from, text},
    kernel::{Mounted, mount, tree},
    profile,
    tars::{Meta, Tar},
};
use ext4_image::{Ext4, hcsshim::LCOW_MAX_DISK};
use layer_codec::apply::ApplyOptions;
use std::{
    fs,
    io::{self, Read},
    os::unix::fs::{FileExt, MetadataExt},
    process::Command,
    time::Duration,
};

/// An image of the default profile, for which `e2fsck -fn` says nothing and gives 0.
fn default(tar: &[u8]) -> Image {
    let image = make(tar, ApplyOptions::default()).unwrap_or_else(|e| panic!("{}", text(&e)));
    assert_clean(&image);
    image
}

fn assert_clean(image: &Image) {
    let out = Command::new("e2fsck").arg("-fn").arg(image.path()).output().expect("this test needs e2fsck");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
}

fn refused_in_hcsshim(tar: &[u8]) {
    assert!(hcsshim(tar, profile(LCOW_MAX_DISK, true, false)).is_err());
}

/// A tar that is made while it is read: entry `i` from `0..count`.
struct Made<F> {
    entry: F,
    left: std::ops::Range<u64>,
    now: io::Cursor<Vec<u8>>,
    ended: bool,
}

fn made<F: Fn(u64) -> Vec<u8>>(count: u64, entry: F) -> Made<F> {
    Made { entry, left: 0..count, now: io::Cursor::default(), ended: false }
}

impl<F: Fn(u64) -> Vec<u8>> Read for Made<F> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let n = self.now.read(buf)?;
            if n > 0 || self.ended {
                return Ok(n);
            }
            let next = self.left.next();
            self.ended = next.is_none();
            self.now = io::Cursor::new(next.map_or_else(|| vec![0; 1024], &self.entry));
        }
    }
}

#[test]
fn e2fsck_finds_nothing_where_it_finds_fault_with_the_tools_images() {
    for case in crate::CASES {
        let tar = (case.tar)();
        // Names that begin above the root and attributes that Linux refuses are errors in this profile; everything else of
        // the corpus is taken.
        match make(&tar, ApplyOptions::default()) {
            Ok(image) => assert_clean(&image),
            Err(e) => {
                let e = text(&e);
                if e.contains("the target of a symbolic link has") {
                    // As long as a block: larger blocks take it.
                    let options = ApplyOptions { block_size: 4096, ..ApplyOptions::default() };
                    let image = make_from(tar.as_slice(), options, |_, _| {});
                    assert_clean(&image.unwrap_or_else(|e| panic!("{}: {}", case.name, text(&e))));
                    continue;
                }
                let known = ["leaves the layer's root", "is used as a folder", "linux refuses its attribute"];
                assert!(known.iter().any(|k| e.contains(k)), "{}: {e}", case.name);
            }
        }
    }
}

#[test]
fn no_lost_and_found_is_in_the_root() {
    let found = tree(&default(&Tar::default().file("x", b"1").end()));
    assert_eq!(found.keys().filter(|name| !name.is_empty() && *name != ".").collect::<Vec<_>>(), ["x"]);
}

#[test]
fn dates_from_1901_to_2446_are_kept() {
    let dates = [
        -2_147_483_648,
        -2_000_000_000,
        -1,
        0,
        2_147_483_647,
        2_147_483_648,
        4_294_967_296,
        15_032_385_535i64,
    ];
    let mut tar = Tar::default();
    for date in dates {
        tar = tar.add(
            format!("{date}").as_bytes(),
            b'0',
            b"",
            b"",
            &Meta::default().pax("mtime", date.to_string()),
        );
    }
    let found = tree(&default(&tar.end()));
    for date in dates {
        assert_eq!(found[&date.to_string()].mtime.0, date);
    }
}

#[test]
fn a_sparse_file_beyond_42_gib_has_right_extents_and_stays_sparse() {
    const SIZE: u64 = 60 << 30;
    // What lies at the start of the 400th extent of 128 MiB is where that tool's second leaf would be wrong.
    let pieces: Vec<(u64, &[u8])> = vec![(0, b"begin"), (400 << 27, b"middle"), (SIZE - 3, b"end")];
    let tar = Tar::default().sparse("big", SIZE, &pieces, Meta::default()).end();
    refused_in_hcsshim(&tar);
    let image = default(&tar);
    assert!(image.summary.image_bytes < 1 << 20, "{}", image.summary.image_bytes);
    let mounted = mount(&image);
    let file = fs::File::open(mounted.path().join("big")).expect("a file");
    let meta = file.metadata().expect("a file");
    assert_eq!(meta.len(), SIZE);
    assert!(meta.blocks() * 512 < 64 << 10, "{} blocks", meta.blocks());
    for (at, data) in pieces {
        let mut found = vec![0; data.len()];
        file.read_exact_at(&mut found, at).expect("a file");
        assert_eq!(found, data, "at {at}");
    }
}

#[test]
fn what_the_tool_refuses_is_applied() {
    let tar = Tar::default()
        .file("twice", b"first")
        .file("twice", b"second")
        .file("gone", b"1")
        .file(".wh.gone", b"")
        .link("forward", "target")
        .file("target", b"t")
        .file("was-file", b"1")
        .dir("was-file")
        .add(b"attr", b'0', b"", b"", &Meta::default().xattr("user.big", vec![b'v'; 60_000]))
        .end();
    refused_in_hcsshim(&tar);
    let found = tree(&default(&tar));
    assert_eq!(found["twice"].content, b"second");
    assert_eq!((found["gone"].mode, found["gone"].device), (0o020_000, (0, 0)), "a whiteout");
    assert_eq!(found["forward"].content, b"t");
    assert_eq!(found["target"].same_as.as_deref(), Some("forward"));
    assert_eq!(found["was-file"].mode & 0o170_000, 0o040_000);
    assert_eq!(found["attr"].xattrs["user.big"].len(), 60_000);
}

#[test]
fn the_same_tar_gives_the_same_file() {
    let tar = crate::tars::random(4, 80, crate::tars::Wildness::Inside);
    for options in [ApplyOptions::default(), in_hcsshim(profile(LCOW_MAX_DISK, true, true))] {
        let [a, b] = [(); 2].map(|()| make(&tar, options.clone()).unwrap_or_else(|e| panic!("{}", text(&e))));
        // UUIDs, tree and footer included.
        assert!(fs::read(a.path()).expect("an image") == fs::read(b.path()).expect("an image"));
    }
}

#[test]
fn many_small_files_stay_small() {
    // That tool: 1.31 GB.
    let tar = made(300_000, |i| {
        Tar::default().file(&format!("d{:03}/file-{i}", i / 1000), &[i as u8 | 1; 200]).bytes()
    });
    let image = make_from(tar, ApplyOptions::default(), |_, _| {}).unwrap_or_else(|e| panic!("{}", text(&e)));
    assert!(image.summary.image_bytes <= 175_000_000, "{} bytes", image.summary.image_bytes);
    assert_clean(&image);
}

#[test]
fn a_layer_like_node_modules_is_at_most_a_fifth_larger_than_its_tar() {
    // Sizes of files as they are in such folders: half below 1 KiB, a median of 1 KiB, a mean of 5 KiB.
    let sizes = [90, 180, 350, 500, 700, 950, 1100, 1300, 1700, 2300, 3200, 4700, 7400, 12_000, 40_000u64];
    let tar = made(60_000, |i| {
        let size = sizes[(i * 7 % 15) as usize] + i % 61;
        Tar::default()
            .file(
                &format!("package/node_modules/p{:04}/lib/file-{i}.js", i / 20),
                &vec![i as u8 | 1; size as usize],
            )
            .bytes()
    });
    let image = make_from(tar, ApplyOptions::default(), |_, _| {}).unwrap_or_else(|e| panic!("{}", text(&e)));
    let summary = &image.summary;
    println!("{} bytes of image for {} of tar", summary.image_bytes, summary.tar_bytes);
    assert!(
        summary.image_bytes * 10 <= summary.tar_bytes * 12,
        "{} of {}",
        summary.image_bytes,
        summary.tar_bytes
    );
}

/// Processor time of this thread: other work on the machine does not count.
fn processor_time() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").expect("a kernel with scheduler statistics");
    Duration::from_nanos(text.split(' ').next().and_then(|n| n.parse().ok()).expect("a number"))
}

/// Time to look every name up once, in an order that is none, in a fresh mount.
fn lookups(mounted: &Mounted, count: u64) -> Duration {
    let folder = mounted.path().join("many");
    let names: Vec<_> = (0..count).map(|i| folder.join(name(i * 7919 % count))).collect();
    let begin = processor_time();
    for name in &names {
        fs::symlink_metadata(name).expect("it is there");
    }
    processor_time().saturating_sub(begin)
}

fn name(i: u64) -> String {
    format!("file-number-{i}")
}

#[test]
fn lookups_in_a_folder_of_100_000_are_as_fast_as_in_a_folder_of_the_kernels() {
    const COUNT: u64 = 100_000;
    let tar = made(COUNT, |i| Tar::default().file(&format!("many/{}", name(i)), b"").bytes());
    let image = make_from(tar, ApplyOptions::default(), |_, _| {}).unwrap_or_else(|e| panic!("{}", text(&e)));
    assert_clean(&image);
    let dir = tempfile::tempdir().expect("a folder");
    let disk = dir.path().join("mkfs.img");
    let file = fs::File::create(&disk).expect("a file");
    file.set_len(256 << 20).expect("a file");
    let made =
        Command::new("mkfs.ext4").args(["-q", "-F", "-N", "120000"]).arg(&disk).status().expect("mkfs.ext4");
    assert!(made.success());
    {
        let mounted = Mounted::new(&disk, dir.path(), "");
        fs::create_dir(mounted.path().join("many")).expect("a folder");
        for i in 0..COUNT {
            fs::File::create(mounted.path().join("many").join(name(i))).expect("a file");
        }
        // A mount namespace that another test makes now keeps this mount, and its unwritten data, beyond the unmount.
        let synced = Command::new("sync").arg("--file-system").arg(mounted.path()).status().expect("sync");
        assert!(synced.success());
    }
    let (mut ours, mut theirs) = (Duration::MAX, Duration::MAX);
    for _ in 0..5 {
        theirs = theirs.min(lookups(&Mounted::new(&disk, dir.path(), "ro"), COUNT));
        ours = ours.min(lookups(&mount(&image), COUNT));
    }
    let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
    println!("{COUNT} lookups: {ours:?}, in a folder of the kernel's {theirs:?}: {ratio:.2} times");
    // Caches are shared with what else the machine does. Without hash trees it is fifty times.
    assert!(ratio < 2.0, "{ours:?} for {theirs:?}");
}

#[test]
fn a_disk_that_no_vhd_can_be_is_refused_before_its_data_come() {
    let tar = Tar::default().claims("huge", 2041 << 30);
    let e = make(&tar, ApplyOptions::default()).map(|_| ()).expect_err("2041 GiB are refused");
    assert!(text(&e).contains("\"huge\"") && text(&e).contains("at most 2040 GiB"), "{}", text(&e));
    // In profile hcsshim holes take blocks.
    let tar = ["a", "b", "c", "d"]
        .into_iter()
        .fold(Tar::default(), |tar, name| tar.sparse(name, 40 << 30, &[], Meta::default()))
        .end();
    let e = hcsshim(&tar, profile(LCOW_MAX_DISK, true, false)).map(|_| ()).expect_err("160 GiB in 128");
    assert!(text(&e).contains("\"d\""), "{}", text(&e));
}

#[test]
fn small_files_lie_in_their_inodes() {
    let image = default(&Tar::default().file("small", &[b's'; 100]).end());
    let fs = Ext4::open(&image.file).expect("an image");
    let file = fs.lookup(&fs.inode(fs.root()).expect("a root"), b"small").expect("a folder").expect("a file");
    let inline = fs.inline_bytes(&fs.inode(file).expect("an inode")).expect("an inode");
    assert_eq!(inline.as_deref(), Some(&[b's'; 100][..]));
}
