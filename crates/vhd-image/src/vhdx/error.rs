//! Errors of the VHDX reader and writer, one variant per cause.
//!
//! [`VhdxError::Corrupt`]: a broken or hostile file. [`VhdxError::Unsupported`]: a valid file with a feature that is not
//! implemented. [`VhdxError::Io`]: the underlying disk. [`VhdxError::Usage`]: the caller.

use std::io;

/// Why a VHDX could not be created, opened or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VhdxError {
    /// The file contradicts itself or the format.
    #[error("corrupt vhdx: {what} (byte {offset} of the file)")]
    Corrupt {
        /// What is wrong.
        what: &'static str,
        /// Where in the file, in bytes.
        offset: u64,
    },
    /// Valid, but with a feature or size that is not implemented.
    #[error("unsupported vhdx: {0}")]
    Unsupported(&'static str),
    /// The underlying disk failed.
    #[error("cannot {action} the vhdx")]
    Io {
        /// What was attempted: `read`, `write`, …
        action: &'static str,
        /// The error of the disk.
        #[source]
        source: io::Error,
    },
    /// Options or offsets that no VHDX can have.
    #[error("a vhdx cannot have {0}")]
    Usage(String),
}

impl VhdxError {
    pub(super) fn corrupt(what: &'static str, offset: u64) -> Self {
        Self::Corrupt { what, offset }
    }

    /// A closure for `map_err`.
    pub(super) fn io(action: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { action, source }
    }
}

impl From<VhdxError> for io::Error {
    fn from(error: VhdxError) -> Self {
        match error {
            VhdxError::Io { source, .. } => source,
            VhdxError::Corrupt { .. } => Self::new(io::ErrorKind::InvalidData, error),
            VhdxError::Unsupported(_) => Self::new(io::ErrorKind::Unsupported, error),
            VhdxError::Usage(_) => Self::new(io::ErrorKind::InvalidInput, error),
        }
    }
}
