//! What a client mounts for a snapshot, and which snapshot mounts belong to.
//!
//! ```text
//!   lcow.containerd.mounts   host                           lcow-layer      kata
//!   to be unpacked into      Folder                         Folder          Folder
//!   container                its upper directory, and the   Folder          Disks
//!                            disks of its ancestors: Paths
//!   view                     disks of its ancestors: Paths  Folder          Disks
//!   either, with id maps     a view mounted here: Mapped    Folder          Disks
//!
//!   <home>/mnt/<disk>             an image          <home>/mnt/<sandbox>/upper      what a container wrote
//!   <home>/<layer>/layer.vhd      an image          <home>/<layer>/<layer>.vhd      a hard link to it, for Kata
//! ```
//!
//! Kata's guest mounts each image under the last component of its path, so that must differ from image to image and be
//! the same for all containers of a pod: hence the links, named by the layer and made when they are first shown.
//!
//! The same disk has the same path in every answer, because clients compare them. The way back is by these paths alone:
//! text from a client is looked up and never opened.

use super::{Snapshots, keys::is_extraction, precondition};
use crate::{
    config::SnapshotMounts,
    driver::{
        DriverError,
        comparison::disks_of,
        on_disk_thread,
        sandbox::{UPPER, WORK},
    },
    store::{LayerId, LayerState, Member, Snapshot, SnapshotKind, files, layout},
};
use std::{
    io,
    path::{Path, PathBuf},
};

/// What a client gets of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shown {
    /// The directories of its layer and of the ancestors, nearest first.
    Folder {
        /// Of the layer; of a view with parents, that of the nearest.
        folder: PathBuf,
        /// Of the others.
        parents: Vec<PathBuf>,
        /// A view.
        read_only: bool,
    },
    /// Directories on mounted disks.
    Paths {
        /// `upperdir` and `workdir` of a container; `None` for a view.
        upper: Option<(PathBuf, PathBuf)>,
        /// `lowerdir`s, top first; may be empty.
        lowers: Vec<PathBuf>,
        /// A directory that is always empty, for a view without lowers.
        empty: PathBuf,
        /// `xino` of the overlay.
        xino: bool,
    },
    /// A mounted view with the ids of a user namespace.
    Mapped {
        /// Where it is mounted.
        view: PathBuf,
        /// Without a place to write to.
        read_only: bool,
    },
    /// Files of disks, for virtual machines that attach them: the images of the ancestors, nearest first.
    Disks {
        /// Image files; the last components of their paths differ.
        images: Vec<PathBuf>,
        /// A view.
        read_only: bool,
    },
}

/// What a client's mounts say; paths as text from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShownPlace {
    /// The directory of a layer.
    Folder(PathBuf),
    /// An overlay or a bind mount.
    Paths {
        /// `upperdir`, or the source of a writable bind mount.
        upper: Option<PathBuf>,
        /// `lowerdir`s, or the source of a read-only bind mount.
        lowers: Vec<PathBuf>,
    },
    /// Files of the images of a view, nearest first.
    Disks(Vec<PathBuf>),
}

impl Snapshots {
    /// What a client gets of a snapshot that is not committed.
    pub(super) async fn show(&self, member: &Member) -> Result<Shown, DriverError> {
        let kind = member.meta.snapshot.as_ref().map(|s| s.kind);
        let view = kind == Some(SnapshotKind::View);
        if self.mounts_here() && (view || member.meta.state == LayerState::Sandbox) {
            return self.show_paths(member).await;
        }
        if self.options().snapshot_mounts == SnapshotMounts::Kata && (view || stays_in_guest(member)) {
            return self.show_disks(member, view).await;
        }
        self.show_folder(member, view)
    }

