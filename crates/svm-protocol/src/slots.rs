//! The transfer disk: pieces of a stream that pass through shared memory instead of the stream.
//!
//! ```text
//!   ┌──────┬──────┬─ … ─┬──────┬──────┬─ … ─┐     slots 0…n-1 belong to the daemon, n…2n-1 to the agent
//!   │  0   │  1   │     │  n   │ n+1  │     │     the owner fills a slot and names it (Stored);
//!   └──────┴──────┴─ … ─┴──────┴──────┴─ … ─┘     the other empties it and gives it back (Free)
//! ```
//!
//! The daemon holds a memory file, the guest sees it as a disk, read and written past its page cache. What the
//! other side writes there are untrusted bytes of a stream: they are copied once before they are used.

use crate::aligned::{ALIGN, Aligned};
use crate::link::{WINDOW, invalid};
use disk_io::{ReadAt, WriteAt};
use serde::{Deserialize, Serialize};
use std::{collections::HashSet, fs::File, io, sync::Mutex};

/// Bytes of a slot: one data frame of the upper protocol.
pub const SLOT_BYTES: usize = 256 << 10;
/// Slots each way: enough for eight channels at full speed; other bytes go inline.
pub const SLOTS: u32 = 8 * (WINDOW / SLOT_BYTES) as u32;
/// Bytes of the transfer disk.
pub const TRANSFER_BYTES: u64 = SLOTS as u64 * 2 * SLOT_BYTES as u64;

/// Identity and layout of a transfer disk, sent by the daemon to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferDisk {
    /// Serial number by which the guest finds it.
    pub serial: String,
    /// Bytes of a slot, a multiple of [`ALIGN`].
    pub slot_bytes: u32,
    /// Slots each way.
    pub slots: u32,
}

impl TransferDisk {
    /// The default layout.
    pub fn new(serial: impl Into<String>) -> Self {
        Self { serial: serial.into(), slot_bytes: SLOT_BYTES as u32, slots: SLOTS }
    }
}

/// An end of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Owns the lower slots.
    Daemon,
    /// Owns the upper ones.
    Agent,
}

/// One end's view of a transfer disk.
#[derive(Debug)]
pub struct Slots {
    file: File,
    slot_bytes: usize,
    /// Number of slots of each side.
    per_side: u32,
    /// First slot of this side.
    first: u32,
    free: Mutex<Vec<u32>>,
    /// Slots of the peer that are full and were not given back yet.
    full: Mutex<HashSet<u32>>,
    /// Memory with the right alignment, kept between uses.
    buffers: Mutex<Vec<Aligned>>,
}

/// Bytes taken out of a slot; their memory goes back to [`Slots::put_back`].
#[derive(Debug)]
pub struct Taken {
    memory: Aligned,
    len: usize,
}

impl Taken {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.memory.bytes()[..self.len]
    }
}

impl Slots {
    /// One end of `disk`, which is open as `file`.
    ///
    /// # Errors
    /// `InvalidInput` for an invalid layout.
    pub fn new(file: File, disk: &TransferDisk, side: Side) -> io::Result<Self> {
        let slot_bytes = disk.slot_bytes as usize;
        if slot_bytes == 0 || !slot_bytes.is_multiple_of(ALIGN) || slot_bytes > WINDOW || disk.slots > 1 << 16
        {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a transfer disk with impossible slots"));
        }
        let first = if side == Side::Daemon { 0 } else { disk.slots };
        // Popped from the end: the lowest come first, and few are ever touched.
        let free = Mutex::new((first..first + disk.slots).rev().collect());
        let (full, buffers) = (Mutex::default(), Mutex::default());
        Ok(Self { file, slot_bytes, per_side: disk.slots, first, free, full, buffers })
    }

    /// Bytes of a slot.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Puts as many bytes of `parts` as fit into a free slot; gives its number and the number of bytes. `None` if no slot is
    /// free.
    ///
    /// # Errors
    /// Errors of the disk.
    pub fn store(&self, parts: &[&[u8]]) -> io::Result<Option<(u32, usize)>> {
        let Some(slot) = lock(&self.free).pop() else { return Ok(None) };
        let mut buffer = self.buffer();
        let mut used = 0;
        for part in parts {
            let n = part.len().min(self.slot_bytes - used);
            buffer.bytes_mut()[used..used + n].copy_from_slice(&part[..n]);
            used += n;
        }
        let whole = used.next_multiple_of(ALIGN);
        let written = self.file.write_all_at(&buffer.bytes()[..whole], self.place(slot));
        self.give_back(buffer);
        match written {
            Ok(()) => Ok(Some((slot, used))),
            Err(e) => {
                lock(&self.free).push(slot);
                Err(e)
            }
        }
    }

