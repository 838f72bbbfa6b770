//! Labels of containerd that change what a snapshot is.
//!
//! ```text
//!   containerd.io/snapshot/max-size                          bytes                ─┐
//!   containerd.io/snapshot/lcow.size                         a size, "20GB"        │
//!   containerd.io/snapshot/io.microsoft.container.storage.rootfs.size-gb   GB      ├─► bytes of the sandbox
//!   containerd.io/snapshot/windows/rootfs.sizebytes          bytes                ─┘
//!   containerd.io/snapshot/uidmapping, …/gidmapping          ctr:host:len[,…]     ───► id maps
//!
//!   containerd.io/snapshot/io.microsoft.container.storage.rootfs.location   a directory ─► checked, not used
//!   containerd.io/snapshot/io.microsoft.container.storage.reuse-scratch     true        ─┐
//!   containerd.io/snapshot/io.microsoft.owner.key                           part of a key ┴─► whose scratch disk to share
//! ```
//!
//! The labels of `io.microsoft` are those of containerd's `windows-lcow` (`plugins/snapshots/lcow/lcow.go`). There, the
//! location is where an empty scratch disk is kept, to be copied for each container; this service formats each disk by
//! itself, so it opens nothing at a place that a client names.
//!
//! containerd's metadata store passes on only labels with the prefix `containerd.io/snapshot/`, and
//! `containerd.io/snapshot.ref`. A label that is understood but has a bad value fails the request; other labels are kept
//! and ignored. Called by the other parts of this module.

use crate::{
    config::{self, MAX_SANDBOX_BYTES, MIN_SANDBOX_BYTES, Unit},
    store::SnapshotRefusal,
    svm::{IdMaps, IdRange},
};
use bytesize::ByteSize;
use std::collections::BTreeMap;

/// Labels as containerd sends them.
pub type Labels = BTreeMap<String, String>;

/// The chain id of the layer that an active snapshot is prepared for; containerd's remote-snapshot protocol.
pub const TARGET_REF: &str = "containerd.io/snapshot.ref";
/// Chain id of the parent of a layer that is unpacked in parallel (containerd 2.3 and later).
pub const PARENT_CHAIN_ID: &str = "containerd.io/snapshot/parent-chain-id";

const MAX_SIZE: &str = "containerd.io/snapshot/max-size";
const LCOW_SIZE: &str = "containerd.io/snapshot/lcow.size";
const ROOTFS_SIZE_GB: &str = "containerd.io/snapshot/io.microsoft.container.storage.rootfs.size-gb";
const ROOTFS_SIZE_BYTES: &str = "containerd.io/snapshot/windows/rootfs.sizebytes";
const ROOTFS_LOCATION: &str = "containerd.io/snapshot/io.microsoft.container.storage.rootfs.location";
const REUSE_SCRATCH: &str = "containerd.io/snapshot/io.microsoft.container.storage.reuse-scratch";
const OWNER_KEY: &str = "containerd.io/snapshot/io.microsoft.owner.key";
const UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
const GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";

/// The labels that give a size, with the unit of a bare number.
const SIZES: [(&str, Unit); 4] = [
    (MAX_SIZE, Unit::Bytes),
    (LCOW_SIZE, Unit::Bytes),
    (ROOTFS_SIZE_GB, Unit::Gigabytes),
    (ROOTFS_SIZE_BYTES, Unit::Bytes),
];

/// The size that the labels give to a sandbox, in bytes. Of several, the smallest.
///
/// # Errors
/// [`SnapshotRefusal::Invalid`] names the label and what is accepted.
pub fn sandbox_bytes(labels: &Labels) -> Result<Option<u64>, SnapshotRefusal> {
    let mut least = None;
    for (name, unit) in SIZES {
        let Some(value) = labels.get(name) else { continue };
        // Only `lcow.size` takes units.
        let plain = name == LCOW_SIZE || value.bytes().all(|b| b.is_ascii_digit());
        let size = plain.then(|| config::parse_sandbox_size(value, unit)).flatten().ok_or_else(|| {
            let (from, to) = (ByteSize(MIN_SANDBOX_BYTES), ByteSize(MAX_SANDBOX_BYTES));
            let how = match (name, unit) {
                (LCOW_SIZE, _) => "a size",
                (_, Unit::Gigabytes) => "a number of GB (2^30 bytes)",
                (_, Unit::Bytes) => "a number of bytes",
            };
            SnapshotRefusal::Invalid(format!(
                "label {name}: '{}' is not accepted; give {how}, from {from} to {to}",
                shortened(value)
            ))
        })?;
        least = Some(least.map_or(size, |known: u64| known.min(size)));
    }
    Ok(least)
}

