//! Processes are killed with SIGKILL at random moments; after each restart the store is whole and the engine works.

use crate::{
    archive,
    command::{children, kill},
    engine::{Engine, EngineOptions},
    rootfs::{self, random_bytes},
    tarball::{self, Entry},
};
use std::{fs, thread, time::Duration};

/// Rounds of each loop.
const ROUNDS: u64 = 10;

/// A small generator (splitmix64): the seed is printed, and repeats a run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % sides
    }
}

/// Kills every service VM: spares, and those that work for somebody.
fn kill_workers(engine: &Engine) {
    for pid in children(engine.plugin_pid()) {
        kill(pid);
    }
}

/// Ten rounds of work, in each of which one of `victims` is killed. Nothing is running and no image is left at the end.
fn rounds_of_kills(victims: &[&str]) -> Engine {
    let seed = std::env::var("LCOW_E2E_SEED").ok().and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |d| d.as_secs())
    });
    eprintln!("LCOW_E2E_SEED={seed}");
    let mut dice = Dice(seed);
    let (engine, _) = rootfs::engine_with(EngineOptions::lcow(), &rootfs::small());
    engine.run_container("kept", "base", &[]);
    engine.exec("kept", "echo kept >/data/kept && sync");

    let large: Vec<Vec<u8>> = (0..3_u64)
        .map(|n| tarball::build(&[Entry::file(format!("data/large-{n}"), random_bytes(n, 6 << 20))]))
        .collect();
    let base = tarball::build(&rootfs::small());
    let archive = archive::write("loaded", &[&[base], &large[..]].concat());
    let file = engine.scratch("files").join("loaded.tar");
    fs::write(&file, &archive).expect("archive");
    let file = file.to_str().expect("UTF-8").to_owned();
    let context = engine.scratch("context");
    fs::write(context.join("copied"), random_bytes(11, 2 << 20)).expect("file");
    let dockerfile = "FROM base\nCOPY copied /copied\nRUN cp /copied /copied-2 && echo built >/data/built\n";
    fs::write(context.join("Dockerfile"), dockerfile).expect("Dockerfile");
    let context = context.to_str().expect("UTF-8").to_owned();

    for round in 0..ROUNDS {
        let action: Vec<&str> = match dice.roll(4) {
            0 => vec!["docker", "load", "-i", &file],
            1 => vec!["docker", "build", "--no-cache", "--network", "none", "-t", "built", &context],
            2 => {
                let script = "echo x >/x; dd if=/dev/zero of=/y bs=1M count=4 2>/dev/null";
                vec!["docker", "run", "--network", "none", "base", "/bin/sh", "-c", script]
            }
            _ => {
                // Something to remove.
                engine.try_docker(&["create", "--name", "victim", "--network", "none", "base", "true"]);
                vec!["docker", "rm", "-f", "victim"]
            }
        };
        let victim = victims[dice.roll(victims.len() as u64) as usize];
        // Within the time that each takes.
        let wait = Duration::from_millis(dice.roll(match action[1] {
            "rm" => 120,
            "load" => 500,
            _ => 900,
        }));
        eprintln!("round {round}: {victim} is killed {wait:?} into {}", action[1]);
        let running = engine.spawn_with(&action, &[("DOCKER_BUILDKIT", "0")], None);
        thread::sleep(wait);
        match victim {
            "plugin" => {
                engine.kill_plugin();
                engine.start_plugin();
            }
            "worker" => kill_workers(&engine),
            _ => {
                engine.kill_dockerd();
                engine.start_dockerd();
                // It was not asked to restore anything.
                engine.docker(&["start", "kept"]);
            }
        }
        // Whether the command came through is a matter of luck; that it ends is not.
        eprintln!("round {round}: {}", if running.wait().ok() { "it succeeded" } else { "it failed" });
        assert_eq!(engine.exec("kept", "cat /data/kept"), "kept", "round {round}");
        assert_eq!(engine.shell("base", "echo works >/x && cat /x"), "works", "round {round}");
        engine.scrub();
    }
    // Everything can be done after all, and its contents are right.
    engine.docker(&["load", "-i", &file]);
    let saved = archive::read(&engine.docker_bytes(&["save", "loaded"]));
    saved[0].assert_digests();
    assert!(saved[0].layers[1..] == large[..], "the loaded layers have other bytes");
    engine.build("built", std::path::Path::new(&context), &["--no-cache"]);
    let sums = engine.shell("built", "sha256sum </copied; sha256sum </copied-2; cat /data/built");
    let sum = crate::manifest::sha256(&random_bytes(11, 2 << 20));
    assert_eq!(sums, format!("{sum}  -\n{sum}  -\nbuilt"));
    engine.scrub();
    engine.remove_everything();
    engine
}

#[test]
fn kills_of_the_plugin_and_of_its_service_vms_lose_nothing() {
    let engine = rounds_of_kills(&["plugin", "worker"]);
    engine.assert_nothing_mounted();
    engine.stop_dockerd();
}

/// A killed dockerd forgets what it was about to create, and what its builder had mounted: such layers stay mounted
/// until its next orderly stop, under every driver.
#[test]
fn kills_of_dockerd_lose_nothing() {
    let engine = rounds_of_kills(&["plugin", "dockerd", "dockerd"]);
    engine.stop_dockerd();
    engine.assert_nothing_mounted();
}
