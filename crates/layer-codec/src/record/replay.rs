//! Reads a record and gives back the tar.
//!
//! ```text
//!   frames ──► ops ──┬─ literal ────────────────────► │ chunk being filled │ ─► hash (second thread)
//!                    └─ image range ─► read-ahead ──► │                    │ ─► held back ─► out
//! ```
//!
//! Long ranges of an image file are read for the hash, and go out from the file itself where `out` can splice.
//!
//! A chunk is written only when the next one is complete or, for the last, when length, checksums and digest have been
//! verified: a reader that gets all bytes of the last chunk has the tar that was applied. Called by `svm-agent` for Diff and
//! by the `layer` commands.

use super::{
    DIGESTS, END, FRAME, FRAME_BYTES, HEADER_BYTES, MAGIC, MAX_FRAME_LITERALS, MAX_FRAME_OPS, RawFrame,
    RawHeader, RawTrailer, TRAILER_BYTES, VERSION, take_varint, unzigzag,
};
use crate::{
    DiffError, DigestKind, TarDigest,
    hash::{HashPipe, Shared},
};
use disk_io::{ReadAt, StreamOut};
use std::{fs::File, ops::Range, sync::Arc};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes written at once, and held back at the end.
const OUT_BYTES: usize = 256 << 10;
/// Ranges of at least this size are read directly into the chunk; bytes.
const DIRECT_BYTES: u64 = 64 << 10;
/// Parts of a chunk of at least this size are spliced from the image's file if possible: shorter ones are faster to copy; bytes.
const SPLICE_BYTES: usize = 32 << 10;
/// Read-ahead for small ranges, doubled while they follow each other.
const MIN_WINDOW: usize = 16 << 10;
const MAX_WINDOW: usize = 512 << 10;
/// A small range that starts at most this far behind the previous one counts as sequential; bytes.
const NEAR: u64 = 64 << 10;

/// Header and trailer of a record; the digest is verified only by [`replay`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordInfo {
    /// Length of the tar.
    pub tar_bytes: u64,
    /// Its digest.
    pub tar_digest: TarDigest,
    /// Size of the ext4 image that the record points into.
    pub image_bytes: u64,
    /// Size of the record.
    pub record_bytes: u64,
    /// Frames.
    pub frames: u64,
}

/// The result of a replay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplaySummary {
    /// Bytes of tar.
    pub tar_bytes: u64,
    /// Digest of the tar, verified.
    pub tar_digest: TarDigest,
}

pub(super) fn corrupt(offset: u64, reason: impl Into<String>) -> DiffError {
    DiffError::Corrupt { what: "exact record", offset, reason: reason.into() }
}

pub(super) fn read_struct<T: FromBytes + IntoBytes, S: ReadAt>(
    record: &S,
    offset: u64,
) -> Result<T, DiffError> {
    let mut value = T::new_zeroed();
    record.read_exact_at(value.as_mut_bytes(), offset).map_err(DiffError::io("reading the exact record"))?;
    Ok(value)
}

/// Reads header and trailer.
///
/// # Errors
/// `Corrupt` if they contradict the format or the record's size, `Unsupported` for another version.
pub fn inspect<S: ReadAt>(record: &S) -> Result<RecordInfo, DiffError> {
    open(record).map(|(info, ..)| info)
}

fn open<S: ReadAt>(record: &S) -> Result<(RecordInfo, RawHeader, RawTrailer), DiffError> {
    let size = record.size().map_err(DiffError::io("reading the exact record"))?;
    if size < (HEADER_BYTES + TRAILER_BYTES) as u64 {
        return Err(corrupt(size, "too short"));
    }
    let header: RawHeader = read_struct(record, 0)?;
    if header.magic != MAGIC {
        return Err(corrupt(0, "bad magic"));
    }
    if header.version.get() != VERSION || header.flags.get() != 0 {
        let reason = format!("version {}, flags {:#x}", header.version, header.flags);
        return Err(DiffError::Unsupported { what: "exact record", reason });
    }
    let end = size - TRAILER_BYTES as u64;
    let trailer: RawTrailer = read_struct(record, end)?;
    if trailer.kind.get() != END || trailer.reserved.get() != 0 {
        return Err(corrupt(end, "bad trailer"));
    }
    if trailer.record_bytes.get() != size {
        return Err(corrupt(end, format!("record of {} bytes has a size of {size}", trailer.record_bytes)));
    }
    let Some(&kind) = DIGESTS.get(trailer.digest_kind.get() as usize) else {
        let reason = format!("digest function {}", trailer.digest_kind);
        return Err(DiffError::Unsupported { what: "exact record", reason });
    };
    let info = RecordInfo {
        tar_bytes: trailer.tar_bytes.get(),
        tar_digest: TarDigest { kind, bytes: trailer.digest },
        image_bytes: trailer.image_bytes.get(),
        record_bytes: size,
        frames: trailer.frames.get(),
    };
    Ok((info, header, trailer))
}

