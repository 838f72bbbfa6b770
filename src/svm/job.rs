//! Disks and jobs that the driver gives to a lease.
//!
//! ```text
//!   ApplyJob { image (rw), record (rw), lowers (ro)… }  ──► disks attached, counted ──► svm_protocol::Operation
//! ```
//!
//! Disks are given as open files, so no path is ever looked up twice (and an embedded VM needs none). Called by
//! `driver`; read by `pool` and `stream`.

use super::{ApplyOptions, Compression, DiskFormat, ExpandLimits, IdMaps, LayerKind, LiveFile, SvmError};
use futures_util::future::BoxFuture;
use std::{fs::File, io, ops::Range, path::PathBuf, sync::Arc, time::Duration};

/// Whether a VM may write a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Access {
    /// Reads only; enforced by the descriptor that the VM gets.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// Which file, whatever its path: device and inode (volume and file id on Windows).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileIdentity {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

/// A window of an open file, to be attached as a disk.
#[derive(Debug, Clone)]
pub struct DiskSource {
    /// The open file. For [`Access::ReadOnly`] a descriptor that could write is re-opened read-only first.
    pub file: Arc<File>,
    /// Its path, for backends that attach by path and for messages.
    pub path: PathBuf,
    /// What the VM may do.
    pub access: Access,
    /// First byte of the window.
    pub offset: u64,
    /// Bytes of the window; `None` = the whole file, and a writable one may grow.
    pub len: Option<u64>,
    /// How the disk's bytes lie in the file.
    pub format: DiskFormat,
}

impl DiskSource {
    /// The whole of `file`, read-only.
    pub fn read_only(file: Arc<File>, path: impl Into<PathBuf>) -> Self {
        Self {
            file,
            path: path.into(),
            access: Access::ReadOnly,
            offset: 0,
            len: None,
            format: DiskFormat::Raw,
        }
    }

    /// The whole of `file`, writable and growing.
    pub fn read_write(file: Arc<File>, path: impl Into<PathBuf>) -> Self {
        Self {
            file,
            path: path.into(),
            access: Access::ReadWrite,
            offset: 0,
            len: None,
            format: DiskFormat::Raw,
        }
    }

    /// Only the bytes `offset..offset + len` (a VHD without its footer).
    #[must_use]
    pub fn window(mut self, offset: u64, len: u64) -> Self {
        self.offset = offset;
        self.len = Some(len);
        self
    }

    /// The disk that a VHDX holds.
    #[must_use]
    pub fn vhdx(mut self) -> Self {
        self.format = DiskFormat::Vhdx;
        self
    }

    /// Which file it is.
    ///
    /// # Errors
    /// What `fstat` says.
    pub fn identity(&self) -> io::Result<FileIdentity> {
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let metadata = self.file.metadata()?;
            Ok(FileIdentity { device: metadata.dev(), inode: metadata.ino() })
        }
        #[cfg(windows)]
        {
            // If 64 bits do not identify a file, the open handle is the identity: such files are not shared, and never
            // confused.
            let (device, inode) = lcow_sys::windows::fs::identity(&self.file)?
                .unwrap_or((u64::MAX, Arc::as_ptr(&self.file) as u64));
            Ok(FileIdentity { device, inode })
        }
    }
}

/// A layer to read: its image (without footer) and its kind.
#[derive(Debug, Clone)]
pub struct LayerDisk {
    /// The file-system part of the image, read-only.
    pub disk: DiskSource,
    /// What the file system holds.
    pub kind: LayerKind,
}

/// What a layer is compared with.
#[derive(Debug, Clone)]
pub enum ParentDisks {
    /// Nothing.
    None,
    /// The layer's own chain.
    Own,
    /// Another chain, nearest first.
    Chain(Vec<LayerDisk>),
}

/// Makes the disks with which an apply continues when an entry needs larger blocks.
pub trait SecondPair: Send + Sync + 'static {
    /// Two empty, writable disks, for image and record. Called at most once per apply, whose first disks lose their
    /// content soon after; the result is then on these.
    fn make(&self) -> BoxFuture<'_, io::Result<(DiskSource, DiskSource)>>;
}

/// A tar is to become an image and a record.
#[derive(Clone)]
pub struct ApplyJob {
    /// Empty, writable.
    pub image: DiskSource,
    /// Empty, writable.
    pub record: DiskSource,
    /// Empty, writable, dropped afterwards; wanted for large images with a hash tree.
    pub scratch: Option<DiskSource>,
    /// The parents, nearest first.
    pub lowers: Vec<LayerDisk>,
    /// Makes a second pair of disks; without it an entry that needs larger blocks is refused.
    pub larger: Option<Arc<dyn SecondPair>>,
    /// Layout and limits.
    pub options: ApplyOptions,
}

/// An image is to be checked by a VM that has not seen its tar.
#[derive(Debug, Clone)]
pub struct CheckJob {
    /// The disk in the image, from a descriptor opened read-only: the file system and its hash tree, if it has one.
    /// Beyond these there may be only zeros.
    pub image: DiskSource,
    /// Compare every block with the hash tree behind the file system.
    pub tree: bool,
    /// The version of the writer that made it.
    pub writer: u32,
    /// With userns-remap: the ids that owners must have. Empty: any.
    pub owners: IdMaps,
    /// Fail unless no process at all has the file open for writing any more (see [`no_writer_left`]). The caller must
    /// have dropped its own writable descriptors.
    pub require_no_writers: bool,
}

