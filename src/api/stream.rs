//! Bodies that stream: a tar on its way in or out.
//!
//! ```text
//!   dockerd ──chunked body──► idle limit, byte count ──► driver.apply_diff
//!   driver.diff ──► first chunk awaited ──► pump task ──(4 chunks)──► chunked body ──► dockerd
//!                        │ error: a proper reply            │ error: the connection is cut without the last chunk
//! ```
//!
//! Only idleness is limited, never a whole transfer: a pull over a slow line may take hours.

use crate::driver::{replayed_within, with_causes};
use axum::body::{Body, Bytes};
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
pub(super) fn outgoing<S, E>(stream: S, idle: Duration, mut count: impl FnMut(u64) + Send + 'static) -> Body
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: std::error::Error + Send + Sync + 'static,
{
    let (sender, receiver) = mpsc::channel::<Result<Bytes, io::Error>>(PUMP_CHUNKS);
    let pump = tokio::spawn(async move {
        let mut stream = std::pin::pin!(stream);
        while let Some(item) = stream.next().await {
            let item = item.map_err(|e| {
                tracing::error!(error = with_causes(&e), "a diff failed half way; its connection is cut");
                io::Error::other(with_causes(&e))
            });
            let failed = item.is_err();
            if let Ok(bytes) = &item {
                count(bytes.len() as u64);
            }
            match unless_idle(idle, sender.send(item)).await {
                Ok(Ok(())) if !failed => {}
                Ok(_) => return,
                Err(_) => {
                    tracing::warn!(
                        seconds = idle.as_secs(),
                        "a client stopped reading a diff; it is dropped"
                    );
                    // The receiver sees the missing end as an error, below.
                    return;
                }
            }
        }
        // An explicit end: without it the body below fails, so that a pump that died is never a clean end.
        let _ = sender.send(Ok(Bytes::new())).await;
    });
    let state = Some((receiver, AbortOnDropHandle::new(pump)));
    Body::from_stream(futures_util::stream::unfold(state, |state| async move {
        let (mut receiver, pump) = state?;
        match receiver.recv().await {
            Some(Ok(bytes)) if bytes.is_empty() => None,
            Some(Ok(bytes)) => Some((Ok(bytes), Some((receiver, pump)))),
            Some(Err(e)) => Some((Err(e), None)),
            None => Some((Err(io::Error::other("the diff has no end")), None)),
        }
    }))
}
