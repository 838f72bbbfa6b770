//! Changes of snapshots: created, committed under a name, removed.
//!
//! ```text
//!   create   number ─► staging/<id>.<random>/{files, snapshot.json} ─► rename to <id>/ ─► index, names
//!   commit   name reserved ─► snapshot.json replaced: name, kind, labels, chain ─► index, names
//!   vanish   index and names only ─► discard, later: <id>/ ─► staging/ ─► deleted
//! ```
//!
//! Invariants:
//! * Checks of names and parents, and their reservation, are one step under the index lock; codes of refusals are those
//!   of containerd's own snapshotters (`core/snapshots/storage/bolt.go`).
//! * `vanish` touches no disk: containerd holds a lock over Remove without a time limit. What a kill brings back is a
//!   snapshot that containerd does not know; its next garbage collection removes it.
//! * A snapshot's number is never given twice, also over crashes: numbers are reserved in the marker, durably, in blocks.
//!
//! Called by `driver::snapshots`.

use super::{
    DiskThread, Index, Layer, LayerId, LayerMeta, LayerState, LayerWishes, Marker, Member, Moment,
    REMOVING_SUFFIX, SnapshotKind, SnapshotMeta, SnapshotUsage, Store, StoreError,
    changes::{Doomed, Expected},
    durable, files, layout, now,
    numbers::RESERVED_AT_ONCE,
    refusal::SnapshotRefusal,
    snapshot::{snapshot_id, snapshot_number},
};
use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
    sync::Arc,
};

/// A snapshot to be created.
#[derive(Debug, Clone)]
pub struct NewSnapshot {
    /// Its key.
    pub key: String,
    /// View or active.
    pub kind: SnapshotKind,
    /// Name of its parent.
    pub parent: Option<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Created or sandbox.
    pub state: LayerState,
    /// The container whose scratch disk it uses instead of one of its own.
    pub scratch_of: Option<LayerId>,
    /// Size and such.
    pub wishes: LayerWishes,
    /// Whether it must survive a power cut that follows the reply.
    pub durable: bool,
}

/// What a Commit gives to a snapshot.
#[derive(Debug, Clone)]
pub struct NewName {
    /// The name.
    pub name: String,
    /// The labels, which replace those of the active snapshot.
    pub labels: BTreeMap<String, String>,
    /// Name of the parent, for a snapshot that was prepared without one.
    pub parent: Option<String>,
    /// What it takes, for good.
    pub usage: Option<SnapshotUsage>,
    /// Its data are not on the disk yet; the id of this boot.
    pub unsynced: Option<String>,
}

/// A snapshot that is gone from the index, with its directory still in place.
#[derive(Debug)]
#[must_use = "its bytes stay on the disk until it is discarded"]
pub struct Vanished {
    /// What was removed.
    pub layer: Layer,
}

/// A name that is being given to a snapshot; a drop gives it back.
struct Coming<'a> {
    store: &'a Store,
    name: Box<str>,
    /// The snapshot that is being committed, whose scratch disk is not to be shared meanwhile.
    committing: Option<LayerId>,
}

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        let mut index = self.store.index.write();
        index.coming.remove(&self.name);
        if let Some(id) = &self.committing {
            index.leaving.remove(id);
        }
    }
}

impl Index {
    fn is_taken(&self, name: &str) -> bool {
        self.names.contains_key(name) || self.coming.contains(name)
    }

    /// The committed snapshot `name`, as the parent of another.
    fn parent_named(
        &self,
        name: &str,
        not_committed: fn(String) -> SnapshotRefusal,
    ) -> Result<LayerId, StoreError> {
        let missing = || SnapshotRefusal::NotFound(name.to_owned());
        let id = self.names.get(name).ok_or_else(missing)?;
        let layer = self.layers.get(id).filter(|l| !self.leaving.contains(&l.id)).ok_or_else(missing)?;
        if layer.snapshot().is_none_or(|s| s.kind != SnapshotKind::Committed) {
            return Err(not_committed(format!("parent '{name}' is not a committed snapshot")).into());
        }
        Ok(id.clone())
    }

