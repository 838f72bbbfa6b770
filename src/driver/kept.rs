//! Disks that no view uses: images that stay mounted for the next view, and what could not be unmounted. Linux only.
//!
//! ```text
//!   last view ends ─► sandbox ─► synced, unmounted ──────────────────┬─ failed ─► stuck: tried again by Put, Remove, Get, a start
//!                └──► image ──► lcow.mount.keep = 0 ─► unmounted ────┘
//!                         └───► kept ─┬─ next view ─► used
//!                                     ├─ more than lcow.mount.keep, older than lcow.mount.keepage, memory is short ─► unmounted
//!                                     ├─ Remove ─► detached at once, torn down by a thread
//!                                     └─ Cleanup, stop, clients gone, POST /unmount-idle ─► unmounted
//!   kill -9 ─► the next start keeps what it finds mounted
//! ```
//!
//! An unmount drops the page cache of a file system, so that the next container would read each file through the loop
//! device again.
//!
//! Invariants:
//! * Only images are kept, never a sandbox: a kept disk has nothing to be synced, thawed or lost.
//! * A kept disk is unmounted under the closed gate of its layer. If the gate is closed by someone else, the disk is about
//!   to be used or removed, and is left to them.
//! * No directory stays busy because of kept disks: whoever ends (the engine, this program) leaves none behind.
//!
//! All functions block. Called by `mounts`, `views`, `lifecycle`, `home` and `snapshots`.

use super::{
    DriverError,
    gates::{Gates, Held},
    mounts::{Disk, Mounts, failed, unmount_all},
};
use crate::{
    error::with_causes,
    store::{LayerId, files},
};
use lcow_sys::linux::mount;
use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

/// Longest time between two looks at age and memory.
const LOOK: Duration = Duration::from_secs(15);
/// Kept disks are unmounted when less than this share of the memory is available: an inverse, 20 for 5 %.
const SHORT_OF_MEMORY: u64 = 20;

impl Mounts {
    /// One use less. Without another use, an image is kept or unmounted, and a sandbox is synced and unmounted.
    pub(super) fn release_disk(&self, id: &LayerId) -> Result<(), DriverError> {
        {
            let mut state = self.state.lock();
            let Some(disk) = state.disks.get_mut(id) else { return Ok(()) };
            if disk.uses > 1 {
                disk.uses -= 1;
                return Ok(());
            }
            if disk.uses == 1 && disk.image && self.keep.number > 0 {
                *disk = Disk { uses: 0, kept: Some(Instant::now()), ..*disk };
                return Ok(());
            }
        }
        self.unmount_disk(id)
    }

    fn unmount_disk(&self, id: &LayerId) -> Result<(), DriverError> {
        let target = self.layout.mount_point(id);
        let unmounted = self.thaw_disk(id).and_then(|()| {
            // A mount namespace that copied this mount, such as that of a container or a service, keeps the file system
            // alive, and then the unmount writes nothing back: a Diff would read an old state from the file.
            if let Err(error) = mount::syncfs(&target) {
                tracing::warn!(%id, error = %with_causes(&error), "cannot sync a disk before its unmount");
            }
            // With userns-remap, there is an id-mapped mount on top of the plain one.
            unmount_all(&target).map_err(failed(id, "unmount its disk"))
        });
        let mut state = self.state.lock();
        if unmounted.is_ok() {
            state.disks.remove(id);
            let _ = files::remove_dir(&target);
        } else if let Some(disk) = state.disks.get_mut(id) {
            *disk = Disk { uses: 0, kept: None, ..*disk };
        }
        unmounted
    }

    /// As [`Mounts::release_disk`], for the sandbox of a removed snapshot: what was written is not wanted any more, so the
    /// last use unmounts it without a sync, at once or when its last user ends.
    pub(super) fn drop_doomed_disk(&self, id: &LayerId) -> Result<(), DriverError> {
        if self.state.lock().disks.get(id).is_some_and(|disk| disk.uses > 1) {
            return self.release_disk(id);
        }
        self.thaw_disk(id)?;
        let target = self.layout.mount_point(id);
        unmount_all(&target).map_err(failed(id, "unmount its disk"))?;
        self.state.lock().disks.remove(id);
        let _ = files::remove_dir(&target);
        Ok(())
    }

    /// Disks that no view uses and that could not be unmounted.
    pub(super) fn stuck(&self) -> Vec<LayerId> {
        let state = self.state.lock();
        let stuck = state.disks.iter().filter(|(_, disk)| disk.uses == 0 && disk.kept.is_none());
        stuck.map(|(id, _)| id.clone()).collect()
    }

    /// Tries again to unmount a disk that no view uses and that is not kept; others are left as they are.
    pub(super) fn release_stuck(&self, held: &Held, id: &LayerId) -> Result<(), DriverError> {
        held.covers(id)?;
        let disk = self.state.lock().disks.get(id).copied();
        match disk {
            Some(Disk { uses: 0, kept: None, .. }) => self.unmount_disk(id),
            _ => Ok(()),
        }
    }

