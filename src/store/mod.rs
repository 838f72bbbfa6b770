//! The shared layer store: ids, folders, chains, states, and how each change is made whole.
//!
//! ```text
//!   Create ── staging/<id>.<n>/{layerchain,layer}.json ──sync──rename──► <id>/            (one rename: there or not)
//!   ApplyDiff ── layer.json "applying" (durable, before the first byte of the body)
//!             ── staging/<id>.<n>/{layer.vhd,layer.exact} ──sync──rename──► <id>/
//!             ── layer.json "applied" (rename: the commit point)
//!   Remove ── <id>/ ──rename──► staging/<id>-removing.<n>/ ── delete
//! ```
//!
//! Invariants:
//! * An id is a [`LayerId`] before it touches a path.
//! * At every instant a kill or power cut leaves either no layer or the whole layer: states change by one rename of
//!   `layer.json`, after everything that the new state speaks of was synced.
//! * What lies in `staging/` is debris for whoever opens the store next.
//! * A parent outlives its children: removing it is refused while they are there.
//! * No lock is held across bulk I/O: the index lock covers map look-ups and single renames only.
//!
//! The store moves files and reads its own JSON; it never opens an image. Called by `driver` and, read-only, by the
//! `store` commands. All functions block; `driver` calls them from blocking threads.

pub mod chain;
pub mod durable;
mod error;
mod id;
pub mod layout;
mod lock;
mod marker;
mod meta;
mod repair;
mod usage;

pub use error::StoreError;
pub use id::{LayerId, MAX_ID_BYTES, REMOVING_SUFFIX};
pub use layout::Layout;
pub use lock::{OwnerLock, holder};
pub use marker::{IdRange, InitRecord, Marker, STORE_FORMAT};
pub use meta::{AppliedMeta, LayerMeta, LayerState, WRITER_VERSION, owners_note};
pub use repair::{Debris, GcReport};
pub use usage::{DiskUsage, LayerUsage, allocated_bytes};

use parking_lot::{Mutex, RwLock};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
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

    /// What stands below the layer; `None` for a base layer.
    pub fn parent(&self) -> Option<Self> {
        let (top, ancestors) = self.ancestors.split_first()?;
        Some(Self { top: top.clone(), ancestors: ancestors.to_vec() })
    }
}

#[derive(Debug, Default)]
struct Index {
    layers: BTreeMap<LayerId, Layer>,
    children: BTreeMap<LayerId, BTreeSet<LayerId>>,
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
            Err(reason) => Err(StoreError::WrongState {
                id: id.clone(),
                reason: format!("it is damaged and can only be removed: {reason}"),
            }),
        }
    }

    fn insert(&mut self, layer: Layer) {
        if let Some(parent) = layer.parent() {
            self.children.entry(parent.clone()).or_default().insert(layer.id.clone());
        }
        self.layers.insert(layer.id.clone(), layer);
    }

    fn remove(&mut self, id: &LayerId) {
        let Some(layer) = self.layers.remove(id) else { return };
        if let Some(parent) = layer.parent()
            && let Some(children) = self.children.get_mut(parent)
        {
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
    index: RwLock<Index>,
    nonce: AtomicU64,
    leftovers: Leftovers,
    /// `None` for a reader beside a running owner.
    _lock: Option<OwnerLock>,
}

/// Folders in `staging/` that could not be deleted when they should have been. On Windows a worker that is just being
/// ended still has files open; they are tried again by the next [`Store::stage`] and [`Store::remove`].
type Leftovers = Arc<Mutex<Vec<PathBuf>>>;

/// A folder in `staging/` that is deleted on drop unless its content was moved away.
#[derive(Debug)]
pub struct Staged {
    path: PathBuf,
    leftovers: Leftovers,
}

impl Staged {
    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Staged {
    /// Tries once. An operation that is given up is dropped on a thread of the runtime, and the task that ends its
    /// worker may be next on that very thread: waiting here for the worker's files would be waiting for oneself.
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::debug!(path = %self.path.display(), error = %e, "a staging folder is in use; it is deleted later");
                self.leftovers.lock().push(std::mem::take(&mut self.path));
            }
            _ => {}
        }
    }
}

