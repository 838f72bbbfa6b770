//! Connections: from an accepted socket or pipe to requests, and to a close that loses no reply.
//!
//! ```text
//!   accept ─► Line ─► hyper ─► router                               Line: what hyper reads and writes through
//!               │ idle           ──────────────► no limit: a client that reuses it at this moment would lose bytes
//!               │ half a head    ──────────────► HALF_REQUEST, then closed; the layer that it may name is distrusted
//!               │ in a handler   ──────────────► the handlers' own limits
//!               └ answered early, more to come ► the reply; further input is read and dropped, without a limit in
//!                                                bytes, until the client closes or is silent for lcow.timeout
//!   stop: no new connection; idle ones are closed; half requests get HALF_AT_STOP, running ones the stop's limit
//! ```
//!
//! Why input is read after a reply: a client that is still writing when its peer closes sees a broken connection
//! instead of the reply, and dockerd's client then sends the rest of its tar as a new request. Reading the input before
//! replying would delay the reply, and reading up to a limit could still lose it.
//!
//! Called by `cli`. hyper's own timeout for heads is not used: it closes idle connections as well.

use super::{Context, called, router};
use crate::{driver::Clients, telemetry::Outcome};
use axum::{
    body::Body,
    http::{HeaderValue, header},
};
use hyper::{
    Request, Response,
    body::{Body as _, Incoming},
    server::conn::http1,
    service::Service,
};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use parking_lot::Mutex;
use std::{
    convert::Infallible,
    io,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{self, Poll, ready},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{MissedTickBehavior, Sleep, interval, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Longest time from the first byte of a request to the end of its head, and of a JSON request to its end, unless
/// `lcow.timeout` is shorter.
const HALF_REQUEST: Duration = Duration::from_secs(30);
/// The same once the program is stopping; also the longest time that input is read after a reply then.
const HALF_AT_STOP: Duration = Duration::from_secs(2);
/// How often a stopping program checks whether a connection is still in use.
const LOOK: Duration = Duration::from_millis(100);
/// Bytes of a head that are kept to find out which layer it names.
const HEAD_KEPT: usize = 4 << 10;
/// Bytes of its first line that are logged.
const LINE_TOLD: usize = 120;
/// Bytes that are read and dropped at a time.
const DROPPED: usize = 16 << 10;

/// Serves requests until `stop` resolves. Running requests then get `limit` to finish; what is left is cut off.
pub async fn serve<L>(
    mut listener: L,
    context: Context,
    limit: Duration,
    stop: impl Future<Output = ()> + Send,
) where
    L: axum::serve::Listener,
{
    let service = TowerToHyperService::new(router(context.clone()));
    let (stopping, cut, tasks) = (CancellationToken::new(), CancellationToken::new(), TaskTracker::new());
    let clients = Clients::default();
    let idle = {
        let (clients, driver) = (clients.clone(), context.driver.clone());
        tokio::spawn(async move {
            loop {
                clients.all_gone().await;
                driver.unmount_idle().await;
            }
        })
    };
    let mut stop = pin!(stop);
    loop {
        let io = tokio::select! {
            biased;
            () = &mut stop => break,
            (io, _) = listener.accept() => io,
        };
        let signals = Signals { stopping: stopping.clone(), cut: cut.clone() };
        let (client, served) = (clients.arrive(), connection(io, service.clone(), context.clone(), signals));
        tasks.spawn(async move {
            served.await;
            drop(client);
        });
    }
    drop(listener);
    idle.abort();
    stopping.cancel();
    tasks.close();
    if timeout(limit, tasks.wait()).await.is_err() {
        tracing::warn!(
            connections = tasks.len(),
            seconds = limit.as_secs(),
            "cutting off requests that did not finish in time"
        );
        cut.cancel();
        tasks.wait().await;
    }
}

/// Signals to a connection: end after the current request, or end at once.
#[derive(Debug, Clone)]
struct Signals {
    stopping: CancellationToken,
    cut: CancellationToken,
}

/// How long to wait for the rest of a small request; forever by default.
#[derive(Debug, Clone, Default)]
pub(super) struct Patience(Option<(Duration, CancellationToken)>);

impl Patience {
    /// The output of `work`; `None` if it takes too long.
    pub(super) async fn wait<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let Some((limit, stopping)) = &self.0 else { return Some(work.await) };
        let late = async {
            stopping.cancelled().await;
            sleep(HALF_AT_STOP).await;
        };
        tokio::select! {
            biased;
            done = work => Some(done),
            () = sleep(*limit) => None,
            () = late => None,
        }
    }
}

async fn connection<I>(io: I, service: TowerToHyperService<axum::Router>, context: Context, signals: Signals)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let state = Arc::new(State::new(context.clone()));
    let (shared, stopping) = (state.clone(), signals.stopping.clone());
    let answer = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        shared.head_ended();
        request.extensions_mut().insert(Patience(Some((shared.half_limit(), stopping.clone()))));
        let read = Arc::new(AtomicBool::new(request.body().is_end_stream()));
        let asked = request.map(|body| Body::new(Asked { body, read: read.clone() }));
        let (answered, shared) = (service.call(asked), shared.clone());
        async move {
            let mut response: Response<Body> = answered.await?;
            let reusable = read.load(Ordering::Acquire);
            if !reusable {
                // Further input is not a head: this is the connection's last reply.
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            let end = End { state: shared, at: if reusable { At::Idle } else { At::Dropping } };
            Ok::<_, Infallible>(response.map(|body| Answer { body, _end: end }))
        }
    });
    let line = Line { io, state: state.clone(), timer: None, shut: false };
    let mut served = pin!(http1::Builder::new().serve_connection(TokioIo::new(line), answer));
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = false;
    loop {
        tokio::select! {
            ended = served.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection ended early");
                }
                break;
            }
            () = signals.stopping.cancelled(), if !told => {
                told = true;
                served.as_mut().graceful_shutdown();
            }
            _ = look.tick(), if told => if state.is_useless() { break },
            () = signals.cut.cancelled() => break,
        }
    }
    state.connection_ended();
}

