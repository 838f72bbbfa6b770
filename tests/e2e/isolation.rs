//! A room: private namespaces in which the daemons, containers and commands of one test live, and which nothing survives.
//!
//! ```text
//!   test ─► setpriv --pdeathsig ─► unshare: mount, pid, ipc, uts ─► sh (pid 1 of the room)
//!             │                      tmpfs on /run, overlay on /etc
//!             ├─ nsenter ─► a daemon   (log file)
//!             └─ nsenter ─► a command
//! ```
//!
//! Invariants: every process of a test lives in its room, so that killing the room's pid 1 ends all of them, and all
//! mounts go with the room's mount namespace; loop devices go with their mounts; all files are below one temporary
//! folder. `Drop` does so after a panic, too, and then prints the ends of the logs. Rooms share nothing but the kernel,
//! the network and the cgroup mount, where each has a folder of its own. The host's own engines are not touched.
//! Called by `engine` and by the tests of the containerd face.

use crate::command::{Run, Running, children, kill, start, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Mutex,
    thread,
    time::Duration,
};

/// Longest time that a daemon may take to answer, or to end.
pub(crate) const DAEMON_LIMIT: Duration = Duration::from_mins(1);
/// Bytes of each log that a failed test shows.
const LOG_TAIL: usize = 12 << 10;

/// A daemon in the room.
#[derive(Debug)]
pub(crate) struct Daemon {
    /// The `nsenter` that waits for it.
    outer: Child,
    /// Its own pid, as the host sees it.
    pub(crate) pid: u32,
}

impl Daemon {
    /// SIGKILL; waits for its end.
    pub(crate) fn kill(mut self) {
        kill(self.pid);
        let _ = self.outer.wait();
    }

    /// SIGTERM; waits for its end.
    pub(crate) fn terminate(mut self, name: &str) -> ExitStatus {
        let pid = Pid::from_raw(self.pid.cast_signed()).expect("a pid");
        kill_process(pid, Signal::TERM).unwrap_or_else(|e| panic!("SIGTERM to {name}: {e}"));
        wait_until(&format!("{name} to end"), DAEMON_LIMIT, || {
            self.outer.try_wait().expect("wait for a daemon")
        })
    }

    /// The status of one that has ended.
    fn ended(&mut self) -> Option<ExitStatus> {
        self.outer.try_wait().expect("wait for a daemon")
    }
}

/// The namespaces of one test.
#[derive(Debug)]
pub(crate) struct Room {
    folder: Option<tempfile::TempDir>,
    /// The `unshare` around the room.
    outer: Child,
    /// Pid 1 of the room, as the host sees it.
    init: u32,
    /// The search path of everything in it.
    path: String,
    /// Names of the daemons, which are those of their logs.
    daemons: Mutex<BTreeSet<String>>,
    cgroup: String,
}

