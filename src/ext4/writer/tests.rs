//! Images judged by foreign oracles: `e2fsck -fn` and the kernel's own mount.

use super::*;
use crate::io::{FaultDisk, MemDisk};
use std::{
    fs,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
};

const SIZES: [BlockSize; 3] = [BlockSize::B1024, BlockSize::B2048, BlockSize::B4096];

/// Every block size, with and without inline data.
fn profiles() -> impl Iterator<Item = WriterOptions> {
    SIZES.into_iter().flat_map(|block_size| {
        [true, false].map(|inline_data| WriterOptions { block_size, inline_data, ..Default::default() })
    })
}

/// A mounted image; unmounted when dropped.
pub(crate) struct Mount {
    dir: tempfile::TempDir,
}

impl Mount {
    pub(crate) fn new(image: &Path, options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let out =
            Command::new("mount").args(["-t", "ext4", "-o", options]).arg(image).arg(dir.path()).output();
        let out = out.expect("this test needs mount(8)");
        assert!(
            out.status.success(),
            "this test needs root and loop devices; mount said: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        Self { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-d").arg(self.dir.path()).status();
    }
}

/// Panics with e2fsck's own words unless it finds nothing at all.
pub(crate) fn fsck(image: &Path) {
    let out = Command::new("e2fsck").arg("-fn").arg(image).output().expect("this test needs e2fsck");
    assert!(
        out.status.success(),
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}

fn image() -> tempfile::NamedTempFile {
    tempfile::NamedTempFile::new().unwrap()
}

fn at(secs: i64, nanos: u32) -> Timestamp {
    Timestamp { secs, nanos }
}

fn attributes(permissions: u16) -> Attributes {
    Attributes {
        permissions,
        uid: 70_000,
        gid: 5,
        mtime: at(1_500_000_000, 123_456_789),
        atime: None,
        ctime: None,
    }
}

fn add_file<W: WriteAt>(w: &mut ImageWriter<W>, dir: NodeId, name: &[u8], data: &[u8]) -> NodeId {
    let node = w.create(dir, name, NodeKind::File, attributes(0o644), vec![]).unwrap();
    w.begin_file(node, data.len() as u64).unwrap();
    for (i, chunk) in data.chunks(100_001).enumerate() {
        w.write_data(i as u64 * 100_001, chunk, &mut |_| ()).unwrap();
    }
    w.end_file().unwrap();
    node
}

fn bytes(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251) as u8 ^ seed).collect()
}

fn xattr(name: &str, value: &[u8]) -> Xattr {
    Xattr { name: name.into(), value: value.to_vec() }
}

fn getfattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut buf = vec![0u8; 70_000];
    let n = rustix::fs::lgetxattr(path, name, &mut buf).ok()?;
    buf.truncate(n);
    Some(buf)
}

