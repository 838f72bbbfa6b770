//! How a blank sandbox is made: a writable ext4 of fixed size with `upper` and `work`, in a VHD or a VHDX.
//!
//! ```text
//!   sandbox.vhd    0 ── ext4, sparse ── bytes ── footer     lcow.mount=overlay: this host mounts it
//!   sandbox.vhdx   the same ext4, blocks on demand          lcow.mount=none: virtual machines attach it
//! ```
//!
//! The daemon formats it itself: no untrusted byte is read, so a service VM would only add time. `pristine` compares a
//! sandbox with the attributes set here to decide whether it was ever written. Called by `lifecycle` and `views`.

use super::DriverError;
#[cfg(target_os = "linux")]
use crate::store::SnapshotUsage;
use crate::{
    config::MountKind,
    store::{LayerId, Layout, files, layout},
};
use ext4_image::{Timestamp, format::BlankOptions, writer::Attributes};
use std::{
    fs::File,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};
use vhd_image::{vhd, vhdx};

/// Directory of a sandbox that holds what the container writes: overlayfs's `upperdir`.
pub(super) const UPPER: &str = "upper";
/// Permissions of [`UPPER`] in a blank sandbox.
pub(super) const ROOT_PERMISSIONS: u16 = 0o755;
/// Overlayfs's `workdir`; on the file system of [`UPPER`], as overlayfs demands.
pub(super) const WORK: &str = "work";

/// File name of a new sandbox: a VHDX if virtual machines attach it.
pub(super) fn file_name(mount: MountKind) -> &'static str {
    match mount {
        MountKind::Overlay => layout::SANDBOX_FILE,
        MountKind::None => layout::SANDBOX_VHDX_FILE,
    }
}

/// The file of an existing sandbox, which may have been made under another `lcow.mount`.
pub(super) fn path(layout: &Layout, id: &LayerId) -> PathBuf {
    let vhdx = layout.layer_file(id, layout::SANDBOX_VHDX_FILE);
    if vhdx.exists() { vhdx } else { layout.layer_file(id, layout::SANDBOX_FILE) }
}

/// Writes and syncs a blank sandbox of `bytes` in `directory`: a sparse fixed VHD for the host, or a VHDX for virtual
/// machines. The caller syncs the directory. A VHDX is never sparse; it grows by itself. `root` are the host's ids of the containers' root.
pub(super) fn write(
    directory: &Path,
    bytes: u64,
    mount: MountKind,
    root: (u32, u32),
) -> Result<(), DriverError> {
    let (path, file) = write_unsynced(directory, bytes, mount, root)?;
    files::sync_file(&file, &path).map_err(DriverError::io("sync the sandbox", &path))
}

/// As [`write`], for callers that sync the directory and its files themselves.
pub(super) fn write_unsynced(
    directory: &Path,
    bytes: u64,
    mount: MountKind,
    root: (u32, u32),
) -> Result<(PathBuf, File), DriverError> {
    let path = directory.join(file_name(mount));
    let write = || -> std::io::Result<File> {
        let file = files::create_private(&path)?;
        let uuid = uuid::Uuid::new_v4();
        let blank = ext4_image::format::blank(bytes, &blank_options(bytes, uuid, root))
            .map_err(std::io::Error::other)?;
        if mount == MountKind::None {
            let disk = vhdx::CreateOptions::new(bytes, uuid);
            vhdx::create(&file, &disk, &blank).map_err(std::io::Error::other)?;
            return Ok(file);
        }
        let footer = vhd::Footer::new(bytes, 0, uuid.into_bytes()).map_err(std::io::Error::other)?.to_bytes();
        disk_io::WriteAt::set_len(&file, bytes + vhd::FOOTER_SIZE as u64)?;
        for (offset, data) in &blank {
            disk_io::WriteAt::write_all_at(&file, data, *offset)?;
        }
        disk_io::WriteAt::write_all_at(&file, &footer, bytes)?;
        Ok(file)
    };
    let file = write().map_err(DriverError::io("format the sandbox", &path))?;
    Ok((path, file))
}

