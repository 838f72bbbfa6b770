//! `ls`, `cat`, `inspect` and `diff`.

use crate::{Scene, fails, json, ok, piped, sample, text};
use oci_image::testing::{PACKINGS, Packing, Store, Tar, archive, pack};
use serde_json::json as value;

#[test]
fn every_source_and_compression_is_listed_alike() {
    for packing in PACKINGS {
        let (scene, store) = (Scene::new(), sample(packing));
        let sources = [
            scene.layout("layout", &store),
            format!("{}:1.0", scene.layout("layout", &store)),
            scene.oci_archive("oci.tar", &store),
            scene.docker_archive("docker.tar", &store),
            format!("{}:test:1.0", scene.docker_archive("docker.tar", &store)),
            format!(
                "docker-archive:{}",
                scene.file("d.tar.gz", &pack(&archive(&store.docker()), Packing::Gzip))
            ),
        ];
        for source in &sources {
            let names = text(&["ls", "-R", source]);
            assert_eq!(names, "bin\nbin/ash\nbin/sh\netc\netc/passwd\nnew\nsh\n", "{packing:?} {source}");
            assert_eq!(ok(&["cat", source, "/etc/passwd"]), b"changed\n");
            assert!(ok(&["cat", source, "sh"]) == vec![1; 300_000], "a link is followed");
            assert_eq!(
                json(&["inspect", "--json", source])["config"]["config"]["Entrypoint"],
                value!(["/init"])
            );
        }
        for archive in [
            archive(&store.files()),
            archive(&store.docker()),
            pack(&archive(&store.docker()), Packing::Zstd),
        ] {
            let done = piped(&["cat", "-", "etc/passwd"], &archive);
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            assert_eq!(done.stdout, b"changed\n");
        }
        assert_eq!(scene.names(), ["d.tar.gz", "docker.tar", "layout", "oci.tar"]);
    }
}

#[test]
fn a_listing_shows_attributes_and_the_layer_of_each_file() {
    let (scene, store) = (Scene::new(), sample(Packing::Gzip));
    let source = scene.layout("layout", &store);
    let long = text(&["ls", "-l", &source]);
    let lines: Vec<Vec<&str>> = long.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["drwxr-xr-x", "1", "0", "0", "0", "2023-11-14", "22:13:20", "0", "bin"]);
    assert_eq!(lines[2], ["-rw-r--r--", "1", "0", "0", "0", "2023-11-14", "22:13:20", "1", "new"]);
    assert_eq!(
        lines[3],
        ["lrwxrwxrwx", "1", "0", "0", "6", "2023-11-14", "22:13:20", "0", "sh", "->", "bin/sh"]
    );
    let rows = json(&["ls", "--json", &source, "/bin"]);
    assert_eq!(rows[0]["path"], "ash");
    assert_eq!(rows[1]["links"], 2);
    assert_eq!(rows[1]["layer_digest"], value!(store.saved[0].2[0]));
    assert_eq!(text(&["ls", &source, "etc/passwd"]), "etc/passwd\n");
    assert_eq!(text(&["ls", &source, "sh"]), "sh\n");
    assert!(fails(&["ls", &source, "/etc/old"]).contains("not found"));
    assert!(fails(&["cat", &source, "/etc"]).contains("not a regular file"));
}

#[test]
fn what_is_hidden_is_named_with_its_layer() {
    let (scene, store) = (Scene::new(), sample(Packing::Zstd));
    let source = scene.oci_archive("oci.tar", &store);
    let report = json(&["ls", "--du", "--json", &source]);
    assert_eq!(report["layers"][0]["file_bytes"], 305_022);
    assert_eq!(report["layers"][0]["shadowed_bytes"], 5022);
    assert_eq!(report["layers"][1]["file_bytes"], 8);
    assert_eq!(report["layers"][0]["compression"], "zstd");
    assert_eq!(report["paths"][0], value!({ "path": "bin", "bytes": 300_000, "shadowed_bytes": 0 }));
    assert_eq!(report["paths"][1], value!({ "path": "etc", "bytes": 8, "shadowed_bytes": 5022 }));
    assert_eq!(
        report["shadowed"][0],
        value!({ "path": "etc/old", "bytes": 5000, "layer": 0, "hidden_by": 1 })
    );
    assert_eq!(report["shadowed"][1]["path"], "etc/passwd");
    let table = text(&["ls", "--du", &source, "/etc"]);
    assert!(table.contains("etc/old") && table.contains("passwd") && !table.contains("bin"), "{table}");
}

