//! The streaming reader: a state machine over chunks.
//!
//! ```text
//!            ┌───────────── Pad ◄── Data | Segments | Skip ◄── Announce
//!            ▼                                                  ▲
//!  start ► Header ──► Extension (x g L K) ──► Pad ──► Header    │ SparseBlocks (GNU S), SparseData (PAX 1.0)
//!            │  └───────────────────────────────────────────────┘
//!            └── zero block ──► ZeroSeen ── zero block or end ──► Trailing ──► End
//! ```
//!
//! Where readers of tar differ, this one follows Go's archive/tar, because the engines use it: links, devices, directories
//! and pipes have no data, whatever their size field; a GNU long name takes precedence over a PAX path; a lone zero block
//! followed by something else is an error, since only some tools would see what follows; global PAX headers have no
//! effect; a file is sparse by Go's rules only. Unlike in Go, missing padding at the end of the stream is an error (the
//! stream was truncated).

use super::{
    chunk::{ChunkSource, Chunks, broken},
    entry::{Entry, EntryKind},
    error::{EntryName, TarError},
    header::{Extension, Fault, Next, Parser},
    layout::{BLOCK, RawHeader},
};
use std::{io::Read, ops::Range};
use zerocopy::FromBytes;

/// A part of the stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Bytes that are not file data: headers, padding, sparse maps, end blocks, and anything after them.
    Raw(&'a [u8]),
    /// An entry begins; its headers have been reported.
    Entry(&'a mut Entry),
    /// Data of the current entry, in ascending order.
    Data {
        /// Offset in the file, in bytes.
        offset: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// The end of the stream; all later calls return it again.
    End,
}

/// [`Event`] with ranges of the chunk in place of slices.
enum Step {
    Raw(Range<usize>),
    Entry,
    Data(u64, Range<usize>),
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Header,
    Extension { kind: Extension, left: u64 },
    SparseBlocks,
    SparseData { left: u64 },
    Announce,
    Data { left: u64, offset: u64 },
    Segments { index: usize, done: u64 },
    Skip { left: u64 },
    Pad { left: usize },
    ZeroSeen,
    Trailing,
    End,
}

/// Reads a tar stream event by event.
#[derive(Debug)]
pub struct TarReader<S> {
    source: S,
    /// Offset in the stream of the chunk's first byte.
    base: u64,
    /// First byte of the chunk that has not been reported.
    pos: usize,
    state: State,
    /// End of the end-of-archive blocks.
    trailing_from: u64,
    parser: Parser,
}

impl<R: Read> TarReader<Chunks<R>> {
    /// Reads from `input` through a buffer of [`CHUNK_BYTES`](super::CHUNK_BYTES).
    pub fn new(input: R) -> Self {
        Self::from_source(Chunks::new(input))
    }
}

impl<S: ChunkSource> TarReader<S> {
    /// Reads from a chunk source that has not been advanced yet.
    pub fn from_source(source: S) -> Self {
        Self {
            source,
            base: 0,
            pos: 0,
            state: State::Header,
            trailing_from: u64::MAX,
            parser: Parser::default(),
        }
    }

    /// Number of bytes that have been reported.
    pub fn offset(&self) -> u64 {
        self.base + self.pos as u64
    }

    /// Number of bytes reported after the end-of-archive blocks; `None` before them.
    pub fn trailing_bytes(&self) -> Option<u64> {
        matches!(self.state, State::Trailing | State::End)
            .then(|| self.offset().saturating_sub(self.trailing_from))
    }

    /// The first difference to what Go's archive/tar would have read so far, if any. A caller that must agree with Go
    /// refuses such a stream.
    pub fn go_differs(&self) -> Option<&'static str> {
        self.parser.entry.go_differs
    }

    /// Bytes of the current chunk that have not been reported.
    pub fn unreported(&self) -> &[u8] {
        self.source.chunk().get(self.pos..).unwrap_or_default()
    }

    /// Returns the source.
    pub fn into_source(self) -> S {
        self.source
    }

    /// The next event. Its slices are valid until the next call. Do not continue after an error.
    ///
    /// # Errors
    /// Any [`TarError`].
    pub fn next_event(&mut self) -> Result<Event<'_>, TarError> {
        Ok(match self.step()? {
            Step::Raw(range) => Event::Raw(&self.source.chunk()[range]),
            Step::Data(offset, range) => Event::Data { offset, bytes: &self.source.chunk()[range] },
            Step::Entry => Event::Entry(&mut self.parser.entry),
            Step::End => Event::End,
        })
    }

    fn step(&mut self) -> Result<Step, TarError> {
        loop {
            match self.state {
                State::Header => return self.header(),
                State::Announce => {
                    let entry = &self.parser.entry;
                    self.state = if entry.kind != EntryKind::File {
                        State::Skip { left: entry.stored }
                    } else if self.parser.sparse {
                        State::Segments { index: 0, done: 0 }
                    } else {
                        State::Data { left: entry.stored, offset: 0 }
                    };
                    return Ok(Step::Entry);
                }
                State::Data { left: 0, .. } | State::Skip { left: 0 } => {
                    self.state = State::Pad { left: self.parser.pad };
                }
                State::Data { left, offset } => {
                    let range = self.take(left, "file data")?;
                    let n = range.len() as u64;
                    self.state = State::Data { left: left - n, offset: offset + n };
                    return Ok(Step::Data(offset, range));
                }
                State::Skip { left } => {
                    let range = self.take(left, "data")?;
                    self.state = State::Skip { left: left - range.len() as u64 };
                    return Ok(Step::Raw(range));
                }
                State::Segments { index, done } => match self.parser.map.get(index).copied() {
                    None => self.state = State::Pad { left: self.parser.pad },
                    Some(s) if done == s.len => self.state = State::Segments { index: index + 1, done: 0 },
                    Some(s) => {
                        let range = self.take(s.len - done, "file data")?;
                        self.state = State::Segments { index, done: done + range.len() as u64 };
                        return Ok(Step::Data(s.offset + done, range));
                    }
                },
                State::Pad { left: 0 } => self.state = State::Header,
                State::Pad { left } => {
                    let range = self.take(left as u64, "padding")?;
                    self.state = State::Pad { left: left - range.len() };
                    return Ok(Step::Raw(range));
                }
                State::Extension { kind, left: 0 } => {
                    self.parser.extension_done(kind).map_err(|f| self.fault(f))?;
                    self.state = State::Pad { left: self.parser.pad };
                }
                State::Extension { kind, left } => {
                    let range = self.take(left, "an extended header")?;
                    self.parser.extension.extend_from_slice(&self.source.chunk()[range.clone()]);
                    self.state = State::Extension { kind, left: left - range.len() as u64 };
                    return Ok(Step::Raw(range));
                }
                State::SparseBlocks => {
                    let range = self.block("a sparse map")?;
                    let extended = self.parser.sparse_block(&self.source.chunk()[range.clone()]);
                    if !extended.map_err(|f| self.fault(f))? {
                        self.state = State::Announce;
                    }
                    return Ok(Step::Raw(range));
                }
                State::SparseData { left } => {
                    if left < BLOCK as u64 {
                        return Err(self.fault(Fault::Corrupt("sparse map does not fit the entry's data")));
                    }
                    let range = self.block("a sparse map")?;
                    let left = left - BLOCK as u64;
                    let done = self.parser.sparse_data(&self.source.chunk()[range.clone()], left);
                    self.state = if done.map_err(|f| self.fault(f))? {
                        State::Announce
                    } else {
                        State::SparseData { left }
                    };
                    return Ok(Step::Raw(range));
                }
                State::ZeroSeen => {
                    if self.available()? == 0 {
                        self.state = State::End;
                        continue;
                    }
                    let range = self.block("the end of the archive")?;
                    if !is_zero(&self.source.chunk()[range.clone()]) {
                        return Err(self.fault(Fault::Corrupt("lone zero block with more data after it")));
                    }
                    self.state = State::Trailing;
                    self.trailing_from = self.offset();
                    return Ok(Step::Raw(range));
                }
                State::Trailing => {
                    let n = self.available()?;
                    if n == 0 {
                        self.state = State::End;
                        continue;
                    }
                    return Ok(Step::Raw(self.advance(n)));
                }
                State::End => return Ok(Step::End),
            }
        }
    }

    fn header(&mut self) -> Result<Step, TarError> {
        let at = self.offset();
        if self.available()? == 0 {
            if at == 0 {
                return Err(TarError::Empty);
            }
            if self.parser.extension_pending() {
                return Err(self.truncated("an entry that has only its extended header"));
            }
            self.state = State::End;
            return Ok(Step::End);
        }
        let range = self.block("a header")?;
        let block = &self.source.chunk()[range.clone()];
        let next = if is_zero(block) {
            if self.parser.extension_pending() {
                Err(Fault::Corrupt("archive ends after an extended header without its entry"))
            } else {
                Ok(None)
            }
        } else {
            match RawHeader::ref_from_bytes(block) {
                Ok(header) if header.checksum_holds() => self.parser.header(header, at).map(Some),
                Ok(_) if at == 0 => Err(Fault::Corrupt("stream does not begin with a tar header")),
                _ => Err(Fault::Corrupt("checksum of the header after this entry does not match")),
            }
        };
        match next {
            Ok(next) => {
                self.state = match next {
                    None => State::ZeroSeen,
                    Some(Next::Extension { kind, bytes }) => State::Extension { kind, left: bytes },
                    Some(Next::SparseBlocks) => State::SparseBlocks,
                    Some(Next::SparseData { bytes }) => State::SparseData { left: bytes },
                    Some(Next::Announce) => State::Announce,
                    Some(Next::Skip { bytes }) => State::Skip { left: bytes },
                };
                Ok(Step::Raw(range))
            }
            Err(fault) => Err(self.fault_at(fault, at)),
        }
    }

    /// Remaining bytes of the chunk, after fetching the next one if it is used up; 0 only at the end of the stream.
    fn available(&mut self) -> Result<usize, TarError> {
        let len = self.source.chunk().len();
        if self.pos < len {
            return Ok(len - self.pos);
        }
        self.base += len as u64;
        self.pos = 0;
        self.source.advance().map_err(|error| {
            let (read, source) = broken(error);
            TarError::Io { offset: self.base + read as u64, source }
        })?;
        Ok(self.source.chunk().len())
    }

    fn advance(&mut self, n: usize) -> Range<usize> {
        let start = self.pos;
        self.pos += n;
        start..self.pos
    }

    /// Between one and `most` bytes.
    fn take(&mut self, most: u64, what: &'static str) -> Result<Range<usize>, TarError> {
        let n = self.available()?;
        if n == 0 {
            return Err(self.truncated(what));
        }
        Ok(self.advance(usize::try_from(most).map_or(n, |most| n.min(most))))
    }

    /// One whole block, which lies in one chunk by the contract of [`ChunkSource`].
    fn block(&mut self, what: &'static str) -> Result<Range<usize>, TarError> {
        if self.available()? < BLOCK {
            self.pos = self.source.chunk().len();
            return Err(self.truncated(what));
        }
        Ok(self.advance(BLOCK))
    }

    fn truncated(&self, what: &'static str) -> TarError {
        TarError::Truncated { entry: EntryName::new(&self.parser.entry.path), offset: self.offset(), what }
    }

    fn fault(&self, fault: Fault) -> TarError {
        self.fault_at(fault, self.offset())
    }

    fn fault_at(&self, fault: Fault, offset: u64) -> TarError {
        let entry = EntryName::new(&self.parser.entry.path);
        match fault {
            Fault::Corrupt(reason) => TarError::Corrupt { entry, offset, reason },
            Fault::Unsupported(reason) => TarError::Unsupported { entry, offset, reason },
            Fault::Limit(what, limit) => TarError::Limit { entry, offset, what, limit },
        }
    }
}

fn is_zero(block: &[u8]) -> bool {
    // A header begins with a name, so the first byte decides for nearly all blocks.
    block.first() == Some(&0) && block.iter().all(|&b| b == 0)
}
