//! A stack of layers seen as overlayfs shows it.
//!
//! ```text
//!  nearest  ┌ sandbox: /upper ┐   name found in layer 0?  whiteout  ─► the name is gone
//!           │ applied: /      │                           file      ─► it hides all below
//!  farthest └ applied: /      ┘                           directory ─► joined with directories below,
//!                                                                      down to an opaque one
//! ```
//!
//! A whiteout is a character device 0/0; a directory is opaque if `trusted.overlay.opaque` is `y` (`user.overlay.*` means
//! nothing: the mounts are made by root). A directory node is the list of its (layer, inode) pairs, nearest first; equal
//! lists mean equal subtrees. Overlayfs merges the root directories of all layers even if they are marked as opaque; where an applied one is
//! marked as opaque the stack ends with it, here ([`Table::root`]) as in the mounts of `driver`. Redirects and
//! metacopies are not followed (`redirect_dir=nofollow,metacopy=off`). Called by [`super::walk`].

use super::{
    DiffError,
    fs::{Foreign, Fs},
    ids::{IdMaps, Ids, OutsideId},
    upper::{self, ContainerId},
};
use disk_io::ReadAt;
use ext4_image::{Ext4, FileKind, Inode, Xattr};

/// What kind of image a layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum LayerKind {
    /// Made by apply: the layer's root is `/` of the image.
    Applied,
    /// Written through a mount: the layer's root is `/upper` of the image.
    Sandbox,
    /// Perhaps written by runhcs, which keeps the root at `/scratch/ID/upper`, several containers in one image. Without an id
    /// it is `/upper` if that holds anything, else the only one that is there, else `/upper`.
    Scratch(Option<ContainerId>),
}

impl LayerKind {
    /// Whether it is written through a mount.
    pub fn is_sandbox(self) -> bool {
        match self {
            Self::Applied => false,
            Self::Sandbox | Self::Scratch(_) => true,
        }
    }
}

/// One layer of a stack.
#[derive(Debug)]
pub struct LayerSource<R> {
    /// The ext4 image (without VHD header or footer).
    pub disk: R,
    /// Where its root is.
    pub kind: LayerKind,
    /// It is mounted read-write somewhere: see [`super::export`].
    pub live: bool,
    /// Its ids are host ids, to be mapped back by [`super::ExportOptions::id_maps`].
    pub host_ids: bool,
    /// What to do with a sandbox whose file system the reader does not support.
    pub foreign: Foreign<R>,
}

impl<R> LayerSource<R> {
    /// A layer at rest with container ids, which is never mounted.
    pub fn new(disk: R, kind: LayerKind) -> Self {
        let foreign = Foreign::Refused("only a service VM that is a virtual machine can mount it");
        Self { disk, kind, live: false, host_ids: false, foreign }
    }
}

/// Prefix of the xattrs that belong to overlayfs.
pub(super) const OVERLAY_PREFIX: &[u8] = b"trusted.overlay.";
const OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// An inode of one layer of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct LayerInode {
    pub(super) layer: u16,
    pub(super) ino: u32,
}

/// A directory: its inodes, nearest first.
pub(super) type Stack = Vec<LayerInode>;

struct OpenLayer<'a, R> {
    source: &'a LayerSource<R>,
    fs: Fs<&'a R>,
    root: u32,
    live: bool,
    host_ids: bool,
    /// It never changes.
    fixed: bool,
    /// Its root is marked as opaque: it hides the layers below.
    last: bool,
}

/// All opened layers of one operation.
pub(super) struct Table<'a, R> {
    layers: Vec<OpenLayer<'a, R>>,
    ids: Ids<'a>,
    /// Ids that the maps do not have are told from 65534.
    pub(super) strict_ids: bool,
}

/// One name of a listed directory.
#[derive(Debug, Clone, Copy)]
struct ListedName {
    at: u32,
    len: u8,
    order: u16,
    kind: Option<FileKind>,
    node: LayerInode,
}

/// A name of a merged directory.
#[derive(Debug)]
pub(super) struct Child {
    at: u32,
    len: u8,
    /// The inode that shows.
    pub(super) node: LayerInode,
    /// All inodes, if it is a directory.
    pub(super) stack: Option<Stack>,
    /// It is a whiteout (only in lists that keep them).
    pub(super) whiteout: bool,
}

/// The names of a directory in bytewise order.
#[derive(Debug, Default)]
pub(super) struct Listing {
    names: Vec<u8>,
    children: Vec<Child>,
}

