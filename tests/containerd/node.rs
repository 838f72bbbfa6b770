//! A node: a private containerd with the product as its proxy snapshotter and differ, in a room that nothing survives.
//!
//! ```text
//!   room ─┬─ lcow-graphdriver serve --containerd-socket /run/lcow.sock ◄─ gRPC ─┐
//!         ├─ containerd, root <folder>/containerd, state and socket /run/containerd
//!         └─ ctr -n <the room's name> …
//! ```
//!
//! The configuration is that of `proxy`. Called by all tests of this program.

use crate::{
    command::{Run, Running, start, wait_until},
    isolation::{DAEMON_LIMIT, Daemon, Room},
    proxy::{self, CONTAINERD_SOCKET, LCOW_SOCKET, script},
    tree::Tree,
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

/// Where Debian keeps the programs.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// Which containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Release {
    /// 1.7, whose clients speak to snapshotter and differ themselves.
    V1,
    /// 2.1 or later, where the transfer service does.
    V2,
}

impl Release {
    fn engine(self) -> &'static str {
        match self {
            Self::V1 => "containerd-1.7",
            Self::V2 => "containerd-2",
        }
    }

    /// The version of its configuration's format.
    fn format(self) -> u32 {
        match self {
            Self::V1 => 2,
            Self::V2 => 3,
        }
    }

    /// The folder of its programs, fetched at the first call.
    pub(crate) fn programs(self) -> &'static Path {
        static V1: OnceLock<PathBuf> = OnceLock::new();
        static V2: OnceLock<PathBuf> = OnceLock::new();
        let place = match self {
            Self::V1 => &V1,
            Self::V2 => &V2,
        };
        place.get_or_init(|| PathBuf::from(script("fetch-engines", &[self.engine()])))
    }
}

/// Which snapshotter a test is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Snapshotter {
    /// containerd's own, as a control.
    Overlayfs,
    /// The product.
    Lcow,
}

impl Snapshotter {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Lcow => "lcow",
        }
    }
}

/// The node of one test.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) release: Release,
    pub(crate) snapshotter: Snapshotter,
    /// Further arguments of `lcow-graphdriver serve`.
    arguments: Vec<String>,
    /// For containerd's blockfile, which is off without it, like erofs.
    blank: Option<PathBuf>,
    pub(crate) room: Room,
    /// How often the room was rebooted: each boot has an id of its own.
    boots: AtomicU32,
    containerd: Mutex<Option<Daemon>>,
    lcow: Mutex<Option<Daemon>>,
}

/// A daemon's place, also after a test has panicked.
fn slot(daemon: &Mutex<Option<Daemon>>) -> MutexGuard<'_, Option<Daemon>> {
    daemon.lock().unwrap_or_else(PoisonError::into_inner)
}

fn taken(daemon: &Mutex<Option<Daemon>>) -> Option<Daemon> {
    slot(daemon).take()
}

impl Node {
    /// A node that answers.
    pub(crate) fn start(release: Release, snapshotter: Snapshotter) -> Self {
        Self::start_with(release, snapshotter, &[])
    }

    /// A node whose product has further arguments.
    pub(crate) fn start_with(release: Release, snapshotter: Snapshotter, arguments: &[&str]) -> Self {
        let node = Self::without_daemons(release, snapshotter, arguments);
        node.start_lcow();
        node.start_containerd();
        node
    }

    /// A node whose product also has containerd's root.
    pub(crate) fn start_with_data(release: Release, arguments: &[&str]) -> Self {
        Self::start_with_peers(release, arguments, None)
    }

    /// As [`Node::start_with_data`], with containerd's blockfile and erofs; `blank` is what each blockfile begins as.
    pub(crate) fn start_with_peers(release: Release, arguments: &[&str], blank: Option<&Path>) -> Self {
        let mut node = Self::without_daemons(release, Snapshotter::Lcow, arguments);
        node.blank = blank.map(Path::to_owned);
        let data = node.room.folder().join("containerd");
        node.arguments.extend(["--containerd-data".into(), data.to_str().expect("UTF-8").into()]);
        node.start_lcow();
        node.start_containerd();
        node
    }

    /// The product alone: a double takes containerd's place.
    pub(crate) fn without_containerd() -> Self {
        let node = Self::without_daemons(Release::V2, Snapshotter::Lcow, &[]);
        node.start_lcow();
        node
    }

