//! Changes of the structure: what QEMU says to the result, and a power cut at every write.

use super::super::{CreateOptions, Vhdx, VhdxWriter, compact, create, grow, set_disk_id};
use super::{ID, disk_of, read_all};
use disk_io::{MemDisk, ReadAt, WriteAt, crash::CrashDisk};
use uuid::Uuid;

const MIB: u64 = 1 << 20;

/// Blocks 0, 2, 3, 5 and 7 of a disk of 8 MiB; the places in the file are in this order.
fn content() -> Vec<(u64, Vec<u8>)> {
    [5, 0, 7, 3, 2].iter().map(|block| (block * MIB + 100, vec![*block as u8 + 1; 5000])).collect()
}

fn is_needed(bytes: &[u8]) -> bool {
    bytes.iter().any(|byte| *byte != 0)
}

/// A block is needed if it is not all zeros and not among `dropped`.
fn drop_blocks(disk: &dyn WriteAt, dropped: &[u64]) -> (u64, u64) {
    compact(disk, |view, range| {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        view.read_exact_at(&mut bytes, range.start)?;
        Ok(is_needed(&bytes) && !dropped.contains(&(range.start / MIB)))
    })
    .unwrap()
}

/// The content without some blocks.
fn without(mut bytes: Vec<u8>, blocks: &[u64]) -> Vec<u8> {
    for block in blocks {
        bytes[(block * MIB) as usize..][..MIB as usize].fill(0);
    }
    bytes
}

#[test]
fn a_disk_grows_and_keeps_its_content() {
    // In the table that is there; beyond it; with other sectors and blocks.
    for (old, new, block_size, sector) in [
        (9 * MIB, 90 * MIB, 1 << 20, 512),
        (20 << 30, 200 << 30, 1 << 20, 512),
        (1 << 30, 5 << 40, 1 << 20, 4096),
        (3 << 30, 60 << 40, 32 << 20, 512),
    ] {
        let disk = MemDisk::new();
        let options = CreateOptions { block_size, logical_sector: sector, ..CreateOptions::new(old, ID) };
        create(&disk, &options, &[(8192, vec![7; 9000])]).unwrap();
        grow(&disk, new).unwrap();
        let writer = VhdxWriter::open(&disk).unwrap();
        assert_eq!(writer.size().unwrap(), new);
        writer.write_all_at(&[8; 4096], new - 8192).unwrap();
        writer.sync().unwrap();
        drop(writer);
        grow(&disk, new).unwrap();
        let vhdx = Vhdx::open(&disk).unwrap();
        assert!(vhdx.geometry().disk_id == ID && !vhdx.is_dirty());
        for (at, len, byte) in [(8192, 9000, 7), (new - 8192, 4096, 8), (old - 4096, 4096, 0)] {
            let mut bytes = vec![1; len];
            vhdx.read_exact_at(&mut bytes, at).unwrap();
            assert!(bytes.iter().all(|b| *b == byte), "{at} of {new}");
        }
        assert!(grow(&disk, old).is_err() && grow(&disk, new + 1).is_err());
    }
}

#[test]
fn a_table_behind_which_something_lies_is_cleared_before_it_is_used() {
    let disk = disk_of(9 * MIB, &[(0, vec![1; 10])]);
    // Bytes of an earlier use behind the nine entries.
    disk.write_all_at(&[0xff; 800], 3 * MIB + 9 * 8).unwrap();
    grow(&disk, 90 * MIB).unwrap();
    let allocated = Vhdx::open(&disk).unwrap().allocated();
    assert!(allocated.len() == 1 && allocated[0] == (0..MIB), "{allocated:?}");
}

#[test]
fn a_cut_while_it_grows_leaves_the_old_or_the_new_size() {
    for new in [90 * MIB, 200 << 30] {
        let disk = CrashDisk::new(disk_of(8 * MIB, &content()).to_vec());
        let before = read_all(&Vhdx::open(&disk).unwrap());
        grow(&disk, new).unwrap();
        let mut sizes = [0, 0];
        let visited = disk.images(|image, _| {
            let image = MemDisk::from(image.to_vec());
            let vhdx = Vhdx::open(&image).expect("it opens");
            let size = vhdx.size().unwrap();
            assert!(size == 8 * MIB || size == new, "{size}");
            sizes[usize::from(size == new)] += 1;
            let mut bytes = vec![0; before.len()];
            vhdx.read_exact_at(&mut bytes, 0).unwrap();
            assert!(bytes == before);
            grow(&image, new).unwrap();
            assert_eq!(Vhdx::open(&image).unwrap().size().unwrap(), new);
        });
        println!("to {new}: {visited:?}, old and new: {sizes:?}");
        assert!(sizes[0] > 5 && sizes[1] > 5, "{sizes:?}");
    }
}

