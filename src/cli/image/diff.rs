//! `image diff`: what two images differ in, file by file. Called by `cli::image`.
//!
//! ```text
//!   tree of SRC1 ─┐  names of both, in order
//!   tree of SRC2 ─┴► only in 1: D │ only in 2: A │ in both: type, mode, owner, size, content, target, device, xattrs, links
//! ```
//!
//! Contents are compared by SHA-256, never by size and time.

use super::{DiffArgs, ls, open};
use crate::cli::{
    CliError,
    listing::escaped,
    output::{print, print_json},
};
use layer_tar::Xattr;
use oci_image::tree::{Node, NodeId, NodeKind, Tree};
use serde::Serialize;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Write as _,
    process::ExitCode,
};

/// A difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Difference {
    /// `added`, `deleted` or `changed`.
    change: &'static str,
    path: String,
    /// The type in the second image, or of what was deleted.
    #[serde(rename = "type")]
    kind: &'static str,
    /// What changed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    what: Vec<&'static str>,
    /// Size in the first image, for files.
    #[serde(skip_serializing_if = "Option::is_none")]
    from_bytes: Option<u64>,
    /// Size in the second image, for files.
    #[serde(skip_serializing_if = "Option::is_none")]
    to_bytes: Option<u64>,
}

pub(super) fn diff(args: &DiffArgs) -> Result<ExitCode, CliError> {
    let from = open::open(0, &args.from, &args.source)?;
    let to = open::open(1, &args.to, &args.source)?;
    let same = from.image.layers().iter().map(|l| l.diff_id).eq(to.image.layers().iter().map(|l| l.diff_id));
    let differences = if same {
        Vec::new()
    } else {
        compare(&open::tree(&from, &args.source, true)?, &open::tree(&to, &args.source, true)?, args.times)
    };
    if args.json {
        print_json(&differences)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    for row in &differences {
        let letter = match row.change {
            "added" => 'A',
            "deleted" => 'D',
            _ => 'C',
        };
        let _ = write!(text, "{letter} {}", row.path);
        if !row.what.is_empty() {
            let _ = write!(text, "  ({})", row.what.join(", "));
        }
        text.push('\n');
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// All names of a node, for groups of hard links.
fn groups(tree: &Tree) -> HashMap<NodeId, BTreeSet<Vec<u8>>> {
    let mut groups: HashMap<NodeId, BTreeSet<Vec<u8>>> = HashMap::new();
    tree.walk(tree.root(), &mut |path, id| {
        if tree.node(id).links > 1 {
            groups.entry(id).or_default().insert(path.to_vec());
        }
    });
    groups
}

fn compare(from: &Tree, to: &Tree, times: bool) -> Vec<Difference> {
    let (from_groups, to_groups) = (groups(from), groups(to));
    let mut rows = Vec::new();
    let mut todo = vec![(Vec::new(), Some(from.root()), Some(to.root()))];
    while let Some((path, a, b)) = todo.pop() {
        let shown = || if path.is_empty() { "/".to_owned() } else { escaped(&path) };
        let size = |node: &Node| (node.kind == NodeKind::File).then_some(node.size);
        match (a, b) {
            (Some(a), Some(b)) => {
                let mut what = changes(from.node(a), to.node(b), times);
                if from.node(a).kind == to.node(b).kind && from_groups.get(&a) != to_groups.get(&b) {
                    what.push("links");
                }
                if !what.is_empty() {
                    rows.push(Difference {
                        change: "changed",
                        path: shown(),
                        kind: ls::kind(to.node(b).kind),
                        what,
                        from_bytes: size(from.node(a)),
                        to_bytes: size(to.node(b)),
                    });
                }
            }
            (Some(a), None) => rows.push(Difference {
                change: "deleted",
                path: shown(),
                kind: ls::kind(from.node(a).kind),
                what: Vec::new(),
                from_bytes: size(from.node(a)),
                to_bytes: None,
            }),
            (None, Some(b)) => rows.push(Difference {
                change: "added",
                path: shown(),
                kind: ls::kind(to.node(b).kind),
                what: Vec::new(),
                from_bytes: None,
                to_bytes: size(to.node(b)),
            }),
            (None, None) => {}
        }
        let mut names: BTreeMap<&[u8], (Option<NodeId>, Option<NodeId>)> = BTreeMap::new();
        for (name, id) in a.into_iter().flat_map(|a| from.children(a)) {
            names.entry(name).or_default().0 = Some(id);
        }
        for (name, id) in b.into_iter().flat_map(|b| to.children(b)) {
            names.entry(name).or_default().1 = Some(id);
        }
        for (name, (a, b)) in names.into_iter().rev() {
            let below = if path.is_empty() { name.to_vec() } else { [&path, &b"/"[..], name].concat() };
            todo.push((below, a, b));
        }
    }
    rows
}

/// What two nodes of the same name differ in.
fn changes(a: &Node, b: &Node, times: bool) -> Vec<&'static str> {
    if a.kind != b.kind {
        return vec!["type"];
    }
    let sorted = |xattrs: &[Xattr]| {
        let mut list: Vec<(Vec<u8>, Vec<u8>)> =
            xattrs.iter().map(|x| (x.name.clone(), x.value.clone())).collect();
        list.sort();
        list
    };
    let checks = [
        (a.mode != b.mode, "mode"),
        ((a.uid, a.gid) != (b.uid, b.gid), "owner"),
        (a.size != b.size, "size"),
        (a.size == b.size && a.digest != b.digest, "content"),
        (a.target != b.target, "target"),
        (a.device != b.device, "device"),
        (sorted(&a.xattrs) != sorted(&b.xattrs), "xattrs"),
        (times && a.mtime != b.mtime, "time"),
    ];
    checks.into_iter().filter(|(differs, _)| *differs).map(|(_, what)| what).collect()
}
