//! Checks and sets the access to the store's directories.
//!
//! A merged view carries set-user-id files and devices of images, as it must for the container. What keeps other users
//! of the host out of them is the mode of the home directory above.

use super::{StoreError, layout};
use std::{fs, io, path::Path};

/// Mode of a directory that only its owner may enter.
#[cfg(unix)]
const OWNER_ONLY: u32 = 0o700;
/// Mode of a directory that one group may also pass through, but not list.
#[cfg(unix)]
const GROUP_PASSES: u32 = 0o710;

/// Closes a directory to everyone but its owner; with `group`, that group may pass through it. Refuses a directory of
/// another user. Follows symbolic links.
///
/// # Errors
/// The directory belongs to another user, or its mode cannot be changed.
#[cfg(unix)]
pub fn close_folder(path: &Path, group: Option<u32>) -> Result<(), StoreError> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    /// The permission bits of a mode.
    const ACCESS: u32 = 0o777;
    let found = fs::metadata(path).map_err(StoreError::io("look at", path))?;
    let me = rustix::process::geteuid().as_raw();
    if found.uid() != me {
        return Err(StoreError::Usage(format!(
            "'{}' belongs to user {} but this program runs as user {me}, and the owner of a directory can replace its \
             content; use another directory, or change its owner to user {me}",
            path.display(),
            found.uid()
        )));
    }
    let mode = if group.is_some() { GROUP_PASSES } else { OWNER_ONLY };
    if let Some(group) = group.filter(|group| *group != found.gid()) {
        std::os::unix::fs::chown(path, None, Some(group))
            .map_err(StoreError::io("change the group of", path))?;
    }
    if found.mode() & ACCESS != mode {
        if found.mode() & ACCESS & !mode != 0 {
            tracing::warn!(
                path = %path.display(),
                was = format!("{:04o}", found.mode() & ACCESS),
                is = format!("{mode:04o}"),
                "other users could enter a directory of the store; closed it to them"
            );
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(StoreError::io("change the mode of", path))?;
    }
    Ok(())
}

/// Whether anyone but its owner may enter the directory.
#[cfg(unix)]
pub fn is_private(path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    /// All permissions of group and others.
    const OTHERS: u32 = 0o077;
    Ok(fs::metadata(path)?.mode() & OTHERS == 0)
}

/// Refuses a directory that is not empty and not a store: a store renames and deletes, and the content is not its own.
/// Accepts what a store leaves behind whose creation was interrupted, and the entries for which `known` is true.
///
/// # Errors
/// [`StoreError::Usage`] names what was found.
pub(super) fn refuse_foreign(home: &Path, known: &dyn Fn(&fs::DirEntry) -> bool) -> Result<(), StoreError> {
    let entries = match fs::read_dir(home) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(StoreError::io("list", home)(e)),
    };
    for entry in entries {
        let entry = entry.map_err(StoreError::io("list", home))?;
        if entry.file_name() != layout::LOST_AND_FOUND && !of_a_begun_store(&entry) && !known(&entry) {
            return Err(StoreError::Usage(format!(
                "'{}' is not a layer store ({} is missing) and not empty (it contains '{}'); name an empty or a new directory",
                home.display(),
                layout::MARKER,
                entry.file_name().to_string_lossy()
            )));
        }
    }
    Ok(())
}

/// Whether a store makes this entry before its marker: the lock, the temporary marker, empty directories.
fn of_a_begun_store(entry: &fs::DirEntry) -> bool {
    let empty = |path: &Path| fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
    match entry.file_name().to_str() {
        Some(layout::OWNER_LOCK | layout::MARKER_NEW) => true,
        Some(layout::CACHE | layout::SCRATCH | layout::STAGING) => empty(&entry.path()),
        Some(layout::MOUNTS) => fs::read_dir(entry.path()).is_ok_and(|inside| {
            inside.flatten().all(|inner| inner.file_name() == layout::EMPTY && empty(&inner.path()))
        }),
        _ => false,
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn folders_are_closed_to_all_but_the_owner_or_to_all_but_one_group() {
        let outer = tempfile::tempdir().unwrap();
        let path = outer.path().join("home");
        fs::create_dir(&path).unwrap();
        let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
        for open in [0o755, 0o777, 0o701, 0o770, 0o744, 0o1777, 0o500] {
            fs::set_permissions(&path, fs::Permissions::from_mode(open)).unwrap();
            close_folder(&path, None).unwrap();
            assert_eq!(mode() & 0o777, 0o700, "from {open:o}");
            assert!(is_private(&path).unwrap());
        }
        let mine = fs::metadata(&path).unwrap().gid();
        close_folder(&path, Some(mine)).unwrap();
        assert_eq!(mode() & 0o777, 0o710);
        assert!(!is_private(&path).unwrap());
    }

    #[test]
    fn a_folder_of_another_user_is_refused_and_left_as_it_is() {
        let outer = tempfile::tempdir().unwrap();
        let path = outer.path().join("home");
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::chown(&path, Some(1234), None)
            .expect("changing the owner of a directory needs root");
        let error = close_folder(&path, None).unwrap_err().to_string();
        assert!(error.contains("user 1234"), "{error}");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o755);
    }
}
