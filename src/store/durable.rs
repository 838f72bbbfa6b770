//! Writes that survive a power cut: temporary file, sync, rename, sync of the folder.

use super::StoreError;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

/// Largest metadata file that is read; a longer one is corrupt. A chain of 128 ids of 128 bytes is 17 KB.
const MAX_JSON_BYTES: u64 = 1 << 20;

/// A folder whose names can be made durable. It is opened before anything in it changes: whoever has no descriptor
/// left, or may not read the folder, learns it while nothing has happened.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    #[cfg(unix)]
    open: File,
}

impl Folder {
    /// Opens a folder.
    ///
    /// # Errors
    /// It is not there, or the system refuses.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Ok(Self {
            path: path.to_owned(),
            #[cfg(unix)]
            open: File::open(path).map_err(StoreError::io("open", path))?,
        })
    }

    /// Makes the names in it durable.
    ///
    /// # Errors
    /// The system cannot: what was renamed before stands, but a power cut may undo it.
    pub fn sync(&self) -> Result<(), StoreError> {
        let sync = || {
            #[cfg(test)]
            super::tests::faults::point(super::tests::faults::Call::Sync)?;
            #[cfg(unix)]
            return self.open.sync_all();
            #[cfg(windows)]
            return lcow_sys::windows::fs::flush_folder(&self.path);
        };
        sync().map_err(StoreError::io("sync", &self.path))
    }
}

/// Makes the names in a folder durable.
///
/// # Errors
/// As [`Folder::open`] and [`Folder::sync`].
pub fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    Folder::open(dir)?.sync()
}

/// Renames a file or folder within the store, replacing a file. Durable after [`sync_dir`] of both folders. On Windows
/// a file that somebody holds for a moment (a scanner, a worker that is just ending) is tried again for some seconds.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(test)]
    super::tests::faults::point(super::tests::faults::Call::Rename)?;
    #[cfg(unix)]
    return fs::rename(from, to);
    #[cfg(windows)]
    return lcow_sys::windows::fs::rename(from, to);
}

/// As [`rename`], for a folder that must not take the place of anything.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(unix)]
    {
        use rustix::{fs::RenameFlags, io::Errno};
        #[cfg(test)]
        super::tests::faults::point(super::tests::faults::Call::Rename)?;
        let here = rustix::fs::CWD;
        match rustix::fs::renameat_with(here, from, here, to, RenameFlags::NOREPLACE) {
            // A file system that does not know the flag; a rename would still replace an empty folder.
            Err(Errno::INVAL | Errno::NOSYS) => match fs::symlink_metadata(to) {
                Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
                Err(_) => fs::rename(from, to),
            },
            other => other.map_err(io::Error::from),
        }
    }
    #[cfg(windows)]
    return rename(from, to);
}

/// Deletes a folder and all in it, with the same patience. What is mounted in it is not entered, and makes it fail.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    return lcow_sys::linux::tree::remove(path);
    #[cfg(windows)]
    return lcow_sys::windows::fs::remove_tree(path);
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
    lcow_sys::windows::fs::make_plain(&file)?;
    Ok(file)
}

/// Why [`replace_json`] failed, and what may stand now.
#[derive(Debug)]
pub struct NotReplaced {
    /// What went wrong.
    pub error: StoreError,
    /// The new content may be in place (without being durable): only a look at the file tells.
    pub unsure: bool,
}

/// Replaces `path` by `value` as JSON so that a reader finds either the old or the new content, whole.
///
/// # Errors
/// See [`NotReplaced`].
pub fn replace_json<T: Serialize>(path: &Path, value: &T) -> Result<(), NotReplaced> {
    let sure = |error| NotReplaced { error, unsure: false };
    let folder = path
        .parent()
        .ok_or_else(|| sure(StoreError::Usage(format!("'{}' has no folder", path.display()))))?;
    let folder = Folder::open(folder).map_err(sure)?;
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
        #[cfg(test)]
        super::tests::faults::point(super::tests::faults::Call::Sync)?;
        file.sync_all()
    };
    write().map_err(|e| sure(StoreError::io("write", path)(e)))?;
    // A rename that says "input/output error" may have happened or not.
    rename(&temporary, path)
        .map_err(|e| NotReplaced { error: StoreError::io("replace", path)(e), unsure: true })?;
    folder.sync().map_err(|error| NotReplaced { error, unsure: true })
}

/// As [`replace_json`], for whoever reads the file again after a failure anyhow.
///
/// # Errors
/// The system refuses.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), StoreError> {
    replace_json(path, value).map_err(|failed| failed.error)
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
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|e| corrupt(format!("not the JSON that is expected here: {e}")))
}
