//! System calls of a running plugin that strace lets fail.
//!
//! ```text
//!   plugin (all its threads, no workers) ◄── ptrace ── strace -f -b execve ──► trace: one line a call
//! ```
//!
//! Called by the tests of failing calls. Needs root and strace (`scripts/install-deps test`).

use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Longest wait for strace to let go.
const PATIENCE: Duration = Duration::from_secs(5);

/// A tracer of a running plugin, until it is dropped.
pub(crate) struct Injection {
    strace: Child,
    trace: PathBuf,
    _folder: tempfile::TempDir,
}

impl Injection {
    /// Lets calls fail; `what` as strace wants it: `fsync:error=EIO:when=1`. Counted for each thread.
    pub(crate) fn begin(pid: u32, what: &str) -> Self {
        let call = what.split(':').next().unwrap();
        Self::hold(pid, &[&format!("trace={call}"), &format!("inject={what}")])
    }

    fn hold(pid: u32, expressions: &[&str]) -> Self {
        loop {
            let injection = Self::attach(pid, expressions);
            // strace looks at the list of threads once, and misses one that an untraced thread starts meanwhile.
            if threads_are_traced(pid) {
                return injection;
            }
        }
    }

    fn attach(pid: u32, expressions: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let trace = folder.path().join("trace");
        let mut strace = Command::new("strace")
            // A program that a thread starts (a worker) is let go: it would stand still now and then.
            .args(["-f", "-b", "execve", "-o"])
            .arg(&trace)
            .args(expressions.iter().flat_map(|e| ["-e", e]))
            .args(["-p", &pid.to_string()])
            .stderr(Stdio::piped())
            .spawn()
            .expect("strace must be installed: scripts/install-deps test");
        // It says so when it has attached to all threads.
        let mut line = String::new();
        BufReader::new(strace.stderr.take().unwrap()).read_line(&mut line).unwrap();
        Self { strace, trace, _folder: folder }
    }

    /// Ends it; how many calls it let fail.
    pub(crate) fn end(mut self) -> usize {
        self.stop();
        fs::read_to_string(&self.trace).unwrap_or_default().matches("(INJECTED)").count()
    }

    fn stop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.strace), Signal::INT);
        // It waits for ever for a thread that waits for its child to begin (vfork), while it holds that child.
        let begin = Instant::now();
        while self.strace.try_wait().is_ok_and(|status| status.is_none()) {
            if begin.elapsed() > PATIENCE {
                let _ = self.strace.kill();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Injection {
    fn drop(&mut self) {
        if self.strace.try_wait().is_ok_and(|status| status.is_none()) {
            self.stop();
        }
    }
}

/// Whether each thread of a process has a tracer. Threads that end meanwhile need none.
fn threads_are_traced(pid: u32) -> bool {
    fs::read_dir(format!("/proc/{pid}/task"))
        .unwrap()
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok())
        .all(|status| !status.lines().any(|l| l == "TracerPid:\t0"))
}
