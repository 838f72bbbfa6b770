//! Opening a store: whose folder it is, who owns it, what lies in it.

use super::{
    DiskThread, Index, InitRecord, Layer, LayerId, LayerMeta, Layout, Leftovers, Marker, OwnerLock, Store,
    StoreError, chain, claims::Claims, durable, guard, layout,
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
    /// Opens the store of `home` for this process alone, making it if there is none. `known` says which entries of a
    /// folder without a marker are no reason to refuse it.
    ///
    /// Reads the index (two small files a layer) and renames nothing; debris is left for [`Store::collect`]. The home
    /// is closed to everybody but its owner, or to all but the group of the container's root if the last Init had maps.
    ///
    /// # Errors
    /// [`StoreError::Locked`] names the present owner; a store of a later format or a damaged marker is refused, and so
    /// is a folder of another user or one that holds something else.
    pub fn open(
        _: &DiskThread,
        home: &Path,
        known: impl Fn(&fs::DirEntry) -> bool,
    ) -> Result<Self, StoreError> {
        // Before anything is changed: a wrong path may be anybody's folder.
        let found = Marker::read(home)?;
        if found.is_none() {
            guard::refuse_foreign(home, &known)?;
        }
        create_private_dir(home)?;
        #[cfg(unix)]
        guard::close_folder(home, found.as_ref().and_then(|marker| marker.init.passing_group()))?;
        let lock = OwnerLock::take(home)?;
        let layout = Layout::new(home);
        for name in [layout::CACHE, layout::SCRATCH, layout::STAGING, layout::MOUNTS] {
            let path = layout.top(name);
            create_private_dir(&path)?;
            if !fs::symlink_metadata(&path).map_err(StoreError::io("look at", &path))?.is_dir() {
                return Err(StoreError::Usage(format!(
                    "'{}' must be a folder of the store's own: what lies in it is deleted at each start",
                    path.display()
                )));
            }
        }
        create_private_dir(&layout.top(layout::MOUNTS).join(layout::EMPTY))?;
        // Under the lock nobody else writes it.
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
    pub fn open_read_only(_: &DiskThread, home: &Path) -> Result<Self, StoreError> {
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
        let folder = lock.is_some().then(|| durable::Folder::open(layout.home())).transpose()?;
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
            _lock: lock,
        };
        let home = store.layout.home();
        let mut index = Index::default();
        for entry in fs::read_dir(home).map_err(StoreError::io("list", home))? {
            let entry = entry.map_err(StoreError::io("list", home))?;
            let name = entry.file_name();
            let Some(id) = name.to_str().and_then(|n| n.parse::<LayerId>().ok()) else { continue };
            if !entry.file_type().is_ok_and(|t| t.is_dir()) {
                continue;
            }
            if made_by_a_store(&entry.path()) {
                index.insert(store.read_layer(id));
            } else {
                index.strangers.insert(id);
            }
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
        Layer { id, chain: chain.into(), meta, generation: self.next_generation(), made_here: false }
    }

    /// What a layer's `layer.json` says now.
    pub(super) fn read_meta(&self, id: &LayerId) -> Result<LayerMeta, StoreError> {
        let path = self.layout.layer_file(id, layout::META_FILE);
        durable::read_json::<LayerMeta>(&path)?.ok_or_else(|| {
            StoreError::corrupt(
                path,
                "it is missing: this store did not make the directory, or the file was lost",
            )
        })
    }

    /// Keeps what Init said, durably; does nothing if it said the same before.
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
                    // The engine is told that this Init failed: a restart must not find it.
                    if let Err(error) = before.write(home) {
                        tracing::error!(%error, "cannot put the store's marker back");
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

/// Whether a folder has what every layer has: a torn one has one of the two at least.
fn made_by_a_store(folder: &Path) -> bool {
    [layout::META_FILE, layout::CHAIN_FILE]
        .iter()
        .any(|name| !matches!(fs::symlink_metadata(folder.join(name)), Err(e) if e.kind() == io::ErrorKind::NotFound))
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
        use lcow_sys::windows::security::{SecurityDescriptor, create_dir};
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

/// Makes a folder that will be a layer's: its owner's alone until a view of it is shown.
pub(super) fn create_layer_dir(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::DirBuilderExt::mode(&mut fs::DirBuilder::new(), 0o700).create(path);
    #[cfg(windows)]
    {
        use lcow_sys::windows::security::{SecurityDescriptor, create_dir};
        create_dir(path, &SecurityDescriptor::parse(LAYER_ACCESS)?)
    }
}

/// Who may use the store's own folders: the system, administrators, and whoever made them. Files inherit it.
#[cfg(windows)]
pub(super) const PRIVATE_ACCESS: &str = "D:P(A;OICI;GA;;;SY)(A;OICI;GA;;;BA)(A;OICI;GA;;;OW)";
/// Who may use a layer's folder: as above, and virtual machines (the group `S-1-5-83-0`) may read. A sandbox that a
/// machine is to write is granted to that machine alone when it is attached.
#[cfg(windows)]
pub(super) const LAYER_ACCESS: &str =
    "D:P(A;OICI;GA;;;SY)(A;OICI;GA;;;BA)(A;OICI;GA;;;OW)(A;OICI;GRGX;;;S-1-5-83-0)";
