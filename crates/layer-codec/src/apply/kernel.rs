//! The rules of the kernel's system calls for owners, attributes and modes, and what happens to entries that break them.
//!
//! The image writer stores inodes without the checks of chown(2), setxattr(2), mknod(2) and symlink(2), so these are made
//! here. What they refuse must not get into a layer: a container could then neither change nor delete the file (copy-up
//! reads and sets every attribute again). The engine's own drivers get these errors when they unpack; the result is the
//! same here:
//!
//! ```text
//!   ENOTSUP, EPERM of setxattr ──► the attribute is dropped (the exact record keeps the tar's bytes)
//!   any other errno            ──► the layer is refused, with the entry, the attribute and the errno
//!   id 2^32-1 of chown         ──► "leave as it is": root's in a new node, the node's own in one that is there
//! ```
//!
//! `XATTRS` is the table of attributes, in the order of the kernel's checks; `docs/tar-rules.md` compares it with moby,
//! containerd and profile `hcsshim`. `tests/apply/kernel.rs` makes the same system calls on a mounted ext4 and compares the
//! results with this table. Types and sizes are checked by the image writer.
//!
//! Pure: no I/O. Called by `layer` and `links`; profile `hcsshim` has its own rules.

use ext4_image::{Xattr, writer::NodeKind};

/// Longest name of an attribute, name space included (`XATTR_NAME_MAX`).
pub const NAME_MAX: usize = 255;
/// Longest value of an attribute (`XATTR_SIZE_MAX`).
pub(super) const VALUE_MAX: usize = 64 << 10;
/// The id that chown(2) takes for "leave as it is", and that no file can have.
pub(super) const NO_ID: u32 = u32::MAX;

/// Error of a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Errno {
    /// The file system has no such attributes, or not on such a node.
    NotSup,
    /// Not allowed on such a node.
    Perm,
    /// The value is malformed.
    Inval,
    /// The name is empty or too long.
    Range,
    /// The value is too long.
    TooBig,
    /// Not allowed.
    Acces,
}

impl Errno {
    /// Its name in errno.h.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotSup => "EOPNOTSUPP",
            Self::Perm => "EPERM",
            Self::Inval => "EINVAL",
            Self::Range => "ERANGE",
            Self::TooBig => "E2BIG",
            Self::Acces => "EACCES",
        }
    }
}

/// What happens to an attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ruling {
    /// It is stored in the image.
    Keep,
    /// It is dropped, and the layer is accepted.
    Drop(&'static str),
    /// setxattr(2) succeeds and removes the attribute of that name.
    Remove(&'static str),
    /// The layer is refused.
    Refuse(Errno, &'static str),
}

/// An attribute that is to be set.
struct Asked<'a> {
    kind: &'a NodeKind,
    name: &'a [u8],
    value: &'a [u8],
}

impl Asked<'_> {
    fn is_file(&self) -> bool {
        matches!(self.kind, NodeKind::File)
    }

    fn is_directory(&self) -> bool {
        matches!(self.kind, NodeKind::Directory)
    }

    fn is_symlink(&self) -> bool {
        matches!(self.kind, NodeKind::Symlink { .. })
    }

    fn is_acl(&self) -> bool {
        self.name == ACL_ACCESS || self.name == ACL_DEFAULT
    }
}

/// One line of the table: the first that fits decides.
struct Rule {
    fits: fn(&Asked<'_>) -> bool,
    ruling: Ruling,
}

/// Overlayfs' own attributes.
pub const OVERLAY_PREFIX: &[u8] = b"trusted.overlay.";
/// The ACL of a node.
pub(super) const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
/// The ACL that new nodes in a directory get.
pub(super) const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";
/// File capabilities.
pub const CAPABILITY: &[u8] = b"security.capability";
/// Name spaces whose attributes have names of their own.
const SPACES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];

