//! Directories that no entry describes: a tar has `a/b/c`, but neither `a/` nor `a/b/`.
//!
//! ```text
//!   make_parents ─► implied ─ an entry describes it ─► forgotten
//!                      └ at the end ─► is there, and not below an opaque directory of this layer?
//!                                        Links                 counted
//!                                        LinksAndDirectories   counted, and made like that of the nearest layer below
//!                                        Unknown               refused
//! ```
//!
//! Through an overlay such a directory shows its own attributes, not those below it, so they must be copied. containerd does so
//! when it makes a missing parent (pkg/archive/tar.go, `mkparent`): owner, mode, times, and all extended attributes but
//! `trusted.*`. Its directory times do not last, since what is unpacked into the directory sets them; here they stay. If an
//! entry for the directory follows, containerd keeps copied attributes that the entry does not name; here a directory with an
//! entry is as the entry says, wherever in the tar it comes.
//!
//! Not counted: a directory that a whiteout or an opaque marker of this layer cuts off from the layers below (its attributes
//! are 0755, root, time 0 whatever lies there), and directories that a hard link into a layer below copied with its target.
//! The root directory is not implied either: containerd makes it 0755 with the owner of the parent's root, ignores an entry
//! for it, and copies nothing; here an entry sets it, and without one it is 0755, root, time 0 on any parent.
//! Called by `layer` at the end of the stream.

use super::{LowerLayers, LowerNode, LowerUse, links, tree::LayerTree};
use crate::DiffError;
use disk_io::WriteAt;
use ext4_image::writer::{NodeId, Shape};
use std::collections::{HashMap, HashSet};

/// Attributes of a name space that containerd does not copy.
const TRUSTED: &[u8] = b"trusted.";

/// Directories on the way to implied ones, with their names, by the directory that has them.
type Ways = HashMap<NodeId, Vec<(Vec<u8>, NodeId)>>;

/// A directory on the way.
struct Step {
    /// The next of its children.
    next: usize,
    dir: NodeId,
    /// What lies in it is cut off from the layers below.
    hidden: bool,
}

/// Settles the implied directories; their number.
pub(super) fn settle<W: WriteAt>(
    tree: &mut LayerTree<'_, W>,
    lowers: &mut dyn LowerLayers,
) -> Result<u64, DiffError> {
    if tree.implied.is_empty() {
        return Ok(0);
    }
    let ways = ways(tree);
    let root = tree.root;
    let mut count = 0;
    let mut path: Vec<&[u8]> = Vec::new();
    let mut steps = vec![Step { next: 0, dir: root, hidden: tree.is_opaque(root) }];
    while let Some(step) = steps.last_mut() {
        let Some((name, dir)) = ways.get(&step.dir).and_then(|children| children.get(step.next)) else {
            steps.pop();
            path.pop();
            continue;
        };
        step.next += 1;
        let hidden = step.hidden;
        path.push(name);
        if !hidden && tree.implied.contains(dir) {
            count += 1;
            match tree.options.lowers {
                LowerUse::Links => {}
                LowerUse::LinksAndDirectories => {
                    if let Some(below) = lowers.directory(&path)? {
                        copy(tree, *dir, &below)?;
                    }
                }
                LowerUse::Unknown => return Err(needs_lowers(&path)),
            }
        }
        steps.push(Step { next: 0, dir: *dir, hidden: hidden || tree.is_opaque(*dir) });
    }
    Ok(count)
}

/// The ways from the root to all implied directories that are still there, names in order of creation.
fn ways<W: WriteAt>(tree: &LayerTree<'_, W>) -> Ways {
    let writer = &tree.writer;
    let mut parents: HashMap<NodeId, (NodeId, &[u8])> = HashMap::new();
    for view in writer.nodes().filter(|view| view.shape == Shape::Directory) {
        let children = writer.names(view.node).filter(|(_, child)| writer.is_directory(*child));
        parents.extend(children.map(|(name, child)| (child, (view.node, name))));
    }
    let mut ways = Ways::new();
    let mut known = HashSet::new();
    for implied in &tree.implied {
        let mut dir = *implied;
        while let Some((parent, name)) = parents.get(&dir)
            && known.insert(dir)
        {
            ways.entry(*parent).or_default().push((name.to_vec(), dir));
            dir = *parent;
        }
    }
    for children in ways.values_mut() {
        children.sort_unstable_by_key(|(_, dir)| *dir);
    }
    ways
}

/// Makes a directory like the one below it.
pub(super) fn copy<W: WriteAt>(
    tree: &mut LayerTree<'_, W>,
    dir: NodeId,
    below: &LowerNode,
) -> Result<(), DiffError> {
    let (attributes, mut xattrs) = links::as_copied(below);
    xattrs.retain(|x| !x.name.starts_with(TRUSTED));
    // Its own, an opaque mark, stay.
    xattrs.extend(tree.writer.xattrs(dir));
    tree.writer.set_attributes(dir, attributes);
    tree.writer.set_xattrs(dir, xattrs).map_err(|e| tree.context.image(e))
}

fn needs_lowers(path: &[&[u8]]) -> DiffError {
    let path = super::name::shown(&path.join(&b'/'));
    DiffError::NeedsLowers { what: format!("directory \"{path}\", which no entry of the tar describes") }
}
