//! The embedded backend on Windows: a child process, a second instance of this program, confined by a job and a
//! restricted token.
//!
//! ```text
//!   lcow-graphdriver worker     stdin ◄═ control: frames, each with the number of a handle ═► EmbeddedVm
//!     (jail, then Hello)        stderr ══► tracing, tail kept
//!   attach(disk)  ─► DuplicateHandle, read-only if it must be      open_channel ─► one end of a pipe pair
//! ```
//!
//! Windows has no message that carries descriptors; instead the daemon duplicates each handle into the worker, with no
//! more access than the worker may have, and sends its number. Needs nothing installed. The job ends the worker with
//! this process, however that ends. Called by `pool` through the traits in `svm`.

use crate::svm::{
    Access, BackendLimits, Channel, Death, DiskId, DiskSource, JailReport, ServiceVm, SvmError, VmBackend,
    VmSpec,
    console::Console,
    end::{End, Process},
};
use futures_util::{FutureExt, future::BoxFuture};
use lcow_sys::windows::{
    pipe,
    process::{Given, WorkerCommand, WorkerProcess},
};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    ffi::OsString,
    fmt, io,
    os::windows::io::{AsHandle, BorrowedHandle},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};
use svm_protocol::{
    Control, ControlReply, ControlRequest, FrameType, HEADER_LEN, Hello, PROTOCOL_VERSION,
    worker::{GivenRequest, MAX_CONTROL},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf},
    net::windows::named_pipe::NamedPipeServer,
    sync::{mpsc, oneshot},
};

/// How workers are started.
#[derive(Debug, Clone)]
pub struct EmbeddedConfig {
    /// The program with the hidden `worker` subcommand; this one, except in tests.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Environment of the worker; it inherits nothing else.
    pub env: Vec<(OsString, OsString)>,
    /// Memory that a worker may commit; bytes.
    pub memory_limit: u64,
}

impl Default for EmbeddedConfig {
    fn default() -> Self {
        Self {
            program: std::env::current_exe().unwrap_or_else(|_| "lcow-graphdriver.exe".into()),
            args: vec!["worker".into()],
            env: Vec::new(),
            memory_limit: 8 << 30,
        }
    }
}

/// Starts jailed workers.
#[derive(Debug)]
pub struct EmbeddedBackend {
    config: EmbeddedConfig,
}

impl EmbeddedBackend {
    /// A backend.
    pub fn new(config: EmbeddedConfig) -> Self {
        Self { config }
    }

    async fn start(&self, spec: VmSpec) -> Result<Arc<dyn ServiceVm>, SvmError> {
        let program = self.config.program.display();
        let console = Console::default();
        let end = End::new(console.clone());
        let failed = |reason: &dyn fmt::Display| end.boot_failed(format_args!("{program}: {reason}"));
        let (control, theirs) = pipe::pair(true).map_err(|e| failed(&e))?;
        let (stderr, their_stderr) = pipe::pair(false).map_err(|e| failed(&e))?;
        for ours in [&control, &stderr] {
            ours.connect().await.map_err(|e| failed(&e))?;
        }
        let command = WorkerCommand {
            program: self.config.program.clone(),
            args: self.config.args.clone(),
            env: self.config.env.clone(),
            memory: self.config.memory_limit,
        };
        let started =
            tokio::task::spawn_blocking(move || WorkerProcess::start(&command, theirs, their_stderr)).await;
        let worker = started.map_err(|e| failed(&e))?.map_err(|e| failed(&e))?;
        let pid = worker.pid();
        console.follow(stderr, format!("worker {pid}"));
        let (control, hello) = ControlClient::new(control);
        let vm = Arc::new(EmbeddedVm {
            label: format!("worker {pid} (vm {})", spec.number),
            control,
            next_disk: AtomicU32::new(0),
            worker: Process::watch(worker, end.clone()).map_err(|e| failed(&e))?,
            jail: Mutex::new(None),
        });
        let Ok(hello) = hello.await else {
            vm.terminate().await;
            return Err(failed(&"it did not greet"));
        };
        if hello.version != PROTOCOL_VERSION {
            let reason =
                format!("protocol version mismatch: expected {PROTOCOL_VERSION}, found {}", hello.version);
            return Err(failed(&reason));
        }
        *vm.jail.lock() = Some(hello.jail);
        Ok(vm)
    }
}

