//! Reading a layer: every entry goes into the layer's tree, data only where they will be seen.
//!
//! ```text
//!   first   Entry ─► rules of apply ─► a file with data?
//!                                        visible                  ─► written
//!                                        the target of a link     ─► written into the node that waits for it
//!                                        shadowed                 ─► its offset is noted, its data are skipped
//!   again   Entry ─► a noted offset that is needed after all?     ─► written            (nothing else is looked at)
//! ```
//!
//! Files are identified by the offset of their header in the tar, which is the same at each read. Called by the parent module.

use super::{
    super::{
        layer::DefaultLayer,
        name,
        target::{Placement, Target},
    },
    ALL_ENTRIES, ALL_TAR_BYTES, Flatten, ids,
};
use crate::DiffError;
use disk_io::WriteAt;
use ext4_image::writer::{ImageWriter, NodeId};
use layer_tar::{Event, TarReader};
use std::{
    collections::{BTreeMap, HashMap},
    io::{self, Read},
};

/// A file with more bytes of holes than this has no digest: hashing zeros takes time, and holes cost a tar nothing.
const MAX_HASHED_HOLES: u64 = 1 << 30;

/// A content digest: BLAKE3 of all bytes of the file, holes as zeros.
pub(super) type ContentDigest = [u8; 32];

/// The data of the layer that is being read, and the digests of all files so far.
#[derive(Debug, Default)]
pub(super) struct LayerData {
    /// Offsets of the entries of files whose data were skipped.
    skipped: HashMap<NodeId, u64>,
    /// The same of files whose data were written; kept while a link waits for its target.
    written: HashMap<NodeId, u64>,
    /// Nodes that were given data when the file that they may stand for was met, and that file.
    early: HashMap<NodeId, NodeId>,
    /// Digests of the files of all layers.
    digests: Option<Vec<(NodeId, ContentDigest)>>,
    /// Number of those of earlier layers.
    settled: usize,
}

impl LayerData {
    pub(super) fn new(digests: bool) -> Self {
        Self { digests: digests.then(Vec::new), ..Self::default() }
    }

    /// Forgets what was known of the previous layer.
    pub(super) fn begin_layer(&mut self) {
        self.skipped.clear();
        self.written.clear();
        self.early.clear();
    }

    /// The digests, in no particular order.
    pub(super) fn digests(&self) -> &[(NodeId, ContentDigest)] {
        self.digests.as_deref().unwrap_or_default()
    }

    /// The offset of a file of this layer that has data.
    pub(super) fn offset(&self, node: NodeId) -> Option<u64> {
        self.skipped.get(&node).or_else(|| self.written.get(&node)).copied()
    }

    /// Whether a node that waits for a file already has the data of `file`.
    pub(super) fn has_early(&self, waiting: NodeId, file: NodeId) -> bool {
        self.early.get(&waiting) == Some(&file)
    }

    /// The layer is merged, and what is not in the image was removed. Skipped files that are in it are needed.
    pub(super) fn end_layer<W: WriteAt>(&mut self, writer: &ImageWriter<W>, needs: &mut Needs) {
        for (node, offset) in &self.skipped {
            if writer.link_count(*node) > 0 {
                needs.add(*offset, *node);
            }
        }
        if let Some(digests) = &mut self.digests {
            let settled = self.settled;
            let mut at = 0;
            digests.retain(|(node, _)| {
                at += 1;
                at <= settled || writer.link_count(*node) > 0
            });
            self.settled = digests.len();
        }
    }

    /// Drops the digest of a node whose data this layer gave it.
    pub(super) fn forget(&mut self, node: NodeId) {
        if let Some(digests) = &mut self.digests
            && self.early.remove(&node).is_some()
        {
            digests.retain(|(known, _)| *known != node);
        }
    }

