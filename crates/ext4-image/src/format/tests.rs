//! Blanks as e2fsck and the kernel see them: their oracles are Linux programs and the Linux kernel.

use super::*;
use crate::{
    Timestamp,
    check::{CheckLimits, check_sandbox},
    testing::{Mount, fsck},
};
use disk_io::WriteAt;
use std::{fs, os::unix::fs::MetadataExt};

fn options() -> BlankOptions {
    let a = |permissions| Attributes {
        permissions,
        uid: 100_000,
        gid: 3,
        mtime: Timestamp { secs: 1_600_000_000, nanos: 5 },
        ..Attributes::default()
    };
    BlankOptions {
        uuid: *b"\x01\x23\x45\x67\x89\xab\x4d\xef\x81\x23\x45\x67\x89\xab\xcd\xef",
        label: b"sandbox".to_vec(),
        root: a(0o755),
        directories: vec![(b"upper".to_vec(), a(0o751)), (b"work".to_vec(), a(0o700))],
        journal_bytes: None,
        mkfs_time: 1_600_000_000,
    }
}

const VERSIONS: [BlankVersion; 2] = [BlankVersion::First, BlankVersion::Second];

fn made(size: u64) -> tempfile::NamedTempFile {
    made_of(BlankVersion::default(), size)
}

fn made_of(version: BlankVersion, size: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size).unwrap();
    for (offset, bytes) in blank_of(version, size, &options()).unwrap() {
        file.as_file().write_all_at(&bytes, offset).unwrap();
    }
    file
}

fn disk_use(file: &tempfile::NamedTempFile) -> u64 {
    file.as_file().metadata().unwrap().blocks() * 512
}

#[test]
fn blanks_of_all_sizes_are_clean() {
    let sizes = [MIN_BYTES, 100 << 20, (128 << 20) + 4096, (1 << 30) + 12_345, 20 << 30, 200 << 30, 1 << 40];
    for (version, size) in VERSIONS.into_iter().flat_map(|version| sizes.map(|size| (version, size))) {
        let file = made_of(version, size);
        fsck(file.path());
        let limits = CheckLimits { max_inodes: u32::MAX, ..CheckLimits::default() };
        check_sandbox(file.as_file(), limits).unwrap();
    }
}

