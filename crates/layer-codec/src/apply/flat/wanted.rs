//! Hard links whose target is in a lower layer: nodes that wait, with the headers of their links, until it is read.
//!
//! ```text
//!   layer 2   link a ─► b          the node of a, which b names too, waits
//!   layer 1   (nothing at b)       it goes on waiting            a whiteout of b, an opaque directory: an error
//!   layer 0   b                    it becomes what b is, then the headers of its links apply in their order
//! ```
//!
//! A lower layer may have such a link at the place of the target: then the upper node waits for the same target, and the
//! lower link's headers come before its own, as if the lower copy had been copied once more. Two links of one layer to two
//! names of one file are two names of one copy. The target's path is taken by its letters, without symlinks, in each layer.
//! A link that is hidden itself waits too: where its target is missing, the layer is wrong. Called by the parent module.

use super::{
    super::{
        LowerNode,
        context::Context,
        links::{LaterLink, as_copied},
        tree::LayerTree,
    },
    read::{LayerData, Needs},
};
use crate::DiffError;
use disk_io::WriteAt;
use ext4_image::writer::{Attributes, ImageWriter, NodeId, NodeKind};
use layer_tar::Entry;
use std::collections::HashMap;

/// A target that is waited for.
#[derive(Debug)]
struct Waiting {
    /// `None` if no name of it is visible.
    node: Option<NodeId>,
    target: Vec<Vec<u8>>,
    headers: Vec<(Context, Entry)>,
    /// Number of the layer whose links these are, counted from the first that was read.
    layer: usize,
}

/// All targets that are waited for, upper layers first.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    waiting: Vec<Waiting>,
    layers: usize,
    /// For [`Self::at`]: the first that waits for a path.
    by_path: HashMap<Vec<u8>, NodeId>,
}

/// What a layer has at a path.
enum Found {
    Node(NodeId),
    Hidden,
    Below,
}

impl Wanted {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The node that waits for a file at this path.
    pub(super) fn at(&self, path: &[&[u8]]) -> Option<NodeId> {
        self.by_path.get(&path.join(&b'/')).copied()
    }

    /// Looks for all targets in a layer whose own links are `later`.
    pub(super) fn find<W: WriteAt>(
        &mut self,
        tree: &mut LayerTree<'_, W>,
        later: &[LaterLink],
        data: &mut LayerData,
        needs: &mut Needs,
    ) -> Result<(), DiffError> {
        let own: HashMap<NodeId, usize> = later.iter().enumerate().map(|(at, l)| (l.node, at)).collect();
        // Copies that the links of one layer made of one file: (layer of the links, file).
        let mut copies: HashMap<(usize, NodeId), NodeId> = HashMap::new();
        let mut same = HashMap::new();
        let mut still = Vec::new();
        for mut waiting in std::mem::take(&mut self.waiting) {
            let file = match search(tree, &waiting.target) {
                Found::Below => {
                    still.push(waiting);
                    continue;
                }
                Found::Hidden => return Err(dangling(&waiting)),
                Found::Node(file) => file,
            };
            if let Some(lower) = own.get(&file).and_then(|at| later.get(*at)) {
                waiting.headers.splice(..0, lower.headers.iter().cloned());
                waiting.target.clone_from(&lower.target);
                still.push(waiting);
                continue;
            }
            if tree.is_directory(file) {
                let (context, target) = (context(&waiting), shown(&waiting));
                return Err(
                    context.refuse(format!("hard link to the directory \"{target}\" of a lower layer"))
                );
            }
            let Some(node) = waiting.node else { continue };
            if let Some(copy) = copies.get(&(waiting.layer, file)) {
                same.insert(node, *copy);
                apply_headers(tree, *copy, waiting.headers)?;
                continue;
            }
            copies.insert((waiting.layer, file), node);
            become_copy(tree, node, file, data, needs)?;
            apply_headers(tree, node, waiting.headers)?;
        }
        if !same.is_empty() {
            tree.writer.unite(&same)?;
        }
        self.waiting = still;
        Ok(())
    }

