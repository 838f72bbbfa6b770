//! What the daemon checks of an applied image itself, whatever a service VM reports.
//!
//! ```text
//!   0 ──────── file system ──────── image_bytes ── zeros ── hash tree, if asked for ── disk_bytes ── footer ── file_bytes
//!   └──── a VM that never saw the tar: strict check, zeros, every block against the tree ────┘└── the daemon ──┘
//! ```
//!
//! The tar may have taken over the VM that applied it. Therefore the daemon writes the footer, which tells other
//! programs what the file is (a differencing disk names another file that they open); all sizes follow from the one
//! that the check confirms; and the layout must be that of `lcow.profile`. Called by `apply` and `scrub`.

use super::DriverError;
use crate::{
    config::Options,
    error::CorruptFile,
    store::AppliedMeta,
    svm::{ApplySummary, CheckSummary, DiskSource, Profile},
};
use disk_io::{ReadAt, WriteAt};
use std::path::Path;
use vhd_image::vhd::{self, Footer};

fn corrupt(path: &Path, reason: impl Into<String>) -> DriverError {
    CorruptFile::new(path, reason.into()).into()
}

/// Bytes of the disk: the file system, and the hash tree if it has one.
fn disk_bytes(image_bytes: u64, tree: bool) -> u64 {
    if tree {
        verity_tree::hash_offset(image_bytes) + verity_tree::tree_bytes(image_bytes)
    } else {
        image_bytes
    }
}

/// The footer of an image, by the id of its file system and the digest of its tar.
fn footer(
    disk_bytes: u64,
    file_system: uuid::Uuid,
    tar_digest: &[u8; 32],
    profile: Profile,
) -> Result<[u8; vhd::FOOTER_SIZE], vhd::VhdError> {
    let footer = Footer::new(disk_bytes, 0, vhd::layer_id(*file_system.as_bytes(), tar_digest))?;
    Ok(match profile {
        Profile::Default => footer.to_bytes(),
        Profile::Hcsshim => footer.to_bytes_hcsshim(),
    })
}

/// What an apply was asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) profile: Profile,
    pub(super) verity: bool,
    /// Most bytes of the file system.
    pub(super) max_image_bytes: u64,
}

impl Asked {
    pub(super) fn of(options: &Options) -> Self {
        Self { profile: options.profile, verity: options.verity, max_image_bytes: options.max_layer_bytes }
    }

    /// Compares what a VM reports with what was asked for and with its file, and writes the footer. `image` is open for
    /// writing; no other process may have it open any more.
    ///
    /// # Errors
    /// `Corrupt` if sizes contradict each other, the file or the limits; `Io`.
    pub(super) fn seal(&self, image: &DiskSource, summary: &ApplySummary) -> Result<(), DriverError> {
        let disk = disk_bytes(summary.image_bytes.min(self.max_image_bytes), self.verity);
        let file = disk + vhd::FOOTER_SIZE as u64;
        let found = image.file.metadata().map_err(DriverError::io("measure", &image.path))?.len();
        if summary.image_bytes > self.max_image_bytes || summary.file_bytes != file || found != file {
            return Err(corrupt(
                &image.path,
                format!(
                    "the service VM reports a file system of {} bytes in a file of {} bytes; the file has {found} bytes, \
                     and at most {file} are possible",
                    summary.image_bytes, summary.file_bytes
                ),
            ));
        }
        let bytes = footer(disk, summary.uuid, &summary.tar_digest.bytes, self.profile)
            .map_err(|e| corrupt(&image.path, e.to_string()))?;
        (*image.file).write_all_at(&bytes, disk).map_err(DriverError::io("write the footer of", &image.path))
    }

    /// Bytes of the image's file that the checking VM gets: all but the footer.
    pub(super) fn disk_bytes(&self, summary: &ApplySummary) -> u64 {
        disk_bytes(summary.image_bytes, self.verity)
    }

    /// Compares what the checking VM found with what the VM that made the image reports.
    ///
    /// # Errors
    /// `Corrupt` if they differ, or if the layout is not the one that was asked for.
    pub(super) fn agree(
        &self,
        path: &Path,
        summary: &ApplySummary,
        found: &CheckSummary,
    ) -> Result<(), DriverError> {
        let differs = if found.image_bytes != summary.image_bytes {
            "size"
        } else if found.uuid != summary.uuid {
            "id"
        } else if found.profile != self.profile {
            "layout"
        } else if found.verity != summary.verity_root || found.verity.is_some() != self.verity {
            "hash tree"
        } else {
            return Ok(());
        };
        Err(corrupt(
            path,
            format!("its {differs} differs from what the service VM reported, or from what was asked for"),
        ))
    }
}

