//! The Debian packages in a real Debian: installed, used, upgraded, removed and purged in a chroot.
//!
//! ```text
//!   scripts/package ×2 (two versions) ─► chroot by debootstrap ─► dpkg --install ─► files, manuals, `config check`
//!                                                                    │              serve, Plugin.Activate
//!                                                                    ▼
//!                                          upgrade with an edited file ─► remove ─► purge: the tree is as before
//! ```
//!
//! Needs root, debootstrap and the network once: the chroot is kept below the target directory. The mirror is the one
//! that this machine's apt uses.
#![cfg(target_os = "linux")]

mod chroot;
#[path = "../support/skip.rs"]
mod skip;

use chroot::{Chroot, run};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const PROGRAM: &str = "lcow-graphdriver";
const CONFIG: &str = "etc/lcow/config.toml";
/// Later than every release: the version of the upgrade.
const LATER: &str = "99.0";

/// Builds the packages of a version with this test's profile, and returns their directory.
fn packages(out: &Path, more: &[&str]) -> PathBuf {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/package");
    run(Command::new(script).args(["--profile", "dev", "--out"]).arg(out).args(more));
    out.to_owned()
}

/// The package of a name in a directory of packages.
fn package(folder: &Path, name: &str) -> PathBuf {
    let begin = format!("{name}_");
    let mut found = fs::read_dir(folder).expect("packages").map(|entry| entry.expect("entry").path());
    let of_that_name =
        |path: &PathBuf| path.file_name().is_some_and(|f| f.to_string_lossy().starts_with(&begin));
    found.find(of_that_name).unwrap_or_else(|| panic!("no {begin}*.deb in {}", folder.display()))
}

