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
//! Choices where tars differ, made as Go's archive/tar makes them because the engines read with it: links, devices,
//! folders and pipes have no data whatever their size field says; a GNU long name beats a PAX path; a lone zero block
//! followed by something else is an error, as what follows would be seen by some tools only. Unlike Go, a missing
//! padding at the end of the stream is an error (the stream was cut), and global PAX headers hold as POSIX says.

use super::{
    chunk::{ChunkSource, Chunks},
    error::{EntryName, TarError},
    layout::{
        BLOCK, Dialect, RawGnuTail, RawHeader, RawSparseExtension, STAR_PREFIX, USTAR_PREFIX, text, typeflag,
    },
    number,
    pax::{MAX_PAX_BYTES, MAX_XATTRS, Pax, PaxError},
    sparse::{self, DataMap, MAX_SPARSE_SEGMENTS, MapError, Segment},
};
use std::{io::Read, ops::Range};
use zerocopy::FromBytes;

/// A point in time: seconds since 1970 (negative: before) and nanoseconds forward from there (below 10^9).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Time {
    /// Seconds.
    pub secs: i64,
    /// Nanoseconds.
    pub nanos: u32,
}

/// An extended attribute with its full name (`user.x`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    /// Name, never empty, without NUL.
    pub name: Vec<u8>,
    /// Value: any bytes.
    pub value: Vec<u8>,
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EntryKind {
    /// Regular file; its data follow.
    #[default]
    File,
    /// Folder.
    Directory,
    /// Symbolic link to [`Entry::link`].
    Symlink,
    /// Hard link to [`Entry::link`].
    HardLink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
}

/// One entry, all extended headers applied.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Entry {
    /// The name as the tar has it: any bytes, possibly absolute, with `..` or a trailing slash.
    pub path: Vec<u8>,
    /// Target of a symbolic or hard link.
    pub link: Vec<u8>,
    /// Type.
    pub kind: EntryKind,
    /// Permissions, 07777.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes of the file as it shall be (with holes); 0 for all other kinds.
    pub size: u64,
    /// Bytes of data in the stream.
    pub stored: u64,
    /// Modification time.
    pub mtime: Time,
    /// Access time, if told.
    pub atime: Option<Time>,
    /// Change time, if told.
    pub ctime: Option<Time>,
    /// Device number.
    pub major: u32,
    /// Device number.
    pub minor: u32,
    /// Extended attributes; names are unique.
    pub xattrs: Vec<Xattr>,
    /// Offset of the header block in the stream.
    pub offset: u64,
}

