//! JSON files whose replacement survives a power cut: temporary file, sync, rename, sync of the directory.
//!
//! ```text
//!   x.json.new: deleted ─► created ─► written ─► synced ─► renamed to x.json ─► directory synced
//! ```
//!
//! Each step is one of [`files`]. Called by `store`, `driver` and `migrate`.

use super::{
    StoreError,
    files::{self, Folder, create_private, rename},
};
use serde::{
    Serialize,
    de::{DeserializeOwned, IgnoredAny},
};
use std::{
    fs::File,
    io::{self, Read, Write},
    path::Path,
};

/// Largest metadata file that is read; a longer one is corrupt. A chain of 128 ids of 128 bytes is 17 KB.
const MAX_JSON_BYTES: u64 = 1 << 20;

/// Why [`replace_json`] failed, and which content the file may have now.
#[derive(Debug)]
pub struct NotReplaced {
    /// What went wrong.
    pub error: StoreError,
    /// The new content may be in place, without being durable; the file must be read to find out.
    pub unsure: bool,
}

/// Replaces the content of `path` by `value` as JSON; a reader finds either the complete old or the complete new
/// content.
///
/// # Errors
/// See [`NotReplaced`].
pub fn replace_json<T: Serialize>(path: &Path, value: &T) -> Result<(), NotReplaced> {
    let sure = |error| NotReplaced { error, unsure: false };
    let folder = path
        .parent()
        .ok_or_else(|| sure(StoreError::Usage(format!("'{}' has no parent directory", path.display()))))?;
    let folder = Folder::open(folder).map_err(sure)?;
    let temporary = path.with_extension("json.new");
    let write = || -> io::Result<()> {
        match files::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = create_private(&temporary)?;
        file.write_all(&text_of(value)?)?;
        files::sync_file(&file, &temporary)
    };
    write().map_err(|e| sure(StoreError::io("write", path)(e)))?;
    // A rename that fails with an I/O error may or may not have happened.
    rename(&temporary, path)
        .map_err(|e| NotReplaced { error: StoreError::io("replace", path)(e), unsure: true })?;
    folder.sync().map_err(|error| NotReplaced { error, unsure: true })
}

/// Writes and syncs a new file of a directory that is not yet where it is looked for; the caller syncs the directory.
///
/// # Errors
/// There is such a file, or the system refuses.
pub fn new_json<T: Serialize>(path: &Path, value: &T) -> Result<(), StoreError> {
    let write = || -> io::Result<()> {
        let mut file = create_private(path)?;
        file.write_all(&text_of(value)?)?;
        files::sync_file(&file, path)
    };
    write().map_err(StoreError::io("write", path))
}

/// As [`new_json`], without the sync: a power cut leaves what [`is_cut`] finds.
///
/// # Errors
/// As [`new_json`].
pub fn new_json_unsynced<T: Serialize>(path: &Path, value: &T) -> Result<(), StoreError> {
    let write = || create_private(path)?.write_all(&text_of(value)?);
    write().map_err(StoreError::io("write", path))
}

/// `value` as it stands in a file.
fn text_of<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(value).map_err(io::Error::other)?;
    text.push(b'\n');
    Ok(text)
}

/// Replaces the content of `path` by `value` as JSON without waiting for the disk: a kill leaves the old or the new
/// content, a power cut also what [`is_cut`] finds.
///
/// # Errors
/// The system refuses; the old content is in place.
pub fn replace_json_unsynced<T: Serialize>(path: &Path, value: &T) -> Result<(), StoreError> {
    let temporary = path.with_extension("json.new");
    let write = || -> io::Result<()> {
        match files::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        create_private(&temporary)?.write_all(&text_of(value)?)?;
        rename(&temporary, path)
    };
    write().map_err(StoreError::io("replace", path))
}

/// As [`replace_json`], for callers that read the file again after any failure.
///
/// # Errors
/// The system refuses.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), StoreError> {
    replace_json(path, value).map_err(|failed| failed.error)
}

/// Whether a power cut may leave what is at `path` of a JSON file that was not synced: nothing, zeros, or a part of its
/// bytes from the beginning. What cannot be read is not called cut.
pub fn is_cut(path: &Path) -> bool {
    let mut text = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_JSON_BYTES + 1).read_to_end(&mut text));
    match read {
        Err(e) => e.kind() == io::ErrorKind::NotFound,
        Ok(_) if text.len() as u64 > MAX_JSON_BYTES => false,
        Ok(_) if text.iter().all(|byte| *byte == 0) => true,
        Ok(_) => serde_json::from_slice::<IgnoredAny>(&text).is_err_and(|e| e.is_eof()),
    }
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
    let corrupt = |reason: String| StoreError::corrupt(path.to_owned(), reason);
    if text.len() as u64 > MAX_JSON_BYTES {
        return Err(corrupt(format!("longer than {MAX_JSON_BYTES} bytes")));
    }
    serde_json::from_slice(&text).map(Some).map_err(|e| corrupt(format!("unexpected JSON: {e}")))
}
