//! Directories that no entry describes are those that containerd makes: its `archive.Apply`, built from the distribution's
//! packages, unpacks the same tar beside the same layers.

use crate::{
    build::Tar,
    engines::oracle,
    kernel::acl,
    layer::{Applied, Blank, options, report, try_apply},
    tree::{Tree, assert_same, snapshot},
};
use layer_codec::{
    LayerKind, LayerSource,
    apply::{ApplyOptions, LayerChain, LowerUse},
};
use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

/// Unpacks a tar into `folder/upper`, beside the layers `0` to `below - 1` of the folder, the last of which is nearest.
fn unpack(tar: &[u8], folder: &Path, below: usize) {
    let mut child = Command::new(oracle())
        .arg("containerd")
        .arg(folder)
        .args((0..below).rev().map(|n| n.to_string()))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the oracle runs");
    child.stdin.take().expect("a pipe").write_all(tar).expect("the oracle reads");
    let output = child.wait_with_output().expect("the oracle ends");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The tree that containerd makes of the last tar on the others, the nearest last.
fn theirs(tars: &[Vec<u8>]) -> Tree {
    let blank = Blank::new();
    let folder = blank.point.join("layers");
    fs::create_dir(&folder).expect("a folder can be made");
    let upper = folder.join("upper");
    for (n, tar) in tars.iter().enumerate() {
        fs::create_dir(&upper).expect("a folder can be made");
        // The base layer is unpacked by the first form.
        if n == 0 {
            unpack(tar, &upper, 0);
        } else {
            unpack(tar, &folder, n);
        }
        if n + 1 < tars.len() {
            fs::rename(&upper, folder.join(n.to_string())).expect("a folder can be renamed");
        }
    }
    settled(snapshot(&upper))
}

fn ours(tars: &[Vec<u8>]) -> Tree {
    let options = ApplyOptions { lowers: LowerUse::LinksAndDirectories, ..options() };
    let mut applied: Vec<Applied> = Vec::new();
    for tar in tars {
        let mut images = applied.iter().rev().map(|layer| layer.image().expect("an image"));
        let mut chain = LayerChain::new(applied.len(), || {
            Ok(LayerSource::new(images.next().expect("no more layers than there are"), LayerKind::Applied))
        });
        let layer = try_apply(tar, &mut chain, &options).unwrap_or_else(|e| panic!("{}", report(&e)));
        applied.push(layer);
    }
    settled(applied.last().expect("a layer").tree())
}

/// Without what containerd leaves to chance, times of directories and of whiteouts, and without the root, which it does not
/// set.
fn settled(mut tree: Tree) -> Tree {
    tree.remove("");
    for node in tree.values_mut() {
        let kind = node.mode & 0o170_000;
        if kind == 0o040_000 {
            node.mtime = (0, 0);
        } else if kind == 0o020_000 && node.device == (0, 0) {
            (node.mode, node.owner, node.mtime) = (kind, (0, 0), (0, 0));
        }
    }
    tree
}

#[test]
fn implied_directories_are_those_that_containerd_makes() {
    let t = Tar::new;
    // A default ACL would be inherited there by all that is unpacked into the directory, and is not here: `docs/tar-rules.md`.
    let colored = || {
        t().pax(&[
            ("uid", b"3000000"),
            ("gid", b"5"),
            ("SCHILY.xattr.user.a", b"1"),
            ("SCHILY.xattr.security.selinux", b"system_u:object_r:etc_t:s0\0"),
            ("SCHILY.xattr.system.posix_acl_access", &acl(7, 8)),
        ])
        .dir("a", 0o2750)
        .dir("a/b", 0o1777)
        .dir("a/b/c", 0o4711)
    };
    let cases: Vec<(&str, Vec<Tar>)> = vec![
        ("no layers", vec![t().file("a/b/f", b"1")]),
        ("owner, mode and attributes", vec![colored(), t().file("a/b/c/d/f", b"1")]),
        ("only the first is implied", vec![colored(), t().dir("a/b", 0o700).file("a/b/f", b"1")]),
        (
            "described later",
            vec![t().dir("a", 0o711).dir("a/b", 0o701), t().file("a/b/f", b"1").dir("a", 0o700)],
        ),
        ("implied by a whiteout", vec![colored(), t().file("a/b/.wh.c", b"")]),
        ("implied by a link", vec![colored(), t().file("f", b"1").link("a/b/l", "f")]),
        (
            "the nearest of several",
            vec![colored(), t().dir("a", 0o711), t().file("other", b""), t().file("a/b/c/f", b"1")],
        ),
        ("implied on implied", vec![colored(), t().file("a/b/f", b"1"), t().file("a/b/c/f", b"1")]),
        ("replaced by a file in between", vec![colored(), t().file("a", b"1"), t().file("a/f", b"1")]),
        ("a whiteout in between", vec![colored(), t().file(".wh.a", b""), t().file("a/f", b"1")]),
        ("an opaque marker of its own", vec![colored(), t().file("a/.wh..wh..opq", b"").file("a/f", b"1")]),
        (
            "a symlink below",
            vec![
                t().dir("usr", 0o711).dir("usr/lib", 0o701).dir("usr/lib/x", 0o700).symlink("lib", "usr/lib"),
                t().file("lib/x/f", b"1"),
            ],
        ),
        (
            "symlinks over symlinks below",
            vec![
                t().dir("d", 0o711).symlink("d/s", "../../../d").symlink("a", "/d/s"),
                t().file("a/f", b"1"),
            ],
        ),
        (
            "a symlink below to what its layer does not have",
            vec![t().dir("a", 0o711), t().file(".wh.a", b"").symlink("b", "a"), t().file("b/f", b"1")],
        ),
        (
            "a symlink in between to what its layer does not have",
            vec![t().dir("a", 0o711), t().symlink("a", "gone"), t().file("a/f", b"1")],
        ),
        (
            "a symlink of its own",
            vec![
                t().dir("usr", 0o711).dir("usr/lib", 0o701),
                t().symlink("lib", "usr/lib").file("lib/f", b"1"),
            ],
        ),
        ("the root", vec![t().dir("./", 0o700), t().file("f", b"1")]),
    ];
    for (what, tars) in cases {
        let tars: Vec<Vec<u8>> = tars.into_iter().map(Tar::end).collect();
        assert_same(what, &ours(&tars), &theirs(&tars));
    }
}
