//! One layer's own tree: what its tar says, before it meets the layers below.
//!
//! ```text
//!   LayerReader ─► TarReader ─┬─ Entry ─► place: parents, whiteouts, links ─► nodes
//!                             └─ Data ──► digest of the file
//! ```
//!
//! Later entries count; parents that are missing are implied; a symbolic link in a parent is followed inside the layer. Hard
//! links whose target comes later, or from a layer below, stay pending. Called by `tree`.

use super::{
    LayerUse, Shadowed, hide,
    node::{Node, NodeId, NodeKind, ROOT, Role},
    path::{self, MAX_DEPTH, MAX_LINKS},
};
use crate::{Algorithm, Hasher, ImageError, LayerReader, shown};
use layer_tar::{Entry, EntryKind, Event, TarError, TarReader};
use std::{collections::HashMap, io::Read};

/// Prefix of whiteouts.
const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// Prefix of AUFS's own entries, which mean nothing here.
const META_PREFIX: &[u8] = b".wh..wh.";
/// Marks its directory as opaque.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Bytes of zeros that are digested at a time, for holes.
const ZEROS: [u8; 4096] = [0; 4096];

/// What a layer may still take.
pub(super) struct Budget {
    pub(super) entries: usize,
    pub(super) bytes: u64,
}

/// The tree of one layer.
pub(super) struct LayerTree {
    pub(super) index: usize,
    pub(super) nodes: Vec<Node>,
    pub(super) used: LayerUse,
    /// Files that the layer itself replaces.
    pub(super) replaced: Vec<Shadowed>,
}

/// What a layer has at a path.
enum Found {
    Node(NodeId),
    /// Nothing: layers below may have it.
    Missing,
    /// Something that hides the layers below.
    Hidden,
}

/// The digest of the file that is being read.
struct Hashing {
    node: NodeId,
    hasher: Hasher,
    at: u64,
    size: u64,
}

impl Hashing {
    /// Digests a hole.
    fn zeros(&mut self, end: u64) {
        while self.at < end {
            let n = (end - self.at).min(ZEROS.len() as u64);
            self.hasher.update(&ZEROS[..n as usize]);
            self.at += n;
        }
    }
}

