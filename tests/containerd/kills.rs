//! The kill loop: pull, run, write, commit, remove, over and over, while containerd and the product are killed at random
//! moments. Afterwards every snapshot that containerd lists mounts, no image has a wrong byte, and when everything is
//! removed nothing is left.
//!
//! ```text
//!   worker   pull ─ run ─ exec ─ diff, import ─ rm ─ pull …   (each may fail)
//!   killer   ──┼────── kill -9 of one or both ──┼── start ──┼── …
//! ```
//!
//! `LCOW_KILL_ROUNDS` is the number of kills (30); `LCOW_E2E_SEED` repeats their moments.

use crate::{
    command::wait_until,
    everyday::{assert_empty, commit, remove_everything},
    image,
    node::{Node, Release, Snapshotter},
    registry::Registry,
};
use std::{
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::Duration,
};

/// Longest time between two kills, in milliseconds.
const CALM: u64 = 900;
/// Longest wait for the worker's last command.
const LAST: Duration = Duration::from_mins(2);

/// A small generator (splitmix64).
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

/// What the worker has finished.
#[derive(Debug, Default)]
struct Done {
    pulls: AtomicU32,
    runs: AtomicU32,
    commits: AtomicU32,
    removals: AtomicU32,
}

/// Images that are pulled: of several layers, and shared ones.
fn images() -> Vec<image::Image> {
    vec![image::small(10), image::small(11), image::full()]
}

#[test]
fn kills_leave_no_broken_snapshot_and_no_debris() {
    for release in [Release::V2, Release::V1] {
        campaign(release);
    }
}

fn campaign(release: Release) {
    let rounds: u64 =
        std::env::var("LCOW_KILL_ROUNDS").map_or(30, |n| n.parse().expect("a number of rounds"));
    let seed = std::env::var("LCOW_E2E_SEED").ok().and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |d| d.as_secs())
    });
    eprintln!("LCOW_E2E_SEED={seed}");
    let mut dice = Dice(seed);
    let node = Node::start(release, Snapshotter::Lcow);
    let registry = Registry::start();
    let offered: Vec<_> = images()
        .into_iter()
        .enumerate()
        .map(|(n, i)| (registry.offer(&format!("image-{n}"), &i), i))
        .collect();
    let (stop, done) = (AtomicBool::new(false), Done::default());
    // Half of the rounds for each release.
    for round in 0..rounds.div_ceil(2) {
        // Commands of a dead containerd wait for the next one; each worker sees one kill.
        stop.store(false, Ordering::Relaxed);
        thread::scope(|scope| {
            let worker = scope.spawn(|| work(&node, &offered, round, &stop, &done));
            thread::sleep(Duration::from_millis(dice.roll(CALM)));
            let victims = dice.roll(3);
            if victims != 1 {
                node.kill_lcow();
            }
            if victims != 0 {
                node.kill_containerd();
            }
            thread::sleep(Duration::from_millis(dice.roll(100)));
            if victims != 1 {
                node.start_lcow();
            }
            if victims != 0 {
                node.start_containerd();
            }
            thread::sleep(Duration::from_millis(dice.roll(300)));
            stop.store(true, Ordering::Relaxed);
            wait_until("the worker", LAST, || worker.is_finished().then_some(()));
        });
        if round.is_multiple_of(10) {
            assert_whole(&node, &offered);
        }
    }
    eprintln!("{release:?}: {done:?} in {} kills", rounds.div_ceil(2));
    assert!(done.pulls.load(Ordering::Relaxed) > 0, "no pull succeeded in {rounds} rounds");
    assert_whole(&node, &offered);
    node.release_leases();
    remove_everything(&node);
    // What a killed client made outside of any image.
    for snapshot in node.snapshots().iter().rev() {
        let _ = node.try_ctr(&["snapshots", "rm", snapshot]);
    }
    assert_empty(&node);
}

/// A loop of what people do, until `stop`; a command that fails is followed by the next.
fn work(node: &Node, offered: &[(String, image::Image)], round: u64, stop: &AtomicBool, done: &Done) {
    let count = |what: &AtomicU32| what.fetch_add(1, Ordering::Relaxed);
    for turn in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let (name, image) = &offered[(round as usize + turn) % offered.len()];
        if node.try_ctr(&["images", "pull", "--plain-http", "--snapshotter", "lcow", name]).ok() {
            count(&done.pulls);
        }
        let id = format!("box-{round}-{turn}");
        let run = ["run", "--detach", "--null-io", name, &id, "/bin/sleep", "100000"];
        if !stop.load(Ordering::Relaxed) && node.try_ctr(&run).ok() {
            count(&done.runs);
            let script = "echo written >/data/written; rm -f /data/old; sync";
            let exec = ["tasks", "exec", "--exec-id", "write", &id, "/bin/sh", "-c", script];
            if node.try_ctr(&exec).ok()
                && let Some(committed) = commit(node, &id, image)
            {
                let tag = format!("example.com/committed:{round}-{turn}");
                if node.try_import(&committed.oci_archive(&tag), &[]).ok() {
                    count(&done.commits);
                }
            }
        }
        let _ = node.try_ctr(&["tasks", "kill", "--signal", "SIGKILL", &id]);
        let _ = node.try_ctr(&["tasks", "delete", "--force", &id]);
        let _ = node.try_ctr(&["containers", "delete", &id]);
        if node.try_ctr(&["images", "rm", "--sync", name]).ok() {
            count(&done.removals);
        }
    }
}

/// Mounts every snapshot that containerd lists, and compares every image of the registry that it has.
fn assert_whole(node: &Node, offered: &[(String, image::Image)]) {
    for (n, snapshot) in node.snapshots().iter().enumerate() {
        // What no lease holds may be collected meanwhile.
        let info = node.try_ctr(&["snapshots", "info", snapshot]);
        if !info.ok() && info.text().contains("not found") {
            continue;
        }
        let committed = info.expect_ok().text().contains("\"Kind\": \"Committed\"");
        let key = if committed { format!("look at {n}") } else { snapshot.clone() };
        if committed {
            // Views that ctr makes are collected as garbage at once, what it prepares is not.
            node.ctr(&["snapshots", "prepare", &key, snapshot]);
        } else if snapshot.contains("extract-") {
            // Only the differ mounts what is being unpacked.
            continue;
        }
        let root = node.mount(&key);
        assert!(root.join("bin/busybox").exists(), "{snapshot} has no busybox, which every image has");
        node.unmount(&root);
        if committed {
            node.ctr(&["snapshots", "rm", &key]);
        }
    }
    let names = node.ctr(&["images", "ls", "-q"]);
    for (name, image) in offered.iter().filter(|(name, _)| names.lines().any(|n| n == name)) {
        // Unpacks what a killed pull has not. Its content may be incomplete: then the pull is to be repeated.
        node.ctr(&["images", "pull", "--plain-http", "--snapshotter", "lcow", name]);
        image.tree().assert_same(&node.tree_of_image(name), name);
    }
}
