//! Windows: named pipes, security descriptors, files, processes in jobs.
//!
//! ```text
//!   listen ──► pipe      servers with a security descriptor (tokio)   svm::embedded ──► process  job, restricted token,
//!   cli    ──► pipe      a blocking client                                                       handles for a worker
//!   store  ──► fs        rename, flush, attributes, free space        worker ─────────► jail     confines a worker from
//!          ──► security  directories with an access list                                         inside
//!   svm::hcs ─► computecore, hvsock   machines and their agents       tests ──► foreign   processes of others
//! ```
//!
//! Errors are `io::Error` with the attempted action in front of the system's message. Paths are made verbatim (`\\?\`), so
//! that names of more than 260 characters work.

pub mod computecore;
pub mod foreign;
pub mod fs;
pub mod hvsock;
pub mod jail;
pub mod pipe;
pub mod process;
pub mod security;

use std::{ffi::OsStr, io, os::windows::ffi::OsStrExt, path::Path};

/// A string for a system call: UTF-16, terminated by NUL.
///
/// # Errors
/// `InvalidInput` for a NUL inside.
pub(crate) fn wide(text: &OsStr) -> io::Result<Vec<u16>> {
    let mut units: Vec<u16> = text.encode_wide().collect();
    if units.contains(&0) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a NUL in a name"));
    }
    units.push(0);
    Ok(units)
}

/// An absolute path in the form that has no length limit.
///
/// # Errors
/// As [`wide`]; a path that cannot be made absolute.
pub(crate) fn wide_path(path: &Path) -> io::Result<Vec<u16>> {
    let absolute = std::path::absolute(path)?;
    let text = absolute.as_os_str();
    let units: Vec<u16> = text.encode_wide().collect();
    let [backslash, question, dot] = [u16::from(b'\\'), u16::from(b'?'), u16::from(b'.')];
    let prefix: &str = match units.as_slice() {
        [a, b, c, d, ..]
            if *a == backslash && *b == backslash && (*c == question || *c == dot) && *d == backslash =>
        {
            ""
        }
        [a, b, ..] if *a == backslash && *b == backslash => return prefixed(r"\\?\UNC", &units[1..]),
        _ => r"\\?\",
    };
    prefixed(prefix, &units)
}

fn prefixed(prefix: &str, units: &[u16]) -> io::Result<Vec<u16>> {
    if units.contains(&0) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a NUL in a path"));
    }
    Ok(prefix.encode_utf16().chain(units.iter().copied()).chain([0]).collect())
}

/// The result of a call that returns 0 for failure.
pub(crate) fn check(result: i32) -> io::Result<()> {
    if result == 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Puts the attempted action in front of an error; its kind is kept.
pub(crate) fn tried(what: &'static str) -> impl FnOnce(io::Error) -> io::Error {
    move |e| io::Error::new(e.kind(), format!("{what}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_verbatim_once() {
        for (given, expected) in [
            (r"C:\a\b", r"\\?\C:\a\b"),
            (r"\\?\C:\a", r"\\?\C:\a"),
            (r"\\server\share\x", r"\\?\UNC\server\share\x"),
            (r"\\.\pipe\lcow", r"\\.\pipe\lcow"),
        ] {
            let units = wide_path(Path::new(given)).unwrap();
            assert_eq!(String::from_utf16_lossy(&units[..units.len() - 1]), expected);
        }
        assert!(wide(OsStr::new("a\0b")).is_err());
    }
}