/// What the reader met.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Bytes that are no file data: headers, padding, sparse maps, end blocks, what follows these.
    Raw(&'a [u8]),
    /// An entry begins; its headers were reported before.
    Entry(&'a mut Entry),
    /// Data of the current entry, in ascending order; `offset` is the place in the file.
    Data {
        /// Place in the file.
        offset: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// The end of the stream; all later calls answer the same.
    End,
}

/// [`Event`] as places in the chunk.
enum Step {
    Raw(Range<usize>),
    Entry,
    Data(u64, Range<usize>),
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extension {
    Pax,
    PaxGlobal,
    LongName,
    LongLink,
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

/// A fault without its place.
#[derive(Debug)]
enum Fault {
    Corrupt(&'static str),
    Unsupported(String),
    Limit(&'static str, u64),
}

impl From<PaxError> for Fault {
    fn from(e: PaxError) -> Self {
        match e {
            PaxError::Corrupt(reason) => Self::Corrupt(reason),
            PaxError::TooManyXattrs => Self::Limit("xattrs", MAX_XATTRS as u64),
            PaxError::TooManySegments => Self::Limit("sparse segments", MAX_SPARSE_SEGMENTS as u64),
        }
    }
}

impl From<MapError> for Fault {
    fn from(e: MapError) -> Self {
        PaxError::from(e).into()
    }
}

/// The part that knows headers and not where bytes come from.
#[derive(Debug, Default)]
struct Parser {
    entry: Entry,
    /// Extended headers for the next entry; global ones are merged in when a local one is read or the entry comes.
    pax: Option<Pax>,
    global: Option<Pax>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    /// Bytes of the extension that is being read.
    extension: Vec<u8>,
    map: Vec<Segment>,
    sparse: bool,
    data_map: DataMap,
    /// Padding after the data of the current entry or extension.
    pad: usize,
}

/// Reads a tar stream event by event.
#[derive(Debug)]
pub struct TarReader<S> {
    source: S,
    /// Offset in the stream of the chunk's first byte.
    base: u64,
    /// First byte of the chunk that is not yet reported.
    pos: usize,
    state: State,
    /// Where the end-of-archive blocks end.
    trailing_from: u64,
    parser: Parser,
}

impl<R: Read> TarReader<Chunks<R>> {
    /// Reads from `input` through an own buffer.
    pub fn new(input: R) -> Self {
        Self::from_source(Chunks::new(input))
    }
}

impl<S: ChunkSource> TarReader<S> {
    /// Reads from a chunk source, which must not have been advanced yet.
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

    /// Bytes of the stream that were reported.
    pub fn offset(&self) -> u64 {
        self.base + self.pos as u64
    }

    /// Bytes reported behind the end-of-archive blocks, or `None` before these.
    pub fn trailing_bytes(&self) -> Option<u64> {
        matches!(self.state, State::Trailing | State::End)
            .then(|| self.offset().saturating_sub(self.trailing_from))
    }

    /// The source.
    pub fn into_source(self) -> S {
        self.source
    }

    /// The next event. Its slices live until the next call. After an error the stream is of no more use.
    ///
    /// # Errors
    /// [`TarError`], all kinds.
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
                        return Err(self.fault(Fault::Corrupt("lone zero block with more behind it")));
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
                Ok(State::ZeroSeen)
            }
        } else {
            match RawHeader::ref_from_bytes(block) {
                Ok(header) if header.checksum_holds() => self.parser.header(header, at),
                Ok(_) if at == 0 => Err(Fault::Corrupt("stream does not begin with a tar header")),
                _ => Err(Fault::Corrupt("checksum of the header after this entry does not match")),
            }
        };
        match next {
            Ok(state) => {
                self.state = state;
                Ok(Step::Raw(range))
            }
            Err(fault) => Err(self.fault_at(fault, at)),
        }
    }

    /// Bytes left in the chunk, the next one fetched if need be; 0 only at the end of the stream.
    fn available(&mut self) -> Result<usize, TarError> {
        let len = self.source.chunk().len();
        if self.pos < len {
            return Ok(len - self.pos);
        }
        self.base += len as u64;
        self.pos = 0;
        self.source.advance().map_err(|source| TarError::Io { offset: self.base, source })?;
        Ok(self.source.chunk().len())
    }

    fn advance(&mut self, n: usize) -> Range<usize> {
        let start = self.pos;
        self.pos += n;
        start..self.pos
    }

    /// From one to `most` bytes.
    fn take(&mut self, most: u64, what: &'static str) -> Result<Range<usize>, TarError> {
        let n = self.available()?;
        if n == 0 {
            return Err(self.truncated(what));
        }
        Ok(self.advance(usize::try_from(most).map_or(n, |most| n.min(most))))
    }

    /// One whole block; by the contract of [`ChunkSource`] it lies in one chunk.
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

impl Parser {
    fn extension_pending(&self) -> bool {
        self.pax.is_some() || self.long_name.is_some() || self.long_link.is_some()
    }

    /// Reads a header whose checksum holds; the state that comes next.
    fn header(&mut self, h: &RawHeader, at: u64) -> Result<State, Fault> {
        let size = number::numeric(&h.size)
            .and_then(|n| u64::try_from(n).ok())
            .ok_or(Fault::Corrupt("bad size in the header"))?;
        let extension = match h.typeflag {
            typeflag::PAX | typeflag::PAX_SOLARIS => Extension::Pax,
            typeflag::PAX_GLOBAL => Extension::PaxGlobal,
            typeflag::GNU_LONGNAME => Extension::LongName,
            typeflag::GNU_LONGLINK => Extension::LongLink,
            _ => return self.entry_header(h, at, size),
        };
        if size > MAX_PAX_BYTES {
            return Err(Fault::Limit("bytes of extended header", MAX_PAX_BYTES));
        }
        self.extension.clear();
        self.pad = padding(size);
        Ok(State::Extension { kind: extension, left: size })
    }

    fn extension_done(&mut self, kind: Extension) -> Result<(), Fault> {
        match kind {
            Extension::Pax => {
                let mut pax = self.global.clone().unwrap_or_default();
                pax.parse(&self.extension, false)?;
                self.pax = Some(pax);
            }
            Extension::PaxGlobal => {
                self.global.get_or_insert_default().parse(&self.extension, true)?;
            }
            Extension::LongName => self.long_name = Some(text(&self.extension).to_vec()),
            Extension::LongLink => self.long_link = Some(text(&self.extension).to_vec()),
        }
        Ok(())
    }

    fn entry_header(&mut self, h: &RawHeader, at: u64, size: u64) -> Result<State, Fault> {
        const BAD_ID: Fault = Fault::Corrupt("bad owner in the header");
        let mut pax = self.pax.take().or_else(|| self.global.clone());
        let dialect = h.dialect();
        let gnu = if dialect == Dialect::Gnu { RawGnuTail::ref_from_bytes(&h.tail).ok() } else { None };
        let e = &mut self.entry;
        e.offset = at;

        // Old GNU headers have times where ustar has its prefix. Some writers put a prefix there all the same (Go
        // before 1.8); it cannot be taken for numbers.
        let optional_time = |field: &[u8]| -> Option<Option<Time>> {
            if field.first().is_none_or(|&b| b == 0) {
                return Some(None);
            }
            number::numeric(field).map(|secs| Some(Time { secs, nanos: 0 }))
        };
        let (mut prefix, mut atime, mut ctime): (&[u8], _, _) = (b"", None, None);
        match (dialect, gnu) {
            (Dialect::Gnu, Some(gnu)) => match (optional_time(&gnu.atime), optional_time(&gnu.ctime)) {
                (Some(a), Some(c)) => (atime, ctime) = (a, c),
                _ => prefix = text(&h.tail[..USTAR_PREFIX]),
            },
            (Dialect::Star, _) => {
                prefix = text(&h.tail[..STAR_PREFIX]);
                atime = optional_time(&h.tail[STAR_PREFIX..STAR_PREFIX + 12]).flatten();
                ctime = optional_time(&h.tail[STAR_PREFIX + 12..STAR_PREFIX + 24]).flatten();
            }
            (Dialect::Ustar, _) => prefix = text(&h.tail[..USTAR_PREFIX]),
            _ => {}
        }
        e.path.clear();
        e.link.clear();
        let sparse_name = pax.as_mut().and_then(|p| p.sparse.name.take());
        let pax_path = pax.as_mut().and_then(|p| p.path.take());
        if let Some(path) = sparse_name.or(self.long_name.take()).or(pax_path) {
            e.path = path;
        } else {
            if !prefix.is_empty() {
                e.path.extend_from_slice(prefix);
                e.path.push(b'/');
            }
            e.path.extend_from_slice(text(&h.name));
        }
        match self.long_link.take().or_else(|| pax.as_mut().and_then(|p| p.linkpath.take())) {
            Some(link) => e.link = link,
            None => e.link.extend_from_slice(text(&h.linkname)),
        }

        e.mode = (number::numeric(&h.mode).ok_or(Fault::Corrupt("bad mode in the header"))? & 0o7777) as u16;
        // A value that a PAX header replaces may be junk in the block: writers clip what does not fit.
        let pax_ref = pax.as_ref();
        let block_id = |field: &[u8]| number::numeric(field).and_then(number::id).ok_or(BAD_ID);
        e.uid = pax_ref.and_then(|p| p.uid).map_or_else(|| block_id(&h.uid), Ok)?;
        e.gid = pax_ref.and_then(|p| p.gid).map_or_else(|| block_id(&h.gid), Ok)?;
        e.mtime = match pax_ref.and_then(|p| p.mtime) {
            Some(time) => time,
            None => Time {
                secs: number::numeric(&h.mtime).ok_or(Fault::Corrupt("bad mtime in the header"))?,
                nanos: 0,
            },
        };
        e.atime = pax_ref.and_then(|p| p.atime).or(atime);
        e.ctime = pax_ref.and_then(|p| p.ctime).or(ctime);
        e.stored = pax_ref.and_then(|p| p.size).unwrap_or(size);

        let named_as_folder = e.path.last() == Some(&b'/');
        let mut sparse_gnu = false;
        e.kind = match h.typeflag {
            typeflag::REGULAR_V7 | typeflag::REGULAR if named_as_folder => EntryKind::Directory,
            typeflag::REGULAR_V7 | typeflag::REGULAR | typeflag::CONTIGUOUS => EntryKind::File,
            typeflag::GNU_SPARSE => {
                sparse_gnu = true;
                EntryKind::File
            }
            typeflag::LINK => EntryKind::HardLink,
            typeflag::SYMLINK => EntryKind::Symlink,
            typeflag::CHAR => EntryKind::CharDevice,
            typeflag::BLOCK => EntryKind::BlockDevice,
            typeflag::DIRECTORY | typeflag::GNU_DUMPDIR => EntryKind::Directory,
            typeflag::FIFO => EntryKind::Fifo,
            typeflag::GNU_VOLUME => {
                self.pad = padding(e.stored);
                return Ok(State::Skip { left: e.stored });
            }
            typeflag::GNU_MULTIVOLUME => {
                return Err(Fault::Unsupported("continuation of a multi-volume archive".into()));
            }
            other => return Err(Fault::Unsupported(format!("type flag {:?}", other as char))),
        };
        if matches!(h.typeflag, typeflag::LINK..=typeflag::FIFO) {
            e.stored = 0;
        }
        (e.major, e.minor) = (0, 0);
        if matches!(e.kind, EntryKind::CharDevice | EntryKind::BlockDevice) {
            let device = |field: &[u8]| {
                number::numeric(field)
                    .and_then(|n| u32::try_from(n).ok())
                    .ok_or(Fault::Corrupt("bad device number in the header"))
            };
            e.major = pax_ref.and_then(|p| p.devmajor).map_or_else(|| device(&h.devmajor), Ok)?;
            e.minor = pax_ref.and_then(|p| p.devminor).map_or_else(|| device(&h.devminor), Ok)?;
        }
        e.size = if e.kind == EntryKind::File { e.stored } else { 0 };
        e.xattrs.clear();
        if let Some(pax) = &mut pax {
            e.xattrs.append(&mut pax.xattrs);
        }
        self.pad = padding(e.stored);

        self.map.clear();
        self.sparse = sparse_gnu;
        if sparse_gnu {
            let gnu = gnu.ok_or(Fault::Corrupt("sparse file in an archive that is not GNU's"))?;
            e.size = number::numeric(&gnu.realsize)
                .and_then(|n| u64::try_from(n).ok())
                .ok_or(Fault::Corrupt("bad real size of a sparse file"))?;
            sparse::push_gnu(&mut self.map, &gnu.sp)?;
            if gnu.isextended != 0 {
                return Ok(State::SparseBlocks);
            }
            sparse::check(&self.map, e.size, e.stored)?;
            return Ok(State::Announce);
        }
        match pax {
            Some(pax) if pax.sparse.any() => self.pax_sparse(pax),
            _ => Ok(State::Announce),
        }
    }

    fn pax_sparse(&mut self, pax: Pax) -> Result<State, Fault> {
        let keys = pax.sparse;
        if self.entry.kind != EntryKind::File {
            return Err(Fault::Corrupt("sparse keywords on an entry that is no file"));
        }
        let size = keys.size.ok_or(Fault::Corrupt("sparse file without its real size"))?;
        self.entry.size = size;
        self.sparse = true;
        match (keys.major, keys.minor.unwrap_or(0)) {
            (Some(1), 0) => {
                self.data_map = DataMap::default();
                Ok(State::SparseData { left: self.entry.stored })
            }
            (None | Some(0), _) => {
                self.map = keys.map.unwrap_or_default();
                if keys.numblocks.is_some_and(|n| n != self.map.len() as u64) {
                    return Err(Fault::Corrupt(
                        "sparse map does not have the count of segments that it tells",
                    ));
                }
                sparse::check(&self.map, size, self.entry.stored)?;
                Ok(State::Announce)
            }
            (Some(major), minor) => Err(Fault::Unsupported(format!("sparse format {major}.{minor}"))),
        }
    }

    /// Takes an extension block of an old GNU sparse map; true if another follows.
    fn sparse_block(&mut self, block: &[u8]) -> Result<bool, Fault> {
        let Ok(block) = RawSparseExtension::ref_from_bytes(block) else { return Ok(false) };
        sparse::push_gnu(&mut self.map, &block.sp)?;
        if block.isextended != 0 {
            // An empty block that claims more would let a stream of them pass without end.
            if block.sp[0].offset[0] == 0 {
                return Err(Fault::Corrupt("empty sparse map block"));
            }
            return Ok(true);
        }
        sparse::check(&self.map, self.entry.size, self.entry.stored)?;
        Ok(false)
    }

    /// Takes a block of a PAX 1.0 sparse map; true when the map is complete. `left` bytes of data follow the block.
    fn sparse_data(&mut self, block: &[u8], left: u64) -> Result<bool, Fault> {
        if !self.data_map.feed(block, &mut self.map)? {
            return Ok(false);
        }
        sparse::check(&self.map, self.entry.size, left)?;
        Ok(true)
    }
}

fn padding(size: u64) -> usize {
    (BLOCK - (size % BLOCK as u64) as usize) % BLOCK
}

fn is_zero(block: &[u8]) -> bool {
    // A header begins with a name: the first byte settles nearly all blocks.
    block.first() == Some(&0) && block.iter().all(|&b| b == 0)
}
