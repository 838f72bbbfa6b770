//! Snapshots: what a containerd snapshotter and differ mean on layers.
//!
//! ```text
//!   Prepare "extract-…" ─► layer without content ─► Apply: a tar becomes its image ─► Commit: a name     (layers of images)
//!   Prepare             ─► sandbox, mounted on its parents' disks ─► Commit: a name; synced later         (containers)
//!   View                ─► the parents' disks, mounted
//!   Remove              ─► gone from memory at once ─► unmounted and deleted by a thread of its own
//!
//!   lifecycle  verbs that change names                shown     what a client mounts, and whose mounts those are
//!   scratch    containers that share a scratch disk   convert   what a container wrote as a disk for virtual machines
//!   labels     sizes and id maps from labels          holds     which snapshot keeps which disk mounted (Linux)
//!   transfer   Apply and Diff                         mapped    views with the ids of a user namespace (Linux)
//!   chores     work after the reply: deletion, unmounts, syncs
//! ```
//!
//! Invariants:
//! * Remove, Stat, List, Usage and Cleanup wait for no disk, no mount and no service VM: containerd calls some of them
//!   under a lock of its own, without a time limit.
//! * Commit of an applied layer is one durable rename; Commit of a written snapshot is a rename without a sync. Such a
//!   name is whole or absent: it is synced afterwards, and if a power cut comes first, the snapshot is not listed.
//! * A disk stays mounted as long as an active snapshot or a view needs it, over restarts of this program.
//! * Mounts that a client sends are compared with paths that this module made, and never opened.
//!
//! Called by `containerd`. One home of its own, which no Init changes: the Docker face and containerd share no layers.

mod chores;
mod convert;
mod diff;
#[cfg(target_os = "linux")]
mod holds;
pub mod keys;
pub mod labels;
mod lifecycle;
#[cfg(target_os = "linux")]
mod mapped;
#[cfg(all(test, target_os = "linux"))]
mod power_tests;
mod scratch;
mod share;
mod shown;
#[cfg(test)]
mod tests;
mod transfer;

pub use crate::store::{Moment, SnapshotKind, SnapshotRefusal, SnapshotUsage};
#[cfg(test)]
pub use crate::svm::TarDigest;
// For blobs that are opened as files.
#[cfg(target_os = "linux")]
pub use crate::svm::sniff;
pub use crate::svm::{Compression, DigestKind, Digesting};
pub use diff::DiffRequest;
pub use lifecycle::PrepareRequest;
pub use shown::{Shown, ShownPlace};
#[cfg(target_os = "linux")]
pub use transfer::Applied;
pub use transfer::{ApplyRequest, Blob, BlobBytes};

use super::{DriverConfig, DriverError, GRACE, home::Home, on_disk_thread};
use crate::{
    config::{Options, SnapshotMounts},
    store::{DiskThread, LayerId, LayerState, Member, SnapshotMeta, boot_id},
    telemetry::{Gauges, Phases},
};
use labels::Labels;
use parking_lot::Mutex;
use std::{
    collections::{HashMap, HashSet},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// What is known of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Key or name.
    pub name: String,
    /// Name of its parent; empty without one.
    pub parent: String,
    /// What it is.
    pub kind: SnapshotKind,
    /// When it was created, or committed.
    pub created: Moment,
    /// When its labels last changed.
    pub updated: Moment,
    /// Its labels.
    pub labels: Labels,
}

impl SnapshotInfo {
    fn new(snapshot: &SnapshotMeta, parent: &str) -> Self {
        Self {
            name: snapshot.name.clone(),
            parent: parent.to_owned(),
            kind: snapshot.kind,
            created: snapshot.created,
            updated: snapshot.updated,
            labels: snapshot.labels.clone(),
        }
    }
}

/// A snapshot as an operator's list shows it.
#[derive(Debug, Clone)]
pub struct SnapshotRow {
    /// What containerd knows.
    pub info: SnapshotInfo,
    /// The layer's id, which names its directory.
    pub id: LayerId,
}

/// The snapshots of one home. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Snapshots {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    home: Arc<Home>,
    phases: Phases,
    /// Id of this boot.
    boot: String,
    #[cfg(target_os = "linux")]
    holds: holds::Holds,
    chores: chores::Chores,
    /// Half as many turns as there are service VMs: a transfer uses up to two at once.
    turns: Arc<Semaphore>,
    /// Snapshots into which a layer is being unpacked, or was not unpacked to its end: they get no name without a whole one.
    spoiled: Mutex<HashSet<LayerId>>,
    /// Applies in progress, to be cancelled by a Remove.
    applying: Mutex<HashMap<LayerId, CancellationToken>>,
    /// When the usage of a mounted sandbox was last recorded.
    noted: Mutex<HashMap<LayerId, Instant>>,
    /// Cut diffs are of interest to the Docker face only; this is where they are noted.
    cuts: Arc<super::cut::CutDiffs>,
    /// Held while a sandbox becomes a layer.
    converting: tokio::sync::Mutex<()>,
}

