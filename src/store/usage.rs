//! Disk use of layers.

use super::{DiskThread, LayerId, Store, StoreError, layout};
use serde::Serialize;
use std::{fs, io, path::Path};

/// Sizes of one layer's files.
#[derive(Debug, Clone, Serialize)]
pub struct LayerUsage {
    /// The layer.
    pub id: LayerId,
    /// Sum of its files' lengths in bytes.
    pub apparent: u64,
    /// Bytes that they take on the disk; less for sparse files.
    pub allocated: u64,
}

/// Sizes of a whole store.
#[derive(Debug, Clone, Serialize)]
pub struct DiskUsage {
    /// Each layer.
    pub layers: Vec<LayerUsage>,
    /// Bytes that staging, scratch and caches take.
    pub other_allocated: u64,
}

impl Store {
    /// Disk use of one layer.
    pub fn layer_usage(&self, _: &DiskThread, id: &LayerId) -> Result<LayerUsage, StoreError> {
        let folder = self.layout.layer(id);
        let (apparent, allocated) = folder_bytes(&folder).map_err(StoreError::io("measure", &folder))?;
        Ok(LayerUsage { id: id.clone(), apparent, allocated })
    }

    /// Disk use of all layers. A layer that is removed meanwhile is left out.
    pub fn usage(&self, thread: &DiskThread) -> DiskUsage {
        let mut layers = Vec::new();
        for layer in self.layers() {
            if let Ok(usage) = self.layer_usage(thread, &layer.id) {
                layers.push(usage);
            }
        }
        let mut other_allocated = 0;
        for name in [layout::STAGING, layout::SCRATCH, layout::CACHE] {
            other_allocated += tree_allocated(&self.layout.top(name));
        }
        DiskUsage { layers, other_allocated }
    }
}

/// Length and disk use of the files directly in a directory; mounts below it are not entered.
fn folder_bytes(folder: &Path) -> io::Result<(u64, u64)> {
    let mut sum = (0, 0);
    for entry in fs::read_dir(folder)? {
        let metadata = entry?.metadata()?;
        if metadata.is_file() {
            sum.0 += metadata.len();
            sum.1 += allocated_bytes(&metadata);
        }
    }
    Ok(sum)
}

fn tree_allocated(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .filter_map(|e| Some((e.path(), e.metadata().ok()?)))
        .map(
            |(path, metadata)| {
                if metadata.is_dir() { tree_allocated(&path) } else { allocated_bytes(&metadata) }
            },
        )
        .sum()
}

/// Bytes that a file takes on the disk.
pub fn allocated_bytes(metadata: &fs::Metadata) -> u64 {
    #[cfg(unix)]
    {
        /// `st_blocks` counts units of 512 bytes, whatever the file system's block size.
        const UNIT: u64 = 512;
        std::os::unix::fs::MetadataExt::blocks(metadata) * UNIT
    }
    #[cfg(not(unix))]
    {
        metadata.len()
    }
}
