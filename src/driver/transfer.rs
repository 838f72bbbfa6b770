//! Diff, ApplyDiff, Changes, DiffSize: what service VMs do for us.
//!
//! ```text
//!   ApplyDiff  mark "applying" (durable) ─► staging/{layer.vhd,layer.exact} ◄─ VM 1 ◄─ tar
//!              ─► VM 1 ended ─► footer ─► VM 2 (fresh) checks the image ─► sync ─► commit "applied"
//!   Diff       applied layer, own parent: image + record ─► VM ─► the very bytes
//!              else: images and sandboxes of both chains ─► VM ─► canonical tar
//! ```
//!
//! The tar that dockerd's client sends after a broken connection may be empty or only a tail of the layer: once a byte
//! of an ApplyDiff was read, a failure leaves the layer marked, and nothing but Remove helps.

use super::{
    ChangedPath, Driver, DriverError, blocking,
    growth::Files,
    home::Home,
    image::Asked,
    live::{Sandbox, Stillness},
    on_disk_thread, open, room,
    views::unfinished,
};
use crate::{
    ext4::check::WRITER,
    store::{
        AppliedMeta, DiskThread, Layer, LayerId, LayerMeta, LayerState, Member, Snapshot, StoreError,
        durable, layout,
    },
    svm::{
        ApplyJob, ApplyOptions, CheckJob, CompareJob, DiskSource, ExportJob, ExportKind, LayerDisk,
        LayerKind, LiveControl, ParentDisks, Purpose, SvmError, TarStream,
    },
    vhd,
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use std::{
    io,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

/// The version of the canonical tar that this program writes for a layer's first Diff.
const CANONICAL_VERSION: u32 = 1;

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

impl Driver {
    /// `GraphDriver.ApplyDiff`: makes the tar `body` the content of a layer that was only created, and says how many
    /// bytes its regular files have.
    ///
    /// # Errors
    /// A layer that has content already, or whose ApplyDiff was cut before, is refused; a bad tar leaves nothing but
    /// the mark.
    pub async fn apply_diff<S>(&self, id: &str, parent: &str, body: S) -> Result<u64, DriverError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send,
    {
        let home = self.home().await?;
        let id: LayerId = id.parse()?;
        let reserved = home.clone();
        on_disk_thread(move |thread| reserved.check_reserve(thread)).await?;
        let layer = home.store.get(&id)?.layer;
        if !parent.is_empty() {
            let parent: LayerId = parent.parse()?;
            if layer.parent() != Some(&parent) {
                return Err(DriverError::Usage(format!(
                    "layer {id} was created on {}, not on {parent}",
                    layer.parent().map_or("nothing", LayerId::as_str)
                )));
            }
        }
        home.take_back(&layer).await?;
        home.mark_applying(&layer).await?;
        let watch = Arc::new(Watch::default());
        let outcome = home.apply(&layer, watched(body, watch.clone())).await;
        if outcome.is_err() && watch.ended_empty() {
            // Nothing was read and the client ended its body properly: nothing can come back as a tail.
            home.set_state(&layer, LayerState::Applying, LayerState::Created).await?;
        }
        outcome
    }

    /// `GraphDriver.Diff`: the tar of a layer against its parent, any other layer, or nothing (`parent` empty).
    pub async fn diff(&self, id: &str, parent: &str) -> Result<DiffStream, DriverError> {
        let home = self.home().await?;
        let pair = home.pair(id, parent).await?;
        let (layer, meta) = (pair.target.top.layer.clone(), pair.target.top.meta.clone());
        let id = layer.id.clone();
        let lease = home
            .pool
            .lease(id.as_str(), Purpose::Export)
            .await
            .map_err(DriverError::svm(&id, "start a diff"))?;
        let (mut applied, mut live) = (None, None);
        let (job, version) = if let (true, LayerState::Applied) = (pair.own, meta.state) {
            applied = meta.applied.map(|applied| applied.tar_digest);
            let opener = home.clone();
            let (image, record) = blocking(move || opener.exact_disks(&pair.target)).await?;
            (ExportJob { kind: ExportKind::Exact { image, record }, live: None }, None)
        } else {
            let own = pair.own;
            let comparison = home.comparison(pair).await?;
            let format = meta.canonical_version.unwrap_or(CANONICAL_VERSION);
            let first = (own && meta.canonical_version.is_none()).then_some(format);
            let kind = ExportKind::Canonical {
                target: comparison.target,
                parent: comparison.parent,
                format,
                id_maps: home.id_maps(),
            };
            live.clone_from(&comparison.live);
            (ExportJob { kind, live: control(comparison.live) }, first)
        };
        let tar = lease.layer_to_tar(job).await.map_err(|error| {
            if let Some(live) = &live {
                live.remember(&error);
            }
            DriverError::svm(&id, "export it")(error)
        })?;
        Ok(DiffStream { tar: Some(tar), home, layer, freeze_version: version, applied, live })
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

    fn image_disk(&self, member: &Member) -> Result<DiskSource, DriverError> {
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
            Err(match meta.state {
                LayerState::Applying => unfinished(id),
                LayerState::Applied => DriverError::Usage(format!(
                    "layer {id} is applied already and never changes; remove it and create it anew"
                )),
                _ => DriverError::Usage(format!(
                    "layer {id} was written through a mount; a tar cannot be applied to it"
                )),
            })
        });
        changed.map(|_| ())
    }

    async fn apply<S>(self: &Arc<Self>, layer: &Layer, body: S) -> Result<u64, DriverError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send,
    {
        let (home, id) = (self.clone(), layer.id.clone());
        let staged = on_disk_thread(move |thread| Ok(home.store.stage(thread, &id)?)).await?;
        let filled = self.fill(layer, staged.path(), body).await;
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
                profile: Asked::of(&self.options).profile,
                block_size: self.options.block_size,
                max_image_bytes: self.options.max_layer_bytes,
                verity: self.options.verity,
                ..ApplyOptions::default()
            },
        };
        let lease = self
            .pool
            .lease(id.as_str(), Purpose::Work)
            .await
            .map_err(DriverError::svm(id, "start an apply"))?;
        let body = room::watched(body, self.clone());
        let summary = lease.tar_to_layer(job, body).await.map_err(DriverError::svm(id, "apply its tar"))?;
        drop(lease);
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
        // The VM that saw the tar may have been taken over by it: one that has seen nothing decides.
        let path = folder.join(layout::LAYER_FILE);
        let image = path.clone();
        let reopened = Arc::new(blocking(move || open(&image)).await?);
        let check = CheckJob {
            image: DiskSource::read_only(reopened, path.clone()).window(0, asked.disk_bytes(&summary)),
            tree: asked.verity,
            writer: WRITER,
            require_no_writers: true,
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
        })
    }

    /// Fixes the canonical version of a written layer after its first complete Diff.
    fn freeze_version(&self, thread: &DiskThread, layer: &Layer, version: u32) {
        let frozen = self.store.update::<StoreError>(thread, &layer.id, layer.generation, |meta| {
            Ok(LayerMeta {
                canonical_version: Some(meta.canonical_version.unwrap_or(version)),
                ..meta.clone()
            })
        });
        match frozen {
            Ok(_) | Err(StoreError::NotFound(_)) => {}
            Err(error) => {
                tracing::warn!(id = %layer.id, %error, "cannot note the canonical version of a layer");
            }
        }
    }
}

