//! Why Diffs were cut, for ApplyDiffs that received their output.
//!
//! ```text
//!   Diff of a sandbox ──bytes──► engine ──bytes──► ApplyDiff          docker commit, docker build
//!        │ fails: the reply can only be cut             │ its body breaks off
//!        └──► reason, length, checksum ── a minute ────►└──► is it a prefix of that? then this is the reason
//! ```
//!
//! The engine shows the error of the ApplyDiff, but the reason is the Diff's. The checksum only selects a message,
//! never a decision. The other body lacks what the cut connection still held and what the engine had read but not sent,
//! so any prefix that ends within the last [`WINDOW`] bytes is recognized. Called by `apply` and `diff`.

use bytes::Bytes;
use parking_lot::Mutex;
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// How long a reason is kept. dockerd's client repeats a request for 30 s.
const KEPT: Duration = Duration::from_mins(1);
/// Most reasons that are kept.
const MOST: usize = 64;
/// Bytes before the cut that are kept, so that a shorter body is recognized: more than an HTTP connection and a client
/// buffer together.
const WINDOW: u64 = 4 << 20;

/// Length and checksum of the bytes of a body.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Passed {
    /// Bytes.
    pub(super) bytes: u64,
    crc: u32,
}

impl Passed {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.crc = crc32c::crc32c_append(self.crc, bytes);
        self.bytes += bytes.len() as u64;
    }
}

/// The bytes that a Diff has sent.
#[derive(Debug, Default)]
pub(super) struct Sent {
    /// Everything before `last`.
    before: Passed,
    last: VecDeque<Bytes>,
    held: u64,
}

impl Sent {
    pub(super) fn add(&mut self, bytes: &Bytes) {
        self.last.push_back(bytes.clone());
        self.held += bytes.len() as u64;
        while let Some(first) = self.last.front()
            && self.held - first.len() as u64 >= WINDOW
        {
            self.before.add(first);
            self.held -= first.len() as u64;
            self.last.pop_front();
        }
    }

    /// Whether a body of this length and checksum is a prefix of what was sent.
    fn begins_with(&self, body: Passed) -> bool {
        let mut prefix = self.before;
        for part in &self.last {
            let Some(missing) = body.bytes.checked_sub(prefix.bytes) else { return false };
            prefix.add(&part[..missing.min(part.len() as u64) as usize]);
        }
        prefix == body
    }
}

/// A Diff that was cut.
#[derive(Debug)]
struct Cut {
    at: Instant,
    layer: String,
    reason: String,
    sent: Sent,
}

/// The Diffs that were cut recently.
#[derive(Debug, Default)]
pub(super) struct CutDiffs(Mutex<VecDeque<Cut>>);

impl CutDiffs {
    /// Records why the Diff of `layer` was cut. Must be called before its connection is cut.
    pub(super) fn note(&self, layer: &str, reason: &str, sent: Sent) {
        if sent.before.bytes == 0 && sent.last.is_empty() {
            // Nothing was sent, so the reply carries the error.
            return;
        }
        let mut cuts = self.0.lock();
        cuts.retain(|cut| cut.at.elapsed() < KEPT);
        cuts.truncate(MOST - 1);
        cuts.push_front(Cut { at: Instant::now(), layer: layer.into(), reason: reason.into(), sent });
    }

    /// The latest Diff of which a broken body is a prefix: its layer and why it was cut.
    pub(super) fn source_of(&self, body: Passed) -> Option<(String, String)> {
        let mut cuts = self.0.lock();
        cuts.retain(|cut| cut.at.elapsed() < KEPT);
        let cut = cuts.iter().find(|cut| cut.sent.begins_with(body))?;
        Some((cut.layer.clone(), cut.reason.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(bytes: &[u8]) -> Passed {
        let mut passed = Passed::default();
        passed.add(bytes);
        passed
    }

    fn sent(content: &[u8], chunk: usize) -> Sent {
        let mut sent = Sent::default();
        content.chunks(chunk).for_each(|part| sent.add(&Bytes::copy_from_slice(part)));
        sent
    }

    /// Bytes that do not repeat.
    fn content(bytes: usize, seed: u32) -> Vec<u8> {
        (0..bytes as u32).map(|n| (n.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8).collect()
    }

    #[test]
    fn a_prefix_that_ends_near_the_cut_is_recognised_and_nothing_else() {
        let window = WINDOW as usize;
        for (length, chunk) in [(10, 3), (window, 1 << 20), (3 * window + 777, (1 << 20) - 1)] {
            let (tar, other) = (content(length, 1), content(length, 2));
            let cuts = CutDiffs::default();
            cuts.note("other", "not this", sent(&other, chunk));
            cuts.note("layer", "the reason", sent(&tar, chunk));
            for missing in [0, 1, 2, length.min(window) / 2, length.min(window) - 1] {
                let found = cuts.source_of(passed(&tar[..length - missing]));
                assert_eq!(found, Some(("layer".into(), "the reason".into())), "{length} - {missing}");
                let mut wrong = tar[..length - missing].to_vec();
                *wrong.last_mut().unwrap() ^= 1;
                assert_eq!(cuts.source_of(passed(&wrong)), None);
            }
            assert_eq!(cuts.source_of(passed(&[&tar[..], b"x"].concat())), None, "more than was sent");
        }
    }

    #[test]
    fn memory_is_bounded() {
        let big = sent(&vec![7; 40 << 20], 1 << 20);
        assert!(big.held < WINDOW + (1 << 20) && big.last.len() <= 5);
        let cuts = CutDiffs::default();
        (0..200).for_each(|n| cuts.note(&n.to_string(), "", sent(&[n as u8], 1)));
        assert_eq!(cuts.0.lock().len(), MOST);
        assert_eq!(cuts.source_of(passed(&[199])).unwrap().0, "199");
    }
}
