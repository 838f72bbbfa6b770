//! The tree of the layer: where each entry goes. The table of rules is in the parent module.
//!
//! Names are resolved folder by folder in the image writer's tree, so a layer can never reach anything but itself. The
//! parent of the previous entry is remembered by its bytes in the tar: most entries have the same.

use super::{
    ApplyOptions, LowerLayers,
    kernel::{self, Ruling},
    links::Links,
    name::{self, Meaning, NameError},
    owner,
    target::Target,
};
use crate::DiffError;
use disk_io::WriteAt;
use ext4_image::{
    Ext4Error, Timestamp, Xattr,
    writer::{Attributes, ImageSummary, ImageWriter, NodeId, NodeKind, Placed},
};
use layer_tar::{Entry, EntryKind, Time};
use std::collections::HashSet;

/// Marks an opaque folder, with value `y`.
const OVERLAY_OPAQUE: &[u8] = b"trusted.overlay.opaque";
/// Symlinks followed in one name, as Linux has it (MAXSYMLINKS).
const MAX_HOPS: usize = 40;

/// Where the data of an entry go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placement {
    /// Into this file.
    Data(NodeId),
    /// There are none, or they are not kept in the image.
    Nothing,
}

/// An entry, for errors.
#[derive(Debug, Clone, Default)]
pub(super) struct Context {
    pub(super) path: Vec<u8>,
    pub(super) offset: u64,
}

impl Context {
    /// The name as errors show it.
    pub(super) fn name(&self) -> String {
        self.path.get(..1024).unwrap_or(&self.path).escape_ascii().to_string()
    }

    pub(super) fn refuse(&self, reason: impl Into<String>) -> DiffError {
        DiffError::Entry { entry: self.name(), offset: self.offset, reason: reason.into() }
    }

    pub(super) fn limit(&self, what: &'static str, limit: u64) -> DiffError {
        DiffError::Limit { entry: self.name(), offset: self.offset, what, limit }
    }

    pub(super) fn image(&self, source: Ext4Error) -> DiffError {
        DiffError::Image { entry: self.name(), offset: self.offset, source }
    }

    pub(super) fn name_error(&self, e: NameError, max_depth: usize) -> DiffError {
        match e {
            NameError::Escapes => self.refuse("name leaves the layer's root"),
            NameError::Nul => self.refuse("name holds a NUL"),
            NameError::TooDeep => self.limit("path components", max_depth as u64),
        }
    }
}

/// What a name leads to without anything being made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// A node of this layer.
    Node(NodeId),
    /// Not in this layer; layers below may have it.
    Missing,
    /// Not there, and this layer hides what layers below have.
    Hidden,
}

/// The layer being made.
pub(super) struct Layer<'o, W> {
    pub(super) writer: ImageWriter<W>,
    pub(super) options: &'o ApplyOptions,
    pub(super) links: Links,
    pub(super) context: Context,
    /// The last entry's parent as the tar wrote it, and its folder; forgotten when a name is removed.
    parent: Option<(Vec<u8>, NodeId)>,
    /// Names made.
    names: u64,
    /// Sum of the sizes of files as they were made.
    size: u64,
    /// A file that counts in `size` may be gone.
    removed: bool,
}

impl<'o, W: WriteAt> Layer<'o, W> {
    pub(super) fn new(writer: ImageWriter<W>, options: &'o ApplyOptions) -> Self {
        let mut layer = Self {
            writer,
            options,
            links: Links::default(),
            context: Context::default(),
            parent: None,
            names: 0,
            size: 0,
            removed: false,
        };
        layer.writer.set_attributes(layer.writer.root(), implied());
        layer
    }

    pub(super) fn limit(&self, what: &'static str, limit: u64) -> DiffError {
        self.context.limit(what, limit)
    }

    pub(super) fn begin_file(&mut self, node: NodeId, size: u64) -> Result<(), DiffError> {
        self.writer.begin_file(node, size).map_err(|e| self.context.image(e))
    }

    /// Gives an entry its place.
    pub(super) fn entry(&mut self, entry: &mut Entry) -> Result<Placement, DiffError> {
        self.context.path.clone_from(&entry.path);
        self.context.offset = entry.offset;
        let longest = entry.path.len().max(entry.link.len());
        if longest > self.options.max_path_bytes {
            return Err(self.limit("bytes of a name", self.options.max_path_bytes as u64));
        }
        (entry.uid, entry.gid) = self.owner(entry.uid, entry.gid)?;
        // Lent out, so that names can be slices of it while the entry is used up.
        let path = std::mem::take(&mut entry.path);
        let placement = match (name::plain_parent(&path), &self.parent) {
            (Some((parent, last)), Some((known, dir))) if known == parent => self.entry_at(*dir, last, entry),
            _ => self.entry_by_path(&path, entry),
        };
        entry.path = path;
        placement
    }

