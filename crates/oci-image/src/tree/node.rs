//! A node of a tree: what an inode is to a file system. Several names may lead to one.

use crate::Digest;
use layer_tar::{Entry, EntryKind, Time, Xattr};
use std::collections::BTreeMap;

/// Number of a node in its tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(super) usize);

/// The root directory of every tree.
pub(super) const ROOT: NodeId = NodeId(0);

/// Overlayfs' own attributes, which a tar must not set.
const OVERLAY_PREFIX: &[u8] = b"trusted.overlay.";
/// Attributes that a directory without an entry does not take from the one below it, as in containerd's `mkparent`.
const TRUSTED_PREFIX: &[u8] = b"trusted.";
/// What chown(2) removes.
const CAPABILITY: &[u8] = b"security.capability";
/// Permissions of symbolic links.
const LINK_MODE: u16 = 0o777;

/// The type of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodeKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
}

/// Where the data of a regular file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Content {
    /// The layer.
    pub layer: usize,
    /// Offset of the entry's header in the layer's plain tar, in bytes.
    pub offset: u64,
}

/// What a name in a layer stands for, beside a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Role {
    /// The node itself.
    Node,
    /// The name is deleted from the layers below.
    Whiteout,
    /// A hard link to a path that the layer does not have.
    Pending {
        /// Its components, joined by slashes.
        target: Vec<u8>,
        /// Its place among those of the layer: in this order their headers are applied.
        order: usize,
    },
}

/// A node.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its type.
    pub kind: NodeKind,
    /// Permissions: the bits of 07777.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length of a regular file in bytes, holes included; else 0.
    pub size: u64,
    /// Time of the last change of its data.
    pub mtime: Time,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Target of a symbolic link.
    pub target: Vec<u8>,
    /// Extended attributes.
    pub xattrs: Vec<Xattr>,
    /// The layer that describes it.
    pub layer: usize,
    /// Where its data are, for a regular file.
    pub content: Option<Content>,
    /// Digest of its data, if that was requested.
    pub digest: Option<Digest>,
    /// Number of names.
    pub links: u32,
    /// A directory that no entry describes.
    pub implied: bool,
    /// In a layer: hides what the layers below have in this directory.
    pub(super) opaque: bool,
    /// In a layer: a directory without an entry where the layer has a whiteout, so that the layers below do not describe it.
    pub(super) fresh: bool,
    /// In the merged tree: some layer has a symbolic link at the path of this directory, or at one on the way to it.
    pub(super) linked: bool,
    /// In the merged tree: layers below that of this directory may describe it, at another path than its own.
    pub(super) sought: bool,
    pub(super) role: Role,
    pub(super) children: BTreeMap<Box<[u8]>, NodeId>,
}

impl Node {
    /// A directory that no entry describes: 0755, root, time 0.
    pub(super) fn directory(layer: usize) -> Self {
        Self {
            kind: NodeKind::Directory,
            mode: 0o755,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: Time::default(),
            device: (0, 0),
            target: Vec::new(),
            xattrs: Vec::new(),
            layer,
            content: None,
            digest: None,
            links: 1,
            implied: true,
            opaque: false,
            fresh: false,
            linked: false,
            sought: false,
            role: Role::Node,
            children: BTreeMap::new(),
        }
    }

    /// A whiteout.
    pub(super) fn whiteout(layer: usize) -> Self {
        Self { role: Role::Whiteout, kind: NodeKind::CharDevice, ..Self::directory(layer) }
    }

    /// The node that an entry describes. A hard link gives a file without data.
    pub(super) fn of(entry: &Entry, layer: usize) -> Self {
        let kind = match entry.kind {
            EntryKind::File | EntryKind::HardLink => NodeKind::File,
            EntryKind::Directory => NodeKind::Directory,
            EntryKind::Symlink => NodeKind::Symlink,
            EntryKind::CharDevice => NodeKind::CharDevice,
            EntryKind::BlockDevice => NodeKind::BlockDevice,
            EntryKind::Fifo => NodeKind::Fifo,
        };
        let is_device = matches!(kind, NodeKind::CharDevice | NodeKind::BlockDevice);
        let mut node = Self::directory(layer);
        node.kind = kind;
        node.implied = false;
        node.size = if entry.kind == EntryKind::File { entry.size } else { 0 };
        node.device = if is_device { (entry.major, entry.minor) } else { (0, 0) };
        if kind == NodeKind::Symlink {
            node.target.clone_from(&entry.link);
        }
        if entry.kind == EntryKind::File {
            node.content = Some(Content { layer, offset: entry.offset });
        }
        node.describe(entry);
        node
    }

    /// Takes the attributes of an entry.
    pub(super) fn describe(&mut self, entry: &Entry) {
        self.mode = if self.kind == NodeKind::Symlink { LINK_MODE } else { entry.mode };
        (self.uid, self.gid, self.mtime) = (entry.uid, entry.gid, entry.mtime);
        self.xattrs = entry.xattrs.iter().filter(|x| !x.name.starts_with(OVERLAY_PREFIX)).cloned().collect();
        self.implied = false;
    }

    /// Takes the attributes of another node.
    pub(super) fn describe_as(&mut self, other: &Self) {
        (self.mode, self.uid, self.gid, self.mtime) = (other.mode, other.uid, other.gid, other.mtime);
        self.xattrs.clone_from(&other.xattrs);
        self.layer = other.layer;
        self.implied = other.implied;
    }

    /// Applies the header of a further name, as by chown, setxattr, chmod and utimes: the last header holds for all names.
    pub(super) fn describe_link(&mut self, header: &Self) {
        if self.kind != NodeKind::Symlink {
            self.mode = header.mode;
        }
        (self.uid, self.gid, self.mtime) = (header.uid, header.gid, header.mtime);
        self.xattrs.retain(|x| x.name != CAPABILITY);
        for xattr in &header.xattrs {
            self.xattrs.retain(|known| known.name != xattr.name);
            self.xattrs.push(xattr.clone());
        }
        self.layer = header.layer;
    }

    /// Drops what a directory without an entry does not take from the one below it.
    pub(super) fn shine_through(&mut self) {
        self.xattrs.retain(|x| !x.name.starts_with(TRUSTED_PREFIX));
    }
}
