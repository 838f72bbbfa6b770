//! The shape of all errors of the daemon: a kind, a context and a source.
//!
//! ```text
//!   kind      what callers act on            Fault::kind ─► status of the reply, metrics, "skip this layer" of an import
//!   context   what was tried, and on what    Attempt, CorruptFile, or the text of a refusal
//!   source    the error underneath           shown once, by `with_causes`; never repeated in the text above it
//! ```
//!
//! The modules keep enums of their own ([`StoreError`](crate::store::StoreError), [`SvmError`](crate::svm::SvmError),
//! [`DriverError`](crate::driver::DriverError), `MigrateError`), whose variants are either refusals, which say what to do,
//! or one of the types below, which are passed on unchanged (`transparent`). [`Kind`] is the same for all of them.
//!
//! An error is written out in two ways. The engine, and so the user of `docker`, gets `with_causes`: one line without
//! untrusted bytes. The log also gets what only an operator can use, such as the last console output of a service VM
//! (`DriverError::for_log`).

use std::{
    fmt, io,
    path::{Path, PathBuf},
};
pub(crate) use svm_protocol::with_causes;

/// What sort of failure an error is, whatever module it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The request is wrong; sending it again cannot help.
    Usage,
    /// What the request names does not exist.
    NotFound,
    /// A layer is in a state that does not allow the request.
    State,
    /// Stored data, or a tar, breaks its format.
    Corrupt,
    /// Well-formed, but not handled by this version or on this host.
    Unsupported,
    /// A size, depth or number exceeds a limit.
    Limit,
    /// The disk is full, or would drop below `lcow.minfree`.
    NoSpace,
    /// Another process or request is using it.
    Busy,
    /// The operating system refused or failed.
    Io,
    /// A service VM did not start, died, stalled or broke the protocol.
    ServiceVm,
    /// The operation was ended before its result was known.
    Cancelled,
    /// A bug of this program.
    Internal,
}

impl Kind {
    /// Its name in replies and log lines; part of the interface.
    pub fn name(self) -> &'static str {
        match self {
            Self::Usage => "usage",
            Self::NotFound => "not-found",
            Self::State => "state",
            Self::Corrupt => "corrupt",
            Self::Unsupported => "unsupported",
            Self::Limit => "limit",
            Self::NoSpace => "no-space",
            Self::Busy => "busy",
            Self::Io => "io",
            Self::ServiceVm => "service-vm",
            Self::Cancelled => "cancelled",
            Self::Internal => "internal",
        }
    }
}

/// An error whose kind is known.
pub trait Fault: std::error::Error {
    /// What sort of failure it is.
    fn kind(&self) -> Kind;
}

impl Fault for io::Error {
    fn kind(&self) -> Kind {
        match io::Error::kind(self) {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::NoSpace,
            _ => Kind::Io,
        }
    }
}

#[cfg(target_os = "linux")]
impl Fault for lcow_sys::linux::SysError {
    fn kind(&self) -> Kind {
        Kind::Io
    }
}

/// What was tried on what, with the error that came of it. The text is the context only; the cause is the source.
#[derive(Debug)]
pub struct Attempt<E> {
    /// What was tried, as a verb phrase that the subject can follow ("open", "rename staged file to").
    pub action: &'static str,
    /// What it was tried on.
    pub subject: Subject,
    /// Why it failed.
    pub source: E,
}

/// What an [`Attempt`] was made on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// A file or directory.
    Path(Box<Path>),
    /// A layer, by its id, or another thing with a name.
    Layer(Box<str>),
}

impl<E> Attempt<E> {
    /// Makes the error of an attempt on a file or directory, for `map_err`.
    pub fn on_path(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(E) -> Self {
        let subject = Subject::Path(path.into().into());
        move |source| Self { action, subject, source }
    }

    /// Makes the error of an attempt on a layer, for `map_err`.
    pub fn on_layer(action: &'static str, id: &impl ToString) -> impl FnOnce(E) -> Self {
        let subject = Subject::Layer(id.to_string().into());
        move |source| Self { action, subject, source }
    }
}

impl<E> fmt::Display for Attempt<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.subject {
            Subject::Path(path) => write!(f, "cannot {} '{}'", self.action, path.display()),
            Subject::Layer(id) => write!(f, "layer {id}: cannot {}", self.action),
        }
    }
}

impl<E: std::error::Error + 'static> std::error::Error for Attempt<E> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

impl<E: Fault + 'static> Fault for Attempt<E> {
    fn kind(&self) -> Kind {
        self.source.kind()
    }
}

/// A file that is not what it must be.
#[derive(Debug, thiserror::Error)]
#[error("'{}' is damaged: {reason}", path.display())]
pub struct CorruptFile {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

impl CorruptFile {
    /// The error of `path` with a reason.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "reasons are texts and errors, handed over as they come"
    )]
    pub fn new(path: impl Into<PathBuf>, reason: impl ToString) -> Self {
        Self { path: path.into(), reason: reason.to_string() }
    }
}

impl Fault for CorruptFile {
    fn kind(&self) -> Kind {
        Kind::Corrupt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_shows_its_context_and_keeps_its_cause_as_source() {
        let full = || io::Error::from(io::ErrorKind::StorageFull);
        let error = Attempt::on_path("write", "/x")(full());
        assert_eq!((error.to_string().as_str(), error.kind()), ("cannot write '/x'", Kind::NoSpace));
        assert_eq!(with_causes(&error), format!("cannot write '/x': {}", full()));
        let error = Attempt::on_layer("mount its view", &"abc")(full());
        assert_eq!(error.to_string(), "layer abc: cannot mount its view");
    }
}
