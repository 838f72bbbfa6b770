//! One machine: its start, its disks, its end.
//!
//! ```text
//!   Held: slot + file ── attach ──► grown? ── detach ──► slot free, scratch gone
//! ```
//!
//! A slot is free only after the service has confirmed that its disk is removed; otherwise it stays taken. The
//! directory of scratch disks is removed with the machine.

use super::{
    AgentTransport, HcsConfig, blocking,
    disks::{self, Backing, Prepared},
    documents::{ComputeSystem, MachineSpec, ModifySettingRequest, Properties},
    failed,
    luns::{Luns, MAX_DISKS, Slot},
};
use crate::svm::{
    Access, Channel, Death, DiskFormat, DiskId, DiskSource, ServiceVm, SvmError,
    console::Console,
    end::End,
    remote::{RemoteAgent, RemoteDisk},
};
use futures_util::{FutureExt, future::BoxFuture};
use lcow_sys::windows::computecore::{HcsError, Library, System};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use svm_protocol::{ErrorKind, JailReport, WireError};
use tokio::{net::windows::named_pipe::ClientOptions, sync::watch, time::timeout};

/// How long a machine may take to end after it was asked to.
const EXIT_TIME: Duration = Duration::from_secs(10);
/// How long the notification of a machine's end may come after the first call that failed because of it.
const END_WORD: Duration = Duration::from_secs(1);
/// Pause between two looks for the console's pipe.
const CONSOLE_LOOK: Duration = Duration::from_millis(50);

/// The directory of a machine's scratch disks; removed with it.
#[derive(Debug)]
struct Folder(PathBuf);

impl Folder {
    /// Waits for files that the machine's process is about to close.
    fn clear(path: &Path) {
        match lcow_sys::windows::fs::remove_tree(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "scratch disks stay until the next start");
            }
            _ => {}
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        Self::clear(&self.0);
    }
}

/// A disk that the machine has.
struct Held {
    slot: Slot,
    backing: Backing,
    /// The file behind it, if it grows: to tell which one `grown` means.
    grows: Option<Arc<fs::File>>,
    /// It is detached already.
    gone: bool,
}

#[derive(Default)]
struct Disks {
    luns: Luns,
    next: u32,
    held: HashMap<DiskId, Held>,
}

/// A machine in use. Dropping it closes its handle, which ends it.
pub(super) struct HcsVm {
    label: String,
    id: String,
    agent: RemoteAgent,
    end: End,
    disks: Mutex<Disks>,
    config: Arc<HcsConfig>,
    library: Arc<Library>,
    // In this order: the handle is closed before the directory is removed.
    system: Mutex<Option<Arc<System>>>,
    folder: Folder,
}

impl fmt::Debug for HcsVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HcsVm").field("label", &self.label).finish_non_exhaustive()
    }
}

