//! Eight clients, the same few layers, and system calls that fail.
//!
//! ```text
//!   8 clients: Create, CreateReadWrite, ApplyDiff, Diff, Get, Put, Remove, Changes, DiffSize, Init … of l0 ◄ l1 ◄ l2, s
//!   besides:   now and then a call fails (fsync, rename, openat, mount, umount, ioctl …); a kill every few seconds,
//!              and other failures after it
//!   afterwards: every whole answer was right; scrub finds nothing; no mount, no loop device, no orphan
//! ```
//!
//! Lasts a minute; `LCOW_CROWD_SECONDS` says otherwise (`scripts/torture`). Needs root and strace.

use super::truth::{loop_devices, wait_for_no_loop_device};
use crate::support::{Plugin, Reply, Tar, noise, transport};
use serde_json::json;
use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

const CLIENTS: u64 = 8;
/// From one kill to the next.
const PERIOD: Duration = Duration::from_secs(6);
/// Layers by name, each with its parent.
const LAYERS: [(&str, &str); 5] = [("l0", ""), ("l1", "l0"), ("l2", "l1"), ("s", "l1"), ("t", "")];
/// What fails, as strace is told: a set from one kill to the next. Counted by thread, and rare enough that a start and
/// most requests come through.
const FAULTS: [&[&str]; 3] = [
    &[
        "fsync:error=EIO:when=5+11",
        "rename:error=EIO:when=3+9",
        "umount2:error=EIO:when=2+5",
        "mount:error=ENOMEM:when=2+5",
        "fsmount:error=ENOMEM:when=2+5",
    ],
    &[
        "fsync:delay_enter=200000:when=3+4",
        "renameat2:error=ENOSPC:when=2+6",
        "openat:error=EMFILE:when=400+97",
        "ioctl:error=EIO:when=6+13",
        "unlinkat:error=EIO:when=9+17",
    ],
    &[
        "fsync:error=ENOSPC:when=4+7",
        "mkdir:error=ENOSPC:when=16+9",
        "umount2:error=EBUSY:when=2+3",
        "fsconfig:error=ENOMEM:when=7+23",
        "pwrite64:error=ENOSPC:when=30+70",
        "socketpair:error=EMFILE:when=3+7",
    ],
];

/// strace in a process beside the plugin's, which notes what it lets fail.
pub(crate) fn tracer(faults: &[&str], trace: &Path) -> Vec<String> {
    let mut words: Vec<String> =
        ["strace", "-D", "-f", "-qq", "--seccomp-bpf", "-o"].map(str::to_owned).into();
    words.push(trace.to_str().unwrap().to_owned());
    let calls: Vec<&str> = faults.iter().filter_map(|fault| fault.split(':').next()).collect();
    words.extend(["-e".to_owned(), format!("trace={}", calls.join(","))]);
    words.extend(faults.iter().flat_map(|fault| ["-e".to_owned(), format!("inject={fault}")]));
    words
}

pub(crate) fn injected(trace: &Path) -> usize {
    fs::read_to_string(trace).unwrap_or_default().matches("(INJECTED)").count()
}

fn tar(id: &str) -> Vec<u8> {
    let seed = id.bytes().map(u64::from).sum();
    Tar::new().dir("d/").file(&format!("d/{id}"), &noise(seed, 40_000)).file("same", id.as_bytes()).end()
}

/// A POST whose connection may break at any time.
fn post(address: &Path, method: &str, body: &[u8]) -> Option<Reply> {
    let mut stream = transport::connect(address).ok()?;
    write!(stream, "POST /{method} HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n", body.len()).ok()?;
    stream.write_all(body).ok()?;
    Reply::read(stream).ok()
}

/// A kill, and a new process when nothing listens any more: a worker that was just being forked, and that strace holds
/// up, still has the socket.
fn restart(plugin: &mut Plugin) {
    plugin.kill();
    let begin = Instant::now();
    while transport::connect(&plugin.socket()).is_ok() {
        assert!(begin.elapsed() < Duration::from_mins(1), "somebody still listens");
        std::thread::sleep(Duration::from_millis(10));
    }
    plugin.start_again();
}

/// Sends the clients home, also when the test fails.
pub(crate) struct AtTheEnd<'a>(pub(crate) &'a AtomicBool);

impl Drop for AtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What happened to requests, by method: (whole answers of success, all).
type Tally = Mutex<BTreeMap<&'static str, (u64, u64)>>;

struct Client<'a> {
    address: PathBuf,
    home: PathBuf,
    random: u64,
    tally: &'a Tally,
}

