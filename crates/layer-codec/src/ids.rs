//! Ranges of ids of a user namespace (userns-remap), and host ids back to container ids.
//!
//! ```text
//!   applied layer   container ids, as the tar has them          apply::owner checks that containers can have them
//!   sandbox         host ids, written through a mapped mount    Ids maps them back for export and changes
//! ```
//!
//! Ids occur as owner and group, in POSIX ACLs and in `security.capability` version 3. A host id outside the maps becomes
//! 65534, which is what the container itself sees. Called by [`super::view`] and by `apply::owner`.

use ext4_image::Xattr;
use std::fmt;

const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";
const CAPABILITY: &[u8] = b"security.capability";
/// What the kernel shows for an id without a counterpart in a namespace.
const OVERFLOW: u32 = 65534;

/// One range of a user-namespace map. Its text is a line of `/proc/<pid>/uid_map`: `CONTAINER HOST SIZE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct IdRange {
    /// First id inside the container.
    pub container_id: u32,
    /// First id on the host.
    pub host_id: u32,
    /// Number of ids.
    pub size: u32,
}

impl IdRange {
    /// Whether the container has this id.
    pub(crate) fn has_container_id(self, id: u32) -> bool {
        id.checked_sub(self.container_id).is_some_and(|place| place < self.size)
    }

    /// The container's id for one of the host.
    fn to_container(self, host: u32) -> Option<u32> {
        let place = host.checked_sub(self.host_id).filter(|place| *place < self.size)?;
        self.container_id.checked_add(place)
    }
}

impl fmt::Display for IdRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.container_id, self.host_id, self.size)
    }
}

/// The maps of a user namespace. Without ranges of either sort, ids stay as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct IdMaps {
    /// User ids.
    pub uids: Vec<IdRange>,
    /// Group ids.
    pub gids: Vec<IdRange>,
}

impl IdMaps {
    /// Whether there is no range at all: no userns-remap.
    pub fn is_empty(&self) -> bool {
        self.uids.is_empty() && self.gids.is_empty()
    }
}

/// An id that the maps do not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutsideId {
    /// What it is: `owner`, `group`, `acl id` or `capability root`.
    pub what: &'static str,
    /// The id on the disk.
    pub id: u32,
}

/// Maps host ids to container ids; without maps ids stay as they are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ids<'a>(pub(super) &'a IdMaps);

impl Ids<'_> {
    fn map(self, ranges: &[IdRange], host: u32) -> u32 {
        if self.0.is_empty() {
            return host;
        }
        ranges.iter().find_map(|range| range.to_container(host)).unwrap_or(OVERFLOW)
    }

    pub(super) fn uid(self, host: u32) -> u32 {
        self.map(&self.0.uids, host)
    }

    pub(super) fn gid(self, host: u32) -> u32 {
        self.map(&self.0.gids, host)
    }

    /// Maps the ids inside an xattr's value.
    pub(super) fn xattr(self, xattr: &mut Xattr) {
        if self.0.is_empty() {
            return;
        }
        match &xattr.name[..] {
            ACL_ACCESS | ACL_DEFAULT => {
                for (id, user) in acl_ids(&mut xattr.value) {
                    let host = u32::from_le_bytes(*id);
                    let mapped = if user { self.uid(host) } else { self.gid(host) };
                    *id = mapped.to_le_bytes();
                }
            }
            CAPABILITY => self.capability(&mut xattr.value),
            _ => {}
        }
    }

    /// The first id of an inode that the maps do not have; `xattrs` have their values on the disk.
    pub(super) fn outside(self, owner: (u32, u32), xattrs: Vec<Xattr>) -> Option<OutsideId> {
        if self.0.is_empty() {
            return None;
        }
        let (uids, gids) = (&self.0.uids, &self.0.gids);
        let missing = |what, ranges: &[IdRange], id| {
            let known = ranges.iter().any(|range| range.to_container(id).is_some());
            (!known).then_some(OutsideId { what, id })
        };
        let owner = missing("owner", uids, owner.0).or_else(|| missing("group", gids, owner.1));
        owner.or_else(|| {
            xattrs.into_iter().find_map(|mut xattr| match &xattr.name[..] {
                ACL_ACCESS | ACL_DEFAULT => acl_ids(&mut xattr.value).find_map(|(id, user)| {
                    let ranges = if user { uids } else { gids };
                    missing("acl id", ranges, u32::from_le_bytes(*id))
                }),
                CAPABILITY => {
                    // Without an id they are for the root of the machine that wrote the disk.
                    let root = xattr
                        .value
                        .get(20..24)
                        .and_then(|id| id.try_into().ok())
                        .map_or(0, u32::from_le_bytes);
                    missing("capability root", uids, root)
                }
                _ => None,
            })
        })
    }

    /// `struct vfs_ns_cap_data`: version 3 names the root of the namespace that it is for. For the container's own root
    /// it becomes version 2, which is what the container sees (`cap_inode_getsecurity`).
    fn capability(self, value: &mut Vec<u8>) {
        const REVISION_2: u8 = 2;
        const REVISION_3: u8 = 3;
        let Ok(bytes) = <&mut [u8; 24]>::try_from(&mut value[..]) else { return };
        if bytes[3] != REVISION_3 {
            return;
        }
        let [.., a, b, c, d] = *bytes;
        let root = self.uid(u32::from_le_bytes([a, b, c, d]));
        if root == 0 {
            bytes[3] = REVISION_2;
            value.truncate(20);
        } else {
            bytes[20..].copy_from_slice(&root.to_le_bytes());
        }
    }
}

