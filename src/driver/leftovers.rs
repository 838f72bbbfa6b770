//! Cleans up what an earlier process left mounted, attached or frozen. Linux only.
//!
//! ```text
//!   start ─► mount table ─► disks of the store ─► thaw ─► views count as held once, disks without a view are kept or unmounted
//!        │               └► what belongs to no layer ─► thaw ─► unmount
//!        └─► loop devices of this home that have no mount here ─► thaw, which releases them  (hidden)
//!   Remove, and whatever else deletes a sandbox's file ─► the same for that file's loop devices
//! ```
//!
//! A frozen file system outlives its mounts: the freeze itself keeps it alive, and with it its loop device. So if the
//! process is killed while a sandbox is frozen, and then the mount namespace ends or the sandbox is lazily unmounted, a
//! file system remains that no mount table shows; the file behind it may be deleted as well. It is reached through its
//! loop device: mounting that inside the home gives the same file system again, which can be thawed.
//!
//! Invariants:
//! * A loop device belongs to this home if it carries the home's mark, which only the home's owner sets
//!   ([`Mounts::mark`]), and its file is on the home's device. Others are never touched, whatever the path of their
//!   file looks like: it may be a path in another mount namespace.
//! * What a layer of the store may have frozen is thawed under that layer's closed gate; at the start, there are no
//!   other users.
//! * What cannot be thawed is tried again, by a thread until it succeeds, and by Remove, which fails rather than losing
//!   track of it.
//!
//! All functions block. Called by `home` and `mounts`.

use super::{
    DriverError,
    gates::{Gates, Held},
    mounts::{Disk, Mounts, State, View, create_dir, failed, unmount},
};
use crate::{
    error::{Attempt, with_causes},
    store::{LayerId, LayerState, Layout, Snapshot, files, layout},
};
use lcow_sys::linux::{
    SysError, freeze,
    loopdev::{self, LoopDevice, LoopStatus},
    mount::{self, Ext4Options},
    mountinfo,
    overlay::is_opaque,
};
use rustix::io::Errno;
use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

/// Time between two attempts to thaw what could not be thawed at the start.
const PAUSE: Duration = Duration::from_secs(5);

/// What could not be thawed at the start.
#[derive(Debug)]
enum Frozen {
    /// The mounted disk of a layer.
    Disk(LayerId),
    /// A file system without a mount, by its loop device; with the layer whose file it is, if that layer exists.
    Hidden(LoopStatus, Option<LayerId>),
}

/// What [`Mounts::rebuild`] could not thaw.
#[derive(Debug, Default)]
#[must_use = "it stays frozen until it is tried again"]
pub(super) struct StillFrozen(Vec<Frozen>);

impl StillFrozen {
    /// Retries in a thread until nothing is left.
    pub(super) fn thaw_later(mut self, mounts: Arc<Mounts>, gates: Arc<Gates>) {
        if self.0.is_empty() {
            return;
        }
        std::thread::spawn(move || {
            while !self.0.is_empty() {
                std::thread::sleep(PAUSE);
                self.0.retain(|one| !mounts.thaw_again(one, &gates));
            }
            tracing::info!("everything that an earlier process left frozen is thawed");
        });
    }
}

/// What is mounted in a home.
#[derive(Debug, Default)]
struct Table {
    /// Mount points relative to the home, in the order of mounting.
    places: Vec<PathBuf>,
    /// The same, for look-ups.
    mounted: HashSet<PathBuf>,
    /// Device numbers of what is mounted.
    devices: HashSet<(u32, u32)>,
}

impl Table {
    fn is_mounted(&self, layout: &Layout, path: &Path) -> bool {
        path.strip_prefix(layout.home()).is_ok_and(|place| self.mounted.contains(place))
    }
}

/// A disk that was found mounted.
fn unused(image: bool) -> Disk {
    Disk { uses: 0, image, kept: None }
}

impl Mounts {
    /// The mark of this home's loop devices: the inode number of the home's directory. Two homes on one device have
    /// different marks.
    fn mark(&self) -> Result<(u64, String), DriverError> {
        let home =
            fs::metadata(self.layout.home()).map_err(DriverError::io("look at", self.layout.home()))?;
        Ok((home.dev(), format!("lcow:{:x}:", home.ino())))
    }

