//! The metadata of all entries of an export, in arenas.
//!
//! ```text
//!   walk ─► Details::note ─► list ─┬─► xattrs, ranges, bytes (link targets, inline data)
//!                                  └─► stamps, of files of live layers
//! ```
//!
//! Everything a tar's headers need is here once the walk has ended, so a live layer may be written again. Memory: about 150
//! bytes an entry, its xattrs, 24 bytes for each data range. Called by [`super::export`] and [`super::live`].

use super::{
    DiffError, OutsideId,
    fs::{Fs, Range},
    stream::FileBytes,
    view::{LayerInode, Table},
    walk::Detailer,
};
use disk_io::{ReadAt, WriteAt};
use ext4_image::{FileKind, Inode, Timestamp};
use std::{collections::HashMap, sync::Arc};

/// What must not change between the first and the last look.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    size: u64,
    mtime: Timestamp,
    pub(super) ctime: Timestamp,
    version: u64,
    generation: u32,
    links_gone: bool,
}

impl Stamp {
    pub(super) fn of(inode: &Inode) -> Self {
        Self {
            size: inode.size,
            mtime: inode.mtime,
            ctime: inode.ctime,
            version: inode.version,
            generation: inode.generation,
            links_gone: inode.links == 0,
        }
    }
}

/// Where something stands in an arena.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Span {
    pub(super) at: usize,
    pub(super) len: usize,
}

/// An inode's metadata as the tar needs them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Detail {
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Timestamp,
    pub(super) rdev: (u32, u32),
    /// In `Details::xattrs`.
    pub(super) xattrs: Span,
    /// In `Details::ranges`.
    pub(super) ranges: Span,
    /// In `Details::bytes`: the target of a symbolic link, or inline data.
    pub(super) bytes: Option<Span>,
    /// In `Details::stamps`, for files of a live layer.
    pub(super) stamp: u32,
    /// The ranges are places in `Details::scratch`.
    pub(super) copied: bool,
}

/// Details of all items, in arenas.
#[derive(Default)]
pub(super) struct Details {
    pub(super) list: Vec<Detail>,
    pub(super) ranges: Vec<Range>,
    pub(super) bytes: Vec<u8>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) stamps: Vec<Stamp>,
    /// Live files that are compared by their bytes, in `list`.
    pub(super) captured: HashMap<LayerInode, u32>,
    /// Ids that the maps do not have, by numbers in `list`.
    pub(super) outside: HashMap<u32, OutsideId>,
    /// Copies of files of live layers.
    pub(super) scratch: Option<Arc<dyn WriteAt>>,
}

pub(super) fn slice<T>(arena: &[T], span: Span) -> &[T] {
    arena.get(span.at..span.at + span.len).unwrap_or(&[])
}

impl Details {
    fn put(&mut self, bytes: &[u8]) -> Span {
        let span = Span { at: self.bytes.len(), len: bytes.len() };
        self.bytes.extend_from_slice(bytes);
        span
    }
}

impl<R: ReadAt> Detailer<R> for Details {
    fn detail(&mut self, table: &Table<'_, R>, node: LayerInode, inode: &Inode) -> Result<u32, DiffError> {
        self.note(table, node, inode)
    }
}

impl Details {
    /// Keeps what is needed of an inode; gives its number in `list`.
    pub(super) fn note<R: ReadAt>(
        &mut self,
        table: &Table<'_, R>,
        node: LayerInode,
        inode: &Inode,
    ) -> Result<u32, DiffError> {
        let fs = table.fs(node.layer)?;
        let (uid, gid) = table.owner(node, inode);
        let at = self.xattrs.len();
        self.xattrs.extend(table.xattrs(node, inode)?.into_iter().map(|x| (x.name, x.value)));
        let xattrs = Span { at, len: self.xattrs.len() - at };
        let mut ranges = Span { at: self.ranges.len(), len: 0 };
        let mut bytes = None;
        match inode.kind {
            FileKind::Symlink => bytes = Some(self.put(&fs.symlink_target(inode)?)),
            FileKind::File => {
                if let Some(inline) = fs.inline_bytes(inode)? {
                    bytes = Some(self.put(&inline));
                } else {
                    fs.ranges(inode, &mut self.ranges)?;
                    ranges.len = self.ranges.len() - ranges.at;
                }
            }
            _ => {}
        }
        let mut stamp = u32::MAX;
        if inode.kind == FileKind::File && table.is_live(node.layer) {
            stamp = self.stamps.len() as u32;
            self.stamps.push(Stamp::of(inode));
        }
        let number = u32::try_from(self.list.len()).unwrap_or(u32::MAX);
        if let Some(id) = table.outside(node, inode)? {
            self.outside.insert(number, id);
        }
        self.list.push(Detail {
            mode: inode.mode & 0o7777,
            uid,
            gid,
            mtime: inode.mtime,
            rdev: inode.rdev,
            xattrs,
            ranges,
            bytes,
            stamp,
            copied: false,
        });
        Ok(number)
    }
}

impl Details {
    /// The bytes of a file in a layer, wherever they are.
    pub(super) fn file<'d, R: ReadAt>(
        &'d self,
        fs: &'d Fs<R>,
        ino: u32,
        size: u64,
        detail: &Detail,
    ) -> FileBytes<'d, R> {
        let ranges = slice(&self.ranges, detail.ranges);
        match (detail.bytes, &self.scratch) {
            (Some(span), _) => FileBytes::inline(fs, slice(&self.bytes, span)),
            (None, Some(scratch)) if detail.copied => FileBytes::copied(fs, &**scratch, size, ranges),
            _ => FileBytes::new(fs, ino, size, ranges),
        }
    }
}
