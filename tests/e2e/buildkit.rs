//! Builds by BuildKit, whose layers are never applied from a tar: they are created, mounted, written, and become
//! parents. Their digest comes from the first Diff, and every later one has to agree.

use crate::{
    archive,
    engine::EngineOptions,
    manifest::Tree,
    rootfs::{self, random_bytes},
};
use std::fs;

#[test]
fn buildkit_layers_keep_their_digests_over_restarts_and_children() {
    let (engine, mut expected) = rootfs::engine_with(EngineOptions::default(), &rootfs::full());
    let context = engine.scratch("context");
    let copied = random_bytes(6, 1 << 20);
    fs::create_dir_all(context.join("tree/sub")).expect("folder");
    fs::write(context.join("tree/sub/copied"), &copied).expect("file");
    let dockerfile = "FROM base AS first\nRUN mkdir /made && echo one >/made/file && ln /made/file /made/hard\n\
        RUN rm -rf /data/odd && mkdir /data/odd && echo o >/data/odd/only && rm /data/empty\n\
        FROM first\nCOPY tree /tree\nCOPY --from=first /made/file /from-first\nRUN mv /tree/sub /tree/moved\n";
    fs::write(context.join("Dockerfile"), dockerfile).expect("Dockerfile");
    let served = engine.diffs_served();
    engine.build_by("1", "built", &context, &[]).expect_ok();
    // One for each step that is a layer, none by BuildKit itself, which could walk an overlay of its own making.
    let steps = dockerfile.matches("RUN").count() + dockerfile.matches("COPY").count();
    if let (Some(before), Some(after)) = (served, engine.diffs_served()) {
        assert_eq!(after - before, steps, "layers that the product made blobs of");
    }
    expected.dir("/made", 0o755);
    expected.file("/made/file", 0o644, "one\n");
    expected.hard_link("/made/hard", "/made/file");
    expected.delete("/data/odd");
    expected.dir("/data/odd", 0o755);
    expected.file("/data/odd/only", 0o644, "o\n");
    expected.delete("/data/empty");
    expected.dir("/tree", 0o755);
    expected.dir("/tree/moved", 0o755);
    expected.file("/tree/moved/copied", 0o644, &copied);
    expected.file("/from-first", 0o644, "one\n");
    expected.assert_same(&Tree::of_image(&engine, "built"), "the image that BuildKit built");

    let saved = engine.docker_bytes(&["save", "built"]);
    let images = archive::read(&saved);
    images[0].assert_digests();
    // The cache knows every step.
    let again = engine.build_by("1", "again", &context, &[]).expect_ok().text();
    assert!(again.contains("CACHED"), "{again}");
    let id = |image: &str| engine.docker(&["inspect", "-f", "{{.Id}}", image]);
    if engine.has_containerd() {
        // An image is an index there, with a statement of when it was built.
        let layers = |image: &str| engine.docker(&["inspect", "-f", "{{json .RootFS}}", image]);
        assert_eq!(layers("again"), layers("built"));
    } else {
        assert_eq!(id("again"), id("built"));
    }

    engine.stop_dockerd();
    engine.kill_plugin();
    engine.start_plugin();
    engine.start_dockerd();
    expected.assert_same(&Tree::of_image(&engine, "built"), "the image after restarts");
    let child = engine.scratch("child");
    fs::write(child.join("Dockerfile"), "FROM built\nRUN echo child >/child && rm -r /made\n")
        .expect("Dockerfile");
    engine.build_by("1", "child", &child, &[]).expect_ok();
    let mut childs = expected.clone();
    childs.delete("/made");
    childs.file("/child", 0o644, "child\n");
    childs.assert_same(&Tree::of_image(&engine, "child"), "a child built after restarts");
    let after = engine.docker_bytes(&["save", "built"]);
    assert!(
        archive::read(&after)[0].layers == images[0].layers,
        "layers have other bytes once they have children"
    );
    let both = archive::read(&engine.docker_bytes(&["save", "child"]));
    both[0].assert_digests();
    assert_eq!(both[0].layers[..images[0].layers.len()], images[0].layers[..]);

    // The classic builder on top of BuildKit's layers, and everything through save and load.
    engine.build("classic", &child, &[]);
    childs.assert_same(&Tree::of_image(&engine, "classic"), "a classic build on BuildKit's layers");
    let kept = id("built");
    engine.remove_everything();
    engine.docker_with(&["load"], saved).expect_ok();
    assert_eq!(id("built"), kept);
    expected.assert_same(&Tree::of_image(&engine, "built"), "BuildKit's image after save, rmi, load");
    engine.scrub();
}
