//! A containerd with no more than a content store: what the service reads blobs from and writes them to, over the same
//! kind of transport as containerd's own.

use super::transport;
use containerd_api::{
    content::{self, WriteAction, WriteContentRequest, WriteContentResponse, content_server},
    leases::{self, leases_server},
};
use futures_util::{StreamExt, stream, stream::BoxStream};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
};
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// Bytes of a message of Read.
const PIECE: usize = 1 << 20;

/// Blobs by digest.
type Blobs = Arc<Mutex<BTreeMap<String, Vec<u8>>>>;

/// The store; it ends with the test's runtime.
#[derive(Clone, Default)]
pub(crate) struct Engine {
    blobs: Blobs,
}

/// The digest of bytes as containerd writes it.
pub(crate) fn digest(data: &[u8]) -> String {
    format!("sha256:{:x}", Sha256::digest(data))
}

impl Engine {
    /// Serves at `address`.
    pub(crate) fn start(address: &Path) -> Self {
        let engine = Self::default();
        let incoming = transport::incoming(address);
        let server = Server::builder()
            .add_service(content_server::ContentServer::new(engine.clone()))
            .add_service(leases_server::LeasesServer::new(engine.clone()));
        tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
        engine
    }

    pub(crate) fn put(&self, data: &[u8]) -> String {
        let digest = digest(data);
        self.blobs.lock().unwrap().insert(digest.clone(), data.to_vec());
        digest
    }

    /// Digests of all blobs.
    #[allow(dead_code, reason = "each test program uses its own part")]
    pub(crate) fn digests(&self) -> Vec<String> {
        self.blobs.lock().unwrap().keys().cloned().collect()
    }

    pub(crate) fn get(&self, digest: &str) -> Vec<u8> {
        self.blobs.lock().unwrap()[digest].clone()
    }
}

fn missing<T>(what: &str) -> Result<T, Status> {
    Err(Status::not_found(format!("{what}: not found")))
}

#[tonic::async_trait]
impl content_server::Content for Engine {
    type ReadStream = BoxStream<'static, Result<content::ReadContentResponse, Status>>;
    type WriteStream = BoxStream<'static, Result<WriteContentResponse, Status>>;

    async fn info(
        &self,
        request: Request<content::InfoRequest>,
    ) -> Result<Response<content::InfoResponse>, Status> {
        missing(&request.into_inner().digest)
    }

    async fn update(
        &self,
        _: Request<content::UpdateRequest>,
    ) -> Result<Response<content::UpdateResponse>, Status> {
        missing("blob")
    }

    async fn delete(&self, _: Request<content::DeleteContentRequest>) -> Result<Response<()>, Status> {
        missing("blob")
    }

    async fn read(
        &self,
        request: Request<content::ReadContentRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let request = request.into_inner();
        let Some(data) = self.blobs.lock().unwrap().get(&request.digest).cloned() else {
            return missing(&request.digest);
        };
        let first = usize::try_from(request.offset).unwrap();
        let pieces: Vec<_> = data[first..]
            .chunks(PIECE)
            .enumerate()
            .map(|(n, piece)| {
                let offset = request.offset + i64::try_from(n * PIECE).unwrap();
                Ok(content::ReadContentResponse { offset, data: bytes::Bytes::copy_from_slice(piece) })
            })
            .collect();
        Ok(Response::new(stream::iter(pieces).boxed()))
    }

    async fn status(
        &self,
        request: Request<content::StatusRequest>,
    ) -> Result<Response<content::StatusResponse>, Status> {
        missing(&request.into_inner().r#ref)
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let blobs = self.blobs.clone();
        let replies =
            stream::unfold((request.into_inner(), Vec::new()), move |(mut messages, mut ingest)| {
                let blobs = blobs.clone();
                async move {
                    let request = match messages.message().await {
                        Ok(request) => request?,
                        Err(status) => return Some((Err(status), (messages, ingest))),
                    };
                    ingest.extend_from_slice(&request.data);
                    let mut reply = WriteContentResponse {
                        action: request.action,
                        offset: i64::try_from(ingest.len()).unwrap(),
                        ..WriteContentResponse::default()
                    };
                    if request.action == i32::from(WriteAction::Commit) {
                        reply.digest = digest(&ingest);
                        if request.total != reply.offset || request.expected != reply.digest {
                            let status = Status::failed_precondition("unexpected commit digest or size");
                            return Some((Err(status), (messages, ingest)));
                        }
                        blobs.lock().unwrap().insert(reply.digest.clone(), ingest.clone());
                    }
                    Some((Ok(reply), (messages, ingest)))
                }
            });
        Ok(Response::new(replies.boxed()))
    }

    async fn abort(&self, _: Request<content::AbortRequest>) -> Result<Response<()>, Status> {
        Ok(Response::new(()))
    }
}

#[tonic::async_trait]
impl leases_server::Leases for Engine {
    async fn create(
        &self,
        request: Request<leases::CreateRequest>,
    ) -> Result<Response<leases::CreateResponse>, Status> {
        let lease = leases::Lease { id: request.into_inner().id, ..leases::Lease::default() };
        Ok(Response::new(leases::CreateResponse { lease: Some(lease) }))
    }

    async fn delete(&self, _: Request<leases::DeleteRequest>) -> Result<Response<()>, Status> {
        Ok(Response::new(()))
    }

    async fn add_resource(&self, _: Request<leases::AddResourceRequest>) -> Result<Response<()>, Status> {
        Ok(Response::new(()))
    }
}
