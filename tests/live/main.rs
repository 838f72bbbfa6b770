//! Containers that are written to while their layers are read: what stands still, for how long, and what is thawed.
//!
//! ```text
//!   busy.rs     Diffs, Changes and sizes while files are written
//!   thaw.rs     thaws that fail, that a killed process owed, that a stop overtakes
//!   killed.rs   kills while a sandbox is frozen, and what others freeze: nothing is left, and no stranger's is touched
//!   ground.rs   the disk below the home: without and with reflinks
//!   faults.rs   FIFREEZE, FITHAW and FICLONE watched and made to fail, in the program's own calls
//! ```
//!
//! Needs root: sandboxes are mounted and frozen. Nothing is left frozen, mounted or bound after a failure.
#![cfg(target_os = "linux")]

mod busy;
mod faults;
mod ground;
mod killed;
#[path = "../support/mod.rs"]
mod support;
mod thaw;

use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use support::{Plugin, Tar};

/// Longest wait for anything here.
const PATIENCE: Duration = Duration::from_mins(2);

/// Waits until something is so.
fn soon(what: &str, plugin: &Plugin, mut so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !so() {
        assert!(begin.elapsed() < PATIENCE, "never: {what}\n{}", plugin.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A plugin with a layer `base` and a mounted sandbox `c` on it; where that is shown.
fn shown(plugin: &Plugin) -> PathBuf {
    plugin.init();
    plugin.layer("base", "", &Tar::new().dir("etc/").file("etc/motd", b"hello\n").end());
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": "c", "Parent": "base"}));
    plugin.get("c")
}

/// Where the disk of the one mounted sandbox is.
fn sandbox_mount(plugin: &Plugin) -> PathBuf {
    let has_upper = |point: &String| point.contains("/mnt/") && Path::new(point).join("upper").exists();
    plugin.mounts().into_iter().find(has_upper).expect("no sandbox is mounted").into()
}

/// Whether a loop device is bound to a file.
fn is_bound(file: &Path) -> bool {
    let devices = fs::read_dir("/sys/block").unwrap().flatten();
    let files = devices.filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
    files.into_iter().any(|bound| Path::new(bound.trim_end()) == file)
}
