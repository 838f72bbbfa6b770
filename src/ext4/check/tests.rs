//! The checker against `e2fsck -fn`: good images of the kernel pass, and what e2fsck refuses is refused here too.
//!
//! These tests need root, loop devices and e2fsprogs, and say so if they are missing.

use super::*;
use crate::io::{MemDisk, WriteAt};
use std::{fs, path::Path, process::Command};
use tempfile::TempDir;

fn sh(script: &str) -> String {
    let out = Command::new("bash").args(["-euc", script]).output().expect("bash starts");
    assert!(
        out.status.success(),
        "`{script}` failed (needs root, loop devices, e2fsprogs, attr, acl): {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Detaches whatever a script left mounted.
struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).stderr(std::process::Stdio::null()).status();
    }
}

/// An image without a journal that the kernel filled, with features as our writer sets them.
fn image(dir: &TempDir, options: &str, size: &str) -> std::path::PathBuf {
    let (path, mount) = (dir.path().join("i.img"), dir.path().join("m"));
    fs::create_dir_all(&mount).unwrap();
    let _unmount = Unmount(&mount);
    sh(&format!(
        r#"truncate -s {size} {0}; mkfs.ext4 -q -m 0 -I 256 -O ^has_journal,^resize_inode,^orphan_file,64bit,inline_data,ea_inode,metadata_csum,metadata_csum_seed,large_dir \
           -E lazy_itable_init=0,hash_seed=01020304-0506-0708-090a-0b0c0d0e0f10 {options} {0}
        mount -o loop {0} {1}; cd {1}; rmdir lost+found
        mkdir -p a/b many inl; echo hi > a/tiny; head -c 20000 /dev/urandom > a/file; ln a/file a/b/link
        ln -s short a/s; ln -s $(printf 'y%.0s' {{1..80}}) a/long; mknod c c 5 1; mknod b b 259 70000; mkfifo p; mknod w c 0 0
        setfattr -n user.a -v 1 a/file; setfattr -n user.big -v 0x$(head -c 300 /dev/zero | xxd -p | tr -d '\n') a/tiny
        setfattr -n trusted.overlay.opaque -v y a; setfacl -m u:5:r a/file
        setfattr -n user.huge -v 0x$(head -c 5000 /dev/zero | xxd -p | tr -d '\n') p 2>/dev/null || true
        setfattr -n user.huge -v 0x$(head -c 5000 /dev/zero | xxd -p | tr -d '\n') a/b
        for i in $(seq 600); do : > many/some-rather-long-name-of-a-file-number-$i; done
        for i in $(seq 0 2 40); do dd if=/dev/urandom of=frag bs=4096 seek=$i count=1 conv=notrunc status=none; done
        cd /; umount {1}; debugfs -w -R 'ssv flags 2' {0} 2>/dev/null; e2fsck -fn {0} >/dev/null 2>&1"#,
        path.display(),
        mount.display()
    ));
    path
}

#[test]
fn good_images_pass_whatever_their_blocks() {
    for (options, size) in [
        ("-b 1024", "16M"),
        ("-b 2048 -O meta_bg", "16M"),
        ("-b 4096", "160M"),
        ("-b 1024 -O meta_bg -g 1024", "24M"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, options, size);
        let file = fs::File::open(&path).unwrap();
        match check(&file, CheckLimits::default()) {
            Ok(report) => assert_eq!(report.directories, 5, "{options}"),
            Err(e) => panic!("{options}: {e}"),
        }
        let limits = CheckLimits { max_inodes: 5, ..CheckLimits::default() };
        assert!(matches!(check(&file, limits), Err(Ext4Error::Unsupported { .. })));
    }
}

/// A small generator, so that failures can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Makes the checksum of an inode right.
fn seal(raw: &mut [u8], ino: u32, seed: u32) {
    raw[124..126].fill(0);
    raw[130..132].fill(0);
    let generation = u32_at(raw, 100);
    let crc = |s, b: &[u8]| crate::ext4::reader::bytes::chksum(s, b);
    let sum = crc(crc(crc(seed, &ino.to_le_bytes()), &generation.to_le_bytes()), raw);
    raw[124..126].copy_from_slice(&(sum as u16).to_le_bytes());
    raw[130..132].copy_from_slice(&((sum >> 16) as u16).to_le_bytes());
}