/// Writes the tar to `out`: byte for byte what was applied.
///
/// `image` is the layer (a VHD footer or hash tree behind the ext4 image does not matter).
///
/// # Errors
/// `Corrupt` if record or image are damaged: the last bytes (up to 256 KiB, or all of a smaller tar) were not given out then, and the caller
/// must cut the stream. `Io` if a disk or `out` fails.
pub fn replay<R: ReadAt, S: ReadAt, O: StreamOut>(
    image: R,
    record: S,
    out: O,
) -> Result<ReplaySummary, DiffError> {
    run(image, record, out, true)
}

/// As [`replay`], for a reader that digests what it gets: a BLAKE3 digest is not computed here, so the summary has the
/// record's, and the reader must compare its own digest before it trusts the last bytes. Records with another function are
/// verified here.
///
/// # Errors
/// As [`replay`], but for a digest that does not match.
pub fn replay_for_digesting_reader<R: ReadAt, S: ReadAt, O: StreamOut>(
    image: R,
    record: S,
    out: O,
) -> Result<ReplaySummary, DiffError> {
    run(image, record, out, false)
}

fn run<R: ReadAt, S: ReadAt, O: StreamOut>(
    image: R,
    record: S,
    out: O,
    hash: bool,
) -> Result<ReplaySummary, DiffError> {
    let (info, header, trailer) = open(&record)?;
    let image_size = image.size().map_err(DiffError::io("reading the image"))?;
    if image_size < info.image_bytes {
        return Err(DiffError::Corrupt {
            what: "layer image",
            offset: image_size,
            reason: format!("its exact record points into an image of {} bytes", info.image_bytes),
        });
    }
    let end = info.record_bytes - TRAILER_BYTES as u64;
    let mut frames = Frames { record: &record, at: HEADER_BYTES as u64, end, crc: header.crc(), count: 0 };
    let mut source = ImageRanges::new(&image, info.image_bytes);
    let mut sink =
        Sink::new(Some(info.tar_digest.kind).filter(|kind| hash || *kind != DigestKind::Blake3), out)?;
    let (mut packed, mut plain) = (Vec::new(), Vec::with_capacity(MAX_FRAME_OPS + MAX_FRAME_LITERALS));
    let mut unpacker = zstd::bulk::Decompressor::new().map_err(DiffError::io("starting the decompressor"))?;
    let mut left = info.tar_bytes;
    let mut image_end = 0u64;
    while let Some((at, ops_len)) = frames.next(&mut unpacker, &mut packed, &mut plain)? {
        let (mut ops, mut literals) =
            plain.split_at_checked(ops_len).ok_or_else(|| corrupt(at, "bad frame"))?;
        while !ops.is_empty() {
            let bad = || corrupt(at, "bad op");
            let word = take_varint(&mut ops).ok_or_else(bad)?;
            let len = word >> 1;
            if len == 0 {
                return Err(bad());
            }
            left = left.checked_sub(len).ok_or_else(|| corrupt(at, "more bytes than the trailer tells"))?;
            if word & 1 == 0 {
                let len = usize::try_from(len).map_err(|_| bad())?;
                let (now, rest) = literals.split_at_checked(len).ok_or_else(bad)?;
                literals = rest;
                sink.put(now)?;
            } else {
                let delta = unzigzag(take_varint(&mut ops).ok_or_else(bad)?);
                let offset = image_end.checked_add_signed(delta).ok_or_else(bad)?;
                image_end = offset
                    .checked_add(len)
                    .filter(|&e| e <= info.image_bytes)
                    .ok_or_else(|| corrupt(at, "op points past the image"))?;
                source.copy(offset, len, &mut sink)?;
            }
        }
        if !literals.is_empty() {
            return Err(corrupt(at, "literals that no op uses"));
        }
    }
    if left != 0 {
        return Err(corrupt(end, format!("{left} bytes less than the trailer tells")));
    }
    if frames.count != info.frames || trailer.crc_after(frames.crc) != trailer.crc.get() {
        return Err(corrupt(end, "checksum of the trailer does not match"));
    }
    sink.finish(&info)?;
    Ok(ReplaySummary { tar_bytes: info.tar_bytes, tar_digest: info.tar_digest })
}

