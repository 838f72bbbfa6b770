//! What a round was: requests with their times, the cut, and the tree that was found after it.
//!
//! ```text
//!   <round>.json   {seed, ground, cut_us, events: [{client, step, names, begun_us, ended_us, ok}], tree: [{path, kind, bytes, sha256}]}
//! ```
//!
//! Enough to compare the tree with the states that an enumeration of recorded writes allows for that moment. Written if
//! `LCOW_POWER_RECORDS` names a directory.

use super::round::Plan;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::{fs, path::Path, sync::Mutex, time::Instant};

/// A request, or what a container did.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Event {
    client: String,
    step: String,
    names: Vec<String>,
    begun_us: u64,
    ended_us: Option<u64>,
    ok: bool,
}

/// The events of a round.
#[derive(Debug)]
pub(crate) struct Events {
    origin: Instant,
    all: Mutex<Vec<Event>>,
}

impl Events {
    pub(crate) fn new() -> Self {
        Self { origin: Instant::now(), all: Mutex::default() }
    }

    /// Microseconds since the round began.
    pub(crate) fn now(&self) -> u64 {
        self.origin.elapsed().as_micros() as u64
    }

    /// A request is about to be sent; its number for [`Events::ended`].
    pub(crate) fn begun(&self, client: &str, step: &str, names: &[&str]) -> usize {
        let event = Event {
            client: client.to_owned(),
            step: step.to_owned(),
            names: names.iter().map(ToString::to_string).collect(),
            begun_us: self.now(),
            ended_us: None,
            ok: false,
        };
        let mut all = self.all.lock().unwrap();
        all.push(event);
        all.len() - 1
    }

    pub(crate) fn ended(&self, number: usize, ok: bool) {
        let now = self.now();
        let event = &mut self.all.lock().unwrap()[number];
        (event.ended_us, event.ok) = (Some(now), ok);
    }

    /// Requests that were acknowledged, and those that were not.
    pub(crate) fn count(&self) -> (u64, u64) {
        let all = self.all.lock().unwrap();
        let ok = all.iter().filter(|e| e.ok).count() as u64;
        (ok, all.len() as u64 - ok)
    }

    pub(crate) fn all(&self) -> Vec<Event> {
        self.all.lock().unwrap().clone()
    }
}

/// A file or directory that was found.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Found {
    pub(crate) path: String,
    pub(crate) kind: &'static str,
    pub(crate) bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) sha256: Option<String>,
}

/// Everything below a directory, in order.
pub(crate) fn tree(top: &Path) -> Vec<Found> {
    fn walk(top: &Path, folder: &Path, found: &mut Vec<Found>) {
        let mut entries: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        entries.sort();
        for path in entries {
            let meta = fs::symlink_metadata(&path).unwrap();
            let shown = path.strip_prefix(top).unwrap().display().to_string();
            let (kind, sha256) = if meta.is_dir() {
                ("directory", None)
            } else if meta.is_file() {
                ("file", Some(format!("{:x}", Sha256::digest(fs::read(&path).unwrap()))))
            } else {
                ("other", None)
            };
            found.push(Found { path: shown, kind, bytes: meta.len(), sha256 });
            if meta.is_dir() {
                walk(top, &path, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(top, top, &mut found);
    found
}

/// Writes the record of a round.
pub(crate) fn write(plan: &Plan, cut_us: u64, events: &Events, tree: &[Found], losses: &[String]) {
    let Some(folder) = std::env::var_os("LCOW_POWER_RECORDS") else { return };
    let record = serde_json::json!({
        "seed": plan.seed,
        "kind": format!("{:?}", plan.kind),
        "ground": plan.ground.name(),
        "skipped": format!("{:?}", plan.skipped),
        "cut_us": cut_us,
        "events": events.all(),
        "tree": tree,
        "losses": losses,
    });
    let name = format!("{:?}-{:?}-{}.json", plan.skipped, plan.kind, plan.seed).to_lowercase();
    fs::create_dir_all(&folder).unwrap();
    fs::write(Path::new(&folder).join(name), record.to_string()).unwrap();
}
