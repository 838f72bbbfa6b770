//! Status codes, names, times, labels and filters of the snapshot service, by a client that is not containerd's. The
//! control is containerd's own service with its overlayfs.

use crate::{
    client::{Client, assert_code, mount},
    node::{Node, Release, Snapshotter},
};
use containerd_api::snapshots::Info;
use std::collections::BTreeMap;
use tonic::Code::{AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unimplemented, Unknown};

/// Kinds of snapshots, by their numbers in snapshots.proto.
const VIEW: i32 = 1;
const ACTIVE: i32 = 2;
const COMMITTED: i32 = 3;
/// A label that keeps a snapshot from containerd's garbage collection.
const ROOT: (&str, &str) = ("containerd.io/gc.root", "2026-01-01T00:00:00Z");

/// A node, and a client of the service that the test is about.
fn client(snapshotter: Snapshotter) -> (Node, Client) {
    let node = Node::start(Release::V2, snapshotter);
    let socket = match snapshotter {
        Snapshotter::Lcow => node.lcow_socket(),
        Snapshotter::Overlayfs => node.containerd_socket(),
    };
    let client = Client::new(&socket, snapshotter.name(), node.namespace());
    (node, client)
}

macro_rules! with_control {
    ($($test:ident)+) => {
        $(mod $test {
            #[test]
            fn on_the_product() {
                super::$test(crate::node::Snapshotter::Lcow);
            }
            #[test]
            fn control() {
                super::$test(crate::node::Snapshotter::Overlayfs);
            }
        })+
    };
}

with_control! { every_call_has_its_code  names_are_free_text  labels_and_times_are_kept }

fn every_call_has_its_code(snapshotter: Snapshotter) {
    let (node, client) = client(snapshotter);
    client.prepare("active", "", &[ROOT]).expect("prepare");
    client.prepare("to-commit", "", &[ROOT]).expect("prepare");
    client.commit("base", "to-commit", "", &[ROOT]).expect("commit");
    client.view("a view", "base").expect("view");

    // One space of names for keys and names.
    for name in ["active", "base", "a view"] {
        assert_code(client.prepare(name, "", &[]), AlreadyExists, name);
        assert_code(client.view(name, "base"), AlreadyExists, name);
    }
    assert_code(client.prepare("new", "no such", &[]), NotFound, "prepare on an unknown parent");
    assert_code(client.view("new", "no such"), NotFound, "view of an unknown parent");
    assert_code(client.prepare("new", "active", &[]), InvalidArgument, "prepare on an active snapshot");
    assert_code(client.view("new", "a view"), InvalidArgument, "view of a view");
    assert_code(client.stat("new"), NotFound, "a snapshot that was refused");

    assert_code(client.mounts("no such"), NotFound, "mounts of an unknown key");
    assert_code(client.mounts("base"), FailedPrecondition, "mounts of a committed snapshot");

    assert_code(client.commit("base", "active", "", &[]), AlreadyExists, "commit under a name that exists");
    assert_code(client.commit("new", "no such", "", &[]), NotFound, "commit of an unknown key");
    assert_code(client.commit("new", "a view", "", &[]), FailedPrecondition, "commit of a view");
    assert_code(client.commit("new", "base", "", &[]), FailedPrecondition, "commit of what is committed");
    assert_code(client.commit("new", "to-commit", "", &[]), NotFound, "commit of a key that has gone");

    client.prepare("child", "base", &[ROOT]).expect("prepare");
    assert_code(client.remove("base"), FailedPrecondition, "remove of a parent");
    for call in ["remove", "stat", "usage", "update"] {
        match call {
            "remove" => assert_code(client.remove("no such"), NotFound, call),
            "stat" => assert_code(client.stat("no such"), NotFound, call),
            "usage" => assert_code(client.usage("no such"), NotFound, call),
            _ => assert_code(client.update("no such", &[("a", "b")], &["labels"]), NotFound, call),
        }
    }
    for mask in ["parent", "kind", "created_at", "nonsense", "label.a"] {
        assert_code(client.update("active", &[], &[mask]), InvalidArgument, &format!("update of {mask}"));
    }
    // containerd's own service has the right text, but loses the code.
    let refused = if snapshotter == Snapshotter::Lcow { InvalidArgument } else { Unknown };
    for filter in ["labels.\"", "kind=active", "name==\""] {
        assert_code(client.list(&[filter]), refused, &format!("the filter {filter}"));
    }
    // containerd finds nothing by a pattern that is none.
    if snapshotter == Snapshotter::Lcow {
        assert_code(client.list(&["name~=["]), InvalidArgument, "a pattern without an end");
    }
    let long = "l".repeat(4096);
    assert_code(client.prepare("new", "", &[("key", &long)]), InvalidArgument, "a label of 4099 bytes");

    if snapshotter == Snapshotter::Lcow {
        // containerd's own service does not pass these on.
        client.cleanup().expect("cleanup");
        client.prepare("rebased", "", &[]).expect("prepare");
        assert_code(client.commit("new", "rebased", "no such", &[]), NotFound, "rebase to an unknown parent");
        assert_code(
            client.commit("new", "rebased", "active", &[]),
            FailedPrecondition,
            "rebase to an active one",
        );
        assert_code(
            client.commit("new", "child", "other", &[]),
            InvalidArgument,
            "commit with another parent",
        );
        client.commit("new", "rebased", "base", &[]).expect("rebase");
        assert_eq!(client.stat("new").expect("stat").parent, "base");
        assert_code(client.remove("base"), FailedPrecondition, "remove of a parent by rebase");
        client.remove("new").expect("remove");
    }
    for key in ["child", "a view", "active", "base"] {
        client.remove(key).expect(key);
        assert_code(client.stat(key), NotFound, key);
    }
    assert_eq!(client.list(&[]).expect("list"), Vec::new());
    drop(node);
}

