//! Files as Hyper-V takes them: VHD or VHDX by path, never a raw file, never a window.
//!
//! ```text
//!   layer.vhd, sandbox.vhdx          ─► Direct   attached as it is, by its path
//!   another file, to be read         ─► Copy     scratch VHD: the bytes (cloned on ReFS) and a footer (exact records)
//!   an empty file, to be written     ─► Growing  scratch VHDX of the largest size ── grown(len) ─► the file
//! ```
//!
//! A growing file is not attached itself, because the daemon has it open for writing and Hyper-V requires exclusive
//! access. The daemon copies what the machine wrote, so the machine never has access to the file that becomes a layer.
//! Called by `hcs`.

use crate::svm::{Access, DiskFormat, DiskSource};
use disk_io::{ReadAt, WriteAt};
use lcow_sys::windows::fs::{check_plain, clone_prefix, make_plain};
use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    ops::Range,
    path::{Path, PathBuf},
};
use vhd_image::{
    vhd::{FOOTER_SIZE, Footer},
    vhdx::{CreateOptions, Vhdx, create},
};

/// Bytes copied at once.
const PIECE: usize = 1 << 20;
/// VHDs come in sectors of this; bytes.
const SECTOR: u64 = 512;

/// What is attached for a disk.
#[derive(Debug)]
pub(super) enum Backing {
    /// The file itself.
    Direct(PathBuf),
    /// A copy that is deleted with the disk.
    Copy(PathBuf),
    /// A separate disk that is copied back.
    Growing(PathBuf),
}

/// A disk that is ready to be attached.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) backing: Backing,
    /// Bytes of the window that the agent uses; `None` = what it writes counts.
    pub(super) len: Option<u64>,
}

impl Backing {
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Direct(path) | Self::Copy(path) | Self::Growing(path) => path,
        }
    }

    /// Removes what was made for the disk. What cannot be removed now is removed with the machine's directory.
    pub(super) fn clear(&self) {
        if let Self::Copy(path) | Self::Growing(path) = self
            && let Err(error) = fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(path = %path.display(), %error, "cannot delete a scratch disk yet");
        }
    }
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().and_then(OsStr::to_str).is_some_and(|e| e.eq_ignore_ascii_case(extension))
}

/// Whether a file is a fixed VHD of exactly its length. A footer of another type could make Hyper-V open other files.
fn is_fixed_vhd(disk: &DiskSource) -> io::Result<bool> {
    let size = ReadAt::size(&*disk.file)?;
    if !has_extension(&disk.path, "vhd") || size < FOOTER_SIZE as u64 {
        return Ok(false);
    }
    let mut bytes = [0; FOOTER_SIZE];
    disk.file.read_exact_at(&mut bytes, size - FOOTER_SIZE as u64)?;
    Ok(Footer::parse(&bytes).is_ok_and(|footer| footer.disk_bytes == size - FOOTER_SIZE as u64))
}

/// Makes a disk attachable; `name` is that of a scratch file without extension.
///
/// # Errors
/// I/O errors; a file that Hyper-V would refuse.
pub(super) fn prepare(disk: &DiskSource, name: &Path, growing_bytes: u64) -> io::Result<Prepared> {
    let size = ReadAt::size(&*disk.file)?;
    if disk.format == DiskFormat::Vhdx {
        check_plain(&disk.file)?;
        let len = Vhdx::open(&*disk.file).map_err(io::Error::other)?.geometry().disk_bytes;
        return Ok(Prepared { backing: Backing::Direct(disk.path.clone()), len: Some(len) });
    }
    if disk.access == Access::ReadWrite {
        if size != 0 || disk.len.is_some() {
            let reason = "only an empty file or a VHDX can be lent to a machine for writing";
            return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
        }
        let path = name.with_extension("vhdx");
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        make_plain(&file)?;
        let options = CreateOptions::new(growing_bytes, uuid::Uuid::new_v4());
        create(&file, &options, &[]).map_err(io::Error::other)?;
        return Ok(Prepared { backing: Backing::Growing(path), len: None });
    }
    let len = disk.len.unwrap_or_else(|| size.saturating_sub(disk.offset));
    if disk.offset == 0 && is_fixed_vhd(disk)? {
        check_plain(&disk.file)?;
        return Ok(Prepared { backing: Backing::Direct(disk.path.clone()), len: Some(len) });
    }
    let path = name.with_extension("vhd");
    let copy = File::options().read(true).write(true).create_new(true).open(&path)?;
    make_plain(&copy)?;
    let disk_bytes = len.next_multiple_of(SECTOR).max(SECTOR);
    WriteAt::set_len(&copy, disk_bytes)?;
    let cloned = clone_prefix(&disk.file, disk.offset, &copy, len)?;
    copy_bytes(&*disk.file, disk.offset, &copy, cloned..len)?;
    let footer = Footer::new(disk_bytes, 0, *uuid::Uuid::new_v4().as_bytes()).map_err(io::Error::other)?;
    copy.write_all_at(&footer.to_bytes(), disk_bytes)?;
    Ok(Prepared { backing: Backing::Copy(path), len: Some(len) })
}

