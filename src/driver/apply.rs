//! ApplyDiff: a tar becomes the image of a layer.
//!
//! ```text
//!   mark "applying" (durable) ─► staging/{layer.vhd,layer.exact} ◄─ VM 1 ◄─ tar
//!   ─► VM 1 has ended ─► footer ─► VM 2 (fresh) checks the image ─► sync ─► commit "applied"
//! ```
//!
//! The body that dockerd's client sends after a broken connection may be empty, or only a tail of the tar. Whatever did
//! not end as a whole tar leaves the layer's door closed ([`door`]) and, once a byte was read, the layer marked; only
//! Remove helps. Called by `api`.

use super::{
    Driver, DriverError, blocking,
    door::{self, Entry, Which},
    error::{APPLY, unfinished},
    growth::Files,
    home::Home,
    image::Asked,
    on_disk_thread, open,
    refusal::{Watch, shut, stands_on, takes_tar, watched, wrong_state},
    room,
};
use crate::{
    error::{CorruptFile, with_causes},
    store::{
        AppliedMeta, DiskThread, Layer, LayerId, LayerMeta, LayerState, Snapshot, SnapshotKind, Staged,
        StoreError, files, layout, owners_note,
    },
    svm::{ApplyJob, ApplyLimits, ApplyOptions, ApplySummary, CheckJob, DiskSource, LowerUse, Purpose},
    telemetry::{Phase, Phases, Transfer},
};
use bytes::Bytes;
use ext4_image::check::WRITER;
use futures_util::Stream;
use std::{io, path::Path, sync::Arc, time::Duration};
use tracing::Instrument as _;

/// The limits of a tar whose image has at most `max_layer_bytes`: twice as many bytes, because data may be sparse or
/// removed again, and headers take space.
pub(super) fn tar_limits(max_layer_bytes: u64) -> ApplyLimits {
    let limits = ApplyLimits::default();
    ApplyLimits { tar_bytes: limits.tar_bytes.min(max_layer_bytes.saturating_mul(2)), ..limits }
}

impl Driver {
    /// `GraphDriver.ApplyDiff`: makes the tar `body` the content of a layer that was only created. Returns the bytes of
    /// its regular files.
    ///
    /// # Errors
    /// Refused are layers that have content, that an earlier process created, or for which an earlier ApplyDiff was
    /// refused or cut (the refusal repeats the first reason). After any error, except for a body that was empty and
    /// ended properly, the layer takes no tar until it is removed: what the client still has may be a tail.
    pub async fn apply_diff<S>(&self, id: &str, parent: &str, body: S) -> Result<u64, DriverError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send,
    {
        let id: LayerId = id.parse()?;
        // Before the first await: a client that hangs up there has lost bytes as well.
        let entry = self.doors.enter(&id, self.which(&id)).map_err(|closed| shut(&id, &closed))?;
        let watch = Arc::new(Watch::default());
        let stopped = match self.apply_behind(&id, parent, &entry, watched(body, watch.clone())).await {
            Ok(size) => {
                entry.reopen();
                return Ok(size);
            }
            Err(stopped) => stopped,
        };
        let (layer, error) = match stopped {
            Stopped::ByState(error) => {
                entry.reopen();
                return Err(error);
            }
            Stopped::Early(layer, error) => (layer, error),
            Stopped::Late(home, layer, error) => {
                if watch.ended_empty() {
                    // Nothing was read and the body ended properly, so no tail can follow.
                    home.set_state(&layer, LayerState::Applying, LayerState::Created).await?;
                    entry.reopen();
                    return Err(error);
                }
                (Some((home, layer)), error)
            }
        };
        let error = match self.cuts.source_of(watch.passed()) {
            Some((from, reason)) if watch.broken() => {
                DriverError::CutSource { id: id.to_string(), from, bytes: watch.passed().bytes, reason }
            }
            _ => error,
        };
        let reason = with_causes(&error);
        if let Some((home, layer)) = layer {
            home.note_refusal(&layer, &reason).await;
        }
        entry.fail(&reason);
        Err(error)
    }

    /// The refusal for a layer whose earlier ApplyDiff was refused or cut.
    pub async fn refused_before(&self, id: &str) -> Option<DriverError> {
        let id: LayerId = id.parse().ok()?;
        if let Some(closed) = self.doors.closed(&id, self.which(&id)) {
            return Some(shut(&id, &closed));
        }
        let member = self.home().await.ok()?.store.get(&id).ok()?;
        if member.meta.state == LayerState::Sandbox {
            return None;
        }
        takes_tar(&member.layer, &member.meta).err()
    }

