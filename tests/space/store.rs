//! `store grow`, `store trim` and `store du --reclaimable` with and without a running plugin.

use super::{GIB, MIB, fsck, ok, program, support::Plugin, taken, text};
use serde_json::json;
use std::{fs, path::PathBuf};

fn sandbox(plugin: &Plugin, id: &str) -> PathBuf {
    plugin.home().join(id).join("sandbox.vhd")
}

/// Runs a `store` command on the plugin's home; its JSON, or its message.
fn store(plugin: &Plugin, arguments: &[&str]) -> Result<serde_json::Value, String> {
    let (home, socket) = (plugin.home(), plugin.socket());
    let mut all = vec!["store", arguments[0], "--json"];
    if arguments[0] != "trim" {
        all.extend(["--home", text(&home)]);
    }
    if arguments[0] != "du" {
        all.extend(["--socket", text(&socket)]);
    }
    all.extend(&arguments[1..]);
    let out = program(&all);
    if out.status.success() {
        Ok(serde_json::from_slice(&out.stdout).unwrap())
    } else {
        Err(String::from_utf8(out.stderr).unwrap())
    }
}

/// Whether this process, and so a plugin that it starts, has `CAP_SYS_RESOURCE`, without which Linux enlarges no mounted file
/// system.
fn is_able() -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(mask.trim(), 16).unwrap() >> CAP_SYS_RESOURCE & 1 == 1
}

fn size_of(path: &PathBuf) -> u64 {
    rustix::fs::statvfs(path).map(|s| s.f_blocks * s.f_frsize).unwrap()
}

#[test]
fn a_sandbox_grows_mounted_and_unmounted() {
    let mut plugin = Plugin::start(&["--storage-opt", "lcow.sandboxsize=1GiB"]);
    plugin.init();
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "rw", "Parent": ""}));
    // Not mounted: a service VM does it.
    let done = store(&plugin, &["grow", "rw", "2GiB"]).unwrap();
    assert_eq!((done["how"].as_str(), done["after"].as_u64()), (Some("unmounted"), Some(2 * GIB)));
    fsck(&sandbox(&plugin, "rw"));
    let dir = plugin.get("rw");
    fs::write(dir.join("before"), vec![1; 5 << 20]).unwrap();
    assert!(size_of(&dir) > 2 * GIB - 100 * MIB);
    // Mounted: the kernel does it, if it may.
    let grown = store(&plugin, &["grow", "rw", "10GiB"]);
    let dir = if is_able() {
        assert_eq!(grown.unwrap()["how"], "mounted");
        dir
    } else {
        let said = grown.unwrap_err();
        assert!(said.contains("CAP_SYS_RESOURCE") && said.contains("--at-next-start"), "{said}");
        fs::write(dir.join("still"), "writable").unwrap();
        assert_eq!(store(&plugin, &["grow", "--at-next-start", "rw", "10GiB"]).unwrap()["how"], "put_off");
        assert!(size_of(&dir) < 2 * GIB);
        plugin.put("rw");
        plugin.get("rw")
    };
    assert!(size_of(&dir) > 9 * GIB, "{}", size_of(&dir));
    fs::write(dir.join("after"), vec![2; 5 << 20]).unwrap();
    for (size, reason) in [("9GiB", "cannot shrink"), ("3TiB", "at most")] {
        let said = store(&plugin, &["grow", "rw", size]).unwrap_err();
        assert!(said.contains(reason), "{said}");
    }
    let said = store(&plugin, &["grow", "nothing", "9GiB"]).unwrap_err();
    assert!(said.contains("nothing"), "{said}");
    // A kill and a start change nothing.
    plugin.kill_and_restart();
    plugin.init();
    assert!(size_of(&dir) > 9 * GIB);
    plugin.put("rw");
    fsck(&sandbox(&plugin, "rw"));
    // Without a plugin, the command does it.
    plugin.terminate();
    let done = store(&plugin, &["grow", "rw", "12GiB"]).unwrap();
    assert_eq!(done["how"], "unmounted");
    fsck(&sandbox(&plugin, "rw"));
    plugin.start_again();
    plugin.init();
    let dir = plugin.get("rw");
    assert!(size_of(&dir) > 11 * GIB);
    assert!(fs::read(dir.join("before")).unwrap() == vec![1; 5 << 20]);
    assert!(fs::read(dir.join("after")).unwrap() == vec![2; 5 << 20]);
    plugin.put("rw");
    // Applied layers never change, and a layer that was only created gets its size.
    plugin.layer("base", "", &super::support::Tar::new().file("f", b"x").end());
    assert!(store(&plugin, &["grow", "base", "9GiB"]).unwrap_err().contains("applied"));
    plugin.ok("GraphDriver.Create", &json!({"ID": "later", "Parent": "base"}));
    assert_eq!(store(&plugin, &["grow", "later", "3GiB"]).unwrap()["how"], "not_made");
    let dir = plugin.get("later");
    assert!(size_of(&dir) > 2 * GIB);
    plugin.put("later");
}

