//! The default profile: what each entry of a tar does to the layer. The table of rules is in the parent module.
//!
//! The parent of the previous entry is remembered by its bytes in the tar: most entries have the same. Called by `apply`
//! through [`Target`].

use super::{
    ApplyOptions, LowerLayers,
    context::opaque,
    implied, kernel,
    links::{self, Below, LaterLink},
    name::{self, Meaning},
    target::{Placement, Settled, Target},
    tree::{LayerTree, attributes, implied},
    usage,
};
use crate::DiffError;
use disk_io::WriteAt;
use ext4_image::writer::{Attributes, ImageSummary, ImageWriter, NodeId, NodeKind, Placed};
use layer_tar::{Entry, EntryKind};

/// A layer of the default profile while it is made.
pub(super) struct DefaultLayer<'o, W> {
    pub(super) tree: LayerTree<'o, W>,
}

impl<'o, W: WriteAt> DefaultLayer<'o, W> {
    pub(super) fn new(writer: ImageWriter<W>, options: &'o ApplyOptions) -> Self {
        Self::of(LayerTree::new(writer, options))
    }

    /// The layer that `tree` is.
    pub(super) fn of(tree: LayerTree<'o, W>) -> Self {
        Self { tree }
    }

    /// Settles the links of a layer whose lower layers are read later: those whose targets are there go into `later`.
    pub(super) fn settle_links(&mut self, later: &mut Vec<LaterLink>) -> Result<(), DiffError> {
        links::settle(&mut self.tree, &mut Below::Later(later))?;
        self.drop_link_dir()
    }

    /// Removes AUFS's link directory: its files have their names elsewhere by now, or none.
    fn drop_link_dir(&mut self) -> Result<(), DiffError> {
        let root = self.tree.root;
        match self.tree.writer.lookup(root, name::LINK_DIR) {
            Some(dir) => self.tree.remove(root, name::LINK_DIR, dir),
            None => Ok(()),
        }
    }

    /// Adds an entry to the layer.
    fn apply_entry(&mut self, entry: &mut Entry) -> Result<Placement, DiffError> {
        self.tree.context.path.clone_from(&entry.path);
        self.tree.context.offset = entry.offset;
        let longest = entry.path.len().max(entry.link.len());
        if longest > self.tree.options.limits.path_bytes {
            return Err(self.tree.limit("bytes of a name", self.tree.options.limits.path_bytes as u64));
        }
        (entry.uid, entry.gid) = self.tree.owner(entry.uid, entry.gid)?;
        // Taken out, so that names can be slices of it while the entry is consumed.
        let path = std::mem::take(&mut entry.path);
        let placement = match (name::plain_parent(&path), &self.tree.parent) {
            (Some((parent, last)), Some((known, dir))) if known == parent => self.entry_at(*dir, last, entry),
            _ => self.entry_by_path(&path, entry),
        };
        entry.path = path;
        placement
    }

    fn entry_by_path(&mut self, path: &[u8], entry: &mut Entry) -> Result<Placement, DiffError> {
        let mut parts = Vec::new();
        let max_depth = self.tree.options.limits.depth;
        name::split(path, max_depth, &mut parts).map_err(|e| self.tree.context.name_error(e, max_depth))?;
        let Some((last, parents)) = parts.split_last() else { return self.root_entry(entry) };
        if parents.iter().any(|p| p.starts_with(name::META_PREFIX)) {
            if parents == [name::LINK_DIR] && entry.kind == EntryKind::File {
                return self.aufs_linked_file(last, entry);
            }
            return Ok(Placement::Nothing);
        }
        if parents.iter().any(|p| p.starts_with(name::WHITEOUT_PREFIX)) {
            return Err(self.tree.context.refuse("a whiteout's name is used as a directory"));
        }
        if name::meaning(last) == Meaning::Meta {
            return Ok(Placement::Nothing);
        }
        let dir = self.tree.make_parents(parents)?;
        if let Some((parent, _)) = name::plain_parent(path) {
            self.tree.parent = Some((parent.to_vec(), dir));
        }
        self.entry_at(dir, last, entry)
    }

    fn root_entry(&mut self, entry: &mut Entry) -> Result<Placement, DiffError> {
        if entry.kind != EntryKind::Directory {
            return Err(self.tree.context.refuse("the root of a layer can only be a directory"));
        }
        let root = self.tree.root;
        self.update_directory(root, entry)?;
        Ok(Placement::Nothing)
    }

    /// A file of AUFS's link directory: kept until the end under that name, which no other entry can have.
    fn aufs_linked_file(&mut self, last: &[u8], entry: &mut Entry) -> Result<Placement, DiffError> {
        let root = self.tree.root;
        let dir = match self.tree.writer.lookup(root, name::LINK_DIR) {
            Some(dir) => dir,
            None => self.tree.create(root, name::LINK_DIR, NodeKind::Directory, implied(), Vec::new())?,
        };
        // Whether it counts depends on its names, which are known at the end: see `settle`.
        self.tree.removed = true;
        self.replace_by_entry(dir, last, entry)
    }

