//! What people do with containerd every day, with contents compared, on each release, on the product and on the
//! control: import (both ways), pull, mount, run, exec, diff, commit, remove.

use crate::{
    image::{self, Image, Layer, MOUNT_POINTS},
    node::{Node, Release, Snapshotter},
    registry::Registry,
    tarball::{self, Entry},
    tree::Tree,
};
use std::time::Duration;

/// Tests that take a release and a snapshotter, for each release, on the product and on the control.
macro_rules! everywhere {
    ($($test:ident)+) => {
        $(mod $test {
            use crate::node::{Release::{V1, V2}, Snapshotter::{Lcow, Overlayfs}};
            #[test]
            fn on_1_7() {
                super::$test(V1, Lcow);
            }
            #[test]
            fn on_2() {
                super::$test(V2, Lcow);
            }
            #[test]
            fn control_on_1_7() {
                super::$test(V1, Overlayfs);
            }
            #[test]
            fn control_on_2() {
                super::$test(V2, Overlayfs);
            }
        })+
    };
}
pub(crate) use everywhere;

everywhere! {
    an_image_is_imported_run_changed_and_removed
    a_pulled_image_is_whole_and_leaves_nothing
    an_image_may_have_a_layer_twice
}

/// Longest wait for what is deleted in the background.
const GONE: Duration = Duration::from_secs(20);

/// Fails unless the namespace is empty, and, on the product, nothing of its snapshots is left on the disk.
pub(crate) fn assert_empty(node: &Node) {
    let lines = |text: &str| text.lines().count();
    assert_eq!(node.ctr(&["containers", "ls", "-q"]), "");
    assert_eq!(node.ctr(&["images", "ls", "-q"]), "");
    let begun = std::time::Instant::now();
    loop {
        let (snapshots, content) = (node.ctr(&["snapshots", "ls"]), node.ctr(&["content", "ls"]));
        if lines(&snapshots) <= 1 && lines(&content) <= 1 {
            break;
        }
        let leases = node.ctr(&["leases", "ls"]);
        assert!(begun.elapsed() < GONE, "not collected:\n{snapshots}\n{content}\nleases:\n{leases}");
        std::thread::sleep(crate::command::TICK);
    }
    if node.snapshotter == Snapshotter::Lcow {
        assert_no_debris(node);
    }
}

/// Fails if the product has mounts, loop devices or layers left, which it may delete after its answer.
pub(crate) fn assert_no_debris(node: &Node) {
    let begun = std::time::Instant::now();
    loop {
        let (mounts, loops, layers) = (node.mounts(), node.loops(), node.layers());
        if mounts.is_empty() && loops.is_empty() && layers.is_empty() {
            return;
        }
        assert!(
            begun.elapsed() < GONE,
            "left: mounts {mounts:#?}, loop devices {loops:#?}, layers {layers:#?}"
        );
        std::thread::sleep(crate::command::TICK);
    }
}

/// Removes containers and images, and collects garbage. What the product wrote into the content store is held by leases
/// of its own, which expire.
pub(crate) fn remove_everything(node: &Node) {
    for line in node.ctr(&["leases", "ls"]).lines().skip(1).filter(|l| l.starts_with("lcow-")) {
        assert!(line.contains("containerd.io/gc.expire="), "a lease without an end: {line}");
        node.ctr(&["leases", "rm", line.split_whitespace().next().expect("a lease")]);
    }
    for id in node.ctr(&["containers", "ls", "-q"]).split_whitespace() {
        node.remove_container(id);
    }
    for name in node.ctr(&["images", "ls", "-q"]).split_whitespace() {
        node.ctr(&["images", "rm", "--sync", name]);
    }
}

/// The difference of a snapshot to its parent, as a tar.
fn diff(node: &Node, snapshot: &str) -> Vec<u8> {
    node.ctr_bytes(&["snapshots", "diff", "--media-type", image::LAYER, snapshot])
}

