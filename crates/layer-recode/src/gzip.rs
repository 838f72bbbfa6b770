//! gzip (RFC 1952) around deflate (RFC 1951).
//!
//! ```text
//!   member: 1f 8b 08 │ flags │ mtime 4 │ xfl │ os │ [extra] [name] [comment] [crc16] │ deflate… │ crc32 │ length
//!   stream: member member … 00 00 …                     fields of the header are skipped, never kept
//! ```
//!
//! Called by `expand` and `compress`.

use crate::{Compression::Gzip, RecodeError, sink::Sink, source::Source};
use flate2::{Compress, Crc, Decompress, FlushCompress, FlushDecompress, Status};
use std::{fmt, io::Read};

/// RFC 1952, section 2.3.1: the only method.
const DEFLATE: u8 = 8;
const FLAG_HEADER_CRC: u8 = 1 << 1;
const FLAG_EXTRA: u8 = 1 << 2;
const FLAG_NAME: u8 = 1 << 3;
const FLAG_COMMENT: u8 = 1 << 4;
/// Must be zero.
const FLAGS_RESERVED: u8 = 0b1110_0000;

/// The header of what is written: no flags, no time, no hint, system "unknown" (255), as Go writes it.
const HEADER: [u8; 10] = [0x1f, 0x8b, DEFLATE, 0, 0, 0, 0, 0, 0, 0xff];

/// The levels of deflate that compress.
const LEVELS: std::ops::RangeInclusive<u32> = 1..=9;

/// Where a decoder is in its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before a member.
    Header,
    /// In a member's data.
    Data,
    /// Behind a member's data.
    Trailer,
    /// Behind a member.
    Between,
    /// In the zeros behind the last member.
    Padding,
    End,
}

/// Decodes a stream of members.
pub(crate) struct Inflate {
    raw: Decompress,
    /// Checksum of the current member's plain bytes.
    crc: Crc,
    state: State,
}

impl Default for Inflate {
    fn default() -> Self {
        Self { raw: Decompress::new(false), crc: Crc::new(), state: State::Header }
    }
}

impl fmt::Debug for Inflate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inflate").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Inflate {
    /// Fills the front of `out`, which is not empty; 0 at the end of the stream.
    pub(crate) fn decode<R: Read>(
        &mut self,
        source: &mut Source<R>,
        out: &mut [u8],
    ) -> Result<usize, RecodeError> {
        loop {
            match self.state {
                State::Header => {
                    disk_io::steps::add(1);
                    header(source)?;
                    self.crc.reset();
                    self.state = State::Data;
                }
                State::Data => {
                    let given = self.data(source, out)?;
                    if given > 0 {
                        return Ok(given);
                    }
                }
                State::Trailer => {
                    trailer(source, self.crc.sum(), self.raw.total_out() as u32)?;
                    self.state = State::Between;
                }
                State::Between => {
                    self.state = match source.bytes()?.first() {
                        None => State::End,
                        Some(0) => State::Padding,
                        // `header` checks the rest.
                        Some(_) => {
                            self.raw.reset(false);
                            State::Header
                        }
                    };
                }
                State::Padding => {
                    padding(source)?;
                    self.state = State::End;
                }
                State::End => return Ok(0),
            }
        }
    }

    /// Inflates once.
    fn data<R: Read>(&mut self, source: &mut Source<R>, out: &mut [u8]) -> Result<usize, RecodeError> {
        let input = source.bytes()?;
        let at_end = input.is_empty();
        let before = (self.raw.total_in(), self.raw.total_out());
        let status = self.raw.decompress(input, out, FlushDecompress::None);
        let taken = (self.raw.total_in() - before.0) as usize;
        let given = (self.raw.total_out() - before.1) as usize;
        self.crc.update(&out[..given]);
        source.consume(taken);
        let status = status.map_err(|e| {
            let reason = e.message().map_or_else(String::new, |text| format!(" ({text})"));
            corrupt(&format!("invalid deflate data{reason}"), source.offset())
        })?;
        match status {
            Status::StreamEnd => self.state = State::Trailer,
            Status::Ok | Status::BufError if taken == 0 && given == 0 => {
                return Err(if at_end {
                    cut(source)
                } else {
                    corrupt("deflate data that lead nowhere", source.offset())
                });
            }
            Status::Ok | Status::BufError => {}
        }
        Ok(given)
    }
}

/// The error for a stream that breaks its format.
fn corrupt(what: &str, offset: u64) -> RecodeError {
    RecodeError::corrupt(Gzip, what, offset)
}

