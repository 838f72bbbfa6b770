//! Whether an apply of this process is reading back what it wrote.
//!
//! ```text
//!   lease ◄─ Event::Replaying, several times a second        api: a client that reads no Diff meanwhile ─► waited for
//!      └──────────► the last one's time ──────────────────────────────► within(idle)?
//! ```
//!
//! `docker commit` streams a Diff into an ApplyDiff, both of this process. While the ApplyDiff restarts with larger
//! blocks it accepts nothing, so the engine reads nothing of the Diff either; that must not count as idleness. One
//! value for all operations, because only the engine knows which Diff feeds which ApplyDiff. Written by `pool::lease`,
//! asked by `api` through `driver`.

use parking_lot::Mutex;
use std::time::{Duration, Instant};

static LAST: Mutex<Option<Instant>> = Mutex::new(None);

/// Records that an apply is replaying.
pub(super) fn touch() {
    *LAST.lock() = Some(Instant::now());
}

/// Whether an apply was replaying within the last `idle`.
pub fn within(idle: Duration) -> bool {
    LAST.lock().is_some_and(|last| last.elapsed() < idle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replay_counts_for_as_long_as_a_time_out() {
        assert!(!within(Duration::ZERO));
        touch();
        assert!(within(Duration::from_mins(1)));
        assert!(!within(Duration::ZERO));
    }
}
