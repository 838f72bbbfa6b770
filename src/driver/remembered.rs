//! Files of live sandboxes that changed while they were exported, for the next attempt.
//!
//! ```text
//!   export fails: file changed ── note ──► Remembered ── of ──► next export copies these files whatever their age
//! ```
//!
//! In memory only, and bounded: what is forgotten costs one more failed attempt. An entry belongs to one generation of
//! a layer, so a later layer of the same id starts afresh. Called by `live`; kept by `home` across Inits.

use crate::{
    store::{Layer, LayerId},
    svm::LiveFile,
};
use parking_lot::Mutex;
use std::{collections::HashMap, fs::File, sync::Arc};

/// A sandbox among the layers of a comparison.
#[derive(Debug, Clone)]
pub(super) struct Sandbox {
    pub(super) layer: Layer,
    #[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "for clones, which only Linux makes"))]
    pub(super) file: Arc<File>,
    /// Its position in the exported stack; `None` in the stack that it is compared with.
    pub(super) in_target: Option<u16>,
}

/// Most layers that are remembered.
const MOST_LAYERS: usize = 256;
/// Most files of one layer; the oldest are dropped first.
const MOST_FILES: usize = 1024;

/// The files that made exports fail, by layer.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    /// By layer: its generation, and inode numbers, the latest last.
    files: Mutex<HashMap<LayerId, (u64, Vec<u32>)>>,
}

impl Remembered {
    /// Keeps `files`, which changed while `sandboxes` were exported.
    pub(super) fn note(&self, sandboxes: &[Sandbox], files: &[LiveFile]) {
        let mut all = self.files.lock();
        for file in files {
            let Some(sandbox) = sandboxes.iter().find(|s| s.in_target == Some(file.layer)) else { continue };
            let layer = &sandbox.layer;
            if all.len() >= MOST_LAYERS && !all.contains_key(&layer.id) {
                // Forgetting a layer costs one more attempt, so any policy will do.
                all.clear();
            }
            let (generation, inodes) = all.entry(layer.id.clone()).or_default();
            if *generation != layer.generation {
                (*generation, *inodes) = (layer.generation, Vec::new());
            }
            inodes.retain(|inode| *inode != file.inode);
            if inodes.len() >= MOST_FILES {
                inodes.remove(0);
            }
            inodes.push(file.inode);
        }
    }

    /// The remembered files of those `sandboxes` that are part of the exported stack.
    #[cfg(target_os = "linux")]
    pub(super) fn of(&self, sandboxes: &[Sandbox]) -> Vec<LiveFile> {
        let all = self.files.lock();
        let mut files = Vec::new();
        for sandbox in sandboxes {
            if let (Some(layer), Some((generation, inodes))) = (sandbox.in_target, all.get(&sandbox.layer.id))
                && *generation == sandbox.layer.generation
            {
                files.extend(inodes.iter().map(|inode| LiveFile { layer, inode: *inode }));
            }
        }
        files
    }
}
