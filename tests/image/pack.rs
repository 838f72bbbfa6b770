//! `image pack` on real files: what the kernel and the tools of each format make of the disk, and that outputs appear
//! together or not at all.

use ext4_image::testing::{Mount, fsck};
use oci_image::testing::{Packing, Store, Tar, archive, directory};
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// A directory with an image: three layers, packed in three ways, of which the top one hides and replaces.
struct Scene {
    dir: tempfile::TempDir,
}

fn store() -> Store {
    let noise =
        |len: usize, seed: u8| -> Vec<u8> { (0..len).map(|i| (i * 31 + i / 251) as u8 ^ seed).collect() };
    let mut base = Tar::default();
    base.dir("etc")
        .file("etc/passwd", b"root:x:0:0::/:/bin/sh\n")
        .dir("usr")
        .file("usr/big", &noise(3_000_000, 1));
    base.file("gone", &noise(2_000_000, 2)).link("usr/same", "usr/big").symlink("link", "etc/passwd");
    let mut middle = Tar::default();
    middle.file("etc/motd", b"hello\n").file("usr/late", &noise(100_000, 3));
    let mut top = Tar::default();
    top.whiteout("", "gone").file("etc/motd", b"good day\n").file("usr/program", b"#!/bin/sh\n");
    let layers: Vec<Vec<u8>> = [base, middle, top].iter().map(Tar::finish).collect();
    let packings = [Packing::Gzip, Packing::Zstd, Packing::Plain];
    let layers: Vec<(&[u8], Packing)> = layers.iter().map(Vec::as_slice).zip(packings).collect();
    let mut store = Store::default();
    let manifest = store.manifest("linux/amd64", &layers);
    store.list(manifest, "test");
    store
}

impl Scene {
    fn new() -> Self {
        let scene = Self { dir: tempfile::tempdir().unwrap() };
        directory(&scene.path("layout"), &store().files());
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Packs the layout into `out`.
    fn pack(&self, out: &str, options: &[&str]) -> Output {
        let source = format!("oci:{}", self.path("layout").display());
        self.pack_from(&source, out, options)
    }

    fn pack_from(&self, source: &str, out: &str, options: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
            .args(["image", "pack"])
            .args(options)
            .arg(source)
            .arg(self.path(out))
            .env_remove("SOURCE_DATE_EPOCH")
            .output()
            .unwrap()
    }

    /// Packs, and gives what `--json` prints.
    fn packed(&self, out: &str, options: &[&str]) -> serde_json::Value {
        let done = self.pack(out, &[&["--json"], options].concat());
        assert!(done.status.success(), "{options:?}: {}", String::from_utf8_lossy(&done.stderr));
        serde_json::from_slice(&done.stdout).unwrap()
    }
}

pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("this test needs {program}: {e}"));
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{program} {args:?}: {}{said}", String::from_utf8_lossy(&out.stdout));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn is_the_image(root: &Path) {
    assert_eq!(fs::read(root.join("etc/motd")).unwrap(), b"good day\n");
    assert_eq!(fs::read(root.join("link")).unwrap(), b"root:x:0:0::/:/bin/sh\n");
    assert!(!root.join("gone").exists());
    let (big, same) =
        (fs::metadata(root.join("usr/big")).unwrap(), fs::metadata(root.join("usr/same")).unwrap());
    assert_eq!((big.ino(), big.len(), big.nlink()), (same.ino(), 3_000_000, 2));
    assert_eq!(fs::metadata(root.join("usr/late")).unwrap().len(), 100_000);
}

#[test]
fn a_read_only_disk_ends_with_its_content() {
    let scene = Scene::new();
    let facts = scene.packed("disk.img", &[]);
    let disk = scene.path("disk.img");
    fsck(&disk);
    assert!(fs::metadata(&disk).unwrap().len() < 3_600_000, "the hidden file is not in it");
    assert_eq!(facts["packed"]["shadowed_files"], 2);
    assert_eq!(facts["config"]["Entrypoint"][0], "/init");
    assert_eq!(facts["image"]["layers"].as_array().unwrap().len(), 3);
    let mount = Mount::new(&disk, "ro");
    is_the_image(mount.path());
    let beside: serde_json::Value =
        serde_json::from_slice(&fs::read(scene.path("disk.img.json")).unwrap()).unwrap();
    assert_eq!(beside, facts);
}