/// Attributes, in the order of the kernel's checks.
static XATTRS: &[Rule] = &[
    Rule {
        fits: |a| a.name.is_empty() || a.name.len() > NAME_MAX,
        ruling: Ruling::Refuse(Errno::Range, "its name is empty or longer than 255 bytes"),
    },
    Rule {
        fits: |a| a.value.len() > VALUE_MAX,
        ruling: Ruling::Refuse(Errno::TooBig, "its value is longer than 64 KiB"),
    },
    Rule {
        fits: |a| a.name.starts_with(OVERLAY_PREFIX),
        // Linux accepts it.
        ruling: Ruling::Drop("overlayfs would follow it"),
    },
    Rule {
        fits: |a| a.name == CAPABILITY && a.value.is_empty(),
        // setxattr(2) accepts it, and then every chown(2) of the file fails.
        ruling: Ruling::Drop("EINVAL for whoever reads it"),
    },
    Rule {
        fits: |a| a.name == CAPABILITY && !is_capability(a.value),
        ruling: Ruling::Refuse(Errno::Inval, "not a file capability (revision 2 or 3)"),
    },
    Rule {
        fits: |a| a.name.starts_with(b"user.") && !a.is_file() && !a.is_directory(),
        ruling: Ruling::Drop("EPERM: only files and directories have attributes of users"),
    },
    Rule {
        fits: |a| SPACES.contains(&a.name),
        ruling: Ruling::Refuse(Errno::Inval, "its name ends after the name space"),
    },
    Rule {
        fits: |a| a.is_acl() && acl_version(a.value).is_some_and(|version| version != ACL_VERSION),
        ruling: Ruling::Drop("EOPNOTSUPP: an ACL of another version"),
    },
    Rule {
        fits: |a| a.is_acl() && !a.value.is_empty() && acl_entries(a.value).is_none(),
        ruling: Ruling::Refuse(Errno::Inval, "not an ACL"),
    },
    Rule {
        fits: |a| a.is_acl() && a.is_symlink(),
        ruling: Ruling::Drop("EOPNOTSUPP: symbolic links have no ACL"),
    },
    Rule {
        fits: |a| a.is_acl() && acl_entries(a.value).is_none_or(|mut entries| entries.next().is_none()),
        ruling: Ruling::Remove("an ACL without entries removes it"),
    },
    Rule {
        fits: |a| a.name == ACL_DEFAULT && !a.is_directory(),
        ruling: Ruling::Refuse(Errno::Acces, "only directories have a default ACL"),
    },
    Rule {
        fits: |a| a.is_acl() && !is_valid_acl(a.value),
        ruling: Ruling::Refuse(Errno::Inval, "its entries are not a valid ACL"),
    },
    Rule {
        fits: |a| a.name == ACL_ACCESS && !is_extended_acl(a.value),
        ruling: Ruling::Remove("the permissions say the same"),
    },
    Rule {
        fits: |a| a.name == b"security.ima" && !matches!(a.value, [1..=6, ..]),
        // EINVAL where the kernel measures files, and no meaning elsewhere.
        ruling: Ruling::Drop("EINVAL where the kernel appraises files"),
    },
    Rule {
        fits: |a| a.name == b"security.evm" && !matches!(a.value, [3 | 5, ..]),
        ruling: Ruling::Drop("EPERM where the kernel verifies attributes"),
    },
    Rule {
        fits: |a| !a.is_acl() && !SPACES.iter().any(|space| a.name.starts_with(space)),
        ruling: Ruling::Drop("EOPNOTSUPP: ext4 has no such name space"),
    },
];

/// What happens to the attribute `name` with this value on a node of this kind.
pub fn xattr(kind: &NodeKind, name: &[u8], value: &[u8]) -> Ruling {
    let asked = Asked { kind, name, value };
    XATTRS.iter().find(|rule| (rule.fits)(&asked)).map_or(Ruling::Keep, |rule| rule.ruling)
}

/// What chown(2) makes of an id: `known` is the node's present one.
pub fn owner(id: u32, known: u32) -> u32 {
    if id == NO_ID { known } else { id }
}

/// Adjusts attributes as a chmod(2) does: the ACL's entries of owner, mask and others are the permissions.
pub fn chmod(kind: &NodeKind, permissions: u16, xattrs: &mut [Xattr]) {
    if matches!(kind, NodeKind::Symlink { .. }) {
        return;
    }
    let Some(acl) = xattrs.iter_mut().find(|x| x.name == ACL_ACCESS) else { return };
    let has_mask = acl_entries(&acl.value).is_some_and(|mut e| e.any(|e| e.tag == MASK));
    for entry in acl.value.get_mut(ACL_HEADER..).unwrap_or_default().as_chunks_mut::<ACL_ENTRY>().0 {
        let bits = match u16::from_le_bytes([entry[0], entry[1]]) {
            USER_OBJ => permissions >> 6,
            GROUP_OBJ if !has_mask => permissions >> 3,
            MASK => permissions >> 3,
            OTHER => permissions,
            _ => continue,
        };
        entry[2..4].copy_from_slice(&(bits & 7).to_le_bytes());
    }
}

