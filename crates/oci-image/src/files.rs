//! The files of a source: the only part of this crate that opens anything.
//!
//! ```text
//!   Files ─┬─ archive()           an archive, or standard input
//!          ├─ layout(LayoutFile)  oci-layout, index.json, blobs/<algorithm>/<hex>: no symbolic link is followed
//!          ├─ remote(RemotePart)  a part of an image in a registry
//!          └─ scratch()           an unnamed file, and how much it may take
//! ```
//!
//! [`Direct`] opens them in this process; it fetches nothing. A jailed process has an implementation that asks its parent for
//! descriptors; the four calls are all that it can ask for. Called by `source` and `registry`.

use crate::{Digest, ImageError};
use std::{
    fmt,
    fs::File,
    io,
    path::{Path, PathBuf},
};

/// A file of an OCI layout (OCI image specification, "Image Layout").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayoutFile {
    /// `oci-layout`.
    Layout,
    /// `index.json`.
    Index,
    /// A blob.
    Blob(Digest),
}

impl LayoutFile {
    /// Its path below the layout's directory, in parts.
    fn parts(&self) -> Vec<String> {
        match self {
            Self::Layout => vec!["oci-layout".to_owned()],
            Self::Index => vec!["index.json".to_owned()],
            Self::Blob(digest) => {
                vec!["blobs".to_owned(), digest.algorithm().name().to_owned(), digest.hex()]
            }
        }
    }

    /// Its path below the layout's directory, with slashes.
    pub fn path(&self) -> String {
        self.parts().join("/")
    }
}

/// An unnamed file for a spooled archive.
#[derive(Debug)]
pub struct Scratch {
    /// The file, empty.
    pub file: File,
    /// Bytes that it may take: what the file system has free.
    pub room: u64,
}

/// The files of one source.
pub trait Files: fmt::Debug + Send + Sync {
    /// The archive, at its start.
    ///
    /// # Errors
    /// Any error of the system.
    fn archive(&self) -> io::Result<File>;

    /// A file of the layout.
    ///
    /// # Errors
    /// `NotFound`; an error with an [`ImageError::Unsupported`] inside for anything but a regular file in real directories.
    fn layout(&self, name: &LayoutFile) -> io::Result<File>;

    /// A part of an image in a registry, at its start. Its size and digest are verified by the reader, too.
    ///
    /// # Errors
    /// `NotFound`, with a reason inside, if the registry does not have it; `Unsupported` by default.
    fn remote(&self, _: &RemotePart) -> io::Result<File> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "registries are not read here"))
    }

    /// An unnamed file.
    ///
    /// # Errors
    /// Any error of the system.
    fn scratch(&self) -> io::Result<Scratch>;
}

/// A part of an image in a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemotePart {
    /// The manifest or index to which the name of the source leads.
    Named,
    /// A manifest or an index.
    Document {
        /// Its digest.
        digest: Digest,
        /// Its length in bytes.
        size: u64,
    },
    /// A configuration or a layer.
    Blob {
        /// Its digest.
        digest: Digest,
        /// Its length in bytes.
        size: u64,
    },
}

/// Where the files of a source are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A layout in this directory.
    Directory(PathBuf),
    /// An archive.
    File(PathBuf),
    /// An archive on standard input.
    Stdin,
    /// In a registry.
    Registry,
}

/// Opens the files in this process.
#[derive(Debug, Clone)]
pub struct Direct {
    place: Place,
    scratch: PathBuf,
}

impl Direct {
    /// The files at `place`, with scratch files in the directory `scratch` (by default, the system's for temporary files).
    pub fn new(place: Place, scratch: Option<&Path>) -> Self {
        Self { place, scratch: scratch.map_or_else(std::env::temp_dir, Path::to_owned) }
    }
}

impl Files for Direct {
    fn archive(&self) -> io::Result<File> {
        match &self.place {
            Place::File(path) => File::open(path),
            Place::Stdin => standard_input(),
            Place::Directory(_) => Err(io::ErrorKind::IsADirectory.into()),
            Place::Registry => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn layout(&self, name: &LayoutFile) -> io::Result<File> {
        match &self.place {
            Place::Directory(path) => open_beneath(path, name),
            Place::File(_) | Place::Stdin => Err(io::ErrorKind::NotADirectory.into()),
            Place::Registry => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn scratch(&self) -> io::Result<Scratch> {
        let file = tempfile::tempfile_in(&self.scratch)?;
        let room = room(&file);
        Ok(Scratch { file, room })
    }
}

/// Standard input as a file of its own.
fn standard_input() -> io::Result<File> {
    #[cfg(unix)]
    let own = std::os::fd::AsFd::as_fd(&io::stdin()).try_clone_to_owned()?;
    #[cfg(windows)]
    let own = std::os::windows::io::AsHandle::as_handle(&io::stdin()).try_clone_to_owned()?;
    Ok(own.into())
}

/// Bytes that the file system of `file` can take; a system that does not say has no limit here, and writing fails instead.
#[cfg(unix)]
fn room(file: &File) -> u64 {
    rustix::fs::fstatvfs(file).map_or(u64::MAX, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Bytes that the file system of `file` can take.
#[cfg(not(unix))]
fn room(_: &File) -> u64 {
    u64::MAX
}

/// The error for a part of a layout that is not what it must be.
fn refused(name: &LayoutFile, part: &str) -> io::Error {
    let reason = format!(
        "{part:?} is a symbolic link or a special file, and neither is followed; copy the layout with `cp -RL`"
    );
    ImageError::Unsupported { what: name.path(), reason }.into()
}

/// Opens a file of the layout in `directory`, which may itself be reached through symbolic links.
#[cfg(unix)]
fn open_beneath(directory: &Path, name: &LayoutFile) -> io::Result<File> {
    use rustix::{
        fs::{Mode, OFlags, open, openat},
        io::Errno,
    };
    const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
    // A pipe must not block, and a terminal must not become ours.
    const FILE: OFlags = OFlags::RDONLY.union(OFlags::CLOEXEC).union(OFlags::NONBLOCK).union(OFlags::NOCTTY);
    let mut at = open(directory, DIRECTORY, Mode::empty())?;
    let parts = name.parts();
    let last = parts.len() - 1;
    for (n, part) in parts.iter().enumerate() {
        let flags = if n == last { FILE } else { DIRECTORY };
        at = openat(&at, part.as_str(), flags | OFlags::NOFOLLOW, Mode::empty()).map_err(|e| match e {
            Errno::LOOP | Errno::NOTDIR | Errno::NXIO => refused(name, part),
            e => e.into(),
        })?;
    }
    let file = File::from(at);
    if !file.metadata()?.is_file() {
        return Err(refused(name, &parts[last]));
    }
    Ok(file)
}

/// Opens a file of the layout in `directory`.
#[cfg(not(unix))]
fn open_beneath(directory: &Path, name: &LayoutFile) -> io::Result<File> {
    let mut path = directory.to_owned();
    let parts = name.parts();
    for (n, part) in parts.iter().enumerate() {
        path.push(part);
        let kind = std::fs::symlink_metadata(&path)?.file_type();
        let right = if n + 1 == parts.len() { kind.is_file() } else { kind.is_dir() };
        if !right {
            return Err(refused(name, part));
        }
    }
    File::open(path)
}
