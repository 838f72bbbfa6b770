//! What the names of a layer tar mean: the table of `diff::apply`, line by line.

use crate::{
    build::Tar,
    kernel::acl,
    layer::{apply_ok, options, report, try_apply},
    tree::{Node, Tree},
};
use ext4_image::{
    Timestamp, Xattr,
    writer::{Attributes, NodeKind},
};
use layer_codec::{
    DiffError, IdMaps, IdRange,
    apply::{ApplyLimits, ApplyOptions, LowerLayers, LowerNode, NoLowers},
};

/// A tree in short: name, kind, and what matters of it.
fn short(tree: &Tree) -> Vec<String> {
    tree.iter()
        .filter(|(name, node)| !name.is_empty() || !node.xattrs.is_empty())
        .map(|(name, node)| {
            let kind = match node.mode & 0o170_000 {
                0o040_000 => "/".to_owned(),
                0o120_000 => format!(" -> {}", String::from_utf8_lossy(&node.content)),
                0o020_000 if node.device == (0, 0) => " whiteout".to_owned(),
                0o020_000 => format!(" c{}:{}", node.device.0, node.device.1),
                0o060_000 => format!(" b{}:{}", node.device.0, node.device.1),
                0o010_000 => " fifo".to_owned(),
                _ => format!(" {}", String::from_utf8_lossy(&node.content)),
            };
            let opaque = if is_opaque(node) { " opaque" } else { "" };
            let same = node.same_as.as_ref().map(|n| format!(" = {n}")).unwrap_or_default();
            format!("{name}{kind}{opaque}{same}")
        })
        .collect()
}

fn is_opaque(node: &Node) -> bool {
    node.xattrs.get("trusted.overlay.opaque").is_some_and(|v| v == b"y")
}

