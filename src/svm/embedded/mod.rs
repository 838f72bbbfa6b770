//! The embedded backend: a jailed child process of this very program.
use super::{BackendLimits, ServiceVm, SvmError, VmBackend, VmSpec};
use futures_util::future::BoxFuture;
use std::{path::PathBuf, sync::Arc};

/// How workers are started.
#[derive(Debug, Clone)]
pub struct EmbeddedConfig {
    /// The program with the hidden `worker` subcommand; `/proc/self/exe` unless a test says otherwise.
    pub program: PathBuf,
    /// Address space of a worker; bytes.
    pub memory_limit: u64,
}

impl Default for EmbeddedConfig {
    fn default() -> Self {
        Self { program: "/proc/self/exe".into(), memory_limit: 8 << 30 }
    }
}

/// Starts jailed workers.
#[derive(Debug)]
pub struct EmbeddedBackend {}

impl EmbeddedBackend {
    /// A backend.
    pub fn new(_config: EmbeddedConfig) -> Self {
        Self {}
    }
}

impl VmBackend for EmbeddedBackend {
    fn name(&self) -> &'static str {
        "embedded"
    }
    fn limits(&self) -> BackendLimits {
        BackendLimits { disks: 1000, vms: 1000 }
    }
    fn boot(&self, _spec: VmSpec) -> BoxFuture<'_, Result<Arc<dyn ServiceVm>, SvmError>> {
        todo!()
    }
    fn reap(&self) -> BoxFuture<'_, Result<usize, SvmError>> {
        todo!()
    }
}
