//! Streamed bodies: a tar that comes in or goes out.
//!
//! ```text
//!   dockerd ──chunked body──► idle limit, byte count ──► driver.apply_diff
//!   driver.diff ──► first chunk awaited ──► pump task ──(4 chunks)──► chunked body ──► dockerd
//!                        │ error: a proper reply            │ error: the connection is cut without the last chunk
//! ```
//!
//! Only idleness is limited, never a whole transfer: a pull over a slow line may take hours.

use super::called::{Called, outcome_of};
use crate::{
    driver::{DriverError, replayed_within},
    error::with_causes,
    telemetry::Outcome,
};
use axum::{
    body::{Body, Bytes},
    http::StatusCode,
};
use futures_util::{Stream, StreamExt};
use std::{io, time::Duration};
use tokio::{
    sync::mpsc,
    time::{error::Elapsed, timeout},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

/// Chunks between the pump and the connection. Chunks have at most 1 MiB.
const PUMP_CHUNKS: usize = 4;

/// The request body as a stream of bytes that fails when nothing arrives for `idle`.
pub(super) fn incoming(
    body: Body,
    idle: Duration,
    mut count: impl FnMut(u64) + Send + 'static,
) -> impl Stream<Item = io::Result<Bytes>> + Send {
    let stream = body.into_data_stream();
    futures_util::stream::unfold(Some(stream), move |state| async move {
        let mut stream = state?;
        match timeout(idle, stream.next()).await {
            Ok(Some(Ok(bytes))) => Some((Ok(bytes), Some(stream))),
            Ok(Some(Err(e))) => Some((Err(io::Error::new(io::ErrorKind::ConnectionAborted, e)), None)),
            Ok(None) => None,
            Err(_) => {
                let text = format!("nothing arrived for {} s (lcow.timeout)", idle.as_secs());
                Some((Err(io::Error::new(io::ErrorKind::TimedOut, text)), None))
            }
        }
    })
    .inspect(move |item| {
        if let Ok(bytes) = item {
            count(bytes.len() as u64);
        }
    })
}

/// Waits at most `idle` for a client to accept data; longer only while an apply starts over, which the client may be
/// waiting for.
async fn unless_idle<F: Future>(idle: Duration, taken: F) -> Result<F::Output, Elapsed> {
    let mut taken = std::pin::pin!(taken);
    loop {
        match timeout(idle, &mut taken).await {
            Err(_) if replayed_within(idle) => {}
            outcome => return outcome,
        }
    }
}

/// What the pump hands to the connection.
enum Part {
    /// The next bytes of the tar.
    Bytes(Bytes),
    /// The tar is complete. Without this the body ends with an error, so that a dead pump never looks like a clean end.
    End,
}

/// A reply body fed from `stream`. An error cuts the connection; a client that reads nothing for `idle` is dropped.
/// `called` logs the outcome.
pub(super) fn outgoing(
    stream: impl Stream<Item = Result<Bytes, DriverError>> + Send + 'static,
    idle: Duration,
    mut count: impl FnMut(u64) + Send + 'static,
    called: Called,
) -> Body {
    let (sender, receiver) = mpsc::channel::<Result<Part, io::Error>>(PUMP_CHUNKS);
    let pumped = called.clone();
    let pump = async move {
        let mut stream = std::pin::pin!(stream);
        let mut sent = 0;
        loop {
            let part = match stream.next().await {
                Some(Ok(bytes)) => {
                    sent += bytes.len() as u64;
                    count(bytes.len() as u64);
                    Ok(Part::Bytes(bytes))
                }
                Some(Err(error)) => {
                    let line = format!("the diff was cut after {sent} bytes: {}", error.for_log());
                    pumped.failed(None, outcome_of(&error), &line);
                    Err(io::Error::other(with_causes(&error)))
                }
                None => Ok(Part::End),
            };
            let last = !matches!(part, Ok(Part::Bytes(_)));
            match unless_idle(idle, sender.send(part)).await {
                Ok(Ok(())) if !last => {}
                Ok(_) => return,
                Err(_) => {
                    let text = format!(
                        "the client read nothing of the diff for {} s (lcow.timeout)",
                        idle.as_secs()
                    );
                    pumped.failed(None, Outcome::Failed, &text);
                    return;
                }
            }
        }
    };
    let pump = tokio::spawn(pump.in_current_span());
    // The request ends with this body; if the body is dropped earlier, the client hung up.
    let state = Some((receiver, AbortOnDropHandle::new(pump), called));
    Body::from_stream(futures_util::stream::unfold(state, |state| async move {
        let (mut receiver, pump, called) = state?;
        match receiver.recv().await {
            Some(Ok(Part::Bytes(bytes))) => Some((Ok(bytes), Some((receiver, pump, called)))),
            Some(Ok(Part::End)) => {
                called.finished(StatusCode::OK);
                None
            }
            Some(Err(e)) => Some((Err(e), None)),
            None => {
                const TEXT: &str = "the diff ended without its end marker";
                called.failed(None, Outcome::Failed, TEXT);
                Some((Err(io::Error::other(TEXT)), None))
            }
        }
    }))
}
