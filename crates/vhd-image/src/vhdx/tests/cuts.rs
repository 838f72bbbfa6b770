//! A power cut at every moment of writing a VHDX in place: each legal image opens, with what was synced.

use super::super::{CreateOptions, Vhdx, VhdxWriter, create};
use super::{ID, disk_of, logs, read_all};
use disk_io::{
    MemDisk, ReadAt, WriteAt,
    crash::{CrashDisk, Event, Visited},
};

/// Bytes of the virtual disk.
const DISK: u64 = 4 << 20;

/// Writes of a guest, in three rounds, each followed by a sync: new blocks, several in one round, a block written again, and
/// a write over the edge of two blocks.
const ROUNDS: [&[(u64, usize, u8)]; 3] = [
    &[(4096, 5000, 1), ((1 << 20) + 700, 512, 2)],
    &[(4096, 5000, 3), ((2 << 20) - 2048, 4096, 4)],
    &[(3 << 20, 3, 5), (0, 512, 6), ((1 << 20) + 700, 100, 7)],
];

/// The disk after `rounds` rounds.
fn content(rounds: usize) -> Vec<u8> {
    let mut bytes = vec![0; DISK as usize];
    for (at, len, byte) in ROUNDS[..rounds].iter().copied().flatten() {
        bytes[*at as usize..][..*len].fill(*byte);
    }
    bytes
}

/// The disk after each number of rounds.
type Contents = [Vec<u8>; ROUNDS.len() + 1];

/// What a byte may be after a cut in round `round`: what it was, or what was written since.
fn is_legal(found: &[u8], contents: &Contents, round: usize) -> bool {
    const PART: usize = 4096;
    let (old, new) = (&contents[round], &contents[(round + 1).min(ROUNDS.len())]);
    found.chunks(PART).zip(old.chunks(PART).zip(new.chunks(PART))).all(|(found, (old, new))| {
        found == old
            || found.iter().zip(old.iter().zip(new)).all(|(byte, (old, new))| byte == old || byte == new)
    })
}

/// A disk that was written in [`ROUNDS`], and the number of flushes after each of them.
fn written() -> (CrashDisk, Vec<usize>) {
    let disk = CrashDisk::new(disk_of(DISK, &[(4096, vec![0; 1])]).to_vec());
    let writer = VhdxWriter::open(&disk).unwrap();
    let flushes = || disk.events().iter().filter(|event| **event == Event::Flush).count();
    let mut ends = Vec::new();
    for round in ROUNDS {
        for (at, len, byte) in round {
            writer.write_all_at(&vec![*byte; *len], *at).unwrap();
        }
        writer.sync().unwrap();
        ends.push(flushes());
    }
    drop(writer);
    (disk, ends)
}

/// The fault of an image, if it has one.
fn fault(image: &[u8], contents: &Contents, round: usize) -> Option<String> {
    let disk = MemDisk::from(image.to_vec());
    let read = match Vhdx::open(&disk) {
        Ok(vhdx) => read_all(&vhdx),
        Err(e) => return Some(format!("does not open: {e}")),
    };
    if !is_legal(&read, contents, round) {
        return Some("lost what was synced, or has what nobody wrote".into());
    }
    // A writer goes on where the cut one stopped, and sees what the reader saw.
    let writer = match VhdxWriter::open(&disk) {
        Ok(writer) => writer,
        Err(e) => return Some(format!("does not open for writing: {e}")),
    };
    if read_all(&writer) != read {
        return Some("a writer reads other bytes".into());
    }
    writer.write_all_at(&[9; 600], (3 << 20) + 4000).unwrap();
    writer.sync().unwrap();
    let mut expected = read;
    expected[(3 << 20) + 4000..][..600].fill(9);
    (read_all(&Vhdx::open(&disk).unwrap()) != expected).then(|| "cannot be written further".into())
}

fn round_of(ends: &[usize], flushes: usize) -> usize {
    ends.iter().filter(|end| **end <= flushes).count()
}

