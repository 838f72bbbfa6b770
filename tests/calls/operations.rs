//! The requests whose calls fail, and what must hold afterwards.

use crate::{
    support::{Plugin, Reply, Tar, leftovers, noise, send_chunks, transport},
    watch::Watched,
};
use serde_json::{Value, json};
use std::{
    fs,
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

/// The layer that a request is about.
const ID: &str = "x";
/// Longest wait for what a start deletes, or for the end of a process.
const PATIENCE: Duration = Duration::from_mins(1);
/// A layer below it, which nothing may harm.
const BASE: &str = "base";

/// What is done.
pub(crate) enum Act {
    /// A request; `None` if its connection broke.
    Request(fn(&Plugin) -> Option<Reply>),
    /// A kill and a start.
    Start,
}

/// A request, or a start.
pub(crate) struct Operation {
    pub(crate) name: &'static str,
    /// What must be there; on a plugin that has [`BASE`] and nothing else.
    pub(crate) prepare: fn(&Plugin),
    pub(crate) act: Act,
    /// Whether the answer is true: the plugin, whether it was success, and the state of [`ID`] on the disk.
    truth: fn(&Plugin, bool, Option<&str>) -> bool,
}

fn tar() -> Vec<u8> {
    Tar::new().dir("d/").file("d/f", &noise(1, 50_000)).end()
}

fn base() -> Vec<u8> {
    Tar::new().file("below", &noise(2, 20_000)).end()
}

/// A POST whose connection may break at any time.
fn post(plugin: &Plugin, method: &str, request: &Value) -> Option<Reply> {
    let mut stream = transport::connect(&plugin.socket()).ok()?;
    let body = request.to_string();
    write!(stream, "POST /{method} HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n{body}", body.len())
        .ok()?;
    Reply::read(stream).ok()
}

fn apply(plugin: &Plugin) -> Option<Reply> {
    let mut stream = transport::connect(&plugin.socket()).ok()?;
    write!(
        stream,
        "POST /GraphDriver.ApplyDiff?id={ID}&parent={BASE} HTTP/1.1\r\nHost: \r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    .ok()?;
    // A failed layer may be refused before its end.
    let _ = send_chunks(&mut stream, &tar(), 16_384).and_then(|()| stream.write_all(b"0\r\n\r\n"));
    Reply::read(stream).ok()
}

fn create(plugin: &Plugin) {
    plugin.ok("GraphDriver.Create", &json!({"ID": ID, "Parent": BASE}));
}

fn applied(plugin: &Plugin) {
    plugin.layer(ID, BASE, &tar());
}

fn sandbox(plugin: &Plugin) {
    plugin.ok("GraphDriver.CreateReadWrite", &json!({"ID": ID, "Parent": BASE}));
}

fn shown(plugin: &Plugin) {
    sandbox(plugin);
    plugin.get(ID);
}

fn written(plugin: &Plugin) {
    sandbox(plugin);
    let view = plugin.get(ID);
    fs::write(view.join("new"), noise(3, 30_000)).unwrap();
    plugin.put(ID);
}

fn exists(_: &Plugin, ok: bool, state: Option<&str>) -> bool {
    // An answer of failure leaves nothing: a later create of the same id would be refused.
    ok == state.is_some()
}

fn is_whole(plugin: &Plugin, ok: bool, state: Option<&str>) -> bool {
    (state == Some("applied")) == ok && (!ok || plugin.diff(ID, BASE) == tar())
}

fn anything(_: &Plugin, _: bool, _: Option<&str>) -> bool {
    true
}

fn is_gone(_: &Plugin, ok: bool, state: Option<&str>) -> bool {
    !ok || state.is_none()
}

pub(crate) const OPERATIONS: [Operation; 10] = [
    Operation {
        name: "create",
        prepare: |_| {},
        act: Act::Request(|p| post(p, "GraphDriver.Create", &json!({"ID": ID, "Parent": BASE}))),
        truth: exists,
    },
    Operation {
        name: "create a sandbox",
        prepare: |_| {},
        act: Act::Request(|p| post(p, "GraphDriver.CreateReadWrite", &json!({"ID": ID, "Parent": BASE}))),
        truth: exists,
    },
    Operation { name: "apply", prepare: create, act: Act::Request(apply), truth: is_whole },
    Operation { name: "first get", prepare: applied, act: Act::Request(get), truth: shows_if_ok },
    Operation { name: "get of a sandbox", prepare: sandbox, act: Act::Request(get), truth: shows_if_ok },
    Operation {
        name: "put",
        prepare: shown,
        act: Act::Request(|p| post(p, "GraphDriver.Put", &json!({"ID": ID}))),
        truth: |p, ok, _| !ok || p.mounts().is_empty(),
    },
    Operation {
        name: "remove",
        prepare: applied,
        act: Act::Request(|p| post(p, "GraphDriver.Remove", &json!({"ID": ID}))),
        truth: is_gone,
    },
    Operation {
        name: "diff of an applied layer",
        prepare: applied,
        act: Act::Request(diff),
        truth: |p, _, _| p.diff(ID, BASE) == tar(),
    },
    Operation {
        name: "diff of a written sandbox",
        prepare: written,
        act: Act::Request(diff),
        truth: anything,
    },
    Operation {
        name: "start",
        prepare: applied,
        act: Act::Start,
        truth: |p, _, _| p.diff(ID, BASE) == tar(),
    },
];

fn get(plugin: &Plugin) -> Option<Reply> {
    post(plugin, "GraphDriver.Get", &json!({"ID": ID}))
}

fn diff(plugin: &Plugin) -> Option<Reply> {
    post(plugin, "GraphDriver.Diff", &json!({"ID": ID, "Parent": BASE}))
}

fn shows_if_ok(plugin: &Plugin, ok: bool, _: Option<&str>) -> bool {
    let view = plugin.home().join(ID).join("merged");
    let seen = fs::read(view.join("below")).is_ok_and(|bytes| bytes == noise(2, 20_000));
    // A Get that failed leaves no view.
    seen == ok
}

/// A plugin with a base layer, whose calls are watched.
pub(crate) fn plugin() -> Watched {
    // No spares: those that a pool starts beside the request would be counted as its own.
    let options = ["--storage-opt", "lcow.sandboxsize=32MiB", "--storage-opt", "lcow.pool.spares=0"];
    let watched = Watched::start(&options);
    watched.plugin.init();
    watched.plugin.layer(BASE, "", &base());
    watched
}

/// Does what the operation does.
pub(crate) fn act(watched: &mut Watched, operation: &Operation) -> Option<Reply> {
    match operation.act {
        Act::Request(request) => request(&watched.plugin),
        Act::Start => {
            watched.kill_and_restart();
            post(&watched.plugin, "GraphDriver.Exists", &json!({"ID": ID}))
        }
    }
}

/// Whether the plugin still runs and answers. One that is about to end is waited for: a thread that cannot begin for want of
/// memory aborts the process, but first it writes down where it is. `logged` is the length of the log before the failure.
pub(crate) fn alive(plugin: &Plugin, logged: usize) -> bool {
    /// Longest wait for a process that has panicked to end; one that caught the panic goes on.
    const ABORT: Duration = Duration::from_secs(5);
    let begin = Instant::now();
    while plugin.log()[logged..].contains("panicked at") && begin.elapsed() < ABORT {
        if !runs(plugin) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    while runs(plugin) && begin.elapsed() < PATIENCE {
        if post(plugin, "GraphDriver.Exists", &json!({"ID": BASE})).is_some() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

fn runs(plugin: &Plugin) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/stat", plugin.pid())).unwrap_or_default();
    status
        .rsplit(')')
        .next()
        .is_some_and(|rest| !rest.trim_start().starts_with(['Z', 'X']) && !rest.is_empty())
}

fn state_on_disk(plugin: &Plugin) -> Option<String> {
    let text = fs::read(plugin.home().join(ID).join("layer.json")).ok()?;
    Some(serde_json::from_slice::<Value>(&text).unwrap()["state"].as_str().unwrap().to_owned())
}

fn state_in_memory(plugin: &Plugin) -> Option<String> {
    let reply = plugin.call("GraphDriver.GetMetadata", &json!({"ID": ID}));
    (reply.status == 200).then(|| reply.json()["Metadata"]["state"].as_str().unwrap().to_owned())
}

/// Holds what was answered against what is there; leaves the plugin with its base layer alone.
pub(crate) fn judge(watched: &mut Watched, operation: &Operation, reply: Option<&Reply>, what: &str) {
    let answer = reply.map_or_else(|| "no answer".to_owned(), |r| format!("{} {}", r.status, r.text()));
    let what = format!("{what}\n{}", answer.chars().take(600).collect::<String>());
    if matches!(operation.act, Act::Start) {
        // A layer whose record a start could not read is refused with the record's path until the next start.
        let reply = watched.plugin.call("GraphDriver.GetMetadata", &json!({"ID": ID}));
        let text = reply.text();
        assert!(
            reply.status == 200 || text.contains("layer.json") || text.contains("layerchain.json"),
            "{text}: {what}"
        );
        watched.kill_and_restart();
    }
    let plugin = &watched.plugin;
    let found = state_on_disk(plugin);
    assert_eq!(state_in_memory(plugin), found, "memory, disk: {what}");
    if let Some(reply) = reply {
        let ok = reply.status == 200 && reply.complete;
        assert!((operation.truth)(plugin, ok, found.as_deref()), "the answer is not true: {what}");
    }
    assert_eq!(plugin.diff(BASE, ""), base(), "the layer below: {what}");
    // What a kill right behind it finds is the same.
    watched.kill_and_restart();
    let plugin = &watched.plugin;
    assert_eq!(state_in_memory(plugin), found, "after a restart: {what}");
    let staged = || fs::read_dir(plugin.home().join("staging")).map_or(0, Iterator::count);
    let begin = Instant::now();
    while staged() > 0 {
        // A start deletes it beside the first requests.
        assert!(begin.elapsed() < PATIENCE, "what was half made is still there after a start: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    clear(plugin, &what);
    // And the same works.
    (operation.prepare)(plugin);
    let again = act(watched, operation).unwrap_or_else(|| panic!("no answer without a failure: {what}"));
    let plugin = &watched.plugin;
    assert!(again.status == 200 && again.complete, "the next request fails: {} {what}", again.text());
    let found = state_on_disk(plugin);
    assert!((operation.truth)(plugin, true, found.as_deref()), "the next answer is not true: {what}");
    clear(plugin, &what);
}

pub(crate) fn clear(plugin: &Plugin, what: &str) {
    plugin.put(ID);
    plugin.remove(ID);
    assert_eq!(plugin.mounts(), [""; 0], "{what}");
}

/// No mount, no loop device, no file of a request stays.
pub(crate) fn nothing_is_left(plugin: &Plugin, patience: Duration) {
    let begin = Instant::now();
    let held = |folder: &Path| leftovers::devices_below(folder);
    while !held(&plugin.folder).is_empty() {
        assert!(begin.elapsed() < patience, "loop devices stay: {:?}", held(&plugin.folder));
        std::thread::sleep(Duration::from_millis(20));
    }
}