    /// The name of a layer's loop device: the mark, and the name of its place in `mnt/`.
    pub(super) fn device_name(&self, id: &LayerId) -> Result<String, DriverError> {
        Ok(self.mark()?.1 + &self.layout.place(id))
    }

    /// Makes the state agree with the kernel's mount table, at a start. Mounted views count as held once, disks by the
    /// views that use them. Disks that no view uses are unmounted, apart from images that may stay mounted, and so are
    /// mounts at the places of this store that belong to no layer. What is frozen is thawed, mounted or not.
    pub(super) fn rebuild(
        &self,
        stack_of: impl Fn(&LayerId) -> Option<Snapshot>,
        known: &[LayerId],
    ) -> Result<StillFrozen, DriverError> {
        let table = self.table()?;
        let is_mounted = |path: PathBuf| table.is_mounted(&self.layout, &path);
        let (mut state, mut frozen) = (State::default(), StillFrozen::default());
        for id in known.iter().filter(|id| is_mounted(self.layout.mount_point(id))) {
            let image = stack_of(id).is_some_and(|stack| stack.top.meta.state == LayerState::Applied);
            state.disks.insert(id.clone(), unused(image));
            frozen.0.extend(self.thaw_found(id));
        }
        self.unmount_strangers(&table.places, known);
        frozen.0.extend(self.thaw_hidden(&table.devices, known));
        for id in known {
            let dir = self.layout.layer_file(id, layout::MERGED);
            if !is_mounted(dir.clone()) {
                continue;
            }
            let mut disks = Vec::new();
            for member in stack_of(id).iter().flat_map(Snapshot::members) {
                if let Some(disk) = state.disks.get_mut(&member.layer.id) {
                    disk.uses += 1;
                    disks.push(member.layer.id.clone());
                    // As in Get: a view uses no disks below a layer whose root is opaque.
                    let place = self.layout.mount_point(&member.layer.id);
                    if member.meta.state == LayerState::Applied && is_opaque(&place).unwrap_or(false) {
                        break;
                    }
                }
            }
            tracing::info!(%id, "found a mounted view of an earlier process; it counts as held once");
            state.views.insert(id.clone(), View { refs: 1, disks, dir });
        }
        self.adopt(state);
        Ok(frozen)
    }

    /// What is mounted in the home.
    fn table(&self) -> Result<Table, DriverError> {
        let home =
            fs::canonicalize(self.layout.home()).map_err(DriverError::io("resolve", self.layout.home()))?;
        let entries = mountinfo::read().map_err(Attempt::on_path("read the mount table for", &home))?;
        let mut table = Table::default();
        for entry in entries {
            if let Ok(place) = entry.mount_point.strip_prefix(&home) {
                table.places.push(place.to_owned());
                table.mounted.insert(place.to_owned());
                table.devices.insert((entry.major, entry.minor));
            }
        }
        Ok(table)
    }

    /// Thaws a disk that was found mounted; returns it if that failed.
    fn thaw_found(&self, id: &LayerId) -> Option<Frozen> {
        let error = self.thaw_disk(id).err()?;
        tracing::error!(%id, error = %with_causes(&error), "a sandbox cannot be thawed; retrying until it succeeds");
        Some(Frozen::Disk(id.clone()))
    }

    /// Makes `state` the current one. Of the disks in it that nothing uses, images stay mounted if they may; others are
    /// unmounted.
    fn adopt(&self, mut state: State) {
        let mut unused = Vec::new();
        for (id, disk) in state.disks.iter_mut().filter(|(_, disk)| disk.uses == 0) {
            if disk.image && self.keep.number > 0 {
                disk.kept = Some(Instant::now());
            } else {
                unused.push(id.clone());
            }
        }
        *self.state.lock() = state;
        for id in unused {
            tracing::info!(%id, "unmounting a disk that nothing uses");
            if let Err(error) = self.release_disk(&id) {
                tracing::warn!(%id, error = %with_causes(&error), "cannot unmount a disk");
            }
        }
        self.remove_places();
    }

