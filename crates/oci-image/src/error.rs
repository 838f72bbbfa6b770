//! Why an image was refused.
//!
//! Text that comes from an image is escaped and truncated before it becomes part of a message
//! ([`shown`](crate::shown)). Errors name a part of a source, and never the source itself: whoever opens it knows its name, and
//! says it once.

use crate::{Digest, digest::DigestError};
use layer_recode::RecodeError;
use std::io;

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageErrorKind {
    /// The request is wrong.
    Usage,
    /// What was requested is not there, or several things are.
    NotFound,
    /// The image contradicts itself or its format.
    Corrupt,
    /// Valid, but not supported.
    Unsupported,
    /// More than a limit.
    Limit,
    /// There is no space for a spooled archive.
    NoSpace,
    /// Reading or writing failed.
    Io,
}

/// An error of an image; `what` names the document, blob, member or archive.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A source, a platform or a digest is not written as it must be.
    #[error("{0}")]
    Usage(String),
    /// A reference, a platform, a blob or a member is missing.
    #[error("{what} not found{known}")]
    NotFound {
        /// What was looked for.
        what: String,
        /// What is there instead, or nothing.
        known: String,
    },
    /// Several images match a request.
    #[error("{what} is ambiguous: {known}")]
    Ambiguous {
        /// What was looked for.
        what: String,
        /// What matches, and how to choose.
        known: String,
    },
    /// A document, a member or a stream breaks its format.
    #[error("{what} is corrupt: {reason}")]
    Corrupt {
        /// The document, blob or member.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Not supported by this crate.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// The document, blob or member.
        what: String,
        /// What is not supported, and what to do.
        reason: String,
    },
    /// A limit of [`Limits`](crate::Limits).
    #[error("{what} exceeds a limit: {reason}")]
    Limit {
        /// The document, blob or member.
        what: String,
        /// The limit.
        reason: String,
    },
    /// Bytes do not have the digest that names them.
    #[error("digest mismatch of {what}: expected {expected}, found {found}")]
    Digest {
        /// The document, blob or layer.
        what: String,
        /// The digest that names it.
        expected: Box<Digest>,
        /// The digest of its bytes.
        found: Box<Digest>,
    },
    /// A blob does not have the size that its descriptor gives.
    #[error("size mismatch of {what}: expected {expected} bytes, found {found}")]
    Size {
        /// The blob.
        what: String,
        /// The size in the descriptor.
        expected: u64,
        /// The size of the blob, or of what was read of it.
        found: u64,
    },
    /// An archive that must be spooled does not fit.
    #[error(
        "no space to spool the archive: more than {room} bytes are needed; choose another directory for scratch files"
    )]
    NoSpace {
        /// Bytes that the scratch directory can take.
        room: u64,
    },
    /// Reading or writing failed.
    #[error("cannot read {what}")]
    Io {
        /// What was read.
        what: String,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
    /// Writing failed.
    #[error("cannot write {what}")]
    Write {
        /// What was written.
        what: String,
        /// The error of the system.
        #[source]
        source: io::Error,
    },
}

impl ImageError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ImageErrorKind {
        match self {
            Self::Usage(_) => ImageErrorKind::Usage,
            Self::NotFound { .. } | Self::Ambiguous { .. } => ImageErrorKind::NotFound,
            Self::Corrupt { .. } | Self::Digest { .. } | Self::Size { .. } => ImageErrorKind::Corrupt,
            Self::Unsupported { .. } => ImageErrorKind::Unsupported,
            Self::Limit { .. } => ImageErrorKind::Limit,
            Self::NoSpace { .. } => ImageErrorKind::NoSpace,
            Self::Io { .. } | Self::Write { .. } => ImageErrorKind::Io,
        }
    }

    pub(crate) fn corrupt(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Corrupt { what: what.into(), reason: reason.into() }
    }

    pub(crate) fn mismatch(what: impl Into<String>, expected: Digest, found: Digest) -> Self {
        Self::Digest { what: what.into(), expected: Box::new(expected), found: Box::new(found) }
    }

    pub(crate) fn unsupported(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into(), reason: reason.into() }
    }

    pub(crate) fn limit(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Limit { what: what.into(), reason: reason.into() }
    }

    /// The error that `error` carries, or one of reading `what`.
    pub(crate) fn reading(what: &str, error: io::Error) -> Self {
        match error.downcast::<Self>() {
            Ok(inner) => inner,
            Err(source) => Self::Io { what: what.to_owned(), source },
        }
    }

    /// The error of expanding `what`.
    pub(crate) fn expanding(what: &str, error: RecodeError) -> Self {
        match error {
            RecodeError::Read(source) => Self::reading(what, source),
            e @ (RecodeError::Output(_) | RecodeError::Window { .. } | RecodeError::Memory { .. }) => {
                Self::limit(what, e.to_string())
            }
            e @ RecodeError::Unsupported { .. } => Self::unsupported(what, e.to_string()),
            e => Self::corrupt(what, e.to_string()),
        }
    }
}

impl From<DigestError> for ImageError {
    fn from(error: DigestError) -> Self {
        Self::Usage(error.to_string())
    }
}

impl From<ImageError> for io::Error {
    /// An error of the system keeps its kind; all others become `InvalidData`. The [`ImageError`] is inside.
    fn from(error: ImageError) -> Self {
        let kind = match &error {
            ImageError::Io { source, .. } | ImageError::Write { source, .. } => source.kind(),
            ImageError::NoSpace { .. } => io::ErrorKind::StorageFull,
            _ => io::ErrorKind::InvalidData,
        };
        Self::new(kind, error)
    }
}
