//! The checker against `e2fsck -fn`: good images of the kernel pass, and what e2fsck refuses is refused here too.
//!
//! These tests need root, loop devices and e2fsprogs, and say so if they are missing.

use super::*;
use crate::{
    BlockSize, FileKind, Xattr,
    layout::{
        dir::{self, seal_dx, seal_leaf},
        group::GroupDesc,
        inode::{InodeFlags, seal_inode},
        superblock::Superblock,
        xattr::{XattrHeader, xattr_block_checksum},
    },
    writer::{Attributes, ImageWriter, NodeKind, WriterOptions},
};
use disk_io::{MemDisk, WriteAt};
use std::{fs, path::Path, process::Command, sync::Arc};
use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes};

fn sh(script: &str) -> String {
    let out = Command::new("bash")
        .args(["-euc", &[crate::testing::BASH, script].concat()])
        .output()
        .expect("bash starts");
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
        r"truncate -s {size} {0}; mkfs.ext4 -q -m 0 -I 256 -O ^has_journal,^resize_inode,^orphan_file,64bit,inline_data,ea_inode,metadata_csum,metadata_csum_seed,large_dir \
           -E lazy_itable_init=0,hash_seed=01020304-0506-0708-090a-0b0c0d0e0f10 {options} {0}
        loop_mount {0} {1}; cd {1}; rmdir lost+found
        mkdir -p a/b many inl; echo hi > a/tiny; head -c 20000 /dev/urandom > a/file; ln a/file a/b/link
        ln -s short a/s; ln -s $(printf 'y%.0s' {{1..80}}) a/long; mknod c c 5 1; mknod b b 259 70000; mkfifo p; mknod w c 0 0
        setfattr -n user.a -v 1 a/file; setfattr -n user.big -v 0x$(head -c 300 /dev/zero | xxd -p | tr -d '\n') a/tiny
        setfattr -n trusted.overlay.opaque -v y a; setfacl -m u:5:r a/file
        setfattr -n user.huge -v 0x$(head -c 5000 /dev/zero | xxd -p | tr -d '\n') p 2>/dev/null || true
        setfattr -n user.huge -v 0x$(head -c 5000 /dev/zero | xxd -p | tr -d '\n') a/b
        for i in $(seq 600); do : > many/some-rather-long-name-of-a-file-number-$i; done
        for i in $(seq 0 2 40); do dd if=/dev/urandom of=frag bs=4096 seek=$i count=1 conv=notrunc status=none; done
        cd /; umount {1}; debugfs -w -R 'ssv flags 2' {0} 2>/dev/null; e2fsck -fn {0} >/dev/null 2>&1",
        path.display(),
        mount.display()
    ));
    path
}

#[test]
#[cfg_attr(windows, ignore = "needs e2fsprogs and mounts of Linux, the oracles")]
fn good_images_pass_whatever_their_blocks() {
    for (options, size) in [
        ("-b 1024 -g 4096", "16M"),
        ("-b 2048 -O meta_bg -g 4096", "16M"),
        ("-b 4096 -g 4096", "160M"),
        ("-b 1024 -O meta_bg -g 4096", "24M"),
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

#[test]
#[cfg_attr(windows, ignore = "needs e2fsprogs and mounts of Linux, the oracles")]
fn what_e2fsck_refuses_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    mutate(&image(&dir, "-b 1024 -g 4096 -N 1024", "4M"), 700);
}

#[test]
#[cfg_attr(windows, ignore = "needs e2fsprogs and mounts of Linux, the oracles")]
fn what_e2fsck_refuses_of_our_writers_images_is_refused() {
    for (block_size, inline_data) in [(BlockSize::B1024, true), (BlockSize::B4096, false)] {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), written(block_size, inline_data, 400).to_vec()).unwrap();
        sh(&format!("e2fsck -fn {}", file.path().display()));
        mutate(file.path(), 500);
    }
}

/// Which checksum a piece of metadata has.
#[derive(Clone, Copy)]
enum Seal {
    None,
    Superblock,
    Descriptor,
    Inode(u32),
    Leaf(u32),
    Index(u32, usize),
    Xattrs(u64),
}

fn blocks_of(extent: &crate::Extent) -> impl Iterator<Item = u64> + use<> {
    extent.physical_block..extent.physical_block + u64::from(extent.blocks)
}

