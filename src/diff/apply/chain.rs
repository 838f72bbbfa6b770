//! The layers below as images: where a hard link of a tar may find its target.
//!
//! ```text
//!   path ─► layer 0 (nearest) ─ not there ─► layer 1 ─ …          a whiteout, an opaque folder or a non-folder on
//!                 └ found ─► LowerNode                            the way ends the search
//! ```
//!
//! Layers are asked for, and their images opened, when a look-up comes to them: most tars have no link into a lower
//! layer. Called by `agent`.

use super::{LowerLayers, LowerNode};
use crate::{
    diff::{DiffError, LayerKind, LayerSource},
    ext4::{
        Ext4, Ext4Error, FileKind, Inode,
        writer::{Attributes, NodeKind},
    },
    io::ReadAt,
};

/// The folder of a sandbox that holds the layer.
const SANDBOX_ROOT: &[u8] = b"upper";
/// Marks a folder that hides what lies below it.
const OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// A chain of layers, nearest first.
pub struct LayerChain<R, F> {
    count: usize,
    next: F,
    opened: Vec<(Ext4<R>, LayerKind)>,
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

    fn layer(&mut self, number: usize) -> Result<Option<&(Ext4<R>, LayerKind)>, DiffError> {
        while self.opened.len() <= number && self.opened.len() < self.count {
            let source = (self.next)()?;
            self.opened.push((Ext4::open(source.disk)?, source.kind));
        }
        Ok(self.opened.get(number))
    }

    fn search(fs: &Ext4<R>, kind: LayerKind, path: &[&[u8]]) -> Result<Found, Ext4Error> {
        let mut inode = fs.inode(fs.root())?;
        if kind == LayerKind::Sandbox {
            match fs.lookup(&inode, SANDBOX_ROOT)? {
                Some(ino) => inode = fs.inode(ino)?,
                None => return Ok(Found::Below),
            }
        }
        let mut opaque = is_opaque(fs, &inode)?;
        for name in path {
            if inode.kind != FileKind::Directory {
                return Ok(Found::Hidden);
            }
            let Some(ino) = fs.lookup(&inode, name)? else {
                return Ok(if opaque { Found::Hidden } else { Found::Below });
            };
            inode = fs.inode(ino)?;
            if inode.is_whiteout() {
                return Ok(Found::Hidden);
            }
            opaque = opaque || is_opaque(fs, &inode)?;
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
            let Some((fs, kind)) = self.layer(number)? else { break };
            let inode = match Self::search(fs, *kind, path)? {
                Found::Node(inode) => inode,
                Found::Hidden => return Ok(None),
                Found::Below => continue,
            };
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
        let Some((fs, _)) = self.layer(node.layer)? else { return Ok(0) };
        Ok(fs.read_file_at(&fs.inode(node.inode)?, offset, buf)?)
    }
}
