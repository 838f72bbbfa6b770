//! Get and Put.
//!
//! ```text
//!   Get ─► gates of the layer and its ancestors ─► already mounted? count : (make its sandbox) mount disks, overlay
//!          lcow.mount=none: (make its sandbox) record "handed out", durably ─► the layer's directory
//!   Put ─► gates of the layer and its view's disks ─► last reference? unmount overlay, then unused disks
//! ```

use super::{Driver, DriverError, error::unfinished, gates::Held, home::Home, sandbox};
#[cfg(target_os = "linux")]
use super::{blocking, on_disk_thread};
use crate::{
    config::MountKind,
    store::{DiskThread, LayerId, LayerMeta, LayerState, Member, StoreError},
};
#[cfg(target_os = "linux")]
use crate::{
    store::{AppliedMeta, owners_note},
    svm::CheckJob,
};
use std::{path::PathBuf, sync::Arc};

impl Driver {
    /// `GraphDriver.Get`: mounts a layer and returns the path. Each Get needs its Put.
    pub async fn get(&self, id: &str, mount_label: &str) -> Result<PathBuf, DriverError> {
        let home = self.home().await?;
        let id: LayerId = id.parse()?;
        let showing = home.shown.begin(&id);
        match home.options.mount {
            MountKind::None => {
                let dir = home.hand_out(id).await?;
                showing.handed_out();
                Ok(dir)
            }
            #[cfg(target_os = "linux")]
            MountKind::Overlay => home.get_view(id, mount_label.to_owned()).await,
            #[cfg(not(target_os = "linux"))]
            MountKind::Overlay => {
                let _ = mount_label;
                Err(DriverError::Usage("lcow.mount=overlay works on Linux only".into()))
            }
        }
    }

    /// `GraphDriver.Put`: drops one reference. Succeeds for a layer that is not mounted or does not exist.
    pub async fn put(&self, id: &str) -> Result<(), DriverError> {
        let home = self.home().await?;
        let id: LayerId = id.parse()?;
        home.shown.put(&id);
        home.put_view(id).await
    }
}

impl Home {
    /// With userns-remap, checks once the owners in each layer that was applied without the map (by release 1, or
    /// before the engine had one): containers could not change or delete files of owners outside the map.
    #[cfg(target_os = "linux")]
    async fn check_owners(self: &Arc<Self>, id: &LayerId) -> Result<(), DriverError> {
        let Some(note) = owners_note(&self.init.uid_maps, &self.init.gid_maps) else { return Ok(()) };
        let snapshot = self.store.snapshot(id)?;
        for member in snapshot.members() {
            let (LayerState::Applied, Some(applied)) = (member.meta.state, &member.meta.applied) else {
                continue;
            };
            if applied.owners.as_ref() == Some(&note) {
                continue;
            }
            let (home, owned) = (self.clone(), member.clone());
            let check = CheckJob {
                image: blocking(move || home.image_disk(&owned)).await?,
                tree: false,
                writer: applied.writer(),
                require_no_writers: false,
                owners: self.id_maps(),
            };
            let checked = self.pool.check_image(check).await;
            checked.map_err(DriverError::svm(&member.layer.id, "look at its owners"))?;
            let (home, layer, note) = (self.clone(), member.layer.clone(), note.clone());
            on_disk_thread(move |thread| {
                home.store.update::<DriverError>(thread, &layer.id, layer.generation, |meta| {
                    let applied = meta.applied.clone().map(|a| AppliedMeta { owners: Some(note), ..a });
                    Ok(LayerMeta { applied, ..meta.clone() })
                })
            })
            .await?;
        }
        Ok(())
    }

    /// Closes the gates of a layer and its ancestors.
    async fn close_stack(&self, id: &LayerId) -> Result<Held, DriverError> {
        self.gates
            .close_what(|| {
                let snapshot = self.store.snapshot(id)?;
                Ok(snapshot.members().map(|member| member.layer.id.clone()).collect())
            })
            .await
    }

    /// Closes the gates of a layer, whether or not it exists, and of the disks that its view holds.
    pub(super) async fn close_view(&self, id: &LayerId) -> Result<Held, DriverError> {
        self.gates
            .close_what(|| {
                #[cfg(target_os = "linux")]
                let disks = self.mounts.disks_of(id);
                #[cfg(not(target_os = "linux"))]
                let disks = Vec::new();
                Ok(std::iter::once(id.clone()).chain(disks).collect())
            })
            .await
    }

