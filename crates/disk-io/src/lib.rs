//! Positioned I/O: the floor on which all formats stand.
//!
//! Formats never see paths, sockets or runtimes. They read through [`ReadAt`] and write through [`WriteAt`], and so run
//! alike on a file, a block device, a window of either ([`SubDisk`]), memory ([`MemDisk`]) and a disk that fails on
//! purpose ([`FaultDisk`]).
//!
//! ```text
//!   ext4, vhd, diff … ──► ReadAt / WriteAt ──► File │ MemDisk │ SubDisk(offset,len) │ FaultDisk
//! ```
//!
//! Invariants: offsets are bytes from the start of the disk; a read past the end is short (like `pread`), never an
//! error; a write past the end extends the disk where it can grow; implementations are safe to share between threads.
//! Called by every format module, by `diff` and by `agent`.

mod fault;
mod mem;
pub mod steps;
mod stream;
mod sub;

pub use fault::FaultDisk;
pub use mem::MemDisk;
pub use stream::StreamOut;
pub use sub::SubDisk;

use std::{fs::File, io, sync::Arc};

/// Positioned reads.
pub trait ReadAt: Send + Sync {
    /// Reads up to `buf.len()` bytes at `offset`; 0 at or past the end.
    ///
    /// # Errors
    /// What the system says; `Interrupted` is retried by [`ReadAt::read_exact_at`].
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Size of the disk in bytes.
    fn size(&self) -> io::Result<u64>;

    /// The open file that holds the `len` bytes at `offset`, and where in it, if one does as they are: for streams that
    /// can take them from there ([`StreamOut::splice`]).
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
    /// `WriteZero` if the disk takes no more bytes, else what the system says (`StorageFull`, …).
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
        // A block device has no length in its metadata; seeking to its end tells it. `&File` seeks through a shared
        // cursor that nothing here uses (all I/O is positioned).
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
