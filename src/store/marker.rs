//! The store marker, which holds the last Init.

use super::{StoreError, durable, layout};
use layer_codec::IdRange;
use serde::{Deserialize, Serialize};
use std::{
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

/// The store format that this program writes.
pub const STORE_FORMAT: u32 = 1;

/// The last Init for this home. The engine does not repeat it after a crash of the plugin.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitRecord {
    /// `--storage-opt` of the engine, `key=value`.
    #[serde(default)]
    pub opts: Vec<String>,
    /// User map; empty without userns-remap.
    #[serde(default)]
    pub uid_maps: Vec<IdRange>,
    /// Group map.
    #[serde(default)]
    pub gid_maps: Vec<IdRange>,
}

impl InitRecord {
    /// The host's ids of the containers' root: 0 without userns-remap.
    pub fn root_ids(&self) -> (u32, u32) {
        let host = |maps: &[IdRange]| maps.iter().find(|m| m.container_id == 0).map_or(0, |m| m.host_id);
        (host(&self.uid_maps), host(&self.gid_maps))
    }

    /// With userns-remap: the group of the mapped root, which must be able to reach the merged views.
    pub fn passing_group(&self) -> Option<u32> {
        let (uid, gid) = self.root_ids();
        ((uid, gid) != (0, 0)).then_some(gid)
    }
}

/// `lcow-store.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    /// Format of the whole store.
    pub format: u32,
    /// Names this store in logs, whatever its path.
    pub store_id: uuid::Uuid,
    /// The reply to Capabilities. Fixed when the store is created, because the engine decides by it whether it keeps
    /// tar-split data of its own.
    pub reproduces_exact_diffs: bool,
    /// When release 2 first opened the store, in seconds since 1970; 0 if it created the store. Layers that were
    /// written before have version 1 of the canonical tar unless `layer.json` says otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release_2_since: Option<u64>,
    /// The last Init.
    #[serde(default)]
    pub init: InitRecord,
    /// Present in a store of snapshots: all numbers below this may have been given to snapshots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_numbers: Option<u64>,
}

impl Marker {
    /// The marker of a new store.
    pub fn new() -> Self {
        Self {
            snapshot_numbers: None,
            format: STORE_FORMAT,
            store_id: uuid::Uuid::new_v4(),
            reproduces_exact_diffs: true,
            release_2_since: Some(0),
            init: InitRecord::default(),
        }
    }

    /// Reads the marker of a home; `None` if there is no store yet.
    pub fn read(home: &Path) -> Result<Option<Self>, StoreError> {
        /// Only the format, to tell a marker of a later format from a damaged one.
        #[derive(Deserialize)]
        struct FormatOnly {
            format: u32,
        }
        let path = home.join(layout::MARKER);
        let Some(value) = durable::read_json::<serde_json::Value>(&path)? else { return Ok(None) };
        let corrupt = |e: serde_json::Error| StoreError::corrupt(path.clone(), e.to_string());
        let FormatOnly { format } = FormatOnly::deserialize(&value).map_err(corrupt)?;
        if format != STORE_FORMAT {
            return Err(StoreError::UnsupportedFormat {
                home: home.to_owned(),
                found: format,
                known: STORE_FORMAT,
            });
        }
        Self::deserialize(value).map(Some).map_err(corrupt)
    }

    /// Records durably when release 2 first opened a store of release 1, before anything else is written into it.
    pub(super) fn note_release_2(&mut self, home: &Path) -> Result<(), StoreError> {
        if self.release_2_since.is_none() {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            let noted = Self { release_2_since: Some(now), ..self.clone() };
            noted.write(home)?;
            *self = noted;
        }
        Ok(())
    }

    /// Version of the canonical tar of a layer without a recorded one, by its creation time (seconds since 1970) or if
    /// this process created it.
    pub fn canonical_version_of(&self, created: u64, made_here: bool) -> u32 {
        /// Versions of release 1 and of this release.
        const VERSIONS: [u32; 2] = [1, 2];
        VERSIONS[usize::from(made_here || self.release_2_since.is_some_and(|since| created > since))]
    }

    /// Writes the marker.
    pub fn write(&self, home: &Path) -> Result<(), StoreError> {
        durable::write_json(&home.join(layout::MARKER), self)
    }
}

impl Default for Marker {
    fn default() -> Self {
        Self::new()
    }
}
