//! Aligned memory with bytes of a device. Called by `block`, which fills and empties it, and `behind`, which writes it.

use svm_protocol::Aligned;

/// Bytes of a piece of memory.
pub(super) const PIECE: usize = 1 << 20;

/// Bytes of the device from an aligned place on.
#[derive(Debug, Default)]
pub(super) struct Piece {
    memory: Option<Aligned>,
    pub(super) start: u64,
    pub(super) len: usize,
}

impl Piece {
    pub(super) fn memory(&mut self) -> &mut [u8] {
        self.memory.get_or_insert_with(|| Aligned::new(PIECE)).bytes_mut()
    }

    pub(super) fn end(&self) -> u64 {
        self.start + self.len as u64
    }
}