    /// Adds the links of a layer that was merged.
    pub(super) fn keep<W: WriteAt>(&mut self, writer: &ImageWriter<W>, later: Vec<LaterLink>) {
        let layer = self.layers;
        self.layers += 1;
        self.waiting.extend(later.into_iter().map(|link| Waiting {
            node: (writer.link_count(link.node) > 0).then_some(link.node),
            target: link.target,
            headers: link.headers,
            layer,
        }));
        self.by_path.clear();
        for waiting in self.waiting.iter().rev() {
            if let Some(node) = waiting.node {
                self.by_path.insert(waiting.target.join(&b'/'), node);
            }
        }
    }

    /// All layers were read.
    ///
    /// # Errors
    /// If a target was not found.
    pub(super) fn check_found(&self) -> Result<(), DiffError> {
        self.waiting.first().map_or(Ok(()), |waiting| Err(dangling(waiting)))
    }
}

/// Looks a path up in one layer, as in the chain of images that apply has.
fn search<W: WriteAt>(tree: &LayerTree<'_, W>, path: &[Vec<u8>]) -> Found {
    let mut node = tree.root;
    let mut opaque = tree.is_opaque(node);
    for name in path {
        if !tree.is_directory(node) {
            return Found::Hidden;
        }
        let Some(child) = tree.writer.lookup(node, name) else {
            return if opaque { Found::Hidden } else { Found::Below };
        };
        if tree.is_whiteout(child) {
            return Found::Hidden;
        }
        opaque = opaque || tree.is_directory(child) && tree.is_opaque(child);
        node = child;
    }
    Found::Node(node)
}

/// Makes a waiting node a copy of `file`.
fn become_copy<W: WriteAt>(
    tree: &mut LayerTree<'_, W>,
    node: NodeId,
    file: NodeId,
    data: &mut LayerData,
    needs: &mut Needs,
) -> Result<(), DiffError> {
    let kind = tree.writer.kind(file);
    let below = LowerNode {
        layer: 0,
        inode: 0,
        kind: kind.clone(),
        attributes: Attributes { atime: None, ctime: None, ..tree.writer.attributes(file) },
        xattrs: tree.writer.xattrs(file),
        size: 0,
        data: Vec::new(),
    };
    let (attributes, xattrs) = as_copied(&below);
    if kind == NodeKind::File {
        match data.offset(file) {
            Some(_) if data.has_early(node, file) => {}
            Some(offset) => {
                empty(tree, node, data)?;
                needs.add(offset, node);
            }
            None => empty(tree, node, data)?,
        }
    } else {
        empty(tree, node, data)?;
        tree.writer.become_kind(node, &kind)?;
    }
    tree.writer.set_attributes(node, attributes);
    tree.writer.set_xattrs(node, xattrs)?;
    Ok(())
}

/// Drops the data of a waiting node: they are of an entry that was replaced.
fn empty<W: WriteAt>(
    tree: &mut LayerTree<'_, W>,
    node: NodeId,
    data: &mut LayerData,
) -> Result<(), DiffError> {
    data.forget(node);
    tree.writer.begin_file(node, 0)?;
    Ok(tree.writer.end_file()?)
}

fn apply_headers<W: WriteAt>(
    tree: &mut LayerTree<'_, W>,
    node: NodeId,
    headers: Vec<(Context, Entry)>,
) -> Result<(), DiffError> {
    for (context, mut header) in headers {
        let own = std::mem::replace(&mut tree.context, context);
        tree.update_linked(node, &mut header)?;
        tree.context = own;
    }
    Ok(())
}

fn context(waiting: &Waiting) -> Context {
    waiting.headers.last().map(|(context, _)| context.clone()).unwrap_or_default()
}

fn shown(waiting: &Waiting) -> String {
    waiting.target.join(&b'/').escape_ascii().to_string()
}

fn dangling(waiting: &Waiting) -> DiffError {
    let target = shown(waiting);
    context(waiting)
        .refuse(format!("hard link to \"{target}\", which is neither in this layer nor in a lower one"))
}
