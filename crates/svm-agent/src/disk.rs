//! The disks of an agent, as operations see them.
//!
//! ```text
//!   OpDisk ─ window ─► file │ block device           some accesses check whether the caller is still there
//! ```
//!
//! A block device cannot grow: a writable disk without a given length is a device that is large enough, and has the
//! length that was set or written, as a file would; the daemon truncates the file behind it to the operation's result.
//! Bulk bytes of devices go past the guest's page cache (`block`). `OpDisk::reach_host` flushes both, so that the daemon
//! sees all bytes.
//!
//! Cancellation has to reach codecs that compute for long without touching their channel; they all touch disks, so
//! the disk fails once the caller is gone. Called by `operation` and, through `ReadAt`/`WriteAt`, by codecs.

use super::block::Unbuffered;
use disk_io::{ReadAt, WriteAt};
use lcow_sys::writeback::Writeback;
use std::{
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};
use svm_protocol::{DiskFormat, ErrorKind, WireError};
use vhd_image::vhdx::Vhdx;

/// An attached disk: a window of an open file or device.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    /// The open file.
    pub(crate) file: Arc<File>,
    /// Writes are allowed.
    pub(crate) writable: bool,
    /// First byte of the window.
    pub(crate) offset: u64,
    /// Bytes of the window; `None` means to the end, which may grow.
    pub(crate) len: Option<u64>,
    /// The disk inside a VHDX; `None` if the file is the disk.
    pub(crate) inner: Option<Arc<Vhdx<Arc<File>>>>,
    /// The length of the file, for a device of fixed size that represents a growing file.
    pub(crate) length: Option<Arc<AtomicU64>>,
    /// The device opened a second time, for access past the page cache.
    pub(crate) unbuffered: Option<Arc<File>>,
}

impl Disk {
    /// A window of a file or device, or of the disk that the file holds.
    ///
    /// # Errors
    /// A file of another format; a writable VHDX; errors of the system.
    pub(crate) fn open(
        file: File,
        format: DiskFormat,
        writable: bool,
        (offset, len): (u64, Option<u64>),
    ) -> Result<Self, WireError> {
        let kind =
            file.metadata().map_err(|e| WireError::new(ErrorKind::Io, format!("a disk: {e}")))?.file_type();
        let device = is_block_device(kind);
        let length = (writable && len.is_none() && device).then(Arc::default);
        // Not for a writable device of fixed size: its operations do not flush gathered writes.
        let bulk = device && format == DiskFormat::Raw && (!writable || length.is_some());
        let unbuffered = bulk.then(|| unbuffered(&file, writable)).flatten().map(Arc::new);
        let file = Arc::new(file);
        let inner = match format {
            DiskFormat::Raw => None,
            DiskFormat::Vhdx if writable => {
                return Err(WireError::new(ErrorKind::Unsupported, "a VHDX is attached read-only here"));
            }
            DiskFormat::Vhdx => Some(Arc::new(
                Vhdx::open(file.clone())
                    .map_err(|e| WireError::new(ErrorKind::Corrupt, format!("VHDX: {e}")))?,
            )),
        };
        Ok(Self { file, writable, offset, len, inner, length, unbuffered })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        match &self.inner {
            None => self.file.read_at(buf, offset),
            Some(inner) => inner.read_at(buf, offset),
        }
    }

    fn size(&self) -> io::Result<u64> {
        match &self.inner {
            None => ReadAt::size(&*self.file),
            Some(inner) => inner.size(),
        }
    }
}

/// Opens the device a second time, for access past the page cache; `None` if that fails, which costs only speed.
fn unbuffered(file: &File, writable: bool) -> Option<File> {
    #[cfg(target_os = "linux")]
    return lcow_sys::linux::guest::reopen_unbuffered(file, writable).ok();
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (file, writable);
        None
    }
}

fn is_block_device(kind: std::fs::FileType) -> bool {
    #[cfg(unix)]
    return std::os::unix::fs::FileTypeExt::is_block_device(&kind);
    #[cfg(not(unix))]
    {
        let _ = kind;
        false
    }
}

/// Whether an operation's caller is gone. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Cancel(Arc<CancelState>);

struct CancelState {
    gone: AtomicBool,
    calls: AtomicU32,
    ask: Box<dyn Fn() -> bool + Send + Sync>,
}

/// Disk accesses between two checks of the channel (each is a system call).
const CALLS_PER_LOOK: u32 = 64;

impl Cancel {
    /// `ask` checks the channel.
    pub(crate) fn new(ask: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self(Arc::new(CancelState {
            gone: AtomicBool::new(false),
            calls: AtomicU32::new(0),
            ask: Box::new(ask),
        }))
    }

