//! A blob as one Write stream, under a lease.
//!
//! ```text
//!   Leases.Create ─► Write: {WRITE, ref, 0, ""}          reply: the ref is ours, and empty
//!                           {WRITE, 0, 1 MiB} {WRITE, 1 MiB, …} …  up to IN_FLIGHT without a reply
//!                           {COMMIT, total, digest, labels}        reply: size and digest
//!                              └ AlreadyExists ─► Leases.AddResource ─► Info ─► Update of a missing label
//!   drop before COMMIT's reply ─► end of the stream ─► Abort, if the ref is ours ─► Leases.Delete, in the background
//! ```
//!
//! containerd answers each message once it is in the file, in order. Waiting only for the reply before the last few keeps it
//! busy without a round trip for each chunk, and bounds what lies in buffers.
//!
//! The digest goes with the COMMIT. containerd then refuses a blob that exists without adding it to the lease, so it is
//! added by itself, before Info shows whether it is still there.
//!
//! The stream has a connection of its own. Called by `connect`.

use super::{
    BlobWriter, Committed, EngineError, UNCOMPRESSED,
    connect::{self, Engine, MAX_MESSAGE},
    limited,
};
use crate::containerd::mask::Labels;
use bytes::Bytes;
use containerd_api::{
    content::{
        AbortRequest, Info, InfoRequest, UpdateRequest, WriteAction, WriteContentRequest,
        WriteContentResponse, content_client::ContentClient,
    },
    leases::{AddResourceRequest, CreateRequest, DeleteRequest, Resource, leases_client::LeasesClient},
};
use futures_util::{
    future::{BoxFuture, FutureExt},
    stream,
};
use std::{collections::VecDeque, time::SystemTime};
use tokio::{runtime::Handle, sync::mpsc, time::timeout};
use tonic::{Streaming, transport::Channel};

/// Bytes of one WRITE at most.
const CHUNK: usize = 1 << 20;
/// WRITEs without a reply.
const IN_FLIGHT: usize = 4;
/// Label of a lease with the time of its end.
const EXPIRE: &str = "containerd.io/gc.expire";
/// What a lease calls a blob.
const BLOB: &str = "content";
/// Methods, in errors.
const WRITE: &str = "Content.Write";
const INFO: &str = "Content.Info";
const UPDATE: &str = "Content.Update";
const ABORT: &str = "Content.Abort";
const CREATE: &str = "Leases.Create";
const DELETE: &str = "Leases.Delete";
const ADD: &str = "Leases.AddResource";

/// A write that is not committed.
pub(super) struct Write {
    target: Target,
    /// Messages to containerd; `None` once the write has ended.
    requests: Option<mpsc::Sender<WriteContentRequest>>,
    replies: Option<Streaming<WriteContentResponse>>,
    /// Bytes that were sent.
    offset: u64,
    /// Whether the ref is known to be ours: what another stream writes under it must not be aborted.
    held: bool,
    /// The offsets that replies must have, oldest first.
    pending: VecDeque<u64>,
}

/// What a write is to.
#[derive(Clone)]
struct Target {
    engine: Engine,
    namespace: String,
    reference: String,
    lease: String,
}

impl Write {
    /// Makes a lease and starts a write.
    pub(super) async fn open(engine: &Engine, namespace: &str, reference: &str) -> Result<Self, EngineError> {
        let target = Target {
            engine: engine.clone(),
            namespace: namespace.to_owned(),
            reference: reference.to_owned(),
            lease: format!("lcow-{}", uuid::Uuid::new_v4()),
        };
        target.create_lease().await?;
        let (requests, queue) = mpsc::channel(1);
        let mut write = Self {
            target,
            requests: Some(requests),
            replies: None,
            offset: 0,
            held: false,
            pending: VecDeque::new(),
        };
        // From here on a failure aborts what was begun.
        let first = WriteContentRequest {
            action: WriteAction::Write.into(),
            r#ref: reference.to_owned(),
            ..WriteContentRequest::default()
        };
        write.queue(first, 0).await?;
        let messages =
            stream::unfold(queue, |mut queue| async { queue.recv().await.map(|message| (message, queue)) });
        let request = connect::request(WRITE, messages, namespace, Some(&write.target.lease))?;
        let mut client = ContentClient::new(engine.alone()).max_decoding_message_size(MAX_MESSAGE);
        let replies = limited(WRITE, engine.limits.call, client.write(request)).await?;
        write.replies = Some(replies.into_inner());
        limited_reply(&mut write, engine.limits.call).await?;
        write.held = true;
        Ok(write)
    }