#[test]
fn an_image_is_described_with_all_that_its_source_offers() {
    let (scene, mut store) = (Scene::new(), Store::default());
    let mut entries = Vec::new();
    for platform in ["linux/amd64", "linux/arm64"] {
        let tar = Tar::default().file(platform, b"").finish();
        entries.push(store.manifest(platform, &[(&tar, Packing::Gzip)]));
    }
    let index = store.index(&entries);
    store.list(index, "app");
    let source = scene.layout("layout", &store);
    for platform in ["linux/amd64", "linux/arm64"] {
        let facts = json(&["inspect", "--json", "--platform", platform, &source]);
        assert_eq!(facts["platform"], platform);
        assert_eq!(facts["names"], value!(["app"]));
        assert_eq!(facts["listed"].as_array().unwrap().len(), 2);
        assert_eq!(facts["manifest"]["config"]["digest"], facts["id"]);
        assert_eq!(facts["layers"][0]["created_by"], "a test");
        assert_eq!(text(&["ls", "-R", "--platform", platform, &source]), format!("linux\n{platform}\n"));
    }
    let message = fails(&["inspect", "--platform", "linux/s390x", &source]);
    assert!(message.contains("linux/amd64") && message.contains("linux/arm64"), "{message}");
    let described = text(&["inspect", "--platform", "linux/arm64", &source]);
    for part in ["app", "linux/arm64", "[\"/init\"]", "PATH=/bin", "made=for a test", "tar+gzip"] {
        assert!(described.contains(part), "{part}: {described}");
    }
}

#[test]
fn images_are_compared_by_content_and_attributes() {
    let scene = Scene::new();
    let one = |name: &str, layers: &[Vec<u8>]| {
        let mut store = Store::default();
        let layers: Vec<(&[u8], Packing)> =
            layers.iter().map(|tar| (tar.as_slice(), Packing::Gzip)).collect();
        let manifest = store.manifest("linux/amd64", &layers);
        store.list(manifest, "");
        scene.layout(name, &store)
    };
    let base = Tar::default()
        .file("same", b"1")
        .file("content", b"22")
        .file("size", b"1")
        .file("gone", b"")
        .symlink("link", "a")
        .file("h1", b"x")
        .link("h2", "h1")
        .finish();
    let a = one("a", std::slice::from_ref(&base));
    let b = one(
        "b",
        &[
            base,
            Tar::default()
                .file("content", b"33")
                .file("size", b"4444")
                .whiteout("", "gone")
                .symlink("link", "b")
                .dir("added")
                .file("added/file", b"")
                .file("h2", b"x")
                .finish(),
        ],
    );
    let expected = "A added\nA added/file\nC content  (content)\nD gone\nC h1  (links)\nC h2  (links)\nC link  (target)\nC size  (size)\n";
    assert_eq!(text(&["diff", &a, &b]), expected);
    assert_eq!(text(&["diff", &a, &a]), "");
    // The same files in other layers are no difference.
    let flat = one(
        "flat",
        &[Tar::default()
            .file("same", b"1")
            .file("content", b"33")
            .file("size", b"4444")
            .symlink("link", "b")
            .dir("added")
            .file("added/file", b"")
            .file("h1", b"x")
            .file("h2", b"x")
            .finish()],
    );
    assert_eq!(text(&["diff", &b, &flat]), "");
    assert_eq!(text(&["diff", "--times", &b, &flat]), "");
    let rows = json(&["diff", "--json", &a, &b]);
    assert_eq!(
        rows[7],
        value!({ "change": "changed", "path": "size", "type": "file", "what": ["size"], "from_bytes": 1, "to_bytes": 4 })
    );
    assert!(fails(&["diff", "-", "-"]).contains("only one"));
}
