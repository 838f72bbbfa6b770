//! `image commit`: a disk is made of an image, written by a kernel, and its changes come back as a layer.

use crate::{Scene, fails, image, json, ok, text};
use oci_image::testing::{Packing, Store, Tar};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::Path,
    process::Command,
};

/// A mount that ends with the test.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

fn run(command: &mut Command) {
    let done = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}; see scripts/install-deps test"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A layout with an image of two layers, and a writable disk of it.
fn disk(scene: &Scene) -> (String, String) {
    disk_with(scene, Packing::Zstd)
}

/// The same, with the upper layer packed in another way.
fn disk_with(scene: &Scene, packing: Packing) -> (String, String) {
    let lower = Tar::default()
        .dir("etc")
        .file("etc/same", b"same")
        .file("etc/content", b"old!")
        .file("etc/gone", b"x")
        .file("etc/mode", b"m")
        .dir("tree")
        .file("tree/a", b"a")
        .dir("proc")
        .dir("run")
        .finish();
    let upper = Tar::default().file("etc/upper", b"u").link("etc/link", "etc/upper").finish();
    let mut store = Store::default();
    let manifest = store.manifest("linux/amd64", &[(&lower, Packing::Gzip), (&upper, packing)]);
    store.list(manifest, "base");
    let source = format!("{}:base", scene.layout("layout", &store));
    let disk = scene.path("disk.img").into_os_string().into_string().unwrap();
    ok_quiet(&["pack", "--size", "64MiB", &source, &disk]);
    (source, disk)
}

fn ok_quiet(arguments: &[&str]) {
    drop(ok(arguments));
}

/// What a machine does with its disk.
fn change(scene: &Scene, disk: &str, work: impl FnOnce(&Path)) {
    let at = scene.path("mnt");
    fs::create_dir_all(&at).unwrap();
    run(Command::new("mount").args(["-o", "loop", disk]).arg(&at));
    let mounted = Mounted(&at);
    work(&at);
    drop(mounted);
}

/// The usual changes.
fn usual(root: &Path) {
    let content = root.join("etc/content");
    let times = fs::metadata(&content).unwrap();
    // The same size and the same time: only the bytes tell.
    fs::write(&content, "new!").unwrap();
    let file = fs::File::options().write(true).open(&content).unwrap();
    file.set_modified(times.modified().unwrap()).unwrap();
    fs::remove_file(root.join("etc/gone")).unwrap();
    fs::set_permissions(root.join("etc/mode"), fs::Permissions::from_mode(0o4700)).unwrap();
    fs::remove_dir_all(root.join("tree")).unwrap();
    fs::write(root.join("tree"), "a file now").unwrap();
    fs::create_dir_all(root.join("new/deep")).unwrap();
    fs::write(root.join("new/deep/file"), vec![5; 100_000]).unwrap();
    fs::hard_link(root.join("new/deep/file"), root.join("new/link")).unwrap();
    symlink("deep/file", root.join("new/symlink")).unwrap();
    for left_out in ["proc/1", "run/pid"] {
        fs::write(root.join(left_out), "of a running system").unwrap();
    }
    fs::create_dir(root.join("lost+found")).unwrap();
}

const CHANGED: &str = "C etc/content  (content)\nD etc/gone\nC etc/mode  (mode)\nA new\nA new/deep\nA new/deep/file\nA new/link\n\
                       A new/symlink\nC tree  (type)\nD tree/a\n";

