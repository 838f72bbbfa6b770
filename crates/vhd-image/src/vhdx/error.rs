//! What can go wrong with a VHDX, and whose fault it is.
//!
//! [`VhdxError::Corrupt`] is a broken or hostile file, [`VhdxError::Unsupported`] a valid one beyond what is done here,
//! [`VhdxError::Io`] the disk below, [`VhdxError::Usage`] the caller. Used by all of [`crate::vhdx`].

use std::io;

/// An error of the VHDX room.
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
    /// Valid, but a feature or size that is not handled here.
    #[error("unsupported vhdx: {0}")]
    Unsupported(&'static str),
    /// The disk below failed.
    #[error("cannot {action} the vhdx")]
    Io {
        /// `read`, `write`, …
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Options or offsets that cannot be.
    #[error("a vhdx cannot have {0}")]
    Usage(String),
}

impl VhdxError {
    pub(super) fn corrupt(what: &'static str, offset: u64) -> Self {
        Self::Corrupt { what, offset }
    }

    /// For `map_err`.
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
