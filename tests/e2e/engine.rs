//! A private Docker engine on the product, which nothing survives.
//!
//! ```text
//!   room (isolation)
//!     ├─ lcow-graphdriver serve   (log file)
//!     ├─ dockerd ─► containerd ─► shims, containers   (log file)
//!     └─ docker …
//! ```

use crate::{
    command::{Run, Running, TICK, children, kill, start, wait_until},
    isolation::{DAEMON_LIMIT, Daemon, Room},
    plugin, proxy,
};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    ffi::OsString,
    fs,
    io::{Read, Write},
    os::unix::{
        fs::{MetadataExt, symlink},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

/// Where Debian keeps the programs; `LCOW_E2E_PATH` is put in front (another dockerd, say).
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// The storage driver below dockerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Driver {
    /// The product.
    Lcow,
    /// The engine's own: a control that shows that a test asks for what engines really do.
    Overlay2,
    /// The engine's simplest own.
    Vfs,
    /// The product as a managed plugin, which the engine itself starts.
    Managed,
    /// The product as the snapshotter of the containerd that keeps the engine's images.
    Containerd,
    /// That containerd's own snapshotter: the control.
    ContainerdOverlayfs,
}

impl Driver {
    /// `LCOW_E2E_DRIVER=managed` runs the tests on the managed plugin, `=overlay2` as a control.
    pub(crate) fn from_env() -> Self {
        match std::env::var("LCOW_E2E_DRIVER").as_deref() {
            Err(_) | Ok("lcow") => Self::Lcow,
            Ok("managed") => Self::Managed,
            Ok("overlay2") => Self::Overlay2,
            Ok("containerd") => Self::Containerd,
            Ok("containerd-overlayfs") => Self::ContainerdOverlayfs,
            Ok(other) => {
                panic!("LCOW_E2E_DRIVER={other}: lcow, managed, overlay2, containerd or containerd-overlayfs")
            }
        }
    }
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lcow | Self::Managed | Self::Containerd => "lcow",
            Self::Overlay2 => "overlay2",
            Self::ContainerdOverlayfs => "overlayfs",
            Self::Vfs => "vfs",
        }
    }
    fn is_lcow(self) -> bool {
        matches!(self, Self::Lcow | Self::Managed | Self::Containerd)
    }
    fn has_containerd(self) -> bool {
        matches!(self, Self::Containerd | Self::ContainerdOverlayfs)
    }
}

/// What kind of engine a test wants.
#[derive(Debug, Clone)]
pub(crate) struct EngineOptions {
    pub(crate) driver: Driver,
    /// Further arguments of dockerd.
    pub(crate) dockerd: Vec<String>,
    /// Further arguments of `lcow-graphdriver serve`; `--storage-opt` alone, since a managed plugin gets them from the
    /// engine.
    pub(crate) plugin: Vec<String>,
    /// Root of containers is host id 500000.
    pub(crate) userns: bool,
    /// Folder of another engine's programs.
    pub(crate) programs: Option<PathBuf>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        let driver = Driver::from_env();
        let given = std::env::var("LCOW_E2E_OPTIONS").unwrap_or_default();
        let options = given.split_whitespace().filter(|_| driver.is_lcow());
        let plugin = options.flat_map(|o| ["--storage-opt".to_owned(), o.to_owned()]).collect();
        Self { driver, dockerd: Vec::new(), plugin, userns: false, programs: None }
    }
}

