//! What people do with an engine every day, with contents compared: one list for all engines and both kinds of plugin.

use crate::{
    archive,
    engine::{Driver, Engine},
    manifest::Tree,
    room::Version,
    rootfs::{self, random_bytes},
    tarball::{self, Kind},
};
use std::fs;

/// import → run, diff, commit, build, cp, save, rmi, load. `base` is the imported image's tree. Leaves the
/// images `base`, `built` and `committed`, and nothing mounted.
pub(crate) fn everything(engine: &Engine, base: &Tree) {
    engine.run_container("box1", "base", &[]);
    base.assert_same(&Tree::of_container(engine, "box1"), "a container of the import");
    let script = "mkdir /work && echo new >/work/new && ln /work/new /work/hard && ln -s new /work/link \
        && rm -r /data/nested && echo changed >/data/old && mknod /work/node c 1 5";
    engine.exec("box1", script);
    let mut tree = base.clone();
    tree.dir("/work", 0o755);
    tree.file("/work/new", 0o644, "new\n");
    tree.hard_link("/work/hard", "/work/new");
    tree.symlink("/work/link", "new");
    tree.put_node("/work/node", 'c', 0o644, Some((1, 5)));
    tree.delete("/data/nested");
    tree.file("/data/old", 0o644, "changed\n");
    tree.assert_same(&Tree::of_container(engine, "box1"), "the running container");
    let diff = engine.docker(&["diff", "box1"]);
    for line in ["A /work/new", "A /work/link", "D /data/nested", "C /data/old"] {
        assert!(diff.lines().any(|l| l == line), "docker diff lacks {line}\n{diff}");
    }

    // In and out.
    let file = engine.scratch("everyday").join("copied");
    let bytes = random_bytes(17, 1 << 20);
    fs::write(&file, &bytes).expect("file");
    engine.docker(&["cp", file.to_str().expect("UTF-8"), "box1:/work/copied"]);
    tree.file("/work/copied", 0o644, &bytes);
    let back = tarball::parse(&engine.docker_bytes(&["cp", "box1:/work/copied", "-"]));
    assert_eq!(back[0].kind, Kind::File(bytes.clone()), "docker cp gave other bytes back");
    engine.docker(&["commit", "box1", "committed"]);
    tree.assert_same(&Tree::of_image(engine, "committed"), "the commit");

    // A classic build on the commit.
    let context = engine.scratch("everyday-context");
    fs::write(context.join("large"), &bytes).expect("file");
    let dockerfile = "FROM committed\nRUN rm /work/hard && echo run >/work/run && chmod 600 /data/new\n\
        COPY large /work/large\n";
    fs::write(context.join("Dockerfile"), dockerfile).expect("Dockerfile");
    engine.build("built", &context, &[]);
    tree.delete("/work/hard");
    if let Some(node) = tree.0.get_mut(b"/work/new".as_slice()) {
        node.same_as = None;
    }
    tree.file("/work/run", 0o644, "run\n");
    tree.file("/work/large", 0o644, &bytes);
    tree.0.get_mut(b"/data/new".as_slice()).expect("/data/new").mode = 0o600;
    tree.assert_same(&Tree::of_image(engine, "built"), "the build");

    // Out and back.
    engine.docker(&["rm", "-f", "box1"]);
    let saved = engine.docker_bytes(&["save", "base", "committed", "built"]);
    let images = archive::read(&saved);
    assert_eq!(images.len(), 3);
    for image in &images {
        image.assert_digests();
    }
    let import = tarball::build(&rootfs::full());
    assert!(images.iter().any(|i| i.layers == [import.clone()]), "the import's bytes are not those imported");
    let facts = || ["base", "committed", "built"].map(|n| engine.docker(&["inspect", "-f", "{{.Id}}", n]));
    let ids = facts();
    engine.remove_everything();
    engine.assert_nothing_mounted();
    engine.docker_with(&["load"], saved).expect_ok();
    assert_eq!(facts(), ids, "image ids after load");
    tree.assert_same(&Tree::of_image(engine, "built"), "the build after save, rmi and load");
    engine.scrub();
    engine.assert_nothing_mounted();
}

/// `docker export`. The last thing to ask of a 26.1: it keeps a reference to the container's layer for ever, also after
/// `docker rm`, whatever the storage driver is.
pub(crate) fn export(engine: &Engine, base: &Tree) {
    engine.run_container("exported", "base", &[]);
    engine.exec("exported", "echo new >/data/new-file && rm /data/old");
    let mut tree = base.clone();
    tree.file("/data/new-file", 0o644, "new\n");
    tree.delete("/data/old");
    let exported = Tree::of_tar(&tarball::parse(&engine.docker_bytes(&["export", "exported"])));
    tree.without_times().assert_same(&exported, "docker export");
}

#[test]
fn the_v1_socket_works_on_26_1() {
    let options = Version::V26.options(Driver::Lcow);
    let (engine, base) = rootfs::engine_with(options, &rootfs::full());
    Version::V26.assert_runs(&engine);
    everything(&engine, &base);
    // A crash of the plugin, and one of the engine.
    engine.run_container("box1", "built", &[]);
    engine.exec("box1", "echo before >/work/before");
    engine.kill_plugin();
    engine.start_plugin();
    assert_eq!(engine.exec("box1", "cat /work/before"), "before");
    engine.kill_dockerd();
    engine.start_dockerd();
    engine.docker(&["start", "box1"]);
    assert_eq!(engine.exec("box1", "cat /work/before"), "before");
    engine.docker(&["rm", "-f", "box1"]);
    engine.assert_nothing_mounted();
    export(&engine, &base);
}
