//! POSIX ACLs: the system call form (version 2) and ext4's on-disk form (version 1).
//!
//! ```text
//!   version 2:  2u32 │ (tag u16, perm u16, id u32) …
//!   version 1:  1u32 │ (tag u16, perm u16) or (tag u16, perm u16, id u32) …   the id only for named users and groups
//! ```
//! Sources: include/uapi/linux/posix_acl_xattr.h, fs/ext4/acl.h. Used by writer and reader.

const VERSION_XATTR: u32 = 2;
const VERSION_DISK: u32 = 1;
const USER: u16 = 0x02;
const GROUP: u16 = 0x08;
/// `ACL_USER_OBJ`, `ACL_GROUP_OBJ`, `ACL_MASK`, `ACL_OTHER`: entries without an id.
const UNNAMED: [u16; 4] = [0x01, 0x04, 0x10, 0x20];
const UNDEFINED_ID: u32 = u32::MAX;

fn u16_at(b: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(b.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(b: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(b.get(at..at + 4)?.try_into().ok()?))
}

/// The on-disk form of an ACL as `setxattr` takes it; `None` if it is malformed.
pub(crate) fn to_disk(xattr: &[u8]) -> Option<Vec<u8>> {
    if u32_at(xattr, 0)? != VERSION_XATTR {
        return None;
    }
    let mut out = VERSION_DISK.to_le_bytes().to_vec();
    for entry in xattr[4..].chunks(8) {
        let (tag, id) = (u16_at(entry, 0)?, entry.get(4..8)?);
        match tag {
            USER | GROUP => out.extend([&entry[..4], id].concat()),
            t if UNNAMED.contains(&t) => out.extend(&entry[..4]),
            _ => return None,
        }
    }
    Some(out)
}

/// The form that `getxattr` gives of an on-disk ACL; `None` if it is malformed.
pub(crate) fn from_disk(disk: &[u8]) -> Option<Vec<u8>> {
    if u32_at(disk, 0)? != VERSION_DISK {
        return None;
    }
    let mut out = VERSION_XATTR.to_le_bytes().to_vec();
    let mut at = 4;
    while at < disk.len() {
        let tag = u16_at(disk, at)?;
        out.extend(disk.get(at..at + 4)?);
        at += 4;
        match tag {
            USER | GROUP => {
                out.extend(disk.get(at..at + 4)?);
                at += 4;
            }
            t if UNNAMED.contains(&t) => out.extend(UNDEFINED_ID.to_le_bytes()),
            _ => return None,
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn converts_both_ways() {
        let mut acl = 2u32.to_le_bytes().to_vec();
        for (tag, perm, id) in [
            (1u16, 7u16, u32::MAX),
            (2, 6, 1000),
            (4, 5, u32::MAX),
            (8, 4, 50),
            (0x10, 7, u32::MAX),
            (0x20, 0, u32::MAX),
        ] {
            acl.extend(tag.to_le_bytes());
            acl.extend(perm.to_le_bytes());
            acl.extend(id.to_le_bytes());
        }
        let disk = to_disk(&acl).unwrap();
        assert_eq!(disk.len(), 4 + 4 * 4 + 2 * 8);
        assert_eq!(from_disk(&disk).unwrap(), acl);
        for bad in [&b""[..], b"\x01\0\0\0", b"\x02\0\0\0\x01\0\x07", b"\x02\0\0\0\x03\0\x07\0\0\0\0\0"] {
            assert_eq!(to_disk(bad), None);
        }
        assert_eq!(from_disk(b"\x01\0\0\0\x02\0\x07\0"), None);
    }
}
