//! Mounts of images, sandboxes and merged views. Linux only.
//!
//! ```text
//!   layer.vhd ──loop, sizelimit──► ext4 ro ─┐ mnt/<short>          counted by the views that use it
//!   layer.vhd ──loop, sizelimit──► ext4 ro ─┤
//!   sandbox.vhd ──loop──► ext4 rw, discard ─┤ mnt/<short>/{upper,work}
//!                                           └─► overlay ──► <id>/merged     counted by Get and Put
//! ```
//!
//! Invariants:
//! * A sandbox file has at most one loop device: before one is attached, the kernel's loop devices are searched for one
//!   that the file already has (a lazy unmount may keep it alive, and two devices of one file would corrupt it).
//! * A caller that changes mounts passes the closed gates of all layers that it touches ([`Held`]), so changes to a
//!   layer are serialized; the map's own lock is held only for lookups.
//! * A disk that no view uses is in the map either because it stays mounted for the next view, or because it could not
//!   be unmounted; `kept` has both.
//! * A sandbox that was handed to a virtual machine is never mounted, and neither are its descendants: the machine may
//!   have written any bytes into it, and the host's kernel would read them.
//! * The kernel's mount table is authoritative after a crash: [`Mounts::rebuild`] reads it and counts each merged view
//!   that it finds as held once.
//! * A disk is thawed before its view and before the disk itself is unmounted, no matter who froze it: a frozen file
//!   system outlives its mounts and keeps its loop device, and the unmount of a view may wait for it. What cannot be
//!   thawed stays mounted.
//!
//! All functions block. Called by `lifecycle`, `transfer` and `live` of this module.

use super::{
    DriverError,
    gates::Held,
    sandbox::{UPPER, WORK},
};
use crate::{
    config::{Options, OverlayApi},
    error::Attempt,
    store::{LayerId, LayerState, Layout, Member, Snapshot, files, layout},
};
use lcow_sys::linux::{
    SysError, freeze, idmap,
    loopdev::{self, LoopDevice, LoopSpec},
    mount::{self, Ext4Options},
    overlay::{OverlayMethod, OverlaySpec, is_opaque, mount_overlay},
};
use parking_lot::Mutex;
use rustix::io::Errno;
use std::{
    collections::{HashMap, HashSet},
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};
use vhd_image::vhd;

/// Which images stay mounted when no view uses them: their next view then finds their files in the page cache, and has
/// nothing to mount but itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Keep {
    /// Most of them; 0 for none (`lcow.mount.keep`).
    pub(super) number: usize,
    /// For how long (`lcow.mount.keepage`).
    pub(super) age: Duration,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) views: HashMap<LayerId, View>,
    /// Mounted disks.
    pub(super) disks: HashMap<LayerId, Disk>,
    /// Sandboxes whose file was made just now and never attached.
    pub(super) fresh: HashSet<LayerId>,
    /// Threads that tear down detached file systems.
    pub(super) teardowns: Vec<JoinHandle<()>>,
}

/// A mounted disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Disk {
    /// How many views use it.
    pub(super) uses: usize,
    /// It is an image, which may stay mounted while no view uses it.
    pub(super) image: bool,
    /// Since when it has been kept mounted for the next view (`kept`); `None` if it is used, or if it could not be
    /// unmounted.
    pub(super) kept: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct View {
    pub(super) refs: u64,
    /// The disks that it holds, each once.
    pub(super) disks: Vec<LayerId>,
    pub(super) dir: PathBuf,
}

/// The mounts of one home.
#[derive(Debug)]
pub(super) struct Mounts {
    pub(super) layout: Layout,
    method: OverlayMethod,
    /// With userns-remap: maps container ids, in which applied layers are stored, to the host's.
    remap: Option<Arc<OwnedFd>>,
    /// Which images stay mounted.
    pub(super) keep: Keep,
    /// Shared by the mounts of one home across successive Inits.
    pub(super) state: Arc<Mutex<State>>,
}

