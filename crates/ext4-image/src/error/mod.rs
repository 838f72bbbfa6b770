//! Errors of this crate: a kind to act upon, the place in the image, and the cause.
//!
//! ```text
//!   Ext4Error ─┬─ Corrupt { kind: CorruptKind, place }      the image is broken or hostile: never mount it
//!              ├─ Unsupported { what, place }, LinkTarget,  valid or requested, but beyond what this crate does
//!              │  AttributeNames, FileSize
//!              ├─ Io { doing, place, source }               the disk failed; a retry elsewhere may work
//!              ├─ Usage { what }                            the caller broke the contract of a function
//!              └─ Full { limit }                            the limit that the caller gave the writer
//! ```
//!
//! [`Ext4Error::kind`] maps the variants to these five, for callers that choose an exit status or a reply by them. Used
//! by every module of this crate and by `layer-codec`.

mod corrupt;

pub use corrupt::{
    BlockFault, CorruptKind, DirFault, ExtentFault, GroupFault, InodeFault, JournalFault, LinkFault,
    SuperblockFault, XattrFault,
};

use super::BlockSize;
use std::{fmt, io};

/// Where in an image something was found. Parts that are not known are left out of messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Place {
    /// Block group.
    pub group: Option<u32>,
    /// Inode number.
    pub inode: Option<u32>,
    /// File system block.
    pub block: Option<u64>,
    /// Byte offset: inside the block if `block` is given, inside the inode if only `inode` is, else on the disk.
    pub offset: Option<u64>,
}

impl Place {
    /// Block group `number`.
    pub fn group(number: u32) -> Self {
        Self { group: Some(number), ..Self::default() }
    }

    /// Inode `ino`.
    pub fn inode(ino: u32) -> Self {
        Self { inode: Some(ino), ..Self::default() }
    }

    /// Block `block`.
    pub fn block(block: u64) -> Self {
        Self { block: Some(block), ..Self::default() }
    }

    /// Byte `offset` of the disk.
    pub fn offset(offset: u64) -> Self {
        Self { offset: Some(offset), ..Self::default() }
    }

    /// The same place, narrowed to `block`.
    #[must_use]
    pub fn at_block(self, block: u64) -> Self {
        Self { block: Some(block), ..self }
    }

    /// The same place, narrowed to byte `offset`.
    #[must_use]
    pub fn at_offset(self, offset: u64) -> Self {
        Self { offset: Some(offset), ..self }
    }
}

impl fmt::Display for Place {
    /// The known parts, separated by commas; nothing if no part is known.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            ("group", self.group.map(u64::from)),
            ("inode", self.inode.map(u64::from)),
            ("block", self.block),
            ("byte", self.offset),
        ];
        let mut separator = "";
        for (name, value) in parts {
            if let Some(value) = value {
                write!(f, "{separator}{name} {value}")?;
                separator = ", ";
            }
        }
        Ok(())
    }
}

/// A place at the end of a message: in parentheses, or nothing.
struct At<'a>(&'a Place);

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self.0 == Place::default() { Ok(()) } else { write!(f, " ({})", self.0) }
    }
}

/// What sort of error it is, for callers that act upon it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ext4ErrorKind {
    /// The image contradicts itself or the format.
    Corrupt,
    /// Valid, but beyond what this crate reads or writes.
    Unsupported,
    /// The disk failed.
    Io,
    /// The caller broke the contract of a function.
    Usage,
    /// The image would outgrow the limit that the caller set.
    Limit,
}

