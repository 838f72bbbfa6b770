//! Images that are wrong, or that want too much: a message, status 1, and nothing left.

use crate::{Scene, failed, fails, piped, sample};
use oci_image::testing::{Packing, Store, Tar, archive, pack};

#[test]
fn limits_end_a_command_with_the_option_that_raises_them() {
    let scene = Scene::new();
    let mut store = Store::default();
    let zeros = Tar::default().file("zeros", &vec![0; 80 << 20]).finish();
    let manifest = store.manifest("linux/amd64", &[(&zeros, Packing::Zstd)]);
    store.list(manifest, "");
    let source = scene.layout("layout", &store);
    assert!(fails(&["ls", &source]).contains("--max-ratio"));
    let message = fails(&["ls", "--max-ratio", "1000000", "--max-size", "10MiB", &source]);
    assert!(message.contains("--max-size"), "{message}");
    assert!(
        fails(&["ls", "--max-ratio", "1000000", "--max-entries", "0", &source]).contains("--max-entries")
    );
    let many = sample(Packing::Gzip);
    assert!(fails(&["ls", "--max-entries", "6", &scene.layout("many", &many)]).contains("--max-entries"));
    let done =
        piped(&["ls", "--scratch", scene.path("").to_str().unwrap(), "-"], &pack(&zeros, Packing::Zstd));
    failed(&["ls", "-"], &done);
    assert_eq!(scene.names(), ["layout", "many"], "the scratch file is gone");
}

/// Layers that are small enough each, and too much together.
#[test]
fn limits_hold_for_all_layers_together() {
    let scene = Scene::new();
    let noise: Vec<u8> = (0..6u32 << 20).map(|n| (n.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    let image = |name: &str, layers: &[Vec<u8>], packing: Packing| {
        let mut store = Store::default();
        let layers: Vec<(&[u8], Packing)> = layers.iter().map(|tar| (&tar[..], packing)).collect();
        let manifest = store.manifest("linux/amd64", &layers);
        store.list(manifest, "");
        scene.layout(name, &store)
    };
    let of = |path: &str, data: &[u8]| Tar::default().file(path, data).finish();
    let large = image("large", &[of("a", &noise), of("b", &noise)], Packing::Plain);
    let hidden = image("hidden", &[of("a", &noise), of("a", &noise)], Packing::Gzip);
    let many = image("many", &[of("a", b"1"), of("a", b"2"), of("b", b"3")], Packing::Gzip);
    let zeros = vec![0; 40 << 20];
    let bombs = image("bombs", &[of("a", &zeros), of("b", &zeros)], Packing::Zstd);
    let out = scene.path("out").display().to_string();
    let before = scene.names();
    for (source, options, raised) in [
        (&large, &["--max-size", "10MiB"][..], "--max-size"),
        (&hidden, &["--max-size", "10MiB"], "--max-size"),
        (&many, &["--max-entries", "2"], "--max-entries"),
        (&bombs, &[], "--max-ratio"),
    ] {
        let commands = [
            &["ls"][..],
            &["pack", "--format", "raw"],
            &["pack", "--format", "qcow2", "--size", "200MiB"],
            &["pack", "--layers"],
        ];
        for command in commands {
            let target: &[&str] = if command[0] == "pack" { &[source, &out] } else { &[source] };
            let message = fails(&[command, options, target].concat());
            assert!(message.contains(raised), "{command:?} {source}: {message}");
            assert_eq!(scene.names(), before, "{command:?} {source}");
        }
    }
    for (source, options) in [
        (&large, &["--max-size", "13MiB"][..]),
        (&many, &["--max-entries", "3"]),
        (&bombs, &["--max-ratio", "1000000"]),
    ] {
        let target: [&str; 2] = [source, &out];
        crate::ok(&[&["pack", "--format", "raw"][..], options, &target].concat());
    }
}

#[test]
fn wrong_images_are_named_in_one_line() {
    let scene = Scene::new();
    let mut store = sample(Packing::Gzip);
    let blob = store.saved[0].2[1];
    store.blobs.get_mut(&blob).unwrap()[30] ^= 1;
    let source = scene.layout("changed", &store);
    let message = fails(&["ls", &source]);
    assert!(
        message.contains("digest mismatch of layer 1") && message.contains(&blob.to_string()),
        "{message}"
    );
    store.blobs.remove(&blob);
    assert!(fails(&["ls", &scene.oci_archive("missing.tar", &store)]).contains("not found"));
    for (archive, part) in [
        (archive(&[("../x".to_owned(), Vec::new())]), "'..'"),
        (archive(&[("x\u{1b}[2J".to_owned(), Vec::new())]), "index.json"),
        (vec![0; 1024], "index.json"),
        (Vec::new(), "empty"),
    ] {
        let file = scene.file("bad.tar", &archive);
        let message = fails(&["ls", &format!("oci-archive:{file}")]);
        assert!(message.contains(part) && !message.contains('\u{1b}'), "{message}");
    }
    // Names that would move a terminal's cursor are escaped.
    let mut store = Store::default();
    let tar = Tar::default().file("a\u{1b}[2Jb", b"").finish();
    let manifest = store.manifest("linux/amd64", &[(&tar, Packing::Plain)]);
    store.list(manifest, "");
    assert_eq!(crate::text(&["ls", &scene.layout("escape", &store)]), "a\\x1b[2Jb\n");
    assert!(fails(&["ls", "oci:/does/not/exist"]).contains("oci-layout"));
    let done = crate::image(&["ls", "image.tar"]).output().unwrap();
    assert_eq!(done.status.code(), Some(2), "a wrong command line");
}
