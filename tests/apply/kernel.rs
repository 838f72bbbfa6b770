//! The table of `diff::apply::kernel` held against a kernel: the same system calls on a mounted ext4; and everything that
//! an image holds can be changed, moved and deleted in a container.

use crate::{
    build::Tar,
    layer::{Blank, apply_ok, options, overlay, report, try_apply},
};
use ext4_image::{Xattr, writer::NodeKind};
use layer_codec::apply::{
    NoLowers,
    kernel::{self, Ruling},
};
use rustix::{
    fs::{
        AtFlags, CWD, FileType, Gid, Mode, Uid, XattrFlags, chownat, lgetxattr, lsetxattr, makedev, mknodat,
    },
    io::Errno,
};
use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

/// Flags of tar for all kinds of nodes.
const KINDS: [u8; 6] = [b'0', b'2', b'3', b'4', b'5', b'6'];

/// An entry of an ACL as setxattr(2) takes it.
fn acl_entry(tag: u16, permissions: u16, id: u32) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &permissions.to_le_bytes(), &id.to_le_bytes()].concat()
}

fn acl_of(version: u32, entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let entries = entries.iter().flat_map(|(tag, permissions, id)| acl_entry(*tag, *permissions, *id));
    version.to_le_bytes().into_iter().chain(entries).collect()
}

/// An ACL with a named user and a named group.
pub(crate) fn acl(user: u32, group: u32) -> Vec<u8> {
    let none = u32::MAX;
    acl_of(2, &[(1, 6, none), (2, 7, user), (4, 4, none), (8, 1, group), (16, 7, none), (32, 4, none)])
}

/// Names and values that setxattr(2) answers in many ways.
fn attributes() -> Vec<(String, Vec<u8>)> {
    let none = u32::MAX;
    let (user, group_obj, group, mask, other) = (2, 4, 8, 16, 32);
    let owner = (1, 6, none);
    let minimal = acl_of(2, &[owner, (group_obj, 4, none), (other, 4, none)]);
    let acls: Vec<Vec<u8>> = vec![
        acl(5, 6),
        minimal.clone(),
        acl_of(2, &[owner, (group_obj, 4, none), (mask, 5, none), (other, 4, none)]),
        // The unnamed have ids, too, which nobody reads.
        acl_of(2, &[(1, 6, 0), (group_obj, 4, 77), (other, 4, none)]),
        acl_of(
            2,
            &[
                owner,
                (user, 7, 9),
                (user, 6, 9),
                (user, 5, 3),
                (group_obj, 4, none),
                (mask, 7, none),
                (other, 0, none),
            ],
        ),
        Vec::new(),
        acl_of(2, &[]),
        b"junk".to_vec(),
        b"\x02\0\0".to_vec(),
        acl_of(1, &[owner]),
        acl_of(3, &[]),
        acl_of(0, &[owner, (group_obj, 4, none), (other, 4, none)]),
        [minimal.clone(), vec![0]].concat(),
        minimal[..minimal.len() - 3].to_vec(),
        acl_of(2, &[owner]),
        acl_of(2, &[(group_obj, 4, none), owner, (other, 4, none)]),
        acl_of(2, &[owner, owner, (group_obj, 4, none), (other, 4, none)]),
        acl_of(2, &[owner, (user, 7, 5), (group_obj, 4, none), (other, 4, none)]),
        acl_of(2, &[owner, (group_obj, 4, none), (group, 1, 5), (other, 4, none)]),
        acl_of(2, &[owner, (group_obj, 4, none), (user, 7, 5), (mask, 7, none), (other, 4, none)]),
        acl_of(2, &[owner, (user, 7, none), (group_obj, 4, none), (mask, 7, none), (other, 4, none)]),
        acl_of(2, &[owner, (group_obj, 4, none), (group, 7, none), (mask, 7, none), (other, 4, none)]),
        acl_of(2, &[owner, (group_obj, 8, none), (other, 4, none)]),
        acl_of(2, &[owner, (group_obj, 4, none), (other, 0xffff, none)]),
        acl_of(2, &[owner, (group_obj, 4, none), (mask, 7, none), (mask, 7, none), (other, 4, none)]),
        acl_of(2, &[owner, (group_obj, 4, none), (other, 4, none), (other, 4, none)]),
        acl_of(2, &[owner, (group_obj, 4, none), (64, 4, none), (other, 4, none)]),
        acl_of(2, &[owner, (0, 4, none), (other, 4, none)]),
    ];
    let cap = |magic: u32, len: usize| [&magic.to_le_bytes()[..], &vec![1; len - 4]].concat();
    let capabilities: Vec<Vec<u8>> = vec![
        cap(0x0200_0000, 20),
        cap(0x0200_0001, 20),
        cap(0x0300_0001, 24),
        [cap(0x0300_0000, 20), 0u32.to_le_bytes().to_vec()].concat(),
        [cap(0x0300_0000, 20), u32::MAX.to_le_bytes().to_vec()].concat(),
        cap(0x0200_0002, 20),
        cap(0x0300_0000, 20),
        cap(0x0200_0000, 24),
        cap(0x0100_0000, 12),
        cap(0x0400_0000, 24),
        b"junk".to_vec(),
        b"\0".to_vec(),
        Vec::new(),
    ];
    let named = |name: &str, value: &[u8]| (name.to_owned(), value.to_vec());
    let mut all = vec![
        named("user.note", b"1"),
        named("user.empty", b""),
        named("user.big", &vec![7; 65_536]),
        named("user.bigger", &vec![7; 65_537]),
        named("user.", b"1"),
        named("user", b"1"),
        named("userx", b"1"),
        named("User.note", b"1"),
        named("user.user.note", b"1"),
        named("user.a=b", b"1"),
        named("user.\u{e9} \n%3D", b"1"),
        named(&format!("user.{}", "n".repeat(250)), b"1"),
        named(&format!("user.{}", "n".repeat(251)), b"1"),
        named(&format!("trusted.{}", "n".repeat(248)), b"1"),
        named(&format!("com.apple.{}", "n".repeat(250)), b"1"),
        named("trusted.mine", b"1"),
        named("trusted.", b"1"),
        named("trusted", b"1"),
        named("security.mine", b"1"),
        named("security.", b"1"),
        named("security", b"1"),
        named("security.capabilityx", b"junk"),
        named("system.posix_acl_accessx", b"1"),
        named("system.posix_acl", b"1"),
        named("system.richacl", b"1"),
        named("system.nfs4_acl", b"1"),
        named("system.data", b"1"),
        named("system.", b"1"),
        named("system", b"1"),
        named("com.apple.provenance", b"\x01\x02"),
        named("com.apple.ResourceFork", &[0; 100]),
        named("btrfs.compression", b"zstd"),
        named("ceph.dir.layout", b"1"),
        named("lustre.lov", b"1"),
        named("os2.a", b"1"),
        named("afs.a", b"1"),
        named("x", b"1"),
        named(".", b"1"),
    ];
    for name in ["system.posix_acl_access", "system.posix_acl_default"] {
        all.extend(acls.iter().map(|value| named(name, value)));
    }
    all.extend(capabilities.iter().map(|value| named("security.capability", value)));
    all
}

