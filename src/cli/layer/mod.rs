//! `layer`: one layer on files, between tar and image.
//!
//! ```text
//!   IN.tar (plain, gzip, zstd, or -) ──pack──► OUT.vhd + RECORD          pack    input, output
//!   IMAGE (+ RECORD) ──unpack, diff──► tar                               unpack  image, output
//!   IMAGE ──inspect, ls, cat, verify──► what it holds                    show    image, verify
//!   IMAGE ──convert──► raw, VHD, VHDX         IMAGE ──mount──► DIRECTORY     convert, mount
//!   DISK  ──grow, compact──► the same disk    SRC ──clone──► DST             grow, compact, clone: target
//! ```
//!
//! All work but that of `mount`, `grow`, `compact` and `clone` is done in a jailed process that has no rights of its own and can open the files that the
//! command line names, and nothing else ([`super::confined`]). Output files appear whole or not at all: they are written
//! under a temporary name in the same directory, synced, and renamed. Called by [`super::run`].

mod clone;
mod compact;
mod convert;
pub(super) mod failure;
mod foreign;
mod grow;
pub(super) mod image;
pub(super) mod input;
#[cfg(target_os = "linux")]
mod mount;
pub(super) mod output;
pub(super) mod pack;
mod show;
mod target;
mod unpack;
mod verify;

pub(super) use input::bar;
pub(super) use output::standard_output;

use super::{
    CliError,
    confined::{self, Grants, JailArgs},
};
use bytesize::ByteSize;
use clap::{
    Args, Subcommand, ValueEnum,
    builder::{PossibleValue, PossibleValuesParser, TypedValueParser},
};
use ext4_image::{BlockSize, hcsshim};
use layer_codec::{RootHash, apply::Profile};
use serde::Serialize;
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Exit status of a program whose output pipe was closed, as shells report it (128 + SIGPIPE).
pub(super) const CLOSED_PIPE: u8 = 141;

#[derive(Debug, Subcommand)]
pub(super) enum LayerCommand {
    /// Packs a tar into a layer image (ext4 in a fixed VHD). Gzip and zstd are recognized by their content.
    Pack(PackArgs),
    /// Unpacks a layer image into a tar: with --exact the original bytes, otherwise the canonical tar.
    Unpack(UnpackArgs),
    /// Describes an image: VHD footer, file system, counts.
    Inspect(InspectArgs),
    /// Converts an image into another disk format: raw, fixed VHD or dynamic VHDX.
    Convert(ConvertArgs),
    /// Makes a disk larger, and the file system on it. The disk must be attached nowhere; a journal in use is replayed first.
    /// A cut at any moment leaves the old or the new size.
    Grow(GrowArgs),
    /// Gives the host the space that the file system of a disk does not use. The disk must be attached nowhere; a journal in
    /// use is replayed first.
    Compact(CompactArgs),
    /// Copies a disk, with reflinks where the file system has them, and gives the copy an identity of its own: UUID of the
    /// file system, id of the VHD or VHDX.
    Clone(CloneArgs),
    /// Mounts an image on a directory, read-only (Linux, as root).
    #[cfg(target_os = "linux")]
    Mount(MountArgs),
    /// Lists a directory of an image, or one file.
    Ls(LsArgs),
    /// Writes a file of an image to standard output.
    Cat(CatArgs),
    /// Checks an image's metadata as strictly as the service does before mounting it, every block against its hash tree
    /// if it has one, and, with a record, all its data.
    Verify(VerifyArgs),
    /// Writes the changes from the PARENTs to IMAGE as a canonical tar (deleted names as `.wh.` files).
    Diff(DiffArgs),
}

/// Reads a profile; help and completions list the names.
fn profile() -> impl TypedValueParser<Value = Profile> {
    PossibleValuesParser::new([
        PossibleValue::new(Profile::Default.name())
            .help("Clean for e2fsck, 1 KiB blocks, small files inside their inodes, metadata checksums"),
        PossibleValue::new(Profile::Hcsshim.name()).help(
            "Byte for byte the ext4 that hcsshim's tar2ext4 makes, for hosts that identify layers by its root hashes",
        ),
    ])
    .try_map(|name| name.parse())
}