    /// Hands a message to the stream; its reply must have `offset`.
    async fn queue(&mut self, message: WriteContentRequest, offset: u64) -> Result<(), EngineError> {
        let after = self.target.engine.limits.idle;
        let requests = self.requests.as_ref().ok_or_else(ended)?;
        match timeout(after, requests.send(message)).await {
            Ok(Ok(())) => {
                self.pending.push_back(offset);
                Ok(())
            }
            // containerd has ended the stream: its replies say why.
            Ok(Err(_)) => loop {
                limited_reply(self, after).await?;
            },
            Err(_) => Err(EngineError::TimedOut { call: WRITE, after }),
        }
    }

    async fn send(&mut self, mut data: Bytes) -> Result<(), EngineError> {
        let idle = self.target.engine.limits.idle;
        while !data.is_empty() {
            while self.pending.len() >= IN_FLIGHT {
                limited_reply(self, idle).await?;
            }
            let chunk = data.split_to(data.len().min(CHUNK));
            let (offset, end) = (self.offset, self.offset + chunk.len() as u64);
            let message = WriteContentRequest {
                action: WriteAction::Write.into(),
                offset: offset.cast_signed(),
                data: chunk,
                ..WriteContentRequest::default()
            };
            self.queue(message, end).await?;
            self.offset = end;
        }
        Ok(())
    }

    async fn commit(mut self, digest: String, labels: Labels) -> Result<Committed, EngineError> {
        let limits = self.target.engine.limits;
        let size = self.offset;
        let message = WriteContentRequest {
            action: WriteAction::Commit.into(),
            total: size.cast_signed(),
            expected: digest.clone(),
            offset: size.cast_signed(),
            labels: labels.clone(),
            ..WriteContentRequest::default()
        };
        let committed = async {
            self.queue(message, size).await?;
            while self.pending.len() > 1 {
                limited_reply(&mut self, limits.idle).await?;
            }
            limited_reply(&mut self, limits.commit).await
        };
        let existed = match committed.await {
            Ok(reply) => {
                if reply.action != i32::from(WriteAction::Commit) || reply.digest != digest {
                    let found = reply.digest.escape_debug();
                    return Err(broken(format!("committed {found}, expected {digest}")));
                }
                false
            }
            Err(EngineError::AlreadyExists { .. }) => true,
            Err(error) => return Err(error),
        };
        // The ref is gone and the lease holds the blob: nothing to abort.
        self.requests = None;
        self.replies = None;
        let target = self.target.clone();
        drop(self);
        if existed {
            target.adopt(&digest, size, &labels).await?;
        }
        Ok(Committed { size, existed })
    }
}

/// The reply to the oldest message.
async fn limited_reply(
    write: &mut Write,
    after: std::time::Duration,
) -> Result<WriteContentResponse, EngineError> {
    let replies = write.replies.as_mut().ok_or_else(ended)?;
    let reply = limited(WRITE, after, replies.message()).await?.ok_or_else(ended)?;
    let expected = write.pending.pop_front().ok_or_else(|| broken("a reply to nothing"))?;
    if u64::try_from(reply.offset) != Ok(expected) {
        return Err(broken(format!("{} bytes were written, expected {expected}", reply.offset)));
    }
    Ok(reply)
}

fn broken(reason: impl std::fmt::Display) -> EngineError {
    EngineError::Broken { call: WRITE, reason: format!("{reason}; repeat the command") }
}

fn ended() -> EngineError {
    broken("the stream ended before the commit")
}

impl BlobWriter for Write {
    fn send(&mut self, data: Bytes) -> BoxFuture<'_, Result<(), EngineError>> {
        Write::send(self, data).boxed()
    }

    fn commit(
        self: Box<Self>,
        digest: String,
        labels: Labels,
    ) -> BoxFuture<'static, Result<Committed, EngineError>> {
        Write::commit(*self, digest, labels).boxed()
    }
}

