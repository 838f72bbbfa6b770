//! The Snapshots service: messages to names, labels and codes, and back.
//!
//! ```text
//!   request ─► checked ─► driver::snapshots ─► mounts_of, Info ─► reply
//! ```
//!
//! Invariants: what changes snapshots runs to its end, whether or not the client waits; a call that takes longer than
//! [`LIMIT`] fails with DeadlineExceeded, because containerd sets no deadline of its own; calls that only read use memory
//! alone. `snapshotter` in the requests is the name in containerd's configuration and is ignored. The model is
//! `core/snapshots/storage/bolt.go`. Called by containerd.

use super::{
    Face,
    called::Called,
    filter::{Candidate, Filters},
    mask, mounts,
};
use crate::driver::{
    DriverError,
    snapshots::{Moment, PrepareRequest, SnapshotInfo, SnapshotKind, labels::Labels},
};
use containerd_api::{
    snapshots::{
        CleanupRequest, CommitSnapshotRequest, Info, Kind, ListSnapshotsRequest, ListSnapshotsResponse,
        MountsRequest, MountsResponse, PrepareSnapshotRequest, PrepareSnapshotResponse,
        RemoveSnapshotRequest, StatSnapshotRequest, StatSnapshotResponse, UpdateSnapshotRequest,
        UpdateSnapshotResponse, UsageRequest, UsageResponse, ViewSnapshotRequest, ViewSnapshotResponse,
        snapshots_server::Snapshots as Service,
    },
    types::Mount,
};
use futures_util::{Stream, stream};
use prost_types::Timestamp;
use std::{collections::BTreeMap, pin::Pin, time::Duration};
use tonic::{Request, Response, Status};
use tracing::Instrument;

/// Longest time of a call, apart from Apply and Diff. The work goes on; containerd's next garbage collection removes what
/// it made.
const LIMIT: Duration = Duration::from_mins(2);
/// Snapshots in one message of a List, as containerd's own service sends them (`plugins/services/snapshots`).
const LIST_BLOCK: usize = 100;
/// Longest key or name, in bytes; containerd's are some 200.
const MAX_NAME: usize = 4096;

/// The service.
#[derive(Debug, Clone)]
pub(super) struct SnapshotService(pub(super) Face);

/// Runs a change to its end, and waits for it within the limit.
async fn to_the_end<T: Send + 'static>(
    called: Called,
    work: impl Future<Output = Result<T, DriverError>> + Send + 'static,
) -> Result<T, Status> {
    match tokio::time::timeout(LIMIT, tokio::spawn(work.instrument(called.span()))).await {
        Ok(Ok(result)) => called.end(result),
        Ok(Err(error)) => called.end(Err(DriverError::Internal(format!("a task ended early: {error}")))),
        Err(_) => Err(called.refuse(Status::deadline_exceeded(format!(
            "no end after {} s; the disk or the kernel does not answer",
            LIMIT.as_secs()
        )))),
    }
}

/// Checks a key or name.
fn name(field: &str, value: &str) -> Result<(), Status> {
    if value.is_empty() {
        return Err(Status::invalid_argument(format!("{field} is empty")));
    }
    if value.len() > MAX_NAME {
        return Err(Status::invalid_argument(format!("{field} is longer than {MAX_NAME} bytes")));
    }
    Ok(())
}

fn labels_of(sent: &Labels) -> Result<Labels, Status> {
    mask::stored(sent).map_err(|error| Status::invalid_argument(error.to_string()))
}

fn kind_of(kind: SnapshotKind) -> Kind {
    match kind {
        SnapshotKind::View => Kind::View,
        SnapshotKind::Active => Kind::Active,
        SnapshotKind::Committed => Kind::Committed,
    }
}

/// The name of a kind in filters (`core/snapshots/snapshotter.go`).
fn kind_name(kind: SnapshotKind) -> &'static str {
    match kind {
        SnapshotKind::View => "view",
        SnapshotKind::Active => "active",
        SnapshotKind::Committed => "committed",
    }
}

fn timestamp(at: Moment) -> Timestamp {
    Timestamp {
        seconds: i64::try_from(at.secs).unwrap_or(i64::MAX),
        // Below 10^9.
        nanos: at.nanos.cast_signed(),
    }
}

fn info_of(info: SnapshotInfo) -> Info {
    Info {
        name: info.name,
        parent: info.parent,
        kind: kind_of(info.kind).into(),
        created_at: Some(timestamp(info.created)),
        updated_at: Some(timestamp(info.updated)),
        labels: info.labels,
    }
}

impl SnapshotService {
    /// Prepare and View.
    async fn create(
        &self,
        method: &'static str,
        (key, parent, labels): (String, String, BTreeMap<String, String>),
    ) -> Result<Vec<Mount>, Status> {
        let called = Called::new(&self.0, method, &key);
        let checked = name("key", &key).and_then(|()| labels_of(&labels));
        let labels = match checked {
            Ok(labels) => labels,
            Err(status) => return Err(called.refuse(status)),
        };
        let (snapshots, request) = (self.0.snapshots().clone(), PrepareRequest { key, parent, labels });
        let view = method == "View";
        let shown = to_the_end(called, async move {
            if view { snapshots.view(request).await } else { snapshots.prepare(request).await }
        });
        Ok(mounts::mounts_of(&shown.await?))
    }
}

