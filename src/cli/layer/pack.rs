//! `layer pack`: tar to image and record.

use super::{
    PackArgs, Profile,
    failure::{failed, shown},
    input::{self, Packing},
    output::{NewFile, print, print_json},
};
use crate::{
    agent::wire::RootHash,
    cli::CliError,
    diff::{
        TarDigest,
        apply::{ApplyOptions, ApplySummary, NoLowers, Verity, apply},
    },
    ext4::writer::WriterOptions,
    io::{ReadAt, WriteAt},
    verity,
};
use bytesize::ByteSize;
use serde::Serialize;
use std::{fmt::Write as _, io, process::ExitCode, sync::Arc};

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
    /// Byte of the disk where its super block stands.
    hash_offset: u64,
}

pub(super) fn pack(args: &PackArgs) -> Result<ExitCode, CliError> {
    let Profile::Default = args.profile;
    if args.record.as_ref() == Some(&args.output) {
        return Err("image and record cannot be one file: name two".into());
    }
    let mut input = input::open(&args.input)?;
    let image = NewFile::create(&args.output)?;
    let record = args.record.as_deref().map(NewFile::create).transpose()?;
    let mut options = ApplyOptions::new(WriterOptions {
        max_image_bytes: args.max_size.as_u64(),
        ..WriterOptions::default()
    });
    if args.verity {
        let scratch = Arc::new(image.scratch()?) as Arc<dyn WriteAt>;
        options.verity = Verity::Tree { scratch: Some(scratch) };
    }
    let result = match &record {
        Some(record) => apply(&mut input.tar, image.disk(), record.file(), &mut NoLowers, &options),
        None => apply(&mut input.tar, image.disk(), Nowhere, &mut NoLowers, &options),
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
    let verity = done.verity_root.map(|root| Verified {
        root_hash: RootHash(root),
        hash_offset: verity::hash_offset(done.image_bytes),
    });
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
