//! A double of containerd's content store and leases: it serves blobs as a test wants them served (late, cut, as other
//! bytes), and keeps what is written to it.
//!
//! ```text
//!   the product ─ Content.Read, Write, Info, Update · Leases.Create ─► Store, on containerd's socket in the room
//! ```

use containerd_api::{
    LEASE_HEADER,
    content::{
        AbortRequest, DeleteContentRequest, Info, InfoRequest, InfoResponse, ReadContentRequest,
        ReadContentResponse, StatusRequest, StatusResponse, UpdateRequest, UpdateResponse, WriteAction,
        WriteContentRequest, WriteContentResponse,
        content_server::{Content, ContentServer},
    },
    leases::{
        AddResourceRequest, CreateRequest, CreateResponse, DeleteRequest, Lease,
        leases_server::{Leases, LeasesServer},
    },
};
use futures_util::Stream;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};
use tokio::sync::{Barrier, mpsc};
use tonic::{Request, Response, Status, Streaming};

/// Bytes of one message of Read, as containerd sends them.
const CHUNK: usize = 1 << 20;

/// How a blob is served.
#[derive(Debug, Clone)]
pub(crate) enum Serving {
    Whole,
    /// Whole, but the first time not before so many reads have begun as the barrier wants.
    Together(Arc<Barrier>),
    /// Ends without an error after so many bytes.
    Short(usize),
    /// Fails after so many bytes.
    Fails(usize),
    /// Stops after so many bytes, and never goes on.
    Hangs(usize),
}

#[derive(Debug, Default)]
struct State {
    blobs: BTreeMap<String, (Vec<u8>, Option<Serving>)>,
    labels: BTreeMap<String, BTreeMap<String, String>>,
    leases: BTreeSet<String>,
    /// Digests of blobs that were read.
    reads: Vec<String>,
    /// Leases under which blobs were written.
    held: BTreeMap<String, String>,
}