#[derive(Debug, Args)]
pub(super) struct PackArgs {
    /// The layout of the image.
    #[arg(long, value_parser = profile(), default_value_t = Profile::Default)]
    profile: Profile,
    /// Profile hcsshim: the maximum disk size; space is reserved for it, and the root hash depends on it. 16GiB is the
    /// default of tar2ext4, 128GiB the value that LCOW passes.
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize(hcsshim::DEFAULT_MAX_DISK))]
    max_disk: ByteSize,
    /// Profile hcsshim: stores files of up to 136 bytes in their inodes (tar2ext4 -inline).
    #[arg(long)]
    inline: bool,
    /// Profile hcsshim: keeps `.wh.` names instead of turning them into whiteouts (tar2ext4 without -overlay).
    #[arg(long)]
    keep_whiteouts: bool,
    /// Block size of the file system: 1KiB, 2KiB or 4KiB. Small blocks waste the least space; a disk with sectors of
    /// 4096 bytes needs 4KiB. If an entry needs larger blocks than given here, 4KiB is used: a symbolic link whose
    /// target is as long as a block, names of extended attributes that fill one, a file of 2^32 blocks. Profile hcsshim
    /// always has 4KiB.
    #[arg(long, value_name = "SIZE", default_value = "1KiB", value_parser = block_size)]
    block_size: BlockSize,
    /// Profile hcsshim: turns backslashes in names into slashes (tar2ext4 -convert-slash).
    #[arg(long)]
    convert_slash: bool,
    /// Leaves out the VHD footer and writes only the image, which may then be larger than a VHD (tar2ext4 without
    /// -vhd).
    #[arg(long)]
    raw: bool,
    /// Also writes the exact record, from which `unpack --exact` reproduces the tar's original bytes.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Appends a dm-verity hash tree to the file system and shows its root hash.
    #[arg(long)]
    verity: bool,
    /// Maximum size of the image (`500MiB`, `20GB`).
    /// At most 2040GiB, which is also the default; with --raw 16TiB.
    #[arg(long, value_name = "SIZE")]
    max_size: Option<ByteSize>,
    /// Prints the summary as JSON.
    #[arg(long)]
    json: bool,
    /// The tar; `-` is standard input.
    #[arg(value_name = "IN.tar")]
    input: PathBuf,
    /// The image to write; replaced if it exists.
    #[arg(value_name = "OUT.vhd")]
    output: PathBuf,
    #[command(flatten)]
    jail: JailArgs,
}

/// Parses a block size.
pub(super) fn block_size(text: &str) -> Result<BlockSize, String> {
    let size: ByteSize = text.parse()?;
    u32::try_from(size.as_u64())
        .ok()
        .and_then(BlockSize::from_bytes)
        .ok_or_else(|| "expected 1KiB, 2KiB or 4KiB".to_owned())
}

#[derive(Debug, Args)]
pub(super) struct UnpackArgs {
    /// The record that `pack --record` wrote with this image.
    #[arg(long, value_name = "RECORD")]
    exact: Option<PathBuf>,
    /// The image.
    image: PathBuf,
    /// The tar to write; `-` is standard output.
    #[arg(value_name = "OUT.tar", default_value = "-")]
    output: PathBuf,
    #[command(flatten)]
    jail: JailArgs,
}

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// Also shows this exact record.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
    /// The image.
    image: PathBuf,
    #[command(flatten)]
    jail: JailArgs,
}

/// A kind of file that holds a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum DiskFormat {
    /// The disk and nothing else.
    Raw,
    /// A fixed VHD: the disk and a footer.
    Vhd,
    /// A dynamic VHDX: only the blocks in use.
    Vhdx,
}

