//! Images judged by foreign oracles: `e2fsck -fn` and the kernel's own mount.

use super::*;
use crate::testing::{Mount, fsck};
use disk_io::{FaultDisk, MemDisk};
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

fn image() -> tempfile::NamedTempFile {
    tempfile::NamedTempFile::new().unwrap()
}

fn at(secs: i64, nanos: u32) -> Timestamp {
    Timestamp { secs, nanos }
}

pub(super) fn attributes(permissions: u16) -> Attributes {
    Attributes {
        permissions,
        uid: 70_000,
        gid: 5,
        mtime: at(1_500_000_000, 123_456_789),
        atime: None,
        ctime: None,
    }
}

pub(super) fn add_file<W: WriteAt>(w: &mut ImageWriter<W>, dir: NodeId, name: &[u8], data: &[u8]) -> NodeId {
    let node = w.create(dir, name, NodeKind::File, attributes(0o644), vec![]).unwrap();
    w.begin_file(node, data.len() as u64).unwrap();
    for (i, chunk) in data.chunks(100_001).enumerate() {
        w.write_data(i as u64 * 100_001, chunk, &mut |_| ()).unwrap();
    }
    w.end_file().unwrap();
    node
}

pub(super) fn bytes(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 251) as u8 ^ seed).collect()
}

fn xattr(name: &str, value: &[u8]) -> Xattr {
    Xattr { name: name.into(), value: value.to_vec() }
}

/// `cap_net_raw+ep`: the kernel checks the form of this attribute when it is read.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

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
                xattr("security.capability", &CAPABILITY),
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
        let [one, other] = ["linked", "dir/other"].map(|name| m.join(name).metadata().unwrap());
        assert_eq!((one.ino(), one.nlink()), (other.ino(), 2));
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

#[test]
fn names_that_collide_in_the_hash() {
    // Names of 255 bytes fill a leaf of 1 KiB by threes, so that colliding names often fall into two leaves.
    let name = |i: u32| format!("{i:08x}{}", "n".repeat(247));
    let mut hashes: Vec<(u32, u32)> = (0..3_000_000)
        .map(|i| (super::super::layout::hash::half_md4(name(i).as_bytes(), &HASH_SEED).0, i))
        .collect();
    hashes.sort_unstable();
    let mut names: Vec<String> = hashes
        .chunk_by(|a, b| a.0 == b.0)
        .filter(|group| group.len() > 1)
        .flatten()
        .map(|&(_, i)| name(i))
        .collect();
    assert!(names.len() > 2_000, "{}", names.len());
    names.sort();
    for options in profiles().filter(|o| o.inline_data) {
        let file = image();
        let mut w = ImageWriter::new(file.as_file(), options).unwrap();
        let root = w.root();
        for n in &names {
            w.create(root, n.as_bytes(), NodeKind::Fifo, attributes(0o644), vec![]).unwrap();
        }
        w.finish().unwrap();
        fsck(file.path());
        assert_names(Mount::new(file.path(), "ro").path(), &names);
    }
}

#[test]
fn three_levels_need_large_dir() {
    let file = image();
    let mut w = ImageWriter::new(file.as_file(), WriterOptions::default()).unwrap();
    let root = w.root();
    let only = w.create(root, &[b'x'; 255], NodeKind::Fifo, attributes(0o644), vec![]).unwrap();
    let names: Vec<String> = (0..60_000).map(|i| format!("{i:08}{}", "n".repeat(247))).collect();
    for n in &names {
        w.link(root, n.as_bytes(), only).unwrap();
    }
    w.unlink(root, &[b'x'; 255]).unwrap();
    w.finish().unwrap();
    fsck(file.path());
    let out = Command::new("dumpe2fs").arg("-h").arg(file.path()).output().unwrap();
    assert!(String::from_utf8_lossy(&out.stdout).contains("large_dir"));
    let mount = Mount::new(file.path(), "ro");
    assert_names(mount.path(), &names);
    assert_eq!(mount.path().join(&names[0]).metadata().unwrap().nlink(), 60_000);
}

