//! A second image writer: its images equal those of hcsshim's `tar2ext4` byte for byte.
//!
//! Hosts that attest their layers keep the dm-verity root hash of what that tool makes of a tar; only the same bytes
//! give the same hash. So byte compatibility dictates every choice here; [`crate::writer`] is better in all else.
//!
//! ```text
//!   block 0      1 … gd       1+gd …                                              bitmaps         end
//!   ├ super ─────┼ descriptors┼ file data, xattr blocks, extent leaves, symlink ──┼ per group ────┼ zeros up to
//!   │            │ (32 bytes) │ targets in call order │ directories │ inode table │ blocks,inodes │ (groups−1)·32768+1
//! ```
//!
//! Invariants:
//! * 4096-byte blocks, 32768 to a group, 256-byte inodes, no checksums, no journal, no hash trees, no UUID; inode 11 is
//!   `lost+found`, the others are numbered as they come.
//! * What goes out is written once and in order, save blocks of xattrs of an entry that comes twice, and block 0 to
//!   `gd` at the end.
//! * What that tool refuses is refused here; what it writes wrongly (a date that another one is read back from, a file
//!   with wrong extents, …) is refused as [`Ext4Error::Unsupported`], never written. `docs/hcsshim-profile.md` has the
//!   list.
//!
//! Does not handle tar and whiteouts: that half of the tool is `layer_codec::apply::hcsshim`, the only caller. Memory: about
//! 250 bytes a node with its name, and the inline data.

mod attrs;
mod dirs;
mod extents;
mod finish;
mod node;
mod out;
#[cfg(test)]
mod tests;
mod time;

use super::{
    Ext4Error, Place, Xattr,
    layout::{
        EXT4_GOOD_OLD_FIRST_INO, EXT4_LINK_MAX, EXT4_NAME_LEN, EXT4_ROOT_INO,
        extent::looks_like_root,
        inode::{I_BLOCK_SIZE, InodeFlags, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG},
    },
    writer::{Attributes, NodeId, NodeKind, Placed, Result},
};
use attrs::Attrs;
use disk_io::WriteAt;
use node::{Content, NewNode, Node, content};
use out::Out;
use time::Stamp;

/// Size of a block.
pub const BLOCK: u64 = 4096;
/// The maximum disk size that the tool takes if none is given.
pub const DEFAULT_MAX_DISK: u64 = 16 << 30;
/// The maximum disk size that LCOW gives.
pub const LCOW_MAX_DISK: u64 = 128 << 30;
/// The largest maximum disk size.
pub const MAX_MAX_DISK: u64 = 16 << 40;

const GROUP_BLOCKS: u32 = 32_768;
const INODE_SIZE: usize = 256;
/// Bytes of an inode up to its xattrs.
const INODE_USED: usize = 152;
/// Bytes of an inode for xattrs.
const INODE_EXTRA: usize = INODE_SIZE - INODE_USED;
/// Longest target of a symbolic link that lies in the inode.
const FAST_SYMLINK_MAX: usize = 59;
/// Longest target of a symbolic link that Linux reads from such a block.
const SYMLINK_MAX: usize = BLOCK as usize - 1;
/// Largest file that lies in its inode: `i_block`, and what an xattr `system.data` alone can take.
const INLINE_MAX: u64 = (I_BLOCK_SIZE + INODE_EXTRA - 8 - 20) as u64;
/// Largest file: with one extent more the tool needs a second leaf, and fills it wrongly.
const FILE_MAX: u64 = (extents::LEAF_MAX as u64 - 1) * (GROUP_BLOCKS as u64) * BLOCK;

/// How an image is laid out, as far as the tool leaves a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HcsshimOptions {
    /// The image may not grow beyond this; the room for its descriptors is reserved in any image. At most
    /// [`MAX_MAX_DISK`]; rounded up to whole blocks.
    pub max_disk_bytes: u64,
    /// The image may not grow beyond this either; the layout does not depend on it.
    pub max_image_bytes: u64,
    /// Files of up to 136 bytes lie in their inodes.
    pub inline_data: bool,
}

impl HcsshimOptions {
    /// Data go into blocks, and the maximum disk size is the only limit.
    pub fn new(max_disk_bytes: u64) -> Self {
        Self { max_disk_bytes, max_image_bytes: u64::MAX, inline_data: false }
    }
}

impl Default for HcsshimOptions {
    fn default() -> Self {
        Self::new(DEFAULT_MAX_DISK)
    }
}

/// The file being written.
#[derive(Debug)]
struct OpenFile {
    node: u32,
    size: u64,
    written: u64,
    inline: Vec<u8>,
}

/// Builds one image on `W`.
#[derive(Debug)]
pub struct HcsshimWriter<W> {
    inline_data: bool,
    /// Blocks reserved for descriptors.
    descriptor_blocks: u32,
    out: Out<W>,
    /// The root, then inodes from 11.
    nodes: Vec<Node>,
    open: Option<OpenFile>,
}

