//! The agent's end of a link.
//!
//! ```text
//!   serve ── hunt SYNC ── session: reader (this thread) ─► inboxes ─► control thread ─► disks, Open
//!     ▲                                │                        └──► operation threads (one each)
//!     └──── garbage, new SYNC ─────────┘      all of them ─► Output (one lock, whole frames) ─► stream
//! ```
//!
//! The reader never waits for a channel: an inbox holds what its credit paid for. An operation whose session is over
//! finds its channel dead at its next byte, and its disks at their next access. Called by the agent's program.

use super::inbox::{Arrived, Inbox, lock};
use crate::{
    channel::AgentChannel,
    codec::Codec,
    serve::{self, ControlTransport},
};
use std::{
    collections::HashMap,
    fs::File,
    io::{self, IoSlice, Read, Write},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use svm_protocol::{
    Control, ControlReply, ControlRequest, ErrorKind, FrameType, Hello, JailReport, PROTOCOL_VERSION, Wake,
    WireError, Witness,
    link::{
        self, CREDIT_STEP, HEADER_LEN, Header, Kind, MAX_INLINE, MIN_STORED, Parsed, SYNC, WINDOW, invalid,
        number,
    },
    meter::Meter,
    slots::{Side, Slots},
};

/// The largest control message; bytes.
const MAX_CONTROL: usize = 64 << 10;

/// What the agent needs from the VM it runs in.
pub trait Platform: Send + Sync + 'static {
    /// Opens the disk with this serial number, as soon as it is there.
    ///
    /// # Errors
    /// No such disk within a reasonable time.
    fn open_disk(&self, serial: &str, writable: bool) -> Result<File, WireError>;

    /// Opens the transfer disk for reading and writing, past any cache.
    ///
    /// # Errors
    /// As [`Platform::open_disk`].
    fn open_transfer(&self, serial: &str) -> Result<File, WireError>;

    /// A disk is about to be detached; it is no longer in use.
    fn forget_disk(&self, serial: &str);

    /// The VM was started, restored from a saved state or resumed after a pause: other VMs may have the same random numbers,
    /// and its clock was stopped. Gives a note for each thing that could not be done.
    fn wake(&self, entropy: &[u8], unix_time: Duration) -> Vec<String>;

    /// Clock and random numbers after [`Platform::wake`], if they are the VM's own.
    fn witness(&self) -> Option<Witness> {
        None
    }
}

/// Serves sessions until `input` ends. Control messages are answered one by one, operations run on threads.
///
/// # Errors
/// Errors of the stream. A violation of the protocol is not an error: the next SYNC starts a new session.
pub fn serve(
    input: impl Read,
    output: impl Write + Send + 'static,
    platform: &Arc<dyn Platform>,
    codec: &Arc<dyn Codec>,
) -> io::Result<()> {
    serve_counted(input, output, platform, codec, &Arc::default())
}

/// [`serve()`], which counts in `meter` what is held for the daemon.
///
/// # Errors
/// As [`serve()`].
pub fn serve_counted(
    mut input: impl Read,
    output: impl Write + Send + 'static,
    platform: &Arc<dyn Platform>,
    codec: &Arc<dyn Codec>,
    meter: &Arc<Meter>,
) -> io::Result<()> {
    let output: Output = Arc::new(Mutex::new(Box::new(output)));
    loop {
        if !link::hunt(&mut input)? {
            return Ok(());
        }
        // A SYNC inside a session leads straight to the next one.
        loop {
            let session = Session::start(&output, platform, codec, meter)?;
            let ended = session.read(&mut input);
            session.end();
            match ended {
                Ok(Ended::Sync) => {}
                Ok(Ended::Stream) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                    eprintln!("agent: session ended: {e}");
                    break;
                }
                Err(e) => return Err(e),
            }
        }
    }
}

type Output = Arc<Mutex<Box<dyn Write + Send>>>;

enum Ended {
    /// The stream is over.
    Stream,
    /// The daemon starts a new session.
    Sync,
}

struct Session {
    output: Output,
    over: AtomicBool,
    slots: OnceLock<Slots>,
    channels: Mutex<HashMap<u32, Arc<Inbox>>>,
    control: Arc<Inbox>,
    meter: Arc<Meter>,
}