/// Makes a node of a kind; what it is to the writer.
fn make(path: &Path, flag: u8) -> NodeKind {
    let node = |kind| {
        mknodat(CWD, path, kind, Mode::from_raw_mode(0o644), makedev(1, 3)).expect("a node can be made");
    };
    match flag {
        b'0' => {
            fs::write(path, b"x").expect("a file can be made");
            NodeKind::File
        }
        b'2' => {
            symlink("target", path).expect("a symlink can be made");
            NodeKind::Symlink { target: b"target".to_vec() }
        }
        b'3' => {
            node(FileType::CharacterDevice);
            NodeKind::CharDevice { major: 1, minor: 3 }
        }
        b'4' => {
            node(FileType::BlockDevice);
            NodeKind::BlockDevice { major: 1, minor: 3 }
        }
        b'5' => {
            fs::create_dir(path).expect("a folder can be made");
            NodeKind::Directory
        }
        _ => {
            node(FileType::Fifo);
            NodeKind::Fifo
        }
    }
}

fn get(path: &Path, name: &str) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0; 1 << 17];
    lgetxattr(path, name, &mut value).map(|n| value[..n].to_vec())
}

fn errno(error: Errno) -> &'static str {
    match error {
        Errno::OPNOTSUPP => "EOPNOTSUPP",
        Errno::PERM => "EPERM",
        Errno::INVAL => "EINVAL",
        Errno::RANGE => "ERANGE",
        Errno::TOOBIG => "E2BIG",
        Errno::ACCESS => "EACCES",
        other => panic!("setxattr answers {other}"),
    }
}

