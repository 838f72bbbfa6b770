//! Headers: from blocks and extended headers to an [`Entry`].
//!
//! ```text
//!   x ──► pax ────┐       g: its records are checked, and pending extended headers are dropped
//!   L K ► names ──┼──► entry_header(block) ──► Entry, sparse map, padding
//!   block ────────┘       GNU long name > PAX > block
//! ```
//!
//! A global header has no effect and is an entry of its own, as in Go's archive/tar, which engines and scanners use: a file
//! that they read as `harmless` must not be `etc/passwd` here. For the same reason it cancels a local header before it.
//!
//! Invariants: does no I/O, so a fault has no offset yet; an extended header is consumed by the entry that follows it, so
//! work and memory are bounded by the bytes of one header. Called by `reader` only.

use super::{
    entry::{Entry, EntryKind, Time},
    layout::{
        BLOCK, Dialect, RawGnuTail, RawHeader, RawSparseExtension, STAR_PREFIX, USTAR_PREFIX, text, typeflag,
    },
    number,
    pax::{self, MAX_PAX_BYTES, MAX_XATTRS, Pax, PaxError, SparseForm, SparseKeys},
    sparse::{self, DataMap, MAX_SPARSE_SEGMENTS, MapError, Segment},
};
use zerocopy::FromBytes;

/// Kinds of extended headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extension {
    Pax,
    PaxGlobal,
    LongName,
    LongLink,
}

/// What follows a header in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// The data of an extended header, this many bytes.
    Extension { kind: Extension, bytes: u64 },
    /// Blocks that continue an old GNU sparse map.
    SparseBlocks,
    /// A PAX 1.0 sparse map, within the entry's data of this many bytes.
    SparseData { bytes: u64 },
    /// The entry is complete.
    Announce,
    /// Data that does not belong to an entry.
    Skip { bytes: u64 },
}

/// A fault without its offset.
#[derive(Debug)]
pub(super) enum Fault {
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

/// The state of header parsing.
#[derive(Debug, Default)]
pub(super) struct Parser {
    pub(super) entry: Entry,
    /// Extended headers for the next entry.
    pax: Option<Pax>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    /// Bytes of the extended header that is being read.
    pub(super) extension: Vec<u8>,
    pub(super) map: Vec<Segment>,
    pub(super) sparse: bool,
    data_map: DataMap,
    /// Padding after the data of the current entry or extension.
    pub(super) pad: usize,
}

impl Parser {
    pub(super) fn extension_pending(&self) -> bool {
        self.pax.is_some() || self.long_name.is_some() || self.long_link.is_some()
    }

    fn go_differs(&mut self, what: &'static str) {
        self.entry.go_differs.get_or_insert(what);
    }

