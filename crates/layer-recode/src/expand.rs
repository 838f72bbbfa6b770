//! Expansion of a stream, as a reader of its plain bytes.
//!
//! ```text
//!   Read ─► Source ─► sniff, or the given format ─► Plain │ Gzip │ Zstd ─► read(buffer): counts, limit
//! ```
//!
//! The end of the plain bytes is reported only after every checksum and trailer behind them has been verified. Called by
//! the agent of a service VM, through [`expand`], and by readers of images, through [`Expander`].

use crate::{
    Compression, ExpandLimits, PIECE_BYTES, RecodeError, RecodeSummary, gzip::Inflate, sniff, source::Source,
    zst::Frames,
};
use std::{
    fmt,
    io::{self, Read, Write},
};

/// How the bytes are decoded.
enum Decoder {
    Plain,
    Gzip(Box<Inflate>),
    Zstd(Frames),
}

/// A reader of the plain bytes of a compressed stream.
pub struct Expander<R> {
    source: Source<R>,
    decoder: Decoder,
    /// Plain bytes given so far, and how many there may be.
    total: u64,
    limit: u64,
    /// An error was reported: nothing after it is trustworthy.
    failed: bool,
}

impl<R> fmt::Debug for Expander<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Expander")
            .field("total", &self.total)
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

impl<R: Read> Expander<R> {
    /// Starts to expand `input`. `format` is how it is compressed; `None` lets its first bytes decide, which are read now.
    ///
    /// # Errors
    /// [`RecodeError::Read`]; [`RecodeError::Usage`] for a window that zstd does not have.
    pub fn new(input: R, format: Option<Compression>, limits: &ExpandLimits) -> Result<Self, RecodeError> {
        let mut source = Source::new(input);
        let format = match format {
            Some(format) => format,
            None => sniff(source.first()?),
        };
        let decoder = match format {
            Compression::Plain => Decoder::Plain,
            Compression::Gzip => Decoder::Gzip(Box::default()),
            Compression::Zstd => Decoder::Zstd(Frames::new(limits.window_log)?),
        };
        Ok(Self { source, decoder, total: 0, limit: limits.output_bytes, failed: false })
    }

    /// How the stream is compressed.
    pub fn format(&self) -> Compression {
        match self.decoder {
            Decoder::Plain => Compression::Plain,
            Decoder::Gzip(_) => Compression::Gzip,
            Decoder::Zstd(_) => Compression::Zstd,
        }
    }

    /// What was expanded so far. After the end, `bytes_in` is the length of the input.
    pub fn summary(&self) -> RecodeSummary {
        RecodeSummary { format: self.format(), bytes_in: self.source.offset(), bytes_out: self.total }
    }

    /// The bytes that were read and not decoded yet. Before the first call of [`Expander::expand`], these are the first
    /// bytes of the stream, if its format was not given.
    pub fn ahead(&self) -> &[u8] {
        self.source.rest()
    }

    /// Fills the front of `out` with the next plain bytes and returns their number: 0 only at the end, or if `out` is
    /// empty. Do not use what was given for anything that cannot be undone before the end was seen.
    ///
    /// # Errors
    /// [`RecodeError::Corrupt`] for a stream that breaks its format, is cut off or fails a checksum;
    /// [`RecodeError::Output`] and [`RecodeError::Window`] beyond a limit; [`RecodeError::Unsupported`] for what the format
    /// reserves; [`RecodeError::Read`] if the input fails. After an error, every call fails.
    pub fn expand(&mut self, out: &mut [u8]) -> Result<usize, RecodeError> {
        if out.is_empty() {
            return Ok(0);
        }
        if self.failed {
            return Err(RecodeError::Usage("the stream failed before".to_owned()));
        }
        let result = self.decode(out);
        self.failed = result.is_err();
        result
    }

    fn decode(&mut self, out: &mut [u8]) -> Result<usize, RecodeError> {
        let given = match &mut self.decoder {
            Decoder::Plain => copy(&mut self.source, out)?,
            Decoder::Gzip(inflate) => inflate.decode(&mut self.source, out)?,
            Decoder::Zstd(frames) => frames.decode(&mut self.source, out)?,
        };
        self.total += given as u64;
        if self.total > self.limit {
            return Err(RecodeError::Output(self.limit));
        }
        Ok(given)
    }

    /// The input, behind what was read ahead. Whatever is read from it is missing from the plain bytes.
    pub fn input(&mut self) -> &mut R {
        self.source.input()
    }
}

impl<R: Read> Read for Expander<R> {
    /// As [`Expander::expand`]; the error holds the [`RecodeError`], unless it is one of the input.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(self.expand(buf)?)
    }
}

fn copy<R: Read>(source: &mut Source<R>, out: &mut [u8]) -> Result<usize, RecodeError> {
    let bytes = source.bytes()?;
    let n = bytes.len().min(out.len());
    out[..n].copy_from_slice(&bytes[..n]);
    source.consume(n);
    Ok(n)
}

/// Expands `input` to its end. `format` is how it is compressed; `None` lets its first bytes decide. The output is written
/// in pieces of [`PIECE_BYTES`]; a piece that exceeds the limit is not written.
///
/// # Errors
/// As [`Expander::new`] and [`Expander::expand`]; [`RecodeError::Write`] if `out` fails.
pub fn expand(
    input: &mut dyn Read,
    format: Option<Compression>,
    limits: &ExpandLimits,
    out: &mut dyn Write,
) -> Result<RecodeSummary, RecodeError> {
    let mut expander = Expander::new(input, format, limits)?;
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let mut used = 0;
        while used < piece.len() {
            match expander.expand(&mut piece[used..])? {
                0 => break,
                n => used += n,
            }
        }
        out.write_all(&piece[..used]).map_err(RecodeError::Write)?;
        if used < piece.len() {
            return Ok(expander.summary());
        }
    }
}
