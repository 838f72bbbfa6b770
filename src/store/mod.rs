//! The layer store: ids, directories, chains, states, and atomic changes of them.
//!
//! ```text
//!   Create ── staging/<id>.<random>/{layerchain,layer}.json ──sync──rename──► <id>/       (one rename: there or not)
//!   ApplyDiff ── layer.json "applying" (durable, before the first byte of the body)
//!             ── staging/<id>.<random>/{layer.vhd,layer.exact} ──sync──rename──► <id>/
//!             ── layer.json "applied" (rename: the commit point)
//!   Remove ── <id>/ ──rename──► staging/<id>-removing.<random>/ ── delete
//!
//!   Prepare, Commit (containerd) ── the same with one file, snapshot.json, which also holds name and chain (`snapshots`)
//!
//!   lookups ─► index (memory) ◄─ publish ─ file work, one thread per directory, on threads that may block
//! ```
//!
//! Invariants:
//! * An id is a [`LayerId`] before it touches a path.
//! * At every instant a kill or power cut leaves either no layer or the complete layer: states change by one rename of
//!   `layer.json`, after everything that the new state refers to was synced.
//! * What is in `staging/` is debris for the process that opens the store next.
//! * A parent outlives its children: removing it is refused while there are any.
//! * The index lock covers memory only. Work in a layer's directory is serialized by a claim on it, and the result is
//!   published at its end. A slow sync therefore delays only its own layer.
//! * Lookups read memory and never wait for a disk; whatever touches a file requires a [`DiskThread`].
//! * Memory matches the disk, also after failures: a rename whose sync fails is undone, or the file is read again
//!   before its layer is used (`changes.rs`).
//! * Only directories that a store made are layers; others are left alone.
//!
//! The store moves files and reads its own JSON; it never opens an image. Called by `driver` and, read-only, by the
//! `store` commands.

pub mod chain;
mod changes;
mod claims;
pub mod durable;
mod error;
pub mod files;
pub mod guard;
mod id;
pub mod layout;
mod lock;
mod marker;
mod meta;
mod names;
mod numbers;
mod open;
mod refusal;
mod repair;
mod snapshot;
mod snapshots;
mod thread;
mod usage;

pub use changes::Staged;
pub use error::StoreError;
pub use id::{InvalidId, LayerId, REMOVING_SUFFIX};
pub use layout::Layout;
pub use lock::OwnerLock;
pub use marker::{InitRecord, Marker};
pub use meta::{AppliedMeta, LayerMeta, LayerState, LayerWishes, SharedMeta, owners_note};
pub use refusal::SnapshotRefusal;
pub use repair::{Debris, GcReport};
pub use snapshot::{Moment, SnapshotKind, SnapshotMeta, SnapshotUsage, boot_id};
pub use snapshots::{NewName, NewSnapshot, Vanished};
pub use thread::DiskThread;
pub use usage::allocated_bytes;

use claims::Claims;
use parking_lot::{Mutex, RwLock};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
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
    /// Its metadata, or why they cannot be read; every operation on such a layer but Remove is refused.
    pub meta: Result<Arc<LayerMeta>, Arc<str>>,
    /// Distinguishes this layer from a later one of the same id.
    pub generation: u64,
    /// This process created it. A layer that an earlier process created takes no tar: the end of that process may have
    /// cut one, and a client may send the rest.
    pub made_here: bool,
}

impl Layer {
    /// The parent, if there is one.
    pub fn parent(&self) -> Option<&LayerId> {
        self.chain.first()
    }

    /// What makes it a snapshot, if it is one.
    pub fn snapshot(&self) -> Option<&SnapshotMeta> {
        self.meta.as_ref().ok()?.snapshot.as_ref()
    }

    /// The snapshot whose scratch disk it uses.
    pub fn scratch_of(&self) -> Option<&LayerId> {
        self.snapshot()?.scratch_of.as_ref()
    }

    fn snapshot_name(&self) -> Option<&str> {
        self.snapshot().map(|snapshot| snapshot.name.as_str())
    }
}

/// A layer with readable metadata, as it was at one moment.
#[derive(Debug, Clone)]
pub struct Member {
    /// The layer.
    pub layer: Layer,
    /// Its metadata.
    pub meta: Arc<LayerMeta>,
}

impl Member {
    /// The name under which its disk is mounted: its id, or that of the snapshot whose image it shares.
    pub fn disk_id(&self) -> &LayerId {
        let shared = self.meta.applied.as_ref().and_then(|applied| applied.shared.as_ref());
        shared.map_or(&self.layer.id, |shared| &shared.image)
    }
}

/// A layer and its ancestors, as they were at one moment. A request takes one snapshot and works with that: two lookups
/// may see two states, or two layers of the same id.
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
    /// Children by parent, including those that are being created; containers that share a scratch disk count as children
    /// of its owner.
    children: BTreeMap<LayerId, BTreeSet<LayerId>>,
    /// Layers that are being removed or committed: they accept no new children.
    leaving: BTreeSet<LayerId>,
    /// Layers whose `layer.json` must be read again, because a write of it failed and its content is uncertain.
    unknown: BTreeSet<LayerId>,
    /// Directories whose name is an id but which no store made.
    strangers: BTreeSet<LayerId>,
    /// Snapshots by key or name; those that are doubtful are left out.
    names: HashMap<Box<str>, LayerId>,
    /// Keys and names that are being created.
    coming: HashSet<Box<str>>,
    /// Snapshots that a power cut may have cut, or that it brought back, and what stands on them.
    doubtful: BTreeSet<LayerId>,
    /// Snapshots whose directories were made without a sync of the home.
    nameless: BTreeSet<LayerId>,
}

