//! What an image contains: the merged tree of its layers, without data.
//!
//! ```text
//!   layer 0 ─► LayerTree ─merge─► Tree ◄─merge─ LayerTree ◄─ layer 1 …       the lowest first, one after the other
//!                                  ├─ find(path), children(dir)
//!                                  ├─ layers: entries, bytes, visible bytes
//!                                  └─ shadowed: what a later layer hides, by path
//! ```
//!
//! Names mean what they mean to overlayfs below containerd: `.wh.NAME` deletes NAME of the layers below, `.wh..wh..opq` hides
//! everything below in its directory, a directory on a directory merges, anything else replaces, and names are looked up in
//! their own layer only, where a symbolic link in a parent is followed. A hard link into a lower layer copies its target. A
//! directory without an entry is like that of the layers below. `tests/image/agree.rs` compares the tree with the disk that
//! `image pack` makes of the same layers. Memory: about 300 bytes an entry. Called by users of this crate.

mod content;
mod describe;
mod hide;
mod layer;
mod merge;
mod node;
mod path;

pub use content::copy_file;
pub use node::{Content, Node, NodeId, NodeKind};

use crate::{Image, ImageError, LayerSummary, image::layer_name};
use layer::LayerTree;
use node::ROOT;

/// How a tree is read.
#[derive(Debug, Clone, Copy)]
pub struct TreeOptions {
    /// The most entries of all layers together.
    pub entries: usize,
    /// The most plain bytes of all layers together.
    pub bytes: u64,
    /// Computes a digest for each file.
    pub digests: bool,
}

impl Default for TreeOptions {
    fn default() -> Self {
        Self { entries: 10_000_000, bytes: 1 << 40, digests: false }
    }
}

/// What a layer adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerUse {
    /// Lengths and compression.
    pub summary: LayerSummary,
    /// Entries of its tar.
    pub entries: usize,
    /// Bytes of regular files in its tar.
    pub file_bytes: u64,
    /// Those of them that the merged tree shows.
    pub visible_bytes: u64,
}

/// A file that the merged tree does not show any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shadowed {
    /// Its path: components joined by slashes, without one in front.
    pub path: Vec<u8>,
    /// Its size in bytes.
    pub size: u64,
    /// The layer that has its data.
    pub layer: usize,
    /// The layer that hides it; the same one if its own tar replaces it.
    pub by: usize,
}

/// The merged tree.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    /// By layer, the lowest first.
    pub layers: Vec<LayerUse>,
    /// In the order in which they were hidden.
    pub shadowed: Vec<Shadowed>,
}

impl Tree {
    /// Reads all layers of an image, and verifies them. `progress` is called with the plain bytes read so far.
    ///
    /// # Errors
    /// Those of [`LayerReader`](crate::LayerReader); [`ImageError::Corrupt`] for tars that are none, and names and links that
    /// cannot be; [`ImageError::Limit`].
    pub fn read(
        image: &Image,
        options: &TreeOptions,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, ImageError> {
        let mut tree = Self { nodes: vec![Node::directory(0)], layers: Vec::new(), shadowed: Vec::new() };
        let (mut entries, mut bytes) = (0, 0);
        for (index, layer) in image.layers().iter().enumerate() {
            let what = layer_name(index, layer);
            let reader = image.open_layer(index)?;
            let budget = layer::Budget {
                entries: options.entries.saturating_sub(entries),
                bytes: options.bytes.saturating_sub(bytes),
            };
            let read = LayerTree::read(index, &what, reader, &budget, options.digests, &mut |n| {
                progress(bytes + n);
            })?;
            entries += read.used.entries;
            bytes += read.used.summary.plain_bytes;
            tree.layers.push(read.used);
            tree.merge(read, &what)?;
        }
        tree.describe(image, options)?;
        tree.count_visible();
        Ok(tree)
    }

    /// The root directory.
    pub fn root(&self) -> NodeId {
        ROOT
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0]
    }

    /// The node at `path`, whose components are separated by slashes. Symbolic links in its directories are followed inside
    /// the image; one at its end only if `follow`.
    ///
    /// # Errors
    /// [`ImageError::NotFound`], also for too many links.
    pub fn find(&self, path: &[u8], follow: bool) -> Result<NodeId, ImageError> {
        path::find(&self.nodes, path, follow).ok_or_else(|| ImageError::NotFound {
            what: crate::shown(&String::from_utf8_lossy(path)),
            known: String::new(),
        })
    }

    /// Names and nodes in a directory, sorted by name; none for anything else.
    pub fn children(&self, id: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
        self.nodes[id.0].children.iter().map(|(name, child)| (&**name, *child))
    }

    /// Calls `visit` for each name below `from`, with its path relative to `from`, directories before what they contain.
    pub fn walk(&self, from: NodeId, visit: &mut dyn FnMut(&[u8], NodeId)) {
        let mut todo: Vec<(Vec<u8>, NodeId)> = vec![(Vec::new(), from)];
        while let Some((path, id)) = todo.pop() {
            if !path.is_empty() {
                visit(&path, id);
            }
            let below = self.nodes[id.0].children.iter().rev();
            todo.extend(below.map(|(name, child)| (path::join(&path, name), *child)));
        }
    }

    fn count_visible(&mut self) {
        let mut seen = std::collections::HashSet::new();
        let mut visible = vec![0u64; self.layers.len()];
        let nodes = &self.nodes;
        self.walk(ROOT, &mut |_, id| {
            let node = &nodes[id.0];
            if let Some(content) = node.content
                && seen.insert(id)
                && let Some(sum) = visible.get_mut(content.layer)
            {
                *sum = sum.saturating_add(node.size);
            }
        });
        for (used, bytes) in self.layers.iter_mut().zip(visible) {
            used.visible_bytes = bytes;
        }
    }
}

#[cfg(test)]
mod tests;
