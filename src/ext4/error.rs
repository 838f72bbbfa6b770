//! What can go wrong in an ext4 image. (Placeholder of branch ext4r until ext4w's file is merged.)

use std::{borrow::Cow, io};

/// Why an image could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Ext4Error {
    /// The disk fails.
    #[error("{what} failed")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The image breaks the format's rules.
    #[error("ext4 is corrupt: {place}: {reason}")]
    Corrupt {
        /// Inode, block or structure.
        place: String,
        /// What is wrong.
        reason: Cow<'static, str>,
    },
    /// The image is sound, but uses what this program does not know.
    #[error("ext4 feature is not supported: {0}")]
    Unsupported(Cow<'static, str>),
}
