//! Imports an engine's data root, on overlay2 or vfs, into a store and the engine's database for it.
//!
//! ```text
//!   for each layer of an image, parents first:
//!     thread:  tar-split.json.gz + layer directory ─► tar ─► digest checked before the end is sent ────┐ 4 chunks
//!     driver:  Create, ApplyDiff (service VM, strict check, commit) ◄──────────────────────────────────┘
//!     then     image/lcow/layerdb/sha256/<chain id>
//!   for each image whose layers are there:   image/lcow/imagedb;  at last the names
//! ```

use super::{
    Digest, EngineDb, LayerNote, MigrateError, SplitError,
    tarsplit::{self},
    tree::Tree,
};
use crate::{
    driver::{Driver, LayerRequest},
    error::with_causes,
    store::LayerId,
};
use bytes::Bytes;
use futures_util::StreamExt;
use sha2::{Digest as _, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{File, TryLockError},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::sync::mpsc;

/// Storage drivers whose layers can be read, and the directory of one layer's files below the data root.
const READABLE: [(&str, &str, &str); 2] = [("overlay2", "overlay2", "diff"), ("vfs", "vfs/dir", "")];
/// Bytes passed on at a time.
const CHUNK: usize = 256 << 10;
/// Chunks between the thread that rebuilds a tar and the one that applies it.
const QUEUED: usize = 4;
/// A file that the engine locks while it runs (its volume database, in 20.10 and later).
const RUNNING: &str = "volumes/metadata.db";

/// Progress of an import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// This many layers, with this many bytes of files, will be imported.
    Planned {
        /// Layers.
        layers: usize,
        /// Bytes.
        bytes: u64,
    },
    /// A layer begins.
    Layer {
        /// Counted from 1.
        number: usize,
        /// Its id in the store.
        id: LayerId,
        /// Bytes of its files.
        bytes: u64,
    },
    /// This many more bytes of its tar were made.
    Bytes(u64),
    /// A layer is in the store (perhaps from an earlier run).
    Done {
        /// Bytes of its files.
        bytes: u64,
        /// An earlier run imported it.
        earlier: bool,
    },
    /// A layer could not be imported; its descendants are left out.
    Failed(String),
}

/// What can be imported.
#[derive(Debug)]
pub struct Found {
    data_root: PathBuf,
    driver: &'static str,
    db: EngineDb,
    /// Images.
    pub images: usize,
    /// Layers of images, parents first.
    layers: Vec<LayerNote>,
    notes: Vec<super::ImageNote>,
    /// The parts of the engine's databases that cannot be read.
    faults: Vec<String>,
    /// Number of containers, which are not imported.
    pub containers: usize,
    /// Held so that no engine starts on the source during the import.
    _still: Option<File>,
}

impl Found {
    /// The storage driver whose layers these are.
    pub fn driver(&self) -> &str {
        self.driver
    }
    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }
}

/// The result of an import.
#[derive(Debug, Default, Clone, serde::Serialize)]
pub struct Report {
    /// Layers imported by this run.
    pub layers: usize,
    /// Layers that earlier runs had imported.
    pub layers_earlier: usize,
    /// Images that are in the engine's database now.
    pub images: usize,
    /// Names that were added.
    pub names: usize,
    /// Names that refer to another image in the target, and were left unchanged.
    pub names_taken: Vec<String>,
    /// Layers, images and notes that could not be imported, and why.
    pub failed: Vec<String>,
    /// Ids of the images that are left out because of them.
    pub images_left_out: Vec<String>,
    /// The same images, with their names and the reason of each.
    pub left_out: Vec<LeftOut>,
    /// Why the run ended before the last layer; the next run continues from here.
    pub stopped: Option<String>,
    /// Number of containers in the source, which are not imported.
    pub containers_left_out: usize,
}

/// An image that is left out.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct LeftOut {
    /// Its id.
    pub image: String,
    /// Its names in the source.
    pub names: Vec<String>,
    /// Why.
    pub reason: String,
}

