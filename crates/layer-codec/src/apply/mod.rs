//! Apply: one streaming pass from a layer's tar to an ext4 image in a VHD, with the exact record written alongside.
//!
//! ```text
//!   input ─► chunks ─┬─► TarReader ─┬─ Entry ─► Layer (names, whiteouts, links) ─► ImageWriter ─► image ─► VHD footer
//!                    │              ├─ Data ──────────────────────────────────────►│  │ Placed::At → image op
//!                    │              │                                                 └ Placed::Inline → literal op
//!                    │              └─ Raw ───────────────────────────────────────────► literal op     ─► record
//!                    └─► digest on a second thread (or told) ──────────────────────────────────► trailer        ─► record
//! ```
//!
//! Invariants:
//! * The record's ops cover every byte of the stream in order; it is held against the reader's offset at the end.
//! * Nothing is written outside of `image` and `record`; on an error both are garbage and the caller drops them.
//! * Memory is bounded by the read buffers, one record frame, and what the image writer keeps per entry.
//! * Nothing is synced: when an image becomes durable is the store's decision.
//!
//! # What the names of a layer tar mean here
//! Leading `/` and `./` are stripped, empty and `.` components dropped, `..` resolved by the letters of the name; a
//! name that leaves the root is an error. Then, in the order of the stream, each entry against what the *same layer*
//! already holds (lower layers are never consulted for names):
//!
//! | the tar has | and the layer already has | then |
//! |---|---|---|
//! | a parent that is missing | – | folder 0755 root:root, time 0; a later entry of that name sets its attributes |
//! | a parent that is a symlink | – | followed inside the layer's root (`..` stops there), at most 40 hops, missing targets made as folders: as dockerd's unpack does in its chroot |
//! | a parent that is a whiteout | – | an opaque folder replaces it |
//! | a parent that is anything else | – | error |
//! | a folder | a folder | merged: attributes of the new one, xattrs of both, the new one's before the old one's |
//! | a folder | a whiteout | an opaque folder: what the whiteout hid stays hidden |
//! | anything | anything else | replaced |
//! | `.wh.NAME` or device 0/0 `NAME` | anything | `NAME` is removed and a whiteout left |
//! | `.wh..wh..opq` | – | its folder gets `trusted.overlay.opaque=y`, before or after other entries |
//! | other `.wh..wh.*`, at any depth | – | AUFS's own: skipped; files of `/.wh..wh.plnk` can be link targets |
//! | a hard link | its target | one more name (a symlink itself is linked, not what it points to); mode, owner, times and xattrs of the link's header hold for all names |
//! | a hard link | no target yet | decided at the end: this layer first, then a copy from the layers below (which has the target's name too), else an error |
//!
//! What no system call could have put into a file system is dropped, mapped or refused: [`kernel`]. How other tools
//! read the same tar: `docs/tar-rules.md`. Called by `agent`; the trait [`LowerLayers`] is implemented over `ext4::reader`.

mod chain;
mod growth;
mod hcsshim;
mod input;
pub mod kernel;
mod layer;
mod links;
mod lower;
mod name;
pub mod owner;
mod target;

pub use chain::LayerChain;
pub use growth::{Growth, NoGrowth};
pub use hcsshim::HcsshimProfile;
pub use lower::{LowerLayers, LowerNode, NoLowers};
pub use owner::IdMap;

use crate::{DiffError, TarDigest, limits, record::RecordWriter};
use disk_io::WriteAt;
use ext4_image::{
    BlockSize,
    writer::{ImageWriter, Placed, UuidSource, WriterOptions},
};
use growth::{Resumed, Stopped, TooSmall};
use hcsshim::HcsshimLayer;
use input::HashedChunks;
use layer::{Layer, Placement};
use layer_tar::{Event, TarReader};
use std::{
    io::Read,
    sync::{Arc, OnceLock},
};
use target::Target;
use verity_tree::{self, TreeDisk};
use vhd_image::vhd::{self, Footer};

/// How the image is laid out, and what the entries of a tar mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Profile {
    /// This project's own; [`ApplyOptions::writer`] says more.
    #[default]
    Default,
    /// What hcsshim's `tar2ext4` makes, byte for byte.
    Hcsshim(HcsshimProfile),
}

/// The largest image without a VHD footer: 16 TiB.
pub const MAX_RAW_BYTES: u64 = 16 << 40;

