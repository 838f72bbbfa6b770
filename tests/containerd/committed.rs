//! Images that `image commit` writes, imported: what a machine wrote on the disk of an image is what a container sees.

use crate::{
    everyday::everywhere,
    image::{self, MOUNT_POINTS},
    node::{Node, Release, Snapshotter},
    tree::Tree,
};
use ext4_image::testing::Mount;
use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::Path,
    process::Command,
};

everywhere! {
    a_committed_disk_is_imported_and_run
}

fn run(args: &[&str]) {
    let done = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver")).arg("image").args(args).output();
    let done = done.expect("lcow-graphdriver");
    assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// What a machine does with its disk.
fn change(root: &Path) {
    let data = root.join("data");
    fs::write(data.join("written"), vec![7; 300_000]).expect("file");
    chown(data.join("written"), Some(5), Some(6)).expect("chown");
    fs::hard_link(data.join("written"), data.join("written-2")).expect("link");
    symlink("written", data.join("to-written")).expect("symlink");
    fs::set_permissions(data.join("old"), PermissionsExt::from_mode(0o2750)).expect("chmod");
    fs::remove_dir_all(data.join("nested")).expect("rm");
    fs::remove_file(data.join("empty")).expect("rm");
    fs::create_dir(data.join("empty")).expect("mkdir");
    fs::write(root.join("run/left-out"), "of the machine").expect("file");
}

fn a_committed_disk_is_imported_and_run(release: Release, snapshotter: Snapshotter) {
    let node = Node::start(release, snapshotter);
    let folder = tempfile::tempdir().expect("a directory");
    let path = |name: &str| folder.path().join(name).display().to_string();
    fs::write(path("base.tar"), image::full().oci_archive("example.com/base:1")).expect("archive");
    let (source, disk) = (format!("oci-archive:{}", path("base.tar")), path("disk.img"));
    run(&["pack", "--size", "128MiB", &source, &disk]);
    let mount = Mount::new(Path::new(&disk), "rw");
    change(mount.path());
    let mut tree = Tree::of_folder(mount.path()).without_times();
    tree.remove("/run/left-out");
    drop(mount);
    for (to, name) in [
        (format!("oci-archive:{}:example.com/committed:oci", path("new.tar")), "example.com/committed:oci"),
        (
            format!("docker-archive:{}:example.com/committed:docker", path("new.tar")),
            "example.com/committed:docker",
        ),
    ] {
        run(&["commit", "--compression", "zstd", "--base", &source, "--to", &to, &disk]);
        node.import(&fs::read(path("new.tar")).expect("archive"), &[]);
        tree.assert_same(&node.tree_of_image(name).without_times(), name);
        node.run_container(name, "box", &[]);
        tree.without(MOUNT_POINTS)
            .assert_same(&node.tree_of_container("box").without(MOUNT_POINTS).without_times(), "a container");
        assert_eq!(node.exec("box", "wc -c </data/written; stat -c %h /data/written"), "300000\n2");
        node.remove_container("box");
    }
}
