//! Two trees walked side by side: what differs, in canonical order.
//!
//! ```text
//!  target ──► sorted names ┐                       ┌ Added, Modified, Deleted
//!                          ├─► same? descend, skip ┤ Same (a directory on the way)
//!  parent ──► sorted names ┘                       └ Pending (the bytes must be compared)
//! ```
//!
//! Two ways to compare. [`CompareMode::Own`]: the target is one layer and its parent the stack below it, so all that stands in
//! the layer is the difference. [`CompareMode::Merged`]: both are merged views; equal stacks are skipped without descending.
//! Memory is one [`Item`] and the name for each reported path; a directory met twice (a loop in a hostile image) is
//! corruption. No file data are read here. Called by [`super::export`] and [`super::changes`].

use super::{
    DiffError,
    view::{LayerInode, Listing, Stack, Table},
};
use disk_io::ReadAt;
use ext4_image::{FileKind, Inode};
use std::{cmp::Ordering, collections::HashSet};

/// The longest path, in bytes: more than any tar reader or system call takes.
const MAX_PATH: usize = 65535;
/// The parent of items in the root directory.
pub(super) const ROOT: u32 = u32::MAX;

/// How a path differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    /// Not in the parent.
    Added,
    /// In the parent, but different.
    Modified,
    /// Only in the parent.
    Deleted,
    /// A whiteout in the layer of something that the parent does not have.
    Whiteout,
    /// A directory without a difference of its own.
    Same,
    /// Alike but for the bytes, which must be compared with those of this inode.
    Pending(LayerInode),
}

/// A reported path.
#[derive(Debug, Clone, Copy)]
pub(super) struct Item {
    /// The item of the directory it is in, or [`ROOT`].
    pub(super) parent: u32,
    name_at: u32,
    name_len: u8,
    pub(super) status: Status,
    /// The directory hides what the parent has in its place.
    pub(super) opaque: bool,
    pub(super) kind: FileKind,
    /// The inode in the target; meaningless for a deletion.
    pub(super) node: LayerInode,
    /// What the detailer gave for it.
    pub(super) detail: u32,
    /// Bytes of a regular file.
    pub(super) size: u64,
    pub(super) links: u16,
}

/// All reported paths, parents before children, names in bytewise order.
#[expect(clippy::struct_field_names, reason = "its items are what it is for")]
#[derive(Debug, Default)]
pub(super) struct Items {
    names: Vec<u8>,
    pub(super) items: Vec<Item>,
    /// The target is one layer that hides all below (own mode).
    pub(super) hides_all: bool,
}

impl Items {
    /// The name of an item.
    pub(super) fn name(&self, item: &Item) -> &[u8] {
        self.names
            .get(item.name_at as usize..item.name_at as usize + usize::from(item.name_len))
            .unwrap_or(&[])
    }

    /// Writes the path of an item to `path`, without a slash at either end.
    pub(super) fn path(&self, item: &Item, path: &mut Vec<u8>) {
        path.clear();
        let mut at = Some(item);
        // Names are pushed reversed from the leaf up, then the whole is reversed.
        while let Some(item) = at {
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(self.name(item).iter().rev());
            at = self.items.get(item.parent as usize);
        }
        path.reverse();
    }

    /// Which items a layer tar cannot express, because a name on their path would be read as a whiteout.
    pub(super) fn inexpressible(&self) -> Vec<bool> {
        let mut out: Vec<bool> = Vec::with_capacity(self.items.len());
        for item in &self.items {
            let above = out.get(item.parent as usize).copied().unwrap_or(false);
            out.push(above || self.name(item).starts_with(super::canonical::WHITEOUT));
        }
        out
    }

    /// Drops directories that neither differ nor hold a difference; gives what is kept. Pending items count as unchanged.
    pub(super) fn kept(&self) -> Vec<bool> {
        let mut keep: Vec<bool> = self
            .items
            .iter()
            .map(|i| matches!(i.status, Status::Added | Status::Modified | Status::Deleted))
            .collect();
        for (i, item) in self.items.iter().enumerate().rev() {
            if keep.get(i) == Some(&true)
                && let Some(parent) = keep.get_mut(item.parent as usize)
            {
                *parent = true;
            }
        }
        keep
    }
}

