//! Larger blocks in mid-stream: an image that was started in small blocks is started again in blocks of 4 KiB.
//!
//! ```text
//!   tar ─► image in 1 KiB blocks, record ─► entry that needs more ─┬─► both read back = the tar so far ─┐
//!                                                                  └─► the rest of the stream ──────────┴─► as if begun
//!                                                                                      in 4 KiB blocks, on a second pair
//! ```
//!
//! A symbolic link of 1,024 bytes, many names of extended attributes or a file of more than 4 TiB do not fit blocks of
//! 1 KiB, and the stream can be read only once. Image and record hold all bytes that were read, so they are replayed before
//! the rest of the stream: the second pass is the same code with the same options on the same bytes, and gives the same
//! result as if started with 4 KiB. The need may also arise at the end, when a hard link copies a file from a lower layer.
//!
//! Invariants: at most once in a stream, and directly to the largest blocks; only one of the two trees is in memory at a
//! time; limits of image and tar are those of the second pass. The digest of the replayed part is compared with that of
//! the received bytes, if this side digests.

use crate::{
    DiffError, TarDigest,
    digest::Hasher,
    record::{Broken, PartialTar},
};
use disk_io::WriteAt;
use ext4_image::Ext4Error;
use std::io::{self, Cursor, Read};

/// Provides the disks for an apply that needs larger blocks.
pub trait Growth<W, S> {
    /// A second pair of empty disks, for image and record; `None` if there is none: then the entry is refused.
    /// Called at most once.
    ///
    /// # Errors
    /// The disks could not be provided.
    fn disks(&mut self) -> Result<Option<(W, S)>, DiffError>;

    /// The first pair is being read back, and the stream is not read: called at least once for each 256 KiB, with the number
    /// of bytes that were read back so far, which is larger each time.
    ///
    /// # Errors
    /// The caller has given up the apply.
    fn replaying(&mut self, bytes: u64) -> Result<(), DiffError>;

    /// The first pair is no longer needed.
    ///
    /// # Errors
    /// The caller has given up the apply.
    fn replayed(&mut self, image: W, record: S) -> Result<(), DiffError>;
}

/// There are no other disks.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoGrowth;

impl<W, S> Growth<W, S> for NoGrowth {
    fn disks(&mut self) -> Result<Option<(W, S)>, DiffError> {
        Ok(None)
    }

    fn replaying(&mut self, _: u64) -> Result<(), DiffError> {
        Ok(())
    }

    fn replayed(&mut self, _: W, _: S) -> Result<(), DiffError> {
        Ok(())
    }
}

/// Why a pass over a tar ended early.
pub(super) enum Stopped {
    /// It failed.
    Failed(DiffError),
    /// An entry needs larger blocks.
    TooSmall(Box<TooSmall>),
}

/// A pass that met an entry that needs larger blocks.
pub(super) struct TooSmall {
    /// The error if there are no other disks.
    pub(super) error: DiffError,
    /// The record up to there.
    pub(super) record: Broken,
    /// Bytes that were read but not recorded.
    pub(super) rest: Vec<u8>,
    /// Digest of both, if they were digested here.
    pub(super) digest: Option<TarDigest>,
}

impl From<DiffError> for Stopped {
    fn from(error: DiffError) -> Self {
        Self::Failed(error)
    }
}

impl From<Ext4Error> for Stopped {
    fn from(error: Ext4Error) -> Self {
        Self::Failed(error.into())
    }
}

/// The stream from its start: what the first pair holds, what was read ahead, and what is still to come.
pub(super) struct Resumed<'a, W, S> {
    replay: Option<PartialTar<W, S>>,
    /// Bytes that it gave.
    replayed: u64,
    rest: Cursor<Vec<u8>>,
    /// The expected digest of the replayed part, until it was verified.
    digest: Option<(Hasher, TarDigest)>,
    input: &'a mut dyn Read,
    growth: &'a mut dyn Growth<W, S>,
}

impl<'a, W: WriteAt, S: WriteAt> Resumed<'a, W, S> {
    pub(super) fn new(
        image: W,
        record: S,
        stopped: TooSmall,
        input: &'a mut dyn Read,
        growth: &'a mut dyn Growth<W, S>,
    ) -> Result<Self, DiffError> {
        let replay = Some(PartialTar::new(image, record, stopped.record)?);
        let digest = stopped.digest.map(|digest| (digest.kind.hasher(), digest));
        Ok(Self { replay, replayed: 0, rest: Cursor::new(stopped.rest), digest, input, growth })
    }

    /// Reads the replayed part; 0 at its end.
    fn again(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if let Some(replay) = &mut self.replay {
            self.growth.replaying(self.replayed).map_err(io::Error::other)?;
            match replay.read(buf)? {
                0 => {}
                n => {
                    self.replayed += n as u64;
                    return Ok(n);
                }
            }
        }
        if let Some(replay) = self.replay.take() {
            let (image, record) = replay.into_disks();
            self.growth.replayed(image, record).map_err(io::Error::other)?;
        }
        self.rest.read(buf)
    }
}

impl<W: WriteAt, S: WriteAt> Read for Resumed<'_, W, S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let n = self.again(buf)?;
        if n > 0 {
            if let Some((hasher, _)) = &mut self.digest {
                hasher.update(&buf[..n]);
            }
            return Ok(n);
        }
        if let Some((hasher, digest)) = self.digest.take()
            && hasher.finish() != digest
        {
            return Err(io::Error::other("the tar that was read back differs from what was written"));
        }
        self.input.read(buf)
    }
}
