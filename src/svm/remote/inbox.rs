//! What a channel has received and not yet passed on, and what it may still send.
//!
//! ```text
//!   Link (reader task) ── put, credit, close, fail ──► Inbox ◄── read, reserve ── RemoteChannel
//! ```
//!
//! Invariants: the agent can send only what it was given credit for, which bounds `pieces`; small frames share a
//! buffer, so the memory behind them is bounded too ([`Meter`] counts it). Errors come after the bytes that arrived
//! before them.

use bytes::{Buf, BytesMut};
use parking_lot::Mutex;
use std::{
    collections::VecDeque,
    io,
    sync::Arc,
    task::{Context, Poll, Waker},
};
use svm_protocol::{
    link::{CREDIT_STEP, WINDOW, invalid},
    meter::{JOINED_BELOW, Meter, cost},
};
use tokio::io::ReadBuf;

/// The received bytes and both credits of one channel.
pub(super) struct Inbox {
    state: Mutex<State>,
    meter: Arc<Meter>,
}

#[derive(Default)]
struct State {
    pieces: VecDeque<Piece>,
    /// Bytes that the agent may still send.
    credit: usize,
    /// Bytes read since credit was last given.
    taken: usize,
    /// Bytes that this end may still send.
    window: usize,
    /// The agent closed the channel.
    closed: bool,
    broken: Option<String>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// Bytes that wait to be read. `counted` is kept because the capacity of a buffer shrinks as it is read.
struct Piece {
    bytes: BytesMut,
    counted: usize,
}

impl State {
    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }

    fn failure(&self) -> Option<io::Error> {
        self.broken.as_ref().map(|reason| io::Error::new(io::ErrorKind::BrokenPipe, reason.clone()))
    }
}

impl Inbox {
    pub(super) fn new(meter: Arc<Meter>) -> Arc<Self> {
        let state = State { credit: WINDOW, window: WINDOW, ..State::default() };
        Arc::new(Self { state: Mutex::new(state), meter })
    }

    /// Appends received bytes.
    ///
    /// # Errors
    /// The agent sent more than its credit.
    pub(super) fn put(&self, bytes: BytesMut) -> io::Result<()> {
        let mut state = self.state.lock();
        state.credit =
            state.credit.checked_sub(bytes.len()).ok_or_else(|| invalid("more bytes than were asked for"))?;
        self.join(&mut state.pieces, bytes);
        if let Some(waker) = state.reader.take() {
            waker.wake();
        }
        Ok(())
    }

    /// Appends a piece. Small ones share a buffer, so that a frame of one byte does not occupy hundreds.
    fn join(&self, pieces: &mut VecDeque<Piece>, bytes: BytesMut) {
        let mut bytes = bytes;
        if bytes.len() < JOINED_BELOW {
            if let Some(last) = pieces.back_mut()
                && last.bytes.capacity() - last.bytes.len() >= bytes.len()
            {
                last.bytes.extend_from_slice(&bytes);
                return;
            }
            let mut shared = BytesMut::with_capacity(JOINED_BELOW);
            shared.extend_from_slice(&bytes);
            bytes = shared;
        }
        let counted = cost(bytes.capacity());
        self.meter.add(counted);
        pieces.push_back(Piece { bytes, counted });
    }

    /// Adds credit that the agent gave.
    ///
    /// # Errors
    /// It gave more than was used.
    pub(super) fn credit(&self, bytes: usize) -> io::Result<()> {
        let mut state = self.state.lock();
        state.window += bytes;
        if state.window > WINDOW {
            return Err(invalid("more credit than was used"));
        }
        if let Some(waker) = state.writer.take() {
            waker.wake();
        }
        Ok(())
    }

    /// The agent closed the channel: what has arrived can still be read.
    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.wake();
    }

    /// Breaks the channel; the first reason counts.
    pub(super) fn fail(&self, reason: &str) {
        let mut state = self.state.lock();
        state.broken.get_or_insert_with(|| reason.to_owned());
        state.wake();
    }

    /// Moves received bytes into `buf`; nothing at the end of the channel. Returns the credit that is to be given for
    /// what was read, if it is time to.
    pub(super) fn read(&self, cx: &Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<Option<u32>>> {
        let mut state = self.state.lock();
        let Some(mut piece) = state.pieces.pop_front() else {
            if let Some(e) = state.failure() {
                return Poll::Ready(Err(e));
            }
            if state.closed {
                return Poll::Ready(Ok(None));
            }
            state.reader = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let n = piece.bytes.len().min(buf.remaining());
        buf.put_slice(&piece.bytes[..n]);
        piece.bytes.advance(n);
        if piece.bytes.is_empty() {
            self.meter.take_away(piece.counted);
        } else {
            state.pieces.push_front(piece);
        }
        state.taken += n;
        if state.taken < CREDIT_STEP {
            return Poll::Ready(Ok(None));
        }
        let taken = std::mem::take(&mut state.taken);
        state.credit += taken;
        Poll::Ready(Ok(Some(taken as u32)))
    }

    /// Uses credit for a whole message, without waiting.
    ///
    /// # Errors
    /// The channel is broken, or its credit does not suffice (`WouldBlock`).
    pub(super) fn reserve_now(&self, bytes: usize) -> io::Result<()> {
        let mut state = self.state.lock();
        if let Some(e) = state.failure() {
            return Err(e);
        }
        state.window =
            state.window.checked_sub(bytes).ok_or_else(|| io::Error::from(io::ErrorKind::WouldBlock))?;
        Ok(())
    }

    /// Waits for credit and for `has_room`, then uses what `most` says of the credit that is left.
    pub(super) fn reserve(
        &self,
        cx: &Context<'_>,
        has_room: impl FnOnce() -> bool,
        most: impl FnOnce(usize) -> usize,
    ) -> Poll<io::Result<usize>> {
        let mut state = self.state.lock();
        if let Some(e) = state.failure() {
            return Poll::Ready(Err(e));
        }
        if state.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        // Without room the waker is kept here as well: an agent that closes the channel ends the wait too.
        if state.window == 0 || !has_room() {
            state.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let most = most(state.window);
        state.window -= most;
        Poll::Ready(Ok(most))
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let held = self.state.get_mut().pieces.iter().map(|p| p.counted).sum();
        self.meter.take_away(held);
    }
}
