//! The only file system calls that change a store: every creation, rename, link, deletion and sync is a function here.
//!
//! ```text
//!   store, driver ─► files ─┬─► the system
//!                           └─► in tests: a recorder, which notes each step in the order of the calls
//!                                  └─► what a power cut between any two steps can leave is enumerated and opened
//! ```
//!
//! Invariants:
//! * No other file of `store` and `driver` creates, renames, links, deletes or syncs a file or a directory of a store
//!   (`tests/architecture` looks for it). Modes and owners, mounts, and the bytes that service VMs write through
//!   descriptors are outside: the last count only once [`sync_file`] has returned.
//! * A step is in one of two classes. A *change* (create, rename, link, unlink) may be lost, and changes of different
//!   directories may be lost in any order, until the directory is synced; a rename is there or not, never half. A *sync*
//!   makes what it names last.
//!
//! Called by `store` and `driver`, and for its helpers by `migrate`.

use super::StoreError;
use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

/// One step, as a recorder notes it.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(
    not(all(test, target_os = "linux")),
    expect(dead_code, reason = "only recorders, which tests have, read the paths")
)]
pub(super) enum Step<'a> {
    /// A directory.
    MakeDir(&'a Path),
    /// A new, empty file. What is written into it later is no step of its own.
    Create(&'a Path),
    /// A symbolic link.
    Symlink(&'a Path),
    /// A second name of a file.
    Link(&'a Path, &'a Path),
    /// A rename, which replaces a file.
    Rename(&'a Path, &'a Path),
    /// A name of a file, or an empty directory.
    Unlink(&'a Path),
    /// A directory with everything in it, children first.
    RemoveTree(&'a Path),
    /// The bytes and the length of a file are durable.
    SyncFile(&'a Path),
    /// The entries of a directory are durable.
    SyncFolder(&'a Path),
}

/// Makes a step.
fn step<T>(step: Step<'_>, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    #[cfg(all(test, target_os = "linux"))]
    return super::tests::power::recorder::observed(step, work);
    #[cfg(not(all(test, target_os = "linux")))]
    {
        let _ = step;
        work()
    }
}

/// A failure that a test has planned for this step.
#[cfg(test)]
use super::tests::faults::{Call, point};

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
            point(Call::Sync)?;
            #[cfg(unix)]
            return self.open.sync_all();
            #[cfg(windows)]
            return lcow_sys::windows::fs::flush_folder(&self.path);
        };
        step(Step::SyncFolder(&self.path), sync).map_err(StoreError::io("sync", &self.path))
    }
}

/// Syncs the entries of a directory.
///
/// # Errors
/// As [`Folder::open`] and [`Folder::sync`].
pub fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    Folder::open(dir)?.sync()
}

/// Syncs the bytes and the length of an open file. `path` is its present name.
///
/// # Errors
/// The sync failed: what was written may be lost, also by a later sync that succeeds.
pub fn sync_file(file: &File, path: &Path) -> io::Result<()> {
    step(Step::SyncFile(path), || {
        #[cfg(test)]
        point(Call::Sync)?;
        file.sync_all()
    })
}

/// Syncs the regular files directly in a directory, and then the directory. Links are not followed: what they lead to
/// belongs to another.
///
/// # Errors
/// A file or the directory cannot be opened or synced.
pub fn sync_files(dir: &Path) -> Result<(), StoreError> {
    for entry in fs::read_dir(dir).map_err(StoreError::io("list", dir))? {
        let entry = entry.map_err(StoreError::io("list", dir))?;
        let path = entry.path();
        if !entry.file_type().map_err(StoreError::io("look at", &path))?.is_file() {
            continue;
        }
        sync_named(&path)?;
    }
    sync_dir(dir)
}

/// Syncs the bytes and the length of a file by its name.
///
/// # Errors
/// It cannot be opened for writing, which Windows demands, or synced.
pub fn sync_named(path: &Path) -> Result<(), StoreError> {
    let file = OpenOptions::new().write(true).open(path).map_err(StoreError::io("open", path))?;
    sync_file(&file, path).map_err(StoreError::io("sync", path))
}

/// Renames a file or directory within the store, replacing a file. Durable after [`sync_dir`] of both directories. On
/// Windows a file that is briefly in use (by a scanner, or a worker that is ending) is retried for some seconds.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    step(Step::Rename(from, to), || {
        #[cfg(test)]
        point(Call::Rename)?;
        #[cfg(unix)]
        return fs::rename(from, to);
        #[cfg(windows)]
        return lcow_sys::windows::fs::rename(from, to);
    })
}

/// As [`rename`], for a directory that must not replace anything.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(unix)]
    return step(Step::Rename(from, to), || {
        use rustix::{fs::RenameFlags, io::Errno};
        #[cfg(test)]
        point(Call::Rename)?;
        let here = rustix::fs::CWD;
        match rustix::fs::renameat_with(here, from, here, to, RenameFlags::NOREPLACE) {
            // The file system does not support the flag; a plain rename would replace an empty directory.
            Err(Errno::INVAL | Errno::NOSYS) => match fs::symlink_metadata(to) {
                Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
                Err(_) => fs::rename(from, to),
            },
            other => other.map_err(io::Error::from),
        }
    });
    #[cfg(windows)]
    return rename(from, to);
}