/// A commit as clients make it: the difference becomes the layer of an image, under its digest. `None` if there is no
/// difference to be had.
pub(crate) fn commit(node: &Node, container: &str, base: &Image) -> Option<Image> {
    let gzip = format!("{}+gzip", image::LAYER);
    let run = node.try_ctr(&["snapshots", "diff", "--media-type", &gzip, container]);
    if !run.ok() {
        return None;
    }
    let mut tar = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::MultiGzDecoder::new(&run.stdout[..]), &mut tar).ok()?;
    Some(base.with(Layer::packed(tar, run.stdout, &gzip)))
}

fn an_image_is_imported_run_changed_and_removed(release: Release, snapshotter: Snapshotter) {
    let node = Node::start(release, snapshotter);
    let image = image::full();
    let tree = image.tree();
    for (name, args) in [("example.com/full:transfer", &[][..]), ("example.com/full:local", &["--local"])] {
        node.import(&image.oci_archive(name), args);
        tree.assert_same(&node.tree_of_image(name), name);
        // The second must unpack, too, and not find the first's snapshots.
        if args.is_empty() {
            node.ctr(&["images", "rm", "--sync", name]);
            assert_empty(&node);
        }
    }
    let name = "example.com/full:local";

    node.run_container(name, "box", &[]);
    tree.without(MOUNT_POINTS)
        .assert_same(&node.tree_of_container("box").without(MOUNT_POINTS), "the container");
    let printed = node.exec("box", "cat /data/old; id -u; stat -c %a /data/kept /tmp");
    assert_eq!(printed, "changed\n0\n700\n1777");
    let script = "mkdir /work && echo new >/work/new && ln /work/new /work/hard && ln -s new /work/link \
        && rm -r /data/nested && echo more >>/data/old && chmod 600 /data/new && rm /data/empty \
        && rm -r /data/opaque && mkdir /data/opaque && echo only >/data/opaque/only && mv /data/large /data/moved";
    node.exec("box", script);
    let mut changed = tree;
    changed.put_directory("/work", 0o755);
    changed.put_file("/work/new", 0o644, "new\n");
    changed.put_hard_link("/work/hard", "/work/new");
    changed.put_symlink("/work/link", "new");
    changed.delete("/data/nested");
    changed.put_file("/data/old", 0o444, "changed\nmore\n");
    changed.change("/data/new", |node| node.mode = 0o600);
    changed.0.get_mut(b"/data/new".as_slice()).expect("new").mtime = Some((4_102_444_800, 999_999_999));
    changed.delete("/data/empty");
    changed.delete("/data/opaque");
    changed.put_directory("/data/opaque", 0o755);
    changed.put_file("/data/opaque/only", 0o644, "only\n");
    let large = changed.0[b"/data/large".as_slice()].clone();
    changed.delete("/data/large");
    changed.put("/data/moved", large);
    let running = node.tree_of_container("box");
    changed.without(MOUNT_POINTS).assert_same(&running.without(MOUNT_POINTS), "the changed container");

    // What the difference says, and what becomes of it.
    let entries = tarball::parse(&diff(&node, "box"));
    let has = |path: &str| {
        entries.iter().any(|e| e.path == path.as_bytes() || e.path == format!("{path}/").as_bytes())
    };
    for path in ["work", "work/new", "data/.wh.nested", "data/.wh.empty", "data/opaque/only", "data/moved"] {
        assert!(has(path), "the diff lacks {path}: {:?}", paths(&entries));
    }
    for path in ["bin/busybox", "data/becomes-a-file", "made", "data/large-too"] {
        assert!(!has(path), "the diff has {path}, which did not change");
    }
    let committed = commit(&node, "box", &image).expect("the difference of a container");
    node.import(&committed.oci_archive("example.com/committed:1"), &[]);
    let found = node.tree_of_image("example.com/committed:1");
    // Times, too, are those of the container. containerd's own differ writes whole seconds.
    let exact = snapshotter == Snapshotter::Lcow;
    for path in ["/work/new", "/data/old", "/data/opaque/only", "/data/moved", "/data/new"] {
        let time = |tree: &Tree| tree.0[path.as_bytes()].mtime.map(|(s, n)| (s, if exact { n } else { 0 }));
        assert_eq!(time(&found), time(&running), "time of {path} in the commit");
        changed.0.get_mut(path.as_bytes()).expect("a path that changed").mtime = None;
    }
    changed.assert_same(&found, "the commit");
    node.run_container("example.com/committed:1", "child", &[]);
    assert_eq!(node.exec("child", "cat /work/hard /data/opaque/only"), "new\nonly");

    remove_everything(&node);
    assert_empty(&node);
}

