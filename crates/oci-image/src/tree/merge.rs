//! A layer on the layers below.
//!
//! ```text
//!   below     a/{x,y}   b     c/z            layer     a/{y'}  b whiteout   c opaque {q}
//!   merged    a/{x,y'}        c/q            hidden    a/y, b, c/z
//! ```
//!
//! A link into a lower layer becomes a copy of its target, with both names, as overlayfs copies up: targets are looked up
//! before the layer joins the tree. Whether a directory without an entry is described by a layer below that has a symbolic link
//! on the way to it is decided at the end ([`describe`](super::describe)). No recursion: a layer may be deep. Called by `tree`.

use super::{
    Tree,
    hide::drop_names,
    layer::LayerTree,
    node::{Node, NodeId, NodeKind, ROOT, Role},
    path,
};
use crate::{ImageError, shown};
use std::collections::HashMap;

/// What the nodes of a layer become in the tree.
#[derive(Default)]
struct Made {
    nodes: HashMap<NodeId, NodeId>,
    /// Copies of files of lower layers, by these.
    copied: HashMap<NodeId, NodeId>,
}

impl Tree {
    /// Merges a layer onto the tree.
    pub(super) fn merge(&mut self, mut layer: LayerTree, what: &str) -> Result<(), ImageError> {
        let by = layer.index;
        self.shadowed.append(&mut layer.replaced);
        let mut made = self.copies(&layer, what)?;
        // The data of a file that was copied are still shown when its own names are hidden.
        for file in made.copied.keys() {
            self.nodes[file.0].links += 1;
        }
        let root = &layer.nodes[ROOT.0];
        if root.opaque || !root.implied {
            self.nodes[ROOT.0].describe_as(root);
        }
        let mut todo = vec![(ROOT, ROOT, Vec::new())];
        while let Some((at, upper, path)) = todo.pop() {
            if layer.nodes[upper.0].opaque {
                self.clear(at, &path, by);
            }
            for (name, id) in std::mem::take(&mut layer.nodes[upper.0].children) {
                let path = path::join(&path, &name);
                match &layer.nodes[id.0].role {
                    Role::Whiteout => self.unlink(at, &name, path, by),
                    Role::Node if layer.nodes[id.0].kind == NodeKind::Directory => {
                        let below = self.directory(at, &name, &layer.nodes[id.0], &path, by);
                        todo.push((below, id, path));
                    }
                    Role::Node | Role::Pending { .. } => {
                        self.unlink(at, &name, path, by);
                        let new = *made.nodes.entry(id).or_insert_with(|| {
                            self.nodes.push(Node { links: 0, ..layer.nodes[id.0].clone() });
                            NodeId(self.nodes.len() - 1)
                        });
                        self.nodes[new.0].links += 1;
                        self.nodes[at.0].children.insert(name, new);
                    }
                }
            }
        }
        for file in made.copied.keys() {
            self.nodes[file.0].links -= 1;
        }
        Ok(())
    }

    /// Copies the targets of a layer's links from the layers below. Links to several names of a file share its copy.
    fn copies(&mut self, layer: &LayerTree, what: &str) -> Result<Made, ImageError> {
        let mut links: Vec<(usize, NodeId, &[u8])> = Vec::new();
        for (at, node) in layer.nodes.iter().enumerate() {
            if let Role::Pending { target, order } = &node.role
                && node.links > 0
            {
                links.push((*order, NodeId(at), target));
            }
        }
        links.sort_unstable();
        let mut made = Made::default();
        for (_, id, target) in links {
            let place = self.beneath(target).filter(|id| self.nodes[id.0].kind != NodeKind::Directory);
            let Some(file) = place else {
                let reason = format!("a hard link has no target {}", shown(&String::from_utf8_lossy(target)));
                return Err(ImageError::corrupt(what, reason));
            };
            let copy = *made.copied.entry(file).or_insert_with(|| {
                self.nodes.push(Node { links: 0, ..self.nodes[file.0].clone() });
                NodeId(self.nodes.len() - 1)
            });
            self.nodes[copy.0].describe_link(&layer.nodes[id.0]);
            made.nodes.insert(id, copy);
        }
        Ok(made)
    }

    /// The node at a path, without symbolic links.
    fn beneath(&self, path: &[u8]) -> Option<NodeId> {
        let mut at = ROOT;
        for part in path.split(|b| *b == b'/') {
            at = *self.nodes[at.0].children.get(part)?;
        }
        Some(at)
    }

    /// The directory that a layer's directory becomes.
    fn directory(&mut self, at: NodeId, name: &[u8], upper: &Node, path: &[u8], by: usize) -> NodeId {
        let below = self.nodes[at.0].children.get(name).copied();
        let described = !upper.implied || upper.fresh;
        if let Some(id) = below
            && self.nodes[id.0].kind == NodeKind::Directory
        {
            let node = &mut self.nodes[id.0];
            if described {
                node.describe_as(upper);
                node.sought = false;
            } else {
                // What no entry describes shows what lies below.
                node.shine_through();
            }
            node.linked &= !upper.opaque;
            return id;
        }
        let over_link = below.is_some_and(|id| self.nodes[id.0].kind == NodeKind::Symlink);
        let linked = over_link || self.nodes[at.0].linked;
        self.unlink(at, name, path.to_vec(), by);
        let mut node = Node::directory(by);
        node.describe_as(upper);
        node.linked = linked && !upper.opaque;
        node.sought = linked && !described;
        self.nodes.push(node);
        let id = NodeId(self.nodes.len() - 1);
        self.nodes[at.0].children.insert(name.into(), id);
        id
    }

    /// Hides a name.
    fn unlink(&mut self, at: NodeId, name: &[u8], path: Vec<u8>, by: usize) {
        if let Some(id) = self.nodes[at.0].children.remove(name) {
            drop_names(&mut self.nodes, id, path, by, &mut self.shadowed);
        }
    }

    /// Hides everything in a directory.
    fn clear(&mut self, at: NodeId, path: &[u8], by: usize) {
        for (name, id) in std::mem::take(&mut self.nodes[at.0].children) {
            drop_names(&mut self.nodes, id, path::join(path, &name), by, &mut self.shadowed);
        }
    }
}
