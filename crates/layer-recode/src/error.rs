//! Why a stream was not expanded or compressed.

use crate::Compression;
use std::io;

/// An error of a stream; `offset` counts bytes of the compressed side.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecodeError {
    /// The stream breaks its format, is cut off, or fails a checksum.
    #[error("{format} stream: {what}, at byte {offset}")]
    Corrupt {
        /// The format.
        format: Compression,
        /// What is wrong.
        what: String,
        /// Where.
        offset: u64,
    },
    /// Something that the format reserves, or that is not supported.
    #[error("{format} stream: {what}, at byte {offset}")]
    Unsupported {
        /// The format.
        format: Compression,
        /// What is not supported.
        what: String,
        /// Where.
        offset: u64,
    },
    /// The stream expands to more bytes than the limit.
    #[error("the stream expands to more than {0} bytes, which is the limit")]
    Output(u64),
    /// A zstd frame needs a larger window than the limit.
    #[error("zstd stream: a window larger than 2^{log} bytes, the limit, at byte {offset}")]
    Window {
        /// Base-2 logarithm of the limit.
        log: u32,
        /// Where the frame begins, or a byte in its header.
        offset: u64,
    },
    /// There is not enough memory for a decoder.
    #[error("zstd stream: {what}, at byte {offset}")]
    Memory {
        /// The message of the library.
        what: String,
        /// Where.
        offset: u64,
    },
    /// The caller asked for a level, a limit or a call that does not exist.
    #[error("{0}")]
    Usage(String),
    /// A library does not do what it documents.
    #[error("{0}")]
    Internal(String),
    /// Reading the input failed.
    #[error("reading the stream failed")]
    Read(#[source] io::Error),
    /// Writing the output failed.
    #[error("writing the stream failed")]
    Write(#[source] io::Error),
}

impl RecodeError {
    /// A stream that breaks its format.
    pub(crate) fn corrupt(format: Compression, what: impl Into<String>, offset: u64) -> Self {
        Self::Corrupt { format, what: what.into(), offset }
    }
}

impl From<RecodeError> for io::Error {
    /// Errors of the input keep their kind; all others become `InvalidData` with the [`RecodeError`] inside.
    fn from(error: RecodeError) -> Self {
        match error {
            RecodeError::Read(source) => source,
            other => Self::new(io::ErrorKind::InvalidData, other),
        }
    }
}
