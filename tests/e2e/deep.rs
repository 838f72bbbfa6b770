//! Images of very many layers.

use crate::{
    archive,
    engine::EngineOptions,
    manifest::Tree,
    rootfs,
    tarball::{self, Entry},
};

/// Layers of the image.
const LAYERS: usize = 120;
/// Layers that an engine allows at most.
const ENGINES_LIMIT: usize = 125;

/// Layer `n` adds, overwrites, deletes, replaces a file by a folder and back, and makes a folder opaque.
fn layer(n: usize) -> Vec<Entry> {
    let mut entries = vec![
        Entry::dir("layers/"),
        Entry::file(format!("layers/{n:03}"), format!("made by layer {n}\n")).owner(n as u32, 0),
        Entry::file("newest", format!("{n}\n")),
    ];
    if n.is_multiple_of(5) {
        entries.push(Entry::file(format!("layers/.wh.{:03}", n - 3), ""));
    }
    match n % 4 {
        0 => entries.push(Entry::dir("changing/").mode(0o700)),
        1 => entries.push(Entry::file(format!("changing/{n}"), "inside")),
        2 => entries.push(Entry::file("changing", "now a file")),
        _ => entries.push(Entry::file(".wh.changing", "")),
    }
    entries.push(Entry::dir("opaque/"));
    if n.is_multiple_of(30) {
        entries.push(Entry::file("opaque/.wh..wh..opq", ""));
    }
    entries.push(Entry::file(format!("opaque/{n}"), "o"));
    entries
}

fn many_layers(options: EngineOptions) {
    let (engine, mut expected) = rootfs::engine_with(options, &rootfs::small());
    let mut layers = vec![rootfs::small()];
    layers.extend((1..LAYERS).map(layer));
    for entries in &layers[1..] {
        expected.apply(entries);
    }
    let tars: Vec<Vec<u8>> = layers.iter().map(|l| tarball::build(l)).collect();
    engine.docker_with(&["load"], archive::write("deep", &tars)).expect_ok();
    engine.run_container("box1", "deep", &[]);
    expected.assert_same(&Tree::of_container(&engine, "box1"), "the image of many layers");
    engine.exec("box1", "echo written >/written && rm /layers/001 && echo x >>/layers/119");
    expected.file("/written", 0o644, "written\n");
    expected.delete("/layers/001");
    expected.file("/layers/119", 0o644, "made by layer 119\nx\n").uid = 119;
    expected.assert_same(&Tree::of_container(&engine, "box1"), "the container on many layers");
    engine.docker(&["commit", "box1", "committed"]);
    let mut tag = "committed".to_owned();
    for n in LAYERS + 1..ENGINES_LIMIT {
        let next = format!("level-{n}");
        let name = format!("box-{n}");
        engine.docker(&[
            "run",
            "--network",
            "none",
            "--name",
            &name,
            &tag,
            "/bin/sh",
            "-c",
            "echo $0 >/level",
            &next,
        ]);
        engine.docker(&["commit", &name, &next]);
        engine.docker(&["rm", &name]);
        tag = next;
    }
    expected.file("/level", 0o644, format!("{tag}\n"));
    expected.assert_same(&Tree::of_image(&engine, &tag), "the deepest image");
    let saved = archive::read(&engine.docker_bytes(&["save", &tag]));
    saved[0].assert_digests();
    assert_eq!(saved[0].layers.len(), ENGINES_LIMIT);
    assert!(saved[0].layers[..LAYERS] == tars[..]);
    engine.run_container("box2", &tag, &[]);
    if !engine.has_containerd() {
        // One more is the engine's own limit; it says so, and nothing breaks.
        let failure = engine.try_docker(&["commit", "box2", "too-deep"]).expect_failure();
        assert!(failure.contains("max depth"), "{failure}");
    }
    assert_eq!(engine.exec("box2", "cat /level"), tag);
    engine.docker(&["rm", "-f", "box1", "box2"]);
    engine.assert_nothing_mounted();
}

#[test]
fn an_image_of_120_layers() {
    many_layers(EngineOptions::default());
}

#[test]
fn an_image_of_120_layers_by_the_old_mount_call() {
    many_layers(EngineOptions::lcow().plugin(&["--storage-opt", "lcow.overlayapi=legacy"]));
}
