//! The daemon's end of a link to an agent in a virtual machine, whatever carries its bytes.
//!
//! ```text
//!   stream (virtio-serial, hvsock, pipe) ─► reader task ─► inboxes ─► RemoteChannel (AsyncRead, AsyncWrite)
//!                                        ◄─ writer task ◄─ queue   ◄─┘      one for each operation
//!   RemoteAgent: hello, attach, detach, open, wake, ping  (control = channel 0)
//! ```
//!
//! A backend brings a pair of byte streams ([`RemoteAgent::connect`]) and, if it can, a transfer disk; the rest is the
//! same for all. Frames and invariants are those of `svm_agent::link`. What the agent sends is untrusted: a frame that
//! breaks the protocol ends the link, and with it every channel. Dropping a channel cancels its operation; dropping the
//! agent ends the link. Called by the backends `qemu` and `hcs`.

mod channel;
mod inbox;
mod link;
mod queue;

pub use channel::RemoteChannel;

use super::DiskId;
use inbox::Inbox;
use link::Link;
use std::{
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};
use svm_protocol::{
    Control, ControlReply, ControlRequest, DiskFormat, FrameType, HEADER_LEN, Hello, PROTOCOL_VERSION, Wake,
    Witness,
    link::{Hunt, SYNC},
    meter::Meter,
    slots::{Side, Slots, TransferDisk},
    worker::MAX_CONTROL,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::Mutex,
};

/// Most bytes before the greeting that are skipped: what an earlier session left in the stream.
const MAX_STALE: usize = 4 << 20;
/// Fresh random bytes for a woken machine.
const ENTROPY_BYTES: usize = 64;

/// An agent in a virtual machine.
pub struct RemoteAgent {
    link: Arc<Link>,
    control: Mutex<ControlState>,
    next_channel: AtomicU32,
    hello: Hello,
}

impl std::fmt::Debug for RemoteAgent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemoteAgent").field("hello", &self.hello).finish_non_exhaustive()
    }
}

struct ControlState {
    channel: RemoteChannel,
    seq: u64,
}

/// What an Attach says.
#[derive(Debug, Clone)]
pub struct RemoteDisk {
    /// Its number from now on.
    pub disk: DiskId,
    /// Writes are allowed.
    pub writable: bool,
    /// First byte of the window on the device.
    pub offset: u64,
    /// Bytes of the window; `None` = the device's, and what is written counts as its length.
    pub len: Option<u64>,
    /// How the guest finds the device.
    pub serial: String,
    /// How the disk's bytes lie on the device.
    pub format: DiskFormat,
}