    fn without_daemons(release: Release, snapshotter: Snapshotter, arguments: &[&str]) -> Self {
        let path = format!("{}:{PATH}", release.programs().display());
        let needed = [("runc", "runc"), ("busybox", "busybox-static")];
        Self {
            release,
            snapshotter,
            arguments: arguments.iter().map(ToString::to_string).collect(),
            blank: None,
            room: Room::new(path, &needed),
            boots: AtomicU32::new(0),
            containerd: Mutex::default(),
            lcow: Mutex::default(),
        }
    }

    fn has_lcow(&self) -> bool {
        self.snapshotter == Snapshotter::Lcow
    }

    /// The product's folder of snapshots.
    pub(crate) fn home(&self) -> PathBuf {
        proxy::home(&self.room)
    }

    /// Folders of layers in the product's folder: those with an image or a record of a snapshot.
    pub(crate) fn layers(&self) -> Vec<String> {
        let folders = fs::read_dir(self.home()).into_iter().flatten().flatten();
        let marks = ["snapshot.json", "layer.vhd", "sandbox.vhd"];
        let layers = folders.filter(|f| marks.iter().any(|mark| f.path().join(mark).exists()));
        layers.map(|f| f.file_name().to_string_lossy().into_owned()).collect()
    }

    /// A folder for a test's own files, the same path in and outside of the room.
    pub(crate) fn scratch(&self, name: &str) -> PathBuf {
        let path = self.room.folder().join("scratch").join(name);
        fs::create_dir_all(&path).expect("scratch folder");
        path
    }

    /// Starts the product, and waits for its socket. A control has nothing to start.
    pub(crate) fn start_lcow(&self) {
        if !self.has_lcow() {
            return;
        }
        assert!(slot(&self.lcow).is_none(), "the product runs already");
        let daemon = proxy::start_lcow(&self.room, "lcow", &self.arguments);
        *slot(&self.lcow) = Some(daemon);
        if slot(&self.containerd).is_some() {
            // containerd dials again after a pause of up to three seconds, and fails until then.
            wait_until("containerd to find the product", DAEMON_LIMIT, || {
                self.try_ctr(&["snapshots", "ls"]).ok().then_some(())
            });
        }
    }

    /// The product's socket, as the host sees it.
    pub(crate) fn lcow_socket(&self) -> PathBuf {
        self.room.seen_from_outside(LCOW_SOCKET)
    }

    /// containerd's socket, as the host sees it.
    pub(crate) fn containerd_socket(&self) -> PathBuf {
        self.room.seen_from_outside(CONTAINERD_SOCKET)
    }

    /// The product's pid, as the host sees it.
    pub(crate) fn lcow_pid(&self) -> u32 {
        slot(&self.lcow).as_ref().expect("the product runs").pid
    }

    /// containerd's pid, as the host sees it.
    pub(crate) fn containerd_pid(&self) -> u32 {
        slot(&self.containerd).as_ref().expect("containerd runs").pid
    }

    /// Kills the product with SIGKILL.
    pub(crate) fn kill_lcow(&self) {
        if let Some(daemon) = taken(&self.lcow) {
            daemon.kill();
        }
    }

    /// Stops the product with SIGTERM.
    pub(crate) fn stop_lcow(&self) {
        if let Some(daemon) = taken(&self.lcow) {
            let status = daemon.terminate("lcow");
            assert!(status.success(), "the product ended with {status}\n{}", self.room.log_tail("lcow"));
        }
    }

    /// Starts containerd, and waits until it serves.
    pub(crate) fn start_containerd(&self) {
        assert!(slot(&self.containerd).is_none(), "containerd runs already");
        let daemon = proxy::start_containerd(
            &self.room,
            self.release.format(),
            self.has_lcow(),
            self.blank.as_deref(),
        );
        *slot(&self.containerd) = Some(daemon);
    }

    /// Kills containerd with SIGKILL; shims and containers go on.
    pub(crate) fn kill_containerd(&self) {
        if let Some(daemon) = taken(&self.containerd) {
            daemon.kill();
        }
    }

