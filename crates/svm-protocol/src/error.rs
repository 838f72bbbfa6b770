//! Errors of an operation: the codec's errors as a kind that the daemon acts upon, and a text for people.

use ext4_image::Ext4Error;
use layer_codec::{DiffError, LiveFile};
use layer_tar::TarError;
use serde::{Deserialize, Serialize};
use std::{error::Error, fmt::Write as _, io};
use verity_tree::VerityError;

/// Why an operation failed in the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The tar or image breaks its format.
    Corrupt,
    /// Well-formed, but more than we do.
    Unsupported,
    /// A size or number beyond a limit.
    Limit,
    /// The disk of the output is full.
    NoSpace,
    /// Reading or writing failed.
    Io,
    /// The request makes no sense (unknown disk, …).
    Usage,
    /// The file changed while it was read (live sandboxes).
    Changed,
    /// The daemon gave up.
    Cancelled,
    /// A fault of ours (panic).
    Internal,
}

/// Why an operation failed: kind and text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct WireError {
    /// What sort of failure.
    pub kind: ErrorKind,
    /// For people: names entry and offset where there are any.
    pub message: String,
    /// Of [`ErrorKind::Changed`]: the files that changed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changed: Vec<LiveFile>,
}

impl WireError {
    /// A failure of `kind`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), changed: Vec::new() }
    }
}

/// An error and its causes in one line, separated by colons.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        // Writing to a String cannot fail.
        let _ = write!(text, ": {inner}");
        cause = inner.source();
    }
    text
}

fn io_kind(kind: io::ErrorKind) -> ErrorKind {
    match kind {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
        io::ErrorKind::FileTooLarge => ErrorKind::Limit,
        io::ErrorKind::ConnectionAborted | io::ErrorKind::BrokenPipe => ErrorKind::Cancelled,
        _ => ErrorKind::Io,
    }
}

fn ext4_kind(error: &Ext4Error) -> ErrorKind {
    match error {
        Ext4Error::Corrupt { .. } => ErrorKind::Corrupt,
        Ext4Error::Unsupported { .. }
        | Ext4Error::LinkTarget { .. }
        | Ext4Error::AttributeNames { .. }
        | Ext4Error::FileSize { .. } => ErrorKind::Unsupported,
        Ext4Error::Io { source, .. } => io_kind(source.kind()),
        Ext4Error::Usage { .. } => ErrorKind::Usage,
        Ext4Error::Full { .. } => ErrorKind::Limit,
        _ => ErrorKind::Internal,
    }
}

fn verity_kind(error: &VerityError) -> ErrorKind {
    match error {
        VerityError::Io { source, .. } => io_kind(source.kind()),
        VerityError::Unsupported(_) => ErrorKind::Unsupported,
        _ => ErrorKind::Corrupt,
    }
}

impl From<VerityError> for WireError {
    fn from(error: VerityError) -> Self {
        Self::new(verity_kind(&error), with_causes(&error))
    }
}

fn diff_kind(error: &DiffError) -> ErrorKind {
    match error {
        DiffError::Tar(TarError::Io { source, .. }) | DiffError::Io { source, .. } => io_kind(source.kind()),
        DiffError::Verity(e) => verity_kind(e),
        DiffError::Tar(_) | DiffError::Entry { .. } | DiffError::Corrupt { .. } => ErrorKind::Corrupt,
        DiffError::Ext4(e) | DiffError::Image { source: e, .. } => ext4_kind(e),
        DiffError::Vhd(_) | DiffError::Limit { .. } | DiffError::Beyond { .. } => ErrorKind::Limit,
        DiffError::Unsupported { .. } | DiffError::Foreign { .. } => ErrorKind::Unsupported,
        DiffError::ChangedWhileReading { .. } => ErrorKind::Changed,
        DiffError::Usage(_) => ErrorKind::Usage,
        _ => ErrorKind::Internal,
    }
}

impl From<DiffError> for WireError {
    fn from(error: DiffError) -> Self {
        let made = Self::new(diff_kind(&error), with_causes(&error));
        match error {
            DiffError::ChangedWhileReading { files, .. } => Self { changed: files, ..made },
            _ => made,
        }
    }
}

impl From<Ext4Error> for WireError {
    fn from(error: Ext4Error) -> Self {
        Self::new(ext4_kind(&error), with_causes(&error))
    }
}
