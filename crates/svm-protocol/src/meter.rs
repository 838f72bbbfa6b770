//! What one end of a link holds in memory for its peer, counted.
//!
//! ```text
//!   queue of frames to send ─┐
//!   inboxes of all channels ─┴─► add, take away ─► now, most          tests hold `most` against the bounds
//! ```
//!
//! Invariant: whatever a peer sends or leaves unread, `most` stays below a bound that depends on the number of open
//! channels only. The count is of memory that was asked for, with a round sum for each piece, never of the process's
//! residence: it is the same on each run. Called by both ends of a link.

use std::sync::atomic::{AtomicUsize, Ordering};

/// What a piece costs besides its bytes: its place in a queue and the allocator's own; bytes.
pub const PIECE_COST: usize = 96;
/// Pieces below this are joined: a byte for each frame would cost a hundred times what it pays; bytes.
pub const JOINED_BELOW: usize = 4 << 10;

/// Counts what is held.
#[derive(Debug, Default)]
pub struct Meter {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Meter {
    /// So many bytes more are held.
    pub fn add(&self, bytes: usize) {
        let now = self.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.most.fetch_max(now, Ordering::Relaxed);
    }

    /// So many were let go.
    pub fn take_away(&self, bytes: usize) {
        self.now.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Bytes held now.
    pub fn now(&self) -> usize {
        self.now.load(Ordering::Relaxed)
    }

    /// Most bytes that were held at a time.
    pub fn most(&self) -> usize {
        self.most.load(Ordering::Relaxed)
    }
}

/// What a piece of this capacity is counted as; bytes.
pub fn cost(capacity: usize) -> usize {
    capacity + PIECE_COST
}