    /// A power cut, and the start after it: no process, no mount, another boot id.
    pub(crate) fn reboot(&mut self) {
        drop((taken(&self.containerd), taken(&self.lcow)));
        self.room.reboot();
        let boot = self.boots.fetch_add(1, Ordering::Relaxed) + 1;
        let id = self.room.folder().join("boot_id");
        fs::write(&id, format!("00000000-0000-4000-8000-{boot:012}\n")).expect("boot id");
        let id = id.to_str().expect("UTF-8");
        self.room.run(&["mount", "--bind", id, "/proc/sys/kernel/random/boot_id"]).expect_ok();
        self.start_lcow();
        self.start_containerd();
    }

    /// The namespace of containerd that the tests use; it is the room's folder of cgroups, too.
    pub(crate) fn namespace(&self) -> &str {
        self.room.cgroup()
    }

    fn ctr_command(&self, namespace: &str, args: &[&str]) -> Command {
        let mut command = self.room.inside("ctr");
        command.args(["--namespace", namespace]).args(args);
        command.env("CONTAINERD_SNAPSHOTTER", self.snapshotter.name());
        command
    }

    /// Starts ctr.
    pub(crate) fn spawn_ctr(&self, args: &[&str]) -> Running {
        start(self.ctr_command(self.namespace(), args), None)
    }

    /// Runs ctr, whatever comes of it.
    pub(crate) fn try_ctr(&self, args: &[&str]) -> Run {
        self.spawn_ctr(args).wait()
    }

    /// Runs ctr; returns its standard output without the last newline.
    pub(crate) fn ctr(&self, args: &[&str]) -> String {
        let run = self.try_ctr(args).expect_ok();
        String::from_utf8_lossy(&run.stdout).trim_end_matches('\n').to_owned()
    }

    /// Runs ctr in another namespace; returns its standard output.
    pub(crate) fn ctr_in(&self, namespace: &str, args: &[&str]) -> String {
        let run = start(self.ctr_command(namespace, args), None).wait().expect_ok();
        String::from_utf8_lossy(&run.stdout).trim_end_matches('\n').to_owned()
    }

    /// Runs ctr with standard input; returns its standard output's bytes.
    pub(crate) fn ctr_bytes(&self, args: &[&str]) -> Vec<u8> {
        self.try_ctr(args).expect_ok().stdout
    }

    /// Imports an archive.
    pub(crate) fn import(&self, archive: &[u8], args: &[&str]) {
        self.try_import(archive, args).expect_ok();
    }

    /// Imports an archive, whatever comes of it.
    pub(crate) fn try_import(&self, archive: &[u8], args: &[&str]) -> Run {
        let file = self.scratch("import").join("archive.tar");
        fs::write(&file, archive).expect("archive");
        self.try_ctr(&[&["images", "import"], args, &[file.to_str().expect("UTF-8")]].concat())
    }

    /// Keys and names of snapshots, parents before their children.
    pub(crate) fn snapshots(&self) -> Vec<String> {
        let list = self.ctr(&["snapshots", "ls"]);
        // Columns are aligned to the header's; keys may have blanks.
        let header = list.lines().next().expect("a header");
        let (parent, kind) = (header.find("PARENT").expect("PARENT"), header.find("KIND").expect("KIND"));
        let field =
            |line: &str, from: usize, to: usize| line.get(from..to).unwrap_or_default().trim().to_owned();
        let mut left: Vec<(String, String)> =
            list.lines().skip(1).map(|l| (field(l, 0, parent), field(l, parent, kind))).collect();
        let mut sorted: Vec<String> = Vec::new();
        while !left.is_empty() {
            let (ready, rest): (Vec<_>, Vec<_>) =
                left.iter().cloned().partition(|(_, parent)| !left.iter().any(|(key, _)| key == parent));
            assert!(!ready.is_empty(), "snapshots are their own ancestors: {list}");
            sorted.extend(ready.into_iter().map(|(key, _)| key));
            left = rest;
        }
        sorted
    }

    /// Mounts an active snapshot or a view as a client does; the mount point, as the host reaches it.
    pub(crate) fn mount(&self, key: &str) -> PathBuf {
        let target = self.scratch("snapshot");
        let target = target.to_str().expect("UTF-8");
        let command = self.ctr(&["snapshots", "mounts", target, key]);
        self.room.run(&["sh", "-ec", &command]).expect_ok();
        self.room.seen_from_outside(target)
    }

