//! What can go wrong in the driver.

use crate::{
    config::{ConfigError, SvmKind},
    store::StoreError,
    svm::{ErrorKind, SvmError},
};
use std::{io, path::PathBuf};

/// What a service VM does with a tar.
pub(super) const APPLY: &str = "apply its tar";

/// Errors of graphdriver operations. Their text is what `docker` shows.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// A wrong request.
    #[error("{0}")]
    Usage(String),
    /// An option is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A service VM refused or failed.
    #[error("layer {id}: cannot {action}")]
    Svm {
        /// The layer.
        id: String,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: SvmError,
    },
    /// The kind of service VM that was asked for cannot work here.
    #[error("lcow.svm={kind} cannot work: {reason}")]
    Backend {
        /// The kind.
        kind: SvmKind,
        /// What is missing, and what to do.
        reason: String,
    },
    /// The kernel refused a mount or a loop device.
    #[cfg(target_os = "linux")]
    #[error("layer {id}: cannot {action}")]
    Mount {
        /// The layer.
        id: String,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: lcow_sys::linux::SysError,
    },
    /// The system refused a file operation.
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
    /// The tar of an ApplyDiff broke off because the Diff that it was fed from did.
    #[error(
        "layer {id}: its tar broke off after {bytes} bytes, because the diff of layer {from} failed: {reason}"
    )]
    CutSource {
        /// The layer.
        id: String,
        /// The layer that the tar came from.
        from: String,
        /// Bytes that had come.
        bytes: u64,
        /// Why that Diff failed.
        reason: String,
    },
    /// A task of the program died.
    #[error("an internal task ended early: {0}")]
    Internal(String),
}

impl DriverError {
    /// The request itself is wrong: sending it again cannot help.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Usage(_)
                | Self::Config(_)
                | Self::Store(StoreError::InvalidId { .. } | StoreError::Usage(_))
        )
    }

    /// What one layer holds, or is, is at fault: with others there is hope. False for what would meet every layer: a full
    /// disk, a failing one, a store or a service VM that does not work, a wrong option.
    pub fn is_of_one_layer(&self) -> bool {
        match self {
            Self::Svm { source, .. } => source.is_of_one_operation(),
            Self::Store(error) => matches!(
                error,
                StoreError::WrongState { .. }
                    | StoreError::TooDeep { .. }
                    | StoreError::MissingParent { .. }
                    | StoreError::NotFound(_)
                    | StoreError::Exists(_)
                    | StoreError::HasChildren { .. }
            ),
            Self::Usage(_) => true,
            _ => false,
        }
    }

    /// Something of the store or of a layer is damaged: what an operator must look at. A damaged tar that somebody
    /// wants to be applied is none.
    pub fn is_corrupt(&self) -> bool {
        match self {
            Self::Store(StoreError::Corrupt { .. } | StoreError::Damaged { .. }) => true,
            Self::Svm { action, source: SvmError::Refused(refused), .. } => {
                refused.kind == ErrorKind::Corrupt && *action != APPLY
            }
            _ => false,
        }
    }

    /// Makes a [`DriverError::Io`] of a system error, for `map_err`.
    pub(super) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// Makes a [`DriverError::Svm`], for `map_err`.
    pub(super) fn svm(id: &impl ToString, action: &'static str) -> impl FnOnce(SvmError) -> Self {
        let id = id.to_string();
        move |source| Self::Svm { id, action, source }
    }
}

/// An error with all its causes in one line, as people are told of it.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layers_own_faults_are_told_from_the_stores() {
        let id: crate::store::LayerId = "x".parse().unwrap();
        let svm = |source| DriverError::Svm { id: "x".into(), action: "apply its tar", source };
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