/// Creates a machine, starts it, and waits for its agent's greeting. Dropping the future removes everything that was
/// made.
pub(super) async fn start(
    library: Arc<Library>,
    config: Arc<HcsConfig>,
    transport: Arc<dyn AgentTransport>,
    number: u64,
) -> Result<Arc<HcsVm>, SvmError> {
    let id = uuid::Uuid::new_v4().to_string();
    let label = format!("hcs {id} (vm {number})");
    let deadline = config.deadline;
    let folder = Folder(config.scratch.join(&id));
    fs::create_dir_all(&folder.0).map_err(|e| failed(&e))?;
    let console_pipe = format!(r"\\.\pipe\lcow-console-{id}");
    let document = ComputeSystem::service_vm(&MachineSpec {
        kernel: &config.kernel,
        initrd: &config.initrd,
        command_line: &config.kernel_line(),
        memory_mb: config.memory >> 20,
        processors: config.processors,
        console_pipe: &console_pipe,
    });
    let document = serde_json::to_string(&document).map_err(|e| failed(&e))?;
    let console = Console::default();
    let end = End::new(console.clone());
    let told = end.clone();
    let on_exit = move |report: String| {
        told.tell(if report.is_empty() { "ended".to_owned() } else { format!("ended: {report}") });
    };
    let (lib, name) = (library.clone(), id.clone());
    let system = blocking(move || System::create(&lib, &name, &document, deadline, on_exit)).await?;
    let system = Arc::new(system.map_err(|e| failed(&e))?);
    let asked = system.clone();
    let properties = blocking(move || asked.properties(deadline)).await?.map_err(|e| failed(&e))?;
    let properties: Properties = serde_json::from_str(&properties).map_err(|e| failed(&e))?;
    let runtime_id = properties
        .runtime_id
        .ok_or_else(|| failed(&io::Error::other("the service reports no RuntimeId of the machine")))?;
    let listener = transport.listen(runtime_id).map_err(|e| failed(&e))?;
    let started = system.clone();
    blocking(move || started.start(deadline)).await?.map_err(|e| failed(&e))?;
    tokio::spawn(follow(console_pipe, console, label.clone(), end.watch()));
    let greeting = async {
        let (input, output) = listener.accept(deadline).await?;
        RemoteAgent::connect(input, output, None).await
    };
    let agent = tokio::select! {
        greeted = timeout(deadline, greeting) => {
            let Ok(greeted) = greeted else {
                let reason = format!("no agent has greeted within {}s", deadline.as_secs());
                return Err(end.boot_failed(reason));
            };
            greeted.map_err(|e| end.boot_failed(format_args!("the agent's connection: {e}")))?
        }
        _ = end.wait() => return Err(end.boot_failed("the machine ended before its agent greeted")),
    };
    for note in &agent.hello().jail.notes {
        tracing::warn!(note, "service VM's guest");
    }
    Ok(Arc::new(HcsVm {
        label,
        id,
        agent,
        end,
        disks: Mutex::default(),
        config,
        library,
        system: Mutex::new(Some(system)),
        folder,
    }))
}

/// Reads the console from the moment that its pipe is there. The machine's process is the pipe's server.
async fn follow(pipe: String, console: Console, label: String, death: watch::Receiver<Option<Death>>) {
    while death.borrow().is_none() && death.has_changed().is_ok() {
        if let Ok(client) = ClientOptions::new().open(&pipe) {
            console.follow(client, label);
            return;
        }
        tokio::time::sleep(CONSOLE_LOOK).await;
    }
}

impl HcsVm {
    fn disk_error(&self, disk: impl fmt::Display, e: impl fmt::Display) -> SvmError {
        SvmError::Disk { vm: self.label.clone(), disk: disk.to_string(), reason: e.to_string() }
    }

    /// The error of a disk, or of the machine if it has ended, of which the notification may come a moment later.
    async fn disk_or_death(&self, disk: impl fmt::Display, e: impl fmt::Display) -> SvmError {
        let error = self.disk_error(disk, e);
        let ended = timeout(END_WORD, self.end.wait()).await.is_ok();
        if ended { self.died() } else { error }
    }

    fn died(&self) -> SvmError {
        let cause = self.end.seen().map_or_else(|| "ended".to_owned(), |d| d.cause);
        SvmError::Died { vm: self.label.clone(), cause, console: self.end.console() }
    }

    fn system(&self) -> Result<Arc<System>, SvmError> {
        self.system.lock().clone().ok_or_else(|| self.died())
    }

    async fn modify(&self, request: &ModifySettingRequest) -> Result<Result<(), HcsError>, SvmError> {
        let system = self.system()?;
        let document = serde_json::to_string(request).map_err(|e| self.disk_error("-", e))?;
        let deadline = self.config.deadline;
        blocking(move || system.modify(&document, deadline)).await
    }

