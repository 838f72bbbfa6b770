//! Notes every step that the code takes below a directory, and what is in the files at that moment.
//!
//! ```text
//!   files::step ─► observed ─► recorder of that directory? no: the step alone
//!                                yes: bytes of the files that are not synced ─► the step ─► log
//! ```
//!
//! The steps of several threads are noted in the order in which they happen: a lock is held over each.

use super::{
    content::Content,
    disk::{Disk, Found},
};
use crate::store::files::Step;
use parking_lot::{Mutex, RwLock};
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

/// What may be in a store after a power cut, from this event on.
pub(crate) type Legal = BTreeMap<String, Vec<String>>;

/// One entry of a log. Paths are relative to the recorder's directory.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    MakeDir(PathBuf),
    Create(PathBuf),
    Symlink(PathBuf, PathBuf),
    Link(PathBuf, PathBuf),
    Rename(PathBuf, PathBuf),
    Unlink(PathBuf),
    /// What a file that is not synced holds now.
    Bytes(PathBuf, Arc<Content>),
    SyncFile(PathBuf),
    SyncFolder(PathBuf),
    /// A request begins or is answered.
    Legal(String, Arc<Legal>),
    /// A long time passes: everything is on the disk.
    Settle,
}

#[derive(Debug, Default)]
struct Log {
    events: Vec<Event>,
    /// Files that were written since their last sync, with what was noted of them last.
    unsynced: BTreeMap<PathBuf, u64>,
}

/// A recorder of one directory.
#[derive(Debug)]
pub(crate) struct Recorder {
    root: PathBuf,
    log: Mutex<Log>,
}

/// Stands for the bytes of a file that is not synced.
const UNSYNCED: &str = "unsynced";

/// The recorders of all tests that run.
static ACTIVE: RwLock<Vec<Arc<Recorder>>> = RwLock::new(Vec::new());

/// Records until it is dropped.
#[derive(Debug)]
pub(crate) struct Recording(pub(crate) Arc<Recorder>);

impl Recording {
    /// Records what happens below `root`, which is empty.
    pub(crate) fn of(root: &Path) -> Self {
        assert_eq!(fs::read_dir(root).unwrap().count(), 0, "a recording begins with an empty directory");
        let recorder = Arc::new(Recorder { root: root.to_owned(), log: Mutex::default() });
        ACTIVE.write().push(recorder.clone());
        Self(recorder)
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        ACTIVE.write().retain(|other| !Arc::ptr_eq(other, &self.0));
    }
}

impl Recorder {
    /// Notes what is in the files, and then an event of the test.
    pub(crate) fn note(&self, event: Event) {
        let mut log = self.log.lock();
        self.note_bytes(&mut log);
        log.events.push(event);
    }

    /// A file was written in place, after its sync.
    pub(crate) fn written(&self, path: &Path) {
        let path = self.inside(path);
        let mut log = self.log.lock();
        log.unsynced.insert(path, 0);
        self.note_bytes(&mut log);
    }

    /// Everything so far.
    pub(crate) fn events(&self) -> Vec<Event> {
        self.log.lock().events.clone()
    }

