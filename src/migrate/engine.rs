//! The engine's own databases of layers and images, for one storage driver.
//!
//! ```text
//!   <data-root>/image/<driver>/
//!     layerdb/sha256/<chain id>/   diff  cache-id  size  parent  tar-split.json.gz  (descriptor.json)
//!     layerdb/mounts/<container>/  one for each container
//!     imagedb/content/sha256/<image id>     the configuration; its digest is the id
//!     imagedb/metadata/sha256/<image id>/   parent  lastUpdated
//!     repositories.json            names and tags
//!     distribution/                which registry has which layer under which digest
//! ```
//!
//! The engine reads them at its start and keeps them in memory: nothing here may be changed while it runs. An entry
//! appears by one rename, whole. Source: moby `layer/filestore.go`, `image/fs.go`, `reference/store.go`, the same from
//! 20.10 to 27.

use super::{Digest, MigrateError};
use crate::store::{LayerId, files};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

/// Longest of the small files (a digest, a number).
const MAX_NOTE: u64 = 4096;
/// Longest image configuration and list of names.
const MAX_JSON: u64 = 64 << 20;
/// Prefix of the names of this program's unfinished entries, in a directory that the engine clears as well.
const TEMPORARY: &str = "lcow-import-";

/// The engine's entry for a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerNote {
    /// Identifies the layer together with all layers below it.
    pub chain: Digest,
    /// Digest of its tar.
    pub diff: Digest,
    /// Chain id of its parent.
    pub parent: Option<Digest>,
    /// Its id in the storage driver.
    pub cache_id: LayerId,
    /// Bytes of its files, as the storage driver counted them.
    pub size: u64,
}

/// The engine's entry for an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageNote {
    /// Its id.
    pub id: Digest,
    /// Chain ids of its layers, lowest first.
    pub layers: Vec<Digest>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Repositories {
    #[serde(rename = "Repositories", default)]
    repositories: BTreeMap<String, BTreeMap<String, String>>,
}

/// The databases for one storage driver.
#[derive(Debug, Clone)]
pub struct EngineDb {
    root: PathBuf,
}

impl EngineDb {
    /// The databases of `driver` (as given to `--storage-driver`) below the engine's data root.
    pub fn new(data_root: &Path, driver: &str) -> Self {
        Self { root: data_root.join("image").join(driver) }
    }

    /// Whether the engine has ever used this driver here.
    pub fn exists(&self) -> bool {
        self.root.join("layerdb").is_dir()
    }

    fn layer_folder(&self, chain: Digest) -> PathBuf {
        self.root.join("layerdb/sha256").join(chain.hex())
    }

    /// A layer's tar data, compressed.
    pub(super) fn tar_split(&self, chain: Digest) -> PathBuf {
        self.layer_folder(chain).join("tar-split.json.gz")
    }

    /// Number of containers.
    pub fn containers(&self) -> Result<usize, MigrateError> {
        Ok(names(&self.root.join("layerdb/mounts"))?.len())
    }

    /// A layer; `None` if there is none of this chain id.
    pub fn layer(&self, chain: Digest) -> Result<Option<LayerNote>, MigrateError> {
        let folder = self.layer_folder(chain);
        if !folder.is_dir() {
            return Ok(None);
        }
        let note = |name: &str| text(&folder.join(name), MAX_NOTE);
        let digest = |name: &str| -> Result<Digest, MigrateError> {
            note(name)?.trim().parse().map_err(|e| MigrateError::corrupt(&folder.join(name), e))
        };
        let diff = digest("diff")?;
        let parent = if folder.join("parent").exists() { Some(digest("parent")?) } else { None };
        if Digest::chain(parent, diff) != chain {
            return Err(MigrateError::corrupt(
                &folder,
                "its name differs from the digest of its parent and its tar",
            ));
        }
        let cache_id = folder.join("cache-id");
        let size = folder.join("size");
        Ok(Some(LayerNote {
            chain,
            diff,
            parent,
            cache_id: note("cache-id")?.trim().parse().map_err(|e| MigrateError::corrupt(&cache_id, e))?,
            size: note("size")?.trim().parse().map_err(|e| MigrateError::corrupt(&size, e))?,
        }))
    }

