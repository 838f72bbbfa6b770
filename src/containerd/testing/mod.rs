//! A containerd for tests: the services Content and Leases over the real wire, with faults on demand.
//!
//! ```text
//!   Engine ─ dial ─► duplex ─► tonic's server ─► Services ─► State (blobs, ingests, leases, calls)
//!                              on a runtime of its own: `stop` ends it as a kill would
//! ```
//!
//! It follows containerd's content server where that matters: a first WRITE at offset 0 truncates, a COMMIT with a known
//! digest ends the ingest without leasing the blob, a range that is too long is cut.

use super::engine::{Engine, Limits};
use bytes::Bytes;
use containerd_api::{
    LEASE_HEADER, NAMESPACE_HEADER,
    content::{self, WriteAction, WriteContentRequest, WriteContentResponse, content_server},
    leases::{self, leases_server},
};
use futures_util::{StreamExt, stream, stream::BoxStream};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    future::pending,
    io,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};
use tokio::{
    io::DuplexStream,
    runtime::{Builder, Runtime},
    sync::mpsc,
};
use tonic::{Code, Request, Response, Status, Streaming, transport::Server};

/// Bytes of a message of Read.
const PIECE: usize = 64 << 10;
/// Bytes between client and server.
const PIPE: usize = 256 << 10;

/// Longest wait for something that must happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Fault {
    #[default]
    None,
    /// Read ends one byte early.
    Short,
    /// Read goes on for one byte.
    Long,
    /// The second message of Read says another offset.
    Gap,
    /// Read fails behind so many bytes.
    ReadFails(usize, Code),
    /// Read sends nothing behind so many bytes.
    ReadHangs(usize),
    /// Read sends messages without data forever.
    ReadEmpty,
    /// Calls without streams never end.
    CallsHang,
    /// Another stream holds the ref.
    Locked,
    /// The first message of Write is never answered.
    OpenHangs,
    /// Write fails behind so many bytes.
    WriteFails(usize, Code),
    /// Write answers nothing behind so many bytes.
    WriteHangs(usize),
    /// Write takes one byte less than it was given.
    WriteCuts,
    /// Write ends without a status behind so many bytes.
    WriteEnds(usize),
    /// The commit never ends.
    CommitHangs,
    /// The commit finds the blob, and a garbage collection takes it at once.
    CommitLoses,
}

/// A blob of the store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) data: Vec<u8>,
    pub(crate) labels: BTreeMap<String, String>,
}

/// A lease.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leased {
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) resources: BTreeSet<String>,
}

/// All that the double holds. Keys start with the namespace.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) fault: Fault,
    pub(crate) blobs: BTreeMap<(String, String), Stored>,
    pub(crate) ingests: BTreeMap<(String, String), Vec<u8>>,
    pub(crate) leases: BTreeMap<(String, String), Leased>,
    /// Methods in the order in which they were called.
    pub(crate) calls: Vec<&'static str>,
    /// Bytes of each WRITE.
    pub(crate) writes: Vec<usize>,
}

/// The double.
#[derive(Debug)]
pub(crate) struct Containerd {
    pub(crate) state: Arc<Mutex<State>>,
    door: Arc<Mutex<Option<mpsc::UnboundedSender<DuplexStream>>>>,
    runtime: Option<Runtime>,
}

/// The digest of bytes as containerd writes it.
pub(crate) fn digest(data: &[u8]) -> String {
    format!("sha256:{:x}", Sha256::digest(data))
}

impl Containerd {
    /// A running one without blobs.
    pub(crate) fn start() -> Self {
        let mut new = Self { state: Arc::default(), door: Arc::default(), runtime: None };
        new.restart();
        new
    }

    /// Starts it again after [`Containerd::stop`]; blobs and leases stay.
    pub(crate) fn restart(&mut self) {
        self.stop();
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (door, streams) = mpsc::unbounded_channel();
        let services = Services(Arc::clone(&self.state));
        runtime.spawn(async move {
            let incoming = stream::unfold(streams, |mut streams| async {
                streams.recv().await.map(|stream| (Ok::<_, io::Error>(stream), streams))
            });
            Server::builder()
                .add_service(content_server::ContentServer::new(services.clone()))
                .add_service(leases_server::LeasesServer::new(services))
                .serve_with_incoming(incoming)
                .await
        });
        *self.door.lock() = Some(door);
        self.runtime = Some(runtime);
    }

