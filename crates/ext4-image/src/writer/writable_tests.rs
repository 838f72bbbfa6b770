//! Writable images judged by `e2fsck -fn` and by the kernel, which mounts them, writes and grows them.

use super::{
    tests::{add_file, attributes, bytes},
    *,
};
use crate::testing::{Mount, fsck};
use disk_io::{MemDisk, ReadAt};
use std::{fs, path::Path, process::Command};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn writable(size: ImageSize, journal: JournalSize) -> WriterOptions {
    WriterOptions {
        block_size: BlockSize::B4096,
        inline_data: false,
        writable: Some(Writable { size, journal }),
        made_at: 1_700_000_000,
        ..WriterOptions::default()
    }
}

/// A tree of a directory, small files, a large file, and a hard link.
fn fill<W: WriteAt>(w: &mut ImageWriter<W>, files: usize) {
    let dir = w.create(w.root(), b"dir", NodeKind::Directory, attributes(0o755), vec![]).unwrap();
    for i in 0..files {
        add_file(w, dir, format!("file {i}").as_bytes(), &bytes(i % 3000, i as u8));
    }
    let large = add_file(w, w.root(), b"large", &bytes(3_000_000, 7));
    w.link(dir, b"also large", large).unwrap();
}

fn image(options: WriterOptions, files: usize) -> (tempfile::NamedTempFile, ImageSummary) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut w = ImageWriter::new(file.as_file(), options).unwrap();
    fill(&mut w, files);
    let summary = w.finish().unwrap();
    assert_eq!(summary.image_bytes, file.as_file().metadata().unwrap().len());
    (file, summary)
}

fn sh(script: &str) -> String {
    let out = Command::new("bash").args(["-euc", script]).output().expect("bash starts");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "`{script}` failed: {said}");
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

/// The tree is there, and takes more.
fn use_it(root: &Path, files: usize) {
    assert_eq!(fs::read(root.join("large")).unwrap(), bytes(3_000_000, 7));
    assert_eq!(fs::read_dir(root.join("dir")).unwrap().count(), files + 1);
    fs::write(root.join("dir/file 5"), b"changed").unwrap();
    fs::write(root.join("new"), bytes(700_000, 9)).unwrap();
    for i in 0..100 {
        fs::write(root.join(format!("dir/new {i}")), bytes(i, 1)).unwrap();
    }
    fs::remove_file(root.join("dir/also large")).unwrap();
}

#[test]
fn every_size_is_clean_before_and_after_a_kernel_wrote_to_it() {
    let chosen = JournalSize::Chosen;
    for (size, journal, files) in [
        (ImageSize::Bytes(MIN_WRITABLE_BYTES), chosen, 100),
        (ImageSize::Bytes(64 * MIB), JournalSize::None, 2000),
        (ImageSize::Bytes(300 * MIB + 5000), JournalSize::Bytes(16 * MIB), 2000),
        (ImageSize::Bytes(20 * GIB), chosen, 2000),
        (ImageSize::Bytes(300 * GIB), chosen, 10),
        // The last group has one block, and is left out.
        (ImageSize::Bytes(128 * MIB + 4096), chosen, 100),
        (ImageSize::Headroom(25), chosen, 2000),
        (ImageSize::Headroom(0), chosen, 10),
        (ImageSize::Headroom(3000), chosen, 5000),
    ] {
        let options = writable(size, journal);
        let (file, summary) = image(options, files);
        let what = format!("{size:?} {journal:?}");
        fsck(file.path());
        match size {
            ImageSize::Bytes(bytes) => {
                assert!(
                    summary.image_bytes <= bytes && summary.image_bytes + 64 * 4096 > bytes / 4096 * 4096
                );
            }
            ImageSize::Headroom(percent) => {
                let fs = crate::Ext4::open(file.as_file()).unwrap();
                let geometry = fs.geometry();
                let tables = u64::from(geometry.inodes_count) * 256 / 4096 + 2 * u64::from(geometry.groups);
                let (free, content) = (summary.blocks - summary.blocks_used, summary.blocks_used - tables);
                // A few blocks are copies of the super block and of descriptors.
                assert!((free + 100) * 100 >= content * u64::from(percent), "{what}: {summary:?}");
            }
        }
        let mount = Mount::new(file.path(), "rw,errors=remount-ro");
        use_it(mount.path(), files);
        drop(mount);
        fsck(file.path());
    }
}

#[test]
fn there_is_an_inode_for_each_16_kib_and_one_for_each_file() {
    for (bytes, files) in [(64 * MIB, 10), (64 * MIB, 9000), (2 * GIB, 10)] {
        let disk = MemDisk::new();
        let mut w = ImageWriter::new(&disk, writable(ImageSize::Bytes(bytes), JournalSize::Chosen)).unwrap();
        for i in 0..files {
            w.create(w.root(), format!("{i}").as_bytes(), NodeKind::File, attributes(0o644), vec![]).unwrap();
        }
        w.finish().unwrap();
        let fs = crate::Ext4::open(&disk).unwrap();
        let inodes = u64::from(fs.geometry().inodes_count);
        assert!(inodes >= bytes / 16_384 && inodes >= files + 1000, "{bytes} {files}: {inodes}");
    }
}

