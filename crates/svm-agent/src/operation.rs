//! One data channel, one operation.
//!
//! ```text
//!   Request ─► disks looked up ─► Codec (panics caught) ─► Result │ Error      the last frame says how it ended
//!        Data, Data, End ─► FrameInput        FrameOutput ─► Data, Data
//! ```
//!
//! Bytes of the stream are read straight into the codec's buffer. Called by `serve`, on a thread of its own.

use super::{
    codec::{Codec, Copies, Growing, Layer, Live, Lowers, Parent, TarInput, ToldDigest},
    disk::{Cancel, Disk, OpDisk},
};
use disk_io::{ReadAt, StreamOut};
use std::{
    cell::RefCell,
    collections::VecDeque,
    fs::File,
    io::{self, IoSlice, Read, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};
use svm_protocol::{
    Change, CopyJob, DATA_PAYLOAD, DiskId, ErrorKind, Event, FrameError, FrameType, HEADER_LEN, LargerDisks,
    LayerKind, LayerRef, Operation, ParentRef, WireError, read_frame, write_frame, write_json,
};

/// A data channel as the agent sees it: both directions at once, and a look at whether the daemon is still there.
pub trait AgentChannel: Send + Sync + 'static {
    /// Reads some bytes; 0 at the end.
    ///
    /// # Errors
    /// What the transport says.
    fn receive(&self, buf: &mut [u8]) -> io::Result<usize>;
    /// Writes some bytes.
    ///
    /// # Errors
    /// What the transport says.
    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize>;
    /// Whether the daemon has closed its end.
    fn peer_gone(&self) -> bool;
    /// Writes up to `len` bytes of a file from `offset`; 0 if this transport, or the system, cannot.
    ///
    /// # Errors
    /// What the transport says.
    fn send_file(&self, _file: &File, _offset: u64, _len: u64) -> io::Result<u64> {
        Ok(0)
    }
    /// Whether [`Self::send_file`] is worth an attempt.
    fn sends_files(&self) -> bool {
        false
    }
    /// Whether the daemon digests the tars that pass: it tells an applied one's digest at its End, and holds an exact
    /// one against the digest of the summary. Hashing is what an emulated processor is worst at.
    fn daemon_digests(&self) -> bool {
        false
    }
}

/// Finds attached disks.
pub trait DiskTable: Send + Sync {
    /// The disk of this number.
    fn disk(&self, id: DiskId) -> Option<Disk>;
}

struct Conn<'a>(&'a dyn AgentChannel);

impl Read for Conn<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.receive(buf)
    }
}

impl Write for Conn<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.send(&[IoSlice::new(buf)])
    }
    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.send(bufs)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Serves one channel to its end.
pub fn serve_channel(channel: &Arc<dyn AgentChannel>, disks: &dyn DiskTable, codec: &dyn Codec) {
    let mut buffer = Vec::new();
    let operation = match read_frame(&mut Conn(&**channel), &mut buffer) {
        Ok(FrameType::Request) => serde_json::from_slice::<Operation>(&buffer)
            .map_err(|e| WireError::new(ErrorKind::Usage, format!("malformed request: {e}"))),
        // Opened and closed again: nobody wants an answer.
        Err(FrameError::Closed) => return,
        Ok(other) => {
            Err(WireError::new(ErrorKind::Usage, format!("{other:?} frame where a Request was due")))
        }
        Err(e) => Err(WireError::new(ErrorKind::Usage, format!("unreadable request: {e}"))),
    };
    let outcome = operation.and_then(|op| {
        let watched = channel.clone();
        let cancel = Cancel::new(move || watched.peer_gone());
        let run = Run { channel: &**channel, disks, codec, cancel };
        catch_unwind(AssertUnwindSafe(|| run.operation(op))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            Err(WireError::new(ErrorKind::Internal, format!("the agent panicked: {text}")))
        })
    });
    // If these fail, the daemon is gone, and with it whoever would read a complaint.
    let mut out = Conn(&**channel);
    let _ = match outcome {
        Ok(json) => write_frame(&mut out, FrameType::Result, &json),
        Err(mut e) => {
            e.message.truncate(e.message.floor_char_boundary(MAX_MESSAGE));
            write_json(&mut out, FrameType::Error, &e)
        }
    };
}

