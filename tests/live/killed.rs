//! Kills while a sandbox is frozen, and sandboxes that others freeze: afterwards nothing is mounted, attached or frozen,
//! what a container wrote is there, and no loop device of anybody else was touched.
//!
//! ```text
//!   thaws fail ─► Diff ─► frozen ─► kill -9 ─► (mount namespace gone, mounts gone, file gone) ─► a new process ─► Remove
//! ```

use super::{
    faults::{Faults, writing},
    ground::{read, unpack},
    is_bound, sandbox_mount, shown, soon,
    support::{
        Plugin, Tar,
        leftovers::{devices_below, release},
        noise,
    },
};
use serde_json::json;
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// EIO of Linux.
const EIO: i32 = 5;
/// No request may take longer, whatever is frozen: a thaw that fails is given up long before.
const PROMPT: Duration = Duration::from_secs(20);

fn kept() -> Vec<u8> {
    noise(11, 300_000)
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn fsfreeze(disk: &Path) {
    run("fsfreeze", &["-f", disk.to_str().unwrap()]);
}

fn unmount_lazily(point: &Path) {
    run("umount", &["-l", point.to_str().unwrap()]);
}

/// kill -9 in the middle of a Diff, while its sandbox is frozen; `thaws` says whether the next process can thaw.
fn kill_in_mid_freeze(plugin: &mut Plugin, faults: &Faults, thaws: bool) {
    let before = faults.count("thaw", EIO);
    faults.fail("thaw");
    let mut asked = plugin.connect();
    let body = json!({"ID": "c", "Parent": "base"}).to_string();
    write!(
        asked,
        "POST /GraphDriver.Diff HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    soon("it is frozen, and a thaw has failed", plugin, || faults.count("thaw", EIO) > before);
    plugin.kill();
    if thaws {
        faults.mend("thaw");
    }
}

/// A plugin whose mounts are in a mount namespace of their own, which ends with it; where its sandbox is seen from here.
fn shown_in_a_namespace(plugin: &mut Plugin) -> PathBuf {
    plugin.kill();
    plugin.launcher = ["unshare", "--mount", "--propagation", "private"].map(str::to_owned).into();
    plugin.start_again();
    plugin.launcher.clear();
    let dir = shown(plugin);
    Path::new(&format!("/proc/{}/root", plugin.pid())).join(dir.strip_prefix("/").unwrap())
}

/// Waits until no loop device of the plugin's files is left.
fn no_loop_device(plugin: &Plugin) {
    let all = || devices_below(&plugin.folder);
    let begin = Instant::now();
    while !all().is_empty() {
        assert!(begin.elapsed() < PROMPT, "loop devices stay: {:?}\n{}", all(), plugin.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A request that must be answered soon; its status and text.
fn prompt(plugin: &Plugin, method: &str) -> (u16, String) {
    let begin = Instant::now();
    let reply = plugin.call(&format!("GraphDriver.{method}"), &json!({"ID": "c", "Parent": "base"}));
    assert!(begin.elapsed() < PROMPT, "{method} took {:?}\n{}", begin.elapsed(), plugin.log());
    (reply.status, reply.text())
}

/// Removes the container, and looks whether anything is left of it.
fn remove_and_look(plugin: &Plugin) {
    let (status, text) = prompt(plugin, "Remove");
    assert_eq!(status, 200, "{text}\n{}", plugin.log());
    assert_eq!(plugin.mounts(), [""; 0], "{}", plugin.log());
    no_loop_device(plugin);
    assert!(!plugin.home().join("c").exists());
    let left = |name: &str| -> Vec<_> {
        fs::read_dir(plugin.home().join(name)).unwrap().map(|entry| entry.unwrap().file_name()).collect()
    };
    soon("nothing is left in staging", plugin, || left("staging").is_empty());
    assert_eq!(left("mnt"), ["empty"]);
    // The next of its name is as any other.
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "c", "Parent": "base"}));
    let dir = plugin.get("c");
    assert!(!dir.join("kept").exists());
    fs::write(dir.join("new"), "new").unwrap();
    plugin.put("c");
    plugin.remove("c");
    no_loop_device(plugin);
}

/// That what the container wrote is there, and that it goes on.
fn look_at_what_was_kept(plugin: &Plugin) {
    let dir = plugin.get("c");
    assert!(fs::read(dir.join("kept")).unwrap() == kept());
    soon("it can be written", plugin, writing(&dir));
    assert!(read(&unpack(&plugin.diff("c", "base")), "kept") == kept());
    plugin.put("c");
}

#[test]
fn a_kill_in_mid_freeze_then_a_restart_and_remove() {
    let (mut plugin, faults) = Faults::plugin(&[]);
    let dir = shown(&plugin);
    fs::write(dir.join("kept"), kept()).unwrap();
    kill_in_mid_freeze(&mut plugin, &faults, true);
    let written = writing(&dir);
    plugin.start_again();
    soon("it can be written", &plugin, written);
    look_at_what_was_kept(&plugin);
    remove_and_look(&plugin);
}

#[test]
fn a_kill_in_mid_freeze_in_a_mount_namespace_that_ends_with_it() {
    let (mut plugin, faults) = Faults::plugin(&[]);
    let dir = shown_in_a_namespace(&mut plugin);
    fs::write(dir.join("kept"), kept()).unwrap();
    kill_in_mid_freeze(&mut plugin, &faults, true);
    assert_eq!(plugin.mounts(), [""; 0], "they were in the namespace");
    let sandbox = plugin.home().join("c/sandbox.vhd");
    soon("only what is frozen lives on", &plugin, || devices_below(&plugin.folder).len() == 1);
    assert!(is_bound(&sandbox));
    plugin.start_again();
    no_loop_device(&plugin);
    look_at_what_was_kept(&plugin);
    remove_and_look(&plugin);
}

#[test]
fn a_kill_in_mid_freeze_then_a_lazy_unmount() {
    let (mut plugin, faults) = Faults::plugin(&[]);
    let dir = shown(&plugin);
    fs::write(dir.join("kept"), kept()).unwrap();
    kill_in_mid_freeze(&mut plugin, &faults, true);
    for point in [dir, sandbox_mount(&plugin)] {
        unmount_lazily(&point);
    }
    assert!(is_bound(&plugin.home().join("c/sandbox.vhd")), "it lives on as long as it is frozen");
    plugin.start_again();
    soon("it is let go", &plugin, || !is_bound(&plugin.home().join("c/sandbox.vhd")));
    look_at_what_was_kept(&plugin);
    remove_and_look(&plugin);
}

#[test]
fn a_remove_that_comes_first_thaws_or_fails_and_loses_nothing() {
    for hidden in [false, true] {
        let (mut plugin, faults) = Faults::plugin(&[]);
        let dir = shown(&plugin);
        fs::write(dir.join("kept"), kept()).unwrap();
        kill_in_mid_freeze(&mut plugin, &faults, false);
        if hidden {
            for point in [dir, sandbox_mount(&plugin)] {
                unmount_lazily(&point);
            }
        }
        // No thaw works at the start, and none at the Remove.
        plugin.start_again();
        let (status, text) = prompt(&plugin, "Remove");
        assert!(status >= 400 && text.contains("thaw"), "hidden: {hidden}, {status}: {text}");
        assert_eq!(plugin.ok("GraphDriver.Exists", &json!({"ID": "c"}))["Exists"], true);
        assert!(is_bound(&plugin.home().join("c/sandbox.vhd")), "its file is known by its name");
        faults.mend("thaw");
        remove_and_look(&plugin);
    }
}

#[test]
fn what_could_not_be_thawed_at_the_start_is_thawed_later_without_a_request() {
    for hidden in [false, true] {
        let (mut plugin, faults) = Faults::plugin(&[]);
        let dir = shown(&plugin);
        fs::write(dir.join("kept"), kept()).unwrap();
        kill_in_mid_freeze(&mut plugin, &faults, false);
        let sandbox = plugin.home().join("c/sandbox.vhd");
        if hidden {
            for point in [dir.clone(), sandbox_mount(&plugin)] {
                unmount_lazily(&point);
            }
        }
        plugin.start_again();
        assert!(plugin.log().contains("cannot be thawed; retrying until it succeeds"), "{}", plugin.log());
        faults.mend("thaw");
        if hidden {
            soon("it is let go", &plugin, || !is_bound(&sandbox));
        } else {
            soon("it can be written", &plugin, writing(&dir));
            plugin.put("c");
        }
        look_at_what_was_kept(&plugin);
        remove_and_look(&plugin);
    }
}

#[test]
fn a_frozen_sandbox_whose_file_is_deleted_is_let_go_at_the_start() {
    for namespace in [false, true] {
        let (mut plugin, faults) = Faults::plugin(&[]);
        let dir = if namespace { shown_in_a_namespace(&mut plugin) } else { shown(&plugin) };
        fs::write(dir.join("kept"), kept()).unwrap();
        kill_in_mid_freeze(&mut plugin, &faults, true);
        if !namespace {
            for point in [dir, sandbox_mount(&plugin)] {
                unmount_lazily(&point);
            }
        }
        fs::remove_dir_all(plugin.home().join("c")).unwrap();
        let bound = devices_below(&plugin.folder);
        assert!(bound.iter().any(|(_, file)| file.ends_with("sandbox.vhd (deleted)")), "{bound:?}");
        plugin.start_again();
        remove_and_look(&plugin);
    }
}

#[test]
fn a_sandbox_that_an_operator_froze_is_thawed_by_put_and_by_remove_and_named_by_diff() {
    let plugin = Plugin::start(&[]);
    let dir = shown(&plugin);
    fs::write(dir.join("kept"), kept()).unwrap();
    let disk = sandbox_mount(&plugin);
    fsfreeze(&disk);
    for method in ["Diff", "Changes", "DiffSize"] {
        let (status, text) = prompt(&plugin, method);
        assert!(status >= 400 && text.contains("fsfreeze -u"), "{method}: {text}");
    }
    let mut written = writing(&dir);
    std::thread::sleep(Duration::from_millis(200));
    assert!(!written(), "a Diff must not thaw what somebody else has frozen");
    let (status, text) = prompt(&plugin, "Put");
    assert_eq!(status, 200, "{text}");
    soon("who waited goes on", &plugin, written);
    assert_eq!(plugin.mounts(), [""; 0], "{}", plugin.log());
    no_loop_device(&plugin);
    look_at_what_was_kept(&plugin);
    // The end of the view would wait for the file that only this descriptor keeps.
    let dir = plugin.get("c");
    let mut open = File::create(dir.join("unlinked")).unwrap();
    open.write_all(&kept()).unwrap();
    fs::remove_file(dir.join("unlinked")).unwrap();
    fsfreeze(&sandbox_mount(&plugin));
    let written = writing(&dir);
    let (status, text) = prompt(&plugin, "Remove");
    assert_eq!(status, 200, "{text}");
    soon("who waited goes on", &plugin, written);
    assert_eq!(plugin.mounts(), [""; 0], "{}", plugin.log());
    drop(open);
    no_loop_device(&plugin);
}

#[test]
fn an_image_that_an_operator_froze_is_let_go_too() {
    let plugin = Plugin::start(&[]);
    plugin.init();
    plugin.layer("base", "", &Tar::new().dir("etc/").file("etc/motd", b"hello\n").end());
    plugin.get("base");
    let image = |point: &String| point.contains("/mnt/");
    let image = plugin.mounts().into_iter().find(image).unwrap();
    fsfreeze(Path::new(&image));
    plugin.put("base");
    assert_eq!(plugin.mounts(), [""; 0], "{}", plugin.log());
    no_loop_device(&plugin);
}

/// Lets a loop device of a test go, frozen or not.
struct Strange(String);

impl Drop for Strange {
    fn drop(&mut self) {
        release(&self.0);
    }
}

/// A frozen ext4 without a mount on a loop device that is not the plugin's.
fn strange(file: &Path) -> Strange {
    let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let strange = Strange(String::from_utf8(output.stdout).unwrap().trim().to_owned());
    let place = tempfile::tempdir().unwrap();
    run("mount", &["-t", "ext4", &strange.0, place.path().to_str().unwrap()]);
    fsfreeze(place.path());
    unmount_lazily(place.path());
    strange
}

/// Whether what is on a loop device is frozen; it stays so.
fn is_frozen(device: &str) -> bool {
    let place = tempfile::tempdir().unwrap();
    run("mount", &["-t", "ext4", device, place.path().to_str().unwrap()]);
    let frozen = Command::new("fsfreeze").arg("-f").arg(place.path()).output().unwrap();
    unmount_lazily(place.path());
    String::from_utf8_lossy(&frozen.stderr).contains("busy")
}

#[test]
fn no_loop_device_of_others_is_touched_whatever_its_file_is_called() {
    let mut plugin = Plugin::start(&[]);
    plugin.init();
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "c", "StorageOpt": {"size": "32m"}}));
    plugin.kill();
    let sandbox = plugin.home().join("c/sandbox.vhd");
    // A home whose path begins with ours, a file of ours that an operator attached, and one that is deleted by now.
    let others = plugin.folder.join("home2/c");
    fs::create_dir_all(&others).unwrap();
    let mut all = Vec::new();
    for (file, keep) in [
        (others.join("sandbox.vhd"), true),
        (plugin.home().join("staging/sandbox.vhd"), true),
        (plugin.home().join("c/copy.vhd"), false),
    ] {
        fs::copy(&sandbox, &file).unwrap();
        all.push(strange(&file));
        if !keep {
            fs::remove_file(&file).unwrap();
        }
    }
    all.push(strange(&sandbox));
    plugin.start_again();
    plugin.remove("c");
    plugin.kill_and_restart();
    for Strange(device) in &all {
        assert!(
            is_frozen(device),
            "{device} was touched: {:?}\n{}",
            devices_below(&plugin.folder),
            plugin.log()
        );
    }
    assert_eq!(all.len(), 4);
}

/// A process in a mount namespace of its own, which got copies of all mounts; ended on drop.
struct Namespace(std::process::Child);

impl Namespace {
    fn new() -> Self {
        let mut child = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", "echo there; exec sleep 120"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("unshare starts");
        let mut line = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).expect("the namespace is there");
        Self(child)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_was_written_is_in_the_diff_although_another_namespace_keeps_the_mount() {
    let plugin = Plugin::start(&[]);
    let view = shown(&plugin);
    let namespace = Namespace::new();
    fs::write(view.join("late"), "written after the mounts were copied\n").unwrap();
    plugin.put("c");
    let tar = plugin.diff("c", "base");
    assert!(tar.windows(21).any(|bytes| bytes == b"written after the mou"), "an old state was read");
    drop(namespace);
}
