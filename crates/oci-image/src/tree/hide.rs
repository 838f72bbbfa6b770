//! Names that are taken away, and the files that have none left. Called by `layer`, for what a layer itself replaces, and by
//! `merge`.

use super::{
    Shadowed,
    node::{Node, NodeId},
    path,
};

/// Takes one name of a node away, and the names of everything below it; files that have no name left are hidden.
pub(super) fn drop_names(
    nodes: &mut [Node],
    id: NodeId,
    path: Vec<u8>,
    by: usize,
    hidden: &mut Vec<Shadowed>,
) {
    let mut todo = vec![(path, id)];
    while let Some((path, id)) = todo.pop() {
        let node = &mut nodes[id.0];
        node.links = node.links.saturating_sub(1);
        if let Some(content) = node.content
            && node.links == 0
        {
            hidden.push(Shadowed { path: path.clone(), size: node.size, layer: content.layer, by });
        }
        let children = std::mem::take(&mut node.children);
        todo.extend(children.into_iter().map(|(name, child)| (path::join(&path, &name), child)));
    }
}
