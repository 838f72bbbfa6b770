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
//! * Whoever changes what is mounted shows the closed gates of all layers that it touches ([`Held`]), so changes of a
//!   layer are serial; the map's own lock is held for look-ups only.
//! * What could not be unmounted is not forgotten: such a disk counts as held by nobody, and the next Put, Remove, Get
//!   and start try again.
//! * A sandbox that was handed to a virtual machine is never mounted, nor anything that stands on it: the machine may
//!   have written any bytes into it, and the host's kernel would read them.
//! * The kernel's mount table is the truth after a crash: [`Mounts::rebuild`] reads it and counts each merged view that
//!   it finds as held once.
//!
//! All functions block. Called by `lifecycle`, `transfer` and `live` of this module.

use super::{
    DriverError,
    gates::Held,
    sandbox::{UPPER, WORK},
};
use crate::{
    config::OverlayApi,
    error::{Attempt, with_causes},
    store::{LayerId, LayerState, Layout, Member, Snapshot, layout},
};
use lcow_sys::linux::{
    SysError, freeze, idmap,
    loopdev::{self, LoopDevice, LoopSpec, LoopStatus},
    mount::{self, Ext4Options},
    mountinfo,
    overlay::{OverlayMethod, OverlaySpec, is_opaque, mount_overlay},
};
use parking_lot::Mutex;
use rustix::io::Errno;
use std::{
    collections::{HashMap, HashSet},
    fs::{self, File, OpenOptions},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};
use vhd_image::vhd;

#[derive(Debug, Default)]
struct State {
    views: HashMap<LayerId, View>,
    /// Mounted disks and how many views use them; 0 where the unmount failed.
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
    /// Shared by the mounts of one home under one Init after the other.
    state: Arc<Mutex<State>>,
}

/// Makes a [`DriverError::Mount`], for `map_err`.
fn failed(id: &LayerId, action: &'static str) -> impl FnOnce(SysError) -> DriverError {
    let attempt = Attempt::on_layer(action, id);
    move |source| DriverError::Mount(attempt(source))
}

fn method(api: OverlayApi) -> OverlayMethod {
    match api {
        OverlayApi::Auto => OverlayMethod::Auto,
        OverlayApi::New => OverlayMethod::NewApi,
        OverlayApi::Legacy => OverlayMethod::OnePage,
    }
}

impl Mounts {
    pub(super) fn new(layout: Layout, api: OverlayApi, remap: Option<Arc<OwnedFd>>) -> Self {
        Self { layout, method: method(api), remap, state: Arc::default() }
    }