/// The frames of a record, one after the other.
pub(super) struct Frames<'a, S> {
    pub(super) record: &'a S,
    pub(super) at: u64,
    pub(super) end: u64,
    pub(super) crc: u32,
    pub(super) count: u64,
}

impl<S: ReadAt> Frames<'_, S> {
    /// Unpacks the next frame into `plain`; its place and the length of its ops.
    pub(super) fn next(
        &mut self,
        unpacker: &mut zstd::bulk::Decompressor<'_>,
        packed: &mut Vec<u8>,
        plain: &mut Vec<u8>,
    ) -> Result<Option<(u64, usize)>, DiffError> {
        let at = self.at;
        if at == self.end {
            return Ok(None);
        }
        let room = self.end.checked_sub(at + FRAME_BYTES as u64).ok_or_else(|| corrupt(at, "cut frame"))?;
        let frame: RawFrame = read_struct(self.record, at)?;
        let (ops, literals) = (frame.ops.get() as usize, frame.literals.get() as usize);
        let packed_len = frame.packed.get() as usize;
        if frame.kind.get() != FRAME
            || ops == 0
            || ops > MAX_FRAME_OPS
            || literals > MAX_FRAME_LITERALS
            || packed_len > zstd::zstd_safe::compress_bound(MAX_FRAME_OPS + MAX_FRAME_LITERALS)
            || packed_len as u64 > room
        {
            return Err(corrupt(at, "bad frame"));
        }
        packed.resize(packed_len, 0);
        self.record
            .read_exact_at(packed, at + FRAME_BYTES as u64)
            .map_err(DiffError::io("reading the exact record"))?;
        self.crc = frame.crc_after(self.crc, packed);
        if self.crc != frame.crc.get() {
            return Err(corrupt(at, "checksum does not match"));
        }
        plain.clear();
        // The capacity is the bound: the decompressor never writes past it.
        let n = unpacker
            .decompress_to_buffer(packed, plain)
            .map_err(|e| corrupt(at, format!("frame does not unpack: {e}")))?;
        if n != ops + literals {
            return Err(corrupt(at, "frame unpacks to another length"));
        }
        self.at = at + (FRAME_BYTES + packed_len) as u64;
        self.count += 1;
        Ok(Some((at, ops)))
    }
}

/// Reads ranges of the image: large ones in place, small ones through a window that runs ahead.
struct ImageRanges<'a, R> {
    image: &'a R,
    image_bytes: u64,
    window: Vec<u8>,
    start: u64,
    len: usize,
    ahead: usize,
}

impl<'a, R: ReadAt> ImageRanges<'a, R> {
    fn new(image: &'a R, image_bytes: u64) -> Self {
        Self { image, image_bytes, window: Vec::new(), start: 0, len: 0, ahead: MIN_WINDOW }
    }

    fn read(image: &R, buf: &mut [u8], offset: u64) -> Result<(), DiffError> {
        image.read_exact_at(buf, offset).map_err(DiffError::io("reading the image"))
    }

    /// Copies `offset .. offset + len`, which lies inside the image.
    fn copy<O: StreamOut>(
        &mut self,
        mut offset: u64,
        mut len: u64,
        sink: &mut Sink<'a, O>,
    ) -> Result<(), DiffError> {
        while len >= DIRECT_BYTES {
            let room = sink.room()?;
            let n = usize::try_from(len).map_or(room.len(), |l| l.min(room.len()));
            Self::read(self.image, &mut room[..n], offset)?;
            sink.filled_from(self.image.in_file(offset, n as u64), n);
            offset += n as u64;
            len -= n as u64;
            (self.start, self.len) = (offset, 0);
        }
        while len > 0 {
            let window_end = self.start + self.len as u64;
            if offset < self.start || offset >= window_end {
                let follows = offset >= window_end && offset - window_end <= NEAR;
                self.ahead = if follows { (self.ahead * 2).min(MAX_WINDOW) } else { MIN_WINDOW };
                let wanted = self.ahead.max(usize::try_from(len).unwrap_or(0).min(MAX_WINDOW));
                let n = usize::try_from(self.image_bytes - offset).map_or(wanted, |l| l.min(wanted));
                if self.window.len() < n {
                    self.window.resize(n, 0);
                }
                Self::read(self.image, &mut self.window[..n], offset)?;
                (self.start, self.len) = (offset, n);
            }
            let skip = (offset - self.start) as usize;
            let have = &self.window[skip..self.len];
            let n = usize::try_from(len).map_or(have.len(), |l| l.min(have.len()));
            sink.put(&have[..n])?;
            offset += n as u64;
            len -= n as u64;
        }
        Ok(())
    }
}

