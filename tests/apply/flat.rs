//! The flat disk of several layers against containerd's: each layer unpacked by its code on those below, and the stack
//! mounted as an overlay by the kernel.

use crate::{
    build::Tar,
    engines::{Numbers, differences, oracle, settled},
    layer::{Blank, Mounted, report, run},
    tree::{Tree, snapshot},
};
use ext4_image::{
    testing::{fsck, loop_mount},
    writer::{ImageSize, JournalSize, Writable},
};
use layer_codec::flat::{FlatOptions, flatten};
use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::Path,
    process::{Command, Stdio},
};

/// What containerd's overlayfs shows of these layers, the base first; what it says if it refuses one.
fn theirs(tars: &[Vec<u8>], folder: &Path) -> Result<Tree, String> {
    // The base layer has a parent, too: one that holds nothing.
    fs::create_dir_all(folder.join("nothing")).expect("a directory can be made");
    let mut below: Vec<String> = Vec::new();
    for (number, tar) in tars.iter().enumerate() {
        let upper = folder.join("upper");
        fs::create_dir(&upper).expect("a directory can be made");
        let mut child = Command::new(oracle())
            .args(["containerd".as_ref(), folder])
            .args(if below.is_empty() { vec!["nothing".to_owned()] } else { below.clone() })
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the oracle runs");
        let _ = child.stdin.take().expect("a pipe").write_all(tar);
        let done = child.wait_with_output().expect("the oracle ends");
        if !done.status.success() {
            return Err(String::from_utf8_lossy(&done.stderr).trim().to_owned());
        }
        let name = format!("l{number}");
        fs::rename(&upper, folder.join(&name)).expect("a directory can be renamed");
        below.insert(0, name);
    }
    if let [only] = &below[..] {
        return Ok(settled(snapshot(&folder.join(only))));
    }
    let point = folder.join("merged");
    fs::create_dir(&point).expect("a directory can be made");
    let lowers: Vec<String> = below.iter().map(|l| folder.join(l).display().to_string()).collect();
    run(Command::new("mount")
        .args(["-t", "overlay", "overlay", "-o", &format!("ro,lowerdir={}", lowers.join(":"))])
        .arg(&point));
    let _mounted = Mounted::at(&point);
    Ok(settled(snapshot(&point)))
}

/// Ours, with theirs for times that are left to chance: those of directories into which containerd unpacks something later,
/// or that no entry describes.
fn without_chance(mut ours: Tree, theirs: &Tree) -> Tree {
    for (name, node) in &mut ours {
        if let Some(known) = theirs.get(name)
            && node.mode & 0o170_000 == 0o040_000
            && (known.mtime == (0, 0) || node.mtime == (0, 0))
        {
            node.mtime = known.mtime;
        }
    }
    ours
}

/// The flat disk as the kernel shows it.
fn ours(tars: &[Vec<u8>], writable: bool, dir: &Path) -> Result<Tree, String> {
    let path = dir.join("flat");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
    let file = file.expect("a file can be made");
    let mut open = |n: usize| -> io::Result<Box<dyn Read>> { Ok(Box::new(io::Cursor::new(tars[n].clone()))) };
    let mut options = FlatOptions::default();
    if writable {
        options.block_size = 4096;
        options.inline_data = false;
        options.writable = Some(Writable { size: ImageSize::Headroom(25), journal: JournalSize::Chosen });
    }
    flatten(tars.len(), &mut open, &file, None, &options, None).map_err(|e| report(&e))?;
    fsck(&path);
    let point = dir.join("point");
    fs::create_dir_all(&point).expect("a directory can be made");
    loop_mount(&path, &point, if writable { "rw" } else { "ro" }, &[]);
    let mounted = Mounted::at(&point);
    let tree = settled(snapshot(&point));
    drop(mounted);
    Ok(tree)
}

