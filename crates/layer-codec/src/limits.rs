//! Limits of a layer: one table for Diff, which writes tars, and for ApplyDiff, which reads them.
//!
//! | what | limit | reason | enforced by |
//! |---|---|---|---|
//! | names in a layer | 8,388,608 | about a gigabyte of a worker's memory | Diff, ApplyDiff |
//! | bytes of a path | 4,096 | Linux' `PATH_MAX` | Diff, ApplyDiff |
//! | nested directories | 2,048 | what a path of 4,096 bytes can name | ApplyDiff; Diff by its paths |
//! | bytes of a symbolic link's target | 4,095 | Linux, and ext4 in blocks of 4 KiB | both by the file system |
//! | extended attributes of an entry | 1,024 | more than any ext4 block has names for | Diff, ApplyDiff |
//! | bytes of an entry's extended attributes | 131,072 | two of Linux' largest | Diff, ApplyDiff |
//! | bytes of their names | 4,032 | one ext4 block of 4 KiB | both by the file system |
//! | bytes of an extended header | 1,048,576 | Go's archive/tar | ApplyDiff; Diff by the three above |
//! | data ranges of a sparse file | 524,288 | 8 MiB of a worker's memory | ApplyDiff; Diff by its format's rule 9 |
//! | bytes of a file | 17,592,186,040,320 | 2^32 blocks of 4 KiB, less one | both by the file system |
//! | names of one file | 65,000 | ext4 | both by the file system |
//!
//! So ApplyDiff accepts what Diff writes. A sandbox can exceed a layer tar in three ways only: paths longer than a system
//! call accepts, more names, and (on file systems that this project did not create) more attributes. Then Diff fails before
//! its first byte and names the path, the limit and what to do. Sizes of images are set by the operator
//! (`lcow.maxlayer`), not by a format. The same table is in `docs/operations.md`; a test compares the two. Called by
//! [`super::apply`] and [`super::export`].

use super::{DiffError, canonical, walk::Items};
use layer_tar;

/// The most names in a layer, implied directories and whiteouts included.
pub const NAMES: u64 = 8 << 20;
/// The most bytes of a path, of a hard link's target, and of a symbolic link's target in a tar.
pub const PATH_BYTES: usize = 4096;
/// The most components of a path: each takes at least two bytes.
pub const DEPTH: usize = PATH_BYTES / 2;
/// The most extended attributes of an entry.
pub const XATTRS: usize = layer_tar::MAX_XATTRS;
/// The most bytes of an entry's extended attributes, names and values together.
pub const XATTR_BYTES: usize = 128 << 10;

// An extended header holds a path, a target and all attributes, with a line's own bytes for each.
const _: () = assert!(
    (2 * PATH_BYTES + XATTR_BYTES + XATTRS * 32 + 1024) as u64 <= layer_tar::MAX_PAX_BYTES,
    "an extended header that Diff writes must be one that ApplyDiff reads"
);
const _: () = assert!(
    canonical::SPARSE_MAX_RANGES <= layer_tar::MAX_SPARSE_SEGMENTS,
    "a sparse map that Diff writes must be one that ApplyDiff reads"
);

/// The error for a sandbox that exceeds a limit.
fn beyond(path: &[u8], what: &'static str, found: u64, limit: u64, advice: &'static str) -> DiffError {
    /// Bytes of a path that are shown.
    const SHOWN: usize = 200;
    let mut shown = path.get(..SHOWN).unwrap_or(path).escape_ascii().to_string();
    if path.len() > SHOWN {
        shown.push('…');
    }
    DiffError::Beyond { path: shown, what, found, limit, advice }
}

