//! The daemon, or its worker, is killed at each frame that the two exchange.
//!
//! ```text
//!   a worker is about to read or write its channel ─► kill -9 to the daemon │ to the worker ─► the other side ends
//!       daemon killed: no worker is left; the next start finds nothing half made
//!       worker killed: the request is answered, truly; the next one works
//! ```
//!
//! Frames of a virtual machine's channel, silence and closed channels are in `tests/conformance`. By itself some moments of
//! each operation; `LCOW_FRAMES=all` tries all of them (`scripts/torture frames`).

use crate::{
    operations::{self, OPERATIONS, Operation, act, judge, plugin},
    watch::{Victim, Watched, moves_a_frame},
};
use std::{
    collections::BTreeSet,
    env, fs,
    time::{Duration, Instant},
};

/// Moments of an operation that are tried by themselves, for each of both sides.
const MOMENTS: usize = 7;
/// An operation with fewer was not seen.
const FEWEST_MOMENTS: usize = 4;
/// Longest wait for workers to end behind their daemon.
const PATIENCE: Duration = Duration::from_mins(1);

/// How often a worker reads or writes its channels in an undisturbed request.
fn moments_of(watched: &mut Watched, operation: &Operation) -> usize {
    (operation.prepare)(&watched.plugin);
    watched.count();
    let reply = act(watched, operation).expect("the request is answered");
    let groups = watched.counted();
    assert_eq!(reply.status, 200, "{}: {}", operation.name, reply.text());
    operations::clear(&watched.plugin, "counted");
    groups.iter().filter(|(group, _)| moves_a_frame(group)).map(|(_, count)| count).sum()
}

/// All moments, or some: the first two, the last two, and others between them.
fn chosen(moments: usize) -> BTreeSet<usize> {
    if env::var("LCOW_FRAMES").is_ok_and(|value| value == "all") {
        return (1..=moments).collect();
    }
    let spread = (0..MOMENTS).map(|n| 1 + n * (moments - 1) / (MOMENTS - 1));
    spread.chain([1, 2, moments - 1, moments]).collect()
}

/// Waits for the end of processes, whose numbers may get new owners: those have another name.
fn wait_until_gone(workers: &BTreeSet<u32>, what: &str) {
    let begin = Instant::now();
    let is_there = |pid: &u32| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&command).contains("worker")
    };
    while workers.iter().any(is_there) {
        assert!(begin.elapsed() < PATIENCE, "workers outlive their daemon: {workers:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn end_at_each_frame_of(name: &str) {
    let operation = OPERATIONS.iter().find(|o| o.name == name).expect("an operation");
    let mut watched = plugin();
    let moments = moments_of(&mut watched, operation);
    assert!(moments >= FEWEST_MOMENTS, "{name}: only {moments} moments");
    let (begin, mut met, mut tried, mut refused) = (Instant::now(), 0, 0, 0);
    for victim in [Victim::Worker, Victim::Daemon] {
        for moment in chosen(moments) {
            let what = format!("{name}, {victim:?} killed at {moment} of {moments}");
            (operation.prepare)(&watched.plugin);
            watched.kill_at(victim, moment);
            let reply = act(&mut watched, operation);
            let killed = watched.killed();
            tried += 1;
            met += usize::from(killed.is_some());
            match killed {
                Some(workers) if victim == Victim::Daemon => {
                    assert!(!workers.is_empty(), "no worker is known: {what}");
                    wait_until_gone(&workers, &what);
                    watched.kill_and_restart();
                }
                _ => assert!(reply.is_some(), "no answer: {what}"),
            }
            refused += usize::from(reply.as_ref().is_none_or(|r| r.status != 200 || !r.complete));
            judge(&mut watched, operation, reply.as_ref(), &what);
        }
    }
    println!(
        "{name}: {moments} moments, {tried} kills, {met} met, {refused} requests without success, {} s",
        begin.elapsed().as_secs()
    );
    assert!(met * 10 >= tried * 7 && refused > 0, "{name}: {met} of {tried} moments were met");
    operations::nothing_is_left(&watched.plugin, PATIENCE);
}

macro_rules! operations {
    ($($test:ident $name:literal;)*) => {$(
        #[test]
        fn $test() { end_at_each_frame_of($name); }
    )*};
}

operations! {
    a_kill_at_each_frame_of_apply "apply";
    a_kill_at_each_frame_of_diff_of_an_applied_layer "diff of an applied layer";
    a_kill_at_each_frame_of_diff_of_a_written_sandbox "diff of a written sandbox";
}
