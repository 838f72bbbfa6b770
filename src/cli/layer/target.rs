//! A disk that a command changes: opened for writing, and attached nowhere.
//!
//! ```text
//!   DISK ─► image (container, file system) ─► in use? partition table? hash tree? ─► Target ─► grow, compact
//! ```
//!
//! What another program has open is refused, as far as the system tells: a loop device, a virtual machine, an editor. Called
//! by `grow` and `compact`, in part by `clone`.

use super::{
    failure::{failed, shown},
    image::{Container, Disk, Image, fs_bytes},
};
use crate::cli::CliError;
use disk_io::{ReadAt, SubDisk, WriteAt};
use std::{fs::File, io, ops::Range, path::Path, sync::Arc};
use vhd_image::{
    vhd::{self, Footer},
    vhdx::{self, VhdxWriter},
};

/// Sizes of disks are multiples of this, in bytes.
const SECTOR: u64 = 512;
/// Where an MBR has its entries and its mark, and what a GPT begins with.
const MBR_ENTRIES: Range<usize> = 446..510;
const MBR_MARK: [u8; 2] = [0x55, 0xAA];
const GPT_MARK: &[u8] = b"EFI PART";

/// The disk, opened.
pub(super) struct Target {
    pub(super) image: Image,
    /// Size of the file system, in bytes.
    pub(super) fs_bytes: u64,
}

impl Target {
    /// Opens a disk to change it.
    pub(super) fn open(path: &Path) -> Result<Self, CliError> {
        #[cfg(windows)]
        refuse_open(path)?;
        let image = Image::open_with(path, true)?;
        refuse_attached(path, &image.file)?;
        if matches!(image.container, Container::DynamicVhd { .. }) {
            return Err(dynamic_vhd(path));
        }
        refuse_partitions(&image)?;
        let fs_bytes = fs_bytes(&image.ext4()?);
        if has_tree(&image, fs_bytes)? {
            return Err(format!(
                "{} has a hash tree, whose root hash any change would break; clone it without the tree, or pack it anew",
                shown(path)
            )
            .into());
        }
        Ok(Self { image, fs_bytes })
    }

    /// The disk for writing.
    pub(super) fn writer(&self) -> Result<Box<dyn WriteAt>, CliError> {
        let size = self.image.disk.size().map_err(|e| failed("read", &self.image.path, &e))?;
        writer(&self.image.file, &self.image.container, size)
            .map_err(|e| failed("open", &self.image.path, &e))
    }

    /// Bytes that the file takes on its disk.
    pub(super) fn allocated(&self) -> Result<u64, CliError> {
        let known = self.image.file.metadata().map_err(|e| failed("read", &self.image.path, &e))?;
        Ok(crate::store::allocated_bytes(&known))
    }
}

/// Why a dynamic VHD is refused.
pub(super) fn dynamic_vhd(path: &Path) -> CliError {
    format!(
        "{} is a dynamic VHD, which is only read; convert it with `lcow-graphdriver layer convert {} OUT.vhdx`",
        shown(path),
        shown(path)
    )
    .into()
}

/// The disk of `size` bytes in a file, for writing.
pub(super) fn writer(file: &Arc<File>, container: &Container, size: u64) -> io::Result<Box<dyn WriteAt>> {
    Ok(match container {
        Container::Vhdx(_) => Box::new(VhdxWriter::open(file.clone())?),
        _ => Box::new(SubDisk::new(file.clone(), 0, size)),
    })
}

/// Makes the disk in a file larger, durably; it reads as zeros behind what it had. A cut leaves the old or the new size.
pub(super) fn enlarge(file: &File, container: &Container, old: u64, new: u64) -> io::Result<()> {
    if new == old {
        return Ok(());
    }
    match container {
        Container::Raw => file.set_len(new)?,
        Container::Vhd(footer) => {
            let footer =
                Footer::new(new, footer.timestamp, footer.uuid).map_err(io::Error::other)?.to_bytes();
            // One write makes the file longer and ends it with a footer. Only then the old one can go.
            file.write_all_at(&footer, new)?;
            file.sync_all()?;
            let rest = (new - old).min(vhd::FOOTER_SIZE as u64) as usize;
            file.write_all_at(&vec![0; rest], old)?;
        }
        Container::Vhdx(_) => vhdx::grow(file, new)?,
        Container::DynamicVhd { .. } => return Err(io::ErrorKind::Unsupported.into()),
    }
    file.sync_all()
}

