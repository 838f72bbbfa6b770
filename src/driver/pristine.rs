//! Layers that were mounted but never written still take a tar.
//!
//! ```text
//!   ApplyDiff of a sandbox ─► created by this process? no Get holds it? no child?                    ─┐ no: refused,
//!     ─► service VM: are its changes against its own parent empty, and is its root as it was made?   ─┤ with the reason
//!     ─► gate closed ─► still so, and no Get came between? ─► layer.json "created" ─► sandbox deleted ─┘
//!     ─► as for any layer that was only created
//! ```
//!
//! moby's own drivers unpack a tar over whatever a layer holds. Here a layer is either an immutable image or a sandbox,
//! so a tar must not hide what was written; but a layer that was only mounted (Create, Get, Put, ApplyDiff) has nothing
//! to lose. The image decides, not a record: an overlay mount leaves times and `trusted.overlay.*` on an untouched
//! root, and only those are ignored.
//!
//! Invariants: a layer with changes is never deleted; no Get comes between the look at the image and the change of
//! state (`shown` counts the Gets). Called by `apply` for ApplyDiff.

use super::{DriverError, home::Home, sandbox::ROOT_PERMISSIONS};
use crate::{
    store::{Layer, LayerId, LayerMeta, LayerState, files, layout},
    svm::{BlankRoot, Purpose},
};
use std::{io, sync::Arc};

fn refused(id: &LayerId, reason: &str) -> DriverError {
    DriverError::Usage(format!("layer {id} {reason}; a tar cannot be applied to it"))
}

impl Home {
    /// Turns a sandbox that was never written back into a layer that was only created; leaves layers in other states as
    /// they are.
    ///
    /// # Errors
    /// The sandbox was written, is in use, has children, or was created by an earlier process. It stays as it is.
    pub(super) async fn take_back(self: &Arc<Self>, layer: &Layer) -> Result<(), DriverError> {
        let id = &layer.id;
        if self.store.get(id)?.meta.state != LayerState::Sandbox {
            return Ok(());
        }
        let (before, _) = self.shown.look(id);
        self.nobody_uses(layer)?;
        if self.was_written(layer).await? {
            return Err(refused(id, "was written through a mount"));
        }
        self.nothing_stands_on(layer)?;
        let gate = self.gates.close([id]).await;
        let (home, layer) = (self.clone(), layer.clone());
        gate.run(move |thread, gate| {
            let id = &layer.id;
            home.nobody_uses(&layer)?;
            home.nothing_stands_on(&layer)?;
            if home.shown.look(id).0 != before {
                return Err(refused(id, "was mounted while its content was being examined"));
            }
            #[cfg(target_os = "linux")]
            home.mounts.free_hidden(&gate, id)?;
            #[cfg(not(target_os = "linux"))]
            let _ = gate;
            home.store.update(thread, id, layer.generation, |meta| match meta.state {
                LayerState::Sandbox => {
                    Ok(LayerMeta { state: LayerState::Created, handed_out: false, ..meta.clone() })
                }
                // Another request was faster; the new state decides.
                _ => Ok::<_, DriverError>(meta.clone()),
            })?;
            for name in [layout::SANDBOX_FILE, layout::SANDBOX_VHDX_FILE] {
                let path = home.store.layout().layer_file(id, name);
                match files::remove_file(&path) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => {
                        return Err(DriverError::io("delete the unwritten sandbox", &path)(e));
                    }
                    _ => {}
                }
            }
            Ok(())
        })
        .await
    }

    /// Refuses a sandbox that may be in use.
    fn nobody_uses(&self, layer: &Layer) -> Result<(), DriverError> {
        let id = &layer.id;
        if !layer.made_here {
            return Err(refused(id, "was made by an earlier process of the plugin"));
        }
        #[cfg(target_os = "linux")]
        let (views, mounted) = (self.mounts.references(id), self.mounts.disk_dir(id).is_some());
        #[cfg(not(target_os = "linux"))]
        let (views, mounted) = (0, false);
        if views + self.shown.look(id).1 > 0 || mounted {
            return Err(refused(id, "is in use (a Get without its Put)"));
        }
        Ok(())
    }

    /// Refuses a sandbox that has children.
    fn nothing_stands_on(&self, layer: &Layer) -> Result<(), DriverError> {
        let children = self.store.children(&layer.id);
        let Some(child) = children.first() else { return Ok(()) };
        let reason = format!("is the parent of {} layers, {child} among them", children.len());
        Err(refused(&layer.id, &reason))
    }

    /// Asks a service VM whether a sandbox holds anything.
    async fn was_written(self: &Arc<Self>, layer: &Layer) -> Result<bool, DriverError> {
        let id = &layer.id;
        let pair = self.pair(id.as_str(), layer.parent().map_or("", LayerId::as_str)).await?;
        let job = self.comparison(pair).await?.job();
        let lease = self
            .pool
            .lease(id.as_str(), Purpose::Work)
            .await
            .map_err(DriverError::svm(id, "look whether it was written"))?;
        let (uid, gid) = self.root_ids();
        let written = lease.written(job, BlankRoot { permissions: ROOT_PERMISSIONS, uid, gid }).await;
        written.map_err(DriverError::svm(id, "look whether it was written"))
    }
}
