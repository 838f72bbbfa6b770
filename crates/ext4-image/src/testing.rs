//! Oracles for tests: the kernel's mount and e2fsck. Feature `testing`; not part of the library's promises.
//!
//! An image is mounted through a loop device of its own:
//!
//! ```text
//!   losetup --find --show FILE ─► mount /dev/loopN ─► losetup --detach: the device goes with its last user
//! ```
//!
//! What `mount -o loop` chooses is freed at any moment before the mount at which somebody else on the machine, who looks
//! for a device, opens and closes it; then the mount fails ("already mounted or mount point busy"), or mounts another file.

use std::{
    path::Path,
    process::{Command, Stdio},
};

/// A mounted image; unmounted when dropped (lazily: a child that another test has just forked may hold a descriptor for
/// a moment). The loop device goes with the mount.
#[derive(Debug)]
pub struct Mount {
    dir: tempfile::TempDir,
}

impl Mount {
    /// Mounts `image` on a directory of its own.
    ///
    /// # Panics
    /// As [`loop_mount`].
    pub fn new(image: &Path, options: &str) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        loop_mount(image, dir.path(), options, &[]);
        Self { dir }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.dir.path()).stderr(Stdio::null()).status();
    }
}

/// Panics with e2fsck's output unless it finds nothing at all.
///
/// # Panics
/// Also where e2fsck is missing.
pub fn fsck(image: &Path) {
    let out = Command::new("e2fsck").arg("-fn").arg(image).output().expect("this test needs e2fsck");
    assert!(
        out.status.success(),
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}

/// Mounts the file system in `file` on the directory `point`, with mount's own options, and losetup's.
///
/// # Panics
/// Without root or loop devices, or where the kernel refuses the file system.
pub fn loop_mount(file: &Path, point: &Path, options: &str, losetup: &[&str]) {
    let run = |command: &mut Command| {
        let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        (out.status.success(), String::from_utf8_lossy(&out.stdout).trim().to_owned(), said)
    };
    let (attached, device, said) =
        run(Command::new("losetup").args(["--find", "--show"]).args(losetup).arg(file));
    assert!(attached, "this test needs root and loop devices; losetup said: {said}");
    let mut mount = Command::new("mount");
    mount.args(["-t", "ext4"]);
    if !options.is_empty() {
        mount.args(["-o", options]);
    }
    let (mounted, _, words) = run(mount.arg(&device).arg(point));
    let (detached, _, said) = run(Command::new("losetup").args(["--detach", &device]));
    assert!(mounted, "{} cannot be mounted; mount said: {words}", file.display());
    assert!(detached, "losetup --detach {device}: {said}");
}

/// The same as a function of bash: `loop_mount FILE DIRECTORY [OPTIONS]`.
pub const BASH: &str = r#"loop_mount() {
    local device status=0
    device=$(losetup --find --show "$1") || return
    mount -t ext4 ${3:+-o "$3"} "$device" "$2" || status=$?
    losetup --detach "$device"
    return $status
}
"#;
