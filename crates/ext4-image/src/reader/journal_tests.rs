//! A power cut at every moment of a journaled change, as jbd2 makes it: the reader sees the change or not, never a part.
//!
//! ```text
//!   needs_recovery ─flush─► log begins ─flush─► descriptor, blocks ─flush─► commit ─flush─► (the change is durable)
//!     ─► blocks in their places ─flush─► log is empty ─flush─► needs_recovery cleared ─flush
//! ```
//!
//! e2fsck replays the same images, and agrees. (Sources: kernel, `fs/jbd2/commit.c`, `fs/jbd2/checkpoint.c`.)

use super::Ext4;
use crate::{
    Ext4Error, Timestamp,
    format::{BlankOptions, MIN_BYTES, blank},
    layout::{
        journal::{JBD2_COMMIT_BLOCK, JBD2_DESCRIPTOR_BLOCK, JBD2_MAGIC_NUMBER, TagFlags},
        superblock::{Incompat, Superblock},
    },
    testing::fsck,
    writer::Attributes,
};
use disk_io::{
    MemDisk, ReadAt, WriteAt,
    crash::{CrashDisk, Event},
};
use std::process::Command;
use zerocopy::{FromZeros, IntoBytes};

const BLOCK: usize = 4096;
/// Place of the super block in its block, in bytes.
const SUPERBLOCK: usize = 1024;
/// Places of the log's begin and first transaction in the journal's super block (`journal_superblock_t`).
const SEQUENCE: u64 = 0x18;
const START: u64 = 0x1C;

/// What the change changes: the label, in the super block, and the permissions of a directory, in its inode.
type Seen = (Vec<u8>, u16);

const OLD: (&[u8], u16) = (b"old", 0o755);
const NEW: (&[u8], u16) = (b"new", 0o711);

fn image((label, permissions): (&[u8], u16)) -> Vec<u8> {
    let attributes = |permissions| Attributes {
        permissions,
        mtime: Timestamp { secs: 1_600_000_000, nanos: 0 },
        ..Attributes::default()
    };
    let options = BlankOptions {
        uuid: [7; 16],
        label: label.to_vec(),
        root: attributes(0o755),
        directories: vec![(b"upper".to_vec(), attributes(permissions))],
        journal_bytes: None,
        mkfs_time: 1_600_000_000,
    };
    let disk = MemDisk::new();
    disk.set_len(MIN_BYTES).unwrap();
    for (offset, bytes) in blank(MIN_BYTES, &options).unwrap() {
        disk.write_all_at(&bytes, offset).unwrap();
    }
    disk.to_vec()
}

fn see<R: ReadAt>(disk: R) -> Result<Seen, Ext4Error> {
    let fs = Ext4::open(disk)?;
    let root = fs.inode(fs.root())?;
    let upper = fs.lookup(&root, b"upper")?.expect("the directory is there before and after");
    let label = fs.source.superblock()?.s_volume_name;
    let end = label.iter().position(|byte| *byte == 0).unwrap_or(label.len());
    Ok((label[..end].to_vec(), fs.inode(upper)?.mode & 0o777))
}

/// The block that holds the super block, with or without the mark that the journal must be replayed.
fn first_block(image: &[u8], recover: bool) -> Vec<u8> {
    let mut sb = Superblock::new_zeroed();
    let end = SUPERBLOCK + size_of::<Superblock>();
    sb.as_mut_bytes().copy_from_slice(&image[SUPERBLOCK..end]);
    let flags = sb.incompat();
    let flag = Incompat::EXT4_FEATURE_INCOMPAT_RECOVER;
    sb.s_feature_incompat.set(if recover { flags | flag } else { flags - flag }.bits());
    sb.seal();
    let mut block = image[..BLOCK].to_vec();
    block[SUPERBLOCK..end].copy_from_slice(sb.as_bytes());
    block
}

fn log_block(kind: u32, words: &[u32]) -> Vec<u8> {
    let words = [JBD2_MAGIC_NUMBER, kind, 1].into_iter().chain(words.iter().copied());
    let mut bytes: Vec<u8> = words.flat_map(u32::to_be_bytes).collect();
    bytes.resize(BLOCK, 0);
    bytes
}

