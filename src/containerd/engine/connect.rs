//! The connection to containerd: a unix socket or a named pipe, shared by all calls.
//!
//! ```text
//!   Engine ─ Channel ─ first call, or first after a failure ─► connector ─► socket or pipe
//! ```
//!
//! The URI is `http://localhost` whatever the address: gRPC needs an authority that is a host. Called by `engine`.

use super::{Blob, BlobWriter, Content, EngineError, Limits, read, write};
use containerd_api::{LEASE_HEADER, NAMESPACE_HEADER};
use futures_util::future::{BoxFuture, FutureExt};
use hyper_util::rt::TokioIo;
use std::{fmt, io, path::PathBuf, sync::Arc};
use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tonic::{
    Request, Status,
    metadata::AsciiMetadataValue,
    transport::{Channel, Endpoint, Uri},
};

/// The greatest message of containerd, in both directions (`defaults.DefaultMaxRecvMsgSize`).
pub(super) const MAX_MESSAGE: usize = 16 << 20;
/// Bytes that containerd may send ahead in one stream. All streams share a connection, so that one that nobody reads must
/// not take the connection's whole window.
const STREAM_WINDOW: u32 = 2 << 20;
/// Bytes that containerd may send ahead in all streams.
const CONNECTION_WINDOW: u32 = 32 << 20;
/// Bytes of containerd that are received at once, as much as a unix socket holds by default (`net.core.wmem_default`). By
/// itself the HTTP/2 library reads 8 KiB at a time, which for a blob of 600 MB were 75,000 calls.
const RECEIVED_AT_ONCE: usize = 208 << 10;
/// The authority of all calls.
const AUTHORITY: &str = "http://localhost";

/// A client of one containerd.
#[derive(Clone)]
pub struct Engine {
    pub(super) channel: Channel,
    pub(super) limits: Limits,
    connect: Arc<dyn Fn() -> Channel + Send + Sync>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Engine {
    /// A client of the containerd that listens at `address`: the path of a unix socket, or the name of a pipe on Windows.
    /// Connects with the first call. Must be called within a runtime.
    pub fn new(address: PathBuf, limits: Limits) -> Self {
        let address = Arc::new(address);
        Self::over(limits, move || dial(Arc::clone(&address)))
    }

    /// A client over streams that `dial` makes.
    pub(crate) fn over<D, F, S>(limits: Limits, dial: D) -> Self
    where
        D: Fn() -> F + Send + Sync + 'static,
        F: Future<Output = io::Result<S>> + Send + 'static,
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let dial = Arc::new(dial);
        let connect = Arc::new(move || {
            let dial = dial.clone();
            let connector = tower::service_fn(move |_: Uri| {
                let buffered = |stream| TokioIo::new(BufReader::with_capacity(RECEIVED_AT_ONCE, stream));
                dial().map(move |stream| stream.map(buffered))
            });
            Endpoint::from_static(AUTHORITY)
                .connect_timeout(limits.call)
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .connect_with_connector_lazy(connector)
        });
        Self { channel: connect(), limits, connect }
    }

    /// A connection of its own, for a stream that sends much: what containerd does not read of it fills the window of the
    /// whole connection, and no other call would get through.
    pub(super) fn alone(&self) -> Channel {
        (self.connect)()
    }
}

/// A request with the headers of a call.
pub(super) fn request<T>(
    call: &'static str,
    message: T,
    namespace: &str,
    lease: Option<&str>,
) -> Result<Request<T>, EngineError> {
    let value = |text: &str| {
        AsciiMetadataValue::try_from(text).map_err(|_| {
            EngineError::of(call, &Status::invalid_argument("a namespace or lease is not plain text"))
        })
    };
    let mut request = Request::new(message);
    let headers = request.metadata_mut();
    headers.insert(NAMESPACE_HEADER, value(namespace)?);
    if let Some(lease) = lease {
        headers.insert(LEASE_HEADER, value(lease)?);
    }
    Ok(request)
}

impl Content for Engine {
    fn read<'a>(
        &'a self,
        namespace: &'a str,
        digest: &'a str,
        size: u64,
    ) -> BoxFuture<'a, Result<Blob, EngineError>> {
        read::blob(self, namespace, digest, size).boxed()
    }

    fn write<'a>(
        &'a self,
        namespace: &'a str,
        reference: &'a str,
    ) -> BoxFuture<'a, Result<Box<dyn BlobWriter>, EngineError>> {
        async move { Ok(Box::new(write::Write::open(self, namespace, reference).await?) as Box<dyn BlobWriter>) }
            .boxed()
    }
}

#[cfg(unix)]
async fn dial(address: Arc<PathBuf>) -> io::Result<tokio::net::UnixStream> {
    tokio::net::UnixStream::connect(&*address).await.map_err(|e| named(&address, &e))
}

/// Waits while all instances of the pipe are in use; the connection's time limit ends that.
#[cfg(windows)]
async fn dial(address: Arc<PathBuf>) -> io::Result<tokio::net::windows::named_pipe::NamedPipeClient> {
    use std::time::Duration;
    /// `ERROR_PIPE_BUSY`: every instance has a client, and the next one does not exist yet.
    const BUSY: i32 = 231;
    const PAUSE: Duration = Duration::from_millis(20);
    loop {
        match tokio::net::windows::named_pipe::ClientOptions::new().open(&*address) {
            Err(e) if e.raw_os_error() == Some(BUSY) => tokio::time::sleep(PAUSE).await,
            opened => return opened.map_err(|e| named(&address, &e)),
        }
    }
}

/// An error with the address that it came from.
fn named(address: &std::path::Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot connect to '{}': {error}", address.display()))
}
