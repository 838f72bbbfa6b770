//! Layers to a tar.
//!
//! ```text
//!  1 metadata   walk ─► items + details in memory ─► hooks.metadata_read()   (the host thaws)
//!  2 compare    bytes of pairs that only bytes can tell apart (merged mode)
//!  3 stream     headers, data straight from their places on the disk
//!  4 recheck    hooks.before_recheck() (the host freezes) ─► re-read the inodes of a live layer from the disk
//! ```
//!
//! After step 1 no metadata of the target are read, so a mounted sandbox may go on to be written: what changed is found
//! in step 4 and is an error, after which the caller must cut the stream. Memory: about 150 bytes an entry, its name,
//! its xattrs, 24 bytes for each data range. Called by `agent`.

use super::{
    DiffError, ParentLayer, ParentSpec,
    canonical::{self, Version},
    fs::Fs,
    ids::IdMaps,
    stream::{FileBytes, Out, Range, same_bytes},
    view::{LayerSource, Node, Table},
    walk::{Detailer, Item, Items, Mode, NoDetail, Status, walk},
};
use crate::{
    ext4::{FileKind, Inode, Timestamp},
    io::{ReadAt, StreamOut},
    tar::writer::{Header, Kind},
};
use std::collections::HashMap;

/// Settings of an export.
#[derive(Debug, Clone, Default)]
pub struct ExportOptions {
    /// Maps for the layers with [`LayerSource::host_ids`].
    pub ids: Option<IdMaps>,
    /// Version of the canonical tar.
    pub version: Version,
}

/// What an export wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExportSummary {
    /// Bytes of the tar.
    pub tar_bytes: u64,
    /// Headers, PAX headers not counted.
    pub entries: u64,
    /// Sum of regular-file sizes, a hard-linked inode once.
    pub diff_size: u64,
    /// Sockets, which were left out: they are of no use without the process that made them.
    pub sockets: u64,
    /// Names that begin with `.wh.`, and what is below them, which were left out: a tar of layers can't express them.
    pub hidden: u64,
    /// The first of these, if there are any.
    pub first_hidden: Option<Vec<u8>>,
}

/// What the caller does between the steps while a target is mounted.
pub trait LiveHooks {
    /// All metadata are in memory; the file system may change again.
    fn metadata_read(&mut self) -> Result<(), DiffError>;
    /// The stream is complete; the file system must stand still (frozen, so that the disk is up to date) until export
    /// returns.
    fn before_recheck(&mut self) -> Result<(), DiffError>;
}

/// For layers at rest.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoHooks;

impl LiveHooks for NoHooks {
    fn metadata_read(&mut self) -> Result<(), DiffError> {
        Ok(())
    }

    fn before_recheck(&mut self) -> Result<(), DiffError> {
        Ok(())
    }
}

/// Where something stands in an arena.
#[derive(Debug, Clone, Copy, Default)]
struct Span {
    at: usize,
    len: usize,
}

/// An inode's metadata as the tar needs them.
#[derive(Debug, Clone, Copy)]
struct Detail {
    mode: u16,
    uid: u32,
    gid: u32,
    mtime: Timestamp,
    rdev: (u32, u32),
    /// In `Details::xattrs`.
    xattrs: Span,
    /// In `Details::ranges`.
    ranges: Span,
    /// In `Details::bytes`: the target of a symbolic link, or inline data.
    bytes: Option<Span>,
    /// In `Details::stamps`, for files of a live layer.
    stamp: u32,
}

/// What must not change between the first and the last step.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    size: u64,
    mtime: Timestamp,
    ctime: Timestamp,
    version: u64,
    generation: u32,
    links_gone: bool,
}

impl Stamp {
    fn of(inode: &Inode) -> Self {
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

/// Details of all items, in arenas.
#[derive(Default)]
struct Details {
    list: Vec<Detail>,
    ranges: Vec<Range>,
    bytes: Vec<u8>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    stamps: Vec<Stamp>,
}

fn slice<T>(arena: &[T], span: Span) -> &[T] {
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
    fn detail(&mut self, table: &Table<'_, R>, node: Node, inode: &Inode) -> Result<u32, DiffError> {
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
        });
        Ok(number)
    }
}

