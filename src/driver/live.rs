//! Holding sandboxes still while a service VM reads their metadata.
//!
//! ```text
//!   syncfs (everybody goes on) ─► gates close ─► FIFREEZE ─► … at least one tick … ─► FITHAW until it succeeds ─► gates open
//! ```
//!
//! A sandbox may be mounted, may become mounted, or may be unmounted while a diff of it runs. During the two short
//! phases in which metadata are read its gate is closed (nobody mounts or unmounts it) and, if it is mounted, its file
//! system is frozen: everything that was written is in the image file then, and nothing moves. It stays so for at least
//! one tick of the kernel's clock, so that a later write always has a later time than what was read.
//!
//! Where the disk has reflinks the metadata are not even waited for: the sandboxes' files are cloned while they stand still
//! ([`Stillness::clones`]), and the clones, which nobody writes, are read. Elsewhere an export copies what changed lately
//! to a scratch disk ([`LiveControl::copies`]), and what changed all the same is remembered for the next one
//! ([`Remembered`]).
//!
//! How often and how long is the business of who asks (`svm`); what was frozen is thawed on every way out: by
//! [`LiveControl::thaw`], when the asking future is dropped, and at the end of the process.

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
        freeze::{FrozenMount, freeze},
        mount, reflink,
    },
    std::{
        fs::File,
        os::fd::AsFd,
        path::PathBuf,
        sync::atomic::Ordering,
        time::{Duration, Instant, SystemTime, UNIX_EPOCH},
    },
};

/// Longer than a tick of the slowest usual clock (100 Hz).
#[cfg(target_os = "linux")]
const TICK: Duration = Duration::from_millis(12);
/// How long a caller waits for a thaw that fails. It goes on being tried, with the gates closed.
#[cfg(target_os = "linux")]
const THAW_WAIT: Duration = Duration::from_secs(5);
/// Of repeated failures of one thaw every so many are told.
#[cfg(target_os = "linux")]
const TOLD: u32 = 60;

/// Files changed within this time before an export are copied while they stand still,
#[cfg(target_os = "linux")]
const LATELY: Duration = Duration::from_mins(1);
/// up to so many bytes,
#[cfg(target_os = "linux")]
const MOST_COPIED: u64 = 256 << 20;
/// and no longer than that.
#[cfg(target_os = "linux")]
const LONGEST_COPY: Duration = Duration::from_secs(1);

/// Freezes and thaws the sandboxes of one comparison.
#[derive(Debug)]
pub(super) struct Stillness {
    gates: Arc<Gates>,
    ids: Vec<LayerId>,
    sandboxes: Vec<Sandbox>,
    remembered: Arc<Remembered>,
    /// Where a scratch disk is made; none if there is no room for it.
    #[cfg(target_os = "linux")]
    scratch: Option<PathBuf>,
    #[cfg(target_os = "linux")]
    mounts: Arc<Mounts>,
    held: Mutex<Option<Still>>,
}

impl Stillness {
    /// Remembers which files made an export fail, if it failed by them.
    pub(super) fn remember(&self, error: &SvmError) {
        if let SvmError::Refused(refused) = error {
            self.remembered.note(&self.sandboxes, &refused.changed);
        }
    }
}

impl Home {
    /// Sees to it that `sandboxes`, which are those of the two stacks, can be read. Either what is given back makes them
    /// stand still when that is needed, or there is no need: their disks are replaced by clones that nobody writes.
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
                    tracing::warn!(%error, "files cannot be cloned after all; sandboxes in use are read as they are");
                }
            }
        }
        let _ = (target, parent);
        Ok(Some(Arc::new(still)))
    }

    /// Whether `bytes` may be taken of the disk for a while.
    #[cfg(target_os = "linux")]
    fn has_room(&self, bytes: u64) -> bool {
        let wanted = bytes.saturating_add(self.options.min_free_bytes);
        self.free_bytes().is_none_or(|free| free >= wanted)
    }

    /// Whether clones can be made, and there is room for all that may be written to the sandboxes while they exist: a
    /// block that was shared is a new one after that.
    #[cfg(target_os = "linux")]
    async fn can_clone(&self, sandboxes: &[Sandbox]) -> Result<bool, DriverError> {
        use std::os::unix::fs::MetadataExt;
        /// What `st_blocks` counts.
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

/// Puts clones in the place of the files that they are of.
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

/// What is held while everything stands still. The file systems thaw before the gates open.
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
    /// Freezes what is mounted at `folders`. If one fails, or nobody wants the outcome any more, all are thawed.
    fn begin(folders: &[PathBuf], gates: Held) -> io::Result<Self> {
        let begun = Instant::now();
        let frozen = folders
            .iter()
            .map(|folder| freeze(folder).map_err(io::Error::other))
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
                    tracing::error!(number, %error, "a sandbox cannot be thawed; it is tried again and again");
                }
            });
        }
        tracing::debug!(file_systems = self.frozen.len(), frozen = ?self.since.elapsed(), "thawed");
    }
}

