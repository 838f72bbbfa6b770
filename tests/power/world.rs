//! What a client knows of its layers and snapshots: for each name, what it may be after a power cut.
//!
//! ```text
//!   known         {applied}
//!   request sent  {applied, absent}          either: it is in flight
//!   acknowledged  {absent}                   or {absent, applied}: a Remove of containerd's, which may be undone
//! ```
//!
//! The promises are those of `docs/reliability.md`.

use std::{collections::BTreeMap, sync::Arc};

/// What is in a layer or a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// Nothing yet.
    Empty,
    /// ApplyDiff was cut: refused until removed.
    Unfinished,
    /// A tar, which a diff must return.
    Tar(Arc<Vec<u8>>),
    /// What a container wrote.
    Disk(Disk),
}

/// A sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Disk {
    /// Files that must be there.
    pub(crate) synced: BTreeMap<String, Vec<u8>>,
    /// Files that were not synced: they may be missing, and cut.
    pub(crate) loose: BTreeMap<String, Vec<u8>>,
    /// What a Diff returned, since when nothing was written.
    pub(crate) diff: Option<Arc<Vec<u8>>>,
    /// A process of the test has it mounted.
    pub(crate) mounted: bool,
}

impl Disk {
    /// What was loose is synced.
    pub(crate) fn settle(&mut self) {
        let loose = std::mem::take(&mut self.loose);
        self.synced.extend(loose);
    }
}

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Of Docker's face.
    Layer,
    Active,
    View,
    Committed,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Thing {
    pub(crate) kind: Kind,
    /// Empty for none.
    pub(crate) parent: String,
    pub(crate) content: Content,
    /// The label of a snapshot.
    pub(crate) label: Option<String>,
}

impl Thing {
    pub(crate) fn new(kind: Kind, parent: &str, content: Content) -> Self {
        Self { kind, parent: parent.to_owned(), content, label: None }
    }

    pub(crate) fn disk(&self) -> Option<&Disk> {
        if let Content::Disk(disk) = &self.content { Some(disk) } else { None }
    }
}

/// What else an acknowledged change may be after a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Promise {
    /// Nothing: it is durable.
    Durable,
    /// It may be undone: what was before may be there instead.
    OrUndone,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct World {
    /// The last one is what the client believes.
    pub(crate) names: BTreeMap<String, Vec<Option<Thing>>>,
    /// A key and the name that a Commit gives it: one of them is there. Neither only if the Commit may be lost altogether.
    pub(crate) commits: Vec<(String, String, Promise)>,
}

impl World {
    /// What a name stands for now.
    pub(crate) fn now(&self, name: &str) -> Option<&Thing> {
        self.names.get(name)?.last()?.as_ref()
    }

    /// Names and what they stand for now.
    pub(crate) fn things(&self) -> impl Iterator<Item = (&str, &Thing)> {
        self.names.iter().filter_map(|(name, all)| Some((name.as_str(), all.last()?.as_ref()?)))
    }

    /// Whether anything stands on it.
    pub(crate) fn has_children(&self, name: &str) -> bool {
        self.things().any(|(_, thing)| thing.parent == name)
    }

    /// A request is sent: afterwards the name may stand for `then`.
    pub(crate) fn sent(&mut self, name: &str, then: Option<Thing>) {
        if then.is_some() && self.now(name).is_none() {
            // Another snapshot gets the key: an earlier Commit says nothing of it.
            self.commits.retain(|(key, ..)| key != name);
        }
        let all = self.names.entry(name.to_owned()).or_insert_with(|| vec![None]);
        // What the client believes stays last.
        all.insert(0, then);
    }

    /// It was acknowledged.
    pub(crate) fn acknowledged(&mut self, name: &str, then: Option<Thing>, promise: Promise) {
        let all = self.names.entry(name.to_owned()).or_insert_with(|| vec![None]);
        if promise == Promise::Durable {
            all.clear();
        }
        all.push(then);
    }

    /// Changes what a name stands for, without a request: a container writes.
    pub(crate) fn change_disk(&mut self, name: &str, change: impl FnOnce(&mut Disk)) {
        let all = self.names.get_mut(name).expect("known");
        let Some(Some(Thing { content: Content::Disk(disk), .. })) = all.last_mut() else {
            panic!("{name} is no sandbox")
        };
        change(disk);
    }
}
