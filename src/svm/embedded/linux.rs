//! The embedded backend: a jailed child process, a second instance of this program.
//!
//! ```text
//!   spawner thread ─► lcow-graphdriver worker       0 ◄═ control: messages + descriptors ═► EmbeddedVm
//!                       (jail, then Hello)          2 ══ stderr ═► tracing, tail kept
//!   attach(disk)  ─► descriptor by SCM_RIGHTS       open_channel ─► one end of a socketpair
//! ```
//!
//! Needs nothing installed. The worker gets descriptors only; a read-only disk is a descriptor that can't write. A dead
//! worker is detected by its pidfd, reaped at once, and leaves neither files nor processes. Called by `pool` through
//! the traits in `svm`.

use super::control::ControlClient;
use crate::svm::{
    Access, BackendLimits, Channel, Death, DiskId, DiskSource, JailReport, ServiceVm, SvmError, VmBackend,
    VmSpec,
    console::Console,
    end::{End, Process},
};
use futures_util::{FutureExt, future::BoxFuture};
use lcow_sys::linux::{
    fdpass,
    process::{WorkerCommand, is_writable, reopen_read_only, spawn_worker},
};
use parking_lot::Mutex;
use std::{
    collections::HashSet,
    ffi::OsString,
    fmt,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};
use svm_protocol::{
    Control, Hello, PROTOCOL_VERSION,
    worker::{FILE_SIZE_VARIABLE, JAIL_VARIABLE, MEMORY_VARIABLE, STRICT, USER_VARIABLE},
};

/// Kernel buffer of a data channel, each way; bytes.
const CHANNEL_BUFFER: usize = 256 << 10;
/// Users that workers become: one each, so that a compromised worker shares neither limits nor signals with its
/// siblings. Next to those of QEMU's machines, above those of distributions and the usual ranges of user namespaces.
const FIRST_USER: u32 = 0x4c44_0000;

/// The user of the worker of this number.
fn user_of(number: u64) -> u32 {
    FIRST_USER + (number & 0xffff) as u32
}

/// How workers are started.
#[derive(Debug, Clone)]
pub struct EmbeddedConfig {
    /// The program with the hidden `worker` subcommand; `/proc/self/exe`, except in tests.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Environment in addition to what the backend sets; workers inherit nothing else.
    pub env: Vec<(OsString, OsString)>,
    /// Address space of a worker; bytes.
    pub memory_limit: u64,
    /// Size of any file that a worker writes; bytes. `None` = no limit.
    pub file_limit: Option<u64>,
    /// A worker whose jail is incomplete does not start, see
    /// [`JailReport::missing`](lcow_sys::jail::JailReport::missing).
    pub strict: bool,
}

impl Default for EmbeddedConfig {
    fn default() -> Self {
        Self {
            program: "/proc/self/exe".into(),
            args: vec!["worker".into()],
            env: Vec::new(),
            memory_limit: 8 << 30,
            file_limit: None,
            strict: false,
        }
    }
}

/// Starts jailed workers.
#[derive(Debug)]
pub struct EmbeddedBackend {
    config: EmbeddedConfig,
    /// Missing parts of the jail that were logged already; each worker would repeat them.
    warned: Mutex<HashSet<String>>,
}

impl EmbeddedBackend {
    /// A backend.
    pub fn new(config: EmbeddedConfig) -> Self {
        Self { config, warned: Mutex::default() }
    }

    /// Logs each missing part of a worker's jail, once.
    fn warn_of(&self, jail: &JailReport) {
        for note in &jail.notes {
            if self.warned.lock().insert(note.clone()) {
                tracing::warn!(note, "a part of the workers' jail is not in force; the others are");
            }
        }
    }

    fn command(&self, number: u64) -> WorkerCommand {
        let mut env = self.config.env.clone();
        env.push((MEMORY_VARIABLE.into(), self.config.memory_limit.to_string().into()));
        env.push((USER_VARIABLE.into(), user_of(number).to_string().into()));
        if let Some(limit) = self.config.file_limit {
            env.push((FILE_SIZE_VARIABLE.into(), limit.to_string().into()));
        }
        if self.config.strict {
            env.push((JAIL_VARIABLE.into(), STRICT.into()));
        }
        // glibc reserves 64 MiB of address space per arena, which would eat the limit; two are plenty for our threads.
        env.push(("MALLOC_ARENA_MAX".into(), "2".into()));
        WorkerCommand { program: self.config.program.clone(), args: self.config.args.clone(), env }
    }