impl Session {
    fn start(
        output: &Output,
        platform: &Arc<dyn Platform>,
        codec: &Arc<dyn Codec>,
        meter: &Arc<Meter>,
    ) -> io::Result<Arc<Self>> {
        let session = Arc::new(Self {
            output: output.clone(),
            over: AtomicBool::new(false),
            slots: OnceLock::new(),
            channels: Mutex::default(),
            control: Inbox::new(meter),
            meter: meter.clone(),
        });
        let mut link = LinkControl {
            channel: Channel { session: session.clone(), id: 0, inbox: session.control.clone() },
            session: session.clone(),
            platform: platform.clone(),
            serials: HashMap::new(),
            last: 0,
        };
        let codec = codec.clone();
        std::thread::Builder::new().name("control".into()).spawn(move || {
            let served = link.greet().and_then(|()| serve::serve(&mut link, &codec));
            if let Err(e) = served
                && !link.session.over.load(Ordering::Relaxed)
            {
                eprintln!("agent: control channel: {e}");
            }
            // The daemon sees the close of channel 0; it can only continue with a new SYNC.
            let _ = link.session.send(&link::header(0, Kind::Close, 0), &[]);
        })?;
        Ok(session)
    }

    /// Sends one frame, whole.
    fn send(&self, head: &[u8], parts: &[&[u8]]) -> io::Result<()> {
        let mut output = lock(&self.output);
        // Checked under the lock, so that no frame of an old session follows the greeting of a new one.
        if self.over.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let mut slices: Vec<IoSlice<'_>> =
            std::iter::once(head).chain(parts.iter().copied()).map(IoSlice::new).collect();
        let mut left = slices.as_mut_slice();
        while !left.is_empty() {
            match output.write_vectored(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => IoSlice::advance_slices(&mut left, n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        output.flush()
    }

    fn slots(&self) -> io::Result<&Slots> {
        self.slots.get().ok_or_else(|| invalid("a slot without a transfer disk"))
    }

    /// Returns an emptied slot to the daemon.
    fn free(&self, slot: u32) -> io::Result<()> {
        // Before the message: the daemon may fill the slot again at once.
        self.slots()?.give_back_slot(slot);
        self.send(&link::numbers(0, Kind::Free, &[slot]), &[])
    }

    fn end(&self) {
        {
            let _no_frame_half_sent = lock(&self.output);
            self.over.store(true, Ordering::Relaxed);
        }
        self.control.close();
        for inbox in lock(&self.channels).values() {
            inbox.close();
        }
    }

    fn read(&self, input: &mut dyn Read) -> io::Result<Ended> {
        loop {
            let mut head = [0; HEADER_LEN];
            if !fill(input, &mut head)? {
                return Ok(Ended::Stream);
            }
            let Header { len, channel, kind } = match link::parse(head)? {
                Parsed::Frame(header) => header,
                Parsed::Sync => {
                    let mut rest = [0; SYNC.len() - HEADER_LEN];
                    if !fill(input, &mut rest)? {
                        return Ok(Ended::Stream);
                    }
                    if rest != SYNC[HEADER_LEN..] {
                        return Err(invalid("half a SYNC"));
                    }
                    return Ok(Ended::Sync);
                }
            };
            let mut payload = vec![0; len];
            if !fill(input, &mut payload)? {
                return Ok(Ended::Stream);
            }
            self.take(channel, kind, payload)?;
        }
    }

    fn take(&self, channel: u32, kind: Kind, payload: Vec<u8>) -> io::Result<()> {
        if kind == Kind::Free {
            return self.slots()?.free(number(&payload, 0)?);
        }
        let inbox = if channel == 0 {
            Some(self.control.clone())
        } else {
            lock(&self.channels).get(&channel).cloned()
        };
        let Some(inbox) = inbox else {
            // Sent before the daemon saw the end of the operation. A slot is returned nevertheless.
            if kind == Kind::Stored {
                let (slot, len) = link::stored(&payload)?;
                self.slots()?.claim(slot, len)?;
                self.free(slot)?;
            }
            return Ok(());
        };
        match kind {
            Kind::Data => {
                let len = payload.len();
                inbox.put(Arrived::Bytes(payload, 0), len).map(drop)
            }
            Kind::Stored => {
                let (slot, len) = link::stored(&payload)?;
                self.slots()?.claim(slot, len)?;
                // The operation may have ended since its channel was looked up: then its slot is returned here.
                if inbox.put(Arrived::Stored { slot, len }, len)? { Ok(()) } else { self.free(slot) }
            }
            Kind::Credit => {
                let mut state = lock(&inbox.state);
                state.window += link::credit(&payload)?;
                if state.window > WINDOW {
                    return Err(invalid("more credit than was used"));
                }
                inbox.changed.notify_all();
                Ok(())
            }
            Kind::Close => {
                inbox.close();
                Ok(())
            }
            Kind::Free => Ok(()),
        }
    }
}

/// Fills `buf`; false if the stream ends first.
fn fill(input: &mut dyn Read, buf: &mut [u8]) -> io::Result<bool> {
    match input.read_exact(buf) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

/// One channel, as an operation sees it. Dropping it closes the channel.
struct Channel {
    session: Arc<Session>,
    id: u32,
    inbox: Arc<Inbox>,
}

impl Drop for Channel {
    fn drop(&mut self) {
        if self.id == 0 {
            return;
        }
        lock(&self.session.channels).remove(&self.id);
        // Slots that will not be read any more are returned.
        let mut state = lock(&self.inbox.state);
        state.left = true;
        while let Some(piece) = self.inbox.pop(&mut state) {
            if let Arrived::Stored { slot, .. } = piece {
                let _ = self.session.free(slot);
            }
        }
        drop(state);
        let _ = self.session.send(&link::header(self.id, Kind::Close, 0), &[]);
    }
}

impl Channel {
    /// The next piece, copied out of its slot if it is in one.
    fn piece(&self) -> io::Result<Option<Arrived>> {
        let mut state = lock(&self.inbox.state);
        loop {
            if self.session.over.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            match self.inbox.pop(&mut state) {
                Some(Arrived::Stored { slot, len }) => {
                    drop(state);
                    let taken = self.session.slots()?.load(slot, len)?;
                    self.session.free(slot)?;
                    return Ok(Some(Arrived::Taken(taken, 0)));
                }
                Some(piece) => return Ok(Some(piece)),
                None if state.closed => return Ok(None),
                None => state = self.inbox.wait(state),
            }
        }
    }
}

impl AgentChannel for Channel {
    fn receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let Some(mut piece) = self.piece()? else { return Ok(0) };
        let (bytes, at) = match &mut piece {
            Arrived::Bytes(bytes, at) => (bytes.as_slice(), at),
            Arrived::Taken(taken, at) => (taken.bytes(), at),
            Arrived::Stored { .. } => return Err(invalid("a piece that was not taken out of its slot")),
        };
        let n = buf.len().min(bytes.len() - *at);
        buf[..n].copy_from_slice(&bytes[*at..*at + n]);
        *at += n;
        let more = *at < bytes.len();
        let mut state = lock(&self.inbox.state);
        if more {
            self.inbox.put_first(&mut state, piece);
        } else if let (Arrived::Taken(taken, _), Some(slots)) = (piece, self.session.slots.get()) {
            slots.put_back(taken);
        }
        state.taken += n;
        if state.taken >= CREDIT_STEP {
            let taken = std::mem::take(&mut state.taken);
            state.credit += taken;
            drop(state);
            self.session.send(&link::numbers(self.id, Kind::Credit, &[taken as u32]), &[])?;
        }
        Ok(n)
    }

    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let wanted: usize = bufs.iter().map(|b| b.len()).sum();
        let mut state = lock(&self.inbox.state);
        while state.window == 0 && !state.closed && wanted > 0 {
            state = self.inbox.wait(state);
        }
        if state.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if wanted == 0 {
            return Ok(0);
        }
        let most = wanted.min(state.window);
        let stored = self.session.slots.get().filter(|_| most >= MIN_STORED);
        let most = most.min(stored.map_or(MAX_INLINE, Slots::slot_bytes));
        state.window -= most;
        drop(state);
        let (mut parts, mut left) = (Vec::with_capacity(bufs.len()), most);
        for buf in bufs {
            let n = buf.len().min(left);
            left -= n;
            parts.push(&buf[..n]);
        }
        if let Some(slots) = stored
            && let Some((slot, n)) = slots.store(&parts)?
        {
            debug_assert_eq!(n, most);
            self.session.send(&link::numbers(self.id, Kind::Stored, &[slot, n as u32]), &[])?;
            return Ok(n);
        }
        // Inline, in frames that do not delay other channels for long.
        let all = parts.concat();
        for chunk in all.chunks(MAX_INLINE) {
            self.session.send(&link::header(self.id, Kind::Data, chunk.len()), &[chunk])?;
        }
        Ok(most)
    }

    fn peer_gone(&self) -> bool {
        lock(&self.inbox.state).closed
    }

    fn daemon_digests(&self) -> bool {
        true
    }
}

impl Read for &Channel {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.receive(buf)
    }
}

impl Write for &Channel {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.send(&[IoSlice::new(buf)])
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Channel 0 as a control channel.
struct LinkControl {
    session: Arc<Session>,
    channel: Channel,
    platform: Arc<dyn Platform>,
    /// Serial numbers of attached disks, for [`Platform::forget_disk`].
    serials: HashMap<svm_protocol::DiskId, String>,
    /// Highest channel opened so far: numbers are not used twice in a session.
    last: u32,
}

impl LinkControl {
    fn message(&mut self) -> io::Result<Option<(FrameType, Vec<u8>)>> {
        let mut payload = Vec::new();
        match svm_protocol::read_frame(&mut &self.channel, &mut payload) {
            Ok(_) if payload.len() > MAX_CONTROL => Err(invalid("control message too long")),
            Ok(kind) => Ok(Some((kind, payload))),
            Err(svm_protocol::FrameError::Closed) => Ok(None),
            Err(e) => Err(io::Error::other(e)),
        }
    }