/// The double, until it is dropped.
#[derive(Debug)]
pub(crate) struct Store {
    state: Arc<Mutex<State>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Store {
    /// Listens at a path.
    pub(crate) fn listen(socket: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.expect("runtime of the content store");
        let state = Arc::new(Mutex::new(State::default()));
        if let Some(folder) = socket.parent() {
            std::fs::create_dir_all(folder).expect("folder of the socket");
        }
        let listener = runtime.block_on(async { tokio::net::UnixListener::bind(socket) }).expect("socket");
        let streams = futures_util::stream::unfold(listener, |listener| async {
            let stream = listener.accept().await.map(|(stream, _)| stream);
            Some((stream, listener))
        });
        let service = Service(Arc::clone(&state));
        let server = tonic::transport::Server::builder()
            .add_service(ContentServer::new(service.clone()))
            .add_service(LeasesServer::new(service));
        runtime.spawn(server.serve_with_incoming(streams));
        Self { state, runtime: Some(runtime) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("state of the content store")
    }

    /// Serves a blob under a digest, which need not be its own.
    pub(crate) fn put(&self, digest: &str, blob: &[u8], serving: Serving) {
        self.state().blobs.insert(digest.to_owned(), (blob.to_vec(), Some(serving)));
    }

    /// Deletes a blob.
    pub(crate) fn delete(&self, digest: &str) {
        self.state().blobs.remove(digest).expect("a blob to delete");
    }

    /// A blob that the product wrote.
    pub(crate) fn blob(&self, digest: &str) -> Vec<u8> {
        self.state().blobs.get(digest).unwrap_or_else(|| panic!("no blob {digest}")).0.clone()
    }

    /// The labels of a blob.
    pub(crate) fn labels(&self, digest: &str) -> BTreeMap<String, String> {
        self.state().labels.get(digest).cloned().unwrap_or_default()
    }

    /// How many times a blob was read.
    pub(crate) fn reads(&self, digest: &str) -> usize {
        self.state().reads.iter().filter(|read| *read == digest).count()
    }

    /// Fails unless a blob was written under a lease that the product created.
    pub(crate) fn assert_leased(&self, digest: &str) {
        let state = self.state();
        let lease = state.held.get(digest).unwrap_or_else(|| panic!("{digest} was written without a lease"));
        assert!(state.leases.contains(lease), "the lease {lease} was never created");
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[derive(Debug, Clone)]
struct Service(Arc<Mutex<State>>);

type Reply<T> = Result<Response<T>, Status>;
type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The messages of a channel as a stream of replies.
fn stream_of<T: Send + 'static>(receiver: mpsc::Receiver<Result<T, Status>>) -> Replies<T> {
    Box::pin(futures_util::stream::unfold(receiver, |mut receiver| async {
        receiver.recv().await.map(|message| (message, receiver))
    }))
}

#[tonic::async_trait]
impl Content for Service {
    type ReadStream = Replies<ReadContentResponse>;
    type WriteStream = Replies<WriteContentResponse>;

    async fn info(&self, request: Request<InfoRequest>) -> Reply<InfoResponse> {
        let digest = request.into_inner().digest;
        let state = self.0.lock().expect("state");
        let (blob, _) = state.blobs.get(&digest).ok_or_else(|| Status::not_found("no such blob"))?;
        let labels = state.labels.get(&digest).cloned().unwrap_or_default();
        let info = Info { size: blob.len() as i64, digest, labels, ..Info::default() };
        Ok(Response::new(InfoResponse { info: Some(info) }))
    }

    async fn update(&self, request: Request<UpdateRequest>) -> Reply<UpdateResponse> {
        let info = request.into_inner().info.unwrap_or_default();
        self.0
            .lock()
            .expect("state")
            .labels
            .entry(info.digest.clone())
            .or_default()
            .extend(info.labels.clone());
        Ok(Response::new(UpdateResponse { info: Some(info) }))
    }

    async fn delete(&self, request: Request<DeleteContentRequest>) -> Reply<()> {
        self.0.lock().expect("state").blobs.remove(&request.into_inner().digest);
        Ok(Response::new(()))
    }

    async fn read(&self, request: Request<ReadContentRequest>) -> Reply<Self::ReadStream> {
        let request = request.into_inner();
        let (blob, serving) = {
            let mut state = self.0.lock().expect("state");
            let mut found = state.blobs.get(&request.digest).cloned();
            // A second read of a blob does not wait.
            if let Some((_, Some(serving @ Serving::Together(_)))) = &mut found
                && state.reads.contains(&request.digest)
            {
                *serving = Serving::Whole;
            }
            state.reads.push(request.digest.clone());
            found.ok_or_else(|| Status::not_found(format!("content {}: not found", request.digest)))?
        };
        let end = match request.size {
            0 => blob.len(),
            size => blob.len().min((request.offset + size) as usize),
        };
        let (sender, receiver) = mpsc::channel(2);
        tokio::spawn(async move {
            let serving = serving.unwrap_or(Serving::Whole);
            if let Serving::Together(barrier) = &serving {
                barrier.wait().await;
            }
            let mut at = request.offset as usize;
            while at < end {
                let limit = match serving {
                    Serving::Short(limit) | Serving::Fails(limit) | Serving::Hangs(limit) => limit.min(end),
                    Serving::Whole | Serving::Together(_) => end,
                };
                let next = (at + CHUNK).min(limit);
                if next <= at {
                    match serving {
                        Serving::Fails(_) => {
                            let _ = sender.send(Err(Status::unavailable("the content store failed"))).await;
                        }
                        // Until the other side gives up.
                        Serving::Hangs(_) => sender.closed().await,
                        _ => {}
                    }
                    return;
                }
                let data = blob[at..next].to_vec().into();
                if sender.send(Ok(ReadContentResponse { offset: at as i64, data })).await.is_err() {
                    return;
                }
                at = next;
            }
        });
        Ok(Response::new(stream_of(receiver)))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Reply<StatusResponse> {
        Err(Status::not_found("no ingest"))
    }

    async fn write(&self, request: Request<Streaming<WriteContentRequest>>) -> Reply<Self::WriteStream> {
        let lease = request.metadata().get(LEASE_HEADER).and_then(|l| l.to_str().ok()).map(str::to_owned);
        let mut messages = request.into_inner();
        let (sender, receiver) = mpsc::channel(2);
        let state = Arc::clone(&self.0);
        tokio::spawn(async move {
            let mut blob = Vec::new();
            while let Ok(Some(message)) = messages.message().await {
                if !message.data.is_empty() {
                    if message.offset as usize != blob.len() {
                        let _ = sender.send(Err(Status::out_of_range("a gap in what is written"))).await;
                        return;
                    }
                    blob.extend_from_slice(&message.data);
                }
                let mut reply = WriteContentResponse {
                    action: message.action,
                    offset: blob.len() as i64,
                    total: message.total,
                    ..WriteContentResponse::default()
                };
                if message.action == WriteAction::Commit as i32 {
                    let digest = crate::image::digest(&blob);
                    let wrong_size = message.total != 0 && message.total != blob.len() as i64;
                    let wrong_digest = !message.expected.is_empty() && message.expected != digest;
                    if wrong_size || wrong_digest {
                        let status = Status::failed_precondition("unexpected size or digest");
                        let _ = sender.send(Err(status)).await;
                        return;
                    }
                    let mut state = state.lock().expect("state");
                    state.labels.entry(digest.clone()).or_default().extend(message.labels);
                    if let Some(lease) = &lease {
                        state.held.insert(digest.clone(), lease.clone());
                    }
                    state.blobs.insert(digest.clone(), (std::mem::take(&mut blob), None));
                    reply.digest = digest;
                }
                if sender.send(Ok(reply)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(stream_of(receiver)))
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Reply<()> {
        Ok(Response::new(()))
    }
}

#[tonic::async_trait]
impl Leases for Service {
    async fn create(&self, request: Request<CreateRequest>) -> Reply<CreateResponse> {
        let CreateRequest { id, labels } = request.into_inner();
        let mut state = self.0.lock().expect("state");
        let id = if id.is_empty() { format!("lease-{}", state.leases.len()) } else { id };
        state.leases.insert(id.clone());
        Ok(Response::new(CreateResponse { lease: Some(Lease { id, created_at: None, labels }) }))
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Reply<()> {
        self.0.lock().expect("state").leases.remove(&request.into_inner().id);
        Ok(Response::new(()))
    }

    async fn add_resource(&self, _: Request<AddResourceRequest>) -> Reply<()> {
        Ok(Response::new(()))
    }
}
