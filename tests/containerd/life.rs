//! Lives of snapshots over the ends of processes and of the machine; what two namespaces share; sizes and quotas.

use crate::{
    command::wait_until,
    everyday::{assert_empty, everywhere, remove_everything},
    image::{self, LARGE, MOUNT_POINTS},
    node::{Node, Release, Snapshotter},
    registry::Registry,
};
use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

everywhere! { containers_go_on_when_daemons_are_killed  containers_start_again_after_a_reboot }

/// Longest wait for something that a container does by itself.
const PATIENCE: Duration = Duration::from_secs(20);

/// Lines that a container has written so far; each must be whole and in order. Needs no daemon.
fn lines(root: &Path) -> usize {
    let text = fs::read_to_string(root.join("data/lines")).unwrap_or_default();
    for (n, line) in text.lines().enumerate() {
        assert_eq!(line, format!("line {}", n + 1), "a line of the container");
    }
    text.lines().count()
}

/// Fails unless the container goes on writing.
fn goes_on(root: &Path) {
    let before = lines(root);
    wait_until("the container's next line", PATIENCE, || (lines(root) > before).then_some(()));
}

/// A container that writes a line into `/data/lines` ten times a second.
fn start_writer(node: &Node, image: &str) -> PathBuf {
    let script = "n=0; while :; do n=$((n+1)); echo line $n >>/data/lines; sleep 0.1; done";
    node.ctr(&["run", "--detach", "--null-io", image, "writer", "/bin/sh", "-c", script]);
    node.root_of("writer")
}

fn containers_go_on_when_daemons_are_killed(release: Release, snapshotter: Snapshotter) {
    let node = Node::start(release, snapshotter);
    let image = image::full();
    let name = "example.com/full:1";
    node.import(&image.oci_archive(name), &[]);
    let root = start_writer(&node, name);
    node.run_container(name, "box", &[]);
    node.exec("box", "mkdir /work && echo w >/work/file && rm -r /data/nested");
    let mut expected = image.tree();
    expected.put_directory("/work", 0o755);
    expected.put_file("/work/file", 0o644, "w\n");
    expected.delete("/data/nested");
    for (round, victims) in [&["lcow"][..], &["containerd"], &["containerd", "lcow"]].into_iter().enumerate()
    {
        goes_on(&root);
        for victim in victims {
            if *victim == "lcow" { node.kill_lcow() } else { node.kill_containerd() }
        }
        // Without it, a container neither sees nor waits for anything.
        goes_on(&root);
        let file = format!("/work/round-{round}");
        fs::write(node.root_of_pid("box").join(&file[1..]), "while dead\n").expect("a file of the container");
        expected.put_file(&file, 0o644, "while dead\n");
        for victim in victims {
            if *victim == "lcow" { node.start_lcow() } else { node.start_containerd() }
        }
        goes_on(&root);
        node.exec("box", "echo more >>/work/file");
        let text = "w\n".to_owned() + &"more\n".repeat(round + 1);
        expected.put_file("/work/file", 0o644, text);
        let found = node.tree_of_container("box").without(MOUNT_POINTS);
        expected.without(MOUNT_POINTS).assert_same(&found, &format!("the container after round {round}"));
        let once = format!("once-{round}");
        assert_eq!(node.ctr(&["run", "--rm", name, &once, "/bin/cat", "/data/old"]), "changed");
    }
    image.tree().assert_same(&node.tree_of_image(name), "the image");
    remove_everything(&node);
    assert_empty(&node);
}

