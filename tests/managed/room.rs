//! An engine whose storage driver is the managed plugin that `scripts/build-plugin` made.
//!
//! ```text
//!   dockerd on vfs ─ build-plugin --load ─ plugin enable ─ dockerd stops ─► dockerd on the plugin
//! ```

use crate::{
    command::wait_until,
    engine::{Driver, Engine, EngineOptions},
    manifest::Tree,
    plugin::{self, archive, script},
    rootfs, tarball,
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// Longest time from the start of the plugin to its first answer.
pub(crate) const READY: Duration = Duration::from_secs(2);
/// Longest time in which the engine starts a plugin that ended.
pub(crate) const RESTART: Duration = Duration::from_secs(20);

/// An engine to test with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// Debian 12's.
    V20,
    /// Debian 13's, unpacked beside it.
    V26,
}

impl Version {
    pub(crate) fn options(self, driver: Driver) -> EngineOptions {
        let programs = match self {
            Self::V20 => None,
            Self::V26 => Some(PathBuf::from(script("fetch-engines", &[]).trim())),
        };
        EngineOptions { driver, programs, ..EngineOptions::default() }
    }

    /// Fails unless this is the engine that answers.
    pub(crate) fn assert_runs(self, engine: &Engine) {
        let wanted = match self {
            Self::V20 => "20.10.",
            Self::V26 => "26.1.",
        };
        let found = engine.docker(&["version", "-f", "{{.Server.Version}}"]);
        assert!(found.starts_with(wanted), "the engine is {found}, not {wanted}x");
    }
}

/// The archive of a plugin whose program has other bytes (some more at its end, which nobody reads) and another
/// version.
pub(crate) fn next_version(folder: &Path) -> PathBuf {
    let tar = |args: &[&str]| {
        let status = Command::new("tar").args(args).status().expect("tar");
        assert!(status.success(), "tar {args:?}");
    };
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let tree = folder.join("next");
    fs::create_dir_all(&tree).expect("folder");
    tar(&["-C", &text(&tree), "-xzf", &text(archive())]);
    let program = tree.join("rootfs/bin/lcow-graphdriver");
    let mut bytes = fs::read(&program).expect("program");
    bytes.extend_from_slice(b"next version");
    fs::write(&program, bytes).expect("program");
    let next = folder.join("next.tar.gz");
    let args = ["--program", &text(&program), "--version", "99.0-test", "--save", &text(&next)];
    script("build-plugin", &args);
    next
}

/// An engine on the managed plugin.
#[derive(Debug)]
pub(crate) struct Room {
    pub(crate) engine: Engine,
    /// The plugin's name, as given to the engine.
    pub(crate) name: String,
}

impl Room {
    /// Creates and enables the plugin, starts the engine on it, and imports `base`.
    pub(crate) fn start(version: Version, dockerd: &[&str]) -> (Self, Tree) {
        let engine = Engine::start(version.options(Driver::Vfs).dockerd(dockerd));
        version.assert_runs(&engine);
        let room = Self::of(engine);
        room.use_plugin();
        let entries = rootfs::full();
        room.engine.import("base", tarball::build(&entries));
        let mut tree = Tree::default();
        tree.apply(&entries);
        // The engine writes there in every container.
        tree.0.get_mut(b"/etc".as_slice()).expect("/etc").mtime = None;
        (room, tree)
    }

    /// Creates and enables the plugin in an engine that runs on something else.
    pub(crate) fn of(engine: Engine) -> Self {
        let room = Self { engine, name: "lcow".into() };
        room.create(archive());
        room.enable();
        room
    }

    /// Runs scripts/build-plugin in the room.
    pub(crate) fn build_plugin(&self, args: &[&str]) -> String {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/build-plugin");
        let words = [&[script.to_str().expect("UTF-8")], args].concat();
        self.engine.run(&words).expect_ok().text()
    }

    pub(crate) fn create(&self, archive: &Path) {
        self.build_plugin(&["--load", archive.to_str().expect("UTF-8"), "--name", &self.name]);
    }

    /// Enables the plugin. The engine returns when it answers.
    pub(crate) fn enable(&self) {
        let begun = Instant::now();
        self.engine.docker(&["plugin", "enable", &self.name]);
        eprintln!("plugin enable took {:?}", begun.elapsed());
        let socket = format!("/run/docker/plugins/{}/lcow.sock", self.id());
        self.engine.run(&["test", "-S", &socket]).expect_ok();
    }

    /// Restarts the engine with the plugin as its storage driver.
    pub(crate) fn use_plugin(&self) {
        self.engine.choose_driver(Driver::Managed, &self.name, self.home_of(&self.name));
        self.engine.stop_dockerd();
        self.engine.start_dockerd();
        let driver = self.engine.docker(&["info", "-f", "{{.Driver}}"]);
        assert_eq!(driver, self.name);
    }

    /// Restarts the engine with a driver of its own.
    pub(crate) fn use_vfs(&self) {
        self.engine.choose_driver(Driver::Vfs, "vfs", self.engine.data_root().join("vfs"));
        self.engine.stop_dockerd();
        self.engine.start_dockerd();
    }

    pub(crate) fn id(&self) -> String {
        self.engine.docker(&["plugin", "inspect", "-f", "{{.Id}}", &self.name])
    }

    /// What of the engine's folder belongs to the plugin: `rootfs`, `propagated-mount`.
    pub(crate) fn folder(&self) -> PathBuf {
        self.engine.data_root().join("plugins").join(self.id())
    }

    /// Where the store for this `--storage-driver` is.
    pub(crate) fn home_of(&self, driver: &str) -> PathBuf {
        self.folder().join("propagated-mount").join(driver)
    }

    /// Pid 1 of the plugin's container as the host sees it, if it runs.
    pub(crate) fn plugin_pid(&self) -> Option<u32> {
        plugin::first_process(&self.folder())
    }

    /// Waits until another process than `old` is the plugin and answers.
    pub(crate) fn wait_for_successor(&self, old: u32) -> u32 {
        let new =
            wait_until("the plugin's next process", RESTART, || self.plugin_pid().filter(|pid| *pid != old));
        wait_until("the plugin to answer", RESTART, || {
            let info = self.engine.try_docker(&["info", "-f", "{{json .DriverStatus}}"]);
            info.text().contains("Store Format").then_some(())
        });
        new
    }

    /// One line of the storage driver's part of `docker info`.
    pub(crate) fn status(&self, key: &str) -> String {
        let json = self.engine.docker(&["info", "-f", "{{json .DriverStatus}}"]);
        let lines: Vec<(String, String)> = serde_json::from_str(&json).expect("DriverStatus");
        let found = lines.into_iter().find(|(k, _)| k == key);
        found.unwrap_or_else(|| panic!("no '{key}' in {json}")).1
    }
}