    /// Closes the doors of layers whose id begins with `begin` (or is `begin`, if `whole`) after a request that broke
    /// off in its head: it may have been an ApplyDiff, whose client may send the rest of the tar.
    pub fn distrust(&self, begin: &str, whole: bool) {
        const REASON: &str = "a request for it broke off before its head was complete";
        if whole {
            if let Ok(id) = begin.parse::<LayerId>() {
                self.doors.close(&id, self.which(&id), REASON);
            }
            return;
        }
        let Some(home) = self.current() else { return };
        for layer in home.store.layers() {
            let open = layer.made_here
                && layer
                    .meta
                    .as_ref()
                    .is_ok_and(|meta| matches!(meta.state, LayerState::Created | LayerState::Sandbox));
            if open && layer.id.as_str().starts_with(begin) {
                self.doors.close(&layer.id, Some(home.which(&layer)), REASON);
            }
        }
    }

    /// The layer that has this id in the current home.
    fn which(&self, id: &LayerId) -> Option<Which> {
        let home = self.current()?;
        home.store.find(id).ok().map(|layer| home.which(&layer))
    }

    async fn apply_behind<S>(
        &self,
        id: &LayerId,
        parent: &str,
        entry: &Entry,
        body: S,
    ) -> Result<u64, Stopped>
    where
        S: Stream<Item = io::Result<Bytes>> + Send,
    {
        let home = self.home().await.map_err(|error| Stopped::Early(None, error))?;
        let member = home.store.get(id).map_err(|error| Stopped::Early(None, error.into()))?;
        let (layer, meta) = (member.layer, member.meta);
        entry.found(home.which(&layer));
        // A sandbox that was never written may take one; `take_back` looks at its image.
        if meta.state != LayerState::Sandbox {
            takes_tar(&layer, &meta).map_err(Stopped::ByState)?;
        }
        let early = |error| Stopped::Early(Some((home.clone(), layer.clone())), error);
        stands_on(&layer, parent).map_err(early)?;
        let reserved = home.clone();
        on_disk_thread(move |thread| reserved.check_reserve(thread)).await.map_err(early)?;
        home.take_back(&layer).await.map_err(early)?;
        home.mark_applying(&layer).await.map_err(early)?;
        let outcome = tokio::select! {
            biased;
            () = entry.given_up() => Err(DriverError::Usage(format!(
                "layer {id} was removed while its tar was being applied"
            ))),
            outcome = home.apply(&layer, Plan::of_docker(&layer), body, &self.phases, |_, _, applied, _| Ok(applied)) => outcome,
        };
        let outcome = outcome.map(|applied| applied.diff_size);
        outcome.map_err(|error| Stopped::Late(home.clone(), layer, error))
    }
}

impl Home {
    async fn mark_applying(self: &Arc<Self>, layer: &Layer) -> Result<(), DriverError> {
        let gate = self.gates.close([&layer.id]).await;
        let (home, layer) = (self.clone(), layer.clone());
        gate.run(move |thread, _gate| {
            home.set_state_now(thread, &layer, LayerState::Created, LayerState::Applying)
        })
        .await
    }

    /// Changes a layer's state durably if it is `from`.
    async fn set_state(
        self: &Arc<Self>,
        layer: &Layer,
        from: LayerState,
        to: LayerState,
    ) -> Result<(), DriverError> {
        let (home, layer) = (self.clone(), layer.clone());
        on_disk_thread(move |thread| home.set_state_now(thread, &layer, from, to)).await
    }

    fn set_state_now(
        &self,
        thread: &DiskThread,
        layer: &Layer,
        from: LayerState,
        to: LayerState,
    ) -> Result<(), DriverError> {
        let id = &layer.id;
        let changed = self.store.update(thread, id, layer.generation, |meta| {
            if meta.state == from {
                return Ok(LayerMeta { state: to, ..meta.clone() });
            }
            Err(wrong_state(id, meta))
        });
        changed.map(|_| ())
    }

