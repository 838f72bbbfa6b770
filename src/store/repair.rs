//! Debris: what a crash left behind, and its deletion.

use super::{DiskThread, LayerId, REMOVING_SUFFIX, Store, StoreError, files, layout};
use serde::Serialize;
use std::{fs, io, path::PathBuf};

/// One thing that a crash or an earlier version left behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Debris {
    /// Its path.
    pub path: PathBuf,
    /// What it is.
    pub kind: &'static str,
}

/// Result of a collection.
#[derive(Debug, Default, Serialize)]
pub struct GcReport {
    /// Deleted debris.
    pub deleted: Vec<Debris>,
    /// Debris that could not be deleted, and why.
    pub failed: Vec<(PathBuf, String)>,
}

impl Store {
    /// Lists debris. While an owner runs, the staging directory also holds live work, so the owner calls this at its
    /// start, before it serves requests.
    pub fn debris(&self, _: &DiskThread) -> Result<Vec<Debris>, StoreError> {
        let mut found = Vec::new();
        for (folder, kind) in [
            (layout::STAGING, "unfinished layer"),
            (layout::SCRATCH, "scratch disk"),
            (layout::CACHE, "cached blank"),
        ] {
            let path = self.layout.top(folder);
            for entry in fs::read_dir(&path).map_err(StoreError::io("list", &path))? {
                let entry = entry.map_err(StoreError::io("list", &path))?;
                let removing = entry.file_name().to_string_lossy().contains(REMOVING_SUFFIX);
                found
                    .push(Debris { path: entry.path(), kind: if removing { "removed layer" } else { kind } });
            }
        }
        let home = self.layout.home();
        for entry in fs::read_dir(home).map_err(StoreError::io("list", home))? {
            let entry = entry.map_err(StoreError::io("list", home))?;
            // The original driver renamed a directory to `<id>-removing` in place.
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.strip_suffix(REMOVING_SUFFIX).is_some_and(|id| id.parse::<LayerId>().is_ok()) {
                found.push(Debris { path: entry.path(), kind: "removed layer" });
            }
        }
        Ok(found)
    }

    /// Deletes the given debris; never touches a layer.
    #[expect(clippy::unused_self, reason = "only a process that has the store open may delete in it")]
    pub fn collect(&self, _: &DiskThread, debris: Vec<Debris>) -> GcReport {
        let mut report = GcReport::default();
        for item in debris {
            let deleted = match fs::symlink_metadata(&item.path) {
                Ok(metadata) if metadata.is_dir() => files::remove_tree(&item.path),
                Ok(_) => files::remove_file(&item.path),
                Err(e) => Err(e),
            };
            match deleted {
                Ok(()) => report.deleted.push(item),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => report.failed.push((item.path, e.to_string())),
            }
        }
        report
    }

    /// Faults of layers that show without opening an image, as `(layer, fault)`.
    pub fn structural_faults(&self, _: &DiskThread) -> Vec<(LayerId, String)> {
        let mut faults = Vec::new();
        for id in self.strangers() {
            let (meta, chain) = (layout::META_FILE, layout::CHAIN_FILE);
            faults.push((id, format!("no layer: {meta} and {chain} are missing, so this store did not make it and leaves it alone; move it away")));
        }
        for layer in self.layers() {
            let mut fault = |text: String| faults.push((layer.id.clone(), text));
            for ancestor in layer.chain.iter().filter(|a| !self.exists(a)) {
                fault(format!("its ancestor {ancestor} is missing"));
            }
            if let Some(parent) = layer.parent()
                && let Ok(found) = self.find(parent)
                && found.chain[..] != layer.chain[1..]
            {
                fault(format!("its chain disagrees with the chain of its parent {parent}"));
            }
            let meta = match &layer.meta {
                Ok(meta) => meta,
                Err(reason) => {
                    fault(reason.to_string());
                    continue;
                }
            };
            let size = |name: &str| fs::metadata(self.layout.layer_file(&layer.id, name)).map(|m| m.len());
            match (meta.state, &meta.applied) {
                (super::LayerState::Applied, Some(applied)) => {
                    for (name, expected) in [
                        (layout::LAYER_FILE, applied.file_bytes),
                        (layout::RECORD_FILE, applied.record_bytes),
                    ] {
                        match size(name) {
                            Ok(found) if found == expected => {}
                            Ok(found) => fault(format!("{name} has {found} bytes instead of {expected}")),
                            Err(e) => fault(format!("{name}: {e}")),
                        }
                    }
                }
                (super::LayerState::Applied, None) => {
                    fault("it is applied, but layer.json does not describe its image".into());
                }
                (super::LayerState::Sandbox, _) => {
                    if size(layout::SANDBOX_FILE).or_else(|_| size(layout::SANDBOX_VHDX_FILE)).is_err() {
                        fault("its sandbox file is missing".into());
                    }
                }
                (super::LayerState::Created | super::LayerState::Applying, _) => {}
            }
        }
        faults
    }
}