/// Checks the place of scratch disks: an absolute path of the host, of Windows or of Linux, without `..`, and no share or
/// device. It is not used.
///
/// # Errors
/// [`SnapshotRefusal::Invalid`].
pub fn check_location(labels: &Labels) -> Result<(), SnapshotRefusal> {
    let Some(location) = labels.get(ROOTFS_LOCATION) else { return Ok(()) };
    let of_drive = match location.as_bytes() {
        [drive, b':', b'\\' | b'/', ..] => drive.is_ascii_alphabetic(),
        _ => false,
    };
    let of_root = location.starts_with('/') && !location.starts_with("//");
    let escapes = location.split(['/', '\\']).any(|part| part == "..");
    if (of_drive || of_root) && !escapes && !location.contains(char::is_control) {
        return Ok(());
    }
    Err(SnapshotRefusal::Invalid(format!(
        "label {ROOTFS_LOCATION}: '{}' is not the absolute path of a local directory",
        shortened(location)
    )))
}

/// What the key of the snapshot contains whose scratch disk is to be used; `None` for a disk of its own.
///
/// # Errors
/// [`SnapshotRefusal::Invalid`]: the label that asks for it is neither "true" nor "false".
pub fn scratch_owner(labels: &Labels) -> Result<Option<&str>, SnapshotRefusal> {
    match labels.get(REUSE_SCRATCH).map(String::as_str) {
        None | Some("false") => Ok(None),
        // As upstream: without an owner, a disk of its own.
        Some("true") => Ok(labels.get(OWNER_KEY).map(String::as_str).filter(|key| !key.is_empty())),
        Some(value) => Err(SnapshotRefusal::Invalid(format!(
            "label {REUSE_SCRATCH}: '{}' is neither true nor false",
            shortened(value)
        ))),
    }
}

/// A value for a message.
fn shortened(value: &str) -> String {
    /// Enough to recognize it.
    const SHOWN: usize = 200;
    value.chars().take(SHOWN).collect::<String>().escape_debug().to_string()
}

/// The user-namespace maps that the labels give.
///
/// # Errors
/// [`SnapshotRefusal::Invalid`]: one of the two labels is missing, or is not a list of `container:host:length`.
pub fn id_maps(labels: &Labels) -> Result<IdMaps, SnapshotRefusal> {
    match (labels.get(UID_MAPPING), labels.get(GID_MAPPING)) {
        (None, None) => Ok(IdMaps::default()),
        (Some(uids), Some(gids)) => {
            Ok(IdMaps { uids: ranges(UID_MAPPING, uids)?, gids: ranges(GID_MAPPING, gids)? })
        }
        _ => Err(SnapshotRefusal::Invalid(format!(
            "labels {UID_MAPPING} and {GID_MAPPING} must be given together"
        ))),
    }
}

fn ranges(name: &str, list: &str) -> Result<Vec<IdRange>, SnapshotRefusal> {
    /// The kernel takes no more lines (`UID_GID_MAP_MAX_EXTENTS`).
    const MOST: usize = 340;
    let refused = || {
        SnapshotRefusal::Invalid(format!(
            "label {name}: '{}' is not a list of container:host:length ranges",
            shortened(list)
        ))
    };
    let mut found = Vec::new();
    for item in list.split(',') {
        let numbers: Vec<u32> =
            item.split(':').map(str::parse).collect::<Result<_, _>>().map_err(|_| refused())?;
        let [container_id, host_id, size] = numbers[..] else { return Err(refused()) };
        let fits =
            size > 0 && container_id.checked_add(size).is_some() && host_id.checked_add(size).is_some();
        if !fits || found.len() == MOST {
            return Err(refused());
        }
        found.push(IdRange { container_id, host_id, size });
    }
    Ok(found)
}

