//! Containers that share one scratch disk, for virtual machines of runhcs.
//!
//! ```text
//!   pod        <home>/ca/sandbox.vhdx      /scratch/POD/upper          what each container wrote, inside the disk
//!   container  <home>/cb/sandbox.vhdx ──┐  /scratch/CONTAINER/upper
//!                └── symbolic link to ca/sandbox.vhdx
//! ```
//!
//! runhcs attaches a disk once for each path, so it resolves the link and counts (hcsshim, `internal/layers/lcow.go`). As in
//! containerd's `windows-lcow` (`handleSharing`), the owner is a snapshot whose key contains the text of a label. Unlike
//! there, it must be of the same namespace, and a snapshot that already shares another's disk leads to that one.
//!
//! Invariants: a disk outlives all that use it: its owner is not removed before them, nor committed ([`store`]). The link's
//! own size is that of an empty file; the owner is charged for the disk.
//!
//! [`store`]: crate::store

use super::{PrepareRequest, Shown, Snapshots, keys, precondition};
use crate::{
    driver::{DriverError, on_disk_thread},
    store::{LayerState, LayerWishes, Member, NewSnapshot, SnapshotKind, SnapshotRefusal, files, layout},
};
use std::{io, path::Path};

impl Snapshots {
    /// The snapshot whose scratch disk the new snapshot `key` is to use: one whose key contains `text`; of several, the
    /// last by name, as in containerd's own.
    pub(super) fn owner_of_scratch(&self, key: &str, text: &str) -> Result<Member, DriverError> {
        let store = &self.home().store;
        let fits = |member: &Member| {
            member.meta.state == LayerState::Sandbox
                && member.meta.snapshot.as_ref().is_some_and(|s| {
                    s.kind == SnapshotKind::Active
                        && s.name.contains(text)
                        && keys::parts(&s.name).0 == keys::parts(key).0
                })
        };
        let name = |member: &Member| member.meta.snapshot.as_ref().map(|s| s.name.clone());
        let found = store.snapshots_listed().into_iter().filter(fits).max_by_key(name);
        let found = found.ok_or_else(|| {
            precondition(format!(
                "no container of this namespace has a key that contains '{}', so there is no scratch disk to share",
                text.escape_debug()
            ))
        })?;
        match found.layer.scratch_of() {
            Some(owner) => Ok(store.get(owner)?),
            None => Ok(found),
        }
    }

    /// Creates an active snapshot on the scratch disk of another one.
    pub(super) async fn prepare_sharing(
        &self,
        request: PrepareRequest,
        owner: Member,
    ) -> Result<Shown, DriverError> {
        let home = self.home().clone();
        let disk = home.store.layout().layer_file(&owner.layer.id, layout::SANDBOX_VHDX_FILE);
        let new = NewSnapshot {
            kind: SnapshotKind::Active,
            parent: request.parent(),
            key: request.key,
            labels: request.labels,
            state: LayerState::Sandbox,
            scratch_of: Some(owner.layer.id.clone()),
            wishes: LayerWishes { sandbox_bytes: owner.meta.sandbox_bytes, ..LayerWishes::default() },
            durable: true,
        };
        let member = on_disk_thread(move |thread| {
            home.check_reserve(thread)?;
            home.store.create_snapshot(thread, new, |_, folder| link(&disk, folder))
        })
        .await?;
        self.show_or_undo(member).await
    }
}

/// Makes a symbolic link to the disk `disk` in `folder`, which the store syncs.
fn link(disk: &Path, folder: &Path) -> Result<(), DriverError> {
    let link = folder.join(layout::SANDBOX_VHDX_FILE);
    let failed = || DriverError::io("link the shared scratch disk as", &link);
    if !disk.is_file() {
        // A sandbox that was made for the host's mounts.
        return Err(SnapshotRefusal::Precondition(format!(
            "'{}' does not exist, so that there is no scratch disk to share",
            disk.display()
        ))
        .into());
    }
    files::symlink(disk, &link).map_err(failed())?;
    // Not every implementation of Windows makes what it says it made.
    if !link.symlink_metadata().map_err(failed())?.is_symlink() {
        return Err(failed()(io::ErrorKind::Unsupported.into()));
    }
    Ok(())
}
