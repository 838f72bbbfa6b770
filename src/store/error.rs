//! Errors of the store: refusals of its own, and the shared shapes of [`crate::error`].

use super::{LayerId, id::InvalidId, refusal::SnapshotRefusal};
use crate::error::{Attempt, CorruptFile, Fault, Kind};
use std::{
    fmt::Write as _,
    io,
    path::{Path, PathBuf},
};

/// Errors of the layer store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Not an id.
    #[error(transparent)]
    InvalidId(#[from] InvalidId),
    /// No layer of this id.
    #[error("layer {0} does not exist")]
    NotFound(LayerId),
    /// There is a layer of this id already.
    #[error("layer {0} exists already; remove it first")]
    Exists(LayerId),
    /// The parent of a new layer does not exist.
    #[error("layer {id} cannot be created: its parent {parent} does not exist")]
    MissingParent {
        /// The new layer.
        id: LayerId,
        /// The parent that was asked for.
        parent: LayerId,
    },
    /// The layer has children.
    #[error("layer {id} still has children: {}; remove those first", list(children))]
    HasChildren {
        /// The layer that was to be removed.
        id: LayerId,
        /// Its children.
        children: Vec<LayerId>,
    },
    /// The state of the layer does not allow this.
    #[error("layer {id}: {reason}")]
    WrongState {
        /// The layer.
        id: LayerId,
        /// What is wrong and what to do.
        reason: String,
    },
    /// `layer.json` or `layerchain.json` of the layer cannot be read.
    #[error("layer {id} is damaged and can only be removed: {reason}")]
    Damaged {
        /// The layer.
        id: LayerId,
        /// What is wrong with it.
        reason: String,
    },
    /// The chain would be longer than a merged view can be.
    #[error("layer {id} would be number {depth} of its chain; the limit is {max}")]
    TooDeep {
        /// The new layer.
        id: LayerId,
        /// Its depth, itself included.
        depth: usize,
        /// The limit.
        max: usize,
    },
    /// Another process owns the store.
    #[error("the store '{}' is in use by {holder}; stop it, or send it the command through its socket", home.display())]
    Locked {
        /// The store's directory.
        home: PathBuf,
        /// Who holds it.
        holder: String,
    },
    /// A file of the store is not what it must be.
    #[error(transparent)]
    Corrupt(#[from] CorruptFile),
    /// The store was made by a newer program.
    #[error("the store '{}' has format {found}; this program knows formats up to {known}", home.display())]
    UnsupportedFormat {
        /// The store's directory.
        home: PathBuf,
        /// Its format.
        found: u32,
        /// The newest one that this program knows.
        known: u32,
    },
    /// Too little space is left on the disk.
    #[error("only {free} bytes are free on the disk of '{}', and lcow.minfree keeps {reserve}; free some space or lower lcow.minfree", home.display())]
    LowSpace {
        /// The store's directory.
        home: PathBuf,
        /// Bytes free now.
        free: u64,
        /// Bytes to keep free.
        reserve: u64,
    },
    /// The caller asked for something that makes no sense.
    #[error("{0}")]
    Usage(String),
    /// The snapshots do not allow this.
    #[error(transparent)]
    Snapshot(#[from] SnapshotRefusal),
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] Attempt<io::Error>),
}

impl StoreError {
    /// Makes a [`StoreError::Io`], for `map_err`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let attempt = Attempt::on_path(action, path);
        move |source| Self::Io(attempt(source))
    }

    /// Makes a [`StoreError::Corrupt`].
    pub fn corrupt(path: impl Into<PathBuf>, reason: impl ToString) -> Self {
        Self::Corrupt(CorruptFile::new(path, reason))
    }
}

impl Fault for StoreError {
    fn kind(&self) -> Kind {
        match self {
            Self::InvalidId(_) | Self::Usage(_) => Kind::Usage,
            Self::NotFound(_) | Self::MissingParent { .. } => Kind::NotFound,
            Self::Exists(_) | Self::HasChildren { .. } | Self::WrongState { .. } => Kind::State,
            Self::Damaged { .. } => Kind::Corrupt,
            Self::TooDeep { .. } => Kind::Limit,
            Self::Locked { .. } => Kind::Busy,
            Self::UnsupportedFormat { .. } => Kind::Unsupported,
            Self::LowSpace { .. } => Kind::NoSpace,
            Self::Corrupt(error) => error.kind(),
            Self::Snapshot(refusal) => refusal.kind(),
            Self::Io(error) => error.kind(),
        }
    }
}

/// How many ids an error message names.
const LISTED: usize = 5;

fn list(ids: &[LayerId]) -> String {
    let mut text = ids.iter().take(LISTED).map(LayerId::as_str).collect::<Vec<_>>().join(", ");
    if ids.len() > LISTED {
        // Writing to a String cannot fail.
        let _ = write!(text, " and {} more", ids.len() - LISTED);
    }
    text
}