    async fn hot_add(&self, slot: Slot, path: &Path, read_only: bool) -> Result<(), SvmError> {
        match self.modify(&ModifySettingRequest::add_disk(slot, path, read_only)).await? {
            Err(e) => Err(self.disk_or_death(path.display(), e).await),
            Ok(()) => Ok(()),
        }
    }

    /// Detaches a slot's disk from the machine; succeeds if there is none.
    async fn hot_remove(&self, slot: Slot) -> Result<(), SvmError> {
        match self.modify(&ModifySettingRequest::remove_disk(slot)).await? {
            Err(e) if !e.is_absent() => Err(self.disk_or_death(slot.serial(), e).await),
            _ => Ok(()),
        }
    }

    /// Grants the machine access to a file: to itself for its own disks, to all machines for shared layers.
    fn grant(&self, path: &Path, own: bool) -> Result<(), HcsError> {
        if own { self.library.grant_access(&self.id, path) } else { self.library.grant_group_access(path) }
    }

    async fn plug(
        &self,
        disk: &DiskSource,
        id: DiskId,
        slot: Slot,
        ready: &Prepared,
    ) -> Result<(), SvmError> {
        let path = ready.backing.path();
        let shown = path.display();
        let writable = disk.access == Access::ReadWrite;
        let own = !matches!(ready.backing, Backing::Direct(_)) || disk.format == DiskFormat::Vhdx;
        self.grant(path, own).map_err(|e| self.disk_error(&shown, e))?;
        self.hot_add(slot, path, !writable).await?;
        // Whatever the file is, Hyper-V attaches it as a disk of plain bytes.
        let (len, format) = (ready.len, DiskFormat::Raw);
        let told = RemoteDisk { disk: id, writable, offset: 0, len, serial: slot.serial(), format };
        match self.agent.attach(&told).await {
            Err(e) => Err(self.disk_or_death(&shown, e).await),
            Ok(()) => Ok(()),
        }
    }

    /// Detaches a disk from the agent and the machine.
    async fn unplug(&self, disk: DiskId, slot: Slot) -> Result<(), SvmError> {
        if let Err(e) = self.agent.detach(disk).await {
            return Err(self.disk_or_death(disk.0, e).await);
        }
        self.hot_remove(slot).await
    }
}

impl ServiceVm for HcsVm {
    fn describe(&self) -> String {
        self.label.clone()
    }

    fn attach<'a>(&'a self, disk: &'a DiskSource) -> BoxFuture<'a, Result<DiskId, SvmError>> {
        async move {
            let shown = disk.path.display();
            let (id, slot) = {
                let mut disks = self.disks.lock();
                let slot = disks.luns.take();
                let slot = slot.ok_or_else(|| {
                    self.disk_error(&shown, format!("{MAX_DISKS} disks are attached already"))
                })?;
                let id = DiskId(disks.next);
                disks.next += 1;
                (id, slot)
            };
            let name = self.folder.0.join(format!("disk{}", id.0));
            let (source, growing) = (disk.clone(), self.config.growing_bytes);
            let prepared = blocking(move || disks::prepare(&source, &name, growing)).await;
            let prepared = match prepared.and_then(|done| done.map_err(|e| self.disk_error(&shown, e))) {
                Ok(prepared) => prepared,
                Err(e) => {
                    self.disks.lock().luns.give_back(slot);
                    return Err(e);
                }
            };
            if let Err(e) = self.plug(disk, id, slot, &prepared).await {
                // The service may have the disk after all: only its confirmation that it has not frees the slot.
                if self.hot_remove(slot).await.is_ok() {
                    self.disks.lock().luns.give_back(slot);
                }
                prepared.backing.clear();
                return Err(e);
            }
            let grows = matches!(prepared.backing, Backing::Growing(_)).then(|| disk.file.clone());
            self.disks.lock().held.insert(id, Held { slot, backing: prepared.backing, grows, gone: false });
            Ok(id)
        }
        .boxed()
    }

