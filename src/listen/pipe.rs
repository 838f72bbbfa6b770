//! The Windows named pipe.
//!
//! ```text
//!   instance n ──client connects──► instance n+1 is made ──► n is handed over      a client never finds no instance
//!   Connection ── writes that do not end for WRITE_TIMEOUT ──► TimedOut: a client that never reads holds nothing
//! ```
//!
//! The first instance is made with the first-instance flag, so no other process can have taken the name before; all have the
//! given security descriptor; remote clients are rejected by the system.

use super::ListenError;
use lcow_sys::windows::{
    pipe::{Instance, PipeStream, create_server},
    security::SecurityDescriptor,
};
use std::{
    ffi::{OsStr, OsString},
    future::Future,
    io,
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::windows::named_pipe::NamedPipeServer,
    time::{Instant, Sleep},
};

/// Default security descriptor: the system and administrators may connect.
pub const DEFAULT_SECURITY: &str = "D:P(A;;GA;;;SY)(A;;GA;;;BA)";
/// Prefix of every pipe's name.
pub const PREFIX: &str = r"\\.\pipe\";
/// Default limit for a client to read bytes of a reply.
pub const WRITE_TIMEOUT: Duration = Duration::from_mins(5);
/// Pause after an accept that failed, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A listening named pipe.
#[derive(Debug)]
pub struct PipeIncoming {
    name: OsString,
    descriptor: SecurityDescriptor,
    write_timeout: Duration,
    /// The instance that waits for the next client; `None` only after making one failed.
    waiting: Option<NamedPipeServer>,
}

impl PipeIncoming {
    /// Listens on the pipe `name`, open to those that `sddl` admits. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// A name that is not that of a local pipe, invalid SDDL, or a pipe of another process.
    pub fn bind(name: &OsStr, sddl: &str, write_timeout: Duration) -> Result<Self, ListenError> {
        let path = || PathBuf::from(name);
        let text = name.to_string_lossy();
        let plain = text.get(..PREFIX.len()).is_some_and(|p| p.eq_ignore_ascii_case(PREFIX));
        if !plain || text.len() == PREFIX.len() || text[PREFIX.len()..].contains('\\') {
            return Err(ListenError::NotAPipe { path: path() });
        }
        let descriptor = SecurityDescriptor::parse(sddl).map_err(|source| ListenError::Io {
            action: "read the security of",
            path: path(),
            source,
        })?;
        // Besides the flag for the first instance, which Wine does not hold to.
        if !matches!(PipeStream::connect(name, Duration::ZERO), Err(e) if e.kind() == io::ErrorKind::NotFound)
        {
            return Err(ListenError::InUse { path: path() });
        }
        let first = create_server(name, Instance::First, &descriptor).map_err(|source| {
            // The flag for the first instance is answered so when the name exists.
            if source.kind() == io::ErrorKind::PermissionDenied {
                ListenError::InUse { path: path() }
            } else {
                ListenError::Io { action: "make", path: path(), source }
            }
        })?;
        Ok(Self { name: name.to_owned(), descriptor, write_timeout, waiting: Some(first) })
    }

    /// As [`PipeIncoming::bind`], for clients of gRPC. grpc-go sends the whole name, percent-encoded, as `:authority` of
    /// each call. `%` is not allowed in a host, and the HTTP/2 library resets such calls; before an `@` it is user
    /// information, in which `%` is allowed (RFC 3986, section 3.2.1).
    ///
    /// # Errors
    /// As there; or a name without `@` and a host behind it.
    pub fn bind_for_grpc(name: &OsStr, sddl: &str, write_timeout: Duration) -> Result<Self, ListenError> {
        let text = name.to_string_lossy();
        let host = text.rsplit_once('@').map(|(before, host)| (before.len() > PREFIX.len(), host));
        let is_host = |host: &str| {
            !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'-')
        };
        if !host.is_some_and(|(is_named, host)| is_named && is_host(host)) || text.matches('@').count() != 1 {
            return Err(ListenError::NotForGrpc { path: PathBuf::from(name) });
        }
        Self::bind(name, sddl, write_timeout)
    }

    /// Waits for a client and makes the next instance before it hands this one over.
    async fn next(&mut self) -> io::Result<NamedPipeServer> {
        if self.waiting.is_none() {
            self.waiting = Some(create_server(&self.name, Instance::Next, &self.descriptor)?);
        }
        if let Some(waiting) = &self.waiting {
            waiting.connect().await.inspect_err(|_| self.waiting = None)?;
        }
        let next = create_server(&self.name, Instance::Next, &self.descriptor);
        let connected = self.waiting.take();
        match next {
            Ok(next) => self.waiting = Some(next),
            // The client that is here is served all the same; the next turn tries again.
            Err(e) => tracing::warn!(error = %e, "cannot create the next instance of the pipe; retrying"),
        }
        connected.ok_or_else(|| io::Error::other("no instance was waiting"))
    }
}

impl axum::serve::Listener for PipeIncoming {
    type Io = PipeConnection;
    type Addr = OsString;

    async fn accept(&mut self) -> (PipeConnection, OsString) {
        loop {
            match self.next().await {
                Ok(pipe) => return (PipeConnection::new(pipe, self.write_timeout), self.name.clone()),
                Err(e) => {
                    tracing::warn!(error = %e, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<OsString> {
        Ok(self.name.clone())
    }
}

/// A client's connection.
#[derive(Debug)]
pub struct PipeConnection {
    pipe: NamedPipeServer,
    limit: Duration,
    /// Runs while a write waits.
    timer: Option<Pin<Box<Sleep>>>,
}

impl PipeConnection {
    fn new(pipe: NamedPipeServer, limit: Duration) -> Self {
        Self { pipe, limit, timer: None }
    }

    /// Passes on the result of a write; one that waits for too long is an error.
    fn timed<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.timer = None;
            return written;
        }
        let limit = self.limit;
        let timer =
            self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + limit)));
        ready!(timer.as_mut().poll(context));
        // Dropping the pipe would let the write that waits keep it open; this takes it from the client at once.
        let _ = self.pipe.disconnect();
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read its reply")))
    }
}

impl AsyncRead for PipeConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_read(context, buf)
    }
}

impl AsyncWrite for PipeConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.pipe).poll_write(context, buf);
        self.timed(context, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> OsString {
        format!(r"{PREFIX}lcow-test-{}", uuid::Uuid::new_v4().simple()).into()
    }

    #[tokio::test]
    async fn wrong_names_and_wrong_sddl_are_refused() {
        for wrong in ["lcow", r"\\.\pipe\", r"\\server\pipe\lcow", r"\\.\pipe\a\b", "/run/lcow.sock"] {
            let refused = PipeIncoming::bind(OsStr::new(wrong), DEFAULT_SECURITY, WRITE_TIMEOUT);
            assert!(matches!(refused, Err(ListenError::NotAPipe { .. })), "{wrong}");
        }
        for wrong in [
            r"\\.\pipe\lcow",
            r"\\.\pipe\lcow@",
            r"\\.\pipe\@localhost",
            r"\\.\pipe\lcow@a b",
            r"\\.\pipe\a@b@localhost",
        ] {
            let refused = PipeIncoming::bind_for_grpc(OsStr::new(wrong), DEFAULT_SECURITY, WRITE_TIMEOUT);
            assert!(matches!(refused, Err(ListenError::NotForGrpc { .. })), "{wrong}");
        }
        let error = PipeIncoming::bind(&name(), "D:(what)", WRITE_TIMEOUT).unwrap_err();
        assert!(matches!(error, ListenError::Io { action: "read the security of", .. }), "{error}");
    }
}