#[test]
fn what_a_guest_synced_survives_any_cut_of_later_writes() {
    let (disk, ends) = written();
    let (contents, mut faults) = (std::array::from_fn(content), Vec::new());
    let visited =
        disk.images(|image, flushes| faults.extend(fault(image, &contents, round_of(&ends, flushes))));
    println!("VHDX written in place: {visited:?}, {} events", disk.events().len());
    assert!(visited.images >= 100 && visited.sampled == 0, "{visited:?}");
    assert!(faults.is_empty(), "{faults:?}");
}

/// Flushes of [`written`] without which nothing is lost, by their number, with the reason.
const SPARE: &[(usize, &str)] = &[(
    0,
    "new write ids tell others that the file has changed (2.2.2.1); what is read from the file does not depend on them",
)];

#[test]
fn each_flush_of_the_writer_counts() {
    let (disk, ends) = written();
    let contents = std::array::from_fn(content);
    let all = disk.events().iter().filter(|event| **event == Event::Flush).count();
    let mut spare = Vec::new();
    for left_out in 0..all {
        let mut faulty = false;
        disk.images_without(left_out, |image, flushes| {
            // The flushes behind it have their numbers still.
            let flushes = flushes + usize::from(flushes >= left_out);
            faulty = faulty || fault(image, &contents, round_of(&ends, flushes)).is_some();
        });
        if !faulty {
            spare.push(left_out);
        }
    }
    assert_eq!(
        spare,
        SPARE.iter().map(|(n, _)| *n).collect::<Vec<_>>(),
        "of {all} flushes, rounds end at {ends:?}"
    );
}

/// The log of another writer is replayed into the file: cut at any moment, the replay begins anew.
#[test]
fn a_replay_of_the_log_that_is_cut_begins_anew() {
    let (begin, expected) = logs::with_a_log_in_use();
    let disk = CrashDisk::new(begin);
    drop(VhdxWriter::open(&disk).unwrap());
    assert!(read_all(&Vhdx::open(MemDisk::from(disk.to_vec())).unwrap()) == expected);
    let mut faults = Vec::new();
    let visited: Visited = disk.images(|image, flushes| {
        let again = MemDisk::from(image.to_vec());
        match Vhdx::open(&again) {
            Ok(vhdx) if read_all(&vhdx) == expected => {}
            Ok(_) => faults.push(format!("other bytes after {flushes} flushes")),
            Err(e) => faults.push(format!("after {flushes} flushes: {e}")),
        }
        let writer = VhdxWriter::open(&again).map(|writer| read_all(&writer) == expected);
        if writer.as_ref().is_ok_and(|same| !same) || writer.is_err() {
            faults.push(format!("a second replay after {flushes} flushes: {writer:?}"));
        }
    });
    println!("replay of a VHDX log: {visited:?}");
    assert!(visited.images > 20, "{visited:?}");
    assert!(faults.is_empty(), "{faults:?}");
    for left_out in 0..2 {
        let mut faulty = false;
        disk.images_without(left_out, |image, _| {
            faulty |=
                Vhdx::open(MemDisk::from(image.to_vec())).map_or(true, |vhdx| read_all(&vhdx) != expected);
        });
        // Behind the last flush nothing follows, and the replay answers nobody.
        assert_eq!(faulty, left_out == 0, "flush {left_out} of the replay");
    }
}

/// A creation that is cut is no VHDX, or a whole one whose content its caller has not synced yet; it never opens with blocks
/// that lie elsewhere.
#[test]
fn a_creation_that_is_cut_opens_whole_or_not_at_all_once_it_was_synced() {
    let disk = CrashDisk::new(Vec::new());
    create(&disk, &CreateOptions::new(DISK, ID), &[(5000, vec![8; 3000])]).unwrap();
    disk.sync().unwrap();
    let mut opened = 0;
    let visited = disk.images(|image, flushes| {
        let vhdx = Vhdx::open(MemDisk::from(image.to_vec()));
        if flushes == 1 {
            let read = read_all(&vhdx.unwrap());
            assert!(read[5000..8000].iter().all(|byte| *byte == 8));
            opened += 1;
        } else if let Ok(vhdx) = vhdx {
            let mut bytes = vec![0; 100];
            let _ = vhdx.read_at(&mut bytes, 5000);
        }
    });
    assert!(opened == 1 && visited.images > 100, "{visited:?}");
}
