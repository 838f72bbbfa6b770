//! One data channel, one operation.
//!
//! ```text
//!   Request ─► disks looked up ─► Codec (panics caught) ─► Result │ Error      the last frame says how it ended
//!        Data, Data, End ─► FrameInput        FrameOutput ─► Data, Data
//! ```
//!
//! Called by `serve`, on a thread of its own.

use super::{
    channel::{AgentChannel, Conn, sending},
    codec::{AttachedLayer, CanonicalTar, Codec, Copies, Growing, Live, Lowers, Parent, TarInput},
    disk::{Cancel, Disk, OpDisk},
    frames::{FrameInput, FrameOutput, TarFrames},
};
use std::{
    cell::RefCell,
    io::{self, Read, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};
use svm_protocol::{
    Change, CopyJob, DiskId, ErrorKind, FrameError, FrameType, LargerDisks, LayerKind, LayerRef, Operation,
    OperationEvent, ParentRef, RecodeSummary, WireError, read_frame, write_frame, write_json,
};

/// Finds attached disks.
pub(crate) trait DiskTable: Send + Sync {
    /// The disk of this number.
    fn disk(&self, id: DiskId) -> Option<Disk>;
}

/// Serves one channel to its end.
pub(crate) fn serve_channel(channel: &Arc<dyn AgentChannel>, disks: &dyn DiskTable, codec: &dyn Codec) {
    let mut buffer = Vec::new();
    let operation = match read_frame(&mut Conn(&**channel), &mut buffer) {
        Ok(FrameType::Request) => serde_json::from_slice::<Operation>(&buffer)
            .map_err(|e| WireError::new(ErrorKind::Usage, format!("malformed request: {e}"))),
        // Opened and closed again: no answer is expected.
        Err(FrameError::Closed) => return,
        Ok(other) => {
            Err(WireError::new(ErrorKind::Usage, format!("{other:?} frame where a Request was expected")))
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
    // If these fail, the daemon is gone, and there is no one to report it to.
    let mut out = Conn(&**channel);
    let _ = match outcome {
        Ok(json) => write_frame(&mut out, FrameType::Result, &json),
        Err(mut e) => {
            e.message.truncate(e.message.floor_char_boundary(MAX_MESSAGE));
            write_json(&mut out, FrameType::Error, &e)
        }
    };
}

/// The most bytes of an error's message; names in it come from hostile tars.
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
            Operation::Grow { disk, bytes, data } => {
                let disk = self.writable(disk)?;
                let data = data.into_iter().map(|(start, end)| start..end).collect();
                json(&self.codec.grow(&disk, bytes, data)?)
            }
            Operation::ExportExact { image, record } => {
                let mut out = FrameOutput::new(self.channel);
                let (image, record) = (self.disk(image)?, self.disk(record)?);
                let digested = self.channel.daemon_digests();
                let summary = self.codec.export_exact(image, record, digested, &mut out)?;
                out.finish()?;
                json(&summary)
            }
            Operation::ExportCanonical {
                target,
                parent,
                format,
                id_maps,
                live,
                copies,
                source_date_epoch,
            } => {
                let mut out = FrameOutput::new(self.channel);
                let mut handshake = Handshake::new(self.channel);
                handshake.copies = copies.map(|job| self.copies(job)).transpose()?;
                let (target, parent) = (self.layers(&target)?, self.parent(&parent)?);
                handshake.watch(&target, &parent)?;
                let live = live.then_some(&mut handshake as &mut dyn Live);
                let tar = CanonicalTar { format, id_maps, source_date_epoch };
                let summary = self.codec.export_canonical(target, parent, &tar, live, &mut out)?;
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
            Operation::Expand { format, limits } => {
                self.recode(|input, out| self.codec.expand(input, format, &limits, out))
            }
            Operation::Compress { format, level } => {
                self.recode(|input, out| self.codec.compress(input, format, level, out))
            }
        }
    }

    /// Runs an operation whose streams flow in both directions. It reads and writes in turns, on this thread alone: the
    /// daemon does both at once.
    fn recode(
        &self,
        run: impl FnOnce(&mut dyn Read, &mut dyn Write) -> Result<RecodeSummary, WireError>,
    ) -> Result<Vec<u8>, WireError> {
        let mut input = TarFrames::undigested(self.channel);
        let mut out = FrameOutput::new(self.channel);
        let summary = run(&mut input, &mut out);
        if input.broken {
            return Err(WireError::new(ErrorKind::Cancelled, "the stream was cut"));
        }
        let summary = summary?;
        if !input.ended() {
            return Err(WireError::new(ErrorKind::Internal, "the codec left a part of the stream unread"));
        }
        out.finish()?;
        json(&summary)
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

    fn layers(&self, layers: &[LayerRef]) -> Result<Vec<AttachedLayer>, WireError> {
        layers
            .iter()
            .map(|l| Ok(AttachedLayer { disk: self.disk(l.disk)?, kind: l.kind, guest_mount: l.guest_mount }))
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

/// Sends events to the daemon and waits for each Resume.
struct Handshake<'a> {
    channel: &'a dyn AgentChannel,
    copies: Option<Copies>,
    /// Disks of mounted sandboxes.
    written: Vec<OpDisk>,
}

/// The lower layers of an apply, attached on demand.
struct Lent<'a> {
    run: &'a Run<'a>,
    kinds: &'a [LayerKind],
    asked: usize,
}

impl Lowers for Lent<'_> {
    fn count(&self) -> usize {
        self.kinds.len()
    }

    fn next(&mut self) -> Result<AttachedLayer, WireError> {
        let kind = self.kinds.get(self.asked).copied();
        let kind = kind.ok_or_else(|| WireError::new(ErrorKind::Internal, "more lowers than there are"))?;
        self.asked += 1;
        let answer = Handshake::new(self.run.channel).exchange(OperationEvent::Lower)?;
        let disk: DiskId = serde_json::from_slice(&answer)
            .map_err(|e| WireError::new(ErrorKind::Usage, format!("malformed Resume: {e}")))?;
        Ok(AttachedLayer { disk: self.run.disk(disk)?, kind, guest_mount: false })
    }
}

/// The second pair of disks of an apply.
struct Grown<'r, 'f, 'a> {
    run: &'r Run<'a>,
    frames: &'f RefCell<TarFrames<'a>>,
    disks: Option<[OpDisk; 2]>,
    /// When the last `Replaying` was sent.
    told: Instant,
}