/// An error of the reader, the checker, a writer or the formatter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Ext4Error {
    /// The image contradicts itself or the format.
    #[error("corrupt ext4: {kind}{}", At(place))]
    Corrupt {
        /// The rule that is broken.
        kind: CorruptKind,
        /// The inode, block or offset where it is broken.
        place: Place,
    },
    /// Valid, but outside of what this crate reads or writes.
    #[error("unsupported ext4: {what}{}", At(place))]
    Unsupported {
        /// What is not supported, with the limit.
        what: String,
        /// Where in the image, if it is about an image.
        place: Place,
    },
    /// The disk failed.
    #[error("ext4 i/o: {doing}{}", At(place))]
    Io {
        /// The operation that failed.
        doing: &'static str,
        /// Where in the image.
        place: Place,
        /// The error of the disk.
        #[source]
        source: io::Error,
    },
    /// The caller broke the contract of a function.
    #[error("ext4 usage: {what}")]
    Usage {
        /// What was wrong with the call.
        what: String,
    },
    /// A symbolic link does not fit a block; larger blocks take longer ones (kernel: `ext4_symlink`).
    #[error("the target of a symbolic link has {bytes} bytes, but blocks of this size hold at most {most}")]
    LinkTarget {
        /// Length of the target.
        bytes: u64,
        /// The longest that fits.
        most: u32,
    },
    /// The names of a node's extended attributes do not fit one block, which ext4 keeps them in; larger blocks take more.
    #[error("the names of {count} extended attributes need a block of {bytes} bytes, but blocks have {most}")]
    AttributeNames {
        /// How many attributes.
        count: usize,
        /// Bytes of their entries, with the block's header.
        bytes: u64,
        /// The block size.
        most: u32,
    },
    /// A file is larger than 2^32 blocks; larger blocks take larger ones.
    #[error("a file has {bytes} bytes, but blocks of this size allow at most {most}")]
    FileSize {
        /// Size of the file.
        bytes: u64,
        /// The largest that blocks of this size take.
        most: u64,
    },
    /// The image would outgrow the limit that the caller set.
    #[error("the ext4 image exceeds its limit of {limit} bytes")]
    Full {
        /// The limit in bytes: `max_image_bytes` or `max_disk_bytes` of the writer's options.
        limit: u64,
    },
}

impl Ext4Error {
    /// What sort of error it is.
    pub fn kind(&self) -> Ext4ErrorKind {
        match self {
            Self::Corrupt { .. } => Ext4ErrorKind::Corrupt,
            Self::Unsupported { .. }
            | Self::LinkTarget { .. }
            | Self::AttributeNames { .. }
            | Self::FileSize { .. } => Ext4ErrorKind::Unsupported,
            Self::Io { .. } => Ext4ErrorKind::Io,
            Self::Usage { .. } => Ext4ErrorKind::Usage,
            Self::Full { .. } => Ext4ErrorKind::Limit,
        }
    }

    /// The error of the disk, for kind [`Ext4ErrorKind::Io`].
    pub fn io_error(&self) -> Option<&io::Error> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }

    /// Whether the largest blocks, of 4 KiB, would hold what smaller ones could not.
    pub fn larger_blocks_help(&self) -> bool {
        let largest = BlockSize::LARGEST.bytes();
        match *self {
            Self::LinkTarget { bytes, most } => most < largest - 1 && bytes < u64::from(largest),
            Self::AttributeNames { bytes, most, .. } => most < largest && bytes <= u64::from(largest),
            Self::FileSize { bytes, most } => {
                let all = u64::from(u32::MAX) * u64::from(largest);
                most < all && bytes <= all
            }
            _ => false,
        }
    }

    /// [`Ext4Error::Corrupt`].
    pub fn corrupt(kind: impl Into<CorruptKind>, place: Place) -> Self {
        Self::Corrupt { kind: kind.into(), place }
    }

    /// [`Ext4Error::Unsupported`].
    pub fn unsupported(what: impl Into<String>, place: Place) -> Self {
        Self::Unsupported { what: what.into(), place }
    }

    /// [`Ext4Error::Usage`].
    pub fn usage(what: impl Into<String>) -> Self {
        Self::Usage { what: what.into() }
    }

    /// [`Ext4Error::Io`].
    pub fn io(doing: &'static str, place: Place, source: io::Error) -> Self {
        Self::Io { doing, place, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_place() {
        let e = Ext4Error::corrupt(ExtentFault::NodeChecksum, Place::inode(12).at_block(77).at_offset(4));
        assert_eq!(
            e.to_string(),
            "corrupt ext4: extents: the checksum of a node does not match (inode 12, block 77, byte 4)"
        );
        assert_eq!(e.kind(), Ext4ErrorKind::Corrupt);
        assert!(matches!(e, Ext4Error::Corrupt { kind: CorruptKind::Extent(ExtentFault::NodeChecksum), .. }));
        assert_eq!(
            Ext4Error::unsupported("bigalloc", Place::default()).to_string(),
            "unsupported ext4: bigalloc"
        );
    }
}