/// Collects chunks, hashes them, and gives each out when the next one is complete.
struct Sink<'a, O> {
    out: O,
    pipe: HashPipe,
    chunk: Shared,
    filled: usize,
    /// Parts of the chunk that a file holds as well.
    parts: Vec<Part<'a>>,
    held: Option<(Shared, Vec<Part<'a>>)>,
}

/// Bytes of a chunk, and where a file has them.
struct Part<'a> {
    bytes: Range<usize>,
    file: &'a File,
    offset: u64,
}

/// Gives out a chunk.
fn give<O: StreamOut>(out: &mut O, chunk: &[u8], parts: &[Part<'_>]) -> Result<(), DiffError> {
    let sending = |source| DiffError::Io { what: "sending the tar", source };
    let mut done = 0;
    for part in parts {
        if part.bytes.len() < SPLICE_BYTES {
            continue;
        }
        let (before, mut at) = (chunk.get(done..part.bytes.start).unwrap_or_default(), part.bytes.start);
        if !before.is_empty() {
            out.write_all(before).map_err(sending)?;
        }
        while at < part.bytes.end {
            let (skip, left) = ((at - part.bytes.start) as u64, (part.bytes.end - at) as u64);
            match out.splice(part.file, part.offset + skip, left).map_err(sending)? {
                0 => break,
                sent => at += usize::try_from(sent).map_or(left as usize, |n| n.min(left as usize)),
            }
        }
        done = at;
    }
    out.write_all(chunk.get(done..).unwrap_or_default()).map_err(sending)
}

impl<'a, O: StreamOut> Sink<'a, O> {
    fn new(kind: Option<DigestKind>, out: O) -> Result<Self, DiffError> {
        let mut pipe = HashPipe::new(kind, OUT_BYTES);
        let chunk = pipe.buffer().map_err(DiffError::io("hashing the tar"))?;
        Ok(Self { out, pipe, chunk, filled: 0, parts: Vec::new(), held: None })
    }

    /// Where the next bytes go; never empty.
    fn room(&mut self) -> Result<&mut [u8], DiffError> {
        if self.filled == self.chunk.len() {
            self.pipe.submit(&self.chunk, self.filled).map_err(DiffError::io("hashing the tar"))?;
            let mut free = Vec::new();
            if let Some((held, parts)) = self.held.take() {
                give(&mut self.out, &held, &parts)?;
                drop(held);
                free = parts;
                free.clear();
            }
            let fresh = self.pipe.buffer().map_err(DiffError::io("hashing the tar"))?;
            let full = std::mem::replace(&mut self.chunk, fresh);
            self.held = Some((full, std::mem::replace(&mut self.parts, free)));
            self.filled = 0;
        }
        let filled = self.filled;
        // Unshared by the contract of `HashPipe::buffer`, until it is submitted.
        Arc::get_mut(&mut self.chunk)
            .and_then(|c| c.get_mut(filled..))
            .ok_or_else(|| DiffError::Usage("a buffer is shared while it is filled".into()))
    }

    /// As [`Self::filled`], with bytes that a file may hold as well.
    fn filled_from(&mut self, file: Option<(&'a File, u64)>, n: usize) {
        if let Some((file, offset)) = file {
            self.parts.push(Part { bytes: self.filled..self.filled + n, file, offset });
        }
        self.filled(n);
    }

    fn filled(&mut self, n: usize) {
        self.filled += n;
        debug_assert!(self.filled <= self.chunk.len());
    }

    fn put(&mut self, mut bytes: &[u8]) -> Result<(), DiffError> {
        while !bytes.is_empty() {
            let room = self.room()?;
            let n = room.len().min(bytes.len());
            room[..n].copy_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            self.filled(n);
        }
        Ok(())
    }

    fn finish(mut self, info: &RecordInfo) -> Result<(), DiffError> {
        self.pipe.submit(&self.chunk, self.filled).map_err(DiffError::io("hashing the tar"))?;
        let digest = self.pipe.finish().map_err(DiffError::io("hashing the tar"))?;
        if digest.is_some_and(|digest| digest != info.tar_digest) {
            return Err(DiffError::Corrupt {
                what: "layer image or exact record",
                offset: info.tar_bytes,
                reason: "digest of the tar does not match".into(),
            });
        }
        if let Some((held, parts)) = self.held {
            give(&mut self.out, &held, &parts)?;
        }
        give(&mut self.out, &self.chunk[..self.filled], &self.parts)?;
        self.out.flush().map_err(DiffError::io("sending the tar"))
    }
}
