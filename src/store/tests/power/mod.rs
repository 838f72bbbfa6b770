//! A power cut at every moment of real requests.
//!
//! ```text
//!   requests ─► files ─► recorder ─► log                          what was done, and what is legal from when on
//!                                     └─► disk ─► explore         what the disk may have kept
//!                                                   └─► check     opened, repaired, compared with what is legal
//!   log without one sync, log with two steps swapped ─► the same: must be found, or stand in a table with its reason
//! ```
//!
//! What is legal: before a request its old state; while it runs also what a kill leaves at any moment of it; after its
//! answer what it promised ([`Promise`]). The sequences are in `store::tests::power::sequences` and `driver::power_tests`.

pub(crate) mod check;
mod content;
mod disk;
mod explore;
pub(crate) mod recorder;
mod sequences;

use sequences::FREE;

use super::super::Store;
use check::{ABSENT, Bench, Open, masked, views};
use disk::Disk;
use explore::{Counts, Seen, explore, number};
use recorder::{Event, Legal, Recorder, Recording};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

/// What an answer says about the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Promise {
    /// What was asked for is there.
    Durable,
    /// It is there or not; nothing in between.
    Either,
    /// As `Either`, however long nothing else happens: the disk has not been touched yet.
    Later,
    /// As `Either`, and what it is about may be gone.
    WholeOrAbsent,
    /// Its disk has any bytes: a container writes it.
    AnyBytes,
}

/// A sequence of requests that is recorded.
pub(crate) struct Sequence {
    pub(crate) recorder: Arc<Recorder>,
    _recording: Recording,
    legal: BTreeMap<String, Vec<String>>,
    /// Sets that were given to the log; kept, because their addresses name them.
    steps: Vec<Step>,
    settle: bool,
}

#[derive(Debug)]
struct Step {
    label: &'static str,
    promise: Promise,
    after: BTreeMap<String, String>,
}

/// A log with the sets of what is legal filled in.
pub(crate) struct Recorded {
    log: Vec<Event>,
    open: Open,
    home: &'static str,
}

impl Sequence {
    /// Begins a recording of an empty directory. With `settle`, everything is on the disk before each further request.
    pub(crate) fn begin(root: &Path, settle: bool) -> Self {
        let recording = Recording::of(root);
        Self {
            recorder: recording.0.clone(),
            _recording: recording,
            legal: BTreeMap::new(),
            steps: Vec::new(),
            settle,
        }
    }

    /// A request begins.
    pub(crate) fn asked(&mut self, label: &'static str) {
        if self.settle {
            self.recorder.note(Event::Settle);
        }
        self.recorder.note(Event::Legal(label.into(), Arc::default()));
    }

    /// The request was answered, and the store is as it promised.
    pub(crate) fn answered(&mut self, label: &'static str, promise: Promise, store: &Store) {
        self.recorder.agrees();
        self.steps.push(Step { label, promise, after: views(store) });
        self.recorder.note(Event::Legal(format!("after {label}"), Arc::default()));
    }

    /// Ends the recording, and fills in what is legal when. A kill is looked at after each step of the log.
    pub(crate) fn end(mut self, open: Open, home: &'static str) -> Recorded {
        let mut log = self.recorder.events();
        let mut bench = Bench::new(open, home);
        let mut disk = Disk::new();
        let (mut steps, mut begun) = (self.steps.into_iter(), None);
        let mut killed: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for n in 0..log.len() {
            disk.apply(&log[n]).expect("what was recorded can happen");
            let Event::Legal(label, _) = &log[n] else {
                let state = disk.present();
                if begun.is_some()
                    && matches!(log[n], Event::Rename(..) | Event::Unlink(_))
                    && seen.insert(number(&state))
                {
                    let found = bench.look(&state);
                    let found = found.unwrap_or_else(|e| panic!("a kill at {:?} leaves damage: {e}", log[n]));
                    for id in found.keys().chain(self.legal.keys()) {
                        let view = found.get(id).map_or(ABSENT, String::as_str);
                        killed.entry(id.clone()).or_default().insert(view.to_owned());
                    }
                }
                continue;
            };
            let Some(at) = begun.take() else {
                begun = Some(n);
                assert!(!label.starts_with("after "), "{label}");
                killed.clear();
                continue;
            };
            let step = steps.next().unwrap();
            assert_eq!(*label, format!("after {}", step.label));
            let ids: BTreeSet<String> =
                self.legal.keys().chain(step.after.keys()).chain(killed.keys()).cloned().collect();
            let (mut during, mut after) = (Legal::new(), Legal::new());
            for id in ids {
                let old = self.legal.get(&id).cloned().unwrap_or_else(|| vec![ABSENT.to_owned()]);
                let new = step.after.get(&id).map_or(ABSENT, String::as_str).to_owned();
                let mut all: BTreeSet<String> = old.iter().cloned().collect();
                all.extend(killed.remove(&id).unwrap_or_default());
                all.insert(new.clone());
                let touched = old != [new.clone()] || all.len() > 1;
                let all: Vec<String> = all.into_iter().collect();
                let mut later = match step.promise {
                    Promise::Durable => vec![new],
                    Promise::Either | Promise::Later | Promise::WholeOrAbsent => all.clone(),
                    Promise::AnyBytes => vec![if touched { masked(&new) } else { new }],
                };
                if touched && step.promise == Promise::WholeOrAbsent {
                    later.push(ABSENT.to_owned());
                }
                let written = step.promise == Promise::AnyBytes && touched;
                during.insert(id.clone(), if written { later.clone() } else { all });
                after.insert(id, later);
            }
            self.legal = after.clone();
            let next_settles = self.settle;
            for (index, set) in [(at, during), (n, after)] {
                let Event::Legal(_, legal) = &mut log[index] else { unreachable!() };
                *legal = Arc::new(set);
            }
            if next_settles && step.promise != Promise::Later {
                // Then it is as it was answered.
                let whole_or_absent = step.promise == Promise::WholeOrAbsent;
                for (id, allowed) in &mut self.legal {
                    let absent = whole_or_absent && allowed.iter().any(|view| view == ABSENT);
                    let view = step.after.get(id).map_or(ABSENT, String::as_str).to_owned();
                    *allowed = if absent { vec![view, ABSENT.to_owned()] } else { vec![view] };
                }
            }
        }
        Recorded { log, open, home }
    }
}

