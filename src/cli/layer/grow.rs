//! `layer grow`: a larger disk, and a larger file system on it.
//!
//! ```text
//!   raw    longer file ─────────────────────────┐
//!   VHD    footer at the new end, old one erased ├─► ext4 grows (ext4_image::offline)
//!   VHDX   larger table of blocks, through its log ┘
//! ```
//!
//! The file takes no more space for it than the descriptors of the new groups. A cut at any moment leaves the old or the new
//! size, and the command can be repeated.

use super::{
    GrowArgs,
    failure::{failed, shown},
    target::{Target, check_size, dirty, enlarge, writer},
};
use crate::cli::{
    CliError,
    output::{print, print_json, table},
};
use bytesize::ByteSize;
use disk_io::ReadAt;
use ext4_image::offline::{GrowOptions, grow as grow_ext4};
use serde::Serialize;
use std::process::ExitCode;

/// Sizes in bytes.
#[derive(Debug, Clone, Copy, Serialize)]
struct Sizes {
    /// The disk, as a machine sees it.
    disk: u64,
    file_system: u64,
    /// What the file takes.
    allocated: u64,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Done {
    disk: String,
    before: Sizes,
    after: Sizes,
    /// The disk was not unmounted: its journal was replayed first.
    journal_replayed: bool,
}

pub(super) fn grow(args: &GrowArgs) -> Result<ExitCode, CliError> {
    let target = Target::open(&args.disk)?;
    let about = |e: &(dyn std::error::Error + 'static)| failed("grow", &args.disk, e);
    let image = &target.image;
    let old = image.disk.size().map_err(|e| about(&e))?;
    let new = args.size.as_u64();
    check_size(&args.disk, old, new)?;
    let before = Sizes { disk: old, file_system: target.fs_bytes, allocated: target.allocated()? };
    let dirty = dirty(&image.data, target.fs_bytes);
    enlarge(&image.file, &image.container, old, new).map_err(|e| about(&e))?;
    let disk = writer(&image.file, &image.container, new).map_err(|e| about(&e))?;
    let grown = grow_ext4(&disk, new, &GrowOptions { dirty, unfinished: false }).map_err(|e| about(&e))?;
    drop(disk);
    let done = Done {
        disk: args.disk.to_string_lossy().into_owned(),
        before,
        after: Sizes { disk: new, file_system: grown.new_bytes, allocated: target.allocated()? },
        journal_replayed: grown.replayed,
    };
    if args.json {
        print_json(&done)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = table(&["", "BEFORE", "AFTER"]);
    for (name, before, after) in [
        ("disk", before.disk, done.after.disk),
        ("file system", before.file_system, done.after.file_system),
        ("on disk", before.allocated, done.after.allocated),
    ] {
        table.add_row([name.to_owned(), ByteSize(before).to_string(), ByteSize(after).to_string()]);
    }
    let replayed = if grown.replayed { "its journal was replayed first\n" } else { "" };
    print(&format!("{}\n{replayed}{table}\n", shown(&args.disk)))?;
    Ok(ExitCode::SUCCESS)
}
