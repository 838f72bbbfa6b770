//! The containerd face: a proxy snapshotter and differ on the layers of the driver.
//!
//! ```text
//!   containerd ──gRPC──► serve ─► snapshots   names, labels, codes   ─► mounts, filter, mask   ─► driver::snapshots
//!                              └► differ      blob in, blob out      ─► engine ──gRPC──► containerd's content store
//!   operator ──HTTP/1.1─► serve ─► /healthz /metrics /svm /snapshots
//! ```
//!
//! Invariants:
//! * Each call that fails is one line in the log (`called`), with the code that containerd acts on (`status`).
//! * Only Apply and Diff may take long; all other calls have a limit of their own.
//! * Mounts, filters, masks and media types are parsed by pure functions; nothing that a client names is opened.
//! * Bytes of a blob pass through; the daemon digests them and looks at the first few to choose a decompressor.
//!
//! The protocol: containerd's `api/services/{snapshots,diff,content,leases}/v1`, versions 1.7 to 2.4. Called by `cli`.

mod called;
mod differ;
mod engine;
#[cfg(target_os = "linux")]
mod file;
// Public for the fuzz target.
pub mod filter;
mod mask;
mod media;
mod mounts;
mod serve;
mod snapshots;
mod status;
#[cfg(test)]
pub(crate) mod testing;

pub use serve::serve;

use crate::{driver::snapshots::Snapshots, telemetry::Metrics};
use engine::{Content, Engine, Limits};
use std::{fmt, path::PathBuf, sync::Arc};

/// Where the containerd face keeps and finds things.
#[derive(Debug, Clone)]
pub struct FaceConfig {
    /// containerd's own socket or pipe, for its content store.
    pub engine: PathBuf,
    /// containerd's root directory, for `lcow.containerd.content=file`.
    pub data: PathBuf,
}

/// What every call shares. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Face {
    inner: Arc<Inner>,
}

struct Inner {
    snapshots: Snapshots,
    metrics: Arc<Metrics>,
    content: Arc<dyn Content>,
    data: PathBuf,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("snapshots", &self.snapshots).finish_non_exhaustive()
    }
}

impl Face {
    /// The face of these snapshots.
    pub fn new(snapshots: Snapshots, metrics: Arc<Metrics>, config: &FaceConfig) -> Self {
        let limits = Limits { idle: snapshots.idle_timeout(), ..Limits::default() };
        let content = Arc::new(Engine::new(config.engine.clone(), limits));
        Self { inner: Arc::new(Inner { snapshots, metrics, content, data: config.data.clone() }) }
    }

    fn snapshots(&self) -> &Snapshots {
        &self.inner.snapshots
    }

    fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    fn content(&self) -> &Arc<dyn Content> {
        &self.inner.content
    }

    /// containerd's root directory, if blobs are read as files.
    #[cfg(target_os = "linux")]
    fn data(&self) -> Option<&PathBuf> {
        let files = self.inner.snapshots.options().content == crate::config::ContentAccess::File;
        files.then_some(&self.inner.data)
    }
}
