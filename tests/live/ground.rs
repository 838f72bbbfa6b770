//! The disk below a plugin's home.
//!
//! ```text
//!   Plain  whatever the temporary folder lies on: ext4 has no reflinks     recent files are copied
//!   Xfs    a disk of its own, with reflinks                                sandboxes are cloned
//! ```

use super::support::Plugin;
use lcow_sys::linux::loopdev::{self, LoopSpec};
use rustix::mount::{MountFlags, mount};
use std::{
    fs::{self, File},
    os::fd::AsFd,
    path::Path,
    process::Command,
};

/// Bytes of a disk with reflinks; sparse.
const BYTES: u64 = 4 << 30;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ground {
    Plain,
    Xfs,
}

impl Ground {
    pub(crate) const ALL: [Self; 2] = [Self::Plain, Self::Xfs];

    /// Lays it below the home of a plugin that has had no Init. The plugin unmounts it when it is dropped.
    pub(crate) fn lay(self, plugin: &Plugin) {
        if self == Self::Plain {
            return;
        }
        let image = plugin.folder.join("xfs.img");
        let file = File::create_new(&image).unwrap();
        file.set_len(BYTES).unwrap();
        let made = Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&image).status();
        assert!(made.expect("mkfs.xfs must be installed: scripts/install-deps test").success());
        let file = File::options().read(true).write(true).open(&image).unwrap();
        let device =
            loopdev::attach(file.as_fd(), &LoopSpec { autoclear: true, ..LoopSpec::default() }).unwrap();
        fs::create_dir(plugin.home()).unwrap();
        mount(&device.path, plugin.home(), "xfs", MountFlags::empty(), None).unwrap();
    }
}

/// Unpacks a tar with GNU tar, which must find no fault with it.
pub(crate) fn unpack(tar: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tar"), tar).unwrap();
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    let mut unpack = Command::new("tar");
    unpack.arg("-C").arg(&out).arg("-xpf").arg(folder.path().join("tar"));
    let output = unpack.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.is_empty(), "GNU tar: {said}");
    fs::remove_file(folder.path().join("tar")).unwrap();
    folder
}

/// What `unpack` has made.
pub(crate) fn read(unpacked: &tempfile::TempDir, name: &str) -> Vec<u8> {
    fs::read(Path::new(unpacked.path()).join("out").join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}
