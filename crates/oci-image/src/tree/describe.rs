//! Directories without an entry that a lower layer describes at another path, because it has a symbolic link on the way.
//!
//! ```text
//!   layer 2   a/x/file          neither a nor a/x has an entry
//!   layer 1   –                 nothing at a/x: the next layer
//!   layer 0   a → b, b/x        its a/x is b/x: what that is like, the a/x of the image is like
//! ```
//!
//! Links are followed inside of the layer that has them, from its root, as containerd does when it makes a missing parent
//! (`mkparent` and `fs.RootPath`). A directory that is not described there either is looked for at that place in the layers
//! below; a whiteout, a file or an opaque directory on the way ends the search, and the directory is 0755, root, time 0. That
//! cannot be seen in the merged tree, which does not know what of it each layer has. So the layers are read again for it, each
//! once, from the top down; only images with such directories pay for that. Called by `tree` when all layers are merged.

use super::{
    Tree, TreeOptions,
    layer::{Budget, LayerTree},
    node::{Node, NodeId, NodeKind, ROOT, Role},
    path::{self, MAX_LINKS},
};
use crate::{Image, ImageError, image::layer_name};

type Path = Vec<Vec<u8>>;

/// A directory whose attributes are looked for.
struct Sought {
    node: NodeId,
    /// Where the next layer may have them.
    path: Path,
    /// Layers from this one up were searched.
    above: usize,
}

/// What a layer has at a path.
enum Found {
    /// A directory, at this path without links; `hidden`: not described there, and nothing below is seen.
    Directory { id: NodeId, path: Path, hidden: bool },
    /// Nothing: the next layer is searched.
    Missing,
    /// Something that hides the layers below.
    Hidden,
}

impl Tree {
    /// Describes the directories that are sought.
    pub(super) fn describe(&mut self, image: &Image, options: &TreeOptions) -> Result<(), ImageError> {
        let mut sought = self.sought();
        let top = sought.iter().map(|one| one.above).max().unwrap_or(0);
        for index in (0..top).rev() {
            if !sought.iter().any(|one| one.above > index) {
                continue;
            }
            let Some(layer) = image.layers().get(index) else { continue };
            // It was within its limits when it was read first.
            let budget = Budget { entries: options.entries, bytes: options.bytes };
            let (what, reader) = (layer_name(index, layer), image.open_layer(index)?);
            let layer = LayerTree::read(index, &what, reader, &budget, false, &mut |_| {})?;
            sought = sought.into_iter().filter_map(|one| self.look(one, index, &layer.nodes)).collect();
        }
        Ok(())
    }

    /// All directories that are sought.
    fn sought(&self) -> Vec<Sought> {
        let mut found = Vec::new();
        self.walk(ROOT, &mut |path, node| {
            if self.nodes[node.0].sought {
                let path = path.split(|b| *b == b'/').map(<[u8]>::to_vec).collect();
                found.push(Sought { node, path, above: self.nodes[node.0].layer });
            }
        });
        found
    }

    /// Looks for a directory in a layer; gives it back if the search goes on.
    fn look(&mut self, one: Sought, index: usize, layer: &[Node]) -> Option<Sought> {
        if one.above <= index {
            return Some(one);
        }
        match search(layer, &one.path) {
            Found::Missing => Some(one),
            Found::Hidden => None,
            Found::Directory { id, path, hidden } => {
                let below = &layer[id.0];
                if below.implied && !below.fresh {
                    return (!hidden).then_some(Sought { path, ..one });
                }
                self.nodes[one.node.0].describe_as(below);
                self.nodes[one.node.0].shine_through();
                None
            }
        }
    }
}

/// Looks a path up name by name; a link in it is followed.
fn search(layer: &[Node], path: &[Vec<u8>]) -> Found {
    let (mut id, mut opaque, mut hidden) = (ROOT, layer[ROOT.0].opaque, false);
    let mut at: Path = Vec::new();
    for name in path {
        let Some(child) = layer[id.0].children.get(&**name).copied() else {
            return if opaque { Found::Hidden } else { Found::Missing };
        };
        at.push(name.clone());
        let node = &layer[child.0];
        match (node.kind, &node.role) {
            (NodeKind::Directory, Role::Node) => {
                hidden = opaque;
                (id, opaque) = (child, opaque || node.opaque);
            }
            (NodeKind::Symlink, Role::Node) => match follow(layer, &at) {
                Found::Directory { id: target, path, .. } => {
                    (id, opaque, hidden, at) = (target, false, false, path);
                }
                other => return other,
            },
            _ => return Found::Hidden,
        }
    }
    Found::Directory { id, path: at, hidden }
}

/// Looks a path up from the root, with all links in it.
fn follow(layer: &[Node], path: &[Vec<u8>]) -> Found {
    let mut todo: Path = path.iter().rev().cloned().collect();
    let mut way: Vec<(NodeId, Vec<u8>)> = Vec::new();
    let mut links = 0;
    while let Some(name) = todo.pop() {
        if name == b".." {
            way.pop();
            continue;
        }
        let at = way.last().map_or(ROOT, |(id, _)| *id);
        let Some(child) = layer[at.0].children.get(&*name).copied() else { return Found::Missing };
        let node = &layer[child.0];
        match (node.kind, &node.role) {
            (NodeKind::Directory, Role::Node) => way.push((child, name)),
            (NodeKind::Symlink, Role::Node) if links < MAX_LINKS => {
                links += 1;
                if node.target.first() == Some(&b'/') {
                    way.clear();
                }
                todo.extend(path::reversed(&node.target));
            }
            _ => return Found::Hidden,
        }
    }
    let id = way.last().map_or(ROOT, |(id, _)| *id);
    Found::Directory { id, path: way.into_iter().map(|(_, name)| name).collect(), hidden: false }
}