/// SHA-256 of all writes: their offsets and lengths (little-endian, 8 bytes each) and bytes.
fn digest(version: BlankVersion, size: u64) -> String {
    use sha2::{Digest as _, Sha256};
    use std::fmt::Write as _;
    let mut sum = Sha256::new();
    for (offset, bytes) in blank_of(version, size, &options()).unwrap() {
        sum.update(offset.to_le_bytes());
        sum.update((bytes.len() as u64).to_le_bytes());
        sum.update(&bytes);
    }
    sum.finalize().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Sandboxes of both versions are in stores: what a version is never changes. A difference here needs a new version.
#[test]
fn each_version_has_its_bytes() {
    let golden = [
        (BlankVersion::First, MIN_BYTES, "08da5b71304b6b3e702a9ecb92c4504ca7a72e47d495852fead6c1d2472d168c"),
        (BlankVersion::First, 20 << 30, "d36197eca55f5fe2bab115edc19b548ed38574f83e3c35502229b91b27f061cc"),
        (BlankVersion::Second, MIN_BYTES, "6773ba5791aa31dcbdd5db13da196d0661abff0928423c09be717250f6094a3e"),
        (BlankVersion::Second, 20 << 30, "ac748060a3347adc1a62f1a929188c0ed14fedf9f8b048cf75c61931c42f45e8"),
        (
            BlankVersion::Second,
            (3 << 40) + (5 << 20),
            "66a790d9b8d02aa8b190497c7ff7d90a87388e7200664b49a3124c2caa13a9fa",
        ),
    ];
    for (version, size, expected) in golden {
        assert_eq!(digest(version, size), expected, "{version:?}, {size} bytes");
    }
}

/// The kernel computes the same, so the first mount has nothing to write into the super block's copies.
#[test]
fn what_is_not_for_data_is_what_the_kernel_counts() {
    for size in [MIN_BYTES, (1 << 30) + 12_345, 20 << 30, 300 << 30] {
        let [known, counted] = [true, false].map(|known| {
            let file = made(size);
            let mut sb = crate::Ext4::open(file.as_file()).unwrap().source.superblock().unwrap();
            if !known {
                sb.s_overhead_clusters.set(0);
                sb.seal();
                file.as_file().write_all_at(sb.as_bytes(), SUPERBLOCK_OFFSET).unwrap();
            }
            let mount = Mount::new(file.path(), "ro");
            rustix::fs::statvfs(mount.path()).unwrap().f_blocks
        });
        assert_eq!(known, counted, "{size}");
    }
}

#[test]
fn a_blank_of_20_gib_is_small() {
    let file = made(20 << 30);
    assert!(disk_use(&file) < 1 << 20, "{} bytes on disk", disk_use(&file));
    // What is written is what it costs: few pieces, and nothing for each of its 160 groups but their descriptors.
    let pieces = blank(20 << 30, &options()).unwrap();
    let bytes: usize = pieces.iter().map(|(_, data)| data.len()).sum();
    assert!(pieces.len() < 1000 && bytes < 1 << 20, "{} pieces, {bytes} bytes", pieces.len());
}

/// Discards and write-back reach the backing file when the kernel gets to them.
fn eventually(what: &str, holds: impl Fn() -> bool) {
    let begin = std::time::Instant::now();
    while !holds() {
        assert!(begin.elapsed() < std::time::Duration::from_mins(5), "in vain: {what}");
        rustix::fs::sync();
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

#[test]
fn the_kernel_writes_to_it_and_gives_space_back() {
    for size in [MIN_BYTES, 20 << 30] {
        let file = made(size);
        {
            let mount = Mount::new(file.path(), "rw,discard");
            let m = mount.path();
            let upper = m.join("upper").metadata().unwrap();
            assert_eq!((upper.mode() & 0o7777, upper.uid(), upper.gid()), (0o751, 100_000, 3));
            assert_eq!((upper.mtime(), upper.mtime_nsec()), (1_600_000_000, 5));
            assert_eq!(fs::read_dir(m).unwrap().count(), 2);
            let before = disk_use(&file);
            for i in 0..200 {
                fs::write(m.join(format!("upper/f{i}")), vec![i as u8; 40_000]).unwrap();
            }
            rustix::fs::sync();
            eventually("the files take space", || disk_use(&file) > before + 8_000_000);
            for i in 1..200 {
                fs::remove_file(m.join(format!("upper/f{i}"))).unwrap();
            }
            rustix::fs::syncfs(fs::File::open(m).unwrap()).unwrap();
            let status = std::process::Command::new("umount").arg(m).status().unwrap();
            assert!(status.success());
            // The journal's blocks stay, the more of them the more often the kernel committed: up to 4 MB.
            eventually("deleted files give space back", || disk_use(&file) < before + 6_000_000);
        }
        fsck(file.path());
        let mount = Mount::new(file.path(), "ro");
        assert!(fs::read(mount.path().join("upper/f0")).unwrap() == vec![0; 40_000]);
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let usage = |size, options: &BlankOptions| {
        assert!(matches!(blank(size, options), Err(Ext4Error::Usage { .. })));
    };
    for size in [0, 4096, MIN_BYTES - 1, MAX_BYTES + 1, u64::MAX] {
        usage(size, &options());
    }
    usage(MIN_BYTES, &BlankOptions { journal_bytes: Some(15 << 20), ..options() });
    usage(1 << 30, &BlankOptions { journal_bytes: Some(4095), ..options() });
    usage(1 << 30, &BlankOptions { label: vec![b'x'; 17], ..options() });
    for name in ["", ".", "..", "a/b", "a\0", "upper"] {
        let mut o = options();
        o.directories.push((name.into(), Attributes::default()));
        usage(1 << 30, &o);
    }
}
