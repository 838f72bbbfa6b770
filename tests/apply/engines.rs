//! The same tree as the engines' own overlay drivers make: moby's `archive.Unpack` and containerd's `archive.Apply`, built
//! from the distribution's packages and run on a mounted ext4.
//!
//! Where both refuse a tar we may take it; where both make the same tree, so must we.

use crate::{
    build::Tar,
    kernel::acl,
    layer::{Blank, options, report, run, try_apply},
    tree::{Node, Tree, snapshot},
};
use layer_codec::apply::NoLowers;
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};
use tempfile::TempDir;

/// Builds the program that unpacks; once for all tests.
pub(crate) fn oracle() -> &'static Path {
    static BUILT: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, program) = BUILT.get_or_init(|| {
        let dir = TempDir::with_prefix("oracle").expect("a folder can be made");
        let program = dir.path().join("oracle");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/apply/oracle/main.go");
        run(Command::new("go")
            .args(["build", "-o"])
            .arg(&program)
            .arg(source)
            .current_dir(dir.path())
            .env("GO111MODULE", "off")
            .env("GOPATH", "/usr/share/gocode")
            .env("GOCACHE", dir.path().join("cache")));
        let _ = fs::remove_dir_all(dir.path().join("cache"));
        (dir, program)
    });
    program
}