impl Listing {
    pub(super) fn get(&self, i: usize) -> Option<(&[u8], &Child)> {
        let child = self.children.get(i)?;
        Some((self.names.get(child.at as usize..child.at as usize + usize::from(child.len))?, child))
    }
}

impl<'a, R: ReadAt> Table<'a, R> {
    pub(super) fn new(ids: &'a IdMaps) -> Self {
        Self { layers: Vec::new(), ids: Ids(ids), strict_ids: false }
    }

    /// Opens a layer and gives its number.
    pub(super) fn open(&mut self, source: &'a LayerSource<R>) -> Result<u16, DiffError> {
        let number = u16::try_from(self.layers.len())
            .map_err(|_| DiffError::Usage("a stack of more than 65,536 layers".to_owned()))?;
        let (fs, root) = match source.kind {
            // Written by this project: never mounted here.
            LayerKind::Applied => {
                let fs = Fs::Own(Ext4::open(&source.disk)?);
                let root = fs.root();
                (fs, root)
            }
            LayerKind::Sandbox | LayerKind::Scratch(_) => {
                let fs = Fs::open_sandbox(&source.disk, &source.foreign, source.live)?;
                let top = fs.inode(fs.root())?;
                let (root, id) = match source.kind {
                    LayerKind::Scratch(id) => (upper::scratch(&fs, &top, id)?, id),
                    _ => (upper::own(&fs, &top)?, None),
                };
                let root = root.ok_or_else(|| upper::missing(id))?.ino;
                (fs, root)
            }
        };
        let applied = source.kind == LayerKind::Applied;
        // A mark in a sandbox is ignored: a container cannot set one.
        let last = applied && opaque(&fs, &fs.inode(root)?)?;
        let (live, host_ids, fixed) = (source.live, source.host_ids, applied && !source.live);
        self.layers.push(OpenLayer { source, fs, root, live, host_ids, fixed, last });
        Ok(number)
    }

