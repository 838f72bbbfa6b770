//! Apply: one streaming pass from a layer's tar to an ext4 image in a VHD, with the exact record written alongside.
//!
//! ```text
//!   input ─► chunks ─┬─► TarReader ─┬─ Entry ─► Layer (names, whiteouts, links) ─► ImageWriter ─► image ─► VHD footer
//!                    │              ├─ Data ──────────────────────────────────────►│  │ Placed::At → image op
//!                    │              │                                                 └ Placed::Inline → literal op
//!                    │              └─ Raw ───────────────────────────────────────────► literal op     ─► record
//!                    └─► digest on a second thread (or sent) ──────────────────────────────────► trailer        ─► record
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
//! | a parent that is missing | – | directory 0755 root:root, time 0, or like that of a layer below ([`LowerUse`]); a later entry of that name sets its attributes |
//! | a parent that is a symlink | – | followed inside the layer's root (`..` stops there), at most 40 hops, missing targets made as directories: as dockerd's unpack does in its chroot |
//! | a parent that is a whiteout | – | an opaque directory replaces it |
//! | a parent that is anything else | – | error |
//! | a directory | a directory | merged: attributes of the new one, xattrs of both, the new one's before the old one's |
//! | a directory | a whiteout | an opaque directory: what the whiteout hid stays hidden |
//! | anything | anything else | replaced |
//! | `.wh.NAME` or device 0/0 `NAME` | anything | `NAME` is removed and a whiteout left |
//! | `.wh..wh..opq` | – | its directory gets `trusted.overlay.opaque=y`, before or after other entries |
//! | other `.wh..wh.*`, at any depth | – | AUFS's own: skipped; files of `/.wh..wh.plnk` can be link targets |
//! | a hard link | its target | one more name (a symlink itself is linked, not what it points to); mode, owner, times and xattrs of the link's header hold for all names |
//! | a hard link | no target yet | decided at the end: this layer first, then a copy from the layers below (which has the target's name too), else an error |
//!
//! What no system call could have put into a file system is dropped, mapped or refused: [`kernel`]. How other tools
//! read the same tar: `docs/tar-rules.md`. Called by `svm-agent` and the
//! `layer` commands; [`LayerChain`] implements [`LowerLayers`].

mod chain;
mod context;
mod descent;
pub mod flat;
mod growth;
mod hcsshim;
mod implied;
mod input;
pub mod kernel;
mod layer;
mod links;
mod lower;
mod name;
mod opened;
mod options;
mod owner;
mod pending;
mod target;
mod tree;
mod usage;

pub use chain::LayerChain;
pub use growth::{Growth, NoGrowth};
pub use lower::{LowerLayers, LowerNode, NoLowers};
pub use options::{
    ApplyLimits, ApplyOptions, ApplyResources, ApplySummary, HcsshimProfile, LowerUse, MAX_RAW_BYTES, NAMES,
    Profile, TAR_BYTES, ToldDigest, UnknownProfile,
};
pub use owner::check_owners;

use crate::{DiffError, RootHash, record::RecordWriter};
use disk_io::WriteAt;
use ext4_image::{
    BlockSize,
    writer::{ImageWriter, Placed, UuidSource, WriterOptions},
};
use growth::{Resumed, Stopped, TooSmall};
use hcsshim::HcsshimLayer;
use input::HashedChunks;
use layer::DefaultLayer;
use layer_tar::{Event, TarReader};
use std::io::Read;
use target::{Placement, Target};
use uuid::Uuid;
use verity_tree::{self, TreeDisk};
use vhd_image::vhd::{self, Footer};

/// Applies `input` to an empty `image` and an empty `record`, in blocks of the requested size.
///
/// `lowers` is used only where the layer itself does not say everything: see [`LowerUse`].
///
/// # Errors
/// [`DiffError`]; image and record are then useless.
pub fn apply<I: Read, W: WriteAt, S: WriteAt>(
    input: I,
    image: W,
    record: S,
    lowers: &mut dyn LowerLayers,
    options: &ApplyOptions,
) -> Result<ApplySummary, DiffError> {
    apply_growing(input, image, record, lowers, options, &ApplyResources::default(), &mut NoGrowth)
}

