//! What can go wrong between a tar and an image.

use ext4_image::Ext4Error;
use layer_tar::TarError;
use std::io;
use verity_tree::VerityError;
use vhd_image::vhd::VhdError;

/// Why a diff could not be applied, replayed or made.
///
/// Kinds are kept apart because the caller acts on them: corrupt input fails the request for good, a corrupt stored
/// layer is a finding of `scrub`, a full disk may be retried, a limit may be raised by the operator.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiffError {
    /// The tar stream is malformed.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// The tar is well formed, but an entry is invalid in a layer.
    #[error("tar entry {entry:?} at byte {offset}: {reason}")]
    Entry {
        /// Name in the tar, printable.
        entry: String,
        /// Offset of its header in the stream.
        offset: u64,
        /// The rule that is broken.
        reason: String,
    },
    /// An entry cannot be stored in the image.
    #[error("tar entry {entry:?} at byte {offset} cannot be stored in the image")]
    Image {
        /// Name in the tar, printable.
        entry: String,
        /// Offset of its header in the stream.
        offset: u64,
        /// The reason of the image writer.
        #[source]
        source: Ext4Error,
    },
    /// Reading or writing the image fails.
    #[error("ext4 image error")]
    Ext4(#[from] Ext4Error),
    /// The reader does not support a sandbox's file system, and it was not mounted.
    #[error("a sandbox file system that this driver did not create ({advice})")]
    Foreign {
        /// What the operator can do.
        advice: &'static str,
        /// What the reader does not support.
        #[source]
        source: Ext4Error,
    },
    /// Reading, writing or checking the hash tree fails.
    #[error("hash tree error")]
    Verity(#[from] VerityError),
    /// The image cannot be a VHD.
    #[error("the image cannot be made a vhd")]
    Vhd(#[from] VhdError),
    /// More than the options allow.
    #[error("limit of {limit} {what} is exceeded (entry {entry:?} at byte {offset})")]
    Limit {
        /// Name in the tar, printable.
        entry: String,
        /// Offset in the stream.
        offset: u64,
        /// What is limited, with its unit.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// A layer holds more than a layer tar can express.
    #[error("{path:?}: {found} {what}, but a layer has at most {limit}; {advice}")]
    Beyond {
        /// Path in the layer, printable.
        path: String,
        /// What is too much, with its unit.
        what: &'static str,
        /// The value that was found.
        found: u64,
        /// The limit.
        limit: u64,
        /// What the operator can do.
        advice: &'static str,
    },
    /// A stored record, or the image it points into, is not what was written.
    #[error("{what} is corrupt at byte {offset}: {reason}")]
    Corrupt {
        /// What is damaged.
        what: &'static str,
        /// Offset in it; bytes.
        offset: u64,
        /// The rule that is broken.
        reason: String,
    },
    /// A stored file is of an unknown version or kind.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// What is not supported.
        what: &'static str,
        /// Why.
        reason: String,
    },
    /// A mounted sandbox was written to while its data were read; what was sent so far is not a diff.
    #[error("{names} changed while it was read{advice}")]
    ChangedWhileReading {
        /// The files, printable; a few of them.
        names: String,
        /// What will happen at the next attempt, or what can be done, with a separator before it.
        advice: String,
        /// The files, for the next attempt.
        files: Vec<super::LiveFile>,
    },
    /// The tar depends on the layers below, which are not known: [`LowerUse::Unknown`](crate::apply::LowerUse::Unknown).
    /// The tar may be applied again once they are.
    #[error(
        "{what}: this depends on the parent layers, which are not known yet; apply the tar again with them"
    )]
    NeedsLowers {
        /// The directory or the link, printable.
        what: String,
    },
    /// A layer of an image that is made one file system.
    #[error("layer {number} of the image, counted from its base at 0")]
    Layer {
        /// Its number; 0 for the base.
        number: usize,
        /// What is wrong with it.
        #[source]
        source: Box<Self>,
    },
    /// An id on a disk has no counterpart in the maps: [`ExportOptions::strict_ids`](crate::ExportOptions::strict_ids).
    #[error("\"{path}\": {} {} is in none of the ranges of --uid-map", .id.what, .id.id)]
    Outside {
        /// Path on the disk, printable.
        path: String,
        /// The id.
        id: super::OutsideId,
    },
    /// The caller asked for something impossible.
    #[error("{0}")]
    Usage(String),
    /// Reading or writing failed.
    #[error("{what} failed")]
    Io {
        /// The operation, as a gerund.
        what: &'static str,
        /// The error of the operating system.
        #[source]
        source: io::Error,
    },
}

impl DiffError {
    /// Whether an image of larger blocks would take what was refused: see [`Ext4Error::larger_blocks_help`].
    pub fn larger_blocks_help(&self) -> bool {
        match self {
            Self::Ext4(source) | Self::Image { source, .. } => source.larger_blocks_help(),
            Self::Layer { source, .. } => source.larger_blocks_help(),
            _ => false,
        }
    }

    /// The kind of the I/O error at the bottom, if it is one: `StorageFull` tells a full disk from bad input.
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Io { source, .. }
            | Self::Verity(VerityError::Io { source, .. })
            | Self::Tar(TarError::Io { source, .. })
            | Self::Ext4(Ext4Error::Io { source, .. })
            | Self::Image { source: Ext4Error::Io { source, .. }, .. } => Some(source.kind()),
            Self::Layer { source, .. } => source.io_kind(),
            _ => None,
        }
    }

    /// Makes the error of an id that the maps do not have.
    pub fn outside(path: &[u8], id: super::OutsideId) -> Self {
        Self::Outside { path: path.get(..1024).unwrap_or(path).escape_ascii().to_string(), id }
    }

    /// Makes an I/O error that names the operation.
    pub fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}
