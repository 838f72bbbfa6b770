//! The list of an image's files with their digests: what `image commit` compares a disk with, and `b3sum` can check.
//!
//! ```text
//!   OUT.b3sums.zst   zstd of lines │ HEX (64 digits of BLAKE3) │ two spaces │ path from the root │ \n │
//!                                  │ \ before the digits where the path has a newline or a backslash: \n, \\ in it
//! ```
//!
//! Order: depth first, the names of each directory by their bytes; a file of several names has a line for each. A file with
//! more than 1 GiB of holes has no line. Equal images give equal bytes. `cd ROOT && zstd -dc OUT.b3sums.zst | b3sum --check`
//! checks the files of a mounted disk. Called by `pack`; read by `digests`.

use layer_codec::flat::FlatFile;
use std::io::{self, Write};

/// What is appended to OUT for the list.
pub(super) const FILES_SUFFIX: &str = ".b3sums.zst";
/// What is appended to OUT for the description, which says of which image it is.
pub(super) const JSON_SUFFIX: &str = ".json";
/// Compression level: digests do not compress, and higher ones take megabytes of memory.
const LEVEL: i32 = 1;

/// A list that is being written.
pub(super) struct FileList<W: Write> {
    out: zstd::stream::write::Encoder<'static, W>,
    files: u64,
}

impl<W: Write> FileList<W> {
    pub(super) fn new(out: W) -> io::Result<Self> {
        Ok(Self { out: zstd::stream::write::Encoder::new(out, LEVEL)?, files: 0 })
    }

    /// Adds a file.
    pub(super) fn add(&mut self, file: &FlatFile<'_>) -> io::Result<()> {
        let Some(digest) = file.blake3 else { return Ok(()) };
        self.files += 1;
        let mut line = Vec::with_capacity(70 + file.path.len());
        let special = file.path.iter().any(|byte| matches!(byte, b'\n' | b'\\'));
        if special {
            line.push(b'\\');
        }
        line.extend_from_slice(blake3::Hash::from_bytes(digest).to_hex().as_bytes());
        line.extend_from_slice(b"  ");
        for byte in file.path {
            match byte {
                b'\n' => line.extend_from_slice(b"\\n"),
                b'\\' => line.extend_from_slice(b"\\\\"),
                byte => line.push(*byte),
            }
        }
        line.push(b'\n');
        self.out.write_all(&line)
    }

    /// Ends the list; gives the number of its lines.
    pub(super) fn finish(self) -> io::Result<u64> {
        self.out.finish()?.flush()?;
        Ok(self.files)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_of_b3sum() {
        let mut out = Vec::new();
        let mut list = FileList::new(&mut out).unwrap();
        let digest = Some([0xab; 32]);
        for (path, blake3) in [(&b"etc/passwd"[..], digest), (b"a\\b\nc", digest), (b"holes", None)] {
            list.add(&FlatFile { path, size: 1, blake3 }).unwrap();
        }
        assert_eq!(list.finish().unwrap(), 2);
        let text = String::from_utf8(zstd::decode_all(&out[..]).unwrap()).unwrap();
        let hex = "ab".repeat(32);
        assert_eq!(text, format!("{hex}  etc/passwd\n\\{hex}  a\\\\b\\nc\n"));
    }
}