    /// Whether the caller was gone at the last check.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.0.gone.load(Ordering::Relaxed)
    }

    fn check(&self) -> io::Result<()> {
        if self.0.calls.fetch_add(1, Ordering::Relaxed).is_multiple_of(CALLS_PER_LOOK) && (self.0.ask)() {
            self.0.gone.store(true, Ordering::Relaxed);
        }
        if self.is_cancelled() {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the caller is gone"));
        }
        Ok(())
    }
}

/// A disk within one operation.
#[derive(Clone)]
pub struct OpDisk {
    disk: Disk,
    cancel: Cancel,
    writeback: Arc<Writeback>,
    /// Takes the bulk bytes of a device.
    bulk: Option<Arc<Unbuffered>>,
}

impl OpDisk {
    /// `disk`, which fails once `cancel` reports that the caller is gone.
    pub(crate) fn new(disk: Disk, cancel: Cancel) -> Self {
        let bulk = disk.unbuffered.clone().map(|device| Arc::new(Unbuffered::new(device)));
        Self { disk, cancel, writeback: Arc::default(), bulk }
    }

    /// Whether both are the same window of the same attached file.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.disk.file, &other.disk.file) && self.disk.offset == other.disk.offset
    }

    /// Flushes what was written from the guest's page cache, so that the daemon finds it in the file behind the device.
    /// Files are the daemon's own: nothing to do.
    ///
    /// # Errors
    /// Errors of the device.
    pub(crate) fn reach_host(&self) -> io::Result<()> {
        if let Some(bulk) = &self.bulk {
            bulk.flush()?;
        }
        if self.disk.length.is_some() { self.disk.file.sync_data() } else { Ok(()) }
    }

    /// Discards what was read from a device: the disk behind it is written by others, which neither the guest's page cache
    /// nor this operation can see. Files are the daemon's own: nothing to do.
    ///
    /// # Errors
    /// If the device cannot be asked.
    #[cfg_attr(
        not(target_os = "linux"),
        expect(clippy::unnecessary_wraps, reason = "only guests, which are Linux, read devices")
    )]
    pub(crate) fn forget(&self) -> io::Result<()> {
        if let Some(bulk) = &self.bulk {
            bulk.forget();
        }
        #[cfg(target_os = "linux")]
        if is_block_device(self.disk.file.metadata()?.file_type()) {
            lcow_sys::linux::guest::forget_cached(&self.disk.file).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// The number of the `len` bytes at `offset` that are in the window, and their offset in the file.
    fn place(&self, offset: u64, len: usize) -> io::Result<(u64, usize)> {
        let at = self.disk.offset.checked_add(offset).ok_or(io::ErrorKind::InvalidInput)?;
        let room = self.disk.len.map_or(u64::MAX, |size| size.saturating_sub(offset));
        Ok((at, usize::try_from(room).unwrap_or(usize::MAX).min(len)))
    }
}

impl ReadAt for OpDisk {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.cancel.check()?;
        let (at, len) = self.place(offset, buf.len())?;
        // The kernel rejects offsets beyond i64; here they are past the end.
        if len == 0 || i64::try_from(at).is_err() {
            return Ok(0);
        }
        let len = match &self.disk.length {
            Some(length) => {
                let room = length.load(Ordering::Acquire).saturating_sub(offset);
                usize::try_from(room).unwrap_or(usize::MAX).min(len)
            }
            None => len,
        };
        if let Some(bulk) = &self.bulk
            && let Some(n) = bulk.read_at(&mut buf[..len], at)?
        {
            return Ok(n);
        }
        self.disk.read_at(&mut buf[..len], at)
    }

    fn size(&self) -> io::Result<u64> {
        if let Some(length) = &self.disk.length {
            return Ok(length.load(Ordering::Acquire));
        }
        let rest = self.disk.size()?.saturating_sub(self.disk.offset);
        Ok(self.disk.len.map_or(rest, |len| len.min(rest)))
    }

    fn in_file(&self, offset: u64, len: u64) -> Option<(&File, u64)> {
        let inside = self.disk.len.is_none_or(|size| offset.checked_add(len).is_some_and(|end| end <= size));
        // Bytes that may still change are not spliced; see `StreamOut`.
        if !inside || self.disk.writable || self.disk.inner.is_some() {
            return None;
        }
        Some((&self.disk.file, self.disk.offset.checked_add(offset)?))
    }
}