/// The tar of a Diff. An item `Err`, or an end without completeness, is a cut tar.
#[derive(Debug)]
pub struct DiffStream {
    tar: Option<TarStream>,
    home: Arc<Home>,
    layer: Layer,
    /// Set if a complete end fixes this version for the layer.
    freeze_version: Option<u32>,
    /// Digest of the tar that was applied, if this is to be that one.
    applied: Option<String>,
    /// Of sandboxes that are in use.
    live: Option<Arc<Stillness>>,
}

impl Stream for DiffStream {
    type Item = Result<Bytes, DriverError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
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
                if let Some(version) = this.freeze_version.take() {
                    let (home, layer) = (this.home.clone(), this.layer.clone());
                    tokio::spawn(DiskThread::run(move |thread| home.freeze_version(thread, &layer, version)));
                }
                Poll::Ready(None)
            }
        }
    }
}

/// What was seen of a body.
#[derive(Debug, Default)]
struct Watch {
    bytes: AtomicU64,
    ended: AtomicBool,
}

impl Watch {
    fn ended_empty(&self) -> bool {
        self.ended.load(Ordering::Acquire) && self.bytes.load(Ordering::Acquire) == 0
    }
}

/// Notes how much of a body was read and whether it ended properly.
fn watched<S>(body: S, watch: Arc<Watch>) -> impl Stream<Item = io::Result<Bytes>> + Send
where
    S: Stream<Item = io::Result<Bytes>> + Send,
{
    let mut body = Box::pin(body);
    let mut broken = false;
    futures_util::stream::poll_fn(move |context| {
        let item = body.poll_next_unpin(context);
        match &item {
            Poll::Ready(Some(Ok(bytes))) => {
                watch.bytes.fetch_add(bytes.len() as u64, Ordering::AcqRel);
            }
            Poll::Ready(Some(Err(_))) => broken = true,
            Poll::Ready(None) if !broken => watch.ended.store(true, Ordering::Release),
            _ => {}
        }
        item
    })
}
