//! Why the snapshots that exist do not allow a request.
//!
//! ```text
//!   NotFound   Exists   Invalid   Precondition      the four codes that containerd tells apart
//! ```
//!
//! containerd's proxy keeps nothing of an error but its code, and acts on it: an unknown parent is another case than one
//! that is not committed. Called by `snapshots` and, through the driver, by the containerd face, which has a code for each.

use crate::error::Kind;

/// Why the snapshots that exist do not allow a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotRefusal {
    /// There is no snapshot of this key or name.
    #[error("snapshot '{0}' does not exist")]
    NotFound(String),
    /// There is one already.
    #[error("snapshot '{0}' exists already")]
    Exists(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The state of a snapshot does not allow the request.
    #[error("{0}")]
    Precondition(String),
}

impl SnapshotRefusal {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::NotFound(_) => Kind::NotFound,
            Self::Exists(_) | Self::Precondition(_) => Kind::State,
            Self::Invalid(_) => Kind::Usage,
        }
    }
}
