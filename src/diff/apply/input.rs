//! The tar reader's chunks, hashed on a second thread while they are parsed.

use crate::{
    diff::{
        digest::{DigestKind, TarDigest},
        hash::{HashPipe, Shared},
    },
    tar::{CHUNK_BYTES, ChunkSource, fill},
};
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
}

impl<R: Read> HashedChunks<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, pipe: HashPipe::new(DigestKind::Blake3, CHUNK_BYTES), chunk: None, len: 0 }
    }

    /// Digest of the bytes so far.
    pub(super) fn finish(self) -> io::Result<TarDigest> {
        self.pipe.finish()
    }
}

impl<R: Read> ChunkSource for HashedChunks<R> {
    fn advance(&mut self) -> io::Result<()> {
        // Let go of the old chunk first: only a buffer that nobody holds is given out again.
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
