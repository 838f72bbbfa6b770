//! Larger blocks in mid-stream: an image begun in small blocks is, byte for byte, the one begun in 4 KiB blocks, wherever
//! in the stream the need shows.

use crate::{
    build::Tar,
    layer::{report, run},
};
use disk_io::{MemDisk, ReadAt};
use ext4_image::{
    BlockSize, Timestamp, Xattr,
    writer::{Attributes, NodeKind},
};
use layer_codec::{
    DiffError,
    apply::{
        ApplyOptions, ApplyResources, ApplySummary, Growth, LowerLayers, LowerNode, NoLowers, apply,
        apply_growing,
    },
    record,
};
use std::{
    io::{self, Read},
    process::Command,
    sync::Arc,
};

type Disk = Arc<MemDisk>;

/// Gives a second pair of disks and remembers what was asked of it.
#[derive(Default)]
struct Second {
    pair: Option<(Disk, Disk)>,
    replays: Option<u64>,
    dropped: bool,
}

impl Growth<Disk, Disk> for Second {
    fn disks(&mut self) -> Result<Option<(Disk, Disk)>, DiffError> {
        assert!(self.pair.is_none(), "asked twice");
        self.pair = Some(Default::default());
        Ok(self.pair.clone())
    }

    fn replaying(&mut self, bytes: u64) -> Result<(), DiffError> {
        assert!(self.replays.is_none_or(|before| bytes > before), "{bytes} after {:?}", self.replays);
        self.replays = Some(bytes);
        Ok(())
    }

    fn replayed(&mut self, image: Disk, record: Disk) -> Result<(), DiffError> {
        assert!(!self.dropped && self.pair.is_some());
        assert!(!Arc::ptr_eq(&image, &self.pair.as_ref().unwrap().0));
        drop((image, record));
        self.dropped = true;
        Ok(())
    }
}

/// Gives a stream in pieces of odd sizes.
struct Dribble<'a>(&'a [u8]);

impl Read for Dribble<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = buf.len().min(7_001);
        self.0.read(&mut buf[..n])
    }
}

/// A layer below with what small blocks do not hold.
struct Below;

impl LowerLayers for Below {
    fn lookup(&mut self, path: &[&[u8]]) -> Result<Option<LowerNode>, DiffError> {
        let (inode, kind, xattrs) = match path {
            [b"long"] => (12, NodeKind::Symlink { target: vec![b't'; 3000] }, Vec::new()),
            [b"many"] => (13, NodeKind::File, many()),
            [b"plain"] => (14, NodeKind::Fifo, Vec::new()),
            _ => return Ok(None),
        };
        let mtime = Timestamp { secs: 5, nanos: 0 };
        let attributes = Attributes { permissions: 0o644, uid: 0, gid: 0, mtime, atime: None, ctime: None };
        Ok(Some(LowerNode { layer: 0, inode, kind, attributes, xattrs, size: 0, data: Vec::new() }))
    }

    fn read(&mut self, _: &LowerNode, _: u64, _: &mut [u8]) -> Result<usize, DiffError> {
        Ok(0)
    }
}

fn name(n: usize) -> String {
    format!("{n:03}{}", "n".repeat(100))
}

/// Attributes whose names need more than 2 KiB.
fn many() -> Vec<Xattr> {
    (0..25).map(|n| Xattr { name: format!("user.{}", name(n)).into_bytes(), value: b"v".to_vec() }).collect()
}

fn noise(len: usize, mut state: u64) -> Vec<u8> {
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect()
}

/// What most layers have: folders, files in inodes, in blocks and of several chunks, a link, a whiteout, a sparse file.
fn ordinary(mut tar: Tar) -> Tar {
    tar = tar.dir("d/", 0o755);
    for n in 0..120 {
        tar = tar.file(&format!("d/small{n}"), &noise(n, n as u64));
    }
    tar = tar.file("d/large", &noise(700_001, 1)).file("d/.wh.gone", b"").link("d/linked", "d/large");
    let map = b"2\n0\n1000\n4000000\n1000\n";
    let mut data = map.to_vec();
    data.resize(512, 0);
    data.extend(noise(2000, 3));
    tar.pax(&[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"d/sparse"),
        ("GNU.sparse.realsize", b"5000000"),
    ])
    .file("d/GNUSparseFile.0/sparse", &data)
}

fn long_link(tar: Tar, bytes: usize) -> Tar {
    let target = "t".repeat(bytes);
    tar.pax(&[("linkpath", target.as_bytes())]).symlink("long", "x")
}

fn attributes(tar: Tar) -> Tar {
    let keys: Vec<String> = (0..25).map(|n| format!("SCHILY.xattr.user.{}", name(n))).collect();
    let records: Vec<(&str, &[u8])> = keys.iter().map(|k| (k.as_str(), &b"value"[..])).collect();
    tar.pax(&records)
}