#[test]
fn the_flat_disk_is_what_containerds_overlay_shows() {
    let t = Tar::new;
    let cases: Vec<(&str, Vec<Tar>)> = vec![
        (
            "whiteouts",
            vec![
                t().dir("d", 0o711).file("d/a", b"1").file("b", b"2"),
                t().file("d/.wh.a", b"").file(".wh.b", b""),
            ],
        ),
        ("a directory over a file", vec![t().file("a", b"1"), t().dir("a", 0o700).file("a/x", b"2")]),
        ("a file over a directory", vec![t().dir("a", 0o700).file("a/x", b"2"), t().file("a", b"1")]),
        (
            "an opaque directory",
            vec![
                t().dir("a", 0o700).file("a/x", b"2"),
                t().dir("a", 0o755).file("a/.wh..wh..opq", b"").file("a/y", b"3"),
            ],
        ),
        (
            "deleted and there again",
            vec![
                t().dir("a", 0o700).file("a/x", b"2"),
                t().file(".wh.a", b""),
                t().dir("a", 0o750).file("a/z", b"4"),
            ],
        ),
        (
            "a path below a lower layer's symlink",
            vec![t().dir("b", 0o755).symlink("a", "b"), t().dir("a", 0o755).file("a/x", b"1")],
        ),
        (
            "a link to a file that is hidden",
            vec![t().file("b", &[7; 5000]).link("a", "b"), t().file(".wh.b", b"")],
        ),
        (
            "a link whose file is replaced",
            vec![t().file("b", &[7; 5000]).link("a", "b"), t().file("b", b"x")],
        ),
        (
            "directories without an entry",
            vec![t().dir("a", 0o711).dir("a/b", 0o1777), t().file("a/b/c", b"1")],
        ),
        (
            "an opaque marker after the entries",
            vec![
                t().dir("a", 0o755).file("a/x", b"1"),
                t().dir("a", 0o755).file("a/y", b"1").file("a/.wh..wh..opq", b""),
            ],
        ),
        (
            "devices, pipes",
            vec![t().device("c", b'3', 1, 5).node("p", b'6', 0o600, "", b""), t().file("c", b"1")],
        ),
    ];
    let blank = Blank::new();
    let dir = tempfile::tempdir().expect("a directory can be made");
    let mut wrong = Vec::new();
    for (number, (what, tars)) in cases.into_iter().enumerate() {
        let tars: Vec<Vec<u8>> = tars.into_iter().map(Tar::end).collect();
        let want = match theirs(&tars, &blank.point.join(format!("case-{number}"))) {
            Ok(want) => want,
            Err(e) => {
                wrong.push(format!("{what}: containerd refuses it: {e}"));
                continue;
            }
        };
        for writable in [false, true] {
            match ours(&tars, writable, dir.path()).map(|tree| without_chance(tree, &want)) {
                Ok(got) if got == want => {}
                Ok(got) => {
                    wrong.push(format!("{what} (writable: {writable}):\n{}", differences(&got, &want)));
                }
                Err(e) => wrong.push(format!("{what}: refused: {e}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Whether one path is the other, or lies below it.
fn meets(a: &str, b: &str) -> bool {
    let below =
        |a: &str, b: &str| a.strip_prefix(b).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    below(a, b) || below(b, a)
}

/// A layer of few names, so that layers meet. None has a whiteout and something else at one place (see
/// `a_name_and_its_whiteout_in_one_layer`), or a directory without an entry in an opaque one: containerd makes it like those
/// that the marker hides.
fn random(r: &mut Numbers) -> Vec<u8> {
    const FOLDERS: [&str; 3] = ["d", "d/g", "e"];
    const NAMES: [&str; 7] = ["a", "b", "d", "d/e", "d/f", "d/g/h", "e/i"];
    let mut tar = Tar::new();
    let (mut files, mut there, mut gone): (Vec<&str>, Vec<&str>, Vec<&str>) = Default::default();
    for _ in 0..=r.below(7) {
        let mode = [0o644, 0o755, 0o4755, 0o750, 0o1777, 0o000][r.below(6) as usize];
        let (name, folder, kind) = (r.one(&NAMES), r.one(&FOLDERS), r.below(12));
        let path = if matches!(kind, 0..=3 | 7) { folder } else { name };
        if kind == 6 {
            if there.iter().any(|known| meets(known, path)) {
                continue;
            }
            gone.push(path);
        } else {
            if gone.iter().any(|known| meets(known, path)) {
                continue;
            }
            there.push(path);
        }
        tar = match kind {
            0..=3 => tar.node(folder, b'5', mode, "", b""),
            4 if !files.is_empty() => {
                let target = r.one(&files);
                if target == name { tar } else { tar.node(name, b'1', mode, target, b"") }
            }
            5 => tar.node(name, b'2', 0o777, "nowhere", b""),
            6 => {
                let marked = match name.rsplit_once('/') {
                    Some((dir, last)) => format!("{dir}/.wh.{last}"),
                    None => format!(".wh.{name}"),
                };
                tar.file(&marked, b"")
            }
            7 => {
                let marked =
                    tar.node(folder, b'5', mode, "", b"").file(&format!("{folder}/.wh..wh..opq"), b"");
                if folder == "d" { marked.node("d/g", b'5', mode, "", b"") } else { marked }
            }
            _ => {
                files.push(name);
                tar.node(name, b'0', mode, "", &vec![b'x'; r.below(6000) as usize])
            }
        };
    }
    tar.end()
}

/// What containerd refuses, or makes depend on the order of the entries. A whiteout concerns lower layers, and what the layer
/// itself has at the name stays, unless the whiteout comes later: then it is gone, as if it had been deleted again.
#[test]
fn a_name_and_its_whiteout_in_one_layer() {
    let t = Tar::new;
    let lower = || t().dir("a", 0o755).file("a/x", b"1").end();
    let blank = Blank::new();
    let dir = tempfile::tempdir().expect("a directory can be made");
    let names = |tars: &[Vec<u8>]| {
        let tree = ours(tars, false, dir.path()).expect("a disk");
        tree.into_keys().collect::<Vec<_>>()
    };
    let first = [lower(), t().file(".wh.a", b"").dir("a", 0o755).file("a/y", b"2").end()];
    assert_eq!(names(&first), ["a", "a/y"]);
    let theirs_first = theirs(&first, &blank.point.join("first")).expect("containerd takes it");
    assert!(theirs_first.contains_key("a/x"), "containerd loses the whiteout: {:?}", theirs_first.keys());
    let last = [lower(), t().dir("a", 0o755).file("a/y", b"2").file(".wh.a", b"").end()];
    assert!(names(&last).is_empty());
    assert!(theirs(&last, &blank.point.join("last")).is_err(), "containerd refuses it");
}

/// What containerd refuses in any order: the target gets a second name, as through a mounted overlay.
#[test]
fn a_link_into_a_lower_layer() {
    let t = Tar::new;
    let tars = [
        t().dir("d", 0o711).file("d/b", &[7; 9000]).end(),
        t().file("c", b"1").end(),
        t().link("a", "d/b").end(),
    ];
    let blank = Blank::new();
    assert!(theirs(&tars, &blank.point.join("link")).is_err(), "containerd refuses it");
    let dir = tempfile::tempdir().expect("a directory can be made");
    let tree = ours(&tars, false, dir.path()).expect("a disk");
    assert_eq!(tree.keys().collect::<Vec<_>>(), ["a", "c", "d", "d/b"]);
    assert_eq!((&tree["a"].content[..], tree["d/b"].same_as.as_deref()), (&[7; 9000][..], Some("a")));
    assert_eq!(tree["d"].mode, 0o40711);
}

#[test]
fn random_stacks_make_containerds_tree() {
    /// Stacks of two to four layers.
    const STACKS: u64 = 120;
    let blank = Blank::new();
    let dir = tempfile::tempdir().expect("a directory can be made");
    let (mut compared, mut wrong) = (0, Vec::new());
    for seed in 0..STACKS {
        let mut r = Numbers(seed);
        let tars: Vec<Vec<u8>> = (0..2 + r.below(3)).map(|_| random(&mut r)).collect();
        let Ok(want) = theirs(&tars, &blank.point.join(format!("stack-{seed}"))) else { continue };
        compared += 1;
        match ours(&tars, seed % 4 == 0, dir.path()).map(|tree| without_chance(tree, &want)) {
            Ok(got) if got == want => {}
            Ok(got) => wrong.push(format!("seed {seed}:\n{}", differences(&got, &want))),
            Err(e) => wrong.push(format!("seed {seed}: refused: {e}")),
        }
    }
    assert!(wrong.is_empty(), "{} of {compared}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(compared > STACKS / 4, "only {compared} stacks to compare");
}