impl EngineOptions {
    /// For tests of what only the product has.
    pub(crate) fn lcow() -> Self {
        match Self::default() {
            Self { driver: Driver::Overlay2 | Driver::Vfs, .. } => {
                Self { driver: Driver::Lcow, ..Self::default() }
            }
            Self { driver: Driver::ContainerdOverlayfs, .. } => {
                Self { driver: Driver::Containerd, ..Self::default() }
            }
            product => product,
        }
    }
    /// As given, but not containerd's own differ.
    pub(crate) fn able_to_commit_what_grows() -> Self {
        match Self::default() {
            Self { driver: Driver::ContainerdOverlayfs, .. } => Self::lcow(),
            able => able,
        }
    }
    /// An option of the storage driver: given by the engine, which knows none of its containerd's snapshotters.
    pub(crate) fn storage_option(self, option: &str) -> Self {
        match self.driver {
            Driver::Containerd | Driver::ContainerdOverlayfs => self.plugin(&["--storage-opt", option]),
            _ => self.dockerd(&["--storage-opt", option]),
        }
    }
    pub(crate) fn dockerd(mut self, args: &[&str]) -> Self {
        self.dockerd.extend(args.iter().map(ToString::to_string));
        self
    }
    pub(crate) fn plugin(mut self, args: &[&str]) -> Self {
        self.plugin.extend(args.iter().map(ToString::to_string));
        self
    }
    pub(crate) fn userns(mut self) -> Self {
        self.userns = true;
        self
    }
    fn path(&self) -> String {
        match &self.programs {
            Some(first) => format!("{}:{}", first.display(), path()),
            None if self.driver.has_containerd() => format!("{}:{}", containerd_programs(), path()),
            None => path(),
        }
    }
}

/// The engine of one test.
#[derive(Debug)]
pub(crate) struct Engine {
    options: EngineOptions,
    /// The present storage driver; `options` has the first one.
    driver: Cell<Driver>,
    /// Pid 1 of the managed plugin that was killed last.
    killed: Cell<Option<u32>>,
    room: Room,
    plugin: RefCell<Option<Daemon>>,
    dockerd: RefCell<Option<Daemon>>,
    /// The containerd that is not dockerd's child.
    containerd: RefCell<Option<Daemon>>,
    /// Name and home of the storage driver, where they are not those of `options.driver`.
    chosen: RefCell<Option<(String, PathBuf)>>,
}

impl Engine {
    /// An engine that answers.
    pub(crate) fn start(options: EngineOptions) -> Self {
        let engine = Self::room(options);
        if engine.driver.get() == Driver::Managed {
            let folder = plugin::furnish(&engine.options, &engine.data_root());
            engine.choose_driver(Driver::Managed, "lcow", folder.join("propagated-mount/lcow"));
        }
        engine.start_plugin();
        engine.start_dockerd();
        engine
    }

    /// An engine whose daemons do not run yet.
    fn room(options: EngineOptions) -> Self {
        let programs =
            [("dockerd", "docker.io"), ("runc", "runc"), ("busybox", "busybox-static"), ("getfattr", "attr")];
        let engine = Self {
            driver: Cell::new(options.driver),
            killed: Cell::default(),
            room: Room::new(options.path(), &programs),
            options,
            plugin: RefCell::default(),
            dockerd: RefCell::default(),
            containerd: RefCell::default(),
            chosen: RefCell::default(),
        };
        if engine.has_containerd() {
            let plugins = engine.folder().join("client/cli-plugins");
            fs::create_dir_all(&plugins).expect("folder of the client's plugins");
            let (docker, _) = containerd_programs().split_once(':').expect("two folders");
            let link = symlink(Path::new(docker).join("docker-buildx"), plugins.join("docker-buildx"));
            link.expect("link to the client's plugin");
        }
        engine
    }

    /// The engine's folder, the same path in and outside of the room.
    pub(crate) fn folder(&self) -> &Path {
        self.room.folder()
    }

    /// The engine's socket, as the host sees it.
    pub(crate) fn socket(&self) -> PathBuf {
        self.room.seen_from_outside("/run/e2e.sock")
    }

    /// The product's socket, as the host sees it; of a product that the engine does not start itself.
    pub(crate) fn plugin_socket(&self) -> PathBuf {
        self.room.seen_from_outside("/run/docker/plugins/lcow.sock")
    }

    /// Makes a folder for a test's own files.
    pub(crate) fn scratch(&self, name: &str) -> PathBuf {
        let path = self.folder().join("scratch").join(name);
        fs::create_dir_all(&path).expect("scratch folder");
        path
    }

    pub(crate) fn is_lcow(&self) -> bool {
        self.driver.get().is_lcow()
    }

    /// The engine's images are in a containerd of its own, and the storage driver is a snapshotter.
    pub(crate) fn has_containerd(&self) -> bool {
        self.driver.get().has_containerd()
    }

