//! The tree of a layer that is being made: names, nodes and their counts, with errors that name the current entry.
//!
//! ```text
//!   layer (rules of the entries) ─┐
//!   links (hard links)          ──┴─► LayerTree ─► ImageWriter
//!                                        └─ LinkTable: placeholders, forgotten when their names are removed
//! ```
//!
//! Names are resolved directory by directory in the image writer's tree, from the layer's root, so a layer can never reach
//! anything but itself. That root is the image's, or, where layers are merged, a directory of the layer's own.
//! Called by `layer`, `links` and `flat`.

use super::{
    ApplyOptions, NAMES,
    context::{Context, OVERLAY_OPAQUE, opaque},
    kernel::{self, Ruling},
    name, owner,
    pending::LinkTable,
    usage::Blocks,
};
use crate::DiffError;
use disk_io::WriteAt;
use ext4_image::{
    Timestamp, Xattr,
    writer::{Attributes, ImageWriter, NodeId, NodeKind, Placed},
};
use layer_tar::{Entry, EntryKind, Time};
use std::collections::{HashMap, HashSet};

/// Symlinks followed in one name, as Linux has it (MAXSYMLINKS).
const MAX_HOPS: usize = 40;

/// Result of a lookup that creates nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lookup {
    /// A node of this layer.
    Node(NodeId),
    /// Not in this layer; lower layers may have it.
    Missing,
    /// Absent, and this layer hides it in lower layers.
    Hidden,
}

/// What was created, for a caller that follows a layer while it is made.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// Directories: parent, name, directory; in order of creation.
    pub(super) directories: Vec<(NodeId, Vec<u8>, NodeId)>,
    /// The directory that the last node was put into.
    pub(super) last_dir: Option<NodeId>,
    /// Its name there.
    pub(super) last_name: Vec<u8>,
}

/// The tree being made.
pub(super) struct LayerTree<'o, W> {
    pub(super) writer: ImageWriter<W>,
    /// The layer's root directory.
    pub(super) root: NodeId,
    pub(super) options: &'o ApplyOptions,
    pub(super) links: LinkTable,
    pub(super) context: Context,
    /// The last entry's parent as the tar wrote it, and its directory; forgotten when a name is removed.
    pub(super) parent: Option<(Vec<u8>, NodeId)>,
    /// Number of names that were created.
    pub(super) names: u64,
    /// Kept only if a caller wants to follow the layer.
    pub(super) watch: Option<Watch>,
    /// Sum of the sizes of files as they were created.
    pub(super) size: u64,
    /// A file that is counted in `size` may have been removed.
    pub(super) removed: bool,
    /// Directories that no entry has described yet; removed ones too.
    pub(super) implied: HashSet<NodeId>,
    /// The blocks of files that have holes; removed ones too.
    pub(super) holes: HashMap<NodeId, u64>,
    /// The open file, its size, and its blocks so far.
    open: Option<(NodeId, u64, Blocks)>,
}

impl<'o, W: WriteAt> LayerTree<'o, W> {
    pub(super) fn new(writer: ImageWriter<W>, options: &'o ApplyOptions) -> Self {
        let root = writer.root();
        Self::below(writer, root, options)
    }

    /// A layer whose root is the directory `root` of the image.
    pub(super) fn below(writer: ImageWriter<W>, root: NodeId, options: &'o ApplyOptions) -> Self {
        let mut tree = Self {
            writer,
            root,
            options,
            links: LinkTable::default(),
            context: Context::default(),
            parent: None,
            names: 0,
            watch: None,
            size: 0,
            removed: false,
            implied: HashSet::new(),
            holes: HashMap::new(),
            open: None,
        };
        tree.writer.set_attributes(root, implied());
        tree
    }

    pub(super) fn limit(&self, what: &'static str, limit: u64) -> DiffError {
        self.context.limit(what, limit)
    }

    pub(super) fn begin_file(&mut self, node: NodeId, size: u64) -> Result<(), DiffError> {
        self.open = Some((node, size, Blocks::default()));
        self.writer.begin_file(node, size).map_err(|e| self.context.image(e))
    }