/// Inspects a data root. `driver` is needed if the engine used several there.
///
/// # Errors
/// An engine runs on it; it has no layers that can be read; the engine's databases are damaged.
pub fn look(data_root: &Path, driver: Option<&str>) -> Result<Found, MigrateError> {
    let still = stopped(data_root)?;
    let usable = |name: &str| EngineDb::new(data_root, name).exists();
    let known: Vec<&'static str> = READABLE.iter().map(|(name, ..)| *name).filter(|n| usable(n)).collect();
    let all = READABLE.map(|(name, ..)| name).join(" and ");
    let driver = match (driver, known.as_slice()) {
        (Some(wanted), _) => *known.iter().find(|n| **n == wanted).ok_or_else(|| {
            MigrateError::Usage(format!(
                "'{}' holds no readable layers of '{wanted}'; {all} can be imported, others with `store import engine`",
                data_root.display()
            ))
        })?,
        (None, [only]) => *only,
        (None, []) => {
            return Err(MigrateError::Usage(format!(
                "'{}' is not the data root of an engine on {all}; for other storage drivers, use `store import engine`",
                data_root.display()
            )));
        }
        (None, several) => {
            return Err(MigrateError::Usage(format!(
                "'{}' holds layers of several storage drivers; choose one with --from-driver {}",
                data_root.display(),
                several.join(" or ")
            )));
        }
    };
    let db = EngineDb::new(data_root, driver);
    let (mut notes, mut faults) = (Vec::new(), Vec::new());
    for image in db.images()? {
        match image {
            Ok(image) => notes.push(image),
            Err(error) => faults.push(with_causes(&error)),
        }
    }
    let mut layers = Vec::new();
    let mut seen = BTreeSet::new();
    for chain in notes.iter().flat_map(|image| &image.layers) {
        // Lowest first within each image, so a parent comes before its children.
        if seen.insert(*chain) {
            match db.layer(*chain) {
                Ok(Some(note)) => layers.push(note),
                Ok(None) => faults.push(format!("layer {chain} of an image is missing")),
                Err(error) => faults.push(with_causes(&error)),
            }
        }
    }
    Ok(Found {
        data_root: data_root.to_owned(),
        driver,
        images: notes.len(),
        containers: db.containers()?,
        db,
        layers,
        notes,
        faults,
        _still: still,
    })
}

/// Makes sure that no engine runs on a data root, and that none starts while the returned file is open.
fn stopped(data_root: &Path) -> Result<Option<File>, MigrateError> {
    let path = data_root.join(RUNNING);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(MigrateError::io("open", &path)(e)),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Err(MigrateError::Usage(format!(
            "an engine is running on '{}'; stop it first, or use `store import engine`",
            data_root.display()
        ))),
        Err(TryLockError::Error(e)) => Err(MigrateError::io("lock", &path)(e)),
    }
}

/// Imports images: their layers into the current home of `driver`, and the engine's entries for them into `target`, the
/// databases below `target_root`. The report lists what was refused, and what ended the run early.
///
/// # Errors
/// An engine runs on the target, or its database cannot be used.
pub async fn import(
    found: &Found,
    target_root: &Path,
    target: &EngineDb,
    driver: &Driver,
    watch: &Arc<dyn Fn(Event) + Send + Sync>,
) -> Result<Report, MigrateError> {
    // If the data root is the same, this is the source's file too: shared locks are compatible.
    let _still = stopped(target_root)?;
    target.prepare()?;
    let mut report =
        Report { containers_left_out: found.containers, failed: found.faults.clone(), ..Report::default() };
    watch(Event::Planned { layers: found.layers.len(), bytes: found.layers.iter().map(|l| l.size).sum() });
    // Chain ids of the layers in the target, with their ids there; and why other layers are missing.
    let mut here: BTreeMap<Digest, LayerId> = BTreeMap::new();
    let mut missing: BTreeMap<Digest, String> = BTreeMap::new();
    for (n, note) in found.layers.iter().enumerate() {
        let parent = match note.parent.map(|p| here.get(&p)) {
            None => None,
            Some(Some(parent)) => Some(parent.clone()),
            Some(None) => continue,
        };
        let brought = async {
            let id = target.layer(note.chain)?.map_or_else(|| note.cache_id.clone(), |known| known.cache_id);
            watch(Event::Layer { number: n + 1, id: id.clone(), bytes: note.size });
            let earlier = bring(found, note, target, driver, &id, parent.as_ref(), watch).await?;
            Ok::<_, MigrateError>((id, earlier))
        };
        match brought.await {
            Ok((id, earlier)) => {
                watch(Event::Done { bytes: note.size, earlier });
                *(if earlier { &mut report.layers_earlier } else { &mut report.layers }) += 1;
                here.insert(note.chain, id);
            }
            Err(error) => {
                let text = with_causes(&error);
                watch(Event::Failed(text.clone()));
                missing.insert(note.chain, text.clone());
                if !error.is_of_one_layer() {
                    report.stopped = Some(text);
                    break;
                }
                report.failed.push(text);
            }
        }
    }
    let present = add_images(found, target, &here, &missing, &mut report);
    report.images = present.len();
    match target.add_names(&found.db, &present) {
        Ok((names, taken)) => (report.names, report.names_taken) = (names, taken),
        Err(error) => report.failed.push(format!("the names of images: {}", with_causes(&error))),
    }
    if let Err(error) = target.copy_distribution(&found.db) {
        report.failed.push(format!("the digests known to registries: {}", with_causes(&error)));
    }
    Ok(report)
}