    fn entry_by_path(&mut self, path: &[u8], entry: &mut Entry) -> Result<Placement, DiffError> {
        let mut parts = Vec::new();
        let max_depth = self.options.max_depth;
        name::split(path, max_depth, &mut parts).map_err(|e| self.context.name_error(e, max_depth))?;
        let Some((last, parents)) = parts.split_last() else { return self.root_entry(entry) };
        if parents.iter().any(|p| p.starts_with(name::META_PREFIX)) {
            if parents == [name::LINK_DIR] && entry.kind == EntryKind::File {
                return self.aufs_linked_file(last, entry);
            }
            return Ok(Placement::Nothing);
        }
        if parents.iter().any(|p| p.starts_with(name::WHITEOUT_PREFIX)) {
            return Err(self.context.refuse("a whiteout's name is used as a folder"));
        }
        if name::meaning(last) == Meaning::Meta {
            return Ok(Placement::Nothing);
        }
        let dir = self.make_parents(parents)?;
        if let Some((parent, _)) = name::plain_parent(path) {
            self.parent = Some((parent.to_vec(), dir));
        }
        self.entry_at(dir, last, entry)
    }

    fn root_entry(&mut self, entry: &mut Entry) -> Result<Placement, DiffError> {
        if entry.kind != EntryKind::Directory {
            return Err(self.context.refuse("the root of a layer can only be a folder"));
        }
        let root = self.writer.root();
        self.update_directory(root, entry)?;
        Ok(Placement::Nothing)
    }

    /// A file of AUFS's link folder: kept under that name, which no other entry can have, until the end.
    fn aufs_linked_file(&mut self, last: &[u8], entry: &mut Entry) -> Result<Placement, DiffError> {
        let root = self.writer.root();
        let dir = match self.writer.lookup(root, name::LINK_DIR) {
            Some(dir) => dir,
            None => self.create(root, name::LINK_DIR, NodeKind::Directory, implied(), Vec::new())?,
        };
        // Whether it counts is known when its names are: see `finish`.
        self.removed = true;
        self.replace_by_entry(dir, last, entry)
    }

    fn entry_at(&mut self, dir: NodeId, last: &[u8], entry: &mut Entry) -> Result<Placement, DiffError> {
        match name::meaning(last) {
            Meaning::Plain => {}
            Meaning::Meta => return Ok(Placement::Nothing),
            Meaning::Bad => return Err(self.context.refuse("whiteout without a name")),
            Meaning::Whiteout(hidden) => {
                self.whiteout(dir, hidden)?;
                return Ok(Placement::Nothing);
            }
            Meaning::Opaque => {
                self.set_opaque(dir)?;
                return Ok(Placement::Nothing);
            }
        }
        if entry.kind == EntryKind::CharDevice && (entry.major, entry.minor) == (0, 0) {
            self.whiteout(dir, last)?;
            return Ok(Placement::Nothing);
        }
        if entry.kind == EntryKind::HardLink {
            self.hard_link(dir, last, entry)?;
            return Ok(Placement::Nothing);
        }
        self.replace_by_entry(dir, last, entry)
    }

    fn replace_by_entry(
        &mut self,
        dir: NodeId,
        last: &[u8],
        entry: &mut Entry,
    ) -> Result<Placement, DiffError> {
        let kind = match entry.kind {
            EntryKind::File => NodeKind::File,
            EntryKind::Directory => NodeKind::Directory,
            EntryKind::Symlink if entry.link.is_empty() => {
                return Err(self.context.refuse("symlink to nothing"));
            }
            EntryKind::Symlink => NodeKind::Symlink { target: std::mem::take(&mut entry.link) },
            EntryKind::CharDevice => NodeKind::CharDevice { major: entry.major, minor: entry.minor },
            EntryKind::BlockDevice => NodeKind::BlockDevice { major: entry.major, minor: entry.minor },
            EntryKind::Fifo => NodeKind::Fifo,
            EntryKind::HardLink => return Err(self.context.refuse("hard link where none can be")),
        };
        let mut over_whiteout = false;
        if let Some(known) = self.writer.lookup(dir, last) {
            if entry.kind == EntryKind::Directory && self.is_directory(known) {
                self.update_directory(known, entry)?;
                return Ok(Placement::Nothing);
            }
            over_whiteout = self.is_whiteout(known);
            self.remove(dir, last, known)?;
        }
        let attributes = attributes(entry, &self.born(dir));
        let mut xattrs = self.xattrs(entry, &kind, Vec::new())?;
        kernel::chmod(&kind, attributes.permissions, &mut xattrs);
        if over_whiteout && entry.kind == EntryKind::Directory {
            xattrs.push(opaque());
        }
        let node = self.create(dir, last, kind, attributes, xattrs)?;
        if entry.kind != EntryKind::File {
            return Ok(Placement::Nothing);
        }
        self.count_bytes(entry.size);
        Ok(if entry.size > 0 { Placement::Data(node) } else { Placement::Nothing })
    }

