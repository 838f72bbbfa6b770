//! Disks that fill up, peers that stand still, workers that are killed, wrong options: what an operator meets.
//!
//! A full disk needs a small one: a tmpfs, which root may mount (Windows: a folder on one, named by `LCOW_SMALL_DISK`).

#[cfg(target_os = "linux")]
mod crowd;
#[cfg(target_os = "linux")]
mod history;
#[cfg(target_os = "linux")]
mod linux;
#[cfg(target_os = "linux")]
mod mark;
#[path = "../support/mod.rs"]
mod support;
#[cfg(target_os = "linux")]
mod truth;
#[cfg(target_os = "linux")]
mod walls;

use serde_json::{Value, json};
use std::{
    fs,
    io::Write,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};
use support::{
    Plugin, Reply, Tar,
    machine::{Machine, SmallDisk},
    noise, send_chunks,
    transport::{FLAG, address},
};

#[test]
fn a_full_disk_during_an_apply_is_an_error_and_leaves_no_trace() {
    let mut plugin = Plugin::start(&["--storage-opt", "lcow.minfree=0"]);
    let Some(disk) = SmallDisk::of(plugin.home(), SmallDisk::BYTES) else { return };
    plugin.home.clone_from(&disk.folder);
    plugin.init();
    plugin.layer("small", "", &Tar::new().file("f", &noise(1, 100_000)).end());
    let before = disk.free();
    plugin.ok("GraphDriver.Create", &json!({"ID": "large"}));
    let reply = plugin.apply("large", "", &Tar::new().file("f", &noise(2, 20 << 20)).end());
    assert!(reply.status >= 400, "{}", reply.text());
    let text = reply.text();
    // Linux and Windows speak of space, Wine of a full disk.
    let lower = text.to_lowercase();
    assert!(text.contains("large") && (lower.contains("space") || lower.contains("disk full")), "{text}");
    plugin.remove("large");
    wait_until_empty(&plugin.home().join("staging"));
    assert!(disk.free() >= before - 64 * 1024, "{} of {before} bytes came back", disk.free());
    plugin.layer("again", "small", &Tar::new().file("g", &noise(3, 1 << 20)).end());
    assert!(plugin.diff("small", "") == Tar::new().file("f", &noise(1, 100_000)).end());
}

#[test]
fn a_transfer_that_stands_still_ends_and_a_slow_one_does_not() {
    // So long that a busy machine's pauses are not taken for idleness.
    let plugin = Plugin::start(&["--storage-opt", "lcow.timeout=5"]);
    plugin.init();
    let tar = Tar::new().file("f", &noise(1, 30_000)).end();
    // Slow: longer than the limit as a whole, never idle for long.
    plugin.ok("GraphDriver.Create", &json!({"ID": "slow"}));
    let mut stream = plugin.begin_apply("slow", "");
    for part in tar.chunks(tar.len() / 14) {
        send_chunks(&mut stream, part, 4096).unwrap();
        std::thread::sleep(Duration::from_millis(400));
    }
    stream.write_all(b"0\r\n\r\n").unwrap();
    let reply = Reply::read(stream).unwrap();
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(plugin.diff("slow", "") == tar);
    // Idle.
    plugin.ok("GraphDriver.Create", &json!({"ID": "idle"}));
    let mut stream = plugin.begin_apply("idle", "");
    send_chunks(&mut stream, &tar[..5000], 1000).unwrap();
    // Reading ends with an error of its own after a minute.
    let reply = Reply::read(stream).unwrap();
    assert!(reply.status >= 400 && reply.text().contains("lcow.timeout"), "{}", reply.text());
    plugin.remove("idle");
}

#[test]
fn a_client_that_never_reads_its_diff_costs_nothing_for_long() {
    let plugin = Plugin::start(&["--storage-opt", "lcow.timeout=1", "--storage-opt", "lcow.pool.max=2"]);
    plugin.init();
    let tar = Tar::new().file("f", &noise(1, 24 << 20)).end();
    plugin.layer("a", "", &tar);
    let mut stuck = Vec::new();
    for _ in 0..3 {
        let mut stream = plugin.connect();
        let body = json!({"ID": "a", "Parent": ""}).to_string();
        write!(
            stream,
            "POST /GraphDriver.Diff HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        stuck.push(stream);
        std::thread::sleep(Duration::from_millis(100));
    }
    // It waits for one of theirs to be given up, and no reply is waited for longer than a minute.
    assert!(plugin.diff("a", "") == tar);
    drop(stuck);
}

#[test]
fn a_killed_worker_fails_one_request_and_leaves_nothing_behind() {
    let plugin = Plugin::start(&["--storage-opt", "lcow.pool.spares=0"]);
    plugin.init();
    let tar = Tar::new().file("f", &noise(1, 200_000)).end();
    plugin.layer("good", "", &tar);
    plugin.ok("GraphDriver.Create", &json!({"ID": "bad"}));
    let mut stream = plugin.begin_apply("bad", "");
    send_chunks(&mut stream, &tar[..100_000], 10_000).unwrap();
    // Time to get into the middle of the stream.
    std::thread::sleep(Duration::from_millis(300));
    Machine::of(&worker_of(&plugin, "bad_svm")).kill();
    let reply = Reply::read(stream).unwrap();
    assert!(reply.status >= 400 && reply.text().contains("died"), "{}", reply.text());
    plugin.remove("bad");
    plugin.layer("bad", "good", &tar);
    assert!(plugin.diff("bad", "good") == tar);
    wait_until_empty(&plugin.home().join("staging"));
}

/// What runs behind the service VM of this name, once there is one.
fn worker_of(plugin: &Plugin, name: &str) -> String {
    let begin = Instant::now();
    loop {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"));
        let done = command.args(["svm", "ls", "--json", FLAG]).arg(plugin.socket()).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let all: Vec<Value> = serde_json::from_slice(&done.stdout).unwrap();
        if let Some(vm) = all.iter().find(|vm| vm["name"] == name) {
            return vm["machine"].as_str().unwrap().to_owned();
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "there is no worker: {all:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Windows lets a folder go only after the last worker has let go of its files.
fn wait_until_empty(folder: &Path) {
    let begin = Instant::now();
    while fs::read_dir(folder).unwrap().count() > 0 {
        let patience = if cfg!(windows) { Duration::from_secs(10) } else { Duration::ZERO };
        assert!(begin.elapsed() <= patience, "something stays in {}", folder.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn wrong_options_are_refused_at_the_start_with_a_message_that_helps() {
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
            .args(["serve", "--root"])
            .arg(folder.path().join("root"))
            .arg(FLAG)
            .arg(address(folder.path()))
            .args(arguments)
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let text = run(&["--storage-opt", "lcow.sandboxsize=tiny"]);
    assert!(text.contains("lcow.sandboxsize") && text.contains("tiny") && text.contains("16 MiB"), "{text}");
    let text = run(&["--storage-opt", "lcow.nosuch=1"]);
    assert!(text.contains("lcow.nosuch") && text.contains("lcow.globalmode"), "{text}");
    let missing = folder.path().join("missing.toml");
    let text = run(&["--config", missing.to_str().unwrap()]);
    assert!(text.contains(missing.to_str().unwrap()), "{text}");
    assert!(!folder.path().join("root").exists());
}
