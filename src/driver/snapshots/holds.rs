//! Which snapshot keeps which disk mounted. Linux only.
//!
//! ```text
//!   Prepare, View, Mounts ─► gates of the disks ─► each disk of the stack: mounted, counted ─► holds[id] = disks
//!   Remove, Commit        ─► gates ─► counts go down ─► a disk that nothing holds is unmounted
//!   start                 ─► mount table: disks of active snapshots and views count as held; others are unmounted
//! ```
//!
//! Invariants:
//! * `holds` and the counts of [`Mounts`] change together, under the gates of the disks.
//! * Disks are named by [`Member::disk_id`]: snapshots that share an image hold one mount.
//! * A hold says that a disk was mounted by this program. Someone may have unmounted it since, so each use looks at the
//!   mount point and mounts again.

use super::Snapshots;
use crate::{
    driver::{
        DriverError,
        gates::Held,
        home::Home,
        mounts::{Mounts, failed, is_mounted},
    },
    error::with_causes,
    store::{LayerId, LayerState, Member, Snapshot, SnapshotKind},
};
use lcow_sys::linux::overlay::is_opaque;
use parking_lot::Mutex;
use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

/// The disks that each snapshot holds, each once.
#[derive(Debug, Default)]
pub(super) struct Holds(Mutex<HashMap<LayerId, Vec<LayerId>>>);

impl Holds {
    /// Makes the state agree with the mount table at a start.
    pub(super) fn take_over(home: &Arc<Home>) -> Result<Self, DriverError> {
        let mut wanted = HashMap::new();
        let mut disks: Vec<(LayerId, bool)> = Vec::new();
        for layer in home.store.layers() {
            let Ok(member) = home.store.get(&layer.id) else { continue };
            if has_disk(&member) {
                disks.push((member.disk_id().clone(), member.meta.state == LayerState::Applied));
            }
            if holds_disks(&member)
                && let Ok(snapshot) = home.store.snapshot(&layer.id)
            {
                wanted.insert(layer.id, snapshot);
            }
        }
        disks.sort_unstable();
        disks.dedup();
        let mut holds = HashMap::new();
        let frozen = home.mounts.rebuild_snapshots(&disks, |mounted| {
            for (id, snapshot) in &wanted {
                let held: Vec<LayerId> = stack(&home.mounts, snapshot)
                    .into_iter()
                    .map(|member| member.disk_id().clone())
                    .filter(|disk| mounted(disk))
                    .collect();
                if !held.is_empty() {
                    holds.insert(id.clone(), held);
                }
            }
            holds.values().flatten().cloned().collect()
        })?;
        frozen.thaw_later(home.mounts.clone(), home.gates.clone());
        Ok(Self(Mutex::new(holds)))
    }
}

/// Whether a layer has a file system of its own.
fn has_disk(member: &Member) -> bool {
    matches!(member.meta.state, LayerState::Applied | LayerState::Sandbox)
}

/// Whether a snapshot keeps disks mounted: containers and views do, layers of images do not.
fn holds_disks(member: &Member) -> bool {
    match member.meta.snapshot.as_ref().map(|s| (s.kind, s.unsynced.is_some())) {
        Some((SnapshotKind::View, _)) => true,
        Some((SnapshotKind::Active, _)) => member.meta.state == LayerState::Sandbox,
        // Until it is synced, its own disk may have to be written back.
        Some((SnapshotKind::Committed, unsynced)) => unsynced && member.meta.state == LayerState::Sandbox,
        None => false,
    }
}

/// The members of a stack whose disks a view of it needs, top first. Below a mounted layer whose root is opaque,
/// overlayfs would merge what must not show.
pub(super) fn stack<'a>(mounts: &Mounts, snapshot: &'a Snapshot) -> Vec<&'a Member> {
    let mut needed = Vec::new();
    for member in snapshot.members().filter(|m| has_disk(m)) {
        needed.push(member);
        if member.meta.state == LayerState::Applied
            && let Some(place) = mounts.disk_dir(member.disk_id())
            && is_opaque(&place).unwrap_or(false)
        {
            break;
        }
    }
    needed
}