fn options(block_size: BlockSize, verity: bool) -> ApplyOptions {
    ApplyOptions { block_size: block_size.bytes(), verity, ..ApplyOptions::default() }
}

/// A scratch disk for hash trees.
fn scratch() -> ApplyResources {
    ApplyResources { scratch: Some(Arc::new(MemDisk::new())), told_digest: None }
}

/// Applies from the start in 4 KiB blocks: image, record, and what is said of them.
fn from_the_start(tar: &[u8], options: &ApplyOptions) -> (Vec<u8>, Vec<u8>, ApplySummary) {
    let (image, record) = (Disk::default(), Disk::default());
    let summary =
        apply(tar, &image, &record, &mut Below, options).unwrap_or_else(|e| panic!("{}", report(&e)));
    (image.to_vec(), record.to_vec(), summary)
}

fn check(what: &str, tar: &[u8], grows: bool) {
    for (start, verity) in [(BlockSize::B1024, false), (BlockSize::B2048, false), (BlockSize::B1024, true)] {
        let (first, record) = (Disk::default(), Disk::default());
        let mut second = Second::default();
        let summary = apply_growing(
            Dribble(tar),
            first.clone(),
            record.clone(),
            &mut Below,
            &options(start, verity),
            &scratch(),
            &mut second,
        )
        .unwrap_or_else(|e| panic!("{what}: {}", report(&e)));
        assert_eq!(second.pair.is_some(), grows, "{what}, {start:?}");
        assert_eq!(second.dropped, grows, "{what}: the first pair is dropped");
        let (image, record) = second.pair.unwrap_or((first, record));
        let size = if grows { BlockSize::LARGEST } else { start };
        let (expected_image, expected_record, expected) = from_the_start(tar, &options(size, verity));
        assert_eq!(summary, expected, "{what}, {start:?}");
        assert!(image.to_vec() == expected_image, "{what}, {start:?}: another image");
        assert!(record.to_vec() == expected_record, "{what}, {start:?}: another record");
        let mut back = Vec::new();
        record::replay(&*image, &*record, &mut back).unwrap();
        assert!(back == tar, "{what}: another tar comes back");
    }
}

#[test]
fn wherever_the_need_shows_the_image_is_that_of_larger_blocks() {
    let first = ordinary(long_link(Tar::new(), 2048));
    check("a link in the first entry", &first.clone().end(), true);
    check("a link in the last entry", &long_link(ordinary(Tar::new()), 4095).end(), true);
    check(
        "a link in the middle",
        &long_link(ordinary(Tar::new()), 2048).file("behind", &noise(600_000, 9)).end(),
        true,
    );
    check("two links", &long_link(first, 3000).end(), true);
    check("attributes in the first entry", &ordinary(attributes(Tar::new()).file("many", b"x")).end(), true);
    check("attributes in the last entry", &attributes(ordinary(Tar::new())).file("many", b"x").end(), true);
    check("no need", &ordinary(Tar::new()).end(), false);
    check("the longest link of small blocks", &long_link(ordinary(Tar::new()), 1023).end(), false);
    // At the end, without end blocks, and with bytes behind the end.
    check("no end blocks", &attributes(ordinary(Tar::new())).dir("many", 0o755).0, true);
    let mut trailing = long_link(ordinary(Tar::new()), 3000).end();
    trailing.extend(noise(300_000, 5));
    check("bytes behind the end", &trailing, true);
}

#[test]
fn the_need_may_show_at_the_end_only() {
    let base = || ordinary(Tar::new());
    check("a link below, a long symlink", &base().link("a", "long").end(), true);
    check("a link below, many attributes", &base().link("a", "many").file("b", b"1").end(), true);
    check("a link below, nothing special", &base().link("a", "plain").end(), false);
    check("a folder that comes twice", &attributes(base()).dir("d", 0o700).end(), true);
    check("the root, at last", &attributes(base()).dir("./", 0o700).end(), true);
}

#[test]
fn a_file_beyond_the_smaller_blocks_reach_is_taken() {
    let sparse = |size: &[u8]| {
        let mut map = b"0\n".to_vec();
        map.resize(512, 0);
        let keys: [(&str, &[u8]); 4] = [
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"huge"),
            ("GNU.sparse.realsize", size),
        ];
        ordinary(Tar::new()).pax(&keys).file("GNUSparseFile.0/huge", &map)
    };
    // 5 TiB: blocks of 1 KiB take 4 TiB, of 2 KiB 8 TiB.
    let tar = sparse(b"5497558138880").end();
    let mut second = Second::default();
    let (first, record) = (Disk::default(), Disk::default());
    let small = options(BlockSize::B1024, false);
    let summary =
        apply_growing(&tar[..], first, record, &mut NoLowers, &small, &scratch(), &mut second).unwrap();
    let (image, record) = second.pair.expect("larger blocks");
    let (expected_image, expected_record, expected) =
        from_the_start(&tar, &options(BlockSize::LARGEST, false));
    assert_eq!(summary, expected);
    assert!(image.to_vec() == expected_image && record.to_vec() == expected_record);
}