/// Opens what is needed and walks; shared with [`super::changes`].
pub(super) fn compare<'a, R: ReadAt>(
    table: &mut Table<'a, R>,
    target: &'a [LayerSource<R>],
    parent: Option<ParentSpec<'a, R>>,
    needs_parent: bool,
    detailer: &mut dyn Detailer<R>,
) -> Result<Items, DiffError> {
    if target.is_empty() {
        return Err(DiffError::Usage("a diff of no layers".to_owned()));
    }
    let own = matches!(parent, Some(ParentSpec::Own | ParentSpec::Ancestor(1)));
    let opened = if own && !needs_parent { target.get(..1).unwrap_or(target) } else { target };
    let mut all = Vec::with_capacity(opened.len());
    for layer in opened {
        all.push(table.open(layer)?);
    }
    let mut other = Vec::new();
    match parent {
        None => {}
        Some(ParentSpec::Own) => other.extend_from_slice(all.get(1..).unwrap_or(&[])),
        Some(ParentSpec::Ancestor(n)) if own && !needs_parent && n == 1 => {}
        Some(ParentSpec::Ancestor(n)) => match all.get(n..) {
            Some(rest) if n > 0 => other.extend_from_slice(rest),
            _ => return Err(DiffError::Usage(format!("no ancestor {n} in a stack of {}", all.len()))),
        },
        Some(ParentSpec::Layers(layers)) => {
            for layer in layers {
                other.push(match layer {
                    ParentLayer::OfTarget(n) => *all.get(*n).ok_or_else(|| {
                        DiffError::Usage(format!("no layer {n} in a stack of {}", all.len()))
                    })?,
                    ParentLayer::Other(source) => table.open(source)?,
                });
            }
        }
    }
    let parent = table.root(&other)?;
    if own {
        return walk(table, Mode::Own, &table.root(all.get(..1).unwrap_or(&[]))?, &parent, detailer);
    }
    walk(table, Mode::Merged, &table.root(&all)?, &parent, detailer)
}

/// Decides the pairs that only their bytes tell apart.
pub(super) fn settle<R: ReadAt>(table: &Table<'_, R>, items: &mut Items) -> Result<(), DiffError> {
    for item in &mut items.items {
        let Status::Pending(was) = item.status else { continue };
        let mut files = Vec::with_capacity(2);
        for node in [item.node, was] {
            files.push(FileBytes::open(table.fs(node.layer)?, &table.inode(node)?)?);
        }
        let same = match &mut files[..] {
            [a, b] => same_bytes(a, b)?,
            _ => false,
        };
        item.status = if same { Status::Same } else { Status::Modified };
    }
    Ok(())
}

