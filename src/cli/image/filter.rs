//! A tar without some of its entries.
//!
//! ```text
//!   TarReader ─┬─ Raw (headers) ─► held until the entry is known ─► kept │ dropped
//!              ├─ Entry ─► wanted(path)?
//!              └─ Data, and the padding behind it ─► kept │ dropped
//! ```
//!
//! What is kept is kept byte for byte. A hard link to an entry that was dropped is an error, because it could not be unpacked.
//! Called by `commit`.

use layer_tar::{BLOCK, Chunks, EntryKind, Event, TarReader};
use std::{
    collections::HashSet,
    io::{self, Read},
};

/// The bytes of the entries that are wanted, and of the end of the archive.
pub(super) struct Filtered<R, W> {
    reader: TarReader<Chunks<R>>,
    wanted: W,
    /// Bytes to give.
    ready: Vec<u8>,
    given: usize,
    /// Headers of an entry that is not known yet.
    held: Vec<u8>,
    /// Whether the current entry is kept, and how many bytes of padding follow its data.
    keep: bool,
    padding: usize,
    ended: bool,
    dropped: HashSet<Vec<u8>>,
    /// What was left out.
    pub(super) left_out: Vec<Vec<u8>>,
}

/// A path as the filter compares it: without slashes at its ends.
fn plain(path: &[u8]) -> &[u8] {
    let path = path.strip_prefix(b"./").unwrap_or(path);
    let path = path.strip_prefix(b"/").unwrap_or(path);
    path.strip_suffix(b"/").unwrap_or(path)
}

impl<R: Read, W: FnMut(&[u8]) -> bool> Filtered<R, W> {
    /// Filters `tar`; `wanted` is called with each path, without slashes at its ends.
    pub(super) fn new(tar: R, wanted: W) -> Self {
        Self {
            reader: TarReader::new(tar),
            wanted,
            ready: Vec::new(),
            given: 0,
            held: Vec::new(),
            keep: true,
            padding: 0,
            ended: false,
            dropped: HashSet::new(),
            left_out: Vec::new(),
        }
    }

    fn step(&mut self) -> io::Result<()> {
        match self.reader.next_event().map_err(io::Error::other)? {
            Event::Raw(bytes) => {
                let (padding, rest) = bytes.split_at(self.padding.min(bytes.len()));
                self.padding -= padding.len();
                if self.keep {
                    self.ready.extend_from_slice(padding);
                }
                self.held.extend_from_slice(rest);
            }
            Event::Entry(entry) => {
                let path = plain(&entry.path);
                self.keep = (self.wanted)(path);
                self.padding = (entry.stored.next_multiple_of(BLOCK as u64) - entry.stored) as usize;
                if self.keep {
                    if entry.kind == EntryKind::HardLink && self.dropped.contains(plain(&entry.link)) {
                        return Err(io::Error::other(format!(
                            "'{}' is a hard link to '{}', which is left out; --include it",
                            path.escape_ascii(),
                            plain(&entry.link).escape_ascii()
                        )));
                    }
                    self.ready.append(&mut self.held);
                } else {
                    self.held.clear();
                    self.dropped.insert(path.to_vec());
                    self.left_out.push(path.to_vec());
                }
            }
            Event::Data { bytes, .. } => {
                if self.keep {
                    self.ready.extend_from_slice(bytes);
                }
            }
            Event::End => {
                self.ready.append(&mut self.held);
                self.ended = true;
            }
        }
        Ok(())
    }
}

impl<R: Read, W: FnMut(&[u8]) -> bool> Read for Filtered<R, W> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.given == self.ready.len() && !self.ended {
            self.ready.clear();
            self.given = 0;
            self.step()?;
        }
        let n = buf.len().min(self.ready.len() - self.given);
        buf[..n].copy_from_slice(&self.ready[self.given..self.given + n]);
        self.given += n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_image::testing::Tar;

    #[test]
    fn what_is_kept_is_kept_byte_for_byte() {
        let long = "a/".repeat(80) + "name";
        let part = |tar: &mut Tar, n: usize| {
            match n {
                0 => tar.dir("etc"),
                1 => tar.file("etc/a", b"123"),
                2 => tar.file(&long, &[7; 1500]),
                3 => tar.file("etc/empty", b""),
                4 => tar.symlink("etc/link", &long),
                _ => tar.whiteout("etc", "gone"),
            };
        };
        let names = ["etc", "etc/a", &long, "etc/empty", "etc/link", "etc/.wh.gone"];
        let mut whole = Tar::default();
        (0..6).for_each(|n| part(&mut whole, n));
        for mask in 0..64u32 {
            let kept = |n: usize| mask >> n & 1 == 1;
            let mut expected = Tar::default();
            (0..6).filter(|n| kept(*n)).for_each(|n| part(&mut expected, n));
            let tar = whole.finish();
            let mut filtered = Filtered::new(tar.as_slice(), |path: &[u8]| {
                kept(names.iter().position(|name| name.as_bytes() == path).unwrap())
            });
            let mut found = Vec::new();
            filtered.read_to_end(&mut found).unwrap();
            assert!(found == expected.finish(), "{mask:b}");
            assert_eq!(filtered.left_out.len(), 6 - mask.count_ones() as usize);
        }
        let tar = Tar::default().file("a", b"1").link("b", "a").finish();
        let mut broken = Filtered::new(tar.as_slice(), |path: &[u8]| path != b"a");
        assert!(broken.read_to_end(&mut Vec::new()).unwrap_err().to_string().contains("hard link"));
    }
}