/// The bytes of the lock file mean nothing but to a person.
fn ignored(name: &str) -> bool {
    name == super::super::layout::OWNER_LOCK
}

impl Recorded {
    /// Every state is legal.
    pub(crate) fn holds(&self, what: &str) -> Seen {
        let (mut bench, mut seen) = (Bench::new(self.open, self.home), Seen::new());
        let mut faults = Vec::new();
        let counts = explore(&self.log, 0..self.log.len(), ignored, &mut seen, |state, legal, label| {
            if let Err(fault) = bench.check(state, legal) {
                faults.push(format!("{label}: {fault}\n{state:#?}"));
            }
            faults.is_empty()
        });
        let counts = Counts { states: seen.len(), ..counts.unwrap() };
        let syncs = self.log.iter().filter(|event| is_sync(event)).count();
        println!("{what}: {} steps, {syncs} syncs, {counts:?}", self.log.len());
        assert!(faults.is_empty(), "{what}: {}\n{}", faults.join("\n"), self.shown());
        seen
    }

    /// The log as a list.
    fn shown(&self) -> String {
        let line = |(n, event): (usize, &Event)| match event {
            Event::Bytes(path, content) => format!("{n} Bytes({path:?}, {})", content.len),
            Event::Legal(label, _) => format!("{n} -- {label}"),
            other => format!("{n} {other:?}"),
        };
        self.log.iter().enumerate().map(line).collect::<Vec<_>>().join("\n")
    }

    /// The label of the request in which an event happens, and where that begins and ends.
    fn request(&self, at: usize) -> (String, usize, usize) {
        let begin = (0..=at).rev().find_map(|n| match &self.log[n] {
            Event::Legal(label, _) => Some((label.trim_start_matches("after ").to_owned(), n)),
            _ => None,
        });
        let settles = (at..self.log.len()).find(|n| matches!(self.log[*n], Event::Settle));
        let (label, begin) = begin.unwrap_or_default();
        (label, begin, settles.map_or(self.log.len(), |n| n + 1))
    }

    /// Whether another log with the same requests has a state that is not legal; what was legal in `seen` is not looked
    /// at again. Also the number of new states.
    fn fault_of(&self, log: &[Event], from: usize, to: usize, seen: &Seen) -> Option<(bool, usize)> {
        let (mut bench, mut known) = (Bench::new(self.open, self.home), seen.clone());
        let (mut fault, mut new) = (false, 0);
        let explored = explore(log, from..to, ignored, &mut known, |state, legal, _| {
            new += 1;
            fault = bench.check(state, legal).is_err();
            !fault
        });
        explored.ok().map(|_| (fault, new))
    }

    /// Each sync, left out, is missed; or it stands in `spare`, as (request, what is synced, why it is there all the
    /// same).
    pub(crate) fn each_sync_counts(&self, seen: &Seen, spare: &[(&str, &str, &str)]) {
        let mut unexpected = Vec::new();
        let mut used = BTreeSet::new();
        let (mut red, mut all) = (0, 0);
        for n in 0..self.log.len() {
            if !is_sync(&self.log[n]) {
                continue;
            }
            let (label, begin, end) = self.request(n);
            let what = plain(&self.log[n]);
            let mut log = self.log.clone();
            log.remove(n);
            all += 1;
            let found = self.fault_of(&log, begin, end - 1, seen).map_or((true, 0), |found| found);
            let listed =
                spare.iter().position(|(request, sync, _)| fits(request, &label) && fits(sync, &what));
            match (found.0, listed) {
                // Another one of the same name may be missed all the same.
                (true, _) => red += 1,
                // A row is for one sync.
                (false, Some(at)) if used.insert(at) => {}
                (false, _) => unexpected.push(format!(
                    "(\"{label}\", \"{what}\", \"\"),    // event {n}, {} new states",
                    found.1
                )),
            }
        }
        println!("syncs left out: {all}, of which {red} are missed and {} are in the table", all - red);
        assert!(
            unexpected.is_empty(),
            "nothing misses these syncs:\n{}\n{}",
            unexpected.join("\n"),
            self.shown()
        );
        let unused: Vec<_> = (0..spare.len()).filter(|at| !used.contains(at)).map(|at| spare[at]).collect();
        assert!(unused.is_empty(), "these are missed, or not there: {unused:?}");
    }

