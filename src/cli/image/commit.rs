//! `image commit`: what a machine wrote on its disk becomes a layer on top of the image that the disk was made of.
//!
//! ```text
//!   DISK ────────────┐ compared: types, attributes, contents     filter        gzip, zstd
//!   base disk ───────┴─► canonical tar (scratch) ─► /proc, lost+found … left out ─► blob (scratch) ─┐
//!     │ --base-disk, or SRC packed anew (scratch), with --base-digests without data                 │
//!   SRC: configuration, layers ─────────────────────► configuration, history, manifest ─────────────┴─► --to
//! ```
//!
//! Equal size and time prove nothing: files that metadata cannot tell apart are compared byte by byte, or by their digests. A
//! dirty journal is replayed in memory; the disk is only read. The base's blobs are copied as they are. Called by the parent
//! module.

use super::{
    CommitArgs, LayerCompression,
    digests::BaseDigests,
    filter::Filtered,
    ids,
    open::{self, Opened},
};
use crate::cli::{
    CliError, confined,
    layer::{
        bar,
        failure::failed,
        image::{Disk, open_disk},
        output::NewFile,
    },
    listing::{date, escaped},
    output::{print, print_json},
};
use bytesize::ByteSize;
use disk_io::{StreamOut, WriteAt};
use ext4_image::BlockSize;
use layer_codec::{
    DiffError, ExportOptions, ExportSummary, LayerKind, LayerSource, LiveHooks, OutsideId, ParentLayer,
    ParentSpec, export,
    flat::{FlatOptions, flatten},
};
use layer_recode::compress;
use oci_image::{
    Algorithm, Blob, Blobs, Compression, Descriptor, Digest, Hasher, Image, ImageError, Layer, LayoutFile,
    media::OCI_LAYER,
    write::{
        Destination, DirectLayout, Fill, LayoutOut, NewImage, NewLayer, Step, append_layer,
        write_docker_archive, write_layout, write_oci_archive,
    },
};
use serde::Serialize;
use std::{
    fs::File,
    io::{self, BufWriter, Read, Seek, Write},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

/// Bytes that are written at a time.
const BUFFER: usize = 256 << 10;
/// What belongs to a running system and not to an image, unless it is included.
const LEFT_OUT: [&[u8]; 5] = [b"lost+found", b"proc", b"sys", b"dev", b"run"];
/// The one of them that is left out itself, not only what it contains.
const WHOLE: &[u8] = b"lost+found";
/// What the history says.
const CREATED_BY: &str = "lcow-graphdriver image commit";

/// The output of `commit`; sizes in bytes.
#[derive(Debug, Serialize)]
struct Committed {
    image: String,
    /// Digest of the new configuration.
    id: Digest,
    layer: Digest,
    diff_id: Digest,
    blob_bytes: u64,
    tar_bytes: u64,
    entries: u64,
    sockets: u64,
    /// Paths that were left out.
    left_out: Vec<String>,
}

/// The blob of the new layer.
#[derive(Debug)]
struct NewBlob(Arc<File>, u64);

impl Blobs for NewBlob {
    fn open(&self, _: &Descriptor) -> io::Result<Blob> {
        let whole = disk_io::SubDisk::new(Arc::clone(&self.0), 0, self.1);
        Ok(Blob { size: self.1, bytes: Box::new(Sequential(whole, 0)) })
    }
}

/// A disk as a stream.
struct Sequential<D>(D, u64);

impl<D: disk_io::ReadAt> Read for Sequential<D> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.0.read_at(buf, self.1)?;
        self.1 += n as u64;
        Ok(n)
    }
}

/// A stream whose bytes are digested and counted.
struct Digested<S> {
    inner: S,
    hasher: Hasher,
    bytes: u64,
}

impl<S> Digested<S> {
    fn new(inner: S) -> Self {
        Self { inner, hasher: Hasher::new(Algorithm::Sha256), bytes: 0 }
    }
}

