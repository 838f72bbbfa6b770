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
use crate::agent::wire::{Event, FrameType};
use bytes::Bytes;
use futures_util::Stream;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};

/// Chunks between the task and the reader.
pub(super) const QUEUED_CHUNKS: usize = 2;

/// What the task hands over.
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

    /// Whether the agent said that the tar is complete (true only after the last chunk was taken).
    pub fn complete(&self) -> bool {
        self.summary.is_some()
    }

    /// What the agent said at the end.
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

/// A live sandbox that may be frozen. Thawed on every way out, also when the operation's future is dropped.
pub(super) struct Freeze {
    live: Option<Arc<dyn LiveControl>>,
    /// When it must be thawed, if it is frozen now.
    until: Option<Instant>,
    limit: Duration,
    runtime: tokio::runtime::Handle,
}

impl Freeze {
    pub(super) fn new(live: Option<Arc<dyn LiveControl>>, limit: Duration) -> Self {
        Self { live, until: None, limit, runtime: tokio::runtime::Handle::current() }
    }

    /// Stops the writers, if the sandbox is live.
    pub(super) async fn freeze(&mut self) -> Result<(), SvmError> {
        if let Some(live) = &self.live
            && self.until.is_none()
        {
            // Set first: if this future is dropped half way, thawing what may be frozen is right.
            self.until = Some(Instant::now() + self.limit);
            live.freeze().await.map_err(|e| SvmError::Live(format!("freeze: {e}")))?;
        }
        Ok(())
    }

    /// Lets the writers go on.
    pub(super) async fn thaw(&mut self) -> Result<(), SvmError> {
        if let Some(live) = &self.live
            && self.until.is_some()
        {
            live.thaw().await.map_err(|e| SvmError::Live(format!("thaw: {e}")))?;
            self.until = None;
        }
        Ok(())
    }

    /// Whether writers wait now.
    pub(super) fn is_frozen(&self) -> bool {
        self.until.is_some()
    }

    /// The agent's next word, within the time that a freeze may last; answers its events.
    pub(super) async fn next(
        &mut self,
        sender: &mut Sender,
        receiver: &mut Receiver,
    ) -> Result<Incoming, SvmError> {
        loop {
            let word = match self.until {
                Some(until) => timeout_at(until, receiver.next()).await.map_err(|_| {
                    SvmError::Live(format!("its metadata were not read within {}s", self.limit.as_secs_f32()))
                })??,
                None => receiver.next().await?,
            };
            match word {
                Incoming::Event(_) if self.live.is_none() => {
                    return Err(receiver.protocol("event without a live sandbox".into()));
                }
                Incoming::Event(event) => {
                    match event {
                        Event::MetadataRead => self.thaw().await?,
                        Event::BeforeRecheck => self.freeze().await?,
                        Event::Lower | Event::LargerBlocks | Event::Replaying { .. } | Event::Replayed => {
                            return Err(receiver.protocol(format!("a comparison has no {event:?}")));
                        }
                    }
                    if let Err(e) = sender.frame(FrameType::Resume, &[]).await {
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
        if let (Some(live), Some(_)) = (self.live.take(), self.until) {
            self.runtime.spawn(async move {
                if let Err(e) = live.thaw().await {
                    tracing::error!("a live sandbox could not be thawed: {e}");
                }
            });
        }
    }
}
