//! What can go wrong with an ext4 image, and whose fault it is.
//!
//! Four causes are kept apart because callers answer them differently: [`Ext4Error::Corrupt`] (the image is broken or
//! hostile: never mount it), [`Ext4Error::Unsupported`] (valid, or wished for, but beyond what this code does),
//! [`Ext4Error::Io`] (the disk below failed; a retry elsewhere may work) and [`Ext4Error::Usage`] (the caller broke the
//! contract). [`Ext4Error::Full`] is the writer's own limit. Used by every module of [`crate`] and by `diff`.

use super::BlockSize;
use std::{fmt, io};

/// Where in an image something was found; parts that are not known are left out of the message.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Place {
    /// Inode number.
    pub inode: Option<u32>,
    /// File system block.
    pub block: Option<u64>,
    /// Byte offset: inside the block if `block` is given, inside the inode if only `inode` is, else on the disk.
    pub offset: Option<u64>,
}

impl Place {
    /// In inode `ino`.
    pub fn inode(ino: u32) -> Self {
        Self { inode: Some(ino), ..Self::default() }
    }

    /// In block `block`.
    pub fn block(block: u64) -> Self {
        Self { block: Some(block), ..Self::default() }
    }

    /// At byte `offset` of the disk.
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
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [("inode", self.inode.map(u64::from)), ("block", self.block), ("byte", self.offset)];
        let mut first = true;
        for (name, value) in parts {
            if let Some(value) = value {
                write!(f, "{}{name} {value}", if first { "" } else { ", " })?;
                first = false;
            }
        }
        if first { f.write_str("image") } else { Ok(()) }
    }
}

/// An error of the ext4 room.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Ext4Error {
    /// The image contradicts itself or the format.
    #[error("corrupt ext4: {what} ({place})")]
    Corrupt {
        /// What is wrong, lower case.
        what: String,
        /// Where.
        place: Place,
    },
    /// Valid, but outside of what this code reads or writes.
    #[error("unsupported by ext4 code: {what} ({place})")]
    Unsupported {
        /// What is not supported, with the limit.
        what: String,
        /// Where.
        place: Place,
    },
    /// The disk below failed.
    #[error("ext4 i/o: {doing} ({place})")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Where.
        place: Place,
        /// What the disk said.
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
    #[error("a symbolic link's target has {bytes} bytes, blocks of this size take {most}")]
    LinkTarget {
        /// Length of the target.
        bytes: u64,
        /// The longest that fits.
        most: u32,
    },
    /// The names of a node's extended attributes do not fit one block, which ext4 keeps them in; larger blocks take more.
    #[error(
        "the names of {count} extended attributes need a block of {bytes} bytes, blocks here have {most}"
    )]
    AttributeNames {
        /// How many attributes.
        count: usize,
        /// Bytes of their entries, with the block's header.
        bytes: u64,
        /// The block size.
        most: u32,
    },
    /// A file is larger than 2^32 blocks; larger blocks take larger ones.
    #[error("a file of {bytes} bytes, blocks of this size take {most}")]
    FileSize {
        /// Size of the file.
        bytes: u64,
        /// The largest that blocks of this size take.
        most: u64,
    },
    /// The image would outgrow the limit that the caller set.
    #[error("ext4 image exceeds its limit of {limit} bytes")]
    Full {
        /// `WriterOptions::max_image_bytes`.
        limit: u64,
    },
}

impl Ext4Error {
    /// Whether the largest blocks, of 4 KiB, would take what smaller ones could not.
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

    /// A [`Ext4Error::Corrupt`].
    pub fn corrupt(what: impl Into<String>, place: Place) -> Self {
        Self::Corrupt { what: what.into(), place }
    }

    /// A [`Ext4Error::Unsupported`].
    pub fn unsupported(what: impl Into<String>, place: Place) -> Self {
        Self::Unsupported { what: what.into(), place }
    }

    /// A [`Ext4Error::Usage`].
    pub fn usage(what: impl Into<String>) -> Self {
        Self::Usage { what: what.into() }
    }

    /// A [`Ext4Error::Io`].
    pub fn io(doing: &'static str, place: Place, source: io::Error) -> Self {
        Self::Io { doing, place, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_place() {
        let e = Ext4Error::corrupt("bad checksum", Place::inode(12).at_block(77).at_offset(4));
        assert_eq!(e.to_string(), "corrupt ext4: bad checksum (inode 12, block 77, byte 4)");
        assert_eq!(Place::default().to_string(), "image");
    }
}
