//! Where requests come in: a unix socket, a socket handed over by systemd, later a named pipe.
//!
//! ```text
//!   Endpoint ──bind──► Incoming (axum::serve::Listener) ──► one hyper connection a client ──► api::router
//! ```
//!
//! Invariants: a live socket of another process is never taken over; a stale one is replaced; the socket has mode 0600
//! from the first instant (it is made under a private name and renamed into place, so nobody can connect earlier); it
//! is removed at a graceful stop if it is still ours. Called by `main`.

#[cfg(unix)]
mod unix;

#[cfg(unix)]
pub use unix::UnixIncoming;

use std::{io, path::PathBuf};

/// What can go wrong with a listener.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody answers on the socket.
    #[error("'{}' is in use: another process answers on it; stop that one or choose another --socket", path.display())]
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
    /// The system refused.
    #[error("cannot {action} the socket '{}'", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}