/// A sandbox of an earlier release: Linux does not enlarge it while it is mounted.
#[test]
fn a_sandbox_of_an_earlier_release_grows_at_its_next_start() {
    let plugin = Plugin::start(&["--storage-opt", "lcow.sandboxsize=1GiB"]);
    plugin.init();
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "old", "Parent": ""}));
    let path = sandbox(&plugin, "old");
    fs::remove_file(&path).unwrap();
    super::make(&path, super::Kind::Vhd, ext4_image::format::BlankVersion::First, GIB);
    let dir = plugin.get("old");
    fs::write(dir.join("file"), "content").unwrap();
    let said = store(&plugin, &["grow", "old", "5GiB"]).unwrap_err();
    let reason = if is_able() { "earlier release" } else { "CAP_SYS_RESOURCE" };
    assert!(said.contains(reason) && said.contains("--at-next-start"), "{said}");
    let done = store(&plugin, &["grow", "--at-next-start", "old", "5GiB"]).unwrap();
    assert_eq!(done["how"], "put_off");
    plugin.put("old");
    let dir = plugin.get("old");
    assert!(size_of(&dir) > 4 * GIB);
    assert_eq!(fs::read(dir.join("file")).unwrap(), b"content");
    plugin.put("old");
    fsck(&path);
}

#[test]
fn what_containers_delete_is_counted_and_given_back() {
    let plugin = Plugin::start(&["--storage-opt", "lcow.sandboxsize=1GiB"]);
    plugin.init();
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "rw", "Parent": ""}));
    let path = sandbox(&plugin, "rw");
    // Mounted without discard for a while, by the test: what is deleted then stays.
    let mounted = super::Mounted::new(&path, GIB, "rw,nodiscard");
    fs::write(mounted.path().join("upper/big"), vec![1; 100 << 20]).unwrap();
    rustix::fs::syncfs(fs::File::open(mounted.path()).unwrap()).unwrap();
    fs::remove_file(mounted.path().join("upper/big")).unwrap();
    mounted.unmount();
    let row = |plugin: &Plugin| store(plugin, &["du", "--reclaimable"]).unwrap()[0].clone();
    assert!(row(&plugin)["reclaimable"].as_u64().unwrap() > 90 << 20, "{}", row(&plugin));
    assert!(store(&plugin, &["trim", "rw"]).unwrap_err().contains("no mounted sandbox"));
    plugin.get("rw");
    let done = store(&plugin, &["trim"]).unwrap();
    let (before, after) = (done[0]["before"].as_u64().unwrap(), done[0]["after"].as_u64().unwrap());
    assert!(before > 100 << 20 && after < 20 << 20 && after == taken(&path), "{done}");
    assert_eq!(row(&plugin)["estimate"], true);
    plugin.put("rw");
    assert!(row(&plugin)["reclaimable"].as_u64().unwrap() < 5 << 20, "{}", row(&plugin));
    let said = ok(&["store", "du", "--reclaimable", "--home", text(&plugin.home())]);
    assert!(said.contains("RECLAIMABLE"), "{said}");
}
