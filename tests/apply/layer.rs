//! Applying a tar, with all checks that hold for every layer.

use crate::tree::{Tree, snapshot};
use ext4_image::testing::loop_mount;
use layer_codec::{
    DiffError, DigestKind, TarDigest,
    apply::{ApplyOptions, ApplySummary, LowerLayers, NoLowers, apply},
    record,
};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;
use vhd_image::vhd::Footer;

/// An applied layer in a folder of its own.
pub(crate) struct Applied {
    dir: TempDir,
    pub(crate) summary: ApplySummary,
}

/// A blank ext4 of the kernel's own making, mounted read-write, in a folder of its own.
pub(crate) struct Blank {
    pub(crate) point: PathBuf,
    // Dropped in this order.
    _mounted: Mounted,
    _dir: TempDir,
}

impl Blank {
    pub(crate) fn new() -> Self {
        let dir = TempDir::with_prefix("blank").expect("a folder can be made");
        let (file, point) = (dir.path().join("blank"), dir.path().join("mnt"));
        create(&file).set_len(64 << 20).expect("a sparse file can be made");
        run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-b", "4096", "-O", "ea_inode"]).arg(&file));
        fs::create_dir(&point).expect("a folder can be made");
        run(Command::new("mount").args(["-t", "ext4", "-o", "loop"]).arg(&file).arg(&point));
        Self { _mounted: Mounted { point: point.clone() }, point, _dir: dir }
    }
}

/// An overlay of a lower and an upper, as containers have it; gone when dropped.
pub(crate) fn overlay(lower: &Path, upper: &Path, point: &Path) -> Mounted {
    for name in ["upper", "work"] {
        fs::create_dir(upper.join(name)).expect("a folder can be made");
    }
    fs::create_dir(point).expect("a folder can be made");
    let options = format!(
        "lowerdir={},upperdir={}/upper,workdir={}/work",
        lower.display(),
        upper.display(),
        upper.display()
    );
    run(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &options]).arg(point));
    Mounted { point: point.to_owned() }
}

/// A loop mount, gone when dropped, also while a test fails.
pub(crate) struct Mounted {
    point: PathBuf,
}

impl Mounted {
    /// What is mounted on `point`.
    pub(crate) fn at(point: &Path) -> Self {
        Self { point: point.to_owned() }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The loop device goes with its last user. A program that another test is just starting may hold files of this
        // mount until it runs.
        let umount = || Command::new("umount").arg(&self.point).output().is_ok_and(|o| o.status.success());
        let done = (0..50).any(|_| {
            let done = umount();
            if !done {
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
            done
        });
        assert!(done || std::thread::panicking(), "{} cannot be unmounted", self.point.display());
    }
}

pub(crate) fn run(command: &mut Command) -> Vec<u8> {
    let out = command.output().unwrap_or_else(|e| panic!("this test needs {command:?}: {e}"));
    assert!(
        out.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    out.stdout
}

pub(crate) fn options() -> ApplyOptions {
    ApplyOptions::default()
}

fn create(path: &Path) -> File {
    File::options().read(true).write(true).create_new(true).open(path).expect("a file can be made")
}

/// Applies, and checks that the tar comes back, that the footer is right and that e2fsck finds nothing.
pub(crate) fn try_apply(
    tar: &[u8],
    lowers: &mut dyn LowerLayers,
    options: &ApplyOptions,
) -> Result<Applied, DiffError> {
    let dir = TempDir::with_prefix("apply").expect("a folder can be made");
    let (image, record_file) = (create(&dir.path().join("layer.vhd")), create(&dir.path().join("record")));
    let summary = apply(tar, &image, &record_file, lowers, options)?;
    assert_eq!(summary.tar_bytes, tar.len() as u64);
    assert_eq!(summary.tar_digest, TarDigest::of(DigestKind::Blake3, tar));
    assert_eq!(summary.file_bytes, image.metadata().expect("metadata").len());
    assert_eq!(summary.record_bytes, record_file.metadata().expect("metadata").len());
    let mut back = Vec::new();
    record::replay(&image, &record_file, &mut back).expect("the tar comes back");
    assert!(back == tar, "the very tar comes back");
    let bytes = fs::read(dir.path().join("layer.vhd")).expect("the image can be read");
    let footer = Footer::parse(&bytes[summary.image_bytes as usize..]).expect("a good footer");
    assert_eq!(footer.disk_bytes, summary.image_bytes);
    run(Command::new("e2fsck").arg("-fn").arg(dir.path().join("layer.vhd")));
    Ok(Applied { dir, summary })
}

pub(crate) fn apply_ok(tar: &[u8]) -> Applied {
    try_apply(tar, &mut NoLowers, &options()).unwrap_or_else(|e| panic!("{}", report(&e)))
}

/// An error with its causes.
pub(crate) fn report(e: &DiffError) -> String {
    let causes = std::iter::successors(std::error::Error::source(e), |s| s.source());
    causes.fold(e.to_string(), |text, cause| text + ": " + &cause.to_string())
}

impl Applied {
    pub(crate) fn mount(&self) -> (Mounted, PathBuf) {
        assert!(rustix::process::geteuid().is_root(), "this test mounts file systems: run it as root");
        let point = self.dir.path().join("mnt");
        fs::create_dir(&point).expect("a folder can be made");
        let limit = self.summary.image_bytes.to_string();
        loop_mount(&self.dir.path().join("layer.vhd"), &point, "ro", &["--read-only", "--sizelimit", &limit]);
        (Mounted { point: point.clone() }, point)
    }

    /// The tree as the kernel shows it.
    pub(crate) fn tree(&self) -> Tree {
        let (_mounted, point) = self.mount();
        snapshot(&point)
    }

    pub(crate) fn image(&self) -> io::Result<File> {
        File::open(self.dir.path().join("layer.vhd"))
    }

    pub(crate) fn record(&self) -> io::Result<File> {
        File::open(self.dir.path().join("record"))
    }
}