/// Checks what an installed package must hold.
fn check_installed(chroot: &Chroot) {
    let pages = chroot.list("usr/share/man/man1");
    for command in ["", "-serve", "-store", "-layer", "-config-dump"] {
        let page = format!("usr/share/man/man1/{PROGRAM}{command}.1.gz");
        assert!(pages.contains(&page), "{page} is missing");
        let text = run(Command::new("zcat").arg(chroot.path(&page)));
        assert!(text.contains(".TH") && text.contains(".SH"), "{page} is no manual page");
    }
    for (path, part) in [
        ("usr/share/bash-completion/completions/lcow-graphdriver", "complete -F"),
        ("usr/share/zsh/vendor-completions/_lcow-graphdriver", "#compdef lcow-graphdriver"),
        ("usr/share/fish/vendor_completions.d/lcow-graphdriver.fish", "complete -c lcow-graphdriver"),
        ("lib/systemd/system/lcow-graphdriver.service", "serve --config /etc/lcow/config.toml\n"),
        ("lib/systemd/system/lcow-graphdriver.service", "\nKillMode=process\nPrivateMounts=no\n"),
        ("lib/systemd/system/lcow-graphdriver.socket", "ListenStream=/run/docker/plugins/lcow.sock"),
        ("lib/systemd/system/lcow-graphdriver.socket", "\nFileDescriptorName=docker\n"),
        ("lib/systemd/system/lcow-graphdriver-containerd.socket", "\nFileDescriptorName=containerd\n"),
        ("lib/systemd/system/lcow-graphdriver-containerd.socket", "\nService=lcow-graphdriver.service\n"),
        ("usr/share/doc/lcow-graphdriver/copyright", "Apache-2.0"),
        ("usr/share/doc/lcow-graphdriver/operations.md", "# Operations"),
        (CONFIG, "#sandboxsize = 20\n"),
    ] {
        let text = fs::read_to_string(chroot.path(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        assert!(text.contains(part), "{path} lacks {part:?}");
    }
    // The file as installed is accepted and changes nothing.
    let text = chroot.run(&[PROGRAM, "config", "check"]);
    assert!(text.starts_with("no problems: 0 of ") && text.ends_with("/etc/lcow/config.toml\n"), "{text}");
    // dpkg compares every file with its checksum.
    assert_eq!(chroot.run(&["dpkg", "--verify", PROGRAM]), "");
}

/// Checks the static tarball in a directory of packages, unpacked below `folder`.
fn check_tarball(packages: &Path, folder: &Path) {
    let mut files = fs::read_dir(packages).expect("packages").map(|entry| entry.expect("entry").path());
    let archive = files.find(|path| path.extension().is_some_and(|e| e == "gz")).expect("a tarball");
    run(Command::new("tar").arg("-C").arg(folder).arg("-xzf").arg(&archive));
    let name = archive.file_name().expect("name").to_string_lossy().into_owned();
    let tree = folder.join(name.trim_end_matches(".tar.gz"));
    for file in [
        "LICENSE",
        "COPYRIGHT",
        "config.toml",
        "doc/operations.md",
        "share/man/man1/lcow-graphdriver.1",
        "systemd/lcow-graphdriver.socket",
        "systemd/lcow-graphdriver-containerd.socket",
        "deploy/host/install",
        "deploy/helm/lcow-graphdriver/Chart.yaml",
    ] {
        assert!(tree.join(file).exists(), "{file} is not in {name}");
    }
    let linked = Command::new("ldd").arg(tree.join(PROGRAM)).output().expect("ldd");
    assert!(!String::from_utf8_lossy(&linked.stdout).contains("=>"), "the program needs shared libraries");
    let version = run(Command::new(tree.join(PROGRAM)).arg("--version"));
    assert!(version.starts_with("lcow-graphdriver "), "{version}");
}

/// One test: two would build programs of the same name in the same target directory at once.
#[test]
fn packages_are_installed_upgraded_removed_and_purged() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
    // --check packs a second time, elsewhere, and compares the bytes.
    let first = packages(&folder.path().join("first"), &["--check"]);
    let second = packages(&folder.path().join("second"), &["--version", LATER]);
    run(Command::new("sha256sum").args(["--check", "--strict", "--quiet", "SHA256SUMS"]).current_dir(&first));
    check_tarball(&first, folder.path());
    let Some(chroot) = Chroot::new(folder.path()) else { return };
    let before = chroot.everything();

    chroot.install(&[&package(&first, PROGRAM), &package(&first, "lcow-graphdriver-guest")]);
    check_installed(&chroot);
    for file in ["vmlinux", "initrd", "lcow-agent"] {
        assert!(chroot.path("usr/lib/lcow-graphdriver").join(file).exists(), "{file}");
    }
    let enabled = "etc/systemd/system/sockets.target.wants/lcow-graphdriver.socket";
    assert!(chroot.path(enabled).is_symlink(), "the socket is not enabled");
    let containerd = "etc/systemd/system/sockets.target.wants/lcow-graphdriver-containerd.socket";
    assert!(!chroot.path(containerd).is_symlink(), "the socket for containerd is enabled");
    let text = chroot.run(&[PROGRAM, "containerd-config", "--containerd-version", "2.1"]);
    assert!(text.contains("address = \"/run/lcow/containerd.sock\""), "{text}");
    let reply = chroot.activate();
    assert!(reply.contains("200 OK") && reply.contains("GraphDriver"), "{reply}");

    // An edited file is kept by the upgrade, and is in force.
    let edited =
        fs::read_to_string(chroot.path(CONFIG)).expect("configuration") + "\n[lcow.pool]\nspares = 3\n";
    let edited = edited.replacen("\n[lcow.pool]\n", "\n", 1);
    fs::write(chroot.path(CONFIG), &edited).expect("configuration");
    fs::remove_file(chroot.path(enabled)).expect("a socket that an administrator disabled");
    chroot.install(&[&package(&second, PROGRAM), &package(&second, "lcow-graphdriver-guest")]);
    assert_eq!(fs::read_to_string(chroot.path(CONFIG)).expect("configuration"), edited);
    assert_eq!(chroot.run(&["dpkg-query", "-W", "-f", "${Version}", PROGRAM]), LATER);
    let dump = chroot.run(&[PROGRAM, "config", "dump"]);
    let spares = dump.lines().find(|line| line.contains("lcow.pool.spares")).expect("the option");
    assert!(spares.contains(" 3 ") && spares.contains("/etc/lcow/config.toml:"), "{spares}");
    assert!(!chroot.path(enabled).exists(), "an upgrade enabled the socket again");

    // A mistake in it has its line, and the exit status says so.
    fs::write(chroot.path(CONFIG), "[lcow]\nverity = \"perhaps\"\n").expect("configuration");
    let error = chroot.fail(&[PROGRAM, "config", "check"]);
    assert!(error.contains("/etc/lcow/config.toml:2: option lcow.verity: 'perhaps'"), "{error}");

    chroot.run(&["dpkg", "--remove", PROGRAM, "lcow-graphdriver-guest"]);
    assert!(chroot.path(CONFIG).exists(), "removing the package removed its configuration");
    assert!(!chroot.path("usr/bin/lcow-graphdriver").exists());
    let note = chroot.run(&["sh", "-c", "dpkg --purge lcow-graphdriver lcow-graphdriver-guest 2>&1"]);
    assert!(note.contains("/var/lib/lcow are kept"), "{note}");
    assert!(chroot.path("var/lib/lcow").exists(), "a purge deleted the store");

    // Nothing else is left.
    fs::remove_dir_all(chroot.path("var/lib/lcow")).expect("the store");
    let after = chroot.everything();
    let left: Vec<_> = after.difference(&before).collect();
    let lost: Vec<_> = before.difference(&after).collect();
    assert!(left.is_empty() && lost.is_empty(), "left behind: {left:?}; gone: {lost:?}");
}