fn acl() -> Vec<u8> {
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, perm, id) in
        [(1u16, 6u16, u32::MAX), (2, 6, 1000), (4, 4, u32::MAX), (0x10, 6, u32::MAX), (0x20, 4, u32::MAX)]
    {
        acl.extend(tag.to_le_bytes());
        acl.extend(perm.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    acl
}

#[test]
fn an_empty_image_is_clean() {
    for options in profiles() {
        let file = image();
        let summary = ImageWriter::new(file.as_file(), options).unwrap().finish().unwrap();
        assert_eq!(file.as_file().metadata().unwrap().len(), summary.image_bytes);
        fsck(file.path());
        let mount = Mount::new(file.path(), "ro");
        assert_eq!(fs::read_dir(mount.path()).unwrap().count(), 0);
    }
}

#[test]
fn every_kind_of_node_reads_back_through_the_kernel() {
    for options in profiles() {
        let file = image();
        let mut w = ImageWriter::new(file.as_file(), options).unwrap();
        let root = w.root();
        w.set_attributes(root, attributes(0o1777));
        let dir = w.create(root, b"dir", NodeKind::Directory, attributes(0o750), vec![]).unwrap();
        let sizes = [0, 1, 59, 60, 61, 136, 137, 200, 392, 393, 1023, 1024, 1025, 5000, 70_000, 9_000_000];
        for (i, len) in sizes.into_iter().enumerate() {
            add_file(&mut w, dir, format!("f{len}").as_bytes(), &bytes(len, i as u8));
        }
        let long = vec![b'x'; 600];
        for (name, target) in
            [(&b"fast"[..], &b"target"[..]), (b"l59", &long[..59]), (b"l60", &long[..60]), (b"l600", &long)]
        {
            let kind = NodeKind::Symlink { target: target.to_vec() };
            w.create(root, name, kind, attributes(0o777), vec![xattr("trusted.t", b"1")]).unwrap();
        }
        let device = attributes(0o600);
        w.create(root, b"null", NodeKind::CharDevice { major: 1, minor: 3 }, device, vec![]).unwrap();
        w.create(root, b"wh", NodeKind::CharDevice { major: 0, minor: 0 }, attributes(0), vec![]).unwrap();
        w.create(root, b"blk", NodeKind::BlockDevice { major: 259, minor: 70_000 }, device, vec![]).unwrap();
        w.create(root, b"fifo", NodeKind::Fifo, device, vec![]).unwrap();
        w.create(root, b"sock", NodeKind::Socket, device, vec![]).unwrap();
        let linked = add_file(&mut w, root, b"linked", b"linked");
        w.link(dir, b"other", linked).unwrap();
        let times = [(-2_147_483_648, 0), (-1, 999_999_999), (2_147_483_648, 1), (15_032_385_535, 5)];
        for (i, (secs, nanos)) in times.into_iter().enumerate() {
            let a = Attributes { mtime: at(secs, nanos), atime: Some(at(secs, 7)), ..attributes(0o600) };
            w.create(root, format!("t{i}").as_bytes(), NodeKind::File, a, vec![]).unwrap();
        }
        let sets = [
            vec![xattr("user.a", b"v")],
            vec![
                xattr("user.empty", b""),
                xattr("security.capability", &[1; 20]),
                xattr("user.b", &[0, 10, 255]),
            ],
            vec![xattr("system.posix_acl_access", &acl()), xattr("trusted.x", &bytes(300, 1))],
            (0..9).map(|i| xattr(&format!("user.n{i}"), &bytes(70, i))).collect(),
            vec![
                xattr("user.big", &bytes(3000, 1)),
                xattr("user.huge", &bytes(65_536, 2)),
                xattr("user.s", b"s"),
            ],
        ];
        for (i, set) in sets.iter().enumerate() {
            let n = w
                .create(root, format!("x{i}").as_bytes(), NodeKind::File, attributes(0o644), set.clone())
                .unwrap();
            w.begin_file(n, 150).unwrap();
            w.write_data(0, &bytes(150, 3), &mut |_| ()).unwrap();
            w.end_file().unwrap();
            w.create(root, format!("d{i}").as_bytes(), NodeKind::Directory, attributes(0o755), set.clone())
                .unwrap();
        }
        w.finish().unwrap();
        fsck(file.path());

        let mount = Mount::new(file.path(), "ro");
        let m = mount.path();
        let top = m.metadata().unwrap();
        assert_eq!((top.mode() & 0o7777, top.uid(), top.gid()), (0o1777, 70_000, 5));
        assert_eq!((top.mtime(), top.mtime_nsec(), top.nlink()), (1_500_000_000, 123_456_789, 8));
        for (i, len) in sizes.into_iter().enumerate() {
            assert!(
                fs::read(m.join(format!("dir/f{len}"))).unwrap() == bytes(len, i as u8),
                "{len} {options:?}"
            );
        }
        assert_eq!(fs::read_dir(m.join("dir")).unwrap().count(), sizes.len() + 1);
        assert_eq!(fs::read_link(m.join("fast")).unwrap(), Path::new("target"));
        for len in [59, 60, 600] {
            let link = m.join(format!("l{len}"));
            assert_eq!(fs::read_link(&link).unwrap().as_os_str().len(), len);
            assert_eq!(getfattr(&link, "trusted.t").unwrap(), b"1");
        }
        let dev = |name: &str| {
            let d = fs::symlink_metadata(m.join(name)).unwrap();
            (d.file_type(), rustix::fs::major(d.rdev()), rustix::fs::minor(d.rdev()))
        };
        assert!(matches!(dev("null"), (t, 1, 3) if t.is_char_device()));
        assert!(matches!(dev("wh"), (t, 0, 0) if t.is_char_device()));
        assert!(matches!(dev("blk"), (t, 259, 70_000) if t.is_block_device()));
        assert!(dev("fifo").0.is_fifo() && dev("sock").0.is_socket());
        let (a, b) = (m.join("linked").metadata().unwrap(), m.join("dir/other").metadata().unwrap());
        assert_eq!((a.ino(), a.nlink()), (b.ino(), 2));
        for (i, (secs, nanos)) in times.into_iter().enumerate() {
            let t = m.join(format!("t{i}")).metadata().unwrap();
            assert_eq!(
                (t.mtime(), t.mtime_nsec(), t.atime(), t.atime_nsec()),
                (secs, i64::from(nanos), secs, 7)
            );
            assert_eq!((t.ctime(), t.ctime_nsec()), (secs, i64::from(nanos)));
        }
        for (i, set) in sets.iter().enumerate() {
            assert!(fs::read(m.join(format!("x{i}"))).unwrap() == bytes(150, 3));
            for kind in ["x", "d"] {
                for x in set {
                    let name = std::str::from_utf8(&x.name).unwrap();
                    let got = getfattr(&m.join(format!("{kind}{i}")), name);
                    assert!(got.as_ref() == Some(&x.value), "{kind}{i} {name} {options:?}");
                }
            }
        }
    }
}

/// All names of a directory by listing, and each by look-up.
fn assert_names(dir: &Path, names: &[String]) {
    let mut listed: Vec<PathBuf> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into()).collect();
    listed.sort();
    let mut expected: Vec<PathBuf> = names.iter().map(PathBuf::from).collect();
    expected.sort();
    assert!(listed == expected, "{} of {}", listed.len(), expected.len());
    for name in names {
        fs::symlink_metadata(dir.join(name)).unwrap();
    }
    assert!(fs::symlink_metadata(dir.join("no such name")).is_err());
}

