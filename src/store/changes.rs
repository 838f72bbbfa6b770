//! Changes of a layer's directory: each is complete or undone, and memory knows which.
//!
//! ```text
//!   claim(id) ─► look ─► staged files ─► rename ─► sync ──ok──► publish
//!                                          └─ failed? ─► undo, or read again what stands there ─► publish that
//! ```
//!
//! A rename whose sync fails has happened, but a power cut may undo it. The caller gets an error, so:
//! * a new layer is renamed away again;
//! * a state that *grants* something (leaving "applying") is written back;
//! * a state that *forbids* something (becoming "applying", handed out, a sandbox) stays, because what it forbids may
//!   already have begun.
//!
//! In each case `layer.json` is read again afterwards, and memory follows it. While it cannot be read, every operation
//! on the layer is refused; [`Store::settle`] tries again.

use super::{
    DiskThread, Index, Layer, LayerId, LayerMeta, LayerState, LayerWishes, Leftovers, REMOVING_SUFFIX, Store,
    StoreError, chain, durable, files, layout, now,
};
use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
};

/// A directory in `staging/`. [`Staged::discard`] or a drop deletes what was not moved out of it.
#[derive(Debug)]
pub struct Staged {
    path: PathBuf,
    leftovers: Leftovers,
}

impl Staged {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Deletes it now, with one attempt; what is still in use is deleted later.
    pub fn discard(mut self, _: &DiskThread) {
        delete_staged(&std::mem::take(&mut self.path), &self.leftovers);
    }
}

fn delete_staged(path: &Path, leftovers: &Leftovers) {
    match files::remove_tree(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            tracing::debug!(path = %path.display(), error = %e, "a staging directory is in use; it will be deleted later");
            leftovers.lock().push(path.to_owned());
        }
        _ => {}
    }
}

impl Drop for Staged {
    /// A cancelled operation is dropped on a thread of the runtime, which must not wait for a disk; and the task that
    /// ends the operation's worker may be queued on that same thread.
    fn drop(&mut self) {
        let path = std::mem::take(&mut self.path);
        if path.as_os_str().is_empty() {
            return;
        }
        let leftovers = self.leftovers.clone();
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                runtime.spawn_blocking(move || delete_staged(&path, &leftovers));
            }
            Err(_) => delete_staged(&path, &leftovers),
        }
    }
}

/// A removed layer whose directory in `staging/` still has to be deleted.
#[derive(Debug)]
#[must_use = "its bytes stay on the disk until it is deleted"]
pub struct Doomed {
    folder: Option<Staged>,
}

impl Doomed {
    /// A directory in `staging/` that holds a removed layer.
    pub(super) fn at(path: PathBuf, leftovers: &Leftovers) -> Self {
        Self { folder: Some(Staged { path, leftovers: leftovers.clone() }) }
    }

    /// Deletes what is left of the layer and retries earlier leftovers: the caller of Remove expects the space back.
    pub fn delete(self, thread: &DiskThread, store: &Store) {
        if let Some(folder) = self.folder {
            folder.discard(thread);
        }
        store.clear_leftovers(files::remove_tree);
    }
}

/// Registers a child that is being created with its parent; a drop unregisters it unless it was published.
pub(super) struct Expected<'a> {
    pub(super) store: &'a Store,
    pub(super) parent: Option<LayerId>,
    pub(super) id: &'a LayerId,
}

impl Expected<'_> {
    pub(super) fn arrived(mut self) {
        self.parent = None;
    }
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        if let Some(parent) = &self.parent {
            self.store.index.write().drop_child(parent, self.id);
        }
    }
}

/// A layer that gets no new children ([`Store::close_to_children`]).
#[derive(Debug)]
#[must_use = "children may be created again when it is dropped"]
pub struct Closed<'a> {
    store: &'a Store,
    id: LayerId,
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.store.index.write().leaving.remove(&self.id);
    }
}