impl DiskFormat {
    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Vhd => "fixed vhd",
            Self::Vhdx => "dynamic vhdx",
        }
    }

    /// The format that a file name's extension stands for.
    fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "img" | "raw" => Some(Self::Raw),
            "vhd" => Some(Self::Vhd),
            "vhdx" => Some(Self::Vhdx),
            _ => None,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct ConvertArgs {
    /// Format of OUT; by default, that of its extension (.img, .raw, .vhd, .vhdx).
    #[arg(long = "to", value_enum, value_name = "FORMAT")]
    format: Option<DiskFormat>,
    /// Size of a VHDX's blocks: a power of two from 1 MiB (the default) to 256 MiB.
    #[arg(long, value_name = "SIZE")]
    block_size: Option<ByteSize>,
    /// Logical sectors of a VHDX: 512 (the default) or 4096.
    #[arg(long, value_name = "BYTES")]
    sector_size: Option<u32>,
    /// Prints the summary as JSON.
    #[arg(long)]
    json: bool,
    /// The image: raw, VHD or VHDX, recognized by its content.
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// The file to write; replaced if it exists.
    #[arg(value_name = "OUT")]
    output: PathBuf,
    #[command(flatten)]
    jail: JailArgs,
}

#[derive(Debug, Args)]
pub(super) struct GrowArgs {
    /// Prints the sizes before and afterwards as JSON.
    #[arg(long)]
    json: bool,
    /// The disk: raw, fixed VHD or dynamic VHDX, recognized by its content.
    disk: PathBuf,
    /// The size that the disk is to have (`200GiB`); a file system that would end with a group of almost no room is a
    /// little smaller.
    size: ByteSize,
}

#[derive(Debug, Args)]
pub(super) struct CompactArgs {
    /// Moves the blocks of a VHDX inside the file instead of writing a new one beside it; needs no space. Other disks are
    /// always changed in place: holes are punched into their files (Linux).
    #[arg(long)]
    in_place: bool,
    /// Prints the sizes before and afterwards as JSON.
    #[arg(long)]
    json: bool,
    /// The disk: raw, fixed VHD or dynamic VHDX, recognized by its content.
    disk: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct CloneArgs {
    /// Makes a read-only file system writable in the copy. Not for a disk with a hash tree.
    #[arg(long)]
    writable: bool,
    /// Makes the copy larger, as `layer grow` does. Not for a disk with a hash tree.
    #[arg(long, value_name = "SIZE")]
    size: Option<ByteSize>,
    /// Prints what was made as JSON.
    #[arg(long)]
    json: bool,
    /// The disk to copy: raw, fixed VHD or VHDX, which nothing may be writing to.
    #[arg(value_name = "SRC")]
    input: PathBuf,
    /// The file to write; replaced if it exists.
    #[arg(value_name = "DST")]
    output: PathBuf,
}

#[cfg(target_os = "linux")]
#[derive(Debug, Args)]
pub(super) struct MountArgs {
    /// Mounts a sandbox writable and replays its journal. Only its structure is checked first.
    #[arg(long)]
    write: bool,
    /// Mounts a sandbox read-only. Only its structure is checked first, and its journal must be clean.
    #[arg(long)]
    sandbox: bool,
    /// The image.
    image: PathBuf,
    /// The directory to mount it on.
    #[arg(value_name = "DIRECTORY")]
    folder: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct LsArgs {
    /// Also shows type, permissions, links, owner, size and time (UTC).
    #[arg(short = 'l', long)]
    long: bool,
    /// Prints JSON, with everything that -l shows and extended attributes.
    #[arg(long)]
    json: bool,
    /// The image.
    image: PathBuf,
    /// A path in the image.
    #[arg(default_value = "/")]
    path: String,
    #[command(flatten)]
    jail: JailArgs,
}

#[derive(Debug, Args)]
pub(super) struct CatArgs {
    /// The image.
    image: PathBuf,
    /// A file in the image; symbolic links are followed inside the image.
    path: String,
    #[command(flatten)]
    jail: JailArgs,
}

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// The exact record: the whole tar is read back from the image and its digest compared.
    #[arg(long, value_name = "RECORD")]
    record: Option<PathBuf>,
    /// The root hash that the image's hash tree must have (64 hexadecimal digits).
    #[arg(long, value_name = "HASH", value_parser = str::parse::<RootHash>)]
    root_hash: Option<RootHash>,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
    /// The image.
    image: PathBuf,
    #[command(flatten)]
    jail: JailArgs,
}

#[derive(Debug, Args)]
pub(super) struct DiffArgs {
    /// Writes the tar here; `-` is standard output.
    #[arg(long, short = 'o', value_name = "OUT.tar", default_value = "-")]
    output: PathBuf,
    /// The image of a whole file system.
    image: PathBuf,
    /// The layers to compare it with, stacked on each other, the topmost first.
    #[arg(value_name = "PARENT", required = true)]
    parents: Vec<PathBuf>,
    #[command(flatten)]
    jail: JailArgs,
}

impl LayerCommand {
    /// The jail that a command works in, and the files that it reads and writes there. `mount` has none: it acts on this
    /// machine, and checks the image before; nor have `grow`, `compact` and `clone`, which need the file itself.
    fn jail(&self) -> Option<(&JailArgs, Grants)> {
        let all = |first: &PathBuf, more: &[PathBuf]| {
            std::iter::once(first).chain(more).cloned().collect::<Vec<PathBuf>>()
        };
        let (jail, inputs, files) = match self {
            Self::Pack(a) => (&a.jail, all(&a.input, &[]), all(&a.output, a.record.as_slice())),
            Self::Unpack(a) => (&a.jail, all(&a.image, a.exact.as_slice()), all(&a.output, &[])),
            Self::Inspect(a) => (&a.jail, all(&a.image, a.record.as_slice()), Vec::new()),
            Self::Convert(a) => (&a.jail, all(&a.input, &[]), all(&a.output, &[])),
            // They change files in place, or ask the file system for a copy.
            Self::Grow(_) | Self::Compact(_) | Self::Clone(_) => return None,
            #[cfg(target_os = "linux")]
            Self::Mount(_) => return None,
            Self::Ls(a) => (&a.jail, all(&a.image, &[]), Vec::new()),
            Self::Cat(a) => (&a.jail, all(&a.image, &[]), Vec::new()),
            Self::Verify(a) => (&a.jail, all(&a.image, a.record.as_slice()), Vec::new()),
            Self::Diff(a) => (&a.jail, all(&a.image, &a.parents), all(&a.output, &[])),
        };
        Some((jail, Grants { inputs, files, ..Grants::default() }))
    }

