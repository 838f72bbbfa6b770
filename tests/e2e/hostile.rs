//! Layers made to do harm, or damaged on their way: each fails cleanly or does nothing, and a good one works after it.

use crate::{
    archive,
    command::Run,
    engine::{Engine, EngineOptions},
    manifest::{Tree, sha256},
    rootfs::{self, random_bytes},
    tarball::{self, Entry, Kind},
};
use std::{fs, os::unix::fs::MetadataExt, path::Path};

/// Longest wait for containerd's next collection of garbage.
const SETTLED: std::time::Duration = std::time::Duration::from_secs(10);

/// Everything below a folder of the host, with what would show a change.
fn snapshot(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("folder").flatten() {
        let (path, meta) = (entry.path(), entry.metadata().expect("metadata"));
        let facts = (meta.mode(), meta.uid(), meta.ino(), meta.nlink(), meta.mtime_nsec());
        let content = if meta.is_file() { sha256(&fs::read(&path).expect("file")) } else { String::new() };
        found.push(format!("{} {facts:?} {content}", path.display()));
        if meta.is_dir() {
            found.extend(snapshot(&path));
        }
    }
    found.sort();
    found
}

/// A folder on the host that nothing may touch, beside the engine's data.
fn canary(engine: &Engine) -> std::path::PathBuf {
    let folder = engine.scratch("canary");
    fs::write(folder.join("passwd"), "the host's own\n").expect("file");
    fs::create_dir_all(folder.join("dir")).expect("folder");
    folder
}

fn load(engine: &Engine, name: &str, tar: Vec<u8>) -> Run {
    let base = tarball::build(&rootfs::small());
    engine.docker_with(&["load"], archive::write(name, &[base, tar]))
}

/// Loads a layer that must be refused; the reason.
fn refused(engine: &Engine, name: &str, tar: Vec<u8>) -> String {
    refusal(engine, name, load(engine, name, tar))
}

/// Why a load failed. An engine with containerd loads what it cannot unpack, and then has an image that does not run.
fn refusal(engine: &Engine, name: &str, run: Run) -> String {
    if !(engine.has_containerd() && run.ok()) {
        return run.expect_failure();
    }
    let text = engine.try_docker(&["run", "--rm", "--network", "none", name, "true"]).expect_failure();
    engine.docker(&["rmi", "-f", name]);
    text
}

/// containerd collects what failed a moment later.
fn settle(engine: &Engine, wanted: usize, count: impl Fn() -> usize) {
    let begun = std::time::Instant::now();
    while engine.has_containerd() && count() != wanted && begun.elapsed() < SETTLED {
        std::thread::sleep(crate::command::TICK);
    }
}

/// A good layer still works, and the store has no trace of the bad one.
fn assert_unharmed(engine: &Engine, base: &Tree, what: &str) {
    let name = format!("good-{what}");
    let layer = [Entry::file("data/good", what)];
    load(engine, &name, tarball::build(&layer)).expect_ok();
    let mut expected = base.clone();
    expected.file("/data/good", 0o644, what).mtime = Some(tarball::TIME);
    expected.assert_same(&Tree::of_image(engine, &name), &format!("a good layer after {what}"));
    engine.docker(&["rmi", &name]);
}