    fn digested(&mut self, node: NodeId, digest: Option<ContentDigest>) {
        if let (Some(digests), Some(digest)) = (&mut self.digests, digest) {
            digests.push((node, digest));
        }
    }
}

/// Files that a second read of the layer has to write: by the offset of their entries.
#[derive(Debug, Default)]
pub(super) struct Needs(BTreeMap<u64, Vec<NodeId>>);

impl Needs {
    pub(super) fn add(&mut self, offset: u64, node: NodeId) {
        let nodes = self.0.entry(offset).or_default();
        nodes.push(node);
        // Their order must not depend on that of a hash table.
        nodes.sort_unstable_by(|a, b| b.cmp(a));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One file of each offset: what one read can write.
    fn round(&mut self) -> BTreeMap<u64, NodeId> {
        let mut round = BTreeMap::new();
        self.0.retain(|offset, nodes| {
            if let Some(node) = nodes.pop() {
                round.insert(*offset, node);
            }
            !nodes.is_empty()
        });
        round
    }
}

/// The file that is being written.
struct OpenFile {
    node: NodeId,
    size: u64,
    hashing: Option<Hashing>,
}

struct Hashing {
    hasher: blake3::Hasher,
    end: u64,
    holes: u64,
}

impl Hashing {
    fn zeros(&mut self, count: u64) {
        const ZEROS: [u8; 4096] = [0; 4096];
        self.holes = self.holes.saturating_add(count);
        let mut left = if self.holes > MAX_HASHED_HOLES { 0 } else { count };
        while left > 0 {
            let n = left.min(ZEROS.len() as u64);
            self.hasher.update(&ZEROS[..n as usize]);
            left -= n;
        }
        self.end += count;
    }
}

impl OpenFile {
    fn new(node: NodeId, size: u64, digest: bool) -> Self {
        let hashing = digest.then(|| Hashing { hasher: blake3::Hasher::new(), end: 0, holes: 0 });
        Self { node, size, hashing }
    }

    fn data(&mut self, offset: u64, bytes: &[u8]) {
        if let Some(hashing) = &mut self.hashing {
            hashing.zeros(offset.saturating_sub(hashing.end));
            hashing.hasher.update(bytes);
            hashing.end += bytes.len() as u64;
        }
    }

