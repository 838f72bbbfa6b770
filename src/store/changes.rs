//! How a layer's folder changes: each change whole or not at all, and known for what it is.
//!
//! ```text
//!   claim(id) ─► look ─► staged files ─► rename ─► sync ──ok──► publish
//!                                          └─ failed? ─► undo, or read again what stands there ─► publish that
//! ```
//!
//! A rename whose sync fails stands, and may be gone after a power cut. Whoever asked is told of a failure, so:
//! * a new layer is taken back (renamed away);
//! * a state that *grants* something (leaving "applying") is written back;
//! * a state that *forbids* something (becoming "applying", handed out, a sandbox) stays, since the forbidden thing may
//!   have begun.
//!
//! In each case `layer.json` is read again afterwards, and memory says what it says. Where it cannot be read the layer
//! is refused everything until [`Store::settle`] could.

use super::{
    DiskThread, Index, Layer, LayerId, LayerMeta, LayerState, LayerWishes, Leftovers, REMOVING_SUFFIX, Store,
    StoreError, chain, durable, layout, now, open::create_layer_dir,
};
use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
};

/// A folder in `staging/` that is deleted unless its content was moved away: by [`Staged::discard`], or on drop.
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

    /// Deletes it now, by a single try: what still stands in it goes later.
    pub fn discard(mut self, _: &DiskThread) {
        delete_staged(&std::mem::take(&mut self.path), &self.leftovers);
    }
}

fn delete_staged(path: &Path, leftovers: &Leftovers) {
    match durable::remove_tree(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            tracing::debug!(path = %path.display(), error = %e, "a staging folder is in use; it is deleted later");
            leftovers.lock().push(path.to_owned());
        }
        _ => {}
    }
}

impl Drop for Staged {
    /// An operation that is given up is dropped on a thread of the runtime, where nothing may wait for a disk; and the
    /// task that ends its worker may be next on that very thread.
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

/// A layer that is no more: its folder lies in `staging/` and is still to be deleted.
#[derive(Debug)]
#[must_use = "its bytes stay on the disk until it is deleted"]
pub struct Doomed {
    folder: Option<Staged>,
}

impl Doomed {
    /// Deletes what is left of the layer, with patience: whoever removes a layer expects its space back.
    pub fn delete(self, thread: &DiskThread, store: &Store) {
        if let Some(folder) = self.folder {
            folder.discard(thread);
        }
        store.clear_leftovers(durable::remove_tree);
    }
}

/// A child that is being made, as its parent knows it; forgotten on drop unless it was published.
struct Expected<'a> {
    store: &'a Store,
    parent: Option<LayerId>,
    id: &'a LayerId,
}

