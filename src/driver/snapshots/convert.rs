//! What a container wrote becomes a layer that a virtual machine can attach.
//!
//! ```text
//!   Prepare on a committed sandbox ─► its canonical tar ─► service VM ─► staging/{layer.vhd, layer.exact}, checked, synced
//!                                 ─► moved into its directory ─► snapshot.json: sandbox → applied ─► sandbox file deleted
//! ```
//!
//! runhcs and Kata mount the file system of a `layer.vhd` as it is, while a sandbox has its layer in a directory. The host's
//! mounts take that directory, so nothing is converted for them. Commit must not take long (containerd holds a database
//! transaction over it), so this is done when the snapshot is first used as a parent.
//!
//! Invariants:
//! * The rename of `snapshot.json` is the only commit point. A kill before it leaves the sandbox as it was, and debris; a kill
//!   after it leaves a sandbox file that the next start deletes.
//! * The tar is the one that a Diff against the parent gives, so the layer keeps its digest.
//! * The service VM that reads the sandbox does not write the image: a virtual machine wrote that file system, and what it
//!   made of the VM could give the digest of another layer to an image of its choice.
//! * One conversion at a time: requests that wait for the same one find it done.
//!
//! Called by `lifecycle`.

use super::{Snapshots, transfer::keeping_error};
use crate::{
    driver::{
        DriverError,
        apply::{Lowers, Plan},
        diff::CanonicalWishes,
        home::Home,
        on_disk_thread,
    },
    store::{DiskThread, LayerId, LayerState, SnapshotKind, files, layout},
    svm::LowerUse,
};
use std::io;

impl Snapshots {
    /// Makes layers of the snapshot `parent` and those of its ancestors that containers wrote. Does nothing where the host
    /// mounts, or if `parent` cannot be a parent.
    ///
    /// # Errors
    /// A sandbox is mounted on this host; a service VM or the disk fails. Nothing has changed then.
    pub(super) async fn convert_written(&self, parent: &str) -> Result<(), DriverError> {
        if self.mounts_here() {
            return Ok(());
        }
        let Ok(member) = self.member(parent) else { return Ok(()) };
        if member.meta.snapshot.as_ref().is_none_or(|s| s.kind != SnapshotKind::Committed) {
            return Ok(());
        }
        let snapshot = self.home().store.snapshot(&member.layer.id)?;
        let written: Vec<LayerId> = snapshot
            .members()
            .filter(|m| m.meta.state == LayerState::Sandbox)
            .map(|m| m.layer.id.clone())
            .collect();
        for id in written.iter().rev() {
            self.convert(id).await?;
        }
        Ok(())
    }

    async fn convert(&self, id: &LayerId) -> Result<(), DriverError> {
        let _one_at_a_time = self.inner.converting.lock().await;
        let home = self.settled().await?.clone();
        let member = home.store.get(id)?;
        if member.meta.state != LayerState::Sandbox {
            return Ok(());
        }
        #[cfg(target_os = "linux")]
        if home.mounts.disk_dir(id).is_some() {
            let name = member.meta.snapshot.as_ref().map(|s| s.name.clone()).unwrap_or_default();
            return Err(super::precondition(format!(
                "the parent '{name}' was written by a container and is mounted on this host; it becomes a layer that a \
                 virtual machine can attach when it is no longer mounted"
            )));
        }
        let reserved = home.clone();
        on_disk_thread(move |thread| reserved.check_reserve(thread)).await?;
        let turn = self.turn().await?;
        let parent = member.layer.parent().cloned();
        let below = parent.as_ref().map_or("", LayerId::as_str);
        tracing::info!(%id, "making a layer of what a container wrote");
        let wishes = CanonicalWishes::default();
        let tar = home.diff(id.as_str(), below, wishes, &self.inner.phases, &self.inner.cuts).await?;
        let (body, failed) = keeping_error(tar);
        let plan = Plan {
            from: LayerState::Sandbox,
            lower_use: LowerUse::LinksAndDirectories,
            lowers: Lowers::Parent(parent),
        };
        let applied = self.apply_plain(&member.layer, plan, Box::pin(body)).await;
        drop(turn);
        if let Err(error) = applied {
            return Err(failed.lock().take().unwrap_or(error));
        }
        let own = id.clone();
        on_disk_thread(move |thread| {
            home.delete_sandbox(thread, &own);
            Ok(())
        })
        .await
    }

    /// Deletes the sandbox files of layers that were converted before a kill.
    pub(super) fn finish_conversions(&self, thread: &DiskThread) {
        let home = self.home();
        // Of applied layers, only converted ones have had a sandbox.
        let converted = home.store.layers_where(|layer| {
            layer.meta.as_ref().is_ok_and(|m| m.state == LayerState::Applied && m.sandbox_bytes.is_some())
        });
        for layer in converted {
            home.delete_sandbox(thread, &layer.id);
        }
    }
}

impl Home {
    /// Deletes the sandbox file of a converted layer. It has no meaning any more, so that a failure, and a power cut that
    /// brings it back, are left to the next start.
    fn delete_sandbox(&self, _: &DiskThread, id: &LayerId) {
        for name in [layout::SANDBOX_FILE, layout::SANDBOX_VHDX_FILE] {
            match files::remove_file(&self.store.layout().layer_file(id, name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(%id, %error, "cannot delete a sandbox that became a layer yet; the next start does");
                }
                _ => {}
            }
        }
    }
}