fn containers_start_again_after_a_reboot(release: Release, snapshotter: Snapshotter) {
    let mut node = Node::start(release, snapshotter);
    let image = image::full();
    let name = "example.com/full:1";
    node.import(&image.oci_archive(name), &[]);
    node.run_container(name, "box", &[]);
    node.exec(
        "box",
        "mkdir /work && echo w >/work/file && ln /work/file /work/hard && rm -r /data/nested; sync",
    );
    // A second snapshot that was written, and is committed at the last moment: whole, or not there.
    node.run_container(name, "late", &[]);
    node.exec(
        "late",
        "dd if=/dev/urandom of=/data/late bs=1M count=20 2>/dev/null; cat /data/late /data/late >/data/twice",
    );
    node.ctr(&["tasks", "kill", "--signal", "SIGKILL", "late"]);
    wait_until("the end of a task", PATIENCE, || {
        node.try_ctr(&["tasks", "delete", "late"]).ok().then_some(())
    });
    node.ctr(&["snapshots", "commit", "committed late", "late"]);
    let mut expected = image.tree();
    expected.put_directory("/work", 0o755);
    expected.put_file("/work/file", 0o644, "w\n");
    expected.put_hard_link("/work/hard", "/work/file");
    expected.delete("/data/nested");

    for boot in 1..=2 {
        node.reboot();
        node.ctr(&["tasks", "start", "--detach", "--null-io", "box"]);
        let found = node.tree_of_container("box").without(MOUNT_POINTS);
        expected.without(MOUNT_POINTS).assert_same(&found, &format!("the container after reboot {boot}"));
        let file = format!("/work/boot-{boot}");
        node.exec("box", &format!("echo {boot} >{file}; sync"));
        expected.put_file(&file, 0o644, format!("{boot}\n"));
        let once = format!("once-{boot}");
        assert_eq!(node.ctr(&["run", "--rm", name, &once, "/bin/cat", "/data/old"]), "changed");
        image.tree().assert_same(&node.tree_of_image(name), "the image after a reboot");
    }
    // Views that ctr makes are collected as garbage at once, what it prepares is not.
    let late = node.try_ctr(&["snapshots", "prepare", "on late", "committed late"]);
    if late.ok() {
        let root = node.mount("on late");
        let (once, twice) = (fs::read(root.join("data/late")), fs::read(root.join("data/twice")));
        let (once, twice) = (once.expect("late"), twice.expect("twice"));
        assert!(once.len() == 20 << 20 && twice == [&once[..], &once].concat(), "a cut snapshot has a name");
        node.unmount(&root);
        node.ctr(&["snapshots", "rm", "on late"]);
        node.ctr(&["snapshots", "rm", "committed late"]);
    } else {
        let text = late.expect_failure();
        assert!(text.contains("not found") || text.contains("does not exist"), "{text}");
        assert_eq!(snapshotter, Snapshotter::Lcow, "the control lost a snapshot");
        // containerd still has its name, and no more than that.
        let _ = node.try_ctr(&["snapshots", "rm", "committed late"]);
    }
    node.ctr(&["containers", "rm", "late"]);
    remove_everything(&node);
    assert_empty(&node);
}

/// Inodes and names of files of this name in the product's folder.
fn files(node: &Node, name: &str) -> (BTreeSet<u64>, usize) {
    let folders = node.layers();
    let found = folders.iter().filter_map(|f| fs::metadata(node.home().join(f).join(name)).ok());
    let inodes: Vec<u64> = found.map(|m| m.ino()).collect();
    (inodes.iter().copied().collect(), inodes.len())
}

