//! What a user of Docker waits for, on this program and on the engine's own overlay2, side by side on one disk.
//! `scripts/bench --engine` makes the layers and runs it:
//! `cargo bench --bench engine -- [--rounds N] [--only A,B] [--out FILE] NAME=TAR NAME=TAR…`. Needs root, like the tests.
//!
//! ```text
//!   one image of a layer for each tar (the first has a shell and python3) ─► docker save ─► image.tar
//!   for each round, for each driver in shuffled order: load, containers that read and write, commit, build, save,
//!   push and pull, rmi      each step timed; times of work in a container are taken in it
//! ```
//!
//! The first round of each driver is discarded. Before each step the disk is settled by a sync that is not counted. Figures
//! are medians, ratios are those of medians.

#![cfg_attr(not(target_os = "linux"), allow(dead_code, unused))]

#[cfg(target_os = "linux")]
#[path = "../tests/e2e/command.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod command;
#[cfg(target_os = "linux")]
#[path = "../tests/e2e/engine.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod engine;
#[cfg(target_os = "linux")]
#[path = "../tests/e2e/isolation.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod isolation;
#[cfg(target_os = "linux")]
#[path = "../tests/e2e/manifest.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod manifest;
#[cfg(target_os = "linux")]
#[path = "../tests/e2e/plugin.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod plugin;
#[cfg(target_os = "linux")]
#[path = "../tests/e2e/proxy.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod proxy;
#[cfg(target_os = "linux")]
#[path = "../tests/e2e/tarball.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod tarball;

#[cfg(not(target_os = "linux"))]
fn main() {}

#[cfg(target_os = "linux")]
fn main() {
    linux::main();
}

#[cfg(target_os = "linux")]
mod linux {
    use crate::engine::{Driver, Engine, EngineOptions};
    use std::{
        collections::BTreeMap,
        fmt::Write as _,
        fs,
        net::{TcpListener, TcpStream},
        path::{Path, PathBuf},
        thread,
        time::{Duration, Instant},
    };

    /// Containers that are started one after the other, and that read one image for the figure of memory.
    const CONTAINERS: usize = 10;
    /// How long after the last of them the page cache is measured.
    const AFTERWARDS: Duration = Duration::from_secs(30);
    /// Longest wait for the registry's port.
    const PATIENCE: Duration = Duration::from_secs(20);

    /// Times one kind of work in a container, and prints the seconds.
    const WORK: &str = r"
import os, shutil, sqlite3, subprocess, sys, time
kind, place = sys.argv[1], '/bench'
os.makedirs(place, exist_ok=True)
def synced(path, data):
    with open(path, 'wb', 0) as f:
        f.write(data); os.fsync(f.fileno())
def walk(read):
    for top, dirs, names in os.walk('/', followlinks=False):
        if top == '/':
            dirs[:] = [d for d in dirs if d not in ('proc', 'sys', 'dev', 'bench')]
        for name in names:
            path = os.path.join(top, name)
            if not read:
                os.lstat(path)
            elif os.path.isfile(path) and not os.path.islink(path):
                with open(path, 'rb', 0) as f:
                    while f.read(1 << 18): pass
def random_writes(sync):
    import random
    rng = random.Random(1)
    f = os.open(place + '/random', os.O_RDWR | os.O_CREAT)
    for _ in range(64): os.write(f, bytes(1 << 20))
    os.fsync(f)
    begin = time.monotonic()
    for _ in range(500):
        os.pwrite(f, b'x' * 4096, rng.randrange(1 << 14) * 4096); sync(f)
    return time.monotonic() - begin
begin = time.monotonic()
if kind == 'find': walk(False)
elif kind == 'read': walk(True)
elif kind == 'small-fsync':
    for n in range(500): synced(f'{place}/s{n}', b'x' * 4096)
elif kind == 'small-sync':
    for n in range(5000):
        with open(f'{place}/n{n}', 'wb') as f: f.write(b'x' * 4096)
    os.sync()
elif kind == 'big':
    with open(place + '/big', 'wb', 0) as f:
        for _ in range(512): f.write(bytes(1 << 20))
        os.fsync(f.fileno())
elif kind == 'fsync': print(random_writes(os.fsync)); sys.exit()
elif kind == 'fdatasync': print(random_writes(os.fdatasync)); sys.exit()
elif kind == 'sqlite':
    db = sqlite3.connect(place + '/db'); db.execute('create table t (a integer primary key, b text)')
    for n in range(300):
        db.execute('insert into t (b) values (?)', ('x' * 500,)); db.commit()
elif kind == 'tree':
    shutil.copytree('/usr/lib/python3', place + '/tree', symlinks=True); shutil.rmtree(place + '/tree')
print(time.monotonic() - begin)
";