/// How to apply, and what to refuse.
#[derive(Debug, Clone)]
pub struct ApplyOptions {
    /// The layout.
    pub profile: Profile,
    /// A VHD footer follows the image. Without one an image may be larger than a VHD.
    pub footer: bool,
    /// Block size, size limit and UUID of the image, in the default profile.
    pub writer: WriterOptions,
    /// The most names in the layer, folders that are only implied and whiteouts included.
    pub max_entries: u64,
    /// The most bytes of an entry's name and of a link's target.
    pub max_path_bytes: usize,
    /// The most components of a path.
    pub max_depth: usize,
    /// The most bytes of one entry's xattrs, names and values together.
    pub max_xattr_bytes: usize,
    /// The most bytes of tar.
    pub max_tar_bytes: u64,
    /// The most bytes behind the end-of-archive blocks.
    pub max_trailing_bytes: u64,
    /// The users that containers have, with userns-remap: an entry of any other is refused. Empty: all.
    pub uid_map: Vec<IdMap>,
    /// The same for groups.
    pub gid_map: Vec<IdMap>,
    /// Whether a dm-verity tree stands behind the file system.
    pub verity: Verity,
    /// Set if the sender of the tar digests it: nothing is hashed here.
    pub told_digest: Option<ToldDigest>,
}

/// The digest of a tar that its sender computes: filled when the stream has ended. Who sends the bytes knows best what
/// they are, so a digest that is not theirs harms nobody else.
pub type ToldDigest = Arc<OnceLock<TarDigest>>;

/// Whether an image gets a hash tree.
#[derive(Clone, Default)]
pub enum Verity {
    /// No.
    #[default]
    None,
    /// Yes. The scratch disk takes the leaves of images over 256 MiB; without one they stay in memory.
    Tree {
        /// Empty; of no use afterwards.
        scratch: Option<Arc<dyn WriteAt>>,
    },
}

impl std::fmt::Debug for Verity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Tree { scratch: None } => "Tree",
            Self::Tree { scratch: Some(_) } => "Tree with a scratch disk",
        })
    }
}

impl ApplyOptions {
    /// The usual limits around the given writer options.
    pub fn new(writer: WriterOptions) -> Self {
        Self {
            profile: Profile::Default,
            footer: true,
            writer,
            max_entries: limits::NAMES,
            max_path_bytes: limits::PATH_BYTES,
            max_depth: limits::DEPTH,
            max_xattr_bytes: limits::XATTR_BYTES,
            max_tar_bytes: 16 << 40,
            max_trailing_bytes: 1 << 30,
            uid_map: Vec::new(),
            gid_map: Vec::new(),
            verity: Verity::None,
            told_digest: None,
        }
    }
}

/// What was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApplySummary {
    /// Size of the ext4 file system.
    pub image_bytes: u64,
    /// Size of the file: the image, its hash tree if it has one, and the VHD footer.
    pub file_bytes: u64,
    /// Sum of the sizes of regular files and of the lengths of symlinks' targets, a hard-linked inode once, whiteouts 0:
    /// the layer's size as engines count.
    pub diff_size: u64,
    /// Length of the tar.
    pub tar_bytes: u64,
    /// Digest of the tar, all bytes.
    pub tar_digest: TarDigest,
    /// Size of the exact record.
    pub record_bytes: u64,
    /// UUID of the file system.
    pub uuid: [u8; 16],
    /// Entries of the tar, extended headers not counted.
    pub entries: u64,
    /// Root of the dm-verity tree, if there is one.
    pub verity_root: Option<verity_tree::Hash>,
}

/// Applies `input` to an empty `image` and an empty `record`, in blocks of the size that is asked for and no other.
///
/// `lowers` is asked only for the targets of hard links that the layer itself does not have.
///
/// # Errors
/// [`DiffError`]; what was written so far is of no use then.
pub fn apply<I: Read, W: WriteAt, S: WriteAt>(
    input: I,
    image: W,
    record: S,
    lowers: &mut dyn LowerLayers,
    options: &ApplyOptions,
) -> Result<ApplySummary, DiffError> {
    apply_growing(input, image, record, lowers, options, &mut NoGrowth)
}

