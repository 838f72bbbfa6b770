//! Paths: split into components, and looked up with symbolic links.

use super::node::{Node, NodeId, NodeKind, ROOT, Role};

/// Directories in each other. The kernel's longest path has fewer.
pub(super) const MAX_DEPTH: usize = 4096;
/// Symbolic links on the way to a node, as in the kernel (`MAXSYMLINKS`).
pub(super) const MAX_LINKS: usize = 40;

/// Splits a name into components: empty ones and `.` are dropped, `..` is resolved; `None` if it leaves the root, is too
/// deep, or has a NUL in it.
pub(super) fn split(path: &[u8]) -> Option<Vec<&[u8]>> {
    let mut parts = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()?),
            _ if parts.len() >= MAX_DEPTH || part.contains(&0) => return None,
            _ => parts.push(part),
        }
    }
    Some(parts)
}

/// A name in a directory.
pub(super) fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

/// The node at a path; `..` at the root stays there.
pub(super) fn find(nodes: &[Node], path: &[u8], follow: bool) -> Option<NodeId> {
    let mut todo: Vec<Vec<u8>> = reversed(path);
    let mut way = vec![ROOT];
    let mut links = 0;
    while let Some(part) = todo.pop() {
        if part == b".." {
            if way.len() > 1 {
                way.pop();
            }
            continue;
        }
        let at = *way.last()?;
        let id = *nodes[at.0].children.get(&*part)?;
        let node = &nodes[id.0];
        match (node.kind, &node.role) {
            (NodeKind::Symlink, Role::Node) if follow || !todo.is_empty() => {
                links += 1;
                if links > MAX_LINKS {
                    return None;
                }
                if node.target.first() == Some(&b'/') {
                    way.truncate(1);
                }
                todo.extend(reversed(&node.target));
                if todo.len() > MAX_DEPTH {
                    return None;
                }
            }
            _ => way.push(id),
        }
    }
    way.last().copied()
}

/// The components of a path that mean something, the last first.
pub(super) fn reversed(path: &[u8]) -> Vec<Vec<u8>> {
    let parts = path.split(|b| *b == b'/').filter(|part| !matches!(*part, b"" | b"."));
    parts.rev().map(<[u8]>::to_vec).collect()
}