#[test]
fn more_folders_than_links_can_count() {
    let file = image();
    let mut w = ImageWriter::new(file.as_file(), WriterOptions::default()).unwrap();
    let root = w.root();
    let parent = w.create(root, b"p", NodeKind::Directory, attributes(0o755), vec![]).unwrap();
    for i in 0..65_010 {
        w.create(parent, format!("{i}").as_bytes(), NodeKind::Directory, attributes(0o755), vec![]).unwrap();
    }
    let file_node = w.create(root, b"f", NodeKind::File, attributes(0o644), vec![]).unwrap();
    for i in 1..65_000 {
        w.link(root, format!("l{i}").as_bytes(), file_node).unwrap();
    }
    assert!(matches!(w.link(root, b"one more", file_node), Err(Ext4Error::Unsupported { .. })));
    assert!(matches!(w.link(root, b"dir", parent), Err(Ext4Error::Usage { .. })));
    w.finish().unwrap();
    fsck(file.path());
    let mount = Mount::new(file.path(), "ro");
    assert_eq!(mount.path().join("p").metadata().unwrap().nlink(), 1);
    assert_eq!(mount.path().join("f").metadata().unwrap().nlink(), 65_000);
}

/// A small tree with all that takes space: data, trees of extents, folders, attributes, dropped files.
fn busy<W: WriteAt>(out: W, options: WriterOptions) -> Result<ImageSummary> {
    let mut w = ImageWriter::new(out, options)?;
    let root = w.root();
    let bs = u64::from(options.block_size.bytes());
    for d in 0..3 {
        let dir =
            w.create(root, format!("d{d}").as_bytes(), NodeKind::Directory, attributes(0o755), vec![])?;
        for f in 0..150 {
            let set = if f % 50 == 0 { vec![xattr("user.big", &bytes(5000, f as u8))] } else { vec![] };
            let n =
                w.create(dir, format!("some-file-{f}").as_bytes(), NodeKind::File, attributes(0o644), set)?;
            w.begin_file(n, 40 * bs)?;
            for i in 0..f % 9 {
                w.write_data(i * 4 * bs, &bytes(bs as usize + 9, i as u8), &mut |_| ())?;
            }
            w.end_file()?;
        }
        for f in (0..150).step_by(3) {
            w.unlink(dir, format!("some-file-{f}").as_bytes())?;
        }
    }
    w.unlink(root, b"d1")?;
    w.finish()
}

#[test]
fn dropped_files_leave_free_space_and_the_same_calls_the_same_bytes() {
    let mut uuids = Vec::new();
    for options in profiles() {
        let file = image();
        let summary = busy(file.as_file(), options).unwrap();
        fsck(file.path());
        assert!(summary.blocks_used < summary.blocks);
        let again = MemDisk::new();
        assert_eq!(busy(&again, options).unwrap(), summary);
        assert!(fs::read(file.path()).unwrap() == again.to_vec());
        assert_eq!((summary.uuid[6] >> 4, summary.uuid[8] >> 6), (8, 2));
        uuids.push(summary.uuid);
        let mount = Mount::new(file.path(), "ro");
        assert_eq!(fs::read_dir(mount.path()).unwrap().count(), 2);
        assert_eq!(fs::read_dir(mount.path().join("d2")).unwrap().count(), 100);
    }
    uuids.sort_unstable();
    uuids.dedup();
    assert_eq!(uuids.len(), 6);
}

#[test]
fn placed_bytes_are_where_they_are_said_to_be() {
    for options in profiles() {
        let disk = MemDisk::new();
        let mut w = ImageWriter::new(&disk, options).unwrap();
        let root = w.root();
        let mut all = Vec::new();
        for len in [100, 3000, 20_000_000] {
            let n = w
                .create(root, format!("{len}").as_bytes(), NodeKind::File, attributes(0o644), vec![])
                .unwrap();
            let data = bytes(len, 9);
            w.begin_file(n, len as u64 + 5000).unwrap();
            let mut at = 0;
            for (offset, chunk) in [(0, &data[..len / 3]), (len / 3 + 5000, &data[len / 3..])] {
                w.write_data(offset as u64, chunk, &mut |p| {
                    let Placed::At { image_offset, len } = p else { panic!("{p:?}") };
                    all.push((image_offset, data[at..at + len as usize].to_vec()));
                    at += len as usize;
                })
                .unwrap();
            }
            assert_eq!(at, len);
            w.end_file().unwrap();
        }
        w.finish().unwrap();
        let image = disk.to_vec();
        for (at, expected) in all {
            assert!(image[at as usize..at as usize + expected.len()] == expected);
        }
    }
}

