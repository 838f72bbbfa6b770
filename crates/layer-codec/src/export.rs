//! Layers to a tar.
//!
//! ```text
//!  1 metadata   walk ─► items + details in memory, recent files of live layers ─► scratch ─► hooks.metadata_read()
//!  2 compare    bytes of pairs that only bytes can tell apart (merged mode)                  (the host thaws)
//!  3 stream     headers, data straight from their places on the disk, or from scratch
//!  4 recheck    hooks.before_recheck() (the host freezes) ─► re-read the inodes of a live layer from the disk
//! ```
//!
//! After step 1 no metadata of live layers are read, so a mounted sandbox may go on to be written: what changed is found
//! in step 4 and is an error, after which the caller must cut the stream. Where all bytes of live layers were read in step
//! 1, there is no step 4. `live` has the particulars. Memory: about 150 bytes an entry, its name, its xattrs, 24 bytes for
//! each data range. Called by `agent`.

use super::{
    DiffError, ParentLayer, ParentSpec,
    canonical::{self, Version},
    fs::Fs,
    ids::IdMaps,
    limits,
    live::{Copies, Read, Stamp},
    stream::{FileBytes, Out, Range, same_bytes},
    view::{LayerSource, Node, Table},
    walk::{Detailer, Item, Items, Mode, NoDetail, Status, walk},
};
use disk_io::{ReadAt, StreamOut, WriteAt};
use ext4_image::{FileKind, Inode, Timestamp};
use layer_tar::writer::{Header, Kind};
use std::{collections::HashMap, sync::Arc};

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
    /// What is to be copied before [`LiveHooks::metadata_read`]; asked once.
    fn copies(&mut self) -> Option<Copies> {
        None
    }
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
pub(super) struct Span {
    pub(super) at: usize,
    pub(super) len: usize,
}

/// An inode's metadata as the tar needs them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Detail {
    mode: u16,
    uid: u32,
    gid: u32,
    mtime: Timestamp,
    rdev: (u32, u32),
    /// In `Details::xattrs`.
    xattrs: Span,
    /// In `Details::ranges`.
    pub(super) ranges: Span,
    /// In `Details::bytes`: the target of a symbolic link, or inline data.
    bytes: Option<Span>,
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
    bytes: Vec<u8>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) stamps: Vec<Stamp>,
    /// Live files that are compared by their bytes, in `list`.
    pub(super) captured: HashMap<Node, u32>,
    /// Copies of files of live layers.
    pub(super) scratch: Option<Arc<dyn WriteAt>>,
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
        self.note(table, node, inode)
    }
}

impl Details {
    /// Keeps what is needed of an inode; gives its number in `list`.
    pub(super) fn note<R: ReadAt>(
        &mut self,
        table: &Table<'_, R>,
        node: Node,
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

/// Decides the pairs that only their bytes tell apart. Of live layers nothing is read but what `details` captured;
/// `detailed`: they have the target's files too.
pub(super) fn settle<R: ReadAt>(
    table: &Table<'_, R>,
    items: &mut Items,
    details: &Details,
    detailed: bool,
) -> Result<(), DiffError> {
    for item in &mut items.items {
        let Status::Pending(was) = item.status else { continue };
        let open = |node: Node, known: Option<u32>| {
            let fs = table.fs(node.layer)?;
            let known = known.or_else(|| details.captured.get(&node).copied());
            match known.and_then(|n| details.list.get(n as usize)) {
                Some(detail) => Ok(details.file(fs, node.ino, item.size, detail)),
                None => FileBytes::open(fs, &table.inode(node)?),
            }
        };
        let mut new = open(item.node, detailed.then_some(item.detail))?;
        let mut old = open(was, None)?;
        item.status = if same_bytes(&mut new, &mut old)? { Status::Same } else { Status::Modified };
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
    details.capture(&table, &items, true)?;
    let inexpressible = items.inexpressible();
    let copies = hooks.copies();
    let most_bytes = copies.as_ref().map(|copies| copies.most_bytes);
    if let Some(copies) = copies {
        // What must be compared first may turn out to be streamed.
        let perhaps = |at: usize| inexpressible.get(at) == Some(&false);
        let reads = details.reads(&items, perhaps).collect();
        details.copy(&table, reads, copies)?;
    }
    hooks.metadata_read()?;
    let compared: Vec<Read> = details.reads(&items, |_| false).collect();
    settle(&table, &mut items, &details, true)?;
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
    let left_out = |n: usize| inexpressible.get(n) == Some(&true) || kept.get(n) == Some(&false);
    limits::hold(&items, left_out, limits::NAMES)?;
    if items.hides_all && options.version != Version::V1 {
        export.summary.entries += 1;
        export.out.header(&canonical::marker(canonical::OPAQUE))?;
    }
    for ((item, _), left_out) in
        items.items.iter().zip(&kept).zip(&inexpressible).filter(|((_, keep), _)| **keep)
    {
        if *left_out {
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
    let streamed = |at: usize| kept.get(at) == Some(&true) && inexpressible.get(at) == Some(&false);
    let reads: Vec<Read> = compared.into_iter().chain(details.reads(&items, streamed)).collect();
    if !reads.is_empty() {
        hooks.before_recheck()?;
        let changed = details.changed(&table, reads.into_iter())?;
        if !changed.is_empty() {
            return Err(details.changed_error(&items, changed, most_bytes));
        }
    }
    Ok(summary)
}

impl Details {
    fn file<'d, R: ReadAt>(
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
        limits::hold_xattrs(path, slice(&self.details.xattrs, detail.xattrs))?;
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
                self.summary.diff_size += item.size;
                self.out.header(&header)?;
            }
            Kind::File => {
                let fs = self.table.fs(item.node.layer)?;
                let fixed = self.table.is_fixed(item.node.layer)?;
                let mut file = self.details.file(fs, item.node.ino, item.size, detail).fixed(fixed);
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
                self.out.zeros(layer_tar::writer::padding(stored))?;
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

/// The walk alone, for the benefit of callers without details.
pub(super) fn compare_only<'a, R: ReadAt>(
    table: &mut Table<'a, R>,
    target: &'a [LayerSource<R>],
    parent: Option<ParentSpec<'a, R>>,
    needs_parent: bool,
) -> Result<Items, DiffError> {
    compare(table, target, parent, needs_parent, &mut NoDetail)
}