#[test]
fn what_no_block_holds_is_refused_and_so_is_what_nobody_has_disks_for() {
    let too_long = long_link(ordinary(Tar::new()), 4096).end();
    let mut second = Second::default();
    let small = options(BlockSize::B1024, false);
    let refused = apply_growing(
        &too_long[..],
        Disk::default(),
        Disk::default(),
        &mut NoLowers,
        &small,
        &scratch(),
        &mut second,
    );
    let text = report(&refused.unwrap_err());
    assert!(text.contains("long") && text.contains("4096 bytes"), "{text}");
    assert!(second.pair.is_none(), "larger blocks would not have helped");
    // The second need is one too many.
    let twice = long_link(long_link(ordinary(Tar::new()), 3000), 4096).end();
    let refused = apply_growing(
        &twice[..],
        Disk::default(),
        Disk::default(),
        &mut NoLowers,
        &small,
        &scratch(),
        &mut second,
    );
    assert!(report(&refused.unwrap_err()).contains("4095"));
    assert!(second.dropped);
    let tar = long_link(Tar::new(), 1024).end();
    let refused = apply(&tar[..], Disk::default(), Disk::default(), &mut NoLowers, &small).unwrap_err();
    assert!(report(&refused).contains("1023"));
}

#[test]
fn limits_are_those_of_the_final_image() {
    let tar = long_link(ordinary(Tar::new()), 3000).end();
    let (.., whole) = from_the_start(&tar, &options(BlockSize::LARGEST, false));
    let limited = |limit| {
        let mut small = options(BlockSize::B1024, false);
        small.max_image_bytes = limit;
        small.limits.tar_bytes = tar.len() as u64;
        let (first, record) = (Disk::default(), Disk::default());
        apply_growing(&tar[..], first, record, &mut NoLowers, &small, &scratch(), &mut Second::default())
    };
    assert_eq!(limited(whole.image_bytes).unwrap(), whole);
    let error = limited(whole.image_bytes - 4096).unwrap_err();
    assert!(report(&error).contains("exceeds its limit"), "{}", report(&error));
}

#[test]
fn a_grown_image_is_sound_for_e2fsck() {
    let tar = attributes(long_link(ordinary(Tar::new()), 3000)).file("many", b"x").end();
    let mut second = Second::default();
    let small = options(BlockSize::B1024, false);
    apply_growing(&tar[..], Disk::default(), Disk::default(), &mut NoLowers, &small, &scratch(), &mut second)
        .unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), second.pair.unwrap().0.to_vec()).unwrap();
    run(Command::new("e2fsck").arg("-fn").arg(file.path()));
    let stat = run(Command::new("debugfs").args(["-R", "stat /long"]).arg(file.path()));
    assert!(String::from_utf8_lossy(&stat).contains("Size: 3000"));
}

/// A disk that gives other bytes than it took.
struct Forgetful(Disk);

impl ReadAt for Forgetful {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let n = self.0.read_at(buf, offset)?;
        // Where files' data are, and nothing of the file system.
        if offset > 4096 {
            buf[..n].fill(0);
        }
        Ok(n)
    }

    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }
}

impl disk_io::WriteAt for Forgetful {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.0.write_at(buf, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

struct Honest;

impl Growth<Forgetful, Disk> for Honest {
    fn disks(&mut self) -> Result<Option<(Forgetful, Disk)>, DiffError> {
        Ok(Some((Forgetful(Disk::default()), Disk::default())))
    }

    fn replaying(&mut self, _: u64) -> Result<(), DiffError> {
        Ok(())
    }

    fn replayed(&mut self, _: Forgetful, _: Disk) -> Result<(), DiffError> {
        Ok(())
    }
}

#[test]
fn a_disk_that_lost_what_was_written_is_found_out() {
    let tar = long_link(ordinary(Tar::new()), 3000).end();
    let small = options(BlockSize::B1024, false);
    let first = Forgetful(Disk::default());
    let error =
        apply_growing(&tar[..], first, Disk::default(), &mut NoLowers, &small, &scratch(), &mut Honest)
            .unwrap_err();
    assert!(report(&error).contains("differs from what was written"), "{}", report(&error));
}