#[test]
fn a_full_disk_is_an_error_at_every_byte() {
    let options = WriterOptions::default();
    let whole = busy(MemDisk::new(), options).unwrap().image_bytes;
    for budget in (0..whole).step_by(whole as usize / 150) {
        match busy(FaultDisk::full_after(MemDisk::new(), budget), options) {
            Err(Ext4Error::Io { .. }) => {}
            Ok(s) => assert!(budget > s.image_bytes / 2, "success with {budget} bytes"),
            Err(e) => panic!("{e}"),
        }
    }
    for max_image_bytes in (0..whole).step_by(whole as usize / 150) {
        let result = busy(MemDisk::new(), WriterOptions { max_image_bytes, ..options });
        assert!(matches!(result, Err(Ext4Error::Full { .. })), "{max_image_bytes} of {whole}: {result:?}");
    }
    assert!(busy(MemDisk::new(), WriterOptions { max_image_bytes: whole, ..options }).is_ok());
}

#[test]
fn misuse_is_an_error() {
    let mut w = ImageWriter::new(MemDisk::new(), WriterOptions::default()).unwrap();
    let root = w.root();
    let f = add_file(&mut w, root, b"f", b"x");
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256], b"f"] {
        assert!(matches!(
            w.create(root, name, NodeKind::Fifo, attributes(0), vec![]),
            Err(Ext4Error::Usage { .. })
        ));
    }
    assert!(w.create(f, b"below a file", NodeKind::Fifo, attributes(0), vec![]).is_err());
    assert!(w.unlink(root, b"none").is_err() && w.end_file().is_err());
    assert!(w.write_data(0, b"x", &mut |_| ()).is_err() && w.begin_file(root, 1).is_err());
    assert!(matches!(w.begin_file(f, 1 << 50), Err(Ext4Error::FileSize { .. })));
    let kinds = [
        NodeKind::CharDevice { major: 5000, minor: 0 },
        NodeKind::Symlink { target: vec![b'x'; 1024] },
        NodeKind::Symlink { target: vec![] },
    ];
    for kind in kinds {
        assert!(w.create(root, b"n", kind, attributes(0), vec![]).is_err());
    }
    let sets = [
        vec![xattr("com.apple.x", b"")],
        vec![xattr("system.posix_acl_access", b"bad")],
        vec![xattr("user.big", &[0; 65_537])],
        (0..60).map(|i| xattr(&format!("user.{i}"), b"")).collect(),
    ];
    for set in sets {
        assert!(w.set_xattrs(f, set).is_err());
    }
    assert_eq!(w.lookup(root, b"n"), None);
    w.begin_file(f, 10).unwrap();
    w.write_data(4, b"4567", &mut |_| ()).unwrap();
    assert!(w.write_data(7, b"7", &mut |_| ()).is_err() && w.write_data(8, b"890", &mut |_| ()).is_err());
    assert!(w.write_data(u64::MAX, b"89", &mut |_| ()).is_err());
    assert!(matches!(w.finish(), Err(Ext4Error::Usage { .. })));
}

mod random {
    use super::*;
    use crate::testing::{Mount, fsck};
    use proptest::{collection::vec, prelude::*};
    use std::collections::BTreeMap;

