//! What has arrived on a channel of a link and was not read yet, and the credit of both directions.
//!
//! ```text
//!   session (reader) ── put: costs credit ─► Inbox ─► pop ── channel (operation thread)
//! ```
//!
//! An inbox holds at most what its credit paid for; small pieces share a buffer, so that its memory is at most about twice
//! that (`meter` counts it). Called by `session`.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};
use svm_protocol::{
    link::{WINDOW, invalid},
    meter::{JOINED_BELOW, Meter, cost},
    slots::Taken,
};

/// Locks a mutex; its data are sound also after a panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Received pieces of a channel, and the credit of both directions.
pub(super) struct Inbox {
    pub(super) state: Mutex<InboxState>,
    pub(super) changed: Condvar,
    meter: Arc<Meter>,
}

#[derive(Default)]
pub(super) struct InboxState {
    pieces: VecDeque<Arrived>,
    /// Bytes that the peer may still send.
    pub(super) credit: usize,
    /// Bytes consumed since credit was last returned.
    pub(super) taken: usize,
    /// Bytes that this side may still send.
    pub(super) window: usize,
    /// The peer has closed the channel, or the session is over.
    pub(super) closed: bool,
    /// The operation has ended: nothing will be read any more.
    pub(super) left: bool,
}

/// Bytes of a channel that have arrived.
pub(super) enum Arrived {
    Bytes(Vec<u8>, usize),
    /// Copied out of its slot; the offset of the next byte to read.
    Taken(Taken, usize),
    Stored {
        slot: u32,
        len: usize,
    },
}

impl Arrived {
    /// Its cost in the meter.
    fn cost(&self) -> usize {
        match self {
            Self::Bytes(bytes, _) => cost(bytes.capacity()),
            Self::Taken(..) | Self::Stored { .. } => cost(0),
        }
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.meter.take_away(state.pieces.iter().map(Arrived::cost).sum());
    }
}

impl Inbox {
    pub(super) fn new(meter: &Arc<Meter>) -> Arc<Self> {
        let state = InboxState { credit: WINDOW, window: WINDOW, ..InboxState::default() };
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new(), meter: meter.clone() })
    }

    /// Appends a piece; false if the operation has ended.
    pub(super) fn put(&self, piece: Arrived, len: usize) -> io::Result<bool> {
        let mut state = lock(&self.state);
        state.credit =
            state.credit.checked_sub(len).ok_or_else(|| invalid("more bytes than the credit allows"))?;
        if state.left {
            return Ok(false);
        }
        self.join(&mut state.pieces, piece);
        self.changed.notify_all();
        Ok(true)
    }

    /// Appends a piece. Small ones share a buffer: a frame of one byte must not occupy the memory of hundreds.
    fn join(&self, pieces: &mut VecDeque<Arrived>, piece: Arrived) {
        let piece = match piece {
            Arrived::Bytes(bytes, 0) if bytes.len() < JOINED_BELOW => {
                if let Some(Arrived::Bytes(last, _)) = pieces.back_mut()
                    && last.capacity() - last.len() >= bytes.len()
                {
                    last.extend_from_slice(&bytes);
                    return;
                }
                let mut shared = Vec::with_capacity(JOINED_BELOW);
                shared.extend_from_slice(&bytes);
                Arrived::Bytes(shared, 0)
            }
            other => other,
        };
        self.meter.add(piece.cost());
        pieces.push_back(piece);
    }

    /// Removes the first piece.
    pub(super) fn pop(&self, state: &mut InboxState) -> Option<Arrived> {
        let piece = state.pieces.pop_front()?;
        self.meter.take_away(piece.cost());
        Some(piece)
    }

    /// Puts what is left of a piece back.
    pub(super) fn put_first(&self, state: &mut InboxState, piece: Arrived) {
        self.meter.add(piece.cost());
        state.pieces.push_front(piece);
    }

    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }

    pub(super) fn wait<'a>(&self, state: MutexGuard<'a, InboxState>) -> MutexGuard<'a, InboxState> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}
