//! Apply: a layer's tar in.
//!
//! ```text
//!   bytes of the blob ─► (service VM: gunzip, unzstd) ─► daemon: SHA-256, count ─► service VM: tar ─► image
//!   ─► another service VM checks the image ─► same tar known? its files instead ─► sync ─► commit "applied"
//! ```
//!
//! The diffID names the layer for every later pull of the node, and containerd compares it with a number that the image's
//! author chose. So it is computed here, over the bytes that were sent to the VM that parses the tar: whatever a hostile
//! tar does to that VM, it cannot make its layer pass for another. A compressed blob is expanded by a VM of its own, which
//! ends with it.
//!
//! Snapshots of the same tar share one image (`lcow.containerd.share`), if the tar means the same on each: it describes all
//! its directories and has no hard link into lower layers, or the lower layers are the same. The client has sent the
//! bytes by then, so it learns nothing. Called by `containerd`.

use super::{
    ShownPlace, Snapshots, labels,
    shown::{Found, not_ours},
};
use crate::{
    driver::{
        DriverError,
        apply::{Lowers, Plan, tar_limits},
        comparison::disks_of,
        error::unfinished,
        on_disk_thread, room,
    },
    error::CorruptFile,
    store::{
        AppliedMeta, DiskThread, Layer, LayerId, LayerState, Member, SharedMeta, Snapshot, SnapshotKind,
        SnapshotUsage, Staged, chain::MAX_CHAIN, layout,
    },
    svm::{
        ApplySummary, Compression, DigestKind, Digesting, ErrorKind, ExpandJob, ExpandLimits, LowerUse,
        Purpose, SNIFF_BYTES, TarDigest, sniff,
    },
};
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt, future::BoxFuture, stream};
use parking_lot::Mutex;
use std::{
    io,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

/// What a service VM does with a compressed blob.
const EXPAND: &str = "expand its blob";

/// The bytes of a blob, or of a tar.
pub type BlobBytes = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

/// A blob that can be read from its beginning, more than once.
pub trait Blob<E>: Send + Sync {
    /// Its bytes.
    fn open(&self) -> BoxFuture<'_, Result<BlobBytes, E>>;
}

/// A layer to be unpacked.
#[derive(Debug, Clone)]
pub struct ApplyRequest {
    /// The mounts that containerd passes on.
    pub place: ShownPlace,
}

/// What was unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    /// SHA-256 of the uncompressed tar.
    pub diff_id: TarDigest,
    /// Bytes of the uncompressed tar.
    pub bytes: u64,
    /// How the blob was compressed.
    pub compression: Compression,
}

/// Removes an Apply from the list of those in progress.
struct InProgress<'a> {
    snapshots: &'a Snapshots,
    id: LayerId,
}

impl Drop for InProgress<'_> {
    fn drop(&mut self) {
        self.snapshots.inner.applying.lock().remove(&self.id);
    }
}

/// Digest and length of a stream that has ended.
#[derive(Debug, Default)]
pub(super) struct Tally(Mutex<Option<(TarDigest, u64)>>);

impl Tally {
    /// `None` before the end.
    pub(super) fn known(&self) -> Option<(TarDigest, u64)> {
        *self.0.lock()
    }
}

/// A stream as the body of an operation of a service VM, which reports its errors in words of its own: the first one is kept.
pub(super) fn keeping_error<S>(
    body: S,
) -> (impl Stream<Item = io::Result<Bytes>> + Send, Arc<Mutex<Option<DriverError>>>)
where
    S: Stream<Item = Result<Bytes, DriverError>> + Send,
{
    let kept: Arc<Mutex<Option<DriverError>>> = Arc::default();
    let first = kept.clone();
    let body = body.map(move |chunk| {
        chunk.map_err(|error| {
            let text = io::Error::other(error.to_string());
            first.lock().get_or_insert(error);
            text
        })
    });
    (body, kept)
}

/// Digests what passes by. The digest is there before the stream ends.
pub(super) fn tallied<S, E>(body: S, tally: Arc<Tally>) -> impl Stream<Item = Result<Bytes, E>> + Send
where
    S: Stream<Item = Result<Bytes, E>> + Send,
    E: Send,
{
    struct State<S> {
        body: S,
        digesting: Option<Digesting>,
        bytes: u64,
        tally: Arc<Tally>,
    }
    let state: State<Pin<Box<S>>> = State {
        body: Box::pin(body),
        digesting: Some(Digesting::start(DigestKind::Sha256)),
        bytes: 0,
        tally,
    };
    futures_util::stream::unfold(state, |mut state| async move {
        let digesting = state.digesting.as_ref()?;
        match state.body.next().await {
            Some(Ok(chunk)) => {
                state.bytes += chunk.len() as u64;
                digesting.update(chunk.clone()).await;
                Some((Ok(chunk), state))
            }
            Some(Err(error)) => {
                state.digesting = None;
                Some((Err(error), state))
            }
            None => {
                let digest = state.digesting.take()?.finish().await;
                *state.tally.0.lock() = digest.map(|digest| (digest, state.bytes));
                None
            }
        }
    })
}