/// Writes the canonical tar (see [`super::canonical`]) of `target`, nearest layer first, relative to `parent`;
/// without a parent all content, without whiteouts.
///
/// # Errors
/// [`DiffError::ChangedWhileReading`] comes after the bytes: the caller must cut the stream on every error.
pub fn export<R: ReadAt>(
    target: &[LayerSource<R>],
    parent: Option<ParentSpec<'_, R>>,
    options: &ExportOptions,
    hooks: &mut dyn LiveHooks,
    out: &mut dyn StreamOut,
) -> Result<ExportSummary, DiffError> {
    let mut table = Table::new(options.ids.as_ref());
    let mut details = Details::default();
    let mut items = compare(&mut table, target, parent, false, &mut details)?;
    hooks.metadata_read()?;
    settle_with(&table, &mut items, &details)?;
    let kept = match parent {
        Some(ParentSpec::Own | ParentSpec::Ancestor(1)) => vec![true; items.items.len()],
        _ => items.kept(),
    };
    let mut export = Export {
        table: &table,
        details: &details,
        out: Out::new(out, options.version),
        version: options.version,
        summary: ExportSummary::default(),
        first: HashMap::new(),
        path: Vec::new(),
    };
    if items.hides_all && options.version != Version::V1 {
        export.summary.entries += 1;
        export.out.header(&canonical::marker(canonical::OPAQUE))?;
    }
    let inexpressible = items.inexpressible();
    for ((item, _), left_out) in
        items.items.iter().zip(&kept).zip(inexpressible).filter(|((_, keep), _)| **keep)
    {
        if left_out {
            export.summary.hidden += 1;
            if export.summary.first_hidden.is_none() {
                let mut path = Vec::new();
                items.path(item, &mut path);
                export.summary.first_hidden = Some(path);
            }
        } else {
            export.item(&items, item)?;
        }
    }
    export.out.zeros(canonical::END_LEN)?;
    let tar_bytes = export.out.finish()?;
    let summary = ExportSummary { tar_bytes, ..export.summary };
    if target.iter().any(|layer| layer.live) {
        hooks.before_recheck()?;
        recheck(target, &items, &details, &kept)?;
    }
    Ok(summary)
}

/// As [`settle`], but with the target's metadata from memory.
fn settle_with<R: ReadAt>(
    table: &Table<'_, R>,
    items: &mut Items,
    details: &Details,
) -> Result<(), DiffError> {
    for item in &mut items.items {
        let Status::Pending(was) = item.status else { continue };
        let Some(detail) = details.list.get(item.detail as usize) else { continue };
        let mut new = details.file(table.fs(item.node.layer)?, item, detail);
        let mut old = FileBytes::open(table.fs(was.layer)?, &table.inode(was)?)?;
        item.status = if same_bytes(&mut new, &mut old)? { Status::Same } else { Status::Modified };
    }
    Ok(())
}

impl Details {
    fn file<'d, R: ReadAt>(&'d self, fs: &'d Fs<R>, item: &Item, detail: &Detail) -> FileBytes<'d, R> {
        match detail.bytes {
            Some(span) => FileBytes::inline(fs, slice(&self.bytes, span)),
            None => FileBytes::new(fs, item.node.ino, item.size, slice(&self.ranges, detail.ranges)),
        }
    }
}

struct Export<'e, 'a, R> {
    table: &'e Table<'a, R>,
    details: &'e Details,
    version: Version,
    out: Out<'e>,
    summary: ExportSummary,
    /// First paths of inodes with several names.
    first: HashMap<Node, Vec<u8>>,
    path: Vec<u8>,
}

impl<R: ReadAt> Export<'_, '_, R> {
    fn item(&mut self, items: &Items, item: &Item) -> Result<(), DiffError> {
        let mut path = std::mem::take(&mut self.path);
        items.path(item, &mut path);
        let done = self.entry(items, item, &mut path);
        self.path = path;
        done
    }

