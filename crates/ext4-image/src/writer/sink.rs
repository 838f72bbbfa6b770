//! Ordered output with small gaps filled, and the checksum of all bytes.
//!
//! Called by all parts of the writer that put bytes into the image.

use super::Result;
use crate::output::Output;
use disk_io::WriteAt;

/// Size of the buffer.
const CAPACITY: usize = 256 << 10;
/// Gaps of at most this size are filled with zeros instead of starting a new write.
const MAX_FILL: u64 = 8 << 10;

#[derive(Debug)]
pub(super) struct Sink<W> {
    out: Output<W>,
    /// crc32c of all bytes in their order, where it is needed: a part of the content's digest.
    pub(super) crc: Option<u32>,
}

impl<W: WriteAt> Sink<W> {
    pub(super) fn new(out: W, sum: bool) -> Self {
        Self { out: Output::new(out, 0, CAPACITY), crc: sum.then_some(0) }
    }

    /// Writes `bytes` at `offset` of the image, sooner or later.
    #[inline]
    pub(super) fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        if let Some(crc) = &mut self.crc {
            *crc = crc32c::crc32c_append(*crc, bytes);
        }
        let position = self.out.position();
        if offset != position {
            let gap = offset.wrapping_sub(position);
            if gap <= MAX_FILL && self.out.has_room_behind(gap as usize) {
                self.out.append_zeros(gap as usize)?;
            } else {
                self.out.seek(offset)?;
            }
        }
        self.out.append(bytes)
    }

    /// Writes out what is buffered.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.out.flush()
    }

    /// Writes out what is buffered and sets the size of the image.
    pub(super) fn close(&mut self, len: u64) -> Result<()> {
        self.out.close(len)
    }
}