impl Snapshots {
    /// Whether these mounts are those of a snapshot that a layer can be unpacked into by [`Snapshots::apply`].
    pub fn takes_layer(&self, place: &ShownPlace) -> bool {
        let Some(Found::Layer(id)) = self.find_shown(place) else { return false };
        self.home().store.get(&id).is_ok_and(|member| {
            member.meta.state != LayerState::Sandbox
                && member.meta.snapshot.as_ref().is_some_and(|s| s.kind == SnapshotKind::Active)
        })
    }

    /// The key or name of a snapshot with these mounts; of several, the one that was created last.
    pub fn name_of(&self, place: &ShownPlace) -> Option<String> {
        let Found::Layer(id) = self.find_shown(place)? else { return None };
        let store = &self.home().store;
        let own = store.snapshot(&id).ok()?;
        let name = |member: &Member| member.meta.snapshot.as_ref().map(|s| (s.created, s.name.clone()));
        if own.top.meta.snapshot.as_ref().is_some_and(|s| s.kind != SnapshotKind::Committed) {
            return name(&own.top).map(|(_, name)| name);
        }
        // A view of it: its mounts do not tell whose.
        let disks = disks_of(&own);
        let same = |member: &Member| {
            store
                .snapshot(&member.layer.id)
                .is_ok_and(|snapshot| is_view(member) && disks_of(&snapshot) == disks)
        };
        let views =
            store.snapshots_listed().into_iter().filter(same).filter_map(|member| name(&member)).max();
        views.or_else(|| name(&own.top)).map(|(_, name)| name)
    }

    /// A layer for this snapshot was refused before it reached [`Snapshots::apply`]: the snapshot gets no name without one.
    pub fn spoil(&self, place: &ShownPlace) {
        if let Some(Found::Layer(id)) = self.find_shown(place) {
            self.inner.spoiled.lock().insert(id);
        }
    }

