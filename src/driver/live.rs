//! Freezes sandboxes while a service VM reads their metadata.
//!
//! ```text
//!   syncfs (everybody goes on) ─► gates close ─► FIFREEZE ─► … at least one tick … ─► FITHAW until it succeeds ─► gates open
//! ```
//!
//! A sandbox may be mounted, may become mounted, or may be unmounted while a diff of it runs. During the two short
//! phases in which metadata are read, its gate is closed (it is neither mounted nor unmounted) and, if it is mounted,
//! its file system is frozen: everything that was written is then in the image file, and nothing changes. This lasts at
//! least one tick of the kernel's clock, so that a later write always has a later time than what was read.
//!
//! On disks with reflinks the freeze does not even last while metadata are read: the sandboxes' files are cloned while
//! frozen ([`Stillness::clones`]), and the clones, which do not change, are read. Elsewhere an export copies recently
//! changed files to a scratch disk ([`LiveControl::copies`]); files that change nevertheless are remembered for the
//! next attempt ([`Remembered`]).
//!
//! The caller (`svm`) decides how often and how long. Everything frozen is thawed on every exit path: by
//! [`LiveControl::thaw`], when the future of the caller is dropped, and at the end of the process.

use super::{
    DriverError,
    gates::{Gates, Held},
    home::Home,
    remembered::{Remembered, Sandbox},
};
use crate::{
    store::LayerId,
    svm::{LayerDisk, LiveControl, ParentDisks, SvmError},
};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use std::{io, sync::Arc};

#[cfg(target_os = "linux")]
use {
    super::{blocking, mounts::Mounts},
    crate::{
        error::with_causes,
        store::layout,
        svm::{CopyDisk, DiskSource},
    },
    lcow_sys::linux::{
        SysError,
        freeze::{FrozenMount, freeze},
        mount, reflink,
    },
    std::{
        fs::File,
        os::fd::AsFd,
        path::{Path, PathBuf},
        sync::atomic::Ordering,
        time::{Duration, Instant, SystemTime, UNIX_EPOCH},
    },
};

/// Longer than a tick of the slowest usual clock (100 Hz).
#[cfg(target_os = "linux")]
const TICK: Duration = Duration::from_millis(12);
/// How long a caller waits for a thaw that fails. The attempts go on, with the gates closed.
#[cfg(target_os = "linux")]
const THAW_WAIT: Duration = Duration::from_secs(5);
/// Repeated failures of one thaw are logged once in this many attempts.
#[cfg(target_os = "linux")]
const TOLD: u32 = 60;

/// Files changed within this time before an export are copied during the freeze,
#[cfg(target_os = "linux")]
const LATELY: Duration = Duration::from_mins(1);
/// up to this many bytes,
#[cfg(target_os = "linux")]
const MOST_COPIED: u64 = 256 << 20;
/// and for at most this long.
#[cfg(target_os = "linux")]
const LONGEST_COPY: Duration = Duration::from_secs(1);

/// Freezes and thaws the sandboxes of one comparison.
#[derive(Debug)]
pub(super) struct Stillness {
    gates: Arc<Gates>,
    ids: Vec<LayerId>,
    sandboxes: Vec<Sandbox>,
    remembered: Arc<Remembered>,
    /// Where a scratch disk is made; `None` if there is no space for it.
    #[cfg(target_os = "linux")]
    scratch: Option<PathBuf>,
    #[cfg(target_os = "linux")]
    mounts: Arc<Mounts>,
    held: Mutex<Option<Still>>,
}

impl Stillness {
    /// Remembers the files whose changes made an export fail.
    pub(super) fn remember(&self, error: &SvmError) {
        if let SvmError::Refused(refused) = error {
            self.remembered.note(&self.sandboxes, &refused.changed);
        }
    }
}

impl Home {
    /// Makes `sandboxes`, which are those of the two stacks, readable: replaces their disks by clones that do not
    /// change, or else returns the control that freezes them.
    #[cfg_attr(not(target_os = "linux"), expect(clippy::unused_async, reason = "only Linux makes clones"))]
    pub(super) async fn hold_still(
        &self,
        sandboxes: Vec<Sandbox>,
        target: &mut [LayerDisk],
        parent: &mut ParentDisks,
    ) -> Result<Option<Arc<Stillness>>, DriverError> {
        if sandboxes.is_empty() {
            return Ok(None);
        }
        let mut ids: Vec<LayerId> = sandboxes.iter().map(|s| s.layer.id.clone()).collect();
        ids.sort_unstable();
        ids.dedup();
        let still = Stillness {
            gates: self.gates.clone(),
            ids,
            remembered: self.remembered.clone(),
            #[cfg(target_os = "linux")]
            scratch: self.has_room(MOST_COPIED).then(|| self.store.layout().top(layout::STAGING)),
            #[cfg(target_os = "linux")]
            mounts: self.mounts.clone(),
            held: Mutex::default(),
            sandboxes,
        };
        #[cfg(target_os = "linux")]
        if self.can_clone(&still.sandboxes).await? {
            match still.clones(self.store.layout().top(layout::STAGING)).await {
                Ok(clones) => {
                    replace(&clones, target, parent);
                    return Ok(None);
                }
                Err(CloneError::Still(error)) => {
                    return Err(DriverError::svm(&still.ids[0], "read it")(SvmError::Live(with_causes(
                        &error,
                    ))));
                }
                Err(CloneError::Clone(error)) => {
                    self.reflinks.store(false, Ordering::Relaxed);
                    tracing::warn!(%error, "files cannot be cloned after all; reading live sandboxes directly");
                }
            }
        }
        let _ = (target, parent);
        Ok(Some(Arc::new(still)))
    }