    /// The images of the ancestors, each under a name of its own.
    async fn show_disks(&self, member: &Member, view: bool) -> Result<Shown, DriverError> {
        let snapshot = self.home().store.snapshot(&member.layer.id)?;
        attachable(&snapshot)?;
        let ids: Vec<LayerId> = snapshot
            .ancestors
            .iter()
            .filter(|m| m.meta.state == LayerState::Applied)
            .map(|m| m.layer.id.clone())
            .collect();
        if ids.is_empty() {
            return Err(precondition(
                "the image has no files, so that there is no disk to attach to a virtual machine".into(),
            ));
        }
        let layout = self.home().store.layout().clone();
        on_disk_thread(move |_| {
            let link = |id: &LayerId| {
                let named = layout.layer_file(id, &disk_name(id));
                match files::hard_link(&layout.layer_file(id, layout::LAYER_FILE), &named) {
                    Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                        Err(DriverError::io("link", &named)(e))
                    }
                    _ => Ok(named),
                }
            };
            let images = ids.iter().map(link).collect::<Result<_, _>>()?;
            Ok(Shown::Disks { images, read_only: view })
        })
        .await
    }

    fn show_folder(&self, member: &Member, view: bool) -> Result<Shown, DriverError> {
        let snapshot = self.home().store.snapshot(&member.layer.id)?;
        if member.meta.state == LayerState::Sandbox {
            attachable(&snapshot)?;
        }
        // A machine attaches a disk of each directory in the list, and a layer without content has none.
        let with_disk = |m: &&Member| m.meta.state != LayerState::Created;
        let mut ancestors = snapshot.ancestors.iter().filter(with_disk).map(|m| self.folder(&m.layer.id));
        let nearest = if view { ancestors.next() } else { None };
        let folder = nearest.unwrap_or_else(|| self.folder(&member.layer.id));
        Ok(Shown::Folder { folder, parents: ancestors.collect(), read_only: view })
    }

    #[cfg(target_os = "linux")]
    async fn show_paths(&self, member: &Member) -> Result<Shown, DriverError> {
        let labels = member.meta.snapshot.as_ref().map(|s| s.labels.clone()).unwrap_or_default();
        let maps = super::labels::id_maps(&labels)?;
        let (layout, mounts) = (self.home().store.layout().clone(), self.home().mounts.clone());
        let xino = self.options().xino;
        let empty = layout.top(layout::MOUNTS).join(layout::EMPTY);
        let look = move |snapshot: &Snapshot, needed: &[&Member]| {
            let (mut upper, mut lowers) = (None, Vec::new());
            // Overlayfs refuses a directory that it has already, and the lower one of two equal layers adds nothing.
            for member in needed {
                let place = layout.mount_point(member.disk_id());
                match member.meta.state {
                    LayerState::Sandbox if &member.layer.id == snapshot.id() => {
                        upper = Some((place.join(UPPER), place.join(WORK)));
                    }
                    LayerState::Sandbox => lowers.push(place.join(UPPER)),
                    _ if lowers.contains(&place) => {}
                    _ => lowers.push(place),
                }
            }
            // Without layers, all there is was written in host ids.
            if lowers.is_empty() || (maps.uids.is_empty() && maps.gids.is_empty()) {
                return Ok(Shown::Paths { upper, lowers, empty, xino });
            }
            let read_only = upper.is_none();
            let parts = super::mapped::Parts { upper, lowers, empty, xino };
            let view = super::mapped::show(&mounts, snapshot.id(), parts, &maps)?;
            Ok(Shown::Mapped { view, read_only })
        };
        self.hold(&member.layer.id, look).await
    }

    #[cfg(not(target_os = "linux"))]
    #[expect(clippy::unused_async, reason = "Linux mounts")]
    async fn show_paths(&self, member: &Member) -> Result<Shown, DriverError> {
        let _ = (UPPER, WORK, layout::MOUNTS);
        Err(DriverError::Internal(format!("layer {} cannot be mounted on this host", member.layer.id)))
    }

    /// The layer that `place` shows: of a folder, of a container's mounts, or any layer with these disks. `None` if the
    /// mounts are not ours; an empty list of paths is nothing, too.
    pub(super) fn find_shown(&self, place: &ShownPlace) -> Option<Found> {
        let store = &self.home().store;
        match place {
            ShownPlace::Folder(folder) => {
                let id = self.name_below(folder, store.layout().home())?;
                store.exists(&id).then_some(Found::Layer(id))
            }
            ShownPlace::Paths { upper: Some(upper), .. } => {
                let id = self.sandbox_of(upper).or_else(|| store.layout().mapped_at(upper))?;
                store.exists(&id).then_some(Found::Layer(id))
            }
            ShownPlace::Paths { upper: None, lowers } => match &lowers[..] {
                [view] if let Some(id) = store.layout().mapped_at(view) => {
                    let snapshot = store.snapshot(&id).ok()?;
                    Some(Found::Layer(snapshot.ancestors.first()?.layer.id.clone()))
                }
                _ => self.find_mounted(lowers),
            },
            ShownPlace::Disks(images) => self.find_images(images),
        }
    }

    /// A committed layer with these images, top first; each is named by its layer.
    fn find_images(&self, images: &[PathBuf]) -> Option<Found> {
        let store = &self.home().store;
        let mut disks = Vec::new();
        for image in images {
            let id = self.name_below(image.parent()?, store.layout().home())?;
            if image.file_name()?.to_str()? != disk_name(&id) {
                return None;
            }
            let disk = store.get(&id).ok()?.disk_id().clone();
            if !disks.contains(&disk) {
                disks.push(disk);
            }
        }
        // A view without images has the form of a directory.
        if disks.is_empty() { None } else { self.find_stack(&disks) }
    }

    /// A committed layer with these mounted disks, top first.
    fn find_mounted(&self, lowers: &[PathBuf]) -> Option<Found> {
        let mounts = self.home().store.layout().top(layout::MOUNTS);
        let mut disks = Vec::new();
        for lower in lowers {
            if lower == &mounts.join(layout::EMPTY) {
                continue;
            }
            let disk = match self.sandbox_of(lower) {
                Some(sandbox) => sandbox,
                None => self.name_below(lower, &mounts)?,
            };
            disks.push(disk);
        }
        if disks.is_empty() { Some(Found::Nothing) } else { self.find_stack(&disks) }
    }

    /// A committed layer with these disks, top first.
    fn find_stack(&self, disks: &[LayerId]) -> Option<Found> {
        let store = &self.home().store;
        store.layers().into_iter().find_map(|layer| {
            let snapshot = store.snapshot(&layer.id).ok()?;
            if snapshot.top.disk_id() != disks.first()?
                || snapshot.top.meta.snapshot.as_ref()?.kind != SnapshotKind::Committed
            {
                return None;
            }
            let all = disks_of(&snapshot);
            let same = all.starts_with(disks);
            (same && (all.len() == disks.len() || self.ends_opaque(disks))).then_some(Found::Layer(layer.id))
        })
    }

    /// Whether the view of these disks ends with an opaque root, so that it shows nothing of what is below.
    #[cfg_attr(not(target_os = "linux"), expect(clippy::unused_self, reason = "only Linux has mounts"))]
    fn ends_opaque(&self, disks: &[LayerId]) -> bool {
        #[cfg(target_os = "linux")]
        {
            let place = disks.last().and_then(|disk| self.home().mounts.disk_dir(disk));
            place.is_some_and(|place| lcow_sys::linux::overlay::is_opaque(&place).unwrap_or(false))
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = disks;
            false
        }
    }

    /// The sandbox whose upper directory this is.
    fn sandbox_of(&self, path: &Path) -> Option<LayerId> {
        if path.file_name()? != UPPER {
            return None;
        }
        self.name_below(path.parent()?, &self.home().store.layout().top(layout::MOUNTS))
    }

    /// The id that is the last component of `path`, if that is directly below `above`.
    #[expect(clippy::unused_self, reason = "one of the ways back from a path")]
    fn name_below(&self, path: &Path, above: &Path) -> Option<LayerId> {
        if path.parent()? != above {
            return None;
        }
        path.file_name()?.to_str()?.parse().ok()
    }
}