/// Checks the size that a disk is to have.
pub(super) fn check_size(path: &Path, old: u64, new: u64) -> Result<(), CliError> {
    if new < old {
        return Err(format!(
            "{} has {old} bytes; a disk cannot shrink to {new}, but `layer compact` gives unused space back",
            shown(path)
        )
        .into());
    }
    if !new.is_multiple_of(SECTOR) {
        return Err(format!("a disk of {new} bytes is not a multiple of {SECTOR}").into());
    }
    Ok(())
}

/// Byte ranges behind the file system that may not be zeros.
pub(super) fn dirty(data: &[Range<u64>], fs_bytes: u64) -> Vec<Range<u64>> {
    data.iter().filter(|r| r.end > fs_bytes).map(|r| r.start.max(fs_bytes)..r.end).collect()
}

/// Whether a hash tree follows the file system.
pub(super) fn has_tree(image: &Image, fs_bytes: u64) -> Result<bool, CliError> {
    let disk: &Disk = &image.disk;
    Ok(verity_tree::find(disk, fs_bytes).map_err(|e| failed("read", &image.path, &e))?.is_some())
}

/// Refuses a disk with a partition table, even if a file system begins at its first byte.
pub(super) fn refuse_partitions(image: &Image) -> Result<(), CliError> {
    let mut head = [0; 2 * SECTOR as usize];
    let read = image.disk.size().and_then(|size| {
        if size < head.len() as u64 { Ok(()) } else { image.disk.read_exact_at(&mut head, 0) }
    });
    read.map_err(|e| failed("read", &image.path, &e))?;
    let mbr = head[MBR_ENTRIES.end..SECTOR as usize] == MBR_MARK && head[MBR_ENTRIES].iter().any(|b| *b != 0);
    if mbr || head[SECTOR as usize..].starts_with(GPT_MARK) {
        return Err(format!(
            "{} has a partition table; only a disk that is one file system is changed",
            shown(&image.path)
        )
        .into());
    }
    Ok(())
}

/// Refuses a file that Windows has open elsewhere.
#[cfg(windows)]
pub(super) fn refuse_open(path: &Path) -> Result<(), CliError> {
    use std::os::windows::fs::OpenOptionsExt;
    /// `ERROR_SHARING_VIOLATION`.
    const SHARING_VIOLATION: i32 = 32;
    match File::options().read(true).write(true).share_mode(0).open(path) {
        Err(e) if e.raw_os_error() == Some(SHARING_VIOLATION) => Err(in_use(path)),
        _ => Ok(()),
    }
}

/// Refuses a file that is no regular one, is behind a loop device, or is open in another process.
fn refuse_attached(path: &Path, file: &File) -> Result<(), CliError> {
    if !file.metadata().map_err(|e| failed("read", path, &e))?.is_file() {
        return Err(format!("{} is not a regular file", shown(path)).into());
    }
    #[cfg(target_os = "linux")]
    {
        refuse_loops(path, file, |_| true)?;
        // Where the file system has no leases, there is no answer.
        if lcow_sys::linux::process::is_open_elsewhere(file).unwrap_or(false) {
            return Err(in_use(path));
        }
    }
    Ok(())
}

/// Refuses a file that something may be writing to.
#[cfg(target_os = "linux")]
pub(super) fn refuse_written(path: &Path, file: &File) -> Result<(), CliError> {
    refuse_loops(path, file, |read_only| !read_only)?;
    if lcow_sys::linux::process::has_writers(file).unwrap_or(false) {
        return Err(in_use(path));
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn refuse_loops(path: &Path, file: &File, counts: impl Fn(bool) -> bool) -> Result<(), CliError> {
    use std::os::fd::AsFd;
    let found = lcow_sys::linux::loopdev::find_by_backing(file.as_fd())
        .map_err(|e| failed("look for the loop device of", path, &e))?;
    match found.iter().find(|device| counts(device.read_only)) {
        Some(device) => Err(format!(
            "{} is attached as /dev/loop{}; unmount it and detach the device first (`losetup -d`), or, if it is a \
             sandbox of the store, use `store grow` or `store trim`",
            shown(path),
            device.number
        )
        .into()),
        None => Ok(()),
    }
}

fn in_use(path: &Path) -> CliError {
    format!("{} is open in another process, perhaps a virtual machine; end that first", shown(path)).into()
}