impl LayerTree {
    /// Reads a layer to its end, and verifies it.
    pub(super) fn read(
        index: usize,
        what: &str,
        mut layer: LayerReader,
        budget: &Budget,
        digests: bool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, ImageError> {
        let mut tree = Self {
            index,
            nodes: vec![Node::directory(index)],
            used: LayerUse {
                summary: crate::LayerSummary {
                    compression: layer.compression(),
                    blob_bytes: 0,
                    plain_bytes: 0,
                },
                entries: 0,
                file_bytes: 0,
                visible_bytes: 0,
            },
            replaced: Vec::new(),
        };
        tree.read_tar(what, &mut layer, budget, digests, progress)?;
        tree.used.summary = layer.finish()?;
        tree.settle().map_err(|reason| ImageError::corrupt(what, reason))?;
        Ok(tree)
    }

    fn read_tar(
        &mut self,
        what: &str,
        layer: &mut LayerReader,
        budget: &Budget,
        digests: bool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), ImageError> {
        let mut hashing: Option<Hashing> = None;
        let mut reader = TarReader::new(layer.by_ref());
        loop {
            let offset = reader.offset();
            if offset > budget.bytes {
                let reason = "the layers have more plain bytes than are accepted; raise --max-size";
                return Err(ImageError::limit(what, reason));
            }
            match reader.next_event().map_err(|e| of_tar(what, e))? {
                Event::Raw(_) => {}
                Event::Data { offset, bytes } => {
                    if let Some(hashing) = &mut hashing {
                        hashing.zeros(offset);
                        hashing.hasher.update(bytes);
                        hashing.at += bytes.len() as u64;
                    }
                }
                Event::Entry(entry) => {
                    self.digested(hashing.take());
                    progress(offset);
                    self.used.entries += 1;
                    if self.used.entries > budget.entries {
                        let reason = "the layers have more entries than are accepted; raise --max-entries";
                        return Err(ImageError::limit(what, reason));
                    }
                    let placed = self.place(entry).map_err(|reason| {
                        let name = shown(&String::from_utf8_lossy(&entry.path));
                        ImageError::corrupt(what, format!("the entry {name}: {reason}"))
                    })?;
                    if let Some(node) = placed.filter(|_| digests && entry.kind == EntryKind::File) {
                        let hasher = Hasher::new(Algorithm::Sha256);
                        hashing = Some(Hashing { node, hasher, at: 0, size: entry.size });
                    }
                }
                Event::End => {
                    self.digested(hashing.take());
                    progress(offset);
                    return Ok(());
                }
            }
        }
    }

    /// Keeps the digest of a file that was read.
    fn digested(&mut self, hashing: Option<Hashing>) {
        if let Some(mut hashing) = hashing {
            hashing.zeros(hashing.size);
            self.nodes[hashing.node.0].digest = Some(hashing.hasher.finish());
        }
    }

    fn add(&mut self, node: Node) -> NodeId {
        self.nodes.push(node);
        NodeId(self.nodes.len() - 1)
    }

    /// Places an entry; gives its node, unless it is a link, a whiteout or AUFS's own.
    fn place(&mut self, entry: &Entry) -> Result<Option<NodeId>, String> {
        if entry.kind == EntryKind::File {
            self.used.file_bytes = self.used.file_bytes.saturating_add(entry.size);
        }
        let parts =
            path::split(&entry.path).ok_or("its name leaves the layer, is too deep, or has a NUL in it")?;
        let Some((last, parents)) = parts.split_last() else {
            if entry.kind != EntryKind::Directory {
                return Err("the root can only be a directory".to_owned());
            }
            self.nodes[ROOT.0].describe(entry);
            return Ok(Some(ROOT));
        };
        let meta = |part: &&[u8]| part.starts_with(META_PREFIX);
        if parents.iter().any(meta) || meta(last) && *last != OPAQUE {
            return Ok(None);
        }
        if parents.iter().any(|part| part.starts_with(WHITEOUT_PREFIX)) {
            return Err("a whiteout's name is used as a directory".to_owned());
        }
        let directory = self.directory(parents)?;
        if *last == OPAQUE {
            self.nodes[directory.0].opaque = true;
            return Ok(None);
        }
        let device_whiteout = entry.kind == EntryKind::CharDevice && (entry.major, entry.minor) == (0, 0);
        let hidden = last.strip_prefix(WHITEOUT_PREFIX).or(device_whiteout.then_some(last));
        if let Some(hidden) = hidden {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err("a whiteout without a name".to_owned());
            }
            let whiteout = Node::whiteout(self.index);
            self.set(directory, parents, hidden, whiteout);
            return Ok(None);
        }
        match entry.kind {
            EntryKind::HardLink => {
                self.link(directory, parents, last, entry)?;
                Ok(None)
            }
            EntryKind::Symlink if entry.link.is_empty() => Err("a symbolic link without a target".to_owned()),
            EntryKind::Directory => Ok(Some(self.merge_directory(directory, parents, last, entry))),
            _ => {
                let node = Node::of(entry, self.index);
                Ok(Some(self.set(directory, parents, last, node)))
            }
        }
    }

