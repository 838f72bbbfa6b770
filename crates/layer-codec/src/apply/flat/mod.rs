//! Flatten: the layers of an image, read from the top down, become one file system.
//!
//! ```text
//!   layer n (top) ─┐                     ┌─ shadowed? ── skipped, its data are never written
//!   layer n-1      ├─► entry ─► rules of │
//!   …              │            apply    └─ else ──► data at the cursor of the one image
//!   layer 0 (base)─┘              │
//!                                 ▼ end of the layer
//!               the layer's tree ─► merged: names move into the image's tree unless an upper layer has or hides them
//! ```
//!
//! Each layer is first what it is for [`apply`](super): the same rules for names, whiteouts, links and attributes, in a
//! directory of its own, so that its entries become the same nodes as in an image of that layer alone. What is above is
//! complete by then, so whether an entry is visible is known when it is met. Three cases need more:
//!
//! | case | what happens |
//! |---|---|
//! | a hard link whose target is in a lower layer | it waits with its header until the target is met; an error if it never is (`wanted`) |
//! | a visible link to a file whose own name is shadowed, so that its data were skipped | that layer is read a second time, for the data of such files alone |
//! | a directory that no entry describes | attributes of the nearest layer below that describes it (`describe`) |
//!
//! Invariants:
//! * The tree is that of an overlay of the layers as [`apply`](super) makes them with
//!   [`LowerUse::LinksAndDirectories`](super::LowerUse), but for the root directory: that of the topmost layer with an entry
//!   for it.
//! * Layers below a root that is opaque are not read: nothing of them can be seen.
//! * The same layers and options give the same bytes: no time, no thread, no order of a hash table reaches the image.
//! * Memory: what the image writer keeps for each entry, 36 bytes for the digest of a file, 16 for a shadowed file.
//!
//! Called by `image pack`.

mod contents;
mod describe;
mod ids;
mod merge;
mod read;
#[cfg(test)]
mod tests;
mod wanted;

pub use contents::{FileSink, FlatFile};

use super::{
    ApplyLimits, ApplyOptions, Profile,
    layer::DefaultLayer,
    tree::{LayerTree, Watch},
};
use crate::{DiffError, IdMaps, RootHash};
use disk_io::WriteAt;
use ext4_image::{
    BlockSize,
    writer::{Attributes, ImageWriter, NodeKind, UuidSource, Writable, WriterOptions},
};
use merge::Merged;
use read::{LayerData, Needs};
use std::{
    io::{self, Read},
    sync::Arc,
};
use uuid::Uuid;
use verity_tree::TreeDisk;

/// Opens a layer of the image by its number, 0 for the base: its tar, decompressed, from the first byte. Called once for
/// each layer from the top down, and again for a layer that has to be read a second time.
pub type OpenLayer<'a> = dyn FnMut(usize) -> io::Result<Box<dyn Read>> + 'a;

/// What [`ApplyLimits::entries`] counts here, besides names: the entries that were read, the hidden ones, too.
pub const ALL_ENTRIES: &str = "entries of all layers";
/// What [`ApplyLimits::tar_bytes`] counts here.
pub const ALL_TAR_BYTES: &str = "bytes of tar of all layers";

/// The directory of a layer that is being read: a name that no entry can have.
const LAYER_DIR: &[u8] = b".wh..wh.layer";

/// How layers become one file system.
#[derive(Debug, Clone)]
pub struct FlatOptions {
    /// Block size: 1024, 2048 or 4096 bytes; 4096 for a writable image.
    pub block_size: u32,
    /// Small files and directories lie in their inodes.
    pub inline_data: bool,
    /// A writable file system of a given size, instead of one that ends with its content and is read only.
    pub writable: Option<Writable>,
    /// A dm-verity tree follows the file system.
    pub verity: bool,
    /// The most bytes of the file system.
    pub max_image_bytes: u64,
    /// Owners in the image are the host's of these ranges instead of those in the layers.
    pub id_maps: IdMaps,
    /// What is refused. Names, entries and bytes of tar are those of all layers together; the rest holds for each.
    pub limits: ApplyLimits,
    /// When the file system was made: seconds since 1970.
    pub made_at: u32,
    /// A digest of what the layers hold, for the UUID; without one the UUID depends on the data themselves.
    pub source: Option<[u8; 32]>,
    /// This path must lead to an executable file.
    pub require: Option<Vec<u8>>,
    /// Files have their data. Without, they have their sizes and are holes, for who only compares everything else.
    pub contents: bool,
}