    /// Applies the header of a further name to a node, as by chown, setxattr, chmod and utimes: the last header holds for
    /// all names.
    pub(super) fn update_linked(&mut self, node: NodeId, entry: &mut Entry) -> Result<(), DiffError> {
        let (kind, known) = (self.writer.kind(node), self.writer.attributes(node));
        let mut attributes = attributes(entry, &known);
        if matches!(kind, NodeKind::Symlink { .. }) {
            attributes.permissions = known.permissions;
        }
        let before = self.writer.xattrs(node);
        let mut known = before.clone();
        kernel::chown(&kind, &mut known);
        let mut xattrs = self.xattrs(entry, &kind, known)?;
        kernel::chmod(&kind, attributes.permissions, &mut xattrs);
        self.writer.set_attributes(node, attributes);
        if xattrs == before {
            return Ok(());
        }
        self.writer.set_xattrs(node, xattrs).map_err(|e| self.context.image(e))
    }

    pub(super) fn create(
        &mut self,
        dir: NodeId,
        name: &[u8],
        kind: NodeKind,
        attributes: Attributes,
        xattrs: Vec<Xattr>,
    ) -> Result<NodeId, DiffError> {
        self.count_name()?;
        if let NodeKind::Symlink { target } = &kind {
            self.count_bytes(target.len() as u64);
        }
        let directory = matches!(kind, NodeKind::Directory);
        let made =
            self.writer.create(dir, name, kind, attributes, xattrs).map_err(|e| self.context.image(e))?;
        if let Some(watch) = &mut self.watch {
            if directory {
                watch.directories.push((dir, name.to_vec(), made));
            }
            watch.last_dir = Some(dir);
            watch.last_name.clear();
            watch.last_name.extend_from_slice(name);
        }
        Ok(made)
    }

    pub(super) fn count_name(&mut self) -> Result<(), DiffError> {
        self.names += 1;
        if self.names > self.options.limits.entries {
            return Err(self.limit(NAMES, self.options.limits.entries));
        }
        Ok(())
    }

    /// Counts a file of this size, or a symlink with a target of this length.
    pub(super) fn count_bytes(&mut self, size: u64) {
        self.size = self.size.saturating_add(size);
    }

    /// Removes a name and everything below it.
    pub(super) fn remove(&mut self, dir: NodeId, name: &[u8], node: NodeId) -> Result<(), DiffError> {
        self.removed = true;
        self.parent = None;
        if !self.links.is_empty() {
            self.links.forget_below(&self.writer, node);
        }
        self.writer.unlink(dir, name).map_err(|e| self.context.image(e))
    }

    pub(super) fn is_directory(&self, node: NodeId) -> bool {
        self.writer.is_directory(node)
    }

    pub(super) fn is_whiteout(&self, node: NodeId) -> bool {
        matches!(self.writer.kind(node), NodeKind::CharDevice { major: 0, minor: 0 })
    }

    pub(super) fn is_opaque(&self, node: NodeId) -> bool {
        self.writer.xattrs(node).iter().any(|x| x.name == OVERLAY_OPAQUE)
    }

    /// The owner in the image: container ids.
    pub(super) fn owner(&self, uid: u32, gid: u32) -> Result<(u32, u32), DiffError> {
        let held = |what, maps, id| {
            owner::inside(maps, id)
                .ok_or_else(|| self.context.refuse(format!("{what} {id} {}", owner::outside(maps))))
        };
        Ok((held("owner", &self.options.id_maps.uids, uid)?, held("group", &self.options.id_maps.gids, gid)?))
    }

    /// Adds an entry's xattrs to those that a node of this kind has.
    pub(super) fn xattrs(
        &self,
        entry: &mut Entry,
        kind: &NodeKind,
        mut known: Vec<Xattr>,
    ) -> Result<Vec<Xattr>, DiffError> {
        if entry.xattrs.is_empty() {
            return Ok(known);
        }
        let bytes: usize = entry.xattrs.iter().map(|x| x.name.len() + x.value.len()).sum();
        if bytes > self.options.limits.xattr_bytes {
            return Err(self.limit("bytes of xattrs", self.options.limits.xattr_bytes as u64));
        }
        for x in entry.xattrs.drain(..) {
            match kernel::xattr(kind, &x.name, &x.value) {
                Ruling::Drop(_) => {}
                Ruling::Refuse(errno, why) => {
                    return Err(self.context.refuse(format!(
                        "linux refuses its attribute \"{}\" ({}: {why}), so no file in a container can have it; the \
                         layer must be made without it",
                        name::shown(&x.name),
                        errno.name()
                    )));
                }
                Ruling::Remove(_) => known.retain(|k| k.name != x.name),
                Ruling::Keep => {
                    self.check_ids(&x.name, &x.value)?;
                    known.retain(|k| k.name != x.name);
                    known.push(Xattr { name: x.name, value: x.value });
                }
            }
        }
        Ok(known)
    }

