//! Whatever happens, nothing stays frozen.

use super::{
    faults::{Faults, writing},
    is_bound, sandbox_mount, shown, soon,
    support::Plugin,
};
use serde_json::json;
use std::{fs, path::Path, process::Command, time::Duration};

/// EIO of Linux.
const EIO: i32 = 5;
/// Failures of a thaw that show that it is tried again.
const SOME: usize = 5;

#[test]
fn a_thaw_that_fails_is_tried_again_until_it_works() {
    let (plugin, faults) = Faults::plugin(&[]);
    let dir = shown(&plugin);
    for method in ["Diff", "Changes", "DiffSize"] {
        fs::write(dir.join(method), "written").unwrap();
        let before = faults.count("thaw", EIO);
        faults.fail("thaw");
        let request = json!({"ID": "c", "Parent": "base"});
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| plugin.call(&format!("GraphDriver.{method}"), &request));
            soon("thaws fail", &plugin, || faults.count("thaw", EIO) >= before + SOME);
            let mut written = writing(&dir);
            std::thread::sleep(Duration::from_millis(100));
            assert!(!written(), "{method}: it is frozen no more, though no thaw worked");
            faults.mend("thaw");
            soon("it can be written", &plugin, written);
            let reply = asked.join().unwrap();
            assert_eq!(reply.status, 200, "{method}: {}", reply.text());
        });
    }
    assert!(plugin.log().contains("cannot be thawed"), "{}", plugin.log());
}

#[test]
fn a_request_does_not_wait_for_ever_for_a_thaw_but_the_thaw_goes_on_being_tried() {
    let (plugin, faults) = Faults::plugin(&[]);
    let dir = shown(&plugin);
    fs::write(dir.join("file"), "written").unwrap();
    faults.fail("thaw");
    let text = plugin.err("GraphDriver.Changes", &json!({"ID": "c", "Parent": "base"}));
    assert!(text.contains("stays frozen"), "{text}");
    // Nobody unmounts it meanwhile: other layers are served, this one waits.
    plugin.ok("GraphDriver.Create", &json!({"ID": "other", "Parent": "base"}));
    let sandbox = plugin.home().join("c/sandbox.vhd");
    std::thread::scope(|scope| {
        let removed = scope.spawn(|| plugin.remove("c"));
        std::thread::sleep(Duration::from_millis(200));
        assert!(!removed.is_finished() && sandbox.exists(), "removed while it is frozen");
        let written = writing(&dir);
        faults.mend("thaw");
        soon("it can be written", &plugin, written);
        removed.join().unwrap();
    });
    assert_eq!(plugin.mounts(), [""; 0], "{}", plugin.log());
}

#[test]
fn a_second_signal_thaws_before_the_process_ends() {
    let (mut plugin, faults) = Faults::plugin(&[]);
    let dir = shown(&plugin);
    fs::write(dir.join("file"), "written").unwrap();
    faults.fail("thaw");
    std::thread::scope(|scope| {
        let (socket, folder) = (plugin.connect(), dir.clone());
        let asked = scope.spawn(move || {
            use std::io::{Read, Write};
            let mut socket = socket;
            let body = "{\"ID\":\"c\",\"Parent\":\"base\"}";
            let head = format!(
                "POST /GraphDriver.Diff HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            socket.write_all(format!("{head}{body}").as_bytes()).unwrap();
            // However it ends: the process does.
            let _ = socket.read_to_end(&mut Vec::new());
        });
        soon("thaws fail", &plugin, || faults.count("thaw", EIO) >= SOME);
        let mut written = writing(&folder);
        let pid = rustix::process::Pid::from_raw(plugin.pid().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        soon("the first signal is heard", &plugin, || plugin.log().contains("a second signal stops at once"));
        assert!(!written());
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        soon("the second is heard", &plugin, || plugin.log().contains("stopped at once by a second signal"));
        faults.mend("thaw");
        soon("it can be written", &plugin, written);
        asked.join().unwrap();
    });
    assert_eq!(plugin.terminate(), Some(1));
}

#[test]
fn what_a_killed_process_left_frozen_is_thawed_at_the_start() {
    let mut plugin = Plugin::start(&[]);
    let dir = shown(&plugin);
    let freeze =
        |disk: &Path| assert!(Command::new("fsfreeze").arg("-f").arg(disk).status().unwrap().success());
    plugin.kill();
    freeze(&sandbox_mount(&plugin));
    plugin.start_again();
    plugin.init();
    soon("it can be written", &plugin, writing(&dir));
    // As it is after one that had a mount namespace of its own: the mounts are gone, the frozen file system is not.
    plugin.kill();
    let disk = sandbox_mount(&plugin);
    freeze(&disk);
    for point in [&dir, &disk] {
        assert!(Command::new("umount").arg("-l").arg(point).status().unwrap().success());
    }
    let sandbox = plugin.home().join("c/sandbox.vhd");
    assert!(is_bound(&sandbox), "it lives on as long as it is frozen");
    plugin.start_again();
    plugin.init();
    soon("its loop device is gone", &plugin, || !is_bound(&sandbox));
    let dir = plugin.get("c");
    soon("it can be written", &plugin, writing(&dir));
}
