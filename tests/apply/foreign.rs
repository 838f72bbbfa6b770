//! Tars of other programs: GNU tar in all its formats, bsdtar, python's tarfile. What they pack is compared with what
//! the reader says and with what the kernel shows of the image.

use crate::{
    layer::{apply_ok, run},
    tree::{Node, Tree, assert_same, snapshot},
};
use layer_tar::{EntryKind, Event, TarReader};
use rustix::fs::XattrFlags;
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, PermissionsExt, lchown, symlink},
    },
    path::Path,
    process::Command,
};
use tempfile::TempDir;

/// What a format can hold.
#[derive(Clone, Copy)]
struct Can {
    /// Names over 100 bytes, ids over 2^21, times before 1970.
    large: bool,
    nanos: bool,
    xattrs: bool,
}

const V7: Can = Can { large: false, nanos: false, xattrs: false };
const GNU: Can = Can { large: true, ..V7 };
const PAX: Can = Can { large: true, nanos: true, xattrs: true };

fn set_time(path: &Path, secs: i64, nanos: i64) {
    let time = rustix::fs::Timespec { tv_sec: secs, tv_nsec: nanos };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
        .expect("a time can be set");
}

/// A folder with a bit of everything that the format can hold.
fn make_tree(root: &Path, can: Can, sparse: bool) {
    let write = |name: &str, data: &[u8]| {
        let path = root.join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("folders can be made");
        fs::write(&path, data).expect("a file can be written");
        path
    };
    write("etc/empty", b"");
    let script = write("bin/script", b"#!/bin/sh\n");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o4755)).expect("permissions can be set");
    write("bin/block", &[7; 512]);
    write("bin/odd", &(0..100_003u32).map(|i| (i * 31) as u8).collect::<Vec<_>>());
    let owned = write("home/owned", b"x");
    lchown(&owned, Some(1234), Some(5678)).expect("an owner can be set");
    symlink("../bin/script", root.join("etc/link")).expect("a symlink can be made");
    symlink("nowhere", root.join("dangling")).expect("a symlink can be made");
    fs::hard_link(root.join("bin/odd"), root.join("etc/hard")).expect("a link can be made");
    fs::hard_link(root.join("bin/odd"), root.join("zz-hard")).expect("a link can be made");
    write(&format!("deep/{}/file", "d".repeat(60)), b"deep");
    fs::write(root.join(OsStr::from_bytes(b"etc/\xff\xfe name")), b"not utf-8")
        .expect("a file can be written");
    fs::create_dir(root.join("tmp")).expect("a folder can be made");
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))
        .expect("permissions can be set");
    run(Command::new("mkfifo").arg(root.join("pipe")));
    run(Command::new("mknod").arg(root.join("null")).args(["c", "1", "3"]));
    run(Command::new("mknod").arg(root.join("disk")).args(["b", "8", "17"]));
    if can.large {
        let long =
            write(&format!("long/{}/{}/{}", "x".repeat(120), "y".repeat(120), "z".repeat(120)), b"long");
        symlink("t".repeat(300), root.join("long/link")).expect("a symlink can be made");
        fs::hard_link(&long, root.join("long/hard")).expect("a link can be made");
        let big = write("big-ids", b"1");
        lchown(&big, Some(3_000_000), Some(4_000_000_000)).expect("an owner can be set");
        set_time(&write("old", b"1"), -1_000_000_000, 0);
        set_time(&write("future", b"1"), 5_000_000_000, 0);
    }
    if can.nanos {
        set_time(&write("nanos", b"1"), 1_700_000_000, 123_456_789);
        set_time(&write("old-nanos", b"1"), -3, 250_000_000);
    }
    if can.xattrs {
        let path = write("attributes", b"1");
        let set = |name: &str, value: &[u8]| {
            rustix::fs::setxattr(&path, name, value, XattrFlags::empty()).expect("an xattr can be set");
        };
        set("user.binary", b"\0\n\xff=1 \n");
        set("user.text", b"text");
        set("trusted.large", &[0xa5; 2000]);
        // A capability as `setcap cap_net_raw+ep` makes it (VFS_CAP_REVISION_2).
        set("security.capability", &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
    if sparse {
        let file = File::create(root.join("sparse")).expect("a file can be made");
        file.write_all_at(b"start", 0).expect("written");
        // More segments than a GNU header and one extension block hold.
        for i in 1..40u64 {
            file.write_all_at(&[i as u8; 4096], i << 18).expect("written");
        }
        file.set_len((40 << 18) + 12_345).expect("sized");
        let hole = File::create(root.join("hole")).expect("a file can be made");
        hole.set_len(5 << 20).expect("sized");
    }
    if !can.nanos {
        round_times(root);
    }
}

/// Whole seconds only, children first.
fn round_times(path: &Path) {
    let m = fs::symlink_metadata(path).expect("metadata");
    if m.is_dir() {
        for child in fs::read_dir(path).expect("a folder") {
            round_times(&child.expect("an entry").path());
        }
    }
    set_time(path, std::os::unix::fs::MetadataExt::mtime(&m), 0);
}

/// The tree as the reader sees it.
fn read_tree(tar: &[u8]) -> Tree {
    let mut reader = TarReader::new(tar);
    let mut tree = Tree::new();
    let mut links = Vec::new();
    let (mut bytes, mut current) = (Vec::new(), String::new());
    loop {
        match reader.next_event().expect("a foreign tar is read") {
            Event::Raw(raw) => bytes.extend_from_slice(raw),
            Event::Data { offset, bytes: data } => {
                bytes.extend_from_slice(data);
                let node: &mut Node = tree.get_mut(&current).expect("data follow their entry");
                node.content[offset as usize..][..data.len()].copy_from_slice(data);
            }
            Event::Entry(e) => {
                let clean = |path: &[u8]| {
                    let path = path.strip_prefix(b".").unwrap_or(path);
                    path.escape_ascii().to_string().trim_matches('/').to_owned()
                };
                current = clean(&e.path);
                let kind = match e.kind {
                    EntryKind::File => 0o100_000,
                    EntryKind::Directory => 0o040_000,
                    EntryKind::Symlink => 0o120_000,
                    EntryKind::CharDevice => 0o020_000,
                    EntryKind::BlockDevice => 0o060_000,
                    EntryKind::Fifo => 0o010_000,
                    EntryKind::HardLink => {
                        links.push((current.clone(), clean(&e.link)));
                        continue;
                    }
                };
                let node = Node {
                    mode: kind | u32::from(if e.kind == EntryKind::Symlink { 0o777 } else { e.mode }),
                    owner: (e.uid, e.gid),
                    mtime: (e.mtime.secs, i64::from(e.mtime.nanos)),
                    device: (e.major, e.minor),
                    content: if e.kind == EntryKind::Symlink {
                        e.link.clone()
                    } else {
                        vec![0; e.size as usize]
                    },
                    xattrs: e
                        .xattrs
                        .iter()
                        .map(|x| (String::from_utf8_lossy(&x.name).into_owned(), x.value.clone()))
                        .collect(),
                    same_as: None,
                };
                tree.insert(current.clone(), node);
            }
            Event::End => break,
        }
    }
    assert!(bytes == tar, "every byte is reported in order");
    for (name, target) in links {
        let node = tree.get(&target).unwrap_or_else(|| panic!("{target} is there for {name}")).clone();
        tree.insert(name, node);
    }
    tree
}

/// What both sides have: links are equal content, and xattrs that the format drops are dropped.
fn comparable(tree: &Tree, xattrs: bool, nanos: bool) -> Tree {
    tree.iter()
        .map(|(name, node)| {
            let mut node = Node { same_as: None, ..node.clone() };
            if !xattrs {
                node.xattrs = BTreeMap::new();
            }
            if !nanos {
                node.mtime.1 = 0;
            }
            (name.clone(), node)
        })
        .collect()
}

fn check(what: &str, root: &Path, tar: &[u8], can: Can) {
    let original = snapshot(root);
    let want = comparable(&original, can.xattrs, can.nanos);
    let read = comparable(&read_tree(tar), can.xattrs, can.nanos);
    assert_same(&format!("{what}: read"), &read, &want);

    let applied = apply_ok(tar);
    let mounted = applied.tree();
    assert_same(&format!("{what}: applied"), &comparable(&mounted, can.xattrs, can.nanos), &want);
    let links =
        |tree: &Tree| tree.iter().map(|(name, n)| (name.clone(), n.same_as.clone())).collect::<Vec<_>>();
    assert_eq!(links(&mounted), links(&original), "{what}: hard links");
    let mut seen = std::collections::BTreeSet::new();
    let size: usize = original
        .iter()
        .filter(|(_, n)| matches!(n.mode & 0o170_000, 0o100_000 | 0o120_000))
        .filter(|(name, n)| n.same_as.is_none() && seen.insert(*name))
        .map(|(_, n)| n.content.len())
        .sum();
    assert_eq!(applied.summary.diff_size, size as u64, "{what}: size");
    assert!(
        applied.summary.record_bytes * 33 < tar.len() as u64 * 2,
        "{what}: a record of {}",
        applied.summary.record_bytes
    );
}

fn packed(can: Can, sparse: bool, cases: &[(&str, &str, &[&str])]) {
    let dir = TempDir::with_prefix("foreign").expect("a folder");
    let root = dir.path().join("root");
    fs::create_dir(&root).expect("a folder");
    make_tree(&root, can, sparse);
    for (what, program, args) in cases {
        if *program == "bsdtar" && can.nanos {
            // libarchive 3.6 writes 2.75 s before 1970 as -3.25.
            fs::remove_file(root.join("old-nanos")).expect("removed");
        }
        let tar = run(Command::new(program).args(*args).arg("-C").arg(&root).args(["-cf", "-", "."]));
        check(what, &root, &tar, can);
    }
}

#[test]
fn old_formats() {
    let dir = TempDir::with_prefix("foreign").expect("a folder");
    let root = dir.path().join("root");
    fs::create_dir(&root).expect("a folder");
    make_tree(&root, V7, false);
    // v7 and ustar know devices or not, so GNU tar leaves them out of v7.
    let ustar = run(Command::new("tar")
        .args(["--format=ustar", "--numeric-owner", "-C"])
        .arg(&root)
        .args(["-cf", "-", "."]));
    check("GNU tar, ustar", &root, &ustar, V7);
    let bsd =
        run(Command::new("bsdtar").args(["--format", "ustar", "-C"]).arg(&root).args(["-cf", "-", "."]));
    check("bsdtar, ustar", &root, &bsd, V7);
    for special in ["pipe", "null", "disk"] {
        fs::remove_file(root.join(special)).expect("removed");
    }
    round_times(&root);
    let v7 = run(Command::new("tar").args(["--format=v7", "-C"]).arg(&root).args(["-cf", "-", "."]));
    check("GNU tar, v7", &root, &v7, V7);
}

#[test]
fn gnu_formats() {
    packed(
        GNU,
        true,
        &[
            ("oldgnu", "tar", &["--format=oldgnu"]),
            ("gnu", "tar", &["--format=gnu"]),
            ("gnu, sparse", "tar", &["--format=gnu", "--sparse"]),
            ("oldgnu, sparse", "tar", &["--format=oldgnu", "--sparse"]),
        ],
    );
}

#[test]
fn pax_formats() {
    let xattrs = ["--format=posix", "--xattrs", "--xattrs-include=*"];
    let sparse = |version: &'static str| [&xattrs[..], &["--sparse", version]].concat();
    packed(
        PAX,
        true,
        &[
            ("posix", "tar", &xattrs),
            ("posix, sparse 0.0", "tar", &sparse("--sparse-version=0.0")),
            ("posix, sparse 0.1", "tar", &sparse("--sparse-version=0.1")),
            ("posix, sparse 1.0", "tar", &sparse("--sparse-version=1.0")),
            ("bsdtar, pax", "bsdtar", &["--format", "pax", "--xattrs"]),
        ],
    );
}

#[test]
fn python_formats() {
    const PACK: &str = "import sys, tarfile\n\
        t = tarfile.open(fileobj=sys.stdout.buffer, mode='w|', format=getattr(tarfile, sys.argv[2]), encoding='utf-8', errors='surrogateescape')\n\
        t.add(sys.argv[1], arcname='.')\n\
        t.close()\n";
    for (format, can) in [
        ("USTAR_FORMAT", V7),
        ("GNU_FORMAT", GNU),
        ("PAX_FORMAT", Can { xattrs: false, nanos: false, ..PAX }),
    ] {
        let dir = TempDir::with_prefix("foreign").expect("a folder");
        let root = dir.path().join("root");
        fs::create_dir(&root).expect("a folder");
        make_tree(&root, can, false);
        if format == "PAX_FORMAT" {
            // Python writes times as rounded floats and cannot encode such names in PAX.
            fs::remove_file(root.join(OsStr::from_bytes(b"etc/\xff\xfe name"))).expect("removed");
            round_times(&root);
        }
        let tar = run(Command::new("python3").args(["-c", PACK]).arg(&root).arg(format));
        check(&format!("python, {format}"), &root, &tar, can);
    }
}