#[tonic::async_trait]
impl Service for SnapshotService {
    type ListStream = Pin<Box<dyn Stream<Item = Result<ListSnapshotsResponse, Status>> + Send>>;

    async fn prepare(
        &self,
        request: Request<PrepareSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        let PrepareSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let mounts = self.create("Prepare", (key, parent, labels)).await?;
        Ok(Response::new(PrepareSnapshotResponse { mounts }))
    }

    async fn view(
        &self,
        request: Request<ViewSnapshotRequest>,
    ) -> Result<Response<ViewSnapshotResponse>, Status> {
        let ViewSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let mounts = self.create("View", (key, parent, labels)).await?;
        Ok(Response::new(ViewSnapshotResponse { mounts }))
    }

    async fn mounts(&self, request: Request<MountsRequest>) -> Result<Response<MountsResponse>, Status> {
        let key = request.into_inner().key;
        let called = Called::new(&self.0, "Mounts", &key);
        let snapshots = self.0.snapshots().clone();
        let shown = to_the_end(called, async move { snapshots.mounts(&key).await }).await?;
        Ok(Response::new(MountsResponse { mounts: mounts::mounts_of(&shown) }))
    }

    async fn commit(&self, request: Request<CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let CommitSnapshotRequest { name: new, key, labels, parent, .. } = request.into_inner();
        let called = Called::new(&self.0, "Commit", &key);
        let checked = name("name", &new).and_then(|()| labels_of(&labels));
        let labels = match checked {
            Ok(labels) => labels,
            Err(status) => return Err(called.refuse(status)),
        };
        let snapshots = self.0.snapshots().clone();
        let parent = (!parent.is_empty()).then_some(parent);
        to_the_end(called, async move { snapshots.commit(new, &key, parent, labels).await }).await?;
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        let key = request.into_inner().key;
        let called = Called::new(&self.0, "Remove", &key);
        let removed = self.0.snapshots().remove(&key).instrument(called.span()).await;
        called.end(removed)?;
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<StatSnapshotRequest>,
    ) -> Result<Response<StatSnapshotResponse>, Status> {
        let key = request.into_inner().key;
        let called = Called::new(&self.0, "Stat", &key);
        let info = called.end(self.0.snapshots().stat(&key))?;
        Ok(Response::new(StatSnapshotResponse { info: Some(info_of(info)) }))
    }

    async fn update(
        &self,
        request: Request<UpdateSnapshotRequest>,
    ) -> Result<Response<UpdateSnapshotResponse>, Status> {
        let UpdateSnapshotRequest { info, update_mask, .. } = request.into_inner();
        let info = info.unwrap_or_default();
        let called = Called::new(&self.0, "Update", &info.name);
        let (sent, paths) = (info.labels, update_mask.unwrap_or_default().paths);
        let invalid = |error: mask::LabelError| Status::invalid_argument(error.to_string());
        // First against the labels of this moment, so that a bad mask changes nothing.
        let tried = match self.0.snapshots().stat(&info.name) {
            Ok(known) => mask::updated(&known.labels, &sent, &paths).map_err(invalid),
            Err(error) => return called.end(Err(error)),
        };
        if let Err(status) = tried {
            return Err(called.refuse(status));
        }
        let snapshots = self.0.snapshots().clone();
        let changed = to_the_end(called, async move {
            let change = move |labels: &mut Labels| {
                if let Ok(changed) = mask::updated(labels, &sent, &paths) {
                    *labels = changed;
                }
            };
            snapshots.update(&info.name, change).await
        });
        Ok(Response::new(UpdateSnapshotResponse { info: Some(info_of(changed.await?)) }))
    }

    async fn list(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let called = Called::new(&self.0, "List", "");
        let filters = match Filters::parse(&request.into_inner().filters) {
            Ok(filters) => filters,
            Err(error) => return Err(called.refuse(Status::invalid_argument(error.to_string()))),
        };
        let wanted = |info: &SnapshotInfo| {
            filters.matches(&Candidate {
                name: &info.name,
                parent: &info.parent,
                kind: kind_name(info.kind),
                labels: &info.labels,
            })
        };
        let found: Vec<Info> = self.0.snapshots().list(wanted).into_iter().map(info_of).collect();
        called.done();
        let blocks: Vec<_> = found
            .chunks(LIST_BLOCK)
            .map(|block| Ok(ListSnapshotsResponse { info: block.to_vec() }))
            .collect();
        Ok(Response::new(Box::pin(stream::iter(blocks))))
    }

    async fn usage(&self, request: Request<UsageRequest>) -> Result<Response<UsageResponse>, Status> {
        let key = request.into_inner().key;
        let called = Called::new(&self.0, "Usage", &key);
        let counted = self.0.snapshots().usage(&key).instrument(called.span()).await;
        let usage = called.end(counted)?;
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        Ok(Response::new(UsageResponse { size: number(usage.bytes), inodes: number(usage.inodes) }))
    }

    async fn cleanup(&self, _: Request<CleanupRequest>) -> Result<Response<()>, Status> {
        let called = Called::new(&self.0, "Cleanup", "");
        self.0.snapshots().cleanup();
        called.done();
        Ok(Response::new(()))
    }
}
