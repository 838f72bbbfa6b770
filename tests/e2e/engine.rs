//! A private Docker engine on the product, which nothing survives.
//!
//! ```text
//!   test ─► setpriv --pdeathsig ─► unshare: mount, pid, ipc, uts ─► sh (pid 1 of the room)
//!             │                      tmpfs on /run, overlay on /etc
//!             ├─ nsenter ─► lcow-graphdriver serve   (log file)
//!             ├─ nsenter ─► dockerd ─► containerd ─► shims, containers   (log file)
//!             └─ nsenter ─► docker …
//! ```
//!
//! Invariants: every process of an engine lives in its room, so that killing the room's pid 1 ends all of them, and
//! all mounts go with the room's mount namespace; all files are below one temporary folder. `Drop` does so after a
//! panic, too, and then prints the ends of the logs. Rooms share nothing but the kernel and the cgroup mount, where
//! each has a folder of its own. The host's own Docker is not touched.

use crate::{
    command::{Run, Running, TICK, children, kill, start, wait_until},
    plugin,
};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    ffi::OsString,
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Longest time that a daemon may take to answer.
const START_LIMIT: Duration = Duration::from_mins(1);
/// Bytes of each log that a failed test shows.
const LOG_TAIL: usize = 12 << 10;
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
}

impl Driver {
    /// `LCOW_E2E_DRIVER=managed` runs the tests on the managed plugin, `=overlay2` as a control.
    pub(crate) fn from_env() -> Self {
        match std::env::var("LCOW_E2E_DRIVER").as_deref() {
            Err(_) | Ok("lcow") => Self::Lcow,
            Ok("managed") => Self::Managed,
            Ok("overlay2") => Self::Overlay2,
            Ok(other) => panic!("LCOW_E2E_DRIVER={other}: lcow, managed or overlay2"),
        }
    }
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lcow | Self::Managed => "lcow",
            Self::Overlay2 => "overlay2",
            Self::Vfs => "vfs",
        }
    }
    fn is_lcow(self) -> bool {
        matches!(self, Self::Lcow | Self::Managed)
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
            product => product,
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
            None => path(),
        }
    }
}

/// A daemon in the room.
#[derive(Debug)]
struct Daemon {
    /// The `nsenter` that waits for it.
    outer: Child,
    /// Its own pid, as the host sees it.
    pid: u32,
}

impl Daemon {
    fn kill(mut self) {
        kill(self.pid);
        let _ = self.outer.wait();
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
    folder: Option<tempfile::TempDir>,
    /// The `unshare` around the room.
    room: Child,
    init: u32,
    plugin: RefCell<Option<Daemon>>,
    dockerd: RefCell<Option<Daemon>>,
    /// Name and home of the storage driver, where they are not those of `options.driver`.
    chosen: RefCell<Option<(String, PathBuf)>>,
    cgroup: String,
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

    /// A room without daemons.
    fn room(options: EngineOptions) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "the end-to-end tests need root: they mount and run dockerd"
        );
        for (program, package) in
            [("dockerd", "docker.io"), ("runc", "runc"), ("busybox", "busybox-static"), ("getfattr", "attr")]
        {
            let found = options.path().split(':').any(|d| Path::new(d).join(program).exists());
            assert!(found, "the end-to-end tests need {program}: apt-get install {package}");
        }
        let folder = tempfile::Builder::new()
            .prefix("lcow-e2e-")
            .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .expect("temporary folder");
        let cgroup = folder.path().file_name().expect("a name").to_string_lossy().into_owned();
        // Pid 1 has to reap what loses its parent; busybox's shell does so while it waits.
        const ROOM: &str = "mount -t tmpfs -o mode=755 room /run && mkdir -p /run/etc/upper /run/etc/work \
            /run/docker/plugins && mount -t overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work \
            etc /etc && rm -rf /etc/docker && echo daemon:500000:65536 >/etc/subuid && cat /etc/subuid >/etc/subgid \
            && echo ready || exit 1; while :; do sleep 1000 & wait $!; done";
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"]);
        command.args([
            "--mount-proc",
            "--ipc",
            "--uts",
            "--propagation",
            "private",
            "busybox",
            "sh",
            "-c",
            ROOM,
        ]);
        // unshare complains of a signal mask whenever its child is killed.
        let log = fs::File::create(folder.path().join("room.log")).expect("log file");
        command.env("PATH", options.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut room = command.spawn().expect("setpriv and unshare (util-linux)");
        let mut ready = [0_u8; 6];
        let told = room.stdout.take().expect("stdout").read_exact(&mut ready);
        let init = children(room.id()).first().copied();
        let engine = Self {
            driver: Cell::new(options.driver),
            killed: Cell::default(),
            options,
            folder: Some(folder),
            room,
            init: init.unwrap_or_default(),
            plugin: RefCell::default(),
            dockerd: RefCell::default(),
            chosen: RefCell::default(),
            cgroup,
        };
        let furnished = told.is_ok() && &ready == b"ready\n" && init.is_some();
        assert!(furnished, "the room could not be furnished\n{}", engine.log_text("room"));
        engine
    }

