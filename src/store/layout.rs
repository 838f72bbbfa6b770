//! Names of the files and directories of a store.
//!
//! ```text
//! <home>/
//!   lcow-store.json      the marker: store format, what Init said
//!   owner.lock           locked by the one process that owns the store; holds its pid
//!   cache/  scratch/     blanks and service VMs' scratch disks (debris after a crash)
//!   staging/             layers being made, and layers on their way out (debris after a crash)
//!   mnt/<short>/         mount points of images and sandboxes (short names: 128 of them fit one page of options)
//!   mnt/empty/           the second lower of a merged view that has only one
//!   <id>/
//!     layer.json         state and facts; its rename is the commit point
//!     layerchain.json    ancestors, nearest first; null for a base layer
//!     layer.vhd          applied layer: ext4 + footer      ┐
//!     layer.exact        applied layer: exact-diff record  ├ one of these two sets, or neither
//!     sandbox.vhd        sandbox: sparse fixed VHD          ┘
//!     merged/            where Get shows the layer
//! ```

use super::LayerId;
#[cfg(target_os = "linux")]
pub use super::names::MERGED;
pub use super::names::{
    CACHE, CHAIN_FILE, EMPTY, LAYER_FILE, LOST_AND_FOUND, MARKER, MARKER_NEW, META_FILE, MOUNTS, OWNER_LOCK,
    RECORD_FILE, SANDBOX_FILE, SANDBOX_VHDX_FILE, SCRATCH, STAGING,
};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Paths of one store.
#[derive(Debug, Clone)]
pub struct Layout {
    home: PathBuf,
}

impl Layout {
    /// The layout below `home`.
    pub fn new(home: impl Into<PathBuf>) -> Self {
        Self { home: home.into() }
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
        self.top(MOUNTS).join(short_name(id))
    }
}

/// Length of a short name.
const SHORT_NAME_BYTES: usize = 16;

/// A name of 16 bytes for a layer, the same in every process: the start of the SHA-256 of its id.
pub fn short_name(id: &LayerId) -> String {
    use std::fmt::Write as _;
    let digest = Sha256::digest(id.as_str());
    digest.iter().take(SHORT_NAME_BYTES / 2).fold(String::new(), |mut name, byte| {
        // Writing to a String cannot fail.
        let _ = write!(name, "{byte:02x}");
        name
    })
}
