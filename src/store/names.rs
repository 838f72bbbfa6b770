//! Names of the files and directories in a store's home; [`layout`](super::layout) shows where each lies.
//!
//! Apart from `layout`, because ids must not be any of these names, and paths are made of ids. Called by `layout` and `id`.

/// Marker of a store.
pub const MARKER: &str = "lcow-store.json";
/// The marker while it is being written.
pub const MARKER_NEW: &str = "lcow-store.json.new";
/// The recovery directory in the root of an ext4 file system.
pub const LOST_AND_FOUND: &str = "lost+found";
/// Lock file of the owner.
pub const OWNER_LOCK: &str = "owner.lock";
/// Cache directory.
pub const CACHE: &str = "cache";
/// Scratch disks of service VMs.
pub const SCRATCH: &str = "scratch";
/// Layers being made or deleted.
pub const STAGING: &str = "staging";
/// Mount points.
pub const MOUNTS: &str = "mnt";
/// Name below [`MOUNTS`] of a directory that is always empty.
pub const EMPTY: &str = "empty";
/// An applied layer's image.
pub const LAYER_FILE: &str = "layer.vhd";
/// An applied layer's exact-diff record.
pub const RECORD_FILE: &str = "layer.exact";
/// A sandbox that the host mounts.
pub const SANDBOX_FILE: &str = "sandbox.vhd";
/// A sandbox that VMs attach.
pub const SANDBOX_VHDX_FILE: &str = "sandbox.vhdx";
/// A layer's ancestors.
pub const CHAIN_FILE: &str = "layerchain.json";
/// A layer's state and facts.
pub const META_FILE: &str = "layer.json";
/// A snapshot's name, state, chain and facts, in a store of snapshots.
pub const SNAPSHOT_FILE: &str = "snapshot.json";
/// Mount point of the merged view.
pub const MERGED: &str = "merged";
/// Ending of the mount point of a snapshot's view with mapped ids.
pub const MAPPED: &str = "mapped";

/// Home of containerd's snapshots below the service's root, by default.
pub const CONTAINERD: &str = "containerd";

/// Lower-case names in the home that can never be ids.
pub const RESERVED_NAMES: &[&str] =
    &[MARKER, OWNER_LOCK, CACHE, SCRATCH, STAGING, MOUNTS, LOST_AND_FOUND, CONTAINERD];