/// Most bytes of an error's text; names in it come from hostile tars.
const MAX_MESSAGE: usize = 16 << 10;

struct Run<'a> {
    channel: &'a dyn AgentChannel,
    disks: &'a dyn DiskTable,
    codec: &'a dyn Codec,
    cancel: Cancel,
}

impl Run<'_> {
    fn operation(&self, operation: Operation) -> Result<Vec<u8>, WireError> {
        match operation {
            Operation::Ping => json(&()),
            Operation::Apply { image, record, scratch, lowers, options } => {
                let frames = RefCell::new(TarFrames::new(self.channel));
                let (image, record) = (self.writable(image)?, self.writable(record)?);
                let first = [image.clone(), record.clone()];
                let scratch = scratch.map(|disk| self.writable(disk)).transpose()?;
                let told = frames.borrow().told.clone();
                let tar = TarInput { told, bytes: &mut FrameInput(&frames) };
                let mut lowers = Lent { run: self, kinds: &lowers, asked: 0 };
                let mut grown = Grown { run: self, frames: &frames, disks: None, told: Instant::now() };
                let summary =
                    self.codec.apply(tar, image, record, scratch, &mut lowers, &mut grown, &options);
                let written = grown.disks.take().unwrap_or(first);
                if frames.borrow().broken {
                    return Err(WireError::new(ErrorKind::Cancelled, "the tar's stream was cut"));
                }
                let summary = summary?;
                if !frames.borrow_mut().ended() {
                    return Err(WireError::new(
                        ErrorKind::Internal,
                        "the codec left a part of the tar unread",
                    ));
                }
                for disk in written {
                    disk.reach_host().map_err(|e| {
                        let kind = match e.kind() {
                            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
                            _ => ErrorKind::Io,
                        };
                        WireError::new(kind, format!("writing to the host: {e}"))
                    })?;
                }
                json(&summary)
            }
            Operation::Check { image, tree, writer, owners } => {
                json(&self.codec.check(self.disk(image)?, tree, writer, &owners)?)
            }
            Operation::ExportExact { image, record } => {
                let mut out = FrameOutput::new(self.channel);
                let (image, record) = (self.disk(image)?, self.disk(record)?);
                let digested = self.channel.daemon_digests();
                let summary = self.codec.export_exact(image, record, digested, &mut out)?;
                out.finish()?;
                json(&summary)
            }
            Operation::ExportCanonical { target, parent, format, id_maps, live, copies } => {
                let mut out = FrameOutput::new(self.channel);
                let mut handshake = Handshake::new(self.channel);
                handshake.copies = copies.map(|job| self.copies(job)).transpose()?;
                let (target, parent) = (self.layers(&target)?, self.parent(&parent)?);
                handshake.watch(&target, &parent)?;
                let live = live.then_some(&mut handshake as &mut dyn Live);
                let summary =
                    self.codec.export_canonical(target, parent, format, &id_maps, live, &mut out)?;
                out.finish()?;
                json(&summary)
            }
            Operation::Changes { target, parent, live } => {
                let mut out = FrameOutput::new(self.channel);
                let mut handshake = Handshake::new(self.channel);
                let (target, parent) = (self.layers(&target)?, self.parent(&parent)?);
                handshake.watch(&target, &parent)?;
                let live = live.then_some(&mut handshake as &mut dyn Live);
                let mut one = Vec::new();
                let mut sink = |change: &Change| {
                    one.clear();
                    svm_protocol::encode_change(&mut one, change);
                    out.write_all(&one).map_err(|e| sending(&e))
                };
                self.codec.changes(target, parent, live, &mut sink)?;
                out.finish()?;
                json(&())
            }
            Operation::Written { target, blank, live } => {
                let mut handshake = Handshake::new(self.channel);
                let target = self.layers(&target)?;
                handshake.watch(&target, &Parent::Own)?;
                let live = live.then_some(&mut handshake as &mut dyn Live);
                json(&self.codec.written(target, blank, live)?)
            }
            Operation::DiffSize { target, parent, live } => {
                let mut handshake = Handshake::new(self.channel);
                let (target, parent) = (self.layers(&target)?, self.parent(&parent)?);
                handshake.watch(&target, &parent)?;
                let live = live.then_some(&mut handshake as &mut dyn Live);
                json(&self.codec.diff_size(target, parent, live)?)
            }
        }
    }

    fn disk(&self, id: DiskId) -> Result<OpDisk, WireError> {
        let disk = self.disks.disk(id);
        let disk =
            disk.ok_or_else(|| WireError::new(ErrorKind::Usage, format!("no disk {} is attached", id.0)))?;
        Ok(OpDisk::new(disk, self.cancel.clone()))
    }

    fn writable(&self, id: DiskId) -> Result<OpDisk, WireError> {
        if self.disks.disk(id).is_some_and(|d| !d.writable) {
            return Err(WireError::new(ErrorKind::Usage, format!("disk {} is attached read-only", id.0)));
        }
        self.disk(id)
    }

    fn copies(&self, job: CopyJob) -> Result<Copies, WireError> {
        Ok(Copies {
            scratch: Arc::new(self.writable(job.scratch)?),
            since: job.since,
            changed: job.changed,
            most_bytes: job.most_bytes,
            most_time: Duration::from_millis(job.most_millis),
        })
    }

    fn layers(&self, layers: &[LayerRef]) -> Result<Vec<Layer>, WireError> {
        layers
            .iter()
            .map(|l| Ok(Layer { disk: self.disk(l.disk)?, kind: l.kind, guest_mount: l.guest_mount }))
            .collect()
    }

    fn parent(&self, parent: &ParentRef) -> Result<Parent, WireError> {
        Ok(match parent {
            ParentRef::None => Parent::None,
            ParentRef::Own => Parent::Own,
            ParentRef::Chain(layers) => Parent::Chain(self.layers(layers)?),
        })
    }
}