    fn layer(&self, number: u16) -> Result<&OpenLayer<'a, R>, DiffError> {
        self.layers.get(usize::from(number)).ok_or_else(|| DiffError::Usage(format!("no layer {number}")))
    }

    pub(super) fn fs(&self, number: u16) -> Result<&Fs<&'a R>, DiffError> {
        Ok(&self.layer(number)?.fs)
    }

    /// Opens a sandbox again, without cached data.
    pub(super) fn opened_anew(&self, number: u16) -> Result<Fs<&'a R>, DiffError> {
        let source = self.layer(number)?.source;
        Fs::open_sandbox(&source.disk, &source.foreign, source.live)
    }

    /// Whether a layer never changes.
    pub(super) fn is_fixed(&self, number: u16) -> Result<bool, DiffError> {
        self.layer(number).map(|layer| layer.fixed)
    }

    pub(super) fn is_live(&self, number: u16) -> bool {
        self.layer(number).is_ok_and(|layer| layer.live)
    }

    /// The root directory of a stack of layers, which ends with the first whose root is opaque.
    pub(super) fn root(&self, layers: &[u16]) -> Result<Stack, DiffError> {
        let mut stack = Stack::new();
        for number in layers {
            let layer = self.layer(*number)?;
            stack.push(LayerInode { layer: *number, ino: layer.root });
            if layer.last {
                break;
            }
        }
        Ok(stack)
    }

    /// Whether a layer hides all layers below.
    pub(super) fn hides_all(&self, number: u16) -> bool {
        self.layer(number).is_ok_and(|layer| layer.last)
    }

    pub(super) fn inode(&self, node: LayerInode) -> Result<Inode, DiffError> {
        self.fs(node.layer)?.inode(node.ino)
    }

    /// Owner and group as the container sees them.
    pub(super) fn owner(&self, node: LayerInode, inode: &Inode) -> (u32, u32) {
        if self.layer(node.layer).is_ok_and(|layer| layer.host_ids) {
            (self.ids.uid(inode.uid), self.ids.gid(inode.gid))
        } else {
            (inode.uid, inode.gid)
        }
    }

    /// The first id of an inode that the maps do not have, if that matters.
    pub(super) fn outside(&self, node: LayerInode, inode: &Inode) -> Result<Option<OutsideId>, DiffError> {
        let layer = self.layer(node.layer)?;
        if !self.strict_ids || !layer.host_ids {
            return Ok(None);
        }
        let mut xattrs = layer.fs.xattrs(inode)?;
        xattrs.retain(|x| !x.name.starts_with(OVERLAY_PREFIX));
        Ok(self.ids.outside((inode.uid, inode.gid), xattrs))
    }

    /// The xattrs that belong to the layer's content: sorted, without overlayfs' own, ids mapped.
    pub(super) fn xattrs(&self, node: LayerInode, inode: &Inode) -> Result<Vec<Xattr>, DiffError> {
        let layer = self.layer(node.layer)?;
        let mut found = layer.fs.xattrs(inode)?;
        found.retain(|x| !x.name.starts_with(OVERLAY_PREFIX));
        found.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        if layer.host_ids {
            for xattr in &mut found {
                self.ids.xattr(xattr);
            }
        }
        Ok(found)
    }

    pub(super) fn is_opaque(&self, node: LayerInode, inode: &Inode) -> Result<bool, DiffError> {
        opaque(self.fs(node.layer)?, inode)
    }

    /// Lists a directory. `keep_whiteouts`: of a single layer, with its whiteouts.
    pub(super) fn list(&self, stack: &[LayerInode], keep_whiteouts: bool) -> Result<Listing, DiffError> {
        let mut names = Vec::new();
        let mut found: Vec<ListedName> = Vec::new();
        for (order, node) in stack.iter().enumerate() {
            let fs = self.fs(node.layer)?;
            let inode = fs.inode(node.ino)?;
            fs.visit_dir(&inode, |name, ino, kind| {
                let at = u32::try_from(names.len())
                    .map_err(|_| super::unsupported("directory", "its names take more than 4 GiB"))?;
                names.extend_from_slice(name);
                found.push(ListedName {
                    at,
                    len: name.len().min(255) as u8,
                    order: order.min(usize::from(u16::MAX)) as u16,
                    kind,
                    node: LayerInode { layer: node.layer, ino },
                });
                Ok(())
            })?;
        }
        let name =
            |f: &ListedName| names.get(f.at as usize..f.at as usize + usize::from(f.len)).unwrap_or(&[]);
        found.sort_unstable_by(|a, b| name(a).cmp(name(b)).then(a.order.cmp(&b.order)));
        let mut children = Vec::with_capacity(found.len());
        for group in found.chunk_by(|a, b| name(a) == name(b)) {
            if group.windows(2).any(|pair| matches!(pair, [a, b] if a.order == b.order)) {
                return Err(DiffError::Corrupt {
                    what: "directory of a layer",
                    offset: 0,
                    reason: format!(
                        "it holds the name {:?} twice",
                        name(&group[0]).escape_ascii().to_string()
                    ),
                });
            }
            if let Some(child) = self.merge(group, keep_whiteouts)? {
                children.push(child);
            }
        }
        Ok(Listing { names, children })
    }

    /// What one name of several layers shows.
    fn merge(&self, group: &[ListedName], keep_whiteouts: bool) -> Result<Option<Child>, DiffError> {
        let Some(top) = group.first() else { return Ok(None) };
        let child = |stack, whiteout| Child { at: top.at, len: top.len, node: top.node, stack, whiteout };
        match self.kind(top)? {
            (FileKind::Directory, _) => {}
            (FileKind::CharDevice, true) => return Ok(keep_whiteouts.then(|| child(None, true))),
            _ => return Ok(Some(child(None, false))),
        }
        let mut stack = vec![top.node];
        for pair in group.windows(2) {
            let [upper, lower] = pair else { break };
            if self.is_opaque(upper.node, &self.inode(upper.node)?)? {
                break;
            }
            if self.kind(lower)?.0 != FileKind::Directory {
                break;
            }
            stack.push(lower.node);
        }
        Ok(Some(child(Some(stack), false)))
    }

    /// The kind of a name, and whether it is a whiteout. Reads the inode only if the directory does not record the type.
    fn kind(&self, found: &ListedName) -> Result<(FileKind, bool), DiffError> {
        match found.kind {
            None | Some(FileKind::CharDevice) => {
                let inode = self.inode(found.node)?;
                Ok((inode.kind, inode.is_whiteout()))
            }
            Some(kind) => Ok((kind, false)),
        }
    }
}

fn opaque<D: ReadAt>(fs: &Fs<D>, inode: &Inode) -> Result<bool, DiffError> {
    Ok(fs.xattrs(inode)?.iter().any(|x| x.name == OPAQUE && x.value == b"y"))
}
