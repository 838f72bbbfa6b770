//! What a container put into its sandbox is committed: Diff gives a tar that ApplyDiff takes, whatever it is, or an error
//! that says what is too much. Needs root.

use super::small_tar;
use crate::support::{Plugin, Tar, noise};
use serde_json::json;
use std::{
    ffi::OsString,
    fs,
    os::unix::{
        ffi::OsStringExt,
        fs::{FileExt, symlink},
    },
    path::Path,
    process::Command,
};

fn start(options: &[&str]) -> Plugin {
    let plugin = Plugin::start(options);
    plugin.init();
    plugin.layer("base", "", &small_tar());
    plugin
}

fn sandbox(plugin: &Plugin, id: &str, fill: impl FnOnce(&Path)) {
    plugin.ok(
        "GraphDriver.CreateReadWrite",
        &json!({"ID": id, "Parent": "base", "StorageOpt": {"size": "512m"}}),
    );
    fill(&plugin.get(id));
    plugin.put(id);
}

/// `depth` folders in each other, each called `name`, made step by step: no system call sees the whole path.
fn deep(dir: &Path, depth: usize, name: &str) {
    let script = format!(
        "import os\nos.chdir({:?})\nfor _ in range({depth}):\n  os.mkdir({name:?})\n  os.chdir({name:?})\nopen('end', 'w').close()",
        dir.to_str().unwrap()
    );
    assert!(Command::new("python3").args(["-c", &script]).status().unwrap().success());
}

fn set_attributes(file: &Path, count: usize) {
    for n in 0..count {
        let name = format!("user.{n:02}{}", "n".repeat(98));
        let set = Command::new("setfattr").args(["-n", &name, "-v", "v"]).arg(file).status().unwrap();
        assert!(set.success(), "{n} attributes");
    }
}

#[test]
fn a_sandbox_is_committed_whatever_a_container_put_into_it() {
    let plugin = start(&[]);
    sandbox(&plugin, "c", |dir| {
        // Links and attributes that blocks of 1 KiB do not hold.
        for size in [1023, 1024, 4095] {
            symlink("t".repeat(size), dir.join(format!("to-{size}"))).unwrap();
        }
        fs::write(dir.join("attributes"), "x").unwrap();
        set_attributes(&dir.join("attributes"), 20);
        // More folders in each other, and more ranges, than were once taken.
        deep(&fs::create_dir(dir.join("deep")).map(|()| dir.join("deep")).unwrap(), 1_100, "d");
        let ranges = fs::File::create(dir.join("ranges")).unwrap();
        for n in 0..30_000u64 {
            ranges.write_all_at(b"x", n * 8192).unwrap();
        }
        let hole = fs::File::create(dir.join("hole")).unwrap();
        hole.set_len(1 << 40).unwrap();
        hole.write_all_at(b"end", (1 << 40) - 3).unwrap();
        let odd = (1..=255u8).filter(|b| *b != b'/').collect::<Vec<_>>();
        fs::write(dir.join(OsString::from_vec(odd)), "odd").unwrap();
        fs::write(dir.join("n".repeat(255)), "long").unwrap();
    });
    let diff = plugin.diff("c", "base");
    plugin.layer("committed", "base", &diff);
    assert!(plugin.diff("committed", "base") == diff, "another tar than was committed");
    let (written, committed) = (plugin.get("c"), plugin.get("committed"));
    for size in [1023, 1024, 4095] {
        assert_eq!(fs::read_link(committed.join(format!("to-{size}"))).unwrap().as_os_str().len(), size);
    }
    let attributes = |dir: &Path| {
        let dump =
            Command::new("getfattr").args(["--absolute-names", "-d", "-m", "-"]).arg(dir).output().unwrap();
        String::from_utf8(dump.stdout).unwrap().lines().skip(1).collect::<Vec<_>>().join("\n")
    };
    assert_eq!(attributes(&committed.join("attributes")), attributes(&written.join("attributes")));
    assert!(attributes(&committed.join("attributes")).lines().count() >= 20);
    let same =
        Command::new("cmp").arg(committed.join("ranges")).arg(written.join("ranges")).status().unwrap();
    assert!(same.success());
    let hole = fs::File::open(committed.join("hole")).unwrap();
    let mut end = [0; 3];
    hole.read_exact_at(&mut end, (1 << 40) - 3).unwrap();
    assert_eq!(&end, b"end");
    let deepest = Command::new("find").arg(committed.join("deep")).args(["-name", "end"]).output().unwrap();
    assert!(deepest.status.success() && !deepest.stdout.is_empty());
    plugin.put("c");
    plugin.put("committed");
    // The image has larger blocks, and stands the check that scrub makes.
    let image = plugin.home().join("committed/layer.vhd");
    assert!(Command::new("e2fsck").arg("-fn").arg(&image).status().unwrap().success());
    let block = Command::new("dumpe2fs").arg("-h").arg(&image).output().unwrap().stdout;
    let block = String::from_utf8(block).unwrap();
    assert!(block.lines().any(|l| l.starts_with("Block size:") && l.ends_with("4096")), "{block}");
}