    /// The next dockerd gets this storage driver, whose home is `home`.
    pub(crate) fn choose_driver(&self, driver: Driver, name: &str, home: PathBuf) {
        self.driver.set(driver);
        *self.chosen.borrow_mut() = Some((name.to_owned(), home));
    }

    fn driver_name(&self) -> String {
        let chosen = self.chosen.borrow();
        chosen.as_ref().map_or_else(|| self.driver.get().name().to_owned(), |(name, _)| name.clone())
    }

    /// dockerd's folder of images and layers.
    pub(crate) fn data_root(&self) -> PathBuf {
        let root = self.folder().join("data");
        if self.options.userns { root.join("500000.500000") } else { root }
    }

    /// The storage driver's home.
    pub(crate) fn home(&self) -> PathBuf {
        if self.has_containerd() {
            return proxy::home(&self.room);
        }
        let chosen = self.chosen.borrow();
        chosen
            .as_ref()
            .map_or_else(|| self.data_root().join(self.driver.get().name()), |(_, home)| home.clone())
    }

    /// Pid 1 of the managed plugin, as the host sees it.
    fn managed_pid(&self) -> Option<u32> {
        let home = self.home();
        plugin::first_process(home.ancestors().nth(2).expect("the plugin's folder"))
    }

    /// The pid of the process that serves requests, as the host sees it.
    pub(crate) fn plugin_pid(&self) -> u32 {
        if self.driver.get() == Driver::Managed {
            // Behind the first process of the container.
            let first = self.managed_pid().expect("the plugin runs");
            return children(first)[0];
        }
        self.plugin.borrow().as_ref().expect("the plugin runs").pid
    }

    /// A command in the room.
    fn inside(&self, program: &str) -> Command {
        let mut command = self.room.inside(program);
        command.env("DOCKER_CONFIG", self.folder().join("client")).env("DOCKER_HOST", "unix:///run/e2e.sock");
        command
    }

    /// Everything that a daemon wrote.
    pub(crate) fn log_text(&self, name: &str) -> String {
        self.room.log_text(name)
    }

    /// How many differences the product has made blobs of; `None` where the engine asks no differ for them.
    pub(crate) fn diffs_served(&self) -> Option<usize> {
        let served = |text: String| {
            text.lines()
                .filter(|line| line.contains(": call number=") && line.contains(" call=\"Diff\" "))
                .count()
        };
        (self.driver.get() == Driver::Containerd).then(|| served(self.log_text("plugin")))
    }

    /// Starts the plugin, and waits for its socket. With another driver than the product there is nothing to start.
    /// A managed plugin is started by the engine, and waited for.
    pub(crate) fn start_plugin(&self) {
        match self.driver.get() {
            Driver::Lcow => {}
            Driver::Managed if self.dockerd.borrow().is_some() => return self.wait_for_managed(),
            Driver::Containerd => {
                assert!(self.plugin.borrow().is_none(), "the product runs already");
                *self.plugin.borrow_mut() =
                    Some(proxy::start_lcow(&self.room, "plugin", &self.options.plugin));
                return;
            }
            Driver::Managed | Driver::Overlay2 | Driver::Vfs | Driver::ContainerdOverlayfs => return,
        }
        assert!(self.plugin.borrow().is_none(), "the plugin runs already");
        let mut command = self.inside(env!("CARGO_BIN_EXE_lcow-graphdriver"));
        command.arg("serve").arg("--root").arg(self.folder().join("plugin"));
        command.args(["--socket", "/run/docker/plugins/lcow.sock"]).args(&self.options.plugin);
        command.env("RUST_BACKTRACE", "1").env("RUST_LOG", "info");
        let mut daemon = self.room.daemon("plugin", command);
        let socket = self.room.seen_from_outside("/run/docker/plugins/lcow.sock");
        self.room.wait_for("plugin", &mut daemon, || UnixStream::connect(&socket).is_ok());
        *self.plugin.borrow_mut() = Some(daemon);
    }

    fn wait_for_managed(&self) {
        let killed = self.killed.get();
        wait_until("the plugin's next process", DAEMON_LIMIT, || {
            self.managed_pid().filter(|pid| Some(*pid) != killed)
        });
        wait_until("the plugin to answer", DAEMON_LIMIT, || {
            let info = self.try_docker(&["info", "-f", "{{json .DriverStatus}}"]);
            info.text().contains("Store Format").then_some(())
        });
    }

