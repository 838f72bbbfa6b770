//! Layers to a tar.
//!
//! ```text
//!  1 metadata   walk ─► items + details in memory, recent files of live layers ─► scratch ─► hooks.metadata_read()
//!  2 compare    bytes of pairs that only bytes can tell apart (merged mode)                  (the host thaws)
//!  3 stream     headers, data straight from their places on the disk, or from scratch
//!  4 recheck    hooks.before_recheck() (the host freezes) ─► re-read the inodes of a live layer from the disk
//! ```
//!
//! After step 1 no metadata of live layers are read, so a mounted sandbox may be written again: a change is found
//! in step 4 and is an error, after which the caller must cut the stream. Where all bytes of live layers were read in step
//! 1, there is no step 4. Details are in `live`. Memory: about 150 bytes an entry, its name, its xattrs, 24 bytes for
//! each data range. Called by `svm-agent` and the `layer` commands.

use super::{
    DiffError, OutsideId, ParentLayer, ParentSpec,
    canonical::{self, Version},
    details::{Details, slice},
    ids::IdMaps,
    limits,
    live::{Copies, Read},
    stream::{self, FileBytes, Out, same_bytes},
    view::{LayerInode, LayerSource, Table},
    walk::{CompareMode, Detailer, Item, Items, NoDetail, Status, walk},
};
use disk_io::{ReadAt, StreamOut};
use ext4_image::{FileKind, Timestamp};
use layer_tar::writer::{Header, Kind};
use std::collections::HashMap;

/// Settings of an export.
#[derive(Debug, Clone, Default)]
pub struct ExportOptions {
    /// Maps for the layers with [`LayerSource::host_ids`]; without any, ids stay as they are.
    pub id_maps: IdMaps,
    /// An id of these layers that the maps do not have differs from all others, and is an error or what
    /// [`LiveHooks::outside`] makes of it; else it is 65534.
    pub strict_ids: bool,
    /// Version of the canonical tar.
    pub version: Version,
    /// The latest time of an entry, in seconds since 1970: later ones become this. Whiteouts and opaque markers keep their
    /// time, 0. Only for [`export`]; the tar without it is the layer's canonical one.
    pub source_date_epoch: Option<i64>,
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
    /// Sockets, which are left out: they are useless without the process that created them.
    pub sockets: u64,
    /// Names that begin with `.wh.`, and names below them, which are left out: a layer tar cannot express them.
    pub hidden: u64,
    /// The first of these, if there are any.
    pub first_hidden: Option<Vec<u8>>,
}

/// Calls during an export: between its steps, for a mounted target, and for what its caller decides.
pub trait LiveHooks {
    /// What to copy before [`LiveHooks::metadata_read`]; called once.
    fn copies(&mut self) -> Option<Copies> {
        None
    }
    /// Whether the parent's files are known by their digests alone: it has their sizes, and no data.
    fn has_parent_digests(&self) -> bool {
        false
    }
    /// Then: BLAKE3 of the parent's file at a path (no slash at either end), holes as zeros. A file without one counts as
    /// changed.
    fn parent_digest(&mut self, _path: &[u8]) -> Option<[u8; 32]> {
        None
    }
    /// With [`ExportOptions::strict_ids`]: the entry `path` (no slash at either end) is about to be written with 65534 in the
    /// place of this id.
    fn outside(&mut self, path: &[u8], id: OutsideId) -> Result<(), DiffError> {
        Err(DiffError::outside(path, id))
    }
    /// All metadata are in memory; the file system may change again.
    fn metadata_read(&mut self) -> Result<(), DiffError>;
    /// The stream is complete; the file system must be frozen, so that the disk is up to date, until export returns.
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

/// Opens the layers that are needed and walks them; shared with [`super::changes`].
pub(super) fn compare<'a, R: ReadAt>(
    table: &mut Table<'a, R>,
    target: &'a [LayerSource<R>],
    parent: Option<ParentSpec<'a, R>>,
    needs_parent: bool,
    detailer: &mut dyn Detailer<R>,
) -> Result<Items, DiffError> {
    if target.is_empty() {
        return Err(DiffError::Usage("a diff needs at least one layer".to_owned()));
    }
    let own = matches!(parent, Some(ParentSpec::Own));
    let opened = if own && !needs_parent { target.get(..1).unwrap_or(target) } else { target };
    let mut all = Vec::with_capacity(opened.len());
    for layer in opened {
        all.push(table.open(layer)?);
    }
    let mut other = Vec::new();
    match parent {
        None => {}
        Some(ParentSpec::Own) => other.extend_from_slice(all.get(1..).unwrap_or(&[])),
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
        return walk(table, CompareMode::Own, &table.root(all.get(..1).unwrap_or(&[]))?, &parent, detailer);
    }
    walk(table, CompareMode::Merged, &table.root(&all)?, &parent, detailer)
}

