//! QEMU reads what we write and the reverse.

use super::super::{CreateOptions, Vhdx, VhdxWriter, create, layout::HEADER_OFFSETS, tables::header_bytes};
use super::{ID, read_all};
use disk_io::{ReadAt, WriteAt};
use ext4_image::format::{BlankOptions, blank};
use std::{
    fs::File,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

fn run(program: &str, args: &[&dyn AsRef<std::ffi::OsStr>]) -> String {
    let out = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("this test needs {program}: {e}"));
    assert!(out.status.success(), "{program}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn qemu_check(path: &Path) {
    run("qemu-img", &[&"check", &"-f", &"vhdx", &path]);
}

fn to_raw(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("raw");
    run("qemu-img", &[&"convert", &"-f", &"vhdx", &"-O", &"raw", &path, &raw]);
    std::fs::read(raw).unwrap()
}

fn place() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhdx");
    (folder, path)
}

fn file(path: &Path) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// Bytes that differ everywhere, from a simple generator.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2) + 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect()
}

#[test]
fn qemu_reads_every_block_size_and_sector() {
    let (_folder, path) = place();
    for shift in 0..=8 {
        for (logical_sector, physical_sector) in [(512, 512), (512, 4096), (4096, 4096)] {
            let options = CreateOptions {
                disk_bytes: 40 << 20,
                block_size: 1 << (20 + shift),
                logical_sector,
                physical_sector,
                disk_id: ID,
            };
            create(file(&path), &options, &[(0, noise(3000, 1)), ((33 << 20) - 9, noise(50, 2))]).unwrap();
            if logical_sector == 4096 {
                // QEMU takes 512-byte sectors only; ours are read by ourselves.
                assert_eq!(Vhdx::open(file(&path)).unwrap().geometry().logical_sector, 4096);
                continue;
            }
            qemu_check(&path);
            let writer = VhdxWriter::open(file(&path)).unwrap();
            writer.write_all_at(&noise(4 << 20, 3), 18 << 20).unwrap();
            writer.sync().unwrap();
            qemu_check(&path);
            assert!(to_raw(&path) == read_all(&writer), "{options:?}");
        }
    }
}

#[test]
fn qemu_finds_blocks_behind_the_bitmap_entries() {
    let (_folder, path) = place();
    create(file(&path), &CreateOptions::new(9 << 30, ID), &[]).unwrap();
    let writer = VhdxWriter::open(file(&path)).unwrap();
    // A chunk has 4 GiB with blocks of 1 MiB.
    for (n, at) in
        [(4u64 << 30) - 512, 4 << 30, (8 << 30) - 512, 8 << 30, (9 << 30) - 512].into_iter().enumerate()
    {
        writer.write_all_at(&[n as u8 + 1; 512], at).unwrap();
    }
    writer.sync().unwrap();
    drop(writer);
    qemu_check(&path);
    for (n, at) in
        [(4u64 << 30) - 512, 4 << 30, (8 << 30) - 512, 8 << 30, (9 << 30) - 512].into_iter().enumerate()
    {
        let command = format!("read -P {} {at} 512", n + 1);
        let said = run("qemu-io", &[&"-r", &"-f", &"vhdx", &"-c", &command, &path]);
        assert!(!said.contains("verification failed"), "{said}");
    }
}

#[test]
fn we_read_what_qemu_converts() {
    let (folder, path) = place();
    let raw = folder.path().join("in.raw");
    let mut bytes = vec![0; 37 << 20];
    bytes[100..200_000].copy_from_slice(&noise(199_900, 4));
    bytes[20 << 20..22 << 20].copy_from_slice(&noise(2 << 20, 5));
    bytes[(37 << 20) - 5..].fill(9);
    std::fs::write(&raw, &bytes).unwrap();
    for form in [
        "subformat=dynamic,block_size=1M",
        "subformat=dynamic,block_size=16M",
        "subformat=fixed",
        "log_size=4M",
    ] {
        run("qemu-img", &[&"convert", &"-f", &"raw", &"-O", &"vhdx", &"-o", &form, &raw, &path]);
        let vhdx = Vhdx::open(file(&path)).unwrap();
        assert!(read_all(&vhdx) == bytes, "{form}");
        assert_eq!(vhdx.geometry().fixed, form.contains("fixed"));
        if form.contains("1M") {
            assert_eq!(vhdx.allocated(), [0..1 << 20, 20 << 20..22 << 20, 36 << 20..37 << 20]);
        }
        let writer = VhdxWriter::open(file(&path)).unwrap();
        writer.write_all_at(&noise(1 << 20, 6), 30 << 20).unwrap();
        writer.sync().unwrap();
        qemu_check(&path);
        assert!(to_raw(&path) == read_all(&writer), "{form} written by us");
    }
}

