//! Hard links, including those whose target comes later or is in a lower layer.
//!
//! ```text
//!   link a → b, b known        a and b are names of one node
//!   link a → b, b not known    a is a placeholder (empty file); at the end:
//!       b in this layer        a becomes a name of it
//!       b itself such a link   b is settled first; a cycle is an error
//!       b in a layer below     it is copied up as the kernel would: a and b are names of the copy, all links to b too
//!       b nowhere, or hidden   error that names a and b
//!       layers not known       refused: [`LowerUse::Unknown`]
//! ```
//!
//! A placeholder that is replaced or removed before the end is forgotten. Mode, owner, times and xattrs of a
//! link's header hold for the file and all its names, as when engines unpack: they call chown, setxattr, chmod and utimes
//! after each header. If the file itself comes later in the stream, its own header is the last one. Called by `layer`.

use super::{
    LowerLayers, LowerNode, LowerUse,
    context::Context,
    kernel::{self, Ruling},
    name,
    pending::PendingLink,
    tree::{LayerTree, Lookup, implied},
};
use crate::DiffError;
use disk_io::WriteAt;
use ext4_image::{
    Timestamp, Xattr,
    writer::{Attributes, NodeId, NodeKind},
};
use layer_tar::Entry;
use std::collections::{HashMap, HashSet};

/// Bytes copied at once from a lower layer.
const COPY_BYTES: usize = 256 << 10;
/// A name that no entry can have: a node is kept alive under it while its other names change.
const HOLD: &[u8] = b".wh..wh.hold";

/// A hard link entry.
pub(super) fn hard_link<W: WriteAt>(
    tree: &mut LayerTree<'_, W>,
    dir: NodeId,
    last: &[u8],
    entry: &mut Entry,
) -> Result<(), DiffError> {
    let target = std::mem::take(&mut entry.link);
    let mut parts = Vec::new();
    split_target(tree, &target, &mut parts)?;
    match tree.find(&parts) {
        Lookup::Node(node) if tree.is_directory(node) => {
            Err(tree.context.refuse(format!("hard link to the directory \"{}\"", target.escape_ascii())))
        }
        Lookup::Node(node) if !tree.links.is_pending(node) => {
            if tree.writer.lookup(dir, last) != Some(node) {
                place_link(tree, dir, last, node)?;
            }
            tree.update_linked(node, entry)
        }
        // A pending link that names itself.
        Lookup::Node(node) if tree.writer.lookup(dir, last) == Some(node) => Ok(()),
        // The target may come later, even if this layer hides it now.
        Lookup::Node(_) | Lookup::Missing | Lookup::Hidden => postpone(tree, dir, last, &target, entry),
    }
}

/// Splits a link's target; names in AUFS's link directory are kept.
fn split_target<'t, W: WriteAt>(
    tree: &LayerTree<'_, W>,
    target: &'t [u8],
    parts: &mut Vec<&'t [u8]>,
) -> Result<(), DiffError> {
    let max_depth = tree.options.limits.depth;
    name::split(target, max_depth, parts).map_err(|e| match e {
        name::NameError::Escapes => {
            tree.context.refuse(format!("hard link to \"{}\" leaves the layer's root", target.escape_ascii()))
        }
        other => tree.context.name_error(other, max_depth),
    })
}

/// Makes `last` a name of `node`, replacing what was there.
fn place_link<W: WriteAt>(
    tree: &mut LayerTree<'_, W>,
    dir: NodeId,
    last: &[u8],
    node: NodeId,
) -> Result<(), DiffError> {
    let root = tree.root;
    let known = tree.writer.lookup(dir, last);
    if let Some(known) = known {
        // The target may be below the replaced name.
        link(tree, root, HOLD, node)?;
        tree.remove(dir, last, known)?;
    }
    tree.count_name()?;
    link(tree, dir, last, node)?;
    if known.is_some() {
        tree.writer.unlink(root, HOLD).map_err(|e| tree.context.image(e))?;
    }
    Ok(())
}

fn link<W: WriteAt>(
    tree: &mut LayerTree<'_, W>,
    dir: NodeId,
    name: &[u8],
    node: NodeId,
) -> Result<(), DiffError> {
    tree.writer.link(dir, name, node).map_err(|e| tree.context.image(e))
}

fn postpone<W: WriteAt>(
    tree: &mut LayerTree<'_, W>,
    dir: NodeId,
    last: &[u8],
    target: &[u8],
    entry: &mut Entry,
) -> Result<(), DiffError> {
    if let Some(known) = tree.writer.lookup(dir, last) {
        tree.remove(dir, last, known)?;
    }
    let time = Timestamp { secs: 0, nanos: 0 };
    let attributes = Attributes { permissions: 0, uid: 0, gid: 0, mtime: time, atime: None, ctime: None };
    let node = tree.create(dir, last, NodeKind::File, attributes, Vec::new())?;
    let (name, target, context) = (last.to_vec(), target.to_vec(), tree.context.clone());
    let header = Entry { xattrs: std::mem::take(&mut entry.xattrs), ..entry.clone() };
    tree.links.insert(node, PendingLink { dir, name, target, context, header });
    Ok(())
}