impl Store {
    /// An unused name in `staging/`. It is random, because in a container the process has the same number after each
    /// start.
    pub(super) fn staging_path(&self, id: &LayerId, suffix: &str) -> PathBuf {
        let random = uuid::Uuid::new_v4().simple();
        self.layout.top(layout::STAGING).join(format!("{id}{suffix}.{random}"))
    }

    /// An empty directory in `staging/`.
    pub fn stage(&self, _: &DiskThread, id: &LayerId) -> Result<Staged, StoreError> {
        let path = self.staging_path(id, "");
        self.clear_leftovers(files::remove_tree);
        files::create_layer_dir(&path).map_err(StoreError::io("create", &path))?;
        Ok(Staged { path, leftovers: self.leftovers.clone() })
    }

    /// Deletes what could not be deleted before. What still cannot be deleted is left for the next call, and finally
    /// for the next start.
    pub(super) fn clear_leftovers(&self, delete: impl Fn(&Path) -> io::Result<()>) {
        let leftovers = std::mem::take(&mut *self.leftovers.lock());
        for path in leftovers {
            match delete(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), error = %e, "cannot delete a staging directory yet");
                    self.leftovers.lock().push(path);
                }
                _ => {}
            }
        }
    }

    /// Deletes what could not be deleted before.
    pub fn retry_leftovers(&self, _: &DiskThread) {
        self.clear_leftovers(files::remove_tree);
    }

    /// Syncs the home directory.
    pub(super) fn sync_home(&self) -> Result<(), StoreError> {
        let synced = match &self.folder {
            Some(folder) => folder.sync(),
            None => Err(StoreError::Usage("the store was opened read-only".into())),
        };
        self.unsynced.store(synced.is_err(), Ordering::Release);
        synced
    }

    /// Syncs the home if the directory of `id` was made without that: what is said of it durably must have a name.
    pub(super) fn sync_name(&self, id: &LayerId) -> Result<(), StoreError> {
        if self.index.read().nameless.contains(id) {
            self.sync_home()?;
            self.index.write().nameless.remove(id);
        }
        Ok(())
    }

    /// Creates a layer: `fill` puts files into its directory, and syncs them, before it appears under its id. The
    /// directory itself is synced after it.
    ///
    /// # Errors
    /// The id exists, the parent does not, the chain would be too long, or `fill` failed. After an error there is no
    /// layer, unless the disk refused to undo the creation as well.
    pub fn create<E: From<StoreError>>(
        &self,
        thread: &DiskThread,
        id: &LayerId,
        parent: Option<&LayerId>,
        state: LayerState,
        wishes: LayerWishes,
        fill: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<(), E> {
        let _claim = self.claims.take(id);
        let (chain, expected) = {
            let mut index = self.index.write();
            if let Some(other) = index.same_folder(id) {
                return Err(StoreError::Exists(other).into());
            }
            if index.strangers.contains(id) {
                return Err(self.stranger(id).into());
            }
            let chain = Self::chain_below(&index, id, parent)?;
            if let Some(parent) = parent {
                index.add_child(parent.clone(), id.clone());
            }
            (chain, Expected { store: self, parent: parent.cloned(), id })
        };
        let staged = self.stage(thread, id)?;
        let target = self.layout.layer(id);
        let meta = LayerMeta::new(state, now(), wishes);
        let make = || {
            fill(staged.path())?;
            chain::write(staged.path(), &chain)?;
            durable::new_json(&staged.path().join(layout::META_FILE), &meta)?;
            files::sync_dir(staged.path())?;
            files::rename_new(staged.path(), &target)
                .map_err(StoreError::io("rename staged layer to", &target))?;
            let Err(error) = self.sync_home() else { return Ok(None) };
            match files::rename_new(&target, staged.path()) {
                Ok(()) => Err(error.into()),
                Err(undo) => {
                    tracing::error!(%id, %error, %undo, "cannot undo the creation of a layer");
                    Ok(Some(error))
                }
            }
        };
        let made: Result<Option<StoreError>, E> = make();
        staged.discard(thread);
        let failed = made?;
        let layer = Layer {
            id: id.clone(),
            chain: chain.into(),
            meta: Ok(Arc::new(meta)),
            generation: self.next_generation(),
            made_here: true,
        };
        self.index.write().insert(layer);
        expected.arrived();
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    fn stranger(&self, id: &LayerId) -> StoreError {
        StoreError::Usage(format!(
            "'{}' was not made by this store ({} and {} are missing): it is left alone; move it away",
            self.layout.layer(id).display(),
            layout::META_FILE,
            layout::CHAIN_FILE
        ))
    }

    pub(super) fn chain_below(
        index: &Index,
        id: &LayerId,
        parent: Option<&LayerId>,
    ) -> Result<Vec<LayerId>, StoreError> {
        let Some(parent) = parent else { return Ok(Vec::new()) };
        let missing = || StoreError::MissingParent { id: id.clone(), parent: parent.clone() };
        let layer =
            index.layers.get(parent).filter(|l| !index.leaving.contains(&l.id)).ok_or_else(missing)?;
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

    /// Changes the metadata of a layer durably: `change` gets the current metadata and returns the new ones, or an
    /// error.
    ///
    /// # Errors
    /// The layer is gone, damaged, or no longer the one of `generation`; or the disk fails, and then the state is what
    /// `layer.json` says (see the module's documentation).
    pub fn update<E: From<StoreError>>(
        &self,
        thread: &DiskThread,
        id: &LayerId,
        generation: u64,
        change: impl FnOnce(&LayerMeta) -> Result<LayerMeta, E>,
    ) -> Result<LayerMeta, E> {
        let _claim = self.claims.take(id);
        self.update_claimed(thread, id, generation, change)
    }

    pub(super) fn update_claimed<E: From<StoreError>>(
        &self,
        thread: &DiskThread,
        id: &LayerId,
        generation: u64,
        change: impl FnOnce(&LayerMeta) -> Result<LayerMeta, E>,
    ) -> Result<LayerMeta, E> {
        self.settle_one(thread, id);
        let before = {
            let index = self.index.read();
            let layer = index
                .layers
                .get(id)
                .filter(|l| l.generation == generation)
                .ok_or_else(|| StoreError::NotFound(id.clone()))?;
            layer
                .meta
                .clone()
                .map_err(|reason| StoreError::WrongState { id: id.clone(), reason: reason.to_string() })?
        };
        let next = change(&before)?;
        if next == *before {
            return Ok(next);
        }
        self.sync_name(id)?;
        let path = self.layout.meta_file(id);
        match durable::replace_json(&path, &next) {
            Ok(()) => {
                self.publish(id, Ok(next.clone()));
                Ok(next)
            }
            Err(failed) => {
                if failed.unsure {
                    let grants = before.state == LayerState::Applying && next.state != LayerState::Applying;
                    if grants && let Err(error) = durable::write_json(&path, &*before) {
                        tracing::error!(%id, %error, "cannot restore the state of a layer");
                    }
                    self.index.write().unknown.insert(id.clone());
                    self.settle_one(thread, id);
                }
                Err(failed.error.into())
            }
        }
    }

    pub(super) fn publish(&self, id: &LayerId, meta: Result<LayerMeta, Arc<str>>) {
        self.index.write().publish(id, meta.map(Arc::new));
    }

    /// Reads the metadata that failed writes left uncertain.
    pub fn settle(&self, thread: &DiskThread) {
        let unknown: Vec<LayerId> = self.index.read().unknown.iter().cloned().collect();
        for id in unknown {
            let _claim = self.claims.take(&id);
            self.settle_one(thread, &id);
        }
    }

    /// As [`Store::settle`], for a layer whose directory is claimed. What cannot be read stays uncertain.
    fn settle_one(&self, _: &DiskThread, id: &LayerId) {
        if !self.index.read().unknown.contains(id) {
            return;
        }
        match self.read_meta(id) {
            Ok(meta) => {
                self.index.write().unknown.remove(id);
                self.publish(id, Ok(meta));
            }
            Err(error) => {
                tracing::error!(%id, %error, "the state of a layer can be neither written nor read");
                self.publish(id, Err(Arc::from(error.to_string())));
            }
        }
    }

    /// Moves files from a staging directory into a layer and changes its metadata: the files first, the rename of
    /// `layer.json` last. The files must be synced.
    ///
    /// # Errors
    /// As [`Store::update`]; files that were moved before the failure stay; they have no meaning in the current state.
    pub fn commit<E: From<StoreError>>(
        &self,
        thread: &DiskThread,
        id: &LayerId,
        generation: u64,
        staged: Staged,
        files: &[&str],
        change: impl FnOnce(&LayerMeta) -> Result<LayerMeta, E>,
    ) -> Result<LayerMeta, E> {
        let _claim = self.claims.take(id);
        let done = self.update_claimed(thread, id, generation, |meta| {
            let next = change(meta)?;
            let folder = files::Folder::open(&self.layout.layer(id))?;
            for name in files {
                let target = self.layout.layer_file(id, name);
                files::rename(&staged.path().join(name), &target)
                    .map_err(StoreError::io("rename staged file to", &target))?;
            }
            folder.sync()?;
            Ok(next)
        });
        staged.discard(thread);
        done
    }

    /// Refuses new children of a layer that is about to be unmounted and removed, until the guard is dropped: a removal
    /// that a child's creation would make fail must not unmount anything first.
    ///
    /// # Errors
    /// [`StoreError::HasChildren`], as [`Store::take_away`].
    pub fn close_to_children(&self, id: &LayerId) -> Result<Closed<'_>, StoreError> {
        let mut index = self.index.write();
        index.has_no_children(id)?;
        index.leaving.insert(id.clone());
        Ok(Closed { store: self, id: id.clone() })
    }

    /// Takes a layer out of the store; succeeds if there is none. The directory is renamed away first and deleted by
    /// the caller: a kill in between leaves debris, never half a layer, and nothing that blocks a later Remove.
    ///
    /// # Errors
    /// [`StoreError::HasChildren`] names the children, those being created included. A directory that no store made is
    /// refused. If the last sync fails the layer is gone, but a power cut may bring it back.
    pub fn take_away(&self, _: &DiskThread, id: &LayerId) -> Result<Doomed, StoreError> {
        let _claim = self.claims.take(id);
        {
            let mut index = self.index.write();
            index.has_no_children(id)?;
            if index.strangers.contains(id) {
                return Err(self.stranger(id));
            }
            if !index.layers.contains_key(id) {
                drop(index);
                // An earlier removal may have failed at its last step; this is its retry.
                if self.unsynced.load(Ordering::Acquire) {
                    self.sync_home()?;
                }
                return Ok(Doomed { folder: None });
            }
            index.leaving.insert(id.clone());
        }
        let folder = self.layout.layer(id);
        let path = self.staging_path(id, REMOVING_SUFFIX);
        match files::rename(&folder, &path) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound && !folder.exists() => {
                self.index.write().remove(id);
                return Ok(Doomed { folder: None });
            }
            Err(e) => {
                self.index.write().leaving.remove(id);
                return Err(StoreError::io("rename away", &folder)(e));
            }
        }
        self.index.write().remove(id);
        if let Err(error) = self.sync_home() {
            // Not deleted: what a power cut may bring back must be complete.
            self.leftovers.lock().push(path);
            return Err(error);
        }
        Ok(Doomed { folder: Some(Staged { path, leftovers: self.leftovers.clone() }) })
    }
}
