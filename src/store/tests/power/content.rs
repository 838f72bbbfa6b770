//! What a file holds, without its holes.

use disk_io::{ReadAt, WriteAt};
use std::{
    collections::hash_map::DefaultHasher,
    fs::File,
    hash::{Hash, Hasher},
    io,
    path::Path,
};

/// Unit in which files are read.
const BLOCK: u64 = 4096;

/// The bytes of a file, by blocks that are not all zeros.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) len: u64,
    blocks: Vec<(u64, Vec<u8>)>,
    /// Of length and blocks.
    pub(crate) hash: u64,
}

impl Content {
    fn new(len: u64, blocks: Vec<(u64, Vec<u8>)>) -> Self {
        let mut hasher = DefaultHasher::new();
        (len, &blocks).hash(&mut hasher);
        Self { len, blocks, hash: hasher.finish() | 1 }
    }

    /// A file without bytes, or with zeros only.
    pub(crate) fn zeros(len: u64) -> Self {
        Self::new(len, Vec::new())
    }

    /// The first half; at least a byte less.
    pub(crate) fn prefix(&self) -> Self {
        let len = self.len / 2;
        let blocks = self.blocks.iter().filter(|(at, _)| *at < len).map(|(at, bytes)| {
            let keep = usize::try_from(len - at).unwrap().min(bytes.len());
            (*at, bytes[..keep].to_vec())
        });
        let blocks = blocks.filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0)).collect();
        Self::new(len, blocks)
    }

    /// The first half of this over all of another.
    pub(crate) fn half_over(&self, old: &Self) -> Self {
        let half = (self.len / 2).next_multiple_of(BLOCK);
        let new = self.blocks.iter().filter(|(at, _)| *at < half);
        let old = old.blocks.iter().filter(|(at, _)| *at >= half && *at < self.len);
        Self::new(self.len, new.chain(old).cloned().collect())
    }

    /// Reads a file.
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let mut blocks = Vec::new();
        let mut at = 0;
        while at < len {
            match rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
                Ok(data) => at = data / BLOCK * BLOCK,
                Err(rustix::io::Errno::NXIO) => break,
                Err(e) => return Err(e.into()),
            }
            let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(at))?;
            while at < hole {
                let mut bytes = vec![0; usize::try_from(BLOCK.min(len - at)).unwrap()];
                file.read_exact_at(&mut bytes, at)?;
                if bytes.iter().any(|byte| *byte != 0) {
                    blocks.push((at, bytes));
                }
                at += BLOCK;
            }
        }
        Ok(Self::new(len, blocks))
    }

    /// Writes a new file.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let file = File::options().write(true).read(true).create_new(true).open(path)?;
        WriteAt::set_len(&file, self.len)?;
        for (at, bytes) in &self.blocks {
            file.write_all_at(bytes, *at)?;
        }
        Ok(())
    }

    /// Replaces a text in a small file by another one of the same length.
    pub(crate) fn replaced(&self, from: &str, to: &str) -> Option<Self> {
        let [(0, bytes)] = &self.blocks[..] else { return None };
        let text = std::str::from_utf8(bytes).ok().filter(|text| text.contains(from))?;
        Some(Self::new(self.len, vec![(0, text.replace(from, to).into_bytes())]))
    }
}