/// How to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CompareMode {
    /// The target is one layer, the parent what lies below it.
    Own,
    /// Both are merged views.
    Merged,
}

/// Records what the caller needs of an inode while it is in memory.
pub(super) trait Detailer<R> {
    /// Gives a number that is kept in [`Item::detail`].
    fn detail(&mut self, table: &Table<'_, R>, node: LayerInode, inode: &Inode) -> Result<u32, DiffError>;
}

/// For callers that need nothing.
pub(super) struct NoDetail;

impl<R> Detailer<R> for NoDetail {
    fn detail(&mut self, _: &Table<'_, R>, _: LayerInode, _: &Inode) -> Result<u32, DiffError> {
        Ok(0)
    }
}

/// A directory being walked.
struct Frame {
    item: u32,
    path_len: usize,
    /// The target's directory does not show the parent's (own mode): what is missing is deleted.
    opaque: bool,
    target: Listing,
    parent: Listing,
    next_target: usize,
    next_parent: usize,
}

struct Walk<'t, 'a, R> {
    table: &'t Table<'a, R>,
    mode: CompareMode,
    detailer: &'t mut dyn Detailer<R>,
    out: Items,
    seen: HashSet<(bool, LayerInode)>,
}

/// Compares two directories. An empty parent stack: everything is added.
pub(super) fn walk<R: ReadAt>(
    table: &Table<'_, R>,
    mode: CompareMode,
    target: &[LayerInode],
    parent: &[LayerInode],
    detailer: &mut dyn Detailer<R>,
) -> Result<Items, DiffError> {
    let mut walk = Walk { table, mode, detailer, out: Items::default(), seen: HashSet::new() };
    if mode == CompareMode::Merged && target == parent {
        return Ok(walk.out);
    }
    let opaque = mode == CompareMode::Own && target.first().is_some_and(|node| table.hides_all(node.layer));
    walk.out.hides_all = opaque;
    let mut frames = vec![walk.frame(ROOT, 0, opaque, target, parent)?];
    while let Some(frame) = frames.last_mut() {
        if let Some(next) = walk.step(frame)? {
            frames.push(next);
        } else if frame.target.get(frame.next_target).is_none()
            && frame.parent.get(frame.next_parent).is_none()
        {
            frames.pop();
        }
    }
    Ok(walk.out)
}

impl<R: ReadAt> Walk<'_, '_, R> {
    fn frame(
        &mut self,
        item: u32,
        path_len: usize,
        opaque: bool,
        target: &[LayerInode],
        parent: &[LayerInode],
    ) -> Result<Frame, DiffError> {
        for (side, node) in target.iter().map(|n| (true, *n)).chain(parent.iter().map(|n| (false, *n))) {
            if !self.seen.insert((side, node)) {
                return Err(DiffError::Corrupt {
                    what: "layer",
                    offset: 0,
                    reason: format!("the directory of inode {} can be reached twice", node.ino),
                });
            }
        }
        Ok(Frame {
            item,
            path_len,
            opaque,
            target: self.table.list(target, self.mode == CompareMode::Own)?,
            parent: self.table.list(parent, false)?,
            next_target: 0,
            next_parent: 0,
        })
    }

