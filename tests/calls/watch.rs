//! A plugin that asks before each call, and what is answered.
//!
//! ```text
//!   plugin, workers ── seccomp user notification ──► this thread: group of the call ─► note it │ let it fail │ go on
//! ```
//!
//! The calls of a group are counted over all threads, so a failure meets the call that it is meant for, unless the request
//! takes another way this time. A short write is made by the thread that decides, with a copy of the process's descriptor.

use crate::{
    errors::{CALLS, SHORT, kind},
    short,
    support::Plugin,
};
use lcow_sys::linux::power::{Call, Calls, Verdict};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, mpsc},
    thread,
};

/// Longest path that is read.
const MAX_PATH: usize = 4096;

/// Calls that are treated alike.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Group {
    /// The daemon's own threads, not a worker's.
    pub(crate) daemon: bool,
    pub(crate) call: &'static str,
    /// What the call is about.
    pub(crate) object: &'static str,
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", if self.daemon { "daemon" } else { "worker" }, self.call, self.object)
    }
}

/// The call that is to fail: the `ordinal`-th of its group, from 1.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) group: Group,
    pub(crate) ordinal: usize,
    pub(crate) error: i32,
}

/// What is done with calls.
#[derive(Default)]
enum Mode {
    #[default]
    Idle,
    Count(BTreeMap<Group, usize>),
    Fail {
        case: Case,
        seen: usize,
        met: bool,
    },
    Kill {
        victim: Victim,
        ordinal: usize,
        seen: usize,
        /// The daemon's workers when it happened.
        workers: Option<BTreeSet<u32>>,
    },
}

/// Which process is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Victim {
    Daemon,
    Worker,
}

/// Whether a call moves a frame, or a part of one, between a worker and its daemon.
pub(crate) fn moves_a_frame(group: &Group) -> bool {
    const TRANSFERS: [&str; 8] =
        ["read", "write", "readv", "writev", "sendmsg", "recvmsg", "sendto", "recvfrom"];
    !group.daemon && group.object == "socket" && TRANSFERS.contains(&group.call)
}

/// A plugin and the thread that decides about its calls.
pub(crate) struct Watched {
    pub(crate) plugin: Plugin,
    mode: Arc<Mutex<Mode>>,
    /// The process that is the daemon, and not a worker; 0 until it is known.
    daemon: Arc<Mutex<u32>>,
}