#[test]
fn trees() {
    let t = Tar::new;
    let cases: Vec<(&str, Tar, &[&str], u64)> = vec![
        ("empty layer", t(), &[], 0),
        ("plain", t().dir("a", 0o755).file("a/f", b"12345"), &["a/", "a/f 12345"], 5),
        (
            "absolute and dotted names",
            t().file("/a//b/./c", b"1").file("./a/d/../e", b"2"),
            &["a/", "a/b/", "a/b/c 1", "a/e 2"],
            2,
        ),
        (
            "duplicates: the last wins",
            t().file("a", b"first").file("a", b"2").symlink("a", "x").file("a", b"last!!"),
            &["a last!!"],
            6,
        ),
        ("a file replaces a folder", t().dir("a", 0o755).file("a/b", b"123").file("a", b"f"), &["a f"], 1),
        (
            "a folder replaces a file",
            t().file("a", b"f").dir("a", 0o755).file("a/b", b"123"),
            &["a/", "a/b 123"],
            3,
        ),
        (
            "a folder replaces a symlink",
            t().symlink("a", "b").dir("a", 0o755).file("a/c", b"1"),
            &["a/", "a/c 1"],
            1,
        ),
        ("folders merge", t().dir("a", 0o700).file("a/b", b"1").dir("a", 0o755), &["a/", "a/b 1"], 1),
        (
            "devices and pipes",
            t().device("c", b'3', 5, 1).device("b", b'4', 8, 300).device("p", b'6', 0, 0),
            &["b b8:300", "c c5:1", "p fifo"],
            0,
        ),
        (
            "whiteouts",
            t().file("a/.wh.f", b"").file(".wh.g", b"ignored"),
            &["a/", "a/f whiteout", "g whiteout"],
            0,
        ),
        ("a whiteout as device", t().device("f", b'3', 0, 0), &["f whiteout"], 0),
        ("a whiteout twice", t().file(".wh.f", b"").device("f", b'3', 0, 0), &["f whiteout"], 0),
        ("a whiteout after the entry", t().file("f", b"123").file(".wh.f", b""), &["f whiteout"], 0),
        ("a whiteout after a folder", t().file("d/f", b"123").file(".wh.d", b""), &["d whiteout"], 0),
        ("an entry after the whiteout", t().file(".wh.f", b"").file("f", b"123"), &["f 123"], 3),
        (
            "a folder after the whiteout",
            t().file(".wh.d", b"").dir("d", 0o755).file("d/f", b"1"),
            &["d/ opaque", "d/f 1"],
            1,
        ),
        (
            "an implied folder after the whiteout",
            t().file(".wh.d", b"").file("d/f", b"1"),
            &["d/ opaque", "d/f 1"],
            1,
        ),
        (
            "opaque before",
            t().file("d/.wh..wh..opq", b"").dir("d", 0o755).file("d/f", b"1"),
            &["d/ opaque", "d/f 1"],
            1,
        ),
        (
            "opaque after",
            t().dir("d", 0o755).file("d/f", b"1").file("d/.wh..wh..opq", b""),
            &["d/ opaque", "d/f 1"],
            1,
        ),
        ("opaque twice", t().file("d/.wh..wh..opq", b"").file("d/.wh..wh..opq", b""), &["d/ opaque"], 0),
        ("opaque root", t().file(".wh..wh..opq", b"").file("f", b"1"), &["/ opaque", "f 1"], 1),
        (
            "aufs metadata",
            t().file(".wh..wh.aufs", b"xx")
                .dir(".wh..wh.orph", 0o700)
                .file("d/.wh..wh.orph/f", b"xx")
                .file("f", b"1"),
            &["f 1"],
            1,
        ),
        (
            "aufs links",
            t().dir(".wh..wh.plnk", 0o700)
                .file(".wh..wh.plnk/12.34", b"abc")
                .file(".wh..wh.plnk/unused", b"abcdef")
                .link("a", ".wh..wh.plnk/12.34")
                .link("b", "/.wh..wh.plnk/12.34"),
            &["a abc", "b abc = a"],
            3,
        ),
        (
            "hard links",
            t().file("a", b"123").link("b", "a").link("d/c", "/b"),
            &["a 123", "b 123 = a", "d/", "d/c 123 = a"],
            3,
        ),
        (
            "a hard link before its target",
            t().link("a", "z").link("b", "a").file("z", b"123"),
            &["a 123", "b 123 = a", "z 123 = a"],
            3,
        ),
        (
            "hard links against their order",
            t().link("a", "b").link("b", "c").link("c", "z").file("z", b"1"),
            &["a 1", "b 1 = a", "c 1 = a", "z 1 = a"],
            1,
        ),
        (
            "a hard link to a symlink",
            t().symlink("s", "nowhere").link("l", "s"),
            &["l -> nowhere", "s -> nowhere = l"],
            0,
        ),
        (
            "a hard link through a symlinked folder",
            t().dir("d", 0o755).file("d/f", b"1").symlink("s", "d").link("l", "s/f"),
            &["d/", "d/f 1", "l 1 = d/f", "s -> d"],
            1,
        ),
        ("a hard link to itself", t().file("a", b"1").link("a", "a"), &["a 1"], 1),
        (
            "a hard link replaces the folder of its target",
            t().file("d/f", b"1").link("d", "d/f"),
            &["d 1"],
            1,
        ),
        ("a waiting link is replaced", t().link("a", "nothing").file("a", b"12"), &["a 12"], 2),
        ("a waiting link is hidden", t().link("a", "nothing").file(".wh.a", b""), &["a whiteout"], 0),
        ("a waiting link's folder goes", t().link("d/a", "nothing").file("d", b"1"), &["d 1"], 1),
        (
            "the target of a link goes, its data stay",
            t().file("a", b"123").link("b", "a").file("a", b"x"),
            &["a x", "b 123"],
            4,
        ),
        (
            "a symlinked parent",
            t().dir("usr/bin", 0o755).symlink("bin", "usr/bin").file("bin/sh", b"1"),
            &["bin -> usr/bin", "usr/", "usr/bin/", "usr/bin/sh 1"],
            1,
        ),
        (
            "a symlinked parent to nowhere",
            t().symlink("bin", "/usr/bin").file("bin/sh", b"1"),
            &["bin -> /usr/bin", "usr/", "usr/bin/", "usr/bin/sh 1"],
            1,
        ),
        (
            "a symlink that would leave the root",
            t().symlink("d/up", "../../../../etc").file("d/up/passwd", b"1"),
            &["d/", "d/up -> ../../../../etc", "etc/", "etc/passwd 1"],
            1,
        ),
        (
            "symlinks over symlinks",
            t().symlink("a", "b/c").symlink("b", "d").file("a/f", b"1"),
            &["a -> b/c", "b -> d", "d/", "d/c/", "d/c/f 1"],
            1,
        ),
        (
            "an opaque folder through a symlink",
            t().dir("d", 0o755).symlink("s", "d").file("s/.wh..wh..opq", b""),
            &["d/ opaque", "s -> d"],
            0,
        ),
    ];
    for (what, tar, want, size) in cases {
        let applied = apply_ok(&tar.end());
        assert_eq!(short(&applied.tree()), want, "{what}");
        // A symlink counts as long as its target is, whatever its names.
        let links: usize = want
            .iter()
            .filter(|line| !line.contains(" = "))
            .filter_map(|line| line.split_once(" -> "))
            .map(|(_, to)| to.len())
            .sum();
        assert_eq!(applied.summary.diff_size, size + links as u64, "{what}");
    }
}

