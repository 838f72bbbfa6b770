//! Diff, ApplyDiff, Changes, DiffSize: what service VMs do for us.
//!
//! ```text
//!   ApplyDiff  mark "applying" (durable) ─► staging/{layer.vhd,layer.exact} ◄─ VM 1 ◄─ tar
//!              ─► VM 1 ended ─► footer ─► VM 2 (fresh) checks the image ─► sync ─► commit "applied"
//!   Diff       applied layer, own parent: image + record ─► VM ─► the very bytes
//!              else: images and sandboxes of both chains ─► VM ─► canonical tar
//! ```
//!
//! The tar that dockerd's client sends after a broken connection may be empty or only a tail of the layer. Whatever did
//! not end as a whole tar leaves the layer's door closed ([`door`]) and, once a byte was read, the layer marked; nothing
//! but Remove helps.

use super::{
    ChangedPath, Driver, DriverError, blocking,
    cut::{CutDiffs, Sent},
    door::{self, Entry, Which},
    error::APPLY,
    growth::Files,
    home::Home,
    image::Asked,
    live::{Sandbox, Stillness},
    on_disk_thread, open,
    refusal::{Watch, shut, stands_on, takes_tar, watched, wrong_state},
    room,
    views::unfinished,
    with_causes,
};
use crate::{
    store::{
        AppliedMeta, DiskThread, Layer, LayerId, LayerMeta, LayerState, Member, Snapshot, StoreError,
        durable, layout, owners_note,
    },
    svm::{
        ApplyJob, ApplyLimits, ApplyOptions, CheckJob, CompareJob, DiskSource, ExportJob, ExportKind,
        ExportSummary, LayerDisk, LayerKind, LiveControl, ParentDisks, Purpose, SvmError, TarStream,
    },
    telemetry::{Phase, PhaseTimer, Phases, Transfer},
};
use bytes::Bytes;
use ext4_image::check::WRITER;
use futures_util::{Stream, StreamExt};
use std::{
    io,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use vhd_image::vhd;

/// A layer and the one that it is compared with, of one moment.
pub(super) struct Pair {
    target: Snapshot,
    other: Option<Snapshot>,
    /// The other is the layer's own parent, or both are nothing.
    own: bool,
}

fn moved(id: &LayerId) -> DriverError {
    StoreError::WrongState {
        id: id.clone(),
        reason: "it was removed or changed by another request while it was being read; try again".into(),
    }
    .into()
}

/// Two stacks to be compared, as disks.
pub(super) struct Comparison {
    target: Vec<LayerDisk>,
    parent: ParentDisks,
    live: Option<Arc<Stillness>>,
}

/// What makes the sandboxes of a comparison stand still, for a lease.
fn control(live: Option<Arc<Stillness>>) -> Option<Arc<dyn LiveControl>> {
    live.map(|live| live as Arc<dyn LiveControl>)
}

/// What a tar may hold whose image has at most so many bytes: twice as many bytes, since data may be sparse or removed
/// again, and headers take room.
fn tar_limits(max_layer_bytes: u64) -> ApplyLimits {
    let limits = ApplyLimits::default();
    ApplyLimits { tar_bytes: limits.tar_bytes.min(max_layer_bytes.saturating_mul(2)), ..limits }
}

impl Driver {
    /// `GraphDriver.ApplyDiff`: makes the tar `body` the content of a layer that was only created, and says how many
    /// bytes its regular files have.
    ///
    /// # Errors
    /// A layer that has content already, that an earlier process created, or of which an earlier ApplyDiff was refused
    /// or cut, is refused; that refusal repeats the first reason. After any error but one of a body that ended properly
    /// and was empty, the layer takes no tar until it is removed: what the client still has may be a tail.
    pub async fn apply_diff<S>(&self, id: &str, parent: &str, body: S) -> Result<u64, DriverError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send,
    {
        let id: LayerId = id.parse()?;
        // Before anything is waited for: a client that hangs up in between has lost bytes as well.
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
                    // Nothing was read and the client ended its body properly: nothing can come back as a tail.
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

    /// Why no tar is taken for a layer any more, if an earlier ApplyDiff of it was refused or cut.
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

    /// Says that a request broke off within its head, which may have been an ApplyDiff of a layer whose id begins with
    /// `begin` (`whole`: is it): its client may come back with the rest of a tar.
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

    /// Which layer of the present home has this id.
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
        // A sandbox that was never written may take one: its image tells.
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
            outcome = home.apply(&layer, body, &self.phases) => outcome,
        };
        outcome.map_err(|error| Stopped::Late(home.clone(), layer, error))
    }

    /// `GraphDriver.Diff`: the tar of a layer against its parent, any other layer, or nothing (`parent` empty).
    pub async fn diff(&self, id: &str, parent: &str) -> Result<DiffStream, DriverError> {
        let home = self.home().await?;
        let pair = home.pair(id, parent).await?;
        let (layer, meta) = (pair.target.top.layer.clone(), pair.target.top.meta.clone());
        let id = layer.id.clone();
        let waiting = self.phases.begin(Transfer::Diff, Phase::Wait);
        let lease = home
            .pool
            .lease(id.as_str(), Purpose::Export)
            .await
            .map_err(DriverError::svm(&id, "start a diff"))?;
        drop(waiting);
        let exporting = self.phases.begin(Transfer::Diff, Phase::Export);
        let (mut applied, mut live) = (None, None);
        let job = if let (true, LayerState::Applied) = (pair.own, meta.state) {
            applied = meta.applied.map(|applied| applied.tar_digest);
            let opener = home.clone();
            let (image, record) = blocking(move || opener.exact_disks(&pair.target)).await?;
            ExportJob { kind: ExportKind::Exact { image, record }, live: None }
        } else {
            let own = pair.own;
            let comparison = home.comparison(pair).await?;
            let format = home.canonical_version(&layer, &meta, own).await?;
            let kind = ExportKind::Canonical {
                target: comparison.target,
                parent: comparison.parent,
                format,
                id_maps: home.id_maps(),
            };
            live.clone_from(&comparison.live);
            ExportJob { kind, live: control(comparison.live) }
        };
        let tar = lease.layer_to_tar(job).await.map_err(|error| {
            if let Some(live) = &live {
                live.remember(&error);
            }
            DriverError::svm(&id, "export it")(error)
        })?;
        Ok(DiffStream {
            tar: Some(tar),
            home,
            layer,
            applied,
            live,
            sent: Sent::default(),
            cuts: self.cuts.clone(),
            _phase: exporting,
        })
    }

    /// `GraphDriver.Changes`.
    pub async fn changes(&self, id: &str, parent: &str) -> Result<Vec<ChangedPath>, DriverError> {
        let home = self.home().await?;
        let pair = home.pair(id, parent).await?;
        let id = &pair.target.id().clone();
        let job = home.comparison(pair).await?.job();
        let lease = home
            .pool
            .lease(id.as_str(), Purpose::Work)
            .await
            .map_err(DriverError::svm(id, "list changes"))?;
        let changes = lease.changes(job).await.map_err(DriverError::svm(id, "list its changes"))?;
        Ok(changes.into_iter().map(ChangedPath::from).collect())
    }

    /// `GraphDriver.DiffSize`: the bytes of a diff's regular files and symlinks.
    pub async fn diff_size(&self, id: &str, parent: &str) -> Result<u64, DriverError> {
        let home = self.home().await?;
        let pair = home.pair(id, parent).await?;
        if let (true, Some(applied)) = (pair.own, &pair.target.top.meta.applied) {
            return Ok(applied.diff_size);
        }
        let id = &pair.target.id().clone();
        let job = home.comparison(pair).await?.job();
        let lease =
            home.pool.lease(id.as_str(), Purpose::Work).await.map_err(DriverError::svm(id, "size a diff"))?;
        lease.diff_size(job).await.map_err(DriverError::svm(id, "size its diff"))
    }
}