/// What was written to a mounted sandbox: what its file system says, less what a blank one has.
#[cfg(target_os = "linux")]
pub(super) fn usage_of(space: lcow_sys::linux::mount::Space) -> SnapshotUsage {
    let bytes = space.total.saturating_sub(space.free);
    let inodes = space.inodes.saturating_sub(space.inodes_free);
    SnapshotUsage { bytes: bytes.saturating_sub(BLANK.bytes), inodes: inodes.saturating_sub(BLANK.inodes) }
}

/// What `statfs` counts in a blank sandbox, without the directory that containers write to: a block each for the root and
/// [`WORK`], and the inodes of these and the nine that ext4 reserves besides the root.
#[cfg(target_os = "linux")]
const BLANK: SnapshotUsage = SnapshotUsage { bytes: 2 * 4096, inodes: 11 };

/// The file system of a blank sandbox: directories `upper` and `work`. Overlayfs takes mode and owner of the
/// containers' `/` from `upper`, which therefore belongs to the containers' root.
fn blank_options(bytes: u64, uuid: uuid::Uuid, (uid, gid): (u32, u32)) -> BlankOptions {
    /// The journal takes this part of a sandbox, within the limits below.
    const JOURNAL_PART: u64 = 128;
    const MIN_JOURNAL: u64 = 4 << 20;
    const MAX_JOURNAL: u64 = 32 << 20;
    /// Label of every sandbox; at most 16 bytes.
    const LABEL: &[u8] = b"lcow-sandbox";
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mtime = Timestamp { secs: now.as_secs().cast_signed(), nanos: now.subsec_nanos() };
    let directory = |permissions, uid, gid| Attributes {
        permissions,
        uid,
        gid,
        mtime,
        atime: Some(mtime),
        ctime: Some(mtime),
    };
    BlankOptions {
        uuid: uuid.into_bytes(),
        label: LABEL.to_vec(),
        // With userns-remap the mapped root, who owns nothing here, must be able to pass through.
        root: directory(0o711, 0, 0),
        directories: vec![
            (UPPER.as_bytes().to_vec(), directory(ROOT_PERMISSIONS, uid, gid)),
            (WORK.as_bytes().to_vec(), directory(0o755, uid, gid)),
        ],
        // Blocks of a journal stay allocated on the host's disk once they were used.
        journal_bytes: Some((bytes / JOURNAL_PART).clamp(MIN_JOURNAL, MAX_JOURNAL)),
        // The field has 32 bits; it is informative only.
        mkfs_time: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use lcow_sys::linux::{
        loopdev::{self, LoopSpec},
        mount::{self, Ext4Options},
    };
    use std::os::fd::AsFd;

    /// Unmounts at the end, also of a test that fails.
    struct Mounted(PathBuf);

    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = mount::umount(&self.0, true);
        }
    }

    #[test]
    fn a_blank_sandbox_takes_what_an_empty_upper_directory_takes_whatever_its_size() {
        for bytes in [16 << 20, 64 << 20, 1 << 30, 20 << 30, 2040 << 30] {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), bytes, MountKind::Overlay, (0, 0)).unwrap();
            let path = folder.path().join(file_name(MountKind::Overlay));
            let file = File::options().read(true).write(true).open(path).unwrap();
            let spec = LoopSpec {
                sizelimit: bytes,
                autoclear: true,
                name: "lcow-test".into(),
                ..LoopSpec::default()
            };
            let device = loopdev::attach(file.as_fd(), &spec).expect("loop devices need root");
            let target = folder.path().join("mnt");
            std::fs::create_dir(&target).unwrap();
            mount::mount_ext4(&device.path, &target, Ext4Options::default()).unwrap();
            let mounted = Mounted(target);
            let usage = || usage_of(mount::space(&mounted.0).unwrap());
            assert_eq!(usage(), SnapshotUsage { bytes: 4096, inodes: 1 }, "{bytes}");
            std::fs::write(mounted.0.join(UPPER).join("file"), vec![1; 1 << 20]).unwrap();
            assert_eq!(usage(), SnapshotUsage { bytes: 4096 + (1 << 20), inodes: 2 }, "{bytes}");
        }
    }
}