    /// Whether the disk has `bytes` to spare for a while.
    #[cfg(target_os = "linux")]
    fn has_room(&self, bytes: u64) -> bool {
        let wanted = bytes.saturating_add(self.options.min_free_bytes);
        self.free_bytes().is_none_or(|free| free >= wanted)
    }

    /// Whether clones can be made and there is space for whatever may be written to the sandboxes while they exist: a
    /// write to a shared block needs a new one.
    #[cfg(target_os = "linux")]
    async fn can_clone(&self, sandboxes: &[Sandbox]) -> Result<bool, DriverError> {
        use std::os::unix::fs::MetadataExt;
        /// Unit of `st_blocks`, in bytes.
        const SECTOR: u64 = 512;
        if !self.reflinks.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let files: Vec<Arc<File>> = sandboxes.iter().map(|s| s.file.clone()).collect();
        let taken = blocking(move || {
            Ok(files.iter().filter_map(|file| Some(file.metadata().ok()?.blocks() * SECTOR)).sum::<u64>())
        });
        Ok(self.has_room(taken.await?))
    }
}

/// Replaces files by their clones.
#[cfg(target_os = "linux")]
fn replace(clones: &[(Arc<File>, Arc<File>)], target: &mut [LayerDisk], parent: &mut ParentDisks) {
    let below: &mut [LayerDisk] = match parent {
        ParentDisks::Chain(layers) => layers,
        _ => &mut [],
    };
    for layer in target.iter_mut().chain(below) {
        if let Some((_, clone)) = clones.iter().find(|(file, _)| Arc::ptr_eq(file, &layer.disk.file)) {
            layer.disk.file = clone.clone();
        }
    }
}

/// Frozen file systems and closed gates. On drop the file systems thaw before the gates open.
#[derive(Debug)]
pub(super) struct Still {
    #[cfg(target_os = "linux")]
    frozen: Vec<FrozenMount>,
    #[cfg(target_os = "linux")]
    since: Instant,
    _gates: Held,
}

#[cfg(target_os = "linux")]
impl Still {
    /// Freezes what is mounted at `folders`. If one fails, or the caller is gone, all are thawed.
    fn begin(folders: &[PathBuf], gates: Held) -> io::Result<Self> {
        let begun = Instant::now();
        let frozen = folders
            .iter()
            .map(|folder| freeze(folder).map_err(|error| refused(folder, error)))
            .collect::<io::Result<Vec<_>>>()?;
        if !frozen.is_empty() {
            tracing::debug!(file_systems = frozen.len(), took = ?begun.elapsed(), "frozen");
        }
        Ok(Self { frozen, since: Instant::now(), _gates: gates })
    }

    /// Thaws, however long that takes; blocks.
    fn end(self) {
        if self.frozen.is_empty() {
            return;
        }
        std::thread::sleep(TICK.saturating_sub(self.since.elapsed()));
        for frozen in &self.frozen {
            frozen.thaw_surely(|number, error| {
                if number % TOLD == 1 {
                    tracing::error!(number, %error, "a sandbox cannot be thawed; retrying");
                }
            });
        }
        tracing::debug!(file_systems = self.frozen.len(), frozen = ?self.since.elapsed(), "thawed");
    }
}

/// Why a sandbox cannot be frozen.
#[cfg(target_os = "linux")]
fn refused(folder: &Path, error: SysError) -> io::Error {
    if error.raw_os_error() != Some(libc::EBUSY) {
        return io::Error::other(error);
    }
    let folder = folder.display();
    io::Error::other(format!(
        "its sandbox was frozen by someone else; thaw it (fsfreeze -u {folder}) and try again"
    ))
}

#[cfg(target_os = "linux")]
impl Stillness {
    /// The mount points of those sandboxes that are mounted now.
    fn folders(&self) -> Vec<PathBuf> {
        self.ids.iter().filter_map(|id| self.mounts.disk_dir(id)).collect()
    }

