//! Hard links whose target is not known yet, by the placeholders (empty files) that have their names.
//!
//! State only: `links` decides, `tree` tells which names are removed.

use super::context::Context;
use disk_io::WriteAt;
use ext4_image::writer::{ImageWriter, NodeId, NodeKind};
use layer_tar::Entry;
use std::collections::HashMap;

/// A link that waits.
pub(super) struct PendingLink {
    pub(super) dir: NodeId,
    pub(super) name: Vec<u8>,
    pub(super) target: Vec<u8>,
    pub(super) context: Context,
    /// The header, without its names.
    pub(super) header: Entry,
}

/// Pending links, by their placeholders.
#[derive(Default)]
pub(super) struct LinkTable {
    pending: HashMap<NodeId, PendingLink>,
    /// Placeholders in the order of the stream, forgotten ones included.
    order: Vec<NodeId>,
}

impl LinkTable {
    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.pending.len()
    }

    pub(super) fn insert(&mut self, placeholder: NodeId, link: PendingLink) {
        self.pending.insert(placeholder, link);
        self.order.push(placeholder);
    }

    /// Whether a node is the placeholder of a pending link.
    pub(super) fn is_pending(&self, node: NodeId) -> bool {
        self.pending.contains_key(&node)
    }

    pub(super) fn get(&self, placeholder: NodeId) -> Option<&PendingLink> {
        self.pending.get(&placeholder)
    }

    pub(super) fn remove(&mut self, placeholder: NodeId) -> Option<PendingLink> {
        self.pending.remove(&placeholder)
    }

    /// All placeholders in the order of the stream, to be settled.
    pub(super) fn take_order(&mut self) -> Vec<NodeId> {
        std::mem::take(&mut self.order)
    }

    /// Forgets the placeholders at and below a node that is about to be removed.
    pub(super) fn forget_below<W: WriteAt>(&mut self, writer: &ImageWriter<W>, node: NodeId) {
        let mut nodes = vec![node];
        while let Some(node) = nodes.pop() {
            self.pending.remove(&node);
            if matches!(writer.kind(node), NodeKind::Directory) {
                nodes.extend(writer.children(node).into_iter().map(|(_, child)| child));
            }
        }
    }
}
