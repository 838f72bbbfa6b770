//! Diff, Changes and DiffSize: a layer against its parent, another layer, or nothing.
//!
//! ```text
//!   applied layer, own parent    image + record ─► VM ─► the very bytes that were applied
//!   else                         images and sandboxes of both stacks ─► VM ─► canonical tar, changes, or a size
//! ```
//!
//! A tar that fails on its way is cut: the stream gives an error, never a clean end. Called by `api`; `pristine` and
//! `scrub` have jobs of their own.

use super::{
    ChangedPath, Driver, DriverError, blocking,
    comparison::control,
    cut::{CutDiffs, Sent},
    home::Home,
    live::Stillness,
    on_disk_thread,
};
use crate::{
    error::{CorruptFile, with_causes},
    store::{Layer, LayerId, LayerMeta, LayerState, layout},
    svm::{ExportJob, ExportKind, ExportSummary, IdMaps, Purpose, SvmError, TarDigest, TarStream},
    telemetry::{Phase, PhaseTimer, Phases, Transfer},
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

/// What a client wants of a canonical tar.
#[derive(Debug, Clone, Default)]
pub(super) struct CanonicalWishes {
    /// Host ids in sandboxes are mapped back to these containers' ids.
    pub(super) maps: IdMaps,
    /// The latest modification time of an entry, in seconds since 1970.
    pub(super) newest: Option<i64>,
}

impl Driver {
    /// `GraphDriver.Diff`: the tar of a layer against its parent, any other layer, or nothing (`parent` empty).
    pub async fn diff(&self, id: &str, parent: &str) -> Result<DiffStream, DriverError> {
        let home = self.home().await?;
        let wishes = CanonicalWishes { maps: home.id_maps(), newest: None };
        home.diff(id, parent, wishes, &self.phases, &self.cuts).await
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

impl Home {
    /// The tar of a layer against another; `wishes` are for a canonical one.
    pub(super) async fn diff(
        self: &Arc<Self>,
        id: &str,
        parent: &str,
        wishes: CanonicalWishes,
        phases: &Phases,
        cuts: &Arc<CutDiffs>,
    ) -> Result<DiffStream, DriverError> {
        let pair = self.pair(id, parent).await?;
        let (layer, meta) = (pair.target.top.layer.clone(), pair.target.top.meta.clone());
        let id = layer.id.clone();
        let waiting = phases.begin(Transfer::Diff, Phase::Wait);
        let lease = self
            .pool
            .lease(id.as_str(), Purpose::Export)
            .await
            .map_err(DriverError::svm(&id, "start a diff"))?;
        drop(waiting);
        let exporting = phases.begin(Transfer::Diff, Phase::Export);
        let (mut applied, mut live) = (None, None);
        let job = if let (true, LayerState::Applied) = (pair.own, meta.state) {
            applied = meta.applied.as_ref().map(|applied| applied.tar_digest);
            let opener = self.clone();
            let (image, record) = blocking(move || opener.exact_disks(&pair.target)).await?;
            ExportJob { kind: ExportKind::Exact { image, record }, live: None }
        } else {
            let own = pair.own;
            let comparison = self.comparison(pair).await?;
            let format = self.canonical_version(&layer, &meta, own).await?;
            let kind = ExportKind::Canonical {
                target: comparison.target,
                parent: comparison.parent,
                format,
                id_maps: wishes.maps,
                source_date_epoch: wishes.newest,
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
            home: self.clone(),
            layer,
            applied,
            live,
            sent: Sent::default(),
            cuts: cuts.clone(),
            _phase: exporting,
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
    applied: Option<TarDigest>,
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
                let digest = tar.summary().and_then(|s| s.tar_digest);
                if complete {
                    warn_hidden(&this.layer.id, tar.summary());
                }
                this.tar = None;
                if complete
                    && let Some(applied) = this.applied
                    && digest != Some(applied)
                {
                    // Image and record fit each other, but they belong to another layer.
                    let path = this.home.store.layout().layer_file(&this.layer.id, layout::RECORD_FILE);
                    let found = digest.map_or_else(|| "without a digest".into(), |d| d.to_string());
                    let reason = format!("the stored layer reproduces tar {found}, expected {applied}");
                    return Poll::Ready(Some(Err(CorruptFile::new(path, reason).into())));
                }
                if !complete {
                    return Poll::Ready(Some(Err(failed(
                        SvmError::Cancelled("the tar ended early"),
                        &this.layer.id,
                    ))));
                }
                Poll::Ready(None)
            }
        }
    }
}
