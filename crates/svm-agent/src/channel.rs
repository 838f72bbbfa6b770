//! A data channel as the agent sees it, independent of its transport.
//!
//! Implemented by the worker's sockets and pipes and by the channels of a link; called by `frames` and `operation`.

use std::{
    fs::File,
    io::{self, IoSlice, Read, Write},
};
use svm_protocol::{ErrorKind, WireError};

/// A data channel as the agent sees it: both directions at once, and whether the daemon is still connected.
pub trait AgentChannel: Send + Sync + 'static {
    /// Reads some bytes; 0 at the end.
    ///
    /// # Errors
    /// Errors of the transport.
    fn receive(&self, buf: &mut [u8]) -> io::Result<usize>;
    /// Writes some bytes.
    ///
    /// # Errors
    /// Errors of the transport.
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize>;
    /// Whether the daemon has closed its end.
    fn peer_gone(&self) -> bool;
    /// Writes up to `len` bytes of a file from `offset`; 0 if this transport, or the system, cannot.
    ///
    /// # Errors
    /// Errors of the transport.
    fn send_file(&self, _file: &File, _offset: u64, _len: u64) -> io::Result<u64> {
        Ok(0)
    }
    /// Whether [`Self::send_file`] is worth an attempt.
    fn sends_files(&self) -> bool {
        false
    }
    /// Whether the daemon digests the tars that pass: it sends the digest of an applied tar with its End, and compares
    /// that of an exact tar with the summary. Emulated processors are especially slow at hashing.
    fn daemon_digests(&self) -> bool {
        false
    }
}

/// A channel as a reader and a writer.
pub(super) struct Conn<'a>(pub(super) &'a dyn AgentChannel);

impl Read for Conn<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.receive(buf)
    }
}

impl Write for Conn<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.send(&[IoSlice::new(buf)])
    }
    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.send(bufs)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The error for a frame that could not be sent.
pub(super) fn sending(e: &io::Error) -> WireError {
    WireError::new(ErrorKind::Cancelled, format!("sending: {e}"))
}
