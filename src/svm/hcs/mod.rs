//! The HCS backend: a Hyper-V utility VM for layer bytes, on Windows.
//!
//! ```text
//!   boot    create (documents) ─ RuntimeId ─ listen on hvsock ─ start ─ console, agent's connection ─ greeting
//!   attach  a slot (luns) ─ a file that Hyper-V takes (disks) ─ access granted ─ hot-add ─ agent: Attach
//!   end     terminate, or the last handle closed: nothing outlives a daemon that was killed
//! ```
//!
//! `computecore.dll` is loaded when the backend is made. Each machine has a directory of scratch disks named after it;
//! a directory that a killed predecessor left names the machine to be ended. Kernel and initrd are those of
//! `scripts/build-svm-image`, with the modules hv_vmbus, hv_storvsc, hv_sock. Called by `pool` through the traits in
//! `svm`.

mod disks;
pub mod documents;
pub mod luns;
mod transport;
mod vm;

pub use transport::{AgentInput, AgentListener, AgentOutput, AgentTransport, Hvsock, VSOCK_PORT};

use super::{BackendLimits, ServiceVm, SvmError, VmBackend, VmSpec, guest_files};
use futures_util::{FutureExt, future::BoxFuture};
use lcow_sys::windows::computecore::{Library, LoadError, System};
use std::{fs, io, path::PathBuf, sync::Arc, time::Duration};

/// Serial console; no probing of other hardware; end instead of waiting after a panic; the agent dials.
const KERNEL_LINE: &str = "lcow.agent=vsock 8250_core.nr_uarts=1 8250_core.skip_txen_test=1 console=ttyS0,115200 pci=off brd.rd_nr=0 pmtmr=0 panic=-1 quiet";

/// The command that builds the guest.
const BUILD: &str = "scripts/build-svm-image --hyperv (on Linux)";

/// How machines are made.
#[derive(Debug, Clone)]
pub struct HcsConfig {
    /// The guest's kernel.
    pub kernel: PathBuf,
    /// The guest's initramfs.
    pub initrd: PathBuf,
    /// Added to the kernel command line.
    pub boot_parameters: String,
    /// The guest's memory; bytes.
    pub memory: u64,
    /// The guest's processors.
    pub processors: u32,
    /// Largest image that an apply may write; bytes.
    pub growing_bytes: u64,
    /// Directory for scratch disks.
    pub scratch: PathBuf,
    /// How long one call of the service, or the agent's greeting, may take.
    pub deadline: Duration,
}

impl HcsConfig {
    /// The usual machine, with this guest and this directory for scratch disks.
    pub fn new(kernel: impl Into<PathBuf>, initrd: impl Into<PathBuf>, scratch: impl Into<PathBuf>) -> Self {
        Self {
            kernel: kernel.into(),
            initrd: initrd.into(),
            boot_parameters: String::new(),
            memory: 1 << 30,
            processors: 2,
            growing_bytes: 128 << 30,
            scratch: scratch.into(),
            deadline: Duration::from_mins(1),
        }
    }

    fn kernel_line(&self) -> String {
        if self.boot_parameters.is_empty() {
            return KERNEL_LINE.into();
        }
        format!("{KERNEL_LINE} {}", self.boot_parameters)
    }
}

/// Starts machines.
#[derive(Debug)]
pub struct HcsBackend {
    config: Arc<HcsConfig>,
    library: Result<Arc<Library>, Arc<LoadError>>,
    transport: Arc<dyn AgentTransport>,
}

impl HcsBackend {
    /// A backend on the system's service. If Hyper-V is not enabled, [`Self::preflight`] and every boot fail.
    pub fn new(config: HcsConfig) -> Self {
        Self::with(config, Library::load(None), Arc::new(Hvsock))
    }

    /// A backend on a given library and transport (tests).
    pub fn with(
        config: HcsConfig,
        library: Result<Arc<Library>, LoadError>,
        transport: Arc<dyn AgentTransport>,
    ) -> Self {
        Self { config: Arc::new(config), library: library.map_err(Arc::new), transport }
    }

    /// Checks what can be checked without starting a machine: the guest's files, and the system's service.
    ///
    /// # Errors
    /// Everything that is missing, and what the operator has to do.
    pub fn preflight(&self) -> Result<(), String> {
        let c = &self.config;
        let faults = [
            guest_files::open(&c.kernel, &c.initrd, BUILD).err(),
            self.library.as_ref().err().map(ToString::to_string),
        ];
        let faults: Vec<String> = faults.into_iter().flatten().collect();
        if faults.is_empty() { Ok(()) } else { Err(faults.join("; ")) }
    }

    fn library(&self) -> Result<Arc<Library>, SvmError> {
        self.library.clone().map_err(|e| failed(&*e))
    }
}

/// The error of a boot that failed before any output.
fn failed(error: &(impl std::error::Error + ?Sized)) -> SvmError {
    SvmError::Boot { reason: error.to_string(), console: String::new() }
}

/// Runs a call that blocks. A panic of the call goes on here.
///
/// # Errors
/// [`SvmError::Cancelled`] if the runtime ends: the call was never begun.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, SvmError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done),
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(SvmError::Cancelled("the program is ending")),
        },
    }
}

/// Ends the machines that a predecessor left in the directory of scratch disks; returns their number.
fn reap(library: &Arc<Library>, config: &HcsConfig) -> io::Result<usize> {
    let entries = match fs::read_dir(&config.scratch) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        other => other?,
    };
    let mut ended = 0;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Only directories that are named after a machine of this program.
        if uuid::Uuid::parse_str(&name).is_err() {
            continue;
        }
        match System::open(library, &name) {
            Ok(system) => {
                if let Err(e) = system.terminate(config.deadline) {
                    tracing::warn!(machine = name, "{e}");
                }
            }
            Err(e) if e.is_gone() => {}
            Err(e) => tracing::warn!(machine = name, "{e}"),
        }
        lcow_sys::windows::fs::remove_tree(&entry.path())?;
        ended += 1;
    }
    Ok(ended)
}

impl VmBackend for HcsBackend {
    fn name(&self) -> &'static str {
        "hcs"
    }

    fn limits(&self) -> BackendLimits {
        BackendLimits { disks: usize::from(luns::MAX_DISKS), vms: 64 }
    }

    fn boot(&self, spec: VmSpec) -> BoxFuture<'_, Result<Arc<dyn ServiceVm>, SvmError>> {
        async move {
            let vm =
                vm::start(self.library()?, self.config.clone(), self.transport.clone(), spec.number).await?;
            Ok(vm as Arc<dyn ServiceVm>)
        }
        .boxed()
    }

    fn reap(&self) -> BoxFuture<'_, Result<usize, SvmError>> {
        async move {
            let (library, config) = (self.library()?, self.config.clone());
            blocking(move || reap(&library, &config)).await?.map_err(|e| failed(&e))
        }
        .boxed()
    }
}
