//! A disk that fails on purpose, for tests of error paths. The budget counts bytes, whatever their offsets.

use super::{ReadAt, WriteAt};
use std::{
    io,
    sync::atomic::{AtomicU64, Ordering},
};

/// Passes everything to another disk until a budget of written bytes is used up, and then fails like a full disk.
///
/// The write that crosses the budget is short, as on a real disk, so callers see half-written blocks.
#[derive(Debug)]
pub struct FaultDisk<D> {
    inner: D,
    budget: AtomicU64,
}

impl<D> FaultDisk<D> {
    /// Accepts `budget` bytes of writes; all later writes fail with `StorageFull`.
    pub fn full_after(inner: D, budget: u64) -> Self {
        Self { inner, budget: AtomicU64::new(budget) }
    }

    /// The disk below.
    pub fn inner(&self) -> &D {
        &self.inner
    }
}

impl<D: ReadAt> ReadAt for FaultDisk<D> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.inner.read_at(buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        self.inner.size()
    }
}

impl<D: WriteAt> WriteAt for FaultDisk<D> {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let mut granted = 0;
        self.budget
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                granted = left.min(buf.len() as u64);
                Some(left - granted)
            })
            .expect("the closure always returns Some");
        if granted == 0 && !buf.is_empty() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.inner.write_at(&buf[..granted as usize], offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
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
    fn the_crossing_write_is_short_and_the_next_one_fails() {
        let disk = FaultDisk::full_after(MemDisk::new(), 6);
        disk.write_all_at(&[1; 4], 0).unwrap();
        assert_eq!(disk.write_at(&[2; 4], 4).unwrap(), 2);
        assert_eq!(disk.write_all_at(&[3; 1], 6).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(disk.inner().to_vec(), [1, 1, 1, 1, 2, 2]);
    }
}
