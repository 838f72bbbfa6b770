//! Buffered, positioned output of the two writers: small pieces are joined, large ones go out as they come.
//!
//! ```text
//!   append ──► buffer (bytes from `at` on) ──► write_all_at      append of a large piece, write_at ──► write_all_at
//! ```
//!
//! Invariant: the buffer holds the bytes right before [`Output::position`]. Called by `writer::sink` and `hcsshim::out`.

use crate::{Ext4Error, Place};
use disk_io::WriteAt;

/// Pieces of at least this size are not copied.
const DIRECT: usize = 64 << 10;

#[derive(Debug)]
pub(crate) struct Output<W> {
    disk: W,
    buffer: Vec<u8>,
    capacity: usize,
    /// Byte of the image where the buffer begins.
    at: u64,
}

impl<W: WriteAt> Output<W> {
    /// Output from byte `at` on, with a buffer of `capacity` bytes.
    pub(crate) fn new(disk: W, at: u64, capacity: usize) -> Self {
        Self { disk, buffer: Vec::with_capacity(capacity), capacity, at }
    }

    /// The byte of the image that comes next.
    pub(crate) fn position(&self) -> u64 {
        self.at + self.buffer.len() as u64
    }

    /// Whether `more` bytes can be buffered behind others that are there.
    pub(crate) fn has_room_behind(&self, more: usize) -> bool {
        !self.buffer.is_empty() && self.buffer.len() + more < self.capacity
    }

    /// Writes `bytes` at the position, sooner or later.
    #[inline]
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<(), Ext4Error> {
        if bytes.len() >= DIRECT {
            self.flush()?;
            self.write_at(bytes, self.at)?;
            self.at += bytes.len() as u64;
            return Ok(());
        }
        if self.buffer.len() + bytes.len() > self.capacity {
            self.flush()?;
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// Writes `count` zeros at the position (at most the capacity).
    pub(crate) fn append_zeros(&mut self, count: usize) -> Result<(), Ext4Error> {
        if self.buffer.len() + count > self.capacity {
            self.flush()?;
        }
        self.buffer.resize(self.buffer.len() + count, 0);
        Ok(())
    }

    /// Moves the position to byte `offset`; what lies between is not written.
    pub(crate) fn seek(&mut self, offset: u64) -> Result<(), Ext4Error> {
        self.flush()?;
        self.at = offset;
        Ok(())
    }

    /// Writes out what is buffered.
    pub(crate) fn flush(&mut self) -> Result<(), Ext4Error> {
        if !self.buffer.is_empty() {
            self.write_at(&self.buffer, self.at)?;
            self.at += self.buffer.len() as u64;
            self.buffer.clear();
        }
        Ok(())
    }

    /// Writes `bytes` at byte `offset` at once; the position stays.
    pub(crate) fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), Ext4Error> {
        self.disk
            .write_all_at(bytes, offset)
            .map_err(|e| Ext4Error::io("writing the image", Place::offset(offset), e))
    }

    /// Writes out what is buffered and sets the size of the image.
    pub(crate) fn close(&mut self, len: u64) -> Result<(), Ext4Error> {
        self.flush()?;
        self.disk.set_len(len).map_err(|e| Ext4Error::io("setting the image's size", Place::offset(len), e))
    }
}
