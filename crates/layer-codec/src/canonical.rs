//! The canonical tar of a layer, **versions 1 and 2, frozen**.
//!
//! A layer that was written through a mount has exactly one tar, whichever backend makes it. Engines keep its digest,
//! so nothing below may change: a new rule is a new version, and a layer keeps the version of its first Diff. Version 1
//! is that of layers which a store of release 1 had; ApplyDiff takes both.
//!
//! # Entries
//! 1. Depth first, a directory before what is in it, names of a directory in bytewise order; a whiteout is sorted by the name
//!    that it hides. Paths have no leading `./` or `/`; directories end with `/`. The root directory has no entry.
//! 2. A name that is missing in the target but present in the parent is an empty regular file `.wh.NAME` (mode 0600,
//!    ids 0, time 0). Against a layer's own parent that is each whiteout in the layer.
//! 3. An opaque directory is followed at once by the empty regular file `DIRECTORY/.wh..wh..opq` with the same metadata. Only
//!    diffs against the own parent have such entries; other diffs list what is missing. In version 2 the tar of a layer
//!    whose root is opaque begins with `.wh..wh..opq`.
//! 4. Each directory on the way to an entry has an entry.
//! 5. Of several names of one inode the first in order carries the data; the others are hard links to it, with the
//!    same metadata and no data. (Directories have one name.)
//! 6. Sockets are left out, and so are names that begin with `.wh.`, which a layer tar cannot express: a reader
//!    would take them for whiteouts.
//! 7. Xattrs are sorted by name, without `trusted.overlay.*`. ACLs are in the form of `getxattr`.
//! 8. Times: `mtime` with nanoseconds; no `atime`, no `ctime`. With an upper bound ([`super::ExportOptions::source_date_epoch`])
//!    later ones are the bound: a tar for a reproducible build, not the layer's canonical one.
//! 9. Holes and unwritten extents are holes; data ranges that touch are one range. A file is written as sparse if its
//!    holes are at least 16 MiB together and at least a quarter of its size; else it is plain and holes are zeros. If the
//!    map of a sparse file would exceed 1 MiB less 512 bytes, holes below the smallest power of two that makes it fit
//!    are written as zeros. (Version 1: 64 KiB in place of 16 MiB, plain beyond 500,000 ranges, and no limit of the
//!    map. Readers without support for sparse files, such as busybox tar and the tar libraries of node and Rust,
//!    silently write map and data into one file, so the sparse form is used only where the plain one would fill disks;
//!    and Go refuses larger maps.)
//! 10. Two zero blocks end the tar. Nothing follows them.
//!
//! The fields of headers are defined in [`layer_tar::writer`].
//!
//! ```text
//!   bin/  bin/.wh..wh..opq  bin/sh  etc/  etc/.wh.motd  etc/passwd  ␀␀
//! ```
//!
//! Called by [`super::export`].

pub use layer_tar::writer::Version;

use layer_tar::writer::{Header, Kind, sparse_map_bytes};
use std::borrow::Cow;

/// The version of the format that a layer gets at its first Diff.
pub const VERSION: u32 = 2;
/// The version of layers that are older than version 2 and have no version of their own.
const OLDEST_VERSION: u32 = 1;

/// The version with this number; `None` for an unknown one.
pub fn version(number: u32) -> Option<Version> {
    match number {
        OLDEST_VERSION => Some(Version::V1),
        VERSION => Some(Version::V2),
        _ => None,
    }
}

/// Prefix of names that hide other names.
pub(super) const WHITEOUT: &[u8] = b".wh.";
/// Name of the marker in an opaque directory.
pub(super) const OPAQUE: &[u8] = b".wh..wh..opq";
/// Bytes of zeros at the end.
pub(super) const END_LEN: usize = 1024;
/// A sparse file is one with at least this much in holes: versions 1 and 2.
const SPARSE_MIN_HOLES: [u64; 2] = [64 << 10, 16 << 20];
/// And with at least one part in so many of its size.
const SPARSE_MIN_PART: u64 = 4;
/// And, in version 1, with at most so many ranges of data.
pub(super) const SPARSE_MAX_RANGES: usize = 500_000;
/// The largest map, in version 2: Go reads 1 MiB.
const SPARSE_MAX_MAP: u64 = (1 << 20) - 512;

