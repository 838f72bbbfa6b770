//! `snapshot.json`: a layer of a containerd snapshotter, its name included.
//!
//! ```text
//!   snapshot.json = the fields of layer.json, and "snapshot": {name, kind, labels, times, chain, …}
//!
//!   Prepare ──► active "key" ──Commit──► committed "name"     one rename of this file: key gone, name there
//!   View    ──► view   "key"
//! ```
//!
//! A store of snapshots has this one file a layer instead of `layer.json` and `layerchain.json`, so that name, state and
//! chain change together. There is no other record of names: the index of a start is read from these files.
//!
//! Invariants:
//! * Keys and names are one name space, of free text; the directory's name is a [`LayerId`] that is never used again.
//! * A container may use the scratch disk of another one ([`SnapshotMeta::scratch_of`]). That one is then neither removed
//!   nor committed, like a parent.
//! * A snapshot that was committed while its data were not on the disk yet carries the id of that boot
//!   ([`SnapshotMeta::unsynced`]). In another boot it is not listed, and neither is what stands on it: it may be cut.
//!
//! Called by `store` alone; `driver` reads the types.

use super::LayerId;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// What a snapshot is for; the names are those of containerd's API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotKind {
    /// A read-only view of a committed snapshot.
    View,
    /// Writable: of a container, or waiting for its tar.
    Active,
    /// Immutable; can be a parent.
    Committed,
}

/// A time with nanoseconds: containerd compares the times of two replies for equality.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Moment {
    /// Seconds since 1970.
    pub secs: u64,
    /// Nanoseconds of the second.
    pub nanos: u32,
}

impl Moment {
    /// The present; 1970 if the clock is set before that.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self { secs: since.as_secs(), nanos: since.subsec_nanos() }
    }
}

/// What a snapshot takes, as containerd's overlayfs snapshotter would count it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotUsage {
    /// Bytes of the blocks of its files and directories.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// The part of `snapshot.json` that a layer of the Docker face does not have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMeta {
    /// Key of an active snapshot or view, name of a committed one.
    pub name: String,
    /// What it is.
    pub kind: SnapshotKind,
    /// Ancestors, nearest first.
    #[serde(default, with = "chain_as_list")]
    pub chain: Arc<[LayerId]>,
    /// When it was created, or committed.
    pub created: Moment,
    /// When its labels last changed.
    pub updated: Moment,
    /// Labels, as given.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Of a committed snapshot: fixed at Commit. Of an active one: the last value that was seen while it was mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<SnapshotUsage>,
    /// The snapshot whose scratch disk this container uses instead of one of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch_of: Option<LayerId>,
    /// The boot in which it was committed, until its data are on the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsynced: Option<String>,
}