    /// A folder's second entry: its xattrs come to those that are there, as setxattr(2) adds them.
    fn update_directory(&mut self, node: NodeId, entry: &mut Entry) -> Result<(), DiffError> {
        let attributes = attributes(entry, &self.writer.attributes(node));
        let known = self.writer.xattrs(node);
        let mut xattrs = self.xattrs(entry, &NodeKind::Directory, known)?;
        kernel::chmod(&NodeKind::Directory, attributes.permissions, &mut xattrs);
        self.writer.set_attributes(node, attributes);
        self.writer.set_xattrs(node, xattrs).map_err(|e| self.context.image(e))
    }

    /// Gives a node what the header of a further name of it says, as chown, setxattr, chmod and utimes do it: the last
    /// header holds for all names.
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

    fn whiteout(&mut self, dir: NodeId, hidden: &[u8]) -> Result<(), DiffError> {
        if let Some(known) = self.writer.lookup(dir, hidden) {
            if self.is_whiteout(known) {
                return Ok(());
            }
            self.remove(dir, hidden, known)?;
        }
        let attributes = Attributes { permissions: 0, ..implied() };
        self.create(dir, hidden, NodeKind::CharDevice { major: 0, minor: 0 }, attributes, Vec::new())?;
        Ok(())
    }

    fn set_opaque(&mut self, dir: NodeId) -> Result<(), DiffError> {
        if self.is_opaque(dir) {
            return Ok(());
        }
        let mut xattrs = self.writer.xattrs(dir);
        xattrs.push(opaque());
        self.writer.set_xattrs(dir, xattrs).map_err(|e| self.context.image(e))
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
        self.writer.create(dir, name, kind, attributes, xattrs).map_err(|e| self.context.image(e))
    }

    pub(super) fn count_name(&mut self) -> Result<(), DiffError> {
        self.names += 1;
        if self.names > self.options.max_entries {
            return Err(self.limit("names in a layer", self.options.max_entries));
        }
        Ok(())
    }

    /// A file of this size, or a symlink whose target is so long, was made.
    pub(super) fn count_bytes(&mut self, size: u64) {
        self.size = self.size.saturating_add(size);
    }

    /// Takes a name away, and what lies below it.
    pub(super) fn remove(&mut self, dir: NodeId, name: &[u8], node: NodeId) -> Result<(), DiffError> {
        self.removed = true;
        self.parent = None;
        if !self.links.is_empty() {
            self.links.forget_below(&self.writer, node);
        }
        self.writer.unlink(dir, name).map_err(|e| self.context.image(e))
    }

    pub(super) fn is_directory(&self, node: NodeId) -> bool {
        matches!(self.writer.kind(node), NodeKind::Directory)
    }

    pub(super) fn is_whiteout(&self, node: NodeId) -> bool {
        matches!(self.writer.kind(node), NodeKind::CharDevice { major: 0, minor: 0 })
    }

    fn is_opaque(&self, node: NodeId) -> bool {
        self.writer.xattrs(node).iter().any(|x| x.name == OVERLAY_OPAQUE)
    }

    /// What a new node in a folder has before chown and chmod: root's, but for the group in a set-group-id folder.
    fn born(&self, dir: NodeId) -> Attributes {
        /// `S_ISGID`.
        const SET_GROUP_ID: u16 = 0o2000;
        let dir = self.writer.attributes(dir);
        let gid = if dir.permissions & SET_GROUP_ID == 0 { 0 } else { dir.gid };
        Attributes { gid, ..implied() }
    }

    /// The owner as the image holds it: in the container's ids.
    fn owner(&self, uid: u32, gid: u32) -> Result<(u32, u32), DiffError> {
        let held = |what, maps, id| {
            owner::inside(maps, id)
                .ok_or_else(|| self.context.refuse(format!("{what} {id} {}", owner::outside(maps))))
        };
        Ok((held("owner", &self.options.uid_map, uid)?, held("group", &self.options.gid_map, gid)?))
    }

