//! Streaming ext4 image builder: one pass, final size unknown until the end, the same calls give the same bytes.
//!
//! ```text
//!   create/link/unlink ──► tree (arena, ~110 B a node)            ┐
//!   begin_file, write_data ──► blocks at the cursor, ascending ──►│ finish: directories, xattr blocks, inode tables,
//!                                                                 ┘ bitmaps, descriptors, super block
//!   image: super │ GDT 0 │ file data in call order … │ directories … │ inode tables │ bitmaps      (GDT blocks of
//!          later meta groups stand at fixed places between: feature meta_bg, so no size is needed in advance)
//! ```
//!
//! Invariants: an image that `finish` returned is clean for `e2fsck -fn`; data never move once placed; nothing below the
//! cursor is written twice save the fixed meta blocks; no lost+found, and no journal unless the image is [`Writable`].
//! The disk must be empty (or read as zeros) at the start. Knows nothing of tar. Called by `layer-codec`.
//!
//! Why 1 KiB blocks and inline data are the default (image size × tar size, synthetic streams): 110,000 files, log-normal
//! around 1.5 KB, 43,000 of them in one directory: 1.04 (1.02 without inline data), 1.10 with 2 KiB, 1.26 with 4 KiB;
//! 300,000 files of 200 bytes: 0.53 (163 MB) against 1.27 without inline data.
//!
//! Memory: about 110 bytes a node with its name, and the inline data themselves until `finish`.

mod data;
mod dirs;
mod extents;
mod finish;
mod inodes;
mod moves;
mod sink;
mod space;
// Their oracles are Linux programs and the Linux kernel.
#[cfg(all(test, target_os = "linux"))]
pub(crate) mod tests;
mod tree;
mod visit;
mod writable;
#[cfg(all(test, target_os = "linux"))]
mod writable_tests;
mod xattrs;

use super::{
    BlockSize, Ext4Error, Place, Timestamp, Xattr,
    layout::{
        EXT4_LINK_MAX,
        inode::{
            I_BLOCK_SIZE, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK,
            encode_device,
        },
    },
};
use disk_io::WriteAt;
pub(crate) use space::GROUP_BLOCKS;
pub use visit::{NodeView, Shape};
pub use writable::{ImageSize, JournalSize, MAX_WRITABLE_BYTES, MIN_WRITABLE_BYTES, Writable};

use data::OpenFile;
use sink::Sink;
use space::{Geometry, Space};
use std::collections::HashMap;
use tree::{Content, NONE, Node, OtherTimes, Payload, Tree};

/// Seed of all metadata checksums (feature metadata_csum_seed): constant, so that the UUID can be known last.
const CHECKSUM_SEED: u32 = 0x4c43_4f57;
/// Seed of the directory hash: constant, so that equal content gives equal bytes.
const HASH_SEED: [u32; 4] = [0x6c63_6f77, 0x2d67_7261, 0x7068_6472, 0x6976_6572];
/// Inode size with inline data.
const INODE_SIZE_INLINE: usize = 512;
/// Inode size without.
const INODE_SIZE_PLAIN: usize = 256;

/// Result of the writer.
pub type Result<T> = std::result::Result<T, Ext4Error>;

/// Permissions, owner and times of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Permission bits, set-id and sticky bits: `0o7777` at most, further bits are dropped.
    pub permissions: u16,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Time of the last change of the content; also the creation time.
    pub mtime: Timestamp,
    /// Time of the last access; `mtime` if it is not given.
    pub atime: Option<Timestamp>,
    /// Time of the last change of the inode; `mtime` if it is not given.
    pub ctime: Option<Timestamp>,
}

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeKind {
    /// A directory.
    Directory,
    /// A regular file; empty until [`ImageWriter::begin_file`].
    File,
    /// A symbolic link.
    Symlink {
        /// 1 byte to one less than the block size, without NUL.
        target: Vec<u8>,
    },
    /// A character device; 0/0 is overlayfs's whiteout.
    CharDevice {
        /// Below 4096.
        major: u32,
        /// Below 2^20.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Below 4096.
        major: u32,
        /// Below 2^20.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// A node of the tree being built; valid for the writer that gave it, until its last name is unlinked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(crate) u32);

/// Where the image's UUID comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UuidSource {
    /// Derived from all metadata and the file data (version 8 form): equal content, equal UUID.
    #[default]
    FromContent,
    /// Derived from all metadata and a digest of where the content came from, given to [`ImageWriter::finish_with`]:
    /// saves looking at the data once more.
    FromSource,
    /// Given by the caller.
    Fixed([u8; 16]),
}

/// How an image is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriterOptions {
    /// Block size.
    pub block_size: BlockSize,
    /// The image may not exceed this many bytes; [`Ext4Error::Full`] otherwise.
    pub max_image_bytes: u64,
    /// UUID.
    pub uuid: UuidSource,
    /// Keep small files and directories in 512-byte inodes (inline data) instead of 256-byte inodes and blocks.
    pub inline_data: bool,
    /// A file system of a given size that is written to, instead of one that ends with its content and is read only.
    pub writable: Option<Writable>,
    /// When the file system was made: seconds since 1970.
    pub made_at: u32,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            block_size: BlockSize::default(),
            max_image_bytes: 2040 << 30,
            uuid: UuidSource::FromContent,
            inline_data: true,
            writable: None,
            made_at: 0,
        }
    }
}

