//! Owners of bytes: the files that damaged ranges of an image belong to.
//!
//! ```text
//!   byte ranges ──► blocks ──► walk of the whole tree, each inode's extents ──► paths │ the rest: metadata or free space
//! ```
//!
//! For reports about damaged blocks. Called by `svm-agent` for scrub and by `layer verify`.

use super::{Ext4, FileKind};
use crate::Ext4Error;
use disk_io::ReadAt;
use std::{
    collections::{BTreeSet, HashSet},
    ops::Range,
};

/// Most files that are named; all are counted.
pub const MAX_NAMED: usize = 64;
/// Most blocks that are searched for.
const MAX_BLOCKS: usize = 1 << 20;

/// Who owns some bytes of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Owners {
    /// Absolute paths of files with data there, one path a file, at most [`MAX_NAMED`].
    pub files: Vec<Vec<u8>>,
    /// How many files there are in all.
    pub count: u64,
    /// Some of the bytes are no file's data: metadata, directories, inline data or free space.
    pub others: bool,
}

impl<R: ReadAt> Ext4<R> {
    /// The files whose data lie in `ranges` (bytes of the disk).
    ///
    /// # Errors
    /// As reading any file: a damaged tree cannot be walked.
    pub fn owners(&self, ranges: &[Range<u64>]) -> Result<Owners, Ext4Error> {
        let bs = u64::from(self.geometry().block_size);
        let mut wanted: BTreeSet<u64> =
            ranges.iter().flat_map(|r| r.start / bs..r.end.div_ceil(bs)).take(MAX_BLOCKS).collect();
        let mut owners = Owners::default();
        let mut seen = HashSet::from([self.root()]);
        let mut todo = vec![(self.root(), Vec::new())];
        while let Some((ino, path)) = todo.pop() {
            let dir = self.inode(ino)?;
            for entry in self.read_dir(&dir)? {
                if !seen.insert(entry.ino) {
                    continue;
                }
                let inode = self.inode(entry.ino)?;
                let mut path = path.clone();
                path.push(b'/');
                path.extend_from_slice(&entry.name);
                if inode.kind == FileKind::Directory {
                    todo.push((entry.ino, path));
                    continue;
                }
                let mut hit = false;
                for extent in self.extents(&inode)? {
                    let end = extent.physical_block.saturating_add(u64::from(extent.blocks));
                    let blocks: Vec<u64> = wanted.range(extent.physical_block..end).copied().collect();
                    hit |= !blocks.is_empty();
                    for block in blocks {
                        wanted.remove(&block);
                    }
                }
                if hit {
                    owners.count += 1;
                    if owners.files.len() < MAX_NAMED {
                        owners.files.push(path);
                    }
                }
            }
        }
        owners.others = !wanted.is_empty();
        owners.files.sort();
        Ok(owners)
    }
}