    #[derive(Debug, Clone)]
    enum Step {
        Create(u8, u8, bool, Vec<(u16, u16)>),
        Link(u8, u8, u8),
        Unlink(u8, u8),
        Label(u8, u16),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (any::<u8>(), any::<u8>(), any::<bool>(), vec((0u16..9000, 0u16..9000), 0..4))
                .prop_map(|(d, n, dir, data)| Step::Create(d, n, dir, data)),
            1 => (any::<u8>(), any::<u8>(), any::<u8>()).prop_map(|(d, n, f)| Step::Link(d, n, f)),
            1 => (any::<u8>(), any::<u8>()).prop_map(|(d, n)| Step::Unlink(d, n)),
            1 => (any::<u8>(), 0u16..3000).prop_map(|(n, len)| Step::Label(n, len)),
        ]
    }

    /// Content of a file and its attribute, as the writer was told.
    type Model = BTreeMap<u32, (Option<Vec<u8>>, Vec<u8>)>;

    /// Compares a folder of the model with one of the mount; the writer's own tree gives the names.
    fn compare(w: &BTreeMap<u32, Vec<(Vec<u8>, NodeId)>>, model: &Model, dir: u32, path: &Path) {
        assert_eq!(fs::read_dir(path).unwrap().count(), w[&dir].len());
        for (name, node) in &w[&dir] {
            let path = path.join(std::str::from_utf8(name).unwrap());
            let (data, label) = &model[&node.0];
            assert_eq!(getfattr(&path, "user.label").unwrap_or_default(), *label);
            match data {
                Some(data) => assert!(fs::read(&path).unwrap() == *data, "{}", path.display()),
                None => compare(w, model, node.0, &path),
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]
        #[test]
        fn trees_read_back(steps in vec(step(), 1..120), size in 0usize..3, inline_data: bool) {
            let file = image();
            let options = WriterOptions { block_size: SIZES[size], inline_data, ..Default::default() };
            let mut w = ImageWriter::new(file.as_file(), options).unwrap();
            let mut model: Model = BTreeMap::from([(0, (None, vec![]))]);
            let mut nodes = vec![w.root()];
            let name = |n: u8| format!("{}-{n}", "name".repeat(usize::from(n % 60)));
            for step in steps {
                let dirs: Vec<NodeId> = nodes.iter().copied().filter(|n| model[&n.0].0.is_none()).collect();
                let pick = |list: &[NodeId], i: u8| list[usize::from(i) % list.len()];
                match step {
                    Step::Create(d, n, true, _) => {
                        let made = w.create(pick(&dirs, d), name(n).as_bytes(), NodeKind::Directory, attributes(0o755), vec![]);
                        if let Ok(id) = made {
                            model.insert(id.0, (None, vec![]));
                            nodes.push(id);
                        }
                    }
                    Step::Create(d, n, false, pieces) => {
                        let made = w.create(pick(&dirs, d), name(n).as_bytes(), NodeKind::File, attributes(0o644), vec![]);
                        let Ok(id) = made else { continue };
                        let mut data = Vec::new();
                        for (gap, len) in &pieces {
                            data.resize(data.len() + usize::from(*gap), 0);
                            data.extend(bytes(usize::from(*len), n));
                        }
                        w.begin_file(id, data.len() as u64).unwrap();
                        let mut at = 0;
                        for (gap, len) in &pieces {
                            at += usize::from(*gap);
                            w.write_data(at as u64, &data[at..at + usize::from(*len)], &mut |_| ()).unwrap();
                            at += usize::from(*len);
                        }
                        w.end_file().unwrap();
                        model.insert(id.0, (Some(data), vec![]));
                        nodes.push(id);
                    }
                    Step::Link(d, n, f) => {
                        let _ = w.link(pick(&dirs, d), name(n).as_bytes(), pick(&nodes, f));
                    }
                    Step::Unlink(d, n) => {
                        if w.unlink(pick(&dirs, d), name(n).as_bytes()).is_ok() {
                            // Only what can still be reached from the root is left.
                            let (mut reached, mut i) = (vec![w.root()], 0);
                            while i < reached.len() {
                                reached.extend(w.children(reached[i]).into_iter().map(|(_, n)| n));
                                i += 1;
                            }
                            nodes.retain(|n| reached.contains(n));
                        }
                    }
                    Step::Label(n, len) => {
                        let node = pick(&nodes, n);
                        let label = bytes(usize::from(len), n);
                        w.set_xattrs(node, vec![xattr("user.label", &label)]).unwrap();
                        model.get_mut(&node.0).unwrap().1 = label;
                    }
                }
            }
            let tree: BTreeMap<u32, Vec<(Vec<u8>, NodeId)>> =
                nodes.iter().map(|&n| (n.0, w.children(n))).collect();
            w.finish().unwrap();
            fsck(file.path());
            compare(&tree, &model, 0, Mount::new(file.path(), "ro").path());
        }
    }
}