    struct Options {
        rounds: usize,
        only: Vec<String>,
        out: Option<PathBuf>,
        layers: Vec<PathBuf>,
    }

    impl Options {
        fn parse() -> Option<Self> {
            let mut options = Self { rounds: 3, only: Vec::new(), out: None, layers: Vec::new() };
            let mut wanted = false;
            let mut arguments = std::env::args().skip(1);
            while let Some(argument) = arguments.next() {
                let mut value = || arguments.next().expect("a value");
                match argument.as_str() {
                    "--bench" => wanted = true,
                    "--rounds" => options.rounds = value().parse().expect("a number of rounds"),
                    "--only" => options.only = value().split(',').map(str::to_owned).collect(),
                    "--out" => options.out = Some(value().into()),
                    layer => {
                        let (_, tar) = layer.split_once('=').expect("NAME=TAR");
                        options.layers.push(tar.into());
                    }
                }
            }
            wanted.then_some(options)
        }
    }

    const DRIVERS: [Driver; 2] = [Driver::Overlay2, Driver::Lcow];

    /// A row of the table, in its order; the last has megabytes.
    const ROWS: &[(&str, &str)] = &[
        ("load", "`docker load`"),
        ("load-sync", "`docker load` and `sync`"),
        ("first-run", "first `docker run` after it"),
        ("read-loaded", "first read of all files after a load"),
        ("runs", "ten `docker run`, one after the other"),
        ("find-cold", "find in a cold container"),
        ("read-cold", "reading all files, cold"),
        ("find-fresh", "find in a fresh container"),
        ("read-fresh", "reading all files in a fresh container"),
        ("read-warm", "reading them again"),
        ("small-fsync", "500 files of 4 KiB, each with fsync"),
        ("small-sync", "5,000 files of 4 KiB, one sync"),
        ("big", "512 MiB, one fsync"),
        ("fsync", "500 random writes of 4 KiB, each with fsync"),
        ("fdatasync", "the same with fdatasync"),
        ("sqlite", "300 transactions of sqlite"),
        ("tree", "copying and deleting a tree of packages"),
        ("diff", "`docker diff`"),
        ("commit", "`docker commit`"),
        ("build", "`docker build` of ten steps"),
        ("save", "`docker save`"),
        ("push", "`docker push` to a registry on loopback"),
        ("pull", "`docker pull` from it (gzip)"),
        ("rmi", "`docker rmi`"),
        ("prune", "`docker system prune`"),
        ("memory", "page cache of one image read by ten containers, MB"),
    ];

    fn settle() {
        rustix::fs::sync();
        thread::sleep(Duration::from_millis(200));
    }

    fn drop_caches() {
        settle();
        fs::write("/proc/sys/vm/drop_caches", "3").expect("drop the page cache");
    }

    /// Megabytes of the page cache.
    fn cached() -> f64 {
        let text = fs::read_to_string("/proc/meminfo").expect("meminfo");
        let value = |name: &str| -> f64 {
            let line = text.lines().find(|line| line.starts_with(name)).expect("a line of meminfo");
            line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
        };
        (value("Cached:") + value("Buffers:") - value("Shmem:")) / 1000.0
    }

