//! Reader and writer of a link, and its table of channels.

use super::{inbox::Inbox, queue::Queue};
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use std::{collections::HashMap, io, sync::Arc};
use svm_protocol::{
    FrameType,
    link::{self, HEADER_LEN, Header, Kind, MAX_INLINE, Parsed, invalid, number},
    meter::Meter,
    slots::Slots,
    worker::MAX_CONTROL,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};

/// Bytes read from the stream at once.
const READ_AHEAD: usize = 128 << 10;

/// What all channels of a link share.
pub(super) struct Link {
    table: Mutex<Table>,
    queue: Arc<Queue>,
    slots: Option<Slots>,
    /// Counts what the inboxes hold.
    inboxes: Arc<Meter>,
    tasks: Mutex<Vec<tokio::task::AbortHandle>>,
}

#[derive(Default)]
struct Table {
    channels: HashMap<u32, Arc<Inbox>>,
    broken: Option<String>,
}

impl Link {
    /// Starts both tasks. Channel 0 is there before the first frame is read: an early frame would otherwise count as
    /// one of a forgotten channel, and an invalid one, or the agent's Close, would be lost.
    pub(super) fn start(
        input: impl AsyncRead + Send + Unpin + 'static,
        mut output: impl AsyncWrite + Send + Unpin + 'static,
        slots: Option<Slots>,
        control: Arc<Inbox>,
        inboxes: Arc<Meter>,
    ) -> Arc<Self> {
        let queue = Arc::new(Queue::default());
        let table = Mutex::new(Table { channels: HashMap::from([(0, control)]), broken: None });
        let link = Arc::new(Self { table, queue: queue.clone(), slots, inboxes, tasks: Mutex::default() });
        let weak = Arc::downgrade(&link);
        let writer = tokio::spawn(async move {
            while let Some((bytes, more)) = queue.next().await {
                let mut sent = output.write_all(&bytes).await;
                queue.sent(bytes.len());
                if sent.is_ok() && !more {
                    sent = output.flush().await;
                }
                if let Err(e) = sent {
                    if let Some(link) = weak.upgrade() {
                        link.end(&format!("link: {e}"));
                    }
                    return;
                }
            }
        });
        let weak = Arc::downgrade(&link);
        let reader = tokio::spawn(async move {
            let mut input = BufReader::with_capacity(READ_AHEAD, input);
            let reason = loop {
                let frame = read(&mut input).await;
                let Some(link) = weak.upgrade() else { return };
                if let Err(e) = frame.and_then(|(header, payload)| link.take(header, payload)) {
                    break format!("link: {e}");
                }
            };
            if let Some(link) = weak.upgrade() {
                link.end(&reason);
            }
        });
        *link.tasks.lock() = vec![reader.abort_handle(), writer.abort_handle()];
        link
    }

    /// Adds a channel.
    pub(super) fn add(&self, id: u32, inbox: Arc<Inbox>) -> io::Result<()> {
        let mut table = self.table.lock();
        if let Some(reason) = &table.broken {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, reason.clone()));
        }
        table.channels.insert(id, inbox);
        Ok(())
    }

    /// Forgets a channel.
    pub(super) fn remove(&self, id: u32) {
        self.table.lock().channels.remove(&id);
    }

    /// Queues bytes of whole frames. If even this queue is full, the agent has stopped reading: the link ends.
    pub(super) fn send(&self, bytes: Bytes) {
        if self.queue.push(bytes).is_err() {
            self.end("link: the agent does not read what it is sent");
        }
    }

    /// The queue that [`Link::send`] fills.
    pub(super) fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Counts what the inboxes hold.
    pub(super) fn inboxes(&self) -> &Arc<Meter> {
        &self.inboxes
    }

    pub(super) fn slots(&self) -> Option<&Slots> {
        self.slots.as_ref()
    }

    /// Breaks every channel. The first reason counts.
    pub(super) fn end(&self, reason: &str) {
        let mut table = self.table.lock();
        if table.broken.is_none() {
            table.broken = Some(reason.to_owned());
            tracing::debug!(reason, "link to an agent ended");
        }
        for inbox in table.channels.values() {
            inbox.fail(reason);
        }
        drop(table);
        self.stop();
    }

    fn stop(&self) {
        self.queue.close();
        self.tasks.lock().drain(..).for_each(|task| task.abort());
    }

    fn take(&self, header: Header, payload: BytesMut) -> io::Result<()> {
        let Header { channel, kind, .. } = header;
        if kind == Kind::Free {
            let slots = self.slots.as_ref().ok_or_else(|| invalid("a slot without a transfer disk"))?;
            return slots.free(number(&payload, 0)?);
        }
        // A slot is emptied at once: the agent has few, and the channel's credit covers the bytes.
        let payload = if kind == Kind::Stored {
            let slots = self.slots.as_ref().ok_or_else(|| invalid("a slot without a transfer disk"))?;
            let (slot, len) = link::stored(&payload)?;
            let taken = slots.load(slot, len)?;
            self.send(link::numbers(0, Kind::Free, &[slot]).into());
            let bytes = BytesMut::from(taken.bytes());
            slots.put_back(taken);
            bytes
        } else {
            payload
        };
        let Some(inbox) = self.table.lock().channels.get(&channel).cloned() else {
            // Sent before the agent knew that the channel is closed.
            return Ok(());
        };
        match kind {
            Kind::Data | Kind::Stored => inbox.put(payload),
            Kind::Credit => inbox.credit(link::credit(&payload)?),
            Kind::Close => {
                inbox.close();
                Ok(())
            }
            Kind::Free => Ok(()),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Bytes of a channel in inline frames.
pub(super) fn data_frame(channel: u32, bytes: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(bytes.len() + HEADER_LEN);
    for chunk in bytes.chunks(MAX_INLINE) {
        out.extend_from_slice(&link::header(channel, Kind::Data, chunk.len()));
        out.extend_from_slice(chunk);
    }
    out.freeze()
}

async fn read(input: &mut (impl AsyncRead + Unpin)) -> io::Result<(Header, BytesMut)> {
    let mut head = [0; HEADER_LEN];
    input.read_exact(&mut head).await?;
    let Parsed::Frame(header) = link::parse(head)? else {
        return Err(invalid("the agent restarted the link"));
    };
    let mut payload = BytesMut::zeroed(header.len);
    input.read_exact(&mut payload).await?;
    Ok((header, payload))
}

/// The first message on channel 0, right behind a SYNC.
pub(super) async fn first_message(input: &mut (impl AsyncRead + Unpin)) -> io::Result<(FrameType, Bytes)> {
    let mut all = BytesMut::new();
    loop {
        if let Some((head, _)) = all.split_first_chunk::<{ svm_protocol::HEADER_LEN }>() {
            let (kind, len) = svm_protocol::parse_header(*head).map_err(|_| invalid("no message"))?;
            if len > MAX_CONTROL {
                return Err(invalid("message too long"));
            }
            if all.len() == svm_protocol::HEADER_LEN + len {
                return Ok((kind, all.split_off(svm_protocol::HEADER_LEN).freeze()));
            }
            if all.len() > svm_protocol::HEADER_LEN + len {
                return Err(invalid("more than a greeting"));
            }
        }
        let (header, payload) = read(input).await?;
        if (header.channel, header.kind) != (0, Kind::Data) {
            return Err(invalid("no greeting"));
        }
        all.extend_from_slice(&payload);
    }
}