#[test]
fn two_namespaces_share_one_copy_on_disk_and_in_memory() {
    let node = Node::start(Release::V2, Snapshotter::Lcow);
    let registry = Registry::start();
    let image = image::small(1);
    let name = registry.offer("shared", &image);
    let other = format!("{}-other", node.namespace());
    let pull = ["images", "pull", "--plain-http", "--snapshotter", "lcow", &name];
    node.ctr(&pull);
    let (copies, names) = files(&node, "layer.vhd");
    assert_eq!((copies.len(), names), (2, 2), "files of the first namespace's layers");
    node.ctr_in(&other, &pull);
    let (after, names) = files(&node, "layer.vhd");
    assert_eq!(after, copies, "the second namespace made copies of its own");
    assert_eq!(names, 4, "each namespace's layers have names of their own");
    // A loop device for each file, not for each name.
    let cgroup = format!("/{}/other-box", node.namespace());
    node.run_container(&name, "box", &[]);
    let run = ["run", "--detach", "--null-io", "--cgroup", &cgroup, &name, "box", "/bin/sleep", "100000"];
    node.ctr_in(&other, &run);
    let layers: Vec<_> = node.loops().into_iter().filter(|(_, file)| file.ends_with("layer.vhd")).collect();
    assert_eq!(layers.len(), 2, "loop devices of two shared layers: {layers:?}");

    // One namespace's removal is none of the other's business.
    remove_everything(&node);
    assert_eq!(files(&node, "layer.vhd").1, 2);
    let text = node.ctr_in(
        &other,
        &["tasks", "exec", "--exec-id", "e", "box", "/bin/sh", "-c", "cat /data/seeded | wc -c"],
    );
    assert_eq!(text, "100000");
    node.ctr_in(&other, &["tasks", "kill", "--signal", "SIGKILL", "box"]);
    node.ctr_in(&other, &["tasks", "delete", "--force", "box"]);
    node.ctr_in(&other, &["containers", "rm", "box"]);
    node.ctr_in(&other, &["images", "rm", "--sync", &name]);
    assert_empty(&node);
}

/// The size that a snapshotter tells of a snapshot, in bytes.
fn usage(node: &Node, snapshotter: &str, key: &str) -> u64 {
    let text = node.ctr(&["snapshots", "--snapshotter", snapshotter, "usage", "-b", key]);
    let line = text.lines().nth(1).unwrap_or_else(|| panic!("no usage in {text}"));
    line.split_whitespace()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or_else(|| panic!("no number in {text}"))
}

#[test]
fn usage_is_what_overlayfs_would_tell() {
    let node = Node::start(Release::V2, Snapshotter::Lcow);
    let image = image::full();
    for snapshotter in ["overlayfs", "lcow"] {
        let name = format!("example.com/{snapshotter}:1");
        node.import(&image.oci_archive(&name), &["--snapshotter", snapshotter]);
        node.run_container(&name, snapshotter, &["--snapshotter", snapshotter]);
        node.exec(snapshotter, "dd if=/dev/urandom of=/data/written bs=1M count=24 2>/dev/null; sync");
    }
    // Blocks differ a little: an ext4 of ours has none for what fits an inode, and others for its journal.
    const SLACK: u64 = 256 << 10;
    for chain in image.chain_ids() {
        let (theirs, ours) = (usage(&node, "overlayfs", &chain), usage(&node, "lcow", &chain));
        assert!(ours.abs_diff(theirs) <= SLACK, "usage of {chain}: {ours}, overlayfs has {theirs}");
    }
    let (theirs, ours) = (usage(&node, "overlayfs", "overlayfs"), usage(&node, "lcow", "lcow"));
    assert!(theirs >= 24 << 20 && ours.abs_diff(theirs) <= theirs / 100 + SLACK, "{ours} and {theirs}");
    node.exec("lcow", "rm /data/written; sync");
    let less = usage(&node, "lcow", "lcow");
    assert!(less < 1 << 20, "usage after the file was deleted: {less}");
}

