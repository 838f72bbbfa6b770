//! Offline changes, with e2fsck and the kernel as oracles, and every moment of a power cut.

use super::{GrowOptions, estimate_free_space, free_space, grow, replay, set_uuid};
use crate::{
    Ext4, Ext4Error, Timestamp,
    check::{CheckLimits, check_sandbox},
    format::{BlankOptions, BlankVersion, MIN_BYTES, blank_of},
    testing::{Mount, fsck},
    writer::Attributes,
};
use disk_io::{
    MemDisk, ReadAt, WriteAt,
    crash::{CrashDisk, Event},
};
use std::{fs, path::Path, process::Command};

const VERSIONS: [BlankVersion; 2] = [BlankVersion::First, BlankVersion::Second];

fn write_blank<W: WriteAt>(disk: &W, version: BlankVersion, size: u64) {
    let a = Attributes {
        permissions: 0o755,
        mtime: Timestamp { secs: 1_600_000_000, nanos: 0 },
        ..Attributes::default()
    };
    let options = BlankOptions {
        uuid: *b"\x01\x23\x45\x67\x89\xab\x4d\xef\x81\x23\x45\x67\x89\xab\xcd\xef",
        root: a,
        directories: vec![(b"upper".to_vec(), a)],
        journal_bytes: Some(4 << 20),
        mkfs_time: 1_600_000_000,
        ..BlankOptions::default()
    };
    disk.set_len(size).unwrap();
    for (offset, bytes) in blank_of(version, size, &options).unwrap() {
        disk.write_all_at(&bytes, offset).unwrap();
    }
}

fn file(version: BlankVersion, size: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    write_blank(file.as_file(), version, size);
    file
}

/// Lets the kernel write something, more each time.
fn fill(path: &Path, name: &str) {
    let mount = Mount::new(path, "rw");
    let dir = mount.path().join("upper").join(name);
    fs::create_dir(&dir).unwrap();
    for i in 0..100 {
        fs::write(dir.join(format!("f{i}")), vec![i as u8; 5000 + i * 100]).unwrap();
    }
    unmount(mount);
}

fn read_back(path: &Path, name: &str) {
    let mount = Mount::new(path, "ro");
    for i in 0..100 {
        let bytes = fs::read(mount.path().join("upper").join(name).join(format!("f{i}"))).unwrap();
        assert!(bytes == vec![i as u8; 5000 + i * 100], "{name}/f{i}");
    }
    unmount(mount);
}

/// At once, not when the last descriptor is closed.
fn unmount(mount: Mount) {
    let status = Command::new("umount").arg(mount.path()).status().unwrap();
    assert!(status.success());
    drop(mount);
}

fn blocks<R: ReadAt>(disk: R) -> u64 {
    Ext4::open(disk).unwrap().geometry().blocks_count
}

/// Sizes before and afterwards, in bytes: whole groups and short ones, over the borders of a block of descriptors.
const SIZES: [(u64, u64); 8] = [
    (MIN_BYTES, 100 << 20),
    (MIN_BYTES, 3 << 30),
    (148 << 20, 9 << 30),
    (1 << 30, (1 << 30) + (1 << 20)),
    (1 << 30, (1 << 30) + (70 << 20)),
    (8 << 30, 8 << 30 | 128 << 20),
    (20 << 30, 200 << 30),
    ((20 << 30) + 12_345_678, 300 << 30),
];

#[test]
fn a_file_system_grows_and_stays_clean_with_what_a_kernel_wrote() {
    for version in VERSIONS {
        for (old, new) in SIZES {
            let file = file(version, old);
            fill(file.path(), "before");
            file.as_file().set_len(new).unwrap();
            let grown = grow(file.as_file(), new, &GrowOptions::default()).unwrap();
            assert!(!grown.replayed && grown.old_bytes == old / 4096 * 4096, "{grown:?}");
            let whole = new / 4096 * 4096;
            assert!(
                grown.new_bytes <= whole && whole - grown.new_bytes < 3 << 20,
                "{version:?} {old}: {grown:?}"
            );
            fsck(file.path());
            check_sandbox(file.as_file(), CheckLimits::default()).unwrap();
            fill(file.path(), "after");
            fsck(file.path());
            for name in ["before", "after"] {
                read_back(file.path(), name);
            }
        }
    }
}

