//! Exports the layers of an original LCOW home as tars.
//!
//! ```text
//!   <home>/<id>/layer.vhd         ext4 + VHD footer ──► service VM ──► <directory>/<id>.tar   (canonical, whiteouts as AUFS)
//!   <home>/<id>/layerchain.json   absolute directories, nearest first
//!   <home>/<id>/sandbox.vhdx      a container: left out
//! ```
//!
//! The original kept no exact record: the tars hold what the layers held, but their digests are new. A tar appears
//! whole or not at all, and an existing one is not written again.

use super::{Digest, MigrateError};
use crate::{
    config::Options,
    driver::embedded_config,
    error::{Attempt, with_causes},
    store::{LayerId, chain, files, layout},
    svm::{
        DiskSource, ExportJob, ExportKind, IdMaps, LayerDisk, LayerKind, ParentDisks, Pool, PoolConfig,
        Purpose, embedded::EmbeddedBackend,
    },
};
use futures_util::StreamExt;
use sha2::{Digest as _, Sha256};
use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use vhd_image::vhd;

/// Version of the canonical tar that is written.
const CANONICAL_VERSION: u32 = 1;
/// Time that service VMs get to end.
const GRACE: Duration = Duration::from_secs(5);
/// File name extension of a tar that is being written.
const PART: &str = "part";

/// An exported layer.
#[derive(Debug, Clone, serde::Serialize)]
pub struct ExportedLayer {
    /// Its id.
    pub id: LayerId,
    /// Its parent.
    pub parent: Option<LayerId>,
    /// The tar's file.
    pub file: PathBuf,
    /// Bytes of the tar.
    pub bytes: u64,
    /// Digest of the tar.
    pub digest: String,
    /// An earlier run had written it.
    pub earlier: bool,
}

/// The result of an export.
#[derive(Debug, Default, Clone, serde::Serialize)]
pub struct OriginalReport {
    /// Layers, parents first.
    pub layers: Vec<ExportedLayer>,
    /// Sandboxes: containers, which are left out.
    pub sandboxes_left_out: usize,
    /// Layers that could not be read, and why.
    pub failed: Vec<String>,
}

struct Original {
    id: LayerId,
    chain: Vec<LayerId>,
}

/// Writes each layer of the LCOW home at `home` into `folder`, as `<id>.tar`; `watch` is called for each layer with the
/// number of layers done, the total, and the layer that begins. Needs a tokio runtime.
///
/// # Errors
/// `home` is not an LCOW home, or `folder` cannot be written to. Layers that cannot be read are in the report.
pub async fn export_original(
    home: &Path,
    folder: &Path,
    mut watch: impl FnMut(usize, usize, &LayerId) + Send,
) -> Result<OriginalReport, MigrateError> {
    let (layers, mut report) = list(home)?;
    fs::create_dir_all(folder).map_err(MigrateError::io("create", folder))?;
    let options = Options::load(None, &[]).map_err(|e| MigrateError::Usage(e.to_string()))?;
    let backend = embedded_config(&options);
    let settings = PoolConfig { idle_timeout: options.idle_timeout, ..PoolConfig::default() };
    let pool = Pool::start(Arc::new(EmbeddedBackend::new(backend)), settings);
    for (done, layer) in layers.iter().enumerate() {
        watch(done, layers.len(), &layer.id);
        match write_out(home, folder, layer, &pool).await {
            Ok(exported) => report.layers.push(exported),
            Err(error @ MigrateError::Io(_)) => {
                pool.shutdown(GRACE).await;
                return Err(error);
            }
            Err(error) => report.failed.push(with_causes(&error)),
        }
    }
    pool.shutdown(GRACE).await;
    Ok(report)
}

/// The layers of a home, parents before children.
fn list(home: &Path) -> Result<(Vec<Original>, OriginalReport), MigrateError> {
    let (mut layers, mut report) = (Vec::new(), OriginalReport::default());
    for entry in fs::read_dir(home).map_err(MigrateError::io("list", home))? {
        let path = entry.map_err(MigrateError::io("list", home))?.path();
        let Some(id) = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse::<LayerId>().ok())
        else {
            continue;
        };
        if path.join(layout::LAYER_FILE).is_file() {
            match chain::read(&path) {
                Ok(chain) => layers.push(Original { id, chain }),
                Err(error) => report.failed.push(format!("layer {id}: {}", with_causes(&error))),
            }
        } else if path.join(layout::SANDBOX_VHDX_FILE).exists() {
            report.sandboxes_left_out += 1;
        }
    }
    if layers.is_empty() && report.failed.is_empty() {
        return Err(MigrateError::Usage(format!(
            "'{}' is not an LCOW home: none of its directories has a {}",
            home.display(),
            layout::LAYER_FILE
        )));
    }
    layers.sort_by(|a, b| (a.chain.len(), &a.id).cmp(&(b.chain.len(), &b.id)));
    Ok((layers, report))
}

