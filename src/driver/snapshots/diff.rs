//! Diff: the difference between two snapshots, out as a blob.
//!
//! ```text
//!   mounts ─► layers ─► exact record, or canonical tar ─► daemon: SHA-256 ─┬─► plain: the blob
//!                                                                          └─► service VM: compress ─┬─► the blob
//!     equal, before the blob ends ◄─ daemon: SHA-256 ◄─ another service VM: expand ◄──────────────────┘
//! ```
//!
//! Clients keep the tar's digest beside the blob (`containerd.io/uncompressed`) and trust it without expanding the blob.
//! So what a service VM returned is not believed: the tar of a layer that was unpacked must have the digest that its bytes
//! had then, and a compressed blob must expand to the bytes that were compressed, in a VM that has seen neither the layers
//! nor the tar. A blob that fails ends with an error, and is not committed.
//!
//! Called by `containerd`.

use super::{
    ShownPlace, Snapshots, labels,
    shown::{Found, not_ours},
    transfer::{Tally, is_view, keeping_error, tallied},
};
use crate::{
    driver::{
        DriverError,
        comparison::disks_of,
        diff::{CanonicalWishes, DiffStream},
    },
    error::CorruptFile,
    store::{LayerId, LayerState, Member, Snapshot, layout},
    svm::{
        CompressJob, Compression, DigestKind, Digesting, ExpandJob, ExpandLimits, Lease, Purpose, Recoded,
        SvmError, TarDigest,
    },
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use std::{
    io,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    task::JoinHandle,
};
use tracing::Instrument;

/// Turns of a compressed diff, of two service VMs each: one exports, one compresses, one expands again.
const TURNS: u32 = 2;
/// Fewest service VMs with which compressed bytes are expanded again (`lcow.pool.max`): with fewer, a Diff would wait for
/// one that it holds itself.
const VMS_TO_VERIFY: usize = 4;
/// Chunks of a blob that wait to be expanded again.
const AHEAD: usize = 2;

/// What the messages of a Diff name.
const ID: &str = "diff";
const COMPRESS: &str = "compress its tar";
const VERIFY: &str = "expand its blob again";

/// Two snapshots to be compared.
#[derive(Debug, Clone)]
pub struct DiffRequest {
    /// The older one.
    pub left: ShownPlace,
    /// The newer one.
    pub right: ShownPlace,
    /// Upper bound of the modification times in a canonical tar, in seconds since 1970 (`SOURCE_DATE_EPOCH`).
    pub newest: Option<i64>,
}

/// The bytes of a diff as they are stored, with what is known of its tar.
pub struct PackedDiff {
    bytes: Pin<Box<dyn Stream<Item = Result<Bytes, DriverError>> + Send>>,
    tally: Arc<Tally>,
    _turns: OwnedSemaphorePermit,
}

impl PackedDiff {
    /// Digest and length of the uncompressed tar; `None` before the end.
    pub fn plain(&self) -> Option<(TarDigest, u64)> {
        self.tally.known()
    }
}

impl Stream for PackedDiff {
    type Item = Result<Bytes, DriverError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.bytes.poll_next_unpin(context)
    }
}

impl Snapshots {
    /// Whether both are mounts of this service, so that it can compare them.
    pub fn knows(&self, request: &DiffRequest) -> bool {
        let is = |id: &LayerId, what: fn(&Member) -> bool| self.home().store.get(id).is_ok_and(|m| what(&m));
        let left = match self.find_shown(&request.left) {
            Some(Found::Layer(id)) => is(&id, has_content) || is(&id, is_view),
            Some(Found::Nothing) => true,
            None => false,
        };
        // Of nothing there is no layer to compare.
        let right = matches!(self.find_shown(&request.right), Some(Found::Layer(id)) if is(&id, has_content));
        left && right
    }

