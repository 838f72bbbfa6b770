//! `docker commit --pause=false`, `docker diff` and sizes of a container that goes on writing.

use crate::{
    engine::{Engine, EngineOptions},
    rootfs,
};

/// Commits in a row; each must succeed.
const COMMITS: usize = 10;

/// The lines of a log that begins at 0, misses none, and ends with a whole one; how many they are.
fn lines(log: &str) -> usize {
    let log = log.strip_suffix("end").expect("all of it");
    for (n, line) in log.lines().enumerate() {
        assert_eq!(line, format!("line {n}"));
    }
    log.lines().count()
}

fn count(engine: &Engine) -> usize {
    engine.exec("box1", "wc -l </log").trim().parse().expect("a number")
}

#[test]
fn a_container_that_writes_is_committed_without_a_pause_ten_times() {
    // containerd's own differ cannot: a file that grows while it is read fails ("archive/tar: write too long").
    let (engine, _) = rootfs::engine_with(EngineOptions::able_to_commit_what_grows(), &rootfs::full());
    engine.run_container("box1", "base", &[]);
    engine.exec(
        "box1",
        "mkdir /many; dd if=/dev/urandom of=/large bs=1M count=30 2>/dev/null; busybox md5sum /large >/sum",
    );
    // 500 lines a second, and files that come and go.
    let log = "i=0; while :; do echo \"line $i\"; i=$((i+1)); busybox usleep 2000; done >/log";
    let many = "i=0; while :; do echo $i >/many/$((i%50)); rm -f /many/$(((i+25)%50)); i=$((i+1)); busybox usleep 1000; done";
    for script in [log, many] {
        engine.docker(&["exec", "-d", "box1", "sh", "-c", script]);
    }
    let mut last = 0;
    for n in 0..COMMITS {
        let before = count(&engine);
        let image = format!("busy{n}");
        engine.docker(&["commit", "--pause=false", "box1", &image]);
        let after = count(&engine);
        let committed = lines(&engine.shell(&image, "busybox md5sum -s -c /sum && cat /log && echo end"));
        if engine.is_lcow() {
            assert!((before..=after + 1).contains(&committed), "{committed} lines, {before} to {after}");
        }
        assert!(committed > last, "{committed} after {last}");
        last = committed;
        assert!(engine.docker(&["diff", "box1"]).lines().any(|l| l == "A /log"));
        assert!(engine.docker(&["ps", "-s"]).contains("MB"));
    }
    engine.docker(&["rm", "-f", "box1"]);
    engine.scrub();
}