    /// All images, by id, or why one cannot be read (for example, its digest differs from its name).
    pub fn images(&self) -> Result<Vec<Result<ImageNote, MigrateError>>, MigrateError> {
        let folder = self.root.join("imagedb/content/sha256");
        Ok(names(&folder)?.iter().map(|name| read_image(&folder.join(name), name)).collect())
    }

    /// Creates the directories that the engine uses, with the engine's modes.
    pub(super) fn prepare(&self) -> Result<(), MigrateError> {
        let folders = ["layerdb/sha256", "layerdb/tmp", "imagedb/content/sha256", "imagedb/metadata/sha256"];
        for folder in folders {
            let folder = self.root.join(folder);
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true);
            #[cfg(unix)]
            std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
            builder.create(&folder).map_err(MigrateError::io("create", &folder))?;
        }
        let temporary = self.root.join("layerdb/tmp");
        for name in names(&temporary)?.into_iter().filter(|n| n.starts_with(TEMPORARY)) {
            let path = temporary.join(name);
            fs::remove_dir_all(&path).map_err(MigrateError::io("delete", &path))?;
        }
        Ok(())
    }

    /// Adds a layer: the engine keeps no tar data for a driver that reproduces exact diffs.
    pub(super) fn add_layer(&self, note: &LayerNote, from: &Self) -> Result<(), MigrateError> {
        let target = self.layer_folder(note.chain);
        let staged = self.root.join("layerdb/tmp").join(format!("{TEMPORARY}{}", note.chain.hex()));
        fs::create_dir(&staged).map_err(MigrateError::io("create", &staged))?;
        write(&staged.join("diff"), note.diff.to_string().as_bytes())?;
        write(&staged.join("cache-id"), note.cache_id.as_str().as_bytes())?;
        write(&staged.join("size"), note.size.to_string().as_bytes())?;
        if let Some(parent) = note.parent {
            write(&staged.join("parent"), parent.to_string().as_bytes())?;
        }
        let descriptor = from.layer_folder(note.chain).join("descriptor.json");
        if descriptor.exists() {
            write(&staged.join("descriptor.json"), &bytes(&descriptor, MAX_JSON)?)?;
        }
        files::sync_dir(&staged)?;
        fs::rename(&staged, &target).map_err(MigrateError::io("rename to", &target))?;
        Ok(files::sync_dir(&self.root.join("layerdb/sha256"))?)
    }

    /// Adds an image whose layers are present; its notes (parent, date) come first, since the image exists once its
    /// configuration does.
    pub(super) fn add_image(&self, id: Digest, from: &Self) -> Result<(), MigrateError> {
        let metadata = from.root.join("imagedb/metadata/sha256").join(id.hex());
        let names = names(&metadata)?;
        if !names.is_empty() {
            let folder = self.root.join("imagedb/metadata/sha256").join(id.hex());
            fs::create_dir_all(&folder).map_err(MigrateError::io("create", &folder))?;
            for name in names {
                replace(&folder.join(&name), &bytes(&metadata.join(&name), MAX_NOTE)?)?;
            }
        }
        let place = |db: &Self| db.root.join("imagedb/content/sha256").join(id.hex());
        replace(&place(self), &bytes(&place(from), MAX_JSON)?)
    }

    /// Whether there is such an image.
    pub(super) fn has_image(&self, id: Digest) -> bool {
        self.root.join("imagedb/content/sha256").join(id.hex()).exists()
    }

    /// Adds the names of images that are present. A name that refers to another image here is left unchanged. Returns
    /// the number of names added, and the names left unchanged.
    pub(super) fn add_names(
        &self,
        from: &Self,
        present: &BTreeSet<Digest>,
    ) -> Result<(usize, Vec<String>), MigrateError> {
        let path = |db: &Self| db.root.join("repositories.json");
        let read = |path: &Path| -> Result<Repositories, MigrateError> {
            if !path.exists() {
                return Ok(Repositories::default());
            }
            serde_json::from_slice(&bytes(path, MAX_JSON)?).map_err(|e| MigrateError::corrupt(path, e))
        };
        let mut here = read(&path(self))?;
        let (mut added, mut taken) = (0, Vec::new());
        for (repository, references) in read(&path(from))?.repositories {
            for (name, id) in references {
                let Ok(digest) = id.parse::<Digest>() else { continue };
                if !present.contains(&digest) {
                    continue;
                }
                let known = here.repositories.entry(repository.clone()).or_default();
                match known.get(&name) {
                    Some(other) if *other != id => taken.push(name),
                    Some(_) => {}
                    None => {
                        known.insert(name, id);
                        added += 1;
                    }
                }
            }
        }
        if added > 0 {
            let json = serde_json::to_vec(&here).map_err(|e| MigrateError::Internal(e.to_string()))?;
            replace(&path(self), &json)?;
        }
        Ok((added, taken))
    }

    /// The names of each image; none where they cannot be read.
    pub(super) fn image_names(&self) -> BTreeMap<Digest, Vec<String>> {
        let mut names: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
        let text = bytes(&self.root.join("repositories.json"), MAX_JSON).unwrap_or_default();
        let noted: Repositories = serde_json::from_slice(&text).unwrap_or_default();
        for (name, id) in noted.repositories.into_values().flatten() {
            if let Ok(image) = id.parse() {
                names.entry(image).or_default().push(name);
            }
        }
        names
    }

    /// Copies the data about registries, so that a push need not send what a registry already has.
    pub(super) fn copy_distribution(&self, from: &Self) -> Result<(), MigrateError> {
        let mut folders = vec![PathBuf::from("distribution")];
        while let Some(folder) = folders.pop() {
            for name in names(&from.root.join(&folder))? {
                let inner = folder.join(&name);
                let (source, target) = (from.root.join(&inner), self.root.join(&inner));
                let kind = fs::symlink_metadata(&source).map_err(MigrateError::io("look at", &source))?;
                if kind.is_dir() {
                    fs::create_dir_all(&target).map_err(MigrateError::io("create", &target))?;
                    folders.push(inner);
                } else if kind.is_file() && !target.exists() {
                    replace(&target, &bytes(&source, MAX_JSON)?)?;
                }
            }
        }
        Ok(())
    }
}

