//! Errors of calls to containerd, by what callers do about them.
//!
//! ```text
//!   gRPC code, or what the transport reports ─► EngineError ─► reply of the face, kind in the log
//! ```
//!
//! Messages of containerd come escaped, since parts of them are a client's. Called by the other files of `engine`.

use crate::error::{Fault, Kind};
use std::{error::Error as _, io, time::Duration};
use tonic::{Code, Status};

/// Why a call to containerd failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The blob, the write or the namespace does not exist.
    #[error("containerd, {call}: not found: {message}")]
    NotFound {
        /// The method.
        call: &'static str,
        /// What containerd says.
        message: String,
    },
    /// It exists already.
    #[error("containerd, {call}: already exists: {message}")]
    AlreadyExists {
        /// The method.
        call: &'static str,
        /// What containerd says.
        message: String,
    },
    /// containerd does not run, ended during the call, or another stream writes to the same ref.
    #[error("containerd, {call}: unavailable: {message}; check that containerd runs, and repeat the command")]
    Unavailable {
        /// The method.
        call: &'static str,
        /// What containerd or the operating system says.
        message: String,
    },
    /// containerd ended the call.
    #[error("containerd, {call}: cancelled: {message}")]
    Cancelled {
        /// The method.
        call: &'static str,
        /// What containerd says.
        message: String,
    },
    /// Nothing came for too long.
    #[error("containerd, {call}: no answer for {} s", after.as_secs_f32())]
    TimedOut {
        /// The method.
        call: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// What came cannot be right, such as a blob of another size.
    #[error("containerd, {call}: {reason}")]
    Broken {
        /// The method.
        call: &'static str,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// Any other refusal.
    #[error("containerd, {call}: {code:?}: {message}")]
    Other {
        /// The method.
        call: &'static str,
        /// The gRPC code.
        code: Code,
        /// What containerd says.
        message: String,
    },
}

impl EngineError {
    /// The error of a method's status.
    pub(super) fn of(call: &'static str, status: &Status) -> Self {
        let message = status.message().escape_debug().to_string();
        match status.code() {
            Code::NotFound => Self::NotFound { call, message },
            Code::AlreadyExists => Self::AlreadyExists { call, message },
            Code::Unavailable => Self::Unavailable { call, message },
            Code::Cancelled => Self::Cancelled { call, message },
            // A status that containerd sent has no source; one that the transport made has. A connection that breaks
            // during a call is one of these.
            Code::Unknown | Code::Internal if status.source().is_some() => {
                Self::Unavailable { call, message }
            }
            code => Self::Other { call, code, message },
        }
    }

    /// For the items of a stream of bytes; [`EngineError::in_stream`] gives it back.
    pub(super) fn into_io(self) -> io::Error {
        let kind = match &self {
            Self::NotFound { .. } => io::ErrorKind::NotFound,
            Self::AlreadyExists { .. } => io::ErrorKind::AlreadyExists,
            Self::Unavailable { .. } => io::ErrorKind::ConnectionAborted,
            Self::Cancelled { .. } => io::ErrorKind::Interrupted,
            Self::TimedOut { .. } => io::ErrorKind::TimedOut,
            Self::Broken { .. } => io::ErrorKind::InvalidData,
            Self::Other { .. } => io::ErrorKind::Other,
        };
        io::Error::new(kind, self)
    }

    /// The error of this module that an item of a stream holds.
    pub fn in_stream(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

impl Fault for EngineError {
    fn kind(&self) -> Kind {
        match self {
            Self::NotFound { .. } => Kind::NotFound,
            Self::AlreadyExists { .. } => Kind::State,
            Self::Cancelled { .. } => Kind::Cancelled,
            Self::Broken { .. } => Kind::Corrupt,
            Self::Unavailable { .. } | Self::TimedOut { .. } | Self::Other { .. } => Kind::Io,
        }
    }
}