    /// Kills the plugin with SIGKILL. A managed one is started anew by the engine.
    pub(crate) fn kill_plugin(&self) {
        if self.driver.get() == Driver::Managed
            && let Some(pid) = self.managed_pid()
        {
            self.killed.set(Some(pid));
            kill(pid);
        }
        if let Some(daemon) = self.plugin.borrow_mut().take() {
            daemon.kill();
        }
    }

    /// Starts dockerd, and waits until it answers.
    pub(crate) fn start_dockerd(&self) {
        assert!(self.dockerd.borrow().is_none(), "dockerd runs already");
        let config = self.folder().join("daemon.json");
        let features = r#"{ "features": { "containerd-snapshotter": true } }"#;
        fs::write(&config, if self.has_containerd() { features } else { "{}" }).expect("daemon.json");
        if self.has_containerd() {
            let with_lcow = self.driver.get() == Driver::Containerd;
            *self.containerd.borrow_mut() = Some(proxy::start_containerd(&self.room, 3, with_lcow, None));
        }
        // A predecessor that was killed leaves its pid file, and the pid may be somebody else's by now.
        let _ = fs::remove_file(self.room.seen_from_outside("/run/e2e.pid"));
        let mut command = self.inside("dockerd");
        command.args(["--iptables=false", "--ip6tables=false", "--bridge=none", "--ip-forward=false"]);
        command.arg("--data-root").arg(self.folder().join("data")).arg("--config-file").arg(config);
        command.args([
            "--exec-root",
            "/run/e2e-exec",
            "--pidfile",
            "/run/e2e.pid",
            "-H",
            "unix:///run/e2e.sock",
        ]);
        command.args(["-D", "--experimental", "--exec-opt", "native.cgroupdriver=cgroupfs"]);
        command.arg(format!("--cgroup-parent=/{}", self.room.cgroup()));
        command.args(["--storage-driver", &self.driver_name()]);
        if self.options.userns {
            command.arg("--userns-remap=daemon");
        }
        command.args(&self.options.dockerd);
        if self.driver.get() == Driver::Managed {
            command.args(&self.options.plugin);
        }
        if self.has_containerd() {
            command.args(["--containerd", proxy::CONTAINERD_SOCKET]);
        }
        let mut daemon = self.room.daemon("dockerd", command);
        self.room.wait_for("dockerd", &mut daemon, || self.ping().is_some());
        *self.dockerd.borrow_mut() = Some(daemon);
    }

