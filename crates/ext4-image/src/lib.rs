#![doc = include_str!("../README.md")]
//!
//! # Modules
//!
//! ```text
//!   layer-codec ──► writer, hcsshim ─┐                      ┌─► reader ──► layer-codec, layer inspect
//!   svm-agent ────► format ──────────┼─► layout (structs, ──┤
//!                                    │   checksums, hash)   └─► check  ──► svm-agent (fresh worker), layer verify
//!                                    └────────► disk_io::{ReadAt, WriteAt}
//! ```
//!
//! Invariants: nothing here knows paths, tar, HTTP or runtimes; the writers and the formatter only produce what
//! `e2fsck -fn` passes; the reader and the checker treat every image as hostile.

#![forbid(unsafe_code)]

pub mod check;
pub mod error;
pub mod format;
#[cfg(feature = "hcsshim")]
pub mod hcsshim;
pub(crate) mod layout;
mod output;
pub(crate) mod reader;
#[cfg(all(any(test, feature = "testing"), unix))]
pub mod testing;
pub mod writer;

pub use error::{CorruptKind, Ext4Error, Ext4ErrorKind, Place};
pub use layout::{
    BlockSize, EXT4_LINK_MAX, Timestamp,
    inode::InodeFlags,
    superblock::{Compat, Incompat, RoCompat},
};
pub use reader::{DataRange, DirEntry, Ext4, Extent, FileKind, Geometry, Inode, MAX_NAMED, Owners};

/// One extended attribute as the system call interface sees it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Xattr {
    /// Full name with its namespace, for example `user.mime_type` or `system.posix_acl_access`.
    pub name: Vec<u8>,
    /// Value as `getxattr` returns it (POSIX ACLs in the kernel's version 2 form); any bytes, at most 64 KiB.
    pub value: Vec<u8>,
}
