//! The tar reader's chunks, hashed on a second thread while they are parsed, unless the sender digests the tar. Called by
//! `apply`.

use super::ToldDigest;
use crate::{
    digest::{DigestKind, TarDigest},
    hash::{HashPipe, Shared},
};
use layer_tar::{CHUNK_BYTES, ChunkSource, fill};
use std::{
    io::{self, Read},
    sync::Arc,
};

/// A [`ChunkSource`] that knows the digest of all that passed.
pub(super) struct HashedChunks<R> {
    input: R,
    pipe: HashPipe,
    chunk: Option<Shared>,
    len: usize,
    told: Option<ToldDigest>,
}

impl<R: Read> HashedChunks<R> {
    pub(super) fn new(input: R, told: Option<ToldDigest>) -> Self {
        let kind = told.is_none().then_some(DigestKind::Blake3);
        Self { input, pipe: HashPipe::new(kind, CHUNK_BYTES), chunk: None, len: 0, told }
    }

    /// Digest of the bytes so far, if they are digested here.
    pub(super) fn so_far(self) -> io::Result<Option<TarDigest>> {
        self.pipe.finish()
    }

    /// Digest of the bytes so far or, at the end of the stream, the digest from the sender.
    pub(super) fn finish(self) -> io::Result<TarDigest> {
        let told = self.told.as_ref().and_then(|told| told.get().copied());
        self.pipe.finish()?.or(told).ok_or_else(|| io::Error::other("the sender of the tar sent no digest"))
    }
}

impl<R: Read> ChunkSource for HashedChunks<R> {
    fn advance(&mut self) -> io::Result<()> {
        // Drop the old chunk first: only a buffer without another owner is reused.
        self.chunk = None;
        self.len = 0;
        let mut buffer = self.pipe.buffer()?;
        let room = Arc::get_mut(&mut buffer)
            .ok_or_else(|| io::Error::other("a buffer is shared while it is filled"))?;
        let len = fill(&mut self.input, room)?;
        if len > 0 {
            self.pipe.submit(&buffer, len)?;
        }
        self.len = len;
        self.chunk = Some(buffer);
        Ok(())
    }

    fn chunk(&self) -> &[u8] {
        self.chunk.as_ref().and_then(|c| c.get(..self.len)).unwrap_or_default()
    }
}