/// Gives a file a second name, which must not exist.
pub fn hard_link(from: &Path, to: &Path) -> io::Result<()> {
    step(Step::Link(from, to), || fs::hard_link(from, to))
}

/// Makes a symbolic link to a file.
pub fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    step(Step::Symlink(link), || {
        #[cfg(unix)]
        return std::os::unix::fs::symlink(target, link);
        #[cfg(windows)]
        return std::os::windows::fs::symlink_file(target, link);
    })
}

/// Deletes a name of a file.
pub fn remove_file(path: &Path) -> io::Result<()> {
    step(Step::Unlink(path), || fs::remove_file(path))
}

/// Deletes an empty directory.
#[cfg(target_os = "linux")]
pub fn remove_dir(path: &Path) -> io::Result<()> {
    step(Step::Unlink(path), || fs::remove_dir(path))
}

/// Deletes a directory and its content, with the retries of [`rename`]. Mount points in it are not entered and make it
/// fail.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    step(Step::RemoveTree(path), || {
        #[cfg(target_os = "linux")]
        return lcow_sys::linux::tree::remove(path);
        #[cfg(windows)]
        return lcow_sys::windows::fs::remove_tree(path);
    })
}

/// Creates a new file that only its owner may read (on Windows: as its directory's access list says). An existing file
/// is an error. On Windows it is neither sparse nor compressed nor encrypted, whatever the directory is: Hyper-V
/// attaches no such disk.
pub fn create_private(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = step(Step::Create(path), || options.open(path))?;
    #[cfg(windows)]
    lcow_sys::windows::fs::make_plain(&file)?;
    Ok(file)
}

/// Opens a file, or creates it; [`create_private`] for files that may be there.
pub(super) fn open_or_create(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    options.read(true).write(true).create(true).truncate(false);
    step(Step::Create(path), || options.open(path))
}

/// Creates a directory, which must not exist.
#[cfg(target_os = "linux")]
pub fn create_dir(path: &Path) -> io::Result<()> {
    step(Step::MakeDir(path), || fs::create_dir(path))
}

/// Creates a directory and its parents, for its owner only (on Windows: the system, administrators and its owner); an
/// existing one is left as it is.
pub fn create_private_dir(path: &Path) -> Result<(), StoreError> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    #[cfg(windows)]
    {
        use lcow_sys::windows::security::{SecurityDescriptor, create_dir};
        if let Some(above) = path.parent() {
            builder.create(above).map_err(StoreError::io("create", above))?;
        }
        let made = SecurityDescriptor::parse(PRIVATE_ACCESS).and_then(|list| create_dir(path, &list));
        match made {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => return other.map_err(StoreError::io("create", path)),
        }
    }
    step(Step::MakeDir(path), || builder.create(path)).map_err(StoreError::io("create", path))
}

/// As [`create_private_dir`], for a directory whose parents are not the store's: their new entries are synced as well,
/// because nothing else would. `anew` is true if the directory may have been created by a process that ended before it
/// synced them. On NTFS the order of its log does that.
///
/// # Errors
/// As [`create_private_dir`]; or a parent cannot be synced. One that this user may not read is left out.
pub fn create_top_dir(path: &Path, anew: bool) -> Result<(), StoreError> {
    #[cfg(unix)]
    let missing = path.ancestors().take_while(|dir| !dir.exists()).count();
    create_private_dir(path)?;
    #[cfg(unix)]
    for above in path.ancestors().skip(1).take(missing.max(usize::from(anew))) {
        let above = if above.as_os_str().is_empty() { Path::new(".") } else { above };
        match File::open(above) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {}
            Err(e) => return Err(StoreError::io("open", above)(e)),
            Ok(open) => Folder { path: above.to_owned(), open }.sync()?,
        }
    }
    #[cfg(not(unix))]
    let _ = anew;
    Ok(())
}

/// Creates the directory of a future layer; only its owner may enter until a view of it is mounted.
pub(super) fn create_layer_dir(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    return step(Step::MakeDir(path), || {
        std::os::unix::fs::DirBuilderExt::mode(&mut fs::DirBuilder::new(), 0o700).create(path)
    });
    #[cfg(windows)]
    return step(Step::MakeDir(path), || {
        use lcow_sys::windows::security::{SecurityDescriptor, create_dir};
        create_dir(path, &SecurityDescriptor::parse(LAYER_ACCESS)?)
    });
}

/// Access to the store's own directories: the system, administrators and their creator. Files inherit it.
#[cfg(windows)]
pub(super) const PRIVATE_ACCESS: &str = "D:P(A;OICI;GA;;;SY)(A;OICI;GA;;;BA)(A;OICI;GA;;;OW)";
/// Access to a layer's directory: as above, and virtual machines (the group `S-1-5-83-0`) may read. A sandbox is
/// granted to the machine that writes it when it is attached.
#[cfg(windows)]
pub(super) const LAYER_ACCESS: &str =
    "D:P(A;OICI;GA;;;SY)(A;OICI;GA;;;BA)(A;OICI;GA;;;OW)(A;OICI;GRGX;;;S-1-5-83-0)";
