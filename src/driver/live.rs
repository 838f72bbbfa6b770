//! Holding sandboxes still while a service VM reads their metadata.
//!
//! A sandbox may be mounted, may become mounted, or may be unmounted while a diff of it runs. During the two short
//! phases in which metadata are read its gate is closed (nobody mounts or unmounts it) and, if it is mounted, its file
//! system is frozen: everything that was written is in the image file then, and nothing moves. It stays so for at least
//! one tick of the kernel's clock, so that a later write always has a later time than what was read.

use super::gates::{Gates, Held};
use crate::{store::LayerId, svm::LiveControl};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use std::{io, sync::Arc};

#[cfg(target_os = "linux")]
use {
    super::mounts::Mounts,
    crate::sys::linux::mount::{self, FrozenMount},
    std::time::{Duration, Instant},
};

/// Longer than a tick of the slowest usual clock (100 Hz).
#[cfg(target_os = "linux")]
const TICK: Duration = Duration::from_millis(12);

/// Freezes and thaws the sandboxes of one comparison.
#[derive(Debug)]
pub(super) struct Stillness {
    pub(super) gates: Arc<Gates>,
    pub(super) sandboxes: Vec<LayerId>,
    #[cfg(target_os = "linux")]
    pub(super) mounts: Arc<Mounts>,
    pub(super) held: Mutex<Option<Still>>,
}

/// What is held while everything stands still. The file systems thaw before the gates open.
#[derive(Debug)]
pub(super) struct Still {
    #[cfg(target_os = "linux")]
    frozen: Vec<FrozenMount>,
    #[cfg(target_os = "linux")]
    since: Instant,
    _gates: Held,
}

impl Still {
    #[cfg(target_os = "linux")]
    async fn thaw(self) -> io::Result<()> {
        if !self.frozen.is_empty() {
            tokio::time::sleep(TICK.saturating_sub(self.since.elapsed())).await;
        }
        for frozen in self.frozen {
            frozen.thaw().map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Nothing is mounted elsewhere, so opening the gates is all.
    #[cfg(not(target_os = "linux"))]
    #[allow(clippy::unused_async, reason = "one signature for all systems")]
    async fn thaw(self) -> io::Result<()> {
        drop(self);
        Ok(())
    }
}

impl Stillness {
    #[cfg(target_os = "linux")]
    fn freeze_mounted(&self) -> io::Result<Vec<FrozenMount>> {
        self.sandboxes
            .iter()
            .filter_map(|id| self.mounts.disk_dir(id))
            .map(|dir| mount::freeze(&dir).map_err(io::Error::other))
            .collect()
    }
}

impl LiveControl for Stillness {
    fn freeze(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let gates = self.gates.close(&self.sandboxes).await;
            #[cfg(target_os = "linux")]
            let frozen = tokio::task::block_in_place(|| self.freeze_mounted())?;
            *self.held.lock() = Some(Still {
                #[cfg(target_os = "linux")]
                frozen,
                #[cfg(target_os = "linux")]
                since: Instant::now(),
                _gates: gates,
            });
            Ok(())
        })
    }

    fn thaw(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let Some(still) = self.held.lock().take() else { return Ok(()) };
            still.thaw().await
        })
    }
}
