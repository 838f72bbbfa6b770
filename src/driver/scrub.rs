//! Scrub: checks that every layer still is what was applied.
//!
//! For each layer: its directory agrees with `layer.json`; its image passes the strict check in a fresh service VM, and
//! every block matches the hash tree if there is one; its footer is the one that was written, and there is nothing
//! outside of these; its exact tar, read back, has the recorded digest.
//!
//! Writer 1, of release 1, made some images that the current check rejects. Those are counted separately: their content
//! is unchanged, but they are worth pulling again. A wrong checksum is damage, whichever writer made the image.

use super::{Driver, DriverError, blocking, image::check_footer, on_disk_thread};
use crate::{
    error::CorruptFile,
    store::{LayerId, LayerState, layout},
    svm::{CheckJob, ExportJob, ExportKind, IdMaps, Purpose, RootHash, SvmError},
};
use ext4_image::check::WRITER;
use futures_util::StreamExt;
use serde::Serialize;
use vhd_image::vhd;

/// One fault.
#[derive(Debug, Clone, Serialize)]
pub struct ScrubFinding {
    /// The layer.
    pub id: LayerId,
    /// What is wrong with it.
    pub fault: String,
}

/// Result of a scrub.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ScrubReport {
    /// Layers examined.
    pub layers: usize,
    /// Images checked and tars read back.
    pub images: usize,
    /// Bytes of tar read back.
    pub tar_bytes: u64,
    /// Layers whose ApplyDiff was cut: refused until removed, but not a fault of the store.
    pub unfinished: Vec<LayerId>,
    /// Layers made by writer 1: intact, but worth pulling again if the current writer makes a different image of their
    /// tar.
    pub writer_1: Vec<LayerId>,
    /// Those of them that the current check rejects, and why.
    pub writer_1_differs: Vec<ScrubFinding>,
    /// Faults.
    pub faults: Vec<ScrubFinding>,
}

/// An intact layer.
struct Scrubbed {
    tar_bytes: u64,
    writer: u32,
    /// Why the current check rejects its image, if writer 1 made it.
    differs: Option<String>,
}

/// Whether a check rejected something that writer 1 made on purpose.
fn of_writer_1(error: &SvmError) -> bool {
    matches!(error, SvmError::Refused(_)) && !error.to_string().contains("checksum")
}

impl Driver {
    /// Examines every layer of the current home; calls `progress` with the number of layers done and of all.
    pub async fn scrub(
        &self,
        mut progress: impl FnMut(usize, usize) + Send,
    ) -> Result<ScrubReport, DriverError> {
        let home = self.home().await?;
        let mut report = ScrubReport::default();
        let looking = home.clone();
        for (id, fault) in on_disk_thread(move |thread| Ok(looking.store.structural_faults(thread))).await? {
            report.faults.push(ScrubFinding { id, fault });
        }
        let layers = home.store.layers();
        let all = layers.len();
        for (done, layer) in layers.into_iter().enumerate() {
            progress(done, all);
            report.layers += 1;
            let Ok(meta) = &layer.meta else { continue };
            match meta.state {
                LayerState::Applying => report.unfinished.push(layer.id.clone()),
                LayerState::Applied => match self.scrub_image(&layer.id).await {
                    Ok(Scrubbed { tar_bytes, writer, differs }) => {
                        report.images += 1;
                        report.tar_bytes += tar_bytes;
                        if writer < WRITER {
                            report.writer_1.push(layer.id.clone());
                        }
                        let finding = |fault| ScrubFinding { id: layer.id.clone(), fault };
                        report.writer_1_differs.extend(differs.map(finding));
                    }
                    Err(error) => {
                        let fault = error.for_log();
                        report.faults.push(ScrubFinding { id: layer.id.clone(), fault });
                    }
                },
                LayerState::Created | LayerState::Sandbox => {}
            }
        }
        progress(all, all);
        Ok(report)
    }

    async fn scrub_image(&self, id: &LayerId) -> Result<Scrubbed, DriverError> {
        let home = self.home().await?;
        let snapshot = home.store.snapshot(id)?;
        let meta = snapshot.top.meta.clone();
        let file = |name: &str| home.store.layout().layer_file(id, name);
        let opener = home.clone();
        let (image, record) = blocking(move || opener.exact_disks(&snapshot)).await?;
        let applied = meta.applied.clone().ok_or_else(|| {
            CorruptFile::new(
                file(layout::META_FILE),
                "state is 'applied', but the field 'applied' is missing",
            )
        })?;
        let (root, writer) = (applied.verity_root, applied.writer());
        let disk = applied.file_bytes.saturating_sub(vhd::FOOTER_SIZE as u64);
        let check = CheckJob {
            image: image.clone().window(0, disk),
            tree: root.is_some(),
            writer,
            require_no_writers: false,
            owners: IdMaps::default(),
        };
        let (found, profile, differs) = match home.pool.check_image(check).await {
            Ok(found) => (found.verity, Some(found.profile), None),
            Err(error) if writer < WRITER && of_writer_1(&error) => {
                (root, None, Some(format!("made by writer 1: {}", error.with_console())))
            }
            Err(error) => return Err(DriverError::svm(id, "verify its image")(error)),
        };
        if found != root {
            let text = |root: Option<RootHash>| root.map_or_else(|| "no hash tree".into(), |r| r.to_string());
            let reason = format!("dm-verity root mismatch: expected {}, found {}", text(root), text(found));
            return Err(CorruptFile::new(file(layout::LAYER_FILE), reason).into());
        }
        let known = applied.tar_digest;
        if let Some(profile) = profile {
            let image = image.clone();
            blocking(move || check_footer(&image, &applied, profile)).await?;
        }
        let lease = home
            .pool
            .lease(id.as_str(), Purpose::Export)
            .await
            .map_err(DriverError::svm(id, "start a diff"))?;
        let job = ExportJob { kind: ExportKind::Exact { image, record }, live: None };
        let mut tar = lease.layer_to_tar(job).await.map_err(DriverError::svm(id, "read its tar back"))?;
        // Computed here as well: a worker's digest of its own output proves nothing.
        let mut hash = known.kind.hasher();
        let mut bytes = 0;
        while let Some(chunk) = tar.next().await {
            let chunk = chunk.map_err(DriverError::svm(id, "read its tar back"))?;
            hash.update(&chunk);
            bytes += chunk.len() as u64;
        }
        let digest = hash.finish();
        if !tar.complete() || digest != known {
            let reason = format!("tar digest mismatch: expected {known}, found {digest}");
            return Err(CorruptFile::new(file(layout::RECORD_FILE), reason).into());
        }
        Ok(Scrubbed { tar_bytes: bytes, writer, differs })
    }
}