impl Comparison {
    pub(super) fn job(self) -> CompareJob {
        CompareJob { target: self.target, parent: self.parent, live: control(self.live) }
    }
}

impl Home {
    /// A layer and the one it is compared with, as they are together at one moment; a layer that was only created gets
    /// its sandbox first, so that there is something to compare.
    pub(super) async fn pair(self: &Arc<Self>, id: &str, parent: &str) -> Result<Pair, DriverError> {
        /// Looks at a layer that others create, fill and remove all the time.
        const LOOKS: usize = 16;
        let id: LayerId = id.parse()?;
        let parent = if parent.is_empty() { None } else { Some(parent.parse::<LayerId>()?) };
        for _ in 0..LOOKS {
            let (target, other) = self.store.snapshots(&id, parent.as_ref())?;
            match target.top.meta.state {
                LayerState::Applying => return Err(unfinished(&id)),
                LayerState::Created => self.materialize(&id).await?,
                LayerState::Applied | LayerState::Sandbox => {
                    let own = parent.as_ref() == target.top.layer.parent();
                    return Ok(Pair { target, other, own });
                }
            }
        }
        Err(moved(&id))
    }

    pub(super) async fn comparison(self: &Arc<Self>, pair: Pair) -> Result<Comparison, DriverError> {
        let home = self.clone();
        let stacks = blocking(move || {
            let mut sandboxes = Vec::new();
            let target = home.chain_disks(&pair.target, &mut sandboxes)?;
            let mut below = Vec::new();
            let parent = match pair.other {
                _ if pair.own => ParentDisks::Own,
                Some(parent) => ParentDisks::Chain(home.chain_disks(&parent, &mut below)?),
                None => ParentDisks::None,
            };
            sandboxes.extend(below.into_iter().map(|sandbox| Sandbox { in_target: None, ..sandbox }));
            Ok((target, parent, sandboxes))
        });
        let (mut target, mut parent, sandboxes) = stacks.await?;
        let live = self.hold_still(sandboxes, &mut target, &mut parent).await?;
        Ok(Comparison { target, parent, live })
    }