    /// Makes chains that were read from files refer to the ids of the index, and equal chains to one allocation: a node has
    /// thousands of snapshots.
    pub(super) fn share_chains(&mut self) {
        let ids: HashSet<LayerId> = self.layers.keys().cloned().collect();
        let mut chains: HashSet<Arc<[LayerId]>> = HashSet::new();
        for layer in self.layers.values_mut() {
            let own: Arc<[LayerId]> = match chains.get(&layer.chain) {
                Some(known) => known.clone(),
                None => layer.chain.iter().map(|id| ids.get(id).unwrap_or(id).clone()).collect(),
            };
            chains.insert(own.clone());
            if let Ok(meta) = &mut layer.meta
                && let Some(snapshot) = &mut Arc::make_mut(meta).snapshot
            {
                snapshot.chain = own.clone();
            }
            layer.chain = own;
        }
    }

    /// Checks that the scratch disk of a container can be shared.
    fn check_scratch(&self, owner: &LayerId) -> Result<(), StoreError> {
        let shareable = self.layers.get(owner).filter(|layer| {
            layer.snapshot().is_some_and(|s| s.kind == SnapshotKind::Active && s.scratch_of.is_none())
                && layer.meta.as_ref().is_ok_and(|meta| meta.state == LayerState::Sandbox)
                && !self.leaving.contains(owner)
        });
        shareable.map(|_| ()).ok_or_else(|| {
            SnapshotRefusal::Precondition(format!(
                "the scratch disk of snapshot {owner} cannot be shared: the snapshot was removed or committed"
            ))
            .into()
        })
    }

    /// Marks snapshots that a power cut may have cut, by their own mark or file or those of an ancestor, so that they
    /// are not listed.
    pub(super) fn doubt(&mut self, boot: &str) {
        let bad = |layer: &Layer| {
            self.doubtful.contains(&layer.id)
                || layer.snapshot().is_none_or(|snapshot| snapshot.may_be_cut(boot))
        };
        let stands_on_bad =
            |layer: &Layer| bad(layer) || layer.chain.iter().any(|a| self.layers.get(a).is_none_or(bad));
        let shares_bad = |layer: &Layer| {
            layer.scratch_of().is_some_and(|owner| self.layers.get(owner).is_none_or(stands_on_bad))
        };
        let doubtful: Vec<(LayerId, Option<Box<str>>)> = self
            .layers
            .values()
            .filter(|layer| stands_on_bad(layer) || shares_bad(layer))
            .map(|layer| (layer.id.clone(), layer.snapshot_name().map(Into::into)))
            .collect();
        for (id, name) in doubtful {
            if let Some(name) = name
                && self.names.get(&name) == Some(&id)
            {
                self.names.remove(&name);
            }
            self.doubtful.insert(id);
        }
    }
}

impl Store {
    /// Opens a store of snapshots for this process alone; creates it if there is none.
    ///
    /// # Errors
    /// As [`Store::open`]; a store of the Docker face is refused.
    pub fn open_snapshots(thread: &DiskThread, home: &Path) -> Result<Self, StoreError> {
        let fresh = || Marker { snapshot_numbers: Some(0), ..Marker::new() };
        let store = Self::open_as(thread, home, |_| false, fresh)?;
        if !store.layout.holds_snapshots() {
            return Err(StoreError::Usage(format!(
                "'{}' is the layer store of a Docker plugin, which containerd cannot use; give containerd's snapshots a \
                 directory of their own (--containerd-root)",
                home.display()
            )));
        }
        Ok(store)
    }