/// Checks all that a diff will write against the limits, before a byte is written. `left_out`: items that are not written.
pub(super) fn hold(items: &Items, left_out: impl Fn(usize) -> bool, names: u64) -> Result<(), DiffError> {
    let mut lengths: Vec<usize> = Vec::with_capacity(items.items.len());
    let mut written = 0u64;
    for (n, item) in items.items.iter().enumerate() {
        let parent = lengths.get(item.parent as usize).copied().unwrap_or(0);
        let length = parent + usize::from(parent > 0) + items.name(item).len();
        lengths.push(length);
        if left_out(n) {
            continue;
        }
        written += 1;
        // A directory ends with a slash; markers stand beside a name or in a directory.
        let longest =
            length + 1 + if item.opaque { canonical::OPAQUE.len() } else { canonical::WHITEOUT.len() };
        if longest > PATH_BYTES {
            let mut path = Vec::new();
            items.path(item, &mut path);
            let advice = "rename or remove directories on its way in the container";
            return Err(beyond(&path, "bytes of a path", longest as u64, PATH_BYTES as u64, advice));
        }
    }
    if written > names {
        let advice = "remove files in the container, or keep them in a volume";
        return Err(beyond(b"/", "names", written, names, advice));
    }
    Ok(())
}

/// Checks the attributes of an entry against the limits.
pub(super) fn hold_xattrs(path: &[u8], xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<(), DiffError> {
    let advice = "remove attributes of it in the container";
    if xattrs.len() > XATTRS {
        let found = xattrs.len() as u64;
        return Err(beyond(path, "extended attributes of an entry", found, XATTRS as u64, advice));
    }
    let bytes: usize = xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
    if bytes > XATTR_BYTES {
        let what = "bytes of an entry's extended attributes";
        return Err(beyond(path, what, bytes as u64, XATTR_BYTES as u64, advice));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ext4_image::EXT4_LINK_MAX;

    /// The rows of a table of this module's form: what, and how many.
    fn rows(text: &str, comment: &str) -> Vec<(String, u64)> {
        text.lines()
            .filter_map(|line| line.trim().strip_prefix(comment)?.trim().strip_prefix("| "))
            .filter_map(|row| {
                let mut cells = row.split(" | ");
                let (what, most) = (cells.next()?, cells.next()?);
                Some((what.to_owned(), most.replace(',', "").parse().ok()?))
            })
            .collect()
    }

    #[test]
    fn the_table_of_the_first_screen_is_what_holds() {
        let blocks = ext4_image::BlockSize::LARGEST.bytes();
        let holds: Vec<(&str, u64)> = vec![
            ("names in a layer", NAMES),
            ("bytes of a path", PATH_BYTES as u64),
            ("nested directories", DEPTH as u64),
            ("bytes of a symbolic link's target", u64::from(blocks) - 1),
            ("extended attributes of an entry", XATTRS as u64),
            ("bytes of an entry's extended attributes", XATTR_BYTES as u64),
            // Without the block's header and the end of the list; entries have 16 bytes beside their names.
            ("bytes of their names", u64::from(blocks) - 32 - 32),
            ("bytes of an extended header", layer_tar::MAX_PAX_BYTES),
            ("data ranges of a sparse file", layer_tar::MAX_SPARSE_SEGMENTS as u64),
            ("bytes of a file", u64::from(u32::MAX) * u64::from(blocks)),
            ("names of one file", u64::from(EXT4_LINK_MAX)),
        ];
        let holds: Vec<_> = holds.into_iter().map(|(what, most)| (what.to_owned(), most)).collect();
        assert_eq!(rows(include_str!("limits.rs"), "//!"), holds, "the first screen of this file");
    }

    #[test]
    fn attributes_are_held_against_the_table() {
        let many = |count: usize, bytes: usize| vec![(vec![b'n'; 4], vec![0; bytes]); count];
        assert!(hold_xattrs(b"a", &many(XATTRS, 0)).is_ok());
        let error = hold_xattrs(b"some/file", &many(XATTRS + 1, 0)).unwrap_err().to_string();
        assert!(error.contains("some/file") && error.contains("1025") && error.contains("1024"), "{error}");
        assert!(hold_xattrs(b"a", &many(2, (XATTR_BYTES / 2) - 4)).is_ok());
        assert!(hold_xattrs(b"a", &many(2, (XATTR_BYTES / 2) - 3)).is_err());
    }
}