#[test]
fn attributes() {
    let long_ago = b"-1000000000.25";
    let far = b"4294967297.000000001";
    let tar = Tar::new()
        .file("implied/f", b"1")
        .pax(&[("mtime", far), ("uid", b"3000000"), ("gid", b"4000000000")])
        .file("far", b"1")
        .pax(&[("mtime", long_ago)])
        .dir("./", 0o1750)
        .pax(&[("mtime", long_ago)])
        .file("old", b"")
        .dir("later/sub", 0o755)
        .dir("later", 0o2700)
        .file(".wh.gone", b"")
        .end();
    let tree = apply_ok(&tar).tree();
    assert_eq!(
        (tree[""].mode, tree[""].owner, tree[""].mtime),
        (0o041_750, (1000, 100), (-1_000_000_001, 750_000_000))
    );
    assert_eq!(
        (tree["implied"].mode, tree["implied"].owner, tree["implied"].mtime),
        (0o040_755, (0, 0), (0, 0))
    );
    assert_eq!((tree["far"].owner, tree["far"].mtime), ((3_000_000, 4_000_000_000), (4_294_967_297, 1)));
    assert_eq!(tree["old"].mtime, (-1_000_000_001, 750_000_000));
    assert_eq!((tree["later"].mode, tree["later"].owner), (0o042_700, (1000, 100)));
    assert_eq!(tree["gone"].mode, 0o020_000);
}

#[test]
fn xattrs() {
    let binary = b"\0\n\xff=";
    let tar = Tar::new()
        .pax(&[
            ("SCHILY.xattr.user.b", binary),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ])
        .dir("d", 0o755)
        .file("d/.wh..wh..opq", b"")
        .pax(&[("SCHILY.xattr.user.c", b"new")])
        .dir("d", 0o755)
        .pax(&[("SCHILY.xattr.trusted.overlay.metacopy", b""), ("SCHILY.xattr.trusted.mine", b"1")])
        .file("f", b"1")
        .end();
    let tree = apply_ok(&tar).tree();
    let show =
        |name: &str| tree[name].xattrs.iter().map(|(k, v)| (k.as_str(), v.clone())).collect::<Vec<_>>();
    // Of a folder that comes twice the attributes of both are there.
    assert_eq!(
        show("d"),
        [("trusted.overlay.opaque", b"y".to_vec()), ("user.b", binary.to_vec()), ("user.c", b"new".to_vec())]
    );
    assert_eq!(show("f"), [("trusted.mine", b"1".to_vec())]);
    let only = Tar::new()
        .pax(&[("SCHILY.xattr.user.b", binary), ("SCHILY.xattr.trusted.overlay.opaque", b"y")])
        .dir("d", 0o755)
        .end();
    let tree = apply_ok(&only).tree();
    assert_eq!(tree["d"].xattrs.iter().collect::<Vec<_>>(), [(&"user.b".to_owned(), &binary.to_vec())]);
}

#[test]
fn owners_outside_of_the_engines_map_are_refused_with_entry_id_and_range() {
    let map = vec![IdRange { container_id: 0, host_id: 100_000, size: 2000 }];
    let mapped = ApplyOptions { id_maps: IdMaps { uids: map.clone(), gids: map }, ..options() };
    // The host's id of the containers' root is root, by moby's rule.
    let tar = Tar::new()
        .file("d/f", b"1")
        .pax(&[("uid", b"100000"), ("gid", b"100000")])
        .file("root", b"1")
        .pax(&[("SCHILY.xattr.system.posix_acl_access", &acl(5, 1999))])
        .file("named", b"1")
        .end();
    let tree = try_apply(&tar, &mut NoLowers, &mapped).unwrap().tree();
    assert_eq!(
        (tree["d/f"].owner, tree["d"].owner, tree["root"].owner),
        ((1000, 100), (0, 0), (0, 0)),
        "the container's ids are stored"
    );
    let capability = [&0x0300_0000u32.to_le_bytes()[..], &[0; 16], &5000u32.to_le_bytes()].concat();
    let minus_one = u32::MAX.to_string();
    let cases: [(&str, &[u8], &str); 6] = [
        ("uid", b"5000", "owner 5000 "),
        ("gid", b"2000", "group 2000 "),
        ("uid", b"100001", "owner 100001 "),
        ("uid", minus_one.as_bytes(), "owner 4294967295 "),
        ("SCHILY.xattr.system.posix_acl_default", &acl(5000, 5), "user 5000 "),
        ("SCHILY.xattr.security.capability", &capability, "user 5000 "),
    ];
    for (key, value, text) in cases {
        for tar in [
            Tar::new().pax(&[(key, value)]).dir("entry", 0o755).end(),
            Tar::new().dir("x", 0o755).pax(&[(key, value)]).dir("entry", 0o755).end(),
        ] {
            let error = try_apply(&tar, &mut NoLowers, &mapped).err().expect("an id outside of the map");
            let error = report(&error);
            assert!(
                [text, "\"entry\"", "(0 to 1999)"].iter().all(|part| error.contains(part)),
                "{key}: {error}"
            );
        }
    }
    let tar = Tar::new().file("f", b"1").pax(&[("uid", b"5000")]).link("entry", "f").end();
    assert!(report(&try_apply(&tar, &mut NoLowers, &mapped).err().unwrap()).contains("\"entry\""));
}

