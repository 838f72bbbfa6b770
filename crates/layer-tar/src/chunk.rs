//! Where the reader gets its bytes: large chunks, aligned to tar's blocks.
//!
//! ```text
//!   Read ──► │ chunk 0: k·512 bytes │ chunk 1: k·512 bytes │ … │ last: any length │ empty = end │
//! ```
//!
//! All records of a tar begin at multiples of 512, so a header never straddles two chunks and is parsed where it lies.

use super::layout::BLOCK;
use std::io::{self, Read};

/// Bytes per chunk: large enough that the cost of a read vanishes, small enough to stay in the second-level cache.
pub const CHUNK_BYTES: usize = 256 << 10;

/// A stream cut into chunks.
///
/// Contract: every chunk but the last has a length that is a multiple of [`BLOCK`]; an empty chunk is the end, and
/// after it no call of [`ChunkSource::advance`] brings more.
pub trait ChunkSource {
    /// Replaces the chunk by the next one.
    ///
    /// # Errors
    /// What the stream says; the reader does not go on after it.
    fn advance(&mut self) -> io::Result<()>;

    /// The bytes of the chunk.
    fn chunk(&self) -> &[u8];
}

/// The plain source: one buffer over a [`Read`].
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

/// A stream that failed in the middle of a chunk: what was read of it is lost, but counts for the place of the failure.
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

/// Bytes that were read before a source failed, and what the stream said.
pub(super) fn broken(error: io::Error) -> (usize, io::Error) {
    match error.downcast::<Broken>() {
        Ok(broken) => (broken.read, broken.source),
        Err(other) => (0, other),
    }
}

/// Reads until `buffer` is full or the stream ends; the count of bytes read.
///
/// # Errors
/// What the stream says, `Interrupted` excepted; of the same kind, and with the count of bytes read before it.
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