impl Snapshots {
    /// Opens the snapshots below `root`, creating the store if there is none; mounts and names of an earlier process are
    /// taken over. Must be called within a tokio runtime, before the first request.
    ///
    /// # Errors
    /// The directory cannot be used, another process owns it, or it is the store of a Docker plugin; the backend that the
    /// options name does not work here.
    pub fn open(root: &Path, config: &DriverConfig) -> Result<Self, DriverError> {
        let thread = &DiskThread::here();
        super::home::check_backend(&config.options, config)?;
        let home = Arc::new(Home::open_snapshots(thread, root, config)?);
        #[cfg(target_os = "linux")]
        let holds = holds::Holds::take_over(&home)?;
        #[cfg(target_os = "linux")]
        home.mounts.look_after_kept(&home.gates);
        let inner = Inner {
            home,
            phases: Phases::default(),
            boot: boot_id(),
            #[cfg(target_os = "linux")]
            holds,
            chores: chores::Chores::default(),
            turns: Arc::new(Semaphore::new((config.options.pool_max / 2).max(1))),
            spoiled: Mutex::default(),
            applying: Mutex::default(),
            noted: Mutex::default(),
            cuts: Arc::default(),
            converting: tokio::sync::Mutex::default(),
        };
        let snapshots = Self { inner: Arc::new(inner) };
        snapshots.remove_doubtful(thread);
        snapshots.finish_conversions(thread);
        snapshots.sync_later();
        Ok(snapshots)
    }

    fn home(&self) -> &Arc<Home> {
        &self.inner.home
    }

    /// The home; if a failed write left the state of a snapshot uncertain, that is read again first.
    async fn settled(&self) -> Result<&Arc<Home>, DriverError> {
        let home = self.home();
        if home.store.is_unsettled() {
            let settling = home.clone();
            on_disk_thread(move |thread| {
                settling.store.settle(thread);
                Ok(())
            })
            .await?;
        }
        Ok(home)
    }

    /// The options of this home.
    pub fn options(&self) -> &Options {
        &self.home().options
    }

    /// How long the phases of transfers took, for metrics.
    pub fn phases(&self) -> Phases {
        self.inner.phases.clone()
    }

    /// How long a transfer may make no progress (`lcow.timeout`).
    pub fn idle_timeout(&self) -> Duration {
        self.options().idle_timeout
    }

    /// Ends service VMs in order, waits a little for deletions and syncs that have begun, and unmounts what nothing uses.
    /// Mounts of running containers stay.
    pub async fn stop(&self) {
        self.home().pool.shutdown(GRACE).await;
        self.inner.chores.rest(GRACE).await;
        self.home().unmount_idle().await;
    }

    /// Unmounts the disks of layers that no container uses (`lcow.mount.keep`).
    pub async fn unmount_idle(&self) {
        self.home().unmount_idle().await;
    }

    /// The running service VMs.
    pub fn service_vms(&self) -> Vec<crate::svm::PoolVm> {
        self.home().pool.running()
    }

    /// Current counts, for metrics.
    pub async fn gauges(&self) -> Gauges {
        self.home().gauges().await
    }

    /// Whether mounts are made on this host.
    fn mounts_here(&self) -> bool {
        cfg!(target_os = "linux") && self.options().snapshot_mounts == SnapshotMounts::Host
    }

    fn member(&self, name: &str) -> Result<Member, DriverError> {
        Ok(self.home().store.snapshot_named(name)?)
    }

    fn info_of(&self, member: &Member) -> Option<SnapshotInfo> {
        let parent =
            member.layer.parent().and_then(|id| self.home().store.snapshot_name(id)).unwrap_or_default();
        Some(SnapshotInfo::new(member.meta.snapshot.as_ref()?, &parent))
    }

    /// What is known of a snapshot. Reads memory only.
    ///
    /// # Errors
    /// It is unknown.
    pub fn stat(&self, name: &str) -> Result<SnapshotInfo, DriverError> {
        let member = self.member(name)?;
        self.info_of(&member)
            .ok_or_else(|| DriverError::Internal(format!("layer {} is no snapshot", member.layer.id)))
    }

    /// All snapshots that `wanted` accepts, in no order. Reads memory only.
    pub fn list(&self, wanted: impl Fn(&SnapshotInfo) -> bool) -> Vec<SnapshotInfo> {
        let mut found = Vec::new();
        self.home().store.each_snapshot(|_, snapshot, parent| {
            let info = SnapshotInfo::new(snapshot, parent);
            if wanted(&info) {
                found.push(info);
            }
        });
        found
    }

