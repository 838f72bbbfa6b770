//! Counts the work that bytes cause: for tests, and for the fuzz targets' bound of work per input byte.
//!
//! ```text
//!   loops of readers ─► add(n) ─► a number of this thread's ─► taken() in a test, in a fuzz target
//! ```
//!
//! A step is one turn of a loop that a hostile input decides the length of: an entry, a pointer, a record, a comparison.
//! Nothing is counted, and nothing costs, in a program that is neither a test nor fuzzed. Called by the formats.

#[cfg(any(test, fuzzing))]
thread_local! {
    static STEPS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Counts steps.
#[inline]
pub fn add(steps: u64) {
    #[cfg(any(test, fuzzing))]
    STEPS.with(|counted| counted.set(counted.get().saturating_add(steps)));
    #[cfg(not(any(test, fuzzing)))]
    let _ = steps;
}

/// Steps of this thread since the last call; always 0 outside of tests and fuzzing.
pub fn taken() -> u64 {
    #[cfg(any(test, fuzzing))]
    return STEPS.with(|steps| steps.replace(0));
    #[cfg(not(any(test, fuzzing)))]
    0
}
