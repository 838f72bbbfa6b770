//! `layer unpack`, `diff` and `cat`: extract data from images.

use super::{
    CatArgs, DiffArgs, UnpackArgs,
    failure::failed,
    image::{Disk, Image, resolve},
    input,
    output::{Counted, TarOutput, standard_output},
};
use crate::cli::CliError;
use disk_io::StreamOut;
use ext4_image::{Ext4, FileKind, Inode};
use layer_codec::{
    DiffError, ExportOptions, ExportSummary, NoHooks, ParentLayer, ParentSpec, export,
    record::{self, replay},
};
use std::{io::Write, path::Path, process::ExitCode};

/// Bytes of a file copied at a time.
const CHUNK: usize = 512 << 10;

pub(super) fn unpack(args: &UnpackArgs) -> Result<ExitCode, CliError> {
    let image = Image::open(&args.image)?;
    let Some(record) = &args.exact else {
        let target = [image.layer()?];
        return write_tar(&args.image, &args.output, None, |out| {
            export(&target, Some(ParentSpec::Own), &ExportOptions::default(), &mut NoHooks, out)
        });
    };
    let file = input::open_file(record).map_err(|e| failed("open", record, &e))?;
    let info = record::inspect(&file).map_err(|e| failed("read the exact record", record, &e))?;
    write_tar(&args.image, &args.output, Some(info.tar_bytes), |out| {
        replay(&image.disk, &file, out).map(|_| ExportSummary::default())
    })
}

pub(super) fn diff(args: &DiffArgs) -> Result<ExitCode, CliError> {
    let target = [Image::open(&args.image)?.layer()?];
    let parents = args
        .parents
        .iter()
        .map(|path| Ok(ParentLayer::Other(Image::open(path)?.layer()?)))
        .collect::<Result<Vec<ParentLayer<Disk>>, CliError>>()?;
    let spec = ParentSpec::Layers(&parents);
    write_tar(&args.image, &args.output, None, |out| {
        export(&target, Some(spec), &ExportOptions::default(), &mut NoHooks, out)
    })
}

/// Writes a tar with a progress bar; warns about files that the tar cannot hold.
fn write_tar(
    image: &Path,
    output: &Path,
    length: Option<u64>,
    write: impl FnOnce(&mut dyn StreamOut) -> Result<ExportSummary, DiffError>,
) -> Result<ExitCode, CliError> {
    let mut out = TarOutput::create(output)?;
    let bar = input::bar(length);
    let result = write(&mut Counted { out: &mut out, bar: &bar });
    bar.finish_and_clear();
    let summary = result.map_err(|e| failed("unpack", image, &e))?;
    out.commit()?;
    if let Some(first) = &summary.first_hidden {
        eprintln!(
            "warning: {} files whose names begin with .wh., or that are in directories with such a name, are not in the \
             tar (the first is '{}'), because readers of layers would treat them as deletions",
            summary.hidden,
            first.escape_ascii()
        );
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn cat(args: &CatArgs) -> Result<ExitCode, CliError> {
    let image = Image::open(&args.image)?;
    let fs = image.ext4()?;
    let about = |e: CliError| failed(&format!("read '{}' of", args.path), &args.image, &*e);
    let inode = resolve(&fs, args.path.as_bytes(), true).map_err(about)?;
    if inode.kind != FileKind::File {
        return Err(about("it is not a regular file".into()));
    }
    copy(&fs, &inode).map_err(about)?;
    Ok(ExitCode::SUCCESS)
}

fn copy(fs: &Ext4<Disk>, inode: &Inode) -> Result<(), CliError> {
    let mut out = standard_output()?;
    if let Some(bytes) = fs.inline_bytes(inode)? {
        out.write_all(&bytes)?;
        return Ok(());
    }
    let mut buffer = vec![0; CHUNK.min(usize::try_from(inode.size).unwrap_or(CHUNK))];
    let ranges = fs.data_map(inode)?;
    let mut ranges = ranges.iter().peekable();
    let mut at = 0;
    while at < inode.size {
        let n = (inode.size - at).min(buffer.len() as u64);
        let part = &mut buffer[..n as usize];
        part.fill(0);
        while let Some(range) = ranges.peek().filter(|r| r.offset < at + n) {
            let (from, to) = (range.offset.max(at), (range.offset + range.len).min(at + n));
            if let (true, Some(disk)) = (from < to, range.disk_offset) {
                fs.read_disk(
                    disk + (from - range.offset),
                    &mut part[(from - at) as usize..(to - at) as usize],
                )?;
            }
            if range.offset + range.len > at + n {
                break;
            }
            ranges.next();
        }
        out.write_all(part)?;
        at += n;
    }
    Ok(())
}