#[test]
fn paths_that_no_tar_holds_are_an_error_that_says_what_to_do() {
    let plugin = start(&[]);
    sandbox(&plugin, "c", |dir| deep(dir, 30, &"n".repeat(200)));
    let text = plugin.err("GraphDriver.Diff", &json!({"ID": "c", "Parent": "base"}));
    for part in ["nnn", "4096", "bytes of a path", "rename or remove"] {
        assert!(text.contains(part), "no \"{part}\" in: {text}");
    }
    assert!(text.len() < 1000, "{text}");
    // One step less is fine as soon as the rest is gone.
    let dir = plugin.get("c");
    assert!(Command::new("rm").arg("-rf").arg(dir.join("n".repeat(200))).status().unwrap().success());
    deep(&dir, 20, &"n".repeat(200));
    plugin.put("c");
    let diff = plugin.diff("c", "base");
    plugin.layer("committed", "base", &diff);
}

#[test]
fn nothing_is_left_of_the_smaller_blocks() {
    let plugin = start(&["--storage-opt", "lcow.verity=true"]);
    sandbox(&plugin, "c", |dir| symlink("t".repeat(2000), dir.join("long")).unwrap());
    let diff = plugin.diff("c", "base");
    plugin.layer("committed", "base", &diff);
    assert!(fs::read_dir(plugin.home().join("staging")).unwrap().next().is_none());
    let mut names: Vec<_> = fs::read_dir(plugin.home().join("committed"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["layer.exact", "layer.json", "layer.vhd", "layerchain.json"]);
}

/// A file system of its own with `bytes` of room, at a plugin's home.
fn small_disk(plugin: &Plugin, bytes: u64) {
    fs::create_dir_all(&plugin.home).unwrap();
    let options = format!("size={bytes}");
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&plugin.home).status();
    assert!(mounted.unwrap().success(), "this test mounts a tmpfs: run it as root");
}

#[test]
fn the_second_pair_leaves_the_reserve_alone() {
    const MIB: u64 = 1 << 20;
    let plugin = Plugin::start(&["--storage-opt", "lcow.minfree=20m"]);
    small_disk(&plugin, 72 * MIB);
    plugin.init();
    let noisy = |mebibytes: u64| Tar::new().file("noise", &noise(1, (mebibytes * MIB) as usize));
    let far = "far/".repeat(500);
    let pax = |mut tar: Tar| {
        let record = format!("2015 linkpath={far}\n");
        assert_eq!(record.len(), 2015);
        tar = tar.entry("pax", b'x', 0o644, "", record.as_bytes());
        tar.entry("link", b'2', 0o777, "x", b"").end()
    };
    // Twice 30 MiB and the reserve do not go into 72 MiB.
    plugin.ok("GraphDriver.Create", &json!({"ID": "large", "Parent": ""}));
    let reply = plugin.apply("large", "", &pax(noisy(30)));
    assert_ne!(reply.status, 200);
    for part in ["larger blocks", "lcow.minfree"] {
        assert!(reply.text().contains(part), "no \"{part}\" in: {}", reply.text());
    }
    plugin.remove("large");
    // Twice 15 MiB do.
    plugin.layer("small", "", &pax(noisy(15)));
    let shown = plugin.get("small");
    assert_eq!(fs::read_link(shown.join("link")).unwrap().as_os_str().len(), far.len());
    plugin.put("small");
}
