//! Streams that can send bytes of a file without reading them first.
//!
//! ```text
//!   file ──pread──► buffer ──write──► stream          two copies, by the processor
//!   file ──────── StreamOut::splice ──► stream        none: the stream refers to the file's pages
//! ```
//!
//! The reader may receive spliced bytes later, and then gets what the file holds at that time. Splice only from files that
//! no longer change.

use std::{
    fs::File,
    io::{self, Sink, Write},
};

/// An output stream that may be able to send bytes of a file directly.
pub trait StreamOut: Write {
    /// Sends up to `len` bytes of `file` from `offset`, after everything written before, and returns the number sent.
    /// 0 means that this stream cannot splice, or not from this file: the caller then writes the bytes.
    ///
    /// # Errors
    /// The error of the stream, for example `BrokenPipe`.
    fn splice(&mut self, file: &File, offset: u64, len: u64) -> io::Result<u64>;
}

impl<W: StreamOut + ?Sized> StreamOut for &mut W {
    fn splice(&mut self, file: &File, offset: u64, len: u64) -> io::Result<u64> {
        (**self).splice(file, offset, len)
    }
}

impl StreamOut for Vec<u8> {
    fn splice(&mut self, _: &File, _: u64, _: u64) -> io::Result<u64> {
        Ok(0)
    }
}

impl StreamOut for Sink {
    fn splice(&mut self, _: &File, _: u64, _: u64) -> io::Result<u64> {
        Ok(0)
    }
}
