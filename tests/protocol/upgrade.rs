//! A store of release 1 under this program: `tests/golden/store-v1.tar.xz` was made by release 1 (writer 1, canonical tar
//! version 1) and holds what it did otherwise. Needs root, as all mounts do.
//!
//! ```text
//!   base      applied: user.* on a symlink, owner 2^32-1, a link with a mode of its own, a folder twice, an inline file
//!             that e2fsck takes for the root of an extent tree
//!   top       applied on base, with an opaque root
//!   noted     sandbox on base: a file of 1 MiB with a hole, user.a=b; its diff was made, so layer.json says version 1
//!   silent    the same, but its diff was never made
//!   *.tar     what release 1 gave
//! ```

use crate::support::{Plugin, Tar};
use serde_json::{Value, json};
use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

/// Unpacks the store where a plugin will look for it.
fn unpack(folder: &Path) {
    let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/store-v1.tar.xz");
    let output = Command::new("tar").arg("-xJSf").arg(packed).arg("-C").arg(folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn layer_json(plugin: &Plugin, id: &str) -> Value {
    serde_json::from_slice(&fs::read(plugin.home().join(id).join("layer.json")).unwrap()).unwrap()
}

fn scrub(plugin: &Plugin) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
        .args(["store", "scrub", "--json", "--root"])
        .arg(plugin.folder.join("root"))
        .arg("--home")
        .arg(plugin.home())
        .output()
        .unwrap()
}

#[test]
fn a_store_of_release_1_gives_the_same_bytes_and_is_never_called_corrupt() {
    let plugin = Plugin::start(&[]);
    unpack(&plugin.folder);
    let golden = |name: &str| fs::read(plugin.folder.join(name)).unwrap();
    plugin.init();
    assert!(plugin.diff("base", "") == golden("base.tar"));
    assert!(plugin.diff("top", "base") == golden("top.tar"));
    // The version is noted before the first byte leaves, so it is there when the stream has ended.
    assert_eq!(layer_json(&plugin, "silent").get("canonical_version"), None);
    assert!(plugin.diff("silent", "base") == golden("silent.tar"));
    assert_eq!(layer_json(&plugin, "silent")["canonical_version"], 1);
    assert!(plugin.diff("noted", "base") == golden("noted.tar"));
    assert!(plugin.diff("noted", "") == golden("noted-all.tar"));

    // Mounts: the kernel reads what writer 1 made.
    let base = plugin.get("base");
    assert_eq!(fs::read(base.join("etc/plain")).unwrap(), b"plain\n");
    plugin.put("base");
    let noted = plugin.get("noted");
    assert_eq!(fs::metadata(noted.join("app.db")).unwrap().len(), (1 << 20) + 4);
    plugin.put("noted");
    let top = plugin.get("top");
    let names: Vec<_> = fs::read_dir(&top).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["top"], "an opaque root hides what is below");
    plugin.put("top");

    // A tar of version 1 goes in as it is; a layer of today has version 2, in which a small hole is written as zeros.
    plugin.layer("again", "base", &golden("noted.tar"));
    assert!(plugin.diff("again", "base") == golden("noted.tar"));
    plugin.ok(
        "GraphDriver.CreateReadWrite",
        &json!({"ID": "today", "Parent": "base", "StorageOpt": {"size": "32m"}}),
    );
    let dir = plugin.get("today");
    fs::write(dir.join("app.db"), b"head").unwrap();
    fs::File::options().write(true).open(dir.join("app.db")).unwrap().set_len(1 << 20).unwrap();
    plugin.put("today");
    let diff = plugin.diff("today", "base");
    assert_eq!(layer_json(&plugin, "today")["canonical_version"], 2);
    assert!(diff.len() > 1 << 20, "{} bytes", diff.len());
    assert!(plugin.diff("today", "base") == diff);
    assert_eq!(layer_json(&plugin, "again")["applied"]["writer"], 2);

    let output = scrub(&plugin);
    let report: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    assert!(output.status.success(), "{report}");
    assert_eq!((&report["faults"], &report["writer_1"]), (&json!([]), &json!(["base", "top"])), "{report}");
    assert!(report["writer_1_differs"].as_array().unwrap().iter().all(|f| f["id"] == "base"), "{report}");
}

#[test]
fn damage_is_damage_whoever_wrote_the_image() {
    let plugin = Plugin::start(&[]);
    unpack(&plugin.folder);
    let image = plugin.home().join("base/layer.vhd");
    let mut bytes = fs::read(&image).unwrap();
    // The super block's count of free inodes: its checksum no longer holds.
    bytes[1024 + 0x10] ^= 1;
    fs::write(&image, bytes).unwrap();
    plugin.init();
    let output = scrub(&plugin);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(!output.status.success(), "{report}");
    assert_eq!(report["faults"][0]["id"], "base", "{report}");
}

#[test]
fn under_a_user_namespace_owners_are_looked_at_at_the_door_and_once_for_what_is_there() {
    let plugin = Plugin::start(&[]);
    unpack(&plugin.folder);
    let maps = json!([{"container_id": 0, "host_id": 100_000, "size": 2000}]);
    let init = json!({"Home": plugin.home(), "Opts": null, "UIDMaps": maps, "GIDMaps": maps});
    plugin.ok("GraphDriver.Init", &init);
    // `etc/odd` belongs to 4294967295 in the image that writer 1 made.
    let error = plugin.err("GraphDriver.Get", &json!({"ID": "base", "MountLabel": ""}));
    for part in ["/etc/odd", "owner 4294967295", "0 to 1999"] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
    assert!(layer_json(&plugin, "base")["applied"].get("owners").is_none());
    let tar = Tar::new().dir("d/").file("d/f", b"1").end();
    plugin.layer("good", "", &tar);
    assert_eq!(layer_json(&plugin, "good")["applied"]["owners"], "users 0+2000 groups 0+2000");
    plugin.get("good");
    plugin.put("good");
    // 5000 in octal, as the second entry's owner.
    let mut bad = Tar::new().dir("d/").end();
    bad.truncate(512);
    let mut entry = Tar::new().file("d/f", b"1").end();
    entry[108..116].copy_from_slice(b"0011610\0");
    entry[148..156].fill(b' ');
    let sum: u32 = entry[..512].iter().map(|b| u32::from(*b)).sum();
    entry[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    bad.extend(entry);
    plugin.ok("GraphDriver.Create", &json!({"ID": "bad", "Parent": ""}));
    let reply = plugin.apply("bad", "", &bad);
    assert_ne!(reply.status, 200);
    for part in ["d/f", "owner 5000", "0 to 1999"] {
        assert!(reply.text().contains(part), "{part} is not in {}", reply.text());
    }
}

#[test]
fn what_a_diff_leaves_out_is_told_in_the_log() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    plugin.layer("base", "", &Tar::new().dir("d/").end());
    plugin.ok(
        "GraphDriver.CreateReadWrite",
        &json!({"ID": "c", "Parent": "base", "StorageOpt": {"size": "32m"}}),
    );
    let dir = plugin.get("c");
    fs::create_dir(dir.join("d/.wh.folder")).unwrap();
    fs::write(dir.join("d/.wh.folder/precious"), "1").unwrap();
    fs::write(dir.join("d/.wh.data"), "1").unwrap();
    fs::write(dir.join("d/kept"), "1").unwrap();
    plugin.put("c");
    plugin.diff("c", "base");
    let log = plugin.log();
    let line = log.lines().find(|l| l.contains("leaves out")).unwrap_or_else(|| panic!("{log}"));
    assert!(line.contains("WARN") && line.contains("d/.wh.data") && line.contains('3'), "{line}");
}
