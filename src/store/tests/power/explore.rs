//! Walks a log and visits every state that a power cut can leave.
//!
//! ```text
//!   log ─ event by event ─► Disk ─ before each sync, answer and end ─► items that may be lost
//!     up to ALL items: every combination        more: every prefix, one or two lost, SAMPLES by a seed
//!     ─► states, equal ones once ─► the caller's check
//! ```
//!
//! Between two syncs a later moment has all the states of an earlier one, so only the last is looked at.

use super::{
    disk::{Disk, Found, Impossible, Item, State},
    recorder::{Event, Legal},
};
use std::{
    collections::{HashMap, HashSet, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
    ops::Range,
    sync::Arc,
};

/// Most items of which all combinations are visited.
const ALL: usize = 12;
/// Combinations that are drawn if there are more items.
const SAMPLES: usize = 10_000;
/// Begin of the sequence from which they are drawn.
const SEED: u64 = 0x6c63_6f77;

/// What was looked at.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Counts {
    /// Moments at which the power was cut.
    pub(crate) cuts: usize,
    /// Of these, those at which not all combinations were visited.
    pub(crate) sampled: usize,
    /// Most items that could be lost at one moment.
    pub(crate) most: usize,
    /// Combinations.
    pub(crate) combinations: usize,
    /// Different states, with what is legal in them.
    pub(crate) states: usize,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.cuts += other.cuts;
        self.sampled += other.sampled;
        self.most = self.most.max(other.most);
        self.combinations += other.combinations;
        self.states += other.states;
    }
}

/// A number for a state.
pub(crate) fn number(state: &State) -> u64 {
    let mut hasher = DefaultHasher::new();
    let mut names: HashMap<usize, usize> = HashMap::new();
    for (n, (path, found)) in state.iter().enumerate() {
        path.hash(&mut hasher);
        match found {
            Found::Dir => 0_u8.hash(&mut hasher),
            Found::Link(target) => (1_u8, target).hash(&mut hasher),
            Found::File(ino, content) => {
                (2_u8, content.hash, *names.entry(*ino).or_insert(n)).hash(&mut hasher);
            }
        }
    }
    hasher.finish()
}

/// The states that were found legal, and what was legal then.
pub(crate) type Seen = HashSet<(u64, u64)>;

/// Visits the states after the events in `looked_at`; the rest of the log only happens. `visit` returns whether to go on.
pub(crate) fn explore(
    log: &[Event],
    looked_at: Range<usize>,
    ignored: impl Fn(&str) -> bool,
    seen: &mut Seen,
    mut visit: impl FnMut(&State, &Legal, &str) -> bool,
) -> Result<Counts, Impossible> {
    let (mut disk, mut counts) = (Disk::new(), Counts::default());
    let mut legal: Option<(String, Arc<Legal>)> = None;
    let mut changed = false;
    for (n, event) in log.iter().chain([&Event::Settle]).enumerate() {
        if n >= looked_at.end && n < log.len() {
            break;
        }
        let before_which =
            matches!(event, Event::SyncFile(_) | Event::SyncFolder(_) | Event::Legal(..) | Event::Settle);
        // Of several legal sets at one state of the disk, each counts.
        if let Some((label, legal)) = &legal
            && before_which
            && changed
            && n > looked_at.start
        {
            counts.cuts += 1;
            let items = disk.items(&ignored);
            let go_on = combinations(&items, &mut counts, |outcomes| {
                let state = disk.after(&items, outcomes);
                if !seen.insert((number(&state), Arc::as_ptr(legal) as usize as u64)) {
                    return true;
                }
                visit(&state, legal, label)
            });
            if !go_on {
                return Ok(counts);
            }
        }
        changed = true;
        disk.apply(event)?;
        if let Event::Legal(label, now) = event {
            legal = Some((label.clone(), now.clone()));
        }
    }
    Ok(counts)
}

/// Calls `visit` with combinations of outcomes; stops when it returns false.
fn combinations(items: &[Item], counts: &mut Counts, mut visit: impl FnMut(&[usize]) -> bool) -> bool {
    counts.most = counts.most.max(items.len());
    let outcomes: Vec<usize> = items.iter().map(Item::outcomes).collect();
    let mut go = |chosen: &[usize], counts: &mut Counts| {
        counts.combinations += 1;
        visit(chosen)
    };
    if items.len() <= ALL {
        let mut chosen = vec![0; items.len()];
        loop {
            if !go(&chosen, counts) {
                return false;
            }
            // The next number, digit by digit.
            let Some(at) = chosen.iter().zip(&outcomes).position(|(digit, base)| digit + 1 < *base) else {
                return true;
            };
            chosen[..at].fill(0);
            chosen[at] += 1;
        }
    }
    counts.sampled += 1;
    let whole: Vec<usize> = outcomes.iter().map(|base| base - 1).collect();
    for end in 0..=items.len() {
        let mut chosen = whole.clone();
        chosen[end..].fill(0);
        if !go(&chosen, counts) {
            return false;
        }
    }
    for first in 0..items.len() {
        for second in first..items.len() {
            for lost in 0..outcomes[first] - 1 {
                for other in 0..outcomes[second] - 1 {
                    let mut chosen = whole.clone();
                    (chosen[first], chosen[second]) = (lost, other);
                    if !go(&chosen, counts) {
                        return false;
                    }
                }
            }
        }
    }
    let mut random = SEED;
    for _ in 0..SAMPLES {
        let chosen: Vec<usize> = outcomes
            .iter()
            .map(|base| {
                // xorshift64: the same draws in every run.
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                (random >> 33) as usize % base
            })
            .collect();
        if !go(&chosen, counts) {
            return false;
        }
    }
    true
}