#[test]
fn what_a_kernel_wrote_comes_back_as_a_layer_everywhere() {
    let scene = Scene::new();
    let (source, disk) = disk(&scene);
    change(&scene, &disk, usual);
    let layout = format!("oci:{}:new", scene.path("layout").display());
    let fresh = format!("oci:{}:new", scene.path("fresh").display());
    let oci = format!("oci-archive:{}:new", scene.path("new.tar").display());
    let docker = format!("docker-archive:{}:test:new", scene.path("docker.tar").display());
    for (to, compression) in [(&layout, "gzip"), (&fresh, "zstd"), (&oci, "none"), (&docker, "gzip")] {
        let done =
            json(&["commit", "--json", "--compression", compression, "--base", &source, "--to", to, &disk]);
        let mut left_out: Vec<&str> =
            done["left_out"].as_array().unwrap().iter().map(|path| path.as_str().unwrap()).collect();
        left_out.sort_unstable();
        assert_eq!(left_out, ["lost+found", "proc/1", "run/pid"], "{to}");
        assert_eq!(text(&["diff", &source, to]), CHANGED, "{to}");
        let facts = json(&["inspect", "--json", to]);
        assert_eq!(facts["layers"].as_array().unwrap().len(), 3);
        assert_eq!(facts["id"], done["id"]);
        assert_eq!(facts["config"]["config"]["Entrypoint"][0], "/init");
        assert_eq!(facts["config"]["history"].as_array().unwrap().len(), 3);
    }
    assert_eq!(text(&["inspect", &source]), text(&["inspect", &source]), "the base is still there");
    // Other tools take them.
    for from in [&layout, &fresh, &oci, &docker] {
        let copy = format!("oci:{}:copy", scene.path("copy").display());
        run(Command::new("skopeo").args(["--insecure-policy", "copy", from, &copy]));
        assert_eq!(text(&["diff", from, &copy]), "");
        fs::remove_dir_all(scene.path("copy")).unwrap();
    }
    assert_eq!(scene.names().iter().filter(|name| name.starts_with('.')).count(), 0);
}

/// What is below a directory: types, attributes, contents, groups of hard links.
fn tree(root: &Path) -> BTreeMap<String, String> {
    let (mut found, mut firsts) = (BTreeMap::new(), HashMap::new());
    let mut todo = vec![root.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().display().to_string();
            let known = fs::symlink_metadata(&path).unwrap();
            let content = if known.is_dir() {
                todo.push(path);
                String::new()
            } else if known.is_symlink() {
                fs::read_link(&path).unwrap().display().to_string()
            } else {
                blake3::hash(&fs::read(&path).unwrap()).to_string()
            };
            found.insert(name, (known.mode(), known.uid(), known.gid(), known.ino(), content));
        }
    }
    let lines = found.into_iter().map(|(name, (mode, uid, gid, ino, content))| {
        let first = firsts.entry(ino).or_insert_with(|| name.clone()).clone();
        (name, format!("{mode:o} {uid} {gid} {first} {content}"))
    });
    lines.collect()
}

#[test]
fn skopeo_and_umoci_take_what_is_committed() {
    let scene = Scene::new();
    // This umoci knows no zstd.
    let (source, disk) = disk_with(&scene, Packing::Gzip);
    let mut expected = BTreeMap::new();
    change(&scene, &disk, |root| {
        usual(root);
        expected = tree(root);
    });
    // Left out.
    expected.retain(|name, _| !matches!(name.as_str(), "lost+found" | "proc/1" | "run/pid"));
    for compression in ["gzip", "none"] {
        let layout = scene.path(compression).display().to_string();
        let to = format!("oci:{layout}:new");
        ok_quiet(&["commit", "--compression", compression, "--base", &source, "--to", &to, &disk]);
        let inspect = |more: &[&str]| -> serde_json::Value {
            let done = Command::new("skopeo").arg("inspect").args(more).arg(&to).output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            serde_json::from_slice(&done.stdout).unwrap()
        };
        assert_eq!(inspect(&[])["Layers"].as_array().unwrap().len(), 3);
        let config = inspect(&["--config"]);
        assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), 3);
        assert_eq!(config["history"][2]["created_by"], "lcow-graphdriver image commit");
        let bundle = scene.path("bundle");
        run(Command::new("umoci").args(["unpack", "--image", &format!("{layout}:new")]).arg(&bundle));
        assert_eq!(tree(&bundle.join("rootfs")), expected, "{compression}");
        fs::remove_dir_all(&bundle).unwrap();
    }
}

