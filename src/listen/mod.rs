//! Listeners: a unix socket, a socket passed by systemd, a Windows named pipe.
//!
//! ```text
//!   Endpoint ──bind──► Incoming (axum::serve::Listener) ──► one hyper connection a client ──► api::router
//! ```
//!
//! Invariants: a live socket of another process is never taken over; a stale one is replaced; the socket has mode 0600
//! from the first instant (it is made under a private name and renamed into place, so no client can connect earlier); it
//! is removed at a graceful stop if it is still this process's. A pipe has no file: its security descriptor guards it, and it is
//! gone with its last handle. Called by `cli`.

#[cfg(windows)]
pub mod pipe;
#[cfg(unix)]
mod unix;

#[cfg(windows)]
pub use pipe::PipeIncoming;
#[cfg(unix)]
pub use unix::UnixIncoming;

use std::{io, path::PathBuf};

/// A listener that cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process answers on the socket.
    #[error("'{}' is in use: another process answers on it; stop that process or choose another name", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket lies at the path.
    #[error("'{}' is not a socket; remove it or choose another --socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The name is not that of a local pipe.
    #[cfg(windows)]
    #[error("'{}' is not the name of a local pipe; write it as \\\\.\\pipe\\NAME", path.display())]
    NotAPipe {
        /// The name.
        path: PathBuf,
    },
    /// gRPC clients cannot name the pipe.
    #[cfg(windows)]
    #[error("'{}' cannot be named by gRPC clients: they send a pipe's name as the host of their calls, and that is valid only if it ends with '@' and the name of a host; use a name like \\\\.\\pipe\\lcow@localhost", path.display())]
    NotForGrpc {
        /// The name.
        path: PathBuf,
    },
    /// The system refused an operation.
    #[error("cannot {action} the socket or pipe '{}'", path.display())]
    Io {
        /// The operation.
        action: &'static str,
        /// The socket.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}