#[cfg(target_os = "linux")]
impl Stillness {
    /// Where those of the sandboxes are that are mounted now.
    fn folders(&self) -> Vec<PathBuf> {
        self.ids.iter().filter_map(|id| self.mounts.disk_dir(id)).collect()
    }

    /// Sends what is dirty to the disk while everybody goes on, so that the freeze has little left to write.
    async fn sync(&self) -> io::Result<()> {
        let folders = self.folders();
        if folders.is_empty() {
            return Ok(());
        }
        in_thread(move || {
            folders.iter().try_for_each(|folder| match mount::syncfs(folder) {
                // Unmounted meanwhile, which has synced it.
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
                other => other.map_err(io::Error::other),
            })
        })
        .await
    }
}

/// Why there are no clones.
#[cfg(target_os = "linux")]
#[derive(Debug)]
enum CloneError {
    /// The sandboxes could not be stopped or started again.
    Still(io::Error),
    /// They were, but could not be cloned.
    Clone(io::Error),
}

#[cfg(target_os = "linux")]
impl Stillness {
    /// Clones of the sandboxes' files, each behind its file, made while all stand still.
    async fn clones(&self, folder: PathBuf) -> Result<Vec<(Arc<File>, Arc<File>)>, CloneError> {
        // One of both stacks is one file of each; the same clone serves both, so that they are known to be the same.
        let mut files: Vec<(LayerId, Arc<File>)> =
            self.sandboxes.iter().map(|s| (s.layer.id.clone(), s.file.clone())).collect();
        files.sort_by(|a, b| a.0.cmp(&b.0));
        let bulk = files.clone();
        // What the loop devices have written lies in the host's page cache: the clone would have to write it back.
        self.sync().await.map_err(CloneError::Still)?;
        in_thread(move || bulk.iter().try_for_each(|(_, file)| file.sync_data()))
            .await
            .map_err(CloneError::Still)?;
        self.freeze().await.map_err(CloneError::Still)?;
        // Dropped here half way, `self` thaws: it holds what is frozen.
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
        // Before anything is made of the outcome.
        self.thaw().await.map_err(CloneError::Still)?;
        cloned.map_err(CloneError::Clone)
    }
}

/// Blocking work, off the runtime's threads.
#[cfg(target_os = "linux")]
async fn in_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
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
            // Looked up again under the gates.
            let folders = self.folders();
            *self.held.lock() = Some(in_thread(move || Still::begin(&folders, gates)).await?);
            Ok(())
        })
    }

    fn thaw(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let Some(still) = self.held.lock().take() else { return Ok(()) };
            let (ended, end) = tokio::sync::oneshot::channel();
            // A thread of its own: it may take for ever, and a runtime waits for its threads when it ends.
            let thread = std::thread::Builder::new().name("thaw".into()).spawn(move || {
                still.end();
                let _ = ended.send(());
            });
            // Without one, dropping `still` has thawed.
            thread?;
            match tokio::time::timeout(THAW_WAIT, end).await {
                Ok(_) => Ok(()),
                Err(_) => Err(io::Error::other("it stays frozen; the log says why, and it is tried again")),
            }
        })
    }
}

/// Nothing is mounted elsewhere, so the gates are all.
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
