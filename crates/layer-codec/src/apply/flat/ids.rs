//! Owners of the image: the host's ids in place of those that the layers have.
//!
//! Ids occur as owner and group of an entry, in POSIX ACLs and in `security.capability` of revision 3. Pure; called for each
//! entry by `read`.

use super::super::kernel;
use crate::{DiffError, IdMaps, IdRange};
use layer_tar::Entry;

/// The high byte of `magic_etc` in `struct vfs_cap_data` and in `struct vfs_ns_cap_data`.
const REVISION_2: u8 = 2;
const REVISION_3: u8 = 3;

/// The host's id for one of a layer.
fn to_host(ranges: &[IdRange], id: u32) -> Option<u32> {
    if ranges.is_empty() || id == kernel::NO_ID {
        return Some(id);
    }
    ranges.iter().find_map(|range| {
        let place = id.checked_sub(range.container_id).filter(|place| *place < range.size)?;
        range.host_id.checked_add(place)
    })
}

/// Replaces the ids of an entry.
///
/// # Errors
/// [`DiffError::Entry`] for an id in none of the ranges.
pub(super) fn shift(entry: &mut Entry, maps: &IdMaps) -> Result<(), DiffError> {
    if maps.is_empty() {
        return Ok(());
    }
    let outside = |what: &str, id: u32| DiffError::Entry {
        entry: entry.path.get(..1024).unwrap_or(&entry.path).escape_ascii().to_string(),
        offset: entry.offset,
        reason: format!("{what} {id} is in none of the ranges of --uid-map"),
    };
    let uid = to_host(&maps.uids, entry.uid).ok_or_else(|| outside("owner", entry.uid))?;
    let gid = to_host(&maps.gids, entry.gid).ok_or_else(|| outside("group", entry.gid))?;
    let mut values = Vec::new();
    for (at, x) in entry.xattrs.iter().enumerate() {
        let mut value = x.value.clone();
        let id = |ranges, id| to_host(ranges, id).ok_or_else(|| outside("an attribute's id", id));
        match &x.name[..] {
            name if name == kernel::ACL_ACCESS || name == kernel::ACL_DEFAULT => {
                for acl in value.get_mut(4..).unwrap_or_default().as_chunks_mut::<8>().0 {
                    let [tag, _, _, _, named @ ..] = acl;
                    match tag {
                        2 => *named = id(&maps.uids, u32::from_le_bytes(*named))?.to_le_bytes(),
                        8 => *named = id(&maps.gids, u32::from_le_bytes(*named))?.to_le_bytes(),
                        _ => {}
                    }
                }
            }
            name => {
                if let Some(root) = kernel::capability_root(name, &value) {
                    value[20..].copy_from_slice(&id(&maps.uids, root)?.to_le_bytes());
                } else if name == kernel::CAPABILITY && value.len() == 20 && value[3] == REVISION_2 {
                    // It is for the container's root, whoever that is on the host.
                    let root = id(&maps.uids, 0)?;
                    if root != 0 {
                        value[3] = REVISION_3;
                        value.extend_from_slice(&root.to_le_bytes());
                    }
                }
            }
        }
        if value != x.value {
            values.push((at, value));
        }
    }
    (entry.uid, entry.gid) = (uid, gid);
    for (at, value) in values {
        if let Some(x) = entry.xattrs.get_mut(at) {
            x.value = value;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps() -> IdMaps {
        let ranges = vec![IdRange { container_id: 0, host_id: 100_000, size: 1000 }];
        IdMaps { uids: ranges.clone(), gids: ranges }
    }

    #[test]
    fn owners_and_ids_in_attributes_become_the_hosts() {
        let mut acl = vec![2, 0, 0, 0, 2, 0, 7, 0];
        acl.extend_from_slice(&42u32.to_le_bytes());
        let x = layer_tar::Xattr { name: kernel::ACL_ACCESS.to_vec(), value: acl };
        let mut entry = Entry { uid: 1, gid: 2, xattrs: vec![x], ..Entry::default() };
        shift(&mut entry, &maps()).unwrap();
        assert_eq!((entry.uid, entry.gid), (100_001, 100_002));
        assert_eq!(entry.xattrs[0].value[8..], 100_042u32.to_le_bytes());
        let mut none = Entry { uid: kernel::NO_ID, gid: 0, ..Entry::default() };
        shift(&mut none, &maps()).unwrap();
        assert_eq!((none.uid, none.gid), (kernel::NO_ID, 100_000), "no id stays none");
    }

    #[test]
    fn an_owner_outside_of_the_ranges_is_an_error_that_names_it() {
        let mut entry = Entry { path: b"a/b".to_vec(), uid: 1000, ..Entry::default() };
        let error = shift(&mut entry, &maps()).unwrap_err().to_string();
        assert!(error.contains("a/b") && error.contains("owner 1000"), "{error}");
    }
}
