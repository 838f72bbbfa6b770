//! Requests to both faces of a daemon, each of which may end with the daemon.
//!
//! Called by `work` and `verify`.

use super::{
    daemon::{docker_socket, snapshots_socket},
    support::{Reply, transport},
    transport as dialled,
};
use containerd_api::{
    diff::{ApplyRequest, DiffRequest, diff_client::DiffClient},
    snapshots::{
        CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
        RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest, ViewSnapshotRequest,
        snapshots_client::SnapshotsClient,
    },
    types::{Descriptor, Mount},
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::{
    io::Write,
    path::{Path, PathBuf},
};
use tokio::runtime::Runtime;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
/// The label that Update changes.
pub(crate) const LABEL: &str = "containerd.io/snapshot/test";

/// Why a request was not answered with success: the daemon's words, or the connection's.
pub(crate) type Failure = String;

pub(crate) struct Calls {
    docker: PathBuf,
    runtime: Runtime,
    snapshots: SnapshotsClient<Channel>,
    diffs: DiffClient<Channel>,
}

fn failed(status: &Status) -> Failure {
    format!("{:?}: {}", status.code(), status.message())
}

impl Calls {
    pub(crate) fn new(folder: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let address = snapshots_socket(folder);
        let connector = tower::service_fn(move |_: tonic::transport::Uri| {
            let address = address.clone();
            async move { dialled::dial(address).await.map(TokioIo::new) }
        });
        let origin = format!("http://{}", dialled::authority(folder));
        let channel = runtime.block_on(async {
            Endpoint::from_shared(origin).unwrap().connect_with_connector_lazy(connector)
        });
        Self {
            docker: docker_socket(folder),
            runtime,
            snapshots: SnapshotsClient::new(channel.clone()),
            diffs: DiffClient::new(channel),
        }
    }

    pub(crate) fn both_answer(&self) -> bool {
        self.post("Plugin.Activate", b"").is_ok_and(|reply| reply.status == 200)
            && matches!(self.stat("no such snapshot"), Ok(None))
    }

    fn post(&self, method: &str, body: &[u8]) -> Result<Reply, Failure> {
        let send = || {
            let mut stream = transport::connect(&self.docker)?;
            write!(stream, "POST /{method} HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n", body.len())?;
            // It may be answered before its end.
            let _ = stream.write_all(body);
            Reply::read(stream)
        };
        send().map_err(|e: std::io::Error| e.to_string())
    }

    fn docker_bytes(&self, method: &str, body: &[u8]) -> Result<Vec<u8>, Failure> {
        let reply = self.post(&format!("GraphDriver.{method}"), body)?;
        if reply.status != 200 {
            return Err(reply.text());
        }
        if reply.complete { Ok(reply.body) } else { Err("the reply was cut".to_owned()) }
    }

    /// A request of Docker's whose body is JSON.
    pub(crate) fn docker(&self, method: &str, body: &Value) -> Result<Value, Failure> {
        let bytes = self.docker_bytes(method, body.to_string().as_bytes())?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
        match value.get("Err").and_then(Value::as_str) {
            Some(text) if !text.is_empty() => Err(text.to_owned()),
            _ => Ok(value),
        }
    }

    pub(crate) fn apply(&self, id: &str, parent: &str, tar: &[u8]) -> Result<(), Failure> {
        self.docker_bytes(&format!("ApplyDiff?id={id}&parent={parent}"), tar).map(drop)
    }

    pub(crate) fn diff(&self, id: &str, parent: &str) -> Result<Vec<u8>, Failure> {
        self.docker_bytes("Diff", json!({"ID": id, "Parent": parent}).to_string().as_bytes())
    }

    pub(crate) fn get(&self, id: &str) -> Result<PathBuf, Failure> {
        let value = self.docker("Get", &json!({"ID": id}))?;
        Ok(PathBuf::from(value["Dir"].as_str().unwrap_or_default()))
    }

    pub(crate) fn put(&self, id: &str) -> Result<(), Failure> {
        self.docker("Put", &json!({"ID": id})).map(drop)
    }

    /// The state of a layer and its parent; `None` if there is none.
    pub(crate) fn layer(&self, id: &str) -> Result<Option<(String, String)>, Failure> {
        if self.docker("Exists", &json!({"ID": id}))?["Exists"] != true {
            return Ok(None);
        }
        let facts = self.docker("GetMetadata", &json!({"ID": id}))?["Metadata"].clone();
        let text = |name: &str| facts[name].as_str().unwrap_or_default().to_owned();
        Ok(Some((text("state"), text("parent"))))
    }

    /// What containerd sees of a snapshot; `None` if there is none.
    pub(crate) fn stat(&self, key: &str) -> Result<Option<Info>, Failure> {
        let request = StatSnapshotRequest { key: key.into(), ..StatSnapshotRequest::default() };
        match self.runtime.block_on(self.snapshots.clone().stat(request)) {
            Ok(reply) => Ok(reply.into_inner().info),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(failed(&status)),
        }
    }

    pub(crate) fn prepare(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Failure> {
        let request = PrepareSnapshotRequest {
            key: key.into(),
            parent: parent.into(),
            ..PrepareSnapshotRequest::default()
        };
        let reply = self.runtime.block_on(self.snapshots.clone().prepare(request));
        reply.map(|r| r.into_inner().mounts).map_err(|s| failed(&s))
    }

    pub(crate) fn view(&self, key: &str, parent: &str) -> Result<Vec<Mount>, Failure> {
        let request =
            ViewSnapshotRequest { key: key.into(), parent: parent.into(), ..ViewSnapshotRequest::default() };
        let reply = self.runtime.block_on(self.snapshots.clone().view(request));
        reply.map(|r| r.into_inner().mounts).map_err(|s| failed(&s))
    }

    pub(crate) fn mounts(&self, key: &str) -> Result<Vec<Mount>, Failure> {
        let request = MountsRequest { key: key.into(), ..MountsRequest::default() };
        let reply = self.runtime.block_on(self.snapshots.clone().mounts(request));
        reply.map(|r| r.into_inner().mounts).map_err(|s| failed(&s))
    }

    pub(crate) fn commit(&self, name: &str, key: &str) -> Result<(), Failure> {
        let request =
            CommitSnapshotRequest { name: name.into(), key: key.into(), ..CommitSnapshotRequest::default() };
        self.runtime.block_on(self.snapshots.clone().commit(request)).map(drop).map_err(|s| failed(&s))
    }

    pub(crate) fn remove_snapshot(&self, key: &str) -> Result<(), Failure> {
        let request = RemoveSnapshotRequest { key: key.into(), ..RemoveSnapshotRequest::default() };
        self.runtime.block_on(self.snapshots.clone().remove(request)).map(drop).map_err(|s| failed(&s))
    }

    /// Gives a snapshot the label [`LABEL`].
    pub(crate) fn label(&self, name: &str, value: &str) -> Result<(), Failure> {
        let info = Info {
            name: name.into(),
            labels: [(LABEL.to_owned(), value.to_owned())].into(),
            ..Info::default()
        };
        let mask = prost_types::FieldMask { paths: vec!["labels".into()] };
        let request = UpdateSnapshotRequest {
            info: Some(info),
            update_mask: Some(mask),
            ..UpdateSnapshotRequest::default()
        };
        self.runtime.block_on(self.snapshots.clone().update(request)).map(drop).map_err(|s| failed(&s))
    }

    pub(crate) fn names(&self) -> Result<Vec<String>, Failure> {
        let list = async {
            let request = ListSnapshotsRequest::default();
            let mut stream = self.snapshots.clone().list(request).await?.into_inner();
            let mut names = Vec::new();
            while let Some(block) = stream.message().await? {
                names.extend(block.info.into_iter().map(|info| info.name));
            }
            Ok::<_, Status>(names)
        };
        self.runtime.block_on(list).map_err(|s| failed(&s))
    }

    /// Apply of a blob of the content store.
    pub(crate) fn unpack(&self, mounts: Vec<Mount>, digest: &str, size: usize) -> Result<(), Failure> {
        let blob = Descriptor {
            media_type: TAR.into(),
            digest: digest.into(),
            size: i64::try_from(size).unwrap(),
            ..Descriptor::default()
        };
        let request = ApplyRequest { diff: Some(blob), mounts, ..ApplyRequest::default() };
        let reply = self.runtime.block_on(self.diffs.clone().apply(request)).map_err(|s| failed(&s))?;
        let applied = reply.into_inner().applied.unwrap_or_default();
        assert_eq!(applied.digest, digest, "diffID of an Apply");
        Ok(())
    }

    /// The digest of the tar of a difference, in the content store.
    pub(crate) fn compare(&self, left: Vec<Mount>, right: Vec<Mount>) -> Result<String, Failure> {
        let request = DiffRequest { left, right, media_type: TAR.into(), ..DiffRequest::default() };
        let reply = self.runtime.block_on(self.diffs.clone().diff(request)).map_err(|s| failed(&s))?;
        Ok(reply.into_inner().diff.unwrap_or_default().digest)
    }
}