#[test]
fn a_label_is_a_hard_quota() {
    let node = Node::start(Release::V2, Snapshotter::Lcow);
    let image = image::small(2);
    let name = "example.com/small:1";
    node.import(&image.oci_archive(name), &[]);
    for (id, label) in [
        ("max", "containerd.io/snapshot/max-size=67108864"),
        ("own", "containerd.io/snapshot/lcow.size=64MiB"),
    ] {
        node.run_container(name, id, &["--snapshotter-label", label]);
        node.exec(id, "echo before >/data/before");
        let dd = "dd if=/dev/zero of=/data/big bs=1M count=100";
        let full = node.try_ctr(&["tasks", "exec", "--exec-id", "full", id, "/bin/sh", "-c", dd]);
        assert!(full.expect_failure().contains("No space left on device"), "{label}");
        let kept: u64 = node.exec(id, "wc -c </data/big").trim().parse().expect("a number");
        assert!((40 << 20..64 << 20).contains(&kept), "{label}: {kept} bytes fitted into 64 MiB");
        assert_eq!(
            node.exec(id, "rm /data/big && sync && echo after >/data/after; cat /data/before"),
            "before"
        );
        assert_eq!(node.exec(id, "cat /data/after"), "after", "{label}");
    }
    for bad in ["max-size=lots", "max-size=-5", "max-size=1k", "max-size=0", "lcow.size=lots", "lcow.size=1"]
    {
        let label = format!("containerd.io/snapshot/{bad}");
        let run = ["run", "--detach", "--null-io", "--snapshotter-label", &label, name, "bad", "/bin/true"];
        let failure = node.try_ctr(&run).expect_failure();
        assert!(failure.contains("not accepted"), "{bad}: {failure}");
        assert!(node.room.log_text("lcow").contains("code=InvalidArgument"), "{bad}: {failure}");
        let _ = node.try_ctr(&["containers", "rm", "bad"]);
    }
    remove_everything(&node);
    assert_empty(&node);
}

#[test]
fn mounts_of_other_snapshotters_are_left_to_the_next_differ() {
    for release in [Release::V1, Release::V2] {
        let node = Node::start(release, Snapshotter::Lcow);
        let image = image::full();
        let name = "example.com/foreign:1";
        let foreign = ["--snapshotter", "overlayfs"];
        node.import(&image.oci_archive(name), &[&foreign[..], &["--local"]].concat());
        node.run_container(name, "box", &foreign);
        node.exec("box", "echo new >/data/new-file");
        let found = node.tree_of_container("box").without(MOUNT_POINTS);
        let mut expected = image.tree();
        expected.put_file("/data/new-file", 0o644, "new\n");
        expected.without(MOUNT_POINTS).assert_same(&found, "a container of overlayfs");
        let diff = ["snapshots", "--snapshotter", "overlayfs", "diff", "--media-type", image::LAYER, "box"];
        let entries = crate::tarball::parse(&node.ctr_bytes(&diff));
        assert!(entries.iter().any(|e| e.path.ends_with(b"data/new-file")), "{entries:?}");
        assert_eq!(node.layers(), Vec::<String>::new(), "the product made layers of foreign mounts");
        assert!(entries.iter().all(|e| !e.path.ends_with(b"large")) && LARGE > 0);
    }
}

#[test]
fn a_stop_of_the_product_leaves_its_mounts() {
    let node = Node::start(Release::V2, Snapshotter::Lcow);
    let name = "example.com/small:1";
    node.import(&image::small(3).oci_archive(name), &[]);
    let root = start_writer(&node, name);
    let mounts: BTreeSet<String> = node.mounts().into_iter().collect();
    assert!(!mounts.is_empty());
    node.stop_lcow();
    goes_on(&root);
    assert_eq!(
        node.mounts().into_iter().collect::<BTreeSet<_>>(),
        mounts,
        "a stop unmounts what containers use"
    );
    // containerd asks for each snapshot that it lists, and fails while the product is stopped.
    node.try_ctr(&["snapshots", "ls"]).expect_failure();
    node.start_lcow();
    goes_on(&root);
    thread::sleep(Duration::from_millis(200));
    assert_eq!(
        node.mounts().into_iter().collect::<BTreeSet<_>>(),
        mounts,
        "a start unmounts what containers use"
    );
    assert_eq!(node.exec("writer", "wc -c </data/seeded").trim(), "100000");
    remove_everything(&node);
    assert_empty(&node);
}