/// A disk on which the change is made, with everything that a kernel writes for it.
fn changed() -> CrashDisk {
    let (old, new) = (image(OLD), image(NEW));
    let journal = {
        let fs = Ext4::open(MemDisk::from(old.clone())).unwrap();
        let inode = fs.inode(fs.geometry().journal_inum).unwrap();
        fs.extents(&inode).unwrap()[0].physical_block * BLOCK as u64
    };
    let differ = |n: &usize| old[n * BLOCK..][..BLOCK] != new[n * BLOCK..][..BLOCK];
    let mut blocks: Vec<(usize, Vec<u8>)> =
        (0..old.len() / BLOCK).filter(differ).map(|n| (n, new[n * BLOCK..][..BLOCK].to_vec())).collect();
    assert!(blocks.len() >= 2 && blocks[0].0 == 0, "the change has a part in each of two blocks");
    blocks[0].1 = first_block(&new, true);

    let disk = CrashDisk::new(old.clone());
    let write = |bytes: &[u8], at: u64| disk.write_all_at(bytes, at).unwrap();
    let log = |start: u32, sequence: u32| {
        write(&sequence.to_be_bytes(), journal + SEQUENCE);
        write(&start.to_be_bytes(), journal + START);
        disk.sync().unwrap();
    };
    write(&first_block(&old, true), 0);
    disk.sync().unwrap();
    log(1, 1);
    let mut tags = Vec::new();
    for (n, (block, _)) in blocks.iter().enumerate() {
        let last = if n + 1 == blocks.len() { TagFlags::JBD2_FLAG_LAST_TAG.bits() } else { 0 };
        tags.extend([*block as u32, TagFlags::JBD2_FLAG_SAME_UUID.bits() | last]);
    }
    write(&log_block(JBD2_DESCRIPTOR_BLOCK, &tags), journal + BLOCK as u64);
    for (n, (_, bytes)) in blocks.iter().enumerate() {
        write(bytes, journal + (n as u64 + 2) * BLOCK as u64);
    }
    disk.sync().unwrap();
    write(&log_block(JBD2_COMMIT_BLOCK, &[]), journal + (blocks.len() as u64 + 2) * BLOCK as u64);
    disk.sync().unwrap();
    for (block, bytes) in &blocks {
        write(bytes, (block * BLOCK) as u64);
    }
    disk.sync().unwrap();
    log(0, 2);
    write(&first_block(&new, false), 0);
    disk.sync().unwrap();
    disk
}

/// Flushes of [`changed`] before which the commit is not written, and after which it is durable.
const BEFORE_COMMIT: usize = 3;
const COMMITTED: usize = 4;

fn owned((label, permissions): (&[u8], u16)) -> Seen {
    (label.to_vec(), permissions)
}

fn is_legal(seen: &Seen, flushes: usize) -> bool {
    let (old, new) = (*seen == owned(OLD), *seen == owned(NEW));
    if flushes < BEFORE_COMMIT {
        old
    } else if flushes < COMMITTED {
        old || new
    } else {
        new
    }
}

#[test]
fn a_journaled_change_is_read_whole_or_not_at_all_and_e2fsck_agrees() {
    let disk = changed();
    let (mut faults, mut replays) = (Vec::new(), 0);
    let file = tempfile::NamedTempFile::new().unwrap();
    let visited = disk.images(|image, flushes| {
        let seen = match see(MemDisk::from(image.to_vec())) {
            Ok(seen) => seen,
            Err(e) => return faults.push(format!("after {flushes} flushes: {e}")),
        };
        if !is_legal(&seen, flushes) {
            faults.push(format!("after {flushes} flushes: {seen:?}"));
        }
        std::fs::write(file.path(), image).unwrap();
        let out =
            Command::new("e2fsck").arg("-fy").arg(file.path()).output().expect("this test needs e2fsck");
        let said = String::from_utf8_lossy(&out.stdout);
        // 1: something was corrected, of which a replay is one.
        assert!(out.status.code().is_some_and(|code| code < 2), "{said}");
        replays += usize::from(said.contains("recovering journal"));
        fsck(file.path());
        let theirs = see(MemDisk::from(std::fs::read(file.path()).unwrap())).unwrap();
        if theirs != seen {
            faults
                .push(format!("after {flushes} flushes: e2fsck makes {theirs:?}, the reader sees {seen:?}"));
        }
    });
    println!("journaled change: {visited:?}, {replays} replays by e2fsck");
    assert!(faults.is_empty(), "{faults:#?}");
    assert!(visited.images > 25 && replays > 10, "{visited:?}, {replays} replays");
}

/// The kernel's flushes are what makes the change whole: without that before the commit a part of it is seen.
#[test]
fn without_the_flush_before_the_commit_a_part_of_the_change_is_seen() {
    let disk = changed();
    assert_eq!(disk.events().iter().filter(|event| **event == Event::Flush).count(), 7);
    let faulty = |left_out: usize| {
        let mut faulty = false;
        disk.images_without(left_out, |image, _| {
            // Not even readable, or a mixture.
            let whole =
                see(MemDisk::from(image.to_vec())).is_ok_and(|seen| seen == owned(OLD) || seen == owned(NEW));
            faulty |= !whole;
        });
        faulty
    };
    assert!(faulty(BEFORE_COMMIT - 1), "before the commit");
    assert!(faulty(COMMITTED), "between the blocks in their places and the empty log");
}
