//! Good images of every kind that this project makes, and one of mke2fs, to be mutated.

use super::build::Tar;
use disk_io::MemDisk;
use ext4_image::{
    BlockSize, Timestamp, Xattr,
    hcsshim::DEFAULT_MAX_DISK,
    writer::{Attributes, ImageWriter, NodeKind, WriterOptions},
};
use layer_codec::apply::{self, ApplyOptions, HcsshimProfile, Profile};
use std::process::Command;

/// A kind of image.
pub(crate) struct Base {
    pub(crate) name: &'static str,
    pub(crate) bytes: Vec<u8>,
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        })
        .collect()
}

/// What every image of the default profile holds: each kind of node, attributes of every size, folders of three sizes.
fn written(block_size: BlockSize, inline_data: bool, many: usize, pieces: u64) -> Vec<u8> {
    let disk = MemDisk::new();
    let options = WriterOptions { block_size, inline_data, ..WriterOptions::default() };
    let mut w = ImageWriter::new(&disk, options).unwrap();
    let root = w.root();
    let attributes = Attributes {
        permissions: 0o644,
        mtime: Timestamp { secs: 1_700_000_000, nanos: 500_000_000 },
        ..Attributes::default()
    };
    let x = |name: &str, value: &[u8]| Xattr { name: name.into(), value: value.to_vec() };
    let set = |n: usize| match n % 5 {
        0 => vec![x("user.a", b"b"), x("security.capability", b"\x01\0\0\x02AAAA")],
        1 => (0..3).map(|i| x(&format!("user.big{i}"), &[b'v'; 150])).collect(),
        2 => vec![x("user.huge", &[b'z'; 20_000])],
        3 => vec![x("user.odd", b"12345"), x("trusted.three", b"abc"), x("user.empty", b"")],
        _ => Vec::new(),
    };
    let dir = w.create(root, b"d", NodeKind::Directory, attributes, set(0)).unwrap();
    let inner = w.create(dir, b"e", NodeKind::Directory, attributes, Vec::new()).unwrap();
    w.create(inner, b"f", NodeKind::Directory, attributes, set(3)).unwrap();
    let opaque = vec![x("trusted.overlay.opaque", b"y")];
    w.create(inner, b"opaque", NodeKind::Directory, attributes, opaque).unwrap();
    for n in 0..12 {
        let (name, data) = (format!("inline{n}"), noise(n + 1, n as usize * 14));
        let node = w.create(inner, name.as_bytes(), NodeKind::File, attributes, set(n as usize)).unwrap();
        w.begin_file(node, data.len() as u64).unwrap();
        w.write_data(0, &data, &mut |_| {}).unwrap();
        w.end_file().unwrap();
    }
    for (name, len) in [("blocks", 5000), ("big", 70_000)] {
        let node = w.create(dir, name.as_bytes(), NodeKind::File, attributes, set(len % 3)).unwrap();
        w.begin_file(node, len as u64).unwrap();
        w.write_data(0, &noise(9, len), &mut |_| {}).unwrap();
        w.end_file().unwrap();
    }
    let big = w.lookup(dir, b"big").unwrap();
    w.link(root, b"hard", big).unwrap();
    // Two links to a device: only one name would let it pass for one whatever its number is.
    let device =
        w.create(dir, b"chr", NodeKind::CharDevice { major: 5, minor: 1 }, attributes, Vec::new()).unwrap();
    w.link(dir, b"chr2", device).unwrap();
    for (name, kind) in [
        ("short", NodeKind::Symlink { target: b"../x/y".to_vec() }),
        ("middle", NodeKind::Symlink { target: vec![b'm'; 62] }),
        ("long", NodeKind::Symlink { target: vec![b'l'; 300] }),
        ("white", NodeKind::CharDevice { major: 0, minor: 0 }),
        ("blk", NodeKind::BlockDevice { major: 259, minor: 70_000 }),
        ("fifo", NodeKind::Fifo),
        ("sock", NodeKind::Socket),
    ] {
        w.create(dir, name.as_bytes(), kind, attributes, set(name.len())).unwrap();
    }
    let middle = w.create(root, b"mid", NodeKind::Directory, attributes, Vec::new()).unwrap();
    for n in 0..40 {
        let name = format!("sub-directory-{n}");
        w.create(middle, name.as_bytes(), NodeKind::Directory, attributes, Vec::new()).unwrap();
    }
    let folder = w.create(root, b"many", NodeKind::Directory, attributes, Vec::new()).unwrap();
    for n in 0..many {
        let name = format!("a-file-with-a-name-of-common-length-{n}");
        w.create(folder, name.as_bytes(), NodeKind::File, attributes, Vec::new()).unwrap();
    }
    if pieces > 0 {
        let node = w.create(root, b"pieces", NodeKind::File, attributes, Vec::new()).unwrap();
        w.begin_file(node, pieces * 16384).unwrap();
        for n in 0..pieces {
            w.write_data(n * 16384, b"data", &mut |_| {}).unwrap();
        }
        w.end_file().unwrap();
    }
    w.finish().unwrap();
    disk.to_vec()
}

