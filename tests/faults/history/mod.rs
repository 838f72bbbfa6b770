//! A history of eight clients, and an order of their requests that explains every answer.
//!
//! ```text
//!   8 clients ─► requests about families of layers ───────► begin, end, request, answer of each ─► search: is there an order?
//!     a0 ◄ a1 ◄ as     b0 ◄ bs          ▲ a call fails now and then; a kill every few seconds        │ no: what was impossible
//! ```
//!
//! * Each tar has a content of its own, so a Diff shows which one it was made from; a container writes names; metadata show
//!   references. What an answer shows must fit one state at one moment within its request.
//! * Answers of the history are falsified one by one, and most of these histories must be found wrong: otherwise the check would
//!   show nothing.
//! * Which requests are sent, and what fails, follows from a seed; how threads meet does not.
//!
//! `LCOW_HISTORY_SECONDS` says how long (12 by itself; `scripts/torture history`), `LCOW_HISTORY_SEED` which requests. Needs root
//! and strace.

mod client;
mod model;
mod search;
mod wrong;

use super::crowd::{AtTheEnd, injected, tracer};
use crate::support::{Plugin, transport};
use client::{Client, Clock};
use model::{Answer, Call, Family, Refusal, Request};
use search::{Event, explain};
use std::{
    collections::BTreeMap,
    env, fs,
    sync::{
        Mutex, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

const CLIENTS: u64 = 8;
/// From one kill to the next.
const PERIOD: Duration = Duration::from_secs(3);
/// Longest wait for a killed process's socket.
const PATIENCE: Duration = Duration::from_mins(1);
/// Longest wait for the end of all requests, when a new process is asked what there is.
const LOOK_PATIENCE: Duration = Duration::from_secs(1);
/// Answers of a family from which those that are falsified are taken.
const MOST_FALSIFIABLE: usize = 36;
/// Answers that are falsified.
const FALSIFIED: usize = 24;
const FAMILIES: [Family; 3] = [
    Family { ids: &["a0", "a1", "as"], parents: &[None, Some(0), Some(1)] },
    Family { ids: &["b0", "bs"], parents: &[None, Some(0)] },
    Family { ids: &["c0", "cs"], parents: &[None, Some(0)] },
];
/// Calls that may fail, with an error and the least and most of what passes between two failures, by thread. Reading a record
/// at a start is not among them: a layer whose record could not be read is refused until the next start.
const FAULTS: [(&str, &str, u64, u64); 10] = [
    ("fsync", "EIO", 7, 23),
    ("fsync", "ENOSPC", 5, 19),
    ("rename", "EIO", 5, 15),
    ("renameat2", "ENOSPC", 3, 9),
    ("mkdir", "ENOSPC", 16, 29),
    ("umount2", "EIO", 5, 13),
    ("mount", "ENOMEM", 5, 13),
    ("fsmount", "ENOMEM", 4, 9),
    ("ioctl", "EIO", 11, 29),
    ("socketpair", "EMFILE", 5, 11),
];
/// Kinds of failures from one kill to the next.
const KINDS_AT_ONCE: u64 = 4;

/// A request of one family's history.
#[derive(Debug, Clone, Copy)]
struct Recorded {
    family: usize,
    event: Event,
}

/// The answers so far, with the clock that orders them.
#[derive(Default)]
struct History {
    clock: Clock,
    recorded: Mutex<Vec<Recorded>>,
    /// Read by each request; written while a new process is asked what the killed one left, which decides between most of
    /// what its last answers and requests without an answer may have done.
    under_way: RwLock<()>,
}

impl History {
    fn add(&self, family: usize, begin: u64, end: u64, call: Call) {
        self.recorded.lock().unwrap().push(Recorded { family, event: Event { begin, end, call } });
    }

    /// Kills the plugin, starts a new one and looks at all layers. What had no answer may have happened up to this moment,
    /// and not later.
    fn restart(&self, plugin: &mut Plugin, looker: &mut Client<'_>, looks: &[Request]) {
        plugin.kill();
        let begin = self.clock.tick();
        // A worker that was just being forked still has the socket.
        let since = Instant::now();
        while transport::connect(&plugin.socket()).is_ok() {
            assert!(since.elapsed() < PATIENCE, "the socket of a killed process still accepts connections");
            std::thread::sleep(Duration::from_millis(10));
        }
        plugin.start_again();
        let end = self.clock.tick();
        for family in 0..FAMILIES.len() {
            let call = Call { layer: 0, request: Request::Restart, answer: Answer::Done, excused: false };
            self.add(family, begin, end, call);
        }
        // A container's write may be stuck in a file system that the killed process froze and the new one could not thaw.
        let since = Instant::now();
        while since.elapsed() < LOOK_PATIENCE {
            if let Ok(_alone) = self.under_way.try_write() {
                looker.look_at_everything(looks);
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The histories of the families, ready for the search.
    fn of_families(&self) -> Vec<Vec<Event>> {
        let recorded = self.recorded.lock().unwrap();
        let of = |family| {
            let mut events: Vec<Event> =
                recorded.iter().filter(|r| r.family == family).map(|r| r.event).collect();
            events.sort_unstable_by_key(|event| event.begin);
            end_at_the_next_restart(&mut events);
            excuse(&FAMILIES[family], &mut events);
            events
        };
        (0..FAMILIES.len()).map(of).collect()
    }
}

/// A request without an answer ends with its process.
fn end_at_the_next_restart(events: &mut [Event]) {
    let restarts: Vec<u64> =
        events.iter().filter(|e| e.call.request == Request::Restart).map(|e| e.begin).collect();
    for event in events.iter_mut().filter(|e| e.call.answer == Answer::Lost) {
        // Clients tick in steps of two.
        let next = restarts.iter().find(|restart| **restart > event.begin);
        event.end = next.expect("a restart behind every request without an answer") - 1;
    }
}

/// A layer that is being created counts as a child, one that is being removed gets no more of them, and a tar that is being
/// read keeps others away, from before their effect to their answer. While a layer is being removed, the reason why one
/// before it took no tar may be repeated; a tar that came meanwhile may keep the next ones away, too.
fn excuse(family: &Family, events: &mut [Event]) {
    let all = events.to_vec();
    for event in events {
        let meets = |other: &Event| other.begin < event.end && event.begin < other.end;
        let layer = event.call.layer;
        event.call.excused =
            all.iter().filter(|other| meets(other) && other.begin != event.begin).any(|other| {
                match (event.call.request, other.call.request) {
                    (Request::Remove, Request::ApplyDiff(_)) if event.call.answer == Answer::Done => {
                        other.call.layer == layer
                    }
                    (Request::Remove, Request::Create | Request::CreateReadWrite)
                        if event.call.answer != Answer::Done =>
                    {
                        family.parents[other.call.layer] == Some(layer)
                    }
                    (Request::Create | Request::CreateReadWrite, Request::Remove) => {
                        family.parents[layer] == Some(other.call.layer)
                    }
                    (Request::ApplyDiff(_), Request::ApplyDiff(_)) => {
                        other.call.layer == layer && event.call.answer == Answer::Refused(Refusal::InProgress)
                    }
                    (Request::ApplyDiff(_), Request::Remove) => {
                        other.call.layer == layer && event.call.answer == Answer::Refused(Refusal::Incomplete)
                    }
                    _ => false,
                }
            });
    }
}

/// What fails until the next kill, as strace is told.
fn faults(client: &mut Client) -> Vec<String> {
    let mut chosen = BTreeMap::new();
    for _ in 0..KINDS_AT_ONCE {
        let (call, error, least, most) = FAULTS[client.below(FAULTS.len() as u64) as usize];
        let (first, then) = (least + client.below(most), least + client.below(most - least));
        chosen.insert(call, format!("{call}:error={error}:when={first}+{then}"));
    }
    chosen.into_values().collect()
}

fn number(name: &str, otherwise: u64) -> u64 {
    env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

#[test]
fn every_history_of_eight_clients_with_failing_calls_has_an_order_that_explains_it() {
    let seconds = number("LCOW_HISTORY_SECONDS", 12);
    let seed = number("LCOW_HISTORY_SEED", 1);
    let mut plugin =
        Plugin::start(&["--storage-opt", "lcow.sandboxsize=16MiB", "--storage-opt", "lcow.timeout=20"]);
    plugin.init();
    let (history, done) = (History::default(), AtomicBool::new(false));
    let (mut failures, mut kills) = (0, 0);
    std::thread::scope(|scope| {
        for n in 0..CLIENTS {
            let mut client = Client::new(&plugin, &history, seed, n);
            let done = &done;
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    client.one_request();
                }
            });
        }
        let _end = AtTheEnd(&done);
        let mut chooser = Client::new(&plugin, &history, seed, CLIENTS);
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(seconds) {
            let trace = plugin.folder.join(format!("trace{kills}"));
            let faults = faults(&mut chooser);
            let faults: Vec<&str> = faults.iter().map(String::as_str).collect();
            plugin.launcher = tracer(&faults, &trace);
            history.restart(&mut plugin, &mut chooser, &[Request::Exists, Request::GetMetadata]);
            std::thread::sleep(PERIOD);
            failures += injected(&trace);
            let _ = fs::remove_file(&trace);
            kills += 1;
        }
    });
    plugin.launcher.clear();
    let mut last = Client::new(&plugin, &history, seed, CLIENTS + 1);
    history.restart(
        &mut plugin,
        &mut last,
        &[Request::Exists, Request::GetMetadata, Request::DiffSize, Request::Diff],
    );
    let families = history.of_families();
    judge(&families, &plugin, &format!("seed {seed}, {seconds} s: {failures} calls failed, {kills} kills"));
}

/// Holds the histories against the model, prints figures, and falsifies answers.
fn judge(families: &[Vec<Event>], plugin: &Plugin, what: &str) {
    let mut tally: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for Event { call, .. } in families.iter().flatten() {
        let name = format!("{:?}", call.request);
        let entry = tally.entry(name.split('(').next().unwrap_or_default().to_owned()).or_default();
        entry.0 += u64::from(!matches!(call.answer, Answer::Failed | Answer::Lost));
        entry.1 += 1;
    }
    let requests: usize = families.iter().map(Vec::len).sum();
    println!(
        "{what}; {requests} requests; answered with more than an error of the system, of all: {tally:?}"
    );
    for (family, events) in FAMILIES.iter().zip(families) {
        match explain(family, events) {
            Ok(found) => println!(
                "{:?}: explained; at most {} worlds behind an answer, {} looked at",
                family.ids, found.most, found.looked_at
            ),
            Err(why) => panic!("{why}\n{}", plugin.log()),
        }
    }
    let enough = |(name, (answered, _)): (&String, &(u64, u64))| *answered > 0 || name == "Restart";
    assert!(tally.iter().all(enough), "{tally:?}");
    falsify(families);
}

/// Turns answers of Exists round: a history that is still explained says nothing about that layer at that moment.
fn falsify(families: &[Vec<Event>]) {
    let (mut tried, mut found) = (0, 0);
    for (family, events) in FAMILIES.iter().zip(families) {
        let answers: Vec<usize> =
            (0..events.len()).filter(|n| matches!(events[*n].call.answer, Answer::Exists(_))).collect();
        // Each is a search from the beginning: the first of a long history are enough.
        let answers = &answers[..answers.len().min(MOST_FALSIFIABLE)];
        let stride = (answers.len() / (FALSIFIED / FAMILIES.len())).max(1);
        for n in answers.iter().copied().step_by(stride) {
            // What follows is only there to be explained as well.
            let upto = events[n].end;
            let mut wrong: Vec<Event> = events.iter().filter(|event| event.begin < upto).copied().collect();
            let Answer::Exists(there) = wrong[n].call.answer else { continue };
            wrong[n].call.answer = Answer::Exists(!there);
            tried += 1;
            found += usize::from(explain(family, &wrong).is_err());
        }
    }
    println!("of {tried} falsified answers {found} were found");
    assert!(tried >= FALSIFIED / 2 && found * 2 > tried, "{found} of {tried}");
}
