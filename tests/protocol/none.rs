//! Get and Put with `lcow.mount=none`: a layer's folder, and sandboxes that virtual machines attach. Both transports.

use super::small_tar;
use crate::support::{Plugin, Tar, noise};
use disk_io::ReadAt;
use serde_json::json;
use std::fs;
use vhd_image::vhdx::Vhdx;

fn start() -> Plugin {
    let plugin = Plugin::start(&["--storage-opt", "lcow.mount=none"]);
    plugin.init();
    plugin
}

#[test]
fn get_gives_the_folder_and_a_sandbox_is_a_vhdx_of_the_size_asked_for() {
    let plugin = start();
    plugin.layer("base", "", &small_tar());
    plugin.ok(
        "GraphDriver.CreateReadWrite",
        &json!({"ID": "c", "Parent": "base", "StorageOpt": {"size": "64m"}}),
    );
    assert_eq!(plugin.get("base"), plugin.home().join("base"));
    let folder = plugin.get("c");
    assert_eq!(folder, plugin.home().join("c"));
    assert!(plugin.home().join("base/layer.vhd").is_file() && !folder.join("sandbox.vhd").exists());
    let file = fs::File::open(folder.join("sandbox.vhdx")).unwrap();
    assert!(file.metadata().unwrap().len() < 16 << 20, "an empty sandbox takes little space");
    let disk = Vhdx::open(file).unwrap();
    assert_eq!(disk.size().unwrap(), 64 << 20);
    let mut magic = [0; 2];
    disk.read_exact_at(&mut magic, 1024 + 56).unwrap();
    assert_eq!(magic, [0x53, 0xef], "an ext4 file system");
    // Written by nobody yet: nothing has changed.
    let changes = plugin.ok("GraphDriver.Changes", &json!({"ID": "c", "Parent": "base"}));
    assert_eq!(changes["Changes"], json!([]));
    assert_eq!(plugin.ok("GraphDriver.DiffSize", &json!({"ID": "c", "Parent": "base"}))["Size"], 0);
    let diff = plugin.diff("c", "base");
    assert!(diff.iter().all(|b| *b == 0), "an empty tar");
    plugin.layer("committed", "base", &diff);
    plugin.put("c");
    plugin.put("c");
    plugin.ok("GraphDriver.Create", &json!({"ID": "late", "Parent": "base"}));
    assert!(plugin.get("late").join("sandbox.vhdx").is_file(), "the first Get makes it a sandbox");
    for id in ["late", "c", "committed", "base"] {
        plugin.remove(id);
        assert!(!plugin.home().join(id).exists());
    }
}

#[test]
fn a_squash_reads_images_and_vhdx_sandboxes_of_a_chain() {
    let plugin = start();
    plugin.layer("base", "", &small_tar());
    plugin.layer("next", "base", &Tar::new().file("etc/issue", &noise(4, 5000)).end());
    plugin.ok(
        "GraphDriver.CreateReadWrite",
        &json!({"ID": "c", "Parent": "next", "StorageOpt": {"size": "32m"}}),
    );
    let squashed = plugin.diff("c", "base");
    assert!(squashed.windows(9).any(|w| w == b"etc/issue"), "what the ancestors added");
    let size = plugin.ok("GraphDriver.DiffSize", &json!({"ID": "c", "Parent": "base"}));
    assert_eq!(size["Size"], 5000);
}
