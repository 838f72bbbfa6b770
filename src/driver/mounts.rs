//! What is mounted: images, sandboxes, merged views. Linux only.
//!
//! ```text
//!   layer.vhd ──loop, sizelimit──► ext4 ro ─┐ mnt/<short>          counted by the views that use it
//!   layer.vhd ──loop, sizelimit──► ext4 ro ─┤
//!   sandbox.vhd ──loop──► ext4 rw, discard ─┤ mnt/<short>/{upper,work}
//!                                           └─► overlay ──► <id>/merged     counted by Get and Put
//! ```
//!
//! Invariants:
//! * A sandbox file has at most one loop device: before one is attached, the kernel is asked whether the file has one
//!   already (a lazy unmount may keep it alive, and two devices of one file would corrupt it).
//! * Callers hold the gates of all layers that they name, so per-layer state changes are serial; the map's own lock is
//!   held only for look-ups.
//! * The kernel's mount table is the truth after a crash: [`Mounts::rebuild`] reads it and counts each merged view that
//!   it finds as held once.
//!
//! All functions block. Called by `lifecycle`, `transfer` and `live` of this module.

use super::{
    DriverError,
    views::{UPPER, WORK},
};
use crate::{
    config::OverlayApi,
    store::{LayerId, LayerState, Layout, Member, Snapshot, layout},
    sys::linux::{
        SysError, idmap,
        loopdev::{self, LoopDevice, LoopSpec},
        mount::{self, Ext4Options},
        mountinfo,
        overlay::{OverlayMethod, OverlaySpec, is_opaque, mount_overlay},
    },
    vhd,
};
use parking_lot::Mutex;
use std::{
    collections::{HashMap, HashSet},
    fs::{self, File, OpenOptions},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

#[derive(Debug, Default)]
struct State {
    views: HashMap<LayerId, View>,
    disks: HashMap<LayerId, usize>,
}

#[derive(Debug)]
struct View {
    refs: u64,
    /// The disks that it holds, each once.
    disks: Vec<LayerId>,
    dir: PathBuf,
}

/// The mounts of one home.
#[derive(Debug)]
pub(super) struct Mounts {
    layout: Layout,
    method: OverlayMethod,
    /// With userns-remap: maps container ids, in which applied layers are stored, to the host's.
    remap: Option<Arc<OwnedFd>>,
    state: Mutex<State>,
}

fn failed(id: &LayerId, action: &'static str) -> impl FnOnce(SysError) -> DriverError {
    let id = id.to_string();
    move |source| DriverError::Mount { id, action, source }
}

impl Mounts {
    pub(super) fn new(layout: Layout, api: OverlayApi, remap: Option<Arc<OwnedFd>>) -> Self {
        let method = match api {
            OverlayApi::Auto => OverlayMethod::Auto,
            OverlayApi::New => OverlayMethod::NewApi,
            OverlayApi::Legacy => OverlayMethod::OnePage,
        };
        Self { layout, method, remap, state: Mutex::default() }
    }

    /// Number of merged views and of mounted disks.
    pub(super) fn counts(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.views.len() as u64, state.disks.len() as u64)
    }

    /// References to a merged view; 0 if it is not mounted.
    pub(super) fn references(&self, id: &LayerId) -> u64 {
        self.state.lock().views.get(id).map_or(0, |v| v.refs)
    }

    /// The layers whose disks the view of `id` holds.
    pub(super) fn disks_of(&self, id: &LayerId) -> Vec<LayerId> {
        self.state.lock().views.get(id).map(|v| v.disks.clone()).unwrap_or_default()
    }

    /// Where the disk of a layer is mounted, if it is.
    pub(super) fn disk_dir(&self, id: &LayerId) -> Option<PathBuf> {
        self.state.lock().disks.contains_key(id).then(|| self.layout.mount_point(id))
    }

    /// One more reference to a mounted view.
    pub(super) fn again(&self, id: &LayerId) -> Option<PathBuf> {
        let mut state = self.state.lock();
        let view = state.views.get_mut(id)?;
        view.refs += 1;
        Some(view.dir.clone())
    }

    /// Mounts the merged view of `stack` (the layer itself first, then its ancestors) and counts one reference.
    pub(super) fn mount_view(&self, stack: &Snapshot, label: &str) -> Result<PathBuf, DriverError> {
        let id = stack.id();
        let dir = self.layout.layer_file(id, layout::MERGED);
        create_dir(&dir)?;
        let mut held = HeldDisks { mounts: self, ids: Vec::new() };
        let (mut lowers, mut upper) = (Vec::new(), None);
        for (position, member) in stack.members().enumerate() {
            let place = match member.meta.state {
                // Created and never written: nothing to show.
                LayerState::Created => continue,
                LayerState::Applying => return Err(super::views::unfinished(&member.layer.id)),
                LayerState::Applied | LayerState::Sandbox => {
                    held.take(member)?;
                    self.layout.mount_point(&member.layer.id)
                }
            };
            match (member.meta.state, position) {
                (LayerState::Sandbox, 0) => upper = Some((place.join(UPPER), place.join(WORK))),
                (LayerState::Sandbox, _) => lowers.push(place.join(UPPER)),
                _ => {
                    // Overlayfs joins the roots of its layers whatever they say: the stack ends here instead.
                    let last = is_opaque(&place).map_err(failed(&member.layer.id, "look at its root"))?;
                    lowers.push(place);
                    if last {
                        break;
                    }
                }
            }
        }
        // Overlayfs wants one lower below an upper, and two without one.
        while lowers.len() < if upper.is_some() { 1 } else { 2 } {
            lowers.push(self.layout.top(layout::MOUNTS).join(layout::EMPTY));
            if upper.is_none() && lowers.len() == 1 {
                break;
            }
        }
        if let (None, [only]) = (&upper, &lowers[..]) {
            mount::bind(only, &dir).map_err(failed(id, "mount its view"))?;
        } else {
            let spec = OverlaySpec {
                base: self.layout.top(layout::MOUNTS),
                lowers,
                upper,
                context: (!label.is_empty()).then(|| label.to_owned()),
                target: dir.clone(),
                read_only: false,
            };
            mount_overlay(&spec, self.method).map_err(failed(id, "mount its merged view"))?;
        }
        let disks = held.keep();
        self.state.lock().views.insert(id.clone(), View { refs: 1, disks, dir: dir.clone() });
        Ok(dir)
    }

    /// One reference less; the last one unmounts. A view that is not mounted is fine.
    pub(super) fn put_view(&self, id: &LayerId) -> Result<(), DriverError> {
        {
            let mut state = self.state.lock();
            let Some(view) = state.views.get_mut(id) else { return Ok(()) };
            if view.refs > 1 {
                view.refs -= 1;
                return Ok(());
            }
        }
        self.drop_view(id)
    }

    /// Unmounts a view whatever its references. Processes that still stand in it keep what they have open.
    pub(super) fn drop_view(&self, id: &LayerId) -> Result<(), DriverError> {
        let Some((dir, disks)) = self.state.lock().views.get(id).map(|v| (v.dir.clone(), v.disks.clone()))
        else {
            return Ok(());
        };
        unmount(&dir).map_err(failed(id, "unmount its merged view"))?;
        self.state.lock().views.remove(id);
        let mut first = Ok(());
        for disk in &disks {
            let released = self.release_disk(disk);
            first = first.and(released);
        }
        first
    }

    fn acquire_disk(&self, member: &Member) -> Result<(), DriverError> {
        let id = &member.layer.id;
        if let Some(uses) = self.state.lock().disks.get_mut(id) {
            *uses += 1;
            return Ok(());
        }
        let target = self.layout.mount_point(id);
        create_dir(&target)?;
        match member.meta.state {
            LayerState::Applied => self.mount_image(member, &target)?,
            _ => self.mount_sandbox(id, &target)?,
        }
        self.state.lock().disks.insert(id.clone(), 1);
        Ok(())
    }

    fn mount_image(&self, member: &Member, target: &Path) -> Result<(), DriverError> {
        let id = &member.layer.id;
        let applied = member.meta.applied.as_ref().filter(|a| a.checked).ok_or_else(|| {
            DriverError::Usage(format!(
                "layer {id}: its image was never checked, so it is not mounted; remove it and pull it again"
            ))
        })?;
        let path = self.layout.layer_file(id, layout::LAYER_FILE);
        let file = File::open(&path).map_err(DriverError::io("open", &path))?;
        let spec = LoopSpec {
            sizelimit: applied.image_bytes,
            read_only: true,
            autoclear: true,
            name: id.to_string(),
            ..LoopSpec::default()
        };
        let device = loopdev::attach(file.as_fd(), &spec).map_err(failed(id, "attach its image"))?;
        let options = Ext4Options {
            read_only: true,
            noatime: true,
            nodev: true,
            nosuid: true,
            ..Ext4Options::default()
        };
        mount::mount_ext4(&device.path, target, options).map_err(failed(id, "mount its image"))?;
        if let Some(namespace) = &self.remap {
            // The mapped view lies on top of the plain one, at the same place; both go at the unmount.
            idmap::mount_idmapped(target, target, namespace, true).map_err(|source| {
                let _ = mount::umount(target, true);
                DriverError::Mount { id: id.to_string(), action: "map the ids of its image", source }
            })?;
        }
        Ok(())
    }

    fn mount_sandbox(&self, id: &LayerId, target: &Path) -> Result<(), DriverError> {
        let path = self.layout.layer_file(id, layout::SANDBOX_FILE);
        let file =
            OpenOptions::new().read(true).write(true).open(&path).map_err(DriverError::io("open", &path))?;
        let device = self.sandbox_device(id, &file)?;
        let options =
            Ext4Options { noatime: true, nodev: true, nosuid: true, discard: true, ..Ext4Options::default() };
        mount::mount_ext4(&device.path, target, options).map_err(failed(id, "mount its sandbox"))
    }

    /// The one loop device of a sandbox file.
    fn sandbox_device(&self, id: &LayerId, file: &File) -> Result<LoopDevice, DriverError> {
        let attached =
            loopdev::find_by_backing(file.as_fd()).map_err(failed(id, "look for its loop device"))?;
        if let Some(found) = attached.iter().find(|s| !s.read_only) {
            return LoopDevice::open(found.number).map_err(failed(id, "open its loop device"));
        }
        let length = file.metadata().map_err(DriverError::io("measure", self.layout.layer(id)))?.len();
        let spec = LoopSpec {
            sizelimit: length.saturating_sub(vhd::FOOTER_SIZE as u64),
            autoclear: true,
            name: id.to_string(),
            ..LoopSpec::default()
        };
        loopdev::attach(file.as_fd(), &spec).map_err(failed(id, "attach its sandbox"))
    }

    fn release_disk(&self, id: &LayerId) -> Result<(), DriverError> {
        {
            let mut state = self.state.lock();
            match state.disks.get_mut(id) {
                Some(uses) if *uses > 1 => {
                    *uses -= 1;
                    return Ok(());
                }
                Some(_) => {}
                None => return Ok(()),
            }
        }
        let target = self.layout.mount_point(id);
        self.unmount_disk(&target).map_err(failed(id, "unmount its disk"))?;
        self.state.lock().disks.remove(id);
        let _ = fs::remove_dir(&target);
        Ok(())
    }

    /// Unmounts a disk: with userns-remap there may be a mapped view on top of the plain one.
    fn unmount_disk(&self, target: &Path) -> Result<(), SysError> {
        if self.remap.is_some() {
            unmount(target)?;
        }
        unmount(target)
    }

    /// Makes the state agree with the kernel's mount table: views that are mounted count as held once, disks by the
    /// views that use them; disks that none uses are unmounted; frozen sandboxes are thawed.
    pub(super) fn rebuild(
        &self,
        stack_of: impl Fn(&LayerId) -> Option<Snapshot>,
        known: &[LayerId],
    ) -> Result<(), DriverError> {
        let home =
            fs::canonicalize(self.layout.home()).map_err(DriverError::io("resolve", self.layout.home()))?;
        let table = mountinfo::read().map_err(|source| DriverError::Mount {
            id: home.display().to_string(),
            action: "read the mount table",
            source,
        })?;
        let mounted: HashSet<PathBuf> = table
            .into_iter()
            .filter_map(|m| Some(m.mount_point.strip_prefix(&home).ok()?.to_owned()))
            .collect();
        let is_mounted =
            |path: PathBuf| path.strip_prefix(self.layout.home()).is_ok_and(|p| mounted.contains(p));
        let mut state = State::default();
        for id in known {
            let disk = self.layout.mount_point(id);
            if is_mounted(disk.clone()) {
                state.disks.insert(id.clone(), 0);
                if let Err(error) = mount::thaw(&disk) {
                    tracing::warn!(%id, %error, "cannot thaw a sandbox");
                }
            }
        }
        for id in known {
            let dir = self.layout.layer_file(id, layout::MERGED);
            if !is_mounted(dir.clone()) {
                continue;
            }
            let mut disks = Vec::new();
            for member in stack_of(id).iter().flat_map(Snapshot::members) {
                if let Some(uses) = state.disks.get_mut(&member.layer.id) {
                    *uses += 1;
                    disks.push(member.layer.id.clone());
                    // As at its Get: a view holds nothing below a layer that hides all.
                    let place = self.layout.mount_point(&member.layer.id);
                    if member.meta.state == LayerState::Applied && is_opaque(&place).unwrap_or(false) {
                        break;
                    }
                }
            }
            tracing::info!(%id, "found a mounted view of an earlier process; it counts as held once");
            state.views.insert(id.clone(), View { refs: 1, disks, dir });
        }
        let unused: Vec<LayerId> =
            state.disks.iter().filter(|(_, n)| **n == 0).map(|(id, _)| id.clone()).collect();
        for id in &unused {
            state.disks.remove(id);
        }
        *self.state.lock() = state;
        for id in unused {
            tracing::info!(%id, "unmounting a disk that no view uses");
            if let Err(error) = self.unmount_disk(&self.layout.mount_point(&id)) {
                tracing::warn!(%id, %error, "cannot unmount a disk");
            }
        }
        Ok(())
    }

    /// Unmounts every view, for Cleanup; says which were still held.
    pub(super) fn drop_all(&self) -> Vec<(LayerId, u64, Result<(), DriverError>)> {
        let held: Vec<_> = self.state.lock().views.iter().map(|(id, v)| (id.clone(), v.refs)).collect();
        held.into_iter()
            .map(|(id, refs)| {
                let dropped = self.drop_view(&id);
                (id, refs, dropped)
            })
            .collect()
    }
}