impl Index {
    /// The layer that already uses the directory of `id`: on Windows, names that differ only in case are the same.
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

    /// Refuses a layer that has children, those being created included.
    fn has_no_children(&self, id: &LayerId) -> Result<(), StoreError> {
        let Some(children) = self.children.get(id) else { return Ok(()) };
        Err(StoreError::HasChildren { id: id.clone(), children: children.iter().cloned().collect() })
    }

    fn insert(&mut self, layer: Layer) {
        for below in layer.parent().into_iter().chain(layer.scratch_of()) {
            self.add_child(below.clone(), layer.id.clone());
        }
        if let Some(name) = layer.snapshot_name() {
            self.names.insert(name.into(), layer.id.clone());
        }
        self.layers.insert(layer.id.clone(), layer);
    }

    fn remove(&mut self, id: &LayerId) {
        self.leaving.remove(id);
        self.unknown.remove(id);
        self.doubtful.remove(id);
        self.nameless.remove(id);
        let Some(layer) = self.layers.remove(id) else { return };
        if let Some(name) = layer.snapshot_name()
            && self.names.get(name) == Some(id)
        {
            self.names.remove(name);
        }
        for below in layer.parent().into_iter().chain(layer.scratch_of()) {
            self.drop_child(below, id);
        }
    }

    /// New metadata of a layer; a snapshot's name and chain may change with them.
    fn publish(&mut self, id: &LayerId, meta: Result<Arc<LayerMeta>, Arc<str>>) {
        let Some(mut layer) = self.layers.remove(id) else { return };
        if let Some(snapshot) = meta.as_ref().ok().and_then(|meta| meta.snapshot.as_ref()) {
            if layer.snapshot_name() != Some(&snapshot.name) {
                if let Some(before) = layer.snapshot_name() {
                    self.names.remove(before);
                }
                self.names.insert(snapshot.name.as_str().into(), id.clone());
            }
            if layer.chain[..] != snapshot.chain[..] {
                if let Some(before) = layer.parent() {
                    self.drop_child(&before.clone(), id);
                }
                layer.chain = snapshot.chain.clone();
                if let Some(parent) = layer.parent() {
                    self.add_child(parent.clone(), id.clone());
                }
            }
        }
        layer.meta = meta;
        self.layers.insert(id.clone(), layer);
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
    /// Held while the marker's file is written; `marker` itself is locked only to read or replace it.
    marker_work: Mutex<()>,
    index: RwLock<Index>,
    claims: Claims,
    generation: AtomicU64,
    leftovers: Leftovers,
    /// The home, kept open so that a sync cannot fail for lack of descriptors. `None` for a reader.
    folder: Option<files::Folder>,
    /// A sync of the home failed; the next change retries it, even one that has nothing to do itself.
    unsynced: AtomicBool,
    /// Numbers for new snapshots.
    numbers: numbers::Numbers,
    /// `None` for a reader, which may run next to an owner.
    _lock: Option<OwnerLock>,
}

/// Directories in `staging/` that could not be deleted yet. On Windows a worker that is being ended may still have
/// files open; elsewhere something may be mounted there. [`Store::stage`] and
/// [`Doomed::delete`](changes::Doomed::delete) retry.
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

    /// The layers for which `wanted` is true, by id.
    pub fn layers_where(&self, wanted: impl Fn(&Layer) -> bool) -> Vec<Layer> {
        self.index.read().layers.values().filter(|layer| wanted(layer)).cloned().collect()
    }

    /// Number of layers.
    pub fn len(&self) -> usize {
        self.index.read().layers.len()
    }

    /// True if there is no layer.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a failed write left the content of a `layer.json` uncertain; [`Store::settle`] reads it again.
    pub fn is_unsettled(&self) -> bool {
        !self.index.read().unknown.is_empty()
    }

    /// True if there is a layer of this id, damaged or not.
    pub fn exists(&self, id: &LayerId) -> bool {
        self.index.read().layers.contains_key(id)
    }

    /// Directories whose name is an id but which no store made.
    pub fn strangers(&self) -> Vec<LayerId> {
        self.index.read().strangers.iter().cloned().collect()
    }

    /// The children of a layer.
    pub fn children(&self, id: &LayerId) -> Vec<LayerId> {
        self.index.read().children.get(id).map(|c| c.iter().cloned().collect()).unwrap_or_default()
    }

    /// A layer, damaged or not.
    pub fn find(&self, id: &LayerId) -> Result<Layer, StoreError> {
        self.index.read().layers.get(id).cloned().ok_or_else(|| StoreError::NotFound(id.clone()))
    }

    /// An undamaged layer and its metadata.
    pub fn get(&self, id: &LayerId) -> Result<Member, StoreError> {
        self.index.read().member(id)
    }

    /// An undamaged layer and its undamaged ancestors, all at this moment.
    pub fn snapshot(&self, id: &LayerId) -> Result<Snapshot, StoreError> {
        Ok(self.snapshots(id, None)?.0)
    }

    /// Two layers with their ancestors, all at the same moment.
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

    /// Whether the layers of a snapshot still exist under their ids. If so, files that were opened by name before this
    /// call belong to that snapshot.
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
pub(crate) mod tests;
