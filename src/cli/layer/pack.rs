//! `layer pack`: tar to image and record.

use super::{
    PackArgs, Profile,
    failure::{failed, shown},
    hex,
    input::{self, Packing},
    output::{NewFile, print, print_json},
};
use crate::{
    cli::CliError,
    diff::apply::{ApplyOptions, ApplySummary, NoLowers, apply},
    ext4::writer::WriterOptions,
    io::{ReadAt, WriteAt},
};
use bytesize::ByteSize;
use serde::Serialize;
use std::{io, process::ExitCode};

/// Takes a record that nobody wants.
struct Nowhere;

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
    tar_sha256: String,
    /// Sum of the sizes of regular files, a hard-linked one once.
    diff_size: u64,
    entries: u64,
}

pub(super) fn pack(args: &PackArgs) -> Result<ExitCode, CliError> {
    let Profile::Default = args.profile;
    if args.record.as_ref() == Some(&args.output) {
        return Err("image and record cannot be one file: name two".into());
    }
    let mut input = input::open(&args.input)?;
    let image = NewFile::create(&args.output)?;
    let record = args.record.as_deref().map(NewFile::create).transpose()?;
    let options = ApplyOptions::new(WriterOptions {
        max_image_bytes: args.max_size.as_u64(),
        ..WriterOptions::default()
    });
    let result = match &record {
        Some(record) => apply(&mut input.tar, image.file(), record.file(), &mut NoLowers, &options),
        None => apply(&mut input.tar, image.file(), Nowhere, &mut NoLowers, &options),
    };
    input.bar.finish_and_clear();
    let done = result.map_err(|e| failed("pack", &args.input, &e))?;
    if let Some(record) = record {
        record.commit()?;
    }
    image.commit()?;
    report(args, input.packing, &done)?;
    Ok(ExitCode::SUCCESS)
}

fn report(args: &PackArgs, packing: Packing, done: &ApplySummary) -> Result<(), CliError> {
    let uuid = uuid::Uuid::from_bytes(done.uuid);
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
            tar_sha256: hex(&done.tar_sha256),
            diff_size: done.diff_size,
            entries: done.entries,
        });
    }
    let mut text = format!(
        "packed {}: {} entries, {} of tar, {} of files\n  sha256 {}\n  image  {}, {}, uuid {uuid}\n",
        shown(&args.input),
        done.entries,
        ByteSize(done.tar_bytes),
        ByteSize(done.diff_size),
        hex(&done.tar_sha256),
        shown(&args.output),
        ByteSize(done.file_bytes),
    );
    if let Some(record) = &args.record {
        text += &format!("  record {}, {}\n", shown(record), ByteSize(done.record_bytes));
    }
    print(&text)
}
