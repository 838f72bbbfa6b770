//! An image becomes a disk, a kernel writes to it, and `image commit` makes an image of it that the engine loads and runs.

use crate::{
    engine::EngineOptions,
    manifest::Tree,
    rootfs::{self, random_bytes},
};
use ext4_image::testing::Mount;
use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::Path,
    process::Command,
};

fn image(args: &[&str]) {
    let done = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver")).arg("image").args(args).output();
    let done = done.expect("lcow-graphdriver");
    assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// What a machine does with its disk.
fn change(root: &Path) {
    let data = root.join("data");
    fs::write(data.join("empty"), "no longer").expect("file");
    fs::write(data.join("written"), random_bytes(5, 500_000)).expect("file");
    chown(data.join("written"), Some(1000), Some(1001)).expect("chown");
    fs::hard_link(data.join("written"), data.join("written-2")).expect("link");
    symlink("written", data.join("to-written")).expect("symlink");
    fs::set_permissions(data.join("linked"), PermissionsExt::from_mode(0o4755)).expect("chmod");
    fs::remove_dir_all(data.join("odd")).expect("rm");
    fs::remove_file(data.join("large")).expect("rm");
    fs::create_dir(data.join("large")).expect("mkdir");
    fs::write(root.join("proc/left-out"), "").expect("file");
}

#[test]
fn a_committed_disk_is_loaded_and_run() {
    let (engine, mut tree) = rootfs::engine_with(EngineOptions::default(), &rootfs::full());
    let folder = tempfile::tempdir().expect("a directory");
    let path = |name: &str| folder.path().join(name).display().to_string();
    fs::write(path("base.tar"), engine.docker_bytes(&["save", "base"])).expect("archive");
    let (source, disk) = (format!("docker-archive:{}", path("base.tar")), path("disk.img"));
    image(&["pack", "--size", "128MiB", &source, &disk]);
    let mount = Mount::new(Path::new(&disk), "rw");
    change(mount.path());
    drop(mount);

    tree.file("/data/empty", 0o644, "no longer");
    let written = tree.file("/data/written", 0o644, random_bytes(5, 500_000));
    (written.uid, written.gid) = (1000, 1001);
    tree.hard_link("/data/written-2", "/data/written");
    tree.symlink("/data/to-written", "written");
    for name in ["/data/linked", "/data/linked-2", "/data/nested/linked-3"] {
        tree.0.get_mut(name.as_bytes()).expect("a name").mode = 0o4755;
    }
    tree.delete("/data/odd");
    tree.delete("/data/large");
    tree.dir("/data/large", 0o755);

    for compression in ["gzip", "none"] {
        let name = format!("committed:{compression}");
        let to = format!("docker-archive:{}:{name}", path("committed.tar"));
        image(&["commit", "--compression", compression, "--base", &source, "--to", &to, &disk]);
        let saved = fs::read(path("committed.tar")).expect("archive");
        engine.docker_with(&["load"], saved).expect_ok();
        tree.assert_same(&Tree::of_image(&engine, &name), &name);
        let printed = engine.shell(&name, "cat /data/empty; stat -c '%u %h' /data/written");
        assert_eq!(printed, "no longer1000 2", "{name}");
        engine.docker(&["rmi", &name]);
    }
    engine.scrub();
}
