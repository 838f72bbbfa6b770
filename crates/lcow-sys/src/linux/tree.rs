//! Deleting a folder with all in it, and nothing of what is mounted there.
//!
//! ```text
//!   staging/x-removing/ ─┬─ layer.json   unlinked
//!                        └─ merged/      a mount point: not entered, an error that names it
//! ```
//!
//! The standard library's `remove_dir_all` walks into mounts: a merged view that could not be unmounted would lose its
//! files, and so would the container that stands in it. Called by `store`.

use rustix::{
    fs::{AtFlags, Dir, Mode, OFlags, ResolveFlags},
    io::Errno,
};
use std::{
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Deletes `path` and what is below it. A symbolic link is deleted, never followed; a mount point is not entered.
///
/// # Errors
/// What the kernel says; `EBUSY` for something that is mounted there, with its path. What could be deleted is gone.
pub fn remove(path: &Path) -> io::Result<()> {
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let name = CString::new(name.as_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let above = if above.as_os_str().is_empty() { Path::new(".") } else { above };
    let above = rustix::fs::open(above, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    remove_entry(above.as_fd(), &name, path)
}

fn remove_entry(parent: BorrowedFd<'_>, name: &CStr, shown: &Path) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        // Linux says EISDIR for a folder, POSIX EPERM.
        Err(Errno::ISDIR | Errno::PERM) => remove_folder(parent, name, shown),
        Err(Errno::BUSY) => Err(mounted(shown)),
        other => other.map_err(io::Error::from),
    }
}

fn remove_folder(parent: BorrowedFd<'_>, name: &CStr, shown: &Path) -> io::Result<()> {
    let folder = match open_folder(parent, name) {
        Err(Errno::XDEV) => return Err(mounted(shown)),
        other => other?,
    };
    let mut first = Ok(());
    // Listed whole before the first deletion: a folder that changes while it is read may show names twice or never.
    for name in names(&folder)? {
        let inner = shown.join(std::ffi::OsStr::from_bytes(name.as_bytes()));
        match remove_entry(folder.as_fd(), &name, &inner) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            other => first = first.and(other),
        }
    }
    first?;
    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Err(Errno::BUSY) => Err(mounted(shown)),
        other => other.map_err(io::Error::from),
    }
}

/// Opens a folder unless something is mounted on it (`EXDEV`).
fn open_folder(parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    match rustix::fs::openat2(parent, name, FOLDER, Mode::empty(), resolve) {
        // Before Linux 5.6, or forbidden: another device is what a mount of another file system shows.
        Err(Errno::NOSYS | Errno::PERM) => {
            let folder = rustix::fs::openat(parent, name, FOLDER, Mode::empty())?;
            let (above, inside) = (rustix::fs::fstat(parent)?, rustix::fs::fstat(&folder)?);
            if above.st_dev == inside.st_dev { Ok(folder) } else { Err(Errno::XDEV) }
        }
        other => other,
    }
}

fn names(folder: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

fn mounted(path: &Path) -> io::Error {
    io::Error::new(
        io::ErrorKind::ResourceBusy,
        format!("something is mounted at '{}'; it is left alone", path.display()),
    )
}
