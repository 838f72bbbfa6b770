//! Images that another tool copied: skopeo, as Debian packages it.

use crate::{Scene, ok, sample, text};
use oci_image::testing::Packing;
use std::process::Command;

fn run(command: &mut Command) {
    let done = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}; see scripts/install-deps test"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

#[test]
#[cfg(target_os = "linux")]
fn skopeo_takes_our_test_images_and_its_copies_read_the_same() {
    let (scene, store) = (Scene::new(), sample(Packing::Gzip));
    let source = scene.layout("layout", &store);
    let copies = [
        format!("oci-archive:{}:1.0", scene.path("copy.tar").display()),
        format!("docker-archive:{}:test:1.0", scene.path("docker.tar").display()),
        format!("oci:{}:1.0", scene.path("copy").display()),
    ];
    for copy in &copies {
        run(Command::new("skopeo").args(["--insecure-policy", "copy", &format!("{source}:1.0"), copy]));
        assert_eq!(text(&["ls", "-R", copy]), text(&["ls", "-R", &source]), "{copy}");
        assert!(ok(&["cat", copy, "bin/ash"]) == ok(&["cat", &source, "bin/ash"]), "{copy}");
        assert_eq!(text(&["diff", &source, copy]), "", "{copy}");
    }
}
