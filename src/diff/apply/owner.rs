//! Owners: container ids to host ids.

/// A range of ids that is shifted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdMap {
    /// First id in the tar.
    pub container: u32,
    /// First id in the image.
    pub host: u32,
    /// Length of the range.
    pub len: u32,
}

/// Maps an id; `None` if there is a map and the id is not in it. Without a map ids stay.
pub(super) fn map(maps: &[IdMap], id: u32) -> Option<u32> {
    if maps.is_empty() {
        return Some(id);
    }
    maps.iter().find_map(|m| {
        let place = id.checked_sub(m.container).filter(|&p| p < m.len)?;
        m.host.checked_add(place)
    })
}

/// The names of the two ACL xattrs begin so.
pub(super) const ACL_PREFIX: &[u8] = b"system.posix_acl_";

/// Maps the ids inside an ACL as `getxattr` gives it (linux/posix_acl_xattr.h: a version of 4 bytes, then entries of
/// tag u16, permissions u16, id u32); `None` if an id is in no map. What is no such ACL is left to the image writer.
pub(super) fn map_acl(uids: &[IdMap], gids: &[IdMap], acl: &mut [u8]) -> Option<()> {
    const ACL_USER: u8 = 0x02;
    const ACL_GROUP: u8 = 0x08;
    for entry in acl.get_mut(4..).unwrap_or_default().as_chunks_mut::<8>().0 {
        let [tag, 0, _, _, id @ ..] = entry else { continue };
        let maps = match *tag {
            ACL_USER => uids,
            ACL_GROUP => gids,
            _ => continue,
        };
        *id = map(maps, u32::from_le_bytes(*id))?.to_le_bytes();
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_in_acls_are_shifted() {
        let maps = [IdMap { container: 0, host: 100_000, len: 1000 }];
        let entry = |tag: u8, id: u32| [&[tag, 0, 7, 0][..], &id.to_le_bytes()].concat();
        let acl = |ids: [u32; 2]| {
            [vec![2, 0, 0, 0], entry(1, u32::MAX), entry(2, ids[0]), entry(8, ids[1]), entry(16, u32::MAX)]
                .concat()
        };
        let mut value = acl([5, 6]);
        assert_eq!(map_acl(&maps, &maps, &mut value), Some(()));
        assert_eq!(value, acl([100_005, 100_006]));
        assert_eq!(map_acl(&maps, &maps, &mut acl([5, 5000])), None);
    }

    #[test]
    fn ids_are_shifted_or_refused() {
        let maps = [
            IdMap { container: 0, host: 100_000, len: 1000 },
            IdMap { container: 5000, host: u32::MAX - 1, len: 10 },
        ];
        let cases = [
            (0, Some(100_000)),
            (999, Some(100_999)),
            (1000, None),
            (5001, Some(u32::MAX)),
            (5002, None),
            (u32::MAX, None),
        ];
        for (id, want) in cases {
            assert_eq!(map(&maps, id), want, "{id}");
        }
        assert_eq!(map(&[], 7), Some(7));
    }
}