/// As [`apply`], but goes on in larger blocks, on the disks that `growth` gives, when an entry needs them: see [`Growth`].
///
/// # Errors
/// [`DiffError`]; what was written so far is of no use then.
pub fn apply_growing<I: Read, W: WriteAt, S: WriteAt>(
    mut input: I,
    image: W,
    record: S,
    lowers: &mut dyn LowerLayers,
    options: &ApplyOptions,
    growth: &mut dyn Growth<W, S>,
) -> Result<ApplySummary, DiffError> {
    let smaller = match attempt(&mut input, &image, &record, lowers, options, options.writer.block_size) {
        Ok(summary) => return Ok(summary),
        Err(Stopped::Failed(error)) => return Err(error),
        Err(Stopped::TooSmall(stopped)) => stopped,
    };
    let Some((larger, larger_record)) = growth.disks()? else { return Err(smaller.error) };
    let mut tar = Resumed::new(image, record, *smaller, &mut input, growth)?;
    match attempt(&mut tar, &larger, &larger_record, lowers, options, BlockSize::LARGEST) {
        Ok(summary) => Ok(summary),
        Err(Stopped::Failed(error)) => Err(error),
        Err(Stopped::TooSmall(stopped)) => Err(stopped.error),
    }
}

/// One pass over a tar, in blocks of one size.
fn attempt<W: WriteAt, S: WriteAt>(
    input: &mut dyn Read,
    image: &W,
    record: &S,
    lowers: &mut dyn LowerLayers,
    options: &ApplyOptions,
    block_size: BlockSize,
) -> Result<ApplySummary, Stopped> {
    let image = match &options.verity {
        Verity::None => TreeDisk::plain(image),
        Verity::Tree { scratch } => {
            TreeDisk::hashing(image, scratch.clone()).map_err(DiffError::io("starting the hashing thread"))?
        }
    };
    let done = match options.profile {
        Profile::Default => {
            let mut settings = options.writer;
            settings.block_size = block_size;
            settings.max_image_bytes = settings.max_image_bytes.min(largest_image(options));
            if settings.uuid == UuidSource::FromContent {
                // The tar's digest stands for the data: they need not be summed a second time.
                settings.uuid = UuidSource::FromSource;
            }
            let layer = Layer::new(ImageWriter::new(&image, settings)?, options);
            run(input, &image, record, layer, lowers, options)
        }
        Profile::Hcsshim(profile) => {
            let layer = HcsshimLayer::new(&image, profile, options)?;
            run(input, &image, record, layer, lowers, options)
        }
    };
    if done.is_err() {
        image.abandon();
    }
    done
}

/// The most bytes that the file system can have so that its tree and footer find room behind it.
fn largest_image(options: &ApplyOptions) -> u64 {
    let max_disk = if options.footer { vhd::MAX_DISK_BYTES } else { MAX_RAW_BYTES };
    let tree = if matches!(options.verity, Verity::None) { 0 } else { verity_tree::tree_bytes(max_disk) };
    max_disk - tree
}

fn run<W: WriteAt, S: WriteAt, V: WriteAt + 'static, T: Target>(
    input: &mut dyn Read,
    image: &TreeDisk<W, V>,
    record: S,
    mut layer: T,
    lowers: &mut dyn LowerLayers,
    options: &ApplyOptions,
) -> Result<ApplySummary, Stopped> {
    let mut reader = TarReader::from_source(HashedChunks::new(input, options.told_digest.clone()));
    let mut record = RecordWriter::new(record)?;
    let read = read_all(&mut reader, &mut record, &mut layer, options)
        .and_then(|entries| Ok((entries, layer.settle(lowers)?)));
    let (entries, diff_size) = match read {
        Ok(read) => read,
        Err(error) if error.larger_blocks_help() => {
            layer.flush()?;
            let (record, rest) = (record.break_off()?, reader.unreported().to_vec());
            let digest = reader.into_source().so_far().map_err(DiffError::io("hashing the tar"))?;
            return Err(Stopped::TooSmall(Box::new(TooSmall { error, record, rest, digest })));
        }
        Err(error) => return Err(error.into()),
    };
    let tar_bytes = reader.offset();
    let tar_digest = reader.into_source().finish().map_err(DiffError::io("hashing the tar"))?;
    let summary = layer.finish(tar_digest.bytes)?;
    // Where the profile gives the file system no id, the disk's is that of the tar.
    let uuid = vhd::layer_id(summary.uuid, &tar_digest.bytes);
    let (disk_bytes, verity_root) = append_tree(image, summary.image_bytes, uuid)?;
    let file_bytes =
        if options.footer { append_footer(image, disk_bytes, uuid, options.profile)? } else { disk_bytes };
    let record_bytes = record.finish(tar_digest, summary.image_bytes)?;
    Ok(ApplySummary {
        image_bytes: summary.image_bytes,
        file_bytes,
        diff_size,
        tar_bytes,
        tar_digest,
        record_bytes,
        uuid: summary.uuid,
        entries,
        verity_root,
    })
}