    /// Records durably why a tar was not taken, for later refusals. Best effort: the door is closed anyway.
    async fn note_refusal(self: &Arc<Self>, layer: &Layer, reason: &str) {
        /// Longest wait; on a slow disk the record is completed after the reply.
        const PATIENCE: Duration = Duration::from_secs(1);
        let (home, id, generation) = (self.clone(), layer.id.clone(), layer.generation);
        let reason = door::bounded(reason).to_string();
        let noting = DiskThread::run(move |thread| {
            let nothing = || StoreError::Usage("nothing to record".into());
            let noted = home.store.update(thread, &id, generation, |meta| match meta.state {
                LayerState::Created | LayerState::Applying if meta.refused.is_none() => {
                    Ok(LayerMeta { refused: Some(reason), ..meta.clone() })
                }
                _ => Err(nothing()),
            });
            match noted {
                Ok(_) | Err(StoreError::Usage(_) | StoreError::NotFound(_)) => {}
                Err(error) => {
                    tracing::warn!(%id, error = with_causes(&error), "cannot record why a tar was refused");
                }
            }
        });
        let noting = tokio::spawn(noting.in_current_span());
        let _ = tokio::time::timeout(PATIENCE, noting).await;
    }

    /// Makes the tar `body` the content of a layer. `finish` may change the facts about the image, and the
    /// staged files, before both are committed.
    pub(super) async fn apply<S>(
        self: &Arc<Self>,
        layer: &Layer,
        plan: Plan,
        body: S,
        phases: &Phases,
        finish: impl FnOnce(&DiskThread, &Staged, AppliedMeta, &ApplySummary) -> Result<AppliedMeta, DriverError>
        + Send
        + 'static,
    ) -> Result<AppliedMeta, DriverError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send,
    {
        let (home, id) = (self.clone(), layer.id.clone());
        let staged = on_disk_thread(move |thread| Ok(home.store.stage(thread, &id)?)).await?;
        let from = plan.from;
        let filled = self.fill(layer, plan, staged.path(), body, phases).await;
        let committing = filled.is_ok().then(|| phases.begin(Transfer::Apply, Phase::Commit));
        let (home, layer) = (self.clone(), layer.clone());
        on_disk_thread(move |thread| {
            let applied =
                match filled.and_then(|(applied, summary)| finish(thread, &staged, applied, &summary)) {
                    Ok(applied) => applied,
                    Err(error) => {
                        staged.discard(thread);
                        return Err(error);
                    }
                };
            let files = [layout::RECORD_FILE, layout::LAYER_FILE];
            home.store.commit::<DriverError>(
                thread,
                &layer.id,
                layer.generation,
                staged,
                &files,
                |meta| {
                    // A name must not get another content.
                    let named = meta.snapshot.as_ref().is_some_and(|s| s.kind != SnapshotKind::Active);
                    if meta.state != from || (named && from == LayerState::Created) {
                        return Err(unfinished(&layer.id));
                    }
                    Ok(LayerMeta {
                        state: LayerState::Applied,
                        applied: Some(applied.clone()),
                        ..meta.clone()
                    })
                },
            )?;
            drop(committing);
            Ok(applied)
        })
        .await
    }

