//! A guest's block device past the page cache: gathered writes and read-ahead, each in one aligned piece of memory.
//!
//! ```text
//!   write_at … write_at ─► pending, 1 MiB ─► device        a gap, a read or the end sends on what is pending; a full
//!                                                           megabyte goes by a thread of its own (`behind`)
//!   read_at ─► window, 128 KiB doubling to 1 MiB ◄─ device  only for large reads and those that follow each other;
//!                                                           the others are left to the caller and the page cache
//! ```
//!
//! Why: a kernel runs thousands of instructions for each page that passes its cache, and an emulated processor runs each
//! about ten times slower, while the device copies a megabyte with the host's processor. Blocks that are written in part
//! are read first. Each operation has its own, so no data are kept from one operation to the next. An error of a gathered
//! write is returned by a later call, at the latest by [`Unbuffered::flush`]. Called by `disk`.

use super::{
    behind::Behind,
    piece::{PIECE, Piece},
};
use disk_io::{ReadAt, WriteAt};
use std::{
    fs::File,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use svm_protocol::{ALIGN, Aligned};

/// First size of the read-ahead window; bytes.
const FIRST_AHEAD: usize = 128 << 10;
/// Reads of at least this size bypass the page cache; bytes.
const LARGE: usize = 64 << 10;
/// A read that starts at most this far behind the previous one counts as sequential; bytes.
const NEAR: u64 = 64 << 10;

/// One operation's access to a device that is open for unbuffered I/O.
#[derive(Debug)]
pub(super) struct Unbuffered {
    device: Arc<File>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    pending: Piece,
    /// Writes full pieces; started with the first.
    behind: Option<Behind>,
    window: Piece,
    ahead: usize,
    /// End of the last read.
    last: u64,
}

impl Unbuffered {
    /// Access to `device`.
    pub(super) fn new(device: Arc<File>) -> Self {
        Self { device, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes all of `buf`, now or later.
    pub(super) fn write_all_at(&self, mut buf: &[u8], mut at: u64) -> io::Result<()> {
        let state = &mut *self.lock();
        state.window.len = 0;
        while !buf.is_empty() {
            if at < state.pending.start || at > state.pending.end() || state.pending.len == 0 {
                self.send(state)?;
                self.begin(state, at)?;
            }
            let pending = &mut state.pending;
            let from = (at - pending.start) as usize;
            let n = buf.len().min(PIECE - from);
            pending.memory()[from..from + n].copy_from_slice(&buf[..n]);
            pending.len = pending.len.max(from + n);
            buf = &buf[n..];
            at += n as u64;
            if pending.len == PIECE {
                self.send_full(state)?;
            }
        }
        Ok(())
    }

    /// Reads up to the length of `buf`; `None` for a read that the page cache serves better.
    pub(super) fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<Option<usize>> {
        let state = &mut *self.lock();
        self.send(state)?;
        if at < state.window.start || at >= state.window.end() {
            let follows = at.checked_sub(state.last).is_some_and(|gap| gap <= NEAR);
            if !follows && buf.len() < LARGE {
                state.last = at + buf.len() as u64;
                return Ok(None);
            }
            state.ahead = if follows { (state.ahead * 2).clamp(FIRST_AHEAD, PIECE) } else { FIRST_AHEAD };
            let start = at - at % ALIGN as u64;
            let wanted = (state.ahead.max(buf.len()) + ALIGN).next_multiple_of(ALIGN).min(PIECE);
            state.window.len = 0;
            let n = self.fill(&mut state.window.memory()[..wanted], start)?;
            (state.window.start, state.window.len) = (start, n);
        }
        let from = usize::try_from(at - state.window.start).unwrap_or(usize::MAX);
        let len = state.window.len;
        let have = state.window.memory()[..len].get(from..).unwrap_or_default();
        let n = have.len().min(buf.len());
        buf[..n].copy_from_slice(&have[..n]);
        state.last = at + n as u64;
        Ok(Some(n))
    }

    /// Discards what was read ahead.
    pub(super) fn forget(&self) {
        self.lock().window.len = 0;
    }

    /// Writes everything that is pending to the device.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.send(&mut self.lock())
    }

    /// Begins a pending piece that holds what the device has before `at` in the same block.
    fn begin(&self, state: &mut State, at: u64) -> io::Result<()> {
        let pending = &mut state.pending;
        let before = (at % ALIGN as u64) as usize;
        pending.start = at - before as u64;
        if before > 0 {
            // The write in progress may touch the same block.
            settle(&mut state.behind)?;
            let start = pending.start;
            let n = self.fill(&mut pending.memory()[..ALIGN], start)?;
            pending.memory()[n.min(before)..before].fill(0);
        }
        pending.len = before;
        Ok(())
    }

    /// Starts writing a full piece while the next one is filled.
    fn send_full(&self, state: &mut State) -> io::Result<()> {
        if state.behind.is_none() {
            state.behind = Behind::start(self.device.clone()).ok();
        }
        let Some(behind) = &mut state.behind else { return self.send(state) };
        let full = std::mem::take(&mut state.pending);
        if let Some(mut piece) = behind.wait()? {
            piece.len = 0;
            state.pending = piece;
        }
        behind.write(full)
    }

    /// Writes what is pending, in whole blocks, and waits for all writes.
    fn send(&self, state: &mut State) -> io::Result<()> {
        let State { pending, behind, .. } = state;
        // Both are written before either error is returned: after a failure nothing is retried, the operation fails.
        let under_way = settle(behind);
        let len = std::mem::take(&mut pending.len);
        under_way?;
        if len == 0 {
            return Ok(());
        }
        let (start, whole) = (pending.start, len.next_multiple_of(ALIGN));
        if whole > len {
            let mut block = Aligned::new(ALIGN);
            let n = self.fill(block.bytes_mut(), start + (whole - ALIGN) as u64)?;
            block.bytes_mut()[n..].fill(0);
            let keep = ALIGN - (whole - len);
            pending.memory()[len..whole].copy_from_slice(&block.bytes()[keep..]);
        }
        self.device.write_all_at(&pending.memory()[..whole], start)
    }

    /// Reads as much as there is.
    fn fill(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        let mut have = 0;
        while have < buf.len() {
            match self.device.read_at(&mut buf[have..], at + have as u64)? {
                0 => break,
                n => have += n,
            }
            // Only at the end of a device is the rest shorter than a block.
            if have % ALIGN != 0 {
                break;
            }
        }
        Ok(have)
    }
}

/// Waits for the write in progress and frees its memory.
fn settle(behind: &mut Option<Behind>) -> io::Result<()> {
    behind.as_mut().map_or(Ok(()), |behind| behind.wait().map(drop))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a device of ordinary size would hold.
    fn device(bytes: u64) -> Arc<File> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        Arc::new(file)
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write { at: u64, len: usize, value: u8 },
        Read { at: u64, len: usize },
        Flush,
    }

    const BYTES: u64 = 3 << 20;

    fn step() -> impl Strategy<Value = Step> {
        let place = || (0..BYTES - 1, prop_oneof![1..9000usize, 60_000..300_000usize, Just(PIECE + 77)]);
        prop_oneof![
            3 => (place(), any::<u8>()).prop_map(|((at, len), value)| Step::Write { at, len, value }),
            // Places where one write ends and the next begins.
            2 => (0..40u64, any::<u8>()).prop_map(|(n, value)| Step::Write { at: n * 5000, len: 5000, value }),
            3 => place().prop_map(|(at, len)| Step::Read { at, len }),
            1 => Just(Step::Flush),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn a_device_holds_what_was_written_and_shows_it(steps in proptest::collection::vec(step(), 1..40)) {
            let file = device(BYTES);
            let way = Unbuffered::new(file.clone());
            let mut model = vec![0u8; BYTES as usize];
            for step in steps {
                match step {
                    Step::Write { at, len, value } => {
                        let end = (at as usize + len).min(model.len());
                        model[at as usize..end].fill(value);
                        way.write_all_at(&model[at as usize..end], at).unwrap();
                    }
                    Step::Read { at, len } => {
                        let mut buf = vec![1; len];
                        let n = match way.read_at(&mut buf, at).unwrap() {
                            Some(n) => n,
                            None => ReadAt::read_at(&*file, &mut buf, at).unwrap(),
                        };
                        prop_assert!(n > 0);
                        prop_assert!(buf[..n] == model[at as usize..at as usize + n]);
                    }
                    Step::Flush => way.flush().unwrap(),
                }
            }
            way.flush().unwrap();
            let mut all = vec![0; model.len()];
            file.read_exact_at(&mut all, 0).unwrap();
            prop_assert!(all == model);
        }
    }

    #[test]
    fn small_reads_here_and_there_are_left_to_the_page_cache_and_following_ones_are_not() {
        let way = Unbuffered::new(device(BYTES));
        let mut buf = [0; 4096];
        assert_eq!(way.read_at(&mut buf, 1 << 20).unwrap(), None);
        assert_eq!(way.read_at(&mut buf, 2 << 20).unwrap(), None);
        assert_eq!(way.read_at(&mut buf, (2 << 20) + 4096).unwrap(), Some(4096));
        assert_eq!(way.read_at(&mut buf, BYTES + (1 << 20)).unwrap(), None, "far behind the end");
        assert_eq!(way.read_at(&mut vec![0; LARGE], BYTES - 100).unwrap(), Some(100), "the end cuts");
        assert_eq!(way.read_at(&mut vec![0; LARGE], BYTES).unwrap(), Some(0));
    }

    #[test]
    fn what_can_not_be_written_is_an_error_at_the_end_and_only_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let way = Unbuffered::new(Arc::new(File::open(file.path()).unwrap()));
        way.write_all_at(b"x", 0).unwrap();
        assert!(way.flush().is_err());
        assert!(way.flush().is_ok());
        // Of a full piece it is told when the next one is full, or at the end.
        way.write_all_at(&vec![1; PIECE], 0).unwrap();
        assert!(way.write_all_at(&vec![2; PIECE], PIECE as u64).is_err());
        assert!(way.flush().is_ok());
        way.write_all_at(&vec![3; PIECE], 0).unwrap();
        assert!(way.flush().is_err());
        // Dropped with one under way.
        way.write_all_at(&vec![4; PIECE], 0).unwrap();
    }
}
