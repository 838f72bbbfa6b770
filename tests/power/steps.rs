//! The daemon's changes of names and its syncs, as the kernel was asked for them, and whether a tree is one that a cut behind
//! them may leave.
//!
//! ```text
//!   open(O_CREAT), mkdir, link, rename, unlink, fsync ─ seccomp notification ─► log, until the cut
//!   log ─► for each name of each directory: the value that a sync has made durable, and those that came later
//!   tree behind the cut ─► each name has one of these values; each file that was synced has the bytes that it had then
//! ```
//!
//! The rules are those of the enumerated states (docs/reliability.md, *A power cut at every moment*): a sync of a directory makes
//! all earlier changes of its entries durable, and those of a rename in the other directory; what is not synced may be there or
//! not. Both names of a rename are looked at by themselves.
//!
//! A call is noted before the kernel does it. It has certainly been done if its thread has asked for another one; a sync that is
//! not certainly done counts for nothing. Called by `round`; for rounds with one client, whose calls hardly overlap.

use super::record::Found;
use lcow_sys::linux::power::{Call, Calls, Verdict};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command},
    sync::{Arc, Mutex, mpsc},
};

/// Longest path that is read.
const MAX_PATH: usize = 4096;
/// What `mkfs` makes.
const LOST_AND_FOUND: &str = "lost+found";
const WATCHED: [libc::c_long; 16] = [
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_symlink,
    libc::SYS_symlinkat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_rmdir,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
];

/// A call, by paths relative to the disk's root.
#[derive(Debug, Clone)]
enum Step {
    Make {
        path: PathBuf,
        directory: bool,
    },
    Link {
        from: PathBuf,
        to: PathBuf,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
        replaces: bool,
    },
    Unlink(PathBuf),
    /// It changes nothing, and shows that its thread's last step is done.
    Nothing,
    /// Of a directory, or of a file with these bytes.
    Sync {
        path: PathBuf,
        digest: Option<String>,
    },
}

#[derive(Debug, Clone)]
struct Noted {
    thread: u32,
    step: Step,
}

#[derive(Debug, Default)]
struct Log {
    steps: Vec<Noted>,
    /// Nothing is noted any more.
    stopped: bool,
}

/// The log of a daemon.
#[derive(Debug)]
pub(crate) struct Steps {
    disk: PathBuf,
    log: Mutex<Log>,
    /// Syncs are noted and not done: a control.
    without_syncs: bool,
}

impl Steps {
    pub(crate) fn new(disk: PathBuf, without_syncs: bool) -> Arc<Self> {
        Arc::new(Self { disk, log: Mutex::default(), without_syncs })
    }

    /// Starts a process whose calls are noted.
    pub(crate) fn spawn(self: &Arc<Self>, mut command: Command) -> Child {
        let (sender, receiver) = mpsc::channel::<Calls>();
        let steps = self.clone();
        std::thread::spawn(move || {
            let calls = receiver.recv().expect("a watched thread");
            calls.serve(|call| steps.decide(call)).expect("decide about calls");
        });
        // The process asks before it becomes the program: somebody must answer by then.
        let start = move || {
            let calls = Calls::watch(&WATCHED).expect("seccomp with user notifications (Linux 5.5)");
            sender.send(calls).expect("the thread that decides");
            command.spawn().unwrap()
        };
        std::thread::spawn(start).join().unwrap()
    }

    /// The moment before the cut.
    pub(crate) fn stop(&self) {
        self.log.lock().unwrap().stopped = true;
    }

    fn decide(&self, call: &Call) -> Verdict {
        let mut log = self.log.lock().unwrap();
        if log.stopped {
            return Verdict::Done;
        }
        let Some(step) = self.step(call) else {
            let last = log.steps.iter().rfind(|noted| noted.thread == call.thread);
            if last.is_some_and(|noted| !matches!(noted.step, Step::Nothing)) {
                log.steps.push(Noted { thread: call.thread, step: Step::Nothing });
            }
            return Verdict::Done;
        };
        let skipped = self.without_syncs && matches!(step, Step::Sync { .. });
        log.steps.push(Noted { thread: call.thread, step });
        if skipped { Verdict::Skipped } else { Verdict::Done }
    }

