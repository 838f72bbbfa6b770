//! A data channel as the agent sees it, whatever its transport.
//!
//! Implemented by the worker's sockets and pipes and by the channels of a link; called by `frames` and `operation`.

use std::{
    fs::File,
    io::{self, IoSlice, Read, Write},
};
use svm_protocol::{ErrorKind, WireError};

/// A data channel as the agent sees it: both directions at once, and a look at whether the daemon is still there.
pub trait AgentChannel: Send + Sync + 'static {
    /// Reads some bytes; 0 at the end.
    ///
    /// # Errors
    /// What the transport says.
    fn receive(&self, buf: &mut [u8]) -> io::Result<usize>;
    /// Writes some bytes.
    ///
    /// # Errors
    /// What the transport says.
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize>;
    /// Whether the daemon has closed its end.
    fn peer_gone(&self) -> bool;
    /// Writes up to `len` bytes of a file from `offset`; 0 if this transport, or the system, cannot.
    ///
    /// # Errors
    /// What the transport says.
    fn send_file(&self, _file: &File, _offset: u64, _len: u64) -> io::Result<u64> {
        Ok(0)
    }
    /// Whether [`Self::send_file`] is worth an attempt.
    fn sends_files(&self) -> bool {
        false
    }
    /// Whether the daemon digests the tars that pass: it tells an applied one's digest at its End, and holds an exact
    /// one against the digest of the summary. Hashing is what an emulated processor is worst at.
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