#[test]
fn the_same_disk_gives_the_same_bytes_and_a_base_disk_the_same_layer() {
    let scene = Scene::new();
    let (source, disk) = disk(&scene);
    let base = scene.path("base.img");
    fs::copy(&disk, &base).unwrap();
    change(&scene, &disk, usual);
    let commit = |name: &str, more: &[&str]| {
        let to = format!("oci-archive:{}", scene.path(name).display());
        let fixed = ["commit", "--source-date-epoch", "1700000000", "--base", &source, "--to", &to, &disk];
        drop(ok(&[&fixed[..], more].concat()));
        fs::read(scene.path(name)).unwrap()
    };
    let first = commit("a.tar", &[]);
    assert!(commit("b.tar", &[]) == first);
    assert!(commit("c.tar", &["--base-disk", base.to_str().unwrap()]) == first);
    let list = format!("{disk}.b3sums.zst");
    assert!(commit("e.tar", &["--base-digests", &list]) == first);
    assert!(commit("d.tar", &["--include", "/run/pid"]) != first);
    let listed = text(&["ls", "-R", &format!("oci-archive:{}", scene.path("d.tar").display()), "/run"]);
    assert_eq!(listed, "pid\n");
}

#[test]
fn contents_are_compared_with_the_digests_of_the_base_and_of_no_other_image() {
    let scene = Scene::new();
    let (source, disk) = disk(&scene);
    let to = format!("oci-archive:{}", scene.path("new.tar").display());
    let commit = |list: &str| {
        vec!["commit", "--base", &source, "--to", &to, "--base-digests", list, &disk]
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let fails_with = |list: &str, part: &str| {
        let line = commit(list);
        let message = fails(&line.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(message.contains(part), "{part}: {message}");
        assert!(!scene.path("new.tar").exists());
    };
    // The digests decide: with a wrong one, a file counts as changed whose bytes are the same.
    let list = format!("{disk}.b3sums.zst");
    let digests = String::from_utf8(zstd::decode_all(&fs::read(&list).unwrap()[..]).unwrap()).unwrap();
    let line = digests.lines().find(|line| line.ends_with("  etc/same")).unwrap();
    let wrong = digests.replace(line, &format!("{}  etc/same", "0".repeat(64)));
    let other = scene.path("other.img").display().to_string();
    fs::write(format!("{other}.b3sums.zst"), zstd::encode_all(wrong.as_bytes(), 1).unwrap()).unwrap();
    fs::copy(format!("{disk}.json"), format!("{other}.json")).unwrap();
    for (list, layer) in [(format!("{other}.b3sums.zst"), 2), (list.clone(), 0)] {
        let line = commit(&list);
        ok_quiet(&line.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(json(&["ls", "--json", &to, "etc/same"])[0]["layer"], layer, "{list}");
        fs::remove_file(scene.path("new.tar")).unwrap();
    }
    // A list that was cut, one of another image, none.
    let (_, short) = digests.split_once('\n').unwrap();
    fs::write(format!("{other}.b3sums.zst"), zstd::encode_all(short.as_bytes(), 1).unwrap()).unwrap();
    fails_with(&format!("{other}.b3sums.zst"), "one of them was changed");
    let mut store = Store::default();
    let manifest =
        store.manifest("linux/amd64", &[(&Tar::default().file("a", b"1").finish(), Packing::Gzip)]);
    store.list(manifest, "other");
    ok_quiet(&["pack", "--size", "16MiB", "--journal", "none", &scene.layout("other", &store), &other]);
    fails_with(&format!("{other}.b3sums.zst"), "another image");
    fails_with(&format!("{disk}.missing.b3sums.zst"), "check the path");
    fails_with(&disk, "b3sums.zst");
}

#[test]
fn a_qcow2_is_committed_like_the_disk_in_it() {
    let scene = Scene::new();
    let (source, disk) = disk(&scene);
    let base = scene.path("base.qcow2").display().to_string();
    ok_quiet(&["pack", "--size", "64MiB", &source, &base]);
    change(&scene, &disk, usual);
    let to = format!("oci-archive:{}", scene.path("new.tar").display());
    let image = scene.path("disk.qcow2").display().to_string();
    let convert = |options: &[&str]| {
        let kinds = ["convert", "-f", "raw", "-O", "qcow2"];
        run(Command::new("qemu-img").args(kinds).args(options).args([&disk, &image]));
    };
    let commit = ["commit", "--source-date-epoch", "1700000000", "--base", &source, "--to", &to];
    ok_quiet(&[&commit[..], &[disk.as_str()]].concat());
    let expected = fs::read(scene.path("new.tar")).unwrap();
    for options in [&[][..], &["-c"], &["-o", "compat=0.10"]] {
        convert(options);
        for more in [&[image.as_str()][..], &["--base-disk", &base, &image]] {
            ok_quiet(&[&commit[..], more].concat());
            assert!(fs::read(scene.path("new.tar")).unwrap() == expected, "{options:?} {more:?}");
        }
    }
    fs::remove_file(scene.path("new.tar")).unwrap();
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &disk, &image]));
    let message = fails(&[&commit[..], &[image.as_str()]].concat());
    assert!(message.contains("backing file"), "{message}");
    assert!(!scene.path("new.tar").exists());
}