    /// The tar of the difference between two snapshots, compressed by a service VM of its own.
    ///
    /// # Errors
    /// The mounts are not ours, or a service VM fails; also as items, as is a tar or a blob with other bytes than it must
    /// have.
    pub async fn packed_diff(
        &self,
        request: &DiffRequest,
        compression: Compression,
    ) -> Result<PackedDiff, DriverError> {
        let verified = compression != Compression::Plain && self.options().pool_max >= VMS_TO_VERIFY;
        let turns = self.turns(if verified { TURNS } else { 1 }).await?;
        let (tar, promised) = self.diff(request).await?;
        let tally = Arc::new(Tally::default());
        let tar = as_promised(tallied(tar, tally.clone()), tally.clone(), promised);
        if compression == Compression::Plain {
            return Ok(PackedDiff { bytes: Box::pin(tar), tally, _turns: turns });
        }
        let (body, kept) = keeping_error(tar);
        let lease = self.lease_for("compress").await?;
        let job = CompressJob::reproducible(compression);
        let packed = lease.compress(job, body).await.map_err(DriverError::svm(&ID, COMPRESS))?;
        let again = if verified {
            let lease = self.lease_for("verify").await?;
            Some(Again::begin(lease, compression).await.map_err(DriverError::svm(&ID, VERIFY))?)
        } else {
            None
        };
        let state = Packing { packed, again, kept, tally: tally.clone() };
        let bytes = stream::unfold(Some(state), |state| async {
            let mut state = state?;
            match state.next().await {
                Ok(Some(chunk)) => Some((Ok(chunk), Some(state))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(PackedDiff { bytes: Box::pin(bytes), tally, _turns: turns })
    }

    /// A service VM that nothing else uses.
    async fn lease_for(&self, work: &str) -> Result<Lease, DriverError> {
        let name = format!("{}-{work}", uuid::Uuid::new_v4().simple());
        let lease = self.home().pool.lease(&name, Purpose::Work).await;
        lease.map_err(DriverError::svm(&ID, "start to compress its tar"))
    }

    /// Another committed layer with the disks of `target`, if that one stands on the disks `below` and `target` does not:
    /// equal layers in one stack show once, so that two stacks may look the same.
    fn on_parent(&self, target: Snapshot, below: &[LayerId]) -> Snapshot {
        let store = &self.home().store;
        let below_it = |snapshot: &Snapshot| match snapshot.ancestors.first() {
            Some(parent) => store.snapshot(&parent.layer.id).map(|p| disks_of(&p)).unwrap_or_default(),
            None => Vec::new(),
        };
        if below_it(&target) == below || target.top.meta.state != LayerState::Applied {
            return target;
        }
        let (disks, image) = (disks_of(&target), target.top.disk_id());
        let others = store.layers_where(|layer| {
            let applied = layer.meta.as_ref().ok().and_then(|meta| meta.applied.as_ref());
            applied.and_then(|a| a.shared.as_ref()).is_some_and(|s| &s.image == image)
        });
        let others = others.into_iter().filter_map(|layer| store.snapshot(&layer.id).ok());
        let mut fitting = others.filter(|other| disks_of(other) == disks && below_it(other) == below);
        fitting.next().unwrap_or(target)
    }

    /// The tar of the difference between two snapshots, uncompressed; and what its digest must be, if it is a tar that was
    /// applied.
    ///
    /// # Errors
    /// The mounts are not ours, or a service VM fails.
    async fn diff(&self, request: &DiffRequest) -> Result<(DiffStream, Option<Promised>), DriverError> {
        let home = self.settled().await?.clone();
        let find = |place| match self.find_shown(place) {
            // The view of nothing has a directory as well.
            Some(Found::Layer(id)) if home.store.get(&id).is_ok_and(|m| is_view(&m)) => Some(Found::Nothing),
            found => found,
        };
        let (Some(left), Some(Found::Layer(right))) = (find(&request.left), find(&request.right)) else {
            return Err(not_ours());
        };
        let left_disks = match &left {
            Found::Layer(id) => disks_of(&home.store.snapshot(id)?),
            Found::Nothing => Vec::new(),
        };
        let target = self.on_parent(home.store.snapshot(&right)?, &left_disks);
        let right = target.id().clone();
        // Any layer with the disks of the parent is as good as the parent.
        let parent = match target.ancestors.first() {
            Some(parent) if disks_of(&home.store.snapshot(&parent.layer.id)?) == left_disks => {
                parent.layer.id.to_string()
            }
            _ => left.as_text().to_owned(),
        };
        let given = target.top.meta.snapshot.as_ref().map(|s| s.labels.clone()).unwrap_or_default();
        let wishes = CanonicalWishes { maps: labels::id_maps(&given)?, newest: request.newest };
        let own = parent == target.top.layer.parent().map_or("", LayerId::as_str);
        let applied = target.top.meta.applied.as_ref().filter(|_| own);
        let promised = applied.and_then(|applied| applied.shared.as_ref()).map(|shared| Promised {
            image: home.store.layout().layer_file(&right, layout::LAYER_FILE),
            diff_id: shared.diff_id,
        });
        let tar = home.diff(right.as_str(), &parent, wishes, &self.inner.phases, &self.inner.cuts).await?;
        Ok((tar, promised))
    }
}

/// The digest that the tar of a layer must have.
struct Promised {
    /// The layer's image, for the message.
    image: PathBuf,
    diff_id: TarDigest,
}

/// `tar`, with an error at its end if it has another digest than it must have. `tally` is that of `tar`.
fn as_promised<S>(
    tar: S,
    tally: Arc<Tally>,
    promised: Option<Promised>,
) -> impl Stream<Item = Result<Bytes, DriverError>> + Send
where
    S: Stream<Item = Result<Bytes, DriverError>> + Send,
{
    let end = stream::once(async move {
        let (Some(promised), Some((found, _))) = (promised, tally.known()) else { return None };
        let reason =
            format!("its tar has digest {found}, expected {}; remove it and pull it again", promised.diff_id);
        (found != promised.diff_id).then(|| Err(CorruptFile::new(promised.image, reason).into()))
    });
    tar.chain(end.filter_map(|error| async { error }))
}

/// A tar being compressed, and expanded again.
struct Packing {
    packed: Recoded,
    again: Option<Again>,
    /// What the tar failed with.
    kept: Arc<Mutex<Option<DriverError>>>,
    tally: Arc<Tally>,
}

impl Packing {
    /// The next bytes of the blob; `None` if it is complete and right.
    async fn next(&mut self) -> Result<Option<Bytes>, DriverError> {
        match self.packed.next().await {
            Some(Ok(chunk)) => {
                if let Some(again) = &self.again {
                    again.add(chunk.clone()).await;
                }
                Ok(Some(chunk))
            }
            Some(Err(error)) => {
                Err(self.kept.lock().take().unwrap_or_else(|| DriverError::svm(&ID, COMPRESS)(error)))
            }
            None => {
                let Some(again) = self.again.take() else { return Ok(None) };
                let found = again.finish().await.map_err(DriverError::svm(&ID, VERIFY))?;
                if Some(found) == self.tally.known() {
                    return Ok(None);
                }
                let vm = "that compressed".to_owned();
                let reason = "the blob does not expand to the tar that was compressed".to_owned();
                Err(DriverError::svm(&ID, COMPRESS)(SvmError::Protocol { vm, reason }))
            }
        }
    }
}

/// A blob that is expanded again while it is written.
struct Again {
    blob: mpsc::Sender<io::Result<Bytes>>,
    plain: JoinHandle<Result<(TarDigest, u64), SvmError>>,
}

impl Again {
    async fn begin(lease: Lease, format: Compression) -> Result<Self, SvmError> {
        let (blob, rest) = mpsc::channel(AHEAD);
        let body = stream::unfold(rest, |mut rest| async { rest.recv().await.map(|chunk| (chunk, rest)) });
        // The tar has the bytes that it has: what is compared is bounded by what was sent.
        let job = ExpandJob { format: Some(format), limits: ExpandLimits::of_output(u64::MAX) };
        let mut plain = lease.expand(job, body).await?;
        let digested = async move {
            let digesting = Digesting::start(DigestKind::Sha256);
            let mut bytes = 0;
            while let Some(chunk) = plain.next().await {
                let chunk = chunk?;
                bytes += chunk.len() as u64;
                digesting.update(chunk).await;
            }
            let digest = digesting.finish().await.ok_or(SvmError::Cancelled("the service ends"))?;
            Ok((digest, bytes))
        };
        Ok(Self { blob, plain: tokio::spawn(digested.in_current_span()) })
    }

    async fn add(&self, chunk: Bytes) {
        // If the expansion has failed, `finish` says why.
        let _ = self.blob.send(Ok(chunk)).await;
    }

    /// Digest and length of what the blob expands to.
    async fn finish(self) -> Result<(TarDigest, u64), SvmError> {
        drop(self.blob);
        self.plain.await.unwrap_or(Err(SvmError::Cancelled("the expansion's task ended early")))
    }
}

fn has_content(member: &Member) -> bool {
    matches!(member.meta.state, LayerState::Applied | LayerState::Sandbox)
}
