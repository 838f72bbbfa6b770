//! Growing, compacting and cloning disks that a kernel writes: `layer grow | compact | clone`, `store grow | trim | du`.
//!
//! ```text
//!   cycles    write by the kernel (also cut) ─► grow │ compact │ clone ─► e2fsck -fn, the kernel's mount ─► every file as written
//!   commands  what is refused, with its reason; JSON; reflinks on XFS
//!   online    a virtual machine lets a mounted blank grow
//!   store     a running plugin: mounted and unmounted sandboxes; without one
//! ```
//!
//! `LCOW_SPACE_ROUNDS` (40) cycles from `LCOW_SPACE_SEED` (1) on. Needs root, loop devices, e2fsprogs, xfsprogs, qemu-img,
//! QEMU and the guest of `scripts/build-svm-image` (as `conformance`).
#![cfg(target_os = "linux")]

mod commands;
mod cycles;
mod online;
mod store;
#[path = "../support/mod.rs"]
mod support;

use disk_io::WriteAt;
use ext4_image::{
    Timestamp,
    format::{BlankOptions, BlankVersion, blank_of},
    testing::{fsck, loop_mount},
    writer::Attributes,
};
use std::{
    ffi::OsStr,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Output},
};
use vhd_image::{
    vhd::{FOOTER_SIZE, Footer},
    vhdx::{self, CreateOptions},
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Runs the program.
fn program<S: AsRef<OsStr>>(arguments: &[S]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver")).args(arguments).output().unwrap()
}

/// Runs a command that must succeed, with `--json`; its result.
fn json(arguments: &[&str]) -> serde_json::Value {
    let out = program(&[arguments, &["--json"]].concat());
    assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Runs a command that must succeed; its output.
fn ok(arguments: &[&str]) -> String {
    let out = program(arguments);
    assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Runs a command that must fail; its message.
fn fails(arguments: &[&str]) -> String {
    let out = program(arguments);
    assert_eq!(out.status.code(), Some(1), "{arguments:?}: {}", String::from_utf8_lossy(&out.stdout));
    String::from_utf8(out.stderr).unwrap()
}

/// Kinds of files that hold a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Raw,
    Vhd,
    Vhdx,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Raw, Self::Vhd, Self::Vhdx];

    fn extension(self) -> &'static str {
        match self {
            Self::Raw => "img",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
        }
    }
}

/// Makes a blank sandbox.
fn make(path: &Path, kind: Kind, version: BlankVersion, size: u64) {
    let a = Attributes {
        permissions: 0o755,
        mtime: Timestamp { secs: 1_600_000_000, nanos: 0 },
        ..Attributes::default()
    };
    let options = BlankOptions {
        uuid: *b"\x01\x23\x45\x67\x89\xab\x4d\xef\x81\x23\x45\x67\x89\xab\xcd\xef",
        root: a,
        directories: vec![(b"upper".to_vec(), a), (b"work".to_vec(), a)],
        mkfs_time: 1_600_000_000,
        journal_bytes: Some(4 * MIB),
        ..BlankOptions::default()
    };
    let content = blank_of(version, size, &options).unwrap();
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    if kind == Kind::Vhdx {
        let options = CreateOptions::new(size, uuid::Uuid::from_bytes(options.uuid));
        vhdx::create(&file, &options, &content).unwrap();
        return;
    }
    WriteAt::set_len(&file, size).unwrap();
    for (offset, bytes) in &content {
        file.write_all_at(bytes, *offset).unwrap();
    }
    if kind == Kind::Vhd {
        file.write_all_at(&Footer::new(size, 0, options.uuid).unwrap().to_bytes(), size).unwrap();
    }
}

/// The disk as a raw file: that file itself, its part, or a copy.
fn raw_view(path: &Path, kind: Kind, scratch: &Path) -> (PathBuf, u64) {
    let length = fs::metadata(path).unwrap().len();
    match kind {
        Kind::Raw => (path.to_owned(), length),
        Kind::Vhd => (path.to_owned(), length - FOOTER_SIZE as u64),
        Kind::Vhdx => {
            let raw = scratch.join("view.img");
            ok(&["layer", "convert", text(path), text(&raw)]);
            (raw.clone(), fs::metadata(raw).unwrap().len())
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A mounted disk.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(file: &Path, bytes: u64, options: &str) -> Self {
        let point = tempfile::tempdir().unwrap();
        loop_mount(file, point.path(), options, &["--sizelimit", &bytes.to_string()]);
        Self(point)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Unmounts it now; a drop does it lazily.
    fn unmount(self) {
        let out = Command::new("umount").arg(self.path()).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ =
            Command::new("umount").arg("-l").arg(self.path()).stderr(std::process::Stdio::null()).status();
    }
}

/// Bytes that a file takes.
fn taken(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap()) * 512
}
