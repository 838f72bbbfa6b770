//! Images out of the engine and back: save, rmi, load. The very bytes of every layer come back.

use crate::{
    archive,
    engine::EngineOptions,
    manifest::Tree,
    rootfs::{self, random_bytes},
    tarball::{self, Entry},
};
use std::fs;

#[test]
fn save_remove_load_gives_the_same_image_and_the_same_bytes() {
    let (engine, _) = rootfs::engine_with(EngineOptions::default(), &rootfs::full());
    // Layers of all origins: an import, RUNs and COPYs of builds, commits.
    let context = engine.scratch("context");
    fs::write(context.join("copied"), random_bytes(3, 700_000)).expect("file");
    let dockerfile = "FROM base\nRUN rm -r /data/odd && echo run >/data/empty && chmod 600 /data/new\n\
        COPY copied /data/copied\nRUN ln /data/copied /data/copied-2 && rm -r /data/nested && mkdir /data/nested\n";
    fs::write(context.join("Dockerfile"), dockerfile).expect("Dockerfile");
    engine.build("built", &context, &[]);
    engine.run_container("box1", "built", &[]);
    engine.exec("box1", "echo committed >/data/committed; mknod /data/node b 8 1; rm /data/copied");
    engine.docker(&["commit", "box1", "committed"]);
    engine.docker(&["rm", "-f", "box1"]);
    let names = ["base", "built", "committed"];
    let inspect = |what: &str| names.map(|n| engine.docker(&["inspect", "-f", what, n]));
    let (ids, roots) = (inspect("{{.Id}}"), inspect("{{json .RootFS}}"));
    let trees = names.map(|n| Tree::of_image(&engine, n).except_times_of(&["/etc"]));

    // One archive of all to load from; its order of images is the engine's mood, so each is saved alone as well.
    let saved = engine.docker_bytes(&["save", "base", "built", "committed"]);
    let save = || names.map(|n| engine.docker_bytes(&["save", n]));
    let first = save();
    let images: Vec<archive::Image> = first.iter().flat_map(|a| archive::read(a)).collect();
    assert_eq!(images.iter().map(|i| i.layers.len()).collect::<Vec<_>>(), [1, 4, 5]);
    for image in images.iter().chain(&archive::read(&saved)) {
        image.assert_digests();
    }
    assert!(
        images[0].layers[0] == tarball::build(&rootfs::full()),
        "the import's tar is not what was imported"
    );
    let again: Vec<archive::Image> = save().iter().flat_map(|a| archive::read(a)).collect();
    for (image, again) in images.iter().zip(&again) {
        // Not the archives: engines from 25 on put the time into them.
        assert!(image.config == again.config && image.layers == again.layers, "a second save gives other bytes");
    }

    engine.remove_everything();
    engine.assert_nothing_mounted();
    engine.docker_with(&["load"], saved.clone()).expect_ok();
    assert_eq!(inspect("{{.Id}}"), ids, "image ids after load");
    assert_eq!(inspect("{{json .RootFS}}"), roots, "layers after load");
    for (name, tree) in names.iter().zip(&trees) {
        tree.assert_same(&Tree::of_image(&engine, name), &format!("{name} after save, rmi, load"));
    }
    for (again, first) in save().iter().zip(&images) {
        let image = &archive::read(again)[0];
        image.assert_digests();
        assert!(image.layers == first.layers, "layers have other bytes after load");
    }
    // Once more over what is there: nothing to do, nothing broken.
    engine.docker_with(&["load"], saved).expect_ok();
    assert_eq!(inspect("{{.Id}}"), ids);
    engine.scrub();
}

#[test]
fn tars_of_every_style_are_kept_byte_for_byte() {
    let (engine, base) = rootfs::engine_with(EngineOptions::default(), &rootfs::small());
    let entry = || vec![Entry::file("data/x", "content of x\n"), Entry::dir("data/d/")];
    let no_end = tarball::members(&entry());
    let mut garbage = tarball::build(&entry());
    garbage.extend_from_slice(&[0; 20 * 512]);
    let record_padded = {
        let mut tar = tarball::build(&entry());
        tar.resize(tar.len().next_multiple_of(10_240), 0);
        tar
    };
    let mut twice = entry();
    twice.insert(0, Entry::file("data/x", "an earlier x"));
    let foreign = |program: &str, args: &[&str]| {
        let folder = engine.scratch("foreign");
        fs::create_dir_all(folder.join("data/d")).expect("folder");
        fs::write(folder.join("data/x"), "content of x\n").expect("file");
        let words = [&[program, "-C", folder.to_str().expect("UTF-8")], args].concat();
        engine.run(&words).expect_ok().stdout
    };
    let base_tar = tarball::build(&rootfs::small());
    let cases: [(&str, Vec<u8>); 8] = [
        ("no-end-blocks", no_end),
        ("zeros-after-the-end", garbage),
        ("padded-records", record_padded),
        ("the-same-path-twice", tarball::build(&twice)),
        (
            "dot-slash",
            tarball::build(&[
                Entry::dir("./"),
                Entry::dir("./data/d/"),
                Entry::file("./data/x", "content of x\n"),
            ]),
        ),
        ("gnu", foreign("tar", &["--format=gnu", "--owner=0", "--group=0", "-c", "data/x", "data/d"])),
        ("pax", foreign("tar", &["--format=pax", "--owner=0", "--group=0", "-c", "data/x", "data/d"])),
        ("v7", foreign("tar", &["--format=v7", "--owner=0", "--group=0", "-c", "data/x", "data/d"])),
    ];
    for (name, tar) in cases {
        // What keeps the engine's own drivers' tars apart from their files refuses a path that comes twice.
        if name == "the-same-path-twice" && !engine.is_lcow() {
            continue;
        }
        let name = format!("tar-{name}");
        engine.docker_with(&["load"], archive::write(&name, &[base_tar.clone(), tar.clone()])).expect_ok();
        let mut expected = base.clone().without_times();
        expected.file("/data/x", 0o644, "content of x\n");
        expected.dir("/data/d", 0o755);
        expected.assert_same(&Tree::of_image(&engine, &name).without_times(), &name);
        let saved = archive::read(&engine.docker_bytes(&["save", &name]));
        assert!(saved[0].layers == [base_tar.clone(), tar], "{name}: saved bytes are not the loaded ones");
    }
    engine.scrub();
}
