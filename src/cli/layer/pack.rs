//! `layer pack`: tar to image and record.

use super::{
    PackArgs,
    failure::{failed, shown},
    input::{self, Packing},
    output::{NewDisk, NewFile},
};
use crate::cli::{
    CliError,
    output::{print, print_json},
};
use bytesize::ByteSize;
use disk_io::{ReadAt, WriteAt};
use ext4_image::{BlockSize, hcsshim};
use layer_codec::{
    DiffError, RootHash, TarDigest,
    apply::{self, ApplyOptions, ApplyResources, ApplySummary, Growth, HcsshimProfile, NoLowers, Profile},
};
use serde::Serialize;
use std::{fmt::Write as _, io, process::ExitCode, sync::Arc};
use verity_tree;
use vhd_image::vhd;

/// Discards a record that is not wanted.
#[derive(Debug)]
pub(in crate::cli) struct Nowhere;

impl ReadAt for Nowhere {
    fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
        Ok(0)
    }
    fn size(&self) -> io::Result<u64> {
        Ok(0)
    }
}

impl WriteAt for Nowhere {
    fn write_at(&self, buf: &[u8], _: u64) -> io::Result<usize> {
        Ok(buf.len())
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// What `--json` prints; sizes in bytes.
#[derive(Debug, Serialize)]
struct Summary {
    input: String,
    packing: Packing,
    image: String,
    /// With the VHD footer.
    file_bytes: u64,
    /// The file system alone.
    image_bytes: u64,
    uuid: uuid::Uuid,
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    record_bytes: Option<u64>,
    tar_bytes: u64,
    tar_digest: TarDigest,
    /// Sum of the sizes of regular files, a hard-linked one once.
    diff_size: u64,
    entries: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    verity: Option<Verified>,
}

/// The hash tree.
#[derive(Debug, Serialize)]
struct Verified {
    root_hash: RootHash,
    /// Offset of its super block on the disk, in bytes.
    hash_offset: u64,
}

pub(super) fn pack(args: &PackArgs) -> Result<ExitCode, CliError> {
    let max_image_bytes = max_image_bytes(args)?;
    let hcsshim = hcsshim_profile(args)?;
    if args.record.as_ref() == Some(&args.output) {
        return Err("image and record must be two different files".into());
    }
    let mut input = input::open(&args.input)?;
    let image = NewFile::create(&args.output)?;
    let record = args.record.as_deref().map(NewFile::create).transpose()?;
    let options = ApplyOptions {
        profile: args.profile,
        block_size: args.block_size.bytes(),
        verity: args.verity,
        max_image_bytes,
        footer: !args.raw,
        hcsshim,
        ..ApplyOptions::default()
    };
    let mut resources = ApplyResources::default();
    if args.verity {
        resources.scratch = Some(Arc::new(image.scratch()?));
    }
    let mut larger = Larger { args, pair: None };
    let result = apply::apply_growing(
        &mut input.tar,
        image.disk()?,
        record_disk(args, &image, record.as_ref())?,
        &mut NoLowers,
        &options,
        &resources,
        &mut larger,
    );
    input.bar.finish_and_clear();
    let done = result.map_err(|e| failed("pack", &args.input, &e))?;
    let (image, record) = larger.pair.unwrap_or((image, record));
    if let Some(record) = record {
        record.commit()?;
    }
    image.commit()?;
    report(args, input.packing, &done)?;
    Ok(ExitCode::SUCCESS)
}

/// Where the record goes. While the image has small blocks, a record is kept even if none was requested: the input may
/// be a stream that can be read only once, and the record allows starting over.
fn record_disk(
    args: &PackArgs,
    image: &NewFile,
    record: Option<&NewFile>,
) -> Result<Arc<dyn WriteAt>, CliError> {
    Ok(match record {
        Some(record) => Arc::new(record.disk()?),
        None if args.profile == Profile::Default && args.block_size != BlockSize::LARGEST => {
            Arc::new(image.scratch()?)
        }
        None => Arc::new(Nowhere),
    })
}

/// A second pair of files beside the first, for an image that needs larger blocks than it was started with.
struct Larger<'a> {
    args: &'a PackArgs,
    pair: Option<(NewFile, Option<NewFile>)>,
}

impl Larger<'_> {
    fn make(&mut self) -> Result<(NewDisk, Arc<dyn WriteAt>), CliError> {
        let image = NewFile::create(&self.args.output)?;
        let record = self.args.record.as_deref().map(NewFile::create).transpose()?;
        let kept: Arc<dyn WriteAt> = match &record {
            Some(record) => Arc::new(record.disk()?),
            None => Arc::new(Nowhere),
        };
        let disk = image.disk()?;
        self.pair = Some((image, record));
        Ok((disk, kept))
    }
}