    /// What a call does to the disk, if anything.
    fn step(&self, call: &Call) -> Option<Step> {
        let at = |n: usize| call.arguments[n];
        let here = i64::from(libc::AT_FDCWD);
        let path = |directory: i64, address: u64| self.path(call.thread, directory, address);
        let fd = |n: usize| i64::from(call.arguments[n] as i32);
        let creates = |flags: u64| flags & libc::O_CREAT as u64 != 0;
        match call.number {
            libc::SYS_open if creates(at(1)) => {
                Some(Step::Make { path: path(here, at(0))?, directory: false })
            }
            libc::SYS_openat if creates(at(2)) => {
                Some(Step::Make { path: path(fd(0), at(1))?, directory: false })
            }
            libc::SYS_mkdir => Some(Step::Make { path: path(here, at(0))?, directory: true }),
            libc::SYS_mkdirat => Some(Step::Make { path: path(fd(0), at(1))?, directory: true }),
            libc::SYS_link => Some(Step::Link { from: path(here, at(0))?, to: path(here, at(1))? }),
            libc::SYS_linkat => Some(Step::Link { from: path(fd(0), at(1))?, to: path(fd(2), at(3))? }),
            libc::SYS_symlink => Some(Step::Make { path: path(here, at(1))?, directory: false }),
            libc::SYS_symlinkat => Some(Step::Make { path: path(fd(1), at(2))?, directory: false }),
            libc::SYS_rename => {
                Some(Step::Rename { from: path(here, at(0))?, to: path(here, at(1))?, replaces: true })
            }
            libc::SYS_renameat => {
                Some(Step::Rename { from: path(fd(0), at(1))?, to: path(fd(2), at(3))?, replaces: true })
            }
            libc::SYS_renameat2 => Some(Step::Rename {
                from: path(fd(0), at(1))?,
                to: path(fd(2), at(3))?,
                replaces: at(4) & u64::from(libc::RENAME_NOREPLACE) == 0,
            }),
            libc::SYS_unlink | libc::SYS_rmdir => Some(Step::Unlink(path(here, at(0))?)),
            libc::SYS_unlinkat => Some(Step::Unlink(path(fd(0), at(1))?)),
            libc::SYS_fsync | libc::SYS_fdatasync => self.sync(call),
            _ => None,
        }
    }

    fn sync(&self, call: &Call) -> Option<Step> {
        let open = PathBuf::from(format!("/proc/{}/fd/{}", call.thread, call.arguments[0]));
        let path = fs::read_link(&open).ok()?.strip_prefix(&self.disk).ok()?.to_owned();
        let digest = if fs::metadata(&open).ok()?.is_dir() {
            None
        } else {
            Some(format!("{:x}", Sha256::digest(fs::read(&open).ok()?)))
        };
        Some(Step::Sync { path, digest })
    }

    /// A path of a process that waits, if it is on the disk.
    fn path(&self, thread: u32, directory: i64, address: u64) -> Option<PathBuf> {
        let memory = fs::File::open(format!("/proc/{thread}/mem")).ok()?;
        let mut bytes = vec![0; MAX_PATH];
        let n = memory.read_at(&mut bytes, address).ok()?;
        let end = bytes[..n].iter().position(|b| *b == 0)?;
        let named = PathBuf::from(String::from_utf8_lossy(&bytes[..end]).into_owned());
        let whole = if named.is_absolute() {
            named
        } else {
            let base = match i32::try_from(directory) {
                Ok(libc::AT_FDCWD) => format!("/proc/{thread}/cwd"),
                _ => format!("/proc/{thread}/fd/{directory}"),
            };
            fs::read_link(base).ok()?.join(named)
        };
        whole.strip_prefix(&self.disk).ok().map(Path::to_owned)
    }

    /// Whether a tree is one that a cut behind the steps may leave.
    pub(crate) fn check(&self, tree: &[Found]) -> Result<(), String> {
        let log = self.log.lock().unwrap();
        let mut model = Model::default();
        let mut later: BTreeSet<u32> = BTreeSet::new();
        let mut certain = vec![false; log.steps.len()];
        for (n, noted) in log.steps.iter().enumerate().rev() {
            certain[n] = !later.insert(noted.thread);
        }
        for (n, noted) in log.steps.iter().enumerate() {
            model.take(&noted.step, n as u64 + 1, certain[n]);
        }
        let mut found = Tree::default();
        for one in tree.iter().filter(|one| !one.path.starts_with(LOST_AND_FOUND)) {
            found.add(one);
        }
        model.fits(ROOT, &found, Path::new(""))
    }