    /// The sync of `what` in the request `label`, left out, is missed.
    pub(crate) fn misses(&self, seen: &Seen, label: &str, what: &str) {
        let here =
            |n: &usize| is_sync(&self.log[*n]) && plain(&self.log[*n]) == what && self.request(*n).0 == label;
        let n = (0..self.log.len()).find(here);
        let n = n.unwrap_or_else(|| panic!("{label} has no {what}:\n{}", self.shown()));
        let mut log = self.log.clone();
        log.remove(n);
        let (_, begin, end) = self.request(n);
        let (missed, _) = self.fault_of(&log, begin, end - 1, seen).unwrap_or((true, 0));
        assert!(missed, "nothing misses {what} in {label}:\n{}", self.shown());
    }

    /// Two steps that follow each other, swapped: a state that is not legal, the same states, or `free`, as (request,
    /// first, second, why).
    pub(crate) fn each_order_counts(&self, seen: &Seen, free: &[(&str, &str, &str, &str)]) {
        let free = &[FREE, free].concat()[..];
        let mut unexpected = Vec::new();
        let mut used = BTreeSet::new();
        let (mut red, mut same, mut impossible) = (0, 0, 0);
        for n in 1..self.log.len() {
            let pair = [n - 1, n];
            if pair
                .iter()
                .any(|n| matches!(self.log[*n], Event::Legal(..) | Event::Settle | Event::Bytes(..)))
            {
                continue;
            }
            let (label, begin, end) = self.request(n);
            let mut log = self.log.clone();
            log.swap(n - 1, n);
            match self.fault_of(&log, begin, end, seen) {
                None => impossible += 1,
                Some((true, _)) => red += 1,
                Some((false, 0)) => same += 1,
                Some((false, new)) => {
                    let [first, second] = pair.map(|n| plain(&self.log[n]));
                    let listed = free.iter().position(|(request, one, two, _)| {
                        fits(request, &label) && fits(one, &first) && fits(two, &second)
                    });
                    match listed {
                        Some(at) => {
                            used.insert(at);
                        }
                        None => unexpected.push(format!("(\"{label}\", \"{first}\", \"{second}\", \"\"),    // event {n}, {new} new states")),
                    }
                }
            }
        }
        println!(
            "steps swapped: {red} are missed, {same} give the same states, {} are in the table, {impossible} cannot be",
            used.len()
        );
        assert!(
            unexpected.is_empty(),
            "nothing misses the order of:\n{}\n{}",
            unexpected.join("\n"),
            self.shown()
        );
        // Rows for all requests need not be of use in each sequence.
        let unused: Vec<_> = (0..free.len())
            .filter(|at| !used.contains(at))
            .map(|at| free[at])
            .filter(|row| row.0 != "*")
            .collect();
        assert!(unused.is_empty(), "these are missed, or not there: {unused:?}");
    }
}

/// Whether a text is that of a table's column, which may end in `*` for any rest, or in `?` for one name of a layer.
fn fits(column: &str, text: &str) -> bool {
    if let Some(begin) = column.strip_suffix('?') {
        return text.strip_prefix(begin).is_some_and(|name| !name.contains(['/', '-']));
    }
    column.strip_suffix('*').map_or(column == text, |begin| text.starts_with(begin))
}

fn is_sync(event: &Event) -> bool {
    matches!(event, Event::SyncFile(_) | Event::SyncFolder(_))
}

/// An event without what differs from run to run.
fn plain(event: &Event) -> String {
    let path = |path: &Path| {
        let mut parts: Vec<String> = path.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
        if let Some(staging) = parts.iter().position(|part| part == super::super::layout::STAGING)
            && let Some(staged) = parts.get_mut(staging + 1)
        {
            *staged = staged.rsplit_once('.').map_or(staged.clone(), |(name, _)| name.to_owned());
        }
        parts.join("/")
    };
    match event {
        Event::MakeDir(p) => format!("mkdir {}", path(p)),
        Event::Create(p) => format!("create {}", path(p)),
        Event::Symlink(p, _) => format!("symlink {}", path(p)),
        Event::Link(a, b) => format!("link {} {}", path(a), path(b)),
        Event::Rename(a, b) => format!("rename {} {}", path(a), path(b)),
        Event::Unlink(p) => format!("unlink {}", path(p)),
        Event::Bytes(p, _) => format!("write {}", path(p)),
        Event::SyncFile(p) => format!("sync {}", path(p)),
        Event::SyncFolder(p) => format!("sync {}/", path(p)),
        Event::Legal(label, _) => label.clone(),
        Event::Settle => "settle".into(),
    }
}