/// What the tool would not do, or not do right.
fn refuse(what: impl Into<String>) -> Ext4Error {
    Ext4Error::unsupported(what, Place::default())
}

fn ino_of(node: u32) -> u32 {
    if node == 0 { EXT4_ROOT_INO } else { EXT4_GOOD_OLD_FIRST_INO - 1 + node }
}

impl<W: WriteAt> HcsshimWriter<W> {
    /// Starts an image with a root (0755, owner 0, time 0) and `lost+found`. `out` must be empty or read as zeros.
    ///
    /// # Errors
    /// `Usage` for a maximum disk size of 0 or beyond [`MAX_MAX_DISK`].
    pub fn new(out: W, options: HcsshimOptions) -> Result<Self> {
        let max = options.max_disk_bytes;
        if max == 0 || max > MAX_MAX_DISK {
            return Err(Ext4Error::usage(format!(
                "a maximum disk size of {max} bytes (1 to {MAX_MAX_DISK})"
            )));
        }
        let max = max.next_multiple_of(BLOCK);
        let groups = (max / BLOCK).div_ceil(u64::from(GROUP_BLOCKS));
        let descriptor_blocks = groups.div_ceil(finish::DESCRIPTORS_PER_BLOCK) as u32;
        let mut root = Node { mode: S_IFDIR | 0o755, links: 2, ..Node::default() };
        root.children = Some(Box::default());
        let mut writer = Self {
            inline_data: options.inline_data,
            descriptor_blocks,
            out: Out::new(out, u64::from(1 + descriptor_blocks) * BLOCK, max.min(options.max_image_bytes)),
            nodes: vec![root],
            open: None,
        };
        let lost_found = NewNode { permissions: 0o700, ..NewNode::empty(NodeKind::Directory) };
        writer.place(writer.root(), b"lost+found", lost_found)?;
        Ok(writer)
    }

    /// The root directory.
    pub fn root(&self) -> NodeId {
        NodeId(0)
    }

    /// The node called `name` in `dir`; `None` if there is none or `dir` is no directory.
    pub fn lookup(&self, dir: NodeId, name: &[u8]) -> Option<NodeId> {
        self.node(dir).children.as_ref()?.0.get(name).copied().map(NodeId)
    }

    /// Whether a node is a directory.
    pub fn is_directory(&self, node: NodeId) -> bool {
        self.node(node).is_dir()
    }

    /// Makes a node or, where the tool does so, turns the one of that name into it. An empty name in the root is the
    /// root. Data of a file (`size` bytes) follow by [`Self::begin_file`]. A time that is not given is 0.
    ///
    /// # Errors
    /// `Unsupported` for all that the tool refuses or would write wrongly; `Full`; `Io`.
    pub fn create(
        &mut self,
        dir: NodeId,
        name: &[u8],
        kind: NodeKind,
        size: u64,
        attributes: &Attributes,
        xattrs: Vec<Xattr>,
    ) -> Result<NodeId> {
        let time = |t| Stamp::pack(t).ok_or_else(|| time::refused(t));
        let optional = |t: Option<_>| t.map_or(Ok(Stamp::default()), time);
        let new = NewNode {
            kind,
            size,
            permissions: attributes.permissions & 0o7777,
            uid: attributes.uid,
            gid: attributes.gid,
            mtime: time(attributes.mtime)?,
            atime: optional(attributes.atime)?,
            ctime: optional(attributes.ctime)?,
            xattrs: xattrs.into_iter().map(|x| (x.name, x.value)).collect(),
        };
        self.place(dir, name, new)
    }

    /// Makes a directory that no entry describes yet: all but xattrs is its parent's.
    pub fn create_parent(&mut self, dir: NodeId, name: &[u8]) -> Result<NodeId> {
        let new = self.copy_of(dir)?;
        self.place(dir, name, new)
    }

    /// Makes a whiteout: device 0/0 with mode and times 0.
    pub fn create_whiteout(&mut self, dir: NodeId, name: &[u8]) -> Result<NodeId> {
        self.place(dir, name, NewNode::empty(NodeKind::CharDevice { major: 0, minor: 0 }))
    }

    /// Adds an xattr to a directory, whose name is `name` in `parent`.
    pub fn add_xattr(&mut self, parent: NodeId, name: &[u8], node: NodeId, xattr: Xattr) -> Result<()> {
        let mut new = self.copy_of(node)?;
        if let Some(attrs) = &self.node(node).attrs {
            new.xattrs = attrs.iter().map(|x| (x.name.clone(), x.value.clone())).collect();
        }
        new.xattrs.insert(xattr.name, xattr.value);
        self.place(parent, name, new).map(|_| ())
    }

