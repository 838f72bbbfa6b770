//! Nodes: what an inode will hold, and what a caller asks for.
//!
//! Called by [`super::HcsshimWriter`] only.

use super::{FILE_MAX, Result, SYMLINK_MAX, attrs::Attrs, refuse, time::Stamp};
use crate::{
    layout::inode::{
        InodeFlags, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK,
        encode_large_device,
    },
    writer::NodeKind,
};
use std::collections::{BTreeMap, HashMap};

/// The contents of a node besides its attributes.
#[derive(Debug, Clone, Default)]
pub(super) enum Content {
    #[default]
    None,
    /// Short target or inline data.
    Bytes(Box<[u8]>),
    /// Adjacent blocks. With more than four extents their leaf is the block after them.
    Run { start: u32, blocks: u32 },
    /// The number in the form of `i_block`.
    Device(u32),
}

/// Nodes of a directory by their names.
#[derive(Debug, Clone, Default)]
pub(super) struct Children(pub(super) HashMap<Box<[u8]>, u32>);

#[derive(Debug, Clone, Default)]
pub(super) struct Node {
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Also the creation time.
    pub(super) mtime: Stamp,
    pub(super) atime: Stamp,
    pub(super) ctime: Stamp,
    pub(super) size: u64,
    pub(super) links: u32,
    /// `INLINE_DATA` and `EXTENTS`.
    pub(super) flags: u32,
    pub(super) xattr_block: u32,
    /// `i_blocks`, in blocks.
    pub(super) blocks: u32,
    pub(super) content: Content,
    pub(super) attrs: Option<Box<Attrs>>,
    pub(super) children: Option<Box<Children>>,
}

impl Node {
    pub(super) fn is_dir(&self) -> bool {
        self.mode & S_IFMT == S_IFDIR
    }

    pub(super) fn has(&self, flag: InodeFlags) -> bool {
        self.flags & flag.bits() != 0
    }
}

/// A node to be made, times packed.
pub(super) struct NewNode {
    pub(super) kind: NodeKind,
    pub(super) size: u64,
    pub(super) permissions: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Stamp,
    pub(super) atime: Stamp,
    pub(super) ctime: Stamp,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl NewNode {
    pub(super) fn empty(kind: NodeKind) -> Self {
        let never = Stamp::default();
        Self {
            kind,
            size: 0,
            permissions: 0,
            uid: 0,
            gid: 0,
            mtime: never,
            atime: never,
            ctime: never,
            xattrs: BTreeMap::new(),
        }
    }
}

/// Type bits of the mode, and what lies in the inode.
pub(super) fn content(new: &NewNode) -> Result<(u16, Content)> {
    let device = |major: u32, minor: u32| {
        if major > 0xfff || minor > 0xf_ffff {
            return Err(refuse(format!("device number {major}:{minor}")));
        }
        let [_, number] = encode_large_device(major, minor);
        Ok(Content::Device(number))
    };
    Ok(match &new.kind {
        NodeKind::Directory => (S_IFDIR, Content::None),
        NodeKind::File if new.size > FILE_MAX => {
            return Err(refuse(format!(
                "a file of {} bytes (beyond {FILE_MAX} hcsshim's tar2ext4 writes wrong extents)",
                new.size
            )));
        }
        NodeKind::File => (S_IFREG, Content::None),
        NodeKind::Symlink { target } if target.is_empty() || target.len() > SYMLINK_MAX => {
            return Err(refuse(format!("a symbolic link's target of {} bytes", target.len())));
        }
        NodeKind::Symlink { target } => (S_IFLNK, Content::Bytes(target.as_slice().into())),
        NodeKind::CharDevice { major, minor } => (S_IFCHR, device(*major, *minor)?),
        NodeKind::BlockDevice { major, minor } => (S_IFBLK, device(*major, *minor)?),
        NodeKind::Fifo => (S_IFIFO, Content::None),
        NodeKind::Socket => (S_IFSOCK, Content::None),
    })
}
