//! Hard links, those included whose target comes later or lies in a layer below.
//!
//! ```text
//!   link a → b, b known        a and b are names of one node
//!   link a → b, b not known    a is a placeholder (empty file); at the end:
//!       b in this layer        a becomes a name of it
//!       b itself such a link   b is settled first; a circle is an error
//!       b in a layer below     it is copied up as the kernel would: a and b are names of the copy, all links to b too
//!       b nowhere, or hidden   error that names a and b
//! ```
//!
//! A placeholder that is replaced or removed before the end is forgotten. What a link's header says of mode, owner,
//! times and xattrs holds for the file and all its names, as the engines' unpack does it: each header was followed by
//! chown, setxattr, chmod and utimes. Only if the file itself comes later in the stream, its header is the last word.

use super::{
    LowerLayers, LowerNode,
    kernel::{self, Ruling},
    layer::{Context, Found, Layer},
    name,
    target::Target,
};
use crate::DiffError;
use disk_io::WriteAt;
use ext4_image::{
    Timestamp, Xattr,
    writer::{Attributes, ImageWriter, NodeId, NodeKind},
};
use layer_tar::Entry;
use std::collections::HashMap;

/// Bytes copied at once from a layer below.
const COPY_BYTES: usize = 256 << 10;
/// A name that no entry can have: a node is kept alive under it while its other names change.
const HOLD: &[u8] = b".wh..wh.hold";

/// A link that waits.
struct Pending {
    dir: NodeId,
    name: Vec<u8>,
    target: Vec<u8>,
    context: Context,
    /// The header, without its names.
    header: Entry,
}

/// Links that wait, by their placeholder.
#[derive(Default)]
pub(super) struct Links {
    waiting: HashMap<NodeId, Pending>,
    /// Placeholders in the order of the stream, forgotten ones included.
    order: Vec<NodeId>,
}

impl Links {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Forgets the placeholders at and below a node that is about to be removed.
    pub(super) fn forget_below<W: WriteAt>(&mut self, writer: &ImageWriter<W>, node: NodeId) {
        let mut nodes = vec![node];
        while let Some(node) = nodes.pop() {
            self.waiting.remove(&node);
            if matches!(writer.kind(node), NodeKind::Directory) {
                nodes.extend(writer.children(node).into_iter().map(|(_, child)| child));
            }
        }
    }
}

