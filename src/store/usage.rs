//! Disk use of layers.
//!
//! A file with several names, in one directory or in those of several layers that share an image, takes its bytes once: it
//! counts for the layer that comes first. A link to the scratch disk of another container takes nothing.

use super::{DiskThread, LayerId, Store, StoreError, layout};
use serde::Serialize;
use std::{collections::HashSet, fs, io, path::Path};

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
        self.usage_beside(id, &mut Counted::default())
    }

    /// Disk use of one layer, apart from what was counted before.
    fn usage_beside(&self, id: &LayerId, counted: &mut Counted) -> Result<LayerUsage, StoreError> {
        let folder = self.layout.layer(id);
        let (apparent, allocated) =
            folder_bytes(&folder, counted).map_err(StoreError::io("measure", &folder))?;
        Ok(LayerUsage { id: id.clone(), apparent, allocated })
    }

    /// Disk use of all layers. A layer that is removed meanwhile is left out.
    pub fn usage(&self, _: &DiskThread) -> DiskUsage {
        let (mut layers, mut counted) = (Vec::new(), Counted::default());
        for layer in self.layers() {
            if let Ok(usage) = self.usage_beside(&layer.id, &mut counted) {
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
fn folder_bytes(folder: &Path, counted: &mut Counted) -> io::Result<(u64, u64)> {
    let mut sum = (0, 0);
    for entry in fs::read_dir(folder)? {
        // Of a symbolic link, its own.
        let metadata = entry?.metadata()?;
        if metadata.is_file() && counted.is_new(&metadata) {
            sum.0 += metadata.len();
            sum.1 += allocated_bytes(&metadata);
        }
    }
    Ok(sum)
}

/// Files with several names that were counted.
#[derive(Debug, Default)]
struct Counted(
    /// Device and inode. Files of a single name are not kept.
    HashSet<(u64, u64)>,
);

impl Counted {
    /// Whether a file was not counted yet; from now on it was.
    fn is_new(&mut self, metadata: &fs::Metadata) -> bool {
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            metadata.nlink() < 2 || self.0.insert((metadata.dev(), metadata.ino()))
        }
        // Its standard library does not tell; nothing makes hard links there.
        #[cfg(not(unix))]
        {
            let _ = (&self.0, metadata);
            true
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_file_of_several_names_counts_once() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (folder.path().join("ca"), folder.path().join("cb"));
        for dir in [&first, &second] {
            fs::create_dir(dir).unwrap();
        }
        fs::write(first.join("layer.vhd"), vec![1; 8192]).unwrap();
        for link in [first.join("ca.vhd"), second.join("layer.vhd"), second.join("cb.vhd")] {
            fs::hard_link(first.join("layer.vhd"), link).unwrap();
        }
        fs::write(second.join("snapshot.json"), "{}").unwrap();
        std::os::unix::fs::symlink(first.join("layer.vhd"), second.join("sandbox.vhdx")).unwrap();
        let alone = |dir| folder_bytes(dir, &mut Counted::default()).unwrap().0;
        assert_eq!((alone(&first), alone(&second)), (8192, 8194));
        let mut counted = Counted::default();
        let mut both = |dir| folder_bytes(dir, &mut counted).unwrap().0;
        assert_eq!((both(&first), both(&second)), (8192, 2));
    }
}
