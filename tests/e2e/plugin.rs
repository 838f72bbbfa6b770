//! The product as a managed plugin: made once, put into each engine's data root before its first start.
//!
//! ```text
//!   build-plugin --quick ─► archive ─► engine on vfs: plugin create, enable, stop ─► template of its plugins folder
//!                                         each test: copy, under an id of its own ─► engine on the plugin
//! ```
//!
//! `LCOW_E2E_PLUGIN` names an archive that is there already. Called by `engine`, and by the tests of the plugin itself.

use crate::engine::{Driver, Engine, EngineOptions};
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

/// The plugin's program below its folder in the engine's data root.
const PROGRAM: &str = "rootfs/bin/lcow-graphdriver";

/// Runs one of the project's scripts on the host; returns what it printed.
pub(crate) fn script(name: &str, args: &[&str]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name);
    run(Command::new(&path).args(args))
}

fn run(command: &mut Command) -> String {
    let run = command.output().unwrap_or_else(|e| panic!("cannot start {command:?}: {e}"));
    let error = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{command:?} failed, {}\n{error}", run.status);
    String::from_utf8_lossy(&run.stdout).into_owned()
}

/// The plugin as an archive; built once.
pub(crate) fn archive() -> &'static Path {
    static ARCHIVE: OnceLock<PathBuf> = OnceLock::new();
    ARCHIVE.get_or_init(|| {
        if let Some(given) = std::env::var_os("LCOW_E2E_PLUGIN") {
            return given.into();
        }
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lcow-plugin.tar.gz");
        script("build-plugin", &["--quick", "--save", path.to_str().expect("UTF-8")]);
        path
    })
}

/// Pid 1 of the plugin in this folder as the host sees it, if it runs.
pub(crate) fn first_process(folder: &Path) -> Option<u32> {
    let program = fs::metadata(folder.join(PROGRAM)).expect("the plugin's program");
    let runs = |pid: u32| {
        let exe = fs::metadata(format!("/proc/{pid}/exe")).ok()?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let first = status.lines().any(|l| l.starts_with("NSpid:") && l.ends_with("\t1"));
        (first && (exe.dev(), exe.ino()) == (program.dev(), program.ino())).then_some(pid)
    };
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).find_map(runs)
}

/// An enabled plugin of the name `lcow` in an engine that has not started yet; returns its folder.
pub(crate) fn furnish(options: &EngineOptions, data_root: &Path) -> PathBuf {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let template = template(options);
    fs::create_dir_all(data_root).expect("data root");
    let plugins = data_root.join("plugins");
    run(Command::new("cp").arg("-a").arg(template).arg(&plugins));
    let old = id_in(&plugins);
    // Two containers of one id, in two engines, would meet in one cgroup.
    let seed = format!("{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let id = crate::manifest::sha256(seed.as_bytes());
    let folder = plugins.join(&id);
    fs::rename(plugins.join(&old), &folder).expect("rename the plugin");
    let config = folder.join("config.json");
    let text = fs::read_to_string(&config).expect("the plugin's config.json");
    fs::write(&config, text.replace(&old, &id)).expect("config.json");
    folder
}

/// The plugins folder of an engine of this kind; made once, and kept for later runs as long as the plugin is the same.
fn template(options: &EngineOptions) -> &'static Path {
    const PREFIX: &str = "plugin-template-";
    static TEMPLATE: OnceLock<PathBuf> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let search = (&options.programs, std::env::var_os("LCOW_E2E_PATH"));
        let stamp =
            [fs::read(archive()).expect("the plugin's archive"), format!("{search:?}").into_bytes()].concat();
        let place = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let made = place.join(format!("{PREFIX}{}", &crate::manifest::sha256(&stamp)[..16]));
        if made.is_dir() {
            return made;
        }
        for old in fs::read_dir(place).expect("folder of temporary files").flatten() {
            if old.file_name().to_string_lossy().starts_with(PREFIX) {
                // Perhaps somebody else is deleting it, too.
                let _ = fs::remove_dir_all(old.path());
            }
        }
        let plain = EngineOptions {
            driver: Driver::Vfs,
            dockerd: Vec::new(),
            plugin: Vec::new(),
            userns: false,
            programs: options.programs.clone(),
        };
        let engine = Engine::start(plain);
        let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/build-plugin");
        let words = [build.as_path(), Path::new("--load"), archive()].map(|w| w.to_str().expect("UTF-8"));
        engine.run(&[&words[..], &["--enable"]].concat()).expect_ok();
        engine.stop_dockerd();
        fs::rename(engine.data_root().join("plugins"), &made).expect("keep the plugins folder");
        made
    })
}

/// The one plugin's id in a plugins folder.
fn id_in(plugins: &Path) -> String {
    let names = fs::read_dir(plugins).expect("plugins folder").flatten();
    let found = names.map(|e| e.file_name().to_string_lossy().into_owned()).find(|n| n.len() == 64);
    found.expect("a plugin in the plugins folder")
}
