//! The canonical tar of a layer, **version 1, frozen**.
//!
//! A layer that was written through a mount has exactly one tar, whichever backend makes it. Engines keep its digest,
//! so nothing below may change: a new rule is a new version, and a layer keeps the version of its first complete Diff.
//!
//! # Entries
//! 1. Depth first, a folder before what is in it, names of a folder in bytewise order; a whiteout is sorted by the name
//!    that it hides. Paths have no leading `./` or `/`; folders end with `/`. The root folder has no entry.
//! 2. A name that is missing in the target but present in the parent is an empty regular file `.wh.NAME` (mode 0600,
//!    ids 0, time 0). Against a layer's own parent that is each whiteout in the layer.
//! 3. An opaque folder is followed at once by the empty regular file `FOLDER/.wh..wh..opq` with the same metadata. Only
//!    diffs against the own parent have such entries; other diffs list what is missing.
//! 4. Each folder on the way to an entry has an entry.
//! 5. Of several names of one inode the first in order carries the data; the others are hard links to it, with the
//!    same metadata and no data. (Folders have one name.)
//! 6. Sockets are left out, and so are names that begin with `.wh.`, which a tar of layers can't express: a reader
//!    would take them for whiteouts.
//! 7. Xattrs are sorted by name, without `trusted.overlay.*`. ACLs are in the form of `getxattr`.
//! 8. Times: `mtime` with nanoseconds; no `atime`, no `ctime`.
//! 9. Holes and unwritten extents are holes. A file is written as sparse if its holes are at least 64 KiB together and
//!    at least a quarter of its size, and it has at most 500,000 data ranges; else it is plain and holes are zeros.
//!    Data ranges that touch are one range.
//! 10. Two zero blocks end the tar. Nothing follows them.
//!
//! The fields of headers are defined in [`crate::tar::writer`].
//!
//! ```text
//!   bin/  bin/.wh..wh..opq  bin/sh  etc/  etc/.wh.motd  etc/passwd  ␀␀
//! ```
//!
//! Called by [`super::export`].

use crate::tar::writer::{Header, Kind};

/// The version of the format that [`super::export()`] writes.
pub const VERSION: u32 = 1;
/// Prefix of the name of a whiteout.
pub(super) const WHITEOUT: &[u8] = b".wh.";
/// Name of the marker of an opaque folder.
pub(super) const OPAQUE: &[u8] = b".wh..wh..opq";
/// Bytes at the end of the tar.
pub(super) const END_LEN: usize = 1024;

/// Rule 9.
const SPARSE_MIN_HOLES: u64 = 64 << 10;
const SPARSE_MIN_PART: u64 = 4;
pub(super) const SPARSE_MAX_RANGES: usize = 500_000;

/// Whether a file with these data ranges is written as a sparse one.
pub(super) fn is_sparse(size: u64, ranges: &[(u64, u64)]) -> bool {
    let data: u64 = ranges.iter().map(|(_, len)| len).sum();
    let holes = size.saturating_sub(data);
    holes >= SPARSE_MIN_HOLES && holes >= size / SPARSE_MIN_PART && ranges.len() <= SPARSE_MAX_RANGES
}

/// Header of a whiteout or an opaque marker.
pub(super) fn marker(path: &[u8]) -> Header<'_> {
    Header {
        kind: Kind::File,
        path,
        link: b"",
        mode: 0o600,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        device: (0, 0),
        size: 0,
        xattrs: &[],
        sparse: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparse_only_where_holes_save_a_lot() {
        assert!(is_sparse(1 << 20, &[]));
        assert!(is_sparse(65536, &[]));
        assert!(!is_sparse(65535, &[]));
        assert!(!is_sparse(1 << 20, &[(0, (1 << 20) - 65536)]));
        assert!(is_sparse(1 << 20, &[(0, 3 << 18)]));
        assert!(!is_sparse(0, &[]));
    }
}