/// Copies a range into `to`; in `from` it is `offset` bytes further on.
fn copy_bytes(from: &impl ReadAt, offset: u64, to: &impl WriteAt, range: Range<u64>) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    let mut at = range.start;
    while at < range.end {
        let n = usize::try_from(range.end - at).unwrap_or(PIECE).min(PIECE);
        from.read_exact_at(&mut buffer[..n], offset + at)?;
        to.write_all_at(&buffer[..n], at)?;
        at += n as u64;
    }
    Ok(())
}

/// Copies the first `len` bytes that a machine wrote to a growing disk into its file.
///
/// # Errors
/// I/O errors; a scratch disk that is damaged or too short.
pub(super) fn bring_back(scratch: &Path, file: &File, len: u64) -> io::Result<()> {
    let vhdx = Vhdx::open(File::open(scratch)?).map_err(io::Error::other)?;
    WriteAt::set_len(file, 0)?;
    copy_bytes(&vhdx, 0, file, 0..len)?;
    WriteAt::set_len(file, len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use vhd_image::vhdx::VhdxWriter;

    fn file(path: &Path, bytes: &[u8]) -> Arc<File> {
        fs::write(path, bytes).unwrap();
        Arc::new(File::options().read(true).write(true).open(path).unwrap())
    }

    #[test]
    fn a_layer_is_attached_as_it_is_and_a_record_as_a_copy() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let footer = Footer::new(4096, 0, [1; 16]).unwrap().to_bytes();
        let vhd = [&[7; 4096][..], &footer].concat();
        let layer = DiskSource::read_only(file(&at("layer.vhd"), &vhd), at("layer.vhd")).window(0, 4096);
        let prepared = prepare(&layer, &at("s1"), 1 << 30).unwrap();
        assert!(matches!(&prepared.backing, Backing::Direct(p) if *p == at("layer.vhd")));
        assert_eq!(prepared.len, Some(4096));
        // A footer alone makes no VHD: the name, the type and the size must be right too.
        let dynamic = Footer::new(1024, 0, [1; 16]).unwrap().to_bytes();
        for (name, bytes) in [
            ("record", vhd.clone()),
            ("short.vhd", [&[7; 4096][..], &dynamic].concat()),
            ("raw.vhd", vec![3; 700]),
        ] {
            let disk = DiskSource::read_only(file(&at(name), &bytes), at(name));
            let prepared = prepare(&disk, &at(&format!("copy-{name}")), 1 << 30).unwrap();
            let Backing::Copy(path) = &prepared.backing else { panic!("{name}: {prepared:?}") };
            let copy = fs::read(path).unwrap();
            assert!(copy.starts_with(&bytes) && copy.len().is_multiple_of(512), "{name}");
            assert_eq!(prepared.len, Some(bytes.len() as u64));
            let found = Footer::parse(&copy[copy.len() - 512..]).unwrap();
            assert_eq!(found.disk_bytes, copy.len() as u64 - 512);
            prepared.backing.clear();
            assert!(!path.exists());
        }
    }

    #[test]
    fn what_a_machine_wrote_comes_back_and_a_full_file_is_not_lent() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let target = file(&at("layer.vhd"), b"");
        let disk = DiskSource::read_write(target.clone(), at("layer.vhd"));
        let prepared = prepare(&disk, &at("grow"), 64 << 20).unwrap();
        assert!(matches!(prepared.backing, Backing::Growing(_)) && prepared.len.is_none());
        let bytes: Vec<u8> = (0..3_000_001u32).map(|n| (n / 7) as u8).collect();
        {
            let file = File::options().read(true).write(true).open(prepared.backing.path()).unwrap();
            let writer = VhdxWriter::open(file).unwrap();
            writer.write_all_at(&bytes, 0).unwrap();
            writer.sync().unwrap();
        }
        bring_back(prepared.backing.path(), &target, bytes.len() as u64).unwrap();
        assert!(fs::read(at("layer.vhd")).unwrap() == bytes);
        assert_eq!(prepare(&disk, &at("x"), 64 << 20).unwrap_err().kind(), io::ErrorKind::Unsupported);
    }
}