#[test]
fn a_writable_disk_takes_more_and_is_clean_afterwards() {
    let scene = Scene::new();
    for (out, options) in [("a.img", ["--size", "300MiB"]), ("b.img", ["--headroom", "100%"])] {
        scene.packed(out, &options);
        fsck(&scene.path(out));
        let mount = Mount::new(&scene.path(out), "rw");
        is_the_image(mount.path());
        fs::write(mount.path().join("new"), vec![7; 1_000_000]).unwrap();
        drop(mount);
        fsck(&scene.path(out));
    }
}

#[test]
fn the_same_image_gives_the_same_bytes_in_every_format() {
    let scene = Scene::new();
    let archived = scene.path("archive");
    fs::write(&archived, archive(&store().files())).unwrap();
    for format in ["img", "vhd", "vhdx", "qcow2"] {
        for options in [&["--size", "64MiB"][..], &["--block-size", "4KiB"]] {
            scene.packed(&format!("a.{format}"), options);
            let source = format!("oci-archive:{}", archived.display());
            let again = scene.pack_from(&source, &format!("b.{format}"), options);
            assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
            for suffix in ["", ".b3sums.zst"] {
                let read = |name: &str| fs::read(scene.path(&format!("{name}.{format}{suffix}"))).unwrap();
                assert!(read("a") == read("b"), "{format} {options:?} {suffix}");
            }
        }
    }
}

#[test]
fn every_format_holds_the_same_disk() {
    let scene = Scene::new();
    scene.packed("disk.img", &["--size", "200MiB"]);
    for (format, name) in [("vhdx", "vhdx"), ("qcow2", "qcow2"), ("vhd", "vpc")] {
        let out = scene.path(&format!("disk.{format}"));
        scene.packed(&format!("disk.{format}"), &["--size", "200MiB"]);
        let (raw, out) = (scene.path("disk.img").display().to_string(), out.display().to_string());
        if format == "qcow2" {
            run("qemu-img", &["check", &out]);
        }
        if format == "vhd" {
            // qemu-img rounds the size of such a disk by its geometry.
            let (a, b) = (fs::read(&raw).unwrap(), fs::read(&out).unwrap());
            assert!(a[..] == b[..a.len()] && b.len() == a.len() + 512);
        } else {
            run("qemu-img", &["compare", "-f", "raw", "-F", name, &raw, &out]);
        }
    }
}

#[test]
fn the_list_of_files_holds_for_the_mounted_disk() {
    let scene = Scene::new();
    let facts = scene.packed("disk.img", &[]);
    let list = zstd::decode_all(&fs::read(scene.path("disk.img.b3sums.zst")).unwrap()[..]).unwrap();
    let list = String::from_utf8(list).unwrap();
    let mount = Mount::new(&scene.path("disk.img"), "ro");
    let mut names = Vec::new();
    for line in list.lines() {
        let (hex, path) = line.split_once("  ").unwrap();
        let bytes = fs::read(mount.path().join(path)).unwrap();
        assert_eq!(blake3::hash(&bytes).to_hex().as_str(), hex, "{path}");
        names.push(path);
    }
    assert_eq!(names, ["etc/motd", "etc/passwd", "usr/big", "usr/late", "usr/program", "usr/same"]);
    assert_eq!(facts["files_listed"], 6);
}

#[test]
fn a_hash_tree_is_what_veritysetup_computes() {
    let scene = Scene::new();
    let facts = scene.packed("disk.img", &["--verity"]);
    let (root, offset) = (facts["verity"]["root_hash"].as_str().unwrap(), &facts["verity"]["hash_offset"]);
    let disk = scene.path("disk.img").display().to_string();
    run("veritysetup", &["verify", &disk, &disk, root, "--hash-offset", &offset.to_string()]);
}