#[test]
fn the_room_is_really_there() {
    for version in VERSIONS {
        let file = file(version, 144 << 20);
        fill(file.path(), "before");
        file.as_file().set_len(700 << 20).unwrap();
        grow(file.as_file(), 700 << 20, &GrowOptions::default()).unwrap();
        {
            let mount = Mount::new(file.path(), "rw");
            for i in 0..6 {
                fs::write(mount.path().join(format!("upper/big{i}")), vec![i + 1; 100 << 20]).unwrap();
            }
            unmount(mount);
        }
        fsck(file.path());
        let mount = Mount::new(file.path(), "ro");
        for i in 0..6u8 {
            let bytes = fs::read(mount.path().join(format!("upper/big{i}"))).unwrap();
            assert!(bytes == vec![i + 1; 100 << 20]);
        }
        unmount(mount);
        read_back(file.path(), "before");
    }
}

#[test]
fn it_grows_again_and_again_by_turns_with_the_kernel() {
    for version in VERSIONS {
        let file = file(version, MIN_BYTES);
        let mut size = MIN_BYTES;
        for (n, step) in [1 << 20, 130 << 20, 7 << 20, 9 << 30, 128 << 20].iter().enumerate() {
            fill(file.path(), &format!("n{n}"));
            size += step;
            file.as_file().set_len(size).unwrap();
            grow(file.as_file(), size, &GrowOptions::default()).unwrap();
            fsck(file.path());
        }
        for n in 0..5 {
            read_back(file.path(), &format!("n{n}"));
        }
    }
}

/// Writes an image into a file, without its zeros.
fn put(path: &Path, image: &[u8]) {
    const CHUNK: usize = 64 << 10;
    let file = fs::File::create(path).unwrap();
    file.set_len(image.len() as u64).unwrap();
    for (n, chunk) in image.chunks(CHUNK).enumerate() {
        if chunk.iter().any(|byte| *byte != 0) {
            file.write_all_at(chunk, (n * CHUNK) as u64).unwrap();
        }
    }
}

/// Blocks of the old and the new size, and a disk that grew in between.
fn grown_in_memory(
    version: BlankVersion,
    old: u64,
    new: u64,
    before: &dyn Fn(&Path),
) -> (CrashDisk, u64, u64) {
    let file = file(version, old);
    before(file.path());
    file.as_file().set_len(new).unwrap();
    let disk = CrashDisk::new(fs::read(file.path()).unwrap());
    let old_blocks = blocks(&disk);
    let grown = grow(&disk, new, &GrowOptions::default()).unwrap();
    (disk, old_blocks, grown.new_bytes / 4096)
}

#[test]
fn a_cut_at_any_write_leaves_the_old_or_the_new_size() {
    for (version, old, new) in [
        (BlankVersion::First, MIN_BYTES, 24 << 20),
        (BlankVersion::Second, MIN_BYTES, 24 << 20),
        (BlankVersion::Second, 128 << 20, 160 << 20),
    ] {
        let (disk, old_blocks, new_blocks) = grown_in_memory(version, old, new, &|path| fill(path, "before"));
        let file = tempfile::NamedTempFile::new().unwrap();
        let (mut sizes, mut last) = ([0, 0], 0);
        let mut seen = std::collections::HashSet::new();
        let visited = disk.images(|image, flushes| {
            let found = blocks(Borrowed(image));
            assert!(found == old_blocks || found == new_blocks, "{found} blocks after {flushes} flushes");
            sizes[usize::from(found == new_blocks)] += 1;
            last = found;
            assert!(!is_broken(image, [old_blocks, new_blocks]), "after {flushes} flushes");
            // e2fsck takes long: once for each size and flush, and a part of the others.
            if !seen.insert((found, flushes)) && sizes.iter().sum::<usize>() % 15 != 0 {
                return;
            }
            put(file.path(), image);
            let out = Command::new("e2fsck").arg("-fy").arg(file.path()).output().unwrap();
            let said = String::from_utf8_lossy(&out.stdout);
            let corrected = said.lines().any(|line| line.contains("ix? yes") || line.contains("FIXED"));
            assert!(out.status.code().is_some_and(|code| code < 2) && !corrected, "{said}");
            fsck(file.path());
            // A second attempt finishes the work.
            grow(
                file.as_file(),
                new,
                &GrowOptions { dirty: std::iter::once(0..new).collect(), unfinished: false },
            )
            .unwrap();
            fsck(file.path());
            assert_eq!(blocks(file.as_file()), new_blocks);
        });
        println!("{version:?}, {old} to {new}: {visited:?}, old and new: {sizes:?}");
        assert!(sizes[0] > 3 && sizes[1] >= 1 && last == new_blocks, "{sizes:?}");
    }
}

/// An image, read where it is.
struct Borrowed<'a>(&'a [u8]);

