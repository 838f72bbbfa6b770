//! Host ids back to container ids, for layers that were written with a user namespace (userns-remap).
//!
//! Ids stand in owner and group, in POSIX ACLs and in `security.capability` version 3. An id outside the maps becomes
//! 65534, which is what the container itself sees. Called by [`super::view`].

use ext4_image::Xattr;

/// What the kernel shows for an id that has no place in a namespace.
const OVERFLOW: u32 = 65534;

/// One range of ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdMap {
    /// First id inside the container.
    pub container: u32,
    /// First id on the host.
    pub host: u32,
    /// How many.
    pub len: u32,
}

/// The ranges of users and groups.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMaps {
    /// Users.
    pub uid: Vec<IdMap>,
    /// Groups.
    pub gid: Vec<IdMap>,
}

fn map(maps: &[IdMap], host: u32) -> Option<u32> {
    maps.iter().find_map(|m| {
        let within = host.checked_sub(m.host).filter(|n| *n < m.len)?;
        m.container.checked_add(within)
    })
}

/// Maps that may be absent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ids<'a>(pub(super) Option<&'a IdMaps>);

impl Ids<'_> {
    pub(super) fn uid(self, host: u32) -> u32 {
        self.0.map_or(host, |m| map(&m.uid, host).unwrap_or(OVERFLOW))
    }

    pub(super) fn gid(self, host: u32) -> u32 {
        self.0.map_or(host, |m| map(&m.gid, host).unwrap_or(OVERFLOW))
    }

    /// Maps the ids inside an xattr's value.
    pub(super) fn xattr(self, xattr: &mut Xattr) {
        if self.0.is_none() {
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

    /// `struct vfs_ns_cap_data`: version 3 names the root of the namespace it is for. For the container's own root it
    /// becomes version 2, which is what the container sees (`cap_inode_getsecurity`).
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
        let maps = vec![IdMap { container: 0, host: 500_000, len: 65536 }];
        IdMaps { uid: maps.clone(), gid: maps }
    }

    #[test]
    fn ids_inside_are_mapped_and_others_become_nobody() {
        let maps = maps();
        let ids = Ids(Some(&maps));
        assert_eq!(
            [ids.uid(500_000), ids.gid(565_535), ids.uid(565_536), ids.uid(0)],
            [0, 65535, 65534, 65534]
        );
        assert_eq!(Ids(None).uid(7), 7);
    }

    #[test]
    fn a_capability_of_the_containers_root_becomes_version_2() {
        let maps = maps();
        let mut value = vec![0; 24];
        value[3] = 3;
        value[20..].copy_from_slice(&500_000u32.to_le_bytes());
        let mut xattr = Xattr { name: b"security.capability".to_vec(), value };
        Ids(Some(&maps)).xattr(&mut xattr);
        assert_eq!((xattr.value.len(), xattr.value[3]), (20, 2));
    }

    #[test]
    fn acl_entries_of_named_users_are_mapped() {
        let maps = maps();
        let mut value = vec![2, 0, 0, 0, 2, 0, 7, 0];
        value.extend_from_slice(&500_042u32.to_le_bytes());
        let mut xattr = Xattr { name: b"system.posix_acl_access".to_vec(), value };
        Ids(Some(&maps)).xattr(&mut xattr);
        assert_eq!(xattr.value[8..], 42u32.to_le_bytes());
    }
}