#[test]
fn refused_entries_are_named() {
    let t = Tar::new;
    let limited = ApplyOptions {
        limits: ApplyLimits {
            entries: 3,
            path_bytes: 50,
            depth: 4,
            xattr_bytes: 20,
            trailing_bytes: 100,
            tar_bytes: 1 << 20,
        },
        ..options()
    };
    let deep = ApplyOptions { limits: ApplyLimits { entries: 99, ..limited.limits }, ..options() };
    let loops = (0..50).fold(t(), |t, i| t.symlink(&format!("l{i}"), &format!("l{}", i + 1)));
    let with_tail = |n: usize| Tar([t().end(), vec![1; n]].concat());
    let cases: Vec<(&str, Tar, Option<&ApplyOptions>, &str)> = vec![
        ("escape", t().file("a/../../b", b""), None, "leaves the layer's root"),
        ("link escape", t().link("a", "../b"), None, "leaves the layer's root"),
        ("dangling link", t().link("a", "b"), None, "hard link to \"b\""),
        ("dangling link to a whiteout", t().file(".wh.b", b"").link("a", "b"), None, "hard link to \"b\""),
        ("circle", t().link("a", "b").link("b", "a"), None, "leads back to itself"),
        ("link to a folder", t().dir("d", 0o755).link("a", "d"), None, "directory \"d\""),
        ("later folder", t().link("a", "d").dir("d", 0o755), None, "directory \"d\""),
        ("file as parent", t().file("f", b"").file("f/g", b""), None, "parent is not a directory"),
        ("whiteout as folder", t().file(".wh.a/b", b""), None, "whiteout's name"),
        ("whiteout of nothing", t().file("d/.wh.", b""), None, "whiteout without a name"),
        ("whiteout of ..", t().file("d/.wh...", b""), None, "whiteout without a name"),
        ("root as file", t().file("./", b"").symlink(".", "x"), None, "root of a layer"),
        (
            "endless symlinks",
            t().symlink("a", "b").symlink("b", "a").file("a/f", b""),
            None,
            "too many symlinks",
        ),
        ("many symlinks", loops.file("l0/f", b""), None, "too many symlinks"),
        (
            "entries",
            t().file("1", b"").file("2", b"").file("3", b"").file("4", b""),
            Some(&limited),
            "3 names",
        ),
        ("path length", t().file(&"x/".repeat(30), b""), Some(&limited), "50 bytes of a name"),
        ("depth", t().file("1/2/3/4/5", b""), Some(&limited), "4 path components"),
        (
            "depth by symlinks",
            t().symlink("s", "a/b/c").file("s/d/e/f", b""),
            Some(&deep),
            "4 path components",
        ),
        (
            "xattrs",
            t().pax(&[("SCHILY.xattr.user.b", &[1; 20])]).file("a", b""),
            Some(&limited),
            "20 bytes of xattrs",
        ),
        ("long component", t().pax(&[("path", &[b'x'; 256])]).file("a", b""), None, "xxxx"),
        ("tail", with_tail(101), Some(&limited), "100 bytes behind"),
        ("huge", t().claims("a", 2 << 20), Some(&limited), "bytes of tar"),
        ("bad xattr", t().pax(&[("SCHILY.xattr.user.", b"1")]).file("a", b""), None, "\"user.\" (EINVAL"),
    ];
    for (what, tar, opts, text) in cases {
        let default = options();
        let error = try_apply(&tar.end(), &mut NoLowers, opts.unwrap_or(&default))
            .err()
            .unwrap_or_else(|| panic!("{what} is refused"));
        let message = report(&error);
        assert!(message.contains(text) && message.contains("at byte"), "{what}: {message}");
    }
}

