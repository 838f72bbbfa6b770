//! A model of a file system that forgets: what is durable, and what is not yet.
//!
//! ```text
//!   inodes    0 the root, directories, files with durable and present bytes
//!   names     (directory, name) → inode, durable; and the changes of names since, each pending until
//!             a sync of a directory that it touches
//! ```
//!
//! What is assumed of ext4, XFS, Btrfs and NTFS, and no more:
//! * A rename is one transaction: both its names change or neither does, and a sync of either directory makes both durable.
//! * A sync of a directory makes all earlier changes of its entries durable, and no others.
//! * A sync of a file makes its bytes and its length durable, and not its name.
//! * Without a sync a change of names is there or not, whatever came before or after it, and a file has its old bytes, no
//!   bytes, zeros in its full length, a part of its bytes, or all. A directory has one name.

use super::{content::Content, recorder::Event};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

type Ino = usize;
type Name = (Ino, String);

/// Why an event cannot happen at this point of a log: an earlier one was moved behind it.
#[derive(Debug)]
pub(crate) struct Impossible;

#[derive(Debug, Clone)]
enum Node {
    Dir,
    Link(PathBuf),
    File { durable: Option<Arc<Content>>, now: Arc<Content>, dirty: bool, since: usize },
}

/// Changes of names that come together or not at all.
#[derive(Debug, Clone)]
struct Change {
    sets: Vec<(Name, Option<Ino>)>,
    since: usize,
}

/// The model.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    nodes: Vec<Node>,
    durable: BTreeMap<Name, Ino>,
    now: BTreeMap<Name, Ino>,
    pending: Vec<Change>,
    clock: usize,
}

/// What one name leads to after a power cut.
#[derive(Debug, Clone)]
pub(crate) enum Found {
    Dir,
    Link(PathBuf),
    File(Ino, Arc<Content>),
}

/// All that is there after a power cut, by path; parents come before what is in them.
pub(crate) type State = BTreeMap<PathBuf, Found>;

/// Something that a power cut may take or leave: a change of names, or the bytes of a file.
#[derive(Debug, Clone)]
pub(crate) enum Item {
    Change(usize),
    Bytes(Ino, Vec<Arc<Content>>),
}

impl Item {
    /// How many outcomes it has; the last is that nothing is lost.
    pub(crate) fn outcomes(&self) -> usize {
        match self {
            Self::Change(_) => 2,
            Self::Bytes(_, variants) => variants.len(),
        }
    }
}

impl Disk {
    /// An empty directory.
    pub(crate) fn new() -> Self {
        Self {
            nodes: vec![Node::Dir],
            durable: BTreeMap::new(),
            now: BTreeMap::new(),
            pending: Vec::new(),
            clock: 0,
        }
    }

    fn find(&self, path: &Path) -> Result<Ino, Impossible> {
        path.iter().try_fold(0, |dir, name| {
            self.now.get(&(dir, name.to_str().unwrap().to_owned())).copied().ok_or(Impossible)
        })
    }

    fn name(&self, path: &Path) -> Result<Name, Impossible> {
        let dir = self.find(path.parent().unwrap())?;
        Ok((dir, path.file_name().unwrap().to_str().unwrap().to_owned()))
    }

    fn change(&mut self, sets: Vec<(Name, Option<Ino>)>) {
        for (name, ino) in &sets {
            put(&mut self.now, &self.nodes, name, *ino);
        }
        self.pending.push(Change { sets, since: self.clock });
    }

    fn add(&mut self, path: &Path, node: Node) -> Result<(), Impossible> {
        let name = self.name(path)?;
        self.nodes.push(node);
        self.change(vec![(name, Some(self.nodes.len() - 1))]);
        Ok(())
    }

    /// Lets an event happen.
    pub(crate) fn apply(&mut self, event: &Event) -> Result<(), Impossible> {
        self.clock += 1;
        match event {
            Event::MakeDir(path) => {
                let mut dir = PathBuf::new();
                for part in path {
                    dir.push(part);
                    if self.find(&dir).is_err() {
                        self.add(&dir, Node::Dir)?;
                    }
                }
            }
            Event::Create(path) => {
                if self.find(path).is_err() {
                    let now = Arc::new(Content::zeros(0));
                    self.add(path, Node::File { durable: None, now, dirty: true, since: self.clock })?;
                }
            }
            Event::Symlink(path, target) => self.add(path, Node::Link(target.clone()))?,
            Event::Link(from, to) => {
                let (ino, to) = (self.find(from)?, self.name(to)?);
                self.change(vec![(to, Some(ino))]);
            }
            Event::Rename(from, to) => {
                let (ino, from, to) = (self.find(from)?, self.name(from)?, self.name(to)?);
                self.change(vec![(from, None), (to, Some(ino))]);
            }
            Event::Unlink(path) => {
                self.find(path)?;
                let name = self.name(path)?;
                self.change(vec![(name, None)]);
            }
            Event::Bytes(path, content) => {
                let (ino, clock) = (self.find(path)?, self.clock);
                let Node::File { now, dirty, since, .. } = &mut self.nodes[ino] else {
                    return Err(Impossible);
                };
                if now.hash != content.hash {
                    (*now, *dirty, *since) = (content.clone(), true, clock);
                }
            }
            Event::SyncFile(path) => {
                let ino = self.find(path)?;
                let Node::File { durable, now, dirty, .. } = &mut self.nodes[ino] else {
                    return Err(Impossible);
                };
                (*durable, *dirty) = (Some(now.clone()), false);
            }
            Event::SyncFolder(path) => {
                let dir = self.find(path)?;
                self.sync(|change| change.sets.iter().any(|((d, _), _)| *d == dir));
            }
            Event::Settle => {
                self.sync(|_| true);
                for node in &mut self.nodes {
                    if let Node::File { durable, now, dirty, .. } = node {
                        (*durable, *dirty) = (Some(now.clone()), false);
                    }
                }
            }
            Event::Legal(..) => {}
        }
        Ok(())
    }