fn reseal(part: &mut [u8], sealing: Seal, seed: u32) {
    match sealing {
        Seal::None => {}
        Seal::Superblock => Superblock::mut_from_bytes(part).unwrap().seal(),
        Seal::Descriptor => {
            let mut desc = GroupDesc::read_from_bytes(part).unwrap();
            desc.seal(seed, 0);
            part.copy_from_slice(desc.as_bytes());
        }
        Seal::Inode(ino) => {
            seal_inode(seed, ino, part);
        }
        Seal::Leaf(seed) => seal_leaf(seed, part),
        Seal::Index(seed, at) => {
            let count = dir::dx_countlimit(part, at).unwrap().1.min(dir::dx_limit(part.len(), at));
            seal_dx(seed, part, at, count);
        }
        Seal::Xattrs(block) => {
            let sum = xattr_block_checksum(seed, block, part);
            XattrHeader::mut_from_prefix(part).unwrap().0.h_checksum.set(sum);
        }
    }
}

/// Damages metadata of a good image in many ways; what e2fsck refuses must be refused.
fn mutate(path: &Path, rounds: u32) {
    let good = fs::read(path).unwrap();
    let fs_good = Ext4::open(MemDisk::from(good.clone())).unwrap();
    let geometry = fs_good.geometry().clone();
    let directories = check(MemDisk::from(good.clone()), CheckLimits::default()).unwrap().directories;
    let (bs, size) = (u64::from(geometry.block_size), u64::from(geometry.inode_size));
    let desc = fs_good.group(0).unwrap();
    let descriptors = geometry.descriptor_place(0).0 * bs;
    let mut places = vec![
        (1024, 1024, Seal::Superblock),
        (descriptors, 64, Seal::Descriptor),
        (desc.block_bitmap() * bs, bs, Seal::None),
        (desc.inode_bitmap() * bs, 256.min(bs), Seal::None),
    ];
    // Directory and xattr blocks of used inodes; inodes of every kind.
    let mut inos = Vec::new();
    for ino in (2..geometry.inodes_per_group.min(700)).filter(|ino| *ino == 2 || *ino >= 11) {
        let Ok(inode) = fs_good.inode(ino) else { continue };
        if inode.kind == FileKind::Directory {
            let seed = inode.seed(&geometry);
            for (i, block) in fs_good.extents(&inode).unwrap().iter().flat_map(blocks_of).enumerate() {
                let bytes = fs_good.source.block(block).unwrap();
                let indexed = inode.has(InodeFlags::EXT4_INDEX_FL);
                let seal = match crate::reader::dir::index_at(&bytes, i == 0, indexed) {
                    Some(at) => Seal::Index(seed, at),
                    None => Seal::Leaf(seed),
                };
                // Twice: these are what a hostile worker would forge.
                places.extend([(block * bs, bs, seal); 2]);
            }
        }
        if inode.file_acl != 0 {
            places.push((inode.file_acl * bs, bs, Seal::Xattrs(inode.file_acl)));
        }
        if inos.len() < 24 || ino % 97 == 0 {
            inos.push(u64::from(ino));
        }
    }
    let table = desc.inode_table() * bs;
    let mut random = Random(0x1234_5678_9ABC_DEF1);
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut missed = Vec::new();
    let (mut refused, mut both) = (0, 0);
    for round in 0..rounds {
        let (at, len, sealing) = if round % 2 == 0 {
            // An inode in use, its checksum made right so that the change itself must be seen.
            let ino = inos[random.below(inos.len() as u64) as usize];
            (table + (ino - 1) * size, size, Seal::Inode(ino as u32))
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
        // In two of three rounds the checksum is made right, so that the damage itself must be seen.
        if round % 3 != 0 || matches!(sealing, Seal::Inode(_) | Seal::Superblock) {
            reseal(&mut part, sealing, geometry.checksum_seed);
        }
        if part == good[at as usize..(at + len) as usize] {
            continue;
        }
        file.write_all_at(&part, at).unwrap();
        let ours = check(&file, CheckLimits::default());
        let theirs = Command::new("e2fsck").arg("-fn").arg(path).output().unwrap();
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
    assert!(both > rounds / 4, "only {both} mutations were refused by e2fsck");
    assert_eq!(check(&file, CheckLimits::default()).map_or(0, |r| r.directories), directories);
}

#[test]
#[cfg_attr(windows, ignore = "needs e2fsprogs and mounts of Linux, the oracles")]
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
        sh(&format!("loop_mount {} {1}; {script}; umount {1}", path.display(), mount.display()));
        assert!(check(fs::File::open(&path).unwrap(), CheckLimits::default()).is_err(), "{script}");
    }
}

