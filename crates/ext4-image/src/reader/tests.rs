//! The reader against file systems of mkfs.ext4 and the kernel, a dirty journal, and damage of every kind.
//!
//! These tests need root, loop devices and e2fsprogs, and say so if they are missing.

use super::*;
use disk_io::MemDisk;
use std::{
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
};
use zerocopy::FromBytes;

fn sh(script: &str) -> String {
    let out = Command::new("bash")
        .args(["-euc", &[crate::testing::BASH, script].concat()])
        .output()
        .expect("bash starts");
    assert!(
        out.status.success(),
        "`{script}` failed (needs root, loop devices, e2fsprogs, attr): {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).stderr(Stdio::null()).status();
    }
}

fn names<R: ReadAt>(fs: &Ext4<R>, ino: u32) -> Vec<String> {
    let mut names: Vec<_> = fs
        .read_dir(&fs.inode(ino).unwrap())
        .unwrap()
        .into_iter()
        .map(|e| String::from_utf8(e.name).unwrap())
        .collect();
    names.sort();
    names
}

fn contents<R: ReadAt>(fs: &Ext4<R>, path: &str) -> Vec<u8> {
    let mut inode = fs.inode(fs.root()).unwrap();
    for name in path.split('/') {
        inode = fs.inode(fs.lookup(&inode, name.as_bytes()).unwrap().expect(path)).unwrap();
    }
    let mut bytes = vec![0; inode.size as usize];
    assert_eq!(fs.read_file_at(&inode, 0, &mut bytes).unwrap(), bytes.len());
    bytes
}

/// Copies a mounted image while its journal is full, as a crash would leave it.
fn crashed(options: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let (image, mount, copy) = (dir.path().join("i"), dir.path().join("m"), dir.path().join("copy"));
    fs::create_dir(&mount).unwrap();
    {
        let _unmount = Unmount(&mount);
        sh(&format!(
            r"truncate -s 48M {0}; mkfs.ext4 -q {options} {0}; loop_mount {0} {1} commit=600; cd {1}
            mkdir d; for i in $(seq 200); do echo $i > d/f$i; done; sync -f .
            for i in $(seq 1 2 199); do rm d/f$i; done; printf '\xc0\x3b\x39\x98escaped' > magic
            for i in $(seq 20); do mkdir x; touch x/y; sync x; rm -r x; done
            echo new > d/new; mkdir e; echo e > e/e; head -c 100000 /dev/urandom > big; sync
            cp --sparse=always {0} {2}; cd /; umount {1}",
            image.display(),
            mount.display(),
            copy.display()
        ));
    }
    (dir, copy)
}

#[test]
#[cfg_attr(windows, ignore = "needs e2fsprogs and mounts of Linux, the oracles")]
fn a_dirty_journal_is_replayed_in_memory() {
    for options in [
        "",
        "-O ^metadata_csum",
        "-b 1024 -O ^64bit,^metadata_csum",
        "-b 1024",
        "-O ^metadata_csum -J size=4",
    ] {
        let (_dir, copy) = crashed(options);
        let before = fs::read(&copy).unwrap();
        assert!(
            sh(&format!("dumpe2fs -h {} 2>/dev/null", copy.display())).contains("needs_recovery"),
            "{options}"
        );
        let dirty = Ext4::open(File::open(&copy).unwrap()).unwrap();
        assert!(!dirty.source.overlay.is_empty(), "{options}");
        // The kernel's own recovery must give the same.
        let replayed = copy.with_extension("kernel");
        fs::copy(&copy, &replayed).unwrap();
        sh(&format!("e2fsck -fy {} >/dev/null 2>&1 || test $? = 1", replayed.display()));
        let clean = Ext4::open(File::open(&replayed).unwrap()).unwrap();
        assert!(clean.source.overlay.is_empty());
        let d = clean.lookup(&clean.inode(2).unwrap(), b"d").unwrap().unwrap();
        assert_eq!(names(&dirty, 2), names(&clean, 2), "{options}");
        assert_eq!(names(&dirty, d), names(&clean, d), "{options}");
        assert_eq!(names(&dirty, d).len(), 101);
        for path in ["d/f2", "d/new", "e/e", "magic", "big"] {
            assert_eq!(contents(&dirty, path), contents(&clean, path), "{options} {path}");
        }
        assert_eq!(contents(&dirty, "magic"), b"\xc0\x3b\x39\x98escaped");
        assert!(fs::read(&copy).unwrap() == before, "nothing is written");
    }
}

