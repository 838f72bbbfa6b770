//! Blank journaled ext4 for sandboxes, as a handful of writes; no I/O.
//!
//! Called by the agent (create_sandbox). The file behind must read as zeros where nothing is written.

use super::{Ext4Error, writer::Attributes};

/// What a blank file system holds.
#[derive(Debug, Clone, Default)]
pub struct BlankOptions {
    /// UUID.
    pub uuid: [u8; 16],
    /// Label; at most 16 bytes, without NUL.
    pub label: Vec<u8>,
    /// Attributes of the root directory.
    pub root: Attributes,
    /// Directories in the root: name and attributes.
    pub directories: Vec<(Vec<u8>, Attributes)>,
    /// Size of the journal in bytes; `None` chooses by the size of the file system.
    pub journal_bytes: Option<u64>,
    /// Creation time in seconds since 1970, for `s_mkfs_time`.
    pub mkfs_time: u32,
}

/// The writes (byte offset, bytes) that turn a file of `size_bytes` zeros into a mountable ext4.
///
/// # Errors
/// `Usage` if the size is too small, too large or names are bad.
pub fn blank(size_bytes: u64, options: &BlankOptions) -> Result<Vec<(u64, Vec<u8>)>, Ext4Error> {
    let _ = (size_bytes, options);
    todo!()
}

impl BlankOptions {
    /// A sandbox: folders `upper` and `work`, owned by the containers' root.
    pub fn sandbox(uuid: uuid::Uuid, uid: u32, gid: u32) -> Self {
        let _ = (uuid, uid, gid);
        todo!()
    }
}