impl Growth<NewDisk, Arc<dyn WriteAt>> for Larger<'_> {
    fn disks(&mut self) -> Result<Option<(NewDisk, Arc<dyn WriteAt>)>, DiffError> {
        let made = self.make().map_err(|e| io::Error::other(e.to_string()));
        made.map(Some).map_err(DiffError::io("starting over with larger blocks"))
    }

    fn replaying(&mut self, _: u64) -> Result<(), DiffError> {
        Ok(())
    }

    fn replayed(&mut self, image: NewDisk, record: Arc<dyn WriteAt>) -> Result<(), DiffError> {
        let emptied = image.set_len(0).and_then(|()| record.set_len(0));
        emptied.map_err(DiffError::io("emptying the files with smaller blocks"))
    }
}

/// The maximum size of the image, in bytes.
fn max_image_bytes(args: &PackArgs) -> Result<u64, CliError> {
    let most = if args.raw { apply::MAX_RAW_BYTES } else { vhd::MAX_DISK_BYTES };
    let size = args.max_size.map_or(most, |size| size.as_u64());
    if size > most {
        let kind = if args.raw {
            "an image"
        } else {
            "a vhd (with --raw, an image without the footer may have 16 TiB)"
        };
        return Err(format!("--max-size {}: {kind} has at most {}", ByteSize(size), ByteSize(most)).into());
    }
    Ok(size)
}

/// The options of profile hcsshim; it is an error to give them, or --block-size, with the wrong profile.
fn hcsshim_profile(args: &PackArgs) -> Result<HcsshimProfile, CliError> {
    if args.profile == Profile::Default {
        let max_disk = args.max_disk.as_u64() != hcsshim::DEFAULT_MAX_DISK;
        for (given, option) in [
            (max_disk, "--max-disk"),
            (args.inline, "--inline"),
            (args.keep_whiteouts, "--keep-whiteouts"),
            (args.convert_slash, "--convert-slash"),
        ] {
            if given {
                return Err(format!("{option} requires --profile hcsshim").into());
            }
        }
        return Ok(HcsshimProfile::default());
    }
    if args.block_size != BlockSize::default() {
        return Err(
            "--block-size requires --profile default; images of profile hcsshim always have blocks of 4 KiB"
                .into(),
        );
    }
    Ok(HcsshimProfile {
        max_disk_bytes: args.max_disk.as_u64(),
        inline_data: args.inline,
        convert_whiteouts: !args.keep_whiteouts,
        convert_backslashes: args.convert_slash,
    })
}

fn report(args: &PackArgs, packing: Packing, done: &ApplySummary) -> Result<(), CliError> {
    let uuid = done.uuid;
    let verity = done
        .verity_root
        .map(|root| Verified { root_hash: root, hash_offset: verity_tree::hash_offset(done.image_bytes) });
    if args.json {
        return print_json(&Summary {
            input: args.input.to_string_lossy().into_owned(),
            packing,
            image: args.output.to_string_lossy().into_owned(),
            file_bytes: done.file_bytes,
            image_bytes: done.image_bytes,
            uuid,
            record: args.record.as_ref().map(|p| p.to_string_lossy().into_owned()),
            record_bytes: args.record.is_some().then_some(done.record_bytes),
            tar_bytes: done.tar_bytes,
            tar_digest: done.tar_digest,
            diff_size: done.diff_size,
            entries: done.entries,
            verity,
        });
    }
    let mut text = format!(
        "packed {}: {} entries, {} of tar, {} of files\n  {}\n  image  {}, {}, uuid {uuid}\n",
        shown(&args.input),
        done.entries,
        ByteSize(done.tar_bytes),
        ByteSize(done.diff_size),
        done.tar_digest,
        shown(&args.output),
        ByteSize(done.file_bytes),
    );
    if let Some(verity) = &verity {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  verity {}, hash offset {}", verity.root_hash, verity.hash_offset);
    }
    if let Some(record) = &args.record {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  record {}, {}", shown(record), ByteSize(done.record_bytes));
    }
    print(&text)
}
