//! A client of the snapshot and diff services that is not containerd's: it can send what containerd would not, and sees
//! the status codes.
//!
//! ```text
//!   test ─► Client ─gRPC over a unix socket─► the product | containerd (the control of what the codes are)
//! ```

use containerd_api::{
    NAMESPACE_HEADER,
    diff::{ApplyRequest, DiffRequest, diff_client::DiffClient},
    snapshots::{
        CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest,
        PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest,
        UsageRequest, UsageResponse, ViewSnapshotRequest, snapshots_client::SnapshotsClient,
    },
    types::{Descriptor, Mount},
};
use std::{collections::BTreeMap, path::Path, time::Duration};
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};

/// Longest time of one call: a call that hangs fails its test.
const CALL_LIMIT: Duration = Duration::from_mins(1);

/// What a call came to.
pub(crate) type Outcome<T> = Result<T, Status>;

/// A connection. Calls block; several threads may make them at once.
#[derive(Debug)]
pub(crate) struct Client {
    runtime: tokio::runtime::Runtime,
    snapshots: SnapshotsClient<Channel>,
    diff: DiffClient<Channel>,
    /// The snapshotter that requests name.
    snapshotter: String,
    namespace: String,
    limit: Duration,
}

/// Labels, as requests have them.
pub(crate) fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// A mount, as requests of Apply and Diff have it.
pub(crate) fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        r#type: kind.to_owned(),
        source: source.to_owned(),
        target: String::new(),
        options: options.iter().map(ToString::to_string).collect(),
    }
}

/// A blob's descriptor.
pub(crate) fn descriptor(media_type: &str, digest: &str, size: i64) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: digest.to_owned(),
        size,
        annotations: BTreeMap::new(),
    }
}

/// Fails unless a call ended with this code.
pub(crate) fn assert_code<T: std::fmt::Debug>(outcome: Outcome<T>, code: Code, what: &str) {
    match outcome {
        Ok(reply) => panic!("{what} succeeded, expected {code:?}: {reply:?}"),
        Err(status) => assert_eq!(status.code(), code, "{what}: {}", status.message()),
    }
}

impl Client {
    /// Connects at the first call, and again after the peer's restart.
    pub(crate) fn new(socket: &Path, snapshotter: &str, namespace: &str) -> Self {
        Self::with_limit(socket, snapshotter, namespace, CALL_LIMIT)
    }

