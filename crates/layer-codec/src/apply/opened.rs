//! An image below that was opened: its root, and caches of what is looked up again and again.
//!
//! ```text
//!   find(directory, name) ─► names of the directory, read once ─► inode
//!   read(file, offset)    ─► map of the file's data, read once ─► bytes
//! ```
//!
//! A tar may have many links into one directory of a hundred thousand names, and the cost of each must not depend on the size
//! of the directory. Memory: cached names are limited to [`MAX_KEPT`]. Called by `chain` and `descent`.

use crate::{DiffError, LayerKind, LayerSource, upper};
use disk_io::ReadAt;
use ext4_image::{DataRange, Ext4, Ext4Error, Inode};
use std::collections::HashMap;

/// The most bytes of cached names; all are dropped when a further directory does not fit.
const MAX_KEPT: usize = 512 << 20;
/// Overhead of a cached name; bytes.
const NAME_COST: usize = 64;

/// A layer that was opened.
pub(super) struct Opened<R> {
    pub(super) fs: Ext4<R>,
    /// Inode of the layer's root directory, if it has one.
    root: Option<u32>,
    /// Cached directories: inode, then names.
    directories: HashMap<u32, HashMap<Box<[u8]>, u32>>,
    /// Cost of the cached names; bytes.
    kept: usize,
    /// The file that is being copied, and where its data are.
    copied: Option<(u32, Vec<DataRange>)>,
}

impl<R: ReadAt> Opened<R> {
    pub(super) fn new(source: LayerSource<R>) -> Result<Self, DiffError> {
        let fs = Ext4::open(source.disk)?;
        let top = fs.inode(fs.root())?;
        let root = match source.kind {
            LayerKind::Applied => Some(top),
            LayerKind::Sandbox => upper::own(&fs, &top)?,
            LayerKind::Scratch(id) => upper::scratch(&fs, &top, id)?,
        };
        let root = root.map(|inode| inode.ino);
        Ok(Self { fs, root, directories: HashMap::new(), kept: 0, copied: None })
    }

    /// The root directory of the layer.
    pub(super) fn root(&self) -> Result<Option<Inode>, Ext4Error> {
        self.root.map(|ino| self.fs.inode(ino)).transpose()
    }

    /// A name in a directory.
    pub(super) fn find(&mut self, dir: &Inode, name: &[u8]) -> Result<Option<u32>, Ext4Error> {
        if let Some(directory) = self.directories.get(&dir.ino) {
            return Ok(directory.get(name).copied());
        }
        let mut directory = HashMap::new();
        let mut cost = NAME_COST;
        self.fs.visit_dir(dir, |name, ino, _| {
            cost += name.len() + NAME_COST;
            directory.insert(name.into(), ino);
            Ok::<(), Ext4Error>(())
        })?;
        if self.kept + cost > MAX_KEPT {
            self.directories.clear();
            self.kept = 0;
        }
        self.kept += cost;
        let found = directory.get(name).copied();
        self.directories.insert(dir.ino, directory);
        Ok(found)
    }

    /// Reads data of a regular file.
    pub(super) fn read(&mut self, ino: u32, offset: u64, buf: &mut [u8]) -> Result<usize, Ext4Error> {
        let inode = self.fs.inode(ino)?;
        if self.fs.inline_bytes(&inode)?.is_some() {
            return self.fs.read_file_at(&inode, offset, buf);
        }
        let known = self.copied.take().filter(|(other, _)| *other == ino);
        let (_, ranges) = match known {
            Some(known) => self.copied.insert(known),
            None => self.copied.insert((ino, self.fs.data_map(&inode)?)),
        };
        let left = usize::try_from(inode.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let want = buf.len().min(left);
        let buf = &mut buf[..want];
        buf.fill(0);
        let end = offset + want as u64;
        let first = ranges.partition_point(|r| r.offset + r.len <= offset);
        for range in ranges[first..].iter().take_while(|r| r.offset < end) {
            let (from, to) = (range.offset.max(offset), (range.offset + range.len).min(end));
            let Some(place) = range.disk_offset else { continue };
            let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
            self.fs.read_disk(place + (from - range.offset), part)?;
        }
        Ok(want)
    }
}
