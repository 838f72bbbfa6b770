//! What can go wrong between a tar and an image. (Branch tar's file plus `ChangedWhileReading`.)

use crate::ext4::Ext4Error;
use std::io;

/// Why a diff could not be applied, replayed or made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiffError {
    /// The image as a whole fails.
    #[error("the ext4 image fails")]
    Ext4(#[from] Ext4Error),
    /// A stored record, or the image it points into, is not what was written.
    #[error("{what} is corrupt at byte {offset}: {reason}")]
    Corrupt {
        /// The damaged thing.
        what: &'static str,
        /// Where in it.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// A stored thing is of a version or kind that this program does not know.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// The thing.
        what: &'static str,
        /// What is not supported.
        reason: String,
    },
    /// A mounted sandbox was written to while its data were read; what was sent so far is not a diff.
    #[error("{path:?} changed while it was read")]
    ChangedWhileReading {
        /// The file, printable.
        path: String,
    },
    /// The caller asked for something impossible.
    #[error("{0}")]
    Usage(String),
    /// Reading or writing failed.
    #[error("{what} failed")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

impl DiffError {
    /// Makes an I/O error that says what was being done.
    pub fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}
