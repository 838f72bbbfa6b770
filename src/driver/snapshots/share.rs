//! One image for all snapshots of the same tar.
//!
//! ```text
//!   staging/{layer.vhd, layer.exact} ─► same diffID, made on the same layers below (or independent of them)?
//!        no: kept          yes: replaced by hard links to the files of the other; both name one image, which is mounted once
//! ```
//!
//! The client has shown the bytes by then, so it learns nothing. Called by `transfer` between check and commit of an apply.

use crate::{
    config::SnapshotSharing,
    driver::home::Home,
    store::{AppliedMeta, DiskThread, LayerId, LayerState, Staged, files, layout},
};
use ext4_image::check::WRITER;
use std::{io, path::Path};

impl Home {
    /// If the store has the image of this tar already, its files take the place of the staged ones; the result are the
    /// facts about the image that is kept.
    pub(super) fn share(
        &self,
        thread: &DiskThread,
        own: &LayerId,
        staged: &Staged,
        applied: AppliedMeta,
    ) -> AppliedMeta {
        let Some(shared) = &applied.shared else { return applied };
        if self.options.sharing == SnapshotSharing::Off {
            return applied;
        }
        let candidates = self.store.layers_where(|layer| {
            let Ok(meta) = &layer.meta else { return false };
            let Some(known) = &meta.applied else { return false };
            known
                .shared
                .as_ref()
                .is_some_and(|s| s.diff_id == shared.diff_id && s.depends_on == shared.depends_on)
                && meta.state == LayerState::Applied
                && known.writer() == WRITER
                && known.checked
                && known.owners == applied.owners
                && known.verity_root.is_some() == applied.verity_root.is_some()
        });
        for layer in candidates {
            let Some(known) = layer.meta.as_ref().ok().and_then(|meta| meta.applied.clone()) else {
                continue;
            };
            match self.link(thread, &layer.id, staged.path()) {
                Ok(()) => {
                    tracing::info!(layer = %own, with = %layer.id, "the layer is known; both share one image");
                    return known;
                }
                // It was removed meanwhile, or has too many links: this layer keeps its own image.
                Err(error) => {
                    tracing::debug!(layer = %own, with = %layer.id, %error, "cannot share an image");
                }
            }
        }
        applied
    }

    /// Replaces the staged files of an image by links to those of another layer.
    fn link(&self, _: &DiskThread, from: &LayerId, staged: &Path) -> io::Result<()> {
        let names = [layout::LAYER_FILE, layout::RECORD_FILE];
        let link = |name: &str| staged.join(format!("{name}.link"));
        for name in names {
            files::hard_link(&self.store.layout().layer_file(from, name), &link(name))?;
        }
        for name in names {
            files::rename(&link(name), &staged.join(name))?;
        }
        Ok(())
    }
}
