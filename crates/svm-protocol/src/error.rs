//! Errors of an operation: a kind that the daemon acts on and a message for people, made from the codec's errors.
//!
//! Called by the agent, which sends them, and by `svm`, which reads them.

use ext4_image::{Ext4Error, Ext4ErrorKind};
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
    /// Well-formed, but not supported.
    Unsupported,
    /// A size or number beyond a limit.
    Limit,
    /// The disk of the output is full.
    NoSpace,
    /// Reading or writing failed.
    Io,
    /// The request is invalid (unknown disk, …).
    Usage,
    /// The file changed while it was read (live sandboxes).
    Changed,
    /// The tar depends on its parent layers, which the request leaves open: it may be applied again with them.
    NeedsLowers,
    /// The daemon closed the channel.
    Cancelled,
    /// A bug of the agent (panic).
    Internal,
}

/// Why an operation failed: kind and text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct WireError {
    /// What the daemon can do about it.
    pub kind: ErrorKind,
    /// For people; names the entry and its offset if there are any.
    pub message: String,
    /// With [`ErrorKind::Changed`]: the files that changed.
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
    match error.kind() {
        Ext4ErrorKind::Corrupt => ErrorKind::Corrupt,
        Ext4ErrorKind::Unsupported => ErrorKind::Unsupported,
        Ext4ErrorKind::Io => error.io_error().map_or(ErrorKind::Io, |source| io_kind(source.kind())),
        Ext4ErrorKind::Usage => ErrorKind::Usage,
        Ext4ErrorKind::Limit => ErrorKind::Limit,
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
        DiffError::NeedsLowers { .. } => ErrorKind::NeedsLowers,
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