#[test]
fn both_write_in_turns() {
    let (_folder, path) = place();
    create(file(&path), &CreateOptions::new(32 << 20, ID), &[]).unwrap();
    let mut model = vec![0; 32 << 20];
    for turn in 0..4u8 {
        let at = usize::from(turn) * (5 << 20) + 4096;
        let writer = VhdxWriter::open(file(&path)).unwrap();
        writer.write_all_at(&[turn + 1; 9000], at as u64).unwrap();
        model[at..at + 9000].fill(turn + 1);
        drop(writer);
        let theirs = at + (2 << 20);
        let command = format!("write -P {} {theirs} 64k", turn + 100);
        run("qemu-io", &[&"-f", &"vhdx", &"-c", &command, &path]);
        model[theirs..theirs + (64 << 10)].fill(turn + 100);
    }
    qemu_check(&path);
    assert!(read_all(&Vhdx::open(file(&path)).unwrap()) == model);
    assert!(to_raw(&path) == model);
}

/// QEMU empties its log within microseconds of filling it, by a header that names no log: here is the header that
/// was there between, on the very entry that QEMU wrote, and the BAT's page that the entry holds is lost.
#[test]
fn a_log_of_qemu_in_use_is_replayed() {
    let (_folder, path) = place();
    run("qemu-img", &[&"create", &"-f", &"vhdx", &"-o", &"block_size=1M", &path, &"64M"]);
    let commands = ["write -P 171 0 64k", "write -P 172 5M 2M", "write -P 173 40M 4k"];
    run("qemu-io", &[&"-f", &"vhdx", &"-c", &commands[0], &"-c", &commands[1], &"-c", &commands[2], &path]);
    let disk = file(&path);
    let opened = Vhdx::open(&disk).unwrap().opened;
    let (bat, mut header) = (opened.bat_offset, opened.header);
    // Each has an id of its own and the whole page of the BAT; the last one counts.
    let mut log = vec![0; 1 << 20];
    disk.read_exact_at(&mut log, header.log_offset.get()).unwrap();
    let entry = log.chunks(4096).rfind(|sector| sector.starts_with(b"loge")).expect("qemu wrote no log");
    header.log_guid = entry[32..48].try_into().unwrap();
    for (n, at) in HEADER_OFFSETS.into_iter().enumerate() {
        header.sequence_number = (1000 + n as u64).into();
        disk.write_all_at(&header_bytes(header), at).unwrap();
    }

    let mut model = vec![0; 64 << 20];
    model[..64 << 10].fill(171);
    model[5 << 20..7 << 20].fill(172);
    model[40 << 20..(40 << 20) + 4096].fill(173);
    disk.write_all_at(&[0; 4096], bat).unwrap();
    let reader = Vhdx::open(&disk).unwrap();
    assert!(reader.is_dirty());
    assert!(read_all(&reader) == model, "replayed in memory");
    drop(reader);
    let theirs = path.with_extension("copy");
    std::fs::copy(&path, &theirs).unwrap();
    let writer = VhdxWriter::open(file(&path)).unwrap();
    assert!(read_all(&writer) == model, "replayed into the file");
    drop(writer);
    qemu_check(&path);
    assert!(to_raw(&path) == model);
    run("qemu-img", &[&"check", &"-r", &"all", &"-f", &"vhdx", &theirs]);
    assert!(to_raw(&theirs) == model, "qemu replays the same");
}

#[test]
fn a_blank_sandbox_of_20_gib_is_small_and_clean() {
    let (_folder, path) = place();
    let options = BlankOptions { uuid: *ID.as_bytes(), ..BlankOptions::default() };
    let content = blank(20 << 30, &options).unwrap();
    create(file(&path), &CreateOptions::new(20 << 30, ID), &content).unwrap();
    let on_disk = std::fs::metadata(&path).unwrap().blocks() * 512;
    assert!(on_disk < 5_000_000, "{on_disk} bytes");
    qemu_check(&path);
    let vhdx = Vhdx::open(file(&path)).unwrap();
    for (at, bytes) in &content {
        let mut found = vec![0; bytes.len()];
        vhdx.read_exact_at(&mut found, *at).unwrap();
        assert!(found == *bytes, "at {at}");
    }
    let raw = path.with_extension("raw");
    run("qemu-img", &[&"convert", &"-f", &"vhdx", &"-O", &"raw", &path, &raw]);
    run("e2fsck", &[&"-fn", &raw]);
}
