//! Imports the layers of another storage driver into a layer store, so that the engine finds its images again.
//!
//! ```text
//!   <data-root>/                                            <data-root>/  (the same one, or another)
//!     image/overlay2/  layerdb, imagedb, repositories.json ──► image/lcow/  layerdb, imagedb, repositories.json   engine
//!     overlay2/<cache-id>/diff   ┐ tree                  ┌──► lcow/<cache-id>/layer.vhd …
//!     …/tar-split.json.gz ───────┴─► tarsplit ─► tar ────┘    the driver's ApplyDiff, in a service VM              data_root
//!   <LCOW home>/<id>/layer.vhd ─► service VM ─► <directory>/<id>.tar                                               original
//! ```
//!
//! Invariants:
//! * The source is read only: no file of it is opened for writing, renamed or touched.
//! * A layer is committed only if the rebuilt tar has the digest that the engine knows it by (its diff id).
//! * A layer or image that is refused is skipped with its reason, and so are the images built on it; everything else is
//!   imported. A condition that would affect every layer (a full disk, a store that does not work) ends the run, after
//!   the complete images have been registered with the engine.
//! * An image appears in the engine's database after all of its layers; a layer after its parent. So a run that was
//!   killed at any moment leaves a working engine, and the next run continues where it stopped.
//! * The files of a layer are untrusted: names are resolved inside its directory only, and the rebuilt tar is
//!   interpreted only in a service VM.
//! * Containers are not imported; their number is reported.
//!
//! Formats: moby's `layer/filestore.go`, `image/fs.go`, `reference/store.go`; vbatts/tar-split `tar/storage`. Called by
//! `cli` (`store import`).

mod data_root;
mod digest;
mod engine;
mod original;
mod tarsplit;
mod tree;

pub use data_root::{Event, import, look};
pub use digest::Digest;
pub use engine::{EngineDb, ImageNote, LayerNote};
pub use original::export_original;
pub use tarsplit::SplitError;

use crate::{
    driver::DriverError,
    error::{Attempt, CorruptFile, Fault, Kind},
    store::StoreError,
    svm::SvmError,
};
use std::{io, path::Path};

/// Why a layer, an image or a whole source could not be imported.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// Wrong use.
    #[error("{0}")]
    Usage(String),
    /// A file of the source, or of the target's database, is not what it must be.
    #[error(transparent)]
    Corrupt(#[from] CorruptFile),
    /// A layer's tar cannot be reassembled.
    #[error("layer {layer} cannot be reassembled")]
    Rebuild {
        /// Its cache id: the name of its directory.
        layer: String,
        /// Why.
        #[source]
        source: SplitError,
    },
    /// A layer's tar was reassembled, but has another digest than the engine recorded.
    #[error("layer {layer} cannot be reassembled: tar digest mismatch: expected {wanted}, found {found}")]
    Differs {
        /// Its cache id.
        layer: String,
        /// The digest of the reassembled tar.
        found: Digest,
        /// The digest that the engine recorded, its diff id.
        wanted: Digest,
    },
    /// The store has another layer under a layer's id.
    #[error(
        "the store has a different layer with the id {layer}; import into an empty store, or remove that layer"
    )]
    Taken {
        /// The id.
        layer: String,
    },
    /// The store refused.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// A file or directory of a layer in the store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A service VM refused or failed.
    #[error(transparent)]
    Svm(#[from] Attempt<SvmError>),
    /// The operating system refused a file operation.
    #[error(transparent)]
    Io(#[from] Attempt<io::Error>),
    /// A task of the program died.
    #[error("an internal task ended early: {0}")]
    Internal(String),
}

impl MigrateError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let attempt = Attempt::on_path(action, path);
        move |source| Self::Io(attempt(source))
    }

    fn corrupt(path: &Path, reason: impl ToString) -> Self {
        Self::Corrupt(CorruptFile::new(path, reason))
    }

    /// Whether only this layer is affected, so that others can still be imported. The driver's refusals (of its tar, of
    /// a limit, by the check) are the likeliest; a full disk or a store that does not work is not among them.
    fn is_of_one_layer(&self) -> bool {
        match self {
            Self::Corrupt(_) | Self::Rebuild { .. } | Self::Differs { .. } | Self::Taken { .. } => true,
            Self::Driver(error) => error.is_of_one_layer(),
            Self::Svm(attempt) => attempt.source.is_of_one_operation(),
            Self::Usage(_) | Self::Store(_) | Self::Io(_) | Self::Internal(_) => false,
        }
    }
}

impl Fault for MigrateError {
    fn kind(&self) -> Kind {
        match self {
            Self::Usage(_) => Kind::Usage,
            Self::Corrupt(error) => error.kind(),
            Self::Rebuild { .. } | Self::Differs { .. } => Kind::Corrupt,
            Self::Taken { .. } => Kind::State,
            Self::Driver(error) => error.kind(),
            Self::Store(error) => error.kind(),
            Self::Svm(error) => error.kind(),
            Self::Io(error) => error.kind(),
            Self::Internal(_) => Kind::Internal,
        }
    }
}
