//! `image ls`: the merged tree of an image, and with `--du` what takes its space. Called by `cli::image`.

use super::{LsArgs, open};
use crate::cli::{
    CliError,
    listing::{date, escaped, permissions},
    output::{print, print_json, table},
};
use bytesize::ByteSize;
use oci_image::{
    Digest,
    tree::{Node, NodeId, NodeKind, Shadowed, Tree},
};
use serde::Serialize;
use std::{
    collections::{BTreeMap, HashSet},
    fmt::Write as _,
    process::ExitCode,
};

/// Rows of the table of what is hidden; JSON has all.
const HIDDEN_ROWS: usize = 20;

/// An entry as `ls` lists it.
#[derive(Debug, Serialize)]
pub(super) struct Listed {
    /// Relative to the listed directory.
    pub(super) path: String,
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    /// Octal digits.
    mode: String,
    uid: u32,
    gid: u32,
    size: u64,
    links: u32,
    mtime: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<(u32, u32)>,
    /// Number of the layer that describes it, from 0, the lowest.
    pub(super) layer: usize,
    /// Digest of that layer's blob.
    layer_digest: Digest,
    /// Values as text with escapes.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    xattrs: BTreeMap<String, String>,
    #[serde(skip)]
    permissions: String,
}

/// The name of a type.
pub(super) fn kind(kind: NodeKind) -> &'static str {
    match kind {
        NodeKind::File => "file",
        NodeKind::Directory => "directory",
        NodeKind::Symlink => "symlink",
        NodeKind::CharDevice => "char-device",
        NodeKind::BlockDevice => "block-device",
        NodeKind::Fifo => "fifo",
    }
}

/// A node's type bits in `st_mode`.
fn type_bits(kind: NodeKind) -> u16 {
    match kind {
        NodeKind::File => 0o100_000,
        NodeKind::Directory => 0o040_000,
        NodeKind::Symlink => 0o120_000,
        NodeKind::CharDevice => 0o020_000,
        NodeKind::BlockDevice => 0o060_000,
        NodeKind::Fifo => 0o010_000,
    }
}

fn listed(opened: &open::Opened, path: &[u8], node: &Node) -> Listed {
    let is_device = matches!(node.kind, NodeKind::CharDevice | NodeKind::BlockDevice);
    let layers = opened.image.layers();
    Listed {
        path: escaped(path),
        kind: kind(node.kind),
        mode: format!("{:04o}", node.mode),
        uid: node.uid,
        gid: node.gid,
        size: if node.kind == NodeKind::Symlink { node.target.len() as u64 } else { node.size },
        links: node.links,
        mtime: date(node.mtime.secs),
        target: (node.kind == NodeKind::Symlink).then(|| escaped(&node.target)),
        device: is_device.then_some(node.device),
        layer: node.layer,
        layer_digest: layers.get(node.layer).map_or(opened.image.config().digest, |l| l.descriptor.digest),
        xattrs: node.xattrs.iter().map(|x| (escaped(&x.name), escaped(&x.value))).collect(),
        permissions: permissions(type_bits(node.kind) | node.mode),
    }
}

