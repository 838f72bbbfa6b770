//! A Diff of containers that ran under runhcs: what they wrote is in a disk of our making, below `/scratch/<container>/upper`.
//! `mke2fs` writes the file system.

use super::{Face, SIZE_GB, tar};
use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::Command,
};
use vhd_image::vhdx;

const REUSE: &str = "containerd.io/snapshot/io.microsoft.container.storage.reuse-scratch";
const OWNER: &str = "containerd.io/snapshot/io.microsoft.owner.key";
const BASE: &str = "default/2/sha256:base";

/// What the guest does with the disk: the file system of `tree`.
fn write_disk(disk: &Path, tree: &Path) {
    let image = tree.with_extension("ext4");
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-m", "0", "-d"])
        .arg(tree)
        .arg(&image)
        .arg("16M")
        .env("LC_ALL", "C")
        .output()
        .expect("this test needs mke2fs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let content = fs::read(image).unwrap();
    // The same file: others may link to it.
    let file = fs::File::options().read(true).write(true).truncate(true).open(disk).unwrap();
    let options = vhdx::CreateOptions::new(content.len() as u64, uuid::Uuid::new_v4());
    vhdx::create(&file, &options, &[(0, content)]).unwrap();
}

/// A snapshot `name` on `parent` in which a container wrote `text` to `/etc/new`; its directory.
pub(crate) async fn written(face: &Face, parent: &str, name: &str, text: &str) -> PathBuf {
    const KEY: &str = "default/3/box";
    let container = face.prepare(KEY, parent, &[(SIZE_GB, "1")]).await.unwrap();
    let tree = tempfile::tempdir().unwrap();
    let root = tree.path().join("root");
    fs::create_dir_all(root.join("scratch/box/upper/etc")).unwrap();
    fs::write(root.join("scratch/box/upper/etc/new"), text).unwrap();
    let folder = PathBuf::from(&container[0].source);
    write_disk(&folder.join("sandbox.vhdx"), &root);
    face.commit(name, KEY, &[]).await.unwrap();
    folder
}

/// The content of a file in an image.
pub(crate) fn file_in(image: &Path, path: &str) -> String {
    let shown = Command::new("debugfs").args(["-R", &format!("cat {path}")]).arg(image).output().unwrap();
    String::from_utf8(shown.stdout).unwrap()
}

/// The paths and contents of a tar's files.
pub(crate) fn files(tar: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut archive = tar::Archive::new(tar);
    let mut found = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.header().entry_type().is_file() {
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            found.push((entry.path().unwrap().display().to_string(), content));
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_diff_finds_what_each_container_of_a_pod_wrote() {
    let face = Face::start().await;
    face.unpack(BASE, "", &tar("etc/base", b"base")).await;
    let pod = face.prepare("default/3/pod-1", BASE, &[(SIZE_GB, "1")]).await.unwrap();
    let one = face.prepare("default/4/one", BASE, &[(REUSE, "true"), (OWNER, "pod-1")]).await.unwrap();
    let alone = face.prepare("default/5/alone", BASE, &[(SIZE_GB, "1")]).await.unwrap();
    let view = face.view("default/6/base", BASE).await.unwrap();

    let tree = tempfile::tempdir().unwrap();
    let shared = tree.path().join("shared");
    for (container, text) in [("pod-1", "of the pod"), ("one", "of the first")] {
        let upper = shared.join("scratch").join(container).join("upper");
        fs::create_dir_all(upper.join("etc")).unwrap();
        fs::create_dir_all(shared.join("scratch").join(container).join("work")).unwrap();
        fs::write(upper.join("etc/new"), text).unwrap();
    }
    write_disk(&Path::new(&pod[0].source).join("sandbox.vhdx"), &shared);
    let single = tree.path().join("single");
    fs::create_dir_all(single.join("scratch/alone/upper")).unwrap();
    fs::write(single.join("scratch/alone/upper/file"), "of the one").unwrap();
    write_disk(&Path::new(&alone[0].source).join("sandbox.vhdx"), &single);

    for (mounts, path, text) in
        [(pod, "etc/new", "of the pod"), (one, "etc/new", "of the first"), (alone, "file", "of the one")]
    {
        let tar = face.diff(view.clone(), mounts).await.unwrap();
        assert_eq!(files(&tar), [(path.to_owned(), text.as_bytes().to_vec())]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_container_wrote_becomes_a_layer_when_a_container_stands_on_it() {
    const WRITTEN: &str = "default/4/written";
    let face = Face::start().await;
    face.unpack(BASE, "", &tar("etc/base", b"base")).await;
    // More than an inode holds.
    let text = "written ".repeat(1000);
    let folder = written(&face, BASE, WRITTEN, &text).await;
    assert!(!folder.join("layer.vhd").exists(), "Commit converts nothing");
    let usage = face.usage(WRITTEN).await;

    // Two at once: one conversion.
    let (first, second) = tokio::join!(
        face.prepare("default/5/one", WRITTEN, &[]),
        face.prepare("default/5/two", WRITTEN, &[])
    );
    let sources: Vec<String> = [first, second]
        .map(|mounts| {
            let mount = mounts.unwrap().remove(0);
            assert_eq!(mount.options, face.lcow_layer("", "rw", &["cb", "ca"])[0].options);
            mount.source
        })
        .into();
    assert_ne!(sources[0], sources[1]);
    assert!(folder.join("layer.vhd").is_file() && folder.join("layer.exact").is_file());
    assert!(!folder.join("sandbox.vhdx").exists());
    assert_eq!(face.log().matches("making a layer of what a container wrote").count(), 1);
    assert_eq!(face.usage(WRITTEN).await, usage, "fixed at the Commit");

    // The file system of the layer is the container's difference.
    assert_eq!(file_in(&folder.join("layer.vhd"), "/etc/new"), text);
    let (view, layer) =
        (face.view("default/6/base", BASE).await, face.view("default/6/written", WRITTEN).await);
    let tar = face.diff(view.unwrap(), layer.unwrap()).await.unwrap();
    assert_eq!(files(&tar), [("etc/new".to_owned(), text.into_bytes())]);
}