    /// Reads a snapshot's directory at the start.
    ///
    /// A name becomes free by a Remove, which a kill or a power cut may undo. Of two snapshots of one name the newer one was
    /// acknowledged after the removal of the other, which is doubtful.
    pub(super) fn read_snapshot(&self, index: &mut Index, id: LayerId) {
        let meta = self.read_meta(&id).map_err(|e| Arc::from(e.to_string()));
        let chain = meta.as_ref().ok().and_then(|meta| Some(meta.snapshot.as_ref()?.chain.clone()));
        let layer = Layer {
            id: id.clone(),
            chain: chain.unwrap_or_default(),
            meta: meta.map(Arc::new),
            generation: self.next_generation(),
            made_here: false,
        };
        let name: Option<Box<str>> = layer.snapshot_name().map(Into::into);
        let rival = name.as_ref().and_then(|name| index.names.get(name).cloned());
        index.insert(layer);
        if let (Some(name), Some(rival)) = (name, rival) {
            let rival_is_newer = snapshot_number(&rival) > snapshot_number(&id);
            let (newer, older) = if rival_is_newer { (rival, id) } else { (id, rival) };
            index.names.insert(name, newer);
            index.doubtful.insert(older);
        }
    }

    /// The snapshot of a key or name.
    pub fn snapshot_named(&self, name: &str) -> Result<Member, StoreError> {
        let index = self.index.read();
        let id = index.names.get(name).ok_or_else(|| SnapshotRefusal::NotFound(name.to_owned()))?;
        index.member(id)
    }

    /// Calls `visit` with each snapshot that is listed and the name of its parent. The index is locked meanwhile.
    pub fn each_snapshot(&self, mut visit: impl FnMut(&Layer, &SnapshotMeta, &str)) {
        let index = self.index.read();
        for layer in index.names.values().filter_map(|id| index.layers.get(id)) {
            let Some(snapshot) = layer.snapshot() else { continue };
            let parent =
                layer.parent().and_then(|id| index.layers.get(id)?.snapshot_name()).unwrap_or_default();
            visit(layer, snapshot, parent);
        }
    }

    /// All snapshots that are listed.
    pub fn snapshots_listed(&self) -> Vec<Member> {
        let index = self.index.read();
        index.names.values().filter_map(|id| index.member(id).ok()).collect()
    }

    /// The name of a committed snapshot, by its id.
    pub fn snapshot_name(&self, id: &LayerId) -> Option<String> {
        self.index.read().layers.get(id)?.snapshot_name().map(str::to_owned)
    }

    /// Snapshots that are not listed because a power cut may have cut them or what they stand on, children first.
    pub fn doubtful(&self) -> Vec<Layer> {
        let index = self.index.read();
        let mut found: Vec<Layer> =
            index.doubtful.iter().filter_map(|id| index.layers.get(id).cloned()).collect();
        // What uses the scratch disk of another has no children itself.
        found.sort_by_key(|layer| (layer.scratch_of().is_none(), std::cmp::Reverse(layer.chain.len())));
        found
    }

    /// Whether a power cut may leave a `snapshot.json` as this one is: there is none, or it was not synced and is cut.
    pub fn has_no_record(&self, _: &DiskThread, id: &LayerId) -> bool {
        durable::is_cut(&self.layout.meta_file(id))
    }

    /// The id of a new snapshot.
    fn new_id(&self) -> Result<LayerId, StoreError> {
        let mut numbers = self.numbers.0.lock();
        loop {
            let (next, reserved) = *numbers;
            if next >= reserved {
                let _serial = self.marker_work.lock();
                let until = reserved + RESERVED_AT_ONCE;
                let changed = Marker { snapshot_numbers: Some(until), ..self.marker() };
                changed.write(self.layout.home())?;
                *self.marker.write() = changed;
                numbers.1 = until;
            }
            numbers.0 = next + 1;
            if let Some(id) = snapshot_id(next) {
                return Ok(id);
            }
        }
    }

