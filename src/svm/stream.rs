//! The tar that comes out of a service VM.
use super::SvmError;
use bytes::Bytes;
use futures_util::Stream;
use std::{
    pin::Pin,
    task::{Context, Poll},
};

/// Bytes of a tar, in chunks of at most 1 MiB. An `Err` item, or an end without [`TarStream::complete`], means that
/// the tar was cut: the HTTP reply must be cut too. Dropping it cancels the operation and frees the lease.
#[derive(Debug)]
pub struct TarStream {
    complete: bool,
}

impl TarStream {
    /// Whether the agent said that the tar is complete (true only after the last chunk was taken).
    pub fn complete(&self) -> bool {
        self.complete
    }
}

impl Stream for TarStream {
    type Item = Result<Bytes, SvmError>;
    fn poll_next(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        todo!()
    }
}