/// A chain is a list in JSON, and one allocation with the index's in memory.
mod chain_as_list {
    use super::{Arc, LayerId};
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    pub(super) fn serialize<S: Serializer>(chain: &Arc<[LayerId]>, output: S) -> Result<S::Ok, S::Error> {
        chain.as_ref().serialize(output)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Arc<[LayerId]>, D::Error> {
        Ok(Vec::deserialize(input)?.into())
    }
}

impl SnapshotMeta {
    /// Whether its data may have been lost by a reboot: it was committed in another boot than `boot` and never synced.
    pub fn may_be_cut(&self, boot: &str) -> bool {
        self.unsynced.as_deref().is_some_and(|then| then != boot)
    }
}

/// The id of this boot of the kernel; random, so that no two boots share one.
#[cfg(target_os = "linux")]
pub fn boot_id() -> String {
    /// Linux's documentation of `/proc/sys/kernel/random`: constant until the next boot.
    const SOURCE: &str = "/proc/sys/kernel/random/boot_id";
    std::fs::read_to_string(SOURCE)
        .map_or_else(|_| uuid::Uuid::new_v4().to_string(), |text| text.trim().to_owned())
}

/// An id that no other process has: elsewhere nothing is committed before it is synced.
#[cfg(not(target_os = "linux"))]
pub fn boot_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// Digits of a snapshot's id: those of base 32 in lower case (RFC 4648), which no file system confuses.
const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
/// First letter of a snapshot's id.
const ID_LETTER: char = 'c';

/// The id of snapshot number `number`: `c` and the number in base 32; `None` if that name is reserved ("con", "cache").
///
/// Short, because 127 of them have to fit into one page of mount options.
pub fn snapshot_id(number: u64) -> Option<LayerId> {
    let mut digits = Vec::new();
    let mut left = number;
    loop {
        digits.push(DIGITS[(left % 32) as usize]);
        left /= 32;
        if left == 0 {
            break;
        }
    }
    let text: String = std::iter::once(ID_LETTER).chain(digits.iter().rev().map(|d| *d as char)).collect();
    text.parse().ok()
}

/// The number of a snapshot's id: a larger one was created later. `None` for any other id.
pub(super) fn snapshot_number(id: &LayerId) -> Option<u64> {
    let digits = id.as_str().strip_prefix(ID_LETTER)?;
    digits.bytes().try_fold(0u64, |number, byte| {
        let digit = DIGITS.iter().position(|d| *d == byte)? as u64;
        number.checked_mul(DIGITS.len() as u64)?.checked_add(digit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{LayerMeta, LayerState, LayerWishes};
    use std::collections::HashSet;

    #[test]
    fn ids_are_short_different_and_never_reserved_names() {
        let ids: Vec<Option<LayerId>> = (0..100_000).map(snapshot_id).collect();
        let valid: HashSet<&LayerId> = ids.iter().flatten().collect();
        assert_eq!(valid.len(), ids.iter().flatten().count(), "no number shares an id");
        for number in 0..100_000 {
            if let Some(id) = snapshot_id(number) {
                assert_eq!(snapshot_number(&id), Some(number));
            }
        }
        assert_eq!(snapshot_id(0).unwrap().as_str(), "ca");
        assert_eq!(snapshot_id(33).unwrap().as_str(), "cbb");
        // "on" in base 32: Windows reserves the name of the console.
        assert_eq!(snapshot_id(14 * 32 + 13), None);
        assert!(ids.iter().flatten().all(|id| id.as_str().len() <= 5));
        assert!(snapshot_id(u64::MAX).unwrap().as_str().len() <= 14);
    }

    #[test]
    fn the_file_is_that_of_a_layer_and_more() {
        let snapshot = SnapshotMeta {
            name: "default/1/extract-6 sha256:ab".into(),
            kind: SnapshotKind::Active,
            chain: ["ca".parse().unwrap()].into(),
            created: Moment { secs: 1, nanos: 2 },
            updated: Moment { secs: 3, nanos: 4 },
            labels: [("k".to_owned(), "v".to_owned())].into(),
            usage: None,
            scratch_of: None,
            unsynced: None,
        };
        let meta = LayerMeta {
            snapshot: Some(snapshot),
            ..LayerMeta::new(LayerState::Created, 7, LayerWishes::default())
        };
        let text = serde_json::to_string(&meta).unwrap();
        assert_eq!(serde_json::from_str::<LayerMeta>(&text).unwrap(), meta);
        assert!(
            text.contains(r#""name":"default/1/extract-6 sha256:ab","kind":"active","chain":["ca"]"#),
            "{text}"
        );
        let docker = LayerMeta::new(LayerState::Created, 7, LayerWishes::default());
        assert_eq!(serde_json::to_string(&docker).unwrap(), r#"{"state":"created","created":7}"#);
    }

    #[test]
    fn only_another_boot_makes_an_unsynced_snapshot_doubtful() {
        let mut meta = SnapshotMeta {
            name: "n".into(),
            kind: SnapshotKind::Committed,
            chain: Arc::default(),
            created: Moment::default(),
            updated: Moment::default(),
            labels: BTreeMap::new(),
            usage: None,
            scratch_of: None,
            unsynced: Some("one".into()),
        };
        assert!(!meta.may_be_cut("one") && meta.may_be_cut("two"));
        meta.unsynced = None;
        assert!(!meta.may_be_cut("two"));
    }
}
