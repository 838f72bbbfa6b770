//! Get and Put with `lcow.mount=overlay`: what the merged views show. Needs root.

use super::small_tar;
use crate::support::{Plugin, Tar, noise};
use serde_json::json;
use std::{fs, os::unix::fs::PermissionsExt, path::Path};

#[test]
fn get_shows_a_layer_and_put_hides_it_when_the_last_reference_goes() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    plugin.layer("base", "", &small_tar());
    plugin.layer(
        "next",
        "base",
        &Tar::new().dir("etc/").file("etc/.wh.motd", b"").file("etc/issue", b"new\n").end(),
    );
    plugin.ok(
        "GraphDriver.CreateReadWrite",
        &json!({"ID": "c-init", "Parent": "next", "StorageOpt": {"size": "64m"}}),
    );
    let init = plugin.get("c-init");
    assert_eq!(fs::read(init.join("etc/issue")).unwrap(), b"new\n");
    assert!(!init.join("etc/motd").exists());
    assert_eq!(fs::read(init.join("big")).unwrap(), noise(1, 300_000));
    fs::write(init.join("etc/hosts"), "127.0.0.1\n").unwrap();
    plugin.put("c-init");
    plugin.ok(
        "GraphDriver.CreateReadWrite",
        &json!({"ID": "c", "Parent": "c-init", "StorageOpt": {"size": "64m"}}),
    );
    let dir = plugin.get("c");
    assert_eq!(plugin.get("c"), dir);
    assert_eq!(dir, plugin.home().join("c/merged"));
    assert_eq!(fs::read(dir.join("etc/hosts")).unwrap(), b"127.0.0.1\n");
    fs::write(dir.join("etc/issue"), "changed\n").unwrap();
    fs::remove_file(dir.join("big")).unwrap();
    fs::write(dir.join("added"), noise(9, 5000)).unwrap();
    plugin.put("c");
    assert_eq!(fs::read(dir.join("added")).unwrap(), noise(9, 5000));
    let expected = json!([
        {"Path": "/added", "Kind": 1},
        {"Path": "/big", "Kind": 2},
        {"Path": "/etc", "Kind": 0},
        {"Path": "/etc/issue", "Kind": 0},
    ]);
    for mounted in [true, false] {
        assert_eq!(
            plugin.ok("GraphDriver.Changes", &json!({"ID": "c", "Parent": "c-init"}))["Changes"],
            expected
        );
        let size = plugin.ok("GraphDriver.DiffSize", &json!({"ID": "c", "Parent": "c-init"}));
        assert_eq!(size["Size"], 5008, "mounted: {mounted}");
        plugin.put("c");
    }
    assert_eq!(plugin.mounts(), [""; 0], "{}", plugin.log());
    let diff = plugin.diff("c", "c-init");
    assert!(plugin.diff("c", "c-init") == diff, "the canonical diff is not stable");
    plugin.layer("committed", "next", &diff);
    assert!(plugin.diff("committed", "next") == diff);
    let shown = plugin.get("committed");
    assert_eq!(fs::read(shown.join("etc/issue")).unwrap(), b"changed\n");
    assert!(!shown.join("big").exists());
    plugin.put("committed");
    let text = plugin.err("GraphDriver.Remove", &json!({"ID": "base"}));
    assert!(text.contains("next"), "{text}");
    for id in ["c", "c-init", "committed", "next", "base"] {
        plugin.remove(id);
    }
    assert_eq!(plugin.mounts(), [""; 0]);
}

#[test]
fn a_layer_that_was_only_created_is_writable_and_can_be_a_parent() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    plugin.layer("base", "", &small_tar());
    plugin.ok("GraphDriver.Create", &json!({"ID": "step", "Parent": "base"}));
    let dir = plugin.get("step");
    fs::write(dir.join("made"), b"by a build\n").unwrap();
    plugin.put("step");
    plugin.ok("GraphDriver.Create", &json!({"ID": "step2", "Parent": "step"}));
    let dir = plugin.get("step2");
    assert_eq!(fs::read(dir.join("made")).unwrap(), b"by a build\n");
    fs::remove_file(dir.join("made")).unwrap();
    plugin.put("step2");
    let first = plugin.diff("step", "base");
    assert!(plugin.diff("step", "base") == first);
    assert_eq!(
        plugin.ok("GraphDriver.Changes", &json!({"ID": "step2", "Parent": "step"}))["Changes"],
        json!([{"Path": "/made", "Kind": 2}])
    );
    assert!(plugin.apply("step", "base", &small_tar()).text().contains("written through a mount"));
}