/// Gives the digest of a parent's file by its path.
type ParentDigests<'a> = dyn FnMut(&[u8]) -> Option<[u8; 32]> + 'a;

/// Decides the pairs that only their bytes tell apart. Of live layers nothing is read but what `details` captured;
/// `detailed`: they have the target's files too. With `digests` nothing is read of the parent.
pub(super) fn settle<R: ReadAt>(
    table: &Table<'_, R>,
    items: &mut Items,
    details: &Details,
    detailed: bool,
    mut digests: Option<&mut ParentDigests<'_>>,
) -> Result<(), DiffError> {
    let mut path = Vec::new();
    for at in 0..items.items.len() {
        let Some(item) = items.items.get(at).copied() else { break };
        let Status::Pending(was) = item.status else { continue };
        let open = |node: LayerInode, known: Option<u32>| {
            let fs = table.fs(node.layer)?;
            let known = known.or_else(|| details.captured.get(&node).copied());
            match known.and_then(|n| details.list.get(n as usize)) {
                Some(detail) => Ok(details.file(fs, node.ino, item.size, detail)),
                None => FileBytes::open(fs, &table.inode(node)?),
            }
        };
        let mut new = open(item.node, detailed.then_some(item.detail))?;
        let same = if let Some(digests) = &mut digests {
            items.path(&item, &mut path);
            match (**digests)(&path) {
                Some(expected) => stream::digest(&mut new)? == expected,
                None => false,
            }
        } else {
            same_bytes(&mut new, &mut open(was, None)?)?
        };
        if let Some(item) = items.items.get_mut(at) {
            item.status = if same { Status::Same } else { Status::Modified };
        }
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
    let mut table = Table::new(&options.id_maps);
    table.strict_ids = options.strict_ids;
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
    let by_digest = hooks.has_parent_digests();
    let mut of_parent = |path: &[u8]| hooks.parent_digest(path);
    let digests: Option<&mut ParentDigests<'_>> = if by_digest { Some(&mut of_parent) } else { None };
    settle(&table, &mut items, &details, true, digests)?;
    let kept = match parent {
        Some(ParentSpec::Own) => vec![true; items.items.len()],
        _ => items.kept(),
    };
    let mut export = Export {
        table: &table,
        details: &details,
        out: Out::new(out, options.version),
        version: options.version,
        latest: options.source_date_epoch,
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
            if let Some(id) = details.outside.get(&item.detail) {
                let mut path = Vec::new();
                items.path(item, &mut path);
                hooks.outside(&path, *id)?;
            }
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

struct Export<'e, 'a, R> {
    table: &'e Table<'a, R>,
    details: &'e Details,
    version: Version,
    /// The latest time of an entry; seconds.
    latest: Option<i64>,
    out: Out<'e>,
    summary: ExportSummary,
    /// First paths of inodes with several names.
    first: HashMap<LayerInode, Vec<u8>>,
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
            mtime: bounded(detail.mtime, self.latest),
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

/// A time, or the latest that is allowed: seconds and nanoseconds.
fn bounded(time: Timestamp, latest: Option<i64>) -> (i64, u32) {
    let time = (time.secs, time.nanos);
    latest.map_or(time, |latest| time.min((latest, 0)))
}

/// [`compare`] for callers that need no details.
pub(super) fn compare_only<'a, R: ReadAt>(
    table: &mut Table<'a, R>,
    target: &'a [LayerSource<R>],
    parent: Option<ParentSpec<'a, R>>,
    needs_parent: bool,
) -> Result<Items, DiffError> {
    compare(table, target, parent, needs_parent, &mut NoDetail)
}
