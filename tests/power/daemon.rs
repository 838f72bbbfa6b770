//! The daemon of a round, both faces on one disk, and what is left out of its syncs.

use super::{PATIENCE, client::Calls, room::Room, steps::Steps};
use lcow_sys::linux::power::{Sync, Syncs, Verdict};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_lcow-graphdriver");

/// Which syncs of the daemon and its workers do nothing. The kernel's own, of containers on loop devices, are real.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Skipped {
    /// Nothing is watched.
    Nothing,
    /// Those of directories.
    Directories,
    /// `fsync`, `fdatasync`, `syncfs`, `sync`, `sync_file_range` and `msync`.
    All,
}

impl Skipped {
    fn verdict(self, sync: Sync) -> Verdict {
        match (self, sync) {
            (Self::All, _) | (Self::Directories, Sync::Directory) => Verdict::Skipped,
            _ => Verdict::Done,
        }
    }
}

/// Killed on drop.
pub(crate) struct Daemon {
    child: Child,
    log: PathBuf,
    /// Syncs that were skipped.
    pub(crate) skipped: Arc<AtomicU64>,
}

/// Where a store is: of Docker's face, and of containerd's.
pub(crate) fn homes(room: &Room) -> [PathBuf; 2] {
    [room.disk().join("docker"), room.disk().join("containerd")]
}

pub(crate) fn docker_socket(folder: &Path) -> PathBuf {
    folder.join("docker.sock")
}

pub(crate) fn snapshots_socket(folder: &Path) -> PathBuf {
    folder.join("snapshots.sock")
}

impl Daemon {
    /// Starts it on the disk of a room; it reads blobs from `containerd`. The error is that it ended, with its log.
    pub(crate) fn start(room: &Room, containerd: &Path, skipped: Skipped) -> Result<Self, String> {
        let count = Arc::new(AtomicU64::new(0));
        let counted = count.clone();
        let spawn = move |mut command: Command| match skipped {
            Skipped::Nothing => command.spawn().unwrap(),
            _ => watched(command, skipped, counted),
        };
        Self::start_by(room, containerd, count, spawn)
    }

    /// As [`Daemon::start`]; what it does to the disk is noted.
    pub(crate) fn start_noted(room: &Room, containerd: &Path, steps: &Arc<Steps>) -> Result<Self, String> {
        Self::start_by(room, containerd, Arc::default(), |command| steps.spawn(command))
    }

    fn start_by(
        room: &Room,
        containerd: &Path,
        skipped: Arc<AtomicU64>,
        spawn: impl FnOnce(Command) -> Child,
    ) -> Result<Self, String> {
        let log = room.folder.join("log");
        let output = fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let mut command = Command::new(PROGRAM);
        command
            .arg("serve")
            .args(["--storage-opt", "lcow.minfree=0", "--storage-opt", "lcow.sandboxsize=16MiB"])
            .args(["--storage-opt", "lcow.pool.spares=1", "--storage-opt", "lcow.containerd.mounts=host"])
            .arg("--root")
            .arg(room.disk().join("root"))
            .arg("--socket")
            .arg(docker_socket(&room.folder))
            .arg("--containerd-socket")
            .arg(snapshots_socket(&room.folder))
            .arg("--containerd-root")
            .arg(&homes(room)[1])
            .arg("--containerd-address")
            .arg(containerd)
            .env("RUST_LOG", "lcow_graphdriver=debug,info")
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output);
        let mut daemon = Self { child: spawn(command), log, skipped };
        daemon.wait_until_ready(room)?;
        Ok(daemon)
    }

    fn wait_until_ready(&mut self, room: &Room) -> Result<(), String> {
        let (begin, calls) = (Instant::now(), Calls::new(&room.folder));
        while !calls.both_answer() {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Err(format!("the daemon ended with {status}:\n{}", self.log()));
            }
            assert!(begin.elapsed() < PATIENCE, "the daemon does not answer:\n{}", self.log());
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        Ok(())
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM, and its end.
    pub(crate) fn stop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let begin = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(begin.elapsed() < PATIENCE, "the daemon does not stop:\n{}", self.log());
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Starts a process whose syncs, and those of its children, are decided here. The filter cannot be taken off, so it is set
/// in a thread of its own.
fn watched(mut command: Command, skipped: Skipped, count: Arc<AtomicU64>) -> Child {
    let start = move || {
        let syncs = Syncs::watch().expect("seccomp with user notifications (Linux 5.5)");
        (syncs, command.spawn().unwrap())
    };
    let (syncs, child) = std::thread::spawn(start).join().unwrap();
    std::thread::spawn(move || {
        let decide = |sync| {
            let verdict = skipped.verdict(sync);
            count.fetch_add(u64::from(verdict == Verdict::Skipped), Ordering::Relaxed);
            verdict
        };
        syncs.serve(decide).expect("decide about syncs");
    });
    child
}

/// Runs a command of `store` on both stores, both of which must be sound.
pub(crate) fn store(room: &Room, command: &str) -> Result<(), String> {
    for home in homes(room).iter().filter(|home| home.exists()) {
        let output = Command::new(PROGRAM).args(["store", command, "--home"]).arg(home).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if !output.status.success() {
            return Err(format!("store {command}: {}{}", text(&output.stdout), text(&output.stderr)));
        }
    }
    Ok(())
}