    /// The directory of these names, which is made as far as it is missing.
    fn directory(&mut self, parents: &[&[u8]]) -> Result<NodeId, String> {
        let mut todo: Vec<Vec<u8>> = parents.iter().rev().map(|part| part.to_vec()).collect();
        let mut way = vec![ROOT];
        let mut links = 0;
        while let Some(part) = todo.pop() {
            if part == b".." {
                if way.len() > 1 {
                    way.pop();
                }
                continue;
            }
            let at = *way.last().unwrap_or(&ROOT);
            let known = self.nodes[at.0].children.get(&*part).copied();
            let id = match known.map(|id| (id, self.nodes[id.0].kind, &self.nodes[id.0].role)) {
                Some((id, NodeKind::Directory, Role::Node)) => id,
                Some((id, NodeKind::Symlink, Role::Node)) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err("too many symbolic links in its name".to_owned());
                    }
                    let target = &self.nodes[id.0].target;
                    if target.first() == Some(&b'/') {
                        way.truncate(1);
                    }
                    todo.extend(path::reversed(target));
                    continue;
                }
                // What the whiteout hides stays hidden.
                Some((_, _, Role::Whiteout)) => {
                    let node = Node { opaque: true, fresh: true, ..Node::directory(self.index) };
                    self.insert(at, &part, node)
                }
                Some(_) => return Err("a parent of its name is not a directory".to_owned()),
                None => {
                    let node = Node::directory(self.index);
                    self.insert(at, &part, node)
                }
            };
            way.push(id);
            if way.len() > MAX_DEPTH || todo.len() > MAX_DEPTH {
                return Err("its name is too deep".to_owned());
            }
        }
        Ok(*way.last().unwrap_or(&ROOT))
    }

    fn insert(&mut self, directory: NodeId, name: &[u8], node: Node) -> NodeId {
        let id = self.add(node);
        self.nodes[directory.0].children.insert(name.into(), id);
        id
    }

    /// Gives a name a new node; what it had is gone.
    fn set(&mut self, directory: NodeId, parents: &[&[u8]], name: &[u8], node: Node) -> NodeId {
        self.remove(directory, parents, name);
        self.insert(directory, name, node)
    }

    /// Takes a name away.
    fn remove(&mut self, directory: NodeId, parents: &[&[u8]], name: &[u8]) {
        let Some(known) = self.nodes[directory.0].children.remove(name) else { return };
        let path = path::join(&parents.join(&b'/'), name);
        hide::drop_names(&mut self.nodes, known, path, self.index, &mut self.replaced);
    }

    /// A directory on whatever the name has.
    fn merge_directory(
        &mut self,
        directory: NodeId,
        parents: &[&[u8]],
        name: &[u8],
        entry: &Entry,
    ) -> NodeId {
        let known = self.nodes[directory.0].children.get(name).copied();
        if let Some(id) = known
            && self.nodes[id.0].kind == NodeKind::Directory
            && self.nodes[id.0].role == Role::Node
        {
            let node = &mut self.nodes[id.0];
            let before = std::mem::take(&mut node.xattrs);
            node.describe(entry);
            for xattr in before {
                if node.xattrs.iter().all(|new| new.name != xattr.name) {
                    node.xattrs.push(xattr);
                }
            }
            return id;
        }
        let opaque = known.is_some_and(|id| self.nodes[id.0].role == Role::Whiteout);
        let node = Node { opaque, ..Node::of(entry, self.index) };
        self.set(directory, parents, name, node)
    }

    /// A hard link.
    fn link(
        &mut self,
        directory: NodeId,
        parents: &[&[u8]],
        name: &[u8],
        entry: &Entry,
    ) -> Result<(), String> {
        let target = path::split(&entry.link).ok_or("its target leaves the layer")?.join(&b'/');
        let header = Node::of(entry, self.index);
        let known = self.nodes[directory.0].children.get(name).copied();
        match self.find(&target) {
            Found::Node(id) if self.nodes[id.0].role == Role::Node => {
                if self.nodes[id.0].kind == NodeKind::Directory {
                    return Err("its target is a directory".to_owned());
                }
                if known != Some(id) {
                    // The target may be below the name that is replaced.
                    self.nodes[id.0].links += 1;
                    self.remove(directory, parents, name);
                    self.nodes[directory.0].children.insert(name.into(), id);
                }
                self.nodes[id.0].describe_link(&header);
            }
            // A link that names itself, for the second time.
            Found::Node(id) if known == Some(id) => {}
            // The target may come later, even if this layer hides it now.
            Found::Node(_) | Found::Missing | Found::Hidden => {
                let role = Role::Pending { target, order: 0 };
                self.set(directory, parents, name, Node { role, ..header });
            }
        }
        Ok(())
    }

    /// What the layer has at the target of a link; a symbolic link at its end is not followed.
    fn find(&self, target: &[u8]) -> Found {
        let mut todo = path::reversed(target);
        let mut way = vec![ROOT];
        let (mut links, mut opaque) = (0, false);
        while let Some(part) = todo.pop() {
            if part == b".." {
                if way.len() > 1 {
                    way.pop();
                }
                continue;
            }
            let at = *way.last().unwrap_or(&ROOT);
            opaque |= self.nodes[at.0].opaque;
            let Some(id) = self.nodes[at.0].children.get(&*part).copied() else {
                return if opaque { Found::Hidden } else { Found::Missing };
            };
            let node = &self.nodes[id.0];
            match (node.kind, &node.role) {
                (_, Role::Whiteout) => return Found::Hidden,
                _ if todo.is_empty() => return Found::Node(id),
                (NodeKind::Directory, Role::Node) => way.push(id),
                (NodeKind::Symlink, Role::Node) if links < MAX_LINKS => {
                    links += 1;
                    if node.target.first() == Some(&b'/') {
                        way.truncate(1);
                    }
                    todo.extend(path::reversed(&node.target));
                }
                _ => return Found::Hidden,
            }
        }
        Found::Node(*way.last().unwrap_or(&ROOT))
    }

    /// Decides links whose target was not there when they came. What leads to a layer below stays pending, in the order in
    /// which it is decided, and the target gets a name here, too: a copy of it has both.
    fn settle(&mut self) -> Result<(), String> {
        let mut waiting: HashMap<NodeId, (NodeId, Box<[u8]>)> = HashMap::new();
        for (at, node) in self.nodes.iter().enumerate() {
            for (name, child) in &node.children {
                if matches!(self.nodes[child.0].role, Role::Pending { .. }) {
                    waiting.insert(*child, (NodeId(at), name.clone()));
                }
            }
        }
        let mut first: Vec<NodeId> = waiting.keys().copied().collect();
        first.sort_unstable();
        let mut count = 0;
        for start in first {
            // Links to links are decided from the end of their chain.
            let mut chain = vec![start];
            while let Some(link) = chain.last().copied() {
                let Role::Pending { target, .. } = &self.nodes[link.0].role else { break };
                let target = target.clone();
                let Some((directory, name)) = waiting.get(&link).cloned() else {
                    chain.pop();
                    continue;
                };
                let refused = |reason: &str| {
                    let [link, target] =
                        [&name[..], &target[..]].map(|path| shown(&String::from_utf8_lossy(path)));
                    Err(format!("the hard link {link} to {target} {reason}"))
                };
                match self.find(&target) {
                    Found::Node(next) if next != link && waiting.contains_key(&next) => {
                        if chain.len() > waiting.len() {
                            return refused("leads back to itself");
                        }
                        chain.push(next);
                    }
                    Found::Node(id) if id != link => {
                        if self.nodes[id.0].kind == NodeKind::Directory {
                            return refused("leads to a directory");
                        }
                        waiting.remove(&link);
                        self.nodes[link.0].links = 0;
                        self.nodes[id.0].links += 1;
                        self.nodes[directory.0].children.insert(name, id);
                    }
                    Found::Hidden => return refused("has no target"),
                    Found::Node(_) | Found::Missing => {
                        waiting.remove(&link);
                        self.name_target(link, &target);
                        self.nodes[link.0].role = Role::Pending { target, order: count };
                        count += 1;
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives a link into a lower layer the name of its target, too, unless the layer has something else on the way.
    fn name_target(&mut self, link: NodeId, target: &[u8]) {
        let parts: Vec<&[u8]> = target.split(|b| *b == b'/').collect();
        let Some((last, parents)) = parts.split_last() else { return };
        let mut at = ROOT;
        for part in parents {
            at = match self.nodes[at.0].children.get(*part).copied() {
                Some(id) if self.nodes[id.0].kind == NodeKind::Directory => id,
                Some(_) => return,
                None => self.insert(at, part, Node::directory(self.index)),
            };
        }
        if !self.nodes[at.0].children.contains_key(*last) {
            self.nodes[link.0].links += 1;
            self.nodes[at.0].children.insert((*last).into(), link);
        }
    }
}

/// The error of a tar.
pub(super) fn of_tar(what: &str, error: TarError) -> ImageError {
    match error {
        TarError::Io { source, .. } => ImageError::reading(what, source),
        TarError::Unsupported { .. } => ImageError::unsupported(what, error.to_string()),
        TarError::Limit { .. } => ImageError::limit(what, error.to_string()),
        other => ImageError::corrupt(what, other.to_string()),
    }
}
