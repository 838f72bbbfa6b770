//! Writes a record while the tar is applied. Called by `apply`.

use super::{
    DIGESTS, END, FRAME, FRAME_BYTES, HEADER_BYTES, MAGIC, MAX_FRAME_LITERALS, MAX_FRAME_OPS, RawFrame,
    RawHeader, RawTrailer, TRAILER_BYTES, VERSION, put_varint, zigzag,
};
use crate::{DiffError, TarDigest};
use disk_io::WriteAt;
use zerocopy::IntoBytes;

/// An op takes at most two numbers of ten bytes.
const OP_BYTES: usize = 20;
/// Tar headers pack 20 to 40 times at any level; the fastest one costs least.
const ZSTD_LEVEL: i32 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Literal(u64),
    Image { offset: u64, len: u64 },
}

/// What the writer of a record that was broken off remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Broken {
    /// End of the last frame.
    pub(super) end: u64,
    pub(super) frames: u64,
    /// The last frame's checksum, which is over all before it.
    pub(super) crc: u32,
    /// Bytes of tar recorded.
    pub(crate) tar_bytes: u64,
}

/// Streams a record out, one frame in memory.
///
/// The calls follow the tar's bytes in order; neighbours that can be one op become one. Errors of [`Self::literal`] and
/// [`Self::image`] are kept and reported by [`Self::finish`] (and [`Self::check`]), so that they can be called from
/// within a callback.
pub(crate) struct RecordWriter<S> {
    out: S,
    /// End of what was written.
    at: u64,
    ops: Vec<u8>,
    /// Room for the ops, then the literals: when they are packed, the ops stand right before them.
    plain: Box<[u8]>,
    /// Bytes of literals of this frame.
    literals: usize,
    packed: Vec<u8>,
    last: Option<Op>,
    /// End of the last image op: the next one is told relative to it.
    image_end: u64,
    compressor: zstd::bulk::Compressor<'static>,
    crc: u32,
    frames: u64,
    tar_bytes: u64,
    failed: Option<DiffError>,
}

impl<S: WriteAt> RecordWriter<S> {
    /// Starts a record at the beginning of `out`.
    ///
    /// # Errors
    /// If the header cannot be written.
    pub(crate) fn new(out: S) -> Result<Self, DiffError> {
        let header = RawHeader { magic: MAGIC, version: VERSION.into(), flags: 0.into() };
        out.write_all_at(header.as_bytes(), 0).map_err(DiffError::io("writing the exact record"))?;
        let compressor =
            zstd::bulk::Compressor::new(ZSTD_LEVEL).map_err(DiffError::io("starting the compressor"))?;
        let bound = zstd::zstd_safe::compress_bound(MAX_FRAME_OPS + MAX_FRAME_LITERALS);
        Ok(Self {
            out,
            at: HEADER_BYTES as u64,
            ops: Vec::with_capacity(MAX_FRAME_OPS),
            plain: vec![0; MAX_FRAME_OPS + MAX_FRAME_LITERALS].into(),
            literals: 0,
            packed: Vec::with_capacity(bound + FRAME_BYTES),
            last: None,
            image_end: 0,
            compressor,
            crc: header.crc(),
            frames: 0,
            tar_bytes: 0,
            failed: None,
        })
    }

    /// Bytes of tar recorded.
    pub(crate) fn tar_bytes(&self) -> u64 {
        self.tar_bytes
    }

