//! What goes out, in order, with the limit of the disk; zeros in large numbers are left out.

use super::{BLOCK, Result};
use crate::{Ext4Error, Place};
use disk_io::WriteAt;

/// Size of the buffer.
const CAPACITY: usize = 1 << 20;
/// Pieces of at least this size are not copied.
const DIRECT: usize = 64 << 10;
/// Up to this many zeros are written.
const MAX_FILL: u64 = 64 << 10;

#[derive(Debug)]
pub(super) struct Out<W> {
    disk: W,
    buffer: Vec<u8>,
    /// Byte of the image where the buffer begins.
    at: u64,
    limit: u64,
}

impl<W: WriteAt> Out<W> {
    pub(super) fn new(disk: W, at: u64, limit: u64) -> Self {
        Self { disk, buffer: Vec::with_capacity(CAPACITY), at, limit }
    }

    pub(super) fn position(&self) -> u64 {
        self.at + self.buffer.len() as u64
    }

    /// The block of the position.
    pub(super) fn block(&self) -> u32 {
        (self.position() / BLOCK) as u32
    }

    fn check(&self, more: u64) -> Result<()> {
        match self.position().checked_add(more) {
            Some(end) if end <= self.limit => Ok(()),
            _ => Err(Ext4Error::Full { limit: self.limit }),
        }
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.check(bytes.len() as u64)?;
        if bytes.len() >= DIRECT {
            self.flush()?;
            self.write_at(bytes, self.at)?;
            self.at += bytes.len() as u64;
            return Ok(());
        }
        if self.buffer.len() + bytes.len() > CAPACITY {
            self.flush()?;
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    pub(super) fn zeros(&mut self, count: u64) -> Result<()> {
        self.check(count)?;
        if count > MAX_FILL {
            self.flush()?;
            self.at += count;
            return Ok(());
        }
        if self.buffer.len() + count as usize > CAPACITY {
            self.flush()?;
        }
        self.buffer.resize(self.buffer.len() + count as usize, 0);
        Ok(())
    }

    /// Zeros up to the next block.
    pub(super) fn align(&mut self) -> Result<()> {
        self.zeros(self.position().next_multiple_of(BLOCK) - self.position())
    }

    /// Writes over a block that went out before, or lies before the first.
    pub(super) fn rewrite(&mut self, block: u32, bytes: &[u8]) -> Result<()> {
        self.flush()?;
        self.write_at(bytes, u64::from(block) * BLOCK)
    }

    /// Writes out what is buffered and sets the image's size to the position.
    pub(super) fn close(&mut self) -> Result<u64> {
        self.flush()?;
        let len = self.at;
        self.disk
            .set_len(len)
            .map_err(|e| Ext4Error::io("setting the image's size", Place::offset(len), e))?;
        Ok(len)
    }

    fn flush(&mut self) -> Result<()> {
        if !self.buffer.is_empty() {
            self.write_at(&self.buffer, self.at)?;
            self.at += self.buffer.len() as u64;
            self.buffer.clear();
        }
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.disk
            .write_all_at(bytes, offset)
            .map_err(|e| Ext4Error::io("writing the image", Place::offset(offset), e))
    }
}