    /// A layer and its ancestors as disks; what was only created has none. Names the sandboxes among them.
    fn chain_disks(
        &self,
        snapshot: &Snapshot,
        sandboxes: &mut Vec<Sandbox>,
    ) -> Result<Vec<LayerDisk>, DriverError> {
        let mut disks = Vec::new();
        for member in snapshot.members() {
            let id = &member.layer.id;
            match member.meta.state {
                LayerState::Created => {}
                LayerState::Applying => return Err(unfinished(id)),
                LayerState::Applied => {
                    disks.push(LayerDisk { disk: self.image_disk(member)?, kind: LayerKind::Applied });
                }
                LayerState::Sandbox => {
                    let path = self.sandbox_path(id);
                    let file = Arc::new(open(&path)?);
                    let length = file.metadata().map_err(DriverError::io("measure", &path))?.len();
                    let vhdx = path.ends_with(layout::SANDBOX_VHDX_FILE);
                    let in_target = u16::try_from(disks.len()).ok();
                    let layer = member.layer.clone();
                    sandboxes.push(Sandbox { layer, file: file.clone(), in_target });
                    let disk = DiskSource::read_only(file, path);
                    let disk = if vhdx {
                        disk.vhdx()
                    } else {
                        disk.window(0, length.saturating_sub(vhd::FOOTER_SIZE as u64))
                    };
                    disks.push(LayerDisk { disk, kind: LayerKind::Sandbox });
                }
            }
        }
        // Opened by name: files of another layer of the same id must not pass for this one's.
        if self.store.is_current(snapshot) { Ok(disks) } else { Err(moved(snapshot.id())) }
    }