    /// The peer has filled one of its slots: it may not name it again before [`Slots::give_back_slot`], so at most as many
    /// pieces wait as there are slots.
    ///
    /// # Errors
    /// `InvalidData` for a slot that is not the peer's, or is full already; for more bytes than a slot has.
    pub fn claim(&self, slot: u32, len: usize) -> io::Result<()> {
        self.check_foreign(slot, len)?;
        if !lock(&self.full).insert(slot) {
            return Err(invalid("bytes in a slot that was not given back"));
        }
        Ok(())
    }

    /// Must precede the message to the peer that its slot is empty.
    pub fn give_back_slot(&self, slot: u32) {
        lock(&self.full).remove(&slot);
    }

    fn check_foreign(&self, slot: u32, len: usize) -> io::Result<()> {
        if slot >= self.per_side * 2 || self.is_ours(slot) || len > self.slot_bytes {
            return Err(invalid("bytes in a slot that the peer does not own"));
        }
        Ok(())
    }

    /// Takes `len` bytes out of the peer's `slot`.
    ///
    /// # Errors
    /// `InvalidData` for a slot that is not the peer's; errors of the disk.
    pub fn load(&self, slot: u32, len: usize) -> io::Result<Taken> {
        self.check_foreign(slot, len)?;
        let mut memory = self.buffer();
        let whole = len.next_multiple_of(ALIGN);
        let read = self.file.read_exact_at(&mut memory.bytes_mut()[..whole], self.place(slot));
        let taken = Taken { memory, len };
        match read {
            Ok(()) => Ok(taken),
            Err(e) => {
                self.put_back(taken);
                Err(e)
            }
        }
    }

    /// Returns the memory of a piece for reuse.
    pub fn put_back(&self, taken: Taken) {
        self.give_back(taken.memory);
    }

    /// The peer has emptied a slot of this side.
    ///
    /// # Errors
    /// `InvalidData` for a slot that was not full.
    pub fn free(&self, slot: u32) -> io::Result<()> {
        let mut free = lock(&self.free);
        if !self.is_ours(slot) || free.contains(&slot) {
            return Err(invalid("a slot was returned that was not lent"));
        }
        free.push(slot);
        Ok(())
    }

    fn is_ours(&self, slot: u32) -> bool {
        (self.first..self.first + self.per_side).contains(&slot)
    }

    fn place(&self, slot: u32) -> u64 {
        u64::from(slot) * self.slot_bytes as u64
    }

    fn buffer(&self) -> Aligned {
        lock(&self.buffers).pop().unwrap_or_else(|| Aligned::new(self.slot_bytes))
    }

    fn give_back(&self, buffer: Aligned) {
        lock(&self.buffers).push(buffer);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_goes_over_and_comes_back_and_lies_are_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 10).unwrap();
        let disk = TransferDisk { serial: "x".into(), slot_bytes: 8192, slots: 2 };
        let daemon = Slots::new(file.try_clone().unwrap(), &disk, Side::Daemon).unwrap();
        let agent = Slots::new(file, &disk, Side::Agent).unwrap();
        let (slot, n) = daemon.store(&[b"head", &[7; 10_000]]).unwrap().unwrap();
        assert_eq!((slot, n), (0, 8192), "what fits");
        let got = agent.load(slot, n).unwrap();
        assert!(got.bytes().starts_with(b"head\x07") && got.bytes().len() == 8192);
        agent.put_back(got);
        assert_eq!(daemon.store(&[b"2"]).unwrap().unwrap(), (1, 1));
        assert!(daemon.store(&[b"3"]).unwrap().is_none(), "all in use: inline");
        daemon.free(0).unwrap();
        assert_eq!(daemon.store(&[b"3"]).unwrap().unwrap().0, 0);
        for lie in [2, 4, u32::MAX] {
            assert!(daemon.free(lie).is_err());
        }
        daemon.free(1).unwrap();
        assert!(daemon.free(1).is_err(), "twice");
        for (slot, len) in [(2, 1), (4, 1), (0, 8193)] {
            assert!(agent.load(slot, len).is_err(), "slot {slot} len {len}");
        }
        assert_eq!(agent.store(&[b"back"]).unwrap().unwrap(), (2, 4));
        assert_eq!(daemon.load(2, 4).unwrap().bytes(), b"back");
        assert!(
            Slots::new(tempfile::tempfile().unwrap(), &TransferDisk { slot_bytes: 100, ..disk }, Side::Agent)
                .is_err()
        );
    }
}