#[test]
fn owners_are_mapped_back() {
    const MAP: [&str; 2] = ["--uid-map", "0:100000:65536"];
    let scene = Scene::new();
    let (source, _) = disk(&scene);
    let (shifted, base) = (scene.path("shifted.img"), scene.path("base.img"));
    let disk = shifted.display().to_string();
    ok_quiet(&[&["pack", "--size", "64MiB"][..], &MAP, &[source.as_str(), disk.as_str()]].concat());
    fs::copy(&shifted, &base).unwrap();
    change(&scene, &disk, |root| {
        fs::write(root.join("etc/content"), "new!").unwrap();
        fs::write(root.join("etc/new"), "n").unwrap();
        chown(root.join("etc/new"), Some(100_005), Some(100_006)).unwrap();
        // Of the machine's own root, which the image does not have; it is left out.
        fs::write(root.join("run/pid"), "1").unwrap();
        fs::create_dir(root.join("lost+found")).unwrap();
    });
    let to = format!("oci-archive:{}", scene.path("new.tar").display());
    let commit =
        [&["commit", "--base", source.as_str(), "--to", to.as_str(), disk.as_str()][..], &MAP].concat();
    for more in [&[][..], &["--base-disk", base.to_str().unwrap()]] {
        ok_quiet(&[&commit[..], more].concat());
        assert_eq!(text(&["diff", &source, &to]), "C etc/content  (content)\nA etc/new\n", "{more:?}");
        let row = json(&["ls", "--json", &to, "etc/new"]);
        assert_eq!((row[0]["uid"].as_u64(), row[0]["gid"].as_u64()), (Some(5), Some(6)));
        fs::remove_file(scene.path("new.tar")).unwrap();
    }
    change(&scene, &disk, |root| fs::write(root.join("etc/foreign"), "f").unwrap());
    let message = fails(&commit);
    assert!(
        message.contains("etc/foreign") && message.contains("owner 0 ") && message.contains("--uid-map"),
        "{message}"
    );
    assert!(!scene.path("new.tar").exists());
    ok_quiet(&[&commit[..], &["--exclude", "etc/foreign"]].concat());
    let message = fails(&[&commit[..], &["--uid-map", "70000:100000:1"]].concat());
    assert!(message.contains("cannot be mapped back"), "{message}");
}

#[test]
fn a_dirty_journal_is_replayed_and_a_disk_in_use_refused() {
    let scene = Scene::new();
    let (source, disk) = disk(&scene);
    let to = format!("oci:{}:new", scene.path("layout").display());
    let copy = scene.path("dirty.img");
    change(&scene, &disk, |root| {
        fs::write(root.join("etc/written"), "before the cut").unwrap();
        run(Command::new("sync").arg("-f").arg(root));
        let message = fails(&["commit", "--base", &source, "--to", &to, &disk]);
        assert!(message.contains("open for writing"), "{message}");
        // The power is cut here, for the copy.
        fs::copy(&disk, &copy).unwrap();
    });
    drop(ok(&["commit", "--base", &source, "--to", &to, copy.to_str().unwrap()]));
    assert_eq!(ok(&["cat", &to, "etc/written"]), b"before the cut");
    // A damaged file system is refused, and nothing is left.
    let file = fs::File::options().write(true).open(&copy).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 1024], 1024).unwrap();
    let out = format!("oci-archive:{}", scene.path("none.tar").display());
    fails(&["commit", "--base", &source, "--to", &out, copy.to_str().unwrap()]);
    assert!(!scene.path("none.tar").exists());
    // Owners are the caller's, not the jail's.
    assert_eq!(fs::metadata(scene.path("layout/index.json")).unwrap().uid(), 0);
    assert_eq!(image(&["commit", &disk]).output().unwrap().status.code(), Some(2));
}