/// Removes what a chown(2) of an existing node removes: the capabilities, unless it is a directory.
pub fn chown(kind: &NodeKind, xattrs: &mut Vec<Xattr>) {
    if !matches!(kind, NodeKind::Directory) {
        xattrs.retain(|x| x.name != CAPABILITY);
    }
}

// linux/capability.h: `struct vfs_cap_data` (revision 2, 20 bytes) and `struct vfs_ns_cap_data` (revision 3, 24 bytes).
const CAP_FLAG_EFFECTIVE: u32 = 1;
const CAP_REVISION_2: u32 = 0x0200_0000;
const CAP_REVISION_3: u32 = 0x0300_0000;

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn is_capability(value: &[u8]) -> bool {
    match (value.len(), u32_at(value, 0).map(|magic| magic & !CAP_FLAG_EFFECTIVE)) {
        (20, Some(CAP_REVISION_2)) => true,
        (24, Some(CAP_REVISION_3)) => u32_at(value, 20) != Some(NO_ID),
        _ => false,
    }
}

/// The user id of the namespace whose root a capability of revision 3 is for.
pub(super) fn capability_root(name: &[u8], value: &[u8]) -> Option<u32> {
    (name == CAPABILITY && value.len() == 24).then(|| u32_at(value, 20)).flatten()
}

// linux/posix_acl_xattr.h and linux/posix_acl.h.
const ACL_VERSION: u32 = 2;
const ACL_HEADER: usize = 4;
const ACL_ENTRY: usize = 8;
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// An entry of an ACL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct AclEntry {
    tag: u16,
    permissions: u16,
    id: u32,
}

fn acl_version(value: &[u8]) -> Option<u32> {
    u32_at(value, 0)
}

/// The entries of an ACL as setxattr(2) takes it, where it is well formed: whole entries of known tags and of ids that
/// can be.
fn acl_entries(value: &[u8]) -> Option<impl Iterator<Item = AclEntry> + '_> {
    let (entries, rest) = value.get(ACL_HEADER..)?.as_chunks::<ACL_ENTRY>();
    let parse = |e: &[u8; ACL_ENTRY]| AclEntry {
        tag: u16::from_le_bytes([e[0], e[1]]),
        permissions: u16::from_le_bytes([e[2], e[3]]),
        id: u32::from_le_bytes([e[4], e[5], e[6], e[7]]),
    };
    let known = |e: &[u8; ACL_ENTRY]| match parse(e) {
        AclEntry { tag: USER | GROUP, id, .. } => id != NO_ID,
        AclEntry { tag, .. } => matches!(tag, USER_OBJ | GROUP_OBJ | MASK | OTHER),
    };
    (rest.is_empty() && entries.iter().all(known)).then(|| entries.iter().map(parse))
}

/// Whether the entries are in their order and all there (`posix_acl_valid`).
fn is_valid_acl(value: &[u8]) -> bool {
    /// What may come next: the tag of the last section begun.
    const DONE: u16 = 0;
    let Some(entries) = acl_entries(value) else { return false };
    let (mut section, mut named) = (USER_OBJ, false);
    for e in entries {
        if e.permissions & !7 != 0 {
            return false;
        }
        section = match (e.tag, section) {
            (USER_OBJ, USER_OBJ) => USER,
            (USER, USER) | (GROUP, GROUP) => {
                named = true;
                section
            }
            (GROUP_OBJ, USER) => GROUP,
            (MASK, GROUP) => OTHER,
            (OTHER, OTHER) => DONE,
            (OTHER, GROUP) if !named => DONE,
            _ => return false,
        };
    }
    section == DONE
}

/// Whether an ACL says more than permissions can.
fn is_extended_acl(value: &[u8]) -> bool {
    acl_entries(value).is_some_and(|mut entries| entries.any(|e| matches!(e.tag, USER | GROUP | MASK)))
}

/// The named users (`true`) and groups (`false`) of an ACL.
pub(super) fn acl_ids(name: &[u8], value: &[u8]) -> Vec<(bool, u32)> {
    if name != ACL_ACCESS && name != ACL_DEFAULT {
        return Vec::new();
    }
    let Some(entries) = acl_entries(value) else { return Vec::new() };
    entries.filter(|e| matches!(e.tag, USER | GROUP)).map(|e| (e.tag == USER, e.id)).collect()
}
