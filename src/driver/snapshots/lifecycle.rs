//! Prepare, View, Mounts, Commit, Remove, Cleanup.
//!
//! ```text
//!   Prepare ─► labels ─► key "…extract-…"? ─yes─► layer without content, not synced     ─► mount for our differ
//!                                          └─no─► sandbox in the new directory, synced  ─► disks mounted ─► bind | overlay
//!              lcow.containerd.mounts=lcow-layer    sandbox.vhdx, or a link to another's ─► mount for runhcs
//!              lcow.containerd.mounts=kata          no sandbox: the guest writes to memory ─► mount for Kata
//!   View    ─► record only ─► parents' disks mounted ─► bind | overlay, read-only
//!   Commit  ─► applied: usage as counted at Apply; one durable rename
//!           └► sandbox: usage of its file system; rename, then a sync in the background
//! ```

use super::{
    Shown, SnapshotInfo, Snapshots, keys::is_extraction, labels, labels::Labels, precondition,
    shown::stays_in_guest,
};
use crate::{
    config::{Extraction, MountKind, SnapshotMounts, SnapshotSharing},
    driver::{DriverError, on_disk_thread, sandbox},
    store::{
        LayerId, LayerState, LayerWishes, Member, NewName, NewSnapshot, SnapshotKind, SnapshotRefusal,
        SnapshotUsage, files,
    },
};
use std::sync::Arc;

/// A request for a new snapshot.
#[derive(Debug, Clone)]
pub struct PrepareRequest {
    /// Its key.
    pub key: String,
    /// Name of its parent; empty without one.
    pub parent: String,
    /// Its labels.
    pub labels: Labels,
}

impl PrepareRequest {
    pub(super) fn parent(&self) -> Option<String> {
        (!self.parent.is_empty()).then(|| self.parent.clone())
    }
}

impl Snapshots {
    /// Creates an active snapshot, and mounts its disks. For virtual machines, what containers wrote below it becomes layers
    /// first, which takes as long as a Diff and an Apply.
    ///
    /// # Errors
    /// The key is taken, the parent is missing or not committed, a label has a bad value, or the disk is nearly full.
    /// After an error there is no snapshot.
    pub async fn prepare(&self, request: PrepareRequest) -> Result<Shown, DriverError> {
        let home = self.settled().await?.clone();
        let size = labels::sandbox_bytes(&request.labels)?;
        labels::check_location(&request.labels)?;
        let maps = labels::id_maps(&request.labels)?;
        self.offer_shared(&request)?;
        // Nothing but this service's differ can unpack into what a virtual machine attaches.
        let extract = is_extraction(&request.key)
            && (home.options.extraction == Extraction::Layer || !self.mounts_here());
        let in_guest = home.options.snapshot_mounts == SnapshotMounts::Kata;
        if !extract {
            self.convert_written(&request.parent).await?;
        }
        if extract || in_guest {
            let new = NewSnapshot {
                kind: SnapshotKind::Active,
                parent: request.parent(),
                key: request.key,
                labels: request.labels,
                state: LayerState::Created,
                scratch_of: None,
                wishes: LayerWishes::default(),
                // After a power cut the unpacker, which has died with it, begins anew.
                durable: !extract,
            };
            let member = on_disk_thread(move |thread| {
                home.check_reserve(thread)?;
                home.store.create_snapshot::<DriverError>(thread, new, |_, _| Ok(()))
            })
            .await?;
            return self.show_or_undo(member).await;
        }
        if home.options.snapshot_mounts == SnapshotMounts::LcowLayer
            && let Some(owner) = labels::scratch_owner(&request.labels)?
        {
            let owner = self.owner_of_scratch(&request.key, owner)?;
            return self.prepare_sharing(request, owner).await;
        }
        let least = self.largest_below(&request.parent)?;
        let bytes = size.unwrap_or(home.options.sandbox_bytes).max(least);
        let new = NewSnapshot {
            kind: SnapshotKind::Active,
            parent: request.parent(),
            key: request.key,
            labels: request.labels,
            state: LayerState::Sandbox,
            scratch_of: None,
            wishes: LayerWishes { sandbox_bytes: Some(bytes), ..LayerWishes::default() },
            durable: true,
        };
        let kind = self.sandbox_kind();
        let root = labels::root_of(&maps);
        let member = on_disk_thread(move |thread| {
            home.check_reserve(thread)?;
            let member = home.store.create_snapshot::<DriverError>(thread, new, |_, folder| {
                sandbox::write_unsynced(folder, bytes, kind, root).map(|_| ())
            })?;
            #[cfg(target_os = "linux")]
            if kind == MountKind::Overlay {
                home.mounts.note_fresh(&member.layer.id);
            }
            Ok(member)
        })
        .await?;
        self.show_or_undo(member).await
    }

