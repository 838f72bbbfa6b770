//! What can go wrong with a hash tree.

use std::io;

/// Why a hash tree could not be written, read or believed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerityError {
    /// The super block or the tree contradicts the format or itself.
    #[error("corrupt hash tree at byte {offset}: {reason}")]
    Corrupt {
        /// Byte of the disk.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// Sound, but of a kind that is not read here.
    #[error("unsupported hash tree: {0}")]
    Unsupported(String),
    /// The disk failed.
    #[error("{what} at byte {offset}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Byte of the disk.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
}

impl VerityError {
    pub(super) fn io(what: &'static str, offset: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, offset, source }
    }
}
