//! Ordered output: small pieces are joined to writes of 256 KiB, large ones go out as they come.

use super::Result;
use crate::{Ext4Error, Place};
use disk_io::WriteAt;

/// Size of the buffer.
const CAPACITY: usize = 256 << 10;
/// Pieces of at least this size are not copied.
const DIRECT: usize = 64 << 10;
/// Gaps of at most this size are filled with zeros instead of starting a new write.
const MAX_FILL: u64 = 8 << 10;

#[derive(Debug)]
pub(super) struct Sink<W> {
    out: W,
    buf: Vec<u8>,
    /// Byte of the image where `buf` begins.
    at: u64,
    /// crc32c of all bytes in their order, where it is wanted: a part of the content's digest.
    pub(super) crc: Option<u32>,
}

impl<W: WriteAt> Sink<W> {
    pub(super) fn new(out: W, sum: bool) -> Self {
        Self { out, buf: Vec::with_capacity(CAPACITY), at: 0, crc: sum.then_some(0) }
    }

    /// Writes `bytes` at `offset` of the image, sooner or later.
    #[inline]
    pub(super) fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        if let Some(crc) = &mut self.crc {
            *crc = crc32c::crc32c_append(*crc, bytes);
        }
        let end = self.at + self.buf.len() as u64;
        if offset != end {
            let gap = offset.wrapping_sub(end);
            if gap <= MAX_FILL && !self.buf.is_empty() && self.buf.len() + (gap as usize) < CAPACITY {
                self.buf.resize(self.buf.len() + gap as usize, 0);
            } else {
                self.flush()?;
                self.at = offset;
            }
        }
        if bytes.len() >= DIRECT {
            self.flush()?;
            self.write(bytes, offset)?;
            self.at = offset + bytes.len() as u64;
            return Ok(());
        }
        if self.buf.len() + bytes.len() > CAPACITY {
            self.flush()?;
        }
        self.buf.extend_from_slice(bytes);
        Ok(())
    }

    /// Writes out what is buffered.
    pub(super) fn flush(&mut self) -> Result<()> {
        if !self.buf.is_empty() {
            self.write(&self.buf, self.at)?;
            self.at += self.buf.len() as u64;
            self.buf.clear();
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.out
            .write_all_at(bytes, offset)
            .map_err(|e| Ext4Error::io("writing the image", Place::offset(offset), e))
    }

    /// Writes out what is buffered and sets the size of the image.
    pub(super) fn close(&mut self, len: u64) -> Result<()> {
        self.flush()?;
        self.out.set_len(len).map_err(|e| Ext4Error::io("setting the image's size", Place::offset(len), e))
    }
}
