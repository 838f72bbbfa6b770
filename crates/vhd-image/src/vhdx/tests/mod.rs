//! The VHDX room against a plain file, QEMU, faults and hostile bytes.

mod change;
mod cuts;
mod hostile;
mod logs;
#[cfg(target_os = "linux")]
mod qemu;

use super::{CreateOptions, Geometry, Vhdx, VhdxError, VhdxWriter, create, layout};
use disk_io::{FaultDisk, MemDisk, ReadAt, WriteAt};
use proptest::prelude::*;
use uuid::Uuid;

const ID: Uuid = Uuid::from_u128(0x0123_4567_89AB_4DEF_8123_4567_89AB_CDEF);

fn disk_of(bytes: u64, content: &[(u64, Vec<u8>)]) -> MemDisk {
    let disk = MemDisk::new();
    let len = create(&disk, &CreateOptions::new(bytes, ID), content).unwrap();
    assert_eq!(disk.size().unwrap(), len);
    disk
}

fn read_all<R: ReadAt>(disk: &R) -> Vec<u8> {
    let mut bytes = vec![0xAA; disk.size().unwrap() as usize];
    disk.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn what_is_created_is_read() {
    let content = [(5, b"hello".to_vec()), ((3 << 20) - 2, vec![9; 5]), ((9 << 20) - 1, vec![7])];
    let disk = disk_of(9 << 20, &content);
    let vhdx = Vhdx::open(&disk).unwrap();
    assert_eq!(
        *vhdx.geometry(),
        Geometry {
            disk_bytes: 9 << 20,
            block_size: 1 << 20,
            logical_sector: 512,
            physical_sector: 4096,
            disk_id: ID,
            fixed: false
        }
    );
    let mut expected = vec![0; 9 << 20];
    for (at, bytes) in &content {
        expected[*at as usize..][..bytes.len()].copy_from_slice(bytes);
    }
    assert!(read_all(&vhdx) == expected);
    assert_eq!(vhdx.allocated(), [0..1 << 20, 2 << 20..4 << 20, 8 << 20..9 << 20]);
    assert!(!vhdx.is_dirty());
    assert!(disk.to_vec() == disk_of(9 << 20, &content).to_vec(), "the same options give the same bytes");
}

#[test]
fn options_that_cannot_be() {
    let good = CreateOptions::new(1 << 30, ID);
    let bad = [
        CreateOptions { disk_bytes: 0, ..good },
        CreateOptions { disk_bytes: 513, ..good },
        CreateOptions { disk_bytes: 512, logical_sector: 4096, ..good },
        CreateOptions { disk_bytes: (64 << 40) + 4096, block_size: 256 << 20, ..good },
        CreateOptions { block_size: 1 << 19, ..good },
        CreateOptions { block_size: 3 << 20, ..good },
        CreateOptions { block_size: 512 << 20, ..good },
        CreateOptions { logical_sector: 1024, ..good },
        CreateOptions { physical_sector: 0, ..good },
        CreateOptions { disk_bytes: 64 << 40, ..good },
    ];
    for options in bad {
        assert!(matches!(create(MemDisk::new(), &options, &[]), Err(VhdxError::Usage(_))), "{options:?}");
    }
    for content in [(1 << 30, vec![1]), (u64::MAX, vec![1, 2]), ((1 << 30) - 1, vec![1, 2])] {
        assert!(matches!(create(MemDisk::new(), &good, &[content]), Err(VhdxError::Usage(_))));
    }
}

#[test]
fn bitmap_entries_lie_behind_each_chunk() {
    let ratio = layout::chunk_ratio(512, 1 << 20);
    assert_eq!((ratio, layout::chunk_ratio(4096, 256 << 20)), (4096, 128));
    for (blocks, entries) in [(1, 1), (4096, 4096), (4097, 4098), (8192, 8193), (8193, 8195)] {
        assert_eq!(layout::bat_entries(blocks, ratio), entries);
        assert_eq!(layout::bat_index(blocks - 1, ratio), entries - 1);
    }
}

#[test]
fn writes_end_with_the_disk_and_its_size_is_fixed() {
    let writer = VhdxWriter::open(disk_of(1 << 20, &[])).unwrap();
    assert_eq!(writer.write_at(&[1; 10], (1 << 20) - 4).unwrap(), 4);
    assert_eq!(writer.write_at(&[1], 1 << 20).unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    assert_eq!(writer.write_at(&[1], u64::MAX).unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    assert!(writer.set_len(1 << 20).is_ok() && writer.set_len(2 << 20).is_err());
    assert_eq!(writer.read_at(&mut [0; 8], u64::MAX).unwrap(), 0);
}

#[test]
fn zeros_take_no_room_and_reads_change_nothing() {
    let disk = disk_of(8 << 20, &[]);
    let before = disk.to_vec();
    drop(VhdxWriter::open(&disk).unwrap());
    assert!(disk.to_vec() == before);
    let writer = VhdxWriter::open(&disk).unwrap();
    writer.write_all_at(&vec![0; 5 << 20], 1 << 20).unwrap();
    assert_eq!(writer.allocated(), []);
    drop(writer);
    assert_eq!(disk.size().unwrap(), before.len() as u64);
    let (a, b) = (disk.to_vec(), before);
    assert!(a[..64 << 10] == b[..64 << 10] && a[192 << 10..] == b[192 << 10..], "more than a header changed");
}

/// Write, sync or reopen.
#[derive(Debug, Clone)]
enum Step {
    Write { at: u64, len: usize, byte: u8 },
    Sync,
    Reopen,
}

const DISK: u64 = (12 << 20) + 512;

fn step() -> impl Strategy<Value = Step> {
    let offset = prop_oneof![0..DISK, (0..12u64).prop_map(|b| (b << 20).saturating_sub(3))];
    prop_oneof![
        8 => (offset, prop_oneof![1..5000usize, 1..(2usize << 20)], 0..4u8)
            .prop_map(|(at, len, byte)| Step::Write { at, len: len.min((DISK - at) as usize), byte }),
        1 => Just(Step::Sync),
        1 => Just(Step::Reopen),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec(step(), 1..24)
}

fn run<D: WriteAt + ReadAt>(disk: &D, steps: &[Step], model: &mut [u8]) {
    let mut writer = VhdxWriter::open(disk).unwrap();
    for step in steps {
        match *step {
            Step::Write { at, len, byte } => {
                writer.write_all_at(&vec![byte; len], at).unwrap();
                model[at as usize..][..len].fill(byte);
            }
            Step::Sync => writer.sync().unwrap(),
            Step::Reopen => {
                drop(writer);
                writer = VhdxWriter::open(disk).unwrap();
            }
        }
    }
    assert!(read_all(&writer) == model);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn random_writes_are_those_of_a_plain_file(steps in steps()) {
        let disk = disk_of(DISK, &[]);
        let mut model = vec![0; DISK as usize];
        run(&disk, &steps, &mut model);
        prop_assert!(read_all(&Vhdx::open(&disk).unwrap()) == model);
    }

    /// A disk that fills up at any byte leaves a file that opens, and holds all that was synced and not written since.
    #[test]
    fn a_cut_at_any_byte_leaves_a_file_that_opens(steps in steps(), budget in prop_oneof![0..20_000u64, 0..(20u64 << 20)]) {
        let disk = disk_of(DISK, &[(2 << 20, vec![3; 5000])]);
        let faulty = FaultDisk::full_after(&disk, budget);
        let mut synced = read_all(&Vhdx::open(&disk).unwrap());
        let mut since: Vec<(usize, usize)> = Vec::new();
        if let Ok(mut writer) = VhdxWriter::open(&faulty) {
            let mut model = synced.clone();
            for step in &steps {
                let done = match *step {
                    Step::Write { at, len, byte } => {
                        since.push((at as usize, len));
                        model[at as usize..][..len].fill(byte);
                        writer.write_all_at(&vec![byte; len], at).is_ok()
                    }
                    Step::Sync => {
                        let done = writer.sync().is_ok();
                        if done {
                            synced.clone_from(&model);
                            since.clear();
                        }
                        done
                    }
                    Step::Reopen => {
                        drop(writer);
                        let Ok(again) = VhdxWriter::open(&faulty) else { break };
                        writer = again;
                        true
                    }
                };
                if !done {
                    break;
                }
            }
        }
        let found = read_all(&Vhdx::open(&disk).unwrap());
        let mut expected = synced;
        for (at, len) in since {
            expected[at..at + len].copy_from_slice(&found[at..at + len]);
        }
        prop_assert!(found == expected, "what was synced is lost");
        let writer = VhdxWriter::open(&disk).unwrap();
        writer.write_all_at(&[5; 100], 11 << 20).unwrap();
        writer.sync().unwrap();
        expected[11 << 20..(11 << 20) + 100].fill(5);
        prop_assert!(read_all(&Vhdx::open(&disk).unwrap()) == expected, "old bytes came back");
    }
}

/// Each single byte of what a sync writes is a place to be cut at.
#[test]
fn every_byte_of_a_small_session_can_be_the_last() {
    let fresh = disk_of(6 << 20, &[]);
    let bytes = fresh.to_vec();
    let session = |budget| {
        let disk = MemDisk::from(bytes.clone());
        let faulty = FaultDisk::full_after(&disk, budget);
        let outcome = VhdxWriter::open(&faulty).map_err(std::io::Error::from).and_then(|writer| {
            writer.write_all_at(&[1; 9], (1 << 20) - 4)?;
            writer.write_all_at(&[2; 9], 4 << 20)?;
            writer.sync()
        });
        (outcome.is_ok(), disk)
    };
    let mut complete = None;
    for budget in (0..4200).step_by(97).chain(4080..4200) {
        let (done, disk) = session(budget);
        let vhdx = Vhdx::open(&disk).unwrap_or_else(|e| panic!("cut after {budget} bytes: {e}"));
        let found = read_all(&vhdx);
        assert!(found.iter().enumerate().all(|(at, &b)| b == 0
            || b == 1 && ((1 << 20) - 4..(1 << 20) + 5).contains(&at)
            || b == 2 && (4 << 20..(4 << 20) + 9).contains(&at)));
        if done {
            complete = Some(complete.map_or(budget, |least: u64| least.min(budget)));
        }
    }
    // One header, 18 bytes of data, three entries twice.
    assert_eq!(complete, Some(4096 + 18 + 48));
}