#[test]
fn the_checksum_is_that_of_sha256sum() {
    let scene = Scene::new();
    let sums = scene.path("SHA256").display().to_string();
    scene.packed("disk.img", &["--sha256", &sums]);
    let text = run("sha256sum", &[&scene.path("disk.img").display().to_string()]);
    let (hex, _) = text.split_once(' ').unwrap();
    assert_eq!(fs::read_to_string(&sums).unwrap(), format!("{hex}  disk.img\n"));
}

#[test]
fn nothing_appears_where_something_is_missing() {
    let scene = Scene::new();
    let left = |scene: &Scene| {
        let mut names: Vec<String> = fs::read_dir(scene.dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let done = scene.pack("disk.img", &["--require-init", "/sbin/init"]);
    assert_eq!(done.status.code(), Some(1));
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(said.contains("/sbin/init"), "{said}");
    // A program that is there, but not executable.
    assert!(!scene.pack("disk.img", &["--require-init", "/usr/program"]).status.success());
    let full = scene.pack("disk.img", &["--size", "16MiB", "--journal", "14MiB"]);
    assert!(!full.status.success());
    assert_eq!(left(&scene), ["layout"]);
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    let scene = Scene::new();
    for options in [
        &["--size", "64MiB", "--headroom", "5%"][..],
        &["--size", "64MiB", "--verity"],
        &["--size", "64MiB", "--block-size", "1KiB"],
        &["--journal", "8MiB"],
        &["--gid-map", "0:1:1"],
        &["--headroom", "5"],
        &["--uid-map", "0:1"],
    ] {
        assert!(!scene.pack("disk.img", options).status.success(), "{options:?}");
    }
    assert!(!scene.pack("disk.unknown", &[]).status.success());
    assert!(scene.pack("disk.unknown", &["--format", "raw"]).status.success());
}

#[test]
fn owners_are_shifted() {
    let scene = Scene::new();
    scene.packed("disk.img", &["--uid-map", "0:100000:65536"]);
    let mount = Mount::new(&scene.path("disk.img"), "ro");
    let passwd = fs::metadata(mount.path().join("etc/passwd")).unwrap();
    assert_eq!((passwd.uid(), passwd.gid()), (100_000, 100_000));
    let outside = scene.pack("other.img", &["--uid-map", "1:100000:65536"]);
    assert!(!outside.status.success());
    let said = String::from_utf8_lossy(&outside.stderr).into_owned();
    assert!(said.contains("--uid-map") && said.contains("layer"), "{said}");
}

#[test]
fn layers_stack_to_the_image() {
    let scene = Scene::new();
    scene.packed("layers", &["--layers"]);
    let list: serde_json::Value =
        serde_json::from_slice(&fs::read(scene.path("layers/layers.json")).unwrap()).unwrap();
    let files: Vec<PathBuf> = list["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| scene.path("layers").join(layer["file"].as_str().unwrap()))
        .collect();
    assert_eq!(files.len(), 3);
    let mounts: Vec<Mount> = files.iter().map(|file| Mount::new(file, "ro")).collect();
    let lowers: Vec<String> = mounts.iter().rev().map(|m| m.path().display().to_string()).collect();
    let point = scene.path("merged");
    fs::create_dir(&point).unwrap();
    run(
        "mount",
        &[
            "-t",
            "overlay",
            "overlay",
            "-o",
            &format!("ro,lowerdir={}", lowers.join(":")),
            &point.display().to_string(),
        ],
    );
    let merged = Overlay(point);
    is_the_image(&merged.0);
    drop(merged);
    assert!(!scene.pack("layers", &["--layers"]).status.success(), "an existing directory is not replaced");
}

/// A mount that goes with the test.
struct Overlay(PathBuf);

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
