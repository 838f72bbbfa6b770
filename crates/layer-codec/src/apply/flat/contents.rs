//! What is in the merged tree: its files with their digests, their sizes, and whether a program is there.
//!
//! Order of a listing: depth first, the names of each directory by their bytes. Called by the parent module once all layers
//! are merged.

use super::{
    super::{
        ApplyOptions, name,
        tree::{Resolved, resolve},
    },
    read::ContentDigest,
};
use crate::DiffError;
use disk_io::WriteAt;
use ext4_image::writer::{ImageWriter, NodeId, NodeKind, Shape};
use std::{cmp::Reverse, io};

/// A regular file of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlatFile<'a> {
    /// Path from the root, without a slash at its start.
    pub path: &'a [u8],
    /// Size in bytes.
    pub size: u64,
    /// BLAKE3 of its content, holes as zeros; `None` for a file with more than 1 GiB of holes.
    pub blake3: Option<[u8; 32]>,
}

/// Receives the files of the image, depth first, the names of each directory by their bytes. A file of several names comes
/// under each of them.
pub type FileSink<'a> = dyn FnMut(FlatFile<'_>) -> io::Result<()> + 'a;

/// Gives all regular files to `files`.
pub(super) fn list<W: WriteAt>(
    writer: &ImageWriter<W>,
    digests: &[(NodeId, ContentDigest)],
    files: &mut FileSink<'_>,
) -> Result<(), DiffError> {
    // Of two digests of a node the later one holds: sorting is stable.
    let mut known: Vec<&(NodeId, ContentDigest)> = digests.iter().collect();
    known.sort_by_key(|(node, _)| *node);
    let nothing: ContentDigest = blake3::hash(b"").into();
    let digest = |node: NodeId, size: u64| {
        let end = known.partition_point(|(n, _)| *n <= node);
        match end.checked_sub(1).and_then(|at| known.get(at)) {
            _ if size == 0 => Some(nothing),
            Some((n, digest)) if *n == node => Some(*digest),
            _ => None,
        }
    };
    let sorted = |dir: NodeId| {
        let mut names: Vec<(Vec<u8>, NodeId)> = writer.children(dir);
        names.sort_unstable_by(|a, b| Reverse(&a.0).cmp(&Reverse(&b.0)));
        names
    };
    let mut path = Vec::new();
    // The names of each open directory that are still to come, the next one last, and the length of its path.
    let mut steps = vec![(0, sorted(writer.root()))];
    while let Some((len, names)) = steps.last_mut() {
        let len = *len;
        path.truncate(len);
        let Some((name, node)) = names.pop() else {
            steps.pop();
            continue;
        };
        if len > 0 {
            path.push(b'/');
        }
        path.extend_from_slice(&name);
        if writer.is_directory(node) {
            steps.push((path.len(), sorted(node)));
        } else if writer.kind(node) == NodeKind::File {
            let size = writer.file_size(node);
            files(FlatFile { path: &path, size, blake3: digest(node, size) })
                .map_err(DiffError::io("writing the list of files"))?;
        }
    }
    Ok(())
}

/// Sum of the sizes of all regular files, each once.
pub(super) fn file_bytes<W: WriteAt>(writer: &ImageWriter<W>) -> u64 {
    writer.nodes().fold(0, |sum: u64, view| match view.shape {
        Shape::File { size } => sum.saturating_add(size),
        _ => sum,
    })
}

/// Checks that a path leads to an executable file.
///
/// # Errors
/// [`DiffError::Usage`] says what is there instead.
pub(super) fn require<W: WriteAt>(
    writer: &ImageWriter<W>,
    options: &ApplyOptions,
    path: &[u8],
) -> Result<(), DiffError> {
    /// Execute permission of owner, group and others.
    const EXECUTE: u16 = 0o111;
    let shown = name::shown(path);
    let missing = |what: &str| DiffError::Usage(format!("the image has no program at \"{shown}\": {what}"));
    let mut parts = Vec::new();
    name::split(path, options.limits.depth, &mut parts).map_err(|_| missing("not a path in an image"))?;
    let Resolved::Node(node, _) = resolve(writer, writer.root(), &parts) else {
        return Err(missing("there is nothing there; add one in a layer of its own"));
    };
    if writer.kind(node) != NodeKind::File {
        return Err(missing("it is not a regular file"));
    }
    if writer.attributes(node).permissions & EXECUTE == 0 {
        return Err(missing("it is not executable"));
    }
    Ok(())
}