    /// Makes the pending changes durable for which `covered` is true.
    fn sync(&mut self, covered: impl Fn(&Change) -> bool) {
        let mut left: Vec<Change> = Vec::new();
        for change in std::mem::take(&mut self.pending) {
            if !covered(&change) {
                left.push(change);
                continue;
            }
            for (name, ino) in &change.sets {
                put(&mut self.durable, &self.nodes, name, *ino);
                // What it replaced can no longer come.
                for earlier in &mut left {
                    earlier.sets.retain(|(other, _)| other != name);
                }
            }
        }
        left.retain(|change| !change.sets.is_empty());
        self.pending = left;
    }

    /// What may be lost now, oldest first. `ignored` are files whose bytes do not matter.
    pub(crate) fn items(&self, ignored: impl Fn(&str) -> bool) -> Vec<Item> {
        let mut named: BTreeMap<Ino, &str> = BTreeMap::new();
        let pending = self.pending.iter().flat_map(|change| &change.sets);
        let names = pending.filter_map(|((_, name), ino)| Some((name, (*ino)?)));
        for (name, ino) in names.chain(self.durable.iter().map(|((_, name), ino)| (name, *ino))) {
            named.insert(ino, name);
        }
        let mut items: Vec<(usize, Item)> =
            self.pending.iter().enumerate().map(|(n, change)| (change.since, Item::Change(n))).collect();
        for (ino, name) in named {
            let Node::File { durable, now, dirty: true, since } = &self.nodes[ino] else { continue };
            if ignored(name) {
                continue;
            }
            let mut variants: Vec<Content> = match durable.as_deref() {
                None => vec![Content::zeros(0), Content::zeros(now.len), now.prefix()],
                // Written in place: nothing makes it shorter.
                Some(old) => vec![old.clone(), now.half_over(old)],
            };
            variants.push(now.as_ref().clone());
            let mut seen = BTreeSet::from([now.hash]);
            let last = variants.pop().unwrap();
            variants.retain(|content| seen.insert(content.hash));
            variants.push(last);
            if variants.len() > 1 {
                items.push((*since, Item::Bytes(ino, variants.into_iter().map(Arc::new).collect())));
            }
        }
        items.sort_by_key(|(since, _)| *since);
        items.into_iter().map(|(_, item)| item).collect()
    }

    /// What a power cut leaves if it decides so of each item.
    pub(crate) fn after(&self, items: &[Item], outcomes: &[usize]) -> State {
        let mut names = self.durable.clone();
        let mut bytes: BTreeMap<Ino, Arc<Content>> = BTreeMap::new();
        for (item, outcome) in items.iter().zip(outcomes) {
            match item {
                Item::Bytes(ino, variants) => drop(bytes.insert(*ino, variants[*outcome].clone())),
                Item::Change(n) if *outcome == 1 => {
                    for (name, ino) in &self.pending[*n].sets {
                        put(&mut names, &self.nodes, name, *ino);
                    }
                }
                Item::Change(_) => {}
            }
        }
        self.tree(&names, &bytes)
    }

    /// What is there without a power cut.
    pub(crate) fn present(&self) -> State {
        self.tree(&self.now, &BTreeMap::new())
    }

    fn tree(&self, names: &BTreeMap<Name, Ino>, bytes: &BTreeMap<Ino, Arc<Content>>) -> State {
        let mut state = State::new();
        let mut folders = vec![(0, PathBuf::new())];
        while let Some((dir, path)) = folders.pop() {
            for ((_, name), ino) in names.range((dir, String::new())..(dir + 1, String::new())) {
                let path = path.join(name);
                let found = match &self.nodes[*ino] {
                    Node::Dir => {
                        folders.push((*ino, path.clone()));
                        Found::Dir
                    }
                    Node::Link(target) => Found::Link(target.clone()),
                    Node::File { now, .. } => Found::File(*ino, bytes.get(ino).unwrap_or(now).clone()),
                };
                state.insert(path, found);
            }
        }
        state
    }
}

/// Sets a name. A directory has only one.
fn put(names: &mut BTreeMap<Name, Ino>, nodes: &[Node], name: &Name, ino: Option<Ino>) {
    match ino {
        Some(ino) => {
            if matches!(nodes[ino], Node::Dir) {
                names.retain(|_, other| *other != ino);
            }
            names.insert(name.clone(), ino);
        }
        None => {
            names.remove(name);
        }
    }
}