impl Store {
    /// Opens the store of `home` for this process alone, making it if there is none.
    ///
    /// Reads the index (two small files a layer) and renames nothing; debris is left for [`Store::collect`].
    ///
    /// # Errors
    /// [`StoreError::Locked`] names the present owner; a store of a later format or a damaged marker is refused.
    pub fn open(home: &Path) -> Result<Self, StoreError> {
        create_private_dir(home)?;
        let lock = OwnerLock::take(home)?;
        let layout = Layout::new(home);
        for name in [layout::CACHE, layout::SCRATCH, layout::STAGING, layout::MOUNTS] {
            create_private_dir(&layout.top(name))?;
        }
        create_private_dir(&layout.top(layout::MOUNTS).join(layout::EMPTY))?;
        let marker = if let Some(mut marker) = Marker::read(home)? {
            marker.note_release_2(home)?;
            marker
        } else {
            let marker = Marker::new();
            marker.write(home)?;
            marker
        };
        Self::load(layout, marker, Some(lock))
    }

    /// Opens a store to look at it, beside its owner or without one. Nothing is written.
    pub fn open_read_only(home: &Path) -> Result<Self, StoreError> {
        let marker = Marker::read(home)?.ok_or_else(|| {
            StoreError::Usage(format!(
                "'{}' holds no layer store ({} is missing)",
                home.display(),
                layout::MARKER
            ))
        })?;
        Self::load(Layout::new(home), marker, None)
    }

