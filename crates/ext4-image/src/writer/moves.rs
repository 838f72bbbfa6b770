//! Changes of the tree that put one tree together from several: names move, nodes take over what others hold.
//!
//! ```text
//!   ".layer"/usr/bin ──carry──► usr/bin          the node keeps its number, its blocks and its further names
//!   placeholder ──become──► symlink              a node whose kind was not known when it got its name
//!   a, b ──unite──► b                            names of two nodes that turn out to be one
//! ```
//!
//! Called by whoever merges layers; a single layer needs none of this.

use super::{ImageWriter, NodeId, NodeKind, Result, tree::Payload};
use crate::{
    Ext4Error, Place,
    layout::{
        EXT4_LINK_MAX,
        inode::{S_IFBLK, S_IFCHR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK},
    },
};
use disk_io::WriteAt;
use std::collections::HashMap;

impl<W: WriteAt> ImageWriter<W> {
    /// Moves the name `name` of `from` to the end of `to`, with everything below it. `to` must not lie below it.
    ///
    /// # Errors
    /// `Usage` if there is no such name, or `to` has it already or is no directory.
    pub fn carry(&mut self, from: NodeId, name: &[u8], to: NodeId) -> Result<()> {
        self.tree.carry(from, name, to)
    }

    /// Lets new nodes have the numbers of all nodes that were removed so far, so that an image does not grow by what is
    /// not in it. Every [`NodeId`] of a removed node is invalid from then on.
    pub fn reuse_removed(&mut self) {
        self.tree.reuse_removed();
    }

    /// Makes an empty file a node of another kind; attributes and names stay. A directory cannot be made so.
    ///
    /// # Errors
    /// As [`Self::create`]; `Usage` for a node that is no empty file, and for [`NodeKind::Directory`].
    pub fn become_kind(&mut self, node: NodeId, kind: &NodeKind) -> Result<()> {
        let payload = self.tree.nodes.get(node.0 as usize).map(|n| n.payload);
        if !matches!(payload, Some(Payload::File { size: 0, .. })) {
            return Err(Ext4Error::usage("another kind for what is no empty file"));
        }
        let (file_type, payload) = match kind {
            NodeKind::Directory => return Err(Ext4Error::usage("a file cannot become a directory")),
            NodeKind::File => return Ok(()),
            NodeKind::Symlink { target } => (S_IFLNK, self.symlink(target)?),
            NodeKind::CharDevice { major, minor } => (S_IFCHR, Self::device(*major, *minor)?),
            NodeKind::BlockDevice { major, minor } => (S_IFBLK, Self::device(*major, *minor)?),
            NodeKind::Fifo => (S_IFIFO, Payload::Plain),
            NodeKind::Socket => (S_IFSOCK, Payload::Plain),
        };
        let node = &mut self.tree.nodes[node.0 as usize];
        debug_assert_eq!(node.mode & S_IFMT, S_IFREG, "it was a file");
        node.mode = node.mode & !S_IFMT | file_type;
        node.payload = payload;
        Ok(())
    }

    /// Makes all names of the first node of each pair names of the second; the first no longer exists.
    ///
    /// # Errors
    /// `Usage` for a directory; `Unsupported` beyond 65,000 names (`EMLINK`).
    pub fn unite(&mut self, same: &HashMap<NodeId, NodeId>) -> Result<()> {
        for (from, to) in same {
            let links = |node: NodeId| self.tree.nodes.get(node.0 as usize).map_or(0, |n| n.links);
            if self.is_directory(*from) || self.is_directory(*to) || from == to {
                return Err(Ext4Error::usage("a directory, or one node, cannot be united"));
            }
            if links(*from) + links(*to) > EXT4_LINK_MAX {
                let place = Place::inode(super::inodes::ino_of(to.0));
                return Err(Ext4Error::unsupported(
                    format!("more than {EXT4_LINK_MAX} names of a file"),
                    place,
                ));
            }
        }
        for payload in self.tree.unite(same) {
            if let Payload::File { content, .. } = payload {
                self.release(content);
            }
        }
        Ok(())
    }
}