/// Registers with the engine the images whose layers are present; the others are left out, each with its reason.
fn add_images(
    found: &Found,
    target: &EngineDb,
    here: &BTreeMap<Digest, LayerId>,
    missing: &BTreeMap<Digest, String>,
    report: &mut Report,
) -> BTreeSet<Digest> {
    let names = found.db.image_names();
    let mut present = BTreeSet::new();
    for image in &found.notes {
        let reason = if image.layers.iter().all(|chain| here.contains_key(chain)) {
            let added =
                if target.has_image(image.id) { Ok(()) } else { target.add_image(image.id, &found.db) };
            let Err(error) = added else {
                present.insert(image.id);
                continue;
            };
            let text = format!("image {}: {}", image.id, with_causes(&error));
            report.failed.push(text.clone());
            text
        } else {
            let first = image.layers.iter().find_map(|chain| missing.get(chain));
            first
                .or(report.stopped.as_ref())
                .cloned()
                .unwrap_or_else(|| "one of its layers is missing".into())
        };
        report.images_left_out.push(image.id.to_string());
        let names = names.get(&image.id).cloned().unwrap_or_default();
        report.left_out.push(LeftOut { image: image.id.to_string(), names, reason });
    }
    present
}

/// Imports one layer; true if an earlier run had done so.
async fn bring(
    found: &Found,
    note: &LayerNote,
    target: &EngineDb,
    driver: &Driver,
    id: &LayerId,
    parent: Option<&LayerId>,
    watch: &Arc<dyn Fn(Event) + Send + Sync>,
) -> Result<bool, MigrateError> {
    let parent_text = parent.map_or("", LayerId::as_str);
    let known =
        if driver.exists(id.as_str()).await? { driver.metadata(id.as_str()).await.ok() } else { None };
    let fact = |name: &str| known.as_ref().and_then(|facts| facts.get(name)).map(String::as_str);
    let on_parent = fact("parent").unwrap_or("") == parent_text;
    let here = match fact("state") {
        Some("applied") => on_parent && is_same(note, target, driver, id, parent_text).await?,
        // Written by a build of the target's engine, which has it under the same tar.
        Some("sandbox") => target.layer(note.chain)?.is_some() && on_parent,
        // Left by a run that was killed, or a layer that can only be removed.
        _ => {
            driver.remove(id.as_str()).await?;
            let request = LayerRequest {
                id: id.to_string(),
                parent: parent_text.to_owned(),
                ..LayerRequest::default()
            };
            driver.create(request).await?;
            if let Err(error) = apply(found, note, driver, id, parent_text, watch).await {
                if let Err(kept) = driver.remove(id.as_str()).await {
                    watch(Event::Failed(with_causes(&error)));
                    return Err(kept.into());
                }
                return Err(error);
            }
            note_layer(note, found, target, driver, id, parent_text).await?;
            return Ok(false);
        }
    };
    if !here {
        return Err(MigrateError::Taken { layer: id.to_string() });
    }
    note_layer(note, found, target, driver, id, parent_text).await?;
    Ok(true)
}

/// Whether an applied layer of the store is the one of `note`. A layer that the target's engine has under the same tar
/// was compared when it was imported; for others (a run was killed before it registered them) the tar is read back and
/// hashed.
async fn is_same(
    note: &LayerNote,
    target: &EngineDb,
    driver: &Driver,
    id: &LayerId,
    parent: &str,
) -> Result<bool, MigrateError> {
    if target.layer(note.chain)?.is_some_and(|known| known.cache_id == *id) {
        return Ok(true);
    }
    let mut hash = Sha256::new();
    let mut tar = driver.diff(id.as_str(), parent).await?;
    while let Some(chunk) = tar.next().await {
        hash.update(&chunk?);
    }
    Ok(Digest::from_hash(hash) == note.diff)
}