    struct Subject<'a> {
        driver: Driver,
        engine: Engine,
        image: PathBuf,
        options: &'a Options,
        registry: String,
        _registry: crate::command::Running,
        figures: BTreeMap<&'static str, Vec<f64>>,
        keep: bool,
    }

    impl<'a> Subject<'a> {
        fn start(driver: Driver, image: &Path, options: &'a Options) -> Self {
            let engine = Engine::start(EngineOptions { driver, ..EngineOptions::default() });
            let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
            let (config, storage) = (engine.scratch("registry").join("config.yml"), engine.scratch("blobs"));
            let text = format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    \
                 enabled: true\nhttp:\n  addr: 127.0.0.1:{port}\n",
                storage.display()
            );
            fs::write(&config, text).expect("the registry's configuration");
            let running = engine.spawn(&["docker-registry", "serve", config.to_str().expect("UTF-8")]);
            crate::command::wait_until("the registry", PATIENCE, || {
                TcpStream::connect(("127.0.0.1", port)).ok()
            });
            fs::write(engine.scratch("context").join("work.py"), WORK).expect("a script");
            Self {
                driver,
                engine,
                image: image.to_owned(),
                options,
                registry: format!("127.0.0.1:{port}/bench"),
                _registry: running,
                figures: BTreeMap::new(),
                keep: false,
            }
        }

        fn wants(&self, row: &str) -> bool {
            self.options.only.is_empty() || self.options.only.iter().any(|only| only == row)
        }

        fn note(&mut self, row: &'static str, value: f64) {
            if self.keep && self.wants(row) {
                self.figures.entry(row).or_default().push(value);
            }
        }

        /// Times a command.
        fn time(&mut self, row: &'static str, work: impl FnOnce(&Engine)) {
            settle();
            let begin = Instant::now();
            work(&self.engine);
            self.note(row, begin.elapsed().as_secs_f64());
        }

        /// The seconds that one kind of work takes in a container.
        fn inside(&mut self, row: &'static str, container: &str, kind: &str) {
            if self.wants(row) {
                settle();
                let text = self.engine.docker(&["exec", container, "python3", "/work.py", kind]);
                self.note(row, text.trim().parse().expect("seconds"));
            }
        }

        fn container(&self, name: &str) {
            let script = self.engine.scratch("context").join("work.py");
            self.engine.run_container(name, "bench", &[]);
            self.engine.docker(&["cp", script.to_str().expect("UTF-8"), &format!("{name}:/work.py")]);
        }

        fn remove(&self, name: &str) {
            self.engine.docker(&["rm", "-f", name]);
        }

        fn round(&mut self) {
            let image = self.image.to_str().expect("UTF-8").to_owned();
            drop_caches();
            let _warm = fs::read(&self.image).expect("the image");
            settle();
            let begin = Instant::now();
            self.engine.docker(&["load", "-i", &image]);
            self.note("load", begin.elapsed().as_secs_f64());
            rustix::fs::sync();
            self.note("load-sync", begin.elapsed().as_secs_f64());
            self.time("first-run", |engine| {
                engine.docker(&["run", "--rm", "bench", "true"]);
            });
            self.container("loaded");
            self.inside("read-loaded", "loaded", "read");
            self.remove("loaded");
            self.time("runs", |engine| {
                for _ in 0..CONTAINERS {
                    engine.docker(&["run", "--rm", "bench", "true"]);
                }
            });
            for (row, kind) in [("find-cold", "find"), ("read-cold", "read")] {
                if self.wants(row) {
                    self.container("cold");
                    drop_caches();
                    self.inside(row, "cold", kind);
                    self.remove("cold");
                }
            }
            self.container("fresh");
            self.inside("find-fresh", "fresh", "find");
            self.remove("fresh");
            self.container("fresh");
            self.inside("read-fresh", "fresh", "read");
            self.inside("read-warm", "fresh", "read");
            self.remove("fresh");
            for row in ["small-fsync", "small-sync", "big", "fsync", "fdatasync", "sqlite", "tree"] {
                if self.wants(row) {
                    self.container("writing");
                    self.inside(row, "writing", row);
                    self.remove("writing");
                }
            }
            self.images(&image);
            if self.wants("memory") {
                self.memory();
            }
            self.time("rmi", |engine| {
                engine.docker(&["rmi", "bench"]);
            });
            self.time("prune", |engine| {
                engine.docker(&["system", "prune", "-a", "-f"]);
            });
        }

        /// What makes images of containers, and moves them.
        fn images(&mut self, image: &str) {
            self.container("changed");
            self.engine.docker(&["exec", "changed", "python3", "/work.py", "small-sync"]);
            self.time("diff", |engine| {
                engine.docker(&["diff", "changed"]);
            });
            self.time("commit", |engine| {
                engine.docker(&["commit", "changed", "committed"]);
            });
            self.remove("changed");
            self.engine.docker(&["rmi", "committed"]);
            if self.wants("build") {
                let context = self.engine.scratch("context");
                let mut steps = "FROM bench\nCOPY work.py /a.py\n".to_owned();
                for n in 0..8 {
                    let _ = writeln!(steps, "RUN mkdir -p /built && echo {n} >/built/{n}");
                }
                steps += "ENV built=1\n";
                fs::write(context.join("Dockerfile"), steps).expect("a Dockerfile");
                self.time("build", |engine| {
                    engine.build("built", &context, &["--no-cache"]);
                });
                self.engine.docker(&["rmi", "built"]);
            }
            let saved = self.engine.scratch("saved").join("image.tar");
            self.time("save", |engine| {
                engine.docker(&["save", "-o", saved.to_str().expect("UTF-8"), "bench"]);
            });
            let _ = fs::remove_file(saved);
            if self.wants("push") || self.wants("pull") {
                let name = self.registry.clone();
                self.engine.docker(&["tag", "bench", &name]);
                self.time("push", |engine| {
                    engine.docker(&["push", &name]);
                });
                self.engine.docker(&["rmi", "bench", &name]);
                self.time("pull", |engine| {
                    engine.docker(&["pull", &name]);
                });
                self.engine.docker(&["tag", &name, "bench"]);
                self.engine.docker(&["rmi", &name]);
                // What is pushed again must not be there already.
                let _ = fs::remove_dir_all(self.engine.scratch("blobs").join("docker"));
            }
            let _ = image;
        }

        fn memory(&mut self) {
            let names: Vec<String> = (0..CONTAINERS).map(|n| format!("reader-{n}")).collect();
            for name in &names {
                self.container(name);
            }
            drop_caches();
            let before = cached();
            for name in &names {
                self.engine.docker(&["exec", name, "python3", "/work.py", "read"]);
            }
            thread::sleep(AFTERWARDS);
            self.note("memory", cached() - before);
            for name in &names {
                self.remove(name);
            }
        }
    }

    /// The image: the first tar imported, and one layer more for each of the others.
    fn image(options: &Options, folder: &Path) -> PathBuf {
        let engine = Engine::start(EngineOptions { driver: Driver::Overlay2, ..EngineOptions::default() });
        let context = engine.scratch("context");
        let first = options.layers.first().expect("a layer with a shell and python3");
        engine.docker(&["import", first.to_str().expect("UTF-8"), "first"]);
        let mut steps = "FROM first\n".to_owned();
        for (n, layer) in options.layers.iter().enumerate().skip(1) {
            fs::hard_link(layer, context.join(format!("{n}.tar")))
                .or_else(|_| fs::copy(layer, context.join(format!("{n}.tar"))).map(|_| ()))
                .expect("a layer of the context");
            let _ = writeln!(steps, "ADD {n}.tar /srv/{n}/");
        }
        steps += "CMD [\"sh\"]\n";
        fs::write(context.join("Dockerfile"), steps).expect("a Dockerfile");
        engine.build("bench", &context, &[]);
        let saved = folder.join("image.tar");
        engine.docker(&["save", "-o", saved.to_str().expect("UTF-8"), "bench"]);
        saved
    }

    fn median(values: &[f64]) -> f64 {
        let mut sorted = values.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    }

    fn shown(row: &str, value: f64) -> String {
        match row {
            "memory" => format!("{value:.0} MB"),
            _ if value >= 1.0 => format!("{value:.2} s"),
            _ => format!("{:.0} ms", value * 1000.0),
        }
    }

    pub(super) fn main() {
        // `cargo test --benches` runs it, too, and expects nothing.
        let Some(options) = Options::parse() else { return };
        let folder = tempfile::Builder::new()
            .prefix("bench-engine-")
            .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .expect("a folder");
        let image = image(&options, folder.path());
        let mut subjects = DRIVERS.map(|driver| Subject::start(driver, &image, &options));
        for round in 0..=options.rounds {
            // The order changes with each round, so that neither always has the other's page cache.
            if round % 2 == 1 {
                subjects.reverse();
            }
            for subject in &mut subjects {
                subject.keep = round > 0;
                subject.round();
            }
            eprintln!("engine: round {round} of {}", options.rounds);
        }
        let of = |driver: Driver| &subjects.iter().find(|s| s.driver == driver).expect("a driver").figures;
        let (base, ours) = (of(Driver::Overlay2), of(Driver::Lcow));
        let mut out = format!(
            "### Docker on this program and on overlay2, medians of {} rounds\n\n| task | overlay2 | this program | × |\n\
             |---|---:|---:|---:|\n",
            options.rounds
        );
        for &(row, name) in ROWS {
            let (Some(base), Some(ours)) = (base.get(row), ours.get(row)) else { continue };
            let (base, ours) = (median(base), median(ours));
            let _ = writeln!(
                out,
                "| {name} | {} | {} | {:.2} |",
                shown(row, base),
                shown(row, ours),
                ours / base
            );
        }
        println!("{out}");
        if let Some(path) = &options.out {
            fs::write(path, &out).expect("the table");
        }
    }
}
