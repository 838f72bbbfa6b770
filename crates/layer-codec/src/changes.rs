//! What a layer changes, as a list of paths and as a size, from metadata.
//!
//! ```text
//!  own parent:  in the layer and in the parent ─► modified    whiteout, or gone from an opaque directory ─► deleted
//!               in the layer only              ─► added
//!  any other:   merged views compared; bytes are read only for pairs of equal metadata in different inodes
//! ```
//!
//! Paths begin with `/` and are sorted as the canonical tar is; `/` itself is never listed. A directory that became
//! something else lists none of its former names; a directory on the way to a change is modified. A file that
//! changed while it was compared counts as modified. Called by `svm-agent` and the `layer` commands.

use super::{
    DiffError, ExportOptions, IdMaps, LiveHooks, ParentSpec,
    details::Details,
    export::{compare_only, settle},
    live::Read,
    view::{LayerSource, Table},
    walk::{Items, Status},
};
use disk_io::ReadAt;
use ext4_image::FileKind;
use std::collections::HashSet;

/// How a path changed; the numbers are those of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum ChangeKind {
    /// Present in both, but different.
    Modified = 0,
    /// Only in the target.
    Added = 1,
    /// Only in the parent.
    Deleted = 2,
}

/// The root directory of a sandbox as it was formatted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct BlankRoot {
    /// Permission bits.
    pub permissions: u16,
    /// Owner, as a host id.
    pub uid: u32,
    /// Group, as a host id.
    pub gid: u32,
}

/// A changed path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// Absolute path in the layer, raw bytes.
    pub path: Vec<u8>,
    /// The kind of change.
    pub kind: ChangeKind,
}

fn settled<'a, R: ReadAt>(
    table: &mut Table<'a, R>,
    target: &'a [LayerSource<R>],
    parent: Option<ParentSpec<'a, R>>,
    needs_parent: bool,
    hooks: &mut dyn LiveHooks,
) -> Result<Items, DiffError> {
    let mut items = compare_only(table, target, parent, needs_parent)?;
    let mut details = Details::default();
    details.capture(table, &items, false)?;
    hooks.metadata_read()?;
    let reads: Vec<Read> = details.reads(&items, |_| false).collect();
    settle(table, &mut items, &details, false, None)?;
    if !reads.is_empty() {
        hooks.before_recheck()?;
        for changed in details.changed(table, reads.into_iter())? {
            if let Some(item) = items.items.get_mut(changed.item) {
                item.status = Status::Modified;
            }
        }
    }
    Ok(items)
}

/// Lists what `target` (nearest layer first) changes relative to `parent`; without a parent all is added. Live layers
/// must be frozen until [`LiveHooks::metadata_read`].
///
/// # Errors
/// As [`super::export()`], but a change in the meantime is not an error.
pub fn changes<R: ReadAt>(
    target: &[LayerSource<R>],
    parent: Option<ParentSpec<'_, R>>,
    options: &ExportOptions,
    hooks: &mut dyn LiveHooks,
) -> Result<Vec<Change>, DiffError> {
    let mut table = Table::new(&options.id_maps);
    let items = settled(&mut table, target, parent, true, hooks)?;
    let kept = items.kept();
    let mut out = Vec::new();
    let mut path = Vec::new();
    for (item, keep) in items.items.iter().zip(kept) {
        let kind = match item.status {
            Status::Added => ChangeKind::Added,
            Status::Modified => ChangeKind::Modified,
            Status::Deleted => ChangeKind::Deleted,
            Status::Same | Status::Pending(_) if keep => ChangeKind::Modified,
            Status::Same | Status::Pending(_) | Status::Whiteout => continue,
        };
        items.path(item, &mut path);
        out.push(Change { path: [b"/", &path[..]].concat(), kind });
    }
    out.sort();
    Ok(out)
}

/// Whether the nearest layer of `target`, a sandbox, holds anything: a change against its own parent, or a root directory
/// other than a blank one's. Times of the root and overlayfs' own attributes on it do not count: one mount leaves both.
///
/// # Errors
/// As [`changes`].
pub fn written<R: ReadAt>(
    target: &[LayerSource<R>],
    blank: BlankRoot,
    hooks: &mut dyn LiveHooks,
) -> Result<bool, DiffError> {
    /// Permission bits of `i_mode`.
    const PERMISSIONS: u16 = 0o7777;
    let Some(nearest) = target.first() else { return Ok(false) };
    let id_maps = IdMaps::default();
    let mut table = Table::new(&id_maps);
    let layer = table.open(nearest)?;
    for root in table.root(&[layer])? {
        let inode = table.inode(root)?;
        let is = BlankRoot { permissions: inode.mode & PERMISSIONS, uid: inode.uid, gid: inode.gid };
        if is != blank || !table.xattrs(root, &inode)?.is_empty() {
            return Ok(true);
        }
    }
    let changes = changes(target, Some(ParentSpec::Own), &ExportOptions::default(), hooks)?;
    Ok(!changes.is_empty())
}

/// Sum of the bytes of regular files and of the lengths of symlinks' targets in the diff, a hard-linked inode once,
/// whiteouts 0; what export leaves out is 0. That is what moby's overlay2 counts (`pkg/directory`, `Size`).
///
/// # Errors
/// As [`changes`].
pub fn diff_size<R: ReadAt>(
    target: &[LayerSource<R>],
    parent: Option<ParentSpec<'_, R>>,
    options: &ExportOptions,
    hooks: &mut dyn LiveHooks,
) -> Result<u64, DiffError> {
    let mut table = Table::new(&options.id_maps);
    let items = settled(&mut table, target, parent, false, hooks)?;
    let mut seen = HashSet::new();
    let mut sum = 0u64;
    for (item, left_out) in items.items.iter().zip(items.inexpressible()) {
        let counts = matches!(item.status, Status::Added | Status::Modified)
            && matches!(item.kind, FileKind::File | FileKind::Symlink)
            && !left_out;
        if counts && (item.links <= 1 || seen.insert(item.node)) {
            sum = sum.saturating_add(item.size);
        }
    }
    Ok(sum)
}
