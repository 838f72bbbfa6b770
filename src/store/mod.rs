//! The shared layer store: ids, folders, chains, states, and how each change is made whole.
//!
//! ```text
//!   Create ── staging/<id>.<random>/{layerchain,layer}.json ──sync──rename──► <id>/       (one rename: there or not)
//!   ApplyDiff ── layer.json "applying" (durable, before the first byte of the body)
//!             ── staging/<id>.<random>/{layer.vhd,layer.exact} ──sync──rename──► <id>/
//!             ── layer.json "applied" (rename: the commit point)
//!   Remove ── <id>/ ──rename──► staging/<id>-removing.<random>/ ── delete
//!
//!   look-ups ─► index (memory) ◄─ publish ─ file work, in one folder at a time, on a thread that may wait
//! ```
//!
//! Invariants:
//! * An id is a [`LayerId`] before it touches a path.
//! * At every instant a kill or power cut leaves either no layer or the whole layer: states change by one rename of
//!   `layer.json`, after everything that the new state speaks of was synced.
//! * What lies in `staging/` is debris for whoever opens the store next.
//! * A parent outlives its children: removing it is refused while they are there.
//! * The index lock covers memory only. Work in a layer's folder is serial by a claim on that folder; what it came to
//!   is published at its end. So one slow sync holds up the layer that it is for, and nobody else.
//! * Look-ups read memory and never wait for a disk; whatever touches a file wants a [`DiskThread`].
//! * Memory says what the disk says, after failures too: a sync that fails behind a rename is undone, or the file is
//!   read again before its layer is used (`changes.rs`).
//! * Only folders that a store made are layers; others are left alone.
//!
//! The store moves files and reads its own JSON; it never opens an image. Called by `driver` and, read-only, by the
//! `store` commands.

pub mod chain;
mod changes;
mod claims;
pub mod durable;
mod error;
pub mod guard;
mod id;
pub mod layout;
mod lock;
mod marker;
mod meta;
mod open;
mod repair;
mod thread;
mod usage;

pub use error::StoreError;
pub use id::{LayerId, REMOVING_SUFFIX};
pub use layout::Layout;
pub use lock::OwnerLock;
pub use marker::{IdRange, InitRecord, Marker};
pub use meta::{AppliedMeta, LayerMeta, LayerState, LayerWishes, owners_note};
pub use repair::GcReport;
pub use thread::DiskThread;
pub use usage::allocated_bytes;

use claims::Claims;
use parking_lot::{Mutex, RwLock};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

/// A layer as the index knows it.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Its id.
    pub id: LayerId,
    /// Ancestors, nearest first.
    pub chain: Arc<[LayerId]>,
    /// State and facts, or why they cannot be read: such a layer is refused everything but Remove.
    pub meta: Result<LayerMeta, Arc<str>>,
    /// Tells this layer from a later one of the same id.
    pub generation: u64,
    /// This process created it. What an earlier one created takes no tar: nobody knows what the end of that process
    /// cut, and a client may come back with the rest.
    pub made_here: bool,
}

impl Layer {
    /// The parent, if there is one.
    pub fn parent(&self) -> Option<&LayerId> {
        self.chain.first()
    }
}

/// A sound layer as it was at one moment.
#[derive(Debug, Clone)]
pub struct Member {
    /// The layer.
    pub layer: Layer,
    /// Its state and facts.
    pub meta: LayerMeta,
}

/// A layer and its ancestors, all of one moment. A request looks once and works with what it saw: two looks may see
/// two states, or two layers of the same id.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The layer itself.
    pub top: Member,
    /// Its ancestors, nearest first.
    pub ancestors: Vec<Member>,
}

impl Snapshot {
    /// The layer's id.
    pub fn id(&self) -> &LayerId {
        &self.top.layer.id
    }

    /// The layer, then its ancestors.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        std::iter::once(&self.top).chain(&self.ancestors)
    }
}

#[derive(Debug, Default)]
struct Index {
    layers: BTreeMap<LayerId, Layer>,
    /// Children by parent, those included that are just being made.
    children: BTreeMap<LayerId, BTreeSet<LayerId>>,
    /// Layers that are just being removed: nothing new may stand on them.
    leaving: BTreeSet<LayerId>,
    /// Layers whose `layer.json` must be read again: a write of it failed, and what stands there is not known.
    unknown: BTreeSet<LayerId>,
    /// Folders with the name of an id that no store made.
    strangers: BTreeSet<LayerId>,
}

impl Index {
    /// The layer whose folder `id` would have: on Windows names that differ in case only are one name.
    fn same_folder(&self, id: &LayerId) -> Option<LayerId> {
        if self.layers.contains_key(id) {
            return Some(id.clone());
        }
        #[cfg(windows)]
        return self.layers.keys().find(|other| other.as_str().eq_ignore_ascii_case(id.as_str())).cloned();
        #[cfg(not(windows))]
        None
    }

    fn member(&self, id: &LayerId) -> Result<Member, StoreError> {
        let layer = self.layers.get(id).cloned().ok_or_else(|| StoreError::NotFound(id.clone()))?;
        match layer.meta.clone() {
            Ok(meta) => Ok(Member { layer, meta }),
            Err(reason) => Err(StoreError::Damaged { id: id.clone(), reason: reason.to_string() }),
        }
    }

