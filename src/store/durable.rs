//! Writes that survive a power cut: temporary file, sync, rename, sync of the folder.

use super::StoreError;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::Path,
};

/// Largest metadata file that is read; a longer one is corrupt. A chain of 128 ids of 128 bytes is 17 KB.
const MAX_JSON_BYTES: u64 = 1 << 20;

/// Makes the names in a folder durable.
pub fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    #[cfg(unix)]
    {
        File::open(dir).and_then(|d| d.sync_all()).map_err(StoreError::io("sync", dir))
    }
    #[cfg(windows)]
    {
        crate::sys::windows::fs::flush_folder(dir).map_err(StoreError::io("sync", dir))
    }
}

/// Renames a file or folder within the store, replacing a file. Durable after [`sync_dir`] of both folders. On Windows
/// a file that somebody holds for a moment (a scanner, a worker that is just ending) is tried again for some seconds.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(unix)]
    return fs::rename(from, to);
    #[cfg(windows)]
    return crate::sys::windows::fs::rename(from, to);
}

/// Deletes a folder and all in it, with the same patience.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    return fs::remove_dir_all(path);
    #[cfg(windows)]
    return crate::sys::windows::fs::remove_tree(path);
}

/// Creates a new file, readable by its owner only (on Windows: by those whom its folder admits); an existing one is an
/// error. On Windows it is neither sparse nor compressed nor encrypted, whatever its folder is: Hyper-V attaches no
/// such disk.
pub fn create_private(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options.open(path)?;
    #[cfg(windows)]
    crate::sys::windows::fs::make_plain(&file)?;
    Ok(file)
}

/// Replaces `path` by `value` as JSON so that a reader finds either the old or the new content, whole.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), StoreError> {
    let folder =
        path.parent().ok_or_else(|| StoreError::Usage(format!("'{}' has no folder", path.display())))?;
    let temporary = path.with_extension("json.new");
    let write = || -> io::Result<()> {
        match fs::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = create_private(&temporary)?;
        let mut text = serde_json::to_vec_pretty(value).map_err(io::Error::other)?;
        text.push(b'\n');
        file.write_all(&text)?;
        file.sync_all()?;
        rename(&temporary, path)
    };
    write().map_err(StoreError::io("write", path))?;
    sync_dir(folder)
}

/// Reads a JSON file written by [`write_json`]; `None` if there is no file.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StoreError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(StoreError::io("open", path)(e)),
    };
    let mut text = Vec::new();
    file.take(MAX_JSON_BYTES + 1).read_to_end(&mut text).map_err(StoreError::io("read", path))?;
    let corrupt = |reason: String| StoreError::Corrupt { path: path.to_owned(), reason };
    if text.len() as u64 > MAX_JSON_BYTES {
        return Err(corrupt(format!("longer than {MAX_JSON_BYTES} bytes")));
    }
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|e| corrupt(format!("not the JSON that is expected here: {e}")))
}