    fn detach(&self, disk: DiskId) -> BoxFuture<'_, Result<(), SvmError>> {
        async move {
            let state = self.disks.lock().held.get(&disk).map(|h| (h.slot, h.gone));
            let (slot, gone) = state.ok_or_else(|| self.disk_error(disk.0, "not attached"))?;
            if !gone {
                self.unplug(disk, slot).await?;
                self.disks.lock().luns.give_back(slot);
            }
            if let Some(held) = self.disks.lock().held.remove(&disk) {
                held.backing.clear();
            }
            Ok(())
        }
        .boxed()
    }

    fn grown<'a>(&'a self, disk: &'a DiskSource, len: u64) -> BoxFuture<'a, Result<(), SvmError>> {
        async move {
            let found = self.disks.lock().held.iter().find_map(|(id, held)| {
                let ours = held.grows.as_ref().is_some_and(|f| Arc::ptr_eq(f, &disk.file)) && !held.gone;
                ours.then(|| (*id, held.slot, held.backing.path().to_owned()))
            });
            let Some((id, slot, scratch)) = found else { return Ok(()) };
            // Only after the machine has released a disk are all bytes in its file.
            self.unplug(id, slot).await?;
            {
                let mut disks = self.disks.lock();
                disks.luns.give_back(slot);
                if let Some(held) = disks.held.get_mut(&id) {
                    held.gone = true;
                }
            }
            let file = disk.file.clone();
            let brought = blocking(move || disks::bring_back(&scratch, &file, len)).await?;
            brought.map_err(|e| match e.kind() {
                // The machine is not to blame for this.
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    SvmError::Refused(WireError::new(
                        ErrorKind::NoSpace,
                        format!("no space left on the host: {}: {e}", disk.path.display()),
                    ))
                }
                _ => self.disk_error(disk.path.display(), e),
            })
        }
        .boxed()
    }

    fn open_channel(&self) -> BoxFuture<'_, Result<Channel, SvmError>> {
        async move {
            let channel = self.agent.open_channel().await.map_err(|e| {
                if self.end.seen().is_some() {
                    return self.died();
                }
                SvmError::Protocol { vm: self.label.clone(), reason: e.to_string() }
            })?;
            Ok(Box::new(channel) as Channel)
        }
        .boxed()
    }

    fn ping(&self) -> BoxFuture<'_, Result<(), SvmError>> {
        async move {
            let answer = self.agent.ping().await;
            answer.map_err(|e| SvmError::Protocol { vm: self.label.clone(), reason: e.to_string() })
        }
        .boxed()
    }

    fn terminate(&self) -> BoxFuture<'_, ()> {
        async move {
            let system = self.system.lock().take();
            if let Some(system) = system {
                let deadline = self.config.deadline;
                let label = self.label.clone();
                let asked = system.clone();
                match blocking(move || asked.terminate(deadline)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(e)) => tracing::warn!(vm = label, "{e}; closing its handle ends it"),
                    Err(e) => tracing::warn!(vm = label, "{e}; closing its handle ends it"),
                }
                // The wait for its end is limited: closing the handle ends it, too.
                let _ = timeout(EXIT_TIME, self.end.wait()).await;
                // If the runtime begins nothing any more, it has dropped the call, and the handle with it.
                let _ = blocking(move || drop(system)).await;
                self.end.tell("ended: its handle was closed");
            }
            self.end.wait().await;
            // Here and not on drop, which may run on a thread of the runtime that must not block.
            let folder = self.folder.0.clone();
            // If the runtime begins nothing any more, the drop is left to clear it.
            let _ = blocking(move || Folder::clear(&folder)).await;
        }
        .boxed()
    }

    fn death(&self) -> BoxFuture<'_, Death> {
        self.end.wait()
    }

    fn console(&self) -> String {
        self.end.console()
    }

    fn daemon_digests(&self) -> bool {
        true
    }

    fn jail(&self) -> Option<JailReport> {
        None
    }
}