    /// Creates a read-only view of a committed snapshot, and mounts its disks.
    ///
    /// # Errors
    /// As [`Snapshots::prepare`].
    pub async fn view(&self, request: PrepareRequest) -> Result<Shown, DriverError> {
        let home = self.settled().await?.clone();
        labels::id_maps(&request.labels)?;
        self.offer_shared(&request)?;
        if home.options.snapshot_mounts == SnapshotMounts::Kata {
            self.convert_written(&request.parent).await?;
        }
        let new = NewSnapshot {
            kind: SnapshotKind::View,
            parent: request.parent(),
            key: request.key,
            labels: request.labels,
            state: LayerState::Created,
            scratch_of: None,
            wishes: LayerWishes::default(),
            durable: true,
        };
        let create = move |thread: &_| home.store.create_snapshot::<DriverError>(thread, new, |_, _| Ok(()));
        let member = on_disk_thread(create).await?;
        self.show_or_undo(member).await
    }

    /// With `lcow.containerd.share=ref`: refuses with "exists" if there is a committed snapshot of the chain that the
    /// new one is prepared for, on the same parent. containerd then uses that one, without its layer's bytes.
    fn offer_shared(&self, request: &PrepareRequest) -> Result<(), DriverError> {
        if self.options().sharing != SnapshotSharing::Ref {
            return Ok(());
        }
        let Some(target) = request.labels.get(labels::TARGET_REF) else { return Ok(()) };
        let fits = |info: &SnapshotInfo| {
            info.kind == SnapshotKind::Committed
                && info.parent == request.parent
                && info.labels.get(labels::TARGET_REF) == Some(target)
        };
        match self.list(fits).pop() {
            Some(info) => Err(SnapshotRefusal::Exists(info.name).into()),
            None => Ok(()),
        }
    }

    /// The size of the largest sandbox among a committed snapshot and its ancestors: what was written there must fit.
    fn largest_below(&self, parent: &str) -> Result<u64, DriverError> {
        if parent.is_empty() {
            return Ok(0);
        }
        let member = self.member(parent)?;
        let snapshot = self.home().store.snapshot(&member.layer.id)?;
        Ok(snapshot.members().filter_map(|m| m.meta.sandbox_bytes).max().unwrap_or(0))
    }

    /// What a sandbox is made for.
    fn sandbox_kind(&self) -> MountKind {
        match self.options().snapshot_mounts {
            // Under Kata there is none.
            SnapshotMounts::Host | SnapshotMounts::Kata => MountKind::Overlay,
            SnapshotMounts::LcowLayer => MountKind::None,
        }
    }

    pub(super) async fn show_or_undo(&self, member: Member) -> Result<Shown, DriverError> {
        let shown = self.show(&member).await;
        if shown.is_err()
            && let Some(snapshot) = &member.meta.snapshot
            && let Ok(vanished) = self.home().store.vanish(&snapshot.name)
        {
            self.discard_soon(vanished).await;
        }
        shown
    }

    /// What a client mounts for an active snapshot or a view; mounts what is not mounted.
    ///
    /// # Errors
    /// It is unknown, or committed.
    pub async fn mounts(&self, key: &str) -> Result<Shown, DriverError> {
        self.settled().await?;
        let member = self.member(key)?;
        if member.meta.snapshot.as_ref().is_some_and(|s| s.kind == SnapshotKind::Committed) {
            return Err(precondition(format!("snapshot '{key}' is committed and has no mounts")));
        }
        self.show(&member).await
    }

