//! `image`: whole container images, in layouts and archives.
//!
//! ```text
//!   SRC: oci:DIR[:REF]  oci-archive:FILE[:REF]  docker-archive:FILE[:NAME]  docker://HOST/NAME  -
//!    │ oci_image::Source
//!    ├─ ls, cat      the merged tree, which layer a file comes from, what is hidden     ls, cat
//!    ├─ inspect      configuration, layers, other platforms                             inspect
//!    ├─ diff         what two images differ in                                          diff
//!    ├─ pack         one disk with the merged tree, or a file for each layer            pack, layers, disk, files, ahead
//!    └─ commit       what was changed on a disk, as a layer on the image                commit, filter, ids, digests
//! ```
//!
//! Nothing is unpacked but by `pack`: layers are read as streams, and verified. All of this happens in a jailed process, which can open the
//! sources that the command line names and nothing else ([`super::confined`]). Called by [`super::run`].

mod ahead;
mod cat;
mod commit;
mod diff;
mod digests;
mod disk;
mod files;
mod filter;
mod ids;
mod inspect;
mod layers;
mod ls;
mod open;
mod pack;

use super::{
    CliError,
    confined::{self, Grants, JailArgs, Means},
    registry::{self, RegistryArgs},
};
use bytesize::ByteSize;
use clap::{Args, Subcommand, ValueEnum};
use layer_codec::IdRange;
use oci_image::{Limits, Platform, Source, tree::TreeOptions, write::Destination};
use std::{ffi::OsString, path::PathBuf, process::ExitCode};

#[derive(Debug, Subcommand)]
pub(super) enum ImageCommand {
    /// Lists what an image contains, all layers merged: a directory, or one file.
    Ls(LsArgs),
    /// Writes a file of an image to standard output.
    Cat(CatArgs),
    /// Describes an image: configuration, layers, other images of the source. No layer is read.
    Inspect(InspectArgs),
    /// Shows what two images differ in: files that were added, deleted, or changed.
    Diff(DiffArgs),
    /// Makes a disk of an image: one ext4 with all layers merged, read-only or writable.
    Pack(pack::PackArgs),
    /// Makes an image of a disk: what was changed on it becomes a layer on top of the image that the disk was made of.
    Commit(CommitArgs),
}

/// How a source is opened.
#[derive(Debug, Args)]
struct SourceArgs {
    /// The platform to choose, for example linux/arm64; by default Linux on this machine's processor, or whatever the source
    /// has if it has only one.
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", value_parser = str::parse::<Platform>)]
    platform: Option<Platform>,
    /// Directory for unnamed scratch files, to which an archive from a pipe or a compressed one is copied; by default the
    /// system's for temporary files.
    #[arg(long, value_name = "DIRECTORY")]
    scratch: Option<PathBuf>,
    /// Maximum number of plain bytes of the image: all layers together, and an archive that is compressed as a whole.
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize::tib(1))]
    max_size: ByteSize,
    /// Maximum number of entries, all layers together. Each takes about 300 bytes of memory.
    #[arg(long, value_name = "NUMBER", default_value_t = TreeOptions::default().entries)]
    max_entries: usize,
    /// Maximum number of plain bytes for each byte of the compressed layers, of each and of all together; the first 64 MiB are
    /// always accepted.
    #[arg(long, value_name = "NUMBER", default_value_t = Limits::default().ratio)]
    max_ratio: u64,
    #[command(flatten)]
    registry: RegistryArgs,
    #[command(flatten)]
    jail: JailArgs,
}

impl SourceArgs {
    /// What the sources may use.
    fn means(&self) -> Means {
        let (scratch, registry) = (self.scratch.clone(), self.registry.clone());
        Means { scratch, registry, blob_bytes: self.max_size.as_u64() }
    }
}

/// Reads a source; help shows its forms.
fn source(text: &str) -> Result<Source, String> {
    let source = Source::parse(text).map_err(|e| e.to_string())?;
    if let Source::Registry(name) = &source {
        registry::check(name)?;
    }
    Ok(source)
}

#[derive(Debug, Args)]
pub(super) struct LsArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Also shows type, permissions, links, owner, size, time (UTC) and layer, counted from 0, the lowest.
    #[arg(short = 'l', long)]
    long: bool,
    /// Lists what is below, too.
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Shows how many bytes each layer and each directory takes, and what later layers hide, instead of names.
    #[arg(long, conflicts_with_all = ["long", "recursive"])]
    du: bool,
    /// Prints JSON, with everything that -l shows and extended attributes.
    #[arg(long)]
    json: bool,
    /// The image: oci:DIR[:REF], oci-archive:FILE[:REF], docker-archive:FILE[:NAME], docker://HOST[:PORT]/NAME[:TAG|@DIGEST] in
    /// a registry, or - for an archive on standard input.
    #[arg(value_name = "SRC", value_parser = source)]
    image: Source,
    /// A path in the image.
    #[arg(default_value = "/")]
    path: String,
}

#[derive(Debug, Args)]
pub(super) struct CatArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// The image, as for `ls`.
    #[arg(value_name = "SRC", value_parser = source)]
    image: Source,
    /// A file in the image; symbolic links are followed inside the image.
    path: String,
}

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Prints JSON, with the whole configuration and manifest.
    #[arg(long)]
    json: bool,
    /// The image, as for `ls`.
    #[arg(value_name = "SRC", value_parser = source)]
    image: Source,
}

#[derive(Debug, Args)]
pub(super) struct DiffArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// Also reports files of which only the time differs.
    #[arg(long)]
    times: bool,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
    /// The first image, as for `ls`.
    #[arg(value_name = "SRC1", value_parser = source)]
    from: Source,
    /// The second image.
    #[arg(value_name = "SRC2", value_parser = source)]
    to: Source,
}

