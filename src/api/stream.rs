//! Bodies that stream: a tar on its way in or out.
//!
//! ```text
//!   dockerd ──chunked body──► idle limit, byte count ──► driver.apply_diff
//!   driver.diff ──► first chunk awaited ──► pump task ──(4 chunks)──► chunked body ──► dockerd
//!                        │ error: a proper reply            │ error: the connection is cut without the last chunk
//! ```
//!
//! Only idleness is limited, never a whole transfer: a pull over a slow line may take hours.

use super::called::Called;
use crate::{
    driver::{replayed_within, with_causes},
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

/// Waits for a client that takes something, at most `idle`; longer only while an apply begins anew, which the client may
/// be waiting for.
async fn unless_idle<F: Future>(idle: Duration, taken: F) -> Result<F::Output, Elapsed> {
    let mut taken = std::pin::pin!(taken);
    loop {
        match timeout(idle, &mut taken).await {
            Err(_) if replayed_within(idle) => {}
            outcome => return outcome,
        }
    }
}

/// A reply body fed from `stream`. An error cuts the connection; a client that reads nothing for `idle` is dropped.
/// `called` hears what became of it; `kind` sorts errors for the metrics.
pub(super) fn outgoing<S, E>(
    stream: S,
    idle: Duration,
    mut count: impl FnMut(u64) + Send + 'static,
    called: Called,
    kind: fn(&E) -> Outcome,
) -> Body
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: std::error::Error + Send + Sync + 'static,
{
    let (sender, receiver) = mpsc::channel::<Result<Bytes, io::Error>>(PUMP_CHUNKS);
    let told = called.clone();
    let pump = tokio::spawn(async move {
        let mut stream = std::pin::pin!(stream);
        let mut sent = 0;
        while let Some(item) = stream.next().await {
            let item = item.map_err(|e| {
                let text = with_causes(&e);
                told.failed(None, kind(&e), &format!("the diff was cut after {sent} bytes: {text}"));
                io::Error::other(text)
            });
            let failed = item.is_err();
            if let Ok(bytes) = &item {
                sent += bytes.len() as u64;
                count(bytes.len() as u64);
            }
            match unless_idle(idle, sender.send(item)).await {
                Ok(Ok(())) if !failed => {}
                Ok(_) => return,
                Err(_) => {
                    let text = format!(
                        "the client read nothing of the diff for {} s (lcow.timeout)",
                        idle.as_secs()
                    );
                    told.failed(None, Outcome::Failed, &text);
                    // The receiver sees the missing end as an error, below.
                    return;
                }
            }
        }
        // An explicit end: without it the body below fails, so that a pump that died is never a clean end.
        let _ = sender.send(Ok(Bytes::new())).await;
    });
    // The request is over with the last byte, or with this body: whoever drops it early hung up.
    let state = Some((receiver, AbortOnDropHandle::new(pump), called));
    Body::from_stream(futures_util::stream::unfold(state, |state| async move {
        let (mut receiver, pump, called) = state?;
        match receiver.recv().await {
            Some(Ok(bytes)) if bytes.is_empty() => {
                called.finished(StatusCode::OK);
                None
            }
            Some(Ok(bytes)) => Some((Ok(bytes), Some((receiver, pump, called)))),
            Some(Err(e)) => Some((Err(e), None)),
            None => {
                called.failed(None, Outcome::Failed, "the diff has no end");
                Some((Err(io::Error::other("the diff has no end")), None))
            }
        }
    }))
}
