//! The cache: an OCI layout's `blobs`, each file complete and right, or under another name.
//!
//! ```text
//!   locks/XX ─ held ─► blobs/<algorithm>/<hex>.part ─ all bytes, digested ─► sync, rename ─► blobs/<algorithm>/<hex>
//! ```
//!
//! A part is written by one process at a time: the others wait for its lock, of which there are 256, by the first byte of the
//! digest, and which are never deleted. A process holds one lock at a time. Called by `fetch`.

use crate::RegistryError;
use oci_image::{Digest, Hasher};
use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

/// Bytes that are digested at a time.
const BUFFER: usize = 256 << 10;
/// The directory of this program in the user's directory for caches.
const OWN: &str = "lcow-graphdriver";

/// The user's directory for this cache; `None` if the environment does not tell.
pub fn default_cache() -> Option<PathBuf> {
    let directory = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    if cfg!(windows) {
        return directory("LOCALAPPDATA").map(|local| local.join(OWN).join("cache"));
    }
    directory("XDG_CACHE_HOME")
        .or_else(|| directory("HOME").map(|home| home.join(".cache")))
        .map(|caches| caches.join(OWN))
}

/// A directory with blobs.
#[derive(Debug)]
pub(crate) struct Cache {
    directory: PathBuf,
}

/// An error of the cache.
fn failed(path: &Path) -> impl Fn(io::Error) -> RegistryError + '_ {
    |source| RegistryError::Cache { path: path.display().to_string(), source }
}

impl Cache {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.directory.join("blobs").join(digest.algorithm().name()).join(digest.hex())
    }

    /// A blob that is here, and its size.
    pub(crate) fn open(&self, digest: &Digest) -> Result<Option<(File, u64)>, RegistryError> {
        let path = self.blob(digest);
        match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            other => {
                let file = other.map_err(failed(&path))?;
                let size = file.metadata().map_err(failed(&path))?.len();
                Ok(Some((file, size)))
            }
        }
    }

    /// The part of a blob, for this process alone; it may have bytes of earlier attempts.
    pub(crate) fn part(&self, digest: &Digest) -> Result<Part, RegistryError> {
        let target = self.blob(digest);
        let locks = self.directory.join("locks");
        for folder in [locks.as_path(), target.parent().unwrap_or(&self.directory)] {
            make(folder).map_err(failed(folder))?;
        }
        let lock = locks.join(&digest.hex()[..2]);
        let lock = lock_file(&lock).map_err(failed(&lock))?;
        let mut path = target.clone().into_os_string();
        path.push(".part");
        let path = PathBuf::from(path);
        let open = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let file = open.map_err(failed(&path))?;
        Ok(Part { file, path, target, _lock: lock })
    }
}

/// Makes a directory and those above it, for this user alone.
fn make(folder: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

/// Opens a file and waits until no other process holds it.
fn lock_file(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => file.lock()?,
        // Without locks, two processes may spoil each other's part, which its digest then shows.
        Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {}
        Err(TryLockError::Error(e)) => return Err(e),
    }
    Ok(file)
}

/// A blob that is being fetched.
#[derive(Debug)]
pub(crate) struct Part {
    file: File,
    path: PathBuf,
    target: PathBuf,
    _lock: File,
}

impl Part {
    /// Bytes that it has.
    pub(crate) fn len(&self) -> Result<u64, RegistryError> {
        Ok(self.file.metadata().map_err(failed(&self.path))?.len())
    }

    /// Forgets all its bytes.
    pub(crate) fn clear(&mut self) -> Result<(), RegistryError> {
        self.file.set_len(0).map_err(failed(&self.path))
    }

    /// Appends bytes behind the first `at`.
    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), RegistryError> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(bytes)).map_err(failed(&self.path))
    }

    /// The digest of all its bytes, as they are in the file.
    pub(crate) fn digest(&self, expected: &Digest) -> Result<Digest, RegistryError> {
        let mut file = &self.file;
        let mut hasher = Hasher::new(expected.algorithm());
        let mut buffer = vec![0; BUFFER];
        file.seek(SeekFrom::Start(0)).map_err(failed(&self.path))?;
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(hasher.finish()),
                Ok(n) => hasher.update(&buffer[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(failed(&self.path)(e)),
            }
        }
    }

    /// Makes it durable, gives it its name, and opens it for reading.
    pub(crate) fn commit(self) -> Result<File, RegistryError> {
        self.file.sync_all().map_err(failed(&self.path))?;
        fs::rename(&self.path, &self.target).map_err(failed(&self.target))?;
        File::open(&self.target).map_err(failed(&self.target))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_has_its_name_only_after_the_commit() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path().join("new/cache"));
        let digest = Digest::sha256(b"text");
        assert!(cache.open(&digest).unwrap().is_none());
        let mut part = cache.part(&digest).unwrap();
        part.write(0, b"te").unwrap();
        drop(part);
        let mut part = cache.part(&digest).unwrap();
        assert_eq!(part.len().unwrap(), 2);
        part.write(2, b"xt").unwrap();
        assert!(cache.open(&digest).unwrap().is_none());
        assert_eq!(part.digest(&digest).unwrap(), digest);
        part.commit().unwrap();
        let (mut file, size) = cache.open(&digest).unwrap().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), size), ("text", 4));
        let mut names: Vec<_> = fs::read_dir(folder.path().join("new/cache/blobs/sha256"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, [digest.hex()]);
        let mut part = cache.part(&digest).unwrap();
        part.write(0, b"x").unwrap();
        part.clear().unwrap();
        assert_eq!(part.len().unwrap(), 0);
        assert_eq!(cache.open(&digest).unwrap().unwrap().1, 4, "the blob is another file");
    }

    #[test]
    fn a_part_is_written_by_one_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path().to_owned());
        let digest = Digest::sha256(b"1");
        let part = cache.part(&digest).unwrap();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| cache.part(&digest).unwrap().len().unwrap());
            let mut part = part;
            part.write(0, b"1").unwrap();
            drop(part);
            assert_eq!(other.join().unwrap(), 1);
        });
    }
}
