//! An entry of a tar, with all its extended headers applied.
//!
//! Plain values: names and xattrs are copied from the stream, within the limits of this crate; file data is not part of it.
//! Filled by `header`, lent out by the reader.

/// A point in time: seconds since 1970 (negative: before), and nanoseconds after that second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Time {
    /// Seconds since 1970-01-01 00:00 UTC.
    pub secs: i64,
    /// Nanoseconds, less than 10^9.
    pub nanos: u32,
}

/// An extended attribute with its full name (`user.x`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    /// Name: not empty, without NUL.
    pub name: Vec<u8>,
    /// Value: any bytes.
    pub value: Vec<u8>,
}

/// The type of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EntryKind {
    /// Regular file; its data follows.
    #[default]
    File,
    /// Directory.
    Directory,
    /// Symbolic link to [`Entry::link`].
    Symlink,
    /// Hard link to [`Entry::link`].
    HardLink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
}

/// An entry with all extended headers applied.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Entry {
    /// The name as in the tar: any bytes, possibly absolute, possibly with `..` or a trailing slash.
    pub path: Vec<u8>,
    /// Target of a symbolic or hard link.
    pub link: Vec<u8>,
    /// Its type.
    pub kind: EntryKind,
    /// Permissions: the bits of 07777.
    pub mode: u16,
    /// User id of the owner.
    pub uid: u32,
    /// Group id of the owner.
    pub gid: u32,
    /// Size of the file in bytes, including holes; 0 for all other types.
    pub size: u64,
    /// Number of data bytes in the stream.
    pub stored: u64,
    /// Modification time.
    pub mtime: Time,
    /// Access time, if present.
    pub atime: Option<Time>,
    /// Change time, if present.
    pub ctime: Option<Time>,
    /// Major device number.
    pub major: u32,
    /// Minor device number.
    pub minor: u32,
    /// Extended attributes; names are unique.
    pub xattrs: Vec<Xattr>,
    /// Offset of the header block in the stream, in bytes.
    pub offset: u64,
    /// The first difference, in this entry or an earlier one, to what Go's archive/tar reads; `None` if there is none.
    pub go_differs: Option<&'static str>,
}