#[test]
fn the_table_of_attributes_says_what_setxattr_answers() {
    let blank = Blank::new();
    let mut wrong = Vec::new();
    for flag in KINDS {
        for (number, (name, value)) in attributes().iter().enumerate() {
            let path = blank.point.join(format!("{}-{number}", flag as char));
            let kind = make(&path, flag);
            let ruling = kernel::xattr(&kind, name.as_bytes(), value);
            let answer = lsetxattr(&path, name.as_str(), value, XattrFlags::empty()).map_err(errno);
            let agrees = match (ruling, answer) {
                (Ruling::Keep, Ok(())) => get(&path, name).is_ok(),
                // What can be set and not be read keeps everybody from changing the file.
                (Ruling::Drop(why), Ok(())) => {
                    get(&path, name) == Err(Errno::INVAL) && why.starts_with("EINVAL")
                }
                (Ruling::Remove(_), Ok(())) => get(&path, name) == Err(Errno::NODATA),
                (Ruling::Drop(why), Err(e)) => matches!(e, "EOPNOTSUPP" | "EPERM") && why.starts_with(e),
                (Ruling::Refuse(errno, _), Err(e)) => errno.name() == e,
                _ => false,
            };
            if !agrees {
                wrong.push(format!(
                    "{} {name:?} {} bytes: {ruling:?}, linux {answer:?}",
                    flag as char,
                    value.len()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn chmod_and_chown_leave_of_attributes_what_the_kernel_leaves() {
    let blank = Blank::new();
    let capability = [&0x0200_0001u32.to_le_bytes()[..], &[1; 16]].concat();
    let none = u32::MAX;
    let with_mask = acl_of(2, &[(1, 7, none), (4, 6, none), (16, 5, none), (32, 4, none)]);
    let sets: [&[(&str, Vec<u8>)]; 3] = [
        &[("system.posix_acl_access", acl(5, 6)), ("security.capability", capability), ("user.x", vec![1])],
        &[("system.posix_acl_access", with_mask)],
        &[("user.x", vec![1])],
    ];
    for flag in [b'0', b'5', b'6'] {
        for (number, set) in sets.iter().enumerate() {
            for mode in [0o000, 0o604, 0o070, 0o4755, 0o777] {
                let path = blank.point.join(format!("{}-{number}-{mode:o}", flag as char));
                let kind = make(&path, flag);
                let mut expected = Vec::new();
                for (name, value) in set.iter().filter(|(name, _)| flag != b'6' || !name.starts_with("user."))
                {
                    lsetxattr(&path, *name, value, XattrFlags::empty()).expect("an attribute can be set");
                    expected.push(Xattr { name: name.as_bytes().to_vec(), value: value.clone() });
                }
                // As at a second header of the same file.
                chownat(CWD, &path, Some(Uid::from_raw(7)), Some(Gid::ROOT), AtFlags::SYMLINK_NOFOLLOW)
                    .expect("chown");
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
                kernel::chown(&kind, &mut expected);
                kernel::chmod(&kind, mode as u16, &mut expected);
                for (name, _) in *set {
                    let known = expected.iter().find(|x| x.name == name.as_bytes()).map(|x| x.value.clone());
                    assert_eq!(get(&path, name).ok(), known, "{} {mode:o} {name}", path.display());
                }
            }
        }
    }
}

/// An entry with one attribute, in a folder of its own.
fn entry(tar: Tar, name: &str, flag: u8, records: &[(&str, &[u8])]) -> Tar {
    let data: &[u8] = if flag == b'0' { b"data" } else { b"" };
    tar.pax(records).node(name, flag, 0o755, if flag == b'2' { "target" } else { "" }, data)
}

/// Does to a path of a container what containers do; the first that fails.
fn work(path: &Path) -> Result<(), String> {
    let told = |what: &str, e: &dyn std::fmt::Display| format!("{what}: {e}");
    let before = fs::symlink_metadata(path).map_err(|e| told("lstat", &e))?;
    let kind = before.file_type();
    chownat(CWD, path, Some(Uid::from_raw(12)), Some(Gid::from_raw(13)), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| told("chown", &e))?;
    if !kind.is_symlink() {
        fs::set_permissions(path, fs::Permissions::from_mode(0o2751)).map_err(|e| told("chmod", &e))?;
    }
    let moved = path.with_extension("moved");
    if kind.is_dir() {
        fs::write(path.join("inner"), b"new").map_err(|e| told("create", &e))?;
        fs::remove_file(path.join("inner")).map_err(|e| told("unlink inside", &e))?;
        fs::remove_dir(path).map_err(|e| told("rmdir", &e))?;
        return Ok(());
    }
    if kind.is_file() {
        fs::OpenOptions::new()
            .append(true)
            .open(path)
            .and_then(|mut f| std::io::Write::write_all(&mut f, b"more"))
            .map_err(|e| told("append", &e))?;
    }
    let other = path.with_extension("other");
    fs::hard_link(path, &other).map_err(|e| told("link", &e))?;
    fs::rename(path, &moved).map_err(|e| told("rename", &e))?;
    let after = fs::symlink_metadata(&moved).map_err(|e| told("lstat", &e))?;
    if (after.uid(), after.gid()) != (12, 13) {
        return Err(format!("owner {}:{} after chown", after.uid(), after.gid()));
    }
    fs::remove_file(&moved).and_then(|()| fs::remove_file(&other)).map_err(|e| told("unlink", &e))
}

#[test]
fn everything_that_is_taken_can_be_changed_moved_and_deleted_in_a_container() {
    let mut tar = Tar::new();
    let mut names: Vec<PathBuf> = Vec::new();
    let (mut taken, mut refused) = (0, 0);
    for flag in KINDS {
        for (number, (name, value)) in attributes().iter().enumerate() {
            // A name with `=` has only one way into a tar.
            let key = if name.contains('=') {
                format!("LIBARCHIVE.xattr.{}", name.replace('=', "%3D"))
            } else {
                format!("SCHILY.xattr.{name}")
            };
            let value: &[u8] = if name.contains('=') { b"AQ" } else { value };
            let path = format!("{}-{number}", flag as char);
            let alone = entry(Tar::new(), &path, flag, &[(&key, value)]).end();
            match try_apply(&alone, &mut NoLowers, &options()) {
                Ok(_) => {
                    taken += 1;
                    tar = entry(tar, &path, flag, &[(&key, value)]);
                    names.push(path.into());
                }
                Err(e) => {
                    refused += 1;
                    let message = report(&e);
                    assert!(
                        message.contains(&format!("{path:?}")) && message.contains("at byte"),
                        "{path} {name:?}: {message}"
                    );
                }
            }
        }
        // Ids that chown takes for "leave as it is", and the largest that are ids.
        for id in ["4294967295", "4294967294", "-1", "4294967296", "-2"] {
            let path = format!("{}-id{id}", flag as char);
            tar = entry(tar, &path, flag, &[("uid", id.as_bytes()), ("gid", id.as_bytes())]);
            names.push(path.into());
        }
    }
    assert!(taken > 150 && refused > 100, "{taken} taken, {refused} refused");
    let applied = apply_ok(&tar.end());
    let (lower, upper) = (applied.mount(), Blank::new());
    let point = upper.point.join("merged");
    let _overlay = overlay(&lower.1, &upper.point, &point);
    let failed: Vec<String> = names
        .iter()
        .filter_map(|name| work(&point.join(name)).err().map(|e| format!("{}: {e}", name.display())))
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn an_owner_of_minus_one_is_roots_in_a_new_node_and_the_nodes_own_in_one_that_is_there() {
    let none: &[(&str, &[u8])] = &[("uid", b"4294967295"), ("gid", b"-1")];
    let tar = Tar::new()
        .pax(none)
        .file("new", b"1")
        .pax(none)
        .dir("folder", 0o755)
        .dir("twice", 0o755)
        .pax(none)
        .dir("twice", 0o700)
        .file("linked", b"1")
        .pax(none)
        .link("name", "linked")
        .dir("group", 0o2755)
        .pax(none)
        .file("group/inherits", b"1")
        .end();
    let tree = apply_ok(&tar).tree();
    let owner = |name: &str| tree[name].owner;
    assert_eq!([owner("new"), owner("folder")], [(0, 0); 2]);
    assert_eq!([owner("twice"), owner("linked")], [(1000, 100); 2]);
    assert_eq!((tree["twice"].mode, owner("group/inherits")), (0o040_700, (0, 100)));
}

#[test]
fn what_mknod_symlink_link_and_open_refuse_is_refused_with_the_entrys_name() {
    let long = "x".repeat(256);
    let target = "t".repeat(4096);
    let links = (0..65_000).fold(Tar::new().file("many", b""), |t, i| t.link(&format!("l{i}"), "many"));
    let cases: Vec<(&str, Tar, &str)> = vec![
        ("ENAMETOOLONG", Tar::new().pax(&[("path", long.as_bytes())]).file("a", b""), "xxx"),
        ("ENAMETOOLONG", Tar::new().pax(&[("path", long.as_bytes())]).dir("a", 0o755), "xxx"),
        ("ENOENT", Tar::new().symlink("empty", ""), "empty"),
        ("ENAMETOOLONG", Tar::new().pax(&[("linkpath", target.as_bytes())]).symlink("far", ""), "far"),
        ("EINVAL", Tar::new().device("dev", b'3', 4096, 1), "dev"),
        ("EINVAL", Tar::new().device("dev", b'4', 1, 1 << 20), "dev"),
        ("EMLINK", links, "l64999"),
        ("EPERM", Tar::new().dir("d", 0o755).link("l", "d"), "l"),
    ];
    for (errno, tar, entry) in cases {
        let error = try_apply(&tar.end(), &mut NoLowers, &options()).err().expect(errno);
        let message = report(&error);
        assert!(message.contains(entry) && message.contains("at byte"), "{errno}: {message}");
    }
    // Bits of a mode that no file has are not taken, as chmod(2) does not take them.
    let tree = apply_ok(&Tar::new().node("odd", b'0', 0o7_177_755, "", b"").end()).tree();
    assert_eq!(tree["odd"].mode, 0o107_755);
}