fn json<T: serde::Serialize>(value: &T) -> Result<Vec<u8>, WireError> {
    serde_json::to_vec(value).map_err(|e| WireError::new(ErrorKind::Internal, format!("summary: {e}")))
}

fn sending(e: &io::Error) -> WireError {
    WireError::new(ErrorKind::Cancelled, format!("sending: {e}"))
}

/// Most bytes of a digest's text.
const MAX_DIGEST_TEXT: usize = 128;

/// Most bytes of tar that are kept while a Resume is on its way. The daemon sends nothing once it has seen the question,
/// so that this is what channels hold by themselves.
const MAX_KEPT: usize = 64 << 20;
/// From here on the daemon is given time.
const KEPT_AT_ONCE: usize = 4 << 20;
/// That time, for each frame.
const PATIENCE: Duration = Duration::from_millis(20);

/// The stream that comes in: Data frames up to End.
struct TarFrames<'a> {
    channel: &'a dyn AgentChannel,
    /// Filled from End where the daemon digests.
    told: Option<ToldDigest>,
    left: usize,
    end: bool,
    broken: bool,
    /// Data that came before a Resume.
    kept: VecDeque<u8>,
}

/// [`TarFrames`] as the codec reads them.
struct FrameInput<'f, 'a>(&'f RefCell<TarFrames<'a>>);

impl Read for FrameInput<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.borrow_mut().read(buf)
    }
}

impl<'a> TarFrames<'a> {
    fn new(channel: &'a dyn AgentChannel) -> Self {
        let told = channel.daemon_digests().then(ToldDigest::default);
        Self { channel, told, left: 0, end: false, broken: false, kept: VecDeque::new() }
    }