impl VmBackend for EmbeddedBackend {
    fn name(&self) -> &'static str {
        "embedded"
    }

    fn limits(&self) -> BackendLimits {
        BackendLimits { disks: svm_protocol::MAX_DISKS, vms: 4096 }
    }

    fn boot(&self, spec: VmSpec) -> BoxFuture<'_, Result<Arc<dyn ServiceVm>, SvmError>> {
        self.start(spec).boxed()
    }

    fn reap(&self) -> BoxFuture<'_, Result<usize, SvmError>> {
        // Workers die with the daemon's handle of their job and own nothing but memory.
        async { Ok(0) }.boxed()
    }
}

type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<ControlReply>>>>;

/// The daemon's end of a worker's control pipe. One task reads and one writes, so that a caller that is cancelled half
/// way leaves no partial message.
struct ControlClient {
    requests: mpsc::UnboundedSender<Vec<u8>>,
    pending: Pending,
    seq: AtomicU64,
}

impl ControlClient {
    fn new(pipe: NamedPipeServer) -> (Self, oneshot::Receiver<Hello>) {
        let (input, mut output) = tokio::io::split(pipe);
        let (requests, mut queue) = mpsc::unbounded_channel::<Vec<u8>>();
        let (greeted, hello) = oneshot::channel();
        let pending = Pending::default();
        tokio::spawn(async move {
            while let Some(message) = queue.recv().await {
                if output.write_all(&message).await.is_err() {
                    return;
                }
            }
        });
        let answers = pending.clone();
        tokio::spawn(async move {
            if let Err(e) = read_replies(input, greeted, &answers).await {
                tracing::debug!(error = %e, "a worker's control pipe ended");
            }
            // Waiting callers notice the end by their dropped sender.
            answers.lock().clear();
        });
        (Self { requests, pending, seq: AtomicU64::new(1) }, hello)
    }

    /// Sends a request and waits for the reply.
    async fn call(&self, control: Control, handle: Option<u64>) -> io::Result<()> {
        let seq = self.seq.fetch_add(1, Ordering::Relaxed);
        let payload = serde_json::to_vec(&GivenRequest { handle, request: ControlRequest { seq, control } })?;
        let mut message = svm_protocol::header(FrameType::Control, payload.len()).to_vec();
        message.extend_from_slice(&payload);
        let (sender, answer) = oneshot::channel();
        self.pending.lock().insert(seq, sender);
        let ended = || io::Error::new(io::ErrorKind::UnexpectedEof, "control pipe closed");
        self.requests.send(message).map_err(|_| ended())?;
        let reply = answer.await.map_err(|_| ended())?;
        reply.error.map_or(Ok(()), |e| Err(io::Error::other(e)))
    }
}

async fn read_replies(
    mut input: ReadHalf<NamedPipeServer>,
    greeted: oneshot::Sender<Hello>,
    pending: &Pending,
) -> io::Result<()> {
    let mut greeted = Some(greeted);
    loop {
        let mut head = [0; HEADER_LEN];
        input.read_exact(&mut head).await?;
        let (kind, len) = svm_protocol::parse_header(head).map_err(io::Error::other)?;
        if len > MAX_CONTROL {
            return Err(io::Error::other("control message too long"));
        }
        let mut payload = vec![0; len];
        input.read_exact(&mut payload).await?;
        match (kind, greeted.take()) {
            (FrameType::Hello, Some(greeted)) => {
                let _ = greeted.send(serde_json::from_slice(&payload)?);
            }
            (FrameType::Reply, None) => {
                let reply: ControlReply = serde_json::from_slice(&payload)?;
                if let Some(waiter) = pending.lock().remove(&reply.seq) {
                    let _ = waiter.send(reply);
                }
            }
            (other, _) => return Err(io::Error::other(format!("unexpected {other:?} frame"))),
        }
    }
}