    async fn start(&self, spec: VmSpec) -> Result<Arc<dyn ServiceVm>, SvmError> {
        let console = Console::default();
        let end = End::new(console.clone());
        let failed = |reason: &dyn fmt::Display| end.boot_failed(reason);
        let (sender, started) = tokio::sync::oneshot::channel();
        spawn_worker(self.command(spec.number), move |worker| {
            // If the waiter is gone, dropping the worker here kills and reaps it.
            let _ = sender.send(worker);
        })
        .map_err(|e| failed(&e))?;
        let program = self.config.program.display();
        let mut worker = started
            .await
            .map_err(|_| failed(&"the spawner thread is gone"))?
            .map_err(|e| failed(&format_args!("{program}: {e}")))?;
        let (Some(stderr), Some(socket)) = (worker.stderr.take(), worker.control.take()) else {
            return Err(failed(&"worker without control socket"));
        };
        let pid = worker.pid();
        let pipe =
            tokio::net::unix::pipe::Receiver::from_owned_fd(OwnedFd::from(stderr)).map_err(|e| failed(&e))?;
        console.follow(pipe, format!("worker {pid}"));
        let control = ControlClient::new(socket).map_err(|e| failed(&e))?;
        let vm = Arc::new(EmbeddedVm {
            label: format!("worker {pid} (vm {})", spec.number),
            control,
            next_disk: AtomicU32::new(0),
            worker: Process::watch(worker, end.clone()).map_err(|e| failed(&e))?,
            jail: Mutex::new(None),
        });
        let hello: Hello = match vm.control.hello().await {
            Ok(hello) => hello,
            Err(e) => {
                vm.terminate().await;
                return Err(failed(&format_args!("{program} did not greet: {e}")));
            }
        };
        if hello.version != PROTOCOL_VERSION {
            let reason =
                format!("protocol version mismatch: expected {PROTOCOL_VERSION}, found {}", hello.version);
            return Err(failed(&reason));
        }
        self.warn_of(&hello.jail);
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
        // Workers die with the daemon (parent-death signal, end of the control socket) and own nothing but memory.
        async { Ok(0) }.boxed()
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
}

impl ServiceVm for EmbeddedVm {
    fn describe(&self) -> String {
        self.label.clone()
    }

    fn attach<'a>(&'a self, disk: &'a DiskSource) -> BoxFuture<'a, Result<DiskId, SvmError>> {
        async move {
            let path = disk.path.display();
            let id = DiskId(self.next_disk.fetch_add(1, Ordering::Relaxed));
            let writable = disk.access == Access::ReadWrite;
            let reopened;
            let mut fd = disk.file.as_fd();
            if !writable && is_writable(fd).map_err(|e| self.disk_error(path, e))? {
                reopened = reopen_read_only(fd).map_err(|e| self.disk_error(disk.path.display(), e))?;
                fd = reopened.as_fd();
            }
            let control = Control::Attach {
                disk: id,
                writable,
                offset: disk.offset,
                len: disk.len,
                serial: None,
                format: disk.format,
            };
            let reply = self.control.call(control, &[fd]).await;
            reply.map_err(|e| self.disk_error(disk.path.display(), e))?;
            Ok(id)
        }
        .boxed()
    }

    fn detach(&self, disk: DiskId) -> BoxFuture<'_, Result<(), SvmError>> {
        async move {
            self.control.call(Control::Detach { disk }, &[]).await.map_err(|e| self.disk_error(disk.0, e))
        }
        .boxed()
    }

    fn open_channel(&self) -> BoxFuture<'_, Result<Channel, SvmError>> {
        async move {
            let protocol =
                |e: &dyn fmt::Display| SvmError::Protocol { vm: self.label.clone(), reason: e.to_string() };
            let (ours, theirs) = fdpass::stream_pair(CHANNEL_BUFFER).map_err(|e| protocol(&e))?;
            self.control
                .call(Control::Open { channel: 0 }, &[theirs.as_fd()])
                .await
                .map_err(|e| protocol(&e))?;
            let stream = UnixStream::from(ours);
            stream.set_nonblocking(true).map_err(|e| protocol(&e))?;
            let stream = tokio::net::UnixStream::from_std(stream).map_err(|e| protocol(&e))?;
            Ok(Box::new(stream) as Channel)
        }
        .boxed()
    }

    fn ping(&self) -> BoxFuture<'_, Result<(), SvmError>> {
        async move {
            let reply = self.control.call(Control::Ping, &[]).await;
            reply.map_err(|e| SvmError::Protocol { vm: self.label.clone(), reason: e.to_string() })
        }
        .boxed()
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