impl Default for FlatOptions {
    fn default() -> Self {
        Self {
            block_size: 1024,
            inline_data: true,
            writable: None,
            verity: false,
            max_image_bytes: super::MAX_RAW_BYTES,
            id_maps: IdMaps::default(),
            limits: ApplyLimits::default(),
            made_at: 0,
            source: None,
            require: None,
            contents: true,
        }
    }
}

/// The result.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FlatSummary {
    /// Bytes of the file system.
    pub image_bytes: u64,
    /// Bytes of the disk: the file system and its hash tree, if it has one.
    pub disk_bytes: u64,
    /// UUID of the file system.
    pub uuid: Uuid,
    /// Root hash of the dm-verity tree.
    pub verity_root: Option<RootHash>,
    /// Inodes in use.
    pub inodes: u64,
    /// Bytes of the file system that are in use.
    pub used_bytes: u64,
    /// Layers that were read, from the top.
    pub layers_read: usize,
    /// Layers that were read a second time.
    pub second_reads: usize,
    /// Entries of all layers.
    pub entries: u64,
    /// Bytes of tar, those of second reads not counted.
    pub tar_bytes: u64,
    /// Files whose data were not written, since upper layers hide them.
    pub shadowed_files: u64,
    /// Their bytes.
    pub shadowed_bytes: u64,
    /// Sum of the sizes of regular files in the image, a hard-linked one once.
    pub file_bytes: u64,
}

/// Makes one file system of `count` layers on the empty disk `image`. `scratch` is an empty disk for the leaves of a large
/// hash tree. `files`, if it is given, receives each regular file with the digest of its content, when all are known.
///
/// # Errors
/// [`DiffError::Layer`] names the layer of everything that a layer can cause. Where [`DiffError::larger_blocks_help`], the
/// same call with blocks of 4096 bytes can succeed. The disk is useless after an error.
pub fn flatten<W: WriteAt>(
    count: usize,
    open: &mut OpenLayer<'_>,
    image: W,
    scratch: Option<Arc<dyn WriteAt>>,
    options: &FlatOptions,
    files: Option<&mut FileSink<'_>>,
) -> Result<FlatSummary, DiffError> {
    let block_size = BlockSize::from_bytes(options.block_size).ok_or_else(|| {
        DiffError::Usage(format!("blocks of {} bytes: 1024, 2048 or 4096", options.block_size))
    })?;
    let image = if options.verity {
        TreeDisk::hashing(image, scratch).map_err(DiffError::io("starting the hashing thread"))?
    } else {
        TreeDisk::plain(image)
    };
    let settings = WriterOptions {
        block_size,
        max_image_bytes: options.max_image_bytes,
        uuid: if options.source.is_some() { UuidSource::FromSource } else { UuidSource::FromContent },
        inline_data: options.inline_data,
        writable: options.writable,
        made_at: options.made_at,
    };
    let apply = apply_options(options);
    let done = ImageWriter::new(&image, settings)
        .map_err(DiffError::from)
        .and_then(|writer| Flatten::new(options, &apply, files.is_some()).run(count, open, writer, files));
    let mut summary = match done {
        Ok(summary) => summary,
        Err(error) => {
            image.abandon();
            return Err(error);
        }
    };
    let (disk_bytes, root) = super::append_tree(&image, summary.image_bytes, summary.uuid.into_bytes())?;
    (summary.disk_bytes, summary.verity_root) = (disk_bytes, root.map(RootHash));
    Ok(summary)
}

/// What is known while layers are read.
struct Flatten<'o> {
    options: &'o FlatOptions,
    apply: &'o ApplyOptions,
    merged: Merged,
    undescribed: describe::Undescribed,
    wanted: wanted::Wanted,
    data: LayerData,
    summary: FlatSummary,
}

