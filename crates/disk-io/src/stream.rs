//! Streams that can be given bytes of a file without reading them first.
//!
//! ```text
//!   file ──pread──► buffer ──write──► stream          two copies, by the processor
//!   file ──────── StreamOut::splice ──► stream        none: the stream refers to the file's pages
//! ```
//!
//! What was spliced may reach the reader later, with what the file holds by then: only files that do not change any more
//! may be spliced from. Called by `diff`; implemented by `agent` and `cli` for sockets and pipes.

use std::{
    fs::File,
    io::{self, Sink, Write},
};

/// A stream of bytes going out.
pub trait StreamOut: Write {
    /// Has the system send up to `len` bytes of `file` from `offset`, behind what was written before; gives how many it
    /// sent. 0 means that this stream cannot, or not from this file: then the caller writes them.
    ///
    /// # Errors
    /// What the system says of the stream.
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