    /// The engine's folder, the same path in and outside of the room.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.as_ref().expect("kept until Drop").path()
    }

    /// The engine's socket, as the host sees it.
    pub(crate) fn socket(&self) -> PathBuf {
        format!("/proc/{}/root/run/e2e.sock", self.init).into()
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
        command
            .env_clear()
            .env("PATH", self.options.path())
            .env("HOME", self.folder())
            .env("LC_ALL", "C.UTF-8");
        command.env("DOCKER_CONFIG", self.folder().join("client")).env("DOCKER_HOST", "unix:///run/e2e.sock");
        command
    }

    fn daemon(&self, name: &str, mut command: Command) -> Daemon {
        let log = fs::File::options().create(true).append(true).open(self.log(name)).expect("log file");
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("log file")).stderr(log);
        let mut outer = command.spawn().expect("nsenter");
        let pid = wait_until(name, START_LIMIT, || {
            if let Some(status) = outer.try_wait().expect("wait for nsenter") {
                panic!("{name} ended at once, {status}\n{}", self.log_tail(name));
            }
            children(outer.id()).first().copied()
        });
        Daemon { outer, pid }
    }

    fn log(&self, name: &str) -> PathBuf {
        self.folder().join(format!("{name}.log"))
    }

    /// Everything that a daemon wrote.
    pub(crate) fn log_text(&self, name: &str) -> String {
        String::from_utf8_lossy(&fs::read(self.log(name)).unwrap_or_default()).into_owned()
    }

    fn log_tail(&self, name: &str) -> String {
        let text = self.log_text(name);
        // dockerd's list of its own routes, and requests in full, tell nothing.
        let noise = |l: &&str| !l.contains("msg=\"Registering ") && !l.contains("msg=\"form data");
        let text = text.lines().filter(noise).collect::<Vec<_>>().join("\n");
        text[text.floor_char_boundary(text.len().saturating_sub(LOG_TAIL))..].to_owned()
    }

    fn wait_for(&self, name: &str, daemon: &mut Daemon, mut answers: impl FnMut() -> bool) {
        wait_until(&format!("{name} to answer"), START_LIMIT, || {
            if let Some(status) = daemon.outer.try_wait().expect("wait for a daemon") {
                panic!("{name} ended, {status}\n{}", self.log_tail(name));
            }
            answers().then_some(())
        });
    }

    /// Starts the plugin, and waits for its socket. With another driver than the product there is nothing to start.
    /// A managed plugin is started by the engine, and waited for.
    pub(crate) fn start_plugin(&self) {
        match self.driver.get() {
            Driver::Lcow => {}
            Driver::Managed if self.dockerd.borrow().is_some() => return self.wait_for_managed(),
            Driver::Managed | Driver::Overlay2 | Driver::Vfs => return,
        }
        assert!(self.plugin.borrow().is_none(), "the plugin runs already");
        let mut command = self.inside(env!("CARGO_BIN_EXE_lcow-graphdriver"));
        command.arg("serve").arg("--root").arg(self.folder().join("plugin"));
        command.args(["--socket", "/run/docker/plugins/lcow.sock"]).args(&self.options.plugin);
        command.env("RUST_BACKTRACE", "1").env("RUST_LOG", "info");
        let mut daemon = self.daemon("plugin", command);
        let socket = format!("/proc/{}/root/run/docker/plugins/lcow.sock", self.init);
        self.wait_for("plugin", &mut daemon, || UnixStream::connect(&socket).is_ok());
        *self.plugin.borrow_mut() = Some(daemon);
    }

    fn wait_for_managed(&self) {
        let killed = self.killed.get();
        wait_until("the plugin's next process", START_LIMIT, || {
            self.managed_pid().filter(|pid| Some(*pid) != killed)
        });
        wait_until("the plugin to answer", START_LIMIT, || {
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
        fs::write(&config, "{}").expect("daemon.json");
        // A predecessor that was killed leaves its pid file, and the pid may be somebody else's by now.
        let _ = fs::remove_file(format!("/proc/{}/root/run/e2e.pid", self.init));
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
        command.arg(format!("--cgroup-parent=/{}", self.cgroup));
        command.args(["--storage-driver", &self.driver_name()]);
        if self.options.userns {
            command.arg("--userns-remap=daemon");
        }
        command.args(&self.options.dockerd);
        if self.driver.get() == Driver::Managed {
            command.args(&self.options.plugin);
        }
        let mut daemon = self.daemon("dockerd", command);
        self.wait_for("dockerd", &mut daemon, || self.ping().is_some());
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
        if let Some(daemon) = self.dockerd.borrow_mut().take() {
            daemon.kill();
        }
    }

    /// Stops dockerd with SIGTERM, and waits for its end.
    pub(crate) fn stop_dockerd(&self) {
        let Some(mut daemon) = self.dockerd.borrow_mut().take() else { panic!("dockerd does not run") };
        let pid = Pid::from_raw(daemon.pid.cast_signed()).expect("a pid");
        kill_process(pid, Signal::TERM).expect("SIGTERM to dockerd");
        let ended =
            wait_until("dockerd to end", START_LIMIT, || daemon.outer.try_wait().expect("wait for dockerd"));
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
        let words = [&["docker", "build", "--network", "none", "--tag", tag], args, &[context]].concat();
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
        let table =
            fs::read_to_string(format!("/proc/{}/mountinfo", self.init)).expect("mount table of the room");
        let points = table.lines().filter_map(|l| l.split(' ').nth(4));
        // dockerd itself keeps a bind mount of a native driver's home.
        points.filter(|p| p.starts_with(&home) && **p != home).map(str::to_owned).collect()
    }

    /// Loop devices whose files are this engine's.
    pub(crate) fn loops(&self) -> Vec<String> {
        let folder = self.folder().to_string_lossy().into_owned();
        let mut found = Vec::new();
        for device in fs::read_dir("/sys/block").expect("/sys/block").flatten() {
            let file = fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
            if file.contains(&folder) {
                found.push(format!("{} {}", device.file_name().to_string_lossy(), file.trim_end()));
            }
        }
        found
    }

    /// Fails if mounts or loop devices are left. The kernel frees a loop device a moment after its unmount.
    pub(crate) fn assert_nothing_mounted(&self) {
        let begun = Instant::now();
        loop {
            let left = [self.mounts(), self.loops()].concat();
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

fn path() -> String {
    match std::env::var("LCOW_E2E_PATH") {
        Ok(first) if !first.is_empty() => format!("{first}:{PATH}"),
        _ => PATH.to_owned(),
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if thread::panicking() {
            for name in ["plugin", "dockerd"] {
                eprintln!("──── end of {name}.log ────\n{}", self.log_tail(name));
            }
        }
        // The kernel kills and reaps the whole pid namespace before its pid 1 is gone.
        kill(self.init);
        let _ = self.room.wait();
        for daemon in [self.plugin.take(), self.dockerd.take()].into_iter().flatten() {
            let mut daemon = daemon;
            let _ = daemon.outer.wait();
        }
        remove_cgroups(&self.cgroup);
        let panics = ["plugin", "dockerd"].iter().any(|log| self.log_text(log).contains("panicked at"));
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