impl Snapshots {
    /// The gates of all disks of a snapshot and of the snapshot itself.
    async fn close_disks(&self, id: &LayerId) -> Result<Held, DriverError> {
        let home = self.home();
        home.gates
            .close_what(|| {
                let snapshot = home.store.snapshot(id)?;
                let mut ids: BTreeSet<LayerId> =
                    snapshot.members().filter(|m| has_disk(m)).map(|m| m.disk_id().clone()).collect();
                ids.insert(id.clone());
                Ok(ids)
            })
            .await
    }

    /// Mounts the disks of a snapshot, unless they are, and calls `look` with those that a view needs.
    pub(super) async fn hold<T: Send + 'static>(
        &self,
        id: &LayerId,
        look: impl FnOnce(&Snapshot, &[&Member]) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, DriverError> {
        let gates = self.close_disks(id).await?;
        let (this, id) = (self.clone(), id.clone());
        gates
            .run(move |_, gates| {
                let home = this.home();
                let snapshot = home.store.snapshot(&id)?;
                this.hold_now(&gates, &snapshot)?;
                look(&snapshot, &stack(&home.mounts, &snapshot))
            })
            .await
    }

    fn hold_now(&self, gates: &Held, snapshot: &Snapshot) -> Result<(), DriverError> {
        let (home, id) = (self.home(), snapshot.id());
        gates.covers(id)?;
        let held = self.inner.holds.0.lock().get(id).cloned().unwrap_or_default();
        let mut taken = Vec::new();
        for member in snapshot.members().filter(|m| has_disk(m)) {
            let disk = member.disk_id();
            gates.covers(disk)?;
            let place = home.store.layout().mount_point(disk);
            if taken.contains(disk) {
                // An equal layer above shares it.
            } else if held.contains(disk) {
                if !is_mounted(&place) {
                    tracing::warn!(%disk, "a disk was unmounted from outside; mounting it again");
                    home.mounts.mount_again(member)?;
                }
            } else {
                let acquired = home.mounts.acquire_disk(member);
                if let Err(error) = acquired {
                    for disk in &taken {
                        if let Err(error) = home.mounts.release_disk(disk) {
                            tracing::warn!(%disk, error = %with_causes(&error), "cannot unmount after a failure");
                        }
                    }
                    return Err(error);
                }
                taken.push(disk.clone());
            }
            if member.meta.state == LayerState::Applied
                && is_opaque(&place).map_err(failed(&member.layer.id, "inspect its root"))?
            {
                break;
            }
        }
        self.inner.holds.0.lock().entry(id.clone()).or_default().extend(taken);
        Ok(())
    }

    /// Lets go of the disks of a snapshot; those that nothing holds are unmounted. What cannot be unmounted is tried
    /// again by the next release. The sandbox of a removed snapshot is not synced first (`keep` false).
    pub(super) async fn release(&self, id: &LayerId, keep: bool) {
        let home = self.home().clone();
        let holds = || self.inner.holds.0.lock().get(id).cloned().unwrap_or_default();
        let closed = home.gates.close_what(|| Ok(holds().into_iter().chain([id.clone()]).collect()));
        let Ok(gates) = closed.await else { return };
        let (this, own) = (self.clone(), id.clone());
        let released = gates.run(move |_, gates| {
            let home = this.home();
            let held = this.inner.holds.0.lock().remove(&own).unwrap_or_default();
            if let Err(error) = super::mapped::hide(home.store.layout(), &own) {
                tracing::warn!(id = %own, error = %with_causes(&error), "cannot unmount an id-mapped view yet");
            }
            for disk in held {
                gates.covers(&disk)?;
                let released = if disk == own && !keep {
                    home.mounts.drop_doomed_disk(&disk)
                } else {
                    home.mounts.release_disk(&disk)
                };
                if let Err(error) = released {
                    tracing::warn!(%disk, error = %with_causes(&error), "cannot unmount a disk yet");
                }
            }
            home.release_stuck(&gates);
            home.mounts.trim_kept(&home.gates, Some(&gates));
            Ok(())
        });
        if let Err(error) = released.await {
            tracing::warn!(%id, error = %with_causes(&error), "cannot let go of a snapshot's disks");
        }
    }
}