#[test]
#[cfg_attr(windows, ignore = "needs e2fsprogs and mounts of Linux, the oracles")]
fn damage_gives_errors_never_panics() {
    let (_dir, copy) = crashed("-b 1024 -O inline_data,ea_inode,metadata_csum");
    let good = fs::read(&copy).unwrap();
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % n
    };
    // Metadata stand at the front; a fresh superblock checksum lets damage through to what lies behind it.
    for round in 0..300 {
        let mut bytes = good.clone();
        for _ in 0..=random(6) {
            let at = random(if round % 3 == 0 { 4096 } else { 3 << 20 }) as usize;
            bytes[at] = random(256) as u8;
        }
        let at = (random(64) * 16 + 1024) as usize;
        bytes[at] ^= (random(2) * random(256)) as u8;
        let sb = Superblock::mut_from_bytes(&mut bytes[1024..2048]).unwrap();
        sb.seal();
        if round % 2 == 0 {
            // Without checksums everything is believed.
            let ro = sb.ro_compat().difference(RoCompat::EXT4_FEATURE_RO_COMPAT_METADATA_CSUM);
            sb.s_feature_ro_compat.set(ro.bits());
        }
        let Ok(fs) = Ext4::open(MemDisk::from(bytes)) else { continue };
        let mut todo = vec![2];
        let mut seen = std::collections::HashSet::new();
        while let Some(ino) = todo.pop() {
            let Ok(inode) = fs.inode(ino) else { continue };
            let _ = (fs.xattrs(&inode), fs.symlink_target(&inode), fs.data_map(&inode));
            let _ = fs.read_file_at(&inode, 1, &mut [0; 5000]);
            if inode.kind == FileKind::Directory
                && seen.insert(ino)
                && let Ok(entries) = fs.read_dir(&inode)
            {
                todo.extend(entries.iter().map(|e| e.ino));
            }
        }
    }
}

#[test]
#[cfg_attr(windows, ignore = "needs e2fsprogs and mounts of Linux, the oracles")]
fn the_block_maps_of_ext2_are_read() {
    let dir = tempfile::tempdir().unwrap();
    sh(&format!(
        "cd {}; mkdir t; seq 300000 > t/f; truncate -s 5M t/hole; echo end >> t/hole; truncate -s 16M i; mkfs.ext2 -q -b 1024 -d t i",
        dir.path().display()
    ));
    let fs = Ext4::open(File::open(dir.path().join("i")).unwrap()).unwrap();
    for name in ["f", "hole"] {
        assert!(contents(&fs, name) == fs::read(dir.path().join("t").join(name)).unwrap(), "{name}");
    }
}

#[test]
fn what_is_no_ext4_is_refused() {
    for bytes in [vec![], vec![0; 512], vec![0; 4096], vec![0xFF; 8192]] {
        assert!(Ext4::open(MemDisk::from(bytes)).is_err());
    }
}

/// Runs e2fsprogs.
fn run(program: &str, args: &[&str]) {
    let out = std::process::Command::new(program).args(args).output().expect("e2fsprogs are needed");
    assert!(out.status.success(), "{program}: {}", String::from_utf8_lossy(&out.stderr));
}

/// A map of which each block names itself stands for a thousand million blocks.
#[test]
#[cfg_attr(windows, ignore = "needs e2fsprogs and mounts of Linux, the oracles")]
fn a_block_map_that_names_itself_ends_with_the_file_system() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let image = path.to_str().unwrap();
    std::fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
    run("mke2fs", &["-q", "-F", "-t", "ext2", "-b", "1024", image]);
    run("debugfs", &["-w", "-R", "write /etc/hostname file", image]);
    // Triple indirect, and a size that lets all of it count.
    for field in ["block[TIND] 3000", "size 15000000000"] {
        run("debugfs", &["-w", "-R", &format!("set_inode_field file {field}"), image]);
    }
    let mut bytes = std::fs::read(&path).unwrap();
    for pointer in bytes[3000 * 1024..3001 * 1024].chunks_exact_mut(4) {
        pointer.copy_from_slice(&3000u32.to_le_bytes());
    }
    let disk = disk_io::MemDisk::from(bytes);
    let fs = super::Ext4::open(&disk).unwrap();
    let root = fs.inode(fs.root()).unwrap();
    let file = fs.inode(fs.lookup(&root, b"file").unwrap().unwrap()).unwrap();
    disk_io::steps::taken();
    let e = fs.extents(&file).unwrap_err();
    let Ext4Error::Corrupt { kind, place } = &e else { panic!("{e}") };
    assert_eq!(*kind, crate::error::ExtentFault::MapBlocks.into());
    assert_eq!(place.inode, Some(file.ino));
    let steps = disk_io::steps::taken();
    assert!(steps < 16 * 4096, "{steps} steps in a file system of 4,096 blocks");
}

/// What all inodes of a hostile image point to is read some times for each block, not once for each inode.
#[test]
#[cfg_attr(windows, ignore = "needs e2fsprogs and mounts of Linux, the oracles")]
fn blocks_that_many_inodes_share_are_visited_a_bounded_number_of_times() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    run("mke2fs", &["-q", "-F", "-t", "ext4", "-b", "1024", path.to_str().unwrap()]);
    let disk = disk_io::MemDisk::from(std::fs::read(&path).unwrap());
    let fs = super::Ext4::open(&disk).unwrap();
    let root = fs.inode(fs.root()).unwrap();
    let visits = (0..1_000_000).take_while(|_| fs.read_dir(&root).is_ok()).count();
    // Some dozen times each block is what no operation on a sound file system comes near.
    assert!((10_000..200_000).contains(&visits), "{visits} visits");
}