    /// Asks the daemon something in mid-stream: what its Resume says. Data that come before it are kept.
    fn ask(&mut self, event: Event) -> Result<Vec<u8>, WireError> {
        write_json(&mut Conn(self.channel), FrameType::Event, &event).map_err(|e| sending(&e))?;
        // What a channel holds is taken only when the daemon had time to see the question.
        std::thread::sleep(PATIENCE);
        let answer = self.until_resume();
        self.broken |= answer.is_err();
        answer.map_err(|e| WireError::new(ErrorKind::Cancelled, format!("waiting for Resume: {e}")))
    }

    fn until_resume(&mut self) -> io::Result<Vec<u8>> {
        let mut payload = Vec::new();
        loop {
            if self.left > 0 {
                self.keep_frame()?;
            }
            match read_frame(&mut Conn(self.channel), &mut payload).map_err(io::Error::other)? {
                FrameType::Resume => return Ok(payload),
                FrameType::Data if !self.end => self.kept.extend(&payload),
                FrameType::End if !self.end && payload.len() <= MAX_DIGEST_TEXT => {
                    self.take_digest(&payload)?;
                    self.end = true;
                }
                other => return Err(io::Error::other(format!("{other:?} frame where a Resume was due"))),
            }
            if self.kept.len() > MAX_KEPT {
                return Err(io::Error::other("the tar goes on where a Resume was due"));
            }
            if self.kept.len() > KEPT_AT_ONCE {
                std::thread::sleep(PATIENCE);
            }
        }
    }

    /// Keeps what is left of the frame under way.
    fn keep_frame(&mut self) -> io::Result<()> {
        let mut rest = vec![0; std::mem::take(&mut self.left)];
        Conn(self.channel).read_exact(&mut rest)?;
        self.kept.extend(&rest);
        Ok(())
    }

    /// Whether the stream is read to its explicit end (looks at the next frame if there is one).
    fn ended(&mut self) -> bool {
        self.end || matches!(self.read(&mut [0]), Ok(0))
    }

    fn next_frame(&mut self) -> io::Result<()> {
        let mut head = [0; HEADER_LEN];
        Conn(self.channel).read_exact(&mut head)?;
        match svm_protocol::parse_header(head).map_err(io::Error::other)? {
            (FrameType::Data, 0) => return Err(io::Error::other("a data frame without a byte")),
            (FrameType::Data, len) => self.left = len,
            (FrameType::End, len) if len <= MAX_DIGEST_TEXT => {
                let mut text = vec![0; len];
                Conn(self.channel).read_exact(&mut text)?;
                self.take_digest(&text)?;
                self.end = true;
            }
            (other, _) => return Err(io::Error::other(format!("{other:?} frame inside the tar's stream"))),
        }
        Ok(())
    }

    /// Where the daemon digests, End carries what it found; elsewhere nothing.
    fn take_digest(&self, text: &[u8]) -> io::Result<()> {
        let bad = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, reason.to_owned());
        match &self.told {
            None if text.is_empty() => Ok(()),
            None => Err(bad("a digest that nobody asked for at the tar's end")),
            Some(told) => {
                let text = std::str::from_utf8(text).map_err(|_| bad("no digest at the tar's end"))?;
                let digest = text.parse().map_err(|e| bad(&format!("the tar's end: {e}")))?;
                // Read once: End is the last frame.
                told.set(digest).map_err(|_| bad("a second end of the tar"))
            }
        }
    }
}

impl Read for TarFrames<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        if !self.kept.is_empty() {
            let n = self.kept.read(buf)?;
            if self.kept.is_empty() {
                self.kept = VecDeque::new();
            }
            return Ok(n);
        }
        let got = (|| {
            while self.left == 0 && !self.end {
                self.next_frame()?;
            }
            if self.end {
                return Ok(0);
            }
            let want = buf.len().min(self.left);
            match self.channel.receive(&mut buf[..want])? {
                0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                n => Ok(n),
            }
        })();
        match got {
            Ok(n) => {
                self.left = self.left.saturating_sub(n);
                Ok(n)
            }
            Err(e) => {
                if e.kind() != io::ErrorKind::Interrupted {
                    self.broken = true;
                }
                Err(e)
            }
        }
    }
}

