//! Sends bytes of a file to a pipe or socket without copying them through this process.
//!
//! ```text
//!   page cache of the file ──sendfile──► pipe │ unix socket: refers to the same pages (sockets: Linux 6.5 and later)
//! ```
//!
//! Called by `svm-agent` and `cli`, which implement `disk_io::StreamOut` with it.

use std::{fs::File, io};

/// Sends up to `len` bytes of `file` from `offset` to `out` and returns the number sent. 0 means that the system cannot
/// send between these two, or that the file ends at `offset`.
///
/// # Errors
/// The error of `out`, for example `BrokenPipe`.
#[cfg(target_os = "linux")]
pub fn send_file(out: impl std::os::fd::AsFd, file: &File, offset: u64, len: u64) -> io::Result<u64> {
    use rustix::io::Errno;
    /// Most bytes that the kernel sends in one call.
    const MOST: u64 = 0x7fff_f000;
    let mut at = offset;
    match rustix::fs::sendfile(out, file, Some(&mut at), len.min(MOST) as usize) {
        Ok(sent) => Ok(sent as u64),
        // The call does not support these two files, or the jail forbids it.
        Err(Errno::INVAL | Errno::NOSYS | Errno::PERM | Errno::OPNOTSUPP | Errno::OVERFLOW) => Ok(0),
        Err(e) => Err(e.into()),
    }
}

/// Returns 0: this system has no such call.
///
/// # Errors
/// Never fails.
#[cfg(not(target_os = "linux"))]
pub fn send_file<O>(_: O, _: &File, _: u64, _: u64) -> io::Result<u64> {
    Ok(0)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn bytes_of_a_file_come_out_of_a_pipe_and_a_socket() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let (mut from, to) = io::pipe().unwrap();
        assert_eq!(send_file(&to, &file, 3, 4).unwrap(), 4);
        assert_eq!(send_file(&to, &file, 8, 100).unwrap(), 2, "no more than there is");
        assert_eq!(send_file(&to, &file, 10, 1).unwrap(), 0);
        drop(to);
        let mut got = String::new();
        from.read_to_string(&mut got).unwrap();
        assert_eq!(got, "345689");
        let (mut from, to) = std::os::unix::net::UnixStream::pair().unwrap();
        let sent = send_file(&to, &file, 0, 10).unwrap();
        assert!(sent == 10 || sent == 0, "all, or not on this kernel");
        drop(to);
        got.clear();
        from.read_to_string(&mut got).unwrap();
        assert_eq!(got.len() as u64, sent);
        // Without a reader it is an error, and not "cannot".
        let (from, to) = io::pipe().unwrap();
        drop(from);
        assert_eq!(send_file(&to, &file, 0, 10).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        // The kernel does not send to files opened for appending; the caller writes.
        let folder = tempfile::tempdir().unwrap();
        let log = File::options().create(true).append(true).open(folder.path().join("log")).unwrap();
        assert_eq!(send_file(&log, &file, 0, 10).unwrap(), 0);
    }
}