/// Runs `work` in a thread whose processes ask before each call.
fn watched<T: Send>(mode: &Arc<Mutex<Mode>>, daemon: &Arc<Mutex<u32>>, work: impl FnOnce() -> T + Send) -> T {
    let (sender, receiver) = mpsc::channel::<Calls>();
    let (mode, daemon) = (mode.clone(), daemon.clone());
    thread::spawn(move || {
        let calls = receiver.recv().expect("a watched thread");
        let decide = |call: &Call| decide(call, &mode, &daemon);
        calls.serve(decide).expect("decide about calls");
    });
    thread::scope(|scope| {
        let started = scope.spawn(move || {
            let numbers: Vec<_> = CALLS.iter().map(|kind| kind.number).collect();
            let calls = Calls::watch(&numbers).expect("seccomp with user notifications (Linux 5.5)");
            // Its own calls are let through: it is neither daemon nor worker.
            sender.send(calls).expect("the thread that decides");
            work()
        });
        started.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

impl Watched {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let (mode, daemon) = (Arc::default(), Arc::default());
        let plugin = watched(&mode, &daemon, || Plugin::start(arguments));
        *daemon.lock().unwrap() = plugin.pid();
        Self { plugin, mode, daemon }
    }

    /// kill -9 and a new process, which is watched, too.
    pub(crate) fn kill_and_restart(&mut self) {
        self.plugin.kill();
        *self.daemon.lock().unwrap() = 0;
        let (mode, daemon) = (self.mode.clone(), self.daemon.clone());
        watched(&mode, &daemon, || self.plugin.start_again());
        *self.daemon.lock().unwrap() = self.plugin.pid();
    }

    /// Counts the calls of what follows, by group, until [`Watched::counted`].
    pub(crate) fn count(&self) {
        *self.mode.lock().unwrap() = Mode::Count(BTreeMap::new());
    }

    pub(crate) fn counted(&self) -> BTreeMap<Group, usize> {
        match std::mem::take(&mut *self.mode.lock().unwrap()) {
            Mode::Count(groups) => groups,
            _ => BTreeMap::new(),
        }
    }

    /// Lets one call of what follows fail, until [`Watched::met`].
    pub(crate) fn fail(&self, case: &Case) {
        *self.mode.lock().unwrap() = Mode::Fail { case: case.clone(), seen: 0, met: false };
    }

    /// Kills a process before the `ordinal`-th frame of what follows, from 1, until [`Watched::killed`].
    pub(crate) fn kill_at(&self, victim: Victim, ordinal: usize) {
        *self.mode.lock().unwrap() = Mode::Kill { victim, ordinal, seen: 0, workers: None };
    }

    /// Whether the call was made.
    pub(crate) fn met(&self) -> bool {
        matches!(std::mem::take(&mut *self.mode.lock().unwrap()), Mode::Fail { met: true, .. })
    }

    /// The workers that the daemon had at the kill; `None` if there was none.
    pub(crate) fn killed(&self) -> Option<BTreeSet<u32>> {
        match std::mem::take(&mut *self.mode.lock().unwrap()) {
            Mode::Kill { workers, .. } => workers,
            _ => None,
        }
    }
}

fn decide(call: &Call, mode: &Mutex<Mode>, daemon: &Mutex<u32>) -> Verdict {
    if matches!(*mode.lock().unwrap(), Mode::Idle) {
        return Verdict::Done;
    }
    let Some(group) = group_of(call, *daemon.lock().unwrap()) else { return Verdict::Done };
    match &mut *mode.lock().unwrap() {
        Mode::Idle => {}
        Mode::Count(groups) => *groups.entry(group).or_default() += 1,
        Mode::Fail { case, seen, met } => {
            if case.group == group {
                *seen += 1;
                if *seen == case.ordinal {
                    if case.error == SHORT {
                        let written = short::write(call);
                        *met = written != Verdict::Done;
                        return written;
                    }
                    *met = true;
                    return Verdict::Failed(case.error);
                }
            }
        }
        Mode::Kill { victim, ordinal, seen, workers } => {
            if moves_a_frame(&group) {
                *seen += 1;
                if *seen == *ordinal {
                    let daemon = *daemon.lock().unwrap();
                    *workers = Some(children(daemon));
                    kill(if *victim == Victim::Daemon { daemon } else { process_of(call.thread) });
                }
            }
        }
    }
    Verdict::Done
}

/// The process of a thread; 0 if it is gone.
fn process_of(thread: u32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let group = status.lines().find_map(|line| line.strip_prefix("Tgid:\t"));
    group.and_then(|group| group.parse().ok()).unwrap_or(0)
}

/// The processes that a process has started.
fn children(of: u32) -> BTreeSet<u32> {
    let threads = fs::read_dir(format!("/proc/{of}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let all = lists.collect::<Vec<_>>().join(" ");
    all.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn kill(process: u32) {
    if let Some(pid) = i32::try_from(process).ok().and_then(Pid::from_raw) {
        // It may have ended by itself.
        let _ = kill_process(pid, Signal::KILL);
    }
}

/// What a path says about the object; the first that fits.
const OBJECTS: [(&str, &str); 22] = [
    ("snapshot.json", "snapshot.json"),
    ("layer.json", "layer.json"),
    ("layerchain.json", "layerchain.json"),
    ("layer.vhd", "image"),
    ("layer.exact", "record"),
    ("sandbox.vhd", "sandbox"),
    ("lcow-store.json", "marker"),
    ("owner.lock", "lock"),
    ("last-init", "last init"),
    ("/merged", "view"),
    ("/mnt", "mount place"),
    ("/staging", "staging"),
    ("/scratch", "scratch"),
    ("/dev/loop", "loop device"),
    ("/home", "home"),
    ("/root", "root"),
    ("socket:", "socket"),
    ("pipe:", "pipe"),
    ("anon_inode", "kernel object"),
    ("memfd", "memory"),
    ("/proc", "/proc"),
    ("/sys", "/sys"),
];

/// The group of a call; `None` for a process that is neither daemon nor worker, such as the thread that starts them.
fn group_of(call: &Call, daemon: u32) -> Option<Group> {
    let kind = kind(call.number)?;
    let status = fs::read_to_string(format!("/proc/{}/status", call.thread)).ok()?;
    let group = status.lines().find_map(|line| line.strip_prefix("Tgid:\t"))?.parse::<u32>().ok()?;
    if group == std::process::id() {
        return None;
    }
    // The process that a start has just made is the daemon.
    let daemon = if daemon == 0 { !status.contains("worker") } else { group == daemon };
    let mut text = String::new();
    for path in kind.paths {
        text += &path_at(call.thread, call.arguments[*path]).unwrap_or_default();
        text.push(' ');
    }
    if let Some(at) = kind.descriptor {
        let link = fs::read_link(format!("/proc/{}/fd/{}", call.thread, call.arguments[at]));
        text += &link.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
    }
    let object = OBJECTS.iter().find(|(part, _)| text.contains(part)).map_or("other", |(_, name)| name);
    Some(Group { daemon, call: kind.name, object })
}

/// A path in a process that waits.
fn path_at(thread: u32, address: u64) -> Option<String> {
    let memory = fs::File::open(format!("/proc/{thread}/mem")).ok()?;
    let mut bytes = vec![0; MAX_PATH];
    let n = memory.read_at(&mut bytes, address).ok()?;
    let end = bytes[..n].iter().position(|b| *b == 0)?;
    Some(String::from_utf8_lossy(&bytes[..end]).into_owned())
}
