//! ext4: layout, writer, blank formatter, reader, checker. (Merged with branch ext4w's.)

mod error;
pub mod layout;
pub mod reader;

pub use error::Ext4Error;
pub use reader::{DataRange, DirEntry, Ext4, Extent, FileKind, Inode};

/// A point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Seconds since 1970, negative before.
    pub secs: i64,
    /// Nanoseconds, below 10⁹.
    pub nanos: u32,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    /// Full name with its prefix.
    pub name: Vec<u8>,
    /// Value.
    pub value: Vec<u8>,
}
