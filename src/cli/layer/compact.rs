//! `layer compact`: gives the host what a disk's file system does not use.
//!
//! ```text
//!   journal in use? replay ─► free blocks of ext4 ─┬─ raw, fixed VHD   holes are punched (Linux)
//!                                                  ├─ VHDX             written anew beside it, then renamed
//!                                                  └─ VHDX --in-place  blocks dropped and moved, through its log
//! ```
//!
//! Free blocks read as zeros afterwards. What lies behind the file system is kept.

use super::{
    CompactArgs,
    failure::{failed, shown},
    image::Container,
    output::NewFile,
    target::Target,
};
use crate::cli::{
    CliError,
    output::{print, print_json},
};
use bytesize::ByteSize;
use disk_io::{ReadAt, WriteAt};
use ext4_image::offline::{free_space, replay};
use serde::Serialize;
use std::{io, ops::Range, process::ExitCode};
use vhd_image::vhdx::{self, CreateOptions, Geometry, Vhdx, VhdxWriter};

/// Bytes looked at together: a block of the file system.
const GRAIN: u64 = 4096;
/// Bytes read at a time.
const CHUNK: u64 = 1 << 20;

/// What `--json` prints; sizes in bytes.
#[derive(Debug, Serialize)]
struct Done {
    disk: String,
    /// What the file took on its disk, and what it takes now.
    before: u64,
    after: u64,
    /// Length of the file before and afterwards.
    length_before: u64,
    length_after: u64,
    /// What the file system does not use.
    free: u64,
    /// The disk was not unmounted: its journal was replayed first.
    journal_replayed: bool,
}