    /// Gives a node that is no directory another name; one that exists is replaced if its node has others.
    ///
    /// # Errors
    /// `Unsupported` as the tool refuses.
    pub fn link(&mut self, dir: NodeId, name: &[u8], target: NodeId) -> Result<()> {
        let existing = self.find(dir, name)?;
        if let Some(existing) = existing
            && (self.nodes[existing as usize].is_dir() || self.nodes[existing as usize].links < 2)
        {
            return Err(refuse("a hard link in the place of a name that is there already"));
        }
        if self.node(target).is_dir() {
            return Err(refuse("a hard link to a directory"));
        }
        if existing != Some(target.0) && self.node(target).links >= EXT4_LINK_MAX {
            return Err(refuse(format!("more than {EXT4_LINK_MAX} names of a file")));
        }
        if let Some(existing) = existing {
            self.nodes[existing as usize].links -= 1;
        }
        self.nodes[target.0 as usize].links += 1;
        self.set_child(dir, name, target.0);
        Ok(())
    }

    /// Opens a file for the data of the size it was created with.
    pub fn begin_file(&mut self, node: NodeId) -> Result<()> {
        let n = self.node(node);
        if self.open.is_some() || n.mode & S_IFMT != S_IFREG || n.has(InodeFlags::EXT4_EXTENTS_FL) {
            return Err(Ext4Error::usage("a file that cannot be opened for writing"));
        }
        self.open = Some(OpenFile { node: node.0, size: n.size, written: 0, inline: Vec::new() });
        Ok(())
    }

    /// Writes at a place that is not below the end of the last write; what is left out is zeros.
    pub fn write_data(&mut self, offset: u64, data: &[u8], placed: &mut dyn FnMut(Placed)) -> Result<()> {
        let Some(file) = &mut self.open else { return Err(Ext4Error::usage("no file is open")) };
        let end = offset.checked_add(data.len() as u64).filter(|end| *end <= file.size);
        let (Some(end), Some(gap)) = (end, offset.checked_sub(file.written)) else {
            return Err(Ext4Error::usage(format!("{} bytes at {offset} of a file", data.len())));
        };
        file.written = end;
        let len = data.len() as u64;
        if self.nodes[file.node as usize].has(InodeFlags::EXT4_INLINE_DATA_FL) {
            file.inline.resize(offset as usize, 0);
            file.inline.extend_from_slice(data);
            placed(Placed::Inline { len });
            return Ok(());
        }
        self.out.zeros(gap)?;
        let image_offset = self.out.position();
        self.out.write(data)?;
        placed(Placed::At { image_offset, len });
        Ok(())
    }

    /// Ends the open file; what was not written is zeros.
    pub fn end_file(&mut self) -> Result<()> {
        let Some(mut file) = self.open.take() else { return Err(Ext4Error::usage("no file is open")) };
        if self.nodes[file.node as usize].has(InodeFlags::EXT4_INLINE_DATA_FL) {
            file.inline.resize(file.size as usize, 0);
            let mut i_block = [0; I_BLOCK_SIZE];
            let n = file.inline.len().min(I_BLOCK_SIZE);
            i_block[..n].copy_from_slice(&file.inline[..n]);
            if looks_like_root(&i_block) {
                return Err(refuse("data that look like the root of an extent tree inside the inode"));
            }
            self.nodes[file.node as usize].content = Content::Bytes(file.inline.into());
            return Ok(());
        }
        self.out.zeros(file.size - file.written)?;
        self.end_run(file.node, file.size)
    }

    /// Sum of the sizes of the regular files and of the lengths of symlinks' targets, each once.
    pub fn file_bytes(&self) -> u64 {
        let size = |node: &Node| match (&node.content, node.mode & S_IFMT) {
            (_, S_IFREG) => node.size,
            (Content::Bytes(target), S_IFLNK) => target.len() as u64,
            _ => 0,
        };
        self.nodes.iter().filter(|n| n.links > 0).map(size).sum()
    }

    fn node(&self, node: NodeId) -> &Node {
        &self.nodes[node.0 as usize]
    }

    /// The node of a name; an empty name is the directory itself.
    fn find(&self, dir: NodeId, name: &[u8]) -> Result<Option<u32>> {
        if !self.node(dir).is_dir() {
            return Err(refuse("a name below something that is no directory"));
        }
        if name.len() > EXT4_NAME_LEN {
            return Err(refuse(format!("a name of {} bytes (at most {EXT4_NAME_LEN})", name.len())));
        }
        if name.is_empty() {
            return Ok(Some(dir.0));
        }
        Ok(self.lookup(dir, name).map(|node| node.0))
    }

    fn set_child(&mut self, dir: NodeId, name: &[u8], node: u32) {
        if let Some(children) = &mut self.nodes[dir.0 as usize].children {
            children.0.insert(name.into(), node);
        }
    }

