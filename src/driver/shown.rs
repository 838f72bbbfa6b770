//! Which layers were shown by a Get, and which are still held.
//!
//! ```text
//!   Get ─► begin: ever + 1, under way + 1 ─► returns or fails: under way − 1
//!                                        └─► lcow.mount=none: handed out + 1 ─► Put: handed out − 1
//! ```
//!
//! `pristine` takes a sandbox back only if nothing holds it and no Get came in between. In memory only: what an earlier
//! process created is never taken back. Called by `views`, `lifecycle` and `pristine`.

use crate::store::LayerId;
use parking_lot::Mutex;
use std::{collections::HashMap, sync::Arc};

/// Counts the Gets of this process, by layer.
#[derive(Debug, Default)]
pub(super) struct Shown(Mutex<HashMap<LayerId, Count>>);

#[derive(Debug, Default)]
struct Count {
    /// Gets that ever began; an unchanged number means that none came in between.
    ever: u64,
    /// Gets that have not returned yet.
    under_way: u64,
    /// Gets without their Put, for layers that virtual machines attach. `mounts` counts mounted views.
    handed_out: u64,
}

/// A Get that has not returned yet.
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

    /// The layer was removed.
    pub(super) fn forget(&self, id: &LayerId) {
        self.0.lock().remove(id);
    }

    /// The number of Gets that ever began, and of those that hold the layer now other than by a mounted view.
    pub(super) fn look(&self, id: &LayerId) -> (u64, u64) {
        self.0.lock().get(id).map_or((0, 0), |count| (count.ever, count.under_way + count.handed_out))
    }
}

impl Showing {
    /// Get returned the directory of a layer whose disk a virtual machine will attach: held until its Put.
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
