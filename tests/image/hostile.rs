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