impl ReadAt for Borrowed<'_> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        let rest = self.0.get(offset as usize..).unwrap_or(&[]);
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }

    fn size(&self) -> std::io::Result<u64> {
        Ok(self.0.len() as u64)
    }
}

/// Whether a file system is not what it was before or afterwards, or its bitmaps contradict each other.
fn is_broken(image: &[u8], sizes: [u64; 2]) -> bool {
    let disk = Borrowed(image);
    let whole = Ext4::open(&disk).is_ok_and(|fs| sizes.contains(&fs.geometry().blocks_count));
    !whole || estimate_free_space(&disk).is_err()
}

#[test]
fn without_a_flush_a_cut_leaves_a_broken_file_system() {
    let (disk, old, new) = grown_in_memory(BlankVersion::Second, MIN_BYTES, 24 << 20, &|_| {});
    let flushes = disk.events().iter().filter(|event| **event == Event::Flush).count();
    let needed = |left_out: &usize| {
        let mut broken = false;
        disk.images_without(*left_out, |image, _| broken = broken || is_broken(image, [old, new]));
        broken
    };
    let needed: Vec<usize> = (0..flushes).filter(needed).collect();
    println!("of {flushes} flushes these are needed: {needed:?}");
    assert!(needed.len() > 1, "{needed:?}");
    disk.images(|image, _| assert!(!is_broken(image, [old, new])));
}

/// A file system whose kernel lost its power: it is copied while it is mounted.
fn dirty(version: BlankVersion, size: u64) -> tempfile::NamedTempFile {
    let file = file(version, size);
    let copy = tempfile::NamedTempFile::new().unwrap();
    let mount = Mount::new(file.path(), "rw,commit=300");
    for i in 0..50 {
        fs::write(mount.path().join(format!("upper/f{i}")), vec![i as u8; 9000]).unwrap();
    }
    fs::File::open(mount.path().join("upper/f1")).unwrap().sync_all().unwrap();
    fs::remove_file(mount.path().join("upper/f7")).unwrap();
    fs::File::open(mount.path().join("upper/f2")).unwrap().sync_all().unwrap();
    // What the kernel has sent to the device is in the file's page cache.
    let status =
        Command::new("cp").arg("--sparse=always").arg(file.path()).arg(copy.path()).status().unwrap();
    assert!(status.success());
    unmount(mount);
    copy
}

#[test]
fn a_journal_in_use_is_replayed_as_e2fsck_does() {
    for version in VERSIONS {
        let ours = dirty(version, 256 << 20);
        let theirs = tempfile::NamedTempFile::new().unwrap();
        fs::copy(ours.path(), theirs.path()).unwrap();
        let out = Command::new("e2fsck").arg("-fy").arg(theirs.path()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.code().is_some_and(|c| c < 2) && said.contains("recovering journal"), "{said}");
        let replayed = replay(ours.as_file()).unwrap();
        assert!(replayed.was_dirty && replayed.blocks > 2, "{replayed:?}");
        fsck(ours.path());
        assert_eq!(replay(ours.as_file()).unwrap().blocks, 0);
        for path in [ours.path(), theirs.path()] {
            let mount = Mount::new(path, "ro");
            let names = fs::read_dir(mount.path().join("upper")).unwrap().count();
            assert_eq!(names, 49, "{}", path.display());
            assert!(fs::read(mount.path().join("upper/f1")).unwrap() == vec![1; 9000]);
            unmount(mount);
        }
        let ours = dirty(version, 144 << 20);
        ours.as_file().set_len(1 << 30).unwrap();
        let grown = grow(ours.as_file(), 1 << 30, &GrowOptions::default()).unwrap();
        assert!(grown.replayed && grown.new_bytes == 1 << 30, "{grown:?}");
        fsck(ours.path());
    }
}

#[test]
fn a_replay_that_is_cut_begins_anew() {
    let file = dirty(BlankVersion::Second, MIN_BYTES);
    let disk = CrashDisk::new(fs::read(file.path()).unwrap());
    replay(&disk).unwrap();
    let expected = {
        let fs = Ext4::open(MemDisk::from(disk.to_vec())).unwrap();
        let root = fs.inode(fs.root()).unwrap();
        let upper = fs.lookup(&root, b"upper").unwrap().unwrap();
        fs.read_dir(&fs.inode(upper).unwrap()).unwrap().len()
    };
    let (mut images, out) = (0, tempfile::NamedTempFile::new().unwrap());
    disk.images(|image, _| {
        images += 1;
        let fs = Ext4::open(MemDisk::from(image.to_vec())).unwrap();
        let root = fs.inode(fs.root()).unwrap();
        let upper = fs.lookup(&root, b"upper").unwrap().unwrap();
        assert_eq!(fs.read_dir(&fs.inode(upper).unwrap()).unwrap().len(), expected);
        if images % 200 == 0 {
            put(out.path(), image);
            replay(out.as_file()).unwrap();
            fsck(out.path());
        }
    });
    assert!(images > 200, "{images}");
}

