//! ext4 images: two writers, a blank formatter, a reader and a checker on one description of the on-disk layout.
//!
//! ```text
//!   layer-codec ──► writer, hcsshim ─┐                      ┌─► reader ──► layer-codec, layer inspect
//!   svm-agent ────► format ──────────┼─► layout (structs, ──┤
//!                                    │   checksums, hash)   └─► check  ──► svm-agent (fresh worker), layer verify
//!                                    └────────► disk_io::{ReadAt, WriteAt}
//! ```
//!
//! Everything works on [`disk_io::ReadAt`] and [`disk_io::WriteAt`]. Invariants: nothing here knows paths, tar, HTTP or
//! runtimes; the writers and the formatter only produce what `e2fsck -fn` passes; the reader and the checker treat every
//! image as hostile.
//!
//! # Limits
//!
//! Writers: blocks of 1, 2 or 4 KiB, no journal, 2^32 inodes, [`EXT4_LINK_MAX`] names of a file. Formatter:
//! [`format::MIN_BYTES`] to [`format::MAX_BYTES`]. Reader: no bigalloc, encryption, casefolding, compression or journal on
//! another device; directories up to 512 MiB, 4 Mi extents and 16 MiB of xattr values an inode. Checker:
//! [`check::CheckLimits`].
//!
//! # Byte stability
//!
//! The same calls give the same image on every platform; [`check::WRITER`] is raised if a release writes other bytes.
//! CHANGELOG.md has the promise for each writer.

#![forbid(unsafe_code)]

pub mod check;
pub mod error;
pub mod format;
#[cfg(feature = "hcsshim")]
pub mod hcsshim;
pub(crate) mod layout;
pub mod offline;
mod output;
pub(crate) mod reader;
#[cfg(any(test, feature = "testing"))]
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

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