    fn load(layout: Layout, marker: Marker, lock: Option<OwnerLock>) -> Result<Self, StoreError> {
        let store = Self {
            layout,
            marker: RwLock::new(marker),
            index: RwLock::default(),
            nonce: AtomicU64::new(1),
            leftovers: Leftovers::default(),
            _lock: lock,
        };
        let home = store.layout.home();
        let mut index = Index::default();
        for entry in fs::read_dir(home).map_err(StoreError::io("list", home))? {
            let entry = entry.map_err(StoreError::io("list", home))?;
            let name = entry.file_name();
            let Some(id) = name.to_str().and_then(|n| n.parse::<LayerId>().ok()) else { continue };
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                index.insert(store.read_layer(id));
            }
        }
        *store.index.write() = index;
        Ok(store)
    }

    fn read_layer(&self, id: LayerId) -> Layer {
        let folder = self.layout.layer(&id);
        let chain = chain::read(&folder);
        let meta = durable::read_json::<LayerMeta>(&folder.join(layout::META_FILE))
            .and_then(|m| {
                m.ok_or_else(|| StoreError::Corrupt {
                    path: folder.join(layout::META_FILE),
                    reason: "it is missing: this folder was not made by this store".into(),
                })
            })
            .map_err(|e| Arc::from(e.to_string()));
        let (chain, meta) = match chain {
            Ok(chain) => (chain, meta),
            Err(e) => (Vec::new(), Err(Arc::from(e.to_string()))),
        };
        Layer { id, chain: chain.into(), meta, generation: self.next(), made_here: false }
    }

    fn next(&self) -> u64 {
        self.nonce.fetch_add(1, Ordering::Relaxed)
    }

    /// Paths of this store.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The marker.
    pub fn marker(&self) -> Marker {
        self.marker.read().clone()
    }

    /// Keeps what Init said, durably; does nothing if it said the same before.
    pub fn record_init(&self, init: InitRecord) -> Result<(), StoreError> {
        let mut marker = self.marker.write();
        if marker.init != init {
            let changed = Marker { init, ..marker.clone() };
            changed.write(self.layout.home())?;
            *marker = changed;
        }
        Ok(())
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

    /// True if there is a layer of this id, sound or not.
    pub fn exists(&self, id: &LayerId) -> bool {
        self.index.read().layers.contains_key(id)
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

    /// An empty folder in `staging/`.
    pub fn stage(&self, id: &LayerId) -> Result<Staged, StoreError> {
        let path =
            self.layout.top(layout::STAGING).join(format!("{id}.{}.{}", std::process::id(), self.next()));
        self.clear_leftovers(|path| fs::remove_dir_all(path));
        create_layer_dir(&path).map_err(StoreError::io("create", &path))?;
        Ok(Staged { path, leftovers: self.leftovers.clone() })
    }

    /// Deletes what could not be deleted before; what still cannot stays for the next time, and at last for the next
    /// start.
    fn clear_leftovers(&self, delete: impl Fn(&Path) -> io::Result<()>) {
        let leftovers = std::mem::take(&mut *self.leftovers.lock());
        for path in leftovers {
            match delete(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), error = %e, "cannot delete a staging folder yet");
                    self.leftovers.lock().push(path);
                }
                _ => {}
            }
        }
    }

    /// Creates a layer: `fill` puts files into its folder before it appears under its id. Files that `fill` makes
    /// must be synced by it.
    ///
    /// # Errors
    /// The id exists, the parent does not, the chain would be too long, or what `fill` says.
    pub fn create<E: From<StoreError>>(
        &self,
        id: &LayerId,
        parent: Option<&LayerId>,
        state: LayerState,
        sandbox_bytes: Option<u64>,
        fill: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<(), E> {
        let chain = {
            let index = self.index.read();
            if let Some(other) = index.same_folder(id) {
                return Err(StoreError::Exists(other).into());
            }
            Self::chain_below(&index, id, parent)?
        };
        let staged = self.stage(id)?;
        fill(staged.path())?;
        let meta = LayerMeta {
            state,
            created: now(),
            sandbox_bytes,
            applied: None,
            canonical_version: None,
            refused: None,
        };
        chain::write(staged.path(), &chain)?;
        durable::write_json(&staged.path().join(layout::META_FILE), &meta)?;
        let target = self.layout.layer(id);
        let mut index = self.index.write();
        // Both may have changed while the files were made.
        if let Some(other) = index.same_folder(id) {
            return Err(StoreError::Exists(other).into());
        }
        Self::chain_below(&index, id, parent)?;
        durable::rename(staged.path(), &target).map_err(StoreError::io("rename staged layer to", &target))?;
        index.insert(Layer {
            id: id.clone(),
            chain: chain.into(),
            meta: Ok(meta),
            generation: self.next(),
            made_here: true,
        });
        drop(index);
        durable::sync_dir(self.layout.home())?;
        Ok(())
    }

    fn chain_below(
        index: &Index,
        id: &LayerId,
        parent: Option<&LayerId>,
    ) -> Result<Vec<LayerId>, StoreError> {
        let Some(parent) = parent else { return Ok(Vec::new()) };
        let missing = || StoreError::MissingParent { id: id.clone(), parent: parent.clone() };
        let layer = index.layers.get(parent).ok_or_else(missing)?;
        if let Err(reason) = &layer.meta {
            return Err(StoreError::WrongState {
                id: parent.clone(),
                reason: format!("it is damaged and cannot be a parent: {reason}"),
            });
        }
        let depth = layer.chain.len() + 2;
        if depth > chain::MAX_CHAIN + 1 {
            return Err(StoreError::TooDeep { id: id.clone(), depth, max: chain::MAX_CHAIN + 1 });
        }
        Ok(std::iter::once(parent.clone()).chain(layer.chain.iter().cloned()).collect())
    }

    /// Changes the meta data of a layer durably: `change` sees the present state and gives the next, or an error.
    ///
    /// # Errors
    /// The layer is gone, damaged, or is no longer the one of `generation`.
    pub fn update<E: From<StoreError>>(
        &self,
        id: &LayerId,
        generation: u64,
        change: impl FnOnce(&LayerMeta) -> Result<LayerMeta, E>,
    ) -> Result<LayerMeta, E> {
        let mut index = self.index.write();
        let layer = index
            .layers
            .get_mut(id)
            .filter(|l| l.generation == generation)
            .ok_or_else(|| StoreError::NotFound(id.clone()))?;
        let meta = match &layer.meta {
            Ok(meta) => change(meta)?,
            Err(reason) => {
                return Err(StoreError::WrongState { id: id.clone(), reason: reason.to_string() }.into());
            }
        };
        durable::write_json(&self.layout.layer_file(id, layout::META_FILE), &meta)?;
        layer.meta = Ok(meta.clone());
        Ok(meta)
    }

    /// Moves files from a staging folder into a layer and changes its meta data: the files first, the rename of
    /// `layer.json` last. The files must be synced.
    pub fn commit<E: From<StoreError>>(
        &self,
        id: &LayerId,
        generation: u64,
        staged: &Staged,
        files: &[&str],
        change: impl FnOnce(&LayerMeta) -> Result<LayerMeta, E>,
    ) -> Result<LayerMeta, E> {
        self.update(id, generation, |meta| {
            let next = change(meta)?;
            for name in files {
                let target = self.layout.layer_file(id, name);
                durable::rename(&staged.path().join(name), &target)
                    .map_err(StoreError::io("rename staged file to", &target))?;
            }
            durable::sync_dir(&self.layout.layer(id))?;
            Ok(next)
        })
    }

    /// Removes a layer; one that is not there is fine. The folder is renamed away first, then deleted: a kill in
    /// between leaves debris, never half a layer, and never something that blocks a later Remove.
    ///
    /// # Errors
    /// [`StoreError::HasChildren`] names the layers that stand on it.
    pub fn remove(&self, id: &LayerId) -> Result<(), StoreError> {
        let folder = self.layout.layer(id);
        let doomed = {
            let mut index = self.index.write();
            if let Some(children) = index.children.get(id) {
                return Err(StoreError::HasChildren {
                    id: id.clone(),
                    children: children.iter().cloned().collect(),
                });
            }
            let path = self.layout.top(layout::STAGING).join(format!(
                "{id}{REMOVING_SUFFIX}.{}.{}",
                std::process::id(),
                self.next()
            ));
            match durable::rename(&folder, &path) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    index.remove(id);
                    return Ok(());
                }
                Err(e) => return Err(StoreError::io("rename away", &folder)(e)),
            }
            index.remove(id);
            Staged { path, leftovers: self.leftovers.clone() }
        };
        durable::sync_dir(self.layout.home())?;
        drop(doomed);
        // With patience: this is a thread that may wait, and whoever removes a layer expects its space back.
        self.clear_leftovers(durable::remove_tree);
        Ok(())
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