impl Drop for Write {
    fn drop(&mut self) {
        let Some(requests) = self.requests.take() else { return };
        let (target, replies, held) = (self.target.clone(), self.replies.take(), self.held);
        // Without a runtime the process ends: the lease expires by itself.
        let Ok(runtime) = Handle::try_current() else { return };
        runtime.spawn(async move { target.abort(requests, replies, held).await });
    }
}

impl Target {
    fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.engine.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.engine.channel.clone())
    }

    fn request<T>(&self, call: &'static str, message: T) -> Result<tonic::Request<T>, EngineError> {
        connect::request(call, message, &self.namespace, None)
    }

    async fn create_lease(&self) -> Result<(), EngineError> {
        let limits = self.engine.limits;
        // RFC 3339, in UTC and with whole seconds.
        let end = prost_types::Timestamp { nanos: 0, ..(SystemTime::now() + limits.lease).into() };
        let labels = [(EXPIRE.to_owned(), end.to_string())].into();
        let request = self.request(CREATE, CreateRequest { id: self.lease.clone(), labels })?;
        limited(CREATE, limits.call, self.leases().create(request)).await?;
        Ok(())
    }

    /// Makes a blob that exists already as good as one that was just committed.
    async fn adopt(&self, digest: &str, size: u64, labels: &Labels) -> Result<(), EngineError> {
        let limit = self.engine.limits.call;
        let resource = Some(Resource { id: digest.to_owned(), r#type: BLOB.to_owned() });
        let request = self.request(ADD, AddResourceRequest { id: self.lease.clone(), resource })?;
        limited(ADD, limit, self.leases().add_resource(request)).await?;
        let request = self.request(INFO, InfoRequest { digest: digest.to_owned() })?;
        let info = limited(INFO, limit, self.content().info(request)).await?.into_inner().info;
        let info = info.unwrap_or_default();
        if u64::try_from(info.size) != Ok(size) {
            let reason = format!("blob {digest} has {} bytes, expected {size}; delete it", info.size);
            return Err(EngineError::Broken { call: INFO, reason });
        }
        if let Some(wanted) = labels.get(UNCOMPRESSED)
            && !info.labels.contains_key(UNCOMPRESSED)
        {
            let labels = [(UNCOMPRESSED.to_owned(), wanted.clone())].into();
            let message = UpdateRequest {
                info: Some(Info { digest: digest.to_owned(), labels, ..Info::default() }),
                update_mask: Some(prost_types::FieldMask { paths: vec![format!("labels.{UNCOMPRESSED}")] }),
            };
            let request = self.request(UPDATE, message)?;
            limited(UPDATE, limit, self.content().update(request)).await?;
        }
        Ok(())
    }

    /// Ends a stream, and deletes what was written and the lease.
    async fn abort(
        &self,
        requests: mpsc::Sender<WriteContentRequest>,
        replies: Option<Streaming<WriteContentResponse>>,
        held: bool,
    ) {
        let limit = self.engine.limits.call;
        // Once containerd has seen the stream's end it has closed the file, which Windows needs for deleting it.
        drop(requests);
        if let Some(mut replies) = replies {
            let _ = timeout(limit, async { while let Ok(Some(_)) = replies.message().await {} }).await;
        }
        let abort = async {
            if !held {
                return Ok(());
            }
            let request = self.request(ABORT, AbortRequest { r#ref: self.reference.clone() })?;
            match limited(ABORT, limit, self.content().abort(request)).await {
                Ok(_) | Err(EngineError::NotFound { .. }) => Ok(()),
                Err(error) => Err(error),
            }
        };
        let delete = async {
            let request = self.request(DELETE, DeleteRequest { id: self.lease.clone(), sync: false })?;
            limited(DELETE, limit, self.leases().delete(request)).await.map(|_| ())
        };
        let aborted = abort.await;
        if let Err(error) = delete.await.and(aborted) {
            tracing::warn!(%error, reference = ?self.reference, "a blob that was not committed stays in containerd until its lease expires");
        }
    }
}