impl Room {
    /// A room without daemons. `path` is its search path; `programs` are names and the packages that have them.
    pub(crate) fn new(path: String, programs: &[(&str, &str)]) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "the tests with engines need root: they mount and run engines"
        );
        for (program, package) in programs {
            let found = path.split(':').any(|d| Path::new(d).join(program).exists());
            assert!(found, "the tests with engines need {program}: apt-get install {package}");
        }
        let folder = tempfile::Builder::new()
            .prefix("lcow-e2e-")
            .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .expect("temporary folder");
        let cgroup = folder.path().file_name().expect("a name").to_string_lossy().into_owned();
        let (outer, init) = furnish(folder.path(), &path);
        Self { folder: Some(folder), outer, init, path, daemons: Mutex::default(), cgroup }
    }

    /// What a power cut leaves: every process, every mount and `/run` are gone, the folder stays.
    pub(crate) fn reboot(&mut self) {
        kill(self.init);
        let _ = self.outer.wait();
        remove_cgroups(&self.cgroup);
        (self.outer, self.init) = furnish(self.folder(), &self.path);
    }

    /// The room's folder, the same path in and outside of the room.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.as_ref().expect("kept until Drop").path()
    }

    /// A path in the room, as the host reaches it: through the room's mounts.
    pub(crate) fn seen_from_outside(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        Path::new(&format!("/proc/{}/root", self.init)).join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The folder of cgroups that is the room's own.
    pub(crate) fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// The mount table of the room.
    pub(crate) fn mount_table(&self) -> String {
        fs::read_to_string(format!("/proc/{}/mountinfo", self.init)).expect("mount table of the room")
    }

    /// A command in the room.
    pub(crate) fn inside(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args([
            "--target",
            &self.init.to_string(),
            "--mount",
            "--pid",
            "--ipc",
            "--uts",
            "--wd=/",
            "--",
        ]);
        command.arg(program);
        command.env_clear().env("PATH", &self.path).env("HOME", self.folder()).env("LC_ALL", "C.UTF-8");
        command
    }

    /// Starts a command in the room.
    pub(crate) fn spawn(&self, words: &[&str]) -> Running {
        let mut command = self.inside(words[0]);
        command.args(words[1..].iter().map(OsString::from));
        start(command, None)
    }

    /// Runs a command in the room, whatever comes of it.
    pub(crate) fn run(&self, words: &[&str]) -> Run {
        self.spawn(words).wait()
    }

    /// Starts a daemon, a command of [`Self::inside`]; its output goes to its log.
    pub(crate) fn daemon(&self, name: &str, mut command: Command) -> Daemon {
        self.daemons.lock().expect("names of daemons").insert(name.to_owned());
        let log = fs::File::options().create(true).append(true).open(self.log(name)).expect("log file");
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("log file")).stderr(log);
        let mut outer = command.spawn().expect("nsenter");
        let pid = wait_until(name, DAEMON_LIMIT, || {
            if let Some(status) = outer.try_wait().expect("wait for nsenter") {
                panic!("{name} ended at once, {status}\n{}", self.log_tail(name));
            }
            children(outer.id()).first().copied()
        });
        Daemon { outer, pid }
    }

    /// Waits until a daemon answers.
    pub(crate) fn wait_for(&self, name: &str, daemon: &mut Daemon, mut answers: impl FnMut() -> bool) {
        wait_until(&format!("{name} to answer"), DAEMON_LIMIT, || {
            if let Some(status) = daemon.ended() {
                panic!("{name} ended, {status}\n{}", self.log_tail(name));
            }
            answers().then_some(())
        });
    }

    fn log(&self, name: &str) -> PathBuf {
        self.folder().join(format!("{name}.log"))
    }

    /// Everything that a daemon wrote.
    pub(crate) fn log_text(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.log(name)).unwrap_or_default()).into_owned()
    }

    /// The end of what a daemon wrote.
    pub(crate) fn log_tail(&self, name: &str) -> String {
        let text = self.log_text(name);
        // dockerd's list of its own routes, and requests in full, tell nothing.
        let noise = |l: &&str| !l.contains("msg=\"Registering ") && !l.contains("msg=\"form data");
        let text = text.lines().filter(noise).collect::<Vec<_>>().join("\n");
        text[text.floor_char_boundary(text.len().saturating_sub(LOG_TAIL))..].to_owned()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let daemons =
            std::mem::take(&mut *self.daemons.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        if thread::panicking() {
            for name in &daemons {
                eprintln!("──── end of {name}.log ────\n{}", self.log_tail(name));
            }
        }
        // The kernel kills and reaps the whole pid namespace before its pid 1 is gone.
        kill(self.init);
        let _ = self.outer.wait();
        remove_cgroups(&self.cgroup);
        let panics = daemons.iter().any(|log| self.log_text(log).contains("panicked at"));
        if let Some(folder) = self.folder.take() {
            if std::env::var_os("LCOW_E2E_KEEP").is_some() {
                eprintln!("kept {}", folder.keep().display());
                return;
            }
            let place = folder.path().to_owned();
            let closed = folder.close();
            if let Err(error) = closed {
                eprintln!("cannot delete {}: {error}", place.display());
            }
        }
        assert!(
            thread::panicking() || !panics,
            "the plugin or a service VM panicked (LCOW_E2E_KEEP keeps its log)"
        );
    }
}

/// Starts the first process of a room, and waits until its mounts are made; the `unshare` around it, and its pid.
fn furnish(folder: &Path, path: &str) -> (Child, u32) {
    // Pid 1 has to reap what loses its parent; busybox's shell does so while it waits.
    const ROOM: &str = "mount -t tmpfs -o mode=755 room /run && mkdir -p /run/etc/upper /run/etc/work \
        /run/docker/plugins && mount -t overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work \
        etc /etc && rm -rf /etc/docker && echo daemon:500000:65536 >/etc/subuid && cat /etc/subuid >/etc/subgid \
        && echo ready || exit 1; while :; do sleep 1000 & wait $!; done";
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"]);
    command.args(["--mount-proc", "--ipc", "--uts", "--propagation", "private", "busybox", "sh", "-c", ROOM]);
    // unshare complains of a signal mask whenever its child is killed.
    let place = folder.join("room.log");
    let log = fs::File::options().create(true).append(true).open(&place).expect("log file");
    command.env("PATH", path).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    let mut outer = command.spawn().expect("setpriv and unshare (util-linux)");
    let mut ready = [0_u8; 6];
    let told = outer.stdout.take().expect("stdout").read_exact(&mut ready);
    let init = children(outer.id()).first().copied();
    if told.is_err() || &ready != b"ready\n" || init.is_none() {
        let _ = outer.kill();
        let _ = outer.wait();
        panic!("the room could not be furnished\n{}", fs::read_to_string(place).unwrap_or_default());
    }
    (outer, init.expect("just looked at"))
}

/// Removes the cgroups of an engine: the kernel keeps them although nobody is in them.
fn remove_cgroups(name: &str) {
    fn remove(folder: &Path) {
        for inner in fs::read_dir(folder).into_iter().flatten().flatten() {
            if inner.file_type().is_ok_and(|t| t.is_dir()) {
                remove(&inner.path());
            }
        }
        // One that is still in use is empty a moment later, and costs nothing.
        let _ = fs::remove_dir(folder);
    }
    let root = Path::new("/sys/fs/cgroup");
    remove(&root.join(name));
    for controller in fs::read_dir(root).into_iter().flatten().flatten() {
        remove(&controller.path().join(name));
    }
}
