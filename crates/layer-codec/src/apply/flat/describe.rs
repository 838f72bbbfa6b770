//! Directories of the merged tree that no entry has described yet, and what a layer says about them.
//!
//! ```text
//!   a directory at the path, with an entry      its attributes                                      described
//!   one without an entry                        nothing; the search goes on in the next layer
//!   a symlink                                   followed inside of the layer, for what lies below, too;
//!                                               to a directory without an entry: the search goes on at that one's path
//!   a whiteout, anything else                   nothing, and no layer below does: 0755, root, time 0
//! ```
//!
//! The same as `implied` with `descent` do for a layer of its own, but for all layers at once, from the top. Called by the
//! parent module before a layer is merged, while its tree is whole.

use super::{
    super::{
        LowerNode,
        context::OVERLAY_OPAQUE,
        implied,
        tree::{LayerTree, Resolved, resolve},
    },
    merge::Merged,
};
use crate::DiffError;
use disk_io::WriteAt;
use ext4_image::writer::{Attributes, ImageWriter, NodeId, NodeKind};
use std::collections::{HashMap, HashSet};

/// What lower layers may describe of a closed directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// It, and what lies in it.
    All,
    /// Only itself: it is opaque.
    Own,
}

type Path = Vec<Vec<u8>>;

/// What is not described.
#[derive(Debug, Default)]
pub(super) struct Undescribed {
    waiting: HashSet<NodeId>,
    /// Closed directories of which lower layers may still say what they are like.
    reach: HashMap<NodeId, Reach>,
    /// Directories that are described by what is at another path: there a symlink led.
    elsewhere: HashMap<NodeId, Path>,
    /// An entry of an upper layer described the root directory.
    root_described: bool,
}

/// What a layer has at the path of a directory.
enum Found {
    Directory(NodeId, Path),
    Nothing,
    /// Something that hides lower layers.
    Hidden,
}

/// A directory of the merged tree, with those children of the layer's that are to come.
struct Step {
    dir: NodeId,
    children: Vec<(Vec<u8>, NodeId)>,
    /// The path of the layer's directory, where a symlink led to it.
    linked: Option<Path>,
}

impl Undescribed {
    /// A directory without an entry is in the merged tree now. `opaque`: it is closed.
    pub(super) fn add(&mut self, dir: NodeId, opaque: bool) {
        self.waiting.insert(dir);
        if opaque {
            self.reach.insert(dir, Reach::Own);
        }
    }

    /// Describes directories by those of a layer.
    pub(super) fn describe<W: WriteAt>(
        &mut self,
        merged: &Merged,
        tree: &mut LayerTree<'_, W>,
    ) -> Result<(), DiffError> {
        let root = tree.writer.root();
        if !self.root_described && !tree.implied.contains(&tree.root) {
            self.root_described = true;
            let dir = tree.root;
            let mut xattrs = tree.writer.xattrs(dir);
            xattrs.retain(|x| x.name != OVERLAY_OPAQUE);
            tree.writer.set_attributes(root, tree.writer.attributes(dir));
            tree.writer.set_xattrs(root, xattrs).map_err(|e| tree.context.image(e))?;
        }
        if self.waiting.is_empty() {
            return Ok(());
        }
        self.look_elsewhere(tree)?;
        let mut path: Path = Vec::new();
        let mut steps = vec![Step { dir: root, children: tree.writer.children(tree.root), linked: None }];
        while let Some(step) = steps.last_mut() {
            let Some((name, node)) = step.children.pop() else {
                steps.pop();
                path.pop();
                continue;
            };
            let Some((known, reach)) = self.describable(merged, &tree.writer, step.dir, &name) else {
                continue;
            };
            let linked = step.linked.as_ref().map(|dir| [&dir[..], std::slice::from_ref(&name)].concat());
            path.push(name);
            // A path through a symlink is not that of the node.
            let place = linked.as_ref().unwrap_or(&path);
            let (found, linked) = if tree.is_directory(node) {
                if tree.is_opaque(node) {
                    self.reach.remove(&known);
                    if tree.implied.contains(&node) {
                        self.reach.insert(known, Reach::Own);
                    }
                }
                (node, linked)
            } else {
                match follow(tree, place) {
                    Found::Directory(target, at) => {
                        self.reach.insert(known, reach);
                        (target, Some(at))
                    }
                    Found::Nothing => {
                        self.reach.insert(known, reach);
                        path.pop();
                        continue;
                    }
                    Found::Hidden => {
                        self.reach.remove(&known);
                        self.drop_waiting(known);
                        path.pop();
                        continue;
                    }
                }
            };
            if self.waiting.contains(&known) && !self.elsewhere.contains_key(&known) {
                if !tree.implied.contains(&found) {
                    self.drop_waiting(known);
                    copy_attributes(tree, known, found)?;
                } else if let Some(at) = &linked {
                    self.elsewhere.insert(known, at.clone());
                }
            }
            if reach == Reach::Own {
                path.pop();
                continue;
            }
            let children = tree.writer.children(found);
            steps.push(Step { dir: known, children, linked });
        }
        Ok(())
    }

