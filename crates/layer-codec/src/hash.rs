//! The digest of a stream on a second thread, and the buffers that both threads share.
//!
//! ```text
//!   caller ── submit(buffer) ──► hashing thread ── done ──┐
//!     ▲   reads or writes the same bytes meanwhile        │
//!     └────────────── buffer() gives it out again ◄───────┘
//! ```
//!
//! Invariants: at most [`BUFFERS`] buffers exist, so memory is bounded and the caller waits if hashing falls behind;
//! a buffer is reused only when it has no other owner; a stream shorter than one buffer never starts a thread, and if no
//! thread can be started the caller hashes. A pipe without a function only provides buffers: the stream is digested
//! elsewhere. Called by `apply` (input) and by `record` (replay).

use super::digest::{DigestKind, Hasher, TarDigest};
use std::{
    io,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
};

/// Buffers in flight: one read, one hashed, and two that even out their paces.
const BUFFERS: usize = 4;

/// Bytes that may be read by two threads.
pub(super) type Shared = Arc<Vec<u8>>;

/// The hash and its buffers.
pub(super) struct HashPipe {
    mode: Mode,
    bytes: usize,
    allocated: usize,
    /// Buffers that came back, some still held by the caller.
    back: Vec<Shared>,
}

enum Mode {
    Off,
    Inline(Hasher),
    Thread { work: Sender<(Shared, usize)>, done: Receiver<Shared>, thread: JoinHandle<Hasher> },
}

impl HashPipe {
    /// A pipe with buffers of `bytes`; without a function nothing is hashed.
    pub(super) fn new(kind: Option<DigestKind>, bytes: usize) -> Self {
        let mode = kind.map_or(Mode::Off, |kind| Mode::Inline(kind.hasher()));
        Self { mode, bytes, allocated: 0, back: Vec::new() }
    }

    /// A buffer without another owner, to be filled through [`Arc::get_mut`].
    ///
    /// # Errors
    /// If the hashing thread died.
    pub(super) fn buffer(&mut self) -> io::Result<Shared> {
        loop {
            if let Mode::Thread { done, .. } = &self.mode {
                self.back.extend(done.try_iter());
            }
            if let Some(i) = self.back.iter_mut().position(|b| Arc::get_mut(b).is_some()) {
                return Ok(self.back.swap_remove(i));
            }
            if self.allocated < BUFFERS {
                self.allocated += 1;
                return Ok(Arc::new(vec![0; self.bytes]));
            }
            match &self.mode {
                Mode::Thread { done, .. } => {
                    self.back
                        .push(done.recv().map_err(|_| io::Error::other("the hashing thread ended early"))?);
                }
                Mode::Off | Mode::Inline(_) => {
                    return Err(io::Error::other("more buffers held than there are"));
                }
            }
        }
    }

    /// Hashes the first `len` bytes. The caller may go on reading its own handle, and drops it when done.
    pub(super) fn submit(&mut self, buffer: &Shared, len: usize) -> io::Result<()> {
        if matches!(self.mode, Mode::Inline(_)) && len == buffer.len() {
            self.start_thread();
        }
        match &mut self.mode {
            Mode::Off => {
                self.back.push(Arc::clone(buffer));
                Ok(())
            }
            Mode::Inline(hash) => {
                hash.update(buffer.get(..len).unwrap_or(buffer));
                self.back.push(Arc::clone(buffer));
                Ok(())
            }
            Mode::Thread { work, .. } => work
                .send((Arc::clone(buffer), len))
                .map_err(|_| io::Error::other("the hashing thread ended early")),
        }
    }

    /// The digest of all that was submitted; `None` from a pipe without a function.
    ///
    /// # Errors
    /// If the hashing thread died.
    pub(super) fn finish(self) -> io::Result<Option<TarDigest>> {
        let hash = match self.mode {
            Mode::Off => return Ok(None),
            Mode::Inline(hash) => hash,
            Mode::Thread { work, thread, .. } => {
                drop(work);
                thread.join().map_err(|_| io::Error::other("the hashing thread ended early"))?
            }
        };
        Ok(Some(hash.finish()))
    }

    fn start_thread(&mut self) {
        let Mode::Inline(hash) = &self.mode else { return };
        let mut hash = hash.clone();
        let (work, jobs) = channel::<(Shared, usize)>();
        let (returned, done) = channel();
        let spawned = thread::Builder::new().name("digest".into()).spawn(move || {
            for (buffer, len) in jobs {
                hash.update(buffer.get(..len).unwrap_or(&buffer));
                // The caller may have dropped its receiver; it still needs the digest.
                let _ = returned.send(buffer);
            }
            hash
        });
        // In a jail that permits no threads the caller hashes.
        if let Ok(thread) = spawned {
            self.mode = Mode::Thread { work, done, thread };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_that_of_the_stream_with_and_without_a_thread() {
        for total in [0usize, 1, 1023, 1024, 1025, 1024 * 20 + 7] {
            let data: Vec<u8> = (0..total).map(|i| (i * 7) as u8).collect();
            let mut pipe = HashPipe::new(Some(DigestKind::Blake3), 1024);
            let mut held = None;
            for part in data.chunks(1024) {
                let mut buffer = pipe.buffer().unwrap();
                Arc::get_mut(&mut buffer).unwrap()[..part.len()].copy_from_slice(part);
                pipe.submit(&buffer, part.len()).unwrap();
                held = Some(buffer);
            }
            drop(held);
            assert_eq!(pipe.finish().unwrap(), Some(TarDigest::of(DigestKind::Blake3, &data)), "{total}");
        }
    }

    #[test]
    fn a_pipe_without_a_function_lends_its_buffers_for_ever() {
        let mut pipe = HashPipe::new(None, 1024);
        let mut held = None;
        for _ in 0..3 * BUFFERS {
            let buffer = pipe.buffer().unwrap();
            pipe.submit(&buffer, 1024).unwrap();
            held.replace(buffer);
        }
        drop(held);
        assert!(pipe.allocated <= BUFFERS);
        assert_eq!(pipe.finish().unwrap(), None);
    }
}