/// One layer below with a file, a symlink and a folder.
struct Below;

const BELOW_DATA: &[u8] = b"data of the layer below";

impl LowerLayers for Below {
    fn lookup(&mut self, path: &[&[u8]]) -> Result<Option<LowerNode>, DiffError> {
        let time = Timestamp { secs: 77, nanos: 5 };
        let attributes =
            Attributes { permissions: 0o4711, uid: 3, gid: 4, mtime: time, atime: None, ctime: None };
        let xattr = |name: &[u8]| Xattr { name: name.to_vec(), value: b"v".to_vec() };
        let (inode, kind, size) = match path {
            [b"etc", b"f" | b"other"] => (12, NodeKind::File, 1 << 20),
            [b"s"] => (13, NodeKind::Symlink { target: b"t".to_vec() }, 0),
            [b"etc"] => (14, NodeKind::Directory, 0),
            _ => return Ok(None),
        };
        let xattrs = vec![xattr(b"user.x"), xattr(b"trusted.overlay.origin")];
        let xattrs = if inode == 12 { xattrs } else { Vec::new() };
        Ok(Some(LowerNode {
            layer: 0,
            inode,
            kind,
            attributes,
            xattrs,
            size,
            data: vec![(500_000, BELOW_DATA.len() as u64)],
        }))
    }

    fn read(&mut self, _: &LowerNode, offset: u64, buf: &mut [u8]) -> Result<usize, DiffError> {
        let rest = &BELOW_DATA[(offset - 500_000) as usize..];
        // Short reads are legal.
        let n = rest.len().min(buf.len()).min(5);
        buf[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }
}

#[test]
fn links_to_layers_below() {
    let tar = Tar::new()
        .link("a", "etc/f")
        .link("b", "/etc/other")
        .link("c", "s")
        .file("d", b"1")
        .link("etc/f", "etc/f")
        .end();
    let applied = try_apply(&tar, &mut Below, &options()).unwrap();
    let tree = applied.tree();
    let mut content = vec![0; 1 << 20];
    content[500_000..500_000 + BELOW_DATA.len()].copy_from_slice(BELOW_DATA);
    let a = &tree["a"];
    assert!(a.content == content);
    // What the link's header says holds, as after chown, chmod and utimes.
    assert_eq!((a.mode, a.owner, a.mtime), (0o100_644, (1000, 100), (0o14_000_000_000, 0)));
    assert_eq!(a.xattrs.keys().collect::<Vec<_>>(), ["user.x"]);
    // The targets are copied up with their folders, and links and targets are one file: as through a mounted overlay.
    for name in ["b", "etc/f", "etc/other"] {
        assert_eq!(tree[name].same_as.as_deref(), Some("a"), "{name}");
    }
    assert_eq!((tree["c"].content.as_slice(), tree["s"].same_as.as_deref()), (&b"t"[..], Some("c")));
    let tar = Tar::new().link("a", "etc/f").end();
    let tree = try_apply(&tar, &mut Below, &options()).unwrap().tree();
    assert_eq!((tree["etc"].mode, tree["etc"].owner, tree["etc"].mtime), (0o044_711, (3, 4), (77, 5)));
    assert_eq!(tree["etc/f"].same_as.as_deref(), Some("a"));
    let (a, links) = (&tree["a"], tree.values().filter(|n| n.same_as.is_some()).count());
    assert_eq!((a.xattrs.keys().map(String::as_str).collect::<Vec<_>>(), links), (vec!["user.x"], 1));
    // The symlink to one letter, too.
    assert_eq!(applied.summary.diff_size, (1 << 20) + 1 + 1);

    for (tar, text) in [
        (Tar::new().link("a", "etc"), "directory \"etc\""),
        (Tar::new().file("etc/.wh.f", b"").link("a", "etc/f"), "neither in this layer"),
        (Tar::new().file("etc/.wh..wh..opq", b"").link("a", "etc/f"), "neither in this layer"),
        (Tar::new().file(".wh.etc", b"").link("a", "etc/f"), "neither in this layer"),
        (Tar::new().link("a", "etc/nothing"), "neither in this layer"),
    ] {
        let error = try_apply(&tar.end(), &mut Below, &options()).err().expect("the link is refused");
        assert!(report(&error).contains(text), "{error}");
    }
}