    /// The next bytes of the tar, which are not in the image.
    pub(crate) fn literal(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = MAX_FRAME_LITERALS - self.literals;
            if room == 0 {
                self.flush();
                continue;
            }
            let (now, rest) = bytes.split_at(room.min(bytes.len()));
            bytes = rest;
            self.tar_bytes += now.len() as u64;
            let at = MAX_FRAME_OPS + self.literals;
            self.plain[at..at + now.len()].copy_from_slice(now);
            self.literals += now.len();
            if let Some(Op::Literal(len)) = &mut self.last {
                *len += now.len() as u64;
            } else {
                self.put(Op::Literal(now.len() as u64));
            }
        }
    }

    /// The next `len` bytes of the tar are in the image at `offset`.
    pub(crate) fn image(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        self.tar_bytes += len;
        match &mut self.last {
            Some(Op::Image { offset: start, len: known }) if *start + *known == offset => *known += len,
            _ => self.put(Op::Image { offset, len }),
        }
    }

    /// The error that an earlier call met.
    ///
    /// # Errors
    /// That error; only once.
    pub(crate) fn check(&mut self) -> Result<(), DiffError> {
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Ends the record without a trailer: it can only be read with [`PartialTar`](super::PartialTar).
    ///
    /// # Errors
    /// If anything could not be written.
    pub(crate) fn break_off(mut self) -> Result<Broken, DiffError> {
        self.flush();
        self.check()?;
        Ok(Broken { end: self.at, frames: self.frames, crc: self.crc, tar_bytes: self.tar_bytes })
    }

    /// Ends the record; its size in bytes.
    ///
    /// # Errors
    /// If anything could not be written.
    pub(crate) fn finish(mut self, digest: TarDigest, image_bytes: u64) -> Result<u64, DiffError> {
        self.flush();
        self.check()?;
        let mut trailer = RawTrailer {
            kind: END.into(),
            digest_kind: DIGESTS.iter().position(|k| *k == digest.kind).map_or(0, |n| n as u32).into(),
            frames: self.frames.into(),
            tar_bytes: self.tar_bytes.into(),
            image_bytes: image_bytes.into(),
            record_bytes: (self.at + TRAILER_BYTES as u64).into(),
            digest: digest.bytes,
            crc: 0.into(),
            reserved: 0.into(),
        };
        trailer.crc = trailer.crc_after(self.crc).into();
        let write = |source| DiffError::Io { what: "writing the exact record", source };
        self.out.write_all_at(trailer.as_bytes(), self.at).map_err(write)?;
        let end = self.at + TRAILER_BYTES as u64;
        self.out.set_len(end).map_err(write)?;
        Ok(end)
    }

    fn put(&mut self, op: Op) {
        self.encode_last();
        self.last = Some(op);
        if self.ops.len() + 2 * OP_BYTES > MAX_FRAME_OPS {
            self.flush();
        }
    }

    fn encode_last(&mut self) {
        match self.last.take() {
            None => {}
            Some(Op::Literal(len)) => put_varint(&mut self.ops, len << 1),
            Some(Op::Image { offset, len }) => {
                put_varint(&mut self.ops, (len << 1) | 1);
                put_varint(&mut self.ops, zigzag(offset.wrapping_sub(self.image_end).cast_signed()));
                self.image_end = offset + len;
            }
        }
    }

    fn flush(&mut self) {
        self.encode_last();
        if self.ops.is_empty() {
            return;
        }
        if self.failed.is_none()
            && let Err(e) = self.write_frame()
        {
            self.failed = Some(e);
        }
        self.ops.clear();
        self.literals = 0;
    }

    fn write_frame(&mut self) -> Result<(), DiffError> {
        let begin = MAX_FRAME_OPS - self.ops.len();
        self.plain[begin..MAX_FRAME_OPS].copy_from_slice(&self.ops);
        self.packed.clear();
        self.compressor
            .compress_to_buffer(&self.plain[begin..MAX_FRAME_OPS + self.literals], &mut self.packed)
            .map_err(DiffError::io("packing the exact record"))?;
        let mut frame = RawFrame {
            kind: FRAME.into(),
            ops: (self.ops.len() as u32).into(),
            literals: (self.literals as u32).into(),
            packed: (self.packed.len() as u32).into(),
            crc: 0.into(),
        };
        self.crc = frame.crc_after(self.crc, &self.packed);
        frame.crc = self.crc.into();
        let write = |source| DiffError::Io { what: "writing the exact record", source };
        self.out.write_all_at(frame.as_bytes(), self.at).map_err(write)?;
        self.out.write_all_at(&self.packed, self.at + FRAME_BYTES as u64).map_err(write)?;
        self.at += (FRAME_BYTES + self.packed.len()) as u64;
        self.frames += 1;
        Ok(())
    }
}
