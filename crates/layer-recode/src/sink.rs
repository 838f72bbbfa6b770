//! The output of a compression: pieces of fixed size.
//!
//! ```text
//!   room, filled ─► │ used │ room │ ─► Write, when the piece is full and at the end
//! ```
//!
//! Called by `compress` and the formats.

use crate::{PIECE_BYTES, RecodeError};
use std::io::Write;

/// The output: one piece of memory, written when it is full.
pub(crate) struct Sink<'a> {
    out: &'a mut dyn Write,
    piece: Vec<u8>,
    used: usize,
    total: u64,
}

impl<'a> Sink<'a> {
    pub(crate) fn new(out: &'a mut dyn Write) -> Self {
        Self { out, piece: vec![0; PIECE_BYTES], used: 0, total: 0 }
    }

    /// Memory for the next bytes; never empty.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        &mut self.piece[self.used..]
    }

    /// The first `n` bytes of the room are output.
    ///
    /// # Errors
    /// [`RecodeError::Write`] if the output fails.
    pub(crate) fn filled(&mut self, n: usize) -> Result<(), RecodeError> {
        self.used += n;
        self.total += n as u64;
        if self.used == self.piece.len() {
            self.finish()?;
        }
        Ok(())
    }

    /// Appends bytes.
    pub(crate) fn put(&mut self, mut bytes: &[u8]) -> Result<(), RecodeError> {
        while !bytes.is_empty() {
            let room = self.room();
            let n = bytes.len().min(room.len());
            room[..n].copy_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            self.filled(n)?;
        }
        Ok(())
    }

    /// Writes what is left.
    pub(crate) fn finish(&mut self) -> Result<(), RecodeError> {
        let used = std::mem::take(&mut self.used);
        self.out.write_all(&self.piece[..used]).map_err(RecodeError::Write)
    }

    /// Bytes of output so far.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }
}