/// The file system on a disk is to become larger.
#[derive(Debug, Clone)]
pub struct GrowJob {
    /// The disk, writable and at least `bytes` long; nothing else uses it.
    pub disk: DiskSource,
    /// The size that the file system is to have.
    pub bytes: u64,
    /// Byte ranges of the disk, ascending, that may not be zeros.
    pub data: Vec<Range<u64>>,
}

/// Which tar of a layer.
#[derive(Debug, Clone)]
pub enum ExportKind {
    /// The original bytes that were applied.
    Exact {
        /// The file-system part of the image.
        image: DiskSource,
        /// The record.
        record: DiskSource,
    },
    /// The canonical tar of a difference.
    Canonical {
        /// The layer and its ancestors, nearest first.
        target: Vec<LayerDisk>,
        /// What it is compared with.
        parent: ParentDisks,
        /// Version of the canonical format.
        format: u32,
        /// Maps host ids of sandboxes back.
        id_maps: IdMaps,
        /// The latest time of an entry, in seconds since 1970; `None` for the layer's own canonical tar.
        source_date_epoch: Option<i64>,
    },
}

/// A layer is to become a tar.
#[derive(Clone)]
pub struct ExportJob {
    /// Which tar.
    pub kind: ExportKind,
    /// Set if sandboxes among the layers are, or may become, mounted.
    pub live: Option<Arc<dyn LiveControl>>,
}

/// Two layers are to be compared (Changes, DiffSize).
#[derive(Clone)]
pub struct CompareJob {
    /// The layer and its ancestors, nearest first.
    pub target: Vec<LayerDisk>,
    /// What it is compared with.
    pub parent: ParentDisks,
    /// Set if sandboxes among the layers are, or may become, mounted.
    pub live: Option<Arc<dyn LiveControl>>,
}

/// A stream that may be compressed is to become plain.
#[derive(Debug, Clone, Copy)]
pub struct ExpandJob {
    /// How it is compressed; `None` lets its first bytes tell, since media types lie.
    pub format: Option<Compression>,
    /// What it may take.
    pub limits: ExpandLimits,
}

/// A plain stream is to be compressed.
#[derive(Debug, Clone, Copy)]
pub struct CompressJob {
    /// The format to write.
    pub format: Compression,
    /// Its level.
    pub level: u32,
}

impl CompressJob {
    /// At the level that always gives the same bytes for the same stream, on every host and in every service VM.
    pub fn reproducible(format: Compression) -> Self {
        Self { format, level: format.level() }
    }
}

/// What an export copies of live sandboxes; see [`CopyJob`](svm_protocol::CopyJob).
#[derive(Debug, Clone)]
pub struct CopyDisk {
    /// Empty, writable, dropped afterwards.
    pub scratch: DiskSource,
    /// Files that changed since (ctime), seconds since 1970.
    pub since: i64,
    /// Files whose changes made an earlier attempt fail.
    pub changed: Vec<LiveFile>,
    /// Most bytes.
    pub most_bytes: u64,
    /// Longest time.
    pub most_time: Duration,
}

/// Stops and restarts the writers of a mounted sandbox. The pool calls `freeze` before the agent reads metadata and
/// `thaw` right after, on every exit path (failure, hang-up, time-out); it never calls `freeze` twice without `thaw`,
/// nor more than twice in one operation.
pub trait LiveControl: Send + Sync + 'static {
    /// Everything written so far is in the image file, and nothing more is written until `thaw`. Slow work, such as
    /// writing back dirty data, is done before writers are stopped. If the future is dropped, no writer stays stopped.
    fn freeze(&self) -> BoxFuture<'_, io::Result<()>>;
    /// What an export copies during the freeze; asked before the first freeze.
    fn copies(&self) -> BoxFuture<'_, io::Result<Option<CopyDisk>>> {
        Box::pin(async { Ok(None) })
    }
    /// Lets writers continue. Must not fail if they already do. After an error the implementation keeps trying.
    fn thaw(&self) -> BoxFuture<'_, io::Result<()>>;
}

/// Fails if any process, this one included, can still write `disk`'s file. A VM that was taken over by a hostile tar
/// may have kept the writable descriptor that it was lent, and could swap the image after its check; the kernel knows
/// (a read lease is refused while writers exist; on Windows, opening without sharing writes is), so the VM need not be
/// trusted.
///
/// # Errors
/// [`SvmError::StillWritable`]; [`SvmError::Disk`] if the file system has no leases.
pub fn no_writer_left(disk: &DiskSource) -> Result<(), SvmError> {
    #[cfg(target_os = "linux")]
    use lcow_sys::linux::process::has_writers;
    #[cfg(windows)]
    use lcow_sys::windows::fs::has_writers;
    let lost = |e: &dyn std::fmt::Display| SvmError::Disk {
        vm: "-".into(),
        disk: disk.path.display().to_string(),
        reason: e.to_string(),
    };
    let writers = has_writers(&disk.file).map_err(|e| lost(&e))?;
    if writers { Err(SvmError::StillWritable(disk.path.display().to_string())) } else { Ok(()) }
}
