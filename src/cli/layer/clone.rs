//! `layer clone`: a copy of a disk that can be attached beside it.
//!
//! ```text
//!   SRC ─┬─ reflink (XFS, btrfs) ─┐
//!        └─ its data, no holes ───┴─► DST under a temporary name ─► ids ─► (larger) ─► (writable) ─► sync, rename
//!   ids   VHD: footer     VHDX: metadata     ext4: UUID, journal      not with a hash tree: its root covers the UUID
//! ```
//!
//! Nothing that grows with the disk is rewritten. A journal in use is replayed in the copy.

use super::{
    CloneArgs,
    failure::{failed, shown},
    image::{Container, Image, fs_bytes},
    output::NewFile,
    target::{check_size, dirty, dynamic_vhd, enlarge, has_tree, refuse_partitions, writer},
};
use crate::cli::{
    CliError,
    output::{print, print_json},
};
use bytesize::ByteSize;
use disk_io::{ReadAt, WriteAt};
use ext4_image::offline::{GrowOptions, grow, set_uuid};
use lcow_sys::sparse::data_ranges;
use serde::Serialize;
use std::{fs::File, io, process::ExitCode, sync::Arc};
use uuid::Uuid;
use vhd_image::{
    vhd::{self, Footer},
    vhdx,
};

#[cfg(windows)]
use super::target::refuse_open;
#[cfg(target_os = "linux")]
use super::target::refuse_written;

/// Bytes copied at a time.
const CHUNK: usize = 1 << 20;
/// Runs of zeros of at least this size are left out.
const GRAIN: usize = 4096;

/// How the bytes were copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum How {
    Reflink,
    Copy,
}

/// What `--json` prints; sizes in bytes.
#[derive(Debug, Serialize)]
struct Cloned {
    output: String,
    how: How,
    disk_bytes: u64,
    file_system_bytes: u64,
    uuid: Uuid,
    /// The UUID is that of the source, because a hash tree covers it.
    uuid_kept: bool,
    /// The file system got the feature metadata_csum_seed, which its kernel must know (Linux 4.4).
    seed_added: bool,
}

pub(super) fn clone(args: &CloneArgs) -> Result<ExitCode, CliError> {
    #[cfg(windows)]
    refuse_open(&args.input)?;
    let image = Image::open(&args.input)?;
    #[cfg(target_os = "linux")]
    refuse_written(&args.input, &image.file)?;
    if matches!(image.container, Container::DynamicVhd { .. }) {
        return Err(dynamic_vhd(&args.input));
    }
    refuse_partitions(&image)?;
    let old_fs = fs_bytes(&image.ext4()?);
    let tree = has_tree(&image, old_fs)?;
    if tree && (args.writable || args.size.is_some()) {
        return Err(format!(
            "{} has a hash tree, so its copy can be neither writable nor larger; pack it anew without --verity",
            shown(&args.input)
        )
        .into());
    }
    let old = image.disk.size().map_err(|e| failed("read", &args.input, &e))?;
    let new = args.size.map_or(old, |size| size.as_u64());
    check_size(&args.input, old, new)?;

    let about = |e: &(dyn std::error::Error + 'static)| failed("write", &args.output, e);
    let out = NewFile::create(&args.output)?;
    let how = copy(&image.file, image.file_bytes, out.file()).map_err(|e| about(&e))?;
    let file = Arc::new(out.file().try_clone().map_err(|e| about(&e))?);
    let container = &image.container;
    let id = Uuid::new_v4();
    let container = match container {
        Container::Vhd(footer) => {
            let footer =
                Footer::new(footer.disk_bytes, footer.timestamp, id.into_bytes()).map_err(|e| about(&e))?;
            // Where the source has it: at the end of the file.
            let at = image.file_bytes - vhd::FOOTER_SIZE as u64;
            file.write_all_at(&footer.to_bytes(), at).map_err(|e| about(&e))?;
            Container::Vhd(footer)
        }
        Container::Vhdx(_) => {
            vhdx::set_disk_id(&file, id).map_err(|e| about(&e))?;
            *container
        }
        _ => *container,
    };
    let mut cloned = Cloned {
        output: args.output.to_string_lossy().into_owned(),
        how,
        disk_bytes: new,
        file_system_bytes: old_fs,
        uuid: Uuid::from_bytes(image.ext4()?.geometry().uuid),
        uuid_kept: tree,
        seed_added: false,
    };
    if !tree {
        let disk = writer(&file, &container, old).map_err(|e| about(&e))?;
        cloned.seed_added =
            set_uuid(&disk, id.into_bytes(), args.writable).map_err(|e| about(&e))?.seed_added;
        cloned.uuid = id;
    }
    if args.size.is_some() {
        enlarge(&file, &container, old, new).map_err(|e| about(&e))?;
        let disk = writer(&file, &container, new).map_err(|e| about(&e))?;
        let options = GrowOptions { dirty: dirty(&image.data, old_fs), unfinished: true };
        cloned.file_system_bytes = grow(&disk, new, &options).map_err(|e| about(&e))?.new_bytes;
    }
    out.commit()?;
    report(args, &cloned)?;
    Ok(ExitCode::SUCCESS)
}

fn report(args: &CloneArgs, cloned: &Cloned) -> Result<(), CliError> {
    if args.json {
        return print_json(cloned);
    }
    let how = match cloned.how {
        How::Reflink => "shares its blocks with the source until they change",
        How::Copy => "copied",
    };
    let uuid = if cloned.uuid_kept {
        "the UUID of the source, which its hash tree covers: do not mount both by UUID".to_owned()
    } else {
        format!("UUID {}", cloned.uuid)
    };
    let seed = if cloned.seed_added { "; it got the feature metadata_csum_seed (Linux 4.4)" } else { "" };
    print(&format!("{}: disk of {}, {how}, {uuid}{seed}\n", shown(&args.output), ByteSize(cloned.disk_bytes)))
}

/// Makes `to`, which is empty, a copy of `from`.
fn copy(from: &File, bytes: u64, to: &File) -> io::Result<How> {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsFd;
        // Another file system, or one without reflinks: both are told by errors of many kinds.
        if lcow_sys::linux::reflink::clone_file(from.as_fd(), to.as_fd()).is_ok() {
            return Ok(How::Reflink);
        }
    }
    to.set_len(bytes)?;
    let mut buffer = vec![0; CHUNK];
    for range in data_ranges(from, bytes) {
        let mut at = range.start;
        while at < range.end {
            let n = usize::try_from(range.end - at).map_or(CHUNK, |n| n.min(CHUNK));
            let chunk = &mut buffer[..n];
            from.read_exact_at(chunk, at)?;
            for (i, grain) in chunk.chunks(GRAIN).enumerate() {
                if grain.iter().any(|byte| *byte != 0) {
                    to.write_all_at(grain, at + (i * GRAIN) as u64)?;
                }
            }
            at += n as u64;
        }
    }
    Ok(How::Copy)
}
