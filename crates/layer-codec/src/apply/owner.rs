//! Owners with userns-remap: which ids of a tar the containers can have.
//!
//! Applied layers hold the container's own ids, and their mounts are mapped. An id that the map does not have would show
//! as an owner whom nobody, the container's root included, can change (`EOVERFLOW`, `EACCES`): such a layer is refused
//! at the door, as moby refuses it. Called by `layer` and, for layers that are there already, by the check of an image.

use super::kernel;
use crate::DiffError;
use disk_io::ReadAt;
use ext4_image::{Ext4, FileKind, Inode};
use std::collections::HashSet;

/// A range of ids that containers have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdMap {
    /// First id in the container.
    pub container: u32,
    /// First id on the host.
    pub host: u32,
    /// Length of the range.
    pub len: u32,
}

/// Whether the containers have this id; without a map they have all.
pub fn is_inside(maps: &[IdMap], id: u32) -> bool {
    maps.is_empty() || maps.iter().any(|m| id.checked_sub(m.container).is_some_and(|place| place < m.len))
}

/// The container's id for one of a tar; `None` if it has none. By moby's rule the host's id of the container's root is
/// that root.
pub(super) fn inside(maps: &[IdMap], id: u32) -> Option<u32> {
    let root = maps.iter().find(|m| m.container == 0 && m.len > 0).map(|m| m.host);
    if root == Some(id) {
        return Some(0);
    }
    is_inside(maps, id).then_some(id)
}

/// Why an id is refused: the ids that there are.
pub fn outside(maps: &[IdMap]) -> String {
    let ranges: Vec<String> = maps
        .iter()
        .filter(|m| m.len > 0)
        .map(|m| format!("{} to {}", m.container, u64::from(m.container) + u64::from(m.len) - 1))
        .collect();
    format!(
        "is outside of the ids of this engine's user namespace ({}): no container could change or delete the file; \
         give --userns-remap a larger range in /etc/subuid and /etc/subgid, or make the layer with other owners",
        ranges.join(", ")
    )
}

/// Looks at all owners of a layer that is there already, those inside of xattrs included.
///
/// # Errors
/// [`DiffError::Unsupported`] names the first path, its id and the ranges.
pub fn check_image<R: ReadAt>(fs: &Ext4<R>, uids: &[IdMap], gids: &[IdMap]) -> Result<(), DiffError> {
    if uids.is_empty() && gids.is_empty() {
        return Ok(());
    }
    let root = fs.inode(fs.root())?;
    check_node(fs, &root, b"/", uids, gids)?;
    let mut seen = HashSet::from([root.ino]);
    let mut folders = vec![(root, Vec::new())];
    while let Some((dir, path)) = folders.pop() {
        for entry in fs.read_dir(&dir)? {
            if !seen.insert(entry.ino) {
                continue;
            }
            let inode = fs.inode(entry.ino)?;
            let path = [&path[..], b"/", &entry.name].concat();
            check_node(fs, &inode, &path, uids, gids)?;
            if inode.kind == FileKind::Directory {
                folders.push((inode, path));
            }
        }
    }
    Ok(())
}

fn check_node<R: ReadAt>(
    fs: &Ext4<R>,
    inode: &Inode,
    path: &[u8],
    uids: &[IdMap],
    gids: &[IdMap],
) -> Result<(), DiffError> {
    let mut ids = vec![("owner", uids, inode.uid), ("group", gids, inode.gid)];
    for x in fs.xattrs(inode)? {
        let named = kernel::acl_ids(&x.name, &x.value).into_iter();
        let named = named.chain(kernel::capability_root(&x.name, &x.value).map(|id| (true, id)));
        ids.extend(named.map(|(user, id)| if user { ("user", uids, id) } else { ("group", gids, id) }));
    }
    for (what, maps, id) in ids {
        if !is_inside(maps, id) {
            let path = super::name::shown(path);
            return Err(DiffError::Unsupported {
                what: "a layer under userns-remap",
                reason: format!("\"{path}\": {what} {id} {}", outside(maps)),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_outside_of_the_map_are_refused_and_the_hosts_root_is_root() {
        let maps = [
            IdMap { container: 0, host: 100_000, len: 1000 },
            IdMap { container: 5000, host: 200_000, len: 10 },
        ];
        let cases = [
            (0, Some(0)),
            (999, Some(999)),
            (1000, None),
            (5000, Some(5000)),
            (5009, Some(5009)),
            (5010, None),
            (100_000, Some(0)),
            (100_001, None),
            (u32::MAX, None),
        ];
        for (id, want) in cases {
            assert_eq!(inside(&maps, id), want, "{id}");
        }
        assert_eq!(inside(&[], u32::MAX), Some(u32::MAX));
        assert!(outside(&maps).contains("0 to 999, 5000 to 5009"), "{}", outside(&maps));
    }
}