    /// As [`Mounts::rebuild`], for a store of snapshots, which has no merged views. `take_over` gets a test for whether a
    /// disk is mounted, and returns each disk as often as it is held; others of `disks`, each with whether it is an image,
    /// are unmounted, or kept.
    pub(super) fn rebuild_snapshots(
        &self,
        disks: &[(LayerId, bool)],
        take_over: impl FnOnce(&dyn Fn(&LayerId) -> bool) -> Vec<LayerId>,
    ) -> Result<StillFrozen, DriverError> {
        let table = self.table()?;
        let mut frozen = StillFrozen::default();
        let mut state = State::default();
        for (id, image) in disks {
            if table.is_mounted(&self.layout, &self.layout.mount_point(id)) {
                state.disks.insert(id.clone(), unused(*image));
                frozen.0.extend(self.thaw_found(id));
            }
        }
        let known: Vec<LayerId> = disks.iter().map(|(id, _)| id.clone()).collect();
        self.unmount_strangers(&table.places, &known);
        frozen.0.extend(self.thaw_hidden(&table.devices, &known));
        for id in take_over(&|id| state.disks.contains_key(id)) {
            if let Some(disk) = state.disks.get_mut(&id) {
                disk.uses += 1;
            }
        }
        self.adopt(state);
        Ok(frozen)
    }

    /// Deletes the directories in `mnt/` on which nothing is mounted: they are created when they are needed.
    fn remove_places(&self) {
        let used: HashSet<PathBuf> =
            self.state.lock().disks.keys().map(|id| self.layout.mount_point(id)).collect();
        let places = self.layout.top(layout::MOUNTS);
        let empty = places.join(layout::EMPTY);
        for place in fs::read_dir(places).into_iter().flatten().flatten().map(|entry| entry.path()) {
            if place != empty && !used.contains(&place) {
                // A directory that is in use after all, or not empty, stays.
                let _ = files::remove_dir(&place);
            }
        }
    }

    /// Unmounts mounts in `mnt/`, in a layer's directory or in staging that belong to no layer of the store: they are
    /// left from a removal that an earlier process could not finish. `places` are relative to the home, in the order of
    /// mounting.
    fn unmount_strangers(&self, places: &[PathBuf], known: &[LayerId]) {
        let ours: HashSet<PathBuf> = known
            .iter()
            .flat_map(|id| {
                let merged = self.layout.layer_file(id, layout::MERGED);
                [self.layout.mount_point(id), self.layout.mapped_view(id), merged]
            })
            .filter_map(|path| Some(path.strip_prefix(self.layout.home()).ok()?.to_owned()))
            .collect();
        let made_here = |place: &Path| {
            place.starts_with(layout::MOUNTS)
                || place.starts_with(layout::STAGING)
                || place.file_name().is_some_and(|name| name == layout::MERGED)
        };
        let strangers: Vec<PathBuf> = places
            .iter()
            .rev()
            .filter(|place| made_here(place) && !ours.contains(*place))
            .map(|place| self.layout.home().join(place))
            .collect();
        // All of them are thawed first: the unmount of a view may wait for a frozen disk below it.
        for path in strangers.iter().filter(|path| path.starts_with(self.layout.top(layout::MOUNTS))) {
            if let Err(error) = freeze::thaw(path) {
                tracing::error!(
                    path = %path.display(),
                    error = %with_causes(&error),
                    "cannot thaw a mount that belongs to no layer; the next start tries again to unmount it"
                );
                return;
            }
        }
        for path in strangers {
            tracing::warn!(path = %path.display(), "unmounting a mount that belongs to no layer");
            if let Err(error) = unmount(&path) {
                tracing::warn!(path = %path.display(), %error, "cannot unmount it");
            }
        }
    }