/// The tree that an engine makes, or what it says.
fn unpack(engine: &str, tar: &[u8], folder: &Path) -> Result<Tree, String> {
    fs::create_dir(folder).expect("a folder can be made");
    let mut child = Command::new(oracle())
        .arg(engine)
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the oracle runs");
    // It may stop reading at an error.
    let _ = child.stdin.take().expect("a pipe").write_all(tar);
    let output = child.wait_with_output().expect("the oracle ends");
    if output.status.success() {
        return Ok(settled(snapshot(folder)));
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// Without what the tools leave to chance: times of folders that no entry describes, whiteouts, and the root, which
/// neither engine sets.
pub(crate) fn settled(mut tree: Tree) -> Tree {
    /// Where the tars here set their times.
    const GIVEN: i64 = 0o14_000_000_000;
    tree.remove("");
    for node in tree.values_mut() {
        let whiteout = node.mode & 0o170_000 == 0o020_000 && node.device == (0, 0);
        if whiteout {
            *node = Node { owner: (0, 0), mode: 0o020_000, ..node.clone() };
        }
        if whiteout || node.mtime.0 != GIVEN {
            node.mtime = (0, 0);
        }
    }
    tree
}

fn ours(tar: &[u8]) -> Result<Tree, String> {
    try_apply(tar, &mut NoLowers, &options()).map(|applied| settled(applied.tree())).map_err(|e| report(&e))
}

/// Differences of two trees, for people.
pub(crate) fn differences(got: &Tree, want: &Tree) -> String {
    let names: std::collections::BTreeSet<_> = got.keys().chain(want.keys()).collect();
    let differing = names.into_iter().filter(|n| got.get(*n) != want.get(*n));
    let shown: Vec<_> =
        differing.map(|n| format!("{n:?}\n   ours {:?}\n  theirs {:?}\n", got.get(n), want.get(n))).collect();
    shown.concat()
}

const CAPABILITY: &[u8] = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

#[test]
fn trees_are_those_of_moby_and_containerd() {
    let t = Tar::new;
    // containerd makes the folders of the name that a global header tells; it has none here.
    let smuggled: &[(&str, &[u8])] = &[("path", b"ld.so.preload"), ("size", b"512")];
    let sharp = t().node("f", b'0', 0o600, "", b"1").node("l", b'1', 0o4755, "f", b"");
    let user: &[(&str, &[u8])] = &[("uid", b"7"), ("gid", b"8"), ("SCHILY.xattr.user.link", b"2")];
    let with_acl: &[(&str, &[u8])] = &[("SCHILY.xattr.system.posix_acl_access", &acl(5, 6))];
    let cases: Vec<(&str, Tar)> = vec![
        ("a link's mode holds for its file", sharp),
        (
            "a link's owner and xattrs hold for its file",
            t().pax(&[("SCHILY.xattr.user.file", b"1"), ("SCHILY.xattr.user.link", b"1")])
                .file("f", b"1")
                .pax(user)
                .link("l", "f"),
        ),
        (
            "a link's chown takes capabilities away",
            t().pax(&[("SCHILY.xattr.security.capability", CAPABILITY)]).file("f", b"1").link("l", "f"),
        ),
        (
            "a link's header gives them back",
            t().pax(&[("SCHILY.xattr.security.capability", CAPABILITY)])
                .file("f", b"1")
                .pax(&[("SCHILY.xattr.security.capability", CAPABILITY)])
                .link("l", "f"),
        ),
        ("a link's chmod and an ACL", t().pax(with_acl).file("f", b"1").node("l", b'1', 0o700, "f", b"")),
        ("a link to a pipe", t().node("p", b'6', 0o600, "", b"").node("l", b'1', 0o666, "p", b"")),
        ("a link to a device", t().device("d", b'3', 1, 5).pax(user).link("l", "d")),
        (
            "three names, three headers",
            t().file("f", b"1").node("k", b'1', 0o755, "f", b"").pax(user).node("l", b'1', 0o111, "k", b""),
        ),
        (
            "a folder twice",
            t().pax(&[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.user.b", b"1")])
                .dir("d", 0o755)
                .file("d/f", b"1")
                .pax(&[("SCHILY.xattr.user.b", b"2"), ("SCHILY.xattr.user.c", b"2"), ("uid", b"5")])
                .dir("d", 0o700),
        ),
        ("a folder twice, with an ACL first", t().pax(with_acl).dir("d", 0o755).dir("d", 0o700)),
        (
            "a folder twice, whose second ACL says no more than its mode",
            t().pax(with_acl)
                .dir("d", 0o755)
                .pax(&[("SCHILY.xattr.system.posix_acl_access", b"\x02\0\0\0")])
                .dir("d", 0o750),
        ),
        ("a file twice", t().pax(&[("SCHILY.xattr.user.a", b"1")]).file("f", b"first").file("f", b"2")),
        ("a file in place of a folder", t().dir("d", 0o755).file("d/f", b"1").file("d", b"2")),
        ("a folder in place of a file", t().file("d", b"2").dir("d", 0o755).file("d/f", b"1")),
        (
            "a global header with a path",
            t().extended(b'g', smuggled).file("harmless", b"1").file("other", b"2"),
        ),
        (
            "a global header with xattrs, ids and times",
            t().extended(b'g', &[("SCHILY.xattr.user.a", b"1"), ("uid", b"0"), ("mtime", b"7")])
                .file("f", b"1"),
        ),
        (
            "a local header, then a global one",
            t().pax(&[("path", b"local")]).extended(b'g', &[("comment", b"c")]).file("header", b"1"),
        ),
        ("a file with the name of a folder", t().node("dir/", b'0', 0o644, "", b"data").file("b", b"2")),
        ("an old folder", t().node("dir/", 0, 0o755, "", b"").file("dir/b", b"2")),
        ("whiteouts", t().dir("d", 0o755).file("d/.wh.f", b"").file(".wh.g", b"")),
        ("an opaque folder", t().dir("d", 0o755).file("d/.wh..wh..opq", b"").file("d/f", b"1")),
        ("foreign name spaces", {
            let records: &[(&str, &[u8])] = &[
                ("SCHILY.xattr.com.apple.provenance", b"\x01"),
                ("SCHILY.xattr.btrfs.compression", b"zstd"),
                ("SCHILY.xattr.system.nfs4_acl", b"1"),
                ("SCHILY.xattr.user", b"1"),
                ("SCHILY.xattr.system.posix_acl_access", b"junk"),
                ("SCHILY.xattr.user.kept", b"1"),
                ("LIBARCHIVE.xattr.com.apple.signed", b"AAAA\nAAAA"),
                ("LIBARCHIVE.xattr.user.passed", b"AQ"),
            ];
            t().pax(records).file("f", b"1")
        }),
        ("attributes of users on what is no file", {
            let records: &[(&str, &[u8])] = &[("SCHILY.xattr.user.a", b"1")];
            t().pax(records)
                .symlink("s", "t")
                .pax(records)
                .node("p", b'6', 0o644, "", b"")
                .pax(records)
                .node("c", b'3', 0o644, "", b"")
        }),
        ("an ACL on a symlink", t().pax(with_acl).symlink("s", "t")),
        ("an ACL and a mode", t().pax(with_acl).node("f", b'0', 0o604, "", b"1")),
        ("a percent sign in a name", t().pax(&[("SCHILY.xattr.user.c%3Dd", b"1")]).file("f", b"1")),
        ("owners of minus one", t().pax(&[("uid", b"4294967295"), ("gid", b"4294967295")]).file("f", b"1")),
        ("owners beyond 32 bits", t().pax(&[("uid", b"4294967301"), ("gid", b"-2")]).file("f", b"1")),
        (
            "owners of minus one where something is",
            t().dir("d", 0o2755)
                .pax(&[("uid", b"4294967295"), ("gid", b"4294967295")])
                .dir("d", 0o2755)
                .pax(&[("uid", b"4294967295"), ("gid", b"4294967295")])
                .file("d/f", b"1")
                .pax(&[("uid", b"4294967295"), ("gid", b"4294967295")])
                .link("d/l", "d/f"),
        ),
        ("star's device numbers", {
            t().pax(&[("SCHILY.devmajor", b"8"), ("SCHILY.devminor", b"1")]).node("c", b'3', 0o644, "", b"")
        }),
        ("sparse keywords without a version", {
            t().pax(&[("GNU.sparse.name", b"other"), ("GNU.sparse.realsize", b"9")]).file("f", b"1\n0\n1\n")
        }),
    ];
    let blank = Blank::new();
    let mut wrong = Vec::new();
    for (number, (what, tar)) in cases.into_iter().enumerate() {
        let tar = tar.end();
        let theirs = ["moby", "containerd"]
            .map(|engine| unpack(engine, &tar, &blank.point.join(format!("{engine}-{number}"))));
        let [Ok(moby), Ok(containerd)] = &theirs else {
            wrong.push(format!("{what}: an engine refuses it: {theirs:?}"));
            continue;
        };
        match ours(&tar) {
            Ok(got) if got == *moby && got == *containerd => {}
            Ok(got) => wrong.push(format!(
                "{what}:\nmoby {}containerd {}",
                differences(&got, moby),
                differences(&got, containerd)
            )),
            Err(e) => wrong.push(format!("{what}: refused: {e}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_both_engines_refuse_for_its_attributes_is_refused() {
    let blank = Blank::new();
    let capability: &[(&str, &[u8])] = &[("SCHILY.xattr.security.capability", b"junk")];
    let default_acl: &[(&str, &[u8])] = &[("SCHILY.xattr.system.posix_acl_default", &acl(1, 2))];
    let long = format!("SCHILY.xattr.user.{}", "n".repeat(251));
    let tars = [
        Tar::new().pax(capability).file("f", b"1"),
        Tar::new().pax(default_acl).file("f", b"1"),
        Tar::new().pax(&[(&long, b"1")]).file("f", b"1"),
        Tar::new().pax(&[("SCHILY.xattr.user.", b"1")]).file("f", b"1"),
        Tar::new().pax(&[("SCHILY.xattr.user.a", &vec![1; 65_537])]).file("f", b"1"),
        Tar::new().pax(&[("SCHILY.xattr.system.posix_acl_access", b"\x02\0\0\0junk")]).file("f", b"1"),
        // An extended header of Solaris, which Go takes for an entry of a type that engines refuse.
        Tar::new().extended(b'X', &[("path", b"etc/ld.so.preload")]).file("f", b"1"),
    ];
    for (number, tar) in tars.into_iter().enumerate() {
        let tar = tar.end();
        for engine in ["moby", "containerd"] {
            let theirs = unpack(engine, &tar, &blank.point.join(format!("{engine}-{number}")));
            assert!(theirs.is_err(), "{engine} takes tar {number}");
        }
        let error = ours(&tar).expect_err("it is refused");
        assert!(error.contains("at byte"), "{number}: {error}");
    }
}

/// Numbers that look random and are the same each time.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    pub(crate) fn one<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// A tar of few names, so that entries meet.
fn random(r: &mut Numbers) -> Vec<u8> {
    const FOLDERS: [&str; 2] = ["d", "d/g"];
    const NAMES: [&str; 6] = ["a", "b", "c", "d/e", "d/f", "d/g/h"];
    let mut tar = Tar::new();
    let mut files: Vec<&str> = Vec::new();
    for _ in 0..2 + r.below(9) {
        let mut records: Vec<(String, Vec<u8>)> = Vec::new();
        if r.below(3) == 0 {
            for key in ["uid", "gid"] {
                let id = r.one(&["0", "5", "1000", "4294967295", "-1", "4294967294"]);
                records.push((key.to_owned(), id.as_bytes().to_vec()));
            }
        }
        for _ in 0..r.below(3) {
            let name =
                r.one(&["user.a", "user.b", "trusted.overlay.x", "security.x", "com.apple.x", "btrfs.y"]);
            records.push((format!("SCHILY.xattr.{name}"), vec![b'0' + r.below(4) as u8]));
        }
        if r.below(6) == 0 {
            records.push(("SCHILY.xattr.system.posix_acl_access".to_owned(), acl(r.below(3) as u32, 9)));
        }
        if r.below(6) == 0 {
            records.push(("SCHILY.xattr.security.capability".to_owned(), CAPABILITY.to_vec()));
        }
        // containerd sets none of these, moby all.
        records.retain(|(key, _)| !key.starts_with("SCHILY.xattr.trusted."));
        let records: Vec<(&str, &[u8])> = records.iter().map(|(k, v)| (k.as_str(), v.as_slice())).collect();
        if !records.is_empty() {
            tar = tar.extended(if r.below(12) == 0 { b'g' } else { b'x' }, &records);
        }
        let mode = [0o644, 0o755, 0o4755, 0o2750, 0o1777, 0o000][r.below(6) as usize];
        let name = r.one(&NAMES);
        let target = if files.is_empty() { name } else { r.one(&files) };
        tar = match r.below(10) {
            0..=2 => tar.node(r.one(&FOLDERS), b'5', mode, "", b""),
            3..=5 if target != name => tar.node(name, b'1', mode, target, b""),
            6 => tar.node(name, b'2', 0o777, "nowhere", b""),
            7 => tar.node(name, [b'3', b'6'][r.below(2) as usize], mode, "", b""),
            _ => {
                files.push(name);
                tar.node(name, b'0', mode, "", &vec![b'x'; r.below(200) as usize])
            }
        };
        // A link to a symlink has its time by containerd and not by moby.
        files.retain(|f| *f != name || !matches!(tar.last_flag(), b'2' | b'3' | b'6'));
    }
    tar.end()
}

#[test]
fn random_tars_make_the_engines_trees() {
    /// Tars; each is unpacked three times.
    const TARS: u64 = 150;
    let blank = Blank::new();
    let (mut compared, mut wrong) = (0, Vec::new());
    for seed in 0..TARS {
        let tar = random(&mut Numbers(seed));
        let theirs = ["moby", "containerd"]
            .map(|engine| unpack(engine, &tar, &blank.point.join(format!("{engine}-{seed}"))));
        let [Ok(moby), Ok(containerd)] = &theirs else { continue };
        if moby != containerd {
            continue;
        }
        compared += 1;
        match ours(&tar) {
            Ok(got) if got == *moby => {}
            Ok(got) => wrong.push(format!("seed {seed}:\n{}", differences(&got, moby))),
            Err(e) => wrong.push(format!("seed {seed}: refused: {e}")),
        }
    }
    assert!(wrong.is_empty(), "{} of {compared}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(compared > TARS / 4, "only {compared} tars to compare");
}