    fn ping(&self) -> Option<()> {
        let mut stream = UnixStream::connect(self.socket()).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        stream.write_all(b"GET /_ping HTTP/1.0\r\n\r\n").ok()?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply).ok()?;
        reply.ends_with("OK").then_some(())
    }

    /// Kills dockerd with SIGKILL; containerd dies with it, containers do not.
    pub(crate) fn kill_dockerd(&self) {
        for daemon in [self.dockerd.take(), self.containerd.take()].into_iter().flatten() {
            daemon.kill();
        }
    }

    /// Stops dockerd with SIGTERM, and waits for its end.
    pub(crate) fn stop_dockerd(&self) {
        let Some(daemon) = self.dockerd.borrow_mut().take() else { panic!("dockerd does not run") };
        let ended = daemon.terminate("dockerd");
        if let Some(containerd) = self.containerd.borrow_mut().take() {
            let ended = containerd.terminate("containerd");
            assert!(ended.success(), "containerd ended with {ended}");
        }
        assert!(ended.success(), "dockerd ended with {ended}");
    }

    /// Starts a command in the room.
    pub(crate) fn spawn(&self, words: &[&str]) -> Running {
        self.spawn_with(words, &[], None)
    }

    pub(crate) fn spawn_with(&self, words: &[&str], env: &[(&str, &str)], input: Option<Vec<u8>>) -> Running {
        let mut command = self.inside(words[0]);
        command.args(words[1..].iter().map(OsString::from)).envs(env.iter().copied());
        start(command, input)
    }

    /// Runs a command in the room, whatever comes of it.
    pub(crate) fn run(&self, words: &[&str]) -> Run {
        self.spawn(words).wait()
    }

    /// Runs docker, whatever comes of it.
    pub(crate) fn try_docker(&self, args: &[&str]) -> Run {
        self.run(&[&["docker"], args].concat())
    }

    /// Runs docker; returns its standard output without the last newline.
    pub(crate) fn docker(&self, args: &[&str]) -> String {
        let run = self.try_docker(args).expect_ok();
        String::from_utf8_lossy(&run.stdout).trim_end_matches('\n').to_owned()
    }

    /// Runs docker; returns the very bytes of its standard output.
    pub(crate) fn docker_bytes(&self, args: &[&str]) -> Vec<u8> {
        self.try_docker(args).expect_ok().stdout
    }

    /// Runs docker with standard input.
    pub(crate) fn docker_with(&self, args: &[&str], input: Vec<u8>) -> Run {
        self.spawn_with(&[&["docker"], args].concat(), &[], Some(input)).wait()
    }

    /// Classic build of a folder; returns the text that it printed.
    pub(crate) fn build(&self, tag: &str, context: &Path, args: &[&str]) -> String {
        self.build_by("0", tag, context, args).expect_ok().text()
    }

    /// Build with (`1`) or without (`0`) BuildKit.
    pub(crate) fn build_by(&self, buildkit: &str, tag: &str, context: &Path, args: &[&str]) -> Run {
        let context = context.to_str().expect("a path in UTF-8");
        // Debian's own program has BuildKit's client built in; a newer one needs a plugin for it, which is beside that of
        // Docker 28.
        let docker = if self.has_containerd() { "docker" } else { "/usr/bin/docker" };
        let words = [&[docker, "build", "--network", "none", "--tag", tag], args, &[context]].concat();
        let env = [("DOCKER_BUILDKIT", buildkit), ("BUILDKIT_PROGRESS", "plain")];
        self.spawn_with(&words, &env, None).wait()
    }

    /// Imports a tar as an image.
    pub(crate) fn import(&self, tag: &str, tar: Vec<u8>) {
        self.docker_with(&["import", "-", tag], tar).expect_ok();
    }

    /// Starts a container that stays.
    pub(crate) fn run_container(&self, name: &str, image: &str, args: &[&str]) {
        // A first process ignores SIGTERM, and every stop of the engine would wait for ten seconds.
        let head = ["run", "-d", "--network", "none", "--stop-signal", "KILL", "--name", name];
        self.docker(&[&head, args, &[image, "sleep", "100000"]].concat());
    }

    /// Runs a shell in a running container; returns what it printed.
    pub(crate) fn exec(&self, container: &str, script: &str) -> String {
        self.docker(&["exec", container, "/bin/sh", "-ec", script])
    }

    /// Runs a shell in a new container; returns what it printed.
    pub(crate) fn shell(&self, image: &str, script: &str) -> String {
        self.docker(&["run", "--rm", "--network", "none", image, "/bin/sh", "-ec", script])
    }

    /// Checks every layer of the product's store; fails on a fault.
    pub(crate) fn scrub(&self) {
        if !self.is_lcow() {
            return;
        }
        let home = self.home();
        let program = env!("CARGO_BIN_EXE_lcow-graphdriver");
        let run = self.run(&[program, "store", "scrub", "--json", "--home", home.to_str().expect("UTF-8")]);
        let report: serde_json::Value = serde_json::from_slice(&run.stdout)
            .unwrap_or_else(|e| panic!("store scrub printed no JSON ({e})\n{}", run.text()));
        let faults = report["faults"].as_array().expect("a list of faults");
        assert!(faults.is_empty() && run.ok(), "store scrub found faults\n{report:#}");
    }

    /// Mount points in the room that lie in the storage driver's home.
    pub(crate) fn mounts(&self) -> Vec<String> {
        let home = self.home().to_string_lossy().into_owned();
        let table = self.room.mount_table();
        let points = table.lines().filter_map(|l| l.split(' ').nth(4));
        // dockerd itself keeps a bind mount of a native driver's home.
        points.filter(|p| p.starts_with(&home) && **p != home).map(str::to_owned).collect()
    }

    /// Loop devices whose files are this engine's, by the files' names or, where these are names inside a plugin's own
    /// root, by the files themselves.
    pub(crate) fn loops(&self) -> Vec<String> {
        let folder = self.folder().to_string_lossy().into_owned();
        let mut files = BTreeSet::new();
        for layer in fs::read_dir(self.home()).into_iter().flatten().flatten() {
            let inside = fs::read_dir(layer.path()).into_iter().flatten().flatten();
            files.extend(inside.filter_map(|f| f.metadata().ok()).map(|m| (m.dev(), m.ino())));
        }
        let list = Command::new("losetup")
            .args(["--list", "--noheadings", "--output", "NAME,BACK-MAJ:MIN,BACK-INO,BACK-FILE"])
            .output()
            .expect("losetup");
        let text = String::from_utf8_lossy(&list.stdout).into_owned();
        let ours = |line: &&str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let file = words.get(1).and_then(|device| device.split_once(':')).and_then(|(major, minor)| {
                let device = rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?);
                Some((device, words.get(2)?.parse().ok()?))
            });
            line.contains(&folder) || file.is_some_and(|f| files.contains(&f))
        };
        text.lines().filter(ours).map(str::to_owned).collect()
    }

    /// Unmounts layers that only stay mounted for the next container, as an operator does.
    pub(crate) fn unmount_idle(&self) {
        let plugins = self.room.seen_from_outside("/run/docker/plugins");
        let managed =
            fs::read_dir(plugins).into_iter().flatten().flatten().map(|e| e.path().join("lcow.sock"));
        let fixed = ["/run/docker/plugins/lcow.sock", proxy::LCOW_SOCKET];
        for socket in fixed.map(|path| self.room.seen_from_outside(path)).into_iter().chain(managed) {
            // Without a plugin, it was the stop that unmounted them.
            if UnixStream::connect(&socket).is_ok() {
                let mut command = Command::new(env!("CARGO_BIN_EXE_lcow-graphdriver"));
                command.args(["store", "unmount-idle", "--socket"]).arg(socket);
                start(command, None).wait().expect_ok();
            }
        }
    }

    /// Fails if mounts or loop devices are left. The kernel frees a loop device a moment after its unmount. Snapshots keep
    /// their mounts as long as they exist.
    pub(crate) fn assert_nothing_mounted(&self) {
        self.unmount_idle();
        let begun = Instant::now();
        loop {
            let mut left = [self.mounts(), self.loops()].concat();
            if self.has_containerd() {
                let home = self.home();
                let exists = |name: &str| home.join(name).join("snapshot.json").exists();
                // ".../mnt/NAME", ".../NAME/merged" or ".../NAME/layer.vhd".
                left.retain(|line| !line.rsplit('/').take(2).any(exists));
            }
            if left.is_empty() {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(10), "left mounted: {left:#?}");
            thread::sleep(TICK);
        }
    }

    /// Removes all containers and images.
    pub(crate) fn remove_everything(&self) {
        let containers = self.docker(&["ps", "-aq"]);
        for id in containers.split_whitespace() {
            self.docker(&["rm", "-f", "-v", id]);
        }
        let images = self.docker(&["images", "-aq", "--no-trunc"]);
        let images: BTreeSet<&str> = images.split_whitespace().collect();
        let mut left = images;
        // A parent goes with its last child, or is refused before it and goes in a later pass.
        for _pass in 0..5 {
            left.retain(|id| {
                let run = self.try_docker(&["rmi", "-f", id]);
                !run.ok() && !run.text().contains("No such image")
            });
        }
        self.try_docker(&["builder", "prune", "-af"]).expect_ok();
        assert_eq!(self.docker(&["images", "-aq"]), "", "images are left: {left:?}");
    }
}

/// Folders of Docker 28, its plugin for builds, and containerd 2, fetched at the first call.
fn containerd_programs() -> &'static str {
    static PROGRAMS: OnceLock<String> = OnceLock::new();
    PROGRAMS.get_or_init(|| proxy::script("fetch-engines", &["docker-28", "containerd-2"]).replace('\n', ":"))
}

fn path() -> String {
    match std::env::var("LCOW_E2E_PATH") {
        Ok(first) if !first.is_empty() => format!("{first}:{PATH}"),
        _ => PATH.to_owned(),
    }
}
