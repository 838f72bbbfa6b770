//! Which layers take a tar, with the texts of refusals; and a watch over the body of an ApplyDiff. Called by `apply`.

use super::{DriverError, cut::Passed, door::Closed, error::unfinished};
use crate::store::{Layer, LayerId, LayerMeta, LayerState};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use parking_lot::Mutex;
use std::{io, sync::Arc, task::Poll};

/// The refusal of an ApplyDiff whose layer has a closed door.
pub(super) fn shut(id: &LayerId, closed: &Closed) -> DriverError {
    match closed {
        Closed::Busy => DriverError::Usage(format!(
            "layer {id}: another ApplyDiff of it is in progress; if that fails, remove the layer and pull it again"
        )),
        Closed::Failed(reason) => unfinished_because(id, Some(reason)),
    }
}

/// The refusal of a marked layer; `reason` is why its first ApplyDiff failed, if known.
pub(super) fn unfinished_because(id: &LayerId, reason: Option<&str>) -> DriverError {
    let Some(reason) = reason else { return unfinished(id) };
    DriverError::Usage(format!(
        "layer {id} is incomplete (its ApplyDiff was interrupted); remove it and pull it again. The first reason was: \
         {reason}"
    ))
}

/// Refuses a layer whose state takes no tar until it is removed.
pub(super) fn takes_tar(layer: &Layer, meta: &LayerMeta) -> Result<(), DriverError> {
    let id = &layer.id;
    match meta.state {
        LayerState::Created if layer.made_here => Ok(()),
        LayerState::Created => Err(DriverError::Usage(format!(
            "layer {id} was created before the plugin was restarted, which may have cut a tar that was being sent to it; \
             remove it and pull it again (docker does so when the command is repeated){}",
            meta.refused
                .as_ref()
                .map(|reason| format!(". The first reason was: {reason}"))
                .unwrap_or_default()
        ))),
        _ => Err(wrong_state(id, meta)),
    }
}

/// The refusal of a layer in this state.
pub(super) fn wrong_state(id: &LayerId, meta: &LayerMeta) -> DriverError {
    match meta.state {
        LayerState::Applying => unfinished_because(id, meta.refused.as_deref()),
        LayerState::Applied => DriverError::Usage(format!(
            "layer {id} is already applied and never changes; remove it and create it again"
        )),
        _ => DriverError::Usage(format!(
            "layer {id} was written through a mount; a tar cannot be applied to it"
        )),
    }
}

/// Refuses a parent that is given and is not the layer's.
pub(super) fn stands_on(layer: &Layer, parent: &str) -> Result<(), DriverError> {
    if parent.is_empty() {
        return Ok(());
    }
    let parent: LayerId = parent.parse()?;
    if layer.parent() == Some(&parent) {
        return Ok(());
    }
    Err(DriverError::Usage(format!(
        "layer {} was created on {}, not on {parent}",
        layer.id,
        layer.parent().map_or("nothing", LayerId::as_str)
    )))
}

/// What was seen of a body so far.
#[derive(Debug, Default)]
pub(super) struct Watch(Mutex<Seen>);

#[derive(Debug, Default, Clone, Copy)]
struct Seen {
    passed: Passed,
    /// It ended properly.
    ended: bool,
    /// It broke off.
    broken: bool,
}

impl Watch {
    pub(super) fn ended_empty(&self) -> bool {
        let seen = *self.0.lock();
        seen.ended && seen.passed.bytes == 0
    }

    pub(super) fn broken(&self) -> bool {
        self.0.lock().broken
    }

    pub(super) fn passed(&self) -> Passed {
        self.0.lock().passed
    }
}

/// Records how much of a body was read and whether it ended properly.
pub(super) fn watched<S>(body: S, watch: Arc<Watch>) -> impl Stream<Item = io::Result<Bytes>> + Send
where
    S: Stream<Item = io::Result<Bytes>> + Send,
{
    let mut body = Box::pin(body);
    futures_util::stream::poll_fn(move |context| {
        let item = body.poll_next_unpin(context);
        let mut seen = watch.0.lock();
        match &item {
            Poll::Ready(Some(Ok(bytes))) => seen.passed.add(bytes),
            Poll::Ready(Some(Err(_))) => seen.broken = true,
            Poll::Ready(None) if !seen.broken => seen.ended = true,
            _ => {}
        }
        item
    })
}