/// Where bytes given to [`ImageWriter::write_data`] live, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placed {
    /// At this byte of the image, for good.
    At {
        /// Byte offset in the image.
        image_offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// In an inode: no stable place.
    Inline {
        /// Number of bytes.
        len: u64,
    },
}

/// What [`ImageWriter::finish`] made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageSummary {
    /// Size of the image in bytes, a multiple of the block size.
    pub image_bytes: u64,
    /// The UUID in the super block.
    pub uuid: [u8; 16],
    /// Inodes in use, the reserved ones included.
    pub inodes: u64,
    /// Blocks in use.
    pub blocks_used: u64,
    /// Blocks in all.
    pub blocks: u64,
}

/// Builds one image on `W`.
#[derive(Debug)]
pub struct ImageWriter<W> {
    options: WriterOptions,
    inode_size: usize,
    tree: Tree,
    sets: xattrs::Sets,
    space: Space,
    sink: Sink<W>,
    roots: Vec<Root>,
    /// Inline data of files.
    spool: Vec<u8>,
    open: Option<OpenFile>,
    /// Kept between files for its allocation.
    extent_buffer: Vec<extents::Extent>,
    /// Nodes with attributes beyond their slot.
    overflow: HashMap<u32, Overflow>,
    data_crc: u32,
    large_dir: bool,
    /// Of a writable image, once it is placed.
    journal: Option<writable::JournalFile>,
}

/// Content that is not one extent from block 0.
#[derive(Debug)]
struct Root {
    i_block: [u8; I_BLOCK_SIZE],
    /// Blocks of data and of the tree.
    blocks: u64,
    /// All blocks lie from the first to before the second, and no other file's do.
    span: (u64, u64),
}

/// Attributes beyond a slot.
#[derive(Debug)]
struct Overflow {
    /// The attribute block.
    block: u64,
    /// Blocks of values in inodes of their own: charged to this inode too.
    value_blocks: u64,
}

impl<W: WriteAt> ImageWriter<W> {
    /// Starts an image with an empty root directory (0755, owner 0, time 0). `out` must be empty or read as zeros.
    ///
    /// # Errors
    /// `Usage` for a writable image whose size, journal or block size cannot be.
    pub fn new(out: W, options: WriterOptions) -> Result<Self> {
        let most = writable::check(&options)?;
        let space = Space::new(Geometry::new(options.block_size, options.writable.is_some()), most);
        Ok(Self {
            options,
            inode_size: if options.inline_data { INODE_SIZE_INLINE } else { INODE_SIZE_PLAIN },
            tree: Tree::new(),
            sets: xattrs::Sets::default(),
            space,
            sink: Sink::new(out, options.uuid == UuidSource::FromContent),
            roots: Vec::new(),
            spool: Vec::new(),
            open: None,
            extent_buffer: Vec::new(),
            overflow: HashMap::new(),
            data_crc: 0,
            large_dir: false,
            journal: None,
        })
    }

    /// The root directory.
    pub fn root(&self) -> NodeId {
        NodeId(0)
    }

    /// The node called `name` in `dir`; `None` if there is none or `dir` is no directory. Constant time.
    pub fn lookup(&self, dir: NodeId, name: &[u8]) -> Option<NodeId> {
        self.tree.lookup(dir, name)
    }