    /// Makes image and record of a tar in a staging directory, checked and synced.
    async fn fill<S>(
        self: &Arc<Self>,
        layer: &Layer,
        plan: Plan,
        folder: &Path,
        body: S,
        phases: &Phases,
    ) -> Result<(AppliedMeta, ApplySummary), DriverError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send,
    {
        let id = &layer.id;
        let (home, staged, lower_use) = (self.clone(), folder.to_owned(), plan.lower_use);
        let (files, scratch, lowers) = blocking(move || {
            let files = Files::new(home.clone(), &staged)?;
            // The leaves of a large hash tree; deleted with the staging directory.
            let scratch = if home.options.verity {
                let path = staged.join("verity.tmp");
                let file = files::create_private(&path).map_err(DriverError::io("create", &path))?;
                Some(DiskSource::read_write(Arc::new(file), &path))
            } else {
                None
            };
            let lowers = match plan.lowers {
                Lowers::Parent(Some(parent)) => {
                    home.chain_disks(&home.store.snapshot(&parent)?, &mut Vec::new())?
                }
                Lowers::Parent(None) => Vec::new(),
                Lowers::Stack(stack) => home.chain_disks(&stack, &mut Vec::new())?,
            };
            Ok((files, scratch, lowers))
        })
        .await?;
        let (image, record) = files.first();
        let job = ApplyJob {
            image,
            record,
            scratch,
            lowers,
            larger: Some(Arc::new(files.clone())),
            options: ApplyOptions {
                profile: self.options.profile,
                block_size: self.options.block_size,
                max_image_bytes: self.options.max_layer_bytes,
                verity: self.options.verity,
                id_maps: self.id_maps(),
                limits: tar_limits(self.options.max_layer_bytes),
                lowers: lower_use,
                ..ApplyOptions::default()
            },
        };
        let waiting = phases.begin(Transfer::Apply, Phase::Wait);
        // The VM that reads a sandbox may be taken over by it, and must not write the image of the tar that it gives.
        let vm = if plan.from == LayerState::Sandbox { format!("{id}-apply") } else { id.to_string() };
        let lease =
            self.pool.lease(&vm, Purpose::Work).await.map_err(DriverError::svm(id, "start an apply"))?;
        drop(waiting);
        let applying = phases.begin(Transfer::Apply, Phase::Apply);
        let body = room::watched(body, self.clone());
        let summary = lease.tar_to_layer(job, body).await.map_err(DriverError::svm(id, APPLY))?;
        drop((lease, applying));
        let syncing = phases.begin(Transfer::Apply, Phase::Sync);
        let (expected_image, expected_record) = (summary.file_bytes, summary.record_bytes);
        let (made, asked) = (summary.clone(), Asked::of(&self.options));
        blocking(move || {
            let (image, record) = files.last()?;
            asked.seal(&image, &made)?;
            for (disk, expected) in [(image, expected_image), (record, expected_record)] {
                room::settle(&disk)?;
                files::sync_file(&disk.file, &disk.path).map_err(DriverError::io("sync", &disk.path))?;
                let found = disk.file.metadata().map_err(DriverError::io("measure", &disk.path))?.len();
                if found != expected {
                    let reason = format!("the service VM reports {expected} bytes, the file has {found}");
                    return Err(CorruptFile::new(disk.path.clone(), reason).into());
                }
            }
            // Their names count once they are in the layer's directory, which `Store::commit` syncs.
            Ok(())
        })
        .await?;
        drop(syncing);
        let _checking = phases.begin(Transfer::Apply, Phase::Check);
        // The tar may have taken over the VM that read it, so a VM that has seen nothing decides.
        let path = folder.join(layout::LAYER_FILE);
        let image = path.clone();
        let reopened = Arc::new(blocking(move || open(&image)).await?);
        let check = CheckJob {
            image: DiskSource::read_only(reopened, path.clone()).window(0, asked.disk_bytes(&summary)),
            tree: asked.verity,
            writer: WRITER,
            require_no_writers: true,
            // Checked again, because the VM that applied may have been taken over.
            owners: self.id_maps(),
        };
        let found = self.pool.check_image(check).await.map_err(DriverError::svm(id, "verify its image"))?;
        asked.agree(&path, &summary, &found)?;
        let applied = AppliedMeta {
            image_bytes: summary.image_bytes,
            file_bytes: summary.file_bytes,
            record_bytes: summary.record_bytes,
            diff_size: summary.diff_size,
            tar_bytes: summary.tar_bytes,
            tar_digest: summary.tar_digest,
            uuid: summary.uuid,
            entries: summary.entries,
            verity_root: summary.verity_root,
            checked: true,
            writer: Some(WRITER),
            owners: owners_note(&self.init.uid_maps, &self.init.gid_maps),
            shared: None,
        };
        Ok((applied, summary))
    }
}

/// What an apply starts from.
#[derive(Debug)]
pub(super) struct Plan {
    /// The state that the layer must be in.
    pub(super) from: LayerState,
    /// What the tar may take from the layers below.
    pub(super) lower_use: LowerUse,
    /// The layers below.
    pub(super) lowers: Lowers,
}

/// The layers below a layer that is being made.
#[derive(Debug)]
pub(super) enum Lowers {
    /// A parent with its ancestors, or nothing.
    Parent(Option<LayerId>),
    /// A stack whose layers are not connected yet.
    Stack(Box<Snapshot>),
}

impl Plan {
    /// As moby's drivers: hard links only.
    fn of_docker(layer: &Layer) -> Self {
        let lowers = Lowers::Parent(layer.parent().cloned());
        Self { from: LayerState::Applying, lower_use: LowerUse::Links, lowers }
    }
}

/// How far an ApplyDiff got before it failed.
enum Stopped {
    /// The layer's state refuses every tar until it is removed.
    ByState(DriverError),
    /// Before the layer was marked; with the layer, if it was found.
    Early(Option<(Arc<Home>, Layer)>, DriverError),
    /// After the layer was marked.
    Late(Arc<Home>, Layer, DriverError),
}
