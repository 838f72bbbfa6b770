//! The tree being built: an arena of nodes, an arena of names, and one hash index over all directories.
//!
//! ```text
//!   nodes   [root, …]            index = inode number - 10 (root: inode 2)
//!   entries [name, dir, node, prev, next]   one per name, a doubly linked list per directory (order of creation)
//!   index   open addressing over (dir, name) → entry        look-up is constant time, 43,000 names or not
//! ```
//!
//! Invariants: no heap allocation per node or name; removed nodes keep their number, so ids never alias, until
//! [`Tree::reuse_removed`] gives the numbers to new nodes. The index is keyed with random state against crafted names;
//! its order never reaches the image.

use super::{NodeId, Result};
use crate::{Ext4Error, Place, Timestamp, layout::inode as raw};
use std::{
    collections::HashMap,
    hash::{BuildHasher, Hasher, RandomState},
};

/// No entry, no node, no set.
pub(super) const NONE: u32 = u32::MAX;

/// Where the bytes of a file or directory are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// No blocks.
    Empty,
    /// One extent from logical block 0.
    Run {
        /// First physical block.
        start: u64,
        /// Blocks, at most an extent's.
        blocks: u32,
    },
    /// Anything else: index into `ImageWriter::roots`.
    Tree(u32),
    /// Offset into the inline spool.
    Inline(u64),
}

/// What a node is, with what only that kind has. Only one variant has a [`Content`] of its own, which has room for the
/// others' tags.
#[derive(Debug, Clone, Copy)]
pub(super) enum Payload {
    Dir {
        first: u32,
        last: u32,
        parent: u32,
        subdirs: u32,
    },
    /// A directory whose blocks are written: index into `Tree::written_dirs`.
    DirDone(u32),
    File {
        size: u64,
        content: Content,
    },
    /// A value of an extended attribute: index into `Tree::ea_values`.
    EaValue(u32),
    Symlink {
        at: u32,
        len: u16,
        block: u64,
    },
    Device {
        major: u32,
        minor: u32,
    },
    Plain,
    Gone,
}

/// A directory whose blocks are written.
#[derive(Debug)]
pub(super) struct WrittenDir {
    pub(super) size: u64,
    pub(super) content: Content,
    pub(super) subdirs: u32,
    /// By a hash tree.
    pub(super) indexed: bool,
}

/// A value of an extended attribute with an inode of its own.
#[derive(Debug)]
pub(super) struct EaValue {
    pub(super) size: u32,
    pub(super) hash: u32,
    pub(super) content: Content,
}

/// A node. There may be millions: what few have lies beside.
#[derive(Debug, Clone)]
pub(super) struct Node {
    /// Type and permissions.
    pub(super) mode: u16,
    /// Names (directories: 1).
    pub(super) links: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (u32, u32),
    /// Index of the times of access and change, where they are not `mtime`.
    other_times: u32,
    /// Index of a set of extended attributes.
    pub(super) xattrs: u32,
    pub(super) payload: Payload,
}

const _: () = assert!(size_of::<Node>() == 56);

/// Times of access and change.
#[derive(Debug, Clone, Copy)]
pub(super) struct OtherTimes {
    pub(super) atime: (u32, u32),
    pub(super) ctime: (u32, u32),
}

impl Node {
    pub(super) fn new(mode: u16, payload: Payload) -> Self {
        Self {
            mode,
            links: 0,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default().encode(),
            other_times: NONE,
            xattrs: NONE,
            payload,
        }
    }

    pub(super) fn is_dir(&self) -> bool {
        self.mode & raw::S_IFMT == raw::S_IFDIR
    }
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Offset of the name in `names`: one byte of length, then the name.
    name: u32,
    dir: u32,
    node: u32,
    prev: u32,
    next: u32,
    hash: u32,
}

/// Slot of the index that was never used.
const EMPTY: u32 = u32::MAX;
/// Slot of the index whose entry was removed.
const REMOVED: u32 = u32::MAX - 1;

#[derive(Debug)]
pub(super) struct Tree {
    pub(super) nodes: Vec<Node>,
    pub(super) written_dirs: Vec<WrittenDir>,
    pub(super) ea_values: Vec<EaValue>,
    other_times: Vec<OtherTimes>,
    entries: Vec<Entry>,
    names: Vec<u8>,
    index: Vec<u32>,
    /// Slots of the index that are not `EMPTY`.
    used: usize,
    hasher: RandomState,
    /// Nodes that were removed and whose numbers are not given again yet.
    gone: Vec<u32>,
    /// Nodes whose numbers new nodes get, the next one last.
    vacant: Vec<u32>,
    /// Entries that were removed.
    vacant_entries: Vec<u32>,
}