    /// Writes dirty data to the disk before the freeze, so that the freeze has little left to write.
    async fn sync(&self) -> io::Result<()> {
        let folders = self.folders();
        if folders.is_empty() {
            return Ok(());
        }
        in_thread(move || {
            folders.iter().try_for_each(|folder| match mount::syncfs(folder) {
                // Unmounted meanwhile, which synced it.
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
                other => other.map_err(io::Error::other),
            })
        })
        .await
    }
}

/// Why cloning failed.
#[cfg(target_os = "linux")]
#[derive(Debug)]
enum CloneError {
    /// The sandboxes could not be frozen or thawed.
    Still(io::Error),
    /// They were frozen, but could not be cloned.
    Clone(io::Error),
}

#[cfg(target_os = "linux")]
impl Stillness {
    /// Clones of the sandboxes' files, as pairs of file and clone, made while all are frozen.
    async fn clones(&self, folder: PathBuf) -> Result<Vec<(Arc<File>, Arc<File>)>, CloneError> {
        // A sandbox of both stacks is opened twice; both get the same clone, so that they are recognized as the same
        // layer.
        let mut files: Vec<(LayerId, Arc<File>)> =
            self.sandboxes.iter().map(|s| (s.layer.id.clone(), s.file.clone())).collect();
        files.sort_by(|a, b| a.0.cmp(&b.0));
        let bulk = files.clone();
        // The writes of the loop devices are in the host's page cache; the clone would have to write them back.
        self.sync().await.map_err(CloneError::Still)?;
        in_thread(move || bulk.iter().try_for_each(|(_, file)| file.sync_data()))
            .await
            .map_err(CloneError::Still)?;
        self.freeze().await.map_err(CloneError::Still)?;
        // If this is dropped half way, `self` thaws, because it holds what is frozen.
        let cloned = in_thread(move || {
            let mut clones: Vec<(LayerId, Arc<File>, Arc<File>)> = Vec::with_capacity(files.len());
            for (id, file) in files {
                let known = clones.last().filter(|(last, ..)| *last == id).map(|(.., clone)| clone.clone());
                let clone = if let Some(clone) = known {
                    clone
                } else {
                    let to = reflink::nameless(&folder).map_err(io::Error::other)?;
                    reflink::clone_file(file.as_fd(), to.as_fd())?;
                    Arc::new(to)
                };
                clones.push((id, file, clone));
            }
            Ok(clones.into_iter().map(|(_, file, clone)| (file, clone)).collect())
        });
        let cloned = cloned.await;
        // Thaw before the result is used.
        self.thaw().await.map_err(CloneError::Still)?;
        cloned.map_err(CloneError::Clone)
    }
}

/// Blocking work, off the runtime's threads.
#[cfg(target_os = "linux")]
async fn in_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work)).await.map_err(io::Error::other)?
}

#[cfg(target_os = "linux")]
impl LiveControl for Stillness {
    fn copies(&self) -> BoxFuture<'_, io::Result<Option<CopyDisk>>> {
        Box::pin(async move {
            let Some(folder) = self.scratch.clone().filter(|_| !self.folders().is_empty()) else {
                return Ok(None);
            };
            let (file, path) = in_thread(move || {
                let file = reflink::nameless(&folder).map_err(io::Error::other)?;
                Ok((Arc::new(file), folder))
            })
            .await?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let since = i64::try_from(now.saturating_sub(LATELY).as_secs()).unwrap_or(i64::MAX);
            Ok(Some(CopyDisk {
                scratch: DiskSource::read_write(file, path),
                since,
                changed: self.remembered.of(&self.sandboxes),
                most_bytes: MOST_COPIED,
                most_time: LONGEST_COPY,
            }))
        })
    }

    fn freeze(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.sync().await?;
            let gates = self.gates.close(&self.ids).await;
            // Look up again under the gates.
            let folders = self.folders();
            *self.held.lock() = Some(in_thread(move || Still::begin(&folders, gates)).await?);
            Ok(())
        })
    }

    fn thaw(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let Some(still) = self.held.lock().take() else { return Ok(()) };
            let (ended, end) = tokio::sync::oneshot::channel();
            // A dedicated thread: it may take forever, and a runtime waits for its threads when it ends.
            let thread = std::thread::Builder::new().name("thaw".into()).spawn(move || {
                still.end();
                let _ = ended.send(());
            });
            // If there is none, dropping `still` has thawed.
            thread?;
            match tokio::time::timeout(THAW_WAIT, end).await {
                Ok(_) => Ok(()),
                Err(_) => Err(io::Error::other("it stays frozen for now; attempts continue, see the log")),
            }
        })
    }
}

/// Only Linux mounts sandboxes; elsewhere the gates suffice.
#[cfg(not(target_os = "linux"))]
impl LiveControl for Stillness {
    fn freeze(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let gates = self.gates.close(&self.ids).await;
            *self.held.lock() = Some(Still { _gates: gates });
            Ok(())
        })
    }

    fn thaw(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            drop(self.held.lock().take());
            Ok(())
        })
    }
}
