//! Known trees, `veritysetup` as the oracle, damage, and any order of writes.

use super::*;
use disk_io::{FaultDisk, MemDisk, ReadAt, WriteAt};
use proptest::prelude::*;
use std::{process::Command, sync::Arc};

type Disk = TreeDisk<Arc<MemDisk>, Arc<MemDisk>>;

/// A tree over `data`, written in order.
fn tree_of(data: &[u8]) -> (Arc<MemDisk>, TreeSummary) {
    let disk = Disk::hashing(Arc::default(), None).unwrap();
    disk.write_all_at(data, 0).unwrap();
    finish(&disk, data.len() as u64)
}

fn finish(disk: &Disk, len: u64) -> (Arc<MemDisk>, TreeSummary) {
    let summary = disk.finish(len, [7; 16]).unwrap().unwrap();
    (disk.disk().clone(), summary)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i as u64 * 2_654_435_761) >> 13) as u8).collect()
}

#[test]
fn levels_stand_top_first() {
    for (blocks, expected) in [
        (1, vec![]),
        (2, vec![(0, 1)]),
        (128, vec![(0, 1)]),
        (129, vec![(1, 2), (0, 1)]),
        (128 * 128, vec![(1, 128), (0, 1)]),
        (128 * 128 + 1, vec![(3, 129), (1, 2), (0, 1)]),
    ] {
        assert_eq!(Levels::new(blocks).levels, expected, "{blocks}");
    }
}

#[test]
#[cfg_attr(windows, ignore = "the oracle is veritysetup of Linux")]
fn veritysetup_agrees_with_tree_and_root() {
    for len in [4096, 8192, 128 * 4096, 129 * 4096, 300 * 4096 + 1024, 17_000 * 4096] {
        let (disk, summary) = tree_of(&pattern(len));
        assert_eq!(summary.end, summary.hash_offset + tree_bytes(len as u64));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let mut bytes = vec![0; disk.size().unwrap() as usize];
        disk.read_exact_at(&mut bytes, 0).unwrap();
        std::fs::write(&path, bytes).unwrap();
        let root = summary.root.iter().fold(String::new(), |text, b| text + &format!("{b:02x}"));
        let out = Command::new("veritysetup")
            .args(["verify", "--hash-offset", &summary.hash_offset.to_string()])
            .args([&path, &path])
            .arg(&root)
            .output()
            .expect("this test needs veritysetup");
        assert!(out.status.success(), "{len}: {}", String::from_utf8_lossy(&out.stderr));
    }
}

#[test]
fn a_check_finds_each_damaged_block_and_no_other() {
    let data = pattern(300 * 4096);
    let (disk, summary) = tree_of(&data);
    let superblock = find(&disk, data.len() as u64).unwrap().unwrap();
    let report = check(&disk, &superblock, &mut |_| {}).unwrap();
    assert!(report.is_sound());
    assert_eq!((report.root, report.data_blocks), (summary.root, 300));
    assert_eq!(root(&disk, &superblock).unwrap(), summary.root);
    let flip = |at: u64| {
        let mut byte = [0];
        disk.read_exact_at(&mut byte, at).unwrap();
        disk.write_all_at(&[byte[0] ^ 4], at).unwrap();
    };
    for at in [5, 4096 * 7, 4096 * 8 + 4095, 4096 * 299] {
        flip(at);
    }
    let report = check(&disk, &superblock, &mut |_| {}).unwrap();
    assert_eq!(report.bad_blocks, 4);
    assert_eq!(report.damaged, [0..4096, 4096 * 7..4096 * 9, 4096 * 299..4096 * 300]);
    assert!(report.damaged_tree.is_empty());
    // The second block of leaves: blocks 128 to 255 cannot be verified.
    let leaves = superblock.offset + 4096 * 3;
    flip(leaves);
    let report = check(&disk, &superblock, &mut |_| {}).unwrap();
    assert_eq!(report.damaged_tree, vec![leaves..leaves + 4096]);
    // The top level has nothing above it: its root differs.
    flip(superblock.offset + 4096 + 64);
    assert_ne!(check(&disk, &superblock, &mut |_| {}).unwrap().root, summary.root);
}