/// As [`apply`], but starts again with larger blocks, on the disks that `growth` gives, if an entry needs them: see
/// [`Growth`].
///
/// # Errors
/// [`DiffError`]; image and record are then useless.
pub fn apply_growing<I: Read, W: WriteAt, S: WriteAt>(
    mut input: I,
    image: W,
    record: S,
    lowers: &mut dyn LowerLayers,
    options: &ApplyOptions,
    resources: &ApplyResources,
    growth: &mut dyn Growth<W, S>,
) -> Result<ApplySummary, DiffError> {
    let block_size = BlockSize::from_bytes(options.block_size).ok_or_else(|| {
        let found = options.block_size;
        DiffError::Usage(format!("blocks of {found} bytes: 1024, 2048 or 4096 "))
    })?;
    let smaller = match attempt(&mut input, &image, &record, lowers, options, resources, block_size) {
        Ok(summary) => return Ok(summary),
        Err(Stopped::Failed(error)) => return Err(error),
        Err(Stopped::TooSmall(stopped)) => stopped,
    };
    let Some((larger, larger_record)) = growth.disks()? else { return Err(smaller.error) };
    let mut tar = Resumed::new(image, record, *smaller, &mut input, growth)?;
    match attempt(&mut tar, &larger, &larger_record, lowers, options, resources, BlockSize::LARGEST) {
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
    resources: &ApplyResources,
    block_size: BlockSize,
) -> Result<ApplySummary, Stopped> {
    let image = if options.verity {
        TreeDisk::hashing(image, resources.scratch.clone())
            .map_err(DiffError::io("starting the hashing thread"))?
    } else {
        TreeDisk::plain(image)
    };
    let input = HashedChunks::new(input, resources.told_digest.clone());
    let done = match options.profile {
        Profile::Default => {
            let settings = WriterOptions {
                block_size,
                max_image_bytes: options.max_image_bytes.min(largest_image(options)),
                // The tar's digest covers the data: they need not be hashed a second time.
                uuid: UuidSource::FromSource,
                inline_data: options.inline_data,
                ..WriterOptions::default()
            };
            let layer = DefaultLayer::new(ImageWriter::new(&image, settings)?, options);
            run(input, &image, record, layer, lowers, options)
        }
        Profile::Hcsshim => {
            let layer = HcsshimLayer::new(&image, options)?;
            run(input, &image, record, layer, lowers, options)
        }
    };
    if done.is_err() {
        image.abandon();
    }
    done
}

/// The largest file system that leaves room for its tree and footer; bytes.
fn largest_image(options: &ApplyOptions) -> u64 {
    let max_disk = if options.footer { vhd::MAX_DISK_BYTES } else { MAX_RAW_BYTES };
    let tree = if options.verity { verity_tree::tree_bytes(max_disk) } else { 0 };
    max_disk - tree
}

fn run<W: WriteAt, S: WriteAt, V: WriteAt + 'static, T: Target>(
    input: HashedChunks<&mut dyn Read>,
    image: &TreeDisk<W, V>,
    record: S,
    mut layer: T,
    lowers: &mut dyn LowerLayers,
    options: &ApplyOptions,
) -> Result<ApplySummary, Stopped> {
    let mut reader = TarReader::from_source(input);
    let mut record = RecordWriter::new(record)?;
    let read = read_all(&mut reader, &mut record, &mut layer, options)
        .and_then(|entries| Ok((entries, layer.settle(lowers)?)));
    let (entries, settled) = match read {
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
    // If the profile gives the file system no id, the id of the disk is derived from the tar.
    let uuid = vhd::layer_id(summary.uuid, &tar_digest.bytes);
    let (disk_bytes, verity_root) = append_tree(image, summary.image_bytes, uuid)?;
    let file_bytes =
        if options.footer { append_footer(image, disk_bytes, uuid, options.profile)? } else { disk_bytes };
    let record_bytes = record.finish(tar_digest, summary.image_bytes)?;
    Ok(ApplySummary {
        image_bytes: summary.image_bytes,
        file_bytes,
        diff_size: settled.diff_size,
        tar_bytes,
        tar_digest,
        record_bytes,
        uuid: Uuid::from_bytes(summary.uuid),
        entries,
        verity_root: verity_root.map(RootHash),
        implied_directories: settled.implied_directories,
        lower_links: settled.lower_links,
        usage_bytes: settled.usage.bytes,
        usage_inodes: settled.usage.inodes,
    })
}

/// Adds every entry of the tar to the layer and every byte to the record; gives the number of entries.
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
                let limit = options.limits.tar_bytes;
                if entry.offset > limit || entry.stored > limit {
                    return Err(layer.limit(TAR_BYTES, limit));
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
            && n > options.limits.trailing_bytes
        {
            return Err(layer.limit("bytes behind the end of the archive", options.limits.trailing_bytes));
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

/// Appends the hash tree, if requested; gives the size of the disk and the root.
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

/// Appends the VHD footer; gives the size of the file.
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
        Profile::Hcsshim => footer.to_bytes_hcsshim(),
    };
    let file_bytes = disk_bytes + vhd::FOOTER_SIZE as u64;
    image
        .write_all_at(&bytes, disk_bytes)
        .and_then(|()| image.set_len(file_bytes))
        .map_err(DiffError::io("writing the vhd footer"))?;
    Ok(file_bytes)
}