#[test]
fn large_folders_have_hash_trees() {
    for (options, count) in profiles().zip([100_000, 2_000, 20_000, 20_000, 100_000, 500]) {
        let file = image();
        let mut w = ImageWriter::new(file.as_file(), options).unwrap();
        let root = w.root();
        let dir = w.create(root, b"many", NodeKind::Directory, attributes(0o755), vec![]).unwrap();
        let names: Vec<String> = (0..count).map(|i| format!("file-number-{i}")).collect();
        for n in &names {
            w.create(dir, n.as_bytes(), NodeKind::File, attributes(0o644), vec![]).unwrap();
        }
        for i in (0..count).step_by(7) {
            assert!(w.lookup(dir, names[i].as_bytes()).is_some());
        }
        w.finish().unwrap();
        fsck(file.path());
        let mount = Mount::new(file.path(), "ro");
        assert_names(&mount.path().join("many"), &names);
    }
}

#[test]
fn files_of_many_extents_and_far_ends() {
    for options in profiles().filter(|o| o.inline_data) {
        let file = image();
        let mut w = ImageWriter::new(file.as_file(), options).unwrap();
        let root = w.root();
        let bs = u64::from(options.block_size.bytes());
        let node = w.create(root, b"comb", NodeKind::File, attributes(0o644), vec![]).unwrap();
        let teeth = 110_000u64;
        w.begin_file(node, teeth * 2 * bs).unwrap();
        for i in 0..teeth {
            w.write_data(i * 2 * bs + 3, &i.to_le_bytes(), &mut |_| ()).unwrap();
        }
        w.end_file().unwrap();
        let far = w.create(root, b"far", NodeKind::File, attributes(0o644), vec![]).unwrap();
        let size = 60u64 << 30;
        w.begin_file(far, size).unwrap();
        w.write_data(5, b"start", &mut |_| ()).unwrap();
        w.write_data(size - 3, b"end", &mut |_| ()).unwrap();
        w.end_file().unwrap();
        let hole = w.create(root, b"hole", NodeKind::File, attributes(0o644), vec![]).unwrap();
        w.begin_file(hole, 1 << 40).unwrap();
        w.end_file().unwrap();
        let summary = w.finish().unwrap();
        assert!(summary.image_bytes < (teeth + 20_000) * bs);
        fsck(file.path());
        let mount = Mount::new(file.path(), "ro");
        let comb = fs::File::open(mount.path().join("comb")).unwrap();
        for i in (0..teeth).step_by(101).chain([teeth - 1]) {
            let mut buf = vec![1; 2 * bs as usize];
            comb.read_exact_at(&mut buf, i * 2 * bs).unwrap();
            let mut expected = vec![0; 2 * bs as usize];
            expected[3..11].copy_from_slice(&i.to_le_bytes());
            assert!(buf == expected, "tooth {i}");
        }
        let far = fs::File::open(mount.path().join("far")).unwrap();
        let mut buf = [1; 10];
        far.read_exact_at(&mut buf, 0).unwrap();
        assert_eq!(&buf, b"\0\0\0\0\0start");
        far.read_exact_at(&mut buf, size - 10).unwrap();
        assert_eq!(&buf, b"\0\0\0\0\0\0\0end");
        let data = rustix::fs::seek(&far, rustix::fs::SeekFrom::Data(bs)).unwrap();
        assert_eq!(data, size - bs);
        assert_eq!(mount.path().join("hole").metadata().unwrap().len(), 1 << 40);
    }
}
