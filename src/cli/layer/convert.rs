//! `layer convert`: the same disk in another kind of file.
//!
//! ```text
//!   raw │ fixed or dynamic VHD │ VHDX ──► disk, its holes left out ──► raw (sparse) │ fixed VHD (sparse) │ dynamic VHDX
//! ```
//!
//! The disk is copied as it is, whatever is on it: a file system, its hash tree. A VHDX whose log is in use and a
//! sandbox with a dirty journal are copied in their current state: the log is replayed, the journal is not.

use super::{
    ConvertArgs, DiskFormat,
    failure::{failed, shown},
    image::{Container, Image},
    input,
    output::NewFile,
};
use crate::cli::{
    CliError,
    output::{print, print_json},
};
use bytesize::ByteSize;
use disk_io::{ReadAt, WriteAt};
use layer_codec::apply::MAX_RAW_BYTES;
use serde::Serialize;
use std::process::ExitCode;
use vhd_image::{
    vhd::{self, Footer},
    vhdx::{self, CreateOptions, VhdxWriter},
};

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;
/// The larger of a VHDX's two sector sizes.
const WIDE_SECTOR: u32 = 4096;
/// Runs of zeros of at least this size are left out.
const GRAIN: usize = 4096;

/// What `--json` prints; sizes in bytes.
#[derive(Debug, Serialize)]
struct Converted {
    output: String,
    format: DiskFormat,
    disk_bytes: u64,
    /// Length of the file; a sparse one takes less of the disk.
    file_bytes: u64,
    /// Bytes that were copied: grains that are not all zero.
    data_bytes: u64,
}

pub(super) fn convert(args: &ConvertArgs) -> Result<ExitCode, CliError> {
    let image = Image::open(&args.input)?;
    let format = args.format.or_else(|| DiskFormat::of(&args.output)).ok_or_else(|| {
        format!(
            "{} does not end with .img, .raw, .vhd or .vhdx; choose the format with --to",
            shown(&args.output)
        )
    })?;
    if format != DiskFormat::Vhdx && (args.block_size.is_some() || args.sector_size.is_some()) {
        return Err("--block-size and --sector-size apply only to VHDX".into());
    }
    let size = image.disk.size().map_err(|e| failed("read", &args.input, &e))?;
    if format != DiskFormat::Vhd && size > MAX_RAW_BYTES {
        let (size, most) = (ByteSize(size), ByteSize(MAX_RAW_BYTES));
        return Err(format!(
            "the disk in {} is too large for a layer: {size}, at most {most}",
            shown(&args.input)
        )
        .into());
    }
    if args.sector_size == Some(WIDE_SECTOR)
        && let Ok(fs) = image.ext4()
        && fs.geometry().block_size < WIDE_SECTOR
    {
        return Err(format!(
            "the file system of {} has blocks of {} bytes, but sectors of {WIDE_SECTOR} need \
             larger blocks; pack the layer with --block-size 4KiB",
            shown(&args.input),
            fs.geometry().block_size
        )
        .into());
    }
    let out = NewFile::create(&args.output)?;
    let about = |e: &(dyn std::error::Error + 'static)| failed("write", &args.output, e);
    let file = out.disk()?;
    let data_bytes = match format {
        DiskFormat::Raw => {
            file.set_len(size).map_err(|e| about(&e))?;
            copy(&image, &file)?
        }
        DiskFormat::Vhd => {
            let uuid = match &image.container {
                Container::Vhd(footer) | Container::DynamicVhd { footer, .. } => footer.uuid,
                Container::Vhdx(geometry) => geometry.disk_id.into_bytes(),
                Container::Raw => uuid::Uuid::new_v4().into_bytes(),
            };
            let footer = Footer::new(size, 0, uuid).map_err(|e| about(&e))?;
            file.set_len(size + vhd::FOOTER_SIZE as u64).map_err(|e| about(&e))?;
            let copied = copy(&image, &file)?;
            file.write_all_at(&footer.to_bytes(), size).map_err(|e| about(&e))?;
            copied
        }
        DiskFormat::Vhdx => {
            let id = match &image.container {
                Container::Vhd(footer) | Container::DynamicVhd { footer, .. } => {
                    uuid::Uuid::from_bytes(footer.uuid)
                }
                Container::Vhdx(geometry) => geometry.disk_id,
                Container::Raw => uuid::Uuid::new_v4(),
            };
            let mut options = CreateOptions::new(size, id);
            if let Some(block) = args.block_size {
                options.block_size = u32::try_from(block.as_u64())
                    .map_err(|_| format!("--block-size {block} is too large; expected 1 MiB to 256 MiB"))?;
            }
            if let Some(sector) = args.sector_size {
                options.logical_sector = sector;
            }
            vhdx::create(&file, &options, &[]).map_err(|e| about(&e))?;
            let disk = VhdxWriter::open(&file).map_err(|e| about(&e))?;
            let copied = copy(&image, &disk)?;
            disk.sync().map_err(|e| about(&e))?;
            copied
        }
    };
    let file_bytes = file.size().map_err(|e| about(&e))?;
    out.commit()?;
    let done = Converted {
        output: args.output.to_string_lossy().into_owned(),
        format,
        disk_bytes: size,
        file_bytes,
        data_bytes,
    };
    if args.json {
        print_json(&done)?;
    } else {
        print(&format!(
            "{}: {}, disk of {}, {} of data\n",
            shown(&args.output),
            format.name(),
            ByteSize(size),
            ByteSize(data_bytes)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Copies everything that is not zero; returns the number of bytes copied.
fn copy(image: &Image, out: &dyn WriteAt) -> Result<u64, CliError> {
    let bar = input::bar(Some(image.data.iter().map(|r| r.end - r.start).sum()));
    let mut buffer = vec![0; CHUNK];
    let mut copied = 0;
    for range in &image.data {
        let mut at = range.start;
        while at < range.end {
            let chunk = &mut buffer[..usize::try_from(range.end - at).map_or(CHUNK, |n| n.min(CHUNK))];
            image.disk.read_exact_at(chunk, at).map_err(|e| failed("read", &image.path, &e))?;
            for (start, len) in runs(chunk) {
                out.write_all_at(&chunk[start..start + len], at + start as u64)
                    .map_err(|e| failed("write a copy of", &image.path, &e))?;
                copied += len as u64;
            }
            at += chunk.len() as u64;
            bar.inc(chunk.len() as u64);
        }
    }
    bar.finish_and_clear();
    Ok(copied)
}

/// Start and length of each run of grains that are not all zero.
fn runs(chunk: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (n, grain) in chunk.chunks(GRAIN).enumerate() {
        if grain.iter().all(|b| *b == 0) {
            continue;
        }
        match runs.last_mut() {
            Some((start, len)) if *start + *len == n * GRAIN => *len += grain.len(),
            _ => runs.push((n * GRAIN, grain.len())),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_left_out_by_grains() {
        let mut chunk = vec![0; GRAIN * 5 + 10];
        assert_eq!(runs(&chunk), []);
        for at in [1, GRAIN * 2, GRAIN * 3 + 5, GRAIN * 5 + 9] {
            chunk[at] = 1;
        }
        assert_eq!(runs(&chunk), [(0, GRAIN), (GRAIN * 2, GRAIN * 2), (GRAIN * 5, 10)]);
    }
}