impl Tree {
    pub(super) fn new() -> Self {
        let mut root =
            Node::new(raw::S_IFDIR | 0o755, Payload::Dir { first: NONE, last: NONE, parent: 0, subdirs: 0 });
        root.links = 1;
        Self {
            nodes: vec![root],
            written_dirs: Vec::new(),
            ea_values: Vec::new(),
            other_times: Vec::new(),
            entries: Vec::new(),
            names: Vec::new(),
            index: vec![EMPTY; 64],
            used: 0,
            hasher: RandomState::new(),
            gone: Vec::new(),
            vacant: Vec::new(),
            vacant_entries: Vec::new(),
        }
    }

    fn name_at(&self, at: u32) -> &[u8] {
        let at = at as usize;
        &self.names[at + 1..at + 1 + usize::from(self.names[at])]
    }

    fn hash(&self, dir: u32, name: &[u8]) -> u32 {
        let mut h = self.hasher.build_hasher();
        h.write_u32(dir);
        h.write(name);
        h.finish() as u32
    }

    /// Slot of the index that holds the entry.
    fn slot(&self, dir: u32, name: &[u8], hash: u32) -> Option<usize> {
        let mask = self.index.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            match self.index[at] {
                EMPTY => return None,
                REMOVED => {}
                i => {
                    let e = &self.entries[i as usize];
                    if e.hash == hash && e.dir == dir && self.name_at(e.name) == name {
                        return Some(at);
                    }
                }
            }
            at = (at + 1) & mask;
        }
    }

    fn insert_slot(&mut self, hash: u32, entry: u32) {
        if self.used * 4 >= self.index.len() * 3 {
            self.rehash();
        }
        let mask = self.index.len() - 1;
        let mut at = hash as usize & mask;
        while self.index[at] < REMOVED {
            at = (at + 1) & mask;
        }
        self.used += usize::from(self.index[at] == EMPTY);
        self.index[at] = entry;
    }

    /// Drops the removed slots, and doubles the index if it is still more than a third full.
    fn rehash(&mut self) {
        let old = std::mem::take(&mut self.index);
        let live = old.iter().filter(|&&i| i < REMOVED).count();
        let len = if live * 3 > old.len() { old.len() * 2 } else { old.len() };
        self.index = vec![EMPTY; len];
        for &i in old.iter().filter(|&&i| i < REMOVED) {
            let mut at = self.entries[i as usize].hash as usize & (len - 1);
            while self.index[at] != EMPTY {
                at = (at + 1) & (len - 1);
            }
            self.index[at] = i;
        }
        self.used = live;
    }

    /// Lets the index go: no name is looked up or changed any more.
    pub(super) fn drop_index(&mut self) {
        self.index = Vec::new();
    }

    pub(super) fn lookup(&self, dir: NodeId, name: &[u8]) -> Option<NodeId> {
        let slot = self.slot(dir.0, name, self.hash(dir.0, name))?;
        Some(NodeId(self.entries[self.index[slot] as usize].node))
    }

    /// Names and nodes of a directory in order of creation; none for what is no directory.
    pub(super) fn children(&self, dir: u32) -> impl Iterator<Item = (&[u8], u32)> + '_ {
        let mut next = match self.nodes.get(dir as usize).map(|n| n.payload) {
            Some(Payload::Dir { first, .. }) => first,
            _ => NONE,
        };
        std::iter::from_fn(move || {
            let e = self.entries.get(next as usize)?;
            next = e.next;
            Some((self.name_at(e.name), e.node))
        })
    }

    /// Replaces the attributes of a node.
    pub(super) fn set_attributes(&mut self, id: u32, a: &super::Attributes) {
        let node = &mut self.nodes[id as usize];
        node.mode = node.mode & raw::S_IFMT | a.permissions & 0o7777;
        (node.uid, node.gid) = (a.uid, a.gid);
        node.mtime = a.mtime.encode();
        let times = OtherTimes {
            atime: a.atime.unwrap_or(a.mtime).encode(),
            ctime: a.ctime.unwrap_or(a.mtime).encode(),
        };
        if let Some(known) = self.other_times.get_mut(node.other_times as usize) {
            *known = times;
        } else if (times.atime, times.ctime) != (node.mtime, node.mtime) {
            node.other_times = self.other_times.len() as u32;
            self.other_times.push(times);
        }
    }

    /// Times of access and change of a node.
    pub(super) fn other_times(&self, node: &Node) -> OtherTimes {
        let known = self.other_times.get(node.other_times as usize).copied();
        known.unwrap_or(OtherTimes { atime: node.mtime, ctime: node.mtime })
    }

    /// Adds a node without a name.
    pub(super) fn add_node(&mut self, node: Node) -> Result<u32> {
        if let Some(id) = self.vacant.pop() {
            self.nodes[id as usize] = node;
            return Ok(id);
        }
        // Inode numbers are the index plus 10 and end at 2^32 - 1.
        if self.nodes.len() >= (u32::MAX - 64) as usize {
            return Err(Ext4Error::unsupported("more than 2^32 inodes", Place::default()));
        }
        self.nodes.push(node);
        Ok(self.nodes.len() as u32 - 1)
    }

    /// Bytes copied into the arena of names; at most 64 KiB.
    pub(super) fn store(&mut self, bytes: &[u8]) -> Result<u32> {
        let at = u32::try_from(self.names.len())
            .ok()
            .filter(|at| at.checked_add(1 << 17).is_some())
            .ok_or_else(|| Ext4Error::unsupported("more than 4 GiB of names", Place::default()))?;
        self.names.extend_from_slice(bytes);
        Ok(at)
    }

    pub(super) fn stored(&self, at: u32, len: usize) -> &[u8] {
        &self.names[at as usize..at as usize + len]
    }

    /// Checks that `name` may be added to `dir`.
    pub(super) fn check_new(&self, dir: NodeId, name: &[u8]) -> Result<()> {
        let shown = || String::from_utf8_lossy(&name[..name.len().min(300)]).into_owned();
        if !matches!(self.nodes.get(dir.0 as usize).map(|n| n.payload), Some(Payload::Dir { .. })) {
            return Err(Ext4Error::usage(format!("parent of {:?} is not a directory", shown())));
        }
        if name.is_empty()
            || name == b"."
            || name == b".."
            || name.len() > crate::layout::EXT4_NAME_LEN
            || name.iter().any(|&b| b == b'/' || b == 0)
        {
            return Err(Ext4Error::usage(format!("bad name {:?}", shown())));
        }
        if self.lookup(dir, name).is_some() {
            return Err(Ext4Error::usage(format!("name {:?} exists", shown())));
        }
        if self.entries.len() >= REMOVED as usize {
            return Err(Ext4Error::unsupported("more than 2^32 names", Place::default()));
        }
        Ok(())
    }

    /// Adds a checked name.
    pub(super) fn add_name(&mut self, dir: NodeId, name: &[u8], node: u32) -> Result<()> {
        let at = self.store(&[name.len() as u8])?;
        self.names.extend_from_slice(name);
        let hash = self.hash(dir.0, name);
        let entry = Entry { name: at, dir: dir.0, node, prev: NONE, next: NONE, hash };
        let id = if let Some(id) = self.vacant_entries.pop() {
            self.entries[id as usize] = entry;
            id
        } else {
            self.entries.push(entry);
            self.entries.len() as u32 - 1
        };
        self.put_last(id)?;
        self.nodes[node as usize].links += 1;
        Ok(())
    }

    /// Makes an entry the last one of its directory, and puts it into the index.
    fn put_last(&mut self, id: u32) -> Result<()> {
        let Entry { dir, node, hash, .. } = self.entries[id as usize];
        let child_is_dir = self.nodes[node as usize].is_dir();
        let Payload::Dir { first, last, subdirs, .. } = &mut self.nodes[dir as usize].payload else {
            return Err(Ext4Error::usage("parent is not a directory"));
        };
        let prev = *last;
        if *first == NONE {
            *first = id;
        }
        *last = id;
        *subdirs += u32::from(child_is_dir);
        if let Some(e) = self.entries.get_mut(prev as usize) {
            e.next = id;
        }
        self.entries[id as usize].prev = prev;
        self.entries[id as usize].next = NONE;
        self.insert_slot(hash, id);
        Ok(())
    }

    /// Moves a name, with all that is below it, to another directory, where nothing has it.
    pub(super) fn carry(&mut self, from: NodeId, name: &[u8], to: NodeId) -> Result<()> {
        self.check_new(to, name)?;
        let slot = self.slot(from.0, name, self.hash(from.0, name)).ok_or_else(|| {
            Ext4Error::usage(format!("no name {:?} to move", String::from_utf8_lossy(name)))
        })?;
        let id = self.index[slot];
        let node = self.drop_entry(id);
        let hash = self.hash(to.0, name);
        self.entries[id as usize].dir = to.0;
        self.entries[id as usize].hash = hash;
        if let Payload::Dir { parent, .. } = &mut self.nodes[node as usize].payload {
            *parent = to.0;
        }
        self.put_last(id)
    }

    /// Makes all names of the first node of each pair names of the second; gives the payloads of the first ones.
    pub(super) fn unite(&mut self, same: &HashMap<NodeId, NodeId>) -> Vec<Payload> {
        for entry in &mut self.entries {
            if let Some(to) = same.get(&NodeId(entry.node)) {
                self.nodes[entry.node as usize].links -= 1;
                self.nodes[to.0 as usize].links += 1;
                entry.node = to.0;
            }
        }
        let mut from: Vec<u32> = same.keys().map(|node| node.0).collect();
        from.sort_unstable();
        let payloads = from.iter().map(|id| {
            let node = &mut self.nodes[*id as usize];
            node.xattrs = NONE;
            std::mem::replace(&mut node.payload, Payload::Gone)
        });
        let payloads = payloads.collect();
        self.gone.extend(from);
        payloads
    }

    /// Gives the numbers of all nodes that were removed to nodes that will be added.
    pub(super) fn reuse_removed(&mut self) {
        self.vacant.append(&mut self.gone);
        while self.nodes.len() > 1 && matches!(self.nodes.last(), Some(Node { payload: Payload::Gone, .. })) {
            self.nodes.pop();
        }
        let left = self.nodes.len() as u32;
        self.vacant.retain(|id| *id < left);
        // The lowest numbers first: the inode tables then have their holes, if any, at their ends.
        self.vacant.sort_unstable_by(|a, b| b.cmp(a));
    }

    /// Removes a name and, if it was the last one, its node with all below; `gone` is called for each node that no longer exists.
    pub(super) fn unlink(
        &mut self,
        dir: NodeId,
        name: &[u8],
        mut gone: impl FnMut(u32, Payload),
    ) -> Result<()> {
        let slot = self.slot(dir.0, name, self.hash(dir.0, name)).ok_or_else(|| {
            Ext4Error::usage(format!("no name {:?} to unlink", String::from_utf8_lossy(name)))
        })?;
        let mut stack = vec![self.index[slot]];
        let mut removed = Vec::new();
        while let Some(id) = stack.pop() {
            let node = self.drop_entry(id);
            self.entries[id as usize].node = NONE;
            removed.push(id);
            let n = &mut self.nodes[node as usize];
            n.links -= 1;
            if n.links > 0 {
                continue;
            }
            let payload = std::mem::replace(&mut n.payload, Payload::Gone);
            n.xattrs = NONE;
            if let Payload::Dir { mut first, .. } = payload {
                while let Some(e) = self.entries.get(first as usize) {
                    stack.push(first);
                    first = e.next;
                }
            }
            self.gone.push(node);
            gone(node, payload);
        }
        // Not before: the list of a directory leads from one removed entry to the next.
        self.vacant_entries.append(&mut removed);
        Ok(())
    }

    /// Takes an entry out of its directory and the index; gives its node.
    fn drop_entry(&mut self, id: u32) -> u32 {
        let e = self.entries[id as usize];
        let mask = self.index.len() - 1;
        let mut at = e.hash as usize & mask;
        while self.index[at] != id {
            at = (at + 1) & mask;
        }
        self.index[at] = REMOVED;
        let child_is_dir = self.nodes[e.node as usize].is_dir();
        // The directory itself may be gone already, when a subtree is removed.
        if let Payload::Dir { first, last, subdirs, .. } = &mut self.nodes[e.dir as usize].payload {
            if *first == id {
                *first = e.next;
            }
            if *last == id {
                *last = e.prev;
            }
            *subdirs -= u32::from(child_is_dir);
            if let Some(p) = self.entries.get_mut(e.prev as usize) {
                p.next = e.next;
            }
            if let Some(n) = self.entries.get_mut(e.next as usize) {
                n.prev = e.prev;
            }
        }
        e.node
    }
}
