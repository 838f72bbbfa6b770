//! The tree that is being built, without copies: every node and every name once.
//!
//! ```text
//!   nodes ──► NodeView { node, shape, xattrs }     in order of creation, the root first, removed ones left out
//!   names ──► (name, node)                         of one directory, in order of creation
//! ```
//!
//! Cost: linear in the nodes that were ever created, and in the names of the directory. Called by whoever measures a tree
//! or looks for directories in it before `finish`.

use super::{ImageWriter, NodeId, Payload};
use crate::Xattr;
use disk_io::WriteAt;

/// What a node is, as far as its size goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Its size as it was begun; bytes.
        size: u64,
    },
    /// A symbolic link.
    Symlink {
        /// Length of its target; bytes.
        len: u64,
    },
    /// A device, pipe or socket.
    Other,
}

/// A node of the tree.
#[derive(Debug, Clone, Copy)]
pub struct NodeView<'a> {
    /// The node.
    pub node: NodeId,
    /// What it is.
    pub shape: Shape,
    /// Its extended attributes, sorted by name.
    pub xattrs: &'a [Xattr],
}

impl<W: WriteAt> ImageWriter<W> {
    /// All nodes that have a name, and the root, in order of creation.
    pub fn nodes(&self) -> impl Iterator<Item = NodeView<'_>> {
        self.tree.nodes.iter().enumerate().filter_map(|(id, node)| {
            let shape = match node.payload {
                Payload::Gone => return None,
                Payload::File { size, .. } => Shape::File { size },
                Payload::Symlink { len, .. } => Shape::Symlink { len: u64::from(len) },
                _ if node.is_dir() => Shape::Directory,
                _ => Shape::Other,
            };
            Some(NodeView { node: NodeId(id as u32), shape, xattrs: self.sets.get(node.xattrs) })
        })
    }

    /// Whether a node is a directory.
    pub fn is_directory(&self, node: NodeId) -> bool {
        self.tree.nodes.get(node.0 as usize).is_some_and(|node| matches!(node.payload, Payload::Dir { .. }))
    }

    /// Names and nodes of a directory in order of creation; none for what is no directory.
    pub fn names(&self, dir: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
        self.tree.children(dir.0).map(|(name, node)| (name, NodeId(node)))
    }
}