#[test]
fn what_e2fsck_refuses_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir, "-b 1024 -N 1024", "4M");
    let good = fs::read(&path).unwrap();
    let fs_good = Ext4::open(MemDisk::from(good.clone())).unwrap();
    let geometry = fs_good.geometry().clone();
    let group = fs_good.group(0).unwrap();
    let mut places: Vec<(u64, u64)> = vec![(1024, 1024), (2048, 64)];
    places.push((group.block_bitmap * 1024, 1024));
    places.push((group.inode_bitmap * 1024, 256));
    // Directory, extent and xattr blocks of used inodes.
    for ino in 11..700 {
        let Ok(inode) = fs_good.inode(ino) else { continue };
        if inode.kind == FileKind::Directory {
            places.extend(fs_good.extents(&inode).unwrap().iter().map(|e| (e.physical_block * 1024, 1024)));
        }
        if inode.file_acl != 0 {
            places.push((inode.file_acl * 1024, 1024));
        }
    }
    let table = group.inode_table * 1024;
    let mut random = Random(0x1234_5678_9ABC_DEF1);
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut missed = Vec::new();
    let (mut refused, mut both) = (0, 0);
    for round in 0..700 {
        let (at, len) = if round % 2 == 0 {
            // An inode in use, its checksum made right so that the change itself must be seen.
            let ino =
                [2, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 30][random.below(16) as usize];
            (table + (ino - 1) * 256, 256)
        } else {
            places[random.below(places.len() as u64) as usize]
        };
        let mut part = good[at as usize..(at + len) as usize].to_vec();
        for _ in 0..=random.below(2) {
            let byte = random.below(len) as usize;
            part[byte] = match random.below(3) {
                0 => part[byte] ^ (1 << random.below(8)),
                1 => 0,
                _ => random.below(256) as u8,
            };
        }
        if round % 2 == 0 {
            seal(&mut part, ((at - table) / 256 + 1) as u32, geometry.checksum_seed);
        } else if at == 1024 {
            let sum = crate::ext4::reader::bytes::chksum(!0, &part[..0x3FC]);
            part[0x3FC..].copy_from_slice(&sum.to_le_bytes());
        }
        if part == good[at as usize..(at + len) as usize] {
            continue;
        }
        file.write_all_at(&part, at).unwrap();
        let ours = check(&file, CheckLimits::default());
        let theirs = Command::new("e2fsck").arg("-fn").arg(&path).output().unwrap();
        if !theirs.status.success() {
            refused += 1;
            if ours.is_ok() {
                let differ: Vec<_> = part
                    .iter()
                    .zip(&good[at as usize..])
                    .enumerate()
                    .filter(|(_, (a, b))| a != b)
                    .map(|(i, (a, b))| format!("{i:#x}: {b:#x}->{a:#x}"))
                    .collect();
                missed.push(format!(
                    "round {round} byte {at}: {differ:?}: {}",
                    String::from_utf8_lossy(&theirs.stdout).lines().take(3).collect::<Vec<_>>().join(" | ")
                ));
            } else {
                both += 1;
            }
        }
        file.write_all_at(&good[at as usize..(at + len) as usize], at).unwrap();
    }
    assert!(missed.is_empty(), "{} of {refused} missed:\n{}", missed.len(), missed.join("\n"));
    assert!(both > 200, "only {both} mutations were refused by e2fsck");
    assert_eq!(check(&file, CheckLimits::default()).map(|r| r.directories).unwrap_or(0), 5);
}

#[test]
fn a_journal_or_a_strange_xattr_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("j.img");
    sh(&format!("truncate -s 8M {0}; mkfs.ext4 -q {0}", path.display()));
    assert!(check(fs::File::open(&path).unwrap(), CheckLimits::default()).is_err());
    for script in [
        "setfattr -n trusted.overlay.redirect -v /x {m}/a",
        "setfattr -n trusted.overlay.opaque -v x {m}/a",
        "setfattr -n trusted.overlay.metacopy -v y {m}/a/file",
        "chattr +i {m}/a/file",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, "-b 1024", "8M");
        let mount = dir.path().join("m");
        let _unmount = Unmount(&mount);
        let script = script.replace("{m}", &mount.display().to_string());
        sh(&format!("mount -o loop {} {1}; {script}; umount {1}", path.display(), mount.display()));
        assert!(check(fs::File::open(&path).unwrap(), CheckLimits::default()).is_err(), "{script}");
    }
}