#[test]
fn only_what_is_in_use_is_written() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut w =
        ImageWriter::new(file.as_file(), writable(ImageSize::Bytes(20 * GIB), JournalSize::Chosen)).unwrap();
    add_file(&mut w, NodeId(0), b"file", &bytes(100_000, 1));
    w.finish().unwrap();
    let used = std::os::unix::fs::MetadataExt::blocks(&file.as_file().metadata().unwrap()) * 512;
    assert!(used < MIB, "{used} bytes for a file of 100,000 in 20 GiB");
}

#[test]
fn the_same_calls_give_the_same_bytes() {
    for size in [ImageSize::Bytes(64 * MIB), ImageSize::Headroom(40)] {
        let made = || {
            let disk = MemDisk::new();
            let mut w = ImageWriter::new(&disk, writable(size, JournalSize::Chosen)).unwrap();
            fill(&mut w, 300);
            w.finish().unwrap();
            disk.to_vec()
        };
        assert!(made() == made());
    }
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let refused = |options| ImageWriter::new(MemDisk::new(), options).err().map(|e| e.to_string());
    let small = refused(writable(ImageSize::Bytes(MIB), JournalSize::Chosen)).unwrap();
    assert!(small.contains("16777216"), "{small}");
    assert!(refused(writable(ImageSize::Bytes(64 * MIB), JournalSize::Bytes(MIB))).is_some());
    let blocks =
        WriterOptions { block_size: BlockSize::B1024, ..writable(ImageSize::Headroom(5), JournalSize::None) };
    assert!(refused(blocks).is_some());
    // What does not fit ends in an error, not in a damaged image.
    let mut w =
        ImageWriter::new(MemDisk::new(), writable(ImageSize::Bytes(16 * MIB), JournalSize::Chosen)).unwrap();
    let node = w.create(NodeId(0), b"f", NodeKind::File, attributes(0o644), vec![]).unwrap();
    let data = bytes(13 << 20, 1);
    let full = w
        .begin_file(node, data.len() as u64)
        .and_then(|()| w.write_data(0, &data, &mut |_| ()))
        .and_then(|()| w.end_file())
        .and_then(|()| w.finish().map(|_| ()));
    assert!(matches!(full, Err(Ext4Error::Full { .. })), "{full:?}");
}

/// `resize2fs` makes it larger: past 8 GiB a second meta group begins, and past 16 GiB a third. That a kernel does so while
/// it is mounted needs more than root here (CAP_SYS_RESOURCE): `tests/image/boot.rs` has a guest do it.
#[test]
fn resize2fs_makes_it_larger() {
    for (size, steps) in [
        (ImageSize::Bytes(200 * MIB), [300 * MIB, 20 * GIB, 33 * GIB]),
        (ImageSize::Bytes(8 * GIB - 128 * MIB), [8 * GIB, 8 * GIB + 128 * MIB, 17 * GIB]),
        (ImageSize::Headroom(10), [100 * MIB, 129 * MIB, 500 * GIB]),
    ] {
        let (file, _) = image(writable(size, JournalSize::Chosen), 500);
        let path = file.path().display().to_string();
        for bytes_now in steps {
            file.as_file().set_len(bytes_now).unwrap();
            sh(&format!("resize2fs -f {path}"));
            fsck(file.path());
            let fs = crate::Ext4::open(file.as_file()).unwrap();
            assert!(fs.geometry().blocks_count * 4096 > bytes_now - 64 * 4096, "{size:?} to {bytes_now}");
        }
        let mount = Mount::new(file.path(), "rw,errors=remount-ro");
        use_it(mount.path(), 500);
        drop(mount);
        fsck(file.path());
    }
}

/// Our own reader takes it, whatever the layout of its groups.
#[test]
fn our_reader_takes_it() {
    let (file, summary) = image(writable(ImageSize::Bytes(20 * GIB), JournalSize::Chosen), 50);
    let fs = crate::Ext4::open(file.as_file()).unwrap();
    assert!(fs.geometry().has_journal());
    assert_eq!(fs.geometry().uuid, summary.uuid);
    let root = fs.inode(fs.root()).unwrap();
    let large = fs.inode(fs.lookup(&root, b"large").unwrap().unwrap()).unwrap();
    let mut data = vec![0; 3_000_000];
    fs.read_file_at(&large, 0, &mut data).unwrap();
    assert!(data == bytes(3_000_000, 7));
    assert_eq!(file.as_file().size().unwrap(), 20 * GIB);
}