/// Registers a layer of the store with the engine, unless the engine has it.
async fn note_layer(
    note: &LayerNote,
    found: &Found,
    target: &EngineDb,
    driver: &Driver,
    id: &LayerId,
    parent: &str,
) -> Result<(), MigrateError> {
    if target.layer(note.chain)?.is_none() {
        let size = driver.diff_size(id.as_str(), parent).await?;
        target.add_layer(&LayerNote { cache_id: id.clone(), size, ..note.clone() }, &found.db)?;
    }
    Ok(())
}

/// Rebuilds a layer's tar on a separate thread and applies it.
async fn apply(
    found: &Found,
    note: &LayerNote,
    driver: &Driver,
    id: &LayerId,
    parent: &str,
    watch: &Arc<dyn Fn(Event) + Send + Sync>,
) -> Result<(), MigrateError> {
    let (sender, mut receiver) = mpsc::channel::<io::Result<Bytes>>(QUEUED);
    let layer = note.cache_id.to_string();
    let (wanted, watch) = (note.diff, watch.clone());
    let split = found.db.tar_split(note.chain);
    let folder = folder_of(&found.data_root, found.driver, &note.cache_id);
    let maker = tokio::task::spawn_blocking(move || {
        let mut out = Chunks { sender, chunk: Vec::with_capacity(CHUNK), hash: Sha256::new(), watch };
        let made = make(&split, &folder, &mut out).map_err(|source| source.about(&layer)).and_then(|()| {
            out.flush()
                .map_err(|e| MigrateError::Rebuild { layer: layer.clone(), source: SplitError::Output(e) })?;
            let found = Digest::from_hash(std::mem::take(&mut out.hash));
            if found == wanted {
                Ok(())
            } else {
                Err(MigrateError::Differs { layer: layer.clone(), found, wanted })
            }
        });
        if let Err(error) = &made {
            // Without this, the tar would end normally, and would be taken as complete.
            let _ = out.sender.blocking_send(Err(io::Error::other(error.to_string())));
        }
        made
    });
    let body = futures_util::stream::poll_fn(move |context| receiver.poll_recv(context));
    let applied = driver.apply_diff(id.as_str(), parent, body).await;
    let made = maker.await.map_err(|e| MigrateError::Internal(e.to_string()))?;
    match (made, applied) {
        // The driver's own failure closed the channel.
        (Err(MigrateError::Rebuild { source: SplitError::Output(_), .. }) | Ok(()), Err(error)) => {
            Err(error.into())
        }
        (Err(error), _) => Err(error),
        (Ok(()), Ok(_)) => Ok(()),
    }
}

/// Where a storage driver keeps the files of a layer.
fn folder_of(data_root: &Path, driver: &str, cache_id: &LayerId) -> PathBuf {
    let (_, folder, inner) = READABLE.iter().find(|(name, ..)| *name == driver).unwrap_or(&READABLE[0]);
    let path = data_root.join(folder).join(cache_id.as_str());
    if inner.is_empty() { path } else { path.join(inner) }
}

/// Why making a tar failed; the layer is added by [`Self::about`].
enum MakeError {
    Split(SplitError),
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

impl MakeError {
    fn about(self, layer: &str) -> MigrateError {
        match self {
            Self::Split(source) => MigrateError::Rebuild { layer: layer.to_owned(), source },
            // The directory or the tar data of this one layer is missing.
            Self::Io { action, path, source } => {
                MigrateError::corrupt(&path, format!("cannot {action} it: {source}"))
            }
        }
    }
}

fn make(split: &Path, folder: &Path, out: &mut dyn Write) -> Result<(), MakeError> {
    let io = |action, path: &Path| {
        let path = path.to_owned();
        move |source| MakeError::Io { action, path, source }
    };
    let file = File::open(split).map_err(io("open", split))?;
    let tree = Tree::open(folder.to_owned()).map_err(io("open", folder))?;
    let lines = flate2::read::MultiGzDecoder::new(file);
    tarsplit::rebuild(lines, |name| tree.file(name), out).map_err(MakeError::Split).map(|_| ())
}

/// Collects bytes into chunks, hashes them and passes them on.
struct Chunks {
    sender: mpsc::Sender<io::Result<Bytes>>,
    chunk: Vec<u8>,
    hash: Sha256,
    watch: Arc<dyn Fn(Event) + Send + Sync>,
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(CHUNK - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..n]);
        if self.chunk.len() == CHUNK {
            self.flush()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::replace(&mut self.chunk, Vec::with_capacity(CHUNK));
        self.hash.update(&chunk);
        let n = chunk.len() as u64;
        let sent = self.sender.blocking_send(Ok(chunk.into()));
        sent.map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the store accepts no more data"))?;
        (self.watch)(Event::Bytes(n));
        Ok(())
    }
}
