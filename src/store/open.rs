//! Opening a store: who may use the directory, who owns it, and what is in it.

use super::{
    DiskThread, Index, InitRecord, Layer, LayerId, LayerMeta, Layout, Leftovers, Marker, OwnerLock, Store,
    StoreError, boot_id, chain, claims::Claims, durable, files, guard, layout, numbers::Numbers,
};
use parking_lot::{Mutex, RwLock};
use std::{
    fs, io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    },
};

impl Store {
    /// Opens the store of `home` for this process alone; creates it if there is none. In a directory without a marker,
    /// only entries for which `known` is true are accepted.
    ///
    /// Reads the index (two small files a layer) and renames nothing; debris is left for [`Store::collect`]. The home
    /// is closed to everyone but its owner; if the last Init had maps, the group of the containers' root may pass.
    ///
    /// # Errors
    /// [`StoreError::Locked`] names the current owner. Refused are a store of a later format, a damaged marker, a
    /// directory of another user, and one that holds something else.
    pub fn open(
        thread: &DiskThread,
        home: &Path,
        known: impl Fn(&fs::DirEntry) -> bool,
    ) -> Result<Self, StoreError> {
        Self::open_as(thread, home, known, Marker::new)
    }

    /// As [`Store::open`]; a store that does not exist yet gets the marker `fresh`.
    pub(super) fn open_as(
        _: &DiskThread,
        home: &Path,
        known: impl Fn(&fs::DirEntry) -> bool,
        fresh: impl FnOnce() -> Marker,
    ) -> Result<Self, StoreError> {
        // Before anything is changed: a mistyped path may be any directory.
        let found = Marker::read(home)?;
        if found.is_none() {
            guard::refuse_foreign(home, &known)?;
        }
        files::create_top_dir(home, found.is_none())?;
        #[cfg(unix)]
        guard::close_folder(home, found.as_ref().and_then(|marker| marker.init.passing_group()))?;
        let lock = OwnerLock::take(home)?;
        let layout = Layout::new(home);
        for name in [layout::CACHE, layout::SCRATCH, layout::STAGING, layout::MOUNTS] {
            let path = layout.top(name);
            files::create_private_dir(&path)?;
            if !fs::symlink_metadata(&path).map_err(StoreError::io("look at", &path))?.is_dir() {
                return Err(StoreError::Usage(format!(
                    "'{}' must be a real directory, not a link: its content is deleted at each start",
                    path.display()
                )));
            }
        }
        files::create_private_dir(&layout.top(layout::MOUNTS).join(layout::EMPTY))?;
        // Of a process that was killed while it wrote the marker.
        let unfinished = layout.top(layout::MARKER_NEW);
        match files::remove_file(&unfinished) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(StoreError::io("delete", &unfinished)(e));
            }
            _ => {}
        }
        // Under the lock no other process writes it.
        let marker = if let Some(mut marker) = Marker::read(home)? {
            marker.note_release_2(home)?;
            marker
        } else {
            let marker = fresh();
            marker.write(home)?;
            marker
        };
        Self::load(home, marker, Some(lock))
    }

    /// Opens a store for reading, with or without a running owner. Nothing is written.
    pub fn open_read_only(_: &DiskThread, home: &Path) -> Result<Self, StoreError> {
        let marker = Marker::read(home)?.ok_or_else(|| {
            StoreError::Usage(format!(
                "'{}' is not a layer store ({} is missing); name the store's directory",
                home.display(),
                layout::MARKER
            ))
        })?;
        Self::load(home, marker, None)
    }

    fn load(home: &Path, marker: Marker, lock: Option<OwnerLock>) -> Result<Self, StoreError> {
        let snapshots = marker.snapshot_numbers.is_some();
        let layout = if snapshots { Layout::of_snapshots(home) } else { Layout::new(home) };
        let numbers = Numbers::after(marker.snapshot_numbers.unwrap_or(0));
        let folder = lock.is_some().then(|| files::Folder::open(layout.home())).transpose()?;
        let store = Self {
            layout,
            marker: RwLock::new(marker),
            marker_work: Mutex::default(),
            index: RwLock::default(),
            claims: Claims::default(),
            generation: AtomicU64::new(1),
            leftovers: Leftovers::default(),
            folder,
            unsynced: AtomicBool::new(false),
            numbers,
            _lock: lock,
        };
        let home = store.layout.home();
        let mut index = Index::default();
        for entry in fs::read_dir(home).map_err(StoreError::io("list", home))? {
            let entry = entry.map_err(StoreError::io("list", home))?;
            let name = entry.file_name();
            let Some(id) = name.to_str().and_then(|n| n.parse::<LayerId>().ok()) else { continue };
            if !entry.file_type().map_err(StoreError::io("look at", &entry.path()))?.is_dir() {
                continue;
            }
            if snapshots {
                store.read_snapshot(&mut index, id);
            } else if made_by_a_store(&entry.path()) {
                index.insert(store.read_layer(id));
            } else {
                index.strangers.insert(id);
            }
        }
        if snapshots {
            index.share_chains();
            index.doubt(&boot_id());
        }
        *store.index.write() = index;
        Ok(store)
    }

    fn read_layer(&self, id: LayerId) -> Layer {
        let folder = self.layout.layer(&id);
        let (chain, meta) = match chain::read(&folder) {
            Ok(chain) => (chain, self.read_meta(&id).map_err(|e| Arc::from(e.to_string()))),
            Err(e) => (Vec::new(), Err(Arc::from(e.to_string()))),
        };
        Layer {
            id,
            chain: chain.into(),
            meta: meta.map(Arc::new),
            generation: self.next_generation(),
            made_here: false,
        }
    }

    /// Reads a layer's `layer.json`.
    pub(super) fn read_meta(&self, id: &LayerId) -> Result<LayerMeta, StoreError> {
        let path = self.layout.meta_file(id);
        durable::read_json::<LayerMeta>(&path)?.ok_or_else(|| {
            StoreError::corrupt(
                path,
                "it is missing: this store did not make the directory, or the file was lost",
            )
        })
    }

    /// Records an Init durably; does nothing if the last one was the same.
    pub fn record_init(&self, _: &DiskThread, init: InitRecord) -> Result<(), StoreError> {
        let _serial = self.marker_work.lock();
        let before = self.marker();
        if before.init == init {
            return Ok(());
        }
        let home = self.layout.home();
        let changed = Marker { init, ..before.clone() };
        let written = durable::replace_json(&home.join(layout::MARKER), &changed);
        match written {
            Ok(()) => *self.marker.write() = changed,
            Err(failed) => {
                if failed.unsure {
                    // This Init is reported as failed, so a restart must not find it.
                    if let Err(error) = before.write(home) {
                        tracing::error!(%error, "cannot restore the store's marker");
                    }
                    if let Ok(Some(found)) = Marker::read(home) {
                        *self.marker.write() = found;
                    }
                }
                return Err(failed.error);
            }
        }
        Ok(())
    }
}

/// Whether a directory has the files that every layer has; a torn layer has at least one of the two.
fn made_by_a_store(folder: &Path) -> bool {
    [layout::META_FILE, layout::CHAIN_FILE]
        .iter()
        .any(|name| !matches!(fs::symlink_metadata(folder.join(name)), Err(e) if e.kind() == io::ErrorKind::NotFound))
}