/// The stream that goes out: Data frames of at most [`DATA_PAYLOAD`].
struct FrameOutput<'a> {
    channel: &'a dyn AgentChannel,
    buffer: Vec<u8>,
}

impl<'a> FrameOutput<'a> {
    fn new(channel: &'a dyn AgentChannel) -> Self {
        Self { channel, buffer: Vec::new() }
    }

    fn finish(&mut self) -> Result<(), WireError> {
        self.flush().map_err(|e| sending(&e))
    }
}

impl Write for FrameOutput<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.buffer.is_empty() && buf.len() >= DATA_PAYLOAD {
            // A whole frame's worth goes out from where it lies.
            write_frame(&mut Conn(self.channel), FrameType::Data, &buf[..DATA_PAYLOAD])?;
            return Ok(DATA_PAYLOAD);
        }
        if self.buffer.capacity() == 0 {
            self.buffer.reserve_exact(DATA_PAYLOAD);
        }
        let n = buf.len().min(DATA_PAYLOAD - self.buffer.len());
        self.buffer.extend_from_slice(&buf[..n]);
        if self.buffer.len() == DATA_PAYLOAD {
            self.flush()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.buffer.is_empty() {
            write_frame(&mut Conn(self.channel), FrameType::Data, &self.buffer)?;
            self.buffer.clear();
        }
        Ok(())
    }
}

impl StreamOut for FrameOutput<'_> {
    fn splice(&mut self, file: &File, offset: u64, len: u64) -> io::Result<u64> {
        if !self.channel.sends_files() || len == 0 {
            return Ok(0);
        }
        self.flush()?;
        let len = len.min(DATA_PAYLOAD as u64);
        Conn(self.channel).write_all(&svm_protocol::header(FrameType::Data, len as usize))?;
        let mut sent = 0;
        while sent < len {
            match self.channel.send_file(file, offset + sent, len - sent)? {
                0 => break,
                n => sent += n,
            }
        }
        // The frame was promised: what the system did not take is read and written.
        if sent < len {
            let mut rest = vec![0; (len - sent) as usize];
            file.read_exact_at(&mut rest, offset + sent)?;
            Conn(self.channel).write_all(&rest)?;
        }
        Ok(len)
    }
}

/// Asks the daemon for something, and waits until it is done.
struct Handshake<'a> {
    channel: &'a dyn AgentChannel,
    copies: Option<Copies>,
    /// Disks that others write to.
    written: Vec<OpDisk>,
}

/// The lowers of an apply: each is lent when it is asked for.
struct Lent<'a> {
    run: &'a Run<'a>,
    kinds: &'a [LayerKind],
    asked: usize,
}

impl Lowers for Lent<'_> {
    fn count(&self) -> usize {
        self.kinds.len()
    }

    fn next(&mut self) -> Result<Layer, WireError> {
        let kind = self.kinds.get(self.asked).copied();
        let kind = kind.ok_or_else(|| WireError::new(ErrorKind::Internal, "more lowers than there are"))?;
        self.asked += 1;
        let answer = Handshake::new(self.run.channel).exchange(Event::Lower)?;
        let disk: DiskId = serde_json::from_slice(&answer)
            .map_err(|e| WireError::new(ErrorKind::Usage, format!("malformed Resume: {e}")))?;
        Ok(Layer { disk: self.run.disk(disk)?, kind, guest_mount: false })
    }
}

/// The second pair of disks of an apply.
struct Grown<'r, 'f, 'a> {
    run: &'r Run<'a>,
    frames: &'f RefCell<TarFrames<'a>>,
    disks: Option<[OpDisk; 2]>,
    /// When the daemon was last told that the first pair is being read.
    told: Instant,
}

/// How often the daemon hears of a replay: far below any time-out, whose units are seconds.
const TELL_EVERY: Duration = Duration::from_millis(250);

