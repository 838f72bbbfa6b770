//! One channel of a link, as a stream of bytes.

use super::link::{Link, data_frame};
use bytes::{Buf, Bytes, BytesMut};
use parking_lot::Mutex;
use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};
use svm_protocol::{
    FrameType,
    link::{self, CREDIT_STEP, Kind, MAX_INLINE, MIN_STORED, WINDOW, invalid},
    meter::{JOINED_BELOW, Meter, cost},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What came in on a channel and what may go out.
pub(super) struct Inbox {
    state: Mutex<State>,
    meter: Arc<Meter>,
}

#[derive(Default)]
struct State {
    pieces: VecDeque<Piece>,
    /// Bytes that the agent may still send.
    credit: usize,
    /// Bytes taken since credit was last given.
    taken: usize,
    /// Bytes that we may still send.
    window: usize,
    /// The agent has let go.
    closed: bool,
    broken: Option<String>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// Bytes that wait to be read. What they were counted as is kept, since a buffer's capacity shrinks as it is read.
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

    /// Appends a piece. Small ones share a buffer: a frame of one byte must not hold the memory of hundreds.
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

    pub(super) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.wake();
    }

    pub(super) fn fail(&self, reason: &str) {
        let mut state = self.state.lock();
        state.broken.get_or_insert_with(|| reason.to_owned());
        state.wake();
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let held = self.state.get_mut().pieces.iter().map(|p| p.counted).sum();
        self.meter.take_away(held);
    }
}

/// A channel. Dropping it cancels its operation.
pub struct RemoteChannel {
    link: Arc<Link>,
    id: u32,
    inbox: Arc<Inbox>,
    /// Control only: bytes of a message that is not whole yet.
    partial: BytesMut,
}

impl std::fmt::Debug for RemoteChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemoteChannel").field("id", &self.id).finish_non_exhaustive()
    }
}

impl RemoteChannel {
    pub(super) fn open(link: &Arc<Link>, id: u32) -> io::Result<Self> {
        let inbox = Inbox::new(link.inboxes().clone());
        link.add(id, inbox.clone())?;
        Ok(Self { link: link.clone(), id, inbox, partial: BytesMut::new() })
    }

    /// Channel 0, of a link that was started with this inbox.
    pub(super) fn control(link: &Arc<Link>, inbox: Arc<Inbox>) -> Self {
        Self { link: link.clone(), id: 0, inbox, partial: BytesMut::new() }
    }

    /// Sends a whole message without waiting: control messages are few and small.
    pub(super) fn queue(&self, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.inbox.state.lock();
        if let Some(e) = state.failure() {
            return Err(e);
        }
        state.window = state
            .window
            .checked_sub(bytes.len())
            .ok_or_else(|| io::Error::from(io::ErrorKind::WouldBlock))?;
        drop(state);
        self.link.send(data_frame(self.id, bytes));
        Ok(())
    }

    /// The next message. Cancel-safe: a part that was read is kept.
    pub(super) async fn message(
        &mut self,
        head: &mut [u8; svm_protocol::HEADER_LEN],
        most: usize,
    ) -> io::Result<(FrameType, Bytes)> {
        use tokio::io::AsyncReadExt;
        loop {
            if let Some((first, _)) = self.partial.split_first_chunk::<{ svm_protocol::HEADER_LEN }>() {
                *head = *first;
                let (kind, len) = svm_protocol::parse_header(*head).map_err(io::Error::other)?;
                if len > most {
                    return Err(invalid("control message too long"));
                }
                if self.partial.len() >= svm_protocol::HEADER_LEN + len {
                    self.partial.advance(svm_protocol::HEADER_LEN);
                    return Ok((kind, self.partial.split_to(len).freeze()));
                }
            }
            let mut more = [0; 4096];
            let n = self.read(&mut more).await?;
            if n == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "control channel closed"));
            }
            self.partial.extend_from_slice(&more[..n]);
        }
    }
}

impl Drop for RemoteChannel {
    fn drop(&mut self) {
        self.link.remove(self.id);
        self.link.queue().forget(self.id);
        if self.id != 0 {
            self.link.send(Bytes::copy_from_slice(&link::header(self.id, Kind::Close, 0)));
        }
    }
}

impl AsyncRead for RemoteChannel {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.inbox.state.lock();
        let Some(mut piece) = state.pieces.pop_front() else {
            if let Some(e) = state.failure() {
                return Poll::Ready(Err(e));
            }
            if state.closed {
                return Poll::Ready(Ok(()));
            }
            state.reader = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let n = piece.bytes.len().min(buf.remaining());
        buf.put_slice(&piece.bytes[..n]);
        piece.bytes.advance(n);
        if piece.bytes.is_empty() {
            self.inbox.meter.take_away(piece.counted);
        } else {
            state.pieces.push_front(piece);
        }
        state.taken += n;
        if state.taken >= CREDIT_STEP {
            let taken = std::mem::take(&mut state.taken);
            state.credit += taken;
            drop(state);
            self.link.send(link::numbers(self.id, Kind::Credit, &[taken as u32]).into());
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for RemoteChannel {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.inbox.state.lock();
        if let Some(e) = state.failure() {
            return Poll::Ready(Err(e));
        }
        if state.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if state.window == 0 {
            state.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        // Credit may be forged by an agent that reads nothing: what it opens is no memory of ours.
        if self.link.queue().room(self.id, cx).is_pending() {
            // An agent that lets go of the channel ends the wait too.
            state.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let most = buf.len().min(state.window);
        let slots = self.link.slots().filter(|_| most >= MIN_STORED);
        let most = most.min(slots.map_or(MAX_INLINE, svm_protocol::slots::Slots::slot_bytes));
        state.window -= most;
        drop(state);
        let stored = slots.map(|slots| slots.store(&[&buf[..most]])).transpose()?.flatten();
        self.link.send(match stored {
            Some((slot, n)) => link::numbers(self.id, Kind::Stored, &[slot, n as u32]).into(),
            None => data_frame(self.id, &buf[..most]),
        });
        Poll::Ready(Ok(most))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