fn tar() -> Vec<u8> {
    let mut tar = Tar::new().dir("d", 0o755).dir("d/e", 0o755);
    for n in 0..8usize {
        tar = tar.file(&format!("d/e/f{n}"), &noise(n as u64 + 1, n * 600));
    }
    tar = tar
        .pax(&[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.user.b", &[b'v'; 200])])
        .file("d/x", b"hello")
        .link("d/y", "d/x")
        .symlink("d/s", "e/f1")
        .symlink("d/t", &"t".repeat(90))
        .device("d/c", b'3', 5, 1)
        .device("d/w", b'3', 0, 0)
        .dir("many", 0o755);
    for n in 0..150 {
        tar = tar.file(&format!("many/a-file-with-a-name-of-common-length-{n}"), b"");
    }
    tar.end()
}

fn applied(options: &ApplyOptions) -> Vec<u8> {
    let (image, record) = (MemDisk::new(), MemDisk::new());
    apply::apply(&tar()[..], &image, &record, &mut apply::NoLowers, options).unwrap();
    image.to_vec()
}

/// An image as `mke2fs -d` makes it, with features as our writer sets them: its groups lie otherwise.
pub(crate) fn mke2fs(options: &[&str]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let (tree, image) = (folder.path().join("tree"), folder.path().join("image"));
    std::fs::create_dir_all(tree.join("a/b")).unwrap();
    for n in 0..40 {
        std::fs::write(tree.join(format!("a/some-name-of-a-file-{n}")), noise(n, n as usize * 300)).unwrap();
    }
    std::os::unix::fs::symlink("x".repeat(80), tree.join("a/b/link")).unwrap();
    std::fs::hard_link(tree.join("a/some-name-of-a-file-9"), tree.join("a/b/hard")).unwrap();
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-m", "0", "-I", "256", "-N", "512"])
        .args(["-O", "^has_journal,^resize_inode,^orphan_file,64bit,inline_data,ea_inode,metadata_csum,metadata_csum_seed"])
        .args(["-E", "lazy_itable_init=0,hash_seed=01020304-0506-0708-090a-0b0c0d0e0f10", "-d"])
        .arg(&tree)
        .args(options)
        .arg(&image)
        .arg("9M")
        .env("LC_ALL", "C")
        .output()
        .expect("this test needs mke2fs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    // The flag that names are hashed as unsigned bytes.
    let flags = Command::new("debugfs")
        .args(["-w", "-R", "ssv flags 2"])
        .arg(&image)
        .output()
        .expect("needs debugfs");
    assert!(flags.status.success());
    std::fs::read(image).unwrap()
}

/// Every kind. The first ones are small, for many mutations; the last one is not.
pub(crate) fn all() -> Vec<Base> {
    let hcsshim = |inline_data| {
        let hcsshim =
            HcsshimProfile { max_disk_bytes: DEFAULT_MAX_DISK, inline_data, ..HcsshimProfile::default() };
        ApplyOptions { profile: Profile::Hcsshim, hcsshim, ..ApplyOptions::default() }
    };
    let verity = ApplyOptions { verity: true, ..ApplyOptions::default() };
    let base = |name, bytes| Base { name, bytes };
    vec![
        base("1 KiB", written(BlockSize::B1024, true, 40, 0)),
        base("1 KiB, no inline data", written(BlockSize::B1024, false, 300, 0)),
        base("2 KiB", written(BlockSize::B2048, true, 200, 0)),
        base("4 KiB", written(BlockSize::B4096, true, 300, 0)),
        base("4 KiB, no inline data", written(BlockSize::B4096, false, 40, 0)),
        base("1 KiB, deep extents", written(BlockSize::B1024, true, 10, 600)),
        base("hash tree of the disk", applied(&verity)),
        base("hcsshim", applied(&hcsshim(false))),
        base("hcsshim, inline data", applied(&hcsshim(true))),
        base("mke2fs, 1 KiB", mke2fs(&["-b", "1024", "-g", "4096"])),
        base("mke2fs, 4 KiB", mke2fs(&["-b", "4096", "-g", "4096", "-O", "large_dir"])),
        base("1 KiB, hash tree of two levels", written(BlockSize::B1024, true, 3200, 0)),
    ]
}
