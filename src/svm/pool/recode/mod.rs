//! Decompression and compression on a lease: a stream goes in while another comes out.
//!
//! ```text
//!   body ─► Sender::body ─► channel ══ agent ══ channel ─► receive ─► 2 chunks ─► Recoded ─► caller
//!           └───────────── one task, both halves polled at the same time ─────────────┘
//! ```
//!
//! * Neither half waits for the other: the agent reads and writes in turns, so whatever it waits for, this side does. Back
//!   pressure of a slow reader reaches the body through the agent, and a stream holds what `svm` says of every stream.
//! * The time-out counts only while the agent is waited for. A body that brings nothing is its owner's affair, as is a
//!   reader that takes nothing; while it holds everything up, the agent need not accept input either.
//! * What the agent reports is checked: no more bytes than the limit (of a compression: than a sane encoder makes of what it
//!   was sent), a summary only after the end of the body, with the numbers of bytes that passed here.
//!
//! The task owns lease, channel and body, and drops them before the reader sees the end. Called by `driver`.

use super::Lease;
use crate::svm::{
    CompressJob, Compression, ExpandJob, RecodeSummary, SvmError,
    exchange::{Incoming, Receiver, SendError, Sender},
    stream::QUEUED_CHUNKS,
};
use bytes::Bytes;
use futures_util::Stream;
use std::{
    io,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};
use svm_protocol::Operation;
use tokio::{sync::mpsc, time::timeout};
use tracing::Instrument as _;

/// What the task sends to the reader.
#[derive(Debug)]
enum Item {
    Data(Bytes),
    Done(RecodeSummary),
}

/// Recoded bytes, in chunks of at most 1 MiB. An `Err` item, or an end without [`Recoded::complete`], means that the stream
/// was cut. Dropping it cancels the operation, drops the body and gives the lease back.
#[derive(Debug)]
pub struct Recoded {
    rest: mpsc::Receiver<Result<Item, SvmError>>,
    summary: Option<RecodeSummary>,
    failed: bool,
}

impl Recoded {
    /// Whether the agent reported the stream as complete, and what it reported is right; true only after the last chunk was
    /// taken.
    pub fn complete(&self) -> bool {
        self.summary.is_some()
    }

    /// The agent's summary, after the last chunk.
    pub fn summary(&self) -> Option<&RecodeSummary> {
        self.summary.as_ref()
    }
}

impl Stream for Recoded {
    type Item = Result<Bytes, SvmError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.summary.is_some() || self.failed {
            return Poll::Ready(None);
        }
        let failed = match ready!(self.rest.poll_recv(cx)) {
            Some(Ok(Item::Data(bytes))) => return Poll::Ready(Some(Ok(bytes))),
            Some(Ok(Item::Done(summary))) => {
                self.summary = Some(summary);
                return Poll::Ready(None);
            }
            Some(Err(e)) => e,
            None => SvmError::Cancelled("the recoding's task ended early"),
        };
        self.failed = true;
        Poll::Ready(Some(Err(failed)))
    }
}

/// What is expected of the agent.
#[derive(Debug, Clone, Copy)]
struct Rules {
    /// The format that the summary must name, unless the agent was to find it out.
    format: Option<Compression>,
    /// Most bytes of output; `None` for a compression, whose output is limited by its input.
    output_bytes: Option<u64>,
    idle: Duration,
}

/// Bytes by which an encoder's output may exceed its input in all, besides an eighth of it: headers, trailers, blocks.
/// Deflate with fixed codes, the worst, needs nine bits for a byte.
const ENCODER_OVERHEAD: u64 = 64 << 10;

impl Rules {
    /// The most bytes that may have come back after `sent` bytes.
    fn most(&self, sent: u64) -> u64 {
        self.output_bytes.unwrap_or_else(|| sent.saturating_add(sent / 8).saturating_add(ENCODER_OVERHEAD))
    }
}

impl Lease {
    /// Decompresses `body`. Returns as soon as the agent has the request; everything later is an item of the stream, which
    /// keeps the lease.
    ///
    /// # Errors
    /// The VM cannot be reached. As items: [`SvmError::Body`] if the body fails; [`SvmError::Refused`] with
    /// [`ErrorKind::Corrupt`](svm_protocol::ErrorKind) for a stream that is damaged or cut off (the message has the place),
    /// with `Limit` if it expands to more than the limits allow; [`SvmError::Timeout`] if the agent makes no progress;
    /// [`SvmError::Protocol`] if it lies.
    pub async fn expand<S>(self, job: ExpandJob, body: S) -> Result<Recoded, SvmError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send + 'static,
    {
        let operation = Operation::Expand { format: job.format, limits: job.limits };
        self.recode(&operation, job.format, Some(job.limits.output_bytes), body).await
    }

    /// Compresses `body`; otherwise as [`Lease::expand`].
    ///
    /// # Errors
    /// As [`Lease::expand`]; [`ErrorKind::Usage`](svm_protocol::ErrorKind) for a level that the format does not have.
    pub async fn compress<S>(self, job: CompressJob, body: S) -> Result<Recoded, SvmError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send + 'static,
    {
        let operation = Operation::Compress { format: job.format, level: job.level };
        self.recode(&operation, Some(job.format), None, body).await
    }

