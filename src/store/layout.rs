//! Names of the files and directories of a store.
//!
//! ```text
//! <home>/
//!   lcow-store.json      the marker: store format, what Init said
//!   owner.lock           locked by the one process that owns the store; holds its pid
//!   cache/  scratch/     blanks and service VMs' scratch disks (debris after a crash)
//!   staging/             layers being made, and layers on their way out (debris after a crash)
//!   mnt/<short>/         mount points of images and sandboxes (short names: 128 of them fit one page of options)
//!   mnt/<id>.mapped/     where a snapshot with a user namespace is mounted
//!   mnt/empty/           the second lower of a merged view that has only one
//!   <id>/
//!     layer.json         state and facts; its rename is the commit point
//!     layerchain.json    ancestors, nearest first; null for a base layer
//!     layer.vhd          applied layer: ext4 + footer      ┐
//!     layer.exact        applied layer: exact-diff record  ├ one of these two sets, or neither
//!     sandbox.vhd        sandbox: sparse fixed VHD          ┘ (sandbox.vhdx for virtual machines; may be a link to another's)
//!     <id>.vhd           hard link to layer.vhd, for virtual machines of Kata
//!     merged/            where Get shows the layer
//!     snapshot.json      in a store of snapshots, instead of layer.json and layerchain.json
//! ```
//!
//! A store of snapshots (containerd) has ids of a few letters, which name their mount points as they are.

use super::LayerId;
#[cfg(target_os = "linux")]
pub use super::names::MERGED;
pub use super::names::{
    CACHE, CHAIN_FILE, EMPTY, LAYER_FILE, LOST_AND_FOUND, MAPPED, MARKER, MARKER_NEW, META_FILE, MOUNTS,
    OWNER_LOCK, RECORD_FILE, SANDBOX_FILE, SANDBOX_VHDX_FILE, SCRATCH, SNAPSHOT_FILE, STAGING,
};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Paths of one store.
#[derive(Debug, Clone)]
pub struct Layout {
    home: PathBuf,
    /// The layers are snapshots.
    snapshots: bool,
}

impl Layout {
    /// The layout below `home`.
    pub fn new(home: impl Into<PathBuf>) -> Self {
        Self { home: home.into(), snapshots: false }
    }

    /// The layout of a store of snapshots.
    pub fn of_snapshots(home: impl Into<PathBuf>) -> Self {
        Self { home: home.into(), snapshots: true }
    }

    /// Whether the layers are snapshots.
    pub fn holds_snapshots(&self) -> bool {
        self.snapshots
    }

    /// The file whose rename commits a change of a layer.
    pub fn meta_file(&self, id: &LayerId) -> PathBuf {
        self.layer_file(id, self.meta_name())
    }

    /// Its name.
    pub fn meta_name(&self) -> &'static str {
        if self.snapshots { SNAPSHOT_FILE } else { META_FILE }
    }

    /// The store's directory.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// The directory of one layer.
    pub fn layer(&self, id: &LayerId) -> PathBuf {
        self.home.join(id.as_str())
    }

    /// A file or directory of one layer.
    pub fn layer_file(&self, id: &LayerId, name: &str) -> PathBuf {
        self.layer(id).join(name)
    }

    /// A file or directory directly in the home.
    pub fn top(&self, name: &str) -> PathBuf {
        self.home.join(name)
    }

    /// Where the file system of this layer is mounted.
    pub fn mount_point(&self, id: &LayerId) -> PathBuf {
        self.top(MOUNTS).join(self.place(id))
    }

    /// Where the view of this layer with the ids of a user namespace is mounted.
    pub fn mapped_view(&self, id: &LayerId) -> PathBuf {
        self.mount_point(id).with_extension(MAPPED)
    }

    /// The layer whose view with the ids of a user namespace would be mounted here.
    pub fn mapped_at(&self, place: &Path) -> Option<LayerId> {
        let id = place.file_name()?.to_str()?.strip_suffix(MAPPED)?.strip_suffix('.')?.parse().ok()?;
        (self.snapshots && self.mapped_view(&id) == place).then_some(id)
    }

    /// The name of that place in `mnt/`, the same in every process.
    pub fn place(&self, id: &LayerId) -> String {
        if self.snapshots { id.to_string() } else { short_name(id) }
    }
}

/// Length of a short name.
const SHORT_NAME_BYTES: usize = 16;

/// A name of 16 bytes for a layer, the same in every process: the start of the SHA-256 of its id.
fn short_name(id: &LayerId) -> String {
    use std::fmt::Write as _;
    let digest = Sha256::digest(id.as_str());
    digest.iter().take(SHORT_NAME_BYTES / 2).fold(String::new(), |mut name, byte| {
        // Writing to a String cannot fail.
        let _ = write!(name, "{byte:02x}");
        name
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_view_with_mapped_ids_is_found_by_its_place_and_by_no_other() {
        let layout = Layout::of_snapshots("/home");
        let id: LayerId = "cab".parse().unwrap();
        let place = layout.mapped_view(&id);
        assert_eq!(place, Path::new("/home/mnt/cab.mapped"));
        assert_eq!(layout.mapped_at(&place), Some(id));
        for other in [
            "/home/mnt/cab",
            "/home/mnt/mapped",
            "/home/mnt/.mapped",
            "/home/mnt/cabmapped",
            "/home/mnt/cab.mapped/upper",
            "/home/cab.mapped",
            "/elsewhere/mnt/cab.mapped",
            "/home/mnt/../mnt/cab.mapped",
        ] {
            assert_eq!(layout.mapped_at(Path::new(other)), None, "{other}");
        }
        assert_eq!(Layout::new("/home").mapped_at(Path::new("/home/mnt/cab.mapped")), None, "of dockerd");
    }
}
