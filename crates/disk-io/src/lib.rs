//! Positioned reads and writes: one pair of traits for files, block devices, memory, and windows of any of them.
//!
//! Code that reads or writes a disk format takes a [`ReadAt`] or a [`WriteAt`] instead of a path or a file. It then runs
//! unchanged on whatever holds the bytes, and its tests run in memory or on a disk that fails on purpose.
//!
//! ```text
//!   a format's reader or writer ──► ReadAt / WriteAt ──┬── std::fs::File      a file or a block device
//!                                                      ├── MemDisk            a growable buffer in memory
//!                                                      ├── SubDisk            bytes offset .. offset + len of another
//!                                                      ├── FaultDisk          fails after a number of written bytes
//!                                                      ├── CrashDisk          forgets, at a power cut, what was not flushed
//!                                                      └── &D, Arc<D>, Box<D> any of these, shared
//! ```
//!
//! # Contract of the traits
//!
//! * Offsets are bytes from the start of the disk. There is no cursor, so threads can share a disk.
//! * A read at or past the end returns 0, and one that crosses the end is short, like `pread`; neither is an error.
//! * A write past the end extends a disk that can grow (`File`, `MemDisk`); the gap reads as zeros. A disk of fixed size
//!   fails with [`StorageFull`](std::io::ErrorKind::StorageFull).
//! * A successful call may transfer fewer bytes than requested; [`ReadAt::read_exact_at`] and [`WriteAt::write_all_at`]
//!   repeat it.
//! * Written bytes are durable once [`WriteAt::sync`] has returned.
//!
//! # Limits
//!
//! [`MemDisk`] holds what fits in memory. On Windows, positioned I/O moves the cursor of the file handle, so do not mix
//! it with `Read` and `Write` on the same handle.
//!
//! # Stability
//!
//! The crate draws no bytes of its own. `steps` counts the work of the parsers of this workspace in tests and fuzz
//! targets; it is not part of the public API.

#![forbid(unsafe_code)]

pub mod crash;
mod fault;
mod mem;
#[doc(hidden)]
pub mod steps;
mod stream;
mod sub;

pub use fault::FaultDisk;
pub use mem::MemDisk;
pub use stream::StreamOut;
pub use sub::SubDisk;

use std::{fs::File, io, sync::Arc};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Positioned reads.
pub trait ReadAt: Send + Sync {
    /// Reads up to `buf.len()` bytes at `offset`; 0 at or past the end.
    ///
    /// # Errors
    /// Any error of the device. The caller repeats an `Interrupted` call, as [`ReadAt::read_exact_at`] does.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Size of the disk in bytes.
    fn size(&self) -> io::Result<u64>;

    /// The open file that holds the `len` bytes at `offset` unchanged, and their offset in it; `None` if there is no such
    /// file. For streams that can take bytes directly from a file ([`StreamOut::splice`]).
    fn in_file(&self, _offset: u64, _len: u64) -> Option<(&File, u64)> {
        None
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` if the disk ends first.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        format!(
                            "disk ends at byte {} of a read of {} at {offset}",
                            offset + done as u64,
                            buf.len()
                        ),
                    ));
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// Positioned writes.
pub trait WriteAt: ReadAt {
    /// Writes up to `buf.len()` bytes at `offset`.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize>;

    /// Sets the size in bytes; new bytes read as zeros.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes all written bytes durable.
    fn sync(&self) -> io::Result<()>;

    /// Writes all of `buf` at `offset`.
    ///
    /// # Errors
    /// `WriteZero` if the disk accepts no more bytes, otherwise the error of [`WriteAt::write_at`] (`StorageFull`, …).
    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.write_at(&buf[done..], offset + done as u64) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl ReadAt for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        #[cfg(unix)]
        return std::os::unix::fs::FileExt::read_at(self, buf, offset);
        #[cfg(windows)]
        return match std::os::windows::fs::FileExt::seek_read(self, buf, offset) {
            // ERROR_HANDLE_EOF: Windows reports a read at the end as an error.
            Err(e) if e.raw_os_error() == Some(38) => Ok(0),
            other => other,
        };
    }

    fn size(&self) -> io::Result<u64> {
        let metadata = self.metadata()?;
        if metadata.is_file() {
            return Ok(metadata.len());
        }
        // The metadata of a block device has no length, so seek to its end. The cursor is not used otherwise: all I/O is
        // positioned.
        io::Seek::seek(&mut &*self, io::SeekFrom::End(0))
    }

    fn in_file(&self, offset: u64, _: u64) -> Option<(&File, u64)> {
        Some((self, offset))
    }
}

impl WriteAt for File {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        #[cfg(unix)]
        return std::os::unix::fs::FileExt::write_at(self, buf, offset);
        #[cfg(windows)]
        return std::os::windows::fs::FileExt::seek_write(self, buf, offset);
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }
}

macro_rules! forward {
    ($($t:ty),*) => {$(
        impl<D: ReadAt + ?Sized> ReadAt for $t {
            fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
                (**self).read_at(buf, offset)
            }
            fn size(&self) -> io::Result<u64> {
                (**self).size()
            }
            fn in_file(&self, offset: u64, len: u64) -> Option<(&File, u64)> {
                (**self).in_file(offset, len)
            }
        }
        impl<D: WriteAt + ?Sized> WriteAt for $t {
            fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
                (**self).write_at(buf, offset)
            }
            fn set_len(&self, len: u64) -> io::Result<()> {
                (**self).set_len(len)
            }
            fn sync(&self) -> io::Result<()> {
                (**self).sync()
            }
        }
    )*};
}
forward!(&D, Arc<D>, Box<D>);
