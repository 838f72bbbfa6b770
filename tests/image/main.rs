//! The `image` commands on images of all kinds, in layouts and archives that are built here (`oci_image::testing`).

mod agree;
#[cfg(target_os = "linux")]
mod boot;
#[cfg(target_os = "linux")]
mod broken;
#[cfg(target_os = "linux")]
mod commit;
mod foreign;
mod hostile;
#[cfg(target_os = "linux")]
mod jail;
mod look;
#[cfg(target_os = "linux")]
mod pack;
#[cfg(target_os = "linux")]
mod readback;
#[cfg(all(target_os = "linux", feature = "registry"))]
mod registry;
mod stacks;

use oci_image::testing::{Packing, Store, Tar, archive, directory};
use std::{
    fs,
    io::Write,
    path::PathBuf,
    process::{Command, Output, Stdio},
};
use tempfile::TempDir;

/// A directory for one test.
pub(crate) struct Scene {
    folder: TempDir,
}

impl Scene {
    pub(crate) fn new() -> Self {
        Self { folder: TempDir::new().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).into_os_string().into_string().unwrap()
    }

    /// A layout; its source.
    pub(crate) fn layout(&self, name: &str, store: &Store) -> String {
        directory(&self.path(name), &store.files());
        format!("oci:{}", self.text(name))
    }

    /// An OCI archive; its source.
    pub(crate) fn oci_archive(&self, name: &str, store: &Store) -> String {
        format!("oci-archive:{}", self.file(name, &archive(&store.files())))
    }

    /// A Docker archive; its source.
    pub(crate) fn docker_archive(&self, name: &str, store: &Store) -> String {
        format!("docker-archive:{}", self.file(name, &archive(&store.docker())))
    }

    /// A file; its path.
    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> String {
        fs::write(self.path(name), bytes).unwrap();
        self.text(name)
    }

    /// Files in the directory.
    pub(crate) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// A command of `image`.
pub(crate) fn image(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"));
    command.arg("image").args(arguments).stdin(Stdio::null());
    command
}

/// The output of a command that must succeed.
pub(crate) fn ok(arguments: &[&str]) -> Vec<u8> {
    let done = image(arguments).output().unwrap();
    assert!(done.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(String::from_utf8_lossy(&done.stderr), "", "{arguments:?}");
    done.stdout
}

/// The output of a command that must succeed, as text.
pub(crate) fn text(arguments: &[&str]) -> String {
    String::from_utf8(ok(arguments)).unwrap()
}

/// The output of a command that must succeed, as JSON.
pub(crate) fn json(arguments: &[&str]) -> serde_json::Value {
    serde_json::from_slice(&ok(arguments)).unwrap()
}

/// A command that must fail with status 1; its message.
pub(crate) fn fails(arguments: &[&str]) -> String {
    failed(arguments, &image(arguments).output().unwrap())
}

fn failed(arguments: &[&str], done: &Output) -> String {
    let message = String::from_utf8(done.stderr.clone()).unwrap();
    assert_eq!(done.status.code(), Some(1), "{arguments:?}: {message}");
    assert_eq!(message.lines().count(), 1, "one line of message: {message}");
    message
}

/// A command with bytes on a pipe as its standard input.
pub(crate) fn piped(arguments: &[&str], input: &[u8]) -> Output {
    let mut command = image(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // The program may stop before it has read everything.
            let _ = stdin.write_all(input);
        });
        child.wait_with_output().unwrap()
    })
}

/// An image with two layers, the second of which changes the first.
pub(crate) fn sample(packing: Packing) -> Store {
    let lower = Tar::default()
        .dir("etc")
        .file("etc/passwd", b"root:x:0:0::/:/bin/sh\n")
        .file("etc/old", &[7; 5000])
        .dir("bin")
        .file("bin/sh", &vec![1; 300_000])
        .link("bin/ash", "bin/sh")
        .symlink("sh", "bin/sh")
        .finish();
    let upper =
        Tar::default().whiteout("etc", "old").file("etc/passwd", b"changed\n").file("new", b"").finish();
    let mut store = Store::default();
    let manifest = store.manifest("linux/amd64", &[(&lower, packing), (&upper, packing)]);
    store.list(manifest, "1.0");
    store
}
