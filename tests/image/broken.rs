//! Broken sources: every command says which one it is, once, and which part of it is wrong, once.

use crate::{Scene, fails, image, ok, sample};
use oci_image::testing::{Packing, Store, Tar, archive};

/// The commands that open a source, with what they need besides it.
fn commands(scene: &Scene, source: &str) -> Vec<Vec<String>> {
    let out = scene.path("out.img").display().to_string();
    let to = format!("oci-archive:{}", scene.path("out.tar").display());
    let disk = scene.path("disk.img").display().to_string();
    let lines: [&[&str]; 7] = [
        &["ls", source],
        &["cat", source, "etc/passwd"],
        &["inspect", source],
        &["diff", source, source],
        &["pack", source, &out],
        &["pack", "--layers", source, &out],
        &["commit", "--base", source, "--to", &to, &disk],
    ];
    lines.iter().map(|line| line.iter().map(|word| (*word).to_owned()).collect()).collect()
}

fn once(message: &str, part: &str) {
    assert_eq!(message.matches(part).count(), 1, "{part:?} in: {message}");
}

/// A scene with the disk of the sample image.
fn with_disk() -> Scene {
    let scene = Scene::new();
    let source = scene.layout("whole", &sample(Packing::Gzip));
    ok(&[
        "pack",
        "--size",
        "16MiB",
        "--journal",
        "none",
        &source,
        &scene.path("disk.img").display().to_string(),
    ]);
    scene
}

#[test]
fn a_source_that_cannot_be_opened_is_named_once() {
    let scene = with_disk();
    let place = |name: &str| scene.path(name).display().to_string();
    let empty = scene.file("empty.tar", b"");
    let noise = scene.file("noise.tar", &[7; 4096]);
    let cut = archive(&sample(Packing::Gzip).docker());
    let cut = scene.file("cut.tar", &cut[..cut.len() / 2]);
    let whole = scene.oci_archive("oci.tar", &sample(Packing::Gzip));
    let mut version = sample(Packing::Gzip).files();
    version.retain(|(name, _)| name != "oci-layout");
    version.push(("oci-layout".to_owned(), br#"{"imageLayoutVersion":"7.0"}"#.to_vec()));
    oci_image::testing::directory(&scene.path("version"), &version);
    let sources = [
        (format!("oci:{}", place("missing")), place("missing")),
        (format!("oci-archive:{}", place("missing")), place("missing")),
        (format!("docker-archive:{}", place("missing")), place("missing")),
        (format!("oci:{}", place("version")), place("version")),
        (format!("oci-archive:{}", place("whole")), place("whole")),
        (format!("oci-archive:{empty}"), empty.clone()),
        (format!("docker-archive:{empty}"), empty),
        (format!("oci-archive:{noise}"), noise),
        (format!("docker-archive:{cut}"), cut),
        (format!("{whole}:no-such-tag"), place("oci.tar")),
    ];
    for (source, path) in &sources {
        for line in commands(&scene, source) {
            let line: Vec<&str> = line.iter().map(String::as_str).collect();
            once(&fails(&line), path);
        }
    }
    for (line, word) in
        [(&["ls", "dir:no-such-kind"][..], "dir:no-such-kind"), (&["ls", "--platform", "amd", "-"], "amd")]
    {
        let done = image(line).output().unwrap();
        assert_eq!(done.status.code(), Some(2));
        once(String::from_utf8(done.stderr).unwrap().lines().next().unwrap(), word);
    }
    let whole = format!("oci:{}", place("whole"));
    for command in ["ls", "cat"] {
        once(&fails(&[command, &whole, "/no-such-file"]), "/no-such-file");
    }
}

#[test]
fn a_broken_layer_is_named_once() {
    type Damage = fn(&mut Store);
    let damages: [(&str, Damage); 4] = [
        ("missing", |store| drop(store.blobs.remove(&store.saved[0].2[1]))),
        ("changed", |store| {
            let blob = store.blobs.get_mut(&store.saved[0].2[1]).unwrap();
            let middle = blob.len() / 2;
            blob[middle] ^= 1;
        }),
        ("short", |store| {
            store.blobs.get_mut(&store.saved[0].2[1]).unwrap().pop();
        }),
        ("no-tar", |store| {
            *store = Store::default();
            let good = Tar::default().dir("etc").file("etc/passwd", b"").finish();
            let layers = [(&good[..], Packing::Gzip), (&[7; 2000][..], Packing::Gzip)];
            let manifest = store.manifest("linux/amd64", &layers);
            store.list(manifest, "1.0");
        }),
    ];
    for (name, damage) in damages {
        let scene = with_disk();
        let mut store = sample(Packing::Gzip);
        damage(&mut store);
        let source = scene.layout(name, &store);
        let before = scene.names();
        for line in commands(&scene, &source)
            .into_iter()
            .filter(|line| !matches!(line[0].as_str(), "inspect" | "diff"))
        {
            let line: Vec<&str> = line.iter().map(String::as_str).collect();
            let message = fails(&line);
            once(&message, &scene.path(name).display().to_string());
            once(&message, "layer 1");
            if name != "changed" {
                assert!(message.matches(&store.saved[0].2[1].to_string()).count() <= 1, "{message}");
            }
        }
        assert_eq!(scene.names(), before, "nothing is left");
    }
}