    /// Names and nodes of a directory in order of creation.
    pub fn children(&self, dir: NodeId) -> Vec<(Vec<u8>, NodeId)> {
        self.tree.children(dir.0).map(|(name, node)| (name.to_vec(), NodeId(node))).collect()
    }

    /// What a node is.
    pub fn kind(&self, node: NodeId) -> NodeKind {
        let node = &self.tree.nodes[node.0 as usize];
        match (node.mode & S_IFMT, node.payload) {
            (S_IFDIR, _) => NodeKind::Directory,
            (_, Payload::Symlink { at, len, .. }) => {
                NodeKind::Symlink { target: self.tree.stored(at, usize::from(len)).to_vec() }
            }
            (S_IFCHR, Payload::Device { major, minor }) => NodeKind::CharDevice { major, minor },
            (_, Payload::Device { major, minor }) => NodeKind::BlockDevice { major, minor },
            (S_IFIFO, _) => NodeKind::Fifo,
            (S_IFSOCK, _) => NodeKind::Socket,
            _ => NodeKind::File,
        }
    }

    /// Size of a regular file as it was begun; 0 for everything else.
    pub fn file_size(&self, node: NodeId) -> u64 {
        match self.tree.nodes[node.0 as usize].payload {
            Payload::File { size, .. } => size,
            _ => 0,
        }
    }

    /// Attributes of a node, as the image will hold them (times within ext4's range).
    pub fn attributes(&self, node: NodeId) -> Attributes {
        let n = &self.tree.nodes[node.0 as usize];
        let OtherTimes { atime, ctime } = self.tree.other_times(n);
        Attributes {
            permissions: n.mode & 0o7777,
            uid: n.uid,
            gid: n.gid,
            mtime: Timestamp::decode(n.mtime.0, n.mtime.1),
            atime: Some(Timestamp::decode(atime.0, atime.1)),
            ctime: Some(Timestamp::decode(ctime.0, ctime.1)),
        }
    }

    /// Extended attributes of a node, sorted by name.
    pub fn xattrs(&self, node: NodeId) -> Vec<Xattr> {
        self.sets.get(self.tree.nodes[node.0 as usize].xattrs).to_vec()
    }

    /// Number of names of a node that is no directory.
    pub fn link_count(&self, node: NodeId) -> u32 {
        self.tree.nodes[node.0 as usize].links
    }

    /// Makes a node with its first name.
    ///
    /// # Errors
    /// `Usage` for a name that exists, is empty, `.`, `..`, longer than 255 bytes or holds `/` or NUL, for a `dir` that
    /// is no directory and for malformed ACLs; `Unsupported` for what ext4 cannot hold (name spaces of xattrs, device
    /// numbers, targets of links beyond the block size, xattr names that do not fit one block).
    #[expect(clippy::needless_pass_by_value, reason = "a node takes over what it is made of")]
    pub fn create(
        &mut self,
        dir: NodeId,
        name: &[u8],
        kind: NodeKind,
        attributes: Attributes,
        xattrs: Vec<Xattr>,
    ) -> Result<NodeId> {
        self.tree.check_new(dir, name)?;
        let (file_type, payload) = match &kind {
            NodeKind::Directory => {
                (S_IFDIR, Payload::Dir { first: NONE, last: NONE, parent: dir.0, subdirs: 0 })
            }
            NodeKind::File => (S_IFREG, Payload::File { size: 0, content: Content::Empty }),
            NodeKind::Symlink { target } => (S_IFLNK, self.symlink(target)?),
            NodeKind::CharDevice { major, minor } => (S_IFCHR, Self::device(*major, *minor)?),
            NodeKind::BlockDevice { major, minor } => (S_IFBLK, Self::device(*major, *minor)?),
            NodeKind::Fifo => (S_IFIFO, Payload::Plain),
            NodeKind::Socket => (S_IFSOCK, Payload::Plain),
        };
        let mut node = Node::new(file_type, payload);
        node.xattrs = self.sets.add(xattrs, self.options.block_size.bytes() as usize)?;
        let id = self.tree.add_node(node)?;
        self.tree.set_attributes(id, &attributes);
        self.tree.add_name(dir, name, id)?;
        Ok(NodeId(id))
    }

    /// Replaces the attributes of a node.
    pub fn set_attributes(&mut self, node: NodeId, attributes: Attributes) {
        self.tree.set_attributes(node.0, &attributes);
    }