impl Grown<'_, '_, '_> {
    fn tell(&self, event: Event) -> Result<(), WireError> {
        write_json(&mut Conn(self.run.channel), FrameType::Event, &event).map_err(|e| sending(&e))
    }
}

impl Growing for Grown<'_, '_, '_> {
    fn disks(&mut self) -> Result<(OpDisk, OpDisk), WireError> {
        if self.disks.is_some() {
            return Err(WireError::new(ErrorKind::Internal, "more than one second pair of disks"));
        }
        let answer = self.frames.borrow_mut().ask(Event::LargerBlocks)?;
        let lent: LargerDisks = serde_json::from_slice(&answer)
            .map_err(|e| WireError::new(ErrorKind::Usage, format!("malformed Resume: {e}")))?;
        let (image, record) = (self.run.writable(lent.image)?, self.run.writable(lent.record)?);
        self.disks = Some([image.clone(), record.clone()]);
        Ok((image, record))
    }

    fn replaying(&mut self, bytes: u64) -> Result<(), WireError> {
        if self.told.elapsed() < TELL_EVERY {
            return Ok(());
        }
        self.told = Instant::now();
        self.tell(Event::Replaying { bytes })
    }

    fn replayed(&mut self) -> Result<(), WireError> {
        self.tell(Event::Replayed)
    }
}

impl<'a> Handshake<'a> {
    fn new(channel: &'a dyn AgentChannel) -> Self {
        Self { channel, copies: None, written: Vec::new() }
    }

    /// Knows the sandboxes among some layers, so that they are seen as they are.
    fn watch(&mut self, target: &[Layer], parent: &Parent) -> Result<(), WireError> {
        let below: &[Layer] = match parent {
            Parent::Chain(layers) => layers,
            Parent::None | Parent::Own => &[],
        };
        let sandboxes = target.iter().chain(below).filter(|layer| layer.kind == LayerKind::Sandbox);
        self.written = sandboxes.map(|layer| layer.disk.clone()).collect();
        self.forget()
    }

    /// What was read of the sandboxes before is not what they are now.
    fn forget(&self) -> Result<(), WireError> {
        let io = |e: io::Error| WireError::new(ErrorKind::Io, format!("a disk that others write to: {e}"));
        self.written.iter().try_for_each(|disk| disk.forget().map_err(io))
    }

    fn exchange(&mut self, event: Event) -> Result<Vec<u8>, WireError> {
        let mut conn = Conn(self.channel);
        write_json(&mut conn, FrameType::Event, &event).map_err(|e| sending(&e))?;
        let mut buffer = Vec::new();
        match read_frame(&mut conn, &mut buffer) {
            Ok(FrameType::Resume) => Ok(buffer),
            Ok(other) => {
                Err(WireError::new(ErrorKind::Usage, format!("{other:?} frame where a Resume was due")))
            }
            Err(e) => Err(WireError::new(ErrorKind::Cancelled, format!("waiting for Resume: {e}"))),
        }
    }
}