    fn insert(&mut self, layer: Layer) {
        if let Some(parent) = layer.parent() {
            self.add_child(parent.clone(), layer.id.clone());
        }
        self.layers.insert(layer.id.clone(), layer);
    }

    fn remove(&mut self, id: &LayerId) {
        self.leaving.remove(id);
        self.unknown.remove(id);
        let Some(layer) = self.layers.remove(id) else { return };
        if let Some(parent) = layer.parent() {
            self.drop_child(parent, id);
        }
    }

    fn add_child(&mut self, parent: LayerId, id: LayerId) {
        self.children.entry(parent).or_default().insert(id);
    }

    fn drop_child(&mut self, parent: &LayerId, id: &LayerId) {
        if let Some(children) = self.children.get_mut(parent) {
            children.remove(id);
            if children.is_empty() {
                self.children.remove(parent);
            }
        }
    }
}

/// An open store.
#[derive(Debug)]
pub struct Store {
    layout: Layout,
    marker: RwLock<Marker>,
    /// Held while the marker's file is written; the lock of the marker itself is not.
    marker_work: Mutex<()>,
    index: RwLock<Index>,
    claims: Claims,
    generation: AtomicU64,
    leftovers: Leftovers,
    /// The home, open: its syncs need no descriptor that may be lacking. `None` for a reader.
    folder: Option<durable::Folder>,
    /// A sync of the home failed: the next change of it tries again, even if it has nothing to do itself.
    unsynced: AtomicBool,
    /// `None` for a reader beside a running owner.
    _lock: Option<OwnerLock>,
}

/// Folders in `staging/` that could not be deleted when they should have been. On Windows a worker that is just being
/// ended still has files open; elsewhere something may be mounted there. They are tried again by the next
/// [`Store::stage`] and [`Store::remove`].
type Leftovers = Arc<Mutex<Vec<PathBuf>>>;

impl Store {
    fn next_generation(&self) -> u64 {
        self.generation.fetch_add(1, Ordering::Relaxed)
    }

    /// Paths of this store.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The marker.
    pub fn marker(&self) -> Marker {
        self.marker.read().clone()
    }

    /// All layers, by id.
    pub fn layers(&self) -> Vec<Layer> {
        self.index.read().layers.values().cloned().collect()
    }

    /// Number of layers.
    pub fn len(&self) -> usize {
        self.index.read().layers.len()
    }

    /// True if there is no layer.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a write failed in a way that left unknown what the disk says; [`Store::settle`] finds out.
    pub fn is_unsettled(&self) -> bool {
        !self.index.read().unknown.is_empty()
    }

    /// True if there is a layer of this id, sound or not.
    pub fn exists(&self, id: &LayerId) -> bool {
        self.index.read().layers.contains_key(id)
    }

    /// Folders with the name of an id that no store made.
    pub fn strangers(&self) -> Vec<LayerId> {
        self.index.read().strangers.iter().cloned().collect()
    }

    /// The children of a layer.
    pub fn children(&self, id: &LayerId) -> Vec<LayerId> {
        self.index.read().children.get(id).map(|c| c.iter().cloned().collect()).unwrap_or_default()
    }

    /// A layer, sound or not.
    pub fn find(&self, id: &LayerId) -> Result<Layer, StoreError> {
        self.index.read().layers.get(id).cloned().ok_or_else(|| StoreError::NotFound(id.clone()))
    }

    /// A sound layer and its meta data.
    pub fn get(&self, id: &LayerId) -> Result<Member, StoreError> {
        self.index.read().member(id)
    }

    /// A sound layer and its sound ancestors, as they are together at this moment.
    pub fn snapshot(&self, id: &LayerId) -> Result<Snapshot, StoreError> {
        Ok(self.snapshots(id, None)?.0)
    }

    /// Two layers with their ancestors, all of the same moment.
    pub fn snapshots(
        &self,
        id: &LayerId,
        other: Option<&LayerId>,
    ) -> Result<(Snapshot, Option<Snapshot>), StoreError> {
        let index = self.index.read();
        let look = |id: &LayerId| {
            let top = index.member(id)?;
            let ancestors = top.layer.chain.iter().map(|a| index.member(a)).collect::<Result<_, _>>()?;
            Ok::<_, StoreError>(Snapshot { top, ancestors })
        };
        Ok((look(id)?, other.map(look).transpose()?))
    }

    /// Whether the layers of a snapshot are still the ones of their ids. Files that were opened by their names before
    /// this said yes belong to that snapshot.
    pub fn is_current(&self, snapshot: &Snapshot) -> bool {
        let index = self.index.read();
        snapshot
            .members()
            .all(|m| index.layers.get(&m.layer.id).is_some_and(|l| l.generation == m.layer.generation))
    }

    /// Refuses if less than `reserve` bytes are free on the store's disk.
    pub fn check_reserve(&self, reserve: u64, free: u64) -> Result<(), StoreError> {
        if free < reserve {
            return Err(StoreError::LowSpace { home: self.layout.home().to_owned(), free, reserve });
        }
        Ok(())
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

#[cfg(test)]
mod tests;
