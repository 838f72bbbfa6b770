//! ext4: on-disk layout, a streaming writer, a blank formatter, a reader and a checker.
//!
//! ```text
//!   diff::apply ──► writer ─┐                      ┌─► reader ──► diff::export
//!   agent ────────► format ─┼─► layout (structs, ──┤
//!                           │    checksums, hash)  └─► check  ──► agent (fresh worker)
//!                           └────────► io::{ReadAt, WriteAt}
//! ```
//!
//! Invariants: nothing here knows paths, tar, HTTP or runtimes; the writer and the formatter only produce what
//! `e2fsck -fn` passes; the reader and the checker take every image for hostile.

pub mod check;
pub mod error;
pub mod format;
pub mod hcsshim;
pub mod layout;
pub mod reader;
#[cfg(all(any(test, feature = "testing"), unix))]
pub mod testing;
pub mod writer;

pub use error::{Ext4Error, Place};
pub use layout::{BlockSize, Timestamp};
pub use reader::{DataRange, DirEntry, Ext4, Extent, FileKind, Inode, Owners};

/// One extended attribute as the system call interface sees it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Xattr {
    /// Full name with its namespace, for example `user.mime_type` or `system.posix_acl_access`.
    pub name: Vec<u8>,
    /// Value as `getxattr` returns it (POSIX ACLs in the kernel's version 2 form); any bytes, at most 64 KiB.
    pub value: Vec<u8>,
}