/// Gives every entry of the tar its place, and every byte of it to the record; the number of entries.
fn read_all<R: Read, S: WriteAt, T: Target>(
    reader: &mut TarReader<HashedChunks<R>>,
    record: &mut RecordWriter<S>,
    layer: &mut T,
    options: &ApplyOptions,
) -> Result<u64, DiffError> {
    let mut open = false;
    let mut entries = 0u64;
    loop {
        match reader.next_event()? {
            Event::Raw(bytes) => record.literal(bytes),
            Event::Entry(entry) => {
                if open {
                    layer.end_file()?;
                }
                entries += 1;
                open = match layer.entry(entry)? {
                    Placement::Data(node) => {
                        layer.begin_file(node, entry.size)?;
                        true
                    }
                    Placement::Nothing => false,
                };
                record.check()?;
                let limit = options.max_tar_bytes;
                if entry.offset > limit || entry.stored > limit {
                    return Err(layer.limit("bytes of tar", limit));
                }
                if open && entry.stored > largest_image(options) {
                    let what = if options.footer {
                        "bytes of image (a fixed vhd has at most 2040 GiB)"
                    } else {
                        "bytes of image (at most 16 TiB)"
                    };
                    return Err(layer.limit(what, largest_image(options)));
                }
            }
            Event::Data { bytes, .. } if !open => record.literal(bytes),
            Event::Data { offset, bytes } => {
                let mut rest = bytes;
                let record = &mut *record;
                layer.write_data(offset, bytes, &mut |placed| {
                    let len = match placed {
                        Placed::At { len, .. } | Placed::Inline { len } => len,
                    };
                    let (now, later) =
                        rest.split_at(usize::try_from(len).map_or(rest.len(), |n| n.min(rest.len())));
                    rest = later;
                    match placed {
                        Placed::At { image_offset, .. } => record.image(image_offset, now.len() as u64),
                        Placed::Inline { .. } => record.literal(now),
                    }
                })?;
                record.check()?;
            }
            Event::End => break,
        }
        if let Some(n) = reader.trailing_bytes()
            && n > options.max_trailing_bytes
        {
            return Err(layer.limit("bytes behind the end of the archive", options.max_trailing_bytes));
        }
    }
    if open {
        layer.end_file()?;
    }
    if record.tar_bytes() != reader.offset() {
        return Err(DiffError::Usage(format!(
            "the exact record has {} of {} bytes: the image writer lost some",
            record.tar_bytes(),
            reader.offset()
        )));
    }
    layer.end_of_stream(reader.go_differs())?;
    Ok(entries)
}

/// Puts the hash tree, if one is wanted, behind the image; the size of the disk and the root.
fn append_tree<W: WriteAt, S: WriteAt + 'static>(
    image: &TreeDisk<W, S>,
    image_bytes: u64,
    mut uuid: [u8; 16],
) -> Result<(u64, Option<verity_tree::Hash>), DiffError> {
    // The super block needs a UUID of its own: tools find disks by it.
    uuid[0] = !uuid[0];
    Ok(match image.finish(image_bytes, uuid)? {
        None => (image_bytes, None),
        Some(tree) => (tree.end, Some(tree.root)),
    })
}

/// Puts the VHD footer behind the disk; the size of the file.
fn append_footer<W: WriteAt>(
    image: &W,
    disk_bytes: u64,
    uuid: [u8; 16],
    profile: Profile,
) -> Result<u64, DiffError> {
    // The time is the epoch and the id that of the file system: equal tars give equal files.
    let footer = Footer::new(disk_bytes, 0, uuid)?;
    let bytes = match profile {
        Profile::Default => footer.to_bytes(),
        Profile::Hcsshim(_) => footer.to_bytes_hcsshim(),
    };
    let file_bytes = disk_bytes + vhd::FOOTER_SIZE as u64;
    image
        .write_all_at(&bytes, disk_bytes)
        .and_then(|()| image.set_len(file_bytes))
        .map_err(DiffError::io("writing the vhd footer"))?;
    Ok(file_bytes)
}
