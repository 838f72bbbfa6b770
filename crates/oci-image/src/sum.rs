//! How many plain bytes of an image were read, all layers together, and how many may be.
//!
//! ```text
//!   reader of layer 0 ─ 7 MiB ─┐  of each layer the most that one of its readers has read
//!   reader of layer 1 ─ 9 MiB ─┼─► sum ≤ image_bytes, and ≤ ratio × all blobs, or RATIO_FLOOR where that is more
//!   layer 1 again     ─ 2 MiB ─┘
//! ```
//!
//! A layer alone may be as large as all together may be, so many layers that are harmless each by itself are no way around a
//! limit. A layer that is read twice counts once. Made with an image; called by `layer`.

use crate::Limits;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The plain bytes of an image.
#[derive(Debug)]
pub(crate) struct PlainSum {
    /// By layer.
    read: Vec<AtomicU64>,
    total: AtomicU64,
    /// The most bytes, whatever they are compressed to.
    by_size: u64,
    /// The most bytes of blobs of this size.
    by_ratio: u64,
    ratio: u64,
}

impl PlainSum {
    /// Of layers whose blobs have these sizes, nothing was read.
    pub(crate) fn new(blobs: impl IntoIterator<Item = u64>, limits: &Limits) -> Self {
        let (mut read, mut sum) = (Vec::new(), 0u64);
        for size in blobs {
            read.push(AtomicU64::new(0));
            sum = sum.saturating_add(size);
        }
        Self {
            read,
            total: AtomicU64::new(0),
            by_size: limits.image_bytes,
            by_ratio: limits.expanded(sum),
            ratio: limits.ratio,
        }
    }

    /// A reader of the layer `index` has read `bytes` from its start.
    ///
    /// # Errors
    /// The limit that is exceeded.
    pub(crate) fn add(&self, index: usize, bytes: u64) -> Result<(), String> {
        let Some(read) = self.read.get(index) else { return Ok(()) };
        let new = bytes.saturating_sub(read.fetch_max(bytes, Relaxed));
        let total = self.total.fetch_add(new, Relaxed).saturating_add(new);
        if total > self.by_size {
            return Err(format!(
                "the layers have more than {} plain bytes together; raise --max-size",
                self.by_size
            ));
        }
        if total > self.by_ratio {
            return Err(format!(
                "the layers expand to more than {} times their size together; raise --max-ratio",
                self.ratio
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RATIO_FLOOR;

    #[test]
    fn layers_count_together_and_each_once() {
        let limits = Limits { image_bytes: 100, ..Limits::default() };
        let all = PlainSum::new([1, 1], &limits);
        assert!(all.add(0, 60).is_ok() && all.add(0, 30).is_ok() && all.add(0, 60).is_ok());
        assert!(all.add(1, 40).is_ok());
        assert!(all.add(1, 41).unwrap_err().contains("--max-size"));
    }

    #[test]
    fn many_small_layers_are_no_way_around_the_ratio() {
        let limits = Limits { ratio: 10, ..Limits::default() };
        let all = PlainSum::new([1000, 1000], &limits);
        assert!(all.add(0, RATIO_FLOOR / 2).is_ok() && all.add(1, RATIO_FLOOR / 2).is_ok());
        assert!(all.add(1, RATIO_FLOOR / 2 + 1).unwrap_err().contains("--max-ratio"));
        let large = PlainSum::new([RATIO_FLOOR, RATIO_FLOOR], &limits);
        assert!(large.add(0, 20 * RATIO_FLOOR).is_ok() && large.add(1, 1).is_err());
    }
}