    /// With userns-remap, ids inside of values must be the container's too.
    fn check_ids(&self, name: &[u8], value: &[u8]) -> Result<(), DiffError> {
        let (uids, gids) = (&self.options.id_maps.uids, &self.options.id_maps.gids);
        if uids.is_empty() && gids.is_empty() {
            return Ok(());
        }
        let root = kernel::capability_root(name, value).map(|id| (true, id));
        for (user, id) in kernel::acl_ids(name, value).into_iter().chain(root) {
            let (what, maps) = if user { ("user", uids) } else { ("group", gids) };
            if !owner::is_inside(maps, id) {
                let (attribute, why) = (name::shown(name), owner::outside(maps));
                return Err(self.context.refuse(format!("attribute \"{attribute}\": {what} {id} {why}")));
            }
        }
        Ok(())
    }

    /// The directory at `parts`, created if it is missing.
    pub(super) fn make_parents(&mut self, parts: &[&[u8]]) -> Result<NodeId, DiffError> {
        let mut walk = Walk::new(self.root, parts);
        while let Some(part) = walk.next_part() {
            if *part == *b".." {
                walk.up();
                continue;
            }
            let dir = walk.dir();
            let next = match self.writer.lookup(dir, &part) {
                None => {
                    let made = self.create(dir, &part, NodeKind::Directory, implied(), Vec::new())?;
                    self.implied.insert(made);
                    made
                }
                // What the whiteout hides stays hidden: nothing below gives this directory its attributes.
                Some(node) if self.is_whiteout(node) => {
                    self.remove(dir, &part, node)?;
                    self.create(dir, &part, NodeKind::Directory, implied(), vec![opaque()])?
                }
                Some(node) => match self.writer.kind(node) {
                    NodeKind::Directory => node,
                    NodeKind::Symlink { target } => {
                        if !walk.follow(&target) {
                            return Err(self.context.refuse("too many symlinks in the name"));
                        }
                        continue;
                    }
                    _ => return Err(self.context.refuse("a parent is not a directory in this layer")),
                },
            };
            walk.down(next);
            if walk.stack.len() > self.options.limits.depth {
                return Err(self.limit("path components", self.options.limits.depth as u64));
            }
        }
        Ok(walk.dir())
    }

    /// Looks `parts` up without creating anything; the last part is not followed if it is a symlink.
    pub(super) fn find(&self, parts: &[&[u8]]) -> Lookup {
        let Some((last, parents)) = parts.split_last() else { return Lookup::Node(self.root) };
        let mut walk = Walk::new(self.root, parents);
        let missing = |dir: NodeId| if self.is_opaque(dir) { Lookup::Hidden } else { Lookup::Missing };
        let mut opaque_above = false;
        while let Some(part) = walk.next_part() {
            if *part == *b".." {
                walk.up();
                continue;
            }
            let dir = walk.dir();
            opaque_above |= missing(dir) == Lookup::Hidden;
            let Some(node) = self.writer.lookup(dir, &part) else {
                return if opaque_above { Lookup::Hidden } else { Lookup::Missing };
            };
            match self.writer.kind(node) {
                NodeKind::Directory => walk.down(node),
                NodeKind::Symlink { target } if walk.follow(&target) => {}
                _ => return Lookup::Hidden,
            }
        }
        let dir = walk.dir();
        match self.writer.lookup(dir, last) {
            Some(node) if self.is_whiteout(node) => Lookup::Hidden,
            Some(node) => Lookup::Node(node),
            None if opaque_above => Lookup::Hidden,
            None => missing(dir),
        }
    }

    /// Sums up the sizes of the files and symlinks that are left, each once.
    pub(super) fn count_size(&self) -> u64 {
        let (mut sum, mut seen) = (0u64, HashSet::new());
        let mut directories = vec![self.root];
        while let Some(dir) = directories.pop() {
            for (_, node) in self.writer.children(dir) {
                match self.writer.kind(node) {
                    NodeKind::Directory => directories.push(node),
                    NodeKind::File if seen.insert(node) => {
                        sum = sum.saturating_add(self.writer.file_size(node));
                    }
                    NodeKind::Symlink { target } if seen.insert(node) => {
                        sum = sum.saturating_add(target.len() as u64);
                    }
                    _ => {}
                }
            }
        }
        sum
    }

