//! Counts the work that an input causes, for tests and for the fuzz targets' bound of work per input byte.
//!
//! ```text
//!   loops of parsers ─► add(n) ─► a counter of this thread ─► taken() in a test or a fuzz target
//! ```
//!
//! A step is one turn of a loop whose length a hostile input decides: an entry, a pointer, a record, a comparison. Without
//! the feature `count-steps` nothing is counted and nothing is spent. It is a feature because `cfg(test)` does not hold
//! for a dependency of the crate under test: the dev-dependencies of the parsers enable it.

#[cfg(feature = "count-steps")]
thread_local! {
    static STEPS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Counts steps.
#[inline]
pub fn add(steps: u64) {
    #[cfg(feature = "count-steps")]
    STEPS.with(|counted| counted.set(counted.get().saturating_add(steps)));
    #[cfg(not(feature = "count-steps"))]
    let _ = steps;
}

/// Steps of this thread since the last call. Only with the feature, so that no test asserts that 0 is small.
#[cfg(feature = "count-steps")]
pub fn taken() -> u64 {
    STEPS.with(|steps| steps.replace(0))
}
