//! `image pack`: an image becomes one disk with the merged tree, or one file for each layer.
//!
//! ```text
//!   SRC ─► layers, the topmost first ─► Ahead (a thread of its own) ─► flatten ─► DiskFile ─► OUT
//!      └─► config, digests ──────────────────────────────────────────────┴─► OUT.json, OUT.b3sums.zst
//! ```
//!
//! All files are written under temporary names, synced, and renamed when everything is there, OUT last. Nothing that differs from run to run or machine to machine is written: no path, no time but
//! SOURCE_DATE_EPOCH. Called by the parent module.

use super::{
    SourceArgs,
    ahead::Ahead,
    disk::{DiskFile, DiskFormat, format_of},
    files::{FILES_SUFFIX, FileList, JSON_SUFFIX},
    ids,
    open::{self, Opened},
    source,
};
use crate::cli::{
    CliError,
    confined::Grants,
    layer::{
        bar,
        failure::{failed, shown},
        output::NewFile,
    },
    output::{print, print_json},
};
use bytesize::ByteSize;
use clap::Args;
use disk_io::{ReadAt, WriteAt};
use ext4_image::{
    BlockSize,
    writer::{ImageSize, JournalSize, Writable},
};
use indicatif::ProgressBar;
use layer_codec::{
    DiffError, IdRange, RootHash,
    apply::{ApplyLimits, NAMES, TAR_BYTES},
    flat::{self, FlatOptions, FlatSummary, flatten},
};
use oci_image::{Image, Source};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use std::{
    ffi::OsString,
    fmt::Write as _,
    io::{self, Read, Seek as _, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

/// Version of OUT.json.
pub(super) const DESCRIPTION_VERSION: u32 = 1;

#[derive(Debug, Args)]
pub(in crate::cli) struct PackArgs {
    #[command(flatten)]
    pub(super) source: SourceArgs,
    /// Format of OUT; by default, that of its extension (.img, .raw, .ext4, .vhd, .vhdx, .qcow2).
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub(super) format: Option<DiskFormat>,
    /// Makes a writable file system of this size (`20GiB`): blocks of 4 KiB, a journal, room for more; its guest can grow
    /// it. Without --size and --headroom the file system is read-only and ends with its content.
    #[arg(long, value_name = "SIZE", conflicts_with = "headroom")]
    size: Option<ByteSize>,
    /// Makes a writable file system with this much of what the content takes left free (`25%`).
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    headroom: Option<u32>,
    /// Size of a writable file system's journal, 4MiB to 1GiB, or `none`; chosen by the size of the file system by default.
    #[arg(long, value_name = "SIZE", value_parser = journal)]
    journal: Option<JournalSize>,
    /// Keeps small files and directories in inodes of 512 bytes (inline data). A file system that is read-only always does.
    #[arg(long)]
    inline_data: bool,
    /// Appends a dm-verity hash tree to a read-only file system and shows its root hash.
    #[arg(long)]
    verity: bool,
    /// Block size of a read-only file system: 1KiB, 2KiB or 4KiB. A disk with sectors of 4096 bytes needs 4KiB; 4KiB is
    /// used anyway if an entry needs it.
    #[arg(long, value_name = "SIZE", value_parser = crate::cli::layer::block_size)]
    block_size: Option<BlockSize>,
    /// Writes a file for each layer and a list, `layers.json`, into the new directory OUT, for those who stack them.
    #[arg(long, conflicts_with_all = ["size", "headroom", "journal", "sha256", "require_init", "uid_map", "gid_map"])]
    pub(super) layers: bool,
    /// Shifts owners: users FIRST to FIRST+COUNT-1 of the image become HOST to HOST+COUNT-1; can be repeated. An owner in
    /// none of the ranges is an error.
    #[arg(long, value_name = "FIRST:HOST:COUNT", value_parser = ids::id_range)]
    uid_map: Vec<IdRange>,
    /// The same for groups; by default, the ranges of --uid-map.
    #[arg(long, value_name = "FIRST:HOST:COUNT", value_parser = ids::id_range, requires = "uid_map")]
    gid_map: Vec<IdRange>,
    /// Also writes the SHA-256 of OUT to this file, as sha256sum does.
    #[arg(long, value_name = "FILE")]
    sha256: Option<PathBuf>,
    /// Fails unless this path of the image leads to an executable file.
    #[arg(long, value_name = "PATH")]
    require_init: Option<PathBuf>,
    /// Time of the file system's own fields: seconds since 1970.
    #[arg(long, env = "SOURCE_DATE_EPOCH", value_name = "SECONDS", default_value_t = 0)]
    source_date_epoch: u32,
    /// Prints what OUT.json holds.
    #[arg(long)]
    pub(super) json: bool,
    /// The image, as for `ls`.
    #[arg(value_name = "SRC", value_parser = source)]
    pub(super) image: Source,
    /// The disk to write; replaced if it exists. OUT.json and OUT.b3sums.zst are written beside it.
    #[arg(value_name = "OUT")]
    pub(super) output: PathBuf,
}

impl PackArgs {
    /// Names what is written.
    pub(super) fn name_outputs(&self, grants: &mut Grants) -> Result<(), CliError> {
        if self.layers {
            grants.directory = Some(self.output.clone());
            return Ok(());
        }
        format_of(self.format, &self.output)?;
        let mut files = vec![self.output.clone(), beside(&self.output, FILES_SUFFIX)];
        files.push(beside(&self.output, JSON_SUFFIX));
        files.extend(self.sha256.clone());
        for (n, file) in files.iter().enumerate() {
            if files.get(..n).is_some_and(|before| before.contains(file)) {
                return Err(format!("{} would be written twice; name another file", shown(file)).into());
            }
        }
        grants.files = files;
        Ok(())
    }

    /// Block size of a read-only file system.
    pub(super) fn block_size(&self) -> BlockSize {
        self.block_size.unwrap_or_default()
    }

    /// What is refused of the layers.
    pub(super) fn limits(&self) -> ApplyLimits {
        ApplyLimits {
            entries: self.source.max_entries as u64,
            tar_bytes: self.source.max_size.as_u64(),
            ..ApplyLimits::default()
        }
    }

    /// Whether a hash tree is wanted.
    pub(super) fn verity(&self) -> bool {
        self.verity
    }
}

/// Parses a percentage.
fn percent(text: &str) -> Result<u32, String> {
    let number = text.strip_suffix('%').ok_or("expected a percentage, for example 25%")?;
    number.trim().parse().map_err(|_| "expected a whole number before the %".to_owned())
}

/// Parses a journal's size.
fn journal(text: &str) -> Result<JournalSize, String> {
    if text == "none" {
        return Ok(JournalSize::None);
    }
    let size: ByteSize = text.parse()?;
    Ok(JournalSize::Bytes(size.as_u64()))
}

/// OUT.json: what the disk holds and where it comes from. Nothing in it depends on the machine.
#[derive(Debug, Serialize)]
struct Description {
    version: u32,
    image: Origin,
    /// What a container of the image would run.
    config: oci_image::RunConfig,
    disk: DiskFacts,
    #[serde(skip_serializing_if = "Option::is_none")]
    verity: Option<Verified>,
    /// Name of the list of files beside it.
    files: String,
    /// Lines of the list.
    files_listed: u64,
    packed: Packed,
}

/// The image.
#[derive(Debug, Serialize)]
pub(super) struct Origin {
    /// Digest of its configuration, which Docker calls the image's id.
    config_digest: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    manifest_digest: Option<String>,
    platform: String,
    /// The lowest first.
    layers: Vec<OriginLayer>,
}

#[derive(Debug, Serialize)]
struct OriginLayer {
    digest: String,
    diff_id: String,
    size: u64,
}

impl Origin {
    pub(super) fn of(image: &Image) -> Self {
        let layers = image.layers().iter().map(|layer| OriginLayer {
            digest: layer.descriptor.digest.to_string(),
            diff_id: layer.diff_id.to_string(),
            size: layer.descriptor.size,
        });
        Self {
            config_digest: image.config().digest.to_string(),
            manifest_digest: image.manifest().map(|m| m.descriptor.digest.to_string()),
            platform: image.config().platform.to_string(),
            layers: layers.collect(),
        }
    }
}

/// Sizes in bytes.
#[derive(Debug, Serialize)]
struct DiskFacts {
    format: DiskFormat,
    /// Length of the file; a sparse one takes less.
    file_bytes: u64,
    disk_bytes: u64,
    file_system_bytes: u64,
    used_bytes: u64,
    block_size: u32,
    inodes: u64,
    uuid: uuid::Uuid,
    writable: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    uid_map: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    gid_map: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
}

/// The hash tree.
#[derive(Debug, Serialize)]
struct Verified {
    root_hash: RootHash,
    /// Offset of its super block on the disk, in bytes.
    hash_offset: u64,
}

/// What was read and left out.
#[derive(Debug, Serialize)]
struct Packed {
    layers_read: usize,
    /// Layers that were read a second time, for links to hidden files.
    second_reads: usize,
    entries: u64,
    tar_bytes: u64,
    file_bytes: u64,
    shadowed_files: u64,
    shadowed_bytes: u64,
}

pub(super) fn pack(args: &PackArgs) -> Result<ExitCode, CliError> {
    let format = format_of(args.format, &args.output)?;
    let options = options(args, format)?;
    let Opened { image, name } = open::open(0, &args.image, &args.source)?;
    let mut options = FlatOptions { source: Some(source_digest(&image)), ..options };
    let (json_path, files_path) = (beside(&args.output, JSON_SUFFIX), beside(&args.output, FILES_SUFFIX));
    let out = DiskFile::create(&args.output, format)?;
    let bar = bar(None);
    let result = fill(&image, &out, &mut options, &files_path, &bar);
    bar.finish_and_clear();
    let (done, files, files_listed) = result.map_err(|e| failed_to_pack(&name, &*e))?;
    let file_bytes = out.complete(done.disk_bytes, done.uuid)?;
    let sum = args.sha256.as_deref().map(|path| checksum(path, &args.output, out.file())).transpose()?;
    let description = Description {
        version: DESCRIPTION_VERSION,
        image: Origin::of(&image),
        config: image.config().config.clone(),
        disk: DiskFacts {
            format,
            file_bytes,
            disk_bytes: done.disk_bytes,
            file_system_bytes: done.image_bytes,
            used_bytes: done.used_bytes,
            block_size: options.block_size,
            inodes: done.inodes,
            uuid: done.uuid,
            writable: options.writable.is_some(),
            uid_map: ids::texts(&options.id_maps.uids),
            gid_map: ids::texts(&options.id_maps.gids),
            sha256: sum.as_ref().map(|(_, hex)| hex.clone()),
        },
        verity: done
            .verity_root
            .map(|root_hash| Verified { root_hash, hash_offset: verity_tree::hash_offset(done.image_bytes) }),
        files: file_name(&files_path),
        files_listed,
        packed: Packed {
            layers_read: done.layers_read,
            second_reads: done.second_reads,
            entries: done.entries,
            tar_bytes: done.tar_bytes,
            file_bytes: done.file_bytes,
            shadowed_files: done.shadowed_files,
            shadowed_bytes: done.shadowed_bytes,
        },
    };
    let mut text = serde_json::to_string_pretty(&description)?;
    text.push('\n');
    let json = NewFile::create(&json_path)?;
    json.file().write_all(text.as_bytes()).map_err(|e| failed("write", &json_path, &e))?;
    files.commit()?;
    json.commit()?;
    if let Some((sum, _)) = sum {
        sum.commit()?;
    }
    out.commit()?;
    report(args, &description)?;
    Ok(ExitCode::SUCCESS)
}

/// Fills the disk; starts anew with larger blocks if an entry needs them. Gives the list of files, too, and its lines.
fn fill(
    image: &Image,
    out: &DiskFile,
    options: &mut FlatOptions,
    files_path: &Path,
    bar: &ProgressBar,
) -> Result<(FlatSummary, NewFile, u64), CliError> {
    let files = NewFile::create(files_path)?;
    loop {
        // Then nothing can make it start anew, and no layer is read after the next one was opened.
        let final_size = options.block_size == BlockSize::LARGEST.bytes();
        let disk = out.disk()?;
        let mut list = FileList::new(io::BufWriter::new(files.file()))?;
        let scratch: Option<Arc<dyn WriteAt>> =
            if options.verity { Some(Arc::new(out.scratch()?)) } else { None };
        let mut open = |number: usize| -> io::Result<Box<dyn Read>> {
            if final_size {
                let end = number + 1;
                image.keep_layers(0..end);
            }
            let layer = image.open_layer(number)?;
            Ok(Box::new(Ahead::new(bar.wrap_read(layer))?))
        };
        let mut add = |file: flat::FlatFile<'_>| list.add(&file);
        match flatten(image.layers().len(), &mut open, &disk, scratch, options, Some(&mut add)) {
            Ok(done) => {
                let listed = list.finish()?;
                return Ok((done, files, listed));
            }
            Err(e) if e.larger_blocks_help() && options.block_size != BlockSize::LARGEST.bytes() => {
                disk.set_len(0)?;
                files.file().set_len(0)?;
                files.file().rewind()?;
                bar.set_position(0);
                options.block_size = BlockSize::LARGEST.bytes();
            }
            Err(e) => return Err(e.into()),
        }
    }
}

fn options(args: &PackArgs, format: DiskFormat) -> Result<FlatOptions, CliError> {
    let size = match (args.size, args.headroom) {
        (Some(size), _) => Some(ImageSize::Bytes(size.as_u64())),
        (None, Some(percent)) => Some(ImageSize::Headroom(percent)),
        (None, None) => None,
    };
    let writable = size.map(|size| Writable { size, journal: args.journal.unwrap_or_default() });
    if writable.is_none() && args.journal.is_some() {
        return Err("--journal requires --size or --headroom: a read-only file system has no journal".into());
    }
    if writable.is_some() && args.verity {
        return Err(
            "--verity cannot be combined with --size or --headroom: every write would break the tree".into(),
        );
    }
    let block_size = match (writable, args.block_size) {
        (Some(_), Some(size)) if size != BlockSize::LARGEST => {
            return Err("a writable file system has blocks of 4KiB; leave out --block-size".into());
        }
        (Some(_), _) => BlockSize::LARGEST,
        (None, _) => args.block_size(),
    };
    Ok(FlatOptions {
        block_size: block_size.bytes(),
        inline_data: args.inline_data || writable.is_none(),
        writable,
        verity: args.verity,
        max_image_bytes: format.most(),
        id_maps: ids::maps(&args.uid_map, &args.gid_map),
        limits: args.limits(),
        made_at: args.source_date_epoch,
        source: None,
        require: args.require_init.as_ref().map(|path| path.to_string_lossy().into_owned().into_bytes()),
        contents: true,
    })
}

/// What the UUID of the file system is derived from, besides its metadata: the layers.
fn source_digest(image: &Image) -> [u8; 32] {
    let mut digest = Sha256::new();
    for layer in image.layers() {
        digest.update(layer.diff_id.to_string());
        digest.update("\n");
    }
    digest.finalize().into()
}

/// `cannot pack NAME`, and the causes.
pub(super) fn failed_to_pack(name: &str, error: &(dyn std::error::Error + 'static)) -> CliError {
    if let Some(broken) = open::image_error(error) {
        return open::failed("pack", name, broken);
    }
    let mut text = format!("cannot pack {name}");
    let mut cause = Some(error);
    while let Some(inner) = cause {
        // Writing to a String cannot fail.
        let _ = write!(text, ": {inner}");
        // The source of an error of a layer is a box.
        let known = inner.downcast_ref::<DiffError>();
        let known = known.or_else(|| inner.downcast_ref::<Box<DiffError>>().map(|boxed| &**boxed));
        if let Some(option) = known.and_then(raised_by) {
            let _ = write!(text, "; raise {option}");
        }
        cause = inner.source();
    }
    text.into()
}

/// The option that raises a limit.
fn raised_by(error: &DiffError) -> Option<&'static str> {
    match error {
        DiffError::Limit { what: NAMES | flat::ALL_ENTRIES, .. } => Some("--max-entries"),
        DiffError::Limit { what: TAR_BYTES | flat::ALL_TAR_BYTES, .. } => Some("--max-size"),
        _ => None,
    }
}

/// A name that begins with that of `path`.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Writes the SHA-256 of a file in the form of sha256sum; gives the digits, too.
fn checksum(path: &Path, output: &Path, file: &std::fs::File) -> Result<(NewFile, String), CliError> {
    /// Bytes read at a time.
    const CHUNK: usize = 1 << 20;
    let mut digest = Sha256::new();
    let (mut buffer, mut at) = (vec![0; CHUNK], 0);
    loop {
        let n = ReadAt::read_at(file, &mut buffer, at).map_err(|e| failed("read", output, &e))?;
        if n == 0 {
            break;
        }
        digest.update(&buffer[..n]);
        at += n as u64;
    }
    let hex = digest.finalize().iter().fold(String::new(), |mut hex, byte| {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    let line = format!("{hex}  {}\n", file_name(output));
    let sum = NewFile::create(path)?;
    sum.file().write_all(line.as_bytes()).map_err(|e| failed("write", path, &e))?;
    Ok((sum, hex))
}

fn report(args: &PackArgs, d: &Description) -> Result<(), CliError> {
    if args.json {
        return print_json(d);
    }
    let mut text = format!(
        "packed {}: {} layers, {} entries, {} of tar, {} of files\n  image  {}, {} ({} in use), uuid {}\n",
        d.image.config_digest,
        d.packed.layers_read,
        d.packed.entries,
        ByteSize(d.packed.tar_bytes),
        ByteSize(d.packed.file_bytes),
        shown(&args.output),
        ByteSize(d.disk.file_bytes),
        ByteSize(d.disk.used_bytes),
        d.disk.uuid,
    );
    // Writing to a String cannot fail.
    if d.packed.shadowed_files > 0 {
        let bytes = ByteSize(d.packed.shadowed_bytes);
        let _ = writeln!(text, "  hidden {} files, {bytes}, left out", d.packed.shadowed_files);
    }
    if let Some(verity) = &d.verity {
        let _ = writeln!(text, "  verity {}, hash offset {}", verity.root_hash, verity.hash_offset);
    }
    if let Some(sha256) = &d.disk.sha256 {
        let _ = writeln!(text, "  sha256 {sha256}");
    }
    print(&text)
}
