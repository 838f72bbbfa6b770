//! Counts the memory that one end of a link holds for its peer.
//!
//! ```text
//!   queue of frames to send ─┐
//!   inboxes of all channels ─┴─► add, take away ─► now, most          tests hold `most` against the bounds
//! ```
//!
//! Invariant: whatever a peer sends or leaves unread, `most` stays below a bound that depends only on the number of open
//! channels. The count is of memory that was allocated, with a fixed overhead for each piece, not of the resident set, so
//! it is the same on each run. Called by both ends of a link.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Overhead of a piece besides its bytes: its place in a queue and the allocator's overhead; bytes.
pub const PIECE_COST: usize = 96;
/// Pieces shorter than this are joined; bytes. A frame of one byte would otherwise cost a hundred times its credit.
pub const JOINED_BELOW: usize = 4 << 10;

/// Counts the bytes that are held.
#[derive(Debug, Default)]
pub struct Meter {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Meter {
    /// Adds bytes that are held from now on.
    pub fn add(&self, bytes: usize) {
        let now = self.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.most.fetch_max(now, Ordering::Relaxed);
    }

    /// Subtracts bytes that were released.
    pub fn take_away(&self, bytes: usize) {
        self.now.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Bytes held now.
    pub fn now(&self) -> usize {
        self.now.load(Ordering::Relaxed)
    }

    /// The most bytes that were held at one time.
    pub fn most(&self) -> usize {
        self.most.load(Ordering::Relaxed)
    }
}

/// The cost of a piece with this capacity; bytes.
pub fn cost(capacity: usize) -> usize {
    capacity + PIECE_COST
}
