//! Memory for reading and writing a disk past the page cache. Called by [`slots`](crate::slots) and the agent's `block`.

/// Alignment that unbuffered disk access needs, of offsets, lengths and memory; bytes.
pub const ALIGN: usize = 4096;

/// Memory whose start is aligned to [`ALIGN`].
#[derive(Debug)]
pub struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// `len` zeros.
    pub fn new(len: usize) -> Self {
        let memory = vec![0; len + ALIGN];
        let start = memory.as_ptr().align_offset(ALIGN).min(ALIGN);
        Self { memory, start, len }
    }

    /// All of them.
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    /// All of them, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}
