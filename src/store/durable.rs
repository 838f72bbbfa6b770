//! Writes that survive a power cut: temporary file, sync, rename, sync of the directory.

use super::StoreError;
use serde::{Serialize, de::DeserializeOwned};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

/// Largest metadata file that is read; a longer one is corrupt. A chain of 128 ids of 128 bytes is 17 KB.
const MAX_JSON_BYTES: u64 = 1 << 20;

/// A directory whose entries can be synced. It is opened before anything in it changes, so that a lack of descriptors
/// or of permission shows while nothing has happened yet.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    #[cfg(unix)]
    open: File,
}

impl Folder {
    /// Opens a directory.
    ///
    /// # Errors
    /// It does not exist, or the system refuses.
    #[cfg_attr(
        windows,
        expect(clippy::unnecessary_wraps, reason = "Windows opens the directory when it syncs it")
    )]
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Ok(Self {
            path: path.to_owned(),
            #[cfg(unix)]
            open: File::open(path).map_err(StoreError::io("open", path))?,
        })
    }

    /// Syncs the entries of the directory.
    ///
    /// # Errors
    /// The sync failed: renames have happened, but a power cut may undo them.
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

/// Syncs the entries of a directory.
///
/// # Errors
/// As [`Folder::open`] and [`Folder::sync`].
pub fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    Folder::open(dir)?.sync()
}

/// Renames a file or directory within the store, replacing a file. Durable after [`sync_dir`] of both directories. On
/// Windows a file that is briefly in use (by a scanner, or a worker that is ending) is retried for some seconds.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(test)]
    super::tests::faults::point(super::tests::faults::Call::Rename)?;
    #[cfg(unix)]
    return fs::rename(from, to);
    #[cfg(windows)]
    return lcow_sys::windows::fs::rename(from, to);
}

/// As [`rename`], for a directory that must not replace anything.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(unix)]
    {
        use rustix::{fs::RenameFlags, io::Errno};
        #[cfg(test)]
        super::tests::faults::point(super::tests::faults::Call::Rename)?;
        let here = rustix::fs::CWD;
        match rustix::fs::renameat_with(here, from, here, to, RenameFlags::NOREPLACE) {
            // The file system does not support the flag; a plain rename would replace an empty directory.
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

/// Deletes a directory and its content, with the same retries. Mount points in it are not entered and make it fail.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    return lcow_sys::linux::tree::remove(path);
    #[cfg(windows)]
    return lcow_sys::windows::fs::remove_tree(path);
}

/// Creates a new file that only its owner may read (on Windows: as its directory's access list says). An existing file
/// is an error. On Windows it is neither sparse nor compressed nor encrypted, whatever the directory is: Hyper-V
/// attaches no such disk.
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
    // A rename that fails with an I/O error may or may not have happened.
    rename(&temporary, path)
        .map_err(|e| NotReplaced { error: StoreError::io("replace", path)(e), unsure: true })?;
    folder.sync().map_err(|error| NotReplaced { error, unsure: true })
}

/// As [`replace_json`], for callers that read the file again after any failure.
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
    serde_json::from_slice(&text).map(Some).map_err(|e| corrupt(format!("unexpected JSON: {e}")))
}