    /// Names, renames and syncs that were noted.
    pub(crate) fn count(&self) -> u64 {
        self.log.lock().unwrap().steps.len() as u64
    }
}

/// The number of the disk's root among nodes.
const ROOT: usize = 0;

#[derive(Debug, Default)]
struct Node {
    directory: bool,
    entries: BTreeMap<String, Entry>,
    /// The bytes at the last sync that is certain.
    synced: Option<String>,
}

/// A name of a directory: its values with the steps that gave them, and up to which step it is durable.
#[derive(Debug, Default)]
struct Entry {
    values: Vec<(u64, Option<usize>)>,
    durable: u64,
}

impl Entry {
    fn now(&self) -> Option<usize> {
        self.values.last().and_then(|(_, node)| *node)
    }

    /// What a cut may leave.
    fn possible(&self) -> Vec<Option<usize>> {
        let durable = self.values.iter().rev().find(|(step, _)| *step <= self.durable);
        let later = self.values.iter().filter(|(step, _)| *step > self.durable).map(|(_, node)| *node);
        std::iter::once(durable.and_then(|(_, node)| *node)).chain(later).collect()
    }
}

/// A name in a directory.
type Place = (usize, String);

#[derive(Debug)]
struct Model {
    nodes: Vec<Node>,
    renames: Vec<(u64, Place, Place)>,
}

impl Default for Model {
    fn default() -> Self {
        Self { nodes: vec![Node { directory: true, ..Node::default() }], renames: Vec::new() }
    }
}

impl Model {
    fn node(&self, path: &Path) -> Option<usize> {
        let step = |node: usize, name: &std::ffi::OsStr| self.nodes[node].entries.get(name.to_str()?)?.now();
        path.iter().try_fold(ROOT, step)
    }

    fn place(&self, path: &Path) -> Option<Place> {
        Some((self.node(path.parent()?)?, path.file_name()?.to_str()?.to_owned()))
    }

    fn now(&self, place: &Place) -> Option<usize> {
        self.nodes[place.0].entries.get(&place.1)?.now()
    }

    fn set(&mut self, place: &Place, step: u64, value: Option<usize>) {
        self.nodes[place.0].entries.entry(place.1.clone()).or_default().values.push((step, value));
    }

    /// Takes a step. One that the kernel has refused by what is there changes nothing.
    fn take(&mut self, step: &Step, number: u64, certain: bool) {
        let is_empty =
            |model: &Self, node: usize| model.nodes[node].entries.values().all(|e| e.now().is_none());
        match step {
            Step::Make { path, directory } => {
                let Some(place) = self.place(path) else { return };
                if self.now(&place).is_none() {
                    self.nodes.push(Node { directory: *directory, ..Node::default() });
                    self.set(&place, number, Some(self.nodes.len() - 1));
                }
            }
            Step::Link { from, to } => {
                let (Some(node), Some(to)) = (self.node(from), self.place(to)) else { return };
                if self.now(&to).is_none() {
                    self.set(&to, number, Some(node));
                }
            }
            Step::Rename { from, to, replaces } => {
                let (Some(from), Some(to)) = (self.place(from), self.place(to)) else { return };
                let Some(node) = self.now(&from) else { return };
                if *replaces || self.now(&to).is_none() {
                    self.set(&from, number, None);
                    self.set(&to, number, Some(node));
                    self.renames.push((number, from, to));
                }
            }
            Step::Nothing => {}
            Step::Unlink(path) => {
                let Some(place) = self.place(path) else { return };
                if self.now(&place).is_some_and(|node| is_empty(self, node)) {
                    self.set(&place, number, None);
                }
            }
            Step::Sync { path, digest } => {
                let Some(node) = self.node(path).filter(|_| certain) else { return };
                match digest {
                    Some(digest) => self.nodes[node].synced = Some(digest.clone()),
                    None => self.sync_directory(node, number),
                }
            }
        }
    }