    /// Unpacks a blob into a snapshot. `open` gives the bytes of the blob, from the beginning each time; the blob must end
    /// where they end.
    ///
    /// # Errors
    /// The snapshot has content, or another Apply of it is in progress; the blob is refused; `open` or its bytes fail; the
    /// snapshot is removed meanwhile. After an error the snapshot is as it was.
    pub async fn apply<E>(&self, request: ApplyRequest, blob: &dyn Blob<E>) -> Result<Applied, E>
    where
        E: From<DriverError>,
    {
        let home = self.settled().await?.clone();
        let Some(Found::Layer(id)) = self.find_shown(&request.place) else { return Err(not_ours().into()) };
        let cancel = CancellationToken::new();
        {
            let mut applying = self.inner.applying.lock();
            if applying.contains_key(&id) {
                let reason = "a layer is being unpacked into this snapshot already";
                return Err(super::precondition(reason.into()).into());
            }
            applying.insert(id.clone(), cancel.clone());
        }
        let _in_progress = InProgress { snapshots: self, id: id.clone() };
        let member = home.store.get(&id).map_err(DriverError::from)?;
        if member.meta.state != LayerState::Created {
            return Err(super::precondition("a layer was unpacked into this snapshot before".into()).into());
        }
        // From here on, only a whole layer clears this: an error, a cancellation or a panic leaves it.
        self.inner.spoiled.lock().insert(id.clone());
        let reserved = home.clone();
        on_disk_thread(move |thread| reserved.check_reserve(thread)).await?;
        let applied = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(DriverError::Usage(format!(
                "the snapshot of layer {id} was removed while its layer was being unpacked"
            )).into()),
            applied = self.unpack(&member, blob) => applied,
        };
        if applied.is_ok() {
            self.inner.spoiled.lock().remove(&id);
        }
        applied
    }

    /// Unpacks; if the tar needs layers below that are still being unpacked themselves, waits for them and does it again.
    /// If they are unpacked already, once is enough.
    async fn unpack<E: From<DriverError>>(&self, member: &Member, blob: &dyn Blob<E>) -> Result<Applied, E> {
        let own = member.layer.parent().cloned();
        let below =
            member.meta.snapshot.as_ref().and_then(|s| s.labels.get(labels::PARENT_CHAIN_ID)).cloned();
        let (Some(below), None) = (below, &own) else {
            let plan = Plan {
                from: LayerState::Created,
                lower_use: LowerUse::LinksAndDirectories,
                lowers: Lowers::Parent(own),
            };
            return Box::pin(self.unpack_once(member, plan, blob)).await.map_err(Failed::into_error);
        };
        let on = |stack| Plan {
            from: LayerState::Created,
            lower_use: LowerUse::LinksAndDirectories,
            lowers: Lowers::Stack(Box::new(stack)),
        };
        if let Some(stack) = self.chain_now(&below)? {
            return Box::pin(self.unpack_once(member, on(stack), blob)).await.map_err(Failed::into_error);
        }
        let unknown =
            Plan { from: LayerState::Created, lower_use: LowerUse::Unknown, lowers: Lowers::Parent(None) };
        match Box::pin(self.unpack_once(member, unknown, blob)).await {
            Err(Failed::Driver(error)) if needs_lowers(&error) => {
                tracing::info!(id = %member.layer.id, chain = below, "the layer needs those below it; waiting for them");
                let stack = self.wait_for_chain(below).await?;
                Box::pin(self.unpack_once(member, on(stack), blob)).await.map_err(Failed::into_error)
            }
            done => done.map_err(Failed::into_error),
        }
    }

    async fn unpack_once<E: From<DriverError>>(
        &self,
        member: &Member,
        plan: Plan,
        blob: &dyn Blob<E>,
    ) -> Result<Applied, Failed<E>> {
        let _turn = self.turn().await?;
        let bytes = blob.open().await.map_err(Failed::Blob)?;
        let (plain, compression) = self.expanded(&member.layer.id, bytes).await?;
        let (diff_id, bytes) = self.apply_plain(&member.layer, plan, plain).await?;
        Ok(Applied { diff_id, bytes, compression })
    }

    /// Makes a plain tar the content of a layer, for a caller with a turn; digest and length of the tar.
    pub(super) async fn apply_plain(
        &self,
        layer: &Layer,
        plan: Plan,
        plain: BlobBytes,
    ) -> Result<(TarDigest, u64), DriverError> {
        let home = self.home();
        let lowers: Vec<LayerId> = match &plan.lowers {
            Lowers::Parent(Some(parent)) => disks_of(&home.store.snapshot(parent)?),
            Lowers::Parent(None) => Vec::new(),
            Lowers::Stack(stack) => disks_of(stack),
        };
        let tally = Arc::new(Tally::default());
        let body = room::watched(tallied(plain, tally.clone()), home.clone());
        let (sharing, own, counted) = (home.clone(), layer.id.clone(), tally.clone());
        let finish = move |thread: &DiskThread, staged: &Staged, applied, summary: &ApplySummary| {
            let (diff_id, bytes) = counted.known().ok_or_else(|| unfinished(&own))?;
            if summary.tar_bytes != bytes {
                let reason =
                    format!("the service VM reports a tar of {} bytes, {bytes} were sent", summary.tar_bytes);
                return Err(CorruptFile::new(staged.path().join(layout::LAYER_FILE), reason).into());
            }
            let shared = SharedMeta {
                diff_id,
                image: own.clone(),
                depends_on: summary.depends_on_lowers().then_some(lowers),
                usage: SnapshotUsage { bytes: summary.usage_bytes, inodes: summary.usage_inodes },
            };
            Ok(sharing.share(thread, &own, staged, AppliedMeta { shared: Some(shared), ..applied }))
        };
        home.apply(layer, plan, body, &self.inner.phases, finish).await?;
        tally.known().ok_or_else(|| unfinished(&layer.id))
    }

    /// The plain bytes of a blob. A compressed one is expanded by a service VM, which gets nothing else.
    async fn expanded(
        &self,
        id: &LayerId,
        bytes: BlobBytes,
    ) -> Result<(BlobBytes, Compression), DriverError> {
        let home = self.home();
        let mut bytes = bytes;
        let mut first = BytesMut::new();
        while first.len() < SNIFF_BYTES {
            match bytes.next().await {
                Some(Ok(chunk)) => first.extend_from_slice(&chunk),
                Some(Err(error)) => {
                    // Reported by the apply, like a failure in the middle.
                    let rest = stream::iter([Ok(first.freeze()), Err(error)]);
                    return Ok((Box::pin(rest), Compression::Plain));
                }
                None => break,
            }
        }
        let first = first.freeze();
        let format = sniff(&first);
        let whole = stream::iter([Ok(first)]).chain(bytes);
        if format == Compression::Plain {
            return Ok((Box::pin(whole), format));
        }
        let limits = ExpandLimits::of_output(tar_limits(home.options.max_layer_bytes).tar_bytes);
        // A name of its own, and so a VM of its own.
        let name = format!("{id}-expand");
        let lease = home
            .pool
            .lease(&name, Purpose::Work)
            .await
            .map_err(DriverError::svm(id, "start to expand its blob"))?;
        let job = ExpandJob { format: Some(format), limits };
        let expanded = lease.expand(job, whole).await.map_err(DriverError::svm(id, EXPAND))?;
        let plain = expanded.map(|chunk| chunk.map_err(|error| io::Error::other(Box::new(error))));
        Ok((Box::pin(plain), format))
    }

    /// The right to use two service VMs at once. Transfers that each hold one and wait for a second would wait for each
    /// other.
    pub(super) async fn turn(&self) -> Result<OwnedSemaphorePermit, DriverError> {
        self.turns(1).await
    }

    /// The right to use twice so many service VMs at once.
    pub(super) async fn turns(&self, count: u32) -> Result<OwnedSemaphorePermit, DriverError> {
        let turns = self.inner.turns.clone();
        turns
            .acquire_many_owned(count)
            .await
            .map_err(|_| DriverError::Internal("transfers have ended".into()))
    }

    /// The layers of a chain, top first, as soon as all are unpacked.
    async fn wait_for_chain(&self, chain: String) -> Result<Snapshot, DriverError> {
        /// Time between two looks.
        const LOOK: Duration = Duration::from_millis(50);
        let begun = Instant::now();
        loop {
            if let Some(stack) = self.chain_now(&chain)? {
                return Ok(stack);
            }
            if begun.elapsed() >= self.options().idle_timeout {
                return Err(super::precondition(format!(
                    "the layers below (chain {chain}) were not unpacked within {} s; pull the image again, or set \
                     max_concurrent_unpacks = 1 in containerd's configuration",
                    self.options().idle_timeout.as_secs()
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The layers of a chain if all are unpacked: committed ones know their ancestors, others name their parent's chain.
    fn chain_now(&self, chain: &str) -> Result<Option<Snapshot>, DriverError> {
        let store = &self.home().store;
        let mut members: Vec<Member> = Vec::new();
        let mut next = Some(chain.to_owned());
        while let Some(chain) = next.take() {
            let is_it = |member: &&Member| {
                let snapshot = member.meta.snapshot.as_ref();
                snapshot.is_some_and(|s| {
                    s.labels.get(labels::TARGET_REF) == Some(&chain)
                        || (s.kind == SnapshotKind::Committed && s.name.rsplit('/').next() == Some(&chain))
                }) && member.meta.state == LayerState::Applied
            };
            let listed = store.snapshots_listed();
            let Some(found) = listed.iter().find(is_it) else { return Ok(None) };
            let snapshot = store.snapshot(&found.layer.id)?;
            let labels = found.meta.snapshot.as_ref().map(|s| s.labels.clone()).unwrap_or_default();
            if snapshot.ancestors.is_empty() {
                next = labels.get(labels::PARENT_CHAIN_ID).cloned();
            }
            members.extend(snapshot.members().cloned());
            if members.len() > MAX_CHAIN {
                return Err(super::precondition(format!(
                    "the chain of {chain} has more than {MAX_CHAIN} layers"
                )));
            }
        }
        let mut members = members.into_iter();
        let Some(top) = members.next() else { return Ok(None) };
        Ok(Some(Snapshot { top, ancestors: members.collect() }))
    }
}

pub(super) fn is_view(member: &Member) -> bool {
    member.meta.snapshot.as_ref().is_some_and(|s| s.kind == SnapshotKind::View)
}

/// Whether an apply ended because the tar depends on layers that it did not have.
fn needs_lowers(error: &DriverError) -> bool {
    matches!(error, DriverError::Svm(attempt) if attempt.source.refused_kind() == Some(ErrorKind::NeedsLowers))
}

/// An Apply that failed, before it is known for whom.
enum Failed<E> {
    /// In the driver.
    Driver(DriverError),
    /// The blob could not be opened.
    Blob(E),
}

impl<E> From<DriverError> for Failed<E> {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

impl<E: From<DriverError>> Failed<E> {
    fn into_error(self) -> E {
        match self {
            Self::Driver(error) => error.into(),
            Self::Blob(error) => error,
        }
    }
}