pub(super) fn ls(args: &LsArgs) -> Result<ExitCode, CliError> {
    let opened = open::open(0, &args.image, &args.source)?;
    let tree = open::tree(&opened, &args.source, false)?;
    let about = |e| open::failed("list", &opened.name, &e);
    let id = tree.find(args.path.as_bytes(), args.path.ends_with('/')).map_err(about)?;
    if args.du {
        return du(args, &opened, &tree, id);
    }
    let mut rows = Vec::new();
    if tree.node(id).kind != NodeKind::Directory {
        rows.push(listed(&opened, args.path.as_bytes(), tree.node(id)));
    } else if args.recursive {
        tree.walk(id, &mut |path, id| rows.push(listed(&opened, path, tree.node(id))));
    } else {
        rows.extend(tree.children(id).map(|(name, id)| listed(&opened, name, tree.node(id))));
    }
    if args.json {
        print_json(&rows)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    for row in &rows {
        if args.long {
            let size = match row.device {
                Some((major, minor)) => format!("{major}, {minor}"),
                None => row.size.to_string(),
            };
            let _ = write!(
                text,
                "{} {:>3} {:>5} {:>5} {size:>10} {} {:>3} ",
                row.permissions, row.links, row.uid, row.gid, row.mtime, row.layer
            );
        }
        text += &row.path;
        if let (true, Some(target)) = (args.long, &row.target) {
            let _ = write!(text, " -> {target}");
        }
        text.push('\n');
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// The output of `--du`; sizes in bytes.
#[derive(Debug, Serialize)]
struct DiskUse {
    layers: Vec<LayerRow>,
    paths: Vec<PathRow>,
    shadowed: Vec<HiddenRow>,
}

#[derive(Debug, Serialize)]
struct LayerRow {
    layer: usize,
    digest: Digest,
    compression: String,
    /// Length of the blob.
    blob_bytes: u64,
    /// Length of the tar.
    tar_bytes: u64,
    entries: usize,
    /// Sum of the sizes of its regular files.
    file_bytes: u64,
    /// Those of them that later entries and layers hide.
    shadowed_bytes: u64,
}

#[derive(Debug, Serialize)]
struct PathRow {
    path: String,
    /// Sum of the sizes of the files below that are shown; a hard-linked file counts where it comes first.
    bytes: u64,
    /// Sum of the sizes of the files below that are hidden.
    shadowed_bytes: u64,
}

#[derive(Debug, Serialize)]
struct HiddenRow {
    path: String,
    bytes: u64,
    /// The layer that has the data.
    layer: usize,
    /// The layer that hides them.
    hidden_by: usize,
}

fn du(args: &LsArgs, opened: &open::Opened, tree: &Tree, id: NodeId) -> Result<ExitCode, CliError> {
    let report = DiskUse {
        layers: layer_rows(opened, tree),
        paths: path_rows(tree, &args.path, id),
        shadowed: hidden_rows(&tree.shadowed, &args.path),
    };
    if args.json {
        print_json(&report)?;
    } else {
        print(&du_text(&report))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn layer_rows(opened: &open::Opened, tree: &Tree) -> Vec<LayerRow> {
    let pairs = tree.layers.iter().zip(opened.image.layers()).enumerate();
    pairs
        .map(|(layer, (used, named))| LayerRow {
            layer,
            digest: named.descriptor.digest,
            compression: used.summary.compression.to_string(),
            blob_bytes: used.summary.blob_bytes,
            tar_bytes: used.summary.plain_bytes,
            entries: used.entries,
            file_bytes: used.file_bytes,
            shadowed_bytes: used.file_bytes.saturating_sub(used.visible_bytes),
        })
        .collect()
}

/// Components of a path, without symbolic links being followed.
fn parts(path: &[u8]) -> Vec<&[u8]> {
    path.split(|b| *b == b'/').filter(|part| !matches!(*part, b"" | b".")).collect()
}

/// What lies directly below the listed directory, the largest first.
fn path_rows(tree: &Tree, listed: &str, id: NodeId) -> Vec<PathRow> {
    let mut sums: BTreeMap<Vec<u8>, (u64, u64)> = BTreeMap::new();
    let mut seen = HashSet::new();
    let node = tree.node(id);
    if node.kind != NodeKind::Directory {
        sums.insert(listed.as_bytes().to_vec(), (node.size, 0));
    }
    tree.walk(id, &mut |path, id| {
        let first = path.split(|b| *b == b'/').next().unwrap_or_default();
        let sum = sums.entry(first.to_vec()).or_default();
        if seen.insert(id) {
            sum.0 = sum.0.saturating_add(tree.node(id).size);
        }
    });
    let prefix = parts(listed.as_bytes());
    for hidden in &tree.shadowed {
        let path = parts(&hidden.path);
        if let Some([first, ..]) = path.strip_prefix(&prefix[..]) {
            let sum = sums.entry(first.to_vec()).or_default();
            sum.1 = sum.1.saturating_add(hidden.size);
        }
    }
    let mut rows: Vec<PathRow> = sums
        .into_iter()
        .map(|(path, (bytes, shadowed_bytes))| PathRow { path: escaped(&path), bytes, shadowed_bytes })
        .collect();
    rows.sort_by(|a, b| {
        (b.bytes + b.shadowed_bytes).cmp(&(a.bytes + a.shadowed_bytes)).then(a.path.cmp(&b.path))
    });
    rows
}

/// What is hidden below the listed path, the largest first.
fn hidden_rows(shadowed: &[Shadowed], listed: &str) -> Vec<HiddenRow> {
    let prefix = parts(listed.as_bytes());
    let mut rows: Vec<HiddenRow> = shadowed
        .iter()
        .filter(|hidden| parts(&hidden.path).starts_with(&prefix))
        .map(|hidden| HiddenRow {
            path: escaped(&hidden.path),
            bytes: hidden.size,
            layer: hidden.layer,
            hidden_by: hidden.by,
        })
        .collect();
    rows.sort_by(|a, b| b.bytes.cmp(&a.bytes).then(a.path.cmp(&b.path)).then(a.layer.cmp(&b.layer)));
    rows
}

fn du_text(report: &DiskUse) -> String {
    let size = |bytes: u64| ByteSize(bytes).to_string();
    let mut layers = table(&["LAYER", "BLOB", "TAR", "FILES", "HIDDEN", "ENTRIES", "COMPRESSION", "DIGEST"]);
    for row in &report.layers {
        layers.add_row([
            row.layer.to_string(),
            size(row.blob_bytes),
            size(row.tar_bytes),
            size(row.file_bytes),
            size(row.shadowed_bytes),
            row.entries.to_string(),
            row.compression.clone(),
            row.digest.to_string(),
        ]);
    }
    let mut paths = table(&["SIZE", "HIDDEN", "PATH"]);
    for row in &report.paths {
        paths.add_row([size(row.bytes), size(row.shadowed_bytes), row.path.clone()]);
    }
    let mut text = format!("{layers}\n\n{paths}\n");
    if !report.shadowed.is_empty() {
        let mut hidden = table(&["HIDDEN", "OF LAYER", "BY LAYER", "PATH"]);
        for row in report.shadowed.iter().take(HIDDEN_ROWS) {
            hidden.add_row([
                size(row.bytes),
                row.layer.to_string(),
                row.hidden_by.to_string(),
                row.path.clone(),
            ]);
        }
        let _ = write!(text, "\n{hidden}\n");
        if report.shadowed.len() > HIDDEN_ROWS {
            let _ = writeln!(text, "and {} more; --json lists them", report.shadowed.len() - HIDDEN_ROWS);
        }
    }
    text
}