fn names_are_free_text(snapshotter: Snapshotter) {
    let (node, client) = client(snapshotter);
    let long = format!("sha256:{}", "0123456789".repeat(30));
    let names = [
        "extract-617573825-32Yj sha256:3411",
        "moby/7/48bf-init-key",
        "/tmp/x",
        "../../../../etc/passwd",
        "..",
        "with \"quotes\", 'commas', \\ and %2e%2e%2f",
        "\u{fc}ml\u{e4}ut \u{65e5}\u{672c} \u{1f40b}",
        "two\nlines\t",
        "con:nul|?*<>",
        &long,
    ];
    for name in names {
        client.prepare(name, "", &[ROOT]).unwrap_or_else(|e| panic!("{name:?}: {e}"));
        assert_eq!(client.stat(name).expect(name).name, name);
        let committed = format!("committed {name}");
        client.commit(&committed, name, "", &[ROOT]).unwrap_or_else(|e| panic!("{name:?}: {e}"));
        client.prepare(name, &committed, &[ROOT]).expect("the key is free again");
        assert_eq!(client.stat(name).expect(name).parent, committed);
    }
    // Names survive, as their snapshots do.
    let mut before = client.list(&[]).expect("list");
    node.kill_lcow();
    node.start_lcow();
    let mut after = client.list(&[]).expect("list");
    for list in [&mut before, &mut after] {
        list.sort_by(|a, b| a.name.cmp(&b.name));
    }
    assert_eq!(before.len(), 2 * names.len());
    assert_eq!(before, after, "after a kill");
    assert!(std::fs::read_dir(node.room.folder()).expect("folder").flatten().all(|e| e.file_name() != "etc"));
}

/// The nanoseconds since 1970 of a time in a reply.
fn nanos(time: Option<prost_types::Timestamp>) -> i128 {
    let time = time.expect("a time");
    i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos)
}