    #[cfg(target_os = "linux")]
    async fn get_view(self: Arc<Self>, id: LayerId, label: String) -> Result<PathBuf, DriverError> {
        self.check_owners(&id).await?;
        self.grow_put_off(&id).await;
        let gates = self.close_stack(&id).await?;
        gates
            .run(move |thread, gates| {
                if let Some(dir) = self.mounts.again(&gates, &id)? {
                    return Ok(dir);
                }
                if self.store.get(&id)?.meta.state == LayerState::Applying {
                    return Err(unfinished(&id));
                }
                self.materialize_now(thread, &gates, &id)?;
                self.set_door(&id)?;
                self.mounts.mount_view(&gates, &self.store.snapshot(&id)?, &label, self.options.xino)
            })
            .await
    }

    /// The directory of a layer, for an engine whose virtual machines attach its disks. From then on the machine may
    /// write any bytes into the sandboxes, so that is recorded before the reply.
    async fn hand_out(self: Arc<Self>, id: LayerId) -> Result<PathBuf, DriverError> {
        let gates = self.close_stack(&id).await?;
        gates
            .run(move |thread, gates| {
                if self.store.get(&id)?.meta.state == LayerState::Applying {
                    return Err(unfinished(&id));
                }
                self.materialize_now(thread, &gates, &id)?;
                let snapshot = self.store.snapshot(&id)?;
                let fresh = || {
                    snapshot
                        .members()
                        .filter(|m| m.meta.state == LayerState::Sandbox && !m.meta.handed_out)
                        .map(|m| &m.layer)
                };
                #[cfg(target_os = "linux")]
                for layer in fresh() {
                    self.mounts.refuse_mounted(&gates, &layer.id)?;
                }
                for layer in fresh() {
                    self.store.update::<DriverError>(thread, &layer.id, layer.generation, |meta| {
                        Ok(LayerMeta { handed_out: true, ..meta.clone() })
                    })?;
                }
                Ok(self.store.layout().layer(&id))
            })
            .await
    }

    #[cfg_attr(not(target_os = "linux"), expect(clippy::unused_async, reason = "only Linux has mounts"))]
    async fn put_view(self: Arc<Self>, id: LayerId) -> Result<(), DriverError> {
        #[cfg(target_os = "linux")]
        {
            let gates = self.close_view(&id).await?;
            gates
                .run(move |_, gates| {
                    let put = self.mounts.put_view(&gates, &id);
                    self.release_stuck(&gates);
                    self.mounts.trim_kept(&self.gates, Some(&gates));
                    put
                })
                .await
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = id;
            Ok(())
        }
    }

    /// Retries to unmount disks that no view uses and that could not be unmounted before, unless their gate is closed.
    #[cfg(target_os = "linux")]
    pub(super) fn release_stuck(&self, gates: &Held) {
        for id in self.mounts.stuck() {
            let released = if gates.covers(&id).is_ok() {
                self.mounts.release_stuck(gates, &id)
            } else if let Some(own) = self.gates.try_close(&id) {
                self.mounts.release_stuck(&own, &id)
            } else {
                continue;
            };
            if let Err(error) = released {
                tracing::warn!(%id, error = %crate::error::with_causes(&error), "cannot unmount a disk that no view uses");
            }
        }
    }

    /// Creates the sandbox of a layer that was only created; leaves other layers as they are.
    pub(super) async fn materialize(self: &Arc<Self>, id: &LayerId) -> Result<(), DriverError> {
        let gate = self.gates.close([id]).await;
        let (home, id) = (self.clone(), id.clone());
        gate.run(move |thread, gate| home.materialize_now(thread, &gate, &id)).await
    }

    /// [`Home::materialize`] for callers that hold the gate.
    fn materialize_now(&self, thread: &DiskThread, gate: &Held, id: &LayerId) -> Result<(), DriverError> {
        gate.covers(id)?;
        let Member { layer, meta } = self.store.get(id)?;
        if meta.state != LayerState::Created {
            return Ok(());
        }
        // The file of one that was taken back may lie there still, and the new one takes its name.
        #[cfg(target_os = "linux")]
        self.mounts.free_hidden(gate, id)?;
        let bytes = meta.sandbox_bytes.unwrap_or(self.options.sandbox_bytes);
        let staged = self.store.stage(thread, id)?;
        if let Err(error) = sandbox::write(staged.path(), bytes, self.options.mount, self.root_ids()) {
            staged.discard(thread);
            return Err(error);
        }
        self.store.commit::<DriverError>(
            thread,
            id,
            layer.generation,
            staged,
            &[sandbox::file_name(self.options.mount)],
            |meta| match meta.state {
                LayerState::Created => {
                    Ok(LayerMeta { state: LayerState::Sandbox, sandbox_bytes: Some(bytes), ..meta.clone() })
                }
                _ => Err(StoreError::WrongState {
                    id: id.clone(),
                    reason: "its state changed while its sandbox was made; try again".into(),
                }
                .into()),
            },
        )?;
        Ok(())
    }
}
