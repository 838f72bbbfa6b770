//! Whether some order of the calls explains a history.
//!
//! ```text
//!   begins and ends in their order ─► at each end: all worlds that calls under way can lead to ─► those in which it is done
//! ```
//!
//! Wing and Gong's search, breadth first: a call takes effect, step by step, at any moment between its begin and its end; equal
//! worlds with the same calls done are looked at once. The first end that no world survives is what cannot be explained. A
//! call without an answer may have stopped after any step. What changes nothing is put as early as it is possible, which
//! excludes no order of the others. Called by the test of the crowd's history and by the tests of wrong histories.

use super::model::{Answer, Call, Family, Layer, World};
use std::{
    collections::{BTreeSet, HashSet},
    fmt,
};

/// More worlds than this at one moment explain nothing.
const MOST_WORLDS: usize = 400_000;
/// Calls before the one that cannot be explained, in the message.
const SHOWN: usize = 30;

/// A call and when it was under way, by a clock that gives each moment once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Event {
    pub(super) begin: u64,
    pub(super) end: u64,
    pub(super) call: Call,
}

/// What a search saw.
#[derive(Debug, Clone, Copy)]
pub(super) struct Explained {
    /// The most worlds that were possible behind an end.
    pub(super) most: usize,
    /// Worlds that were looked at.
    pub(super) looked_at: usize,
}

/// Why there is no order.
#[derive(Debug)]
pub(super) struct Unexplained(String);

impl fmt::Display for Unexplained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Possible {
    world: World,
    /// How many steps of the calls under way are done; those without any are left out. In the order of their numbers.
    done: Vec<(u32, u8)>,
}

impl Possible {
    fn done(&self, event: usize) -> u8 {
        self.done.iter().find(|(n, _)| *n as usize == event).map_or(0, |(_, steps)| *steps)
    }

    fn with(&self, event: usize, steps: u8, world: World) -> Self {
        let mut done = self.done.clone();
        match done.binary_search_by_key(&(event as u32), |(n, _)| *n) {
            Ok(at) => done[at].1 = steps,
            Err(at) => done.insert(at, (event as u32, steps)),
        }
        Self { world, done }
    }

    fn without(mut self, event: usize) -> Self {
        self.done.retain(|(n, _)| *n as usize != event);
        self
    }
}

/// Looks for an order of `events`, beginning without any layer.
pub(super) fn explain(family: &Family, events: &[Event]) -> Result<Explained, Unexplained> {
    let mut moments: Vec<(u64, bool, usize)> = Vec::new();
    for (n, event) in events.iter().enumerate() {
        assert!(event.begin < event.end, "{event:?}");
        moments.extend([(event.begin, true, n), (event.end, false, n)]);
    }
    moments.sort_unstable();
    let first = Possible { world: vec![Layer::ABSENT; family.ids.len()], done: Vec::new() };
    let mut possible = HashSet::from([first]);
    let mut under_way = BTreeSet::new();
    let mut explained = Explained { most: 1, looked_at: 0 };
    for (_, begins, event) in moments {
        if begins {
            under_way.insert(event);
            continue;
        }
        let search = Search { family, events, under_way: &under_way, event };
        let (next, seen) = search.until_done(&possible);
        explained.looked_at += seen;
        let why = if seen > MOST_WORLDS { "too many worlds are possible at" } else { "no order explains" };
        if next.is_empty() || seen > MOST_WORLDS {
            return Err(Unexplained(describe(family, events, event, why, &possible)));
        }
        explained.most = explained.most.max(next.len());
        possible = next;
        under_way.remove(&event);
    }
    Ok(explained)
}

struct Search<'a> {
    family: &'a Family,
    events: &'a [Event],
    under_way: &'a BTreeSet<usize>,
    event: usize,
}

impl Search<'_> {
    /// What is possible once the call is done, and how many worlds were looked at.
    fn until_done(&self, possible: &HashSet<Possible>) -> (HashSet<Possible>, usize) {
        let call = &self.events[self.event].call;
        let lost = call.answer == Answer::Lost;
        let mut seen: HashSet<Possible> = HashSet::new();
        let mut open: Vec<Possible> = possible.iter().cloned().collect();
        let mut next = HashSet::new();
        while let Some(one) = open.pop() {
            let one = self.put_what_changes_nothing(one);
            if !seen.insert(one.clone()) {
                continue;
            }
            if seen.len() > MOST_WORLDS {
                break;
            }
            let done = one.done(self.event) == call.steps();
            if done || lost {
                next.insert(one.clone().without(self.event));
            }
            if done {
                continue;
            }
            for other in self.under_way {
                let step = one.done(*other);
                let call = &self.events[*other].call;
                if step < call.steps() {
                    let worlds = self.family.after(&one.world, *other as u32, call, step);
                    open.extend(worlds.into_iter().map(|world| one.with(*other, step + 1, world)));
                }
            }
        }
        (next, seen.len())
    }

    fn put_what_changes_nothing(&self, mut one: Possible) -> Possible {
        for other in self.under_way {
            let call = &self.events[*other].call;
            let mut step = one.done(*other);
            while call.is_pure()
                && step < call.steps()
                && !self.family.after(&one.world, *other as u32, call, step).is_empty()
            {
                step += 1;
                let world = one.world.clone();
                one = one.with(*other, step, world);
            }
        }
        one
    }
}

fn describe(
    family: &Family,
    events: &[Event],
    event: usize,
    why: &str,
    possible: &HashSet<Possible>,
) -> String {
    let line = |event: &Event| {
        let Call { layer, request, answer, .. } = event.call;
        format!("{:>7}..{:<7} {} {request:?}: {answer:?}", event.begin, event.end, family.ids[layer])
    };
    let end = events[event].end;
    let mut near: Vec<&Event> = events.iter().filter(|e| e.begin < end).collect();
    near.sort_unstable_by_key(|e| e.end);
    let skipped = near.len().saturating_sub(SHOWN);
    let lines: Vec<String> = near[skipped..].iter().map(|e| line(e)).collect();
    let worlds: Vec<String> = possible.iter().take(5).map(|one| format!("{one:?}")).collect();
    format!(
        "{why}\n{}\namong\n{}\nfrom {} worlds, such as\n{}",
        line(&events[event]),
        lines.join("\n"),
        possible.len(),
        worlds.join("\n")
    )
}
