//! The file that a disk is written to: raw, fixed VHD, dynamic VHDX or qcow2.
//!
//! ```text
//!   raw, VHD     disk ─► file (a VHD's footer comes last)
//!   VHDX, qcow2  disk ─► unnamed file ─► what is not zero ─► file, in one pass
//! ```
//!
//! Equal disks give equal files in every format. Called by `pack`.

use crate::cli::{
    CliError,
    layer::{
        failure::{failed, shown},
        output::NewFile,
    },
};
use clap::ValueEnum;
use disk_io::{ReadAt, WriteAt};
use lcow_sys::sparse::data_ranges;
use serde::Serialize;
use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};
use uuid::Uuid;
use vhd_image::{
    qcow2,
    vhd::{self, Footer},
    vhdx::{self, CreateOptions},
};

/// A kind of file that holds a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum DiskFormat {
    /// The disk and nothing else.
    Raw,
    /// A fixed VHD: the disk and a footer.
    Vhd,
    /// A dynamic VHDX: only the blocks in use.
    Vhdx,
    /// QEMU's format: only the clusters in use.
    Qcow2,
}

impl DiskFormat {
    /// The format that a file name's extension stands for.
    pub(super) fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "img" | "raw" | "ext4" => Some(Self::Raw),
            "vhd" => Some(Self::Vhd),
            "vhdx" => Some(Self::Vhdx),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }

    /// Most bytes of a disk in such a file.
    pub(super) fn most(self) -> u64 {
        match self {
            Self::Vhd => vhd::MAX_DISK_BYTES,
            Self::Raw | Self::Vhdx | Self::Qcow2 => layer_codec::apply::MAX_RAW_BYTES,
        }
    }
}

/// A new file for a disk.
pub(super) struct DiskFile {
    path: PathBuf,
    format: DiskFormat,
    out: NewFile,
    /// Where the disk is written first, if the file cannot be written in any order.
    staged: Option<Arc<File>>,
}

impl DiskFile {
    pub(super) fn create(path: &Path, format: DiskFormat) -> Result<Self, CliError> {
        let out = NewFile::create(path)?;
        let staged = match format {
            DiskFormat::Raw | DiskFormat::Vhd => None,
            DiskFormat::Vhdx | DiskFormat::Qcow2 => Some(Arc::new(out.scratch()?)),
        };
        Ok(Self { path: path.to_owned(), format, out, staged })
    }

    /// The disk, empty at first.
    pub(super) fn disk(&self) -> Result<Arc<dyn WriteAt>, CliError> {
        match &self.staged {
            Some(staged) => Ok(staged.clone()),
            None => Ok(Arc::new(self.out.disk()?)),
        }
    }

    /// An unnamed file beside it.
    pub(super) fn scratch(&self) -> Result<File, CliError> {
        self.out.scratch()
    }

    /// Completes the file for a disk of `disk_bytes`; it has no name yet. Gives its length.
    pub(super) fn complete(&self, disk_bytes: u64, uuid: Uuid) -> Result<u64, CliError> {
        let about = |e: &(dyn std::error::Error + 'static)| failed("write", &self.path, e);
        let file = self.out.file();
        match (self.format, &self.staged) {
            (DiskFormat::Vhd, _) => {
                let footer = Footer::new(disk_bytes, 0, uuid.into_bytes()).map_err(|e| about(&e))?;
                WriteAt::write_all_at(file, &footer.to_bytes(), disk_bytes).map_err(|e| about(&e))?;
                let bytes = disk_bytes + vhd::FOOTER_SIZE as u64;
                WriteAt::set_len(file, bytes).map_err(|e| about(&e))?;
                Ok(bytes)
            }
            (DiskFormat::Vhdx, Some(staged)) => {
                let data = data_ranges(staged, disk_bytes);
                let options = CreateOptions::new(disk_bytes, uuid);
                vhdx::create_from(file, &options, &**staged, &data).map_err(|e| about(&e))
            }
            (DiskFormat::Qcow2, Some(staged)) => {
                let data = data_ranges(staged, disk_bytes);
                qcow2::create_from(file, disk_bytes, &**staged, &data).map_err(|e| about(&e))
            }
            _ => ReadAt::size(file).map_err(|e| about(&e)),
        }
    }

    /// The complete file, for whoever digests it.
    pub(super) fn file(&self) -> &File {
        self.out.file()
    }

    /// Makes the file durable and gives it its name.
    pub(super) fn commit(self) -> Result<(), CliError> {
        self.out.commit()
    }
}

/// The format of `path`, chosen by hand or by its extension.
pub(super) fn format_of(chosen: Option<DiskFormat>, path: &Path) -> Result<DiskFormat, CliError> {
    chosen.or_else(|| DiskFormat::of(path)).ok_or_else(|| {
        format!(
            "{} does not end with .img, .raw, .ext4, .vhd, .vhdx or .qcow2; choose the format with --format",
            shown(path)
        )
        .into()
    })
}
