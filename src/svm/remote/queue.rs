//! Frames that wait to be sent.
//!
//! ```text
//!   bodies ── wait for room ──┐                        ┌─► writer task ─► stream
//!   Credit, Free, Close, ─────┴─► frames, at most FULL ┘
//!   control                      (more: the agent takes nothing, the link ends)
//! ```
//!
//! Invariant: at most [`FULL`] bytes wait, and one frame more, whatever the agent credits, answers or leaves unread. An
//! honest agent reads its stream whatever its channels do, so a body waits only for the stream, never for another
//! channel. Called by [`super::link`] and [`super::channel`].

use bytes::Bytes;
use parking_lot::Mutex;
use std::{
    collections::{HashMap, VecDeque},
    task::{Context, Poll, Waker},
};
use svm_protocol::{
    link::WINDOW,
    meter::{Meter, cost},
};
use tokio::sync::Notify;

/// Bytes of a body are queued while fewer than this wait.
const BODIES: usize = 2 * WINDOW;
/// Bytes that wait at most. What bodies leave free is enough for all that an honest agent can leave unread: a Free for
/// each slot, four Credits and a Close for each of its thousand operations.
pub(super) const FULL: usize = BODIES + WINDOW;

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    filled: Notify,
    meter: Meter,
}

#[derive(Debug, Default)]
struct State {
    frames: VecDeque<Bytes>,
    /// What the frames cost, that which is being sent included.
    held: usize,
    closed: bool,
    /// Wakers of channels that wait for space.
    waiting: HashMap<u32, Waker>,
}

/// The queue is full of frames that cannot wait.
pub(super) struct Full;

impl Queue {
    /// Ready when a body may queue a frame. A closed queue is always ready: its owner's channel knows why.
    pub(super) fn room(&self, channel: u32, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.state.lock();
        if state.closed || state.held < BODIES {
            return Poll::Ready(());
        }
        state.waiting.insert(channel, cx.waker().clone());
        Poll::Pending
    }

    /// Queues bytes of whole frames; forgets them if the queue is closed.
    pub(super) fn push(&self, bytes: Bytes) -> Result<(), Full> {
        let mut state = self.state.lock();
        if state.closed || bytes.is_empty() {
            return Ok(());
        }
        if state.held > FULL {
            return Err(Full);
        }
        let cost = cost(bytes.len());
        state.held += cost;
        self.meter.add(cost);
        state.frames.push_back(bytes);
        drop(state);
        self.filled.notify_one();
        Ok(())
    }

    /// The next frames to send, and whether more wait; `None` when the queue is closed.
    pub(super) async fn next(&self) -> Option<(Bytes, bool)> {
        loop {
            {
                let mut state = self.state.lock();
                if state.closed {
                    return None;
                }
                if let Some(bytes) = state.frames.pop_front() {
                    return Some((bytes, !state.frames.is_empty()));
                }
            }
            self.filled.notified().await;
        }
    }

    /// Frames with this many bytes were sent.
    pub(super) fn sent(&self, bytes: usize) {
        let mut state = self.state.lock();
        if state.closed {
            return;
        }
        state.held -= cost(bytes);
        self.meter.take_away(cost(bytes));
        if state.held < BODIES {
            state.waiting.drain().for_each(|(_, waker)| waker.wake());
        }
    }

    /// Drops all frames and wakes the waiting channels.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.frames = VecDeque::new();
        self.meter.take_away(std::mem::take(&mut state.held));
        state.waiting.drain().for_each(|(_, waker)| waker.wake());
        drop(state);
        self.filled.notify_one();
    }

    /// Forgets a waiting channel.
    pub(super) fn forget(&self, channel: u32) {
        self.state.lock().waiting.remove(&channel);
    }

    /// Counts the bytes that wait.
    pub(super) fn meter(&self) -> &Meter {
        &self.meter
    }
}