/// The paths of some entries, to be shown.
fn paths(entries: &[Entry]) -> Vec<String> {
    entries.iter().map(|e| String::from_utf8_lossy(&e.path).into_owned()).collect()
}

fn a_pulled_image_is_whole_and_leaves_nothing(release: Release, snapshotter: Snapshotter) {
    let node = Node::start(release, snapshotter);
    let registry = Registry::start();
    let image = image::full();
    let name = registry.offer("full", &image);
    node.ctr(&["images", "pull", "--plain-http", "--snapshotter", snapshotter.name(), &name]);
    image.tree().assert_same(&node.tree_of_image(&name), "the pulled image");
    for (chain, layer) in image.chain_ids().iter().zip(&image.layers) {
        let info = node.ctr(&["snapshots", "info", chain]);
        assert!(info.contains("\"Kind\": \"Committed\""), "{info}");
        // Of a committed snapshot, ctr takes views of it and of its parent.
        let tar = diff(&node, chain);
        if snapshotter == Snapshotter::Lcow {
            assert_eq!(image::digest(&tar), layer.diff_id(), "the diff of {chain} is not its layer");
        }
    }
    // Of two snapshots that are not parent and child: what turns the one into the other.
    let chains = image.chain_ids();
    let (lowest, top) = (&chains[0], chains.last().expect("a layer"));
    let squashed = node.ctr_bytes(&["snapshots", "diff", "--media-type", image::LAYER, lowest, top]);
    let mut tree = Tree::default();
    tree.apply(&image.layers[0].entries);
    tree.apply(&tarball::parse(&squashed));
    let mut wanted = image.tree().without_times();
    if snapshotter == Snapshotter::Overlayfs {
        // containerd's own differ writes no attributes but capabilities.
        for tree in [&mut tree, &mut wanted] {
            tree.0.values_mut().for_each(|node| node.xattrs.retain(|name, _| !name.starts_with("user.")));
        }
    }
    wanted.assert_same(&tree, "the difference of the top to the lowest layer, applied");
    let text = node.ctr(&["run", "--rm", &name, "once", "/bin/sh", "-c", "echo $((6 * 7)); cat /data/old"]);
    assert_eq!(text, "42\nchanged");
    // A Docker archive of the same layers finds them there.
    node.import(&image.docker_archive("example.com/docker:1"), &["--local"]);
    image.tree().assert_same(&node.tree_of_image("example.com/docker:1"), "the Docker archive");
    remove_everything(&node);
    assert_empty(&node);
    // And once more: nothing of the first time is in the way.
    node.ctr(&["images", "pull", "--plain-http", "--snapshotter", snapshotter.name(), &name]);
    image.tree().assert_same(&node.tree_of_image(&name), "the image, pulled again");
}

/// Old images have the empty layer several times, and a build may make equal layers; overlayfs refuses a directory that it
/// has already.
fn an_image_may_have_a_layer_twice(release: Release, snapshotter: Snapshotter) {
    let node = Node::start(release, snapshotter);
    let registry = Registry::start();
    let image = image::repeated();
    let name = registry.offer("repeated", &image);
    node.ctr(&["images", "pull", "--plain-http", "--snapshotter", snapshotter.name(), &name]);
    image.tree().assert_same(&node.tree_of_image(&name), "an image with equal layers");
    if snapshotter == Snapshotter::Lcow {
        for (chain, layer) in image.chain_ids().iter().zip(&image.layers) {
            assert_eq!(image::digest(&diff(&node, chain)), layer.diff_id(), "the diff of {chain}");
        }
    }
    let text =
        node.ctr(&["run", "--rm", &name, "once", "/bin/sh", "-c", "cat /data/one /data/two; ls /data"]);
    assert_eq!(text, "first\nsecond\none\ntwo");
    remove_everything(&node);
    assert_empty(&node);
}