    async fn recode<S>(
        self,
        operation: &Operation,
        format: Option<Compression>,
        output_bytes: Option<u64>,
        body: S,
    ) -> Result<Recoded, SvmError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send + 'static,
    {
        let rules = Rules { format, output_bytes, idle: self.idle_timeout() };
        let channel = self.judge(self.begin(operation).await)?;
        let (out, rest) = mpsc::channel(QUEUED_CHUNKS);
        let exchanging = async move {
            let end = tokio::select! {
                biased;
                () = out.closed() => None,
                done = exchange(channel, rules, body, &out) => Some(self.judge(done)),
            };
            // The lease is dropped first, so that the VM is free when the reader sees the end of the stream.
            drop(self);
            if let Some(end) = end {
                let _ = out.send(end.map(Item::Done)).await;
            }
        };
        tokio::spawn(exchanging.in_current_span());
        Ok(Recoded { rest, summary: None, failed: false })
    }
}

/// Sends the body and forwards what comes back, both at once.
async fn exchange<S>(
    (mut sender, mut receiver): (Sender, Receiver),
    rules: Rules,
    body: S,
    out: &mpsc::Sender<Result<Item, SvmError>>,
) -> Result<RecodeSummary, SvmError>
where
    S: Stream<Item = io::Result<Bytes>> + Send,
{
    // Nothing is sent between the frames of the body.
    let (_, mut between) = mpsc::unbounded_channel();
    let (summary, broken) = {
        let mut receiving = pin!(receive(&mut receiver, rules, out));
        let sent = tokio::select! {
            biased;
            // The agent may refuse before it has seen everything, but cannot succeed.
            early = &mut receiving => Err(early.err()),
            sent = sender.body(body, &mut between) => Ok(sent),
        };
        match sent {
            Ok(Ok(())) => (receiving.await?, None),
            Ok(Err(SendError::Body(e))) => return Err(SvmError::Body(e.to_string())),
            Ok(Err(SendError::Timeout)) => {
                return Err(SvmError::Timeout { what: "sending to the service VM", after: rules.idle });
            }
            // The agent's Error, if there is one, is behind what it had sent already.
            Ok(Err(SendError::Channel(e))) => {
                (receiving.await?, Some(format!("channel broke while sending: {e}")))
            }
            Err(Some(error)) => return Err(error),
            Err(None) => (RecodeSummary::default(), Some("a result before the end of the stream".to_owned())),
        }
    };
    if let Some(reason) = broken {
        return Err(receiver.protocol(reason));
    }
    let sent = receiver.sent_bytes();
    if summary.bytes_in != sent {
        let found = summary.bytes_in;
        return Err(receiver.protocol(format!("a summary of {found} bytes in where {sent} were sent")));
    }
    Ok(summary)
}

/// Forwards the agent's bytes up to its summary, which it checks against them.
async fn receive(
    receiver: &mut Receiver,
    rules: Rules,
    out: &mpsc::Sender<Result<Item, SvmError>>,
) -> Result<RecodeSummary, SvmError> {
    let mut received = 0;
    loop {
        match receiver.next().await? {
            Incoming::Data(bytes) => {
                received += bytes.len() as u64;
                let most = rules.most(receiver.sent_bytes());
                if received > most {
                    return Err(receiver.protocol(format!("{received} bytes of output, more than {most}")));
                }
                forward(receiver, rules.idle, bytes, out).await?;
            }
            Incoming::Result(json) => {
                let summary: RecodeSummary = receiver.decode(&json)?;
                if summary.bytes_out != received {
                    let found = summary.bytes_out;
                    let reason = format!("a summary of {found} bytes out where {received} came");
                    return Err(receiver.protocol(reason));
                }
                if let Some(format) = rules.format
                    && format != summary.format
                {
                    let found = summary.format;
                    return Err(
                        receiver.protocol(format!("a summary of {found} where {format} was asked for"))
                    );
                }
                return Ok(summary);
            }
            Incoming::Event(_) => return Err(receiver.protocol("unexpected event".into())),
        }
    }
}

/// Waits for the reader to take a chunk. Meanwhile the agent may be unable to write, and then it does not read either.
async fn forward(
    receiver: &mut Receiver,
    idle: Duration,
    bytes: Bytes,
    out: &mpsc::Sender<Result<Item, SvmError>>,
) -> Result<(), SvmError> {
    let mut taken = pin!(out.send(Ok(Item::Data(bytes))));
    loop {
        receiver.excuse();
        match timeout(idle / 2, &mut taken).await {
            Ok(Ok(())) => break,
            Ok(Err(_)) => return Err(SvmError::Cancelled("the reader of the stream has gone")),
            Err(_) => {}
        }
    }
    receiver.excuse();
    Ok(())
}

#[cfg(test)]
mod tests;
