//! Views of snapshots whose container has a user namespace: an overlay of our own, of id-mapped layers. Linux only.
//!
//! ```text
//!   mnt/<image>  ── id-mapped clone, mnt/<id>.<n> ──┐ read-only; leave their places when the overlay has its own
//!   mnt/<image>  ── id-mapped clone, mnt/<id>.<n> ──┤
//!   mnt/<id>/{upper,work}   host ids, as it is ─────┴─► overlay at mnt/<id>.mapped ─► bind mount of the client
//! ```
//!
//! A client that is given the maps as options of the mount (`uidmap=`, `gidmap=`) would map the layers itself, and
//! containerd 2.1 cannot: it clones the directory that holds all of them (`core/mount/mount_linux.go`,
//! doPrepareIDMappedOverlay), and the clone has none of the file systems mounted in it. The container would see an empty
//! root.
//!
//! Invariants:
//! * The view is mounted only while its snapshot holds its disks, and is unmounted before they are.
//! * A clone that a kill left in its place is unmounted by the next start, as everything in `mnt/` that is no disk's, and
//!   by the next use.
//!
//! All functions block. Called by `shown` and `holds`, under the gates of the disks.

use crate::{
    driver::{
        DriverError,
        mounts::{Mounts, create_dir, failed, is_mounted, unmount},
        remap,
    },
    store::{LayerId, Layout, files},
    svm::IdMaps,
};
use lcow_sys::linux::{
    idmap::mount_idmapped,
    overlay::{OverlaySpec, mount_overlay},
};
use std::path::{Path, PathBuf};

/// The directories of a view.
#[derive(Debug)]
pub(super) struct Parts {
    /// `upperdir` and `workdir`, in host ids; `None` for a read-only view.
    pub(super) upper: Option<(PathBuf, PathBuf)>,
    /// Disks and directories on them, in container ids, top first; at least one.
    pub(super) lowers: Vec<PathBuf>,
    /// A directory that is always empty.
    pub(super) empty: PathBuf,
    /// `xino` of the overlay.
    pub(super) xino: bool,
}

/// Mounts the view of a snapshot, unless it is; returns where.
///
/// # Errors
/// [`DriverError::Usage`] on a kernel whose overlayfs accepts no id-mapped layers, [`DriverError::Mount`].
pub(super) fn show(
    mounts: &Mounts,
    id: &LayerId,
    parts: Parts,
    maps: &IdMaps,
) -> Result<PathBuf, DriverError> {
    let view = mounts.layout.mapped_view(id);
    if is_mounted(&view) {
        return Ok(view);
    }
    let namespace = remap::namespace_of(&maps.uids, &maps.gids)?;
    create_dir(&view)?;
    let mut clones = Clones(Vec::new());
    for (number, lower) in parts.lowers.iter().enumerate() {
        let clone = mounts.layout.mount_point(id).with_extension(number.to_string());
        create_dir(&clone)?;
        // Of a use that was killed.
        unmount(&clone).map_err(failed(id, "unmount an old clone of a layer"))?;
        clones.0.push(clone.clone());
        mount_idmapped(lower, &clone, &namespace, true).map_err(failed(id, "map the ids of its layers"))?;
    }
    let mut lowers = clones.0.clone();
    if parts.upper.is_none() && lowers.len() == 1 {
        // Overlayfs needs two lowers without an upper.
        lowers.push(parts.empty);
    }
    let spec = OverlaySpec {
        base: mounts.layout.top(crate::store::layout::MOUNTS),
        lowers,
        upper: parts.upper,
        context: None,
        target: view.clone(),
        xino: parts.xino,
        read_only: false,
    };
    mount_overlay(&spec, mounts.method()).map_err(failed(id, "mount its id-mapped view"))?;
    Ok(view)
}

/// Unmounts the view of a snapshot, if there is one. A client that mounted it keeps what it has.
pub(super) fn hide(layout: &Layout, id: &LayerId) -> Result<(), DriverError> {
    let view = layout.mapped_view(id);
    if !view.exists() {
        return Ok(());
    }
    unmount(&view).map_err(failed(id, "unmount its id-mapped view"))?;
    remove_place(&view);
    Ok(())
}

/// Clones in their places; they leave them on drop.
struct Clones(Vec<PathBuf>);

impl Drop for Clones {
    fn drop(&mut self) {
        for place in &self.0 {
            if let Err(error) = unmount(place) {
                tracing::warn!(place = %place.display(), %error, "cannot unmount an id-mapped clone of a layer");
            }
            remove_place(place);
        }
    }
}

/// One that is still in use stays, and the next start removes it.
fn remove_place(place: &Path) {
    let _ = files::remove_dir(place);
}