    /// Adds an entry's xattrs to those that a node of this kind has.
    fn xattrs(
        &self,
        entry: &mut Entry,
        kind: &NodeKind,
        mut known: Vec<Xattr>,
    ) -> Result<Vec<Xattr>, DiffError> {
        if entry.xattrs.is_empty() {
            return Ok(known);
        }
        let bytes: usize = entry.xattrs.iter().map(|x| x.name.len() + x.value.len()).sum();
        if bytes > self.options.max_xattr_bytes {
            return Err(self.limit("bytes of xattrs", self.options.max_xattr_bytes as u64));
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
        let (uids, gids) = (&self.options.uid_map, &self.options.gid_map);
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

    /// The folder at `parts`, made if need be.
    fn make_parents(&mut self, parts: &[&[u8]]) -> Result<NodeId, DiffError> {
        let mut walk = Walk::new(self.writer.root(), parts);
        while let Some(part) = walk.next_part() {
            if *part == *b".." {
                walk.up();
                continue;
            }
            let dir = walk.dir();
            let next = match self.writer.lookup(dir, &part) {
                None => self.create(dir, &part, NodeKind::Directory, implied(), Vec::new())?,
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
                    _ => return Err(self.context.refuse("a parent is not a folder in this layer")),
                },
            };
            walk.down(next);
            if walk.stack.len() > self.options.max_depth {
                return Err(self.limit("path components", self.options.max_depth as u64));
            }
        }
        Ok(walk.dir())
    }

    /// Where `parts` lead, nothing made; the last part is not followed if it is a symlink.
    pub(super) fn find(&self, parts: &[&[u8]]) -> Found {
        let Some((last, parents)) = parts.split_last() else { return Found::Node(self.writer.root()) };
        let mut walk = Walk::new(self.writer.root(), parents);
        let missing = |dir: NodeId| if self.is_opaque(dir) { Found::Hidden } else { Found::Missing };
        let mut opaque_above = false;
        while let Some(part) = walk.next_part() {
            if *part == *b".." {
                walk.up();
                continue;
            }
            let dir = walk.dir();
            opaque_above |= missing(dir) == Found::Hidden;
            let Some(node) = self.writer.lookup(dir, &part) else {
                return if opaque_above { Found::Hidden } else { Found::Missing };
            };
            match self.writer.kind(node) {
                NodeKind::Directory => walk.down(node),
                NodeKind::Symlink { target } if walk.follow(&target) => {}
                _ => return Found::Hidden,
            }
        }
        let dir = walk.dir();
        match self.writer.lookup(dir, last) {
            Some(node) if self.is_whiteout(node) => Found::Hidden,
            Some(node) => Found::Node(node),
            None if opaque_above => Found::Hidden,
            None => missing(dir),
        }
    }

    /// Sums up the sizes of the files and symlinks that are left, each once.
    fn count_size(&self) -> u64 {
        let (mut sum, mut seen) = (0u64, HashSet::new());
        let mut folders = vec![self.writer.root()];
        while let Some(dir) = folders.pop() {
            for (_, node) in self.writer.children(dir) {
                match self.writer.kind(node) {
                    NodeKind::Directory => folders.push(node),
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
}

fn opaque() -> Xattr {
    Xattr { name: OVERLAY_OPAQUE.to_vec(), value: b"y".to_vec() }
}

/// Attributes of folders that no entry describes, and of whiteouts.
fn implied() -> Attributes {
    let time = Timestamp { secs: 0, nanos: 0 };
    Attributes { permissions: 0o755, uid: 0, gid: 0, mtime: time, atime: None, ctime: None }
}

/// What an entry's header makes of a node that has `known`.
fn attributes(entry: &Entry, known: &Attributes) -> Attributes {
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

impl<W: WriteAt> Target for Layer<'_, W> {
    fn entry(&mut self, entry: &mut Entry) -> Result<Placement, DiffError> {
        Layer::entry(self, entry)
    }

    fn begin_file(&mut self, node: NodeId, size: u64) -> Result<(), DiffError> {
        Layer::begin_file(self, node, size)
    }

    fn write_data(
        &mut self,
        offset: u64,
        data: &[u8],
        placed: &mut dyn FnMut(Placed),
    ) -> Result<(), DiffError> {
        self.writer.write_data(offset, data, placed).map_err(|e| self.context.image(e))
    }

    fn flush(&mut self) -> Result<(), DiffError> {
        self.writer.flush().map_err(|e| self.context.image(e))
    }

    fn end_file(&mut self) -> Result<(), DiffError> {
        self.writer.end_file().map_err(|e| self.context.image(e))
    }

    fn limit(&self, what: &'static str, limit: u64) -> DiffError {
        self.context.limit(what, limit)
    }

    fn settle(&mut self, lowers: &mut dyn LowerLayers) -> Result<u64, DiffError> {
        self.settle_links(lowers)?;
        let root = self.writer.root();
        if let Some(dir) = self.writer.lookup(root, name::LINK_DIR) {
            self.remove(root, name::LINK_DIR, dir)?;
        }
        Ok(if self.removed { self.count_size() } else { self.size })
    }

    fn finish(self, tar_digest: [u8; 32]) -> Result<ImageSummary, DiffError> {
        Ok(self.writer.finish_with(tar_digest)?)
    }
}

/// A way through folders and symlinks.
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

    /// Goes on with a symlink's target; false if there were too many.
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