    fn sync_directory(&mut self, node: usize, number: u64) {
        for entry in self.nodes[node].entries.values_mut() {
            entry.durable = number;
        }
        for (step, from, to) in self.renames.clone() {
            if from.0 == node || to.0 == node {
                for place in [from, to] {
                    if let Some(entry) = self.nodes[place.0].entries.get_mut(&place.1) {
                        entry.durable = entry.durable.max(step);
                    }
                }
            }
        }
    }

    fn fits(&self, node: usize, found: &Tree, path: &Path) -> Result<(), String> {
        let node = &self.nodes[node];
        let names: BTreeSet<&String> = node.entries.keys().chain(found.children.keys()).collect();
        for name in names {
            let path = path.join(name);
            let possible = node.entries.get(name).map_or_else(|| vec![None], Entry::possible);
            let Some(there) = found.children.get(name) else {
                if possible.contains(&None) {
                    continue;
                }
                return Err(format!("'{}' was durable and is not there", path.display()));
            };
            let mut why = "no step made it, or its removal was durable".to_owned();
            let fits = possible
                .into_iter()
                .flatten()
                .any(|node| self.is(node, there, &path).inspect_err(|reason| why.clone_from(reason)).is_ok());
            if !fits {
                return Err(format!("'{}' is there: {why}", path.display()));
            }
        }
        Ok(())
    }

    /// Whether a node is what was found.
    fn is(&self, node: usize, found: &Tree, path: &Path) -> Result<(), String> {
        let here = &self.nodes[node];
        match (here.directory, found.directory) {
            (true, true) => self.fits(node, found, path),
            (false, false) => match &here.synced {
                // What mounts write later is no step.
                Some(digest) if is_written_once(path) && found.sha256.as_ref() != Some(digest) => {
                    Err("it has other bytes than were synced".to_owned())
                }
                _ => Ok(()),
            },
            _ => Err("it is of another kind".to_owned()),
        }
    }
}

/// Files that are never written once they are synced.
fn is_written_once(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name == "layer.vhd" || name == "layer.exact" || Path::new(name).extension().is_some_and(|e| e == "json")
}

/// What was found, by names.
#[derive(Debug, Default)]
struct Tree {
    directory: bool,
    sha256: Option<String>,
    children: BTreeMap<String, Tree>,
}

impl Tree {
    fn add(&mut self, found: &Found) {
        let place = Path::new(&found.path)
            .iter()
            .fold(self, |tree, name| tree.children.entry(name.to_string_lossy().into_owned()).or_default());
        place.directory = found.kind == "directory";
        place.sha256.clone_from(&found.sha256);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(path: &str, directory: bool) -> Step {
        Step::Make { path: path.into(), directory }
    }

    fn sync(path: &str) -> Step {
        Step::Sync { path: path.into(), digest: None }
    }

    fn rename(from: &str, to: &str) -> Step {
        Step::Rename { from: from.into(), to: to.into(), replaces: true }
    }

    fn found(path: &str) -> Found {
        let kind = if path.ends_with('/') { "directory" } else { "file" };
        Found { path: path.trim_end_matches('/').to_owned(), kind, bytes: 0, sha256: None }
    }

    #[test]
    fn a_tree_must_be_one_of_those_that_the_steps_allow() {
        let steps = [
            make("home", true),
            sync(""),
            make("home/staging", true),
            make("home/staging/a", false),
            rename("home/staging/a", "home/a"),
            sync("home"),
            make("home/b", false),
            rename("home/a", "home/c"),
        ];
        let cases: [(&[&str], bool); 7] = [
            (&["home/", "home/staging/", "home/a"], true),
            (&["home/", "home/staging/", "home/c", "home/b"], true),
            (&["home/", "home/staging/", "home/a", "home/b"], true),
            // Without what was synced.
            (&["home/", "home/a"], false),
            (&[], false),
            // What a synced rename took away.
            (&["home/", "home/staging/", "home/staging/a", "home/a"], false),
            // What no step made.
            (&["home/", "home/staging/", "home/a", "home/x"], false),
        ];
        for (paths, fits) in cases {
            let mut model = Model::default();
            for (n, step) in steps.iter().enumerate() {
                model.take(step, n as u64 + 1, true);
            }
            let mut tree = Tree::default();
            for path in paths {
                tree.add(&found(path));
            }
            assert_eq!(model.fits(ROOT, &tree, Path::new("")).is_ok(), fits, "{paths:?}");
        }
    }
}
