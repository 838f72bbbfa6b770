//! The store survives a kill at any moment.
//!
//! ```text
//!   a fixed sequence of requests ─ kill ─► a new process ─► no layer or the whole layer, no debris, what was answered
//!                                                           is there; the sequence can be finished
//!   moments: every request, spread over its time (all systems) │ every call that changes the store (strace, Linux)
//! ```

#[cfg(target_os = "linux")]
mod strace;
#[path = "../support/mod.rs"]
mod support;

use serde_json::json;
use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};
use support::{Plugin, Reply, Tar, noise, transport};

/// Longest wait for a socket or an end.
const PATIENCE: Duration = Duration::from_secs(30);

fn base_tar() -> Vec<u8> {
    Tar::new().dir("d/").file("d/f", &noise(1, 50_000)).end()
}

fn top_tar() -> Vec<u8> {
    Tar::new().file("d/.wh.f", b"").file("g", &noise(2, 9_000)).end()
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

/// A POST; `None` if the connection broke.
fn post(address: &Path, method: &str, body: &[u8]) -> Option<Reply> {
    let mut stream = transport::connect(address).ok()?;
    write!(stream, "POST /{method} HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n", body.len()).ok()?;
    stream.write_all(body).ok()?;
    Reply::read(stream).ok().filter(|r| r.complete)
}

/// Runs the sequence until it is done or the plugin is gone; says which requests were answered with success.
fn drive(address: &Path, home: &Path, mut before: impl FnMut(usize)) -> BTreeSet<usize> {
    let mut done = BTreeSet::new();
    for (n, (method, body)) in sequence(home).into_iter().enumerate() {
        before(n);
        match post(address, &method, &body) {
            Some(reply) if reply.status == 200 => {
                done.insert(n);
            }
            // The kill may have met a worker: then the plugin lives and answers with an error.
            Some(_) | None => break,
        }
    }
    done
}

/// Looks at what a new process finds, and finishes the sequence. `done` was answered before the kill.
fn check(plugin: &Plugin, done: &BTreeSet<usize>, what: &str) {
    let home = plugin.home();
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
        if state != "applied" {
            // What the killed process began takes no tar, even if no tar was seen: a client may have lost its begin.
            let reply = plugin.apply(id, parent, &tar);
            assert_eq!(reply.status, 400, "{what}: {id} is {state}: {}", reply.text());
            // The engine's way: remove, create anew. Children of an unfinished layer cannot exist.
            plugin.remove(id);
            plugin.layer(id, parent, &tar);
        }
        assert!(plugin.diff(id, parent) == tar, "{what}: {id} has other bytes");
    }
    if exists("rw") {
        let dir = plugin.get("rw");
        #[cfg(unix)]
        assert_eq!(fs::read(dir.join("g")).unwrap(), noise(2, 9_000), "{what}");
        // Nothing is mounted on Windows: a whole disk, and an empty one.
        #[cfg(windows)]
        {
            let disk = vhd_image::vhdx::Vhdx::open(fs::File::open(dir.join("sandbox.vhdx")).unwrap());
            assert_eq!(disk.unwrap().geometry().disk_bytes, 32 << 20, "{what}");
            let changes = plugin.ok("GraphDriver.Changes", &json!({"ID": "rw", "Parent": "top"}));
            assert_eq!(changes["Changes"], json!([]), "{what}");
        }
        plugin.put("rw");
    }
    for folder in ["staging", "scratch"] {
        wait_until_empty(&home.join(folder), what);
    }
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

/// At evenly spread moments of each request's time. On Windows this is all there is: no strace counts calls there, and
/// under Wine a start takes seconds.
#[test]
fn a_kill_in_the_middle_of_any_request_loses_nothing_that_was_answered() {
    const PARTS: u32 = if cfg!(windows) { 2 } else { 4 };
    let plugin = Plugin::start(&["--storage-opt", "lcow.pool.spares=1"]);
    let mut begins = Vec::new();
    let done = drive(&plugin.socket(), &plugin.home(), |_| begins.push(Instant::now()));
    begins.push(Instant::now());
    assert_eq!(
        done.len(),
        sequence(&plugin.home()).len(),
        "the sequence works without kills\n{}",
        plugin.log()
    );
    check(&plugin, &done, "not killed");
    drop(plugin);
    let took: Vec<Duration> = begins.windows(2).map(|pair| pair[1] - pair[0]).collect();
    // How many requests had been answered at the kills: the moments are spread over the sequence, or it is no test.
    let mut answered = BTreeSet::new();
    for (n, took) in took.iter().enumerate() {
        for part in 0..PARTS {
            answered.insert(kill_in(n, *took * part / PARTS));
        }
    }
    assert!(answered.len() >= took.len() / 2, "kills met the sequence only after {answered:?} answers");
}

/// Kills the plugin some time after request `n` began; the number of requests that were answered by then.
fn kill_in(n: usize, after: Duration) -> usize {
    let what = format!("killed in request {n}, {after:?} after its begin");
    let mut plugin = Plugin::start(&["--storage-opt", "lcow.pool.spares=1"]);
    let (address, home) = (plugin.socket(), plugin.home());
    let (begun, wait) = std::sync::mpsc::channel();
    let driver = std::thread::spawn(move || {
        drive(&address, &home, |at| {
            if at == n {
                begun.send(()).unwrap();
            }
        })
    });
    wait.recv_timeout(PATIENCE).unwrap();
    std::thread::sleep(after);
    plugin.kill();
    let done = driver.join().unwrap();
    plugin.start_again();
    check(&plugin, &done, &what);
    done.len()
}