impl Expected<'_> {
    fn arrived(mut self) {
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

impl Store {
    /// A name in `staging/` that nothing has: in a container the process has the same number after each start.
    fn staging_path(&self, id: &LayerId, suffix: &str) -> PathBuf {
        let random = uuid::Uuid::new_v4().simple();
        self.layout.top(layout::STAGING).join(format!("{id}{suffix}.{random}"))
    }

    /// An empty folder in `staging/`.
    pub fn stage(&self, _: &DiskThread, id: &LayerId) -> Result<Staged, StoreError> {
        let path = self.staging_path(id, "");
        self.clear_leftovers(durable::remove_tree);
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

    /// Makes the names in the home durable.
    fn sync_home(&self) -> Result<(), StoreError> {
        let synced = match &self.folder {
            Some(folder) => folder.sync(),
            None => Err(StoreError::Usage("a store that was opened to be read is not changed".into())),
        };
        self.unsynced.store(synced.is_err(), Ordering::Release);
        synced
    }

    /// Creates a layer: `fill` puts files into its folder before it appears under its id. Files that `fill` makes
    /// must be synced by it.
    ///
    /// # Errors
    /// The id exists, the parent does not, the chain would be too long, or what `fill` says. After an error there is
    /// no layer, unless the disk refused to take it back as well.
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
            durable::write_json(&staged.path().join(layout::META_FILE), &meta)?;
            durable::rename_new(staged.path(), &target)
                .map_err(StoreError::io("rename staged layer to", &target))?;
            let Err(error) = self.sync_home() else { return Ok(None) };
            match durable::rename_new(&target, staged.path()) {
                Ok(()) => Err(error.into()),
                Err(undo) => {
                    tracing::error!(%id, %error, %undo, "a layer whose creation failed cannot be taken back");
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
            meta: Ok(meta),
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

    fn chain_below(
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

    /// Changes the meta data of a layer durably: `change` sees the present state and gives the next, or an error.
    ///
    /// # Errors
    /// The layer is gone, damaged, or is no longer the one of `generation`; or the disk refuses, and then the state is
    /// what `layer.json` says (see this module's text).
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

    fn update_claimed<E: From<StoreError>>(
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
        if next == before {
            return Ok(next);
        }
        let path = self.layout.layer_file(id, layout::META_FILE);
        match durable::replace_json(&path, &next) {
            Ok(()) => {
                self.publish(id, Ok(next.clone()));
                Ok(next)
            }
            Err(failed) => {
                if failed.unsure {
                    let grants = before.state == LayerState::Applying && next.state != LayerState::Applying;
                    if grants && let Err(error) = durable::write_json(&path, &before) {
                        tracing::error!(%id, %error, "the state of a layer cannot be put back");
                    }
                    self.index.write().unknown.insert(id.clone());
                    self.settle_one(thread, id);
                }
                Err(failed.error.into())
            }
        }
    }

    fn publish(&self, id: &LayerId, meta: Result<LayerMeta, Arc<str>>) {
        if let Some(layer) = self.index.write().layers.get_mut(id) {
            layer.meta = meta;
        }
    }

    /// Reads again what failed writes left unknown.
    pub fn settle(&self, thread: &DiskThread) {
        let unknown: Vec<LayerId> = self.index.read().unknown.iter().cloned().collect();
        for id in unknown {
            let _claim = self.claims.take(&id);
            self.settle_one(thread, &id);
        }
    }

    /// As [`Store::settle`], for a layer whose folder is claimed. What cannot be read stays unknown.
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
                tracing::error!(%id, %error, "a write of a layer's state failed, and now it cannot be read");
                self.publish(id, Err(Arc::from(error.to_string())));
            }
        }
    }

    /// Moves files from a staging folder into a layer and changes its meta data: the files first, the rename of
    /// `layer.json` last. The files must be synced.
    ///
    /// # Errors
    /// As [`Store::update`]; files that were moved before the failure stay, and mean nothing in the present state.
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
            let folder = durable::Folder::open(&self.layout.layer(id))?;
            for name in files {
                let target = self.layout.layer_file(id, name);
                durable::rename(&staged.path().join(name), &target)
                    .map_err(StoreError::io("rename staged file to", &target))?;
            }
            folder.sync()?;
            Ok(next)
        });
        staged.discard(thread);
        done
    }

    /// Takes a layer out of the store; one that is not there is fine. The folder is renamed away first, then deleted:
    /// a kill in between leaves debris, never half a layer, and never something that blocks a later Remove.
    ///
    /// # Errors
    /// [`StoreError::HasChildren`] names the layers that stand on it, or that are just being made. A folder that no
    /// store made is refused. If the last sync fails the layer is gone, though a power cut may bring it back.
    pub fn take_away(&self, _: &DiskThread, id: &LayerId) -> Result<Doomed, StoreError> {
        let _claim = self.claims.take(id);
        {
            let mut index = self.index.write();
            if let Some(children) = index.children.get(id) {
                return Err(StoreError::HasChildren {
                    id: id.clone(),
                    children: children.iter().cloned().collect(),
                });
            }
            if index.strangers.contains(id) {
                return Err(self.stranger(id));
            }
            if !index.layers.contains_key(id) {
                drop(index);
                // The removal before this one may have failed at its last step, and this is its second try.
                if self.unsynced.load(Ordering::Acquire) {
                    self.sync_home()?;
                }
                return Ok(Doomed { folder: None });
            }
            index.leaving.insert(id.clone());
        }
        let folder = self.layout.layer(id);
        let path = self.staging_path(id, REMOVING_SUFFIX);
        match durable::rename(&folder, &path) {
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
            // Not deleted: what a power cut may bring back must be whole.
            self.leftovers.lock().push(path);
            return Err(error);
        }
        Ok(Doomed { folder: Some(Staged { path, leftovers: self.leftovers.clone() }) })
    }
}