    /// The digest of the whole, if there is one.
    fn digest(self) -> Option<ContentDigest> {
        let mut hashing = self.hashing?;
        hashing.zeros(self.size.saturating_sub(hashing.end));
        (hashing.holes <= MAX_HASHED_HOLES).then(|| hashing.hasher.finalize().into())
    }
}

/// Reads a layer for the first time.
pub(super) fn first<W: WriteAt>(
    layer: &mut DefaultLayer<'_, W>,
    input: impl Read,
    flat: &mut Flatten<'_>,
) -> Result<(), DiffError> {
    let mut reader = TarReader::new(input);
    let limits = flat.options.limits;
    let mut open: Option<OpenFile> = None;
    loop {
        match reader.next_event()? {
            Event::Entry(entry) => {
                close(layer, &mut open, &mut flat.data)?;
                flat.summary.entries += 1;
                if flat.summary.entries > limits.entries {
                    return Err(layer.limit(ALL_ENTRIES, limits.entries));
                }
                ids::shift(entry, &flat.options.id_maps)?;
                let placement = layer.entry(entry)?;
                flat.merged.follow(&mut layer.tree);
                // Before the data are read: what is too much is never written.
                let end = flat.summary.tar_bytes.saturating_add(entry.offset).saturating_add(entry.stored);
                if end > limits.tar_bytes {
                    return Err(layer.limit(ALL_TAR_BYTES, limits.tar_bytes));
                }
                if let Placement::Data(node) = placement
                    && !flat.options.contents
                {
                    layer.begin_file(node, entry.size)?;
                    layer.end_file()?;
                    if !flat.wanted.is_empty() {
                        flat.data.written.insert(node, entry.offset);
                    }
                } else if let Placement::Data(node) = placement {
                    let into = destination(layer, node, &entry.path, flat);
                    let digest = flat.data.digests.is_some();
                    if let Some(into) = into {
                        layer.begin_file(into, entry.size)?;
                        open = Some(OpenFile::new(into, entry.size, digest));
                    } else {
                        flat.summary.shadowed_files += 1;
                        flat.summary.shadowed_bytes += entry.stored;
                    }
                    if into != Some(node) {
                        flat.data.skipped.insert(node, entry.offset);
                    } else if !flat.wanted.is_empty() {
                        flat.data.written.insert(node, entry.offset);
                    }
                }
            }
            Event::Data { offset, bytes } => {
                if let Some(file) = &mut open {
                    file.data(offset, bytes);
                    layer.write_data(offset, bytes, &mut |_| {})?;
                }
            }
            Event::Raw(_) => {}
            Event::End => break,
        }
        if reader.trailing_bytes().is_some_and(|n| n > limits.trailing_bytes) {
            return Err(layer.limit("bytes behind the end of the archive", limits.trailing_bytes));
        }
    }
    close(layer, &mut open, &mut flat.data)?;
    flat.summary.tar_bytes += reader.offset();
    Ok(())
}

/// The node that gets the data of the file `node`, which was just added: itself, one that waits for it, or none.
fn destination<W: WriteAt>(
    layer: &DefaultLayer<'_, W>,
    node: NodeId,
    path: &[u8],
    flat: &mut Flatten<'_>,
) -> Option<NodeId> {
    let tree = &layer.tree;
    let watch = tree.watch.as_ref()?;
    if flat.merged.shows(&tree.writer, watch.last_dir?, &watch.last_name) {
        return Some(node);
    }
    if flat.wanted.is_empty() {
        return None;
    }
    let mut parts = Vec::new();
    name::split(path, flat.options.limits.depth, &mut parts).ok()?;
    let waiting = flat.wanted.at(&parts)?;
    flat.data.early.insert(waiting, node);
    Some(waiting)
}

fn close<W: WriteAt>(
    layer: &mut DefaultLayer<'_, W>,
    open: &mut Option<OpenFile>,
    data: &mut LayerData,
) -> Result<(), DiffError> {
    let Some(file) = open.take() else { return Ok(()) };
    layer.end_file()?;
    data.digested(file.node, file.digest());
    Ok(())
}

/// Reads a layer again, for the data of files that are needed after all.
pub(super) fn again<W: WriteAt>(
    writer: &mut ImageWriter<W>,
    input: impl Read,
    needs: &mut Needs,
    data: &mut LayerData,
) -> Result<(), DiffError> {
    let mut round = needs.round();
    let mut reader = TarReader::new(input);
    let mut open: Option<OpenFile> = None;
    loop {
        let event = reader.next_event()?;
        if matches!(event, Event::Entry(_) | Event::End)
            && let Some(file) = open.take()
        {
            writer.end_file()?;
            data.digested(file.node, file.digest());
        }
        match event {
            Event::Entry(entry) => {
                if let Some(node) = round.remove(&entry.offset) {
                    writer.begin_file(node, entry.size)?;
                    open = Some(OpenFile::new(node, entry.size, data.digests.is_some()));
                }
            }
            Event::Data { offset, bytes } => {
                if let Some(file) = &mut open {
                    file.data(offset, bytes);
                    writer.write_data(offset, bytes, &mut |_| {})?;
                }
            }
            Event::Raw(_) => {}
            Event::End => break,
        }
    }
    match round.first_key_value() {
        None => {
            data.settled = data.digests().len();
            Ok(())
        }
        Some((offset, _)) => {
            let what = format!("no entry at byte {offset}, where the first read found a file");
            Err(DiffError::io("reading the layer a second time")(io::Error::new(
                io::ErrorKind::InvalidData,
                what,
            )))
        }
    }
}
