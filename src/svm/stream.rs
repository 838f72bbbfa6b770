//! The tar that comes out of a service VM, and the freeze of a live sandbox around it.
//!
//! ```text
//!   agent ─► task (owns lease, channel, freeze) ─► 2 chunks ─► TarStream ─► HTTP reply
//! ```
//!
//! The task ends, and with it lease and channel, as soon as the stream is dropped. Called by `lease`.

use super::{
    ExportSummary, LiveControl, SvmError,
    exchange::{Incoming, Receiver, Sender},
};
use crate::error::with_causes;
use bytes::Bytes;
use futures_util::Stream;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use svm_protocol::{FrameType, OperationEvent};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tracing::Instrument as _;

/// Chunks between the task and the reader.
pub(super) const QUEUED_CHUNKS: usize = 2;

/// What the task sends to the reader.
#[derive(Debug)]
pub(super) enum Item {
    Data(Bytes),
    Done(ExportSummary),
}

/// Bytes of a tar, in chunks of at most 1 MiB. An `Err` item, or an end without [`TarStream::complete`], means that
/// the tar was cut: the HTTP reply must be cut too. Dropping it cancels the operation and frees the lease.
#[derive(Debug)]
pub struct TarStream {
    first: Option<Bytes>,
    rest: mpsc::Receiver<Result<Item, SvmError>>,
    summary: Option<ExportSummary>,
    failed: bool,
}

impl TarStream {
    /// Waits for the first chunk (or the end of an empty tar).
    pub(super) async fn begin(mut rest: mpsc::Receiver<Result<Item, SvmError>>) -> Result<Self, SvmError> {
        let (first, summary) = match rest.recv().await {
            Some(Ok(Item::Data(bytes))) => (Some(bytes), None),
            Some(Ok(Item::Done(summary))) => (None, Some(summary)),
            Some(Err(e)) => return Err(e),
            None => return Err(SvmError::Cancelled("the export ended early")),
        };
        Ok(Self { first, rest, summary, failed: false })
    }

    /// Whether the agent reported the tar as complete; true only after the last chunk was taken.
    pub fn complete(&self) -> bool {
        self.summary.is_some()
    }

    /// The agent's summary.
    pub fn summary(&self) -> Option<&ExportSummary> {
        self.summary.as_ref()
    }
}

impl Stream for TarStream {
    type Item = Result<Bytes, SvmError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(first)));
        }
        if self.summary.is_some() || self.failed {
            return Poll::Ready(None);
        }
        Poll::Ready(match std::task::ready!(self.rest.poll_recv(cx)) {
            Some(Ok(Item::Data(bytes))) => Some(Ok(bytes)),
            Some(Ok(Item::Done(summary))) => {
                self.summary = Some(summary);
                None
            }
            Some(Err(e)) => {
                self.failed = true;
                Some(Err(e))
            }
            None => {
                self.failed = true;
                Some(Err(SvmError::Cancelled("the export's task ended early")))
            }
        })
    }
}

/// Freezes of one operation: one to read metadata, one to check them again at the end.
const MOST_FREEZES: u32 = 2;

/// A live sandbox that may be frozen. Limits how often and how long, whatever the agent asks for. Thawed on every exit
/// path, also when the operation's future is dropped.
pub(super) struct Freeze {
    live: Option<Arc<dyn LiveControl>>,
    state: Writers,
    /// Freezes that are left.
    left: u32,
    limit: Duration,
    runtime: tokio::runtime::Handle,
}

/// State of the writers of a live sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writers {
    GoOn,
    /// Being stopped, or perhaps still stopped: in case of doubt, thaw.
    Stopping,
    /// They are stopped, until then at most.
    Wait(Instant),
}

impl Freeze {
    pub(super) fn new(live: Option<Arc<dyn LiveControl>>, limit: Duration) -> Self {
        let runtime = tokio::runtime::Handle::current();
        Self { live, state: Writers::GoOn, left: MOST_FREEZES, limit, runtime }
    }

    /// Stops the writers, if the sandbox is live. The time limit begins when they are stopped.
    pub(super) async fn freeze(&mut self) -> Result<(), SvmError> {
        let Some(live) = &self.live else { return Ok(()) };
        self.left = self.left.checked_sub(1).ok_or(SvmError::Live("a third freeze".into()))?;
        self.state = Writers::Stopping;
        live.freeze().await.map_err(|e| SvmError::Live(format!("freeze: {}", with_causes(&e))))?;
        self.state = Writers::Wait(Instant::now() + self.limit);
        Ok(())
    }

    /// Lets the writers continue.
    pub(super) async fn thaw(&mut self) -> Result<(), SvmError> {
        if let Some(live) = &self.live
            && self.state != Writers::GoOn
        {
            live.thaw().await.map_err(|e| SvmError::Live(format!("thaw: {}", with_causes(&e))))?;
            self.state = Writers::GoOn;
        }
        Ok(())
    }

    /// Whether writers are stopped now.
    pub(super) fn is_frozen(&self) -> bool {
        self.state != Writers::GoOn
    }

    /// Awaits `work`, which the agent could delay, within the time limit of a freeze. After that the writers continue,
    /// and it is an error.
    pub(super) async fn within<T>(&mut self, work: impl Future<Output = T>) -> Result<T, SvmError> {
        let Writers::Wait(until) = self.state else { return Ok(work.await) };
        if let Ok(done) = timeout_at(until, work).await {
            return Ok(done);
        }
        self.thaw().await?;
        let limit = self.limit.as_secs_f32();
        Err(SvmError::Live(format!("its metadata were not read within {limit}s, the limit of a freeze")))
    }

    /// The agent's next message, within the time limit of a freeze; answers its events.
    pub(super) async fn next(
        &mut self,
        sender: &mut Sender,
        receiver: &mut Receiver,
    ) -> Result<Incoming, SvmError> {
        loop {
            match self.within(receiver.next()).await?? {
                Incoming::Event(_) if self.live.is_none() => {
                    return Err(receiver.protocol("event without a live sandbox".into()));
                }
                Incoming::Event(event) => {
                    match (event, self.is_frozen()) {
                        (OperationEvent::MetadataRead, true) => self.thaw().await?,
                        (OperationEvent::BeforeRecheck, false) if self.left > 0 => self.freeze().await?,
                        _ => return Err(receiver.protocol(format!("unexpected event {event:?}"))),
                    }
                    if let Err(e) = self.within(sender.frame(FrameType::Resume, &[])).await? {
                        return Err(receiver.after_send_error(e).await);
                    }
                }
                Incoming::Result(json) => {
                    self.thaw().await?;
                    return Ok(Incoming::Result(json));
                }
                data @ Incoming::Data(_) => return Ok(data),
            }
        }
    }
}

impl Drop for Freeze {
    fn drop(&mut self) {
        if self.state == Writers::GoOn {
            return;
        }
        if let Some(live) = self.live.take() {
            let thaw = async move {
                if let Err(e) = live.thaw().await {
                    tracing::error!("a live sandbox could not be thawed: {e}");
                }
            };
            self.runtime.spawn(thaw.in_current_span());
        }
    }
}