#[test]
fn another_id_changes_nothing_else() {
    let disk = disk_of(8 * MIB, &content());
    let before = read_all(&Vhdx::open(&disk).unwrap());
    let id = Uuid::from_u128(77);
    set_disk_id(&disk, id).unwrap();
    let vhdx = Vhdx::open(&disk).unwrap();
    assert!(vhdx.geometry().disk_id == id && read_all(&vhdx) == before);
}

#[test]
fn blocks_that_nobody_needs_are_given_back() {
    for dropped in [&[][..], &[0], &[5], &[2, 7], &[0, 5, 7], &[0, 2, 3, 5, 7]] {
        let disk = disk_of(8 * MIB, &content());
        let expected = without(read_all(&Vhdx::open(&disk).unwrap()), dropped);
        let (before, after) = drop_blocks(&disk, dropped);
        assert_eq!(before - after, dropped.len() as u64 * MIB, "{dropped:?}");
        assert_eq!(disk.size().unwrap(), after);
        let vhdx = Vhdx::open(&disk).unwrap();
        assert!(
            read_all(&vhdx) == expected
                && vhdx.allocated().iter().map(|r| (r.end - r.start) / MIB).sum::<u64>()
                    == 5 - dropped.len() as u64
        );
        // And it is written further.
        let writer = VhdxWriter::open(&disk).unwrap();
        writer.write_all_at(&[9; 3000], 4 * MIB + 5).unwrap();
        writer.sync().unwrap();
        drop(writer);
        let mut expected = expected;
        expected[(4 * MIB + 5) as usize..][..3000].fill(9);
        assert!(read_all(&Vhdx::open(&disk).unwrap()) == expected);
    }
}

#[test]
fn a_cut_while_it_is_compacted_loses_nothing() {
    let dropped = [0, 5];
    let disk = CrashDisk::new(disk_of(8 * MIB, &content()).to_vec());
    let before = read_all(&Vhdx::open(&disk).unwrap());
    let expected = without(before.clone(), &dropped);
    drop_blocks(&disk, &dropped);
    let mut seen = [0, 0];
    let visited = disk.images(|image, _| {
        let image = MemDisk::from(image.to_vec());
        let read = read_all(&Vhdx::open(&image).expect("it opens"));
        assert!(read == before || read == expected);
        seen[usize::from(read == expected)] += 1;
    });
    println!("compacted in place: {visited:?}, {seen:?}");
    assert!(seen[0] > 5 && seen[1] > 5, "{seen:?}");
}

/// Without the flush between the copy of a block and the table that names it, a cut loses the block.
#[test]
fn the_flush_behind_a_moved_block_counts() {
    let disk = CrashDisk::new(disk_of(8 * MIB, &content()).to_vec());
    let before = read_all(&Vhdx::open(&disk).unwrap());
    let expected = without(before.clone(), &[5]);
    drop_blocks(&disk, &[5]);
    let flushes = disk.events().iter().filter(|e| **e == disk_io::crash::Event::Flush).count();
    let faulty = (0..flushes).filter(|left_out| {
        let mut faulty = false;
        disk.images_without(*left_out, |image, _| {
            let read = Vhdx::open(MemDisk::from(image.to_vec())).map(|vhdx| read_all(&vhdx));
            faulty |= !read.is_ok_and(|read| read == before || read == expected);
        });
        faulty
    });
    let faulty: Vec<usize> = faulty.collect();
    println!("of {flushes} flushes these keep the content: {faulty:?}");
    assert!(faulty.len() >= 3, "{faulty:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn qemu_takes_what_was_changed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.vhdx");
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    create(&file, &CreateOptions::new(8 * MIB, ID), &content()).unwrap();
    let check = || {
        for args in [&["check", "-f", "vhdx"][..], &["info", "-f", "vhdx", "--output=json"]] {
            let out = std::process::Command::new("qemu-img").args(args).arg(&path).output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        }
    };
    drop_blocks(&file, &[0, 3]);
    check();
    set_disk_id(&file, Uuid::from_u128(5)).unwrap();
    check();
    grow(&file, 200 << 30).unwrap();
    check();
    let out = std::process::Command::new("qemu-io")
        .args([
            "-f",
            "vhdx",
            "-c",
            "read -P 8 7340132 5000",
            "-c",
            "write -P 3 150G 64k",
            "-c",
            "read -P 0 0 1M",
        ])
        .arg(&path)
        .output()
        .unwrap();
    assert!(out.status.success() && !String::from_utf8_lossy(&out.stdout).contains("failed"), "{out:?}");
    let vhdx = Vhdx::open(&file).unwrap();
    let mut bytes = [0; 4096];
    vhdx.read_exact_at(&mut bytes, 150 << 30).unwrap();
    assert_eq!(bytes, [3; 4096]);
}