    fn entry_at(&mut self, dir: NodeId, last: &[u8], entry: &mut Entry) -> Result<Placement, DiffError> {
        match name::meaning(last) {
            Meaning::Plain => {}
            Meaning::Meta => return Ok(Placement::Nothing),
            Meaning::Bad => return Err(self.tree.context.refuse("whiteout without a name")),
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
            links::hard_link(&mut self.tree, dir, last, entry)?;
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
                return Err(self.tree.context.refuse("symlink with an empty target"));
            }
            EntryKind::Symlink => NodeKind::Symlink { target: std::mem::take(&mut entry.link) },
            EntryKind::CharDevice => NodeKind::CharDevice { major: entry.major, minor: entry.minor },
            EntryKind::BlockDevice => NodeKind::BlockDevice { major: entry.major, minor: entry.minor },
            EntryKind::Fifo => NodeKind::Fifo,
            EntryKind::HardLink => return Err(self.tree.context.refuse("a hard link is not possible here")),
        };
        let mut over_whiteout = false;
        if let Some(known) = self.tree.writer.lookup(dir, last) {
            if entry.kind == EntryKind::Directory && self.tree.is_directory(known) {
                self.update_directory(known, entry)?;
                return Ok(Placement::Nothing);
            }
            over_whiteout = self.tree.is_whiteout(known);
            self.tree.remove(dir, last, known)?;
        }
        let attributes = attributes(entry, &self.born(dir));
        let mut xattrs = self.tree.xattrs(entry, &kind, Vec::new())?;
        kernel::chmod(&kind, attributes.permissions, &mut xattrs);
        if over_whiteout && entry.kind == EntryKind::Directory {
            xattrs.push(opaque());
        }
        let node = self.tree.create(dir, last, kind, attributes, xattrs)?;
        if entry.kind != EntryKind::File {
            return Ok(Placement::Nothing);
        }
        self.tree.count_bytes(entry.size);
        Ok(if entry.size > 0 { Placement::Data(node) } else { Placement::Nothing })
    }

    /// A directory's second entry: its xattrs are added to the present ones, as by setxattr(2).
    fn update_directory(&mut self, node: NodeId, entry: &mut Entry) -> Result<(), DiffError> {
        self.tree.implied.remove(&node);
        let attributes = attributes(entry, &self.tree.writer.attributes(node));
        let known = self.tree.writer.xattrs(node);
        let mut xattrs = self.tree.xattrs(entry, &NodeKind::Directory, known)?;
        kernel::chmod(&NodeKind::Directory, attributes.permissions, &mut xattrs);
        self.tree.writer.set_attributes(node, attributes);
        self.tree.writer.set_xattrs(node, xattrs).map_err(|e| self.tree.context.image(e))
    }

    fn whiteout(&mut self, dir: NodeId, hidden: &[u8]) -> Result<(), DiffError> {
        if let Some(known) = self.tree.writer.lookup(dir, hidden) {
            if self.tree.is_whiteout(known) {
                return Ok(());
            }
            self.tree.remove(dir, hidden, known)?;
        }
        let attributes = Attributes { permissions: 0, ..implied() };
        self.tree.create(dir, hidden, NodeKind::CharDevice { major: 0, minor: 0 }, attributes, Vec::new())?;
        Ok(())
    }

    fn set_opaque(&mut self, dir: NodeId) -> Result<(), DiffError> {
        if self.tree.is_opaque(dir) {
            return Ok(());
        }
        let mut xattrs = self.tree.writer.xattrs(dir);
        xattrs.push(opaque());
        self.tree.writer.set_xattrs(dir, xattrs).map_err(|e| self.tree.context.image(e))
    }

    /// The attributes of a new node before chown and chmod: owner root, and the group of a set-group-id directory.
    fn born(&self, dir: NodeId) -> Attributes {
        /// `S_ISGID`.
        const SET_GROUP_ID: u16 = 0o2000;
        let dir = self.tree.writer.attributes(dir);
        let gid = if dir.permissions & SET_GROUP_ID == 0 { 0 } else { dir.gid };
        Attributes { gid, ..implied() }
    }
}

impl<W: WriteAt> Target for DefaultLayer<'_, W> {
    fn entry(&mut self, entry: &mut Entry) -> Result<Placement, DiffError> {
        self.apply_entry(entry)
    }

    fn begin_file(&mut self, node: NodeId, size: u64) -> Result<(), DiffError> {
        self.tree.begin_file(node, size)
    }

    fn write_data(
        &mut self,
        offset: u64,
        data: &[u8],
        placed: &mut dyn FnMut(Placed),
    ) -> Result<(), DiffError> {
        self.tree.write_data(offset, data, placed)
    }

    fn flush(&mut self) -> Result<(), DiffError> {
        self.tree.writer.flush().map_err(|e| self.tree.context.image(e))
    }

    fn end_file(&mut self) -> Result<(), DiffError> {
        self.tree.end_file()
    }

    fn limit(&self, what: &'static str, limit: u64) -> DiffError {
        self.tree.context.limit(what, limit)
    }

    fn settle(&mut self, lowers: &mut dyn LowerLayers) -> Result<Settled, DiffError> {
        let lower_links = links::settle(&mut self.tree, &mut Below::Layers(lowers))?;
        let implied_directories = implied::settle(&mut self.tree, lowers)?;
        self.drop_link_dir()?;
        let diff_size = if self.tree.removed { self.tree.count_size() } else { self.tree.size };
        let usage = usage::measure(&self.tree.writer, &self.tree.holes);
        Ok(Settled { diff_size, implied_directories, lower_links, usage })
    }

    fn finish(self, tar_digest: [u8; 32]) -> Result<ImageSummary, DiffError> {
        Ok(self.tree.writer.finish_with(tar_digest)?)
    }
}