impl Client<'_> {
    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 20) % limit
    }

    fn call(&self, method: &'static str, query: &str, body: &[u8]) -> Option<Reply> {
        let reply = post(&self.address, &format!("GraphDriver.{method}{query}"), body);
        if reply.is_none() {
            // It was killed, and is not there yet.
            std::thread::sleep(Duration::from_millis(20));
        }
        let whole = reply.as_ref().is_some_and(|r| r.status == 200 && r.complete);
        let mut tally = self.tally.lock().unwrap();
        let entry = tally.entry(method).or_default();
        entry.0 += u64::from(whole);
        entry.1 += 1;
        reply.filter(|_| whole)
    }

    fn one_request(&mut self) {
        let (id, parent) = LAYERS[self.below(LAYERS.len() as u64) as usize];
        let of = json!({"ID": id, "Parent": parent}).to_string().into_bytes();
        match self.below(28) {
            0..5 => {
                self.call("Create", "", &of);
            }
            5..7 => {
                self.call("CreateReadWrite", "", &of);
            }
            7..12 => {
                // As an engine does it, and as one whose layer is there already.
                if self.below(3) > 0 {
                    self.call("Remove", "", &of);
                    self.call("Create", "", &of);
                }
                let size = self.call("ApplyDiff", &format!("?id={id}&parent={parent}"), &tar(id));
                if let Some(size) = size {
                    assert_eq!(size.json()["Size"], 40_000 + id.len());
                }
            }
            12..15 => {
                // Sandboxes are never written here: theirs is the empty tar.
                if let Some(diff) = self.call("Diff", "", &of) {
                    let empty = diff.body.iter().all(|byte| *byte == 0);
                    assert!(empty || diff.body == tar(id), "Diff of {id}: {} bytes", diff.body.len());
                }
            }
            15..18 => {
                self.call("Get", "", &of);
            }
            18..21 => {
                self.call("Put", "", &of);
            }
            21..23 => {
                self.call("Remove", "", &of);
            }
            23 => {
                self.call("Changes", "", &of);
            }
            24 => {
                if let Some(size) = self.call("DiffSize", "", &of) {
                    let size = size.json()["Size"].as_u64().unwrap();
                    assert!(size == 0 || size == 40_000 + id.len() as u64, "DiffSize of {id}: {size}");
                }
            }
            25 => {
                self.call("Exists", "", &of);
                self.call("Status", "", b"{}");
            }
            26 => {
                self.call("GetMetadata", "", &of);
            }
            _ => {
                let api = ["auto", "legacy", "new"][self.below(3) as usize];
                let spares = self.below(2);
                let opts = [format!("lcow.overlayapi={api}"), format!("lcow.pool.spares={spares}")];
                let init = json!({"Home": self.home, "Opts": opts}).to_string();
                self.call("Init", "", init.as_bytes());
            }
        }
    }
}

#[test]
fn eight_clients_and_failing_calls_leave_a_sound_store_and_nothing_behind() {
    let seconds = std::env::var("LCOW_CROWD_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    let mut plugin =
        Plugin::start(&["--storage-opt", "lcow.sandboxsize=16MiB", "--storage-opt", "lcow.timeout=20"]);
    plugin.init();
    let (tally, done) = (Tally::default(), AtomicBool::new(false));
    let (mut hits, mut kills) = (0, 0);
    std::thread::scope(|scope| {
        for n in 0..CLIENTS {
            let mut client = Client {
                address: plugin.socket(),
                home: plugin.home(),
                random: 0x9e37_79b9_7f4a_7c15 ^ (n + 1),
                tally: &tally,
            };
            let done = &done;
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    client.one_request();
                }
            });
        }
        let _end = AtTheEnd(&done);
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(seconds) {
            let trace = plugin.folder.join(format!("trace{kills}"));
            plugin.launcher = tracer(FAULTS[kills % FAULTS.len()], &trace);
            restart(&mut plugin);
            std::thread::sleep(PERIOD);
            hits += injected(&trace);
            let _ = fs::remove_file(&trace);
            kills += 1;
        }
        plugin.launcher.clear();
        restart(&mut plugin);
    });
    let tally = tally.into_inner().unwrap();
    println!("{seconds} s: {hits} calls failed, {kills} kills; of requests came through: {tally:?}");
    assert!(hits > 20 && tally.values().all(|(whole, _)| *whole > 0), "{hits} failures, {tally:?}");
    settle(&mut plugin);
}

/// What must be true when everybody has gone.
fn settle(plugin: &mut Plugin) {
    let states = |plugin: &Plugin| -> Vec<_> {
        let one = |(id, _): &(&str, &str)| {
            let reply = plugin.call("GraphDriver.GetMetadata", &json!({"ID": id}));
            (reply.status == 200).then(|| reply.json()["Metadata"]["state"].clone())
        };
        LAYERS.iter().map(one).collect()
    };
    let before = states(plugin);
    plugin.kill_and_restart();
    assert_eq!(before, states(plugin), "memory and disk said other things\n{}", plugin.log());
    for (id, _) in LAYERS {
        // The last Put of a view that an earlier process left; more than enough.
        for _ in 0..3 {
            plugin.put(id);
        }
    }
    assert_eq!(plugin.mounts(), [""; 0], "{}", plugin.log());
    wait_for_no_loop_device(&plugin.folder);
    let scrub = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"))
        .args(["store", "scrub", "--home"])
        .arg(plugin.home())
        .output()
        .unwrap();
    assert!(scrub.status.success(), "{}", String::from_utf8_lossy(&scrub.stdout));
    for (id, parent) in LAYERS {
        if plugin.call("GraphDriver.GetMetadata", &json!({"ID": id})).text().contains("\"applied\"") {
            assert!(plugin.diff(id, parent) == tar(id), "{id} has other bytes");
        }
    }
    for (id, _) in LAYERS.iter().rev() {
        plugin.remove(id);
    }
    let home = plugin.home();
    let begin = Instant::now();
    while fs::read_dir(home.join("staging")).unwrap().count() > 0 {
        assert!(begin.elapsed() < Duration::from_mins(1), "debris stays\n{}", plugin.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut left: Vec<_> =
        fs::read_dir(&home).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    left.sort();
    assert_eq!(left, ["cache", "lcow-store.json", "mnt", "owner.lock", "scratch", "staging"]);
    let mnt: Vec<_> = fs::read_dir(home.join("mnt")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(mnt, ["empty"]);
    assert_eq!(loop_devices(&plugin.folder), [""; 0]);
}