/// The host's ids of the containers' root under these maps.
pub fn root_of(maps: &IdMaps) -> (u32, u32) {
    let host = |ranges: &[IdRange]| ranges.iter().find(|r| r.container_id == 0).map_or(0, |r| r.host_id);
    (host(&maps.uids), host(&maps.gids))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn sizes_have_their_labels_units_and_the_smallest_counts() {
        for (name, value, expected) in [
            (MAX_SIZE, "67108864", 64 << 20),
            (LCOW_SIZE, "64MiB", 64 << 20),
            (LCOW_SIZE, "1G", 1 << 30),
            (ROOTFS_SIZE_GB, "20", 20 << 30),
            (ROOTFS_SIZE_BYTES, "1073741824", 1 << 30),
        ] {
            assert_eq!(sandbox_bytes(&labels(&[(name, value)])).unwrap(), Some(expected), "{name}={value}");
        }
        assert_eq!(
            sandbox_bytes(&labels(&[(MAX_SIZE, "1073741824"), (LCOW_SIZE, "64MiB")])).unwrap(),
            Some(64 << 20)
        );
        assert_eq!(sandbox_bytes(&labels(&[("other", "1")])).unwrap(), None);
        for (name, value) in [
            (MAX_SIZE, ""),
            (MAX_SIZE, "64MiB"),
            (MAX_SIZE, "1"),
            (MAX_SIZE, "-67108864"),
            (MAX_SIZE, "99999999999999999999"),
            (LCOW_SIZE, "much"),
            (ROOTFS_SIZE_GB, "0"),
            (ROOTFS_SIZE_GB, "1.5"),
            (ROOTFS_SIZE_BYTES, "20G"),
        ] {
            let error = sandbox_bytes(&labels(&[(name, value)])).unwrap_err();
            assert!(
                matches!(&error, SnapshotRefusal::Invalid(text) if text.contains(name)),
                "{name}={value}: {error}"
            );
        }
    }

    #[test]
    fn a_location_is_an_absolute_path_of_this_host() {
        for good in [r"C:\scratch", "d:/scratch/x", r"C:\", "/var/scratch", "/", r"C:\a..b"] {
            check_location(&labels(&[(ROOTFS_LOCATION, good)])).unwrap();
        }
        check_location(&Labels::new()).unwrap();
        for bad in [
            "",
            "scratch",
            r"..\scratch",
            r"C:scratch",
            r"C:\a\..\b",
            "/a/../b",
            r"\\server\share",
            "//server/share",
            r"\\.\PhysicalDrive0",
            r"\\?\C:\x",
            "1:/x",
            "/a\0b",
            "/a\nb",
        ] {
            let error = check_location(&labels(&[(ROOTFS_LOCATION, bad)])).unwrap_err();
            assert!(matches!(error, SnapshotRefusal::Invalid(text) if text.contains("location")), "{bad}");
        }
    }

    #[test]
    fn a_scratch_disk_is_shared_with_an_owner_only() {
        for (reuse, owner, expected) in [
            (Some("true"), Some("pod-1"), Some("pod-1")),
            (Some("true"), Some(""), None),
            (Some("true"), None, None),
            (Some("false"), Some("pod-1"), None),
            (None, Some("pod-1"), None),
        ] {
            let pairs: Vec<(&str, &str)> =
                reuse.map(|v| (REUSE_SCRATCH, v)).into_iter().chain(owner.map(|v| (OWNER_KEY, v))).collect();
            assert_eq!(scratch_owner(&labels(&pairs)).unwrap(), expected, "{pairs:?}");
        }
        assert!(scratch_owner(&labels(&[(REUSE_SCRATCH, "yes"), (OWNER_KEY, "pod-1")])).is_err());
    }

    #[test]
    fn maps_are_lists_of_ranges_and_come_in_pairs() {
        let both = |uids, gids| id_maps(&labels(&[(UID_MAPPING, uids), (GID_MAPPING, gids)]));
        let maps = both("0:100000:65536", "0:200000:10,10:300000:5").unwrap();
        assert_eq!(root_of(&maps), (100_000, 200_000));
        let range = |container_id, host_id, size| IdRange { container_id, host_id, size };
        assert_eq!(maps.gids, [range(0, 200_000, 10), range(10, 300_000, 5)]);
        assert_eq!(id_maps(&Labels::new()).unwrap(), IdMaps::default());
        assert_eq!(root_of(&IdMaps::default()), (0, 0));
        for bad in ["", "0:1", "0:1:0", "0:1:2:3", "a:b:c", "0:4294967295:2", "-1:0:1", "0:1:2,"] {
            assert!(matches!(both(bad, "0:1:1"), Err(SnapshotRefusal::Invalid(_))), "{bad}");
            assert!(matches!(both("0:1:1", bad), Err(SnapshotRefusal::Invalid(_))), "{bad}");
        }
        assert!(id_maps(&labels(&[(UID_MAPPING, "0:1:1")])).is_err());
        let long = vec!["0:1:1"; 341].join(",");
        assert!(both(&long, "0:1:1").is_err());
    }
}
