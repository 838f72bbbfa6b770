//! strace kills the plugin at the n-th rename, sync, unlink, … of the sequence, for every n (or an even sample of them).
//!
//! Needs root and strace.

use super::{PATIENCE, check, drive, sequence};
use crate::support::Plugin;
use std::{
    collections::BTreeSet,
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// The calls that change what a store holds.
const CLASSES: &[&str] =
    &["rename,renameat,renameat2", "fsync,fdatasync", "mkdir,unlink,unlinkat,rmdir", "ftruncate,pwrite64"];
/// Kills per class: all if there are fewer.
const KILLS: usize = 14;

/// A plugin under strace.
struct Traced {
    child: Child,
    socket: PathBuf,
}

impl Traced {
    fn start(folder: &Path, strace: &[String]) -> Self {
        let socket = folder.join("lcow.sock");
        let _ = fs::remove_file(&socket);
        let child = Command::new("strace")
            .args(["-f", "-qq"])
            .args(strace)
            .arg(env!("CARGO_BIN_EXE_lcow-graphdriver"))
            .args(["serve", "--storage-opt", "lcow.pool.spares=1", "--root"])
            .arg(folder.join("root"))
            .arg("--socket")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("strace must be installed: scripts/install-deps test");
        Self { child, socket }
    }

    /// Waits for the socket; false if the plugin was killed before it was there.
    fn ready(&mut self) -> bool {
        let begin = Instant::now();
        loop {
            if UnixStream::connect(&self.socket).is_ok() {
                return true;
            }
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(begin.elapsed() < PATIENCE, "the plugin neither answers nor ends");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Runs the sequence until it is done or the plugin is gone.
    fn drive(&mut self, home: &Path) -> BTreeSet<usize> {
        if self.ready() { drive(&self.socket, home, |_| {}) } else { BTreeSet::new() }
    }

    /// The traced program: strace's child, as long as it lives.
    fn tracee(&self) -> Option<rustix::process::Pid> {
        let strace = self.child.id();
        let children = fs::read_to_string(format!("/proc/{strace}/task/{strace}/children")).ok()?;
        rustix::process::Pid::from_raw(children.split_whitespace().next()?.parse().ok()?)
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        // Killing strace would let its tracee go on: the tracee is killed, and strace ends with it.
        let begin = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            if let Some(pid) = self.tracee() {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            if begin.elapsed() > PATIENCE {
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn count_calls(class: &str) -> usize {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let mut plugin = Traced::start(
        folder.path(),
        &["-o".into(), trace.to_str().unwrap().into(), "-e".into(), format!("trace={class}")],
    );
    let home = folder.path().join("home");
    let done = plugin.drive(&home);
    assert_eq!(done.len(), sequence(&home).len(), "the sequence works without kills");
    drop(plugin);
    fs::read_to_string(trace).unwrap().lines().filter(|l| l.contains('(')).count()
}

#[test]
fn a_kill_at_any_change_of_the_store_leaves_no_layer_or_the_whole_layer() {
    for class in CLASSES {
        let calls = count_calls(class);
        assert!(calls > 3, "{class}: {calls} calls were seen; the trace is broken");
        let step = calls.div_ceil(KILLS);
        for when in (1..=calls).step_by(step) {
            kill_at(class, when);
        }
    }
}

fn kill_at(class: &str, when: usize) {
    let what = format!("killed at call {when} of {class}");
    let mut plugin = Plugin::start(&[]);
    plugin.terminate();
    let (folder, home) = (plugin.folder.clone(), plugin.home());
    let mut traced = Traced::start(
        &folder,
        &[
            "-o".into(),
            "/dev/null".into(),
            "-e".into(),
            format!("trace={class}"),
            "-e".into(),
            format!("inject={class}:signal=KILL:when={when}"),
        ],
    );
    let done = traced.drive(&home);
    drop(traced);
    plugin.start_again();
    check(&plugin, &done, &what);
}
