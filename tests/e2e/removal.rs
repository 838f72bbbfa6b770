//! What is removed is gone: mounts, loop devices, files.

use crate::{
    engine::{Engine, EngineOptions},
    rootfs,
};
use std::{collections::BTreeSet, fs};

/// Names in the product's home that are layers: everything but the store's own few files and folders.
fn layers(engine: &Engine) -> BTreeSet<String> {
    let entries = fs::read_dir(engine.home()).expect("home").flatten();
    // Docker names layers itself, those of containerd's snapshots are numbered.
    let is_layer = |entry: &fs::DirEntry| {
        if engine.has_containerd() {
            entry.path().join("snapshot.json").exists()
        } else {
            entry.file_name().len() >= 64
        }
    };
    entries.filter(is_layer).map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

/// Files anywhere below the home, of which an empty store has only small ones.
fn bytes_in(folder: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let inside = fs::read_dir(folder).into_iter().flatten().flatten();
    inside
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => bytes_in(&entry.path()),
            Ok(meta) => meta.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

fn busy(engine: &Engine) {
    let context = engine.scratch("context");
    fs::write(context.join("Dockerfile"), "FROM base\nRUN echo x >/x\nRUN rm -r /data/nested\n")
        .expect("Dockerfile");
    engine.build("built", &context, &[]);
    for name in ["one", "two"] {
        engine.run_container(name, "built", &[]);
        engine.exec(name, "echo own >/own");
    }
    engine.docker(&["create", "--name", "created", "--network", "none", "base", "true"]);
    engine.docker(&["commit", "one", "committed"]);
}

#[test]
fn removing_everything_leaves_an_empty_store() {
    let (engine, _) = rootfs::engine_with(EngineOptions::lcow(), &rootfs::full());
    busy(&engine);
    assert!(layers(&engine).len() >= 9, "{:?}", layers(&engine));
    assert!(!engine.mounts().is_empty(), "running containers have mounts");
    assert!(!engine.loops().is_empty(), "running containers have loop devices");
    engine.docker(&["rm", "-f", "one"]);
    assert_eq!(engine.exec("two", "cat /own"), "own", "a neighbour was removed");
    engine.remove_everything();
    engine.assert_nothing_mounted();
    assert_eq!(layers(&engine), BTreeSet::new());
    let left = bytes_in(&engine.home());
    assert!(left < 256 << 10, "{left} bytes are left in an empty store");
    // And it is of use again.
    engine.import("base", crate::tarball::build(&rootfs::small()));
    assert_eq!(engine.shell("base", "echo works"), "works");
}

#[test]
fn a_stop_of_dockerd_leaves_no_mounts() {
    let (engine, _) = rootfs::engine_with(EngineOptions::lcow(), &rootfs::full());
    busy(&engine);
    engine.stop_dockerd();
    if !engine.has_containerd() {
        // containerd never says that it is done with a mount: they stay until their snapshots are removed.
        engine.assert_nothing_mounted();
    }
    let log = engine.log_text("plugin");
    assert!(!log.contains("panicked"), "{log}");
    engine.start_dockerd();
    engine.docker(&["start", "one", "two"]);
    assert_eq!(engine.exec("one", "cat /own"), "own");
    engine.docker(&["rm", "-f", "one", "two", "created"]);
    engine.scrub();
    engine.remove_everything();
    engine.assert_nothing_mounted();
    assert_eq!(layers(&engine), BTreeSet::new());
}