#[test]
fn remove_unmounts_even_with_references_outstanding() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    plugin.layer("base", "", &small_tar());
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "c", "Parent": "base"}));
    let dir = plugin.get("c");
    plugin.get("c");
    let open = fs::File::open(dir.join("big")).unwrap();
    plugin.remove("c");
    assert!(!plugin.home().join("c").exists());
    assert_eq!(plugin.mounts(), [""; 0]);
    drop(open);
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "c", "Parent": "base"}));
    assert_eq!(fs::read(plugin.get("c").join("etc/motd")).unwrap(), b"hello\n");
}

#[test]
fn a_killed_plugin_finds_its_mounts_again() {
    let mut plugin = Plugin::start(&[]);
    plugin.init();
    plugin.layer("base", "", &small_tar());
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "c", "Parent": "base"}));
    let dir = plugin.get("c");
    fs::write(dir.join("state"), b"before").unwrap();
    plugin.kill_and_restart();
    // The view lives on without the plugin, and no Init comes again.
    fs::write(dir.join("state"), b"after").unwrap();
    // Live-restore: Get and Put while the container runs.
    assert_eq!(plugin.get("c"), dir);
    plugin.put("c");
    assert_eq!(fs::read(dir.join("state")).unwrap(), b"after");
    plugin.put("c");
    assert_eq!(plugin.mounts(), [""; 0], "{}", plugin.log());
    assert_eq!(fs::read(plugin.get("c").join("state")).unwrap(), b"after");
}

#[test]
fn set_user_id_programs_and_device_nodes_work_through_the_merged_view() {
    // The layers themselves are mounted nosuid and nodev; what counts for a container is the view.
    let plugin = Plugin::start(&[]);
    plugin.init();
    let program = fs::read("/usr/bin/id").unwrap();
    let tar = Tar::new().entry("id", b'0', 0o4755, "", &program).end();
    plugin.layer("base", "", &tar);
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "c", "Parent": "base"}));
    let dir = plugin.get("c");
    // A user must be able to walk to it; only this test's folders are opened.
    for folder in dir.ancestors().skip(1).take_while(|f| f.starts_with(&plugin.folder)) {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o711)).unwrap();
    }
    let run = |path: &Path| {
        let output = std::process::Command::new("setpriv")
            .args(["--reuid", "12345", "--regid", "12345", "--clear-groups"])
            .arg(path)
            .args(["-u"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(run(Path::new("/usr/bin/id")), "12345\n");
    assert_eq!(run(&dir.join("id")), "0\n", "a set-user-id program of a lower layer lost its power");
    fs::copy(dir.join("id"), dir.join("id2")).unwrap();
    fs::set_permissions(dir.join("id2"), fs::Permissions::from_mode(0o4755)).unwrap();
    assert_eq!(run(&dir.join("id2")), "0\n", "a set-user-id program of the sandbox has no power");
    let made =
        std::process::Command::new("mknod").arg(dir.join("zero")).args(["c", "1", "5"]).status().unwrap();
    assert!(made.success());
    let mut bytes = [1; 4];
    std::io::Read::read_exact(&mut fs::File::open(dir.join("zero")).unwrap(), &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4]);
}

#[test]
fn a_hash_tree_stands_behind_each_layer_where_it_is_wanted() {
    let plugin = Plugin::start(&["--storage-opt", "lcow.verity=true"]);
    plugin.init();
    let tar = small_tar();
    plugin.layer("base", "", &tar);
    let facts = plugin.ok("GraphDriver.GetMetadata", &json!({"ID": "base"}))["Metadata"].clone();
    let (root, image) = (facts["verity_root"].as_str().unwrap(), plugin.home().join("base/layer.vhd"));
    let offset = facts["image_bytes"].as_str().unwrap().parse::<u64>().unwrap().next_multiple_of(4096);
    let checked = std::process::Command::new("veritysetup")
        .args(["verify", "--hash-offset", &offset.to_string()])
        .args([&image, &image])
        .arg(root)
        .output()
        .unwrap();
    assert!(checked.status.success(), "{checked:?}");
    // The tree is neither mounted nor in the way of an exact diff.
    assert!(plugin.diff("base", "") == tar);
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "c", "Parent": "base"}));
    assert!(plugin.get("c").join("big").exists());
    plugin.ok("GraphDriver.Put", &json!({"ID": "c"}));
    let scrub = || {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
            .args(["store", "scrub", "--home"])
            .arg(plugin.home())
            .output()
            .unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    assert!(scrub().0);
    let mut bytes = fs::read(&image).unwrap();
    let big = noise(1, 300_000);
    let at = bytes.windows(64).position(|w| w == &big[..64]).unwrap();
    bytes[at + 10] ^= 1;
    fs::write(&image, bytes).unwrap();
    let (sound, said) = scrub();
    assert!(!sound && said.contains("1 blocks are damaged") && said.contains("'/big'"), "{said}");
}