    /// Commits an active snapshot under a name.
    ///
    /// # Errors
    /// See [`Store::commit_snapshot`](crate::store::Store::commit_snapshot).
    pub async fn commit(
        &self,
        name: String,
        key: &str,
        parent: Option<String>,
        labels: Labels,
    ) -> Result<(), DriverError> {
        self.settled().await?;
        let (this, key) = (self.clone(), key.to_owned());
        let member = on_disk_thread(move |thread| {
            let before = this.member(&key)?;
            let written = before.meta.state == LayerState::Sandbox;
            this.refuse_unfinished(&before)?;
            if stays_in_guest(&before) && this.options().snapshot_mounts == SnapshotMounts::Kata {
                return Err(precondition(format!(
                    "what the container of snapshot '{key}' wrote is in the memory of its virtual machine and cannot be \
                     committed"
                )));
            }
            let usage = match (&before.meta.applied, written) {
                (Some(applied), _) => applied.shared.as_ref().map(|shared| shared.usage),
                (None, true) => Some(this.usage_now(thread, &before, None)),
                (None, false) => Some(SnapshotUsage::default()),
            };
            let sync_first = written && !cfg!(target_os = "linux");
            if sync_first {
                this.home().sync_sandbox(&before.layer.id)?;
            }
            let unsynced = (written && !sync_first).then(|| this.inner.boot.clone());
            let new = NewName { name, labels, parent, usage, unsynced };
            Ok(this.home().store.commit_snapshot(thread, &key, new)?)
        })
        .await?;
        if member.meta.snapshot.as_ref().is_some_and(|s| s.unsynced.is_some()) {
            self.sync_committed(member);
        }
        Ok(())
    }

    /// Refuses a snapshot that waits for a layer which was not unpacked to its end, or perhaps not, by an earlier process:
    /// it would get a name without content.
    fn refuse_unfinished(&self, member: &Member) -> Result<(), DriverError> {
        let Some(snapshot) = &member.meta.snapshot else { return Ok(()) };
        let waits = member.meta.state == LayerState::Created && snapshot.kind == SnapshotKind::Active;
        let lost = self.inner.spoiled.lock().contains(&member.layer.id)
            || (!member.layer.made_here && is_extraction(&snapshot.name));
        if waits && lost {
            return Err(precondition(format!(
                "the layer of snapshot '{}' was not unpacked to its end; remove the snapshot and prepare it again",
                snapshot.name
            )));
        }
        Ok(())
    }

    /// Removes a snapshot. Its files are deleted, and its disks unmounted, after the reply.
    ///
    /// # Errors
    /// It is unknown, or has children.
    pub async fn remove(&self, name: &str) -> Result<(), DriverError> {
        let vanished = self.home().store.vanish(name)?;
        self.inner.spoiled.lock().remove(&vanished.layer.id);
        if let Some(apply) = self.inner.applying.lock().remove(&vanished.layer.id) {
            apply.cancel();
        }
        self.discard_soon(vanished).await;
        Ok(())
    }

    /// Deletes, after the reply, what could not be deleted before. Never touches what an operation uses.
    pub fn cleanup(&self) {
        self.sweep_later();
    }

    /// The directory of a snapshot's layer.
    pub(super) fn folder(&self, id: &LayerId) -> std::path::PathBuf {
        self.home().store.layout().layer(id)
    }
}

impl crate::driver::home::Home {
    /// Writes everything of a sandbox to the disk: its mounted file system, or its file.
    pub(super) fn sync_sandbox(self: &Arc<Self>, id: &LayerId) -> Result<(), DriverError> {
        #[cfg(target_os = "linux")]
        if let Some(dir) = self.mounts.disk_dir(id) {
            lcow_sys::linux::mount::syncfs(&dir)
                .map_err(super::super::mounts::failed(id, "sync its sandbox"))?;
        }
        let path = sandbox::path(self.store.layout(), id);
        Ok(files::sync_named(&path)?)
    }
}
