//! A layer that is read ahead: inflating and digesting on one thread, what becomes of the bytes on another.
//!
//! ```text
//!   thread "layer"   LayerReader ─► 256 KiB ─► queue of 4 ─► Ahead: Read   the thread of the caller
//!                    inflate, SHA-256            ◄─ empty buffers ─┘        tar, ext4, BLAKE3
//! ```
//!
//! An error of the reader comes after the bytes before it, as from the reader itself. Nothing depends on which thread is
//! faster. Dropping an [`Ahead`] ends its thread. Called by `pack`.

use std::{
    io::{self, Read},
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    thread::{self, JoinHandle},
};

/// Bytes of a buffer.
const BUFFER: usize = 256 << 10;
/// Buffers that are full and not taken yet.
const QUEUED: usize = 4;

/// The bytes of a reader that runs on a thread of its own.
pub(super) struct Ahead {
    full: Option<Receiver<io::Result<Vec<u8>>>>,
    empty: Sender<Vec<u8>>,
    current: Vec<u8>,
    taken: usize,
    thread: Option<JoinHandle<()>>,
}

impl Ahead {
    /// Starts to read `reader`.
    pub(super) fn new(reader: impl Read + Send + 'static) -> io::Result<Self> {
        let (send, full) = sync_channel(QUEUED);
        let (empty, emptied) = channel();
        let thread =
            thread::Builder::new().name("layer".into()).spawn(move || run(reader, &send, &emptied))?;
        Ok(Self { full: Some(full), empty, current: Vec::new(), taken: 0, thread: Some(thread) })
    }
}

/// Reads to the end or the first error.
fn run(mut reader: impl Read, send: &SyncSender<io::Result<Vec<u8>>>, emptied: &Receiver<Vec<u8>>) {
    loop {
        let mut buffer = emptied.try_recv().unwrap_or_default();
        buffer.resize(BUFFER, 0);
        let mut len = 0;
        let error = loop {
            match reader.read(&mut buffer[len..]) {
                Ok(0) => break None,
                Ok(n) => len += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => break Some(e),
            }
            if len == BUFFER {
                break None;
            }
        };
        let ended = len < BUFFER;
        buffer.truncate(len);
        // Where sending fails, the other side has lost interest.
        if len > 0 && send.send(Ok(buffer)).is_err() {
            return;
        }
        if let Some(error) = error {
            let _ = send.send(Err(error));
            return;
        }
        if ended {
            return;
        }
    }
}

impl Read for Ahead {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.taken == self.current.len() {
            let Some(full) = &self.full else { return Ok(0) };
            let next = full.recv();
            let used = std::mem::take(&mut self.current);
            self.taken = 0;
            // The thread may have ended; then the buffer is of no use.
            let _ = self.empty.send(used);
            match next {
                Ok(Ok(buffer)) => self.current = buffer,
                Ok(Err(error)) => {
                    self.full = None;
                    return Err(error);
                }
                Err(_) => {
                    self.full = None;
                    let joined = self.thread.take().map_or(Ok(()), JoinHandle::join);
                    return joined
                        .map(|()| 0)
                        .map_err(|_| io::Error::other("the thread that reads the layer failed"));
                }
            }
        }
        let n = buf.len().min(self.current.len() - self.taken);
        buf[..n].copy_from_slice(&self.current[self.taken..self.taken + n]);
        self.taken += n;
        Ok(n)
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        // Its next send fails.
        self.full = None;
        if let Some(thread) = self.thread.take() {
            // A panic in it was reported where it happened.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives bytes in pieces of odd lengths, then an error if it has one.
    struct Pieces {
        left: usize,
        step: usize,
        error: Option<io::Error>,
    }

    impl Read for Pieces {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let n = buf.len().min(self.left).min(self.step);
            if n == 0 {
                return self.error.take().map_or(Ok(0), Err);
            }
            for (i, byte) in buf[..n].iter_mut().enumerate() {
                *byte = ((self.left - i) % 251) as u8;
            }
            self.left -= n;
            Ok(n)
        }
    }

    #[test]
    fn all_bytes_come_in_their_order_and_an_error_after_them() {
        for len in [0, 1, BUFFER - 1, BUFFER, BUFFER + 1, 20 * BUFFER + 7] {
            let mut whole = Vec::new();
            let pieces = || Pieces { left: len, step: 100_003, error: None };
            pieces().read_to_end(&mut whole).unwrap();
            let mut ahead = Vec::new();
            Ahead::new(pieces()).unwrap().read_to_end(&mut ahead).unwrap();
            assert!(ahead == whole, "{len}");
            let failing = Pieces { error: Some(io::Error::other("broken")), ..pieces() };
            let mut ahead = Vec::new();
            let error = Ahead::new(failing).unwrap().read_to_end(&mut ahead).unwrap_err();
            assert!(ahead == whole && error.to_string() == "broken", "{len}");
        }
    }

    #[test]
    fn a_reader_that_is_no_longer_wanted_ends() {
        let mut ahead = Ahead::new(io::repeat(7)).unwrap();
        let mut byte = [0];
        ahead.read_exact(&mut byte).unwrap();
        drop(ahead);
    }
}