impl<R: Read> Read for Digested<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.hasher.update(&buf[..n]);
        self.bytes += n as u64;
        Ok(n)
    }
}

impl<W: Write> Write for Digested<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.hasher.update(&buf[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A file that takes a tar.
struct TarFile(BufWriter<File>);

impl Write for TarFile {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl StreamOut for TarFile {
    fn splice(&mut self, _: &File, _: u64, _: u64) -> io::Result<u64> {
        Ok(0)
    }
}

/// What the export asks.
struct Hooks<'a, F> {
    /// What of the disk becomes part of the layer: an owner of anything else does not matter.
    wanted: F,
    digests: Option<&'a BaseDigests>,
}

impl<F: Fn(&[u8]) -> bool> LiveHooks for Hooks<'_, F> {
    fn has_parent_digests(&self) -> bool {
        self.digests.is_some()
    }

    fn parent_digest(&mut self, path: &[u8]) -> Option<[u8; 32]> {
        self.digests?.get(path)
    }

    fn metadata_read(&mut self) -> Result<(), DiffError> {
        Ok(())
    }

    fn before_recheck(&mut self) -> Result<(), DiffError> {
        Ok(())
    }

    fn outside(&mut self, path: &[u8], id: OutsideId) -> Result<(), DiffError> {
        if (self.wanted)(path) { Err(DiffError::outside(path, id)) } else { Ok(()) }
    }
}

/// Refuses a disk that something writes to. Asked by the process that has the caller's rights.
#[cfg(target_os = "linux")]
pub(super) fn refuse_writers(disk: &std::path::Path) -> Result<(), CliError> {
    use crate::cli::layer::failure::shown;
    let file = File::open(disk).map_err(|e| failed("open", disk, &e))?;
    // A file system without leases, or a file of another user, gives no answer.
    if lcow_sys::linux::process::has_writers(&file).unwrap_or(false) {
        return Err(format!(
            "{} is open for writing, by a mount or a running machine; unmount it or stop the machine first",
            shown(disk)
        )
        .into());
    }
    Ok(())
}

pub(super) fn commit(args: &CommitArgs) -> Result<ExitCode, CliError> {
    let opened = open::open(0, &args.base, &args.source)?;
    let files = confined::files(0, &args.base, &args.source.means());
    let scratch = || -> Result<File, CliError> {
        files.scratch().map(|made| made.file).map_err(|e| format!("cannot create a scratch file: {e}").into())
    };
    let disk = open_disk(&args.disk)?;
    let id_maps = ids::maps(&args.uid_map, &args.gid_map);
    ids::check_backwards(&id_maps)?;
    let shifted = !id_maps.is_empty();
    let of = |disk: Disk, host_ids| LayerSource { host_ids, ..LayerSource::new(disk, LayerKind::Applied) };
    let target = [of(disk, shifted)];
    let list = args.base_digests.as_deref();
    let digests = list.map(|list| BaseDigests::read(list, &opened, args.source.max_entries)).transpose()?;
    let base = match &args.base_disk {
        Some(path) => of(open_disk(path)?, shifted),
        // Packed anew, it has the ids of the image.
        None => of(pack_base(&opened, scratch()?, digests.is_none())?, false),
    };
    let parents = [ParentLayer::Other(base)];
    let epoch = args.source_date_epoch;
    let mut tar = scratch()?;
    let options =
        ExportOptions { id_maps, source_date_epoch: epoch, strict_ids: true, ..ExportOptions::default() };
    let wanted = |path: &[u8]| is_wanted(args, path);
    let mut hooks = Hooks { wanted, digests: digests.as_ref() };
    let mut out = TarFile(BufWriter::with_capacity(BUFFER, tar.try_clone()?));
    let exported = export(&target, Some(ParentSpec::Layers(&parents)), &options, &mut hooks, &mut out)
        .map_err(|e| failed("commit", &args.disk, &e))?;
    out.flush().map_err(|e| failed("commit", &args.disk, &e))?;
    tar.rewind().map_err(|e| failed("commit", &args.disk, &e))?;
    let blob = scratch()?;
    let mut filtered = Digested::new(Filtered::new(tar, wanted));
    let mut packed = Digested::new(BufWriter::with_capacity(BUFFER, blob.try_clone()?));
    let (format, suffix) = match args.compression {
        LayerCompression::None => (Compression::Plain, ""),
        LayerCompression::Gzip => (Compression::Gzip, "+gzip"),
        LayerCompression::Zstd => (Compression::Zstd, "+zstd"),
    };
    compress(&mut filtered, format, format.level(), &mut packed)
        .map_err(|e| failed("commit", &args.disk, &e))?;
    packed.flush().map_err(|e| failed("commit", &args.disk, &e))?;
    let (diff_id, tar_bytes) = (filtered.hasher.finish(), filtered.bytes);
    let (digest, blob_bytes) = (packed.hasher.finish(), packed.bytes);
    let created = date(epoch.unwrap_or_else(now)).replace(' ', "T") + "Z";
    let comment = args.message.clone().unwrap_or_default();
    let step = Step { created, created_by: CREATED_BY.to_owned(), comment };
    let about = |e: &ImageError| open::failed("commit to", &args.to.to_string(), e);
    let config = append_layer(&opened.image.config().raw, &diff_id, &step).map_err(|e| about(&e))?;
    let id = Digest::sha256(&config);
    let mut layers = NewLayer::all_of(&opened.image);
    layers.push(NewLayer {
        layer: Layer {
            descriptor: Descriptor::new(&format!("{OCI_LAYER}{suffix}"), digest, blob_bytes),
            diff_id,
        },
        blobs: Arc::new(NewBlob(Arc::new(blob), blob_bytes)),
    });
    write(&args.to, &NewImage { config, layers }, epoch.unwrap_or(0), about)?;
    report(
        args,
        &exported,
        &Committed {
            image: args.to.to_string(),
            id,
            layer: digest,
            diff_id,
            blob_bytes,
            tar_bytes,
            entries: exported.entries.saturating_sub(filtered.inner.left_out.len() as u64),
            sockets: exported.sockets,
            left_out: filtered.inner.left_out.iter().map(|path| escaped(path)).collect(),
        },
    )
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

/// Whether an entry becomes part of the layer.
fn is_wanted(args: &CommitArgs, path: &[u8]) -> bool {
    let beneath = |list: &[String]| {
        list.iter().any(|named| {
            let named = named.trim_matches('/').as_bytes();
            path.strip_prefix(named).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
        })
    };
    if beneath(&args.include) {
        return true;
    }
    if beneath(&args.exclude) {
        return false;
    }
    !LEFT_OUT.iter().any(|named| match path.strip_prefix(*named) {
        Some([]) => *named == WHOLE,
        Some([first, ..]) => *first == b'/',
        None => false,
    })
}

/// The disk of the base, made anew; `contents`: with the data of its files.
fn pack_base(opened: &Opened, scratch: File, contents: bool) -> Result<Disk, CliError> {
    let image: &Image = &opened.image;
    let file = Arc::new(scratch);
    let mut options = FlatOptions { contents, ..FlatOptions::default() };
    let bar = bar(None);
    loop {
        let mut open = |number: usize| -> io::Result<Box<dyn Read>> {
            Ok(Box::new(bar.wrap_read(image.open_layer(number)?)))
        };
        match flatten(image.layers().len(), &mut open, &*file, None, &options, None) {
            Ok(_) => break,
            Err(e) if e.larger_blocks_help() && options.block_size != BlockSize::LARGEST.bytes() => {
                file.set_len(0).map_err(|e| format!("cannot empty a scratch file: {e}"))?;
                options.block_size = BlockSize::LARGEST.bytes();
            }
            Err(e) => return Err(super::pack::failed_to_pack(&opened.name, &e)),
        }
    }
    bar.finish_and_clear();
    Ok(file)
}

/// A layout whose files the jail's parent makes.
struct Granted {
    direct: DirectLayout,
    directory: PathBuf,
}

impl LayoutOut for Granted {
    fn open(&self, name: &LayoutFile) -> io::Result<File> {
        let source = oci_image::Source::Layout { directory: self.directory.clone(), reference: None };
        confined::files(1, &source, &confined::Means::default()).layout(name)
    }

    fn place(&self, name: &LayoutFile, fill: &mut Fill<'_>) -> Result<(), ImageError> {
        #[cfg(target_os = "linux")]
        if let Some(granted) = confined::place_in_layout(1, name) {
            let writing = |source| ImageError::Write { what: name.path(), source };
            let granted = granted.map_err(writing)?;
            let mut file = granted.file().try_clone().map_err(writing)?;
            fill(&mut file)?;
            return granted.commit().map_err(writing);
        }
        self.direct.place(name, fill)
    }

    fn sync(&self) -> Result<(), ImageError> {
        #[cfg(target_os = "linux")]
        if confined::in_jail() {
            // The parent has synced what it renamed.
            return Ok(());
        }
        self.direct.sync()
    }
}

fn write(
    to: &Destination,
    image: &NewImage,
    mtime: i64,
    about: impl Fn(&ImageError) -> CliError,
) -> Result<(), CliError> {
    let (path, reference, docker) = match to {
        Destination::Layout { directory, reference } => {
            let out = Granted { direct: DirectLayout::new(directory), directory: directory.clone() };
            return write_layout(&out, reference, image).map(drop).map_err(|e| about(&e));
        }
        Destination::OciArchive { file, reference } => (file, reference, false),
        Destination::DockerArchive { file, reference } => (file, reference, true),
    };
    let file = NewFile::create(path)?;
    let mut out = BufWriter::with_capacity(BUFFER, file.file());
    let written = if docker {
        write_docker_archive(&mut out, reference.as_deref(), image, mtime)
    } else {
        write_oci_archive(&mut out, reference.as_deref(), image, mtime)
    };
    written.map_err(|e| about(&e))?;
    out.flush().map_err(|e| failed("write", path, &e))?;
    drop(out);
    file.commit()
}

fn report(args: &CommitArgs, exported: &ExportSummary, done: &Committed) -> Result<ExitCode, CliError> {
    if let Some(first) = &exported.first_hidden {
        eprintln!(
            "warning: {} files whose names begin with .wh., or that are in directories with such a name, are not in the \
             layer (the first is '{}'), because readers of layers would treat them as deletions",
            exported.hidden,
            first.escape_ascii()
        );
    }
    if args.json {
        print_json(done)?;
    } else {
        print(&format!(
            "{}: {}, {} entries in a layer of {} ({} left out; --json lists them)\n",
            done.image,
            done.id,
            done.entries,
            ByteSize(done.blob_bytes),
            done.left_out.len()
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: CommitArgs,
    }

    #[test]
    fn what_belongs_to_a_running_system_is_left_out_unless_it_is_included() {
        let line = |more: &[&str]| {
            let fixed = ["x", "disk", "--base", "oci:a", "--to", "oci:b:c"];
            Line::parse_from(fixed.iter().chain(more)).args
        };
        let args = line(&[]);
        for (path, expected) in [
            ("proc", true),
            ("proc/1", false),
            ("dev/.wh.null", false),
            ("lost+found", false),
            ("lost+found/x", false),
            ("process", true),
            ("etc/run/x", true),
            ("run/x/y", false),
        ] {
            assert_eq!(is_wanted(&args, path.as_bytes()), expected, "{path}");
        }
        let args = line(&["--include", "/run/app", "--exclude", "var/cache/"]);
        for (path, expected) in [
            ("run/app", true),
            ("run/app/x", true),
            ("run/apps", false),
            ("var/cache", false),
            ("var/cached", true),
        ] {
            assert_eq!(is_wanted(&args, path.as_bytes()), expected, "{path}");
        }
    }
}