/// Makes a [`DriverError::Mount`], for `map_err`.
pub(super) fn failed(id: &LayerId, action: &'static str) -> impl FnOnce(SysError) -> DriverError {
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
    pub(super) fn new(layout: Layout, options: &Options, remap: Option<Arc<OwnedFd>>) -> Self {
        let (method, keep) =
            (method(options.overlay_api), Keep { number: options.keep_mounts, age: options.keep_age });
        Self { layout, method, remap, keep, state: Arc::default() }
    }

    /// The same mounts, counts included; new ones use these settings.
    pub(super) fn renewed(&self, options: &Options, remap: Option<Arc<OwnedFd>>) -> Self {
        Self { state: self.state.clone(), ..Self::new(self.layout.clone(), options, remap) }
    }

    /// The kernel interface of overlay mounts.
    pub(super) fn method(&self) -> OverlayMethod {
        self.method
    }

    /// Numbers of merged views, of disks that views use, and of images that stay mounted for the next view.
    pub(super) fn counts(&self) -> (u64, u64, u64) {
        let state = self.state.lock();
        let kept = state.disks.values().filter(|disk| disk.kept.is_some()).count() as u64;
        (state.views.len() as u64, state.disks.len() as u64 - kept, kept)
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
    /// is the store's default; the layer's own setting takes precedence.
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
                    // Overlayfs merges the roots of its layers even where one is opaque, so the stack ends here
                    // instead.
                    let last = is_opaque(&place).map_err(failed(&member.layer.id, "inspect its root"))?;
                    lowers.push(place);
                    if last {
                        break;
                    }
                }
            }
        }
        let empty = || self.layout.top(layout::MOUNTS).join(layout::EMPTY);
        // Overlayfs needs one lower with an upper, and two without one.
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

    /// Drops one reference; the last one unmounts. It is not an error if the view is not mounted.
    ///
    /// # Errors
    /// A view or a disk could not be unmounted; the next Put tries again.
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

    /// Unmounts a view regardless of its references, or the disk of a layer that an earlier call could not unmount.
    /// Processes that still use it keep what they have open.
    pub(super) fn drop_view(&self, held: &Held, id: &LayerId) -> Result<(), DriverError> {
        held.covers(id)?;
        let view = self.state.lock().views.get(id).map(|v| (v.dir.clone(), v.disks.clone()));
        let Some((dir, disks)) = view else { return self.release_stuck(held, id) };
        disks.iter().try_for_each(|disk| held.covers(disk))?;
        disks.iter().try_for_each(|disk| self.thaw_disk(disk))?;
        unmount(&dir).map_err(failed(id, "unmount its merged view"))?;
        self.state.lock().views.remove(id);
        let mut first = Ok(());
        for disk in &disks {
            let released = self.release_disk(disk);
            first = first.and(released);
        }
        first
    }

    /// Unmounts and thaws everything of a layer that is about to be removed, recorded or not: once its file is deleted,
    /// only the next start would find its loop device.
    pub(super) fn clear(&self, held: &Held, id: &LayerId) -> Result<(), DriverError> {
        self.drop_view(held, id)?;
        self.drop_kept(held, id)?;
        self.thaw_disk(id)?;
        unmount_all(&self.layout.layer_file(id, layout::MERGED))
            .map_err(failed(id, "unmount its merged view"))?;
        if !self.state.lock().disks.contains_key(id) {
            let disk = self.layout.mount_point(id);
            unmount_all(&disk).map_err(failed(id, "unmount its disk"))?;
            let _ = files::remove_dir(&disk);
        }
        self.free_hidden(held, id)
    }

    /// Thaws the disk of a layer if it is mounted, no matter who froze it. While the layer's gate is closed, it was not
    /// this process.
    pub(super) fn thaw_disk(&self, id: &LayerId) -> Result<(), DriverError> {
        freeze::thaw(&self.layout.mount_point(id)).map_err(failed(id, "thaw its disk before the unmount"))
    }

    /// Refuses to hand a sandbox to a virtual machine while the host has it mounted, or while it has a loop device.
    pub(super) fn refuse_mounted(&self, held: &Held, id: &LayerId) -> Result<(), DriverError> {
        self.release_stuck(held, id)?;
        let refused = || {
            DriverError::Usage(format!(
                "layer {id}: its sandbox is mounted on the host, so it cannot be handed to a virtual machine; stop what uses \
                 it, and Put it as often as Get was called"
            ))
        };
        if self.state.lock().disks.contains_key(id) {
            return Err(refused());
        }
        self.free_hidden(held, id)?;
        let path = self.layout.layer_file(id, layout::SANDBOX_FILE);
        let attached = match File::open(&path) {
            Ok(file) => !loopdev::find_by_backing(file.as_fd())
                .map_err(failed(id, "look for its loop device"))?
                .is_empty(),
            // A VHDX: the host never mounts it.
            Err(e) if e.kind() == io::ErrorKind::NotFound => false,
            Err(e) => return Err(DriverError::io("open", path)(e)),
        };
        if attached { Err(refused()) } else { Ok(()) }
    }

    /// Mounts the disk of a layer, or counts one more use of it.
    pub(super) fn acquire_disk(&self, member: &Member) -> Result<(), DriverError> {
        let id = member.disk_id();
        let target = self.layout.mount_point(id);
        let image = member.meta.state == LayerState::Applied;
        let used = |uses| Disk { uses, image, kept: None };
        let found = self.state.lock().disks.get(id).copied();
        match found {
            None => {}
            Some(Disk { uses: 0, kept: Some(_), .. }) if is_mounted(&target) => {
                self.state.lock().disks.insert(id.clone(), used(1));
                return Ok(());
            }
            Some(Disk { uses: 0, .. }) => {
                self.thaw_disk(id)?;
                match unmount_all(&target) {
                    Ok(()) => {
                        self.state.lock().disks.remove(id);
                    }
                    // It is still fully mounted, so it can be used; of an id-mapped disk, only one of two mounts may be
                    // left.
                    Err(_) if self.remap.is_none() => {
                        self.state.lock().disks.insert(id.clone(), used(1));
                        return Ok(());
                    }
                    Err(error) => return Err(failed(id, "unmount its disk, which no view uses")(error)),
                }
            }
            Some(Disk { uses, .. }) => {
                self.state.lock().disks.insert(id.clone(), used(uses + 1));
                return Ok(());
            }
        }
        self.mount_again(member)?;
        self.state.lock().disks.insert(id.clone(), used(1));
        Ok(())
    }

    /// Mounts the disk of a layer, whatever its count says.
    pub(super) fn mount_again(&self, member: &Member) -> Result<(), DriverError> {
        let target = self.layout.mount_point(member.disk_id());
        create_dir(&target)?;
        match member.meta.state {
            LayerState::Applied => self.mount_image(member, &target),
            _ => self.mount_sandbox(&member.layer.id, &target),
        }
    }

    fn mount_image(&self, member: &Member, target: &Path) -> Result<(), DriverError> {
        let (id, disk) = (&member.layer.id, member.disk_id());
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
            name: self.device_name(disk)?,
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
            // The id-mapped mount is on top of the plain one, at the same place; the unmount removes both.
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
        let (device, known) = self.sandbox_device(id, &file)?;
        let options =
            Ext4Options { noatime: true, nodev: true, nosuid: true, discard: true, ..Ext4Options::default() };
        mount::mount_ext4(&device.path, target, options).map_err(failed(id, "mount its sandbox"))?;
        // The file system may have been left frozen by a process that was killed.
        freeze::thaw(target).map_err(|source| {
            let _ = mount::umount(target, true);
            failed(id, "thaw its sandbox")(source)
        })?;
        if known { takes_writes(target) } else { Ok(()) }
    }

    /// The sandbox of `id` was made just now, under an id that is never used again: its file can have no loop device, and
    /// the search for one, which takes longer than the mount, is left out at its first mount.
    pub(super) fn note_fresh(&self, id: &LayerId) {
        self.state.lock().fresh.insert(id.clone());
    }

    /// The one loop device of a sandbox file, and whether it was there already.
    fn sandbox_device(&self, id: &LayerId, file: &File) -> Result<(LoopDevice, bool), DriverError> {
        let fresh = self.state.lock().fresh.remove(id);
        let known = if fresh {
            Vec::new()
        } else {
            loopdev::find_by_backing(file.as_fd()).map_err(failed(id, "look for its loop device"))?
        };
        for found in known {
            // Checked again once it is open: its number may meanwhile belong to another file.
            if !found.read_only
                && let Some(device) = LoopDevice::open_bound(found.number, file.as_fd())
                    .map_err(failed(id, "open its loop device"))?
            {
                return Ok((device, true));
            }
        }
        let length = file.metadata().map_err(DriverError::io("measure", self.layout.layer(id)))?.len();
        let spec = LoopSpec {
            sizelimit: length.saturating_sub(vhd::FOOTER_SIZE as u64),
            autoclear: true,
            name: self.device_name(id)?,
            ..LoopSpec::default()
        };
        loopdev::attach(file.as_fd(), &spec)
            .map(|device| (device, false))
            .map_err(failed(id, "attach its sandbox"))
    }

    /// Unmounts every view whose layers' gates are closed, for Cleanup; returns the references that each still had.
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