    /// Waits for the daemon's Wake and answers with SYNC and Hello.
    fn greet(&mut self) -> io::Result<()> {
        let Some((FrameType::Wake, payload)) = self.message()? else { return Err(invalid("no Wake")) };
        let wake: Wake = serde_json::from_slice(&payload)?;
        let mut notes = self.platform.wake(&wake.entropy, Duration::from_nanos(wake.unix_nanos));
        if let Some(disk) = &wake.transfer {
            let opened = self.platform.open_transfer(&disk.serial).map_err(io::Error::other);
            match opened.and_then(|file| Slots::new(file, disk, Side::Agent)) {
                Ok(slots) => {
                    let _ = self.session.slots.set(slots);
                }
                Err(e) => notes.push(format!("no transfer disk: {e}")),
            }
        }
        let transfer = self.session.slots.get().is_some();
        let jail = JailReport { notes, ..JailReport::default() };
        let witness = self.platform.witness();
        let hello = Hello { version: PROTOCOL_VERSION, jail, nonce: wake.nonce, transfer, witness };
        self.session.send(&SYNC, &[])?;
        svm_protocol::write_json(&mut &self.channel, FrameType::Hello, &hello)
    }
}

impl ControlTransport for LinkControl {
    type Beside = ();

    fn receive(&mut self) -> io::Result<Option<(ControlRequest, ())>> {
        let Some((kind, payload)) = self.message()? else { return Ok(None) };
        if kind != FrameType::Control {
            return Err(invalid("a message that is not a Control"));
        }
        let request: ControlRequest = serde_json::from_slice(&payload)?;
        match &request.control {
            Control::Attach { disk, serial: Some(serial), .. } => {
                self.serials.insert(*disk, serial.clone());
            }
            Control::Detach { disk } => {
                if let Some(serial) = self.serials.remove(disk) {
                    self.platform.forget_disk(&serial);
                }
            }
            _ => {}
        }
        Ok(Some((request, ())))
    }

