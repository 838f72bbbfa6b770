//! A `serve` that must not start: it exits by itself, with a failure, and reports why.

use super::transport::{FLAG, address, prepare};
use std::{
    fs::{self, File},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Longest wait for a program that exits by itself.
const PATIENCE: Duration = Duration::from_secs(30);

/// Killed on drop, whatever the test found.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `serve` with a root in `folder` and these options; returns what it logged before it exited.
pub(crate) fn refused(folder: &Path, options: &[String]) -> String {
    let log = folder.join("log");
    let mut command = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"));
    command.args(["serve", "--root"]).arg(folder.join("root")).arg(FLAG).arg(address(folder));
    prepare(&mut command);
    command.args(options.iter().flat_map(|o| ["--storage-opt", o]));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log).unwrap());
    let mut served = Served(command.spawn().unwrap());
    let begin = Instant::now();
    loop {
        let ended = served.0.try_wait().unwrap();
        let said = fs::read_to_string(&log).unwrap();
        assert!(!said.contains("ready"), "{options:?}: it calls itself ready:\n{said}");
        if let Some(status) = ended {
            assert_eq!(status.code(), Some(1), "{options:?}:\n{said}");
            return said;
        }
        assert!(begin.elapsed() < PATIENCE, "{options:?}: it neither ends nor is ready:\n{said}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
