//! Reads a record that was broken off, and gives back the tar up to there.
//!
//! ```text
//!   frames ──► ops ──┬─ literal ─────► │
//!                    └─ image range ─► │ read()          where the writer stopped: end
//! ```
//!
//! For an apply that starts again with larger blocks. The same process has just written the record and remembers its end
//! and last checksum; nevertheless every frame's checksum is verified, and no op reaches beyond its frame. Called by [`crate::apply`].

use super::{
    Broken, HEADER_BYTES, MAX_FRAME_LITERALS, MAX_FRAME_OPS, RawHeader,
    replay::{Frames, corrupt, read_struct},
    take_varint, unzigzag,
};
use crate::DiffError;
use disk_io::ReadAt;
use std::io::{self, Read};

/// The tar that a broken-off record and its image hold.
pub(crate) struct PartialTar<R, S> {
    image: R,
    record: S,
    broken: Broken,
    /// Where the next frame stands, the checksum before it, and how many went before.
    at: u64,
    crc: u32,
    frames: u64,
    unpacker: zstd::bulk::Decompressor<'static>,
    packed: Vec<u8>,
    /// The frame: ops, then literals.
    plain: Vec<u8>,
    ops: std::ops::Range<usize>,
    /// First literal that was not given out.
    literals: usize,
    image_end: u64,
    /// The rest of the current op.
    op: Op,
    left: u64,
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Literal(u64),
    Image { offset: u64, len: u64 },
}

impl<R: ReadAt, S: ReadAt> PartialTar<R, S> {
    /// The tar of which `broken` was recorded.
    ///
    /// # Errors
    /// `Io` if the record cannot be read.
    pub(crate) fn new(image: R, record: S, broken: Broken) -> Result<Self, DiffError> {
        let header: RawHeader = read_struct(&record, 0)?;
        let unpacker = zstd::bulk::Decompressor::new().map_err(DiffError::io("starting the decompressor"))?;
        Ok(Self {
            image,
            record,
            broken,
            at: HEADER_BYTES as u64,
            crc: header.crc(),
            frames: 0,
            unpacker,
            packed: Vec::new(),
            plain: Vec::with_capacity(MAX_FRAME_OPS + MAX_FRAME_LITERALS),
            ops: 0..0,
            literals: 0,
            image_end: 0,
            op: Op::Literal(0),
            left: broken.tar_bytes,
        })
    }

    /// Image and record.
    pub(crate) fn into_disks(self) -> (R, S) {
        (self.image, self.record)
    }

    /// Loads the next op, if necessary from the next frame; false at the end.
    fn next_op(&mut self) -> Result<bool, DiffError> {
        if self.ops.is_empty() {
            if self.literals != self.plain.len() {
                return Err(corrupt(self.at, "literals that no op uses"));
            }
            let end = self.broken.end;
            let mut frames =
                Frames { record: &self.record, at: self.at, end, crc: self.crc, count: self.frames };
            let next = frames.next(&mut self.unpacker, &mut self.packed, &mut self.plain)?;
            (self.at, self.crc, self.frames) = (frames.at, frames.crc, frames.count);
            let Some((_, ops)) = next else {
                let whole =
                    self.left == 0 && (self.frames, self.crc) == (self.broken.frames, self.broken.crc);
                return if whole { Ok(false) } else { Err(corrupt(self.at, "it is not what was written")) };
            };
            (self.ops, self.literals) = (0..ops, ops);
        }
        let at = self.at;
        let bad = || corrupt(at, "bad op");
        let mut ops = self.plain.get(self.ops.clone()).ok_or_else(bad)?;
        let before = ops.len();
        let word = take_varint(&mut ops).ok_or_else(bad)?;
        let len = word >> 1;
        if len == 0 {
            return Err(bad());
        }
        self.op = if word & 1 == 0 {
            Op::Literal(len)
        } else {
            let delta = unzigzag(take_varint(&mut ops).ok_or_else(bad)?);
            let offset = self.image_end.checked_add_signed(delta).ok_or_else(bad)?;
            self.image_end = offset.checked_add(len).ok_or_else(bad)?;
            Op::Image { offset, len }
        };
        self.ops.start += before - ops.len();
        self.left = self.left.checked_sub(len).ok_or_else(|| corrupt(at, "more bytes than were recorded"))?;
        Ok(true)
    }

    fn give(&mut self, buf: &mut [u8]) -> Result<usize, DiffError> {
        loop {
            match &mut self.op {
                Op::Literal(0) | Op::Image { len: 0, .. } => {
                    if !self.next_op()? {
                        return Ok(0);
                    }
                }
                Op::Literal(len) => {
                    let have = self.plain.get(self.literals..).unwrap_or_default();
                    let n = usize::try_from(*len).unwrap_or(usize::MAX).min(buf.len());
                    let now = have.get(..n).ok_or_else(|| corrupt(self.at, "bad op"))?;
                    buf[..n].copy_from_slice(now);
                    *len -= n as u64;
                    self.literals += n;
                    return Ok(n);
                }
                Op::Image { offset, len } => {
                    let n = usize::try_from(*len).unwrap_or(usize::MAX).min(buf.len());
                    self.image
                        .read_exact_at(&mut buf[..n], *offset)
                        .map_err(DiffError::io("reading the image"))?;
                    *offset += n as u64;
                    *len -= n as u64;
                    return Ok(n);
                }
            }
        }
    }
}

impl<R: ReadAt, S: ReadAt> Read for PartialTar<R, S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() { Ok(0) } else { self.give(buf).map_err(io::Error::other) }
    }
}
