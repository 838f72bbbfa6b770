//! The pool's tokio shell.
use super::{
    ApplyJob, ApplySummary, Change, CheckJob, CheckSummary, CompareJob, ExportJob, JailReport, SvmError,
    TarStream, VmBackend,
};
use bytes::Bytes;
use futures_util::Stream;
use std::{io, sync::Arc, time::Duration};

/// How VMs are shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// One VM per layer id, ended after the id's last operation.
    Safe,
    /// One VM for all, until [`Pool::retire`] or [`Pool::shutdown`].
    Global,
}

/// What a lease is for. Exports may wait for their reader, who may wait for an apply; so exports never take the last
/// VM (a Diff that streams into an ApplyDiff would wait for ever).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Needs nothing but its input: apply, check, changes, sizes.
    Work,
    /// Streams to somebody whose pace we don't know.
    Export,
}

/// How the pool behaves.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// Safe or global.
    pub mode: Mode,
    /// VMs started ahead.
    pub spares: usize,
    /// VMs at a time, spares included; at least 2.
    pub max_vms: usize,
    /// A VM that has not greeted by then is given up.
    pub boot_timeout: Duration,
    /// No progress for so long is a failure (`lcow.timeout`).
    pub idle_timeout: Duration,
    /// A live sandbox is thawed after that, come what may, and the operation fails.
    pub freeze_limit: Duration,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            mode: Mode::Safe,
            spares: 2,
            max_vms: 64,
            boot_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(300),
            freeze_limit: Duration::from_secs(10),
        }
    }
}

/// What the pool is doing now, for Status and metrics.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolSnapshot {
    /// Safe or global.
    pub mode: Mode,
    /// Name of the backend.
    pub backend: &'static str,
    /// Running VMs that hold leases or are kept (global): name and number of leases.
    pub vms: Vec<(String, usize)>,
    /// VMs ready to be taken.
    pub spares: usize,
    /// VMs on their way up.
    pub booting: usize,
    /// Leases held.
    pub leases: usize,
    /// Leases waited for.
    pub waiting: usize,
    /// VMs started since the pool began.
    pub boots: u64,
    /// Starts that failed.
    pub boot_failures: u64,
    /// VMs that died by themselves.
    pub deaths: u64,
    /// VMs taken out of use because they misbehaved.
    pub poisoned: u64,
    /// Leases granted.
    pub granted: u64,
    /// Leases that had to wait for a VM.
    pub waits: u64,
    /// Seconds waited in all.
    pub wait_seconds: f64,
    /// What holds the last started VM's agent in.
    pub jail: Option<JailReport>,
}

/// Service VMs, handed out by lease. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Pool {}

impl Pool {
    /// Starts a pool on the current tokio runtime; spares start at once.
    pub fn start(_backend: Arc<dyn VmBackend>, _config: PoolConfig) -> Self {
        todo!()
    }

    /// A VM for work on layer `id`; waits, in order of asking, while all VMs are taken.
    ///
    /// # Errors
    /// [`SvmError::Boot`], [`SvmError::Cancelled`].
    pub async fn lease(&self, _id: &str, _purpose: Purpose) -> Result<Lease, SvmError> {
        todo!()
    }

    /// Checks an image in a VM that has seen nothing before and nothing after.
    ///
    /// # Errors
    /// [`SvmError::Refused`] says what is wrong with the image.
    pub async fn check_image(&self, _job: CheckJob) -> Result<CheckSummary, SvmError> {
        todo!()
    }

    /// What it is doing now.
    pub fn snapshot(&self) -> PoolSnapshot {
        todo!()
    }

    /// GraphDriver.Cleanup: no VM of now is used for new leases, and all are ended: idle ones at once, the others
    /// when their leases end or after `grace`. The pool stays usable.
    pub async fn retire(&self, _grace: Duration) {
        todo!()
    }

    /// Stop: no new leases; running ones get `grace`, then their VMs are ended. Returns when no VM is left.
    pub async fn shutdown(&self, _grace: Duration) {
        todo!()
    }
}

/// The right to use a VM; dropping it gives the VM back.
#[derive(Debug)]
pub struct Lease {}

impl Lease {
    /// Name of the VM (`<id>_svm` or `_lcow_global_svm_`).
    pub fn vm_name(&self) -> &str {
        todo!()
    }

    /// Writes the tar `body` as an image with its record.
    ///
    /// # Errors
    /// [`SvmError::Body`] if the body fails (a cut upload), [`SvmError::Refused`] for a bad tar, and so on.
    pub async fn tar_to_layer<S>(&self, _job: ApplyJob, _body: S) -> Result<ApplySummary, SvmError>
    where
        S: Stream<Item = io::Result<Bytes>> + Send,
    {
        todo!()
    }

    /// Streams a layer's tar. Returns when the first bytes (or a complete empty tar) are there, so an early failure is
    /// an error here. The stream keeps the lease.
    ///
    /// # Errors
    /// As [`Lease::tar_to_layer`].
    pub async fn layer_to_tar(self, _job: ExportJob) -> Result<TarStream, SvmError> {
        todo!()
    }

    /// Paths that differ, in the agent's order. At most 256 MiB of paths.
    ///
    /// # Errors
    /// As [`Lease::tar_to_layer`].
    pub async fn changes(&self, _job: CompareJob) -> Result<Vec<Change>, SvmError> {
        todo!()
    }

    /// Sum of the regular-file bytes of the difference.
    ///
    /// # Errors
    /// As [`Lease::tar_to_layer`].
    pub async fn diff_size(&self, _job: CompareJob) -> Result<u64, SvmError> {
        todo!()
    }
}