/// What the layers are for apply.
fn apply_options(options: &FlatOptions) -> ApplyOptions {
    ApplyOptions {
        profile: Profile::Default,
        block_size: options.block_size,
        max_image_bytes: options.max_image_bytes,
        inline_data: options.inline_data,
        limits: options.limits,
        ..ApplyOptions::default()
    }
}

impl<'o> Flatten<'o> {
    fn new(options: &'o FlatOptions, apply: &'o ApplyOptions, digests: bool) -> Self {
        Self {
            options,
            apply,
            merged: Merged::default(),
            undescribed: describe::Undescribed::default(),
            wanted: wanted::Wanted::default(),
            data: LayerData::new(digests),
            summary: FlatSummary::default(),
        }
    }

    fn run<W: WriteAt>(
        mut self,
        count: usize,
        open: &mut OpenLayer<'_>,
        mut writer: ImageWriter<W>,
        files: Option<&mut FileSink<'_>>,
    ) -> Result<FlatSummary, DiffError> {
        // The root of an image without an entry for it, as in a layer.
        writer.set_attributes(writer.root(), super::tree::implied());
        let mut names = 0;
        for number in (0..count).rev() {
            if self.merged.is_complete(&writer) {
                break;
            }
            let last = number == 0;
            (writer, names) = self
                .layer(number, last, names, open, writer)
                .map_err(|source| DiffError::Layer { number, source: Box::new(source) })?;
        }
        self.wanted.check_found()?;
        if let Some(path) = &self.options.require {
            contents::require(&writer, self.apply, path)?;
        }
        self.summary.file_bytes = contents::file_bytes(&writer);
        if let Some(files) = files {
            contents::list(&writer, self.data.digests(), files)?;
        }
        let done = match self.options.source {
            Some(source) => writer.finish_with(source),
            None => writer.finish(),
        }?;
        self.summary.image_bytes = done.image_bytes;
        self.summary.uuid = Uuid::from_bytes(done.uuid);
        self.summary.inodes = done.inodes;
        self.summary.used_bytes = done.blocks_used * u64::from(self.options.block_size);
        Ok(self.summary)
    }

    /// Reads one layer and merges it; gives back the writer and the number of names so far.
    fn layer<W: WriteAt>(
        &mut self,
        number: usize,
        last: bool,
        names: u64,
        open: &mut OpenLayer<'_>,
        mut writer: ImageWriter<W>,
    ) -> Result<(ImageWriter<W>, u64), DiffError> {
        let root = writer.root();
        let dir = writer.create(root, LAYER_DIR, NodeKind::Directory, Attributes::default(), Vec::new())?;
        let mut tree = LayerTree::below(writer, dir, self.apply);
        (tree.names, tree.watch) = (names, Some(Watch::default()));
        // Until an entry describes it.
        tree.implied.insert(dir);
        let mut layer = DefaultLayer::of(tree);
        let input = open(number).map_err(DiffError::io("opening the layer"))?;
        self.merged.begin_layer(&layer.tree.writer, dir);
        self.data.begin_layer();
        read::first(&mut layer, input, self)?;
        self.summary.layers_read += 1;
        let mut later = Vec::new();
        layer.settle_links(&mut later)?;
        let mut tree = layer.tree;
        let mut needs = Needs::default();
        self.wanted.find(&mut tree, &later, &mut self.data, &mut needs)?;
        self.undescribed.describe(&self.merged, &mut tree)?;
        for (dir, opaque) in self.merged.merge(&mut tree, last)? {
            self.undescribed.add(dir, opaque);
        }
        let (mut writer, names) = (tree.writer, tree.names);
        writer.unlink(root, LAYER_DIR)?;
        self.data.end_layer(&writer, &mut needs);
        while !needs.is_empty() {
            let input = open(number).map_err(DiffError::io("opening the layer again"))?;
            read::again(&mut writer, input, &mut needs, &mut self.data)?;
            self.summary.second_reads += 1;
        }
        self.wanted.keep(&writer, later);
        writer.reuse_removed();
        Ok((writer, names))
    }
}
