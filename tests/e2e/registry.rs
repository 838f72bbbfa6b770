//! Push to a registry on loopback and pull again: the engine verifies every layer's digest on both ways, and keeps no
//! tar data of its own, since the driver reproduces exact diffs.

use crate::{
    archive,
    command::wait_until,
    engine::EngineOptions,
    manifest::Tree,
    rootfs::{self, random_bytes},
};
use std::{fs, net::TcpListener, time::Duration};

/// Longest wait for the registry's port.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn push_and_pull_keep_every_digest_and_the_engine_stores_no_tar_split() {
    let (engine, _) = rootfs::engine_with(EngineOptions::default(), &rootfs::full());
    let context = engine.scratch("context");
    fs::write(context.join("large"), random_bytes(11, 3_000_000)).expect("file");
    let dockerfile =
        "FROM base\nCOPY large /data/large\nRUN rm -r /data/odd && ln /data/large /data/large-2\n";
    fs::write(context.join("Dockerfile"), dockerfile).expect("Dockerfile");
    engine.build("built", &context, &[]);

    // A port that is free now; the kernel does not hand it out again at once.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
    let config = engine.scratch("registry").join("config.yml");
    let storage = engine.scratch("registry-data");
    fs::write(
        &config,
        format!(
            "version: 0.1\nlog:\n  level: warn\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    \
             enabled: true\nhttp:\n  addr: 127.0.0.1:{port}\n",
            storage.display()
        ),
    )
    .expect("configuration");
    let _registry = engine.spawn(&["docker-registry", "serve", config.to_str().expect("UTF-8")]);
    wait_until("the registry", PATIENCE, || std::net::TcpStream::connect(("127.0.0.1", port)).ok());

    let name = format!("127.0.0.1:{port}/built");
    engine.docker(&["tag", "built", &name]);
    let facts = |what: &str, name: &str| engine.docker(&["inspect", "-f", what, name]);
    let (id, roots) = (facts("{{.Id}}", "built"), facts("{{json .RootFS}}", "built"));
    // The engine itself writes into /etc of every container that it starts.
    let tree_of = |name: &str| Tree::of_image(&engine, name).except_times_of(&["/etc"]);
    let (tree, saved) = (tree_of("built"), engine.docker_bytes(&["save", "built"]));
    engine.docker(&["push", &name]);
    engine.remove_everything();
    engine.docker(&["pull", &name]);
    assert_eq!((facts("{{.Id}}", &name), facts("{{json .RootFS}}", &name)), (id, roots));
    tree.assert_same(&tree_of(&name), "after push and pull");
    let (before, after) = (archive::read(&saved), archive::read(&engine.docker_bytes(&["save", &name])));
    after[0].assert_digests();
    assert!(before[0].layers == after[0].layers, "layers have other bytes after push and pull");
    if engine.is_lcow() && !engine.has_containerd() {
        let notes = engine.data_root().join("image/lcow/layerdb/sha256");
        let layers =
            fs::read_dir(&notes).expect("the engine's notes of layers").flatten().collect::<Vec<_>>();
        assert_eq!(layers.len(), 3);
        for layer in layers {
            assert!(layer.path().join("diff").exists(), "{} is no note of a layer", layer.path().display());
            assert!(!layer.path().join("tar-split.json.gz").exists(), "the engine keeps tar data of its own");
        }
    }
    engine.scrub();
}