#[test]
fn what_stands_beside_a_layers_file_system_is_not_believed() {
    for options in
        [&[][..], &["--storage-opt", "lcow.profile=hcsshim"], &["--storage-opt", "lcow.verity=true"]]
    {
        let plugin = Plugin::start(options);
        plugin.init();
        plugin.layer("base", "", &small_tar());
        let image = plugin.home().join("base/layer.vhd");
        let good = fs::read(&image).unwrap();
        let sound = || {
            std::process::Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
                .args(["store", "scrub", "--home"])
                .arg(plugin.home())
                .stdout(std::process::Stdio::null())
                .status()
                .unwrap()
                .success()
        };
        assert!(sound(), "{options:?}");
        let footer = good.len() - 512;
        // What probes for disks would take for a qcow2; a differencing footer; another id.
        for (at, bytes) in
            [(0, &b"QFI\xfb"[..]), (1020, b"x"), (footer + 63, b"\x04"), (footer + 70, b"other")]
        {
            let mut bad = good.clone();
            bad[at..at + bytes.len()].copy_from_slice(bytes);
            bad[footer + 64..footer + 68].fill(0);
            let sum = !bad[footer..].iter().map(|b| u32::from(*b)).sum::<u32>();
            bad[footer + 64..footer + 68].copy_from_slice(&sum.to_be_bytes());
            fs::write(&image, bad).unwrap();
            assert!(!sound(), "{options:?}: byte {at}");
        }
        fs::write(&image, good).unwrap();
        assert!(sound(), "{options:?}");
    }
}

#[test]
fn blocks_have_the_size_that_was_asked_for() {
    let plugin = Plugin::start(&["--storage-opt", "lcow.blocksize=4KiB"]);
    plugin.init();
    let tar = small_tar();
    plugin.layer("base", "", &tar);
    let image = fs::read(plugin.home().join("base/layer.vhd")).unwrap();
    assert_eq!(image[1024 + 0x18..1024 + 0x1c], 2u32.to_le_bytes(), "s_log_block_size");
    assert!(plugin.diff("base", "") == tar);
    assert!(plugin.get("base").join("big").exists());
    plugin.ok("GraphDriver.Put", &json!({"ID": "base"}));
}

#[test]
fn a_layer_with_an_opaque_root_ends_the_stack_in_get_changes_and_diff() {
    let mut plugin = Plugin::start(&[]);
    plugin.init();
    plugin.layer("base", "", &Tar::new().dir("d/").file("d/old", b"1").file("gone", b"1").end());
    let hides = Tar::new().file(".wh..wh..opq", b"").dir("d/").file("d/new", b"22").end();
    plugin.layer("hides", "base", &hides);
    plugin.layer("above", "hides", &Tar::new().file("above", b"333").end());
    assert!(plugin.diff("hides", "base") == hides);
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "c", "Parent": "above"}));
    let names = |folder: &Path| {
        let all = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = all.collect();
        names.sort();
        names
    };
    for id in ["above", "c"] {
        let dir = plugin.get(id);
        assert_eq!(names(&dir), ["above", "d"], "{id}");
        assert_eq!(names(&dir.join("d")), ["new"], "{id}");
    }
    assert_eq!(names(&plugin.get("hides")), ["d"]);
    let changes = |id: &str, parent: &str| {
        let all = plugin.ok("GraphDriver.Changes", &json!({"ID": id, "Parent": parent}))["Changes"].clone();
        let all = all.as_array().unwrap().iter();
        all.map(|c| format!("{} {}", c["Kind"], c["Path"].as_str().unwrap())).collect::<Vec<_>>()
    };
    assert_eq!(changes("hides", "base"), ["0 /d", "1 /d/new", "2 /d/old", "2 /gone"]);
    assert_eq!(changes("above", "base"), ["1 /above", "0 /d", "1 /d/new", "2 /d/old", "2 /gone"]);
    assert_eq!(changes("above", ""), ["1 /above", "1 /d", "1 /d/new"]);
    let size = |id: &str| plugin.ok("GraphDriver.DiffSize", &json!({"ID": id, "Parent": ""}))["Size"].clone();
    assert_eq!(size("above"), 5);
    // The squashed layer says the same of itself.
    let squashed = plugin.diff("above", "");
    plugin.layer("squashed", "", &squashed);
    assert_eq!(names(&plugin.get("squashed")), ["above", "d"]);
    plugin.put("squashed");
    // After a crash the same disks are held, and all go.
    plugin.kill_and_restart();
    plugin.init();
    for id in ["above", "c", "hides"] {
        plugin.put(id);
    }
    assert_eq!(plugin.mounts(), [""; 0], "{}", plugin.log());
}