    /// Reserves a name that is not taken.
    fn reserve(&self, index: &mut Index, name: &str) -> Result<Coming<'_>, StoreError> {
        if index.is_taken(name) {
            return Err(SnapshotRefusal::Exists(name.to_owned()).into());
        }
        index.coming.insert(name.into());
        Ok(Coming { store: self, name: name.into(), committing: None })
    }

    /// Creates a snapshot: `fill` puts files into its directory before it appears under its key. What is to be durable has
    /// its files synced before its record is written, because a record makes a snapshot of what is beside it; record and
    /// names are synced after the rename, so that one commit of the disk's journal does for all of them. A power cut in
    /// between leaves the snapshot, nothing, or a directory whose record is missing or cut, which the next start removes.
    ///
    /// # Errors
    /// The key is taken; the parent does not exist, is not committed, or its chain is too long; the scratch disk cannot be
    /// shared; or `fill` failed.
    pub fn create_snapshot<E: From<StoreError>>(
        &self,
        thread: &DiskThread,
        new: NewSnapshot,
        fill: impl FnOnce(&LayerId, &Path) -> Result<(), E>,
    ) -> Result<Member, E> {
        // Numbers are plenty; one that is not used is lost.
        let id = &self.new_id()?;
        let (chain, expected, sharing, _coming) = {
            let mut index = self.index.write();
            let coming = self.reserve(&mut index, &new.key)?;
            let parent = new.parent.as_deref().map(|name| index.parent_named(name, SnapshotRefusal::Invalid));
            // `coming` must not be dropped under the lock, which its drop takes.
            let parent = match parent.transpose() {
                Ok(parent) => parent,
                Err(error) => {
                    drop(index);
                    return Err(error.into());
                }
            };
            let chain = Self::chain_below(&index, id, parent.as_ref());
            let shared = new.scratch_of.as_ref().map_or(Ok(()), |owner| index.check_scratch(owner));
            let chain = match chain.and_then(|chain| shared.map(|()| chain)) {
                Ok(chain) => chain,
                Err(error) => {
                    drop(index);
                    return Err(error.into());
                }
            };
            for below in parent.iter().chain(&new.scratch_of) {
                index.add_child(below.clone(), id.clone());
            }
            let expected = |below| Expected { store: self, parent: below, id };
            (chain, expected(parent), expected(new.scratch_of.clone()), coming)
        };
        let chain: Arc<[LayerId]> = chain.into();
        let at = Moment::now();
        let snapshot = SnapshotMeta {
            name: new.key,
            kind: new.kind,
            chain: chain.clone(),
            created: at,
            updated: at,
            labels: new.labels,
            usage: None,
            scratch_of: new.scratch_of,
            unsynced: None,
        };
        let meta = LayerMeta { snapshot: Some(snapshot), ..LayerMeta::new(new.state, now(), new.wishes) };
        let meta = Arc::new(meta);
        let staged = self.staging_path(id, "");
        files::create_layer_dir(&staged).map_err(StoreError::io("create", &staged))?;
        let doomed = Doomed::at(staged.clone(), &self.leftovers);
        let target = self.layout.layer(id);
        let make = || {
            fill(id, &staged)?;
            if new.durable && new.state == LayerState::Sandbox {
                files::sync_files(&staged)?;
            }
            durable::new_json_unsynced(&staged.join(layout::SNAPSHOT_FILE), &*meta)?;
            files::rename_new(&staged, &target)
                .map_err(StoreError::io("rename staged snapshot to", &target))?;
            let sync = || {
                files::sync_named(&target.join(layout::SNAPSHOT_FILE))?;
                files::sync_dir(&target)?;
                self.sync_home()
            };
            if new.durable
                && let Err(error) = sync()
            {
                // Its debris if even this fails: nothing refers to it.
                let _ = files::rename_new(&target, &staged);
                return Err(error.into());
            }
            Ok::<_, E>(())
        };
        let made = make();
        doomed.delete(thread, self);
        made?;
        let layer = Layer {
            id: id.clone(),
            chain,
            meta: Ok(meta.clone()),
            generation: self.next_generation(),
            made_here: true,
        };
        let mut index = self.index.write();
        index.insert(layer.clone());
        if !new.durable {
            index.nameless.insert(id.clone());
        }
        drop(index);
        expected.arrived();
        sharing.arrived();
        Ok(Member { layer, meta })
    }

    /// Commits the active snapshot `key` under a name: key, kind, labels and chain change by one rename.
    ///
    /// # Errors
    /// The name is taken, the key is unknown, or it is not an active snapshot that can be committed; the parent does not
    /// fit. The disk fails: then the state is what `snapshot.json` says.
    pub fn commit_snapshot(&self, _: &DiskThread, key: &str, new: NewName) -> Result<Member, StoreError> {
        let (id, _coming) = {
            let mut index = self.index.write();
            if index.is_taken(&new.name) {
                return Err(SnapshotRefusal::Exists(new.name).into());
            }
            let id =
                index.names.get(key).cloned().ok_or_else(|| SnapshotRefusal::NotFound(key.to_owned()))?;
            let snapshot = index.layers.get(&id).and_then(Layer::snapshot);
            let active = snapshot.filter(|s| s.kind == SnapshotKind::Active);
            // An active snapshot has no children but those that share its scratch disk.
            let shares = |s: &SnapshotMeta| s.scratch_of.is_some() || index.children.contains_key(&id);
            if active.is_some_and(shares) {
                return Err(SnapshotRefusal::Precondition(format!(
                    "snapshot '{key}' shares its scratch disk with another container and cannot be committed; make a layer of \
                     its difference instead"
                ))
                .into());
            }
            // Others stay what they are, and are refused below.
            let committing = active.is_some().then(|| id.clone());
            index.leaving.extend(committing.clone());
            index.coming.insert(new.name.as_str().into());
            (id, Coming { store: self, name: new.name.as_str().into(), committing })
        };
        let _claim = self.claims.take(&id);
        let (layer, before) = {
            let index = self.index.read();
            // It may have been removed or committed while its claim was waited for.
            let gone = || SnapshotRefusal::NotFound(key.to_owned());
            if index.names.get(key) != Some(&id) {
                return Err(gone().into());
            }
            let member = index.member(&id)?;
            (member.layer, member.meta)
        };
        let snapshot = before.snapshot.clone().ok_or_else(|| SnapshotRefusal::NotFound(key.to_owned()))?;
        if snapshot.kind != SnapshotKind::Active {
            return Err(SnapshotRefusal::Precondition(format!("snapshot '{key}' is not active")).into());
        }
        if before.state == LayerState::Applying {
            return Err(SnapshotRefusal::Precondition(format!(
                "the layer of snapshot '{key}' is incomplete; remove the snapshot and prepare it again"
            ))
            .into());
        }
        let chain = self.chain_of_commit(&layer, new.parent.as_deref())?;
        let at = Moment::now();
        let next = LayerMeta {
            snapshot: Some(SnapshotMeta {
                name: new.name,
                kind: SnapshotKind::Committed,
                chain,
                created: at,
                updated: at,
                labels: new.labels,
                usage: new.usage,
                scratch_of: None,
                unsynced: new.unsynced.clone(),
            }),
            ..LayerMeta::clone(&before)
        };
        let path = self.layout.meta_file(&id);
        if new.unsynced.is_some() {
            durable::replace_json_unsynced(&path, &next)?;
            self.publish(&id, Ok(next));
            return self.index.read().member(&id);
        }
        self.sync_name(&id)?;
        if let Err(failed) = durable::replace_json(&path, &next) {
            if failed.unsure {
                // The caller gets an error, so the key must still be there.
                if let Err(error) = durable::write_json(&path, &*before) {
                    tracing::error!(%id, %error, "cannot restore the state of a snapshot");
                    self.index.write().unknown.insert(id.clone());
                }
            }
            return Err(failed.error);
        }
        self.publish(&id, Ok(next));
        self.index.read().member(&id)
    }

    /// The chain that a snapshot gets by its Commit with `parent`.
    fn chain_of_commit(&self, layer: &Layer, parent: Option<&str>) -> Result<Arc<[LayerId]>, StoreError> {
        let Some(parent) = parent else { return Ok(layer.chain.clone()) };
        let index = self.index.read();
        if let Some(own) = layer.parent() {
            let name = index.layers.get(own).and_then(Layer::snapshot_name).unwrap_or_default();
            if name == parent {
                return Ok(layer.chain.clone());
            }
            return Err(SnapshotRefusal::Invalid(format!(
                "the snapshot was prepared on '{name}' and cannot be committed on '{parent}'"
            ))
            .into());
        }
        let id = index.parent_named(parent, SnapshotRefusal::Precondition)?;
        Ok(Self::chain_below(&index, &layer.id, Some(&id))?.into())
    }

    /// Changes the labels of a snapshot, or notes something else in its record.
    ///
    /// # Errors
    /// It is gone, or the disk fails.
    pub fn update_snapshot(
        &self,
        thread: &DiskThread,
        id: &LayerId,
        change: impl FnOnce(&mut SnapshotMeta),
    ) -> Result<LayerMeta, StoreError> {
        let generation = self.find(id)?.generation;
        self.update::<StoreError>(thread, id, generation, |meta| {
            let mut next = meta.clone();
            if let Some(snapshot) = &mut next.snapshot {
                change(snapshot);
            }
            Ok(next)
        })
    }

    /// Takes a snapshot out of the index. Touches no disk and waits for nothing; its directory stays for
    /// [`Store::discard`].
    ///
    /// # Errors
    /// It is unknown, or has children, those being created included.
    pub fn vanish(&self, name: &str) -> Result<Vanished, StoreError> {
        let mut index = self.index.write();
        let id = index.names.get(name).cloned().ok_or_else(|| SnapshotRefusal::NotFound(name.to_owned()))?;
        if index.children.contains_key(&id) {
            return Err(SnapshotRefusal::Precondition(format!(
                "snapshot '{name}' still has children, or containers that use its scratch disk; remove them first"
            ))
            .into());
        }
        Self::vanish_now(&mut index, &id).ok_or_else(|| SnapshotRefusal::NotFound(name.to_owned()).into())
    }

    /// As [`Store::vanish`], for a snapshot that is not listed; `None` if it is gone or has children.
    pub fn vanish_doubtful(&self, id: &LayerId) -> Option<Vanished> {
        let mut index = self.index.write();
        if index.children.contains_key(id) {
            return None;
        }
        Self::vanish_now(&mut index, id)
    }

    fn vanish_now(index: &mut Index, id: &LayerId) -> Option<Vanished> {
        let layer = index.layers.get(id).cloned()?;
        index.remove(id);
        Some(Vanished { layer })
    }

    /// Renames the directory of a removed snapshot away, for its deletion; the result still has to be deleted. Waits for
    /// what is still going on in the directory.
    ///
    /// # Errors
    /// The rename failed; the next start finds the snapshot again.
    pub fn discard(&self, _: &DiskThread, vanished: &Vanished) -> Result<Doomed, StoreError> {
        let id = &vanished.layer.id;
        let _claim = self.claims.take(id);
        let (folder, path) = (self.layout.layer(id), self.staging_path(id, REMOVING_SUFFIX));
        files::rename(&folder, &path).map_err(StoreError::io("rename away", &folder))?;
        Ok(Doomed::at(path, &self.leftovers))
    }

    /// Makes the removals so far durable: what a power cut brings back must be complete, so nothing is deleted before.
    ///
    /// # Errors
    /// The disk fails.
    pub fn sync_removals(&self, _: &DiskThread) -> Result<(), StoreError> {
        self.sync_home()
    }
}

#[cfg(test)]
mod tests;
