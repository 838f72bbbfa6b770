//! What can go wrong in a store.

use super::LayerId;
use std::{
    fmt::Write as _,
    io,
    path::{Path, PathBuf},
};

/// Errors of the layer store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The caller gave something that is no layer id.
    #[error("'{}' is not a layer id: {reason}", id.escape_debug())]
    InvalidId {
        /// What was given (cut to a printable length).
        id: String,
        /// Why it is none.
        reason: &'static str,
    },
    /// No layer of this id.
    #[error("layer {0} does not exist")]
    NotFound(LayerId),
    /// A layer of this id is there already.
    #[error("layer {0} exists already; remove it first")]
    Exists(LayerId),
    /// The parent named for a new layer is not there.
    #[error("layer {id} cannot be created: its parent {parent} does not exist")]
    MissingParent {
        /// The new layer.
        id: LayerId,
        /// The parent that was asked for.
        parent: LayerId,
    },
    /// Other layers stand on this one.
    #[error("layer {id} still has children and is kept for them: {}; remove those first", list(children))]
    HasChildren {
        /// The layer that was to be removed.
        id: LayerId,
        /// Its children.
        children: Vec<LayerId>,
    },
    /// The layer is in a state in which this cannot be done.
    #[error("layer {id}: {reason}")]
    WrongState {
        /// The layer.
        id: LayerId,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The layer's own files cannot be read.
    #[error("layer {id}: it is damaged and can only be removed: {reason}")]
    Damaged {
        /// The layer.
        id: LayerId,
        /// What is wrong with it.
        reason: String,
    },
    /// A chain would be longer than the merged view can be.
    #[error("layer {id} would be number {depth} of its chain; {max} is the limit")]
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
        /// The store's folder.
        home: PathBuf,
        /// Who holds it.
        holder: String,
    },
    /// A file of the store is not what it must be.
    #[error("'{}' is damaged: {reason}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The store was made by a newer program.
    #[error("the store '{}' has format {found}; this program knows formats up to {known}", home.display())]
    UnsupportedFormat {
        /// The store's folder.
        home: PathBuf,
        /// Its format.
        found: u32,
        /// The newest one known here.
        known: u32,
    },
    /// Too little space is left on the disk.
    #[error("only {free} bytes are free on the disk of '{}', and lcow.minfree keeps {reserve}; free some space or lower lcow.minfree", home.display())]
    LowSpace {
        /// The store's folder.
        home: PathBuf,
        /// Bytes free now.
        free: u64,
        /// Bytes to keep free.
        reserve: u64,
    },
    /// Wrong use.
    #[error("{0}")]
    Usage(String),
    /// The system refused.
    #[error("cannot {action} '{}'", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl StoreError {
    /// Makes an [`StoreError::Io`] of a system error, for `map_err`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
        let path = path.to_owned();
        move |source| StoreError::Io { action, path, source }
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
