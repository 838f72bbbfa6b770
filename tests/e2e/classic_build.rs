//! Builds without BuildKit: RUN, COPY, ADD, what replaces what, the cache, `--squash`.

use crate::{
    engine::{Engine, EngineOptions},
    manifest::Tree,
    rootfs::{self, random_bytes},
    tarball::{self, Entry},
};
use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

const DOCKERFILE: &str = r#"FROM base
ENV A=b
RUN mkdir -p /app/opaque/old /app/dir && echo 1 >/app/opaque/old/one && echo 2 >/app/opaque/two && echo f >/app/file
RUN echo in >/app/dir/in && echo linked >/app/link-a && ln /app/link-a /app/link-b && chown 12:34 /app/link-a
COPY copied /app/copied
COPY --chown=1000:1001 tree /app/tree
ADD added.tar /app/added
RUN rm -rf /app/opaque && mkdir /app/opaque && echo new >/app/opaque/new
RUN rm -r /app/dir && echo "a file now" >/app/dir && rm /app/file && mkdir /app/file && echo d >/app/file/inside
RUN ln /app/link-a /app/link-c && rm /app/link-b && rm -r /data/odd /data/nested/deeper
COPY copied /app/tree/sub/replaced
WORKDIR /app/made/by/workdir
RUN chmod 4711 /app/copied && touch -d @1000000000 /app/copied && rm /data/large
"#;

/// The context of the build, and the tree that the image must show.
fn context(engine: &Engine, base: &Tree) -> (PathBuf, Tree) {
    let folder = engine.scratch("context");
    let copied = random_bytes(5, 1 << 20);
    let write = |path: &str, data: &[u8], mode: u32| {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("folder");
        fs::write(&path, data).expect("file");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("mode");
    };
    write("copied", &copied, 0o644);
    write("tree/sub/replaced", b"to be replaced", 0o600);
    write("tree/sub/stays", b"stays", 0o755);
    std::os::unix::fs::symlink("sub/stays", folder.join("tree/link")).expect("symlink");
    let added =
        [Entry::dir("top/").mode(0o700), Entry::file("top/file", "from the tar").mode(0o640).owner(7, 8)];
    write("added.tar", &tarball::build(&added), 0o644);
    write("Dockerfile", DOCKERFILE.as_bytes(), 0o644);

    let mut tree = base.clone();
    for dir in [
        "/app",
        "/app/opaque",
        "/app/file",
        "/app/added",
        "/app/made",
        "/app/made/by",
        "/app/made/by/workdir",
    ] {
        tree.dir(dir, 0o755);
    }
    tree.file("/app/opaque/new", 0o644, "new\n");
    tree.file("/app/dir", 0o644, "a file now\n");
    tree.file("/app/file/inside", 0o644, "d\n");
    let link = tree.file("/app/link-a", 0o644, "linked\n");
    (link.uid, link.gid) = (12, 34);
    tree.hard_link("/app/link-c", "/app/link-a");
    tree.file("/app/copied", 0o4711, &copied).mtime = Some((1_000_000_000, 0));
    for dir in ["/app/tree", "/app/tree/sub"] {
        let node = tree.dir(dir, 0o755);
        (node.uid, node.gid) = (1000, 1001);
    }
    let node = tree.file("/app/tree/sub/stays", 0o755, "stays");
    (node.uid, node.gid) = (1000, 1001);
    let node = tree.symlink("/app/tree/link", "sub/stays");
    (node.uid, node.gid) = (1000, 1001);
    tree.file("/app/tree/sub/replaced", 0o644, &copied);
    tree.dir("/app/added/top", 0o700);
    let node = tree.file("/app/added/top/file", 0o640, "from the tar");
    (node.uid, node.gid) = (7, 8);
    for gone in ["/data/odd", "/data/nested/deeper", "/data/large"] {
        tree.delete(gone);
    }
    (folder, tree)
}

#[test]
fn a_build_shows_what_its_steps_did_and_is_cached() {
    let (engine, base) = rootfs::engine_with(EngineOptions::default(), &rootfs::full());
    let (folder, expected) = context(&engine, &base);
    engine.build("built", &folder, &[]);
    expected.assert_same(&Tree::of_image(&engine, "built"), "the built image");
    let steps = DOCKERFILE.lines().count();
    assert_eq!(engine.docker(&["history", "-q", "built"]).lines().count(), steps);

    let id = |image: &str| engine.docker(&["inspect", "-f", "{{.Id}}", image]);
    let text = engine.build("again", &folder, &[]);
    assert_eq!(text.matches("Using cache").count(), steps - 1, "not every step came from the cache\n{text}");
    assert_eq!(id("again"), id("built"));
    // A changed file: cached up to it, and not after it.
    fs::write(folder.join("tree/sub/stays"), "changed").expect("file");
    let text = engine.build("changed", &folder, &[]);
    assert_eq!(text.matches("Using cache").count(), 4, "{text}");
    let mut changed = expected;
    let node = changed.file("/app/tree/sub/stays", 0o755, "changed");
    (node.uid, node.gid) = (1000, 1001);
    changed.assert_same(&Tree::of_image(&engine, "changed"), "the image of the changed context");
    // A step that fails leaves what was.
    fs::write(folder.join("Dockerfile"), "FROM built\nRUN echo x >/x && false\n").expect("Dockerfile");
    let failure = engine.build_by("0", "failed", &folder, &[]).expect_failure();
    assert!(failure.contains("returned a non-zero code: 1"), "{failure}");
    engine.docker(&["container", "prune", "-f"]);
    engine.scrub();
}

#[test]
fn squashed_images_show_the_same_in_one_layer() {
    let (engine, base) = rootfs::engine_with(EngineOptions::default(), &rootfs::full());
    let (folder, expected) = context(&engine, &base);
    if engine.has_containerd() {
        let failure = engine.build_by("0", "squashed", &folder, &["--squash"]).expect_failure();
        assert!(failure.contains("squash"), "{failure}");
        return;
    }
    engine.build("squashed", &folder, &["--squash"]);
    let layers = engine.docker(&["inspect", "-f", "{{len .RootFS.Layers}}", "squashed"]);
    assert_eq!(layers, "2", "a base and the squashed rest");
    expected.assert_same(&Tree::of_image(&engine, "squashed"), "the squashed image");
    let saved = crate::archive::read(&engine.docker_bytes(&["save", "squashed"]));
    saved[0].assert_digests();
    assert_eq!(saved[0].layers[0], tarball::build(&rootfs::full()));
    engine.scrub();
}