#[test]
fn another_uuid_changes_nothing_else() {
    for version in VERSIONS {
        let file = file(version, 300 << 20);
        fill(file.path(), "before");
        let identity = set_uuid(file.as_file(), [9; 16], false).unwrap();
        assert_eq!(identity.seed_added, version == BlankVersion::First);
        assert_eq!(Ext4::open(file.as_file()).unwrap().geometry().uuid, [9; 16]);
        fsck(file.path());
        fill(file.path(), "after");
        fsck(file.path());
        file.as_file().set_len(1 << 30).unwrap();
        grow(file.as_file(), 1 << 30, &GrowOptions::default()).unwrap();
        fsck(file.path());
        for name in ["before", "after"] {
            read_back(file.path(), name);
        }
    }
}

/// Their sum is the kernel's, and whatever is written there, nobody misses.
#[test]
fn free_space_is_what_the_kernel_left_free() {
    for version in VERSIONS {
        let file = file(version, (9 << 30) + (5 << 20));
        fill(file.path(), "before");
        let free = free_space(file.as_file()).unwrap();
        let bytes: u64 = free.iter().map(|range| range.end - range.start).sum();
        let sb = super::superblock::read(file.as_file()).unwrap();
        assert_eq!(bytes / 4096, sb.free_blocks_count(), "{version:?}");
        for range in &free {
            let middle = range.start.midpoint(range.end) / 4096 * 4096;
            for at in [range.start, middle, range.end - 4096] {
                file.as_file().write_all_at(&[0xA5; 4096], at).unwrap();
            }
        }
        fsck(file.path());
        read_back(file.path(), "before");
        fill(file.path(), "after");
        fsck(file.path());
        assert!(free_space(file.as_file()).unwrap().len() >= free.len());
    }
    let file = dirty(BlankVersion::Second, 64 << 20);
    assert!(matches!(free_space(file.as_file()), Err(Ext4Error::Unsupported { .. })));
}

/// File systems of mke2fs: with copies of the super block, small blocks, or what we refuse.
#[test]
fn a_foreign_file_system_grows_or_is_refused_with_the_reason() {
    let made = |options: &[&str], size: u64| {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        let out = Command::new("mke2fs")
            .args(["-q", "-t", "ext4"])
            .args(options)
            .arg(file.path())
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        file
    };
    for options in [
        &["-O", "^resize_inode"][..],
        &["-O", "^resize_inode,meta_bg"],
        &["-O", "^resize_inode,^flex_bg", "-b", "1024"],
        &["-O", "^resize_inode,sparse_super2"],
        &["-O", "^resize_inode,^sparse_super", "-m", "7"],
        &["-O", "^resize_inode,^64bit"],
    ] {
        for (old, new) in [(256 << 20, 3 << 30), (200 << 20, (9 << 30) + (5 << 20))] {
            let file = made(options, old);
            file.as_file().set_len(new).unwrap();
            let grown = grow(file.as_file(), new, &GrowOptions::default()).unwrap();
            assert!(new - grown.new_bytes < 9 << 20, "{options:?}: {grown:?}");
            fsck(file.path());
            let mount = Mount::new(file.path(), "rw");
            fs::write(mount.path().join("x"), vec![7; 300 << 20]).unwrap();
            unmount(mount);
            fsck(file.path());
        }
    }
    for (options, reason) in [
        (&[][..], "resize_inode"),
        (&["-O", "^metadata_csum,^resize_inode"], "checksums"),
        (&["-O", "^has_journal,^resize_inode"], "without a journal"),
    ] {
        let file = made(options, 200 << 20);
        file.as_file().set_len(1 << 30).unwrap();
        let error = grow(file.as_file(), 1 << 30, &GrowOptions::default()).unwrap_err();
        assert!(
            matches!(error, Ext4Error::Unsupported { .. }) && error.to_string().contains(reason),
            "{error}"
        );
        fsck(file.path());
    }
    let file = file(BlankVersion::Second, 1 << 30);
    for (size, what) in [((1 << 30) - 4096, "shrink"), (2 << 30, "fewer than")] {
        let error = grow(file.as_file(), size, &GrowOptions::default()).unwrap_err();
        assert!(matches!(error, Ext4Error::Usage { .. }) && error.to_string().contains(what), "{error}");
    }
}
