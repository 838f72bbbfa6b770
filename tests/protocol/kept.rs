//! Layers that stay mounted for the next container (`lcow.mount.keep`), and everything that must unmount them. Needs root.

use super::small_tar;
use crate::support::{Plugin, leftovers, transport::Stream};
use serde_json::json;
use std::{
    fs,
    os::unix::fs::MetadataExt,
    process::Command,
    time::{Duration, Instant},
};

/// Longest wait for what the plugin does by itself.
const PATIENCE: Duration = Duration::from_mins(1);

/// A plugin that keeps `keep` layers, and a connection, without which it would take its client for gone.
fn keeping(keep: &str) -> (Plugin, Stream) {
    let keep = format!("lcow.mount.keep={keep}");
    let plugin = Plugin::start(&["--storage-opt", &keep]);
    plugin.init();
    plugin.layer("base", "", &small_tar());
    let client = plugin.connect();
    (plugin, client)
}

/// Starts and ends a container on `layer`; the device of the layer's files in it.
fn container(plugin: &Plugin, id: &str, layer: &str) {
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": id, "Parent": layer}));
    let dir = plugin.get(id);
    assert_eq!(fs::read(dir.join("etc/motd")).unwrap(), b"hello\n");
    plugin.put(id);
    plugin.remove(id);
}

/// The device number of what is mounted at the only mount of the home.
fn only_device(plugin: &Plugin) -> u64 {
    let mounts = plugin.mounts();
    assert_eq!(mounts.len(), 1, "{mounts:?}\n{}", plugin.log());
    fs::metadata(&mounts[0]).unwrap().dev()
}

fn wait_until(what: &str, plugin: &Plugin, reached: impl Fn() -> bool) {
    let begin = Instant::now();
    while !reached() {
        assert!(begin.elapsed() < PATIENCE, "{what} does not happen\n{}", plugin.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn nothing_left(plugin: &Plugin) -> bool {
    plugin.mounts().is_empty() && leftovers::devices_below(&plugin.folder).is_empty()
}

#[test]
fn the_next_container_finds_the_layer_mounted() {
    let (plugin, _client) = keeping("8");
    container(&plugin, "one", "base");
    let first = only_device(&plugin);
    container(&plugin, "two", "base");
    assert_eq!(only_device(&plugin), first, "the layer was mounted anew");
    assert_eq!(leftovers::devices_below(&plugin.folder).len(), 1);
    let status = plugin.ok("GraphDriver.Status", &json!({}))["Status"].to_string();
    assert!(status.contains("0 merged, 0 disks, 1 kept"), "{status}");
    // The layer's own view, without a container.
    assert_eq!(fs::read(plugin.get("base").join("etc/motd")).unwrap(), b"hello\n");
    plugin.put("base");
    assert_eq!(only_device(&plugin), first);
}

#[test]
fn no_more_than_the_number_stay_and_the_oldest_goes_first() {
    let (plugin, _client) = keeping("2");
    for layer in ["second", "third"] {
        plugin.layer(layer, "", &small_tar());
    }
    for layer in ["base", "second", "third"] {
        container(&plugin, "used", layer);
    }
    assert_eq!(plugin.mounts().len(), 2);
    // What stayed is used again: none is mounted anew, and none goes.
    let kept = plugin.mounts();
    for layer in ["second", "third"] {
        container(&plugin, "again", layer);
    }
    assert_eq!(plugin.mounts(), kept);
}

#[test]
fn a_removed_layer_is_unmounted_at_once() {
    let (plugin, _client) = keeping("8");
    container(&plugin, "one", "base");
    plugin.remove("base");
    assert_eq!(plugin.mounts(), [""; 0]);
    wait_until("the end of its loop device", &plugin, || nothing_left(&plugin));
    // Another layer of the same id shows its own files.
    plugin.layer("base", "", &small_tar());
    container(&plugin, "one", "base");
}

#[test]
fn old_ones_go_by_themselves() {
    let plugin =
        Plugin::start(&["--storage-opt", "lcow.mount.keep=8", "--storage-opt", "lcow.mount.keepage=1"]);
    plugin.init();
    plugin.layer("base", "", &small_tar());
    let _client = plugin.connect();
    container(&plugin, "one", "base");
    wait_until("the unmount", &plugin, || nothing_left(&plugin));
}

/// As `systemctl stop` and the deletion of the engine's data root: nothing is busy.
#[test]
fn a_stop_and_a_cleanup_leave_what_containers_use_alone() {
    let (mut plugin, _client) = keeping("8");
    plugin.layer("other", "", &small_tar());
    container(&plugin, "ended", "other");
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "running", "Parent": "base"}));
    let dir = plugin.get("running");
    let used = plugin.mounts().len() - 1;
    plugin.terminate();
    assert_eq!(plugin.mounts().len(), used, "{}", plugin.log());
    assert_eq!(fs::read(dir.join("etc/motd")).unwrap(), b"hello\n");
    plugin.start_again();
    let _client = plugin.connect();
    plugin.put("running");
    assert_eq!(plugin.mounts().len(), 1);
    plugin.ok("GraphDriver.Cleanup", &json!({}));
    wait_until("the unmount", &plugin, || nothing_left(&plugin));
    container(&plugin, "again", "other");
    assert_eq!(plugin.mounts().len(), 1);
    plugin.terminate();
    assert!(nothing_left(&plugin));
    fs::remove_dir_all(plugin.home()).unwrap();
}

#[test]
fn after_a_kill_the_next_start_keeps_what_it_finds() {
    let (mut plugin, _client) = keeping("8");
    container(&plugin, "one", "base");
    let first = only_device(&plugin);
    plugin.kill_and_restart();
    let _client = plugin.connect();
    container(&plugin, "two", "base");
    assert_eq!(only_device(&plugin), first);
    // One that keeps nothing unmounts it.
    plugin.arguments.retain(|argument| !argument.contains("keep=8"));
    plugin.arguments.push("lcow.mount.keep=0".into());
    plugin.kill_and_restart();
    assert!(nothing_left(&plugin), "{}", plugin.log());
}

/// dockerd with live-restore ends without a Cleanup.
#[test]
fn they_go_when_the_last_client_has_gone() {
    let (plugin, client) = keeping("8");
    container(&plugin, "one", "base");
    only_device(&plugin);
    drop(client);
    wait_until("the unmount", &plugin, || nothing_left(&plugin));
}

#[test]
fn an_operator_can_unmount_them() {
    let (plugin, _client) = keeping("8");
    container(&plugin, "one", "base");
    let unmount = |socket| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"));
        command.args(["store", "unmount-idle", "--socket"]).arg(socket).output().unwrap()
    };
    let done = unmount(plugin.socket());
    assert!(done.status.success(), "{done:?}");
    assert!(nothing_left(&plugin), "{}", plugin.log());
    let failed = unmount(plugin.folder.join("no-such-socket"));
    assert!(String::from_utf8_lossy(&failed.stderr).contains("is the plugin running?"), "{failed:?}");
}
