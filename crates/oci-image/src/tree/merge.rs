//! A layer on the layers below.
//!
//! ```text
//!   below     a/{x,y}   b     c/z            layer     a/{y'}  b whiteout   c opaque {q}
//!   merged    a/{x,y'}        c/q            hidden    a/y, b, c/z
//! ```
//!
//! Links into lower layers are decided last, when the tree is otherwise complete. No recursion: a layer may be deep. Called by
//! `tree`.

use super::{
    Tree,
    hide::drop_names,
    layer::LayerTree,
    node::{Node, NodeId, NodeKind, ROOT, Role},
    path,
};
use crate::{ImageError, shown};
use std::collections::HashMap;

/// A hard link whose target lies below.
struct Link {
    directory: NodeId,
    name: Box<[u8]>,
    target: Vec<u8>,
    header: Node,
    path: Vec<u8>,
}

impl Tree {
    /// Merges a layer onto the tree.
    pub(super) fn merge(&mut self, mut layer: LayerTree, what: &str) -> Result<(), ImageError> {
        let by = layer.index;
        self.shadowed.append(&mut layer.replaced);
        let mut made: HashMap<NodeId, NodeId> = HashMap::new();
        let mut links = Vec::new();
        if !layer.nodes[ROOT.0].implied {
            self.nodes[ROOT.0].describe_as(&layer.nodes[ROOT.0]);
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
                    Role::Pending(target) => {
                        let (target, header) = (target.clone(), layer.nodes[id.0].clone());
                        links.push(Link { directory: at, name, target, header, path });
                    }
                    Role::Node if layer.nodes[id.0].kind == NodeKind::Directory => {
                        let below = self.directory(at, &name, &layer.nodes[id.0], &path, by);
                        todo.push((below, id, path));
                    }
                    Role::Node => {
                        self.unlink(at, &name, path, by);
                        let new = *made.entry(id).or_insert_with(|| {
                            self.nodes.push(Node { links: 0, ..layer.nodes[id.0].clone() });
                            NodeId(self.nodes.len() - 1)
                        });
                        self.nodes[new.0].links += 1;
                        self.nodes[at.0].children.insert(name, new);
                    }
                }
            }
        }
        self.link(links, by, what)
    }

    /// The directory that a layer's directory becomes.
    fn directory(&mut self, at: NodeId, name: &[u8], upper: &Node, path: &[u8], by: usize) -> NodeId {
        if let Some(id) = self.nodes[at.0].children.get(name).copied()
            && self.nodes[id.0].kind == NodeKind::Directory
        {
            // What no entry describes shows what lies below.
            if !upper.implied || upper.opaque {
                self.nodes[id.0].describe_as(upper);
            }
            return id;
        }
        self.unlink(at, name, path.to_vec(), by);
        let mut node = Node::directory(by);
        node.describe_as(upper);
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

    /// Copies the targets of links from below.
    fn link(&mut self, links: Vec<Link>, by: usize, what: &str) -> Result<(), ImageError> {
        for link in links {
            let parts: Vec<&[u8]> = link.target.split(|b| *b == b'/').collect();
            let place = self.beneath(&parts).filter(|(_, id)| self.nodes[id.0].kind != NodeKind::Directory);
            let Some((directory, id)) = place else {
                let (path, target) =
                    (String::from_utf8_lossy(&link.path), String::from_utf8_lossy(&link.target));
                let reason = format!("the hard link {} has no target {}", shown(&path), shown(&target));
                return Err(ImageError::corrupt(what, reason));
            };
            let last = parts.last().copied().unwrap_or_default();
            let id = if self.nodes[id.0].layer == by {
                id
            } else {
                let copy = Node { links: 1, ..self.nodes[id.0].clone() };
                self.nodes.push(copy);
                let copy = NodeId(self.nodes.len() - 1);
                // The name below is hidden by its copy, and its data are still shown.
                self.nodes[id.0].links = self.nodes[id.0].links.saturating_sub(1);
                self.nodes[directory.0].children.insert(last.into(), copy);
                copy
            };
            self.unlink(link.directory, &link.name, link.path, by);
            self.nodes[id.0].describe_as(&link.header);
            self.nodes[id.0].links += 1;
            self.nodes[link.directory.0].children.insert(link.name, id);
        }
        Ok(())
    }

    /// The directory and the node at a path, without symbolic links.
    fn beneath(&self, parts: &[&[u8]]) -> Option<(NodeId, NodeId)> {
        let (mut directory, mut at) = (ROOT, ROOT);
        for part in parts {
            directory = at;
            at = *self.nodes[directory.0].children.get(*part)?;
        }
        Some((directory, at))
    }
}