/// Builds an image with our writer that has one of everything.
fn written(block_size: BlockSize, inline_data: bool, files: u32) -> Arc<MemDisk> {
    let disk = Arc::new(MemDisk::new());
    let options = WriterOptions { block_size, inline_data, ..WriterOptions::default() };
    let mut w = ImageWriter::new(disk.clone(), options).unwrap();
    let attributes = Attributes { permissions: 0o755, uid: 70_000, gid: 5, ..Attributes::default() };
    let x = |name: &str, value: &[u8]| Xattr { name: name.as_bytes().to_vec(), value: value.to_vec() };
    let root = w.root();
    let dir = w
        .create(root, b"dir", NodeKind::Directory, attributes, vec![x("trusted.overlay.opaque", b"y")])
        .unwrap();
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, id) in [(1u8, u32::MAX), (2, 1000), (4, u32::MAX), (0x10, u32::MAX), (0x20, u32::MAX)] {
        acl.extend_from_slice(&[tag, 0, 5, 0]);
        acl.extend_from_slice(&id.to_le_bytes());
    }
    for (name, size) in [("empty", 0u64), ("tiny", 20), ("small", 300), ("block", 4096), ("large", 300_000)] {
        let xattrs = match name {
            "tiny" => vec![x("user.a", b"1"), x("system.posix_acl_access", &acl)],
            "small" => vec![x("user.block", &[7; 600]), x("security.capability", &[1; 20])],
            "large" => vec![x("user.huge", &[9; 20_000])],
            _ => Vec::new(),
        };
        let node = w.create(dir, name.as_bytes(), NodeKind::File, attributes, xattrs).unwrap();
        w.begin_file(node, size).unwrap();
        w.write_data(0, &vec![b'x'; size as usize], &mut |_| {}).unwrap();
        w.end_file().unwrap();
    }
    let frag = w.create(root, b"fragments", NodeKind::File, attributes, Vec::new()).unwrap();
    w.begin_file(frag, 40 << 20).unwrap();
    for i in 0..1200u64 {
        w.write_data(i * 32768, b"data", &mut |_| {}).unwrap();
    }
    w.end_file().unwrap();
    w.link(root, b"again", frag).unwrap();
    for (name, kind) in [
        ("short", NodeKind::Symlink { target: b"dir/tiny".to_vec() }),
        ("long", NodeKind::Symlink { target: vec![b'l'; 900] }),
        ("chr", NodeKind::CharDevice { major: 5, minor: 1 }),
        ("white", NodeKind::CharDevice { major: 0, minor: 0 }),
        ("blk", NodeKind::BlockDevice { major: 259, minor: 70_000 }),
        ("fifo", NodeKind::Fifo),
        ("sock", NodeKind::Socket),
    ] {
        w.create(root, name.as_bytes(), kind, attributes, Vec::new()).unwrap();
    }
    let many = w.create(root, b"many", NodeKind::Directory, attributes, Vec::new()).unwrap();
    for i in 0..files {
        let name = format!("a-file-with-a-name-of-common-length-{i}");
        w.create(many, name.as_bytes(), NodeKind::File, attributes, Vec::new()).unwrap();
    }
    let gone = w.create(root, b"gone", NodeKind::Directory, attributes, Vec::new()).unwrap();
    w.create(gone, b"inside", NodeKind::File, attributes, Vec::new()).unwrap();
    w.unlink(root, b"gone").unwrap();
    w.finish().unwrap();
    disk
}

#[test]
fn images_of_our_writer_pass_and_read_well() {
    for block_size in [BlockSize::B1024, BlockSize::B2048, BlockSize::B4096] {
        for inline_data in [true, false] {
            let disk = written(block_size, inline_data, 3000);
            let report = check(&disk, CheckLimits::default())
                .unwrap_or_else(|e| panic!("{block_size:?} {inline_data}: {e}"));
            assert_eq!(report.directories, 3, "{block_size:?} {inline_data}");
            let fs = Ext4::open(&disk).unwrap();
            let root = fs.inode(fs.root()).unwrap();
            let open =
                |dir: &crate::Inode, name: &[u8]| fs.inode(fs.lookup(dir, name).unwrap().unwrap()).unwrap();
            let dir = open(&root, b"dir");
            for (name, size) in
                [("empty", 0u64), ("tiny", 20), ("small", 300), ("block", 4096), ("large", 300_000)]
            {
                let file = open(&dir, name.as_bytes());
                let mut bytes = vec![0; size as usize + 10];
                assert_eq!(fs.read_file_at(&file, 0, &mut bytes).unwrap() as u64, size);
                assert!(bytes[..size as usize].iter().all(|b| *b == b'x'), "{name}");
            }
            assert_eq!(fs.xattrs(&open(&dir, b"large")).unwrap()[0].value, vec![9; 20_000]);
            assert_eq!(fs.xattrs(&open(&dir, b"tiny")).unwrap().len(), 2);
            assert_eq!(fs.symlink_target(&open(&root, b"long")).unwrap(), [b'l'; 900]);
            assert_eq!(open(&root, b"blk").rdev, (259, 70_000));
            assert_eq!(fs.data_map(&open(&root, b"again")).unwrap().len(), 1200);
            assert_eq!(fs.read_dir(&open(&root, b"many")).unwrap().len(), 3000);
        }
    }
}