/// The data ranges of a file that is written as sparse; `None` for a plain file.
pub(super) fn sparse(version: Version, size: u64, ranges: &[(u64, u64)]) -> Option<Cow<'_, [(u64, u64)]>> {
    let data: u64 = ranges.iter().map(|(_, len)| len).sum();
    let holes = size.saturating_sub(data);
    let (min, known) = match version {
        Version::V1 => (SPARSE_MIN_HOLES[0], ranges.len() <= SPARSE_MAX_RANGES),
        Version::V2 => (SPARSE_MIN_HOLES[1], true),
    };
    if !known || holes < min || holes < size / SPARSE_MIN_PART {
        return None;
    }
    let fits =
        |ranges: &[(u64, u64)]| version == Version::V1 || sparse_map_bytes(ranges, size) <= SPARSE_MAX_MAP;
    if fits(ranges) {
        return Some(ranges.into());
    }
    // From 2 on: no hole is below 1. The last power fills all holes, and one range fits.
    let filled = (1..u64::BITS).map(|power| fill(size, ranges, 1 << power)).find(|ranges| fits(ranges));
    filled.map(Cow::Owned)
}

/// The ranges with holes below `least` bytes filled.
fn fill(size: u64, ranges: &[(u64, u64)], least: u64) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    let mut end = 0;
    for (offset, len) in ranges {
        match out.last_mut() {
            Some(last) if offset - end < least => last.1 = offset + len - last.0,
            None if *offset < least => out.push((0, offset + len)),
            _ => out.push((*offset, *len)),
        }
        end = offset + len;
    }
    if let Some(last) = out.last_mut()
        && size.saturating_sub(end) < least
    {
        last.1 = size - last.0;
    }
    out
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

    const MIB: u64 = 1 << 20;

    #[test]
    fn sparse_only_where_holes_save_a_lot() {
        let one = |size, ranges: &[(u64, u64)]| sparse(Version::V1, size, ranges).is_some();
        assert!(one(MIB, &[]) && one(65536, &[]) && one(MIB, &[(0, 3 << 18)]));
        assert!(!one(65535, &[]) && !one(MIB, &[(0, MIB - 65536)]) && !one(0, &[]));
        let two = |size, ranges: &[(u64, u64)]| sparse(Version::V2, size, ranges).is_some();
        assert!(two(16 * MIB, &[]) && two(64 * MIB, &[(0, 48 * MIB)]) && two(550 << 30, &[(0, 1)]));
        assert!(!two(16 * MIB - 1, &[]) && !two(64 * MIB, &[(0, 48 * MIB + 1)]));
        assert!(!two(65 * MIB, &[(0, 49 * MIB)]) && !two(MIB, &[]) && !two(0, &[]));
    }

    #[test]
    fn a_map_that_is_too_long_has_its_smallest_holes_filled() {
        // 80,000 ranges of 4 KiB with holes of 4 KiB, but each eighth is one of 32 KiB.
        let (mut at, mut ranges) = (4096, Vec::new());
        for n in 0..80_000u64 {
            ranges.push((at, 4096));
            at += 4096 + if n % 8 == 0 { 32 << 10 } else { 4096 };
        }
        let size = at;
        assert!(sparse_map_bytes(&ranges, size) > SPARSE_MAX_MAP);
        assert_eq!(sparse(Version::V1, size, &ranges).as_deref(), Some(&ranges[..]));
        let filled = sparse(Version::V2, size, &ranges).unwrap();
        assert!(sparse_map_bytes(&filled, size) <= SPARSE_MAX_MAP);
        // Below 8 KiB: the small ones, that at the start and that at the end included.
        assert_eq!(filled.len(), 10_001);
        assert_eq!((filled[0], filled[1].0), ((0, 8192), 8192 + (32 << 10)));
        assert_eq!(filled.last().map(|(offset, len)| offset + len), Some(size));
        for pair in filled.windows(2) {
            assert!(pair[1].0 - (pair[0].0 + pair[0].1) >= 8192, "{pair:?}");
        }
        // The data are all there.
        assert!(ranges.iter().all(|(offset, len)| {
            let within = filled.partition_point(|(start, _)| start <= offset) - 1;
            filled[within].0 + filled[within].1 >= offset + len
        }));
        // Holes of one size only: all or none.
        let even: Vec<(u64, u64)> = (0..100_000).map(|n| (n * 8192, 4096)).collect();
        assert_eq!(sparse(Version::V2, 100_000 * 8192, &even).as_deref(), Some(&[(0, 100_000 * 8192)][..]));
    }
}
