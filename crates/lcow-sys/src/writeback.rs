//! Starts write-back of an image while the rest is still being produced, so that the sync at the end has little left.
//!
//! ```text
//!   writes ──► page cache ── every STEP ──► sync_file_range(SYNC_FILE_RANGE_WRITE): begins writing, waits for nothing
//! ```
//!
//! Only a hint: durability is decided by the sync at the end, and without the call only time is lost. Called by `svm-agent`
//! and `cli` for images.

use std::{
    fs::File,
    sync::atomic::{AtomicU64, Ordering},
};

/// Bytes between two hints: large enough for long requests, small enough to leave little for the end.
const STEP: u64 = 8 << 20;
/// Hints end at multiples of this, since a page that is still being filled would be written twice.
const PAGES: u64 = 64 << 10;

/// Up to where the write-back of a file has been started.
#[derive(Debug, Default)]
pub struct Writeback(AtomicU64);

impl Writeback {
    /// Records that the file has been written up to `end`, in mostly ascending order.
    pub fn written(&self, file: &File, end: u64) {
        let from = self.0.load(Ordering::Relaxed);
        if end < from.saturating_add(STEP) {
            return;
        }
        let end = end & !(PAGES - 1);
        start(file, from, end);
        self.0.store(end, Ordering::Relaxed);
    }
}

/// Starts the write-back of a range.
#[cfg(target_os = "linux")]
fn start(file: &File, from: u64, end: u64) {
    use std::os::fd::AsRawFd;
    let (Ok(offset), Ok(len)) = (i64::try_from(from), i64::try_from(end.saturating_sub(from))) else {
        return;
    };
    // SAFETY: the descriptor is open for the whole call, and the call touches no memory of this process.
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
}

#[cfg(not(target_os = "linux"))]
fn start(_: &File, _: u64, _: u64) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_is_given_for_each_step_and_leaves_the_bytes_alone() {
        use std::io::{Seek, Write};
        let mut file = tempfile::tempfile().unwrap();
        let writeback = Writeback::default();
        writeback.written(&file, STEP - 1);
        assert_eq!(writeback.0.load(Ordering::Relaxed), 0);
        file.write_all(&vec![7; STEP as usize + 100]).unwrap();
        writeback.written(&file, STEP + 100);
        assert_eq!(writeback.0.load(Ordering::Relaxed), STEP);
        writeback.written(&file, 5);
        assert_eq!(writeback.0.load(Ordering::Relaxed), STEP);
        file.rewind().unwrap();
        assert_eq!(std::io::read_to_string(&mut file).unwrap().len(), STEP as usize + 100);
    }
}