    /// All snapshots with their ids, by name.
    pub fn rows(&self) -> Vec<SnapshotRow> {
        let mut rows = Vec::new();
        self.home().store.each_snapshot(|layer, snapshot, parent| {
            rows.push(SnapshotRow { info: SnapshotInfo::new(snapshot, parent), id: layer.id.clone() });
        });
        rows.sort_by(|a, b| a.info.name.cmp(&b.info.name));
        rows
    }

    /// What a snapshot takes: fixed at the Commit; of a mounted sandbox what its file system says; of one that was mounted
    /// the last known value; otherwise what its file takes. Never walks a tree, mounts, or uses a service VM.
    ///
    /// # Errors
    /// It is unknown.
    pub async fn usage(&self, name: &str) -> Result<SnapshotUsage, DriverError> {
        let member = self.member(name)?;
        let known = member.meta.snapshot.as_ref().and_then(|s| s.usage);
        let kind = member.meta.snapshot.as_ref().map(|s| s.kind);
        if let (Some(SnapshotKind::Committed), Some(usage)) = (kind, known) {
            return Ok(usage);
        }
        if let Some(shared) = member.meta.applied.as_ref().and_then(|a| a.shared.as_ref()) {
            return Ok(shared.usage);
        }
        // The owner is charged for a shared scratch disk.
        let without = kind == Some(SnapshotKind::View) || member.layer.scratch_of().is_some();
        if member.meta.state != LayerState::Sandbox || without {
            return Ok(SnapshotUsage::default());
        }
        // A disk that a virtual machine writes is never mounted here: its file tells how it grows.
        let known = known.filter(|_| self.mounts_here());
        let (this, id) = (self.clone(), member.layer.id.clone());
        let usage = on_disk_thread(move |thread| Ok(this.usage_now(thread, &member, known))).await?;
        if known != Some(usage) {
            self.note_usage_later(id, usage);
        }
        Ok(usage)
    }

    /// Usage of a sandbox.
    fn usage_now(&self, thread: &DiskThread, member: &Member, known: Option<SnapshotUsage>) -> SnapshotUsage {
        #[cfg(target_os = "linux")]
        if let Some(measured) = self.measured(&member.layer.id) {
            return measured;
        }
        known.unwrap_or_else(|| {
            let bytes = self.home().store.layer_usage(thread, &member.layer.id).map_or(0, |u| u.allocated);
            SnapshotUsage { bytes, inodes: 1 }
        })
    }

    /// What the mounted file system of a sandbox says; `None` if it is not mounted.
    #[cfg(target_os = "linux")]
    fn measured(&self, id: &LayerId) -> Option<SnapshotUsage> {
        let dir = self.home().mounts.disk_dir(id)?;
        let space = lcow_sys::linux::mount::space(&dir).ok()?;
        Some(super::sandbox::usage_of(space))
    }

    /// Replaces the labels of a snapshot by what `change` makes of them.
    ///
    /// # Errors
    /// It is unknown, or the disk fails.
    pub async fn update(
        &self,
        name: &str,
        change: impl FnOnce(&mut Labels) + Send + 'static,
    ) -> Result<SnapshotInfo, DriverError> {
        let home = self.settled().await?.clone();
        let id = self.member(name)?.layer.id;
        on_disk_thread(move |thread| {
            home.store.update_snapshot(thread, &id, |snapshot| {
                change(&mut snapshot.labels);
                snapshot.updated = Moment::now();
            })?;
            Ok(())
        })
        .await?;
        self.stat(name)
    }

    /// Snapshots whose data a power cut may have cut are removed, with what stands on them.
    fn remove_doubtful(&self, thread: &DiskThread) {
        let store = &self.home().store;
        for layer in store.doubtful() {
            let name = layer.snapshot().map_or_else(|| "(unknown)".to_owned(), |s| s.name.clone());
            if let Err(reason) = &layer.meta
                && !store.has_no_record(thread, &layer.id)
            {
                tracing::error!(id = %layer.id, error = %reason, "a snapshot is damaged and left as it is; containerd does not see it");
                continue;
            }
            tracing::warn!(
                id = %layer.id,
                name,
                "removing a snapshot that was not completely on the disk when the machine stopped, or that stands on such a \
                 one; containerd makes it again when it needs it"
            );
            if let Some(vanished) = store.vanish_doubtful(&layer.id) {
                self.discard_later(vanished);
            }
        }
    }
}

/// The error of a snapshot's state.
fn precondition(text: String) -> DriverError {
    SnapshotRefusal::Precondition(text).into()
}