    pub(super) fn image_disk(&self, member: &Member) -> Result<DiskSource, DriverError> {
        let path = self.store.layout().layer_file(&member.layer.id, layout::LAYER_FILE);
        let applied = member.meta.applied.as_ref().ok_or_else(|| StoreError::Corrupt {
            path: path.clone(),
            reason: "layer.json does not describe it".into(),
        })?;
        Ok(DiskSource::read_only(Arc::new(open(&path)?), path).window(0, applied.image_bytes))
    }

    /// Image and exact record of an applied layer.
    pub(super) fn exact_disks(&self, snapshot: &Snapshot) -> Result<(DiskSource, DiskSource), DriverError> {
        let record = self.store.layout().layer_file(snapshot.id(), layout::RECORD_FILE);
        let file = open(&record)?;
        let image = self.image_disk(&snapshot.top)?;
        if !self.store.is_current(snapshot) {
            return Err(moved(snapshot.id()));
        }
        Ok((image, DiskSource::read_only(Arc::new(file), record)))
    }

    async fn mark_applying(self: &Arc<Self>, layer: &Layer) -> Result<(), DriverError> {
        let gate = self.gates.close([&layer.id]).await;
        let (home, layer) = (self.clone(), layer.clone());
        gate.run(move |thread, _gate| {
            home.set_state_now(thread, &layer, LayerState::Created, LayerState::Applying)
        })
        .await
    }

    /// Changes a layer's state, durably, if it is the one expected.
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

    /// Notes durably why a tar was not taken, for later refusals. Best effort: the door is closed all the same.
    async fn note_refusal(self: &Arc<Self>, layer: &Layer, reason: &str) {
        /// Longest wait: the client wants the reason now, and a slow disk gets the note when it does.
        const PATIENCE: Duration = Duration::from_secs(1);
        let (home, id, generation) = (self.clone(), layer.id.clone(), layer.generation);
        let reason = door::bounded(reason).to_string();
        let noting = tokio::spawn(DiskThread::run(move |thread| {
            let nothing = || StoreError::Usage("nothing to note".into());
            let noted = home.store.update(thread, &id, generation, |meta| match meta.state {
                LayerState::Created | LayerState::Applying if meta.refused.is_none() => {
                    Ok(LayerMeta { refused: Some(reason), ..meta.clone() })
                }
                _ => Err(nothing()),
            });
            match noted {
                Ok(_) | Err(StoreError::Usage(_) | StoreError::NotFound(_)) => {}
                Err(error) => {
                    tracing::warn!(%id, error = with_causes(&error), "cannot note why a tar was refused");
                }
            }
        }));
        let _ = tokio::time::timeout(PATIENCE, noting).await;
    }

    async fn apply<S>(self: &Arc<Self>, layer: &Layer, body: S, phases: &Phases) -> Result<u64, DriverError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send,
    {
        let (home, id) = (self.clone(), layer.id.clone());
        let staged = on_disk_thread(move |thread| Ok(home.store.stage(thread, &id)?)).await?;
        let filled = self.fill(layer, staged.path(), body, phases).await;
        let committing = filled.is_ok().then(|| phases.begin(Transfer::Apply, Phase::Commit));
        let (home, layer) = (self.clone(), layer.clone());
        on_disk_thread(move |thread| {
            let applied = match filled {
                Ok(applied) => applied,
                Err(error) => {
                    staged.discard(thread);
                    return Err(error);
                }
            };
            let size = applied.diff_size;
            let files = [layout::RECORD_FILE, layout::LAYER_FILE];
            home.store.commit::<DriverError>(
                thread,
                &layer.id,
                layer.generation,
                staged,
                &files,
                |meta| match meta.state {
                    LayerState::Applying => {
                        Ok(LayerMeta { state: LayerState::Applied, applied: Some(applied), ..meta.clone() })
                    }
                    _ => Err(unfinished(&layer.id)),
                },
            )?;
            drop(committing);
            Ok(size)
        })
        .await
    }