/// A running worker.
struct EmbeddedVm {
    label: String,
    control: ControlClient,
    next_disk: AtomicU32,
    worker: Process,
    jail: Mutex<Option<JailReport>>,
}

impl fmt::Debug for EmbeddedVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedVm").field("label", &self.label).finish_non_exhaustive()
    }
}

impl EmbeddedVm {
    fn disk_error(&self, disk: impl fmt::Display, e: impl fmt::Display) -> SvmError {
        SvmError::Disk { vm: self.label.clone(), disk: disk.to_string(), reason: e.to_string() }
    }

    fn protocol(&self, e: impl fmt::Display) -> SvmError {
        SvmError::Protocol { vm: self.label.clone(), reason: e.to_string() }
    }

    fn give(&self, handle: BorrowedHandle<'_>, access: Given) -> io::Result<u64> {
        let given = self.worker.with(|worker| worker.give(handle, access));
        given.unwrap_or_else(|| Err(io::Error::other("the worker has ended")))
    }
}

impl ServiceVm for EmbeddedVm {
    fn describe(&self) -> String {
        self.label.clone()
    }

    fn attach<'a>(&'a self, disk: &'a DiskSource) -> BoxFuture<'a, Result<DiskId, SvmError>> {
        async move {
            let id = DiskId(self.next_disk.fetch_add(1, Ordering::Relaxed));
            let writable = disk.access == Access::ReadWrite;
            let access = if writable { Given::ReadWrite } else { Given::Read };
            let given = self.give(disk.file.as_handle(), access);
            let handle = given.map_err(|e| self.disk_error(disk.path.display(), e))?;
            let control = Control::Attach {
                disk: id,
                writable,
                offset: disk.offset,
                len: disk.len,
                serial: None,
                format: disk.format,
            };
            let reply = self.control.call(control, Some(handle)).await;
            reply.map_err(|e| self.disk_error(disk.path.display(), e))?;
            Ok(id)
        }
        .boxed()
    }

    fn detach(&self, disk: DiskId) -> BoxFuture<'_, Result<(), SvmError>> {
        async move {
            self.control.call(Control::Detach { disk }, None).await.map_err(|e| self.disk_error(disk.0, e))
        }
        .boxed()
    }

    fn open_channel(&self) -> BoxFuture<'_, Result<Channel, SvmError>> {
        async move {
            let (ours, theirs) = pipe::pair(true).map_err(|e| self.protocol(e))?;
            ours.connect().await.map_err(|e| self.protocol(e))?;
            let handle = self.give(theirs.as_handle(), Given::Same).map_err(|e| self.protocol(e))?;
            drop(theirs);
            self.control
                .call(Control::Open { channel: 0 }, Some(handle))
                .await
                .map_err(|e| self.protocol(e))?;
            Ok(Box::new(ours) as Channel)
        }
        .boxed()
    }

    fn ping(&self) -> BoxFuture<'_, Result<(), SvmError>> {
        async move { self.control.call(Control::Ping, None).await.map_err(|e| self.protocol(e)) }.boxed()
    }

    fn terminate(&self) -> BoxFuture<'_, ()> {
        self.worker.terminate().map(|_| ()).boxed()
    }

    fn death(&self) -> BoxFuture<'_, Death> {
        self.worker.end.wait()
    }

    fn console(&self) -> String {
        self.worker.end.console()
    }

    fn jail(&self) -> Option<JailReport> {
        self.jail.lock().clone()
    }
}
