//! Work after the reply: deletions, unmounts and syncs, which may take seconds.
//!
//! ```text
//!   Remove ─► gone from memory ─► reply, at most PATIENCE later
//!                └─► thread: directory renamed away ─► gates ─► disks unmounted ─► renames synced ─► files deleted
//!   Commit of a sandbox ─► reply
//!                └─► thread: file system synced, record synced ─► "synced" noted durably ─► its disks are let go
//! ```
//!
//! A chore that fails is logged; a sync is tried again, a directory that cannot be deleted stays in `staging/` for the
//! next Cleanup or start. At most [`AT_ONCE`] chores run, so that a thousand removals do not take a thousand threads.

use super::Snapshots;
use crate::{
    driver::on_disk_thread,
    error::with_causes,
    store::{LayerId, LayerState, Member, SnapshotKind, SnapshotMeta, SnapshotUsage, Vanished},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{Semaphore, oneshot};
use tokio_util::task::TaskTracker;

/// Chores that run at one time.
const AT_ONCE: usize = 8;
/// How long a Remove waits for the rename of its directory: done before the reply, it also holds over a kill.
const PATIENCE: Duration = Duration::from_millis(1);
/// Time between two attempts to sync a committed snapshot.
const AGAIN: Duration = Duration::from_secs(5);

/// How long the disks of a committed sandbox stay mounted: the next step of a build stands on it.
#[cfg(target_os = "linux")]
const LINGER: Duration = Duration::from_secs(30);

/// Shortest time between two records of one sandbox's usage.
const NOTE_USAGE: Duration = Duration::from_mins(1);

/// The chores of one home.
#[derive(Debug)]
pub(super) struct Chores {
    turns: Arc<Semaphore>,
    tasks: TaskTracker,
}

impl Default for Chores {
    fn default() -> Self {
        Self { turns: Arc::new(Semaphore::new(AT_ONCE)), tasks: TaskTracker::new() }
    }
}

impl Chores {
    /// Waits until no chore is left, but not longer than `limit`.
    pub(super) async fn rest(&self, limit: Duration) {
        self.tasks.close();
        if tokio::time::timeout(limit, self.tasks.wait()).await.is_err() {
            tracing::info!(chores = self.tasks.len(), "deletions and syncs go on at the next start");
        }
        self.tasks.reopen();
    }
}

impl Snapshots {
    /// Deletes a snapshot that vanished; returns after a moment, done or not.
    pub(super) async fn discard_soon(&self, vanished: Vanished) {
        let renamed = self.discard_later(vanished);
        let _ = tokio::time::timeout(PATIENCE, renamed).await;
    }

    /// Deletes a snapshot that vanished; the result resolves when its directory was renamed away.
    pub(super) fn discard_later(&self, vanished: Vanished) -> oneshot::Receiver<()> {
        let (renamed, receiver) = oneshot::channel();
        let (this, turns) = (self.clone(), self.inner.chores.turns.clone());
        self.inner.chores.tasks.spawn(async move {
            let Ok(_turn) = turns.acquire_owned().await else { return };
            let id = vanished.layer.id.clone();
            if let Err(error) = this.discard(vanished, renamed).await {
                tracing::warn!(%id, error = %with_causes(&error), "cannot delete a removed snapshot yet; the next start does");
            }
        });
        receiver
    }

    async fn discard(
        &self,
        vanished: Vanished,
        renamed: oneshot::Sender<()>,
    ) -> Result<(), crate::driver::DriverError> {
        let home = self.home().clone();
        let id = vanished.layer.id.clone();
        #[cfg(target_os = "linux")]
        let disk = disk_of(&vanished);
        let doomed = on_disk_thread(move |thread| {
            let doomed = home.store.discard(thread, &vanished)?;
            // Without a receiver the caller has stopped waiting.
            let _ = renamed.send(());
            Ok(doomed)
        })
        .await?;
        #[cfg(target_os = "linux")]
        self.release(&id, false).await;
        #[cfg(target_os = "linux")]
        self.unmount_kept(&disk).await;
        let home = self.home().clone();
        on_disk_thread(move |thread| {
            home.store.sync_removals(thread)?;
            doomed.delete(thread, &home.store);
            Ok(())
        })
        .await?;
        self.home().shown.forget(&id);
        Ok(())
    }

    /// Unmounts the disk of a removed snapshot if it stayed mounted without being used.
    #[cfg(target_os = "linux")]
    async fn unmount_kept(&self, disk: &LayerId) {
        let home = self.home().clone();
        let gates = home.gates.close([disk]).await;
        let id = disk.clone();
        if let Err(error) = gates.run(move |_, gates| home.mounts.drop_kept(&gates, &id)).await {
            tracing::warn!(id = %disk, error = %with_causes(&error), "cannot unmount the disk of a removed snapshot yet");
        }
    }

    /// Syncs what earlier Commits left to be synced.
    pub(super) fn sync_later(&self) {
        for member in self.home().store.snapshots_listed() {
            if member.meta.snapshot.as_ref().is_some_and(|s| s.unsynced.is_some()) {
                self.sync_committed(member);
            }
        }
    }

    /// Writes a committed sandbox to the disk, and then notes that it is there.
    pub(super) fn sync_committed(&self, member: Member) {
        let (this, turns) = (self.clone(), self.inner.chores.turns.clone());
        self.inner.chores.tasks.spawn(async move {
            loop {
                let Ok(turn) = turns.clone().acquire_owned().await else { return };
                match this.sync_once(&member).await {
                    Ok(()) => break,
                    Err(error) => {
                        let id = &member.layer.id;
                        if !this.home().store.exists(id) {
                            return;
                        }
                        tracing::error!(%id, error = %with_causes(&error), "cannot sync a committed snapshot; trying again");
                    }
                }
                drop(turn);
                tokio::time::sleep(AGAIN).await;
            }
            #[cfg(target_os = "linux")]
            {
                // Without the turn: this waits.
                tokio::time::sleep(LINGER).await;
                this.release(&member.layer.id, true).await;
            }
        });
    }

    async fn sync_once(&self, member: &Member) -> Result<(), crate::driver::DriverError> {
        let (home, id) = (self.home().clone(), member.layer.id.clone());
        on_disk_thread(move |thread| {
            // It may have become a layer meanwhile, which is synced.
            if home.store.get(&id)?.meta.state == LayerState::Sandbox {
                home.sync_sandbox(&id)?;
            }
            home.store.update_snapshot(thread, &id, |snapshot| snapshot.unsynced = None)?;
            Ok(())
        })
        .await
    }

    /// Records the usage of a mounted sandbox, for the time when it is not mounted; now and then only.
    pub(super) fn note_usage_later(&self, id: LayerId, usage: SnapshotUsage) {
        {
            let mut noted = self.inner.noted.lock();
            if noted.get(&id).is_some_and(|last| last.elapsed() < NOTE_USAGE) {
                return;
            }
            noted.retain(|_, last| last.elapsed() < NOTE_USAGE);
            noted.insert(id.clone(), Instant::now());
        }
        let home = self.home().clone();
        self.inner.chores.tasks.spawn(on_disk_thread(move |thread| {
            let note = |snapshot: &mut SnapshotMeta| {
                if snapshot.kind == SnapshotKind::Active {
                    snapshot.usage = Some(usage);
                }
            };
            // It may have been removed meanwhile.
            if let Err(error) = home.store.update_snapshot(thread, &id, note) {
                tracing::debug!(%id, %error, "cannot record what a snapshot takes");
            }
            Ok(())
        }));
    }

    /// Deletes, in the background, what could not be deleted before.
    pub(super) fn sweep_later(&self) {
        let home = self.home().clone();
        self.inner.chores.tasks.spawn(async move {
            let swept = on_disk_thread(move |thread| {
                home.store.retry_leftovers(thread);
                Ok(())
            });
            if let Err(error) = swept.await {
                tracing::warn!(error = %with_causes(&error), "cannot delete what was left behind");
            }
        });
    }
}

/// The name under which a removed snapshot's disk is mounted, as [`Member::disk_id`].
#[cfg(target_os = "linux")]
fn disk_of(vanished: &Vanished) -> LayerId {
    let layer = &vanished.layer;
    let applied = layer.meta.as_ref().ok().and_then(|meta| meta.applied.as_ref());
    applied.and_then(|applied| applied.shared.as_ref()).map_or(&layer.id, |shared| &shared.image).clone()
}