/// Reads an image's configuration.
fn read_image(path: &Path, name: &str) -> Result<ImageNote, MigrateError> {
    #[derive(Default, Deserialize)]
    struct RootFs {
        #[serde(default)]
        diff_ids: Vec<String>,
    }
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        rootfs: RootFs,
    }
    let id: Digest = format!("sha256:{name}").parse().map_err(|e| MigrateError::corrupt(path, e))?;
    let bytes = bytes(path, MAX_JSON)?;
    if Digest::of(&bytes) != id {
        return Err(MigrateError::corrupt(path, "its digest differs from its name"));
    }
    let config: Config = serde_json::from_slice(&bytes).map_err(|e| MigrateError::corrupt(path, e))?;
    let mut layers: Vec<Digest> = Vec::new();
    for diff in config.rootfs.diff_ids {
        let diff = diff.parse().map_err(|e| MigrateError::corrupt(path, e))?;
        layers.push(Digest::chain(layers.last().copied(), diff));
    }
    Ok(ImageNote { id, layers })
}

/// Names in a directory, sorted; none if there is no such directory.
fn names(folder: &Path) -> Result<Vec<String>, MigrateError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(MigrateError::io("list", folder)(e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(MigrateError::io("list", folder))?;
        // The engine's names are digits, letters and dashes; other names are not the engine's.
        if let Some(name) = entry.file_name().to_str() {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn bytes(path: &Path, limit: u64) -> Result<Vec<u8>, MigrateError> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|f| f.take(limit + 1).read_to_end(&mut bytes));
    read.map_err(MigrateError::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(MigrateError::corrupt(path, format!("longer than {limit} bytes")));
    }
    Ok(bytes)
}

fn text(path: &Path, limit: u64) -> Result<String, MigrateError> {
    String::from_utf8(bytes(path, limit)?).map_err(|e| MigrateError::corrupt(path, e))
}

/// Creates a new file and syncs it.
fn write(path: &Path, bytes: &[u8]) -> Result<(), MigrateError> {
    let made = files::create_private(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    made.map_err(MigrateError::io("write", path))
}

/// Replaces a file by one rename.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), MigrateError> {
    let folder = path.parent().unwrap_or(path);
    let mut file = tempfile::Builder::new()
        .prefix(TEMPORARY)
        .tempfile_in(folder)
        .map_err(MigrateError::io("create a file in", folder))?;
    file.write_all(bytes)
        .and_then(|()| file.as_file().sync_all())
        .map_err(MigrateError::io("write", path))?;
    file.persist(path).map_err(|e| MigrateError::io("rename to", path)(e.error))?;
    Ok(files::sync_dir(folder)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: u8) -> Digest {
        Digest::of(&[n])
    }

    #[test]
    fn a_layer_is_read_as_it_was_written_and_checked() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (EngineDb::new(folder.path(), "vfs"), EngineDb::new(folder.path(), "lcow"));
        assert!(!to.exists());
        to.prepare().unwrap();
        assert!(to.exists());
        let base = LayerNote {
            chain: digest(1),
            diff: digest(1),
            parent: None,
            cache_id: "abc".parse().unwrap(),
            size: 7,
        };
        let upper = LayerNote {
            chain: Digest::chain(Some(digest(1)), digest(2)),
            diff: digest(2),
            parent: Some(digest(1)),
            cache_id: "def".parse().unwrap(),
            size: 0,
        };
        for note in [&base, &upper] {
            assert_eq!(to.layer(note.chain).unwrap(), None);
            to.add_layer(note, &from).unwrap();
            assert_eq!(to.layer(note.chain).unwrap().as_ref(), Some(note));
        }
        let place = to.layer_folder(upper.chain);
        fs::write(place.join("diff"), digest(3).to_string()).unwrap();
        assert!(to.layer(upper.chain).unwrap_err().to_string().contains("damaged"));
        fs::write(place.join("diff"), "../../etc").unwrap();
        assert!(to.layer(upper.chain).unwrap_err().to_string().contains("not a digest"));
        fs::write(to.layer_folder(base.chain).join("cache-id"), "../x").unwrap();
        assert!(to.layer(base.chain).unwrap_err().to_string().contains("cache-id"));
    }

    #[test]
    fn images_and_names_come_over_once() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (EngineDb::new(folder.path(), "vfs"), EngineDb::new(folder.path(), "lcow"));
        from.prepare().unwrap();
        to.prepare().unwrap();
        let config =
            format!(r#"{{"rootfs":{{"type":"layers","diff_ids":["{}","{}"]}}}}"#, digest(1), digest(2));
        let id = Digest::of(config.as_bytes());
        fs::write(from.root.join("imagedb/content/sha256").join(id.hex()), &config).unwrap();
        let metadata = from.root.join("imagedb/metadata/sha256").join(id.hex());
        fs::create_dir(&metadata).unwrap();
        fs::write(metadata.join("lastUpdated"), "2021").unwrap();
        let read = |db: &EngineDb| db.images().unwrap().into_iter().map(Result::unwrap).collect::<Vec<_>>();
        let images = read(&from);
        let layers = vec![digest(1), Digest::chain(Some(digest(1)), digest(2))];
        assert_eq!(images, [ImageNote { id, layers }]);
        assert!(!to.has_image(id));
        to.add_image(id, &from).unwrap();
        to.add_image(id, &from).unwrap();
        assert!(to.has_image(id));
        assert_eq!(read(&to), images);

        let other = digest(9);
        let names =
            format!(r#"{{"Repositories":{{"a":{{"a:1":"{id}","a:2":"{id}"}},"b":{{"b:1":"{other}"}}}}}}"#);
        fs::write(from.root.join("repositories.json"), names).unwrap();
        let present = BTreeSet::from([id]);
        fs::write(
            to.root.join("repositories.json"),
            format!(r#"{{"Repositories":{{"a":{{"a:2":"{other}"}}}}}}"#),
        )
        .unwrap();
        assert_eq!(to.add_names(&from, &present).unwrap(), (1, vec!["a:2".to_owned()]));
        assert_eq!(to.add_names(&from, &present).unwrap(), (0, vec!["a:2".to_owned()]));
        let written = fs::read_to_string(to.root.join("repositories.json")).unwrap();
        assert!(written.contains(&format!("\"a:1\":\"{id}\"")) && !written.contains("b:1"), "{written}");

        fs::write(from.root.join("imagedb/content/sha256").join(id.hex()), "{}").unwrap();
        let fault = from.images().unwrap().remove(0).unwrap_err().to_string();
        assert!(fault.contains("its digest differs from its name"), "{fault}");
    }
}
