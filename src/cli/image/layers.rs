//! `image pack --layers`: one file system for each layer, and a list, for those who stack them themselves.
//!
//! ```text
//!   layer 0 ─apply─► 000-HEX.img ◄─┐ links and directories without an entry
//!   layer 1 ─apply─► 001-HEX.img ──┘ are looked up below
//!   …                              all in a new directory, which gets its name when it is complete
//!   layers.json: image, config, the files from the lowest up
//! ```
//!
//! Whiteouts are overlayfs' own: mounted read-only and stacked, the files are the image. Called by `pack`.

use super::{
    ahead::Ahead,
    disk::DiskFormat,
    open::{self, Opened},
    pack::{Origin, PackArgs, failed_to_pack},
};
use crate::cli::{
    CliError,
    confined::NewDirectory,
    layer::{
        bar,
        failure::{failed, shown},
        pack::Nowhere,
    },
    output::{print, print_json},
};
use bytesize::ByteSize;
use disk_io::SubDisk;
use ext4_image::BlockSize;
use indicatif::ProgressBar;
use layer_codec::{
    DiffError, LayerKind, LayerSource, RootHash,
    apply::{
        ApplyLimits, ApplyOptions, ApplyResources, ApplySummary, LayerChain, LowerUse, NAMES, NoGrowth,
        TAR_BYTES, apply_growing,
    },
    flat::{ALL_ENTRIES, ALL_TAR_BYTES},
};
use oci_image::Image;
use serde::Serialize;
use std::{fs::File, io::Write, process::ExitCode, sync::Arc};

/// Version of layers.json.
const LIST_VERSION: u32 = 1;
/// Digits of a layer's digest in the name of its file.
const DIGITS: usize = 12;

/// layers.json.
#[derive(Debug, Serialize)]
struct List {
    version: u32,
    image: Origin,
    config: oci_image::RunConfig,
    /// The lowest first.
    layers: Vec<Listed>,
}

/// Sizes in bytes.
#[derive(Debug, Serialize)]
struct Listed {
    file: String,
    diff_id: String,
    file_bytes: u64,
    file_system_bytes: u64,
    uuid: uuid::Uuid,
    #[serde(skip_serializing_if = "Option::is_none")]
    verity_root: Option<RootHash>,
}

pub(super) fn pack(args: &PackArgs) -> Result<ExitCode, CliError> {
    let footer = match args.format {
        None | Some(DiskFormat::Raw) => false,
        Some(DiskFormat::Vhd) => true,
        Some(DiskFormat::Vhdx | DiskFormat::Qcow2) => {
            return Err("--layers writes raw files or VHDs; use `layer convert` for other formats".into());
        }
    };
    let out = &args.output;
    let Opened { image, name: source } = open::open(0, &args.image, &args.source)?;
    let mut options = ApplyOptions {
        block_size: args.block_size().bytes(),
        verity: args.verity(),
        max_image_bytes: args.format.unwrap_or(DiskFormat::Raw).most(),
        footer,
        limits: args.limits(),
        lowers: LowerUse::LinksAndDirectories,
        ..ApplyOptions::default()
    };
    let all = options.limits;
    let bar = bar(None);
    let mut below: Vec<Arc<SubDisk<Arc<File>>>> = Vec::new();
    let mut list = Vec::new();
    let mut dir = NewDirectory::create(out)?;
    for (number, layer) in image.layers().iter().enumerate() {
        image.keep_layers(number..image.layers().len());
        let hex = layer.diff_id.hex();
        let extension = if footer { "vhd" } else { "img" };
        let name = format!("{number:03}-{}.{extension}", hex.get(..DIGITS).unwrap_or(&hex));
        let file = Arc::new(dir.member(&name).map_err(|e| failed("write", out, &e))?);
        let done = one(&image, number, &file, &below, &options, &dir, &bar);
        let done = done.map_err(|e| {
            bar.finish_and_clear();
            failed_to_pack(&source, &*of_all(e, &all))
        })?;
        // The limits are those of all layers together.
        let left = &mut options.limits;
        left.entries = left.entries.saturating_sub(done.entries);
        left.tar_bytes = left.tar_bytes.saturating_sub(done.tar_bytes);
        below.insert(0, Arc::new(SubDisk::new(file, 0, done.image_bytes)));
        list.push(Listed {
            file: name,
            diff_id: layer.diff_id.to_string(),
            file_bytes: done.file_bytes,
            file_system_bytes: done.image_bytes,
            uuid: done.uuid,
            verity_root: done.verity_root,
        });
    }
    bar.finish_and_clear();
    let list = List {
        version: LIST_VERSION,
        image: Origin::of(&image),
        config: image.config().config.clone(),
        layers: list,
    };
    let mut text = serde_json::to_string_pretty(&list)?;
    text.push('\n');
    let written = dir.member("layers.json").and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|e| failed("write", out, &e))?;
    dir.commit()?;
    if args.json {
        print_json(&list)?;
    } else {
        let bytes = list.layers.iter().map(|layer| layer.file_bytes).sum();
        print(&format!("packed {}: {} layers in {}\n", shown(out), list.layers.len(), ByteSize(bytes)))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// An error of a layer that was given what the layers below had left, with the limits of all layers.
fn of_all(error: CliError, all: &ApplyLimits) -> CliError {
    match error.downcast::<DiffError>() {
        Ok(mut known) => {
            if let DiffError::Layer { source, .. } = &mut *known
                && let DiffError::Limit { what, limit, .. } = &mut **source
            {
                match *what {
                    NAMES => (*what, *limit) = (ALL_ENTRIES, all.entries),
                    TAR_BYTES => (*what, *limit) = (ALL_TAR_BYTES, all.tar_bytes),
                    _ => {}
                }
            }
            known
        }
        Err(other) => other,
    }
}

/// Applies one layer; with larger blocks if an entry needs them.
fn one(
    image: &Image,
    number: usize,
    file: &Arc<File>,
    below: &[Arc<SubDisk<Arc<File>>>],
    options: &ApplyOptions,
    dir: &NewDirectory,
    bar: &ProgressBar,
) -> Result<ApplySummary, CliError> {
    let mut options = options.clone();
    loop {
        let input = Ahead::new(bar.wrap_read(image.open_layer(number)?))?;
        let mut next = below.iter();
        let mut chain = LayerChain::new(below.len(), || {
            let disk = next.next().cloned();
            let disk = disk.ok_or_else(|| DiffError::Usage("no such layer".into()))?;
            Ok(LayerSource::new(disk, LayerKind::Applied))
        });
        let resources = ApplyResources {
            scratch: if options.verity { Some(Arc::new(dir.scratch()?)) } else { None },
            ..ApplyResources::default()
        };
        let done =
            apply_growing(input, file.clone(), Nowhere, &mut chain, &options, &resources, &mut NoGrowth);
        match done {
            Err(e) if e.larger_blocks_help() && options.block_size != BlockSize::LARGEST.bytes() => {
                options.block_size = BlockSize::LARGEST.bytes();
                file.set_len(0)?;
            }
            other => {
                return Ok(other.map_err(|source| DiffError::Layer { number, source: Box::new(source) })?);
            }
        }
    }
}