    /// Parses a header with a valid checksum; returns what follows it.
    pub(super) fn header(&mut self, h: &RawHeader, at: u64) -> Result<Next, Fault> {
        let size = number::numeric(&h.size)
            .and_then(|n| u64::try_from(n).ok())
            .ok_or(Fault::Corrupt("bad size in the header"))?;
        let extension = match h.typeflag {
            typeflag::PAX => Extension::Pax,
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
        Ok(Next::Extension { kind: extension, bytes: size })
    }

    pub(super) fn extension_done(&mut self, kind: Extension) -> Result<(), Fault> {
        match kind {
            Extension::Pax => {
                let mut pax = Pax::default();
                pax.parse(&self.extension)?;
                self.pax = Some(pax);
            }
            Extension::PaxGlobal => {
                self.go_differs("a global pax header, which Go reads as an entry");
                pax::check_records(&self.extension)?;
                (self.pax, self.long_name, self.long_link) = (None, None, None);
            }
            // An empty one has no effect.
            Extension::LongName => {
                self.long_name = Some(text(&self.extension).to_vec()).filter(|n| !n.is_empty());
            }
            Extension::LongLink => {
                self.long_link = Some(text(&self.extension).to_vec()).filter(|n| !n.is_empty());
            }
        }
        Ok(())
    }

    fn entry_header(&mut self, h: &RawHeader, at: u64, size: u64) -> Result<Next, Fault> {
        const BAD_ID: Fault = Fault::Corrupt("bad owner in the header");
        let mut pax = self.pax.take();
        let dialect = h.dialect();
        let gnu = if dialect == Dialect::Gnu { RawGnuTail::ref_from_bytes(&h.tail).ok() } else { None };
        let e = &mut self.entry;
        e.offset = at;

        // Old GNU headers have times in the place of ustar's prefix. Some writers (Go before 1.8) put a prefix there
        // nevertheless; it does not parse as numbers.
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
        let pax_path = pax.as_mut().and_then(|p| p.path.take());
        if let Some(path) = self.long_name.take().or(pax_path) {
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
        // A value that a PAX header replaces may be garbage in the block: writers truncate what does not fit.
        let pax_ref = pax.as_ref();
        let block_id = |field: &[u8]| number::numeric(field).map(number::id).ok_or(BAD_ID);
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

        let named_as_directory = e.path.last() == Some(&b'/');
        let differs = match h.typeflag {
            typeflag::REGULAR if named_as_directory => {
                Some("a file with the name of a directory, which Go reads as a file")
            }
            typeflag::GNU_DUMPDIR => Some("a gnu dump directory, which Go reads as a file"),
            typeflag::GNU_VOLUME => Some("a gnu volume label, which Go reads as a file"),
            typeflag::CHAR | typeflag::BLOCK if pax_ref.is_some_and(|p| p.has_device) => {
                Some("a device number in a pax header, which Go ignores")
            }
            _ if pax_ref.is_some_and(Pax::has_libarchive_only) => {
                Some("a LIBARCHIVE xattr, which Go ignores")
            }
            _ => None,
        };
        e.go_differs = e.go_differs.or(differs);
        let mut sparse_gnu = false;
        e.kind = match h.typeflag {
            // Old archives have no other directories. For Go, a `0` is a file, whatever its name.
            typeflag::REGULAR_V7 if named_as_directory => EntryKind::Directory,
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
                return Ok(Next::Skip { bytes: e.stored });
            }
            typeflag::GNU_MULTIVOLUME => {
                return Err(Fault::Unsupported("continuation of a multi-volume archive".into()));
            }
            other => return Err(Fault::Unsupported(format!("type flag {:?}", other as char))),
        };
        let old_directory = h.typeflag == typeflag::REGULAR_V7 && e.kind == EntryKind::Directory;
        if old_directory || matches!(h.typeflag, typeflag::LINK..=typeflag::FIFO) {
            e.stored = 0;
        }
        (e.major, e.minor) = (0, 0);
        // Without a magic, these fields are not device numbers.
        if matches!(e.kind, EntryKind::CharDevice | EntryKind::BlockDevice) && dialect != Dialect::V7 {
            let device = |field: &[u8]| {
                number::numeric(field)
                    .and_then(|n| u32::try_from(n).ok())
                    .ok_or(Fault::Corrupt("bad device number in the header"))
            };
            (e.major, e.minor) = (device(&h.devmajor)?, device(&h.devminor)?);
        }
        e.size = if e.kind == EntryKind::File { e.stored } else { 0 };
        e.xattrs.clear();
        if let Some(pax) = &mut pax {
            pax.take_xattrs(&mut e.xattrs);
        }
        self.pad = padding(e.stored);

        self.map.clear();
        self.sparse = sparse_gnu;
        if sparse_gnu {
            let gnu = gnu.ok_or(Fault::Corrupt("gnu sparse file in an archive that is not in gnu format"))?;
            e.size = number::numeric(&gnu.realsize)
                .and_then(|n| u64::try_from(n).ok())
                .ok_or(Fault::Corrupt("bad real size of a sparse file"))?;
            sparse::push_gnu(&mut self.map, &gnu.sp)?;
            if gnu.isextended != 0 {
                return Ok(Next::SparseBlocks);
            }
            sparse::check(&self.map, e.size, e.stored)?;
            return Ok(Next::Announce);
        }
        match pax.as_mut().map(|p| (p.sparse.form(), &mut p.sparse)) {
            None | Some((SparseForm::None, _)) => Ok(Next::Announce),
            Some((form, keys)) => self.pax_sparse(form, keys),
        }
    }

    fn pax_sparse(&mut self, form: SparseForm, keys: &mut SparseKeys) -> Result<Next, Fault> {
        if self.entry.kind != EntryKind::File {
            return Err(Fault::Corrupt("sparse keywords on an entry that is not a file"));
        }
        if let Some(name) = keys.name.take() {
            self.entry.path = name;
        }
        // Without a keyword, Go uses the stored size as the size of the file.
        let size = keys.size.or(keys.real_size).unwrap_or(self.entry.stored);
        self.entry.size = size;
        self.sparse = true;
        if form == SparseForm::InData {
            self.data_map = DataMap::default();
            return Ok(Next::SparseData { bytes: self.entry.stored });
        }
        self.map = keys.map.take().unwrap_or_default();
        if keys.numblocks.is_some_and(|n| n != self.map.len() as u64) {
            return Err(Fault::Corrupt("sparse map does not have the recorded number of segments"));
        }
        sparse::check(&self.map, size, self.entry.stored)?;
        Ok(Next::Announce)
    }

    /// Parses an extension block of an old GNU sparse map; returns whether another one follows.
    pub(super) fn sparse_block(&mut self, block: &[u8]) -> Result<bool, Fault> {
        let Ok(block) = RawSparseExtension::ref_from_bytes(block) else { return Ok(false) };
        sparse::push_gnu(&mut self.map, &block.sp)?;
        if block.isextended != 0 {
            // Empty blocks that announce another one could go on forever.
            if block.sp[0].offset[0] == 0 {
                return Err(Fault::Corrupt("empty sparse map block"));
            }
            return Ok(true);
        }
        sparse::check(&self.map, self.entry.size, self.entry.stored)?;
        Ok(false)
    }

    /// Parses a block of a PAX 1.0 sparse map; returns whether the map is complete. `left` bytes of data follow the block.
    pub(super) fn sparse_data(&mut self, block: &[u8], left: u64) -> Result<bool, Fault> {
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