    /// Mounts what a service answered; the mount point, as the host reaches it.
    pub(crate) fn mount_as_answered(&self, mounts: &[containerd_api::types::Mount]) -> PathBuf {
        let target = self.scratch("snapshot");
        let target = target.to_str().expect("UTF-8");
        for mount in mounts {
            let options = mount.options.join(",");
            let words = ["mount", "-t", &mount.r#type, &mount.source, target, "-o", &options];
            self.room.run(&words).expect_ok();
        }
        self.room.seen_from_outside(target)
    }

    /// Unmounts what [`Self::mount`] mounted.
    pub(crate) fn unmount(&self, root: &Path) {
        let target = self.scratch("snapshot");
        self.room.run(&["umount", target.to_str().expect("UTF-8")]).expect_ok();
        assert!(root.ends_with(target.strip_prefix("/").expect("an absolute path")));
    }

    /// Ends the leases that killed clients left; containerd would do so a day later.
    pub(crate) fn release_leases(&self) {
        for lease in self.ctr(&["leases", "ls", "-q"]).split_whitespace() {
            self.ctr(&["leases", "rm", "--sync", lease]);
        }
    }

    /// The tree of an image, read through `ctr images mount`.
    pub(crate) fn tree_of_image(&self, name: &str) -> Tree {
        let target = self.scratch("mounted");
        let target = target.to_str().expect("UTF-8");
        self.ctr(&["images", "mount", name, target]);
        let tree = Tree::of_folder(&self.room.seen_from_outside(target));
        self.ctr(&["images", "unmount", "--rm", target]);
        tree
    }

    /// Starts a container that stays; `args` are flags of `ctr run`.
    pub(crate) fn run_container(&self, image: &str, id: &str, args: &[&str]) {
        self.ctr(&[&["run", "--detach", "--null-io"], args, &[image, id, "/bin/sleep", "100000"]].concat());
    }

    /// Runs a shell in a running container; returns what it printed.
    pub(crate) fn exec(&self, id: &str, script: &str) -> String {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let exec = format!("exec-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        self.ctr(&["tasks", "exec", "--exec-id", &exec, id, "/bin/sh", "-ec", script])
    }

    /// The root of a running container, as the host reaches it; needs no daemon.
    pub(crate) fn root_of_pid(&self, id: &str) -> PathBuf {
        let file =
            format!("/run/containerd/io.containerd.runtime.v2.task/{}/{id}/init.pid", self.namespace());
        let pid = fs::read_to_string(self.room.seen_from_outside(file)).expect("pid of the task");
        self.room.seen_from_outside(format!("/proc/{}/root", pid.trim()))
    }

    /// The root of a running container, as the host reaches it.
    pub(crate) fn root_of(&self, id: &str) -> PathBuf {
        let list = self.ctr(&["tasks", "ls"]);
        let line = list.lines().find(|l| l.split_whitespace().next() == Some(id));
        let pid = line
            .and_then(|l| l.split_whitespace().nth(1))
            .unwrap_or_else(|| panic!("no task {id} in\n{list}"));
        // The pid is one of the room's.
        self.room.seen_from_outside(format!("/proc/{pid}/root"))
    }

    /// The tree of a running container, without what runc mounts.
    pub(crate) fn tree_of_container(&self, id: &str) -> Tree {
        Tree::of_folder(&self.root_of(id))
    }

    /// Ends and removes a container.
    pub(crate) fn remove_container(&self, id: &str) {
        let _ = self.try_ctr(&["tasks", "kill", "--signal", "SIGKILL", id]);
        let _ = self.try_ctr(&["tasks", "delete", "--force", id]);
        self.ctr(&["containers", "delete", id]);
    }

    /// Mount points in the room that lie below the product's folder.
    pub(crate) fn mounts(&self) -> Vec<String> {
        let home = self.home().to_string_lossy().into_owned();
        let table = self.room.mount_table();
        table
            .lines()
            .filter_map(|l| l.split(' ').nth(4))
            .filter(|p| p.starts_with(&home))
            .map(str::to_owned)
            .collect()
    }

    /// Loop devices of files in the room's folder: device and file.
    pub(crate) fn loops(&self) -> Vec<(String, String)> {
        let folder = format!("/{}/", self.room.folder().file_name().expect("a name").to_string_lossy());
        let devices = fs::read_dir("/sys/block").expect("/sys/block").flatten();
        let backed = devices.filter_map(|entry| {
            let file = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
            Some((entry.file_name().to_string_lossy().into_owned(), file.trim_end().to_owned()))
        });
        backed.filter(|(_, file)| file.contains(&folder)).collect()
    }
}