    fn drop_waiting(&mut self, dir: NodeId) {
        self.waiting.remove(&dir);
        self.elsewhere.remove(&dir);
    }

    /// Looks for what describes the directories whose path in lower layers is another.
    fn look_elsewhere<W: WriteAt>(&mut self, tree: &mut LayerTree<'_, W>) -> Result<(), DiffError> {
        let mut dirs: Vec<NodeId> = self.elsewhere.keys().copied().collect();
        dirs.sort_unstable();
        for dir in dirs {
            let Some(path) = self.elsewhere.get(&dir) else { continue };
            match search(tree, path) {
                Found::Nothing => {}
                Found::Hidden => self.drop_waiting(dir),
                Found::Directory(found, at) if tree.implied.contains(&found) => {
                    self.elsewhere.insert(dir, at);
                }
                Found::Directory(found, _) => {
                    self.drop_waiting(dir);
                    copy_attributes(tree, dir, found)?;
                }
            }
        }
        Ok(())
    }

    /// The directory of the merged tree at a name, and what of it lower layers may describe.
    fn describable<W: WriteAt>(
        &self,
        merged: &Merged,
        writer: &ImageWriter<W>,
        dir: NodeId,
        name: &[u8],
    ) -> Option<(NodeId, Reach)> {
        let node = writer.lookup(dir, name).filter(|node| writer.is_directory(*node))?;
        let reach = if merged.is_closed(node) { *self.reach.get(&node)? } else { Reach::All };
        Some((node, reach))
    }
}

/// What a layer's node at `path`, which is no directory, leads to.
fn follow<W: WriteAt>(tree: &LayerTree<'_, W>, path: &[Vec<u8>]) -> Found {
    let parts: Vec<&[u8]> = path.iter().map(Vec::as_slice).collect();
    match resolve(&tree.writer, tree.root, &parts) {
        Resolved::Node(node, at) if tree.is_directory(node) => Found::Directory(node, at),
        Resolved::Missing => Found::Nothing,
        Resolved::Node(..) | Resolved::Blocked => Found::Hidden,
    }
}

/// The directory at a path of a layer, name by name.
fn search<W: WriteAt>(tree: &LayerTree<'_, W>, path: &[Vec<u8>]) -> Found {
    let (mut dir, mut opaque) = (tree.root, tree.is_opaque(tree.root));
    let mut at: Path = Vec::new();
    for name in path {
        let Some(node) = tree.writer.lookup(dir, name) else {
            return if opaque { Found::Hidden } else { Found::Nothing };
        };
        at.push(name.clone());
        if tree.is_directory(node) {
            (dir, opaque) = (node, opaque || tree.is_opaque(node));
            continue;
        }
        match tree.writer.kind(node) {
            NodeKind::Symlink { .. } => match follow(tree, &at) {
                Found::Directory(target, place) => (dir, opaque, at) = (target, false, place),
                other => return other,
            },
            _ => return Found::Hidden,
        }
    }
    Found::Directory(dir, at)
}

/// Makes `known` like the directory `dir` of a layer, as an entry of its own would.
fn copy_attributes<W: WriteAt>(
    tree: &mut LayerTree<'_, W>,
    known: NodeId,
    dir: NodeId,
) -> Result<(), DiffError> {
    let below = LowerNode {
        layer: 0,
        inode: 0,
        kind: NodeKind::Directory,
        attributes: Attributes { atime: None, ctime: None, ..tree.writer.attributes(dir) },
        xattrs: tree.writer.xattrs(dir),
        size: 0,
        data: Vec::new(),
    };
    implied::copy(tree, known, &below)
}