/// Interval of `Replaying` events: far below any time-out, whose units are seconds.
const TELL_EVERY: Duration = Duration::from_millis(250);

impl Grown<'_, '_, '_> {
    fn tell(&self, event: OperationEvent) -> Result<(), WireError> {
        write_json(&mut Conn(self.run.channel), FrameType::Event, &event).map_err(|e| sending(&e))
    }
}

impl Growing for Grown<'_, '_, '_> {
    fn disks(&mut self) -> Result<(OpDisk, OpDisk), WireError> {
        if self.disks.is_some() {
            return Err(WireError::new(ErrorKind::Internal, "more than one second pair of disks"));
        }
        let answer = self.frames.borrow_mut().ask(OperationEvent::LargerBlocks)?;
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
        self.tell(OperationEvent::Replaying { bytes })
    }

    fn replayed(&mut self) -> Result<(), WireError> {
        self.tell(OperationEvent::Replayed)
    }
}

impl<'a> Handshake<'a> {
    fn new(channel: &'a dyn AgentChannel) -> Self {
        Self { channel, copies: None, written: Vec::new() }
    }

    /// Remembers the sandboxes among these layers, and discards cached data of them.
    fn watch(&mut self, target: &[AttachedLayer], parent: &Parent) -> Result<(), WireError> {
        let below: &[AttachedLayer] = match parent {
            Parent::Chain(layers) => layers,
            Parent::None | Parent::Own => &[],
        };
        let sandboxes = target.iter().chain(below).filter(|layer| layer.kind.is_sandbox());
        self.written = sandboxes.map(|layer| layer.disk.clone()).collect();
        self.forget()
    }

    /// Discards cached data of the sandboxes: they may have changed.
    fn forget(&self) -> Result<(), WireError> {
        let io = |e: io::Error| WireError::new(ErrorKind::Io, format!("a disk that others write to: {e}"));
        self.written.iter().try_for_each(|disk| disk.forget().map_err(io))
    }

    fn exchange(&mut self, event: OperationEvent) -> Result<Vec<u8>, WireError> {
        let mut conn = Conn(self.channel);
        write_json(&mut conn, FrameType::Event, &event).map_err(|e| sending(&e))?;
        let mut buffer = Vec::new();
        match read_frame(&mut conn, &mut buffer) {
            Ok(FrameType::Resume) => Ok(buffer),
            Ok(other) => {
                Err(WireError::new(ErrorKind::Usage, format!("{other:?} frame where a Resume was expected")))
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
        self.exchange(OperationEvent::MetadataRead).map(drop)
    }

    fn before_recheck(&mut self) -> Result<(), WireError> {
        self.exchange(OperationEvent::BeforeRecheck)?;
        self.forget()
    }
}