/// Where the targets are that a layer does not have itself.
pub(super) enum Below<'a> {
    /// In these layers.
    Layers(&'a mut dyn LowerLayers),
    /// In layers that are read after this one: what waits for them.
    Later(&'a mut Vec<LaterLink>),
}

/// A target in a layer that is read later.
#[derive(Debug)]
pub(super) struct LaterLink {
    /// An empty file that has the names of the links and, where the layer has nothing else there, of the target.
    pub(super) node: NodeId,
    /// Components of the target's path.
    pub(super) target: Vec<Vec<u8>>,
    /// The links' headers, to be applied in this order, each with what errors name.
    pub(super) headers: Vec<(Context, Entry)>,
}

/// Settles all pending links; the number of those into layers below.
pub(super) fn settle<W: WriteAt>(
    tree: &mut LayerTree<'_, W>,
    below: &mut Below<'_>,
) -> Result<u64, DiffError> {
    let mut lower_links = 0;
    let mut later_by_path = HashMap::new();
    let mut copies = HashMap::new();
    // A copied target has its own name in this layer, where further links to it find it.
    let mut copied = HashSet::new();
    let order = tree.links.take_order();
    for first in order {
        // Links to links are settled from the end of their chain.
        let mut chain = vec![first];
        while let Some(&placeholder) = chain.last() {
            let Some(pending) = tree.links.get(placeholder) else {
                chain.pop();
                continue;
            };
            tree.context = pending.context.clone();
            let target = pending.target.clone();
            let mut parts = Vec::new();
            split_target(tree, &target, &mut parts)?;
            let found = tree.find(&parts);
            if let Lookup::Node(node) = found
                && tree.links.is_pending(node)
                // A link to its own name means the file of that name in a lower layer.
                && node != placeholder
            {
                if chain.len() > tree.links.len() {
                    return Err(tree
                        .context
                        .refuse(format!("hard link to \"{}\" leads back to itself", target.escape_ascii())));
                }
                chain.push(node);
                continue;
            }
            let Some(mut pending) = tree.links.remove(placeholder) else { break };
            match found {
                Lookup::Node(node) if node != placeholder => {
                    if tree.is_directory(node) {
                        let target = target.escape_ascii();
                        return Err(tree.context.refuse(format!("hard link to the directory \"{target}\"")));
                    }
                    place_link(tree, pending.dir, &pending.name, node)?;
                    lower_links += u64::from(copied.contains(&node));
                }
                Lookup::Hidden => return Err(dangling(tree, &target)),
                Lookup::Node(_) | Lookup::Missing => {
                    if tree.options.lowers == LowerUse::Unknown {
                        return Err(needs_lowers(&tree.context, &target));
                    }
                    let lowers = match below {
                        Below::Layers(lowers) => &mut **lowers,
                        Below::Later(later) => {
                            put_off(tree, placeholder, pending, &parts, later, &mut later_by_path)?;
                            continue;
                        }
                    };
                    let copy = link_below(tree, &pending, &parts, &mut copies, lowers)?;
                    tree.update_linked(copy, &mut pending.header)?;
                    copied.insert(copy);
                    lower_links += 1;
                }
            }
        }
    }
    Ok(lower_links)
}

/// Lets a link wait for a layer that is read later. Its target gets a name here already, as in [`copy_up`]; directories
/// on the way are like those that no entry describes.
fn put_off<W: WriteAt>(
    tree: &mut LayerTree<'_, W>,
    placeholder: NodeId,
    pending: PendingLink,
    parts: &[&[u8]],
    later: &mut Vec<LaterLink>,
    by_path: &mut HashMap<Vec<u8>, usize>,
) -> Result<(), DiffError> {
    let header = (pending.context, pending.header);
    let path = parts.join(&b'/');
    let node = if let Some(known) = by_path.get(&path).and_then(|at| later.get_mut(*at)) {
        known.headers.push(header);
        known.node
    } else {
        by_path.insert(path, later.len());
        let target = parts.iter().map(|part| part.to_vec()).collect();
        later.push(LaterLink { node: placeholder, target, headers: vec![header] });
        placeholder
    };
    if node != placeholder {
        place_link(tree, pending.dir, &pending.name, node)?;
    }
    let Some((last, parents)) = parts.split_last() else { return Ok(()) };
    let mut dir = tree.root;
    for name in parents {
        dir = match tree.writer.lookup(dir, name) {
            Some(known) if tree.is_directory(known) => known,
            Some(_) => return Ok(()),
            None => {
                let made = tree.create(dir, name, NodeKind::Directory, implied(), Vec::new())?;
                tree.implied.insert(made);
                made
            }
        };
    }
    match tree.writer.lookup(dir, last) {
        None => place_link(tree, dir, last, node),
        Some(_) => Ok(()),
    }
}

/// The error for a link whose target is looked for in layers that are not known.
fn needs_lowers(context: &Context, target: &[u8]) -> DiffError {
    let (link, target) = (name::shown(&context.path), name::shown(target));
    DiffError::NeedsLowers {
        what: format!("hard link \"{link}\" to \"{target}\", which the tar does not hold"),
    }
}

fn dangling<W: WriteAt>(tree: &LayerTree<'_, W>, target: &[u8]) -> DiffError {
    tree.context.refuse(format!(
        "hard link to \"{}\", which is neither in this layer nor in a lower one",
        target.escape_ascii()
    ))
}

/// Makes a link's name a name of the target's copy from a lower layer.
fn link_below<W: WriteAt>(
    tree: &mut LayerTree<'_, W>,
    pending: &PendingLink,
    parts: &[&[u8]],
    copies: &mut HashMap<(usize, u32), NodeId>,
    lowers: &mut dyn LowerLayers,
) -> Result<NodeId, DiffError> {
    let Some(below) = lowers.lookup(parts)? else { return Err(dangling(tree, &pending.target)) };
    let identity = (below.layer, below.inode);
    if let Some(&copy) = copies.get(&identity) {
        place_link(tree, pending.dir, &pending.name, copy)?;
        copy_up(tree, parts, copy, lowers)?;
        return Ok(copy);
    }
    match &below.kind {
        NodeKind::Directory => {
            let target = pending.target.escape_ascii();
            return Err(tree
                .context
                .refuse(format!("hard link to the directory \"{target}\" of a lower layer")));
        }
        NodeKind::CharDevice { major: 0, minor: 0 } => return Err(dangling(tree, &pending.target)),
        _ => {}
    }
    if let Some(known) = tree.writer.lookup(pending.dir, &pending.name) {
        tree.remove(pending.dir, &pending.name, known)?;
    }
    let (attributes, xattrs) = as_copied(&below);
    let node = tree.create(pending.dir, &pending.name, below.kind.clone(), attributes, xattrs)?;
    copies.insert(identity, node);
    if matches!(below.kind, NodeKind::File) {
        tree.count_bytes(below.size);
        copy_data(tree, node, &below, lowers)?;
    }
    copy_up(tree, parts, node, lowers)?;
    Ok(node)
}

/// Gives the copy of a target the target's own name too, in directories like those below: a link to a lower file makes
/// one inode of both names, as it does through a mounted overlay. If this layer has something else on the
/// way, the name already belongs to another file.
fn copy_up<W: WriteAt>(
    tree: &mut LayerTree<'_, W>,
    parts: &[&[u8]],
    copy: NodeId,
    lowers: &mut dyn LowerLayers,
) -> Result<(), DiffError> {
    let Some((last, parents)) = parts.split_last() else { return Ok(()) };
    let mut dir = tree.root;
    for (depth, name) in parents.iter().enumerate() {
        dir = match tree.writer.lookup(dir, name) {
            Some(known) if tree.is_directory(known) => known,
            Some(_) => return Ok(()),
            None => {
                let path = parts.get(..=depth).unwrap_or(parts);
                let below = lowers.lookup(path)?.filter(|b| matches!(b.kind, NodeKind::Directory));
                let Some(below) = below else { return Ok(()) };
                let (attributes, xattrs) = as_copied(&below);
                tree.create(dir, name, NodeKind::Directory, attributes, xattrs)?
            }
        };
    }
    match tree.writer.lookup(dir, last) {
        None => place_link(tree, dir, last, copy),
        Some(_) => Ok(()),
    }
}

fn copy_data<W: WriteAt>(
    tree: &mut LayerTree<'_, W>,
    node: NodeId,
    below: &LowerNode,
    lowers: &mut dyn LowerLayers,
) -> Result<(), DiffError> {
    if below.size == 0 {
        return Ok(());
    }
    tree.begin_file(node, below.size)?;
    let mut buffer = vec![0; COPY_BYTES];
    for &(start, len) in &below.data {
        let mut at = start;
        let end = start.saturating_add(len).min(below.size);
        while at < end {
            let want = usize::try_from(end - at).map_or(COPY_BYTES, |n| n.min(COPY_BYTES));
            let n = lowers.read(below, at, &mut buffer[..want])?.min(want);
            if n == 0 {
                return Err(tree.context.refuse("the target's data in a lower layer end early"));
            }
            tree.write_data(at, &buffer[..n], &mut |_| {})?;
            at += n as u64;
        }
    }
    tree.end_file()
}

/// What a copy-up keeps of a node: everything that the kernel accepts.
pub(super) fn as_copied(below: &LowerNode) -> (Attributes, Vec<Xattr>) {
    let attributes = Attributes {
        uid: kernel::owner(below.attributes.uid, 0),
        gid: kernel::owner(below.attributes.gid, 0),
        ..below.attributes
    };
    let kept = |x: &&Xattr| kernel::xattr(&below.kind, &x.name, &x.value) == Ruling::Keep;
    (attributes, below.xattrs.iter().filter(kept).cloned().collect())
}
