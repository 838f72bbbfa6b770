//! What an entry of a tar is, all its headers applied.
//!
//! Plain values: names and xattrs are copied from the stream (bounded by the limits of this module), data are not here.
//! Filled by `header`, lent out by the reader.

/// A point in time: seconds since 1970 (negative: before) and nanoseconds forward from there (below 10^9).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Time {
    /// Seconds.
    pub secs: i64,
    /// Nanoseconds.
    pub nanos: u32,
}

/// An extended attribute with its full name (`user.x`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    /// Name, never empty, without NUL.
    pub name: Vec<u8>,
    /// Value: any bytes.
    pub value: Vec<u8>,
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EntryKind {
    /// Regular file; its data follow.
    #[default]
    File,
    /// Folder.
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

/// One entry, all extended headers applied.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Entry {
    /// The name as the tar has it: any bytes, possibly absolute, with `..` or a trailing slash.
    pub path: Vec<u8>,
    /// Target of a symbolic or hard link.
    pub link: Vec<u8>,
    /// Type.
    pub kind: EntryKind,
    /// Permissions, 07777.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes of the file as it shall be (with holes); 0 for all other kinds.
    pub size: u64,
    /// Bytes of data in the stream.
    pub stored: u64,
    /// Modification time.
    pub mtime: Time,
    /// Access time, if told.
    pub atime: Option<Time>,
    /// Change time, if told.
    pub ctime: Option<Time>,
    /// Device number.
    pub major: u32,
    /// Device number.
    pub minor: u32,
    /// Extended attributes; names are unique.
    pub xattrs: Vec<Xattr>,
    /// Offset of the header block in the stream.
    pub offset: u64,
    /// What Go's archive/tar takes otherwise in this entry or one before it, if anything.
    pub go_differs: Option<&'static str>,
}
