//! The control channel: greeting, disks, data channels.
//!
//! ```text
//!   Hello ─►     ◄─ Attach, Detach, Open, Wake, Ping     Reply ─►       end of the channel = end of the agent
//! ```
//!
//! Transport and lookup of disks are a trait ([`ControlTransport`]): messages with descriptors in a
//! worker process, a serial port and device serial numbers in a virtual machine. Called by `worker`.

use super::{
    channel::AgentChannel,
    codec::Codec,
    disk::Disk,
    operation::{DiskTable, serve_channel},
};
use std::{
    collections::HashMap,
    fs::File,
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use svm_protocol::{
    Control, ControlReply, ControlRequest, DiskId, ErrorKind, MAX_DISKS, MAX_OPERATIONS, WireError, Witness,
};

/// A control channel. `Beside` is what travels with a message (a descriptor, or nothing).
pub(crate) trait ControlTransport {
    /// What travels beside a message.
    type Beside;
    /// The next request; `None` at the end of the channel.
    ///
    /// # Errors
    /// Errors of the transport; a malformed request.
    fn receive(&mut self) -> io::Result<Option<(ControlRequest, Self::Beside)>>;
    /// Answers a request.
    ///
    /// # Errors
    /// Errors of the transport.
    fn reply(&mut self, reply: &ControlReply) -> io::Result<()>;
    /// The device of an Attach.
    ///
    /// # Errors
    /// The reason, if there is none.
    fn disk(&mut self, beside: Self::Beside, serial: Option<&str>, writable: bool)
    -> Result<File, WireError>;
    /// The channel of an Open; `id` is its number on a link.
    ///
    /// # Errors
    /// The reason, if there is none.
    fn channel(&mut self, beside: Self::Beside, id: u32) -> Result<Arc<dyn AgentChannel>, WireError>;
    /// Sets the clock and reseeds the random numbers of a VM that was stopped.
    ///
    /// # Errors
    /// What could not be done. Not called for an agent that shares the daemon's clock.
    fn wake(&mut self, _entropy: &[u8], _unix_time: Duration) -> Result<Option<Witness>, WireError> {
        Err(WireError::new(ErrorKind::Usage, "this agent shares the daemon's clock"))
    }
}

/// Attached disks by number.
#[derive(Debug, Default)]
pub(crate) struct Disks(Mutex<HashMap<DiskId, Disk>>);

impl DiskTable for Disks {
    fn disk(&self, id: DiskId) -> Option<Disk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }
}

/// Serves until the control channel ends.
///
/// # Errors
/// The control channel failed or its data were malformed: the agent must end, since the daemon can no longer reach it.
pub(crate) fn serve<T: ControlTransport>(transport: &mut T, codec: &Arc<dyn Codec>) -> io::Result<()> {
    let disks = Arc::new(Disks::default());
    let running = Arc::new(AtomicUsize::new(0));
    while let Some((request, beside)) = transport.receive()? {
        let mut witness = None;
        let outcome = match request.control {
            Control::Ping => Ok(()),
            Control::Wake { entropy, unix_nanos } => {
                transport.wake(&entropy, Duration::from_nanos(unix_nanos)).map(|seen| witness = seen)
            }
            Control::Attach { disk, writable, offset, len, serial, format } => transport
                .disk(beside, serial.as_deref(), writable)
                .and_then(|file| attach(&disks, disk, Disk::open(file, format, writable, (offset, len))?)),
            Control::Detach { disk } => {
                match disks.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&disk) {
                    Some(_) => Ok(()),
                    None => Err(WireError::new(ErrorKind::Usage, format!("no disk {} is attached", disk.0))),
                }
            }
            Control::Open { channel } => {
                transport.channel(beside, channel).and_then(|channel| start(channel, &disks, codec, &running))
            }
        };
        transport.reply(&ControlReply { seq: request.seq, error: outcome.err(), witness })?;
    }
    Ok(())
}

fn attach(disks: &Disks, id: DiskId, disk: Disk) -> Result<(), WireError> {
    let mut table = disks.0.lock().unwrap_or_else(PoisonError::into_inner);
    if table.len() >= MAX_DISKS {
        return Err(WireError::new(ErrorKind::Limit, format!("{MAX_DISKS} disks are attached already")));
    }
    if table.contains_key(&id) {
        return Err(WireError::new(ErrorKind::Usage, format!("disk {} is attached already", id.0)));
    }
    table.insert(id, disk);
    Ok(())
}

/// Counts a running operation until it is dropped, also by a panic of its thread.
struct Running(Arc<AtomicUsize>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn start(
    channel: Arc<dyn AgentChannel>,
    disks: &Arc<Disks>,
    codec: &Arc<dyn Codec>,
    running: &Arc<AtomicUsize>,
) -> Result<(), WireError> {
    if running.fetch_add(1, Ordering::Relaxed) >= MAX_OPERATIONS {
        running.fetch_sub(1, Ordering::Relaxed);
        return Err(WireError::new(
            ErrorKind::Limit,
            format!("{MAX_OPERATIONS} operations are running already"),
        ));
    }
    let (disks, codec, count) = (disks.clone(), codec.clone(), Running(running.clone()));
    let thread = std::thread::Builder::new().name("operation".into()).spawn(move || {
        let _count = count;
        serve_channel(&channel, &*disks, &*codec);
    });
    thread
        .map(drop)
        .map_err(|e| WireError::new(ErrorKind::Limit, format!("no thread for the operation: {e}")))
}