    /// What only the process with the caller's terminal can see.
    fn refuse_terminals(&self) -> Result<(), CliError> {
        match self {
            Self::Pack(args) => input::refuse_terminal(&args.input),
            Self::Unpack(UnpackArgs { output, .. }) | Self::Diff(DiffArgs { output, .. }) => {
                output::refuse_terminal(output)
            }
            _ => Ok(()),
        }
    }
}

/// Runs a command; `arguments` are those of this program.
pub(super) fn run(command: &LayerCommand, arguments: &[OsString]) -> Result<ExitCode, CliError> {
    let work = || match command {
        LayerCommand::Pack(args) => pack::pack(args),
        LayerCommand::Unpack(args) => unpack::unpack(args),
        LayerCommand::Inspect(args) => show::inspect(args),
        LayerCommand::Convert(args) => convert::convert(args),
        LayerCommand::Grow(args) => grow::grow(args),
        LayerCommand::Compact(args) => compact::compact(args),
        LayerCommand::Clone(args) => clone::clone(args),
        #[cfg(target_os = "linux")]
        LayerCommand::Mount(args) => mount::mount(args),
        LayerCommand::Ls(args) => show::ls(args),
        LayerCommand::Cat(args) => unpack::cat(args),
        LayerCommand::Verify(args) => verify::verify(args),
        LayerCommand::Diff(args) => unpack::diff(args),
    };
    command.refuse_terminals()?;
    closed_pipe(match command.jail() {
        Some((jail, grants)) => confined::run(&grants, jail, arguments, work),
        None => work(),
    })
}

/// The exit status of a command whose reader closed the output, or its own result.
pub(super) fn closed_pipe(result: Result<ExitCode, CliError>) -> Result<ExitCode, CliError> {
    match result {
        Err(e) if failure::is_closed_pipe(&*e) => Ok(ExitCode::from(CLOSED_PIPE)),
        other => other,
    }
}
