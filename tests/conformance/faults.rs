//! Faults of the original (docs/faults.md) that only a whole plugin shows, on each backend.

use crate::{
    killed::soon,
    linux::plugin::debris,
    support::{Plugin, Reply, Tar, noise, send_chunks},
};
use serde_json::json;
use std::{
    fs,
    io::Write,
    os::unix::fs::{FileExt, PermissionsExt},
    path::Path,
    time::{Duration, Instant},
};

/// A plugin whose machines need no first boot, if another test has made their template already.
fn started(options: &[String]) -> Plugin {
    let arguments: Vec<&str> = options.iter().flat_map(|o| ["--storage-opt", o]).collect();
    let plugin = Plugin::start(&arguments);
    let made = Path::new(env!("CARGO_TARGET_TMPDIR")).join("conformance/.svm");
    if options.iter().any(|o| o == "lcow.svm=qemu") {
        for key in fs::read_dir(made).into_iter().flatten().flatten() {
            let copy = plugin.folder.join("root/.svm").join(key.file_name());
            fs::create_dir_all(&copy).unwrap();
            for file in fs::read_dir(key.path()).into_iter().flatten().flatten() {
                // Never written once it is made. Beyond this file system, the plugin makes its own.
                let _ = fs::hard_link(file.path(), copy.join(file.file_name()));
            }
        }
    }
    plugin.init();
    plugin
}

fn tar(seed: u64, bytes: usize) -> Vec<u8> {
    Tar::new().dir("d").file("d/f", &noise(seed, bytes)).end()
}

/// The tool's exit code was never checked: half a tar looked like a whole one.
pub(crate) fn fault_6_an_export_that_fails_half_way_is_cut(options: &[String]) {
    let plugin = started(options);
    let whole = tar(1, 6_000_000);
    plugin.layer("a", "", &whole);
    let path = plugin.home().join("a/layer.vhd");
    let image = fs::read(&path).unwrap();
    let part = noise(1, 6_000_000)[5_000_000..5_000_064].to_vec();
    let at = image.windows(part.len()).position(|w| w == part).expect("its bytes");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[!image[at]], at as u64).unwrap();
    let reply = plugin.call("GraphDriver.Diff", &json!({"ID": "a", "Parent": ""}));
    assert!(!reply.complete, "a diff with other bytes than were applied ends like a good one");
    assert!(plugin.log().contains("digest"), "{}", plugin.log());
    // The same layer as it was comes whole again.
    file.write_all_at(&image[at..=at], at as u64).unwrap();
    assert!(plugin.diff("a", "") == whole);
}

/// A read-only export hung to the time-out; and Diff needed a Get before it (fault 23).
pub(crate) fn fault_7_and_23_a_read_only_layer_is_exported_at_once_and_without_get(options: &[String]) {
    let mut plugin = started(options);
    let whole = tar(2, 100_000);
    plugin.layer("a", "", &whole);
    for file in fs::read_dir(plugin.home().join("a")).unwrap().flatten() {
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o400)).unwrap();
    }
    // A process that has never seen the layer, and no Get.
    plugin.kill_and_restart();
    plugin.init();
    let begin = Instant::now();
    assert!(plugin.diff("a", "") == whole);
    // The time-out is five minutes, and this takes a second even under emulation.
    assert!(begin.elapsed() < Duration::from_mins(1), "{:?}", begin.elapsed());
    assert_eq!(plugin.mounts(), Vec::<String>::new());
}

