//! Which entry is being applied, for errors, and the names of overlayfs.
//!
//! Called by everything that puts entries into an image: `tree`, `links`, `layer`, `hcsshim`.

use super::name::NameError;
use crate::DiffError;
use ext4_image::{Ext4Error, Xattr};

/// Marks an opaque directory, with value `y`.
pub(super) const OVERLAY_OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// The attribute of an opaque directory.
pub(super) fn opaque() -> Xattr {
    Xattr { name: OVERLAY_OPAQUE.to_vec(), value: b"y".to_vec() }
}

/// An entry, for errors.
#[derive(Debug, Clone, Default)]
pub(super) struct Context {
    pub(super) path: Vec<u8>,
    pub(super) offset: u64,
}

impl Context {
    /// The name as errors show it.
    pub(super) fn name(&self) -> String {
        self.path.get(..1024).unwrap_or(&self.path).escape_ascii().to_string()
    }

    pub(super) fn refuse(&self, reason: impl Into<String>) -> DiffError {
        DiffError::Entry { entry: self.name(), offset: self.offset, reason: reason.into() }
    }

    pub(super) fn limit(&self, what: &'static str, limit: u64) -> DiffError {
        DiffError::Limit { entry: self.name(), offset: self.offset, what, limit }
    }

    pub(super) fn image(&self, source: Ext4Error) -> DiffError {
        DiffError::Image { entry: self.name(), offset: self.offset, source }
    }

    pub(super) fn name_error(&self, e: NameError, max_depth: usize) -> DiffError {
        match e {
            NameError::Escapes => self.refuse("name leaves the layer's root"),
            NameError::Nul => self.refuse("name holds a NUL"),
            NameError::TooDeep => self.limit("path components", max_depth as u64),
        }
    }
}