/// Makes a folder (and those above it) that only its owner may enter (on Windows: the system, administrators and its
/// owner); an existing one is left as it is.
fn create_private_dir(path: &Path) -> Result<(), StoreError> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    #[cfg(windows)]
    {
        use crate::sys::windows::security::{SecurityDescriptor, create_dir};
        if let Some(above) = path.parent() {
            builder.create(above).map_err(StoreError::io("create", above))?;
        }
        let made = SecurityDescriptor::parse(PRIVATE_ACCESS).and_then(|list| create_dir(path, &list));
        match made {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => return other.map_err(StoreError::io("create", path)),
        }
    }
    builder.create(path).map_err(StoreError::io("create", path))
}

/// Makes a folder that will be a layer's.
fn create_layer_dir(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    return fs::create_dir(path);
    #[cfg(windows)]
    {
        use crate::sys::windows::security::{SecurityDescriptor, create_dir};
        create_dir(path, &SecurityDescriptor::parse(LAYER_ACCESS)?)
    }
}

/// Who may use the store's own folders: the system, administrators, and whoever made them. Files inherit it.
#[cfg(windows)]
const PRIVATE_ACCESS: &str = "D:P(A;OICI;GA;;;SY)(A;OICI;GA;;;BA)(A;OICI;GA;;;OW)";
/// Who may use a layer's folder: as above, and virtual machines (the group `S-1-5-83-0`) may read. A sandbox that a
/// machine is to write is granted to that machine alone when it is attached.
#[cfg(windows)]
const LAYER_ACCESS: &str = "D:P(A;OICI;GA;;;SY)(A;OICI;GA;;;BA)(A;OICI;GA;;;OW)(A;OICI;GRGX;;;S-1-5-83-0)";

#[cfg(test)]
mod tests;