/// The state of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Between requests.
    Idle,
    /// A head has begun.
    Head,
    /// A handler has the request, or its reply is being sent.
    Request,
    /// The last reply was sent; further input is dropped.
    Dropping,
}

#[derive(Debug)]
struct State {
    context: Context,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    at: At,
    since: Instant,
    /// The beginning of a head that has not become a request.
    head: Vec<u8>,
    /// The head took too long.
    late: bool,
}

impl State {
    fn new(context: Context) -> Self {
        let inner = Inner { at: At::Idle, since: Instant::now(), head: Vec::new(), late: false };
        Self { context, inner: Mutex::new(inner) }
    }

    /// Longest time that an incomplete request may take.
    fn half_limit(&self) -> Duration {
        self.context.driver.idle_timeout().min(HALF_REQUEST)
    }

    fn arrived(&self, bytes: &[u8]) {
        let mut inner = self.inner.lock();
        if inner.at == At::Idle {
            inner.go(At::Head);
        }
        if inner.at == At::Head {
            let kept = bytes.len().min(HEAD_KEPT - inner.head.len());
            inner.head.extend_from_slice(&bytes[..kept]);
        }
    }

    fn is_at(&self, at: At) -> bool {
        self.inner.lock().at == at
    }

    fn head_ended(&self) {
        let mut inner = self.inner.lock();
        inner.go(At::Request);
        inner.head.clear();
    }

    fn request_ended(&self, at: At) {
        let mut inner = self.inner.lock();
        if inner.at == At::Request {
            inner.go(at);
        }
    }

    fn head_is_late(&self) {
        self.inner.lock().late = true;
    }

    fn dropping(&self) {
        self.inner.lock().go(At::Dropping);
    }

    /// True if a stop no longer needs to wait for this connection.
    fn is_useless(&self) -> bool {
        let inner = self.inner.lock();
        inner.at != At::Request && inner.since.elapsed() >= HALF_AT_STOP
    }

    /// A head that never became a request may have been that of an ApplyDiff, whose client then sends the rest as a new
    /// request.
    fn connection_ended(&self) {
        let (head, late, seconds) = {
            let mut inner = self.inner.lock();
            (std::mem::take(&mut inner.head), inner.late, inner.since.elapsed().as_secs_f32())
        };
        if head.is_empty() {
            return;
        }
        let named = named_layer(&head);
        let (request, layer) = (called::number(), named.as_ref().map(|(begin, _)| begin.as_str()));
        let line = head.split(|b| *b == b'\n').next().unwrap_or_default();
        let line = &line[..line.len().min(LINE_TOLD)];
        tracing::warn!(
            request,
            endpoint = %line.escape_ascii(),
            layer,
            seconds,
            error = if late { "the head of the request did not arrive in time" } else { "the request was cut off, or is not HTTP" },
            "request failed in its head"
        );
        self.context.metrics.request("unknown", Outcome::Failed, Duration::from_secs_f32(seconds));
        match named {
            // A client that gave up before it named a layer is no reason to distrust all layers.
            Some((begin, false)) if begin.is_empty() && !late => {}
            Some((begin, whole)) => self.context.driver.distrust(&begin, whole),
            None => {}
        }
    }
}

impl Inner {
    fn go(&mut self, at: At) {
        (self.at, self.since) = (at, Instant::now());
    }
}

