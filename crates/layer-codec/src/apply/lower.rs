//! The lower layers as apply needs them: for the targets of hard links. Implemented by `chain`; called by `links`.

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