    /// Makes image and record of a tar in a staging folder, checked and synced.
    async fn fill<S>(
        self: &Arc<Self>,
        layer: &Layer,
        folder: &Path,
        body: S,
        phases: &Phases,
    ) -> Result<AppliedMeta, DriverError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send,
    {
        let id = &layer.id;
        let (home, member, staged) = (self.clone(), layer.clone(), folder.to_owned());
        let (files, scratch, lowers) = blocking(move || {
            let files = Files::new(home.clone(), &staged)?;
            // The leaves of a large hash tree; it goes with the staging folder.
            let scratch = if home.options.verity {
                let path = staged.join("verity.tmp");
                let file = durable::create_private(&path).map_err(DriverError::io("create", &path))?;
                Some(DiskSource::read_write(Arc::new(file), &path))
            } else {
                None
            };
            let lowers = match member.parent() {
                Some(parent) => home.chain_disks(&home.store.snapshot(parent)?, &mut Vec::new())?,
                None => Vec::new(),
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
                ..ApplyOptions::default()
            },
        };
        let waiting = phases.begin(Transfer::Apply, Phase::Wait);
        let lease = self
            .pool
            .lease(id.as_str(), Purpose::Work)
            .await
            .map_err(DriverError::svm(id, "start an apply"))?;
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
            let image_path = image.path.clone();
            asked.seal(&image, &made)?;
            for (disk, expected) in [(image, expected_image), (record, expected_record)] {
                room::settle(&disk)?;
                disk.file.sync_all().map_err(DriverError::io("sync", &disk.path))?;
                let found = disk.file.metadata().map_err(DriverError::io("measure", &disk.path))?.len();
                if found != expected {
                    let reason = format!("the service VM says {expected} bytes, the file has {found}");
                    return Err(StoreError::Corrupt { path: disk.path.clone(), reason }.into());
                }
            }
            Ok(durable::sync_dir(image_path.parent().unwrap_or(&image_path))?)
        })
        .await?;
        drop(syncing);
        let _checking = phases.begin(Transfer::Apply, Phase::Check);
        // The VM that saw the tar may have been taken over by it: one that has seen nothing decides.
        let path = folder.join(layout::LAYER_FILE);
        let image = path.clone();
        let reopened = Arc::new(blocking(move || open(&image)).await?);
        let check = CheckJob {
            image: DiskSource::read_only(reopened, path.clone()).window(0, asked.disk_bytes(&summary)),
            tree: asked.verity,
            writer: WRITER,
            require_no_writers: true,
            // The one that applied may have been taken over.
            owners: self.id_maps(),
        };
        let found = self.pool.check_image(check).await.map_err(DriverError::svm(id, "verify its image"))?;
        asked.agree(&path, &summary, &found)?;
        Ok(AppliedMeta {
            image_bytes: summary.image_bytes,
            file_bytes: summary.file_bytes,
            record_bytes: summary.record_bytes,
            diff_size: summary.diff_size,
            tar_bytes: summary.tar_bytes,
            tar_digest: summary.tar_digest.to_string(),
            uuid: summary.uuid,
            entries: summary.entries,
            verity_root: summary.verity_root.map(|root| root.to_string()),
            checked: true,
            writer: Some(WRITER),
            owners: owners_note(&self.init.uid_maps, &self.init.gid_maps),
        })
    }

    /// The version of the canonical tar of a layer. Engines keep the digest of a layer's own diff, so that version is
    /// durable before a byte of it leaves: what could not be noted is not sent.
    async fn canonical_version(
        self: &Arc<Self>,
        layer: &Layer,
        meta: &LayerMeta,
        own: bool,
    ) -> Result<u32, DriverError> {
        let by_age = || self.store.marker().canonical_version_of(meta.created, layer.made_here);
        let format = meta.canonical_version.unwrap_or_else(by_age);
        if !own || meta.canonical_version.is_some() {
            return Ok(format);
        }
        let (home, layer) = (self.clone(), layer.clone());
        let noted = on_disk_thread(move |thread| {
            home.store.update::<DriverError>(thread, &layer.id, layer.generation, |meta| {
                let noted = meta.canonical_version.unwrap_or(format);
                Ok(LayerMeta { canonical_version: Some(noted), ..meta.clone() })
            })
        })
        .await?;
        Ok(noted.canonical_version.unwrap_or(format))
    }
}