    /// Replaces all extended attributes of a node. Of two with one name the last counts.
    pub fn set_xattrs(&mut self, node: NodeId, xattrs: Vec<Xattr>) -> Result<()> {
        let set = self.sets.add(xattrs, self.options.block_size.bytes() as usize)?;
        self.tree.nodes[node.0 as usize].xattrs = set;
        Ok(())
    }

    /// Gives a node another name.
    ///
    /// # Errors
    /// As [`Self::create`]; `Usage` for a directory; `Unsupported` beyond 65,000 names (`EMLINK`).
    pub fn link(&mut self, dir: NodeId, name: &[u8], node: NodeId) -> Result<()> {
        self.tree.check_new(dir, name)?;
        let n = &self.tree.nodes[node.0 as usize];
        if n.is_dir() || matches!(n.payload, Payload::Gone) {
            return Err(Ext4Error::usage("another name for a directory, or for a file that was removed"));
        }
        if n.links >= EXT4_LINK_MAX {
            let place = Place::inode(inodes::ino_of(node.0));
            return Err(Ext4Error::unsupported(format!("more than {EXT4_LINK_MAX} names of a file"), place));
        }
        self.tree.add_name(dir, name, node.0)
    }

    /// Removes a name, of a directory with all that is below it; no file may be open. A node without names no longer
    /// exists and its blocks become free space; their bytes are not overwritten.
    ///
    /// # Errors
    /// `Usage` if there is no such name, or a file is open.
    pub fn unlink(&mut self, dir: NodeId, name: &[u8]) -> Result<()> {
        if self.open.is_some() {
            return Err(Ext4Error::usage("unlink while a file is open"));
        }
        let mut dropped = Vec::new();
        self.tree.unlink(dir, name, |_, payload| {
            if let Payload::File { content, .. } = payload {
                dropped.push(content);
            }
        })?;
        for content in dropped {
            self.release(content);
        }
        Ok(())
    }

    /// Writes out what is buffered: from now on all data that were [`Placed::At`] can be read there.
    ///
    /// # Errors
    /// `Io`.
    pub fn flush(&mut self) -> Result<()> {
        self.sink.flush()
    }

    /// Opens a regular file for writing `size` bytes; earlier content is dropped. One file is open at a time.
    pub fn begin_file(&mut self, node: NodeId, size: u64) -> Result<()> {
        self.open_file(node, size)
    }

    /// Writes at a logical offset that is not below the end of the last write; what is left out is a hole.
    /// `placed` receives the places of the bytes of `data`, in order and without gaps.
    pub fn write_data(&mut self, offset: u64, data: &[u8], placed: &mut dyn FnMut(Placed)) -> Result<()> {
        self.write_open(offset, data, placed)
    }

    /// Ends the open file; what was not written of its size is a hole.
    pub fn end_file(&mut self) -> Result<()> {
        self.close_file()
    }

    /// Writes all metadata and sets the image's size. Does not sync.
    ///
    /// # Errors
    /// `Usage` with [`UuidSource::FromSource`], which needs [`Self::finish_with`].
    pub fn finish(self) -> Result<ImageSummary> {
        if self.options.uuid == UuidSource::FromSource {
            return Err(Ext4Error::usage("the digest of the image's source is missing"));
        }
        self.finish_image(&[])
    }

    /// As [`Self::finish`]; with [`UuidSource::FromSource`] the UUID depends on `source`, a digest of what the content
    /// was read from.
    pub fn finish_with(self, source: [u8; 32]) -> Result<ImageSummary> {
        self.finish_image(&source)
    }

    fn device(major: u32, minor: u32) -> Result<Payload> {
        match encode_device(major, minor) {
            Some(_) => Ok(Payload::Device { major, minor }),
            None => Err(Ext4Error::unsupported(format!("device number {major}:{minor}"), Place::default())),
        }
    }

    fn symlink(&mut self, target: &[u8]) -> Result<Payload> {
        if target.is_empty() || target.contains(&0) {
            return Err(Ext4Error::usage("target of a symbolic link is empty or contains NUL"));
        }
        if target.len() >= self.options.block_size.bytes() as usize {
            return Err(Ext4Error::LinkTarget {
                bytes: target.len() as u64,
                most: self.options.block_size.bytes() - 1,
            });
        }
        Ok(Payload::Symlink { at: self.tree.store(target)?, len: target.len() as u16, block: 0 })
    }
}
