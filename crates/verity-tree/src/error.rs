//! Errors of building, finding and checking a hash tree.

use std::io;

/// Why a hash tree could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerityError {
    /// The super block or the tree contradicts the format or itself.
    #[error("corrupt hash tree at byte {offset}: {reason}")]
    Corrupt {
        /// Offset on the disk, in bytes.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// Valid, but with parameters that this crate does not implement.
    #[error("unsupported hash tree: {0}")]
    Unsupported(String),
    /// The disk failed.
    #[error("{what} at byte {offset}")]
    Io {
        /// What failed, as "reading the image".
        what: &'static str,
        /// Offset on the disk, in bytes.
        offset: u64,
        /// The error of the disk.
        source: io::Error,
    },
}

impl VerityError {
    pub(super) fn io(what: &'static str, offset: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, offset, source }
    }
}
