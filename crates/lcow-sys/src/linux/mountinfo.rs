//! The kernel's mount table, `/proc/<pid>/mountinfo`.
//!
//! ```text
//! 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
//! id parent dev root mount_point options  tags… - fs_type source super_options
//! ```
//!
//! Source: proc(5). Space, tab, newline and backslash in names are octal escapes (`\040`). A line that cannot be parsed is an
//! error and is never skipped: a mount that is not seen would not be unmounted. Called by `driver` (state after a crash of
//! the plugin) and by tests.

use super::{Context, SysError};
use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Unique id of the mount.
    pub mount_id: u64,
    /// Id of the parent mount.
    pub parent: u64,
    /// Major number of `st_dev` of files on it.
    pub major: u32,
    /// Minor number of `st_dev` of files on it.
    pub minor: u32,
    /// The mounted directory of the file system ("/" except for bind mounts).
    pub root: PathBuf,
    /// Path at which it is mounted.
    pub mount_point: PathBuf,
    /// Type of the file system.
    pub fs_type: String,
    /// Its source (`/dev/loop3`, "overlay", …).
    pub source: OsString,
    /// Options of this mount ("rw,noatime").
    pub options: String,
    /// Options of the file system as a whole.
    pub super_options: String,
    /// Propagation tags: `shared:N`, `master:N`, `propagate_from:N`, `unbindable`.
    pub tags: Vec<String>,
}

impl MountEntry {
    /// Whether the mount itself is read-only.
    pub fn read_only(&self) -> bool {
        self.options.split(',').any(|o| o == "ro")
    }
}

/// A line of the table that does not follow proc(5).
#[derive(Debug, thiserror::Error)]
#[error("mount table line {line}: {reason}")]
pub struct ParseError {
    /// Number of the line, from 1.
    pub line: usize,
    /// What is missing or malformed.
    pub reason: &'static str,
}

/// Reads the table of this process.
///
/// # Errors
/// [`SysError`] if it cannot be read or parsed.
pub fn read() -> Result<Vec<MountEntry>, SysError> {
    let path = "/proc/self/mountinfo";
    let text = std::fs::read(path).context("read", path)?;
    parse(&text).map_err(|e| SysError::usage("parse", path.as_ref(), e.to_string()))
}

/// Parses a whole table.
///
/// # Errors
/// [`ParseError`] names the first line that does not follow proc(5).
pub fn parse(text: &[u8]) -> Result<Vec<MountEntry>, ParseError> {
    text.split(|b| *b == b'\n')
        .enumerate()
        .filter(|(_, line)| !line.is_empty())
        .map(|(n, line)| parse_line(line).map_err(|reason| ParseError { line: n + 1, reason }))
        .collect()
}

fn parse_line(line: &[u8]) -> Result<MountEntry, &'static str> {
    let mut fields = line.split(|b| *b == b' ');
    let mut next = |what: &'static str| fields.next().ok_or(what);
    let number =
        |field: &[u8], what| std::str::from_utf8(field).ok().and_then(|s| s.parse::<u64>().ok()).ok_or(what);
    let mount_id = number(next("no mount id")?, "bad mount id")?;
    let parent = number(next("no parent id")?, "bad parent id")?;
    let device = next("no device number")?;
    let (major, minor) = std::str::from_utf8(device)
        .ok()
        .and_then(|s| s.split_once(':'))
        .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)))
        .ok_or("bad device number")?;
    let root = path(next("no root")?);
    let mount_point = path(next("no mount point")?);
    let options = text(next("no options")?);
    let mut tags = Vec::new();
    loop {
        match next("no separator")? {
            b"-" => break,
            tag => tags.push(text(tag)),
        }
    }
    let fs_type = text(&unescape(next("no file system type")?));
    let source = OsString::from_vec(unescape(next("no source")?));
    // Some virtual file systems have had an empty last field.
    let super_options = text(next("").unwrap_or_default());
    Ok(MountEntry {
        mount_id,
        parent,
        major,
        minor,
        root,
        mount_point,
        fs_type,
        source,
        options,
        super_options,
        tags,
    })
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(field).into_owned()
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(field)))
}

/// Turns `\ooo` back into bytes; anything else stays as it is.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first == b'\\'
            && let Some((&[a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7'], after)) =
                tail.split_first_chunk()
        {
            out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = after;
        } else {
            out.push(first);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_manual_page_and_hard_ones() {
        let table = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n\
            40 36 7:12 / /a\\040b\\134c\\011d\\012e ro shared:3 master:2 - ext4 /dev/loop12 ro\n\
            41 36 0:55 / /x\xff rw - overlay over\\040lay rw,lowerdir=a:b\n\
            42 36 0:56 / /odd\\9 rw - tmpfs none \n";
        let all = parse(table).unwrap();
        assert_eq!(all.len(), 4);
        assert_eq!((all[0].mount_id, all[0].parent, all[0].major, all[0].minor), (36, 35, 98, 0));
        assert_eq!(all[0].root, PathBuf::from("/mnt1"));
        assert_eq!(all[0].tags, ["master:1"]);
        assert_eq!(all[0].super_options, "rw,errors=continue");
        assert!(!all[0].read_only());
        assert_eq!(all[1].mount_point, PathBuf::from("/a b\\c\td\ne"));
        assert_eq!(all[1].tags, ["shared:3", "master:2"]);
        assert!(all[1].read_only());
        assert_eq!(all[2].mount_point.as_os_str().as_encoded_bytes(), b"/x\xff");
        assert_eq!(all[2].source, "over lay");
        assert_eq!(all[3].mount_point, PathBuf::from("/odd\\9"));
    }

    #[test]
    fn a_bad_line_is_named() {
        for (table, line) in [
            (&b"x 35 98:0 / / rw - a b c"[..], 1),
            (b"1 1 1:1 / / rw - a b c\n1 1 11 / / rw - a b c", 2),
            (b"1 1 1:1 / / rw shared:1", 1),
            (b"1 1", 1),
        ] {
            assert_eq!(parse(table).unwrap_err().line, line);
        }
    }

    #[test]
    fn the_table_of_this_machine_parses() {
        let all = read().unwrap();
        assert!(all.iter().any(|m| m.mount_point == *"/"), "no root mount in {all:?}");
    }
}