/// Disks taken for a view that is being made; given back on drop unless kept.
struct HeldDisks<'a> {
    mounts: &'a Mounts,
    ids: Vec<LayerId>,
}

impl HeldDisks<'_> {
    fn take(&mut self, member: &Member) -> Result<(), DriverError> {
        self.mounts.acquire_disk(member)?;
        self.ids.push(member.layer.id.clone());
        Ok(())
    }

    fn keep(mut self) -> Vec<LayerId> {
        std::mem::take(&mut self.ids)
    }
}

impl Drop for HeldDisks<'_> {
    fn drop(&mut self) {
        for id in &self.ids {
            if let Err(error) = self.mounts.release_disk(id) {
                tracing::warn!(%id, %error, "cannot unmount after a failure");
            }
        }
    }
}

/// Unmounts; where something still stands in it the name goes now and the rest when the last user leaves.
fn unmount(target: &Path) -> Result<(), SysError> {
    match mount::umount(target, false) {
        Err(e) if e.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {
            mount::umount(target, true)
        }
        // Not a mount point: somebody else has unmounted it.
        Err(e) if e.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => Ok(()),
        other => other,
    }
}

fn create_dir(path: &Path) -> Result<(), DriverError> {
    match fs::create_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(DriverError::io("create", path)(e)),
        _ => Ok(()),
    }
}
