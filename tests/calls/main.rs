//! Every system call of a request fails once.
//!
//! ```text
//!   count   the request undisturbed ─► its calls by group: daemon or worker, call, kind of object
//!   plan    first, second and last of each group × the errors that the kernel may return there
//!   for each: prepare ─ that call fails ─ the request ─ then:
//!             the answer was the truth │ memory and disk agree │ nothing half made │ the same request works
//! ```
//!
//! Calls are stopped by seccomp's user notifications, outside of the product. A short write is made by who
//! decides: half of the bytes. Full disks are in `power` and `faults`. Each case is tried with one of its errors, chosen by its place in the plan; `LCOW_CALLS=all` tries
//! every error (`scripts/torture calls`). Needs root.
#![cfg(target_os = "linux")]

mod errors;
mod frames;
mod operations;
mod short;
mod snapshots;
#[path = "../support/mod.rs"]
mod support;
mod watch;

use operations::{OPERATIONS, Operation, act, alive, judge, plugin};
use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    time::{Duration, Instant},
};
use watch::{Case, Group, Watched};

/// A request with fewer groups of calls was not seen.
const FEWEST_GROUPS: usize = 10;

/// The calls of one undisturbed request.
fn groups_of(watched: &mut Watched, operation: &Operation) -> BTreeMap<Group, usize> {
    (operation.prepare)(&watched.plugin);
    watched.count();
    let reply = act(watched, operation).expect("the request is answered");
    let groups = watched.counted();
    assert_eq!(reply.status, 200, "{}: {}", operation.name, reply.text());
    operations::clear(&watched.plugin, "counted");
    groups
}

/// The first, second and last call of each group, each with one of its errors, or with all.
pub(crate) fn plan(groups: &BTreeMap<Group, usize>, all: bool) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for (group, count) in groups {
        let errors = errors::of(group.call, group.object);
        if errors.is_empty() {
            continue;
        }
        for ordinal in BTreeSet::from([1, 2.min(*count), *count]) {
            let at = cases.len() % errors.len();
            let chosen = if all { errors } else { &errors[at..=at] };
            cases.extend(chosen.iter().map(|error| Case { group: group.clone(), ordinal, error: *error }));
        }
    }
    cases
}

fn fail_every_call_of(name: &str) {
    let operation = OPERATIONS.iter().find(|o| o.name == name).expect("an operation");
    let mut watched = plugin();
    let mut groups = groups_of(&mut watched, operation);
    let all_groups = groups.len();
    groups.retain(|group, _| !errors::of(group.call, group.object).is_empty());
    assert!(groups.len() >= FEWEST_GROUPS, "{name}: only {} groups of calls", groups.len());
    let cases = plan(&groups, env::var("LCOW_CALLS").is_ok_and(|v| v == "all"));
    let (begin, mut met, mut refused, mut ended) = (Instant::now(), BTreeSet::new(), 0, 0);
    for case in &cases {
        (operation.prepare)(&watched.plugin);
        let logged = watched.plugin.log().len();
        watched.fail(case);
        let reply = act(&mut watched, operation);
        if watched.met() {
            met.insert(case.group.clone());
        }
        let what = format!("{name}, {} {}: {}", case.group, case.ordinal, errors::name(case.error));
        if !alive(&watched.plugin, logged) {
            // Memory that cannot be had ends the program, as a kill does.
            ended += 1;
            watched.kill_and_restart();
        }
        refused += usize::from(reply.as_ref().is_none_or(|r| r.status != 200 || !r.complete));
        judge(&mut watched, operation, reply.as_ref(), &what);
    }
    println!(
        "{name}: {} calls in {} groups (of {all_groups}; the others cannot fail), {} groups met, {} cases, {refused} refused, {ended} ended the daemon, {} s",
        groups.values().sum::<usize>(),
        groups.len(),
        met.len(),
        cases.len(),
        begin.elapsed().as_secs()
    );
    let missed: Vec<_> = groups.keys().filter(|g| !met.contains(g)).map(ToString::to_string).collect();
    println!("{name}: not met: {}", missed.join("; "));
    assert!(met.len() * 10 >= groups.len() * 8, "only {} of {} groups were met", met.len(), groups.len());
    assert!(refused > 0 || name == "start", "no failure was noticed: the test tests nothing");
    operations::nothing_is_left(&watched.plugin, Duration::from_mins(1));
}

macro_rules! operations {
    ($($test:ident $name:literal;)*) => {$(
        #[test]
        fn $test() { fail_every_call_of($name); }
    )*};
}

operations! {
    create "create";
    create_a_sandbox "create a sandbox";
    apply "apply";
    first_get "first get";
    get_of_a_sandbox "get of a sandbox";
    put "put";
    remove "remove";
    diff_of_an_applied_layer "diff of an applied layer";
    diff_of_a_written_sandbox "diff of a written sandbox";
    start "start";
}
