//! Power cuts by the kernel: a file system under the daemon stops at once, and comes back with what was synced.
//!
//! ```text
//!   thread with mounts of its own ─► tmpfs ─► sparse file ─► loop device ─► ext4 │ xfs ─► daemon, both faces
//!     clients ─ requests ─► acknowledged? noted        containers ─ write, fsync ─► noted
//!     cut: EXT4_IOC_SHUTDOWN │ XFS_IOC_GOINGDOWN, no log flush ─► kill -9 ─► everything unmounted
//!     mounted again (the journal is replayed), another boot id ─► daemon ─► compared with the notes ─► repair, scrub, fsck
//! ```
//!
//! * `lone` rounds: one client, nothing else on the file system, cut within 5 ms of an acknowledgement. Any other sync on
//!   the same journal would hide a missing one.
//! * `crowd` rounds: eight clients, and containers that write, cut at any moment.
//! * In every sixth round, with one client, the daemon's changes of names and its syncs are noted (seccomp), and the tree behind the
//!   cut must be one that they allow.
//! * Controls: with syncs skipped, by seccomp and outside of the product, rounds must lose something.
//!
//! `full.rs` has disks that are full, in the same rooms.
//!
//! A loop device keeps every write that has reached it, in its order: what a disk's own volatile cache loses or reorders
//! is not tested here, but by the recorded writes.
//!
//! `LCOW_POWER_ROUNDS` is the number of rounds (30), `LCOW_POWER_SEED` the first one's seed; `LCOW_POWER_RECORDS` names a
//! directory that gets a record of each round: requests with their times, the cut's, and the tree that was found. Needs
//! root, e2fsprogs and xfsprogs.
#![cfg(target_os = "linux")]

mod client;
mod containers;
mod daemon;
#[path = "../face/engine.rs"]
mod engine;
mod full;
mod record;
mod room;
mod round;
mod steps;
#[path = "../support/mod.rs"]
mod support;
#[path = "../face/transport.rs"]
mod transport;
mod verify;
mod work;
mod world;

use daemon::Skipped;
use room::Ground;
use round::{IMPOSSIBLE, Kind, Noting, Plan, play};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// Longest wait for anything here.
const PATIENCE: Duration = Duration::from_mins(1);
/// Rounds of an ordinary run.
const ROUNDS: u64 = 30;
/// Rounds of a control, of which one must lose something.
const CONTROLS: u64 = 10;

fn number(variable: &str, otherwise: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|e| panic!("{variable}={text}: {e}")),
        Err(_) => otherwise,
    }
}

/// The file systems that this kernel has.
fn grounds() -> Vec<Ground> {
    // A module that nothing has needed yet is not in the list.
    let _ = std::process::Command::new("modprobe").args(["-q", "xfs"]).status();
    let known = std::fs::read_to_string("/proc/filesystems").unwrap();
    let has = |ground: &Ground| known.split_whitespace().any(|word| word == ground.name());
    let found: Vec<Ground> = Ground::ALL.into_iter().filter(has).collect();
    assert!(found.contains(&Ground::Ext4), "the kernel has no ext4");
    found
}

#[test]
fn what_was_acknowledged_survives_a_power_cut() {
    let (rounds, seed) = (number("LCOW_POWER_ROUNDS", ROUNDS), number("LCOW_POWER_SEED", 1));
    let grounds = grounds();
    let begin = Instant::now();
    let mut tally: BTreeMap<String, u64> = BTreeMap::new();
    let mut lost = Vec::new();
    for n in 0..rounds {
        let plan = Plan {
            seed: seed + n,
            kind: if n % 2 == 0 { Kind::Lone } else { Kind::Crowd },
            ground: grounds[(n / 2) as usize % grounds.len()],
            skipped: Skipped::Nothing,
            // A third of those with one client: watched calls are slower, and in the others a cut meets other moments.
            noting: if n % 6 == 0 { Noting::Yes } else { Noting::No },
        };
        let result = play(&plan);
        for (what, count) in &result.tally {
            *tally.entry(what.clone()).or_default() += count;
        }
        if !result.losses.is_empty() {
            println!("{plan:?}: {:#?}\n{}", result.losses, result.log);
            lost.push(plan.seed);
        }
    }
    println!("{rounds} rounds, {:?}: {tally:?}", begin.elapsed());
    assert!(
        lost.is_empty(),
        "rounds with these seeds lost something (LCOW_POWER_SEED repeats one): {lost:?}"
    );
    // The rounds met what they are for.
    if rounds >= ROUNDS {
        for what in [
            "acknowledged",
            "in flight",
            "synced files of containers",
            "layers read back",
            "trees held against their steps",
        ] {
            assert!(tally.get(what).is_some_and(|n| *n > 0), "no round had any of: {what}: {tally:?}");
        }
    }
}

#[test]
fn xfs_is_among_the_file_systems() {
    if !grounds().contains(&Ground::Xfs) {
        support::skip::skip("this kernel has no XFS");
    }
}

/// The harness sees losses: with syncs skipped there are some.
fn control(skipped: Skipped) {
    let mut losing = 0;
    for n in 0..CONTROLS {
        let plan = Plan { seed: 1 + n, kind: Kind::Lone, ground: Ground::Ext4, skipped, noting: Noting::No };
        losing += u64::from(!play(&plan).losses.is_empty());
    }
    println!("{skipped:?}: {losing} of {CONTROLS} rounds lost something");
    assert!(losing > 0, "{skipped:?}: no round of {CONTROLS} lost anything: this harness sees no losses");
}

#[test]
fn control_without_syncs_that_were_noted_a_tree_is_impossible() {
    let mut found = 0;
    for n in 0..CONTROLS {
        let plan = Plan {
            seed: 1 + n,
            kind: Kind::Lone,
            ground: Ground::Ext4,
            skipped: Skipped::Nothing,
            noting: Noting::WithoutSyncs,
        };
        found += u64::from(play(&plan).losses.iter().any(|loss| loss.starts_with(IMPOSSIBLE)));
    }
    println!("{found} of {CONTROLS} trees were found impossible");
    assert!(found > 0, "no tree of {CONTROLS} without syncs was found impossible: the check sees nothing");
}

#[test]
fn control_without_any_sync_something_is_lost() {
    control(Skipped::All);
}

#[test]
fn control_without_syncs_of_directories_something_is_lost() {
    control(Skipped::Directories);
}
