//! Numbers for new snapshots.
//!
//! ```text
//!   marker: all numbers below N may have been given     0 … next … N      next = N: the marker gets N + RESERVED_AT_ONCE
//! ```
//!
//! A number is never given twice, also over crashes: a start continues with N. Called by `open` and `snapshots`.

use parking_lot::Mutex;

/// How many numbers are reserved at a time: one write of the marker for that many snapshots.
pub(super) const RESERVED_AT_ONCE: u64 = 4096;

/// Numbers for new snapshots.
#[derive(Debug)]
pub(super) struct Numbers(pub(super) Mutex<(u64, u64)>);

impl Numbers {
    /// Continues with `first`; nothing is reserved yet.
    pub(super) fn after(first: u64) -> Self {
        Self(Mutex::new((first, first)))
    }
}
