//! Real containerds as judges: they read what is printed, show it in `config dump`, and load both proxies.

use crate::{check, printed, skip::skip};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Longest wait for a containerd's socket.
const READY: Duration = Duration::from_mins(1);

/// The directory of a release's containerd and ctr; `None` if the test is skipped because there are no package sources.
fn programs(suite: &str) -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("containerd-{suite}"));
    let found = folder.join("usr/bin");
    if !found.join("containerd").exists() {
        // Tests run at once: each fetches into a directory of its own, and the first one stays.
        let part = folder.with_extension(format!("part-{}", std::process::id()));
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/fetch-packages");
        let fetched = Command::new(script).arg(suite).arg(&part).arg("containerd").output().expect("fetch");
        if !fetched.status.success() {
            skip(&format!("no containerd of {suite}: {}", String::from_utf8_lossy(&fetched.stderr).trim()));
            return None;
        }
        if fs::rename(&part, &folder).is_err() {
            fs::remove_dir_all(&part).expect("the second copy");
        }
    }
    Some(found)
}

/// A containerd that is killed when it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Prints the configuration by asking this containerd for its version, and lets it read, dump and load it.
fn accepts(suite: &str, format: u32, main_file: bool, runtime: bool) {
    let Some(programs) = programs(suite) else { return };
    let (containerd, ctr) = (programs.join("containerd"), programs.join("ctr"));
    // Addresses of unix sockets are short; the target directory's path may not be.
    let folder = tempfile::tempdir().expect("directory");
    let path = |name: &str| folder.path().join(name);
    let number = format.to_string();
    let mut arguments =
        vec!["--containerd", containerd.to_str().expect("UTF-8"), "--config-version", &number, "--default"];
    if runtime {
        arguments.extend(["--runtime", "vm=io.containerd.runc.v2"]);
    }
    let main = format!(
        "version = {format}\nroot = '{root}'\nstate = '{state}'\nimports = ['{drop}']\n[grpc]\n  address = '{socket}'\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\n  path = '{opt}'\n",
        root = path("root").display(),
        state = path("state").display(),
        drop = path("conf.d/*.toml").display(),
        socket = path("socket").display(),
        opt = path("opt").display(),
    );
    fs::create_dir(path("conf.d")).expect("directory");
    fs::write(path("config.toml"), &main).expect("file");
    if main_file {
        let merged =
            printed(&[&arguments[..], &["--into", path("config.toml").to_str().expect("UTF-8")]].concat());
        fs::write(path("config.toml"), merged).expect("file");
    } else {
        fs::write(path("conf.d/lcow.toml"), printed(&arguments)).expect("file");
    }

    let dump =
        text(Command::new(&containerd).arg("--config").arg(path("config.toml")).args(["config", "dump"]));
    // Quotes differ by version.
    let dump = dump.replace('\'', "\"");
    let cri = if format == 2 && suite == "trixie" {
        "io.containerd.grpc.v1.cri\".containerd]"
    } else {
        "io.containerd.cri.v1.images\"]"
    };
    let after = dump.split(cri).nth(1).expect("CRI's section");
    let snapshotter =
        after.lines().find(|line| line.trim().starts_with("snapshotter =")).expect("a snapshotter");
    assert_eq!(snapshotter.trim(), "snapshotter = \"lcow\"");
    for part in [
        "[proxy_plugins.lcow]",
        "[proxy_plugins.lcow-diff]",
        "capabilities = [\"rebase\", \"remap-ids\"]",
        "[proxy_plugins.lcow.exports]",
        "root = \"/var/lib/lcow/containerd\"",
        "default = [\"lcow-diff\", \"walking\"]",
        "differ = \"lcow-diff\"",
        "snapshotter = \"overlayfs\"",
        if runtime { "containerd.runtimes.vm]" } else { "containerd.runtimes.runc]" },
    ] {
        assert!(dump.contains(part), "{part:?} is not in containerd's own view:\n{dump}");
    }
    let (status, lines) =
        check(&arguments[..2].iter().chain(&["--default"]).copied().collect::<Vec<_>>(), &dump);
    assert_eq!(status, 0, "{lines:?}");

    let log = fs::File::create(path("log")).expect("log");
    let mut started = Command::new(&containerd);
    started.arg("--config").arg(path("config.toml")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let mut running = Running(started.current_dir(folder.path()).spawn().expect("containerd"));
    let until = Instant::now() + READY;
    let list = || {
        Command::new(&ctr).arg("--address").arg(path("socket")).args(["plugins", "ls"]).output().expect("ctr")
    };
    let plugins = loop {
        let output = list();
        if output.status.success() {
            break String::from_utf8(output.stdout).expect("UTF-8");
        }
        let log = fs::read_to_string(path("log")).unwrap_or_default();
        assert!(running.0.try_wait().expect("containerd").is_none(), "containerd ended: {log}");
        assert!(Instant::now() < until, "containerd does not answer: {log}");
        std::thread::sleep(Duration::from_millis(100));
    };
    for (kind, name) in [("io.containerd.snapshotter.v1", "lcow"), ("io.containerd.differ.v1", "lcow-diff")] {
        let row = plugins.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let row = row.into_iter().find(|row| row.starts_with(&[kind, name]));
        assert_eq!(row.and_then(|row| row.last().copied()), Some("ok"), "{kind} {name} in:\n{plugins}");
    }
}

#[test]
fn containerd_1_7_takes_a_merged_main_file() {
    accepts("trixie", 2, true, false);
}

#[test]
fn containerd_2_1_takes_a_drop_in() {
    accepts("sid", 3, false, true);
}

#[test]
fn containerd_2_1_takes_a_drop_in_of_version_2() {
    accepts("sid", 2, false, false);
}

#[test]
fn containerd_2_1_takes_a_merged_main_file() {
    accepts("sid", 3, true, true);
}

/// What `--check` assumes of imports and of version 2: 2.1 merges a section key by key, 1.7 replaces it; 2.1 forgets the
/// snapshotter if no runtime handler stands beside it.
#[test]
fn sections_are_read_as_the_check_assumes() {
    const CRI: &str = "plugins.\"io.containerd.grpc.v1.cri\"";
    for (suite, handler, kept, snapshotter) in [
        ("trixie", true, false, true),
        ("sid", true, true, true),
        ("trixie", false, false, true),
        ("sid", false, true, false),
    ] {
        let Some(programs) = programs(suite) else { return };
        let folder = tempfile::tempdir().expect("directory");
        let path = |name: &str| folder.path().join(name);
        let main = format!(
            "version = 2\nimports = ['{}']\n[{CRI}]\n  stats_collect_period = 77\n",
            path("drop.toml").display()
        );
        let runtime =
            format!("[{CRI}.containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n");
        let mut drop_in = format!("version = 2\n[{CRI}.containerd]\n  snapshotter = \"lcow\"\n");
        drop_in.push_str(if handler { &runtime } else { "" });
        fs::write(path("config.toml"), main).expect("file");
        fs::write(path("drop.toml"), drop_in).expect("file");
        let mut dump = Command::new(programs.join("containerd"));
        let dump =
            text(dump.arg("--config").arg(path("config.toml")).args(["config", "dump"])).replace('\'', "\"");
        assert_eq!(dump.contains("stats_collect_period = 77"), kept, "{suite}: {dump}");
        assert_eq!(
            dump.contains("snapshotter = \"lcow\""),
            snapshotter,
            "{suite}, handler {handler}: {dump}"
        );
    }
}