async fn write_out(
    home: &Path,
    folder: &Path,
    layer: &Original,
    pool: &Pool,
) -> Result<ExportedLayer, MigrateError> {
    let file = folder.join(format!("{}.tar", layer.id));
    let done = |bytes, digest: Digest, earlier| ExportedLayer {
        id: layer.id.clone(),
        parent: layer.chain.first().cloned(),
        file: file.clone(),
        bytes,
        digest: digest.to_string(),
        earlier,
    };
    if file.exists() {
        let (bytes, digest) = measure(&file).map_err(MigrateError::io("read", &file))?;
        return Ok(done(bytes, digest, true));
    }
    let target = std::iter::once(&layer.id)
        .chain(&layer.chain)
        .map(|id| disk(&home.join(id.as_str()).join(layout::LAYER_FILE)))
        .collect::<Result<_, _>>()?;
    let svm = |source| MigrateError::from(Attempt::on_layer("read it in a service VM", &layer.id)(source));
    let lease = pool.lease(layer.id.as_str(), Purpose::Export).await.map_err(svm)?;
    let kind = ExportKind::Canonical {
        target,
        parent: ParentDisks::Own,
        format: CANONICAL_VERSION,
        id_maps: IdMaps::default(),
        source_date_epoch: None,
    };
    let mut tar = lease.layer_to_tar(ExportJob { kind, live: None }).await.map_err(svm)?;
    let part = file.with_extension(PART);
    let failed = |action| MigrateError::io(action, &part);
    let mut out = File::create(&part).map_err(failed("create"))?;
    let (mut hash, mut bytes) = (Sha256::new(), 0);
    let outcome = loop {
        match tar.next().await {
            Some(Ok(chunk)) => {
                hash.update(&chunk);
                bytes += chunk.len() as u64;
                out.write_all(&chunk).map_err(failed("write"))?;
            }
            Some(Err(error)) => break Err(svm(error)),
            None if tar.complete() => break Ok(()),
            None => break Err(MigrateError::corrupt(&part, "the service VM's tar ended early")),
        }
    };
    if let Err(error) = outcome {
        fs::remove_file(&part).map_err(failed("delete"))?;
        return Err(error);
    }
    out.sync_all().map_err(failed("sync"))?;
    fs::rename(&part, &file).map_err(MigrateError::io("rename to", &file))?;
    files::sync_dir(folder)?;
    Ok(done(bytes, Digest::from_hash(hash), false))
}

fn measure(path: &Path) -> io::Result<(u64, Digest)> {
    let (mut file, mut hash, mut buffer) = (File::open(path)?, Sha256::new(), vec![0; 1 << 20]);
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((bytes, Digest::from_hash(hash))),
            n => {
                hash.update(&buffer[..n]);
                bytes += n as u64;
            }
        }
    }
}

/// A layer's image without its footer.
fn disk(path: &Path) -> Result<LayerDisk, MigrateError> {
    let corrupt = |reason: &dyn std::fmt::Display| MigrateError::corrupt(path, reason);
    // A missing file affects only its own layer.
    let file = File::open(path).map_err(|e| corrupt(&format_args!("cannot open it: {e}")))?;
    let length = file.metadata().map_err(|e| corrupt(&e))?.len();
    let at = length
        .checked_sub(vhd::FOOTER_SIZE as u64)
        .ok_or_else(|| corrupt(&"it is shorter than a VHD's footer"))?;
    let mut bytes = [0; vhd::FOOTER_SIZE];
    file.read_exact_at(&mut bytes, at).map_err(|e| corrupt(&e))?;
    let footer = vhd::Footer::parse(&bytes).map_err(|e| corrupt(&e))?;
    if footer.disk_bytes > at {
        return Err(corrupt(&"the file is shorter than its VHD footer says; it was truncated"));
    }
    let disk = DiskSource::read_only(Arc::new(file), path).window(0, footer.disk_bytes);
    Ok(LayerDisk { disk, kind: LayerKind::Applied })
}