    /// Compares what the steps in the log make with what is there: nothing was changed on another way.
    pub(crate) fn agrees(&self) {
        let mut log = self.log.lock();
        self.note_bytes(&mut log);
        let mut disk = Disk::new();
        for event in &log.events {
            disk.apply(event).expect("what was recorded can happen");
        }
        let kind = |found: &Found| match found {
            Found::Dir => "directory".to_owned(),
            Found::Link(_) => "link".to_owned(),
            Found::File(_, content) => format!("{} bytes, {:x}", content.len, content.hash),
        };
        let recorded: BTreeMap<PathBuf, String> = disk
            .present()
            .iter()
            .map(|(path, found)| {
                // A worker may be writing it at this moment.
                let unsynced = log.unsynced.contains_key(path);
                (path.clone(), if unsynced { UNSYNCED.to_owned() } else { kind(found) })
            })
            .collect();
        let (mut there, mut folders) = (BTreeMap::new(), vec![self.root.clone()]);
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
                let (path, kind) = (entry.path(), entry.file_type().unwrap());
                let text = if kind.is_dir() {
                    folders.push(path.clone());
                    "directory".to_owned()
                } else if kind.is_symlink() {
                    "link".to_owned()
                } else if log.unsynced.contains_key(&self.inside(&path)) {
                    UNSYNCED.to_owned()
                } else {
                    let content = Content::read(&path).unwrap();
                    format!("{} bytes, {:x}", content.len, content.hash)
                };
                there.insert(self.inside(&path), text);
            }
        }
        assert_eq!(recorded, there, "something changed that was not recorded");
    }

    fn inside(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root).unwrap().to_owned()
    }

    fn note_bytes(&self, log: &mut Log) {
        let Log { events, unsynced } = log;
        for (path, last) in unsynced {
            let content = Content::read(&self.root.join(path)).unwrap();
            if content.hash != *last {
                *last = content.hash;
                events.push(Event::Bytes(path.clone(), Arc::new(content)));
            }
        }
    }

    /// The events of a tree's deletion, children first.
    fn deletion(&self, path: &Path, events: &mut Vec<Event>) {
        let Ok(metadata) = fs::symlink_metadata(path) else { return };
        if metadata.is_dir() {
            let mut inside: Vec<PathBuf> =
                fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
            inside.sort();
            for child in inside {
                self.deletion(&child, events);
            }
        }
        events.push(Event::Unlink(self.inside(path)));
    }

    fn events_of(&self, step: Step<'_>) -> Vec<Event> {
        let inside = |path| self.inside(path);
        vec![match step {
            Step::MakeDir(path) => Event::MakeDir(inside(path)),
            Step::Create(path) => Event::Create(inside(path)),
            Step::Symlink(path) => Event::Symlink(inside(path), PathBuf::new()),
            Step::Link(from, to) => Event::Link(inside(from), inside(to)),
            Step::Rename(from, to) => Event::Rename(inside(from), inside(to)),
            Step::Unlink(path) => Event::Unlink(inside(path)),
            Step::SyncFile(path) => Event::SyncFile(inside(path)),
            Step::SyncFolder(path) => Event::SyncFolder(inside(path)),
            Step::RemoveTree(path) => {
                let mut events = Vec::new();
                self.deletion(path, &mut events);
                return events;
            }
        }]
    }
}

/// The path that decides whose step it is.
fn path_of(step: Step<'_>) -> &Path {
    match step {
        Step::MakeDir(path)
        | Step::Create(path)
        | Step::Symlink(path)
        | Step::Link(path, _)
        | Step::Rename(path, _)
        | Step::Unlink(path)
        | Step::RemoveTree(path)
        | Step::SyncFile(path)
        | Step::SyncFolder(path) => path,
    }
}

/// Takes a step of the code under test, and notes it if it succeeds.
pub(in crate::store) fn observed<T>(step: Step<'_>, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let path = path_of(step);
    let recorder = ACTIVE.read().iter().find(|recorder| path.starts_with(&recorder.root)).cloned();
    let Some(recorder) = recorder else { return work() };
    let mut log = recorder.log.lock();
    recorder.note_bytes(&mut log);
    if let Step::SyncFile(path) = step {
        // Also of a file that was written in place since.
        log.unsynced.entry(recorder.inside(path)).or_insert(0);
        recorder.note_bytes(&mut log);
    }
    let events = recorder.events_of(step);
    let done = work()?;
    for event in events {
        let event = match event {
            Event::Symlink(path, _) => {
                let target = fs::read_link(recorder.root.join(&path)).unwrap();
                Event::Symlink(path, target.strip_prefix(&recorder.root).unwrap_or(&target).to_owned())
            }
            other => other,
        };
        match &event {
            Event::Create(path) => {
                log.unsynced.insert(path.clone(), 0);
            }
            Event::SyncFile(path) | Event::Unlink(path) => {
                log.unsynced.remove(path);
            }
            Event::Rename(from, to) => {
                log.unsynced.remove(to);
                let moved: Vec<PathBuf> =
                    log.unsynced.keys().filter(|path| path.starts_with(from)).cloned().collect();
                for path in moved {
                    let last = log.unsynced.remove(&path).unwrap_or_default();
                    let rest = path.strip_prefix(from).unwrap();
                    let path = if rest.as_os_str().is_empty() { to.clone() } else { to.join(rest) };
                    log.unsynced.insert(path, last);
                }
            }
            _ => {}
        }
        log.events.push(event);
    }
    Ok(done)
}
