//! Where the directories on a path are in each layer below: for the attributes of directories that no entry describes.
//!
//! ```text
//!   path  a / b / c          layer 0      layer 1      layer 2
//!         ├─ root            Dir          Dir          –
//!         ├─ a               Missing      Dir          –          asked from left to right, only as far as needed
//!         └─ b               Missing      Hidden       –          ◄─ the search ends: a whiteout, a file, or nothing in an
//!                                                                    opaque directory
//! ```
//!
//! Each line is made from the line above it, one name at a time, and lines are kept for the next path: with parents before
//! children, depth first, a path costs one look-up in each layer, however deep it is. A symlink is followed inside of its own
//! layer, from that layer's root; one that leads nowhere counts as missing. Memory: a few bytes for each component of one path
//! and layer.
//!
//! This is what containerd does (pkg/archive/tar.go, `mkparent`), but for two cases: it does not see that an opaque directory
//! hides those in layers below, and fails where a parent is no directory. Called by `chain`.

use super::{context::OVERLAY_OPAQUE, opened::Opened};
use disk_io::ReadAt;
use ext4_image::{Ext4Error, FileKind, Inode};

/// The most symlinks that are followed for one name, as Linux has it (MAXSYMLINKS).
const MAX_HOPS: usize = 40;

/// What a layer has at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// This directory; `opaque`: what it does not have is hidden in layers below.
    Dir {
        /// Its inode.
        ino: u32,
        /// It, or one on the way to it, is opaque.
        opaque: bool,
    },
    /// Nothing: the next layer is searched.
    Missing,
    /// Something that hides the layers below.
    Hidden,
}

/// A component of the path.
struct Step {
    name: Box<[u8]>,
    /// Of the nearest layers.
    places: Vec<Place>,
}

/// The last path, with what is known of it.
#[derive(Default)]
pub(super) struct Descent {
    /// Of the root directory.
    roots: Vec<Place>,
    steps: Vec<Step>,
}

impl Descent {
    /// Continues with another path; what it shares with the last one stays known.
    pub(super) fn go(&mut self, path: &[&[u8]]) {
        let shared = self.steps.iter().zip(path).take_while(|(step, name)| *step.name == ***name).count();
        self.steps.truncate(shared);
        let new = path.iter().skip(shared);
        self.steps.extend(new.map(|name| Step { name: (*name).into(), places: Vec::new() }));
    }

    /// What `layer`, the layer of this number, has at the path. Layers are asked in their order.
    pub(super) fn place<R: ReadAt>(
        &mut self,
        number: usize,
        layer: &mut Opened<R>,
    ) -> Result<Place, Ext4Error> {
        let mut above = if let Some(known) = self.roots.get(number) {
            *known
        } else {
            let root = root(layer)?;
            self.roots.push(root);
            root
        };
        for depth in 0..self.steps.len() {
            let known = self.steps.get(depth).and_then(|step| step.places.get(number));
            above = if let Some(known) = known {
                *known
            } else {
                let place = self.child(above, depth, layer)?;
                if let Some(step) = self.steps.get_mut(depth) {
                    step.places.push(place);
                }
                place
            };
        }
        Ok(above)
    }

    /// What a layer has at the component `depth`, below what it has above.
    fn child<R: ReadAt>(
        &self,
        above: Place,
        depth: usize,
        layer: &mut Opened<R>,
    ) -> Result<Place, Ext4Error> {
        let (Place::Dir { ino, opaque }, Some(step)) = (above, self.steps.get(depth)) else {
            return Ok(above);
        };
        let dir = layer.fs.inode(ino)?;
        let Some(ino) = layer.find(&dir, &step.name)? else {
            return Ok(if opaque { Place::Hidden } else { Place::Missing });
        };
        let inode = layer.fs.inode(ino)?;
        Ok(match inode.kind {
            FileKind::Directory => Place::Dir { ino, opaque: opaque || is_opaque(layer, &inode)? },
            FileKind::Symlink => {
                let path: Vec<&[u8]> = self.steps.iter().take(depth + 1).map(|step| &*step.name).collect();
                follow(layer, &path)?
            }
            _ => Place::Hidden,
        })
    }
}

/// The root directory of a layer.
fn root<R: ReadAt>(layer: &Opened<R>) -> Result<Place, Ext4Error> {
    let Some(inode) = layer.root()? else { return Ok(Place::Missing) };
    if inode.kind != FileKind::Directory {
        return Ok(Place::Hidden);
    }
    Ok(Place::Dir { ino: inode.ino, opaque: is_opaque(layer, &inode)? })
}

/// The directory at a path with symlinks, in this layer alone.
fn follow<R: ReadAt>(layer: &mut Opened<R>, path: &[&[u8]]) -> Result<Place, Ext4Error> {
    let Some(root) = layer.root()? else { return Ok(Place::Missing) };
    let mut stack = vec![root];
    let mut rest: Vec<Vec<u8>> = path.iter().rev().map(|name| name.to_vec()).collect();
    let mut hops = 0;
    while let Some(name) = rest.pop() {
        if name == b".." {
            // At the root it stays there, as in a chroot.
            if stack.len() > 1 {
                stack.pop();
            }
            continue;
        }
        let Some(dir) = stack.last() else { return Ok(Place::Missing) };
        if dir.kind != FileKind::Directory {
            return Ok(Place::Hidden);
        }
        let Some(ino) = layer.find(dir, &name)? else { return Ok(Place::Missing) };
        let inode = layer.fs.inode(ino)?;
        if inode.kind != FileKind::Symlink {
            stack.push(inode);
            continue;
        }
        hops += 1;
        if hops > MAX_HOPS {
            return Ok(Place::Hidden);
        }
        let target = layer.fs.symlink_target(&inode)?;
        if target.first() == Some(&b'/') {
            stack.truncate(1);
        }
        let parts = target.split(|&b| b == b'/').filter(|part| !matches!(*part, b"" | b"."));
        rest.extend(parts.rev().map(<[u8]>::to_vec));
    }
    Ok(match stack.last() {
        Some(inode) if inode.kind == FileKind::Directory => Place::Dir { ino: inode.ino, opaque: false },
        _ => Place::Hidden,
    })
}

fn is_opaque<R: ReadAt>(layer: &Opened<R>, inode: &Inode) -> Result<bool, Ext4Error> {
    Ok(layer.fs.xattrs(inode)?.iter().any(|x| x.name == OVERLAY_OPAQUE && x.value == b"y"))
}
