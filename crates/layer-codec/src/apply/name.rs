//! Names of entries: split into components, and the meaning of AUFS's special names. Called by `layer`, `links` and `tree`.

/// Prefix of AUFS whiteouts.
pub(super) const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// Prefix of AUFS's own entries.
pub(super) const META_PREFIX: &[u8] = b".wh..wh.";
/// Marks its directory as opaque.
pub(super) const OPAQUE: &[u8] = b".wh..wh..opq";
/// The directory at the root in which AUFS kept hard-linked files.
pub(super) const LINK_DIR: &[u8] = b".wh..wh.plnk";

/// Why a name is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NameError {
    Escapes,
    TooDeep,
    Nul,
}

/// Splits a name into components: `/` at the start, `.` and empty ones dropped, `..` resolved.
pub(super) fn split<'a>(path: &'a [u8], max_depth: usize, out: &mut Vec<&'a [u8]>) -> Result<(), NameError> {
    out.clear();
    for part in path.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                out.pop().ok_or(NameError::Escapes)?;
            }
            _ if out.len() >= max_depth => return Err(NameError::TooDeep),
            _ if part.contains(&0) => return Err(NameError::Nul),
            _ => out.push(part),
        }
    }
    Ok(())
}

/// Splits the last component off, if the name is so plain that its components are what lies between its slashes:
/// (everything before the last slash, last component).
pub(super) fn plain_parent(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    let slash = path.iter().rposition(|&b| b == b'/')?;
    let last = &path[slash + 1..];
    (!matches!(last, b"" | b"." | b"..") && !last.contains(&0)).then(|| (&path[..slash], last))
}

/// A name from a tar as messages show it.
pub(super) fn shown(name: &[u8]) -> String {
    /// Enough to recognize it.
    const MOST: usize = 256;
    let cut = name.get(..MOST).map_or((name, ""), |head| (head, "…"));
    format!("{}{}", cut.0.escape_ascii(), cut.1)
}

/// The meaning of an entry's last component.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning<'a> {
    /// An ordinary name.
    Plain,
    /// A whiteout of this name in the same directory.
    Whiteout(&'a [u8]),
    /// Marks the directory as opaque.
    Opaque,
    /// An entry of AUFS itself, which is skipped.
    Meta,
    /// A whiteout without a name.
    Bad,
}

/// The meaning of a last component.
pub(super) fn meaning(last: &[u8]) -> Meaning<'_> {
    let Some(hidden) = last.strip_prefix(WHITEOUT_PREFIX) else { return Meaning::Plain };
    match hidden {
        _ if last == OPAQUE => Meaning::Opaque,
        _ if last.starts_with(META_PREFIX) => Meaning::Meta,
        b"" | b"." | b".." => Meaning::Bad,
        _ => Meaning::Whiteout(hidden),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_split() {
        type Case<'a> = (&'a [u8], Result<&'a [&'a [u8]], NameError>);
        let cases: &[Case<'_>] = &[
            (b"", Ok(&[])),
            (b"./", Ok(&[])),
            (b"/", Ok(&[])),
            (b"/etc//passwd", Ok(&[b"etc", b"passwd"])),
            (b"./a/./b/", Ok(&[b"a", b"b"])),
            (b"a/../b", Ok(&[b"b"])),
            (b"a/..", Ok(&[])),
            (b"..", Err(NameError::Escapes)),
            (b"/../a", Err(NameError::Escapes)),
            (b"a/../../b", Err(NameError::Escapes)),
            (b"...", Ok(&[b"..."])),
            (b"a\xff/\x01", Ok(&[b"a\xff", b"\x01"])),
            (b"a\0b", Err(NameError::Nul)),
            (b"1/2/3/4", Ok(&[b"1", b"2", b"3", b"4"])),
            (b"1/2/3/4/5", Err(NameError::TooDeep)),
            (b"1/2/3/4/../5", Ok(&[b"1", b"2", b"3", b"5"])),
        ];
        for (path, want) in cases {
            let mut out = Vec::new();
            let got = split(path, 4, &mut out).map(|()| &out[..]);
            assert_eq!(got, *want, "{}", String::from_utf8_lossy(path));
        }
    }

    #[test]
    fn special_names() {
        let cases: &[(&[u8], Meaning<'_>)] = &[
            (b"a", Meaning::Plain),
            (b".wh", Meaning::Plain),
            (b".wh.a", Meaning::Whiteout(b"a")),
            (b".wh..a", Meaning::Whiteout(b".a")),
            (b".wh.", Meaning::Bad),
            (b".wh..", Meaning::Bad),
            (b".wh...", Meaning::Bad),
            (b".wh....", Meaning::Whiteout(b"...")),
            (b".wh..wh.", Meaning::Meta),
            (b".wh..wh.aufs", Meaning::Meta),
            (b".wh..wh..opq", Meaning::Opaque),
            (b".wh..wh..opq2", Meaning::Meta),
        ];
        for (name, want) in cases {
            assert_eq!(meaning(name), *want, "{}", String::from_utf8_lossy(name));
        }
    }
}