    /// Images that stay mounted, those that were used last first.
    fn kept(&self) -> Vec<(LayerId, Instant)> {
        let state = self.state.lock();
        let mut kept: Vec<_> =
            state.disks.iter().filter_map(|(id, disk)| Some((id.clone(), disk.kept?))).collect();
        kept.sort_unstable_by_key(|(_, since)| std::cmp::Reverse(*since));
        kept
    }

    /// Detaches the kept disk of a layer that is about to be removed. Its file system is torn down by a thread, for which
    /// [`Mounts::torn_down`] waits.
    pub(super) fn drop_kept(&self, held: &Held, id: &LayerId) -> Result<(), DriverError> {
        held.covers(id)?;
        if self.state.lock().disks.get(id).is_none_or(|disk| disk.kept.is_none()) {
            return Ok(());
        }
        let target = self.layout.mount_point(id);
        // With a second reference, the unmount has nothing to tear down. On a kernel without it, the unmount takes longer.
        let reference = mount::reference(&target);
        unmount_all(&target).map_err(failed(id, "unmount its disk"))?;
        let mut state = self.state.lock();
        state.disks.remove(id);
        let _ = files::remove_dir(&target);
        if let Ok(reference) = reference {
            state.teardowns.retain(|thread| !thread.is_finished());
            state.teardowns.push(std::thread::spawn(move || drop(reference)));
        }
        Ok(())
    }

    /// Waits for the threads of [`Mounts::drop_kept`].
    pub(super) fn torn_down(&self) {
        let threads = std::mem::take(&mut self.state.lock().teardowns);
        for thread in threads {
            // It only closes a descriptor.
            let _ = thread.join();
        }
    }

    /// Unmounts kept disks beyond the number that may stay, the oldest first. `held` are the gates that the caller has closed.
    pub(super) fn trim_kept(&self, gates: &Gates, held: Option<&Held>) {
        let beyond = self.kept().into_iter().skip(self.keep.number).map(|(id, _)| id);
        self.unmount_kept(beyond, gates, held);
    }

    /// Unmounts all kept disks but those that are about to be used or removed.
    pub(super) fn let_go(&self, gates: &Gates, held: Option<&Held>) {
        self.unmount_kept(self.kept().into_iter().map(|(id, _)| id), gates, held);
        self.torn_down();
    }

    fn unmount_kept(&self, ids: impl Iterator<Item = LayerId>, gates: &Gates, held: Option<&Held>) {
        for id in ids {
            let own;
            let gate = match held.filter(|held| held.covers(&id).is_ok()) {
                Some(held) => held,
                None => match gates.try_close(&id) {
                    Some(closed) => {
                        own = closed;
                        &own
                    }
                    None => continue,
                },
            };
            // A view may have taken it before its gate was closed.
            debug_assert!(gate.covers(&id).is_ok());
            if self.state.lock().disks.get(&id).is_some_and(|disk| disk.kept.is_some())
                && let Err(error) = self.unmount_disk(&id)
            {
                tracing::warn!(%id, error = %with_causes(&error), "cannot unmount a disk that no view uses");
            }
        }
    }

    /// Unmounts what has been kept for too long, and everything if memory is short.
    fn look(&self, gates: &Gates) {
        if memory_is_short() {
            return self.let_go(gates, None);
        }
        let old = self.kept().into_iter().filter(|(_, since)| since.elapsed() >= self.keep.age);
        self.unmount_kept(old.map(|(id, _)| id), gates, None);
    }

    /// Looks after the kept disks until the home is closed, or another Init has replaced these mounts. Must be called
    /// within a tokio runtime.
    pub(super) fn look_after_kept(self: &Arc<Self>, gates: &Arc<Gates>) {
        async fn looking(mounts: Weak<Mounts>, gates: Arc<Gates>) {
            let pause = mounts.upgrade().map_or(LOOK, |mounts| (mounts.keep.age / 4).min(LOOK));
            loop {
                tokio::time::sleep(pause).await;
                let Some(mounts) = mounts.upgrade() else { return };
                let gates = gates.clone();
                if tokio::task::spawn_blocking(move || mounts.look(&gates)).await.is_err() {
                    return;
                }
            }
        }
        if self.keep.number > 0 {
            tokio::spawn(looking(Arc::downgrade(self), gates.clone()));
        }
    }
}

/// Whether the kernel is about to run out of memory (`proc_meminfo(5)`).
fn memory_is_short() -> bool {
    // Without procfs nothing is known; the kernel reclaims clean pages by itself.
    std::fs::read_to_string("/proc/meminfo").is_ok_and(|text| is_short(&text))
}

fn is_short(meminfo: &str) -> bool {
    let value = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse().ok()
    };
    match (value("MemAvailable"), value("MemTotal")) {
        (Some(available), Some(total)) => available < total / SHORT_OF_MEMORY,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_short_below_a_twentieth() {
        let text =
            |available: u64| format!("MemTotal: 1000000 kB\nMemFree: 1 kB\nMemAvailable:   {available} kB\n");
        assert!(is_short(&text(49_999)));
        assert!(!is_short(&text(50_000)));
        assert!(!is_short(""), "unknown is not short");
    }
}