impl RemoteAgent {
    /// Greets the agent at the other end of `input` and `output`. With `transfer`, the file behind a disk that the
    /// guest sees under that serial number, bulk bytes go through it.
    ///
    /// # Errors
    /// Errors of the stream; a wrong greeting or protocol version.
    pub async fn connect(
        mut input: impl AsyncRead + Send + Unpin + 'static,
        mut output: impl AsyncWrite + Send + Unpin + 'static,
        transfer: Option<(File, TransferDisk)>,
    ) -> io::Result<Self> {
        let id = uuid::Uuid::new_v4();
        let nonce = id.as_u64_pair().0 | 1;
        let wake = Wake {
            version: PROTOCOL_VERSION,
            nonce,
            entropy: entropy(),
            unix_nanos: unix_nanos(),
            transfer: transfer.as_ref().map(|(_, disk)| disk.clone()),
        };
        let slots = transfer.map(|(file, disk)| Slots::new(file, &disk, Side::Daemon)).transpose()?;
        let mut first = SYNC.to_vec();
        first.extend_from_slice(&link::data_frame(0, &control_frame(FrameType::Wake, &wake)?));
        output.write_all(&first).await?;
        output.flush().await?;
        // The rest of a saved session in the stream may contain another greeting, with another nonce.
        let (mut stale, mut hunt, mut byte) = (0, Hunt::default(), [0]);
        let hello: Hello = loop {
            while input.read_exact(&mut byte).await.map(|_| !hunt.take(byte[0]))? {
                stale += 1;
                if stale > MAX_STALE {
                    return Err(io::Error::other("no greeting within the first bytes"));
                }
            }
            if stale > MAX_STALE {
                return Err(io::Error::other("only greetings of other sessions"));
            }
            // Counted too, though not to the byte: otherwise greetings of other sessions could hold this end up
            // forever.
            stale += SYNC.len();
            let hello: Hello = match link::first_message(&mut input).await {
                Ok((FrameType::Hello, payload)) => {
                    stale += payload.len();
                    serde_json::from_slice(&payload)?
                }
                Ok((_, payload)) => {
                    stale += payload.len();
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::InvalidData => continue,
                Err(e) => return Err(e),
            };
            if hello.nonce == nonce {
                break hello;
            }
        };
        if hello.version != PROTOCOL_VERSION {
            let reason =
                format!("protocol version mismatch: expected {PROTOCOL_VERSION}, found {}", hello.version);
            return Err(io::Error::other(reason));
        }
        let inboxes = Arc::new(Meter::default());
        let inbox = Inbox::new(inboxes.clone());
        let slots = slots.filter(|_| hello.transfer);
        let link = Link::start(input, output, slots, inbox.clone(), inboxes);
        let control = RemoteChannel::control(&link, inbox);
        Ok(Self {
            link,
            control: Mutex::new(ControlState { channel: control, seq: 0 }),
            next_channel: AtomicU32::new(1),
            hello,
        })
    }

    /// Most bytes that this end held at a time for its agent: queued to be sent, and received and not yet read.
    /// Counted, not measured; see [`Meter`].
    pub fn most_held(&self) -> (usize, usize) {
        (self.link.queue().meter().most(), self.link.inboxes().most())
    }

    /// The agent's greeting.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Announces a disk that was attached to the machine.
    ///
    /// # Errors
    /// The agent does not find it; the link broke.
    pub async fn attach(&self, disk: &RemoteDisk) -> io::Result<()> {
        let RemoteDisk { disk, writable, offset, len, serial, format } = disk.clone();
        self.call(Control::Attach { disk, writable, offset, len, serial: Some(serial), format })
            .await
            .map(drop)
    }

    /// Makes the agent release a disk: after the reply it may be detached from the machine.
    ///
    /// # Errors
    /// As [`RemoteAgent::attach`].
    pub async fn detach(&self, disk: DiskId) -> io::Result<()> {
        self.call(Control::Detach { disk }).await.map(drop)
    }

    /// Checks that the agent answers.
    ///
    /// # Errors
    /// The link broke.
    pub async fn ping(&self) -> io::Result<()> {
        self.call(Control::Ping).await.map(drop)
    }

    /// Gives a machine that continues after a pause the time and fresh random numbers. Returns what it shows of both.
    ///
    /// # Errors
    /// The agent failed to set them; the link broke.
    pub async fn wake(&self) -> io::Result<Option<Witness>> {
        let mut state = self.control.lock().await;
        // The time is taken under the lock: waiting for it must not make the clock late.
        state.call(Control::Wake { entropy: entropy(), unix_nanos: unix_nanos() }).await.map(|r| r.witness)
    }

    /// A channel for one operation.
    ///
    /// # Errors
    /// The agent has too many; the link broke.
    pub async fn open_channel(&self) -> io::Result<RemoteChannel> {
        let mut state = self.control.lock().await;
        // Under the lock, because the agent accepts only rising numbers.
        let id = self.next_channel.fetch_add(1, Ordering::Relaxed);
        let channel = RemoteChannel::open(&self.link, id)?;
        state.call(Control::Open { channel: id }).await?;
        Ok(channel)
    }

    async fn call(&self, control: Control) -> io::Result<ControlReply> {
        self.control.lock().await.call(control).await
    }
}

impl Drop for RemoteAgent {
    fn drop(&mut self) {
        self.link.end("the link was dropped");
    }
}

impl ControlState {
    async fn call(&mut self, control: Control) -> io::Result<ControlReply> {
        self.seq += 1;
        let seq = self.seq;
        let frame = control_frame(FrameType::Control, &ControlRequest { seq, control })?;
        // One write, so that a caller that is cancelled half way leaves no partial message.
        self.channel.queue(&frame)?;
        loop {
            let mut head = [0; HEADER_LEN];
            // A cancelled caller may have read a part of a message; the channel keeps the parts together.
            let (kind, payload) = self.channel.message(&mut head, MAX_CONTROL).await?;
            if kind != FrameType::Reply {
                return Err(io::Error::other(format!("unexpected {kind:?} frame on the control channel")));
            }
            let mut reply: ControlReply = serde_json::from_slice(&payload)?;
            match reply.error.take() {
                _ if reply.seq < seq => {}
                _ if reply.seq > seq => return Err(io::Error::other("reply to a request never made")),
                Some(e) => return Err(io::Error::other(e)),
                None => return Ok(reply),
            }
        }
    }
}

/// Version-4 UUIDs come from the system's random numbers: 122 bits of each 128.
fn entropy() -> Vec<u8> {
    (0..ENTROPY_BYTES / 16).flat_map(|_| *uuid::Uuid::new_v4().as_bytes()).collect()
}

fn unix_nanos() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

fn control_frame<T: serde::Serialize>(kind: FrameType, message: &T) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    svm_protocol::write_json(&mut bytes, kind, message)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