    fn entry(&mut self, items: &Items, item: &Item, path: &mut Vec<u8>) -> Result<(), DiffError> {
        if matches!(item.status, Status::Deleted | Status::Whiteout) {
            let at = path.len() - items.name(item).len();
            path.splice(at..at, canonical::WHITEOUT.iter().copied());
            self.summary.entries += 1;
            self.out.header(&canonical::marker(path))?;
            return Ok(());
        }
        let Some(detail) = self.details.list.get(item.detail as usize) else { return Ok(()) };
        let kind = match item.kind {
            FileKind::File => Kind::File,
            FileKind::Directory => Kind::Directory,
            FileKind::Symlink => Kind::Symlink,
            FileKind::CharDevice => Kind::CharDevice,
            FileKind::BlockDevice => Kind::BlockDevice,
            FileKind::Fifo => Kind::Fifo,
            FileKind::Socket => {
                self.summary.sockets += 1;
                return Ok(());
            }
        };
        if kind == Kind::Directory {
            path.push(b'/');
        }
        let xattrs: Vec<(&[u8], &[u8])> =
            slice(&self.details.xattrs, detail.xattrs).iter().map(|(n, v)| (&n[..], &v[..])).collect();
        let mut header = Header {
            kind,
            path,
            link: b"",
            mode: detail.mode,
            uid: detail.uid,
            gid: detail.gid,
            mtime: (detail.mtime.secs, detail.mtime.nanos),
            device: detail.rdev,
            size: 0,
            xattrs: &xattrs,
            sparse: None,
        };
        self.summary.entries += 1;
        if item.links > 1 && kind != Kind::Directory {
            if let Some(first) = self.first.get(&item.node) {
                let link = Header { kind: Kind::HardLink, link: first, device: (0, 0), ..header };
                return self.out.header(&link).map(|_| ());
            }
            self.first.insert(item.node, path.clone());
        }
        match kind {
            Kind::Symlink => {
                header.link = detail.bytes.map_or(&[], |span| slice(&self.details.bytes, span));
                self.out.header(&header)?;
            }
            Kind::File => {
                let fs = self.table.fs(item.node.layer)?;
                let fixed = self.table.is_fixed(item.node.layer)?;
                let mut file = self.details.file(fs, item, detail).fixed(fixed);
                header.size = item.size;
                self.summary.diff_size += item.size;
                // Most files are one range from their start: no list is made for them.
                let dense = detail.bytes.is_some() || file.is_dense();
                let ranges = if dense { Vec::new() } else { file.joined() };
                let sparse = if dense { None } else { canonical::sparse(self.version, item.size, &ranges) };
                header.sparse = sparse.as_deref();
                let stored = self.out.header(&header)?;
                if let Some(ranges) = &sparse {
                    for (offset, len) in ranges.iter() {
                        self.out.copy(&mut file, *offset, *len)?;
                    }
                } else {
                    self.out.copy(&mut file, 0, item.size)?;
                }
                self.out.zeros(crate::tar::writer::padding(stored))?;
            }
            _ => {
                self.out.header(&header)?;
            }
        }
        if item.opaque {
            path.extend_from_slice(canonical::OPAQUE);
            self.summary.entries += 1;
            self.out.header(&canonical::marker(path))?;
        }
        Ok(())
    }
}

/// Re-reads, with fresh caches, the inodes whose data were read from live layers.
fn recheck<R: ReadAt>(
    target: &[LayerSource<R>],
    items: &Items,
    details: &Details,
    kept: &[bool],
) -> Result<(), DiffError> {
    let mut fresh = Table::new(None);
    for layer in target {
        fresh.open(layer)?;
    }
    let mut now = Vec::new();
    for (item, _) in
        items.items.iter().zip(kept).filter(|(item, keep)| **keep || matches!(item.status, Status::Same))
    {
        let Some(detail) = details.list.get(item.detail as usize) else { continue };
        let Some(stamp) = details.stamps.get(detail.stamp as usize) else { continue };
        now.clear();
        let unchanged = fresh.inode(item.node).is_ok_and(|inode| {
            inode.kind == FileKind::File
                && Stamp::of(&inode) == *stamp
                && fresh.fs(item.node.layer).is_ok_and(|fs| fs.ranges(&inode, &mut now).is_ok())
                && now == slice(&details.ranges, detail.ranges)
        });
        if !unchanged {
            let mut path = Vec::new();
            items.path(item, &mut path);
            return Err(DiffError::ChangedWhileReading { path: String::from_utf8_lossy(&path).into_owned() });
        }
    }
    Ok(())
}

/// The walk alone, for the benefit of callers without details.
pub(super) fn compare_only<'a, R: ReadAt>(
    table: &mut Table<'a, R>,
    target: &'a [LayerSource<R>],
    parent: Option<ParentSpec<'a, R>>,
    needs_parent: bool,
) -> Result<Items, DiffError> {
    compare(table, target, parent, needs_parent, &mut NoDetail)
}
