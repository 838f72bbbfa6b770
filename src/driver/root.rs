//! The service's own directory (`--root`): the last Init, the socket and QEMU's cache; also the home, until an Init
//! names one.
//!
//! It is closed to others like a home. A directory that others may enter and that holds something else is refused
//! rather than closed: `--root /var` must not lock all users out of `/var`.

use super::{DriverError, LAST_INIT};
use crate::store::{Marker, StoreError, layout};
#[cfg(unix)]
use crate::store::{files, guard};
#[cfg(unix)]
use std::ffi::OsString;
use std::{
    fs::{self, DirEntry},
    io,
    path::Path,
};

/// Creates the root, or checks that it belongs to this user and closes it to others.
pub(super) fn prepare(root: &Path, home: Option<&Path>) -> Result<(), DriverError> {
    match fs::symlink_metadata(root) {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            #[cfg(unix)]
            files::create_top_dir(root, true)?;
            #[cfg(windows)]
            fs::DirBuilder::new().recursive(true).create(root).map_err(DriverError::io("create", root))?;
        }
        Err(e) => return Err(DriverError::io("look at", root)(e)),
    }
    #[cfg(unix)]
    {
        // With userns-remap the containers' root passes through it to a home below.
        let group = match home.filter(|home| is_above(root, home)) {
            Some(home) => Marker::read(home)?.and_then(|marker| marker.init.passing_group()),
            None => None,
        };
        if !guard::is_private(root).map_err(DriverError::io("look at", root))?
            && let Some(foreign) = foreign(root)?
        {
            return Err(StoreError::Usage(format!(
                "'{}' is open to other users and contains '{}', which does not belong to this service; give the service a \
                 directory of its own as --root",
                root.display(),
                foreign.to_string_lossy()
            ))
            .into());
        }
        guard::close_folder(root, group)?;
    }
    #[cfg(windows)]
    let _ = (home, Marker::read, StoreError::NotFound);
    Ok(())
}

/// An entry of the directory that is not the service's; `None` if the service has used the directory before.
#[cfg(unix)]
fn foreign(root: &Path) -> Result<Option<OsString>, DriverError> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(root).map_err(DriverError::io("list", root))? {
        entries.push(entry.map_err(DriverError::io("list", root))?);
    }
    let marked = entries.iter().any(|entry| {
        [LAST_INIT, layout::MARKER, layout::OWNER_LOCK].iter().any(|name| entry.file_name() == *name)
    });
    Ok(entries.iter().find(|entry| !marked && !is_ours(entry)).map(DirEntry::file_name))
}

/// Whether an entry of the root belongs to the service: its state, sockets and logs.
pub(super) fn is_ours(entry: &DirEntry) -> bool {
    let name = entry.file_name();
    let name = name.to_string_lossy();
    let Ok(kind) = entry.file_type() else { return false };
    #[cfg(unix)]
    if std::os::unix::fs::FileTypeExt::is_socket(&kind) {
        return true;
    }
    if kind.is_dir() {
        // A home in the root, possibly moved there before the first start (docs/managed-plugin.md).
        return [layout::LOST_AND_FOUND, QEMU_FOLDER, PROPAGATION].contains(&&*name)
            || entry.path().join(layout::MARKER).exists();
    }
    let suffix = Path::new(&*name).extension().and_then(|e| e.to_str());
    kind.is_file() && (name.starts_with(LAST_INIT) || name == "log" || matches!(suffix, Some("log" | "pid")))
}

/// Where `lcow_sys::linux::init`, as a managed plugin's first process, tests whether mounts reach the host.
const PROPAGATION: &str = ".propagation";
/// Directory of QEMU's saved machines.
const QEMU_FOLDER: &str = ".svm";

/// Whether `folder` is below `root`, with links resolved.
#[cfg(unix)]
pub(super) fn is_above(root: &Path, folder: &Path) -> bool {
    match (root.canonicalize(), folder.canonicalize()) {
        (Ok(root), Ok(folder)) => folder != root && folder.starts_with(root),
        _ => false,
    }
}