/// Only zeros may follow.
fn padding<R: Read>(source: &mut Source<R>) -> Result<(), RecodeError> {
    loop {
        let bytes = source.bytes()?;
        let (zeros, all) = (bytes.iter().take_while(|b| **b == 0).count(), bytes.len());
        source.consume(zeros);
        if zeros < all {
            return Err(corrupt("garbage after a member", source.offset()));
        }
        if all == 0 {
            return Ok(());
        }
    }
}

/// Reads a member's header.
fn header<R: Read>(source: &mut Source<R>) -> Result<(), RecodeError> {
    let start = source.offset();
    let mut crc = Crc::new();
    let head: [u8; HEADER.len()] = fixed(source, &mut crc)?;
    let [0x1f, 0x8b, method, flags, ..] = head else {
        let what = if start == 0 { "no gzip header" } else { "garbage after a member" };
        return Err(corrupt(what, start));
    };
    let reserved = |what: String| RecodeError::Unsupported { format: Gzip, what, offset: start };
    if method != DEFLATE {
        return Err(reserved(format!("compression method {method} (8 is known)")));
    }
    if flags & FLAGS_RESERVED != 0 {
        return Err(reserved(format!("reserved flags {flags:#x}")));
    }
    if flags & FLAG_EXTRA != 0 {
        let length = fixed(source, &mut crc).map(u16::from_le_bytes)?;
        for _ in 0..length {
            let [_] = fixed(source, &mut crc)?;
        }
    }
    for _ in 0..(flags & (FLAG_NAME | FLAG_COMMENT)).count_ones() {
        while fixed(source, &mut crc)? != [0] {}
    }
    if flags & FLAG_HEADER_CRC != 0 {
        let expected = crc.sum() as u16;
        let found = fixed(source, &mut Crc::new()).map(u16::from_le_bytes)?;
        if found != expected {
            let what = format!("header checksum mismatch: expected {expected:04x}, found {found:04x}");
            return Err(corrupt(&what, source.offset()));
        }
    }
    Ok(())
}

/// The next bytes of a header or trailer.
fn fixed<R: Read, const N: usize>(source: &mut Source<R>, crc: &mut Crc) -> Result<[u8; N], RecodeError> {
    let mut bytes = [0; N];
    for byte in &mut bytes {
        *byte = source.byte()?.ok_or_else(|| cut(source))?;
    }
    crc.update(&bytes);
    Ok(bytes)
}

fn cut<R: Read>(source: &Source<R>) -> RecodeError {
    corrupt("cut off inside a member", source.offset())
}

fn trailer<R: Read>(source: &mut Source<R>, crc: u32, length: u32) -> Result<(), RecodeError> {
    let found: [u8; 4] = fixed(source, &mut Crc::new())?;
    let found = u32::from_le_bytes(found);
    if found != crc {
        let what = format!("checksum mismatch: expected {crc:08x}, found {found:08x}");
        return Err(corrupt(&what, source.offset()));
    }
    let found = fixed(source, &mut Crc::new()).map(u32::from_le_bytes)?;
    if found != length {
        let what = format!("length mismatch (modulo 4 GiB): expected {length}, found {found}");
        return Err(corrupt(&what, source.offset()));
    }
    Ok(())
}

pub(crate) fn compress<R: Read>(
    source: &mut Source<R>,
    sink: &mut Sink<'_>,
    level: u32,
) -> Result<(), RecodeError> {
    if !LEVELS.contains(&level) {
        return Err(RecodeError::Usage(format!("gzip has no level {level}, only 1 to 9")));
    }
    let mut deflate = Compress::new(flate2::Compression::new(level), false);
    let mut crc = Crc::new();
    sink.put(&HEADER)?;
    loop {
        crc.update(source.block()?);
        let flush = if source.ended() { FlushCompress::Finish } else { FlushCompress::None };
        loop {
            let before = (deflate.total_in(), deflate.total_out());
            let status = deflate
                .compress(source.rest(), sink.room(), flush)
                .map_err(|e| RecodeError::Internal(format!("gzip: {e}")))?;
            let taken = (deflate.total_in() - before.0) as usize;
            let given = (deflate.total_out() - before.1) as usize;
            source.consume(taken);
            sink.filled(given)?;
            match status {
                Status::StreamEnd => {
                    sink.put(&crc.sum().to_le_bytes())?;
                    return sink.put(&(deflate.total_in() as u32).to_le_bytes());
                }
                Status::Ok | Status::BufError if taken == 0 && given == 0 && source.ended() => {
                    return Err(RecodeError::Internal("gzip: the end is not written".to_owned()));
                }
                Status::Ok | Status::BufError if source.rest().is_empty() && !source.ended() => break,
                Status::Ok | Status::BufError => {}
            }
        }
    }
}
