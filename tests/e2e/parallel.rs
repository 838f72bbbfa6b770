//! Many things at one time on one engine.

use crate::{
    archive,
    command::Running,
    engine::EngineOptions,
    manifest::{Tree, sha256},
    rootfs::{self, random_bytes},
    tarball::{self, Entry},
};
use std::fs;

/// How many of each kind.
const EACH: u64 = 6;

fn all_at_once(options: EngineOptions) {
    let (engine, base) = rootfs::engine_with(options, &rootfs::small());
    let base_tar = tarball::build(&rootfs::small());
    let mut running: Vec<(String, Running)> = Vec::new();
    for n in 0..EACH {
        let script =
            format!("echo {n} >/data/n; dd if=/dev/zero of=/data/z bs=64k count=20 2>/dev/null; cat /data/n");
        let words = ["docker", "run", "--rm", "--network", "none", "base", "/bin/sh", "-c", &script];
        running.push((format!("run {n}"), engine.spawn(&words)));

        let context = engine.scratch(&format!("context-{n}"));
        fs::write(context.join("copied"), random_bytes(100 + n, 300_000)).expect("file");
        let dockerfile =
            format!("FROM base\nRUN echo {n} >/data/run\nCOPY copied /data/copied\nRUN rm /etc/group\n");
        fs::write(context.join("Dockerfile"), dockerfile).expect("Dockerfile");
        let tag = format!("built-{n}");
        let words = ["docker", "build", "--network", "none", "-t", &tag, context.to_str().expect("UTF-8")];
        running.push((tag.clone(), engine.spawn_with(&words, &[("DOCKER_BUILDKIT", "0")], None)));

        // All archives share their first two layers.
        let shared = tarball::build(&[Entry::file("data/shared", random_bytes(50, 400_000))]);
        let own = tarball::build(&[Entry::file("data/own", random_bytes(200 + n, 500_000))]);
        let archive = archive::write(&format!("loaded-{n}"), &[base_tar.clone(), shared, own]);
        running.push((format!("load {n}"), engine.spawn_with(&["docker", "load"], &[], Some(archive))));
    }
    for (what, running) in running {
        let run = running.wait().expect_ok();
        if let Some(n) = what.strip_prefix("run ") {
            assert_eq!(String::from_utf8_lossy(&run.stdout).trim(), n, "{what}");
        }
    }
    for n in 0..EACH {
        let mut built = base.clone();
        built.delete("/etc/group");
        built.file("/data/run", 0o644, format!("{n}\n"));
        built.file("/data/copied", 0o644, random_bytes(100 + n, 300_000));
        built.assert_same(&Tree::of_image(&engine, &format!("built-{n}")), &format!("built-{n}"));
        let sums = engine.shell(&format!("loaded-{n}"), "sha256sum </data/shared; sha256sum </data/own");
        let (shared, own) = (sha256(&random_bytes(50, 400_000)), sha256(&random_bytes(200 + n, 500_000)));
        assert_eq!(sums, format!("{shared}  -\n{own}  -"), "loaded-{n}");
    }
    // Saves and removals at one time; what is left is whole.
    let saves: Vec<Running> =
        (0..EACH).map(|n| engine.spawn(&["docker", "save", &format!("loaded-{n}")])).collect();
    let removals: Vec<Running> =
        (0..EACH).map(|n| engine.spawn(&["docker", "rmi", &format!("built-{n}")])).collect();
    for save in saves {
        archive::read(&save.wait().expect_ok().stdout)[0].assert_digests();
    }
    for removal in removals {
        removal.wait().expect_ok();
    }
    engine.scrub();
    engine.remove_everything();
    engine.assert_nothing_mounted();
}

#[test]
fn runs_builds_and_loads_at_one_time() {
    all_at_once(EngineOptions::default());
}

#[test]
fn runs_builds_and_loads_at_one_time_in_global_mode() {
    all_at_once(EngineOptions::lcow().plugin(&["--storage-opt", "lcow.globalmode=true"]));
}