    /// As [`Client::new`], with calls that may take so long.
    pub(crate) fn with_limit(socket: &Path, snapshotter: &str, namespace: &str, limit: Duration) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("runtime of the client");
        let socket = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://localhost").timeout(limit);
        let channel = {
            let _context = runtime.enter();
            endpoint.connect_with_connector_lazy(connector)
        };
        Self {
            snapshots: SnapshotsClient::new(channel.clone()),
            diff: DiffClient::new(channel),
            runtime,
            snapshotter: snapshotter.to_owned(),
            namespace: namespace.to_owned(),
            limit,
        }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let namespace = self.namespace.parse().expect("a namespace");
        request.metadata_mut().insert(NAMESPACE_HEADER, namespace);
        request
    }

    pub(crate) fn prepare(&self, key: &str, parent: &str, with: &[(&str, &str)]) -> Outcome<Vec<Mount>> {
        let message = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: labels(with),
        };
        let call = async { self.snapshots.clone().prepare(self.request(message)).await };
        self.runtime.block_on(call).map(|reply| reply.into_inner().mounts)
    }

    /// A view that containerd's garbage collection leaves alone.
    pub(crate) fn view(&self, key: &str, parent: &str) -> Outcome<Vec<Mount>> {
        let message = ViewSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: BTreeMap::from([("containerd.io/gc.root".to_owned(), "test".to_owned())]),
        };
        let call = async { self.snapshots.clone().view(self.request(message)).await };
        self.runtime.block_on(call).map(|reply| reply.into_inner().mounts)
    }

    pub(crate) fn mounts(&self, key: &str) -> Outcome<Vec<Mount>> {
        let message = MountsRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        let call = async { self.snapshots.clone().mounts(self.request(message)).await };
        self.runtime.block_on(call).map(|reply| reply.into_inner().mounts)
    }

    /// Commit with the parent of a rebase, empty for none.
    pub(crate) fn commit(&self, name: &str, key: &str, parent: &str, with: &[(&str, &str)]) -> Outcome<()> {
        let message = CommitSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels: labels(with),
            parent: parent.to_owned(),
        };
        let call = async { self.snapshots.clone().commit(self.request(message)).await };
        self.runtime.block_on(call).map(|_| ())
    }

    pub(crate) fn remove(&self, key: &str) -> Outcome<()> {
        let message = RemoveSnapshotRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        let call = async { self.snapshots.clone().remove(self.request(message)).await };
        self.runtime.block_on(call).map(|_| ())
    }

    pub(crate) fn stat(&self, key: &str) -> Outcome<Info> {
        let message = StatSnapshotRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        let call = async { self.snapshots.clone().stat(self.request(message)).await };
        self.runtime.block_on(call).map(|reply| reply.into_inner().info.expect("info"))
    }

    /// Update of labels, with a mask.
    pub(crate) fn update(&self, name: &str, with: &[(&str, &str)], mask: &[&str]) -> Outcome<Info> {
        let info = Info { name: name.to_owned(), labels: labels(with), ..Info::default() };
        let message = UpdateSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            info: Some(info),
            update_mask: Some(prost_types::FieldMask {
                paths: mask.iter().map(ToString::to_string).collect(),
            }),
        };
        let call = async { self.snapshots.clone().update(self.request(message)).await };
        self.runtime.block_on(call).map(|reply| reply.into_inner().info.expect("info"))
    }

    pub(crate) fn usage(&self, key: &str) -> Outcome<UsageResponse> {
        let message = UsageRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        let call = async { self.snapshots.clone().usage(self.request(message)).await };
        self.runtime.block_on(call).map(tonic::Response::into_inner)
    }

    pub(crate) fn cleanup(&self) -> Outcome<()> {
        let message = CleanupRequest { snapshotter: self.snapshotter.clone() };
        let call = async { self.snapshots.clone().cleanup(self.request(message)).await };
        self.runtime.block_on(call).map(|_| ())
    }

    pub(crate) fn list(&self, filters: &[&str]) -> Outcome<Vec<Info>> {
        let message = ListSnapshotsRequest {
            snapshotter: self.snapshotter.clone(),
            filters: filters.iter().map(ToString::to_string).collect(),
        };
        self.runtime.block_on(async {
            let mut stream = self.snapshots.clone().list(self.request(message)).await?.into_inner();
            let mut all = Vec::new();
            while let Some(block) = stream.message().await? {
                all.extend(block.info);
            }
            Ok(all)
        })
    }

    /// Apply; the descriptor of what was applied.
    pub(crate) fn apply(&self, blob: Descriptor, mounts: Vec<Mount>) -> Outcome<Descriptor> {
        self.apply_for(blob, mounts, CALL_LIMIT)
    }

    /// Apply of any length, after which the file system of the mounts is synced if its differ knows how to.
    #[allow(dead_code, reason = "the bench measures it")]
    pub(crate) fn apply_synced(
        &self,
        blob: Descriptor,
        mounts: Vec<Mount>,
        sync_fs: bool,
    ) -> Outcome<Descriptor> {
        let message = ApplyRequest { diff: Some(blob), mounts, payloads: BTreeMap::new(), sync_fs };
        self.apply_message(message, self.limit)
    }

    /// Apply that the client gives up after some time: it resets the stream.
    pub(crate) fn apply_for(
        &self,
        blob: Descriptor,
        mounts: Vec<Mount>,
        limit: Duration,
    ) -> Outcome<Descriptor> {
        let message = ApplyRequest { diff: Some(blob), mounts, payloads: BTreeMap::new(), sync_fs: false };
        self.apply_message(message, limit)
    }

    fn apply_message(&self, message: ApplyRequest, limit: Duration) -> Outcome<Descriptor> {
        self.runtime.block_on(async {
            let mut client = self.diff.clone();
            let call = client.apply(self.request(message));
            let reply = tokio::time::timeout(limit, call).await;
            let reply = reply.map_err(|_| Status::cancelled("the client gave up"))??;
            Ok(reply.into_inner().applied.expect("a descriptor"))
        })
    }

    /// Diff; the descriptor of the blob that was written.
    pub(crate) fn diff(&self, left: Vec<Mount>, right: Vec<Mount>, media_type: &str) -> Outcome<Descriptor> {
        let message = DiffRequest {
            left,
            right,
            media_type: media_type.to_owned(),
            r#ref: String::new(),
            labels: BTreeMap::new(),
            source_date_epoch: None,
        };
        let call = async { self.diff.clone().diff(self.request(message)).await };
        self.runtime.block_on(call).map(|reply| reply.into_inner().diff.expect("a descriptor"))
    }
}