/// Compares the footer of an applied image with the only one that it can have.
///
/// # Errors
/// `Corrupt` if it differs; `Io`.
pub(super) fn check_footer(
    image: &DiskSource,
    applied: &AppliedMeta,
    profile: Profile,
) -> Result<(), DriverError> {
    let disk = disk_bytes(applied.image_bytes, applied.verity_root.is_some());
    if applied.file_bytes != disk + vhd::FOOTER_SIZE as u64 {
        return Err(corrupt(
            &image.path,
            format!("the file has {} bytes, but its disk has {disk}", applied.file_bytes),
        ));
    }
    let mut found = [0; vhd::FOOTER_SIZE];
    (*image.file)
        .read_exact_at(&mut found, disk)
        .map_err(DriverError::io("read the footer of", &image.path))?;
    let right = footer(disk, applied.uuid, &applied.tar_digest.bytes, profile)
        .map_err(|e| corrupt(&image.path, e.to_string()))?;
    if found != right {
        return Err(corrupt(&image.path, "its VHD footer differs from the one that was written"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::svm::RootHash;
    use std::{fs::File, sync::Arc};

    const ASKED: Asked = Asked { profile: Profile::Default, verity: false, max_image_bytes: 1 << 20 };

    fn image(file: File) -> DiskSource {
        DiskSource::read_write(Arc::new(file), "layer.vhd")
    }

    fn summary(image_bytes: u64) -> ApplySummary {
        ApplySummary {
            image_bytes,
            file_bytes: image_bytes + 512,
            uuid: uuid::Uuid::from_u128(7),
            tar_digest: format!("sha256:{}", "5a".repeat(32)).parse().unwrap(),
            ..ApplySummary::default()
        }
    }

    #[test]
    fn the_daemon_writes_the_footer_itself() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192 + 512).unwrap();
        // What a compromised VM may have left: a differencing disk.
        file.write_all_at(&[0x5A; 512], 8192).unwrap();
        let (disk, said) = (image(file), summary(8192));
        ASKED.seal(&disk, &said).unwrap();
        let applied: AppliedMeta = serde_json::from_value(serde_json::json!({
            "image_bytes": said.image_bytes, "file_bytes": said.file_bytes, "record_bytes": 1, "diff_size": 0,
            "tar_bytes": 0, "tar_digest": said.tar_digest.to_string(), "uuid": said.uuid, "entries": 0, "checked": true,
        }))
        .unwrap();
        check_footer(&disk, &applied, Profile::Default).unwrap();
        for at in [0, 16, 60, 64, 100, 511] {
            let mut byte = [0];
            disk.file.read_exact_at(&mut byte, 8192 + at).unwrap();
            disk.file.write_all_at(&[byte[0] ^ 1], 8192 + at).unwrap();
            check_footer(&disk, &applied, Profile::Default).unwrap_err();
            disk.file.write_all_at(&byte, 8192 + at).unwrap();
        }
        check_footer(&disk, &applied, Profile::Hcsshim).unwrap_err();
    }

    #[test]
    fn sizes_that_a_vm_cannot_have_made_are_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192 + 512).unwrap();
        let disk = image(file);
        let beyond = Asked { max_image_bytes: 4096, ..ASKED };
        beyond.seal(&disk, &summary(8192)).unwrap_err();
        ASKED.seal(&disk, &summary(4096)).unwrap_err();
        ASKED.seal(&disk, &summary(u64::MAX - 512)).unwrap_err();
        ASKED.seal(&disk, &ApplySummary { file_bytes: 8192, ..summary(8192) }).unwrap_err();
        Asked { verity: true, ..ASKED }.seal(&disk, &summary(8192)).unwrap_err();
        ASKED.seal(&disk, &summary(8192)).unwrap();
    }

    #[test]
    fn the_two_vms_must_agree() {
        let said = summary(8192);
        let found = CheckSummary { image_bytes: 8192, uuid: said.uuid, ..CheckSummary::default() };
        let path = Path::new("layer.vhd");
        ASKED.agree(path, &said, &found).unwrap();
        for other in [
            CheckSummary { image_bytes: 4096, ..found.clone() },
            CheckSummary { uuid: uuid::Uuid::nil(), ..found.clone() },
            CheckSummary { profile: Profile::Hcsshim, ..found.clone() },
            CheckSummary { verity: Some(RootHash([0; 32])), ..found.clone() },
        ] {
            ASKED.agree(path, &said, &other).unwrap_err();
        }
        Asked { verity: true, ..ASKED }.agree(path, &said, &found).unwrap_err();
    }
}
