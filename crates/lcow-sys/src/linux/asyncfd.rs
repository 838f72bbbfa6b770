//! Registers descriptors that tokio has no type for (message sockets, pidfds) with its event loop.
//!
//! Called by `svm::embedded`, within a runtime. Only with the feature `tokio`.

use std::{io, os::fd::OwnedFd};
use tokio::io::{Interest, unix::AsyncFd};

/// Watches `fd`, which should be non-blocking, for `interest`.
///
/// # Errors
/// The descriptor cannot be polled, or the event loop has shut down.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` returns the same descriptor for as long as it lives and closes it only when dropped; the
    // `AsyncFd` owns it from here on and deregisters it first.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}
