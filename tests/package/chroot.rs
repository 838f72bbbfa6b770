//! A minimal Debian in a directory, and what is done in it.
//!
//! Every command runs in a mount and process namespace of its own, so that neither a process nor a mount outlives it,
//! also after a failure.

use crate::skip::skip;
use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

/// Longest wait for the service's socket.
const READY: Duration = Duration::from_mins(1);

/// Mounts what a system has, and runs a command in the directory of the first argument. The shell stays the first
/// process of the namespace: the service behaves differently as one.
const INSIDE: &str = r#"
    mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && mount -t tmpfs tmpfs "$1/tmp" || exit 125
    root=$1; shift
    chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive "$@"
    exit $?
"#;

/// Runs a command that must succeed, and returns its standard output.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    text(command, output)
}

fn text(command: &Command, output: Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}: {error}", output.status);
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// A Debian system in a directory.
pub(crate) struct Chroot {
    root: PathBuf,
}

/// A process that is ended, with everything in its namespace, when it is dropped.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Chroot {
    /// A fresh system below `folder`; `None` if the test is skipped because there is no mirror.
    pub(crate) fn new(folder: &Path) -> Option<Self> {
        let archive = archive(folder)?;
        let root = folder.join("chroot");
        fs::create_dir(&root).expect("chroot");
        run(Command::new("tar").arg("-C").arg(&root).args(["--numeric-owner", "-xpf"]).arg(archive));
        Some(Self { root })
    }

    /// The host's path of a file in the system.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "--"]);
        command.args(["sh", "-c", INSIDE, "sh"]).arg(&self.root).args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs a command that must succeed, and returns its standard output.
    pub(crate) fn run(&self, arguments: &[&str]) -> String {
        run(&mut self.command(arguments))
    }

    /// Runs a command that must end with status 1, and returns its standard error.
    pub(crate) fn fail(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().expect("unshare");
        let error = String::from_utf8(output.stderr).expect("UTF-8");
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {error}");
        error
    }

    /// Installs packages together.
    pub(crate) fn install(&self, packages: &[&PathBuf]) {
        for package in packages {
            fs::copy(package, self.path("mnt").join(package.file_name().expect("name"))).expect("copy");
        }
        // A question about an edited file would be a failure: standard input is empty.
        self.run(&["sh", "-c", "dpkg --install /mnt/*.deb && rm /mnt/*.deb"]);
    }

    /// The files of a directory, with paths as they were given.
    pub(crate) fn list(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(folder)).unwrap_or_else(|e| panic!("{folder}: {e}"));
        entries.map(|entry| format!("{folder}/{}", entry.expect("entry").file_name().display())).collect()
    }

    /// Every path of the system, except the records of dpkg about packages that were there.
    pub(crate) fn everything(&self) -> BTreeSet<String> {
        let found = run(Command::new("find").arg(&self.root).args(["-mindepth", "1", "-printf", "%P\n"]));
        let own = |path: &&str| !["var/lib/dpkg/status-old", "var/lib/dpkg/lock"].iter().any(|p| path == p);
        // Logs and empty directories of helpers may come with the first package that uses them.
        let kept = |path: &&str| !path.starts_with("var/log/") && !path.starts_with("var/lib/systemd");
        found.lines().filter(own).filter(kept).map(str::to_owned).collect()
    }

    /// Runs the installed service as its unit does, and returns its reply to `Plugin.Activate`.
    pub(crate) fn activate(&self) -> String {
        let unit =
            fs::read_to_string(self.path("lib/systemd/system/lcow-graphdriver.service")).expect("unit");
        let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).expect("ExecStart");
        let arguments: Vec<&str> = start.split(' ').collect();
        fs::create_dir_all(self.path("run/docker/plugins")).expect("directory of the socket");
        let log = fs::File::create(self.path("run/log")).expect("log");
        let mut command = self.command(&arguments);
        let child = command.stdout(Stdio::null()).stderr(log).spawn().expect("unshare");
        let mut service = Ended(child);
        // The address of a unix socket is short; the target directory's path may not be.
        let folder = fs::File::open(self.path("run/docker/plugins")).expect("directory of the socket");
        let socket = format!("/proc/self/fd/{}/lcow.sock", folder.as_raw_fd());
        let until = Instant::now() + READY;
        let mut stream = loop {
            if let Ok(stream) = UnixStream::connect(&socket) {
                break stream;
            }
            let log = || fs::read_to_string(self.path("run/log")).unwrap_or_default();
            assert!(service.0.try_wait().expect("service").is_none(), "the service ended: {}", log());
            assert!(Instant::now() < until, "the service does not listen: {}", log());
            std::thread::sleep(Duration::from_millis(50));
        };
        stream.set_read_timeout(Some(READY)).expect("socket");
        let request =
            "POST /Plugin.Activate HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).expect("request");
        let mut reply = String::new();
        stream.read_to_string(&mut reply).expect("reply");
        drop(service);
        for left in ["run/docker", "run/log"] {
            let path = self.path(left);
            let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
            removed.unwrap_or_else(|e| panic!("{left}: {e}"));
        }
        reply
    }
}

/// A tar of a minimal system of this machine's release, made once.
fn archive(folder: &Path) -> Option<PathBuf> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?.trim_matches('"');
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("debian-{codename}.tar"));
    if kept.exists() {
        return Some(kept);
    }
    let format = "$(REPO_URI) $(CODENAME) $(COMPONENT)";
    let targets =
        run(Command::new("apt-get").args(["indextargets", "--format", format, "Identifier: Packages"]));
    let mirror = targets.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        (fields.get(1) == Some(&codename) && fields.get(2) == Some(&"main")).then(|| fields[0].to_owned())
    });
    let Some(mirror) = mirror else {
        skip(&format!("apt's sources have no component main of {codename}"));
        return None;
    };
    let made = folder.join("debootstrap");
    run(Command::new("debootstrap").args(["--variant=minbase", codename]).arg(&made).arg(mirror));
    // Packages and lists that were downloaded.
    let _ = fs::remove_dir_all(made.join("var/cache/apt/archives"));
    let part = kept.with_extension("part");
    run(Command::new("tar").arg("-C").arg(&made).args(["--numeric-owner", "-cpf"]).arg(&part).arg("."));
    fs::rename(&part, &kept).expect("archive");
    fs::remove_dir_all(&made).expect("debootstrap's directory");
    Some(kept)
}
