//! What is in the plugin, and how its program behaves as the first process of a container.

use crate::{
    command::{children, wait_until},
    plugin::{archive, script},
    room::READY,
};
use lcow_graphdriver::config::{SPECS, env_name};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const CONFIG: &str = include_str!("../../plugin-config.json");
const PAGE: &str = include_str!("../../docs/managed-plugin.md");
/// Variables of the configuration that are no options.
const OTHERS: [&str; 2] = ["LCOW_LOG_FORMAT", "RUST_LOG"];
/// Options of another face: dockerd alone calls a managed plugin.
const CONTAINERD: &str = "lcow.containerd.";

#[test]
fn the_configuration_offers_every_option_and_the_page_explains_every_line() {
    let config: Value = serde_json::from_str(CONFIG).expect("plugin-config.json is JSON");
    let env = config["env"].as_array().expect("env");
    let named = |v: &Value| v["name"].as_str().expect("name").to_owned();
    let names: BTreeSet<String> = env.iter().map(named).collect();
    let wanted = SPECS.iter().map(|s| s.name).filter(|name| !name.starts_with(CONTAINERD)).map(env_name);
    let wanted: BTreeSet<String> = wanted.chain(OTHERS.map(str::to_owned)).collect();
    assert_eq!(names, wanted);
    for variable in env {
        assert_eq!(variable["settable"][0], "value", "{variable}");
        // A value would hide the one of a --config file or a default.
        assert!(variable["value"].is_null(), "{variable}");
        if let Some(spec) = SPECS.iter().find(|s| env_name(s.name) == named(variable)) {
            let text = format!("{} Accepts {}. Default {}.", spec.help, spec.accepts, spec.default);
            assert_eq!(variable["description"], text, "{}", spec.name);
        }
    }
    for key in config.as_object().expect("an object").keys() {
        assert!(PAGE.contains(&format!("`{key}`")), "docs/managed-plugin.md does not explain `{key}`");
    }
    // What would give a layer's bytes more than they need.
    assert_eq!(config["linux"]["capabilities"], serde_json::json!(["CAP_SYS_ADMIN"]));
    assert_eq!(config["network"]["type"], "none");
    assert_eq!(config["mounts"], serde_json::json!([]));
}

#[test]
fn the_plugin_is_one_static_program_and_the_same_bytes_each_time() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let status = Command::new("tar").args(["-C", &text(folder.path()), "-xzf", &text(archive())]).status();
    assert!(status.expect("tar").success());
    let mut files = Vec::new();
    let mut folders = vec![folder.path().join("rootfs")];
    while let Some(at) = folders.pop() {
        for entry in fs::read_dir(at).expect("folder").flatten() {
            if entry.file_type().expect("type").is_dir() {
                folders.push(entry.path());
            } else {
                files.push(entry.path());
            }
        }
    }
    assert_eq!(files, [folder.path().join("rootfs/bin/lcow-graphdriver")]);
    let linked = Command::new("ldd").arg(&files[0]).output().expect("ldd");
    assert!(!String::from_utf8_lossy(&linked.stdout).contains("=>"), "the program needs shared libraries");

    let pack = |name: &str, version: &str| {
        let path = folder.path().join(name);
        script(
            "build-plugin",
            &["--program", &text(&files[0]), "--version", version, "--save", &text(&path)],
        );
        fs::read(path).expect("archive")
    };
    let first = pack("one.tar.gz", "1.2.3");
    assert!(first == pack("two.tar.gz", "1.2.3"), "the same plugin twice is not the same bytes");
    assert!(first != pack("three.tar.gz", "1.2.4"), "the version is not in the plugin");

    let more = folder.path().join("more");
    fs::create_dir_all(more.join("usr/share/lcow")).expect("folder");
    fs::write(more.join("usr/share/lcow/kernel"), "kernel").expect("file");
    let path = text(&folder.path().join("four.tar.gz"));
    script("build-plugin", &["--program", &text(&files[0]), "--add", &text(&more), "--save", &path]);
    let list = Command::new("tar").args(["-tzf", &path]).output().expect("tar").stdout;
    let list = String::from_utf8_lossy(&list);
    assert!(
        list.contains("rootfs/usr/share/lcow/kernel") && list.contains("rootfs/bin/lcow-graphdriver"),
        "{list}"
    );
}

/// `unshare` and what runs in it; ended with the test.
struct Namespace(Child);

impl Drop for Namespace {
    fn drop(&mut self) {
        for pid in children(self.0.id()) {
            crate::command::kill(pid);
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn as_the_first_process_it_is_ready_soon_reaps_orphans_and_ends_on_sigterm() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
    let socket = folder.path().join("lcow.sock");
    let begun = Instant::now();
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]);
    command.arg(env!("CARGO_BIN_EXE_lcow-graphdriver")).arg("serve").arg("--root").arg(folder.path());
    command.arg("--socket").arg(&socket).env_remove("NOTIFY_SOCKET").stdin(Stdio::null());
    let mut space = Namespace(command.spawn().expect("unshare (util-linux)"));
    wait_until("the socket", READY * 5, || UnixStream::connect(&socket).ok());
    eprintln!("ready after {:?}", begun.elapsed());
    let first = children(space.0.id())[0];
    assert_eq!(children(first).len(), 1, "pid 1 stands before one process");

    // A process that loses its parent, then ends.
    let orphan = "busybox sh -c 'busybox sleep 0.3 & echo $!'";
    let mut enter = Command::new("nsenter");
    enter.args(["--pid", "--target", &first.to_string(), "sh", "-c", orphan]).stdout(Stdio::null());
    assert!(enter.status().expect("nsenter").success());
    wait_until("the orphan to come to pid 1", READY, || (children(first).len() == 2).then_some(()));
    wait_until("the orphan to be reaped", READY, || (children(first).len() == 1).then_some(()));

    let pid = Pid::from_raw(first.cast_signed()).expect("a pid");
    let begun = Instant::now();
    kill_process(pid, Signal::TERM).expect("SIGTERM");
    let ended = wait_until("its end", Duration::from_secs(20), || space.0.try_wait().expect("wait"));
    assert!(ended.success(), "it ended with {ended}");
    assert!(begun.elapsed() < Duration::from_secs(9), "the engine kills a plugin after 10 s");
    assert!(!socket.exists(), "the socket is left behind");
}