#[test]
fn damaged_and_foreign_superblocks_are_distinguished() {
    let (disk, _) = tree_of(&pattern(8192));
    let mut whole = vec![0; disk.size().unwrap() as usize];
    disk.read_exact_at(&mut whole, 0).unwrap();
    let with = |at: usize, bytes: &[u8]| {
        let mut copy = whole.clone();
        copy[8192 + at..8192 + at + bytes.len()].copy_from_slice(bytes);
        find(&MemDisk::from(copy), 8192)
    };
    assert!(with(0, b"verity").unwrap().is_some());
    assert!(with(0, b"Verity").unwrap().is_none());
    for (at, bytes) in [(8, &[2][..]), (12, &[0]), (32, b"sha512"), (64, &[0, 2]), (68, &[0, 2])] {
        assert!(matches!(with(at, bytes), Err(VerityError::Unsupported(_))), "{at}");
    }
    for (at, bytes) in [(72, &[3][..]), (72, &[0]), (72, &[0xff; 8]), (80, &[1, 1])] {
        assert!(matches!(with(at, bytes), Err(VerityError::Corrupt { .. })), "{at}");
    }
    assert!(find(&MemDisk::from(whole[..8192].to_vec()), 8192).unwrap().is_none());
    let cut = MemDisk::from(whole[..8192 + 4096].to_vec());
    let superblock = find(&cut, 8192).unwrap().unwrap();
    assert!(matches!(check(&cut, &superblock, &mut |_| {}), Err(VerityError::Corrupt { .. })));
}

#[test]
fn leaves_that_leave_memory_give_the_same_tree() {
    let blocks = (leaves::IN_MEMORY * 2 + 300) as u64;
    let write = |disk: Disk| {
        // Mostly holes, so that the test is quick.
        for at in [0, 4096 * 70_000 + 5, 4096 * (blocks - 1), 4096 * 3 + 9] {
            disk.write_all_at(b"some bytes", at).unwrap();
        }
        finish(&disk, blocks * 4096).1.root
    };
    let scratch = Arc::new(MemDisk::new());
    let spilled = write(Disk::hashing(Arc::default(), Some(scratch.clone())).unwrap());
    assert_eq!(spilled, write(Disk::hashing(Arc::default(), None).unwrap()));
    assert_eq!(scratch.size().unwrap(), (leaves::IN_MEMORY * 2 * HASH) as u64);
}

#[test]
fn a_failing_disk_fails_the_tree() {
    let disk = TreeDisk::<_, MemDisk>::hashing(FaultDisk::full_after(MemDisk::new(), 8192), None).unwrap();
    disk.write_all_at(&pattern(8192), 0).unwrap();
    assert!(matches!(disk.finish(8192, [0; 16]), Err(VerityError::Io { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_order_of_writes_does_not_matter(
        writes in prop::collection::vec((0u64..3_000_000, 1usize..700_000, any::<u8>()), 1..12),
        tail in 0u64..10_000,
    ) {
        let disk = Disk::hashing(Arc::default(), None).unwrap();
        let mut expected = Vec::new();
        for (at, len, byte) in writes {
            let data = vec![byte; len];
            disk.write_all_at(&data, at).unwrap();
            let end = at as usize + len;
            if expected.len() < end {
                expected.resize(end, 0);
            }
            expected[at as usize..end].copy_from_slice(&data);
        }
        expected.resize(expected.len() + tail as usize, 0);
        disk.set_len(expected.len() as u64).unwrap();
        let (_, summary) = finish(&disk, expected.len() as u64);
        prop_assert_eq!(summary.root, tree_of(&expected).1.root);
    }
}