    /// Thaws file systems of this home that have no mount here; those on `mounted` devices have one. Returns those that
    /// could not be thawed.
    fn thaw_hidden(&self, mounted: &HashSet<(u32, u32)>, known: &[LayerId]) -> Vec<Frozen> {
        let found = self.mark().and_then(|(dev, mark)| {
            let all =
                loopdev::list().map_err(Attempt::on_path("look for loop devices of", self.layout.home()))?;
            Ok(all.into_iter().filter(move |s| s.backing_dev == dev && s.name.starts_with(&mark)))
        });
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(error = %with_causes(&error), "cannot look for frozen sandboxes without a mount");
                return Vec::new();
            }
        };
        let mut frozen = Vec::new();
        for device in found.filter(|s| !mounted.contains(&(s.major, s.minor))) {
            tracing::warn!(
                device = device.number,
                name = device.name,
                "a loop device of this home has no mount here; thawing it if it is frozen"
            );
            if let Err(error) = self.free(&device) {
                tracing::error!(device = device.number, name = device.name, error = %with_causes(&error), "a file system without a mount cannot be thawed; retrying until it succeeds");
                let layer = self.layer_of(&device, known);
                frozen.push(Frozen::Hidden(device, layer));
            }
        }
        frozen
    }

    /// Tries once more; returns whether nothing is left to do.
    fn thaw_again(&self, frozen: &Frozen, gates: &Gates) -> bool {
        match frozen {
            // The holder of the gate may have frozen it, and will thaw it.
            Frozen::Disk(id) => gates.try_close(id).is_some_and(|_held| self.thaw_disk(id).is_ok()),
            // The file is deleted: no layer has it.
            Frozen::Hidden(device, None) => self.free(device).is_ok(),
            Frozen::Hidden(device, Some(id)) => gates.try_close(id).is_some_and(|_held| {
                // If a Get has mounted it meanwhile, that also thawed it.
                self.state.lock().disks.contains_key(id) || self.free(device).is_ok()
            }),
        }
    }

    /// The layer whose sandbox or image is behind a loop device.
    fn layer_of(&self, device: &LoopStatus, known: &[LayerId]) -> Option<LayerId> {
        let is_behind = |id: &LayerId, name| {
            fs::metadata(self.layout.layer_file(id, name))
                .is_ok_and(|file| (file.dev(), file.ino()) == (device.backing_dev, device.backing_inode))
        };
        known
            .iter()
            .find(|id| is_behind(id, layout::SANDBOX_FILE) || is_behind(id, layout::LAYER_FILE))
            .cloned()
    }

    /// Thaws the file system of a sandbox's file if it is still alive without a mount, before the file is deleted. Does
    /// nothing if none is frozen.
    pub(super) fn free_hidden(&self, held: &Held, id: &LayerId) -> Result<(), DriverError> {
        held.covers(id)?;
        let path = self.layout.layer_file(id, layout::SANDBOX_FILE);
        let file = match File::open(&path) {
            Ok(file) => file,
            // An image, a VHDX, or nothing yet.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(DriverError::io("open", path)(e)),
        };
        let (_, mark) = self.mark()?;
        let found = loopdev::find_by_backing(file.as_fd()).map_err(failed(id, "look for its loop device"))?;
        found.iter().filter(|device| device.name.starts_with(&mark)).try_for_each(|device| {
            tracing::info!(%id, device = device.number, "a sandbox without a mount still has its loop device; thawing it if it is frozen");
            self.free(device).map_err(failed(id, "thaw its sandbox, which has no mount"))
        })
    }

    /// Thaws what is on a loop device and releases it: if nothing else uses it, the kernel detaches it.
    fn free(&self, found: &LoopStatus) -> Result<(), SysError> {
        let Some(device) = LoopDevice::open_same(found)? else { return Ok(()) };
        let place = self.layout.top(layout::MOUNTS).join(format!("loop{}", found.number));
        let thawed = thaw_at(&device, found.read_only, &place);
        let _ = files::remove_dir(&place);
        thawed?;
        device.detach()
    }
}

/// Mounts what is on `device` at `place`, thaws it, and unmounts it. If the file system is still alive, this mounts the
/// same one again.
fn thaw_at(device: &LoopDevice, read_only: bool, place: &Path) -> Result<(), SysError> {
    create_dir(place).map_err(|error| SysError::Usage {
        action: "create a place to thaw at",
        subject: place.into(),
        reason: with_causes(&error),
    })?;
    let mount = |read_only| {
        let options =
            Ext4Options { read_only, noatime: true, nodev: true, nosuid: true, ..Ext4Options::default() };
        mount::mount_ext4(&device.path, place, options)
    };
    let is = |error: &SysError, numbers: &[Errno]| {
        numbers.iter().any(|number| error.raw_os_error() == Some(number.raw_os_error()))
    };
    let mounted = match mount(read_only) {
        // It is still alive, but became read-only after an error on the disk.
        Err(e) if !read_only && is(&e, &[Errno::BUSY, Errno::ROFS, Errno::ACCESS]) => mount(true),
        other => other,
    };
    match mounted {
        Ok(()) => {}
        // The kernel read the disk and found no file system: none is alive there, so none is frozen.
        Err(e) if is(&e, &[Errno::INVAL, Errno::UCLEAN]) => return Ok(()),
        Err(e) => return Err(e),
    }
    let thawed = freeze::thaw(place);
    unmount(place).and(thawed)
}
