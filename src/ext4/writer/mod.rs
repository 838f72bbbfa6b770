//! Streaming ext4 image builder: one pass, final size unknown until the end, the same calls give the same bytes.
//!
//! ```text
//!   create/link/unlink ──► tree (arena, ~150 B a node)            ┐
//!   begin_file, write_data ──► blocks at the cursor, ascending ──►│ finish: directories, xattr blocks, inode tables,
//!                                                                 ┘ bitmaps, descriptors, super block
//!   image: super │ GDT 0 │ file data in call order … │ directories … │ inode tables │ bitmaps      (GDT blocks of
//!          later meta groups stand at fixed places between: feature meta_bg, so no size need be foretold)
//! ```
//!
//! Invariants: an image that `finish` returned is clean for `e2fsck -fn`; data never move once placed; nothing below the
//! cursor is written twice save the fixed meta blocks; no journal, no lost+found. The disk must be empty (or read as
//! zeros) at the start. Knows nothing of tar. Called by `diff::apply`.

use super::{BlockSize, Ext4Error, Timestamp, Xattr};
use crate::io::WriteAt;

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
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            block_size: BlockSize::default(),
            max_image_bytes: 2040 << 30,
            uuid: UuidSource::FromContent,
            inline_data: true,
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
    out: W,
    options: WriterOptions,
}

#[expect(unused_variables, reason = "signatures first")]
impl<W: WriteAt> ImageWriter<W> {
    /// Starts an image with an empty root directory (0755, owner 0, time 0). `out` must be empty or read as zeros.
    pub fn new(out: W, options: WriterOptions) -> Result<Self> {
        Ok(Self { out, options })
    }

    /// The root directory.
    pub fn root(&self) -> NodeId {
        NodeId(0)
    }

    /// The node called `name` in `dir`; `None` if there is none or `dir` is no directory. Constant time.
    pub fn lookup(&self, dir: NodeId, name: &[u8]) -> Option<NodeId> {
        todo!()
    }

    /// Names and nodes of a directory in order of creation.
    pub fn children(&self, dir: NodeId) -> Vec<(Vec<u8>, NodeId)> {
        todo!()
    }

    /// What a node is.
    pub fn kind(&self, node: NodeId) -> NodeKind {
        todo!()
    }

    /// Attributes of a node, as the image will hold them (times within ext4's range).
    pub fn attributes(&self, node: NodeId) -> Attributes {
        todo!()
    }

    /// Extended attributes of a node, sorted by name.
    pub fn xattrs(&self, node: NodeId) -> Vec<Xattr> {
        todo!()
    }

    /// Number of names of a node that is no directory.
    pub fn link_count(&self, node: NodeId) -> u32 {
        todo!()
    }

    /// Makes a node with its first name.
    ///
    /// # Errors
    /// `Usage` for a name that exists, is empty, `.`, `..`, longer than 255 bytes or holds `/` or NUL, for a `dir` that
    /// is no directory and for malformed ACLs; `Unsupported` for what ext4 cannot hold (name spaces of xattrs, device
    /// numbers, targets of links beyond the block size, xattr names that do not fit one block).
    pub fn create(
        &mut self,
        dir: NodeId,
        name: &[u8],
        kind: NodeKind,
        attributes: Attributes,
        xattrs: Vec<Xattr>,
    ) -> Result<NodeId> {
        todo!()
    }

    /// Replaces the attributes of a node.
    pub fn set_attributes(&mut self, node: NodeId, attributes: Attributes) {
        todo!()
    }

    /// Replaces all extended attributes of a node. Of two with one name the last counts.
    pub fn set_xattrs(&mut self, node: NodeId, xattrs: Vec<Xattr>) -> Result<()> {
        todo!()
    }

    /// Gives a node another name.
    ///
    /// # Errors
    /// As [`Self::create`]; `Usage` for a directory; `Unsupported` beyond 65,000 names (`EMLINK`).
    pub fn link(&mut self, dir: NodeId, name: &[u8], node: NodeId) -> Result<()> {
        todo!()
    }

    /// Removes a name, of a directory with all that is below it. A node that lost its last name is gone, its blocks
    /// become free space; their bytes stay where they were.
    ///
    /// # Errors
    /// `Usage` if there is no such name, or the file being written would go.
    pub fn unlink(&mut self, dir: NodeId, name: &[u8]) -> Result<()> {
        todo!()
    }

    /// Opens a regular file for writing `size` bytes; earlier content is dropped. One file is open at a time.
    pub fn begin_file(&mut self, node: NodeId, size: u64) -> Result<()> {
        todo!()
    }

    /// Writes at a logical offset that is not below the end of the last write; what is left out is a hole.
    /// `placed` is told where the bytes of `data` live, in order and without gaps.
    pub fn write_data(&mut self, offset: u64, data: &[u8], placed: &mut dyn FnMut(Placed)) -> Result<()> {
        todo!()
    }

    /// Ends the open file; what was not written of its size is a hole.
    pub fn end_file(&mut self) -> Result<()> {
        todo!()
    }

    /// Writes all metadata and sets the image's size. Does not sync.
    pub fn finish(self) -> Result<ImageSummary> {
        todo!()
    }
}
