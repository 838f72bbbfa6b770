//! Errors of the driver: refusals of its own, and the shared shapes of [`crate::error`]. `api` turns them into replies.

use crate::{
    config::{ConfigError, SvmKind},
    error::{Attempt, CorruptFile, Fault, Kind, with_causes},
    store::{InvalidId, LayerId, SnapshotRefusal, StoreError},
    svm::SvmError,
};
use std::{io, path::PathBuf};

/// What a service VM does with the tar of an ApplyDiff.
pub(super) const APPLY: &str = "apply its tar";

/// Errors of graphdriver operations. With its causes, the text is what `docker` shows.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The request is wrong, or does not fit the layer; the text says what to do.
    #[error("{0}")]
    Usage(String),
    /// An option is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file of the store is not what it must be.
    #[error(transparent)]
    Corrupt(#[from] CorruptFile),
    /// A service VM refused or failed.
    #[error(transparent)]
    Svm(#[from] Attempt<SvmError>),
    /// The backend that `lcow.svm` names does not work here.
    #[error("lcow.svm={kind} cannot work: {reason}")]
    Backend {
        /// The backend.
        kind: SvmKind,
        /// What is missing, and what to do.
        reason: String,
    },
    /// The kernel refused a mount or a loop device.
    #[cfg(target_os = "linux")]
    #[error(transparent)]
    Mount(#[from] Attempt<lcow_sys::linux::SysError>),
    /// The operating system refused a file operation.
    #[error(transparent)]
    Io(#[from] Attempt<io::Error>),
    /// The tar of an ApplyDiff was cut because the Diff that produced it failed.
    #[error(
        "layer {id}: its tar was cut after {bytes} bytes, because the diff of layer {from} failed: {reason}"
    )]
    CutSource {
        /// The layer.
        id: String,
        /// The layer of the Diff.
        from: String,
        /// Bytes that had arrived.
        bytes: u64,
        /// Why the Diff failed.
        reason: String,
    },
    /// A bug: a task of the program panicked, or an invariant does not hold.
    #[error("internal error: {0}")]
    Internal(String),
}

impl From<SnapshotRefusal> for DriverError {
    fn from(refusal: SnapshotRefusal) -> Self {
        StoreError::from(refusal).into()
    }
}

impl From<InvalidId> for DriverError {
    fn from(error: InvalidId) -> Self {
        StoreError::from(error).into()
    }
}

impl Fault for DriverError {
    fn kind(&self) -> Kind {
        match self {
            Self::Usage(_) | Self::Config(_) => Kind::Usage,
            Self::Store(error) => error.kind(),
            Self::Corrupt(error) => error.kind(),
            Self::Svm(error) => error.kind(),
            Self::Backend { .. } => Kind::Unsupported,
            #[cfg(target_os = "linux")]
            Self::Mount(error) => error.kind(),
            Self::Io(error) => error.kind(),
            Self::CutSource { .. } => Kind::Cancelled,
            Self::Internal(_) => Kind::Internal,
        }
    }
}

impl DriverError {
    /// One layer is at fault; the same operation may succeed for others. False for what would affect every layer: a
    /// full or failing disk, a store or backend that does not work, a wrong option.
    pub fn is_of_one_layer(&self) -> bool {
        match self {
            Self::Svm(attempt) => attempt.source.is_of_one_operation(),
            Self::Store(error) => matches!(error.kind(), Kind::NotFound | Kind::State | Kind::Limit),
            Self::Usage(_) => true,
            _ => false,
        }
    }

    /// The refusal, if the snapshots that exist do not allow a request.
    pub fn snapshot_refusal(&self) -> Option<&SnapshotRefusal> {
        match self {
            Self::Store(StoreError::Snapshot(refusal)) => Some(refusal),
            _ => None,
        }
    }

    /// Stored data are damaged, which an operator must look into. Not so a damaged tar that a client sent.
    pub fn is_corrupt(&self) -> bool {
        let sent = matches!(self, Self::Svm(attempt) if attempt.action == APPLY);
        self.kind() == Kind::Corrupt && !sent
    }

    /// The line for the log: as for the engine, and the last console output of the service VM if one failed.
    pub fn for_log(&self) -> String {
        match self {
            Self::Svm(attempt) => format!("{attempt}: {}", attempt.source.with_console()),
            _ => with_causes(self),
        }
    }

    /// Makes a [`DriverError::Io`], for `map_err`.
    pub(super) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let attempt = Attempt::on_path(action, path);
        move |source| Self::Io(attempt(source))
    }

    /// Makes a [`DriverError::Svm`], for `map_err`.
    pub(super) fn svm(id: &impl ToString, action: &'static str) -> impl FnOnce(SvmError) -> Self {
        let attempt = Attempt::on_layer(action, id);
        move |source| Self::Svm(attempt(source))
    }
}

/// The refusal of a layer whose ApplyDiff was interrupted: nothing but Remove helps.
pub(super) fn unfinished(id: &LayerId) -> DriverError {
    DriverError::Usage(format!(
        "layer {id} is incomplete (its ApplyDiff was interrupted); remove it and pull it again"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layers_own_faults_are_told_from_the_stores() {
        let id: crate::store::LayerId = "x".parse().unwrap();
        let svm = |source| DriverError::svm(&"x", APPLY)(source);
        let died = SvmError::Died { vm: "w".into(), cause: "signal 9".into(), console: String::new() };
        for error in
            [svm(died), StoreError::Exists(id).into(), DriverError::Usage("its parent is another".into())]
        {
            assert!(error.is_of_one_layer(), "{error}");
        }
        let boot = SvmError::Boot { reason: "no memory".into(), console: String::new() };
        let full = StoreError::LowSpace { home: "/h".into(), free: 1, reserve: 2 };
        let io = DriverError::io("write", "/h")(io::ErrorKind::StorageFull.into());
        for error in [svm(boot), full.into(), io] {
            assert!(!error.is_of_one_layer(), "{error}");
        }
    }
}
