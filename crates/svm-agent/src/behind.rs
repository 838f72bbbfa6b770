//! A thread that moves pieces of a device while its owner fills or empties others.
//!
//! ```text
//!   owner ── job: piece ─► thread ── device ─► done: piece, outcome ─► owner        at most one job at a time
//! ```
//!
//! An emulated processor that waits for its device does nothing else, so an operation that waits for each megabyte
//! takes the sum of both times. Dropping it waits for the job in progress. Called by `block`.

use super::piece::Piece;
use disk_io::WriteAt;
use std::{
    fs::File,
    io,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

/// One device's thread.
#[derive(Debug)]
pub(super) struct Behind {
    /// `None` once it is being dropped.
    jobs: Option<SyncSender<Piece>>,
    done: Receiver<(Piece, io::Result<()>)>,
    busy: bool,
    thread: Option<JoinHandle<()>>,
}

impl Behind {
    /// A thread that writes to `device`.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn start(device: Arc<File>) -> io::Result<Self> {
        let (jobs, orders) = sync_channel::<Piece>(1);
        let (tell, done) = sync_channel(1);
        let thread = std::thread::Builder::new().name("write behind".into()).spawn(move || {
            for mut piece in orders {
                let (start, len) = (piece.start, piece.len);
                let outcome = device.write_all_at(&piece.memory()[..len], start);
                if tell.send((piece, outcome)).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { jobs: Some(jobs), done, busy: false, thread: Some(thread) })
    }

    /// Waits for the job in progress; gives its piece for reuse.
    ///
    /// # Errors
    /// The device's error.
    pub(super) fn wait(&mut self) -> io::Result<Option<Piece>> {
        if !std::mem::take(&mut self.busy) {
            return Ok(None);
        }
        let (piece, outcome) = self.done.recv().map_err(|_| io::Error::other("the writing thread ended"))?;
        outcome.map(|()| Some(piece))
    }

    /// Writes a piece of whole blocks. No job may be in progress.
    ///
    /// # Errors
    /// The thread has ended.
    pub(super) fn write(&mut self, piece: Piece) -> io::Result<()> {
        debug_assert!(!self.busy);
        let jobs = self.jobs.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        jobs.send(piece).map_err(|_| io::Error::other("the writing thread ended"))?;
        self.busy = true;
        Ok(())
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has already been reported.
            let _ = thread.join();
        }
    }
}