/// How a new layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LayerCompression {
    /// Not at all.
    None,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

/// Reads a destination; help shows its forms.
fn destination(text: &str) -> Result<Destination, String> {
    Destination::parse(text).map_err(|e| e.to_string())
}

#[derive(Debug, Args)]
pub(super) struct CommitArgs {
    #[command(flatten)]
    source: SourceArgs,
    /// The image that the disk was made of, as for `ls`.
    #[arg(long, value_name = "SRC", value_parser = source)]
    base: Source,
    /// Where the new image is written: oci:DIR:REF, oci-archive:FILE[:REF] or docker-archive:FILE[:NAME:TAG].
    #[arg(long, value_name = "DEST", value_parser = destination)]
    to: Destination,
    /// A disk that `pack` made of the base, with the same --uid-map; by default, the base is packed anew into a scratch file.
    #[arg(long, value_name = "FILE")]
    base_disk: Option<PathBuf>,
    /// The list OUT.b3sums.zst that `pack` left beside a disk of the base, with OUT.json beside it: contents are compared by
    /// these digests, and the base needs no space in scratch files.
    #[arg(long, value_name = "FILE", conflicts_with = "base_disk")]
    base_digests: Option<PathBuf>,
    /// Shifts owners back, as the disk was packed with the same option: users HOST to HOST+COUNT-1 of the disk become FIRST to
    /// FIRST+COUNT-1 in the layer; can be repeated. An owner in none of the ranges is an error.
    #[arg(long, value_name = "FIRST:HOST:COUNT", value_parser = ids::id_range)]
    uid_map: Vec<IdRange>,
    /// The same for groups; by default, the ranges of --uid-map.
    #[arg(long, value_name = "FIRST:HOST:COUNT", value_parser = ids::id_range, requires = "uid_map")]
    gid_map: Vec<IdRange>,
    /// How the new layer is compressed.
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "gzip")]
    compression: LayerCompression,
    /// Takes this path and what is below it, whatever is left out; can be repeated. Left out are lost+found, sockets, and
    /// what is below /proc, /sys, /dev and /run.
    #[arg(long, value_name = "PATH")]
    include: Vec<String>,
    /// Leaves out this path and what is below it; can be repeated.
    #[arg(long, value_name = "PATH")]
    exclude: Vec<String>,
    /// A comment for the history of the image.
    #[arg(short, long, value_name = "TEXT")]
    message: Option<String>,
    /// Time of the image, and the latest time of its files, in seconds since 1970; by default now, and no limit.
    #[arg(long, env = "SOURCE_DATE_EPOCH", value_name = "SECONDS")]
    source_date_epoch: Option<i64>,
    /// Prints JSON, with the paths that were left out.
    #[arg(long)]
    json: bool,
    /// The disk: raw, VHD, VHDX or qcow2. It is only read, and must not be in use.
    #[arg(value_name = "DISK")]
    disk: PathBuf,
}

impl CommitArgs {
    /// The files that it reads and writes.
    fn name_files(&self, grants: &mut Grants) -> Result<(), CliError> {
        #[cfg(target_os = "linux")]
        if !confined::in_jail() {
            commit::refuse_writers(&self.disk)?;
        }
        grants.inputs =
            std::iter::once(&self.disk).chain(&self.base_disk).chain(&self.base_digests).cloned().collect();
        if let Some(list) = &self.base_digests {
            grants.inputs.push(digests::description_of(list)?);
        }
        match &self.to {
            Destination::Layout { directory, .. } => {
                grants.layout = Some(grants.sources.len());
                grants.sources.push(Source::Layout { directory: directory.clone(), reference: None });
            }
            Destination::OciArchive { file, .. } | Destination::DockerArchive { file, .. } => {
                grants.files = vec![file.clone()];
            }
        }
        Ok(())
    }
}

impl ImageCommand {
    /// The options of its sources, and these.
    fn sources(&self) -> (&SourceArgs, Vec<&Source>) {
        match self {
            Self::Ls(args) => (&args.source, vec![&args.image]),
            Self::Cat(args) => (&args.source, vec![&args.image]),
            Self::Inspect(args) => (&args.source, vec![&args.image]),
            Self::Diff(args) => (&args.source, vec![&args.from, &args.to]),
            Self::Pack(args) => (&args.source, vec![&args.image]),
            Self::Commit(args) => (&args.source, vec![&args.base]),
        }
    }
}

/// Runs a command; `arguments` are those of this program.
pub(super) fn run(command: &ImageCommand, arguments: &[OsString]) -> Result<ExitCode, CliError> {
    let (args, sources) = command.sources();
    if sources.iter().filter(|source| ***source == Source::Stdin).count() > 1 {
        return Err("only one of the images can come from standard input".into());
    }
    let mut grants =
        Grants { sources: sources.into_iter().cloned().collect(), means: args.means(), ..Grants::default() };
    match command {
        ImageCommand::Pack(args) => args.name_outputs(&mut grants)?,
        // In the jail this is repeated, but for what only the parent can see.
        ImageCommand::Commit(args) => args.name_files(&mut grants)?,
        _ => {}
    }
    let result = confined::run(&grants, &args.jail, arguments, || match command {
        ImageCommand::Ls(args) => ls::ls(args),
        ImageCommand::Cat(args) => cat::cat(args),
        ImageCommand::Inspect(args) => inspect::inspect(args),
        ImageCommand::Diff(args) => diff::diff(args),
        ImageCommand::Pack(args) if args.layers => layers::pack(args),
        ImageCommand::Pack(args) => pack::pack(args),
        ImageCommand::Commit(args) => commit::commit(args),
    });
    super::layer::closed_pipe(result)
}