    /// Handles the next name of a directory; gives the directory to descend into.
    fn step(&mut self, frame: &mut Frame) -> Result<Option<Frame>, DiffError> {
        let target = frame.target.get(frame.next_target);
        let parent = frame.parent.get(frame.next_parent);
        let order = match (target, parent) {
            (None, None) => return Ok(None),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((a, _)), Some((b, _))) => a.cmp(b),
        };
        frame.next_target += usize::from(order != Ordering::Greater);
        frame.next_parent += usize::from(order != Ordering::Less);
        let parent = parent.filter(|_| order != Ordering::Less);
        let Some((name, child)) = target.filter(|_| order != Ordering::Greater) else {
            if let Some((name, gone)) = parent
                && (self.mode == CompareMode::Merged || frame.opaque)
            {
                self.deleted(frame.item, name, gone.node)?;
            }
            return Ok(None);
        };
        if child.whiteout {
            // A whiteout of nothing is kept for the tar (it is in the layer), and left out by the list of changes.
            let status = if parent.is_some() { Status::Deleted } else { Status::Whiteout };
            let node = child.node;
            self.push(frame.item, name, status, node, FileKind::CharDevice)?;
            return Ok(None);
        }
        let was = parent.map(|(_, child)| child);
        let inode = self.table.inode(child.node)?;
        let mut below: &[LayerInode] = &[];
        let status = match (was, self.mode) {
            (None, _) => Status::Added,
            (Some(was), mode) => {
                if let (Some(stack), Some(old)) = (&child.stack, &was.stack) {
                    if mode == CompareMode::Merged && stack == old {
                        return Ok(None);
                    }
                    below = old;
                }
                if mode == CompareMode::Own {
                    Status::Modified
                } else if child.node == was.node {
                    if child.stack.is_none() {
                        return Ok(None);
                    }
                    Status::Same
                } else {
                    match self.compare(child.node, &inode, was.node)? {
                        Status::Same if child.stack.is_none() => return Ok(None),
                        status => status,
                    }
                }
            }
        };
        let opaque = self.mode == CompareMode::Own
            && inode.kind == FileKind::Directory
            && self.table.is_opaque(child.node, &inode)?;
        let detail = self.detailer.detail(self.table, child.node, &inode)?;
        let item = self.push(frame.item, name, status, child.node, inode.kind)?;
        if let Some(pushed) = self.out.items.last_mut() {
            pushed.detail = detail;
            pushed.opaque = opaque;
            pushed.links = inode.links;
            let counts = matches!(inode.kind, FileKind::File | FileKind::Symlink);
            pushed.size = if counts { inode.size } else { 0 };
        }
        let Some(stack): Option<&Stack> = child.stack.as_ref() else { return Ok(None) };
        let path_len = frame.path_len + name.len() + 1;
        if path_len > MAX_PATH {
            return Err(super::unsupported("layer", "a path is longer than 65,535 bytes"));
        }
        self.frame(item, path_len, opaque || frame.opaque, stack, below).map(Some)
    }

    fn push(
        &mut self,
        parent: u32,
        name: &[u8],
        status: Status,
        node: LayerInode,
        kind: FileKind,
    ) -> Result<u32, DiffError> {
        let too_many = |_| super::unsupported("layer", "more than 4 billion paths or bytes of names");
        let number = u32::try_from(self.out.items.len()).map_err(too_many)?;
        let name_at = u32::try_from(self.out.names.len()).map_err(too_many)?;
        self.out.names.extend_from_slice(name);
        let name_len = name.len().min(255) as u8;
        self.out.items.push(Item {
            parent,
            name_at,
            name_len,
            status,
            opaque: false,
            kind,
            node,
            detail: u32::MAX,
            size: 0,
            links: 1,
        });
        Ok(number)
    }

    fn deleted(&mut self, parent: u32, name: &[u8], node: LayerInode) -> Result<(), DiffError> {
        self.push(parent, name, Status::Deleted, node, FileKind::CharDevice).map(|_| ())
    }

    /// Compares the metadata of two different inodes that have the same path.
    fn compare(&self, node: LayerInode, inode: &Inode, was: LayerInode) -> Result<Status, DiffError> {
        let old = self.table.inode(was)?;
        let same = inode.mode == old.mode
            && inode.mtime == old.mtime
            && inode.rdev == old.rdev
            && (inode.kind == FileKind::Directory || inode.size == old.size)
            && self.table.owner(node, inode) == self.table.owner(was, &old)
            && self.table.outside(node, inode)?.is_none()
            && self.table.xattrs(node, inode)? == self.table.xattrs(was, &old)?;
        if !same {
            return Ok(Status::Modified);
        }
        Ok(match inode.kind {
            FileKind::File if inode.size > 0 => Status::Pending(was),
            FileKind::Symlink => {
                let target = self.table.fs(node.layer)?.symlink_target(inode)?;
                if target == self.table.fs(was.layer)?.symlink_target(&old)? {
                    Status::Same
                } else {
                    Status::Modified
                }
            }
            _ => Status::Same,
        })
    }
}