impl<W: WriteAt> Layer<'_, W> {
    /// A hard link entry.
    pub(super) fn hard_link(&mut self, dir: NodeId, last: &[u8], entry: &mut Entry) -> Result<(), DiffError> {
        let target = std::mem::take(&mut entry.link);
        let mut parts = Vec::new();
        self.split_target(&target, &mut parts)?;
        match self.find(&parts) {
            Found::Node(node) if self.is_directory(node) => {
                Err(self.context.refuse(format!("hard link to the folder \"{}\"", target.escape_ascii())))
            }
            Found::Node(node) if !self.links.waiting.contains_key(&node) => {
                if self.writer.lookup(dir, last) != Some(node) {
                    self.place_link(dir, last, node)?;
                }
                self.update_linked(node, entry)
            }
            // A link that waits, named by itself.
            Found::Node(node) if self.writer.lookup(dir, last) == Some(node) => Ok(()),
            // The target may come later, also where something of this layer hides it now.
            Found::Node(_) | Found::Missing | Found::Hidden => self.postpone(dir, last, &target, entry),
        }
    }

    /// Splits a link's target; names inside of AUFS's link folder are left as they are.
    fn split_target<'t>(&self, target: &'t [u8], parts: &mut Vec<&'t [u8]>) -> Result<(), DiffError> {
        let max_depth = self.options.max_depth;
        name::split(target, max_depth, parts).map_err(|e| match e {
            name::NameError::Escapes => self
                .context
                .refuse(format!("hard link to \"{}\" leaves the layer's root", target.escape_ascii())),
            other => self.context.name_error(other, max_depth),
        })
    }

    /// Makes `last` a name of `node`, whatever it was before.
    fn place_link(&mut self, dir: NodeId, last: &[u8], node: NodeId) -> Result<(), DiffError> {
        let root = self.writer.root();
        let known = self.writer.lookup(dir, last);
        if let Some(known) = known {
            // The target may live below what is replaced.
            self.link(root, HOLD, node)?;
            self.remove(dir, last, known)?;
        }
        self.count_name()?;
        self.link(dir, last, node)?;
        if known.is_some() {
            self.writer.unlink(root, HOLD).map_err(|e| self.context.image(e))?;
        }
        Ok(())
    }

    fn link(&mut self, dir: NodeId, name: &[u8], node: NodeId) -> Result<(), DiffError> {
        self.writer.link(dir, name, node).map_err(|e| self.context.image(e))
    }

    fn postpone(
        &mut self,
        dir: NodeId,
        last: &[u8],
        target: &[u8],
        entry: &mut Entry,
    ) -> Result<(), DiffError> {
        if let Some(known) = self.writer.lookup(dir, last) {
            self.remove(dir, last, known)?;
        }
        let time = Timestamp { secs: 0, nanos: 0 };
        let attributes = Attributes { permissions: 0, uid: 0, gid: 0, mtime: time, atime: None, ctime: None };
        let node = self.create(dir, last, NodeKind::File, attributes, Vec::new())?;
        let (name, target, context) = (last.to_vec(), target.to_vec(), self.context.clone());
        let header = Entry { xattrs: std::mem::take(&mut entry.xattrs), ..entry.clone() };
        self.links.waiting.insert(node, Pending { dir, name, target, context, header });
        self.links.order.push(node);
        Ok(())
    }

    /// Settles all links that wait.
    pub(super) fn settle_links(&mut self, lowers: &mut dyn LowerLayers) -> Result<(), DiffError> {
        let mut copies = HashMap::new();
        let order = std::mem::take(&mut self.links.order);
        for first in order {
            // Links to links are settled from the far end of their chain.
            let mut chain = vec![first];
            while let Some(&placeholder) = chain.last() {
                let Some(pending) = self.links.waiting.get(&placeholder) else {
                    chain.pop();
                    continue;
                };
                self.context = pending.context.clone();
                let target = pending.target.clone();
                let mut parts = Vec::new();
                self.split_target(&target, &mut parts)?;
                let found = self.find(&parts);
                if let Found::Node(node) = found
                    && self.links.waiting.contains_key(&node)
                    // A link to its own name means the file of that name below.
                    && node != placeholder
                {
                    if chain.len() > self.links.waiting.len() {
                        return Err(self.context.refuse(format!(
                            "hard link to \"{}\" goes round in a circle",
                            target.escape_ascii()
                        )));
                    }
                    chain.push(node);
                    continue;
                }
                let Some(mut pending) = self.links.waiting.remove(&placeholder) else { break };
                match found {
                    Found::Node(node) if node != placeholder => {
                        if self.is_directory(node) {
                            let target = target.escape_ascii();
                            return Err(self.context.refuse(format!("hard link to the folder \"{target}\"")));
                        }
                        self.place_link(pending.dir, &pending.name, node)?;
                    }
                    Found::Hidden => return Err(self.dangling(&target)),
                    Found::Node(_) | Found::Missing => {
                        let copy = self.link_below(&pending, &parts, &mut copies, lowers)?;
                        self.update_linked(copy, &mut pending.header)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn dangling(&self, target: &[u8]) -> DiffError {
        self.context.refuse(format!(
            "hard link to \"{}\", which is neither in this layer nor in one below",
            target.escape_ascii()
        ))
    }

    /// Makes a link's name one of the target's copy from a layer below.
    fn link_below(
        &mut self,
        pending: &Pending,
        parts: &[&[u8]],
        copies: &mut HashMap<(usize, u32), NodeId>,
        lowers: &mut dyn LowerLayers,
    ) -> Result<NodeId, DiffError> {
        let Some(below) = lowers.lookup(parts)? else { return Err(self.dangling(&pending.target)) };
        let identity = (below.layer, below.inode);
        if let Some(&copy) = copies.get(&identity) {
            self.place_link(pending.dir, &pending.name, copy)?;
            self.copy_up(parts, copy, lowers)?;
            return Ok(copy);
        }
        match &below.kind {
            NodeKind::Directory => {
                let target = pending.target.escape_ascii();
                return Err(self
                    .context
                    .refuse(format!("hard link to the folder \"{target}\" of a layer below")));
            }
            NodeKind::CharDevice { major: 0, minor: 0 } => return Err(self.dangling(&pending.target)),
            _ => {}
        }
        if let Some(known) = self.writer.lookup(pending.dir, &pending.name) {
            self.remove(pending.dir, &pending.name, known)?;
        }
        let (attributes, xattrs) = as_copied(&below);
        let node = self.create(pending.dir, &pending.name, below.kind.clone(), attributes, xattrs)?;
        copies.insert(identity, node);
        if matches!(below.kind, NodeKind::File) {
            self.count_bytes(below.size);
            self.copy_data(node, &below, lowers)?;
        }
        self.copy_up(parts, node, lowers)?;
        Ok(node)
    }

    /// Gives the copy of a target the target's own name too, in folders like those below: a link to a lower file makes
    /// one inode of both names, as it does through a mounted overlay. Where this layer leads elsewhere on the way, the
    /// name below is another file's already.
    fn copy_up(
        &mut self,
        parts: &[&[u8]],
        copy: NodeId,
        lowers: &mut dyn LowerLayers,
    ) -> Result<(), DiffError> {
        let Some((last, parents)) = parts.split_last() else { return Ok(()) };
        let mut dir = self.writer.root();
        for (depth, name) in parents.iter().enumerate() {
            dir = match self.writer.lookup(dir, name) {
                Some(known) if self.is_directory(known) => known,
                Some(_) => return Ok(()),
                None => {
                    let path = parts.get(..=depth).unwrap_or(parts);
                    let below = lowers.lookup(path)?.filter(|b| matches!(b.kind, NodeKind::Directory));
                    let Some(below) = below else { return Ok(()) };
                    let (attributes, xattrs) = as_copied(&below);
                    self.create(dir, name, NodeKind::Directory, attributes, xattrs)?
                }
            };
        }
        match self.writer.lookup(dir, last) {
            None => self.place_link(dir, last, copy),
            Some(_) => Ok(()),
        }
    }

    fn copy_data(
        &mut self,
        node: NodeId,
        below: &LowerNode,
        lowers: &mut dyn LowerLayers,
    ) -> Result<(), DiffError> {
        if below.size == 0 {
            return Ok(());
        }
        self.begin_file(node, below.size)?;
        let mut buffer = vec![0; COPY_BYTES];
        for &(start, len) in &below.data {
            let mut at = start;
            let end = start.saturating_add(len).min(below.size);
            while at < end {
                let want = usize::try_from(end - at).map_or(COPY_BYTES, |n| n.min(COPY_BYTES));
                let n = lowers.read(below, at, &mut buffer[..want])?.min(want);
                if n == 0 {
                    return Err(self.context.refuse("the target's data in a layer below end early"));
                }
                self.write_data(at, &buffer[..n], &mut |_| {})?;
                at += n as u64;
            }
        }
        self.end_file()
    }
}

/// What a copy-up takes over of a node: what the kernel lets be set.
fn as_copied(below: &LowerNode) -> (Attributes, Vec<Xattr>) {
    let attributes = Attributes {
        uid: kernel::owner(below.attributes.uid, 0),
        gid: kernel::owner(below.attributes.gid, 0),
        ..below.attributes
    };
    let kept = |x: &&Xattr| kernel::xattr(&below.kind, &x.name, &x.value) == Ruling::Keep;
    (attributes, below.xattrs.iter().filter(kept).cloned().collect())
}
