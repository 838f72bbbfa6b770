//! `containerd-config`: what it prints for each version, what real containerds make of it, and what a check finds.
//!
//! ```text
//!   containerd-config ─► golden/*.toml                       byte for byte, for every version and system
//!                    ─► containerd 1.7.24, 2.1.9 (packages)  `config dump` has every section; `ctr plugins ls`: both ok
//!   a good drop-in, one thing broken ─► --check              one error, with its remedy; status 1
//! ```
//!
//! `LCOW_WRITE_GOLDEN=1` writes the golden files. The real containerds come from other Debian releases, once, and are
//! kept below the target directory; each one that is started has its own root, state and socket, and is killed on drop.

#[cfg(target_os = "linux")]
mod engine;
#[cfg(target_os = "linux")]
#[path = "../support/skip.rs"]
mod skip;

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Output, Stdio},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_lcow-graphdriver");

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg("containerd-config").args(["--platform", "linux/amd64"]).args(arguments).stdin(Stdio::null());
    command
}

/// What a command that must succeed prints.
fn printed(arguments: &[&str]) -> String {
    let output = command(arguments).output().expect("containerd-config");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// The status of a check, and its lines.
fn check(arguments: &[&str], input: &str) -> (i32, Vec<String>) {
    let mut command = command(arguments);
    let mut child =
        command.args(["--check", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("check");
    child.stdin.take().expect("stdin").write_all(input.as_bytes()).expect("input");
    outcome(child.wait_with_output().expect("check"))
}

fn outcome(output: Output) -> (i32, Vec<String>) {
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    (output.status.code().expect("a status"), text.lines().map(str::to_owned).collect())
}

#[test]
#[cfg(not(windows))]
fn every_version_has_its_text() {
    let cases: &[(&str, &[&str])] = &[
        ("1.7.toml", &["1.7"]),
        ("1.7-default.toml", &["1.7.24~ds1", "--default"]),
        ("2.0-default.toml", &["2.0", "--default"]),
        ("2.1-default.toml", &["2.1", "--default", "--config-version", "2"]),
        ("2.2.toml", &["2.2"]),
        ("2.4-default.toml", &["2.4", "--default", "--unpacks", "8", "--runtime", "kata"]),
        ("2.3-runtime.toml", &["2.3", "--runtime", "lcow=io.containerd.runc.v2", "--name", "vhd"]),
        ("1.7-windows.toml", &["1.7", "--os", "windows"]),
        ("2.2-windows-default.toml", &["2.2", "--os", "windows", "--default"]),
    ];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/containerd_config/golden");
    for (file, arguments) in cases {
        let mut all = vec!["--containerd-version"];
        all.extend(*arguments);
        let text = printed(&all);
        let path = folder.join(file);
        if std::env::var_os("LCOW_WRITE_GOLDEN").is_some() {
            fs::write(&path, &text).expect("golden file");
        }
        assert_eq!(fs::read_to_string(&path).expect("golden file"), text, "{file}");
        // A drop-in for 1.7 cannot choose the snapshotter of pods; everything else passes its own check.
        let (status, lines) = check(&all, &text);
        let expected = i32::from(*file == "1.7-default.toml");
        assert_eq!(status, expected, "{file}: {lines:?}");
    }
}

#[test]
fn a_main_file_keeps_what_it_says() {
    let folder = tempfile::tempdir().expect("directory");
    let main = folder.path().join("config.toml");
    let text = "# ours\nversion = 2 # the format\n\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = \"pause\"\n\
                [plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc.options]\n  SystemdCgroup = true\n\
                [plugins.\"io.containerd.service.v1.diff-service\"]\n  default = [\"walking\", \"special\"]\n\
                [[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  platform = \"linux/arm64\"\n  snapshotter = \"native\"\n";
    fs::write(&main, text).expect("file");
    let path = main.to_str().expect("UTF-8");
    let arguments = ["--os", "linux", "--containerd-version", "1.7", "--default"];
    let merged = printed(&[&arguments[..], &["--into", path]].concat());
    for part in [
        "# ours\nversion = 2 # the format\n",
        "sandbox_image = \"pause\"",
        "SystemdCgroup = true",
        "default = [\"lcow-diff\", \"walking\", \"special\"]",
        "platform = \"linux/arm64\"",
        "snapshotter = \"overlayfs\"",
        "[proxy_plugins.lcow.exports]",
    ] {
        assert!(merged.contains(part), "{part:?} is not in:\n{merged}");
    }
    assert_eq!(check(&arguments, &merged).0, 0);
    // Once more changes nothing.
    fs::write(&main, &merged).expect("file");
    assert_eq!(printed(&[&arguments[..], &["--into", path]].concat()), merged);
    // A file that this containerd does not read is not merged into.
    fs::write(&main, "version = 3\n").expect("file");
    let output = command(&[&arguments[..], &["--into", path]].concat()).output().expect("command");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("containerd 1.7 needs version = 2"));
}

#[test]
fn each_fault_is_found_with_its_remedy() {
    let linux: &[&str] = &["--os", "linux", "--containerd-version", "2.2", "--default"];
    let windows: &[&str] = &["--os", "windows", "--containerd-version", "2.2", "--default"];
    let old: &[&str] = &["--os", "linux", "--containerd-version", "1.7"];
    // Options, what is replaced, by what, and part of the line: an empty `from` appends.
    let cases: &[(&[&str], &str, &str, &str)] = &[
        (linux, "root = \"/var/lib/lcow/containerd\"", "", "error: proxy_plugins.lcow: no exports.root"),
        (
            linux,
            "root = \"/var/lib/lcow/containerd\"",
            "root = \"/elsewhere\"",
            "exports.root is '/elsewhere'",
        ),
        (linux, "\"rebase\", ", "", "capability \"rebase\" is missing"),
        (linux, ", \"remap-ids\"", "", "capability \"remap-ids\" is missing"),
        (
            linux,
            "[proxy_plugins.lcow-diff]",
            "[proxy_plugins.other]",
            "error: proxy_plugins.lcow-diff: missing",
        ),
        (linux, "[proxy_plugins.lcow", "[proxy_plugins.old", "check with --name old"),
        (linux, "type = \"diff\"", "type = \"snapshot\"", "write type = \"diff\""),
        (
            linux,
            "default = [\"lcow-diff\", \"walking\"]",
            "default = [\"walking\"]",
            "does not name lcow-diff",
        ),
        (
            linux,
            "[\"lcow-diff\", \"walking\"]",
            "[\"walking\", \"lcow-diff\"]",
            "names walking before lcow-diff",
        ),
        (linux, "[\"lcow-diff\", \"walking\"]", "[\"lcow-diff\"]", "does not name walking"),
        (linux, "    differ = \"lcow-diff\"\n", "", "has the differ ''; write differ = \"lcow-diff\""),
        (
            linux,
            "    snapshotter = \"lcow\"\n    differ",
            "    snapshotter = \"x\"\n    differ",
            "no unpack_config for lcow",
        ),
        (linux, "version = 3", "version = 2", "not a section of version 2"),
        (linux, "version = 3", "", "does not read version 1"),
        (
            linux,
            "[plugins.\"io.containerd.cri.v1.images\"]\n  snapshotter = \"lcow\"",
            "",
            "the snapshotter of CRI is ''",
        ),
        (linux, "version = 3", "version = 3\ndisabled_plugins = [\"cri\"]", "CRI is disabled"),
        (
            linux,
            "",
            "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"lcow\"\n",
            "not a section of version 3",
        ),
        (windows, "lcow@localhost", "lcow", "the pipe's name has no @"),
        (
            windows,
            "  platform = \"linux/amd64\"\n  capabilities",
            "  capabilities",
            "without a platform it counts as windows",
        ),
        (
            &["--os", "linux", "--containerd-version", "2.1", "--config-version", "2", "--default"],
            "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"",
            "",
            "forgets the snapshotter of a version 2 file",
        ),
        (old, "version = 2", "version = 3", "does not read version 3"),
    ];
    for (arguments, from, to, expected) in cases {
        let good = printed(arguments);
        assert!(good.contains(from), "{from:?} is not in:\n{good}");
        let bad = if from.is_empty() { good + to } else { good.replace(from, to) };
        let (status, lines) = check(arguments, &bad);
        assert!(lines.iter().any(|line| line.contains(expected)), "{expected:?} is not in {lines:?}");
        assert_eq!(status, 1, "{expected}");
    }
}

#[test]
fn names_of_built_in_plugins_need_those_disabled() {
    let arguments = ["--os", "windows", "--containerd-version", "2.1", "--name", "windows-lcow"];
    let text = printed(&arguments);
    let (status, lines) = check(&arguments, &text);
    assert_eq!(status, 1);
    assert!(lines[0].contains("containerd has a plugin of its own with that name"), "{lines:?}");
    let off = "version = 3\ndisabled_plugins = [\"io.containerd.snapshotter.v1.windows-lcow\"]";
    assert_eq!(check(&arguments, &text.replace("version = 3", off)).0, 0);
}

#[test]
fn what_may_be_meant_is_a_note() {
    let arguments = ["--os", "linux", "--containerd-version", "2.2"];
    let text = printed(&arguments);
    for (from, to, expected) in [
        (
            "snapshotter = \"overlayfs\"",
            "snapshotter = \"native\"",
            "note: plugins.\"io.containerd.transfer.v1.local\": no unpack_config for overlayfs",
        ),
        ("max_concurrent_unpacks = 4", "", "layers are unpacked one after the other"),
    ] {
        let (status, lines) = check(&arguments, &text.replace(from, to));
        assert!(lines.iter().any(|line| line.contains(expected)), "{expected:?} is not in {lines:?}");
        assert_eq!(status, 0, "{lines:?}");
    }
}

#[test]
fn a_file_is_checked_with_what_it_imports() {
    let folder = tempfile::tempdir().expect("directory");
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("conf.d")).expect("directory");
    fs::write(path("config.toml"), "version = 3\nimports = [\"conf.d/*.toml\"]\n").expect("file");
    let arguments = ["--os", "linux", "--containerd-version", "2.1"];
    let checked = |main: &Path| {
        let output = command(&arguments).arg("--check").arg(main).output().expect("check");
        outcome(output)
    };
    let text = printed(&arguments);
    fs::write(path("conf.d/lcow.toml"), &text).expect("file");
    let (status, lines) = checked(&path("config.toml"));
    assert_eq!((status, lines.len()), (0, 1), "{lines:?}");
    assert!(lines[0].contains("files read: 2"), "{lines:?}");

    // The same proxies in a second file, and a file of another version.
    fs::write(path("conf.d/old.toml"), &text).expect("file");
    fs::write(path("conf.d/other.toml"), "version = 2\n").expect("file");
    let (status, lines) = checked(&path("config.toml"));
    assert_eq!(status, 1);
    for expected in ["only the last one counts", "other.toml: its version is 2 and that of the main file 3"] {
        assert!(lines.iter().any(|line| line.contains(expected)), "{expected:?} is not in {lines:?}");
    }
    let missing = command(&arguments).arg("--check").arg(path("none.toml")).output().expect("check");
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("none.toml"));
}

#[test]
fn the_version_is_asked_from_the_program_that_is_named() {
    let output = command(&["--containerd", "/no/such/containerd"]).output().expect("command");
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("--containerd-version"), "{error}");
    let output = command(&["--containerd-version", "1.6.20"]).output().expect("command");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("upgrade to 1.7"));
}