/// Whether this is the snapshot of a container under Kata, which keeps what it writes in the guest's memory: it stands on
/// an image and was not made to be unpacked into.
pub(super) fn stays_in_guest(member: &Member) -> bool {
    member.meta.state == LayerState::Created
        && member.layer.parent().is_some()
        && member
            .meta
            .snapshot
            .as_ref()
            .is_some_and(|s| s.kind == SnapshotKind::Active && !is_extraction(&s.name))
}

/// Refuses a stack that a virtual machine cannot attach: it mounts the file system of a `layer.vhd` as it is, and a
/// sandbox has its layer in a directory. Prepare converts those; this one was made for the host's mounts before.
fn attachable(snapshot: &Snapshot) -> Result<(), DriverError> {
    let Some(written) = snapshot.ancestors.iter().find(|m| m.meta.state == LayerState::Sandbox) else {
        return Ok(());
    };
    let name = written.meta.snapshot.as_ref().map(|s| s.name.clone()).unwrap_or_default();
    Err(precondition(format!(
        "the parent '{name}' was written by a container, and a virtual machine can only attach unpacked layers; remove the \
         container and create it again"
    )))
}

/// The name of a layer's image beside `layer.vhd`, which no other layer has.
fn disk_name(id: &LayerId) -> String {
    format!("{id}.vhd")
}

/// What mounts of a client show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// A layer.
    Layer(LayerId),
    /// An empty directory.
    Nothing,
}

impl Found {
    /// Its id as text; empty for nothing.
    pub(super) fn as_text(&self) -> &str {
        match self {
            Self::Layer(id) => id.as_str(),
            Self::Nothing => "",
        }
    }
}

/// Refuses what is not a layer to be unpacked into.
pub(super) fn not_ours() -> DriverError {
    precondition("the mounts are not those of a snapshot of this service".into())
}