/// Cleanup deleted what VMs still held, and Init never did.
pub(crate) fn fault_14_what_a_vm_holds_is_removed_all_the_same(options: &[String]) {
    let plugin = started(options);
    let whole = tar(3, 12_000_000);
    plugin.layer("a", "", &whole);
    let mut reader = plugin.connect();
    let body = r#"{"ID":"a","Parent":""}"#;
    let head = format!("POST /GraphDriver.Diff HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n", body.len());
    reader.write_all(format!("{head}{body}").as_bytes()).unwrap();
    std::io::Read::read_exact(&mut reader, &mut [0; 1000]).unwrap();
    plugin.remove("a");
    plugin.ok("GraphDriver.Cleanup", &json!({}));
    drop(reader);
    let left = || {
        let entries = fs::read_dir(plugin.home()).unwrap().flatten();
        let names = entries.map(|e| e.file_name().to_string_lossy().into_owned());
        names.filter(|n| n == "a" || n.contains("removing")).collect::<Vec<_>>()
    };
    soon("the layer's folder is gone", &plugin, || left().is_empty() && debris(&plugin).is_empty());
    // The id is free, and the plugin goes on.
    plugin.layer("a", "", &tar(4, 1000));
    assert!(plugin.diff("a", "") == tar(4, 1000));
}

/// Cache files were copied while they were written.
pub(crate) fn fault_20_blanks_made_at_one_time_are_all_whole(options: &[String]) {
    const AT_ONCE: usize = 6;
    let plugin = started(options);
    std::thread::scope(|scope| {
        for n in 0..AT_ONCE {
            let plugin = &plugin;
            scope.spawn(move || {
                plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": format!("rw{n}"), "Parent": ""}));
            });
        }
    });
    let first = plugin.diff("rw0", "");
    let blank = fs::read_dir(plugin.home().join("rw0")).unwrap().flatten().find_map(|e| {
        let name = e.file_name().to_string_lossy().into_owned();
        name.starts_with("sandbox.").then_some(name)
    });
    let blank = blank.expect("a sandbox file");
    let length = |n: usize| fs::metadata(plugin.home().join(format!("rw{n}")).join(&blank)).unwrap().len();
    for n in 1..AT_ONCE {
        assert_eq!(length(n), length(0), "rw{n}");
        assert!(plugin.diff(&format!("rw{n}"), "") == first, "rw{n}: another blank");
        let changes = plugin.ok("GraphDriver.Changes", &json!({"ID": format!("rw{n}"), "Parent": ""}));
        assert!(changes["Changes"].as_array().is_none_or(Vec::is_empty), "{changes}");
    }
}

/// The lock of the scratch folder was held across VM work.
pub(crate) fn fault_21_an_apply_that_stands_still_holds_up_nobody(options: &[String]) {
    let plugin = started(options);
    plugin.ok("GraphDriver.Create", &json!({"ID": "slow", "Parent": ""}));
    let whole = tar(5, 600_000);
    let mut slow = plugin.begin_apply("slow", "");
    send_chunks(&mut slow, &whole[..300_000], 50_000).unwrap();
    plugin.wait_for_state("slow", "applying");
    for n in 0..3 {
        let id = format!("quick{n}");
        plugin.layer(&id, "", &tar(6, 10_000));
        assert!(plugin.diff(&id, "") == tar(6, 10_000));
        plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": format!("rw{n}"), "Parent": id}));
        plugin.remove(&format!("rw{n}"));
        plugin.remove(&id);
    }
    send_chunks(&mut slow, &whole[300_000..], 50_000).unwrap();
    slow.write_all(b"0\r\n\r\n").unwrap();
    let reply = Reply::read(slow).unwrap();
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(plugin.diff("slow", "") == whole);
}

/// The walk at the start crashed on a missing folder.
pub(crate) fn fault_22_missing_folders_are_no_reason_to_crash(options: &[String]) {
    let mut plugin = started(options);
    plugin.layer("a", "", &tar(7, 10_000));
    plugin.terminate();
    for folder in ["scratch", "staging", "cache", "mnt", "mounts"] {
        let path = plugin.home().join(folder);
        if path.exists() {
            fs::remove_dir_all(path).unwrap();
        }
    }
    let _ = fs::remove_dir_all(plugin.folder.join("root/.svm"));
    plugin.start_again();
    plugin.init();
    assert!(plugin.diff("a", "") == tar(7, 10_000));
    plugin.layer("b", "a", &tar(8, 10_000));
}
