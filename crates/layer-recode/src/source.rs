//! The input of a recoding: one buffer, with the offset of what was consumed.
//!
//! ```text
//!   Read ─► │ consumed │ start … end: bytes() │ room │        offset counts what was consumed
//! ```
//!
//! Called by `expand`, `compress` and the formats.

use crate::{PIECE_BYTES, RecodeError, SNIFF_BYTES};
use std::io::{self, Read};

/// The input.
#[derive(Debug)]
pub(crate) struct Source<R> {
    input: R,
    buffer: Vec<u8>,
    /// The bytes of `buffer` that were not consumed yet.
    start: usize,
    end: usize,
    /// Bytes consumed.
    offset: u64,
    /// The input has ended.
    ended: bool,
}

impl<R: Read> Source<R> {
    pub(crate) fn new(input: R) -> Self {
        Self { input, buffer: vec![0; PIECE_BYTES], start: 0, end: 0, offset: 0, ended: false }
    }

    /// Bytes consumed so far.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// The next bytes; none at the end of the input.
    pub(crate) fn bytes(&mut self) -> Result<&[u8], RecodeError> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            self.read()?;
        }
        Ok(&self.buffer[self.start..self.end])
    }

    /// The first [`SNIFF_BYTES`] bytes or more, or all if there are fewer. Only before anything was consumed.
    pub(crate) fn first(&mut self) -> Result<&[u8], RecodeError> {
        while self.end < SNIFF_BYTES && !self.ended {
            self.read()?;
        }
        Ok(&self.buffer[..self.end])
    }

    /// As many of the next bytes as fit the buffer: fewer only at the end of the input. What was read before must have
    /// been consumed.
    pub(crate) fn block(&mut self) -> Result<&[u8], RecodeError> {
        debug_assert!(self.start == self.end);
        (self.start, self.end) = (0, 0);
        while self.end < self.buffer.len() && !self.ended {
            self.read()?;
        }
        Ok(&self.buffer[..self.end])
    }

    /// What was read and not consumed yet.
    pub(crate) fn rest(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Whether [`Source::block`] gave the last bytes.
    pub(crate) fn ended(&self) -> bool {
        self.ended
    }

    /// Reads once, behind what is in the buffer.
    fn read(&mut self) -> Result<(), RecodeError> {
        while !self.ended {
            match self.input.read(&mut self.buffer[self.end..]) {
                Ok(0) => self.ended = true,
                Ok(n) => {
                    self.end += n;
                    break;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(RecodeError::Read(e)),
            }
        }
        Ok(())
    }

    pub(crate) fn consume(&mut self, n: usize) {
        self.start += n;
        self.offset += n as u64;
        debug_assert!(self.start <= self.end);
    }

    /// The next byte; `None` at the end of the input.
    pub(crate) fn byte(&mut self) -> Result<Option<u8>, RecodeError> {
        let byte = self.bytes()?.first().copied();
        self.consume(usize::from(byte.is_some()));
        Ok(byte)
    }

    /// The input, behind what is in the buffer.
    pub(crate) fn input(&mut self) -> &mut R {
        &mut self.input
    }
}