pub(super) fn compact(args: &CompactArgs) -> Result<ExitCode, CliError> {
    let about = |e: &(dyn std::error::Error + 'static)| failed("compact", &args.disk, e);
    let target = Target::open(&args.disk)?;
    let (before, length_before) = (target.allocated()?, target.image.file_bytes);
    let journal_replayed = replay(&target.writer()?).map_err(|e| about(&e))?.was_dirty;
    // The file has changed if its journal or log was replayed.
    let target = if journal_replayed {
        drop(target);
        Target::open(&args.disk)?
    } else {
        target
    };
    let free = free_space(&target.image.disk).map_err(|e| about(&e))?;
    match target.image.container {
        Container::Vhdx(_) if args.in_place => {
            vhdx::compact(target.image.file.clone(), |disk, range| needed(disk, range, &free))
                .map_err(|e| about(&e))?;
        }
        Container::Vhdx(geometry) => rewrite(args, &target, &geometry, &free)?,
        _ => {
            let disk_bytes = target.image.disk.size().map_err(|e| about(&e))?;
            punch(&target, &free, disk_bytes).map_err(|e| about(&e))?;
        }
    }
    drop(target);
    let target = Target::open(&args.disk)?;
    let done = Done {
        disk: args.disk.to_string_lossy().into_owned(),
        before,
        after: target.allocated()?,
        length_before,
        length_after: target.image.file_bytes,
        free: free.iter().map(|range| range.end - range.start).sum(),
        journal_replayed,
    };
    if args.json {
        print_json(&done)?;
    } else {
        let replayed = if journal_replayed { ", journal replayed" } else { "" };
        print(&format!(
            "{}: {} on disk before, {} now ({} free in the file system{replayed})\n",
            shown(&args.disk),
            ByteSize(done.before),
            ByteSize(done.after),
            ByteSize(done.free)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The parts of `range` that are not free, ascending.
fn used(range: &Range<u64>, free: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut parts = Vec::new();
    let mut at = range.start;
    let from = free.partition_point(|other| other.end <= range.start);
    for other in free[from..].iter().take_while(|other| other.start < range.end) {
        if other.start > at {
            parts.push(at..other.start);
        }
        at = at.max(other.end);
    }
    if at < range.end {
        parts.push(at..range.end);
    }
    parts
}

/// Whether a range of the disk holds something that is in use and not zero.
fn needed(disk: &dyn ReadAt, range: Range<u64>, free: &[Range<u64>]) -> io::Result<bool> {
    let mut buffer = vec![0; CHUNK as usize];
    for part in used(&range, free) {
        let mut at = part.start;
        while at < part.end {
            let chunk = &mut buffer[..(part.end - at).min(CHUNK) as usize];
            disk.read_exact_at(chunk, at)?;
            if chunk.iter().any(|byte| *byte != 0) {
                return Ok(true);
            }
            at += chunk.len() as u64;
        }
    }
    Ok(false)
}

/// Writes a VHDX anew, with what is in use, and gives it the name of the old one.
fn rewrite(
    args: &CompactArgs,
    target: &Target,
    geometry: &Geometry,
    free: &[Range<u64>],
) -> Result<(), CliError> {
    let about = |e: &(dyn std::error::Error + 'static)| failed("compact", &args.disk, e);
    if geometry.fixed {
        return Err(format!(
            "{} is a fixed VHDX, whose blocks all keep their space; make it dynamic with `layer convert`",
            shown(&args.disk)
        )
        .into());
    }
    let out = NewFile::create(&args.disk)?;
    let options = CreateOptions {
        disk_bytes: geometry.disk_bytes,
        block_size: geometry.block_size,
        logical_sector: geometry.logical_sector,
        physical_sector: geometry.physical_sector,
        disk_id: geometry.disk_id,
    };
    let file = out.disk()?;
    vhdx::create(&file, &options, &[]).map_err(|e| about(&e))?;
    let disk = VhdxWriter::open(&file).map_err(|e| about(&e))?;
    let mut buffer = vec![0; CHUNK as usize];
    for range in &target.image.data {
        for part in used(range, free) {
            let mut at = part.start;
            while at < part.end {
                // Whole grains, so that a run of zeros inside of a chunk is left out.
                let n = (part.end - at).min(CHUNK);
                let chunk = &mut buffer[..n as usize];
                target.image.disk.read_exact_at(chunk, at).map_err(|e| about(&e))?;
                for (i, grain) in chunk.chunks(GRAIN as usize).enumerate() {
                    if grain.iter().any(|byte| *byte != 0) {
                        disk.write_all_at(grain, at + i as u64 * GRAIN).map_err(|e| about(&e))?;
                    }
                }
                at += n;
            }
        }
    }
    disk.sync().map_err(|e| about(&e))?;
    drop(disk);
    out.keep_owner(&target.image.file)?;
    // What is renamed is a whole VHDX.
    Vhdx::open(&file).map_err(|e| about(&e))?;
    out.commit()
}

/// Punches holes where the file system uses nothing.
#[cfg(target_os = "linux")]
fn punch(target: &Target, free: &[Range<u64>], disk_bytes: u64) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    let file = &target.image.file;
    for range in free {
        let end = range.end.min(disk_bytes);
        if range.start < end {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file, flags, range.start, end - range.start)?;
        }
    }
    file.sync_all()
}

#[cfg(not(target_os = "linux"))]
fn punch(_: &Target, _: &[Range<u64>], _: u64) -> io::Result<()> {
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        "holes are punched on Linux only; convert it to a VHDX, which is compacted everywhere",
    ))
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "lists of ranges, here often of one")]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_free_is_used() {
        let free = [10..20, 30..40, 60..80];
        for (range, expected) in [
            (0..10, &[0..10][..]),
            (0..15, &[0..10]),
            (12..18, &[]),
            (15..35, &[20..30]),
            (15..70, &[20..30, 40..60]),
            (80..90, &[80..90]),
            (0..100, &[0..10, 20..30, 40..60, 80..100]),
        ] {
            assert_eq!(used(&range, &free), expected, "{range:?}");
        }
    }
}
