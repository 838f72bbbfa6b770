//! Deletes a directory and its content, but nothing that is mounted in it.
//!
//! ```text
//!   staging/x-removing/ ─┬─ layer.json   unlinked
//!                        └─ merged/      a mount point: not entered, reported as an error with its path
//! ```
//!
//! The standard library's `remove_dir_all` descends into mounts: a merged view that could not be unmounted, and the container
//! in it, would lose its files. Called by `store`.

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

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Deletes `path` and everything below it. A symbolic link is deleted, never followed; a mount point is not entered.
///
/// # Errors
/// `EBUSY` for a mount point, with its path; any other error of unlinkat(2). Everything that could be deleted is deleted.
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
        // For a directory, Linux returns EISDIR, and POSIX specifies EPERM.
        Err(Errno::ISDIR | Errno::PERM) => remove_directory(parent, name, shown),
        Err(Errno::BUSY) => Err(mounted(shown)),
        other => other.map_err(io::Error::from),
    }
}

fn remove_directory(parent: BorrowedFd<'_>, name: &CStr, shown: &Path) -> io::Result<()> {
    let directory = match open_directory(parent, name) {
        Err(Errno::XDEV) => return Err(mounted(shown)),
        other => other?,
    };
    let mut first = Ok(());
    // Listed completely before the first deletion: a directory that changes while it is read may repeat or omit names.
    for name in names(&directory)? {
        let inner = shown.join(std::ffi::OsStr::from_bytes(name.as_bytes()));
        match remove_entry(directory.as_fd(), &name, &inner) {
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

/// Opens a directory unless something is mounted on it (`EXDEV`).
fn open_directory(parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    match rustix::fs::openat2(parent, name, DIRECTORY, Mode::empty(), resolve) {
        // Before Linux 5.6, or forbidden: a mount of another file system shows as another device.
        Err(Errno::NOSYS | Errno::PERM) => {
            let directory = rustix::fs::openat(parent, name, DIRECTORY, Mode::empty())?;
            let (above, inside) = (rustix::fs::fstat(parent)?, rustix::fs::fstat(&directory)?);
            if above.st_dev == inside.st_dev { Ok(directory) } else { Err(Errno::XDEV) }
        }
        other => other,
    }
}

fn names(directory: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
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
        format!("something is mounted at '{}'; it was not deleted", path.display()),
    )
}
