//! The source of the reader: large chunks, aligned to tar's blocks.
//!
//! ```text
//!   Read ──► │ chunk 0: k·512 bytes │ chunk 1: k·512 bytes │ … │ last: any length │ empty = end │
//! ```
//!
//! All records of a tar begin at multiples of 512, so a header never spans two chunks and is parsed in place.

use super::layout::BLOCK;
use std::io::{self, Read};

/// Default chunk size in bytes: large enough to make the cost of a read negligible, small enough for a second-level cache.
pub const CHUNK_BYTES: usize = 256 << 10;

/// A stream cut into chunks.
///
/// Contract: the length of every chunk but the last is a multiple of [`BLOCK`]. An empty chunk is the end of the stream;
/// after it, [`ChunkSource::advance`] yields only empty chunks. Before the first call of `advance` the chunk is empty.
pub trait ChunkSource {
    /// Replaces the chunk with the next one.
    ///
    /// # Errors
    /// Any error of the stream; the reader does not continue after one.
    fn advance(&mut self) -> io::Result<()>;

    /// The bytes of the current chunk.
    fn chunk(&self) -> &[u8];
}

/// The simple source: one buffer over a [`Read`].
#[derive(Debug)]
pub struct Chunks<R> {
    input: R,
    buffer: Box<[u8]>,
    len: usize,
}

impl<R: Read> Chunks<R> {
    /// Reads `input` in chunks of [`CHUNK_BYTES`].
    pub fn new(input: R) -> Self {
        Self::with_chunk_bytes(input, CHUNK_BYTES)
    }

    /// Reads `input` in chunks of `bytes`, rounded up to whole blocks (at least one).
    pub fn with_chunk_bytes(input: R, bytes: usize) -> Self {
        let bytes = bytes.max(1).next_multiple_of(BLOCK);
        Self { input, buffer: vec![0; bytes].into_boxed_slice(), len: 0 }
    }
}

impl<R: Read> ChunkSource for Chunks<R> {
    fn advance(&mut self) -> io::Result<()> {
        self.len = fill(&mut self.input, &mut self.buffer)?;
        Ok(())
    }

    fn chunk(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

/// A failure in the middle of a chunk. The bytes read before it are lost, but count for the offset of the failure.
#[derive(Debug)]
struct Broken {
    read: usize,
    source: io::Error,
}

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.source.fmt(f)
    }
}

impl std::error::Error for Broken {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.source()
    }
}

/// Number of bytes read before a source failed, and the error of the stream.
pub(super) fn broken(error: io::Error) -> (usize, io::Error) {
    match error.downcast::<Broken>() {
        Ok(broken) => (broken.read, broken.source),
        Err(other) => (0, other),
    }
}

/// Reads until `buffer` is full or the stream ends, and returns the number of bytes read.
///
/// For implementations of [`ChunkSource`]: an error after the first bytes carries their number, so that the reader reports
/// the exact offset.
///
/// # Errors
/// Any error of the stream but `Interrupted`, with the same kind.
pub fn fill(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match input.read(&mut buffer[done..]) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(source) if done > 0 => {
                return Err(io::Error::new(source.kind(), Broken { read: done, source }));
            }
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}
