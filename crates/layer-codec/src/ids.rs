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
            b"system.posix_acl_access" | b"system.posix_acl_default" => {
                for entry in xattr.value.get_mut(4..).unwrap_or_default().as_chunks_mut::<8>().0 {
                    let [tag, _, _, _, id @ ..] = entry;
                    let host = u32::from_le_bytes(*id);
                    match tag {
                        2 => *id = self.uid(host).to_le_bytes(),
                        8 => *id = self.gid(host).to_le_bytes(),
                        _ => {}
                    }
                }
            }
            b"security.capability" => self.capability(&mut xattr.value),
            _ => {}
        }
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
    fn acl_entries_of_named_users_are_mapped() {
        let maps = maps();
        let mut value = vec![2, 0, 0, 0, 2, 0, 7, 0];
        value.extend_from_slice(&500_042u32.to_le_bytes());
        let mut xattr = Xattr { name: b"system.posix_acl_access".to_vec(), value };
        Ids(&maps).xattr(&mut xattr);
        assert_eq!(xattr.value[8..], 42u32.to_le_bytes());
    }
}
