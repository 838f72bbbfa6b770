//! Owners with userns-remap: which ids of a tar the containers can have.
//!
//! Applied layers hold the container's own ids, and their mounts are mapped. An id without a counterpart in the map would
//! show as an owner that no process in a container, root included, can change (`EOVERFLOW`, `EACCES`). Such a layer is
//! refused when it is applied, as moby refuses it. Called by `layer` and `hcsshim` and, for layers that were applied
//! before, by the check of an image.

use super::kernel;
use crate::{DiffError, IdMaps, IdRange};
use disk_io::ReadAt;
use ext4_image::{Ext4, FileKind, Inode};
use std::collections::HashSet;

/// Whether the containers have this id; without a map they have all.
pub(super) fn is_inside(ranges: &[IdRange], id: u32) -> bool {
    ranges.is_empty() || ranges.iter().any(|range| range.has_container_id(id))
}

/// The container's id for one of a tar; `None` if it has none. By moby's rule the host's id of the container's root is
/// that root.
pub(super) fn inside(ranges: &[IdRange], id: u32) -> Option<u32> {
    let root = ranges.iter().find(|r| r.container_id == 0 && r.size > 0).map(|r| r.host_id);
    if root == Some(id) {
        return Some(0);
    }
    is_inside(ranges, id).then_some(id)
}

/// Why an id is refused: the ids that there are.
pub(super) fn outside(ranges: &[IdRange]) -> String {
    let ranges: Vec<String> = ranges
        .iter()
        .filter(|r| r.size > 0)
        .map(|r| format!("{} to {}", r.container_id, u64::from(r.container_id) + u64::from(r.size) - 1))
        .collect();
    format!(
        "is outside of the ids of this engine's user namespace ({}): no container could change or delete the file; \
         give --userns-remap a larger range in /etc/subuid and /etc/subgid, or make the layer with other owners",
        ranges.join(", ")
    )
}

/// Checks all owners of an applied layer, those inside of xattrs included.
///
/// # Errors
/// [`DiffError::Unsupported`] names the first path, its id and the ranges.
pub fn check_owners<R: ReadAt>(fs: &Ext4<R>, maps: &IdMaps) -> Result<(), DiffError> {
    if maps.is_empty() {
        return Ok(());
    }
    let root = fs.inode(fs.root())?;
    check_node(fs, &root, b"/", maps)?;
    let mut seen = HashSet::from([root.ino]);
    let mut directories = vec![(root, Vec::new())];
    while let Some((dir, path)) = directories.pop() {
        for entry in fs.read_dir(&dir)? {
            if !seen.insert(entry.ino) {
                continue;
            }
            let inode = fs.inode(entry.ino)?;
            let path = [&path[..], b"/", &entry.name].concat();
            check_node(fs, &inode, &path, maps)?;
            if inode.kind == FileKind::Directory {
                directories.push((inode, path));
            }
        }
    }
    Ok(())
}

fn check_node<R: ReadAt>(fs: &Ext4<R>, inode: &Inode, path: &[u8], maps: &IdMaps) -> Result<(), DiffError> {
    let (uids, gids) = (&maps.uids[..], &maps.gids[..]);
    let mut ids = vec![("owner", uids, inode.uid), ("group", gids, inode.gid)];
    for x in fs.xattrs(inode)? {
        let named = kernel::acl_ids(&x.name, &x.value).into_iter();
        let named = named.chain(kernel::capability_root(&x.name, &x.value).map(|id| (true, id)));
        ids.extend(named.map(|(user, id)| if user { ("user", uids, id) } else { ("group", gids, id) }));
    }
    for (what, ranges, id) in ids {
        if !is_inside(ranges, id) {
            let path = super::name::shown(path);
            return Err(DiffError::Unsupported {
                what: "a layer under userns-remap",
                reason: format!("\"{path}\": {what} {id} {}", outside(ranges)),
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
            IdRange { container_id: 0, host_id: 100_000, size: 1000 },
            IdRange { container_id: 5000, host_id: 200_000, size: 10 },
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
