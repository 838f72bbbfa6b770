//! `serve` with virtual machines that cannot be made: it says so at its start, names what is missing and what to do.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Longest wait for a program that ends by itself.
const PATIENCE: Duration = Duration::from_secs(30);

/// Ended on drop, whatever the test found.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `serve`, which must end by itself and with a failure; what it said.
fn refused(folder: &Path, options: &[String]) -> String {
    let log = folder.join("log");
    let mut command = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"));
    command.args(["serve", "--root"]).arg(folder.join("root")).arg("--socket").arg(folder.join("socket"));
    command.args(options.iter().flat_map(|o| ["--storage-opt", o]));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(&log).unwrap());
    let mut served = Served(command.spawn().unwrap());
    let begin = Instant::now();
    loop {
        let said = std::fs::read_to_string(&log).unwrap();
        assert!(!said.contains("ready"), "{options:?}: it calls itself ready:\n{said}");
        if let Some(status) = served.0.try_wait().unwrap() {
            assert_eq!(status.code(), Some(1), "{options:?}:\n{said}");
            return std::fs::read_to_string(&log).unwrap();
        }
        assert!(begin.elapsed() < PATIENCE, "{options:?}: it neither ends nor is ready:\n{said}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) fn names_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let kird = folder.path().join("kird");
    let options = ["lcow.svm=qemu".to_owned(), format!("lcow.kirdpath={}", kird.display())];
    let said = refused(folder.path(), &options);
    for expected in [&kird.join("vmlinux").display().to_string(), "scripts/build-svm-image", "lcow.kirdpath"]
    {
        assert!(said.contains(expected), "{expected} is missing in:\n{said}");
    }

    // A folder of that name can be opened, and is no kernel; an initrd that is missing beside a good kernel.
    std::fs::create_dir_all(kird.join("vmlinux")).unwrap();
    let said = refused(folder.path(), &options);
    assert!(said.contains("vmlinux") && said.contains("is no file"), "{said}");
    std::fs::remove_dir(kird.join("vmlinux")).unwrap();
    std::fs::write(kird.join("vmlinux"), b"\x7fELF").unwrap();
    let said = refused(folder.path(), &options);
    assert!(said.contains("initrd") && !said.contains("vmlinux:"), "{said}");
}
