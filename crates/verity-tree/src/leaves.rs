//! The leaves until their final place is known: first in memory, and on a scratch disk beyond 64 Ki of them.

use super::{BLOCK, HASH, Hash};
use disk_io::WriteAt;
use std::io;

/// Leaves that are kept in memory: 2 MiB of hashes, those of 256 MiB of data.
pub(super) const IN_MEMORY: usize = 64 << 10;

/// A growing list of hashes.
pub(super) struct Leaves<S> {
    scratch: Option<S>,
    /// Number of leaves on the scratch disk; they precede those in memory.
    spilled: u64,
    recent: Vec<Hash>,
}

impl<S: WriteAt> Leaves<S> {
    pub(super) fn new(scratch: Option<S>) -> Self {
        Self { scratch, spilled: 0, recent: Vec::new() }
    }

    pub(super) fn len(&self) -> u64 {
        self.spilled + self.recent.len() as u64
    }

    pub(super) fn push(&mut self, hash: Hash) -> io::Result<()> {
        if self.recent.len() >= IN_MEMORY
            && let Some(scratch) = &self.scratch
        {
            scratch.write_all_at(self.recent.as_flattened(), self.spilled * HASH as u64)?;
            self.spilled += self.recent.len() as u64;
            self.recent.clear();
        }
        self.recent.push(hash);
        Ok(())
    }

    /// Replaces a leaf.
    pub(super) fn set(&mut self, index: u64, hash: Hash) -> io::Result<()> {
        if let Some(recent) = index.checked_sub(self.spilled) {
            let slot = usize::try_from(recent).ok().and_then(|i| self.recent.get_mut(i));
            *slot.ok_or(io::ErrorKind::InvalidInput)? = hash;
            return Ok(());
        }
        self.scratch.as_ref().map_or(Ok(()), |s| s.write_all_at(&hash, index * HASH as u64))
    }

    /// Fills `block` with the hashes from `first`: 128, or the remaining ones and zeros.
    pub(super) fn block(&self, first: u64, block: &mut [u8; BLOCK]) -> io::Result<()> {
        let n = (self.len().saturating_sub(first)).min((BLOCK / HASH) as u64);
        let on_disk = self.spilled.saturating_sub(first).min(n);
        let (head, tail) = block.split_at_mut(on_disk as usize * HASH);
        if let (Some(scratch), true) = (&self.scratch, on_disk > 0) {
            scratch.read_exact_at(head, first * HASH as u64)?;
        }
        tail.fill(0);
        let from = (first + on_disk - self.spilled.min(first + on_disk)) as usize;
        let recent = self.recent.get(from..from + (n - on_disk) as usize).unwrap_or_default();
        tail[..recent.len() * HASH].copy_from_slice(recent.as_flattened());
        Ok(())
    }
}