    /// The same mounts, counts included; new ones are made in another way.
    pub(super) fn renewed(&self, api: OverlayApi, remap: Option<Arc<OwnedFd>>) -> Self {
        Self { layout: self.layout.clone(), method: method(api), remap, state: self.state.clone() }
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
    pub(super) fn again(&self, held: &Held, id: &LayerId) -> Result<Option<PathBuf>, DriverError> {
        held.covers(id)?;
        let mut state = self.state.lock();
        let Some(view) = state.views.get_mut(id) else { return Ok(None) };
        view.refs += 1;
        Ok(Some(view.dir.clone()))
    }

    /// Mounts the merged view of `stack` (the layer itself first, then its ancestors) and counts one reference. `xino`
    /// is the store's wish; the layer's own is stronger.
    pub(super) fn mount_view(
        &self,
        gates: &Held,
        stack: &Snapshot,
        label: &str,
        xino: bool,
    ) -> Result<PathBuf, DriverError> {
        let id = stack.id();
        for member in stack.members() {
            gates.covers(&member.layer.id)?;
            if member.meta.handed_out {
                return Err(handed_out(id, &member.layer.id));
            }
        }
        let dir = self.layout.layer_file(id, layout::MERGED);
        create_dir(&dir)?;
        let mut held = HeldDisks { mounts: self, ids: Vec::new() };
        let (mut lowers, mut upper) = (Vec::new(), None);
        for (position, member) in stack.members().enumerate() {
            let place = match member.meta.state {
                // Created and never written: nothing to show.
                LayerState::Created => continue,
                LayerState::Applying => return Err(super::error::unfinished(&member.layer.id)),
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
        let empty = || self.layout.top(layout::MOUNTS).join(layout::EMPTY);
        // Overlayfs needs one lower below an upper, and two without one.
        match (&upper, lowers.len()) {
            (Some(_), 0) | (None, 1) => lowers.push(empty()),
            (None, 0) => {
                return Err(DriverError::Internal(format!("layer {id} has neither an image nor a sandbox")));
            }
            _ => {}
        }
        let spec = OverlaySpec {
            base: self.layout.top(layout::MOUNTS),
            lowers,
            upper,
            context: (!label.is_empty()).then(|| label.to_owned()),
            target: dir.clone(),
            xino: stack.top.meta.xino.unwrap_or(xino),
            read_only: false,
        };
        mount_overlay(&spec, self.method).map_err(failed(id, "mount its merged view"))?;
        let disks = held.keep();
        self.state.lock().views.insert(id.clone(), View { refs: 1, disks, dir: dir.clone() });
        Ok(dir)
    }

    /// One reference less; the last one unmounts. A view that is not mounted is fine.
    ///
    /// # Errors
    /// Something could not be unmounted; it is tried again by the next Put.
    pub(super) fn put_view(&self, held: &Held, id: &LayerId) -> Result<(), DriverError> {
        held.covers(id)?;
        {
            let mut state = self.state.lock();
            if let Some(view) = state.views.get_mut(id)
                && view.refs > 1
            {
                view.refs -= 1;
                return Ok(());
            }
        }
        self.drop_view(held, id)
    }

    /// Unmounts a view whatever its references, or the disk of a layer that an earlier call could not unmount.
    /// Processes that still stand in it keep what they have open.
    pub(super) fn drop_view(&self, held: &Held, id: &LayerId) -> Result<(), DriverError> {
        held.covers(id)?;
        let view = self.state.lock().views.get(id).map(|v| (v.dir.clone(), v.disks.clone()));
        let Some((dir, disks)) = view else { return self.release_stuck(held, id) };
        disks.iter().try_for_each(|disk| held.covers(disk))?;
        unmount(&dir).map_err(failed(id, "unmount its merged view"))?;
        self.state.lock().views.remove(id);
        let mut first = Ok(());
        for disk in &disks {
            let released = self.release_disk(disk);
            first = first.and(released);
        }
        first
    }

    /// Leaves nothing mounted of a layer that is about to be removed, known of or not.
    pub(super) fn clear(&self, held: &Held, id: &LayerId) -> Result<(), DriverError> {
        self.drop_view(held, id)?;
        unmount_all(&self.layout.layer_file(id, layout::MERGED))
            .map_err(failed(id, "unmount its merged view"))?;
        if !self.state.lock().disks.contains_key(id) {
            let disk = self.layout.mount_point(id);
            unmount_all(&disk).map_err(failed(id, "unmount its disk"))?;
            let _ = fs::remove_dir(&disk);
        }
        Ok(())
    }

    /// Disks that no view uses and that could not be unmounted.
    pub(super) fn stuck(&self) -> Vec<LayerId> {
        self.state.lock().disks.iter().filter(|(_, uses)| **uses == 0).map(|(id, _)| id.clone()).collect()
    }

    /// Tries again to unmount a disk that no view uses; others are left as they are.
    pub(super) fn release_stuck(&self, held: &Held, id: &LayerId) -> Result<(), DriverError> {
        held.covers(id)?;
        if self.state.lock().disks.get(id) == Some(&0) { self.release_disk(id) } else { Ok(()) }
    }

    /// Refuses to let a virtual machine have a sandbox that the host's kernel has mounted, or whose loop device lives.
    pub(super) fn refuse_mounted(&self, held: &Held, id: &LayerId) -> Result<(), DriverError> {
        self.release_stuck(held, id)?;
        let path = self.layout.layer_file(id, layout::SANDBOX_FILE);
        let attached = match File::open(&path) {
            Ok(file) => !loopdev::find_by_backing(file.as_fd())
                .map_err(failed(id, "look for its loop device"))?
                .is_empty(),
            // A VHDX: the host never mounts it.
            Err(e) if e.kind() == io::ErrorKind::NotFound => false,
            Err(e) => return Err(DriverError::io("open", path)(e)),
        };
        if attached || self.state.lock().disks.contains_key(id) {
            return Err(DriverError::Usage(format!(
                "layer {id}: the host has its sandbox mounted, so no virtual machine may have it; stop what uses it, and \
                 Put it as often as it was got"
            )));
        }
        Ok(())
    }

    fn acquire_disk(&self, member: &Member) -> Result<(), DriverError> {
        let id = &member.layer.id;
        let target = self.layout.mount_point(id);
        let uses = self.state.lock().disks.get(id).copied();
        match uses {
            None => {}
            Some(0) => match unmount_all(&target) {
                Ok(()) => {
                    self.state.lock().disks.remove(id);
                }
                // It is still mounted whole, so it can be used; of a mapped one only half may be left.
                Err(_) if self.remap.is_none() => {
                    self.state.lock().disks.insert(id.clone(), 1);
                    return Ok(());
                }
                Err(error) => return Err(failed(id, "unmount its disk of before")(error)),
            },
            Some(uses) => {
                self.state.lock().disks.insert(id.clone(), uses + 1);
                return Ok(());
            }
        }
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
                failed(id, "map the ids of its image")(source)
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
        mount::mount_ext4(&device.path, target, options).map_err(failed(id, "mount its sandbox"))?;
        // Its file system may be one that lives on, frozen, after a process that was killed.
        freeze::thaw(target).map_err(|source| {
            let _ = mount::umount(target, true);
            failed(id, "thaw its sandbox")(source)
        })
    }

    /// The one loop device of a sandbox file.
    fn sandbox_device(&self, id: &LayerId, file: &File) -> Result<LoopDevice, DriverError> {
        for found in loopdev::find_by_backing(file.as_fd()).map_err(failed(id, "look for its loop device"))? {
            // Asked again when it is open: meanwhile its number may have become another file's.
            if !found.read_only
                && let Some(device) = LoopDevice::open_bound(found.number, file.as_fd())
                    .map_err(failed(id, "open its loop device"))?
            {
                return Ok(device);
            }
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
        // With userns-remap there is a mapped view on top of the plain one.
        let unmounted = unmount_all(&target).map_err(failed(id, "unmount its disk"));
        let mut state = self.state.lock();
        if unmounted.is_ok() {
            state.disks.remove(id);
            let _ = fs::remove_dir(&target);
        } else {
            state.disks.insert(id.clone(), 0);
        }
        unmounted
    }

    /// Makes the state agree with the kernel's mount table, at a start: views that are mounted count as held once, disks
    /// by the views that use them; disks that none uses are unmounted, and so is what stands where this store mounts and
    /// belongs to no layer; frozen sandboxes are thawed.
    pub(super) fn rebuild(
        &self,
        stack_of: impl Fn(&LayerId) -> Option<Snapshot>,
        known: &[LayerId],
    ) -> Result<(), DriverError> {
        let home =
            fs::canonicalize(self.layout.home()).map_err(DriverError::io("resolve", self.layout.home()))?;
        let table = mountinfo::read().map_err(Attempt::on_path("read the mount table for", &home))?;
        let places: Vec<PathBuf> = table
            .into_iter()
            .filter_map(|m| Some(m.mount_point.strip_prefix(&home).ok()?.to_owned()))
            .collect();
        let mounted: HashSet<PathBuf> = places.iter().cloned().collect();
        self.unmount_strangers(&places, known);
        let is_mounted =
            |path: PathBuf| path.strip_prefix(self.layout.home()).is_ok_and(|p| mounted.contains(p));
        let mut state = State::default();
        for id in known {
            let disk = self.layout.mount_point(id);
            if is_mounted(disk.clone()) {
                state.disks.insert(id.clone(), 0);
                thaw_at_start(id, disk);
            }
        }
        self.thaw_hidden(known, &state.disks);
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
        *self.state.lock() = state;
        for id in unused {
            tracing::info!(%id, "unmounting a disk that no view uses");
            if let Err(error) = self.release_disk(&id) {
                tracing::warn!(%id, error = %with_causes(&error), "cannot unmount a disk");
            }
        }
        Ok(())
    }

    /// Thaws sandboxes whose file systems live on without a mount that this process sees: those of a process that was
    /// killed in a mount namespace of its own while it had them frozen.
    fn thaw_hidden(&self, known: &[LayerId], mounted: &HashMap<LayerId, usize>) {
        use std::os::unix::fs::MetadataExt;
        let bound: HashMap<(u64, u64), LoopStatus> = match loopdev::list() {
            Ok(all) => all.into_iter().map(|s| ((s.backing_dev, s.backing_inode), s)).collect(),
            Err(error) => {
                tracing::warn!(%error, "cannot look for frozen sandboxes");
                return;
            }
        };
        for id in known.iter().filter(|id| !bound.is_empty() && !mounted.contains_key(*id)) {
            let Ok(file) = fs::metadata(self.layout.layer_file(id, layout::SANDBOX_FILE)) else { continue };
            let Some(device) = bound.get(&(file.dev(), file.ino())).filter(|s| !s.read_only) else {
                continue;
            };
            tracing::info!(%id, device = device.number, "a sandbox is in use by nobody that is known; looking whether it is frozen");
            let target = self.layout.mount_point(id);
            // To mount it thaws it.
            let thawed = create_dir(&target)
                .and_then(|()| self.mount_sandbox(id, &target))
                .and_then(|()| mount::umount(&target, true).map_err(failed(id, "unmount its disk")));
            let _ = fs::remove_dir(&target);
            if let Err(error) = thawed {
                tracing::warn!(%id, error = &error as &dyn std::error::Error, "cannot thaw a sandbox");
            }
        }
    }

    /// Unmounts what stands in `mnt/`, in a folder of a layer or on its way out, and belongs to no layer of the store:
    /// a removal that an earlier process could not finish. `places` are below the home, in the order of mounting.
    fn unmount_strangers(&self, places: &[PathBuf], known: &[LayerId]) {
        let ours: HashSet<PathBuf> = known
            .iter()
            .flat_map(|id| [self.layout.mount_point(id), self.layout.layer_file(id, layout::MERGED)])
            .filter_map(|path| Some(path.strip_prefix(self.layout.home()).ok()?.to_owned()))
            .collect();
        let made_here = |place: &Path| {
            place.starts_with(layout::MOUNTS)
                || place.starts_with(layout::STAGING)
                || place.file_name().is_some_and(|name| name == layout::MERGED)
        };
        for place in places.iter().rev().filter(|place| made_here(place) && !ours.contains(*place)) {
            let path = self.layout.home().join(place);
            tracing::warn!(path = %path.display(), "unmounting what belongs to no layer");
            if let Err(error) = unmount(&path) {
                tracing::warn!(path = %path.display(), %error, "cannot unmount it");
            }
        }
    }

    /// Unmounts every view whose layers' gates are closed, for Cleanup; says which were still held.
    pub(super) fn drop_all(&self, held: &Held) -> Vec<(LayerId, u64, Result<(), DriverError>)> {
        let views: Vec<_> = self.state.lock().views.iter().map(|(id, v)| (id.clone(), v.refs)).collect();
        views
            .into_iter()
            .filter(|(id, _)| held.covers(id).is_ok())
            .map(|(id, refs)| {
                let dropped = self.drop_view(held, &id);
                (id, refs, dropped)
            })
            .collect()
    }
}

/// Thaws what an earlier process left frozen; where that fails, a thread goes on trying.
fn thaw_at_start(id: &LayerId, disk: PathBuf) {
    /// Between two series of attempts.
    const PAUSE: std::time::Duration = std::time::Duration::from_secs(5);
    let Err(error) = freeze::thaw(&disk) else { return };
    tracing::error!(%id, %error, "a sandbox cannot be thawed; it is tried again and again");
    let id = id.clone();
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(PAUSE);
            match freeze::thaw(&disk) {
                Ok(()) => break tracing::info!(%id, "thawed"),
                // Unmounted by now.
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => break,
                Err(_) => {}
            }
        }
    });
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
        Err(e) if e.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => mount::umount(target, true),
        // Not a mount point: somebody else has unmounted it.
        Err(e) if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(()),
        other => other,
    }
}

/// Unmounts everything that is mounted at a place, one on top of the other.
fn unmount_all(target: &Path) -> Result<(), SysError> {
    /// A plain and a mapped disk are two; more stands there only if somebody else mounted it.
    const STACKED: usize = 16;
    for _ in 0..STACKED {
        match mount::umount(target, false) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                mount::umount(target, true)?;
            }
            // Nothing is mounted there (any more), or there is no such place.
            Err(e)
                if [Errno::INVAL, Errno::NOENT]
                    .map(|n| Some(n.raw_os_error()))
                    .contains(&e.raw_os_error()) =>
            {
                return Ok(());
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn handed_out(id: &LayerId, culprit: &LayerId) -> DriverError {
    let which = if id == culprit {
        "its sandbox".to_owned()
    } else {
        format!("the sandbox of its ancestor {culprit}")
    };
    DriverError::Usage(format!(
        "layer {id}: {which} was handed to a virtual machine (lcow.mount=none), which may have written anything into it; \
         the host's kernel never mounts it. Use it with lcow.mount=none, or Diff it and apply that to a new layer"
    ))
}

fn create_dir(path: &Path) -> Result<(), DriverError> {
    match fs::create_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(DriverError::io("create", path)(e)),
        _ => Ok(()),
    }
}