#[test]
fn damaged_layers_are_refused_and_leave_nothing() {
    let (engine, base) = rootfs::engine_with(EngineOptions::default(), &rootfs::small());
    let good = tarball::build(&[
        Entry::file("data/a", random_bytes(1, 100_000)),
        Entry::file("data/b", random_bytes(2, 100_000)),
    ]);
    let mut checksum = good.clone();
    checksum[110] ^= 1;
    let mut second_checksum = good.clone();
    let second = 512 + 100_000_usize.next_multiple_of(512);
    // The second file's PAX header.
    second_checksum[second + 512 + 512] ^= 0x55;
    let mut huge = tarball::members(&[Entry::file("data/huge", "")]);
    let header = huge.len() - 512;
    huge[header + 124..header + 136].copy_from_slice(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff");
    let sum: u64 =
        (0..512).map(|n| if (148..156).contains(&n) { 32 } else { u64::from(huge[header + n]) }).sum();
    huge[header + 148..header + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let cases: [(&str, Vec<u8>); 7] = [
        ("header-checksum", checksum),
        ("later-checksum", second_checksum),
        ("cut-in-data", good[..60_000].to_vec()),
        ("cut-in-extension", good[..520].to_vec()),
        ("cut-in-header", good[..1024 + 300].to_vec()),
        ("exabytes", huge),
        ("noise", random_bytes(3, 64 << 10)),
    ];
    // A control's home is the engine's own business, and another one with containerd.
    let layers = |engine: &Engine| fs::read_dir(engine.home()).map_or(0, Iterator::count);
    // The base comes with the first archive; the second run of each case finds it there.
    assert_unharmed(&engine, &base, "nothing");
    for (name, tar) in cases {
        let before = layers(&engine);
        let failure = refused(&engine, name, tar.clone());
        assert!(!failure.contains("panic"), "{name}: {failure}");
        settle(&engine, before, || layers(&engine));
        assert_eq!(layers(&engine), before, "{name} left a layer: {failure}");
        // The same once more: an earlier failure is not in the way.
        refused(&engine, name, tar);
        assert!(engine.try_docker(&["inspect", name]).expect_failure().contains("No such"));
        assert_unharmed(&engine, &base, name);
    }
    // A digest that does not fit the bytes is the engine's to find; the driver has applied the layer by then.
    let mut archive = archive::write("digest", &[tarball::build(&rootfs::small()), good.clone()]);
    let at =
        archive.windows(64).rposition(|w| w == &good[512 + 512 + 600..][..64]).expect("the layer's data");
    archive[at] ^= 1;
    let before = layers(&engine);
    let run = engine.docker_with(&["load"], archive);
    refusal(&engine, "digest", run);
    settle(&engine, before, || layers(&engine));
    assert_eq!(layers(&engine), before, "a layer with a wrong digest is left");
    assert_unharmed(&engine, &base, "digest");
    engine.scrub();
    engine.remove_everything();
    engine.assert_nothing_mounted();
}

#[test]
fn layers_that_reach_outside_touch_nothing_there() {
    let (engine, base) = rootfs::engine_with(EngineOptions::default(), &rootfs::small());
    let canary = canary(&engine);
    let outside = canary.to_str().expect("UTF-8").trim_start_matches('/').to_owned();
    let before = snapshot(&canary);
    let passwd = fs::read("/etc/passwd").expect("passwd");
    let up = "../".repeat(30);
    let evil = |path: String| Entry::file(path, "evil\n");
    let cases: Vec<(&str, Vec<Entry>)> = vec![
        ("dot-dot", vec![evil(format!("{up}{outside}/passwd"))]),
        ("dot-dot-inside", vec![evil(format!("data/{up}{outside}/passwd"))]),
        ("absolute", vec![evil(format!("/{outside}/new"))]),
        ("dot-dot-whiteout", vec![Entry::file(format!("{up}{outside}/.wh.passwd"), "")]),
        ("opaque-dot-dot", vec![Entry::file(format!("{up}{outside}/.wh..wh..opq"), "")]),
        ("whiteout-of-dot-dot", vec![Entry::file("data/.wh...", "")]),
        ("symlinked-parent", vec![Entry::symlink("out", format!("/{outside}")), evil("out/new".into())]),
        (
            "symlinked-parent-up",
            vec![Entry::symlink("out", format!("{up}{outside}")), evil("out/new".into())],
        ),
        (
            "symlink-then-whiteout",
            vec![Entry::symlink("out", format!("/{outside}")), Entry::file("out/.wh.passwd", "")],
        ),
        ("link-out", vec![Entry::hard_link("data/link", format!("{up}{outside}/passwd"))]),
        ("link-absolute", vec![Entry::hard_link("data/link", format!("/{outside}/passwd"))]),
        (
            "link-through-symlink",
            vec![Entry::symlink("out", format!("/{outside}")), Entry::hard_link("data/link", "out/passwd")],
        ),
        (
            "file-over-symlink",
            vec![Entry::symlink("data/s", format!("/{outside}/passwd")), evil("data/s".into())],
        ),
        ("etc-passwd", vec![evil(format!("{up}etc/passwd"))]),
    ];
    for (name, entries) in cases {
        let run = load(&engine, name, tarball::build(&entries));
        assert_eq!(snapshot(&canary), before, "{name} reached the host\n{}", run.text());
        assert_eq!(fs::read("/etc/passwd").expect("passwd"), passwd, "{name} changed /etc/passwd");
        if run.ok() {
            // Harmless, then; mounting it and writing in it must be so, too.
            let script = "cat /data/link /data/s /out/new 2>&1 || true; echo x >/data/x";
            let run = ["run", "--rm", "--network", "none", name, "/bin/sh", "-ec", script];
            let run = engine.try_docker(&run);
            // An engine with containerd may refuse the layer only now.
            assert!(run.ok() || engine.has_containerd(), "{name}: {}", run.text());
            let text = run.text();
            assert!(!text.contains("the host's own"), "{name} shows the host's file: {text}");
            assert_eq!(snapshot(&canary), before, "{name}: its container reached the host");
            engine.docker(&["rmi", name]);
        }
    }
    assert_unharmed(&engine, &base, "escapes");
    engine.scrub();
}

#[test]
fn attributes_of_overlayfs_in_a_tar_are_harmless() {
    let (engine, base) = rootfs::engine_with(EngineOptions::lcow(), &rootfs::small());
    let layer = vec![
        Entry::dir("secret/"),
        Entry::file("secret/file", "from below\n"),
        Entry::dir("redirected/").xattr("trusted.overlay.redirect", "/secret"),
        Entry::dir("data/").xattr("trusted.overlay.opaque", "y"),
        Entry::dir("etc/").xattr("trusted.overlay.opaque", "x").xattr("user.overlay.opaque", "y"),
        Entry::file("data/meta", "")
            .xattr("trusted.overlay.metacopy", "")
            .xattr("trusted.overlay.redirect", "/etc/passwd"),
        Entry::file("data/origin", "o").xattr("trusted.overlay.origin", [0; 20]).xattr("user.kept", "yes"),
        Entry::new("data/hidden", Kind::CharDevice(0, 0), 0o600),
    ];
    let lower = [Entry::file("data/below", "seen\n"), Entry::file("data/hidden", "not seen\n")];
    let tars = [tarball::build(&rootfs::small()), tarball::build(&lower), tarball::build(&layer)];
    engine.docker_with(&["load"], archive::write("crafted", &tars)).expect_ok();
    engine.run_container("box1", "crafted", &[]);
    let mut expected = base;
    expected.apply(&lower);
    expected.apply(&layer[..7]);
    // A character device 0/0 in a tar is a whiteout.
    expected.remove("/data/hidden");
    expected.0.get_mut(b"/etc".as_slice()).expect("/etc").mtime = None;
    expected.assert_same(&Tree::of_container(&engine, "box1"), "a layer with attributes of overlayfs");
    engine.exec("box1", "echo w >/redirected/w && echo w >/data/w && ls /redirected /secret");
    assert_eq!(engine.exec("box1", "ls /redirected; ls /secret"), "w\nfile");
    // The bytes come back all the same.
    let saved = archive::read(&engine.docker_bytes(&["save", "crafted"]));
    assert!(saved[0].layers == tars, "the crafted layers are saved with other bytes");
    engine.docker(&["commit", "box1", "committed"]);
    let committed = archive::read(&engine.docker_bytes(&["save", "committed"]));
    for entry in tarball::parse(committed[0].layers.last().expect("the commit's layer")) {
        let bad = entry.xattrs.iter().any(|(name, _)| name.starts_with("trusted.overlay"));
        assert!(!bad, "an attribute of overlayfs in a commit: {:?}", entry.path);
    }
    engine.scrub();
}
