//! One channel of a link, as a stream of bytes.

use super::{
    inbox::Inbox,
    link::{Link, data_frame},
};
use bytes::{Buf, Bytes, BytesMut};
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use svm_protocol::{
    FrameType,
    link::{self, Kind, MAX_INLINE, MIN_STORED, invalid},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A channel. Dropping it cancels its operation.
pub struct RemoteChannel {
    link: Arc<Link>,
    id: u32,
    inbox: Arc<Inbox>,
    /// Control channel only: the beginning of an incomplete message.
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
        self.inbox.reserve_now(bytes.len())?;
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
        if let Some(credit) = ready!(self.inbox.read(cx, buf))? {
            self.link.send(link::numbers(self.id, Kind::Credit, &[credit]).into());
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for RemoteChannel {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let slots = self.link.slots();
        let most = |window: usize| {
            let most = buf.len().min(window);
            most.min(match slots {
                Some(slots) if most >= MIN_STORED => slots.slot_bytes(),
                _ => MAX_INLINE,
            })
        };
        // An agent may forge credit and read nothing: the queue bounds what that costs.
        let has_room = || self.link.queue().room(self.id, cx).is_ready();
        let n = ready!(self.inbox.reserve(cx, has_room, most))?;
        let slots = slots.filter(|_| n >= MIN_STORED);
        let stored = slots.map(|slots| slots.store(&[&buf[..n]])).transpose()?.flatten();
        self.link.send(match stored {
            Some((slot, len)) => link::numbers(self.id, Kind::Stored, &[slot, len as u32]).into(),
            None => data_frame(self.id, &buf[..n]),
        });
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