/// The ids of named users and groups in an access control list, each with whether it is a user's.
fn acl_ids(value: &mut [u8]) -> impl Iterator<Item = (&mut [u8; 4], bool)> {
    /// `ACL_USER` and `ACL_GROUP`.
    const USER: u8 = 2;
    const GROUP: u8 = 8;
    let entries = value.get_mut(4..).unwrap_or_default().as_chunks_mut::<8>().0;
    entries.iter_mut().filter_map(|[tag, _, _, _, id @ ..]| match *tag {
        USER => Some((id, true)),
        GROUP => Some((id, false)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps() -> IdMaps {
        let ranges = vec![IdRange { container_id: 0, host_id: 500_000, size: 65536 }];
        IdMaps { uids: ranges.clone(), gids: ranges }
    }

    #[test]
    fn ids_inside_are_mapped_and_others_become_nobody() {
        let maps = maps();
        let ids = Ids(&maps);
        assert_eq!(
            [ids.uid(500_000), ids.gid(565_535), ids.uid(565_536), ids.uid(0)],
            [0, 65535, 65534, 65534]
        );
        assert_eq!(Ids(&IdMaps::default()).uid(7), 7);
    }

    #[test]
    fn a_capability_of_the_containers_root_becomes_version_2() {
        let maps = maps();
        let mut value = vec![0; 24];
        value[3] = 3;
        value[20..].copy_from_slice(&500_000u32.to_le_bytes());
        let mut xattr = Xattr { name: b"security.capability".to_vec(), value };
        Ids(&maps).xattr(&mut xattr);
        assert_eq!((xattr.value.len(), xattr.value[3]), (20, 2));
    }

    #[test]
    fn ids_outside_are_found_in_owners_and_attributes() {
        let maps = maps();
        let ids = Ids(&maps);
        let inside = (500_000, 500_001);
        let found = |owner, name: &[u8], value: Vec<u8>| {
            let xattr = Xattr { name: name.to_vec(), value };
            ids.outside(owner, vec![xattr]).map(|outside| outside.id)
        };
        assert_eq!(found(inside, b"user.x", vec![0; 24]), None);
        assert_eq!(found((7, 500_000), b"user.x", Vec::new()), Some(7));
        assert_eq!(found((500_000, 565_536), b"user.x", Vec::new()), Some(565_536));
        let mut acl = vec![2, 0, 0, 0, 8, 0, 7, 0];
        acl.extend_from_slice(&42u32.to_le_bytes());
        assert_eq!(found(inside, ACL_DEFAULT, acl), Some(42));
        let mut capability = vec![0; 24];
        capability[3] = 3;
        capability[20..].copy_from_slice(&500_000u32.to_le_bytes());
        assert_eq!(found(inside, CAPABILITY, capability.clone()), None);
        capability.truncate(20);
        assert_eq!(found(inside, CAPABILITY, capability), Some(0), "of the machine's own root");
        assert_eq!(Ids(&IdMaps::default()).outside((1, 1), Vec::new()), None);
    }

    #[test]
    fn acl_entries_of_named_users_are_mapped() {
        let maps = maps();
        let mut value = vec![2, 0, 0, 0, 2, 0, 7, 0];
        value.extend_from_slice(&500_042u32.to_le_bytes());
        let mut xattr = Xattr { name: b"system.posix_acl_access".to_vec(), value };
        Ids(&maps).xattr(&mut xattr);
        assert_eq!(xattr.value[8..], 42u32.to_le_bytes());
    }
}
