//! A client of containerd: reads and writes the blobs of its content store.
//!
//! ```text
//!   Apply ◄─ Bytes ─ read ◄─ one Read stream, in order, complete ─┐
//!   Diff ── Bytes ─► write ── WRITE … COMMIT, under a lease ─────┴─ one connection, made anew when it breaks ─► containerd
//! ```
//!
//! * A blob is one Read call from its first to its last byte: no gaps, and exactly the size that was asked for. Anything
//!   else is an error in the stream, never a clean end. Digests are not checked here.
//! * A write that is not committed is aborted, also if its future or its writer is dropped.
//! * What is written belongs to a lease of ours that expires by itself: containerd passes no lease to a differ, and deletes a
//!   blob that nothing references at once.
//! * Every call has the namespace as a header, and a time limit; streams have one between two messages.
//! * A connection is made by the first call after a failure. Calls that run when containerd ends fail as unavailable.
//!
//! Callers see only the trait [`Content`]; tests put a double behind the same wire (`testing`). Called by the differ.

mod connect;
mod error;
mod read;
mod write;

pub use connect::Engine;
pub use error::EngineError;

use super::mask::Labels;
use bytes::Bytes;
use futures_util::{future::BoxFuture, stream::BoxStream};
use std::{future::Future, io, time::Duration};
use tokio::time::timeout;

/// Label of a layer's blob with the digest of its tar, which dockerd and BuildKit demand of a differ.
pub const UNCOMPRESSED: &str = "containerd.io/uncompressed";

/// How long to wait for containerd.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For a connection, and for a call that moves no data.
    pub call: Duration,
    /// For the next message of a stream.
    pub idle: Duration,
    /// For a commit: containerd syncs the whole blob before it answers.
    pub commit: Duration,
    /// How long a lease holds what was written, counted from the start of the write. The client has to reference the blob
    /// before that.
    pub lease: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            call: Duration::from_secs(30),
            idle: Duration::from_mins(2),
            commit: Duration::from_mins(10),
            lease: Duration::from_hours(1),
        }
    }
}

/// The bytes of a blob. An error is the last item; it holds an [`EngineError`] ([`EngineError::in_stream`]).
pub type Blob = BoxStream<'static, io::Result<Bytes>>;

/// A blob that was committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Bytes.
    pub size: u64,
    /// Whether the store had it already.
    pub existed: bool,
}

/// A content store.
pub trait Content: Send + Sync {
    /// Opens a blob of `size` bytes.
    ///
    /// # Errors
    /// [`EngineError::NotFound`]: there is no such blob in the namespace; any other: the call failed.
    fn read<'a>(
        &'a self,
        namespace: &'a str,
        digest: &'a str,
        size: u64,
    ) -> BoxFuture<'a, Result<Blob, EngineError>>;

    /// Starts to write a blob under `reference`, and drops what was written under it before.
    ///
    /// # Errors
    /// [`EngineError::Unavailable`]: another stream writes to it, or containerd does not run; any other: the call failed.
    fn write<'a>(
        &'a self,
        namespace: &'a str,
        reference: &'a str,
    ) -> BoxFuture<'a, Result<Box<dyn BlobWriter>, EngineError>>;
}

/// A write that is not committed. Dropping it aborts it in the background.
pub trait BlobWriter: Send {
    /// Writes at the end. Returns when containerd has all but a few chunks of what was given so far.
    ///
    /// # Errors
    /// [`EngineError`]: the write is of no use any more; drop it.
    fn send(&mut self, data: Bytes) -> BoxFuture<'_, Result<(), EngineError>>;

    /// Commits what was written, if its digest is `digest`. If the store has such a blob already, it is added to the lease,
    /// and gets the label [`UNCOMPRESSED`] of `labels` if it has none.
    ///
    /// # Errors
    /// [`EngineError`]: the blob is not in the store, or not known to be. [`EngineError::NotFound`]: it was there and was
    /// deleted meanwhile; write it again.
    fn commit(
        self: Box<Self>,
        digest: String,
        labels: Labels,
    ) -> BoxFuture<'static, Result<Committed, EngineError>>;
}

/// A call's reply within a time limit.
async fn limited<T>(
    call: &'static str,
    after: Duration,
    reply: impl Future<Output = Result<T, tonic::Status>>,
) -> Result<T, EngineError> {
    match timeout(after, reply).await {
        Ok(reply) => reply.map_err(|status| EngineError::of(call, &status)),
        Err(_) => Err(EngineError::TimedOut { call, after }),
    }
}

#[cfg(test)]
mod tests;
