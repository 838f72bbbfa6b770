//! Layers that were shown and never written: they still take a tar.
//!
//! ```text
//!   ApplyDiff of a sandbox ─► created by this process? no Get holds it? no child?                    ─┐ no: refused,
//!     ─► service VM: are its changes against its own parent empty, and is its root as it was made?   ─┤ with the reason
//!     ─► gate closed ─► still so, and no Get came between? ─► layer.json "created" ─► sandbox deleted ─┘
//!     ─► as for any layer that was only created
//! ```
//!
//! moby's own drivers unpack a tar over whatever a layer holds. Here a layer is either an image that never changes or a
//! sandbox, so what was written must not vanish behind a tar; but a layer that was only looked at (Create, Get, Put,
//! ApplyDiff) has nothing to lose. The image decides, not a note: one overlay mount leaves times and `trusted.overlay.*`
//! on an untouched root, and those alone are passed over.
//!
//! Invariants: nothing of a layer that holds a change is deleted; between the look at the image and the change of state
//! nobody was shown the layer. Called by `transfer` (ApplyDiff) and, to count, by `views` and `lifecycle`.

use super::{DriverError, home::Home, views::ROOT_PERMISSIONS};
use crate::{
    store::{Layer, LayerId, LayerMeta, LayerState, layout},
    svm::{BlankRoot, Purpose},
};
use parking_lot::Mutex;
use std::{collections::HashMap, io, sync::Arc};

/// Which layers this process shows and has shown.
#[derive(Debug, Default)]
pub(super) struct Shown(Mutex<HashMap<LayerId, Count>>);

#[derive(Debug, Default)]
struct Count {
    /// Gets that began, ever: equal numbers mean that none came between.
    ever: u64,
    /// Gets under way.
    under_way: u64,
    /// Gets without a Put of a layer that virtual machines attach. Mounted views are counted by `mounts`.
    handed_out: u64,
}

/// A Get under way.
#[derive(Debug)]
pub(super) struct Showing {
    shown: Arc<Shown>,
    id: LayerId,
}

impl Shown {
    /// A Get of `id` begins.
    pub(super) fn begin(self: &Arc<Self>, id: &LayerId) -> Showing {
        let mut counts = self.0.lock();
        let count = counts.entry(id.clone()).or_default();
        count.ever += 1;
        count.under_way += 1;
        Showing { shown: self.clone(), id: id.clone() }
    }

    /// A Put of `id`.
    pub(super) fn put(&self, id: &LayerId) {
        if let Some(count) = self.0.lock().get_mut(id) {
            count.handed_out = count.handed_out.saturating_sub(1);
        }
    }

    /// The layer is gone.
    pub(super) fn forget(&self, id: &LayerId) {
        self.0.lock().remove(id);
    }

    /// Gets that began, ever, and those that hold the layer outside of mounted views.
    fn look(&self, id: &LayerId) -> (u64, u64) {
        self.0.lock().get(id).map_or((0, 0), |count| (count.ever, count.under_way + count.handed_out))
    }
}

impl Showing {
    /// The layer's folder was given to somebody who attaches its disk.
    pub(super) fn handed_out(self) {
        if let Some(count) = self.shown.0.lock().get_mut(&self.id) {
            count.handed_out += 1;
        }
    }
}

impl Drop for Showing {
    fn drop(&mut self) {
        if let Some(count) = self.shown.0.lock().get_mut(&self.id) {
            count.under_way = count.under_way.saturating_sub(1);
        }
    }
}

fn refused(id: &LayerId, reason: &str) -> DriverError {
    DriverError::Usage(format!("layer {id} {reason}; a tar cannot be applied to it"))
}

impl Home {
    /// Makes a sandbox that was never written a layer that was only created; leaves layers in other states as they are.
    ///
    /// # Errors
    /// A sandbox that was written, is shown, has children, or is of an earlier process: it stays as it is.
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
                return Err(refused(id, "was shown while its content was looked at"));
            }
            #[cfg(target_os = "linux")]
            home.mounts.free_hidden(&gate, id)?;
            #[cfg(not(target_os = "linux"))]
            let _ = gate;
            home.store.update(thread, id, layer.generation, |meta| match meta.state {
                LayerState::Sandbox => {
                    Ok(LayerMeta { state: LayerState::Created, handed_out: false, ..meta.clone() })
                }
                // Somebody else was faster: what it is now decides.
                _ => Ok::<_, DriverError>(meta.clone()),
            })?;
            for name in [layout::SANDBOX_FILE, layout::SANDBOX_VHDX_FILE] {
                let path = home.store.layout().layer_file(id, name);
                match std::fs::remove_file(&path) {
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

    /// Refuses a sandbox that somebody may be writing.
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

    /// Refuses a sandbox that is a parent.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gets_are_counted_until_they_end_or_are_put() {
        let (shown, id) = (Arc::new(Shown::default()), "a".parse::<LayerId>().unwrap());
        assert_eq!(shown.look(&id), (0, 0));
        let showing = shown.begin(&id);
        assert_eq!(shown.look(&id), (1, 1));
        // It failed.
        drop(showing);
        assert_eq!(shown.look(&id), (1, 0));
        shown.begin(&id).handed_out();
        shown.begin(&id).handed_out();
        assert_eq!(shown.look(&id), (3, 2));
        shown.put(&id);
        assert_eq!(shown.look(&id), (3, 1));
        shown.put(&id);
        shown.put(&id);
        assert_eq!(shown.look(&id), (3, 0));
        shown.forget(&id);
        assert_eq!(shown.look(&id), (0, 0));
    }
}