    /// Writes data of the open file; tells where they live.
    pub(super) fn write_data(
        &mut self,
        offset: u64,
        data: &[u8],
        placed: &mut dyn FnMut(Placed),
    ) -> Result<(), DiffError> {
        if let Some((_, _, blocks)) = &mut self.open {
            blocks.write(offset, data.len() as u64);
        }
        self.writer.write_data(offset, data, placed).map_err(|e| self.context.image(e))
    }

    /// Ends the open file.
    pub(super) fn end_file(&mut self) -> Result<(), DiffError> {
        if let Some((node, size, blocks)) = self.open.take()
            && let Some(count) = blocks.with_holes(size)
        {
            self.holes.insert(node, count);
        }
        self.writer.end_file().map_err(|e| self.context.image(e))
    }
}

/// What a path leads to, symlinks followed, the last one too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Resolved {
    /// A node, and its path without symlinks.
    Node(NodeId, Vec<Vec<u8>>),
    /// A name that is not there.
    Missing,
    /// Something on the way is no directory, or there are too many symlinks.
    Blocked,
}

/// Resolves `parts` inside of `root`.
pub(super) fn resolve<W: WriteAt>(writer: &ImageWriter<W>, root: NodeId, parts: &[&[u8]]) -> Resolved {
    let mut walk = Walk::new(root, parts);
    let mut path: Vec<Vec<u8>> = Vec::new();
    while let Some(part) = walk.next_part() {
        if *part == *b".." {
            walk.up();
            path.pop();
            continue;
        }
        if !writer.is_directory(walk.dir()) {
            return Resolved::Blocked;
        }
        let Some(node) = writer.lookup(walk.dir(), &part) else { return Resolved::Missing };
        if let NodeKind::Symlink { target } = writer.kind(node) {
            if !walk.follow(&target) {
                return Resolved::Blocked;
            }
            path.truncate(walk.stack.len());
        } else {
            walk.down(node);
            path.push(part.into_owned());
        }
    }
    Resolved::Node(walk.dir(), path)
}

/// Attributes of directories that no entry describes, and of whiteouts.
pub(super) fn implied() -> Attributes {
    let time = Timestamp { secs: 0, nanos: 0 };
    Attributes { permissions: 0o755, uid: 0, gid: 0, mtime: time, atime: None, ctime: None }
}

/// What an entry's header makes of a node that has `known`.
pub(super) fn attributes(entry: &Entry, known: &Attributes) -> Attributes {
    let stamp = |t: Time| Timestamp { secs: t.secs, nanos: t.nanos };
    Attributes {
        permissions: if entry.kind == EntryKind::Symlink { 0o777 } else { entry.mode },
        uid: kernel::owner(entry.uid, known.uid),
        gid: kernel::owner(entry.gid, known.gid),
        mtime: stamp(entry.mtime),
        atime: entry.atime.map(stamp),
        ctime: entry.ctime.map(stamp),
    }
}

/// A walk through directories and symlinks.
struct Walk<'a> {
    stack: Vec<NodeId>,
    root: NodeId,
    /// Parts still to go: first what symlinks added (nearest last), then those of the name.
    added: Vec<Vec<u8>>,
    parts: std::slice::Iter<'a, &'a [u8]>,
    hops: usize,
}

impl<'a> Walk<'a> {
    fn new(root: NodeId, parts: &'a [&'a [u8]]) -> Self {
        Self { stack: Vec::with_capacity(parts.len()), root, added: Vec::new(), parts: parts.iter(), hops: 0 }
    }

    fn next_part(&mut self) -> Option<std::borrow::Cow<'a, [u8]>> {
        match self.added.pop() {
            Some(part) => Some(part.into()),
            None => self.parts.next().map(|p| (*p).into()),
        }
    }

    fn dir(&self) -> NodeId {
        self.stack.last().copied().unwrap_or(self.root)
    }

    fn down(&mut self, node: NodeId) {
        self.stack.push(node);
    }

    /// `..`: at the root it stays there, as in a chroot.
    fn up(&mut self) {
        self.stack.pop();
    }

    /// Continues with a symlink's target; false if there were too many.
    fn follow(&mut self, target: &[u8]) -> bool {
        self.hops += 1;
        if self.hops > MAX_HOPS {
            return false;
        }
        if target.first() == Some(&b'/') {
            self.stack.clear();
        }
        let parts = target.split(|&b| b == b'/').filter(|p| !matches!(*p, b"" | b"."));
        let at = self.added.len();
        self.added.extend(parts.map(<[u8]>::to_vec));
        self.added[at..].reverse();
        true
    }
}
