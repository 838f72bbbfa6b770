//! The layers below as images: where a hard link of a tar may find its target.
//!
//! ```text
//!   path ─► layer 0 (nearest) ─ not there ─► layer 1 ─ …          a whiteout, an opaque folder or a non-folder on
//!                 └ found ─► LowerNode                            the way ends the search
//! ```
//!
//! Layers are asked for, and their images opened, when a look-up comes to them: most tars have no link into a lower
//! layer. A folder that was looked into is kept by its names, and a file's map of data as long as it is copied: a tar
//! decides how many links go into one folder of a hundred thousand names, and each may cost what it is long, not what
//! the folder is. Called by `agent`.

use super::{LowerLayers, LowerNode};
use crate::{
    diff::{DiffError, LayerKind, LayerSource},
    ext4::{
        DataRange, Ext4, Ext4Error, FileKind, Inode,
        writer::{Attributes, NodeKind},
    },
    io::ReadAt,
};
use std::collections::HashMap;

/// The folder of a sandbox that holds the layer.
const SANDBOX_ROOT: &[u8] = b"upper";
/// Marks a folder that hides what lies below it.
const OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// Most bytes of names that are kept; all are forgotten when a further folder does not fit.
const MAX_KEPT: usize = 512 << 20;
/// What a kept name costs besides its bytes.
const NAME_COST: usize = 64;

/// A chain of layers, nearest first.
pub struct LayerChain<R, F> {
    count: usize,
    next: F,
    opened: Vec<Opened<R>>,
}

/// A layer that was asked for.
struct Opened<R> {
    fs: Ext4<R>,
    kind: LayerKind,
    /// Folders that were looked into: inode, then names.
    folders: HashMap<u32, HashMap<Box<[u8]>, u32>>,
    /// What the names cost.
    kept: usize,
    /// The file that is being copied, and where its data are.
    copied: Option<(u32, Vec<DataRange>)>,
}

impl<R: ReadAt> Opened<R> {
    fn find(&mut self, dir: &Inode, name: &[u8]) -> Result<Option<u32>, Ext4Error> {
        if let Some(folder) = self.folders.get(&dir.ino) {
            return Ok(folder.get(name).copied());
        }
        let mut folder = HashMap::new();
        let mut cost = NAME_COST;
        self.fs.visit_dir(dir, |name, ino, _| {
            cost += name.len() + NAME_COST;
            folder.insert(name.into(), ino);
            Ok::<(), Ext4Error>(())
        })?;
        if self.kept + cost > MAX_KEPT {
            self.folders.clear();
            self.kept = 0;
        }
        self.kept += cost;
        let found = folder.get(name).copied();
        self.folders.insert(dir.ino, folder);
        Ok(found)
    }

    /// Reads data of a regular file.
    fn read(&mut self, ino: u32, offset: u64, buf: &mut [u8]) -> Result<usize, Ext4Error> {
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

/// What one layer says about a path.
enum Found {
    /// It is there.
    Node(Box<Inode>),
    /// It is not, and no lower layer may answer.
    Hidden,
    /// It is not; ask the next layer.
    Below,
}

impl<R: ReadAt, F: FnMut() -> Result<LayerSource<R>, DiffError>> LayerChain<R, F> {
    /// A chain of `count` layers, each of which `next` gives when it is needed.
    pub fn new(count: usize, next: F) -> Self {
        Self { count, next, opened: Vec::new() }
    }

    fn layer(&mut self, number: usize) -> Result<Option<&mut Opened<R>>, DiffError> {
        while self.opened.len() <= number && self.opened.len() < self.count {
            let source = (self.next)()?;
            self.opened.push(Opened {
                fs: Ext4::open(source.disk)?,
                kind: source.kind,
                folders: HashMap::new(),
                kept: 0,
                copied: None,
            });
        }
        Ok(self.opened.get_mut(number))
    }

    fn search(layer: &mut Opened<R>, path: &[&[u8]]) -> Result<Found, Ext4Error> {
        let mut inode = layer.fs.inode(layer.fs.root())?;
        if layer.kind == LayerKind::Sandbox {
            match layer.find(&inode, SANDBOX_ROOT)? {
                Some(ino) => inode = layer.fs.inode(ino)?,
                None => return Ok(Found::Below),
            }
        }
        let mut opaque = is_opaque(&layer.fs, &inode)?;
        for name in path {
            if inode.kind != FileKind::Directory {
                return Ok(Found::Hidden);
            }
            let Some(ino) = layer.find(&inode, name)? else {
                return Ok(if opaque { Found::Hidden } else { Found::Below });
            };
            inode = layer.fs.inode(ino)?;
            if inode.is_whiteout() {
                return Ok(Found::Hidden);
            }
            opaque = opaque || is_opaque(&layer.fs, &inode)?;
        }
        Ok(Found::Node(Box::new(inode)))
    }
}

fn is_opaque<R: ReadAt>(fs: &Ext4<R>, inode: &Inode) -> Result<bool, Ext4Error> {
    if inode.kind != FileKind::Directory {
        return Ok(false);
    }
    Ok(fs.xattrs(inode)?.iter().any(|x| x.name == OPAQUE && x.value == b"y"))
}

fn node_kind<R: ReadAt>(fs: &Ext4<R>, inode: &Inode) -> Result<NodeKind, Ext4Error> {
    let (major, minor) = inode.rdev;
    Ok(match inode.kind {
        FileKind::File => NodeKind::File,
        FileKind::Directory => NodeKind::Directory,
        FileKind::Symlink => NodeKind::Symlink { target: fs.symlink_target(inode)? },
        FileKind::CharDevice => NodeKind::CharDevice { major, minor },
        FileKind::BlockDevice => NodeKind::BlockDevice { major, minor },
        FileKind::Fifo => NodeKind::Fifo,
        FileKind::Socket => NodeKind::Socket,
    })
}

impl<R: ReadAt, F: FnMut() -> Result<LayerSource<R>, DiffError>> LowerLayers for LayerChain<R, F> {
    fn lookup(&mut self, path: &[&[u8]]) -> Result<Option<LowerNode>, DiffError> {
        for number in 0..self.count {
            let Some(layer) = self.layer(number)? else { break };
            let inode = match Self::search(layer, path)? {
                Found::Node(inode) => inode,
                Found::Hidden => return Ok(None),
                Found::Below => continue,
            };
            let fs = &layer.fs;
            let data = if inode.kind == FileKind::File {
                fs.data_map(&inode)?.into_iter().map(|range| (range.offset, range.len)).collect()
            } else {
                Vec::new()
            };
            /// Permission bits of `i_mode`.
            const PERMISSIONS: u16 = 0o7777;
            return Ok(Some(LowerNode {
                layer: number,
                inode: inode.ino,
                kind: node_kind(fs, &inode)?,
                attributes: Attributes {
                    permissions: inode.mode & PERMISSIONS,
                    uid: inode.uid,
                    gid: inode.gid,
                    mtime: inode.mtime,
                    atime: None,
                    ctime: None,
                },
                xattrs: fs.xattrs(&inode)?,
                size: inode.size,
                data,
            }));
        }
        Ok(None)
    }

    fn read(&mut self, node: &LowerNode, offset: u64, buf: &mut [u8]) -> Result<usize, DiffError> {
        let Some(layer) = self.layer(node.layer)? else { return Ok(0) };
        Ok(layer.read(node.inode, offset, buf)?)
    }
}