/// Says that a diff is not all of a layer.
fn warn_hidden(id: &LayerId, summary: Option<&ExportSummary>) {
    if let Some(ExportSummary { hidden: hidden @ 1.., first_hidden, .. }) = summary {
        let first = first_hidden.as_deref().unwrap_or_default();
        tracing::warn!(
            %id, hidden, first,
            "the diff leaves out files whose names begin with .wh., which no layer can hold: an engine would take them \
             for deletions"
        );
    }
}

/// The tar of a Diff. An item `Err`, or an end without completeness, is a cut tar.
#[derive(Debug)]
pub struct DiffStream {
    tar: Option<TarStream>,
    home: Arc<Home>,
    layer: Layer,
    /// Digest of the tar that was applied, if this is to be that one.
    applied: Option<String>,
    /// Of sandboxes that are in use.
    live: Option<Arc<Stillness>>,
    sent: Sent,
    cuts: Arc<CutDiffs>,
    _phase: PhaseTimer,
}

impl Stream for DiffStream {
    type Item = Result<Bytes, DriverError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let item = this.poll_tar(context);
        match &item {
            Poll::Ready(Some(Ok(bytes))) => this.sent.add(bytes),
            Poll::Ready(Some(Err(error))) => {
                let sent = std::mem::take(&mut this.sent);
                this.cuts.note(this.layer.id.as_str(), &with_causes(error), sent);
            }
            _ => {}
        }
        item
    }
}

impl DiffStream {
    fn poll_tar(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, DriverError>>> {
        let this = self;
        let Some(tar) = &mut this.tar else { return Poll::Ready(None) };
        let failed = |error: SvmError, id: &LayerId| DriverError::svm(id, "export it")(error);
        match tar.poll_next_unpin(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Ok(bytes))) => Poll::Ready(Some(Ok(bytes))),
            Poll::Ready(Some(Err(error))) => {
                this.tar = None;
                if let Some(live) = &this.live {
                    live.remember(&error);
                }
                Poll::Ready(Some(Err(failed(error, &this.layer.id))))
            }
            Poll::Ready(None) => {
                let complete = tar.complete();
                let digest = tar.summary().and_then(|s| s.tar_digest).map(|digest| digest.to_string());
                if complete {
                    warn_hidden(&this.layer.id, tar.summary());
                }
                this.tar = None;
                if complete && this.applied.is_some() && this.applied != digest {
                    // A sound pair of image and record, but of another layer.
                    let (was, is) = (this.applied.take().unwrap_or_default(), digest.unwrap_or_default());
                    let path = this.home.store.layout().layer_file(&this.layer.id, layout::RECORD_FILE);
                    let reason = format!("it gives the tar {is}, and {was} was applied");
                    return Poll::Ready(Some(Err(StoreError::Corrupt { path, reason }.into())));
                }
                if !complete {
                    return Poll::Ready(Some(Err(failed(
                        SvmError::Cancelled("the tar has no proper end"),
                        &this.layer.id,
                    ))));
                }
                Poll::Ready(None)
            }
        }
    }
}

/// Where an ApplyDiff stopped.
enum Stopped {
    /// The layer's state refuses every tar, and will until it is removed.
    ByState(DriverError),
    /// Before the mark.
    Early(Option<(Arc<Home>, Layer)>, DriverError),
    /// Behind the mark.
    Late(Arc<Home>, Layer, DriverError),
}