    fn reply(&mut self, reply: &ControlReply) -> io::Result<()> {
        svm_protocol::write_json(&mut &self.channel, FrameType::Reply, reply)
    }

    fn disk(&mut self, (): (), serial: Option<&str>, writable: bool) -> Result<File, WireError> {
        let serial =
            serial.ok_or_else(|| WireError::new(ErrorKind::Usage, "a disk without a serial number"))?;
        self.platform.open_disk(serial, writable)
    }

    fn channel(&mut self, (): (), id: u32) -> Result<Arc<dyn AgentChannel>, WireError> {
        if id <= self.last {
            return Err(WireError::new(ErrorKind::Usage, format!("channel {id} was used already")));
        }
        self.last = id;
        let inbox = Inbox::new(&self.session.meter);
        lock(&self.session.channels).insert(id, inbox.clone());
        if self.session.over.load(Ordering::Relaxed) {
            inbox.close();
        }
        Ok(Arc::new(Channel { session: self.session.clone(), id, inbox }))
    }

    fn wake(&mut self, entropy: &[u8], unix_time: Duration) -> Result<Option<Witness>, WireError> {
        let notes = self.platform.wake(entropy, unix_time);
        if notes.is_empty() {
            Ok(self.platform.witness())
        } else {
            Err(WireError::new(ErrorKind::Io, notes.join("; ")))
        }
    }
}
