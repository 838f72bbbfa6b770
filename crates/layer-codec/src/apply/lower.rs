//! The lower layers as apply needs them: for the targets of hard links, and for the attributes of directories that no entry
//! describes. Implemented by `chain`; called by `links` and `implied`.

use crate::DiffError;
use ext4_image::{
    Xattr,
    writer::{Attributes, NodeKind},
};

/// A node of a lower layer.
#[derive(Debug, Clone)]
pub struct LowerNode {
    /// Index of its layer, for [`LowerLayers::read`].
    pub layer: usize,
    /// Inode number.
    pub inode: u32,
    /// Its type.
    pub kind: NodeKind,
    /// Owner, permissions, times; ids as that layer's image has them.
    pub attributes: Attributes,
    /// All xattrs.
    pub xattrs: Vec<Xattr>,
    /// Size of a regular file.
    pub size: u64,
    /// Ranges (offset, length) of a regular file that hold data, ascending; the rest are holes.
    pub data: Vec<(u64, u64)>,
}

/// The merged view of the layers below, nearest first.
pub trait LowerLayers {
    /// The node at `path` (components from the root, symlinks not followed), whiteouts and opaque directories honored.
    ///
    /// # Errors
    /// If a layer cannot be read.
    fn lookup(&mut self, path: &[&[u8]]) -> Result<Option<LowerNode>, DiffError>;

    /// The directory that a directory at `path` takes its attributes from, if no entry describes it: that of the nearest
    /// layer that has the name, unless something hides it. A symlink there is followed inside of its own layer, and if it
    /// leads nowhere the next layer is searched, as containerd does (pkg/archive/tar.go, `mkparent`). Called with parents
    /// before children, depth first.
    ///
    /// # Errors
    /// If a layer cannot be read.
    fn directory(&mut self, path: &[&[u8]]) -> Result<Option<LowerNode>, DiffError> {
        Ok(self.lookup(path)?.filter(|node| matches!(node.kind, NodeKind::Directory)))
    }

    /// Reads data of a regular file; short only at its end.
    ///
    /// # Errors
    /// If a layer cannot be read.
    fn read(&mut self, node: &LowerNode, offset: u64, buf: &mut [u8]) -> Result<usize, DiffError>;
}

/// No lower layers: for a base layer.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoLowers;

impl LowerLayers for NoLowers {
    fn lookup(&mut self, _: &[&[u8]]) -> Result<Option<LowerNode>, DiffError> {
        Ok(None)
    }

    fn read(&mut self, _: &LowerNode, _: u64, _: &mut [u8]) -> Result<usize, DiffError> {
        Ok(0)
    }
}