impl Live for Handshake<'_> {
    fn copies(&mut self) -> Option<Copies> {
        self.copies.take()
    }

    fn metadata_read(&mut self) -> Result<(), WireError> {
        self.exchange(Event::MetadataRead).map(drop)
    }

    fn before_recheck(&mut self) -> Result<(), WireError> {
        self.exchange(Event::BeforeRecheck)?;
        self.forget()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::VecDeque, sync::Mutex};

    /// What a channel does when it is to send a file.
    #[derive(Debug, Clone, Copy)]
    enum Step {
        /// Takes one in so many of the bytes, at least one.
        Part(u64),
        /// Takes nothing: the system can't go on.
        Nothing,
        Fails,
    }

    /// A daemon's end that takes files by halves, and other bytes in small pieces.
    struct Fake {
        steps: Mutex<VecDeque<Step>>,
        sent: Mutex<Vec<u8>>,
    }

    impl AgentChannel for Fake {
        fn receive(&self, _: &mut [u8]) -> io::Result<usize> {
            Ok(0)
        }

        fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
            /// No divisor of anything here.
            const MOST: usize = 7_777;
            let all: Vec<u8> = bufs.iter().flat_map(|b| b.iter().copied()).take(MOST).collect();
            self.sent.lock().unwrap().extend_from_slice(&all);
            Ok(all.len())
        }

        fn peer_gone(&self) -> bool {
            false
        }

        fn send_file(&self, file: &File, offset: u64, len: u64) -> io::Result<u64> {
            // Behind the last step: all at once.
            let n = match self.steps.lock().unwrap().pop_front().unwrap_or(Step::Part(1)) {
                Step::Part(parts) => (len / parts).max(1),
                Step::Nothing => 0,
                Step::Fails => return Err(io::ErrorKind::ConnectionReset.into()),
            };
            let mut bytes = vec![0; n as usize];
            file.read_exact_at(&mut bytes, offset)?;
            self.sent.lock().unwrap().extend_from_slice(&bytes);
            Ok(n)
        }

        fn sends_files(&self) -> bool {
            true
        }
    }

    impl Fake {
        fn new(steps: &[Step]) -> Self {
            Self { steps: Mutex::new(steps.iter().copied().collect()), sent: Mutex::default() }
        }

        /// What the frames carried.
        fn content(&self) -> Vec<u8> {
            let sent = self.sent.lock().unwrap();
            let (mut rest, mut frame, mut all) = (sent.as_slice(), Vec::new(), Vec::new());
            while !rest.is_empty() {
                assert_eq!(read_frame(&mut rest, &mut frame).unwrap(), FrameType::Data);
                assert!(!frame.is_empty() && frame.len() <= DATA_PAYLOAD, "{} bytes", frame.len());
                all.extend_from_slice(&frame);
            }
            all
        }
    }

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn a_frame_that_was_sent_in_part_is_filled_up_with_the_right_bytes() {
        const BEGIN: usize = 4_099;
        let bytes: Vec<u8> = (0..BEGIN + 2 * DATA_PAYLOAD + 1234).map(|n| (n / 251 + n) as u8).collect();
        let file = file_of(&bytes);
        let cases: [&[Step]; 9] = [
            &[],
            &[Step::Nothing],
            &[Step::Part(2)],
            &[Step::Part(2), Step::Nothing],
            &[Step::Part(2), Step::Part(3), Step::Nothing],
            &[Step::Part(u64::MAX), Step::Nothing],
            // The first frame whole, the second not at all or in part, the third in part.
            &[Step::Part(1), Step::Nothing, Step::Part(2), Step::Nothing],
            &[Step::Part(1), Step::Part(2), Step::Nothing, Step::Part(3), Step::Nothing],
            // All but little, and then nothing.
            &[Step::Part(2), Step::Part(2), Step::Part(2), Step::Part(1)],
        ];
        for steps in cases {
            let fake = Fake::new(steps);
            let mut out = FrameOutput::new(&fake);
            out.write_all(b"before").unwrap();
            let mut at = BEGIN;
            while at < bytes.len() {
                let n = out.splice(&file, at as u64, (bytes.len() - at) as u64).unwrap() as usize;
                assert_eq!(n, DATA_PAYLOAD.min(bytes.len() - at), "{steps:?}");
                at += n;
            }
            out.write_all(b"behind").unwrap();
            out.finish().unwrap();
            let expected = [b"before", &bytes[BEGIN..], b"behind"].concat();
            assert!(fake.content() == expected, "{steps:?}");
        }
    }

    #[test]
    fn a_promised_frame_that_can_not_be_filled_is_an_error_and_no_short_frame() {
        let file = file_of(&[7; 1000]);
        let splice = |steps: &[Step], len| FrameOutput::new(&Fake::new(steps)).splice(&file, 0, len);
        // The file ends before the frame does.
        let e = splice(&[Step::Part(2), Step::Nothing], 1500).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::UnexpectedEof);
        let e = splice(&[Step::Part(2), Step::Fails], 1000).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::ConnectionReset);
    }
}
