//! Output in order, with the limit of the disk; zeros in large numbers are left out.

use super::{BLOCK, Result};
use crate::{Ext4Error, output::Output};
use disk_io::WriteAt;

/// Size of the buffer.
const CAPACITY: usize = 1 << 20;
/// Up to this many zeros are written.
const MAX_FILL: u64 = 64 << 10;

#[derive(Debug)]
pub(super) struct Out<W> {
    out: Output<W>,
    limit: u64,
}

impl<W: WriteAt> Out<W> {
    pub(super) fn new(disk: W, at: u64, limit: u64) -> Self {
        Self { out: Output::new(disk, at, CAPACITY), limit }
    }

    pub(super) fn position(&self) -> u64 {
        self.out.position()
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
        self.out.append(bytes)
    }

    pub(super) fn zeros(&mut self, count: u64) -> Result<()> {
        self.check(count)?;
        if count > MAX_FILL {
            self.out.seek(self.position() + count)
        } else {
            self.out.append_zeros(count as usize)
        }
    }

    /// Zeros up to the next block.
    pub(super) fn align(&mut self) -> Result<()> {
        self.zeros(self.position().next_multiple_of(BLOCK) - self.position())
    }

    /// Writes over a block that was written before, or lies before the first.
    pub(super) fn rewrite(&mut self, block: u32, bytes: &[u8]) -> Result<()> {
        self.out.flush()?;
        self.out.write_at(bytes, u64::from(block) * BLOCK)
    }

    /// Writes out what is buffered and sets the image's size to the position.
    pub(super) fn close(&mut self) -> Result<u64> {
        let len = self.position();
        self.out.close(len)?;
        Ok(len)
    }
}