impl WriteAt for OpDisk {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.cancel.check()?;
        if !self.disk.writable {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "disk is attached read-only"));
        }
        let (at, len) = self.place(offset, buf.len())?;
        let written = match &self.bulk {
            Some(bulk) => {
                bulk.write_all_at(&buf[..len], at)?;
                len
            }
            None => self.disk.file.write_at(&buf[..len], at)?,
        };
        if let Some(length) = &self.disk.length {
            length.fetch_max(offset.saturating_add(written as u64), Ordering::AcqRel);
            return Ok(written);
        }
        self.writeback.written(&self.disk.file, at.saturating_add(written as u64));
        Ok(written)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.disk.len.is_some() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "a window of a disk cannot change its size",
            ));
        }
        if !self.disk.writable {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "disk is attached read-only"));
        }
        if let Some(length) = &self.disk.length {
            // Truncated bytes would reappear if the disk grew again; no caller grows a disk.
            if len < length.load(Ordering::Acquire) {
                return Err(io::Error::new(io::ErrorKind::Unsupported, "a device cannot be truncated"));
            }
            length.store(len, Ordering::Release);
            return Ok(());
        }
        let end = self.disk.offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        self.disk.file.set_len(end)
    }

    fn sync(&self) -> io::Result<()> {
        if let Some(bulk) = &self.bulk {
            bulk.flush()?;
        }
        self.disk.file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(file: File, writable: bool, window: (u64, Option<u64>)) -> Disk {
        Disk::open(file, DiskFormat::Raw, writable, window).unwrap()
    }

    fn disk(len: Option<u64>, writable: bool) -> OpDisk {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"0123456789", 0).unwrap();
        OpDisk::new(raw(file, writable, (2, len)), Cancel::new(|| false))
    }

    #[test]
    fn a_window_shows_its_bytes_only() {
        let d = disk(Some(5), true);
        assert_eq!(d.size().unwrap(), 5);
        let mut buf = [0; 8];
        assert_eq!(d.read_at(&mut buf, 3).unwrap(), 2);
        assert_eq!(&buf[..2], b"56");
        assert_eq!(d.read_at(&mut buf, u64::MAX - 5).unwrap(), 0);
        assert_eq!(disk(None, true).read_at(&mut buf, u64::MAX - 5).unwrap(), 0);
        assert!(d.read_at(&mut buf, u64::MAX).is_err());
        assert_eq!(d.write_at(b"abc", 4).unwrap(), 1, "writes stop at the window's end");
        assert!(d.set_len(3).is_err());
    }

    #[test]
    fn read_only_disks_refuse_writes_and_growing_ones_grow() {
        let d = disk(None, false);
        assert_eq!(d.write_at(b"a", 0).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert!(d.set_len(0).is_err());
        let d = disk(None, true);
        d.write_all_at(b"xyz", 20).unwrap();
        assert_eq!(d.size().unwrap(), 23);
        d.set_len(4).unwrap();
        assert_eq!(d.size().unwrap(), 4);
    }

    #[test]
    fn a_device_has_the_length_that_was_written() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let mut disk = raw(file, true, (0, None));
        disk.length = Some(Arc::default());
        disk.unbuffered = Some(disk.file.clone());
        let file = disk.file.clone();
        let d = OpDisk::new(disk, Cancel::new(|| false));
        assert_eq!((d.size().unwrap(), d.read_at(&mut [0; 9], 0).unwrap()), (0, 0));
        d.write_all_at(b"abc", 10).unwrap();
        assert_eq!((d.size().unwrap(), d.read_at(&mut [0; 9], 8).unwrap()), (13, 5));
        d.set_len(20).unwrap();
        assert_eq!(d.size().unwrap(), 20);
        assert!(d.set_len(5).is_err());
        d.reach_host().unwrap();
        let mut there = [0; 3];
        file.read_exact_at(&mut there, 10).unwrap();
        assert_eq!(&there, b"abc");
    }

    #[test]
    fn a_gone_caller_stops_disk_access_within_one_look() {
        let gone = Arc::new(AtomicBool::new(false));
        let seen = gone.clone();
        let file = tempfile::tempfile().unwrap();
        let d = OpDisk::new(raw(file, true, (0, None)), Cancel::new(move || seen.load(Ordering::Relaxed)));
        d.write_all_at(b"x", 0).unwrap();
        gone.store(true, Ordering::Relaxed);
        let failed = (0..=CALLS_PER_LOOK).find_map(|_| d.read_at(&mut [0], 0).err()).unwrap();
        assert_eq!(failed.kind(), io::ErrorKind::ConnectionAborted);
    }
}
