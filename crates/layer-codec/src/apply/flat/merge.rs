//! The merged tree while layers come from the top down: what upper layers have and hide, and how a layer joins it.
//!
//! ```text
//!   a name of the layer    and in the merged tree        then
//!   anything               nothing, nothing hides it     it moves there, with all below it
//!   a whiteout             nothing, nothing hides it     the name is hidden from now on
//!   a directory            an open directory             their names are merged
//!   anything else          an open directory             that directory is closed: lower layers add nothing to it
//!   anything               anything else                 it stays where it is, and goes with the layer's directory
//! ```
//!
//! *Open* directories take names of lower layers; an opaque one, and one over something that is no directory, is *closed*.
//! Whiteouts and opaque marks are not in the merged tree: they are kept here as long as a lower layer is to come.
//!
//! Invariant: while a layer is read the merged tree does not change, so [`Merged::shows`] is right from a name's first
//! entry to the end of the layer. Called by the parent module and `read`.

use super::super::{context::OVERLAY_OPAQUE, tree::LayerTree};
use crate::DiffError;
use disk_io::WriteAt;
use ext4_image::writer::{ImageWriter, NodeId};
use std::collections::{HashMap, HashSet};

/// What upper layers have where a directory of the layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Above {
    /// Nothing: all of it is visible.
    Nothing,
    /// This open directory.
    Open(NodeId),
    /// Something that hides all of it.
    Hidden,
}

/// The state between layers, and of the layer that is being read.
#[derive(Debug, Default)]
pub(super) struct Merged {
    /// Directories of the merged tree to which lower layers add nothing.
    closed: HashSet<NodeId>,
    /// Names that a whiteout hides, by their directories in the merged tree.
    hidden: HashMap<NodeId, HashSet<Box<[u8]>>>,
    /// Of the directories of the layer that is being read.
    above: HashMap<NodeId, Above>,
}

impl Merged {
    /// Whether nothing of the remaining layers can be seen.
    pub(super) fn is_complete<W: WriteAt>(&self, writer: &ImageWriter<W>) -> bool {
        self.closed.contains(&writer.root())
    }

    /// A layer with this root directory is read next.
    pub(super) fn begin_layer<W: WriteAt>(&mut self, writer: &ImageWriter<W>, root: NodeId) {
        self.above.clear();
        self.above.insert(root, Above::Open(writer.root()));
    }

    /// Notes the directories that the last entry made in the layer.
    pub(super) fn follow<W: WriteAt>(&mut self, tree: &mut LayerTree<'_, W>) {
        let Some(watch) = &mut tree.watch else { return };
        for (parent, name, dir) in watch.directories.drain(..) {
            let above = match self.above.get(&parent) {
                Some(Above::Open(open)) => self.above(&tree.writer, *open, &name),
                Some(known) => *known,
                None => Above::Hidden,
            };
            self.above.insert(dir, above);
        }
    }

    /// What there is at a name in an open directory of the merged tree.
    fn above<W: WriteAt>(&self, writer: &ImageWriter<W>, open: NodeId, name: &[u8]) -> Above {
        match writer.lookup(open, name) {
            Some(node) if writer.is_directory(node) && !self.closed.contains(&node) => Above::Open(node),
            Some(_) => Above::Hidden,
            None if self.is_hidden(open, name) => Above::Hidden,
            None => Above::Nothing,
        }
    }

    fn is_hidden(&self, dir: NodeId, name: &[u8]) -> bool {
        self.hidden.get(&dir).is_some_and(|names| names.contains(name))
    }

    /// Whether a name in a directory of the layer is visible: no upper layer has it or hides it.
    pub(super) fn shows<W: WriteAt>(&self, writer: &ImageWriter<W>, dir: NodeId, name: &[u8]) -> bool {
        match self.above.get(&dir) {
            Some(Above::Nothing) => true,
            Some(Above::Open(open)) => self.above(writer, *open, name) == Above::Nothing,
            Some(Above::Hidden) | None => false,
        }
    }

    /// Whether lower layers add nothing to a directory.
    pub(super) fn is_closed(&self, dir: NodeId) -> bool {
        self.closed.contains(&dir)
    }

    /// Merges a layer into the tree. What is left in its directory is not visible. `last`: no layer follows.
    /// Gives the directories without an entry that came into the tree, each with whether it is opaque.
    pub(super) fn merge<W: WriteAt>(
        &mut self,
        tree: &mut LayerTree<'_, W>,
        last: bool,
    ) -> Result<Vec<(NodeId, bool)>, DiffError> {
        let mut implied = Vec::new();
        let mut pairs = vec![(tree.root, tree.writer.root())];
        let mut moved = Vec::new();
        while let Some((dir, open)) = pairs.pop() {
            let opaque = tree.is_opaque(dir);
            for (name, node) in tree.writer.children(dir) {
                let whiteout = tree.is_whiteout(node);
                match self.above(&tree.writer, open, &name) {
                    Above::Hidden => {}
                    Above::Open(known) if tree.is_directory(node) => pairs.push((node, known)),
                    Above::Open(known) => {
                        self.closed.insert(known);
                    }
                    Above::Nothing if whiteout => self.hide(open, &name, last),
                    Above::Nothing => {
                        tree.writer.carry(dir, &name, open).map_err(|e| tree.context.image(e))?;
                        if tree.is_directory(node) {
                            moved.push(node);
                        }
                    }
                }
            }
            if opaque {
                self.closed.insert(open);
                self.hidden.remove(&open);
            }
        }
        while let Some(dir) = moved.pop() {
            let opaque = self.arrived(tree, dir)?;
            if tree.implied.contains(&dir) {
                implied.push((dir, opaque));
            }
            let children = tree.writer.children(dir);
            for (name, node) in children {
                if tree.is_directory(node) {
                    moved.push(node);
                } else if tree.is_whiteout(node) {
                    tree.writer.unlink(dir, &name).map_err(|e| tree.context.image(e))?;
                    self.hide(dir, &name, last);
                }
            }
        }
        Ok(implied)
    }

    /// A directory of the layer is in the merged tree now; whether it is opaque.
    fn arrived<W: WriteAt>(&mut self, tree: &mut LayerTree<'_, W>, dir: NodeId) -> Result<bool, DiffError> {
        let opaque = tree.is_opaque(dir);
        if opaque {
            let mut xattrs = tree.writer.xattrs(dir);
            xattrs.retain(|x| x.name != OVERLAY_OPAQUE);
            tree.writer.set_xattrs(dir, xattrs).map_err(|e| tree.context.image(e))?;
            self.closed.insert(dir);
        }
        Ok(opaque)
    }

    fn hide(&mut self, dir: NodeId, name: &[u8], last: bool) {
        if !last && !self.closed.contains(&dir) {
            self.hidden.entry(dir).or_default().insert(name.into());
        }
    }
}