    /// A directory like `node`, without its xattrs.
    fn copy_of(&self, node: NodeId) -> Result<NewNode> {
        let n = self.node(node);
        let again =
            |t: Stamp| t.again().ok_or_else(|| refuse("a directory that inherits a date before 1970"));
        Ok(NewNode {
            permissions: n.mode & 0o7777,
            uid: n.uid,
            gid: n.gid,
            mtime: again(n.mtime)?,
            atime: again(n.atime)?,
            ctime: again(n.ctime)?,
            ..NewNode::empty(NodeKind::Directory)
        })
    }

    fn place(&mut self, dir: NodeId, name: &[u8], new: NewNode) -> Result<NodeId> {
        if self.open.is_some() {
            return Err(Ext4Error::usage("a file is still open"));
        }
        let existing = self.find(dir, name)?;
        let is_dir = new.kind == NodeKind::Directory;
        let mut reuse = None;
        match existing.map(|e| (e, &self.nodes[e as usize])) {
            Some((_, known)) if known.is_dir() && !is_dir => {
                return Err(refuse("a directory is there already, and this is none"));
            }
            Some((_, known)) if !known.is_dir() && is_dir => {
                return Err(refuse("something that is no directory is there already"));
            }
            Some((e, known)) if is_dir || known.links < 2 => reuse = Some(e),
            None if is_dir && self.node(dir).links >= EXT4_LINK_MAX => {
                return Err(refuse(format!("more than {} subdirectories of a directory", EXT4_LINK_MAX - 2)));
            }
            Some(_) | None => {}
        }
        let node = self.fill(reuse, new)?;
        if existing != Some(node) {
            if let Some(existing) = existing {
                self.nodes[existing as usize].links -= 1;
            }
            self.set_child(dir, name, node);
            self.nodes[node as usize].links += 1;
            if is_dir {
                self.nodes[dir.0 as usize].links += 1;
            }
        }
        Ok(NodeId(node))
    }

    /// Makes a node, in the inode of another one if need be.
    fn fill(&mut self, reuse: Option<u32>, new: NewNode) -> Result<u32> {
        let mut node = match reuse {
            None => Node { links: u32::from(new.kind == NodeKind::Directory), ..Node::default() },
            Some(known) => {
                let known = &mut self.nodes[known as usize];
                if known.has(InodeFlags::EXT4_EXTENTS_FL) {
                    return Err(refuse("the name exists, and its file has data on the disk"));
                }
                if known.has(InodeFlags::EXT4_INLINE_DATA_FL) {
                    return Err(refuse("the name exists, and its file has data in its inode"));
                }
                std::mem::take(known)
            }
        };
        let (file_type, content) = content(&new)?;
        node.mode = file_type | new.permissions;
        if file_type == S_IFLNK {
            node.mode |= 0o777;
        }
        (node.uid, node.gid) = (new.uid, new.gid);
        (node.mtime, node.atime, node.ctime) = (new.mtime, new.atime, new.ctime);
        node.size = new.size;
        node.flags = 0;
        if file_type == S_IFDIR && node.children.is_none() {
            node.children = Some(Box::default());
        }
        let mut inline_extra = None;
        if file_type == S_IFREG && self.inline_data && new.size <= INLINE_MAX {
            node.flags = InodeFlags::EXT4_INLINE_DATA_FL.bits();
            inline_extra = Some((new.size as usize).saturating_sub(I_BLOCK_SIZE));
        }
        let mut target = None;
        node.content = match content {
            Content::Bytes(bytes) => {
                node.size = bytes.len() as u64;
                if bytes.len() > FAST_SYMLINK_MAX {
                    target = Some(bytes);
                    Content::None
                } else {
                    Content::Bytes(bytes)
                }
            }
            other => other,
        };
        let mut xattrs = new.xattrs;
        for x in node.attrs.take().map(|a| a.inline).unwrap_or_default() {
            xattrs.entry(x.name).or_insert(x.value);
        }
        let attrs = Attrs::divide(xattrs, inline_extra, file_type)?;
        if !attrs.block.is_empty() || node.xattr_block != 0 {
            let block = attrs.block_bytes();
            if node.xattr_block == 0 {
                node.xattr_block = self.out.block();
                node.blocks += 1;
                self.out.write(&block)?;
            } else {
                self.out.rewrite(node.xattr_block, &block)?;
            }
        }
        node.attrs = (!attrs.is_empty()).then(|| Box::new(attrs));
        let id = if let Some(known) = reuse {
            self.nodes[known as usize] = node;
            known
        } else {
            let id = self.nodes.len() as u32;
            self.nodes.push(node);
            id
        };
        if let Some(target) = target {
            self.out.write(&target)?;
            self.end_run(id, target.len() as u64)?;
        }
        Ok(id)
    }
}