fn labels_and_times_are_kept(snapshotter: Snapshotter) {
    let (node, client) = client(snapshotter);
    let with = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> { crate::client::labels(pairs) };
    client.prepare("key", "", &[ROOT, ("a", "1"), ("b", "2")]).expect("prepare");
    let info = client.stat("key").expect("stat");
    assert_eq!((info.kind, info.labels.clone()), (ACTIVE, with(&[ROOT, ("a", "1"), ("b", "2")])));
    assert_eq!(nanos(info.created_at), nanos(info.updated_at), "times of a new snapshot");

    let one = client.update("key", &[("a", "3"), ("c", "4")], &["labels.a"]).expect("update of one label");
    assert_eq!(one.labels, with(&[ROOT, ("a", "3"), ("b", "2")]));
    assert_eq!(nanos(one.created_at), nanos(info.created_at));
    assert!(nanos(one.updated_at) > nanos(info.updated_at), "an update has a time");
    let gone = client.update("key", &[], &["labels.b"]).expect("deletion of one label");
    assert_eq!(gone.labels, with(&[ROOT, ("a", "3")]));
    let all = client.update("key", &[ROOT, ("d", "5")], &["labels"]).expect("update of all labels");
    assert_eq!(all.labels, with(&[ROOT, ("d", "5")]));
    let masked = client.update("key", &[ROOT, ("e", "6")], &[]).expect("update without a mask");
    assert_eq!(masked.labels, with(&[ROOT, ("e", "6")]));
    assert_eq!(client.stat("key").expect("stat"), masked);

    // Nothing is inherited by a name.
    client.commit("name", "key", "", &[ROOT, ("of", "the name")]).expect("commit");
    let committed = client.stat("name").expect("stat");
    assert_eq!((committed.kind, committed.labels.clone()), (COMMITTED, with(&[ROOT, ("of", "the name")])));
    assert_eq!(nanos(committed.created_at), nanos(committed.updated_at), "times of a new name");
    assert!(nanos(committed.created_at) > nanos(info.created_at));
    client.view("view", "name").expect("view");
    assert_eq!(client.stat("view").expect("stat").kind, VIEW);
    if snapshotter == Snapshotter::Lcow {
        node.kill_lcow();
        node.start_lcow();
        assert_eq!(client.stat("name").expect("stat"), committed, "after a kill");
    }
    let names = |filters: &[&str]| -> Vec<String> {
        let mut names: Vec<String> =
            client.list(filters).expect("list").into_iter().map(|info: Info| info.name).collect();
        names.sort();
        names
    };
    assert_eq!(names(&[]), ["name", "view"]);
    assert_eq!(names(&["parent==name"]), ["view"]);
    assert_eq!(names(&["kind==committed,labels.of==\"the name\""]), ["name"]);
    assert_eq!(names(&["name==view", "name==name"]), ["name", "view"]);
    assert_eq!(names(&["name~=\"^vi\""]), ["view"]);
    assert_eq!(names(&["labels.of"]), ["name"]);
    assert_eq!(names(&["labels.of!=x,kind!=view"]), ["name"]);
    assert_eq!(names(&["labels.\"containerd.io/gc.root\"", "kind==view"]), ["name", "view"]);
}

#[test]
fn mounts_that_are_not_ours_are_left_to_others() {
    let (node, client) = client(Snapshotter::Lcow);
    let canary = node.scratch("canary");
    std::fs::write(canary.join("layer.vhd"), "the host's own").expect("file");
    let outside = canary.to_str().expect("UTF-8");
    let up = format!("{}/../scratch/canary", node.home().display());
    let digest = crate::image::digest(b"x");
    let foreign = [
        vec![mount("bind", outside, &["rw", "rbind"])],
        vec![mount("overlay", "overlay", &[&format!("upperdir={outside}"), "workdir=/w", "lowerdir=/a:/b"])],
        vec![mount("ext4", "/dev/loop0", &["rw"])],
        vec![mount("lcow-layer", outside, &["rw", "parentLayerPaths=[]"])],
        vec![mount("lcow-layer", &up, &["rw", "parentLayerPaths=[]"])],
        vec![mount("lcow-layer", "", &["rw"])],
        vec![mount("", "", &[])],
        vec![mount("lcow-layer", outside, &["rw", "parentLayerPaths=not JSON"]); 2],
    ];
    for mounts in foreign {
        let what = format!("{mounts:?}");
        let blob = crate::client::descriptor(crate::image::LAYER, &digest, 1);
        assert_code(client.apply(blob, mounts.clone()), Unimplemented, &format!("apply to {what}"));
        assert_code(
            client.diff(Vec::new(), mounts, crate::image::LAYER),
            Unimplemented,
            &format!("diff of {what}"),
        );
    }
    assert_eq!(std::fs::read(canary.join("layer.vhd")).expect("canary"), b"the host's own");
    assert_eq!(std::fs::read_dir(&canary).expect("canary").count(), 1);
    assert_eq!(node.layers(), Vec::<String>::new());
}
