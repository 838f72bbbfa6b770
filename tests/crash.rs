//! The store survives a kill at any system call that changes it.
//!
//! strace kills the plugin at the n-th rename, sync, unlink, … of a fixed sequence of requests, for every n (or an even
//! sample of them). After each kill a new process must find either no layer or the whole layer, no debris, and must be
//! able to finish the sequence.
//!
//! Needs root and strace.

mod support;

use serde_json::json;
use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use support::{Plugin, Tar, noise};

/// The calls that change what a store holds.
const CLASSES: &[&str] =
    &["rename,renameat,renameat2", "fsync,fdatasync", "mkdir,unlink,unlinkat,rmdir", "ftruncate,pwrite64"];
/// Kills per class: all if there are fewer.
const KILLS: usize = 14;
/// Longest wait for a socket or an end.
const PATIENCE: Duration = Duration::from_secs(30);

fn base_tar() -> Vec<u8> {
    Tar::new().dir("d/").file("d/f", &noise(1, 50_000)).end()
}

fn top_tar() -> Vec<u8> {
    Tar::new().file("d/.wh.f", b"").file("g", &noise(2, 9_000)).end()
}

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

    /// A POST; `None` if the connection broke.
    fn post(&self, method: &str, body: &[u8]) -> Option<support::Reply> {
        let mut stream = UnixStream::connect(&self.socket).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "POST /{method} HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n", body.len()).ok()?;
        stream.write_all(body).ok()?;
        support::Reply::read(stream).ok().filter(|r| r.complete)
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

/// The requests, each as (method, body). Errors of later ones after a kill are expected.
fn sequence(home: &Path) -> Vec<(String, Vec<u8>)> {
    let json = |value: serde_json::Value| value.to_string().into_bytes();
    vec![
        ("GraphDriver.Init".into(), json(json!({"Home": home}))),
        ("GraphDriver.Create".into(), json(json!({"ID": "base"}))),
        ("GraphDriver.ApplyDiff?id=base&parent=".into(), base_tar()),
        ("GraphDriver.Create".into(), json(json!({"ID": "top", "Parent": "base"}))),
        ("GraphDriver.ApplyDiff?id=top&parent=base".into(), top_tar()),
        (
            "GraphDriver.CreateReadWrite".into(),
            json(json!({"ID": "rw", "Parent": "top", "StorageOpt": {"size": "32m"}})),
        ),
        ("GraphDriver.Create".into(), json(json!({"ID": "gone", "Parent": "top"}))),
        ("GraphDriver.Remove".into(), json(json!({"ID": "gone"}))),
        ("GraphDriver.Remove".into(), json(json!({"ID": "rw"}))),
    ]
}

/// Runs the sequence until it is done or the plugin is gone; says which requests were answered with success.
fn drive(plugin: &mut Traced, home: &Path) -> BTreeSet<usize> {
    let mut done = BTreeSet::new();
    if !plugin.ready() {
        return done;
    }
    for (n, (method, body)) in sequence(home).into_iter().enumerate() {
        match plugin.post(&method, &body) {
            Some(reply) if reply.status == 200 => {
                done.insert(n);
            }
            // The kill may have met a worker: then the plugin lives and answers with an error.
            Some(_) | None => break,
        }
    }
    done
}

fn count_calls(class: &str) -> usize {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let mut plugin = Traced::start(
        folder.path(),
        &["-o".into(), trace.to_str().unwrap().into(), "-e".into(), format!("trace={class}")],
    );
    let home = folder.path().join("home");
    let done = drive(&mut plugin, &home);
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
    let done = drive(&mut traced, &home);
    drop(traced);
    plugin.start_again();
    plugin.init();
    let exists = |id: &str| plugin.ok("GraphDriver.Exists", &json!({"ID": id}))["Exists"] == true;
    // What was answered is durable; what was not may be there or not, but never by halves.
    for (n, id) in [(1, "base"), (3, "top")] {
        assert!(exists(id) || !done.contains(&n), "{what}: {id} was created and is gone");
    }
    assert!(!exists("gone") || !done.contains(&7), "{what}: a removed layer is back");
    assert!(!exists("rw") || !done.contains(&8), "{what}: a removed layer is back");
    for (id, parent, tar, applied) in [("base", "", base_tar(), 2), ("top", "base", top_tar(), 4)] {
        if !exists(id) {
            plugin.layer(id, parent, &tar);
        }
        let state = plugin.ok("GraphDriver.GetMetadata", &json!({"ID": id}))["Metadata"]["state"].clone();
        assert!(state == "applied" || !done.contains(&applied), "{what}: {id} was applied and is {state}");
        if state == "applying" {
            // The engine's way: remove, create anew. Children of an unfinished layer cannot exist.
            plugin.remove(id);
            plugin.layer(id, parent, &tar);
        } else if state == "created" {
            let reply = plugin.apply(id, parent, &tar);
            assert_eq!(reply.status, 200, "{what}: {}", reply.text());
        }
        assert!(plugin.diff(id, parent) == tar, "{what}: {id} has other bytes");
    }
    if exists("rw") {
        let dir = plugin.get("rw");
        assert_eq!(fs::read(dir.join("g")).unwrap(), noise(2, 9_000), "{what}");
        plugin.put("rw");
    }
    wait_until_empty(&home.join("staging"), &what);
    let scrub = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
        .args(["store", "scrub", "--home"])
        .arg(&home)
        .output()
        .unwrap();
    assert!(scrub.status.success(), "{what}: {}", String::from_utf8_lossy(&scrub.stdout));
}

/// Debris is deleted in the background.
fn wait_until_empty(folder: &Path, what: &str) {
    let begin = Instant::now();
    while fs::read_dir(folder).unwrap().count() > 0 {
        assert!(begin.elapsed() < PATIENCE, "{what}: debris stays in {}", folder.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}