/// Disks acquired for a view that is being mounted; released on drop unless kept.
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

/// Refuses a sandbox whose file system has stopped after an error: a mount namespace that copied its mount has kept it
/// alive since, and the kernel mounts the same file system again, read-only at its first write.
fn takes_writes(target: &Path) -> Result<(), DriverError> {
    /// What cannot be done, and what to do.
    const ACTION: &str = "write to a sandbox that stopped after an error and that another mount namespace keeps mounted \
                          (end the processes there), at";
    let written = File::open(target).and_then(|root| root.set_modified(SystemTime::now()));
    written.map_err(|source| {
        let _ = mount::umount(target, true);
        DriverError::io(ACTION, target)(source)
    })
}

/// Unmounts; a mount that is still in use leaves its path now, and goes away with its last user.
pub(super) fn unmount(target: &Path) -> Result<(), SysError> {
    match mount::umount(target, false) {
        Err(e) if e.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => mount::umount(target, true),
        // Not a mount point: it was unmounted from outside.
        Err(e) if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(()),
        other => other,
    }
}

/// Whether something is mounted at `place`.
pub(super) fn is_mounted(place: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|m| m.dev()).ok();
    match (device(place), place.parent().and_then(device)) {
        (Some(own), Some(above)) => own != above,
        _ => false,
    }
}

/// Unmounts everything that is mounted at a place, one on top of the other.
pub(super) fn unmount_all(target: &Path) -> Result<(), SysError> {
    /// A plain and an id-mapped disk are two; there are more only if they were mounted from outside.
    const STACKED: usize = 16;
    for _ in 0..STACKED {
        match mount::umount(target, false) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                mount::umount(target, true)?;
            }
            // Nothing is mounted there, or the path does not exist.
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
        "layer {id}: {which} was handed to a virtual machine (lcow.mount=none), which may have written anything into it, \
         so the host never mounts it; use it with lcow.mount=none, or Diff it and apply the tar to a new layer"
    ))
}

pub(super) fn create_dir(path: &Path) -> Result<(), DriverError> {
    match files::create_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(DriverError::io("create", path)(e)),
        _ => Ok(()),
    }
}
