//! A window of a disk: no read or write leaves it.

use super::{ReadAt, WriteAt};
use std::{fs::File, io};

/// The bytes `offset .. offset + len` of another disk, as a disk of fixed size.
///
/// Hides, for example, a VHD footer or a hash tree from a file system. Writes past the window fail with `StorageFull`:
/// the window cannot grow into the bytes behind it.
#[derive(Debug, Clone)]
pub struct SubDisk<D> {
    inner: D,
    offset: u64,
    len: u64,
}

impl<D> SubDisk<D> {
    /// A window of `len` bytes that starts at byte `offset` of `inner`.
    pub fn new(inner: D, offset: u64, len: u64) -> Self {
        Self { inner, offset, len }
    }

    /// How many of `want` bytes at `offset` lie inside.
    fn clip(&self, want: usize, offset: u64) -> usize {
        want.min(usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX))
    }
}

impl<D: ReadAt> ReadAt for SubDisk<D> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let n = self.clip(buf.len(), offset);
        if n == 0 {
            return Ok(0);
        }
        self.inner.read_at(&mut buf[..n], self.offset + offset)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn in_file(&self, offset: u64, len: u64) -> Option<(&File, u64)> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len);
        if inside { self.inner.in_file(self.offset + offset, len) } else { None }
    }
}

impl<D: WriteAt> WriteAt for SubDisk<D> {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let n = self.clip(buf.len(), offset);
        if n == 0 && !buf.is_empty() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.inner.write_at(&buf[..n], self.offset + offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len == self.len { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemDisk;

    #[test]
    fn window_clips_reads_and_refuses_writes_past_its_end() {
        let disk = MemDisk::from((0u8..16).collect::<Vec<_>>());
        let window = SubDisk::new(&disk, 4, 8);
        let mut buf = [0; 16];
        assert_eq!(window.read_at(&mut buf, 6).unwrap(), 2);
        assert_eq!(buf[..2], [10, 11]);
        assert_eq!(window.read_at(&mut buf, 8).unwrap(), 0);
        assert_eq!(window.write_at(&[99; 4], 7).unwrap(), 1);
        assert_eq!(window.write_at(&[99; 4], 8).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(disk.to_vec()[11..13], [99, 12]);
    }
}