/// The layer that the head of an ApplyDiff names: the beginning of its id, and whether that is the whole id. `None` if
/// the head is not that of an ApplyDiff, or names no layer.
fn named_layer(head: &[u8]) -> Option<(String, bool)> {
    const LINE: &[u8] = b"POST /GraphDriver.ApplyDiff?";
    let head = head.trim_ascii_start();
    let Some(rest) = head.strip_prefix(LINE) else {
        return LINE.starts_with(head).then(|| (String::new(), false));
    };
    let end = rest.iter().position(u8::is_ascii_whitespace);
    let query = &rest[..end.unwrap_or(rest.len())];
    let mut pairs = query.split(|b| *b == b'&').peekable();
    while let Some(pair) = pairs.next() {
        let last = pairs.peek().is_none() && end.is_none();
        if let Some(id) = pair.strip_prefix(b"id=") {
            // No valid id needs an escape; of one that has any, the part before the first is enough.
            let plain = id.iter().position(|b| matches!(b, b'%' | b'+'));
            let begin = String::from_utf8_lossy(&id[..plain.unwrap_or(id.len())]).into_owned();
            return Some((begin, plain.is_none() && !last));
        }
        if last {
            return Some((String::new(), false));
        }
    }
    None
}

/// The body of a reply; the request ends with it.
struct Answer {
    body: Body,
    _end: End,
}

struct End {
    state: Arc<State>,
    at: At,
}

impl Drop for End {
    fn drop(&mut self) {
        self.state.request_ended(self.at);
    }
}

/// The body of a request, which records that it was read to its end.
struct Asked {
    body: Incoming,
    read: Arc<AtomicBool>,
}

impl hyper::body::Body for Asked {
    type Data = bytes::Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
        let this = self.get_mut();
        let frame = Pin::new(&mut this.body).poll_frame(context);
        if matches!(frame, Poll::Ready(None)) || this.body.is_end_stream() {
            this.read.store(true, Ordering::Release);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

impl hyper::body::Body for Answer {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

/// A client's connection as hyper sees it.
struct Line<I> {
    io: I,
    state: Arc<State>,
    /// Runs while a head is incomplete, and while input is dropped.
    timer: Option<Pin<Box<Sleep>>>,
    shut: bool,
}

impl<I: AsyncRead + Unpin> AsyncRead for Line<I> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let read = Pin::new(&mut this.io).poll_read(context, buf);
        let new = &buf.filled()[before..];
        if !new.is_empty() {
            this.state.arrived(new);
        }
        if !this.state.is_at(At::Head) {
            this.timer = None;
            return read;
        }
        let limit = &this.state;
        let timer = this.timer.get_or_insert_with(|| Box::pin(sleep(limit.half_limit())));
        if read.is_pending() && timer.as_mut().poll(context).is_ready() {
            this.state.head_is_late();
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Line<I> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(context, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut task::Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(context, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(context)
    }

    /// Shuts down the sending side, and keeps reading until the client closes.
    fn poll_shutdown(self: Pin<&mut Self>, context: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.shut {
            ready!(Pin::new(&mut this.io).poll_shutdown(context))?;
            this.shut = true;
            this.state.dropping();
            this.timer = None;
        }
        let mut dropped = [0; DROPPED];
        // Other tasks need their turn too.
        for _ in 0..16 {
            let mut buf = ReadBuf::new(&mut dropped);
            match Pin::new(&mut this.io).poll_read(context, &mut buf) {
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => this.timer = None,
                // Closed, one way or the other.
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => {
                    let idle = this.state.context.driver.idle_timeout();
                    let timer = this.timer.get_or_insert_with(|| Box::pin(sleep(idle)));
                    return timer.as_mut().poll(context).map(|()| Ok(()));
                }
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_tells_which_layer_it_may_have_meant() {
        let whole = "POST /GraphDriver.ApplyDiff?id=abc&parent=def HTTP/1.1\r\n";
        let named = |text: &str| named_layer(text.as_bytes());
        let (begin, id_ends) = (whole.find("abc").unwrap(), whole.find('&').unwrap());
        for cut in 1..whole.len() {
            let expected = match cut {
                _ if cut > id_ends => ("abc".into(), true),
                _ if cut > begin => (whole[begin..cut].to_owned(), false),
                _ => (String::new(), false),
            };
            assert_eq!(named(&whole[..cut]), Some(expected), "{cut}");
        }
        assert_eq!(named("POST /GraphDriver.ApplyDiff?parent=x&id=y HTTP/1.1"), Some(("y".into(), true)));
        assert_eq!(named("POST /GraphDriver.ApplyDiff?parent=x&i"), Some((String::new(), false)));
        assert_eq!(named("POST /GraphDriver.ApplyDiff?id=a%62c HTTP/1.1"), Some(("a".into(), false)));
        for other in [
            "POST /GraphDriver.Status HTTP/1.1\r\n",
            "GET /metrics",
            "POST /GraphDriver.ApplyDiff?x=1 HTTP/1.1",
        ] {
            assert_eq!(named(other), None, "{other}");
        }
    }
}