    /// Ends it in the middle of whatever it does.
    pub(crate) fn stop(&mut self) {
        *self.door.lock() = None;
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// A client.
    pub(crate) fn engine(&self, limits: Limits) -> Engine {
        let door = Arc::clone(&self.door);
        Engine::over(limits, move || {
            let (ours, theirs) = tokio::io::duplex(PIPE);
            let open = door.lock().as_ref().is_some_and(|door| door.send(theirs).is_ok());
            async move { if open { Ok(ours) } else { Err(io::ErrorKind::ConnectionRefused.into()) } }
        })
    }

    /// Adds a blob, and returns its digest.
    pub(crate) fn put(&self, namespace: &str, data: &[u8]) -> String {
        let digest = digest(data);
        let blob = Stored { data: data.to_vec(), labels: BTreeMap::new() };
        self.state.lock().blobs.insert((namespace.to_owned(), digest.clone()), blob);
        digest
    }

    /// Sets what goes wrong from now on.
    pub(crate) fn fault(&self, fault: Fault) {
        self.state.lock().fault = fault;
    }

    /// Waits until something holds.
    pub(crate) async fn until(&self, what: &str, holds: impl Fn(&State) -> bool) {
        let start = Instant::now();
        while !holds(&self.state.lock()) {
            if start.elapsed() > PATIENCE {
                let state = self.state.lock();
                let (refs, leases) = (state.ingests.keys(), state.leases.values());
                panic!("{what}: calls {:?}, refs {refs:?}, leases {leases:?}", state.calls);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.stop();
    }
}

#[derive(Debug, Clone)]
struct Services(Arc<Mutex<State>>);

impl Services {
    /// Notes a call, and returns its namespace.
    async fn enter<T>(&self, call: &'static str, request: &Request<T>) -> Result<String, Status> {
        self.0.lock().calls.push(call);
        let fault = self.0.lock().fault;
        if fault == Fault::CallsHang {
            pending::<()>().await;
        }
        header(request, NAMESPACE_HEADER).ok_or_else(|| Status::failed_precondition("namespace is required"))
    }
}

fn header<T>(request: &Request<T>, name: &str) -> Option<String> {
    request.metadata().get(name).map(|value| value.to_str().unwrap().to_owned())
}

fn missing(what: &str) -> Status {
    Status::not_found(format!("{what}: not found"))
}

/// One reply of Write, and whether the stream goes on.
fn answer(
    state: &mut State,
    namespace: &str,
    reference: &str,
    lease: &str,
    request: &WriteContentRequest,
) -> Result<WriteContentResponse, Status> {
    let key = (namespace.to_owned(), reference.to_owned());
    let blob = (namespace.to_owned(), request.expected.clone());
    if !request.expected.is_empty() && state.blobs.contains_key(&blob) {
        state.ingests.remove(&key);
        return Err(Status::already_exists(format!("blob {} exists", request.expected)));
    }
    let cut = usize::from(state.fault == Fault::WriteCuts && !request.data.is_empty());
    let ingest = state.ingests.entry(key.clone()).or_default();
    if request.offset == 0 {
        ingest.clear();
    } else if request.offset != i64::try_from(ingest.len()).unwrap() {
        return Err(Status::out_of_range(format!("write at {}, have {}", request.offset, ingest.len())));
    }
    ingest.extend_from_slice(&request.data[..request.data.len() - cut]);
    let commit = request.action == i32::from(WriteAction::Commit);
    let reply = WriteContentResponse {
        action: request.action,
        offset: i64::try_from(ingest.len()).unwrap(),
        digest: if commit { digest(ingest) } else { String::new() },
        ..WriteContentResponse::default()
    };
    if commit {
        if request.total != reply.offset || request.expected != reply.digest {
            return Err(Status::failed_precondition("unexpected commit digest or size"));
        }
        let data = state.ingests.remove(&key).unwrap();
        state.blobs.insert(blob, Stored { data, labels: request.labels.clone() });
        let lease = state.leases.get_mut(&(namespace.to_owned(), lease.to_owned()));
        lease.ok_or_else(|| missing("lease"))?.resources.insert(format!("content {}", reply.digest));
    } else {
        state.writes.push(request.data.len());
    }
    Ok(reply)
}

#[tonic::async_trait]
impl content_server::Content for Services {
    type ReadStream = BoxStream<'static, Result<content::ReadContentResponse, Status>>;
    type WriteStream = BoxStream<'static, Result<WriteContentResponse, Status>>;

    async fn info(
        &self,
        request: Request<content::InfoRequest>,
    ) -> Result<Response<content::InfoResponse>, Status> {
        let namespace = self.enter("Info", &request).await?;
        let digest = request.into_inner().digest;
        let state = self.0.lock();
        let blob = state.blobs.get(&(namespace, digest.clone())).ok_or_else(|| missing(&digest))?;
        let size = i64::try_from(blob.data.len()).unwrap();
        let info = content::Info { digest, size, labels: blob.labels.clone(), ..content::Info::default() };
        Ok(Response::new(content::InfoResponse { info: Some(info) }))
    }

    async fn update(
        &self,
        request: Request<content::UpdateRequest>,
    ) -> Result<Response<content::UpdateResponse>, Status> {
        let namespace = self.enter("Update", &request).await?;
        let content::UpdateRequest { info, update_mask } = request.into_inner();
        let (info, mask) = (info.unwrap(), update_mask.unwrap());
        let mut state = self.0.lock();
        let blob = state.blobs.get_mut(&(namespace, info.digest.clone())).ok_or_else(|| missing("blob"))?;
        for path in mask.paths {
            let key = path.strip_prefix("labels.").ok_or_else(|| Status::invalid_argument("path"))?;
            blob.labels.insert(key.to_owned(), info.labels[key].clone());
        }
        Ok(Response::new(content::UpdateResponse::default()))
    }

    async fn delete(&self, request: Request<content::DeleteContentRequest>) -> Result<Response<()>, Status> {
        let namespace = self.enter("Delete", &request).await?;
        let digest = request.into_inner().digest;
        let removed = self.0.lock().blobs.remove(&(namespace, digest.clone()));
        removed.map(|_| Response::new(())).ok_or_else(|| missing(&digest))
    }

    async fn read(
        &self,
        request: Request<content::ReadContentRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let namespace = self.enter("Read", &request).await?;
        let request = request.into_inner();
        let state = self.0.lock();
        let blob = state.blobs.get(&(namespace, request.digest.clone()));
        let mut data = blob.ok_or_else(|| missing(&request.digest))?.data.clone();
        data.drain(..usize::try_from(request.offset).unwrap());
        if request.size > 0 {
            data.truncate(usize::try_from(request.size).unwrap());
        }
        match state.fault {
            Fault::Short => drop(data.pop()),
            Fault::Long => data.push(0),
            Fault::ReadFails(most, _) | Fault::ReadHangs(most) => data.truncate(most),
            _ => {}
        }
        let fault = state.fault;
        let pieces = data.chunks(PIECE).scan(0, |offset, piece| {
            let at = *offset;
            *offset += i64::try_from(piece.len()).unwrap();
            let gap = i64::from(fault == Fault::Gap && at > 0);
            let data = Bytes::copy_from_slice(piece);
            Some(Ok(content::ReadContentResponse { offset: at + gap, data }))
        });
        let pieces = stream::iter(pieces.collect::<Vec<_>>());
        Ok(Response::new(match fault {
            Fault::ReadFails(_, code) => {
                pieces.chain(stream::iter([Err(Status::new(code, "in mid-stream\u{1b}"))])).boxed()
            }
            Fault::ReadHangs(_) => pieces.chain(stream::pending()).boxed(),
            Fault::ReadEmpty => {
                let none = stream::repeat_with(|| Ok(content::ReadContentResponse::default()));
                none.then(|item| async {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    item
                })
                .boxed()
            }
            _ => pieces.boxed(),
        }))
    }

    async fn status(
        &self,
        request: Request<content::StatusRequest>,
    ) -> Result<Response<content::StatusResponse>, Status> {
        let namespace = self.enter("Status", &request).await?;
        let reference = request.into_inner().r#ref;
        let state = self.0.lock();
        let ingest = state.ingests.get(&(namespace, reference.clone())).ok_or_else(|| missing(&reference))?;
        let offset = i64::try_from(ingest.len()).unwrap();
        let status = content::Status { r#ref: reference, offset, ..content::Status::default() };
        Ok(Response::new(content::StatusResponse { status: Some(status) }))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let namespace = self.enter("Write", &request).await?;
        let lease = header(&request, LEASE_HEADER).ok_or_else(|| Status::aborted("no lease"))?;
        let messages = request.into_inner();
        let state = Arc::clone(&self.0);
        let replies = stream::unfold(Some((messages, String::new())), move |going| {
            let (state, namespace, lease) = (Arc::clone(&state), namespace.clone(), lease.clone());
            async move {
                let (mut messages, mut reference) = going?;
                let request = match messages.message().await {
                    Ok(request) => request?,
                    Err(status) => return Some((Err(status), None)),
                };
                if reference.is_empty() {
                    reference.clone_from(&request.r#ref);
                }
                let end = usize::try_from(request.offset).unwrap() + request.data.len();
                let commit = request.action == i32::from(WriteAction::Commit);
                let fault = state.lock().fault;
                match fault {
                    Fault::Locked => return Some((Err(Status::unavailable("ref locked")), None)),
                    Fault::OpenHangs => pending().await,
                    Fault::WriteFails(most, code) if end > most => {
                        return Some((Err(Status::new(code, "no space left")), None));
                    }
                    Fault::WriteEnds(most) if end > most => return None,
                    Fault::WriteHangs(most) if end > most => pending().await,
                    Fault::CommitHangs if commit => pending().await,
                    _ => {}
                }
                let mut state = state.lock();
                let reply = answer(&mut state, &namespace, &reference, &lease, &request);
                if fault == Fault::CommitLoses && commit {
                    state.blobs.clear();
                }
                let going = (reply.is_ok() && !commit).then_some((messages, reference));
                Some((reply, going))
            }
        });
        Ok(Response::new(replies.boxed()))
    }

    async fn abort(&self, request: Request<content::AbortRequest>) -> Result<Response<()>, Status> {
        let namespace = self.enter("Abort", &request).await?;
        let reference = request.into_inner().r#ref;
        let removed = self.0.lock().ingests.remove(&(namespace, reference.clone()));
        removed.map(|_| Response::new(())).ok_or_else(|| missing(&reference))
    }
}

#[tonic::async_trait]
impl leases_server::Leases for Services {
    async fn create(
        &self,
        request: Request<leases::CreateRequest>,
    ) -> Result<Response<leases::CreateResponse>, Status> {
        let namespace = self.enter("Create", &request).await?;
        let leases::CreateRequest { id, labels } = request.into_inner();
        let lease = Leased { labels, resources: BTreeSet::new() };
        self.0.lock().leases.insert((namespace, id.clone()), lease);
        let created_at = Some(SystemTime::now().into());
        let lease = leases::Lease { id, created_at, ..leases::Lease::default() };
        Ok(Response::new(leases::CreateResponse { lease: Some(lease) }))
    }

    async fn delete(&self, request: Request<leases::DeleteRequest>) -> Result<Response<()>, Status> {
        let namespace = self.enter("DeleteLease", &request).await?;
        let id = request.into_inner().id;
        let removed = self.0.lock().leases.remove(&(namespace, id.clone()));
        removed.map(|_| Response::new(())).ok_or_else(|| missing(&id))
    }

    async fn add_resource(
        &self,
        request: Request<leases::AddResourceRequest>,
    ) -> Result<Response<()>, Status> {
        let namespace = self.enter("AddResource", &request).await?;
        let leases::AddResourceRequest { id, resource } = request.into_inner();
        let resource = resource.unwrap();
        let mut state = self.0.lock();
        let lease = state.leases.get_mut(&(namespace, id.clone())).ok_or_else(|| missing(&id))?;
        lease.resources.insert(format!("{} {}", resource.r#type, resource.id));
        Ok(Response::new(()))
    }
}
