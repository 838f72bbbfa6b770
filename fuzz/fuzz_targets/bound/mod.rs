//! Bounded time and memory per input byte, as a property of every target.
//!
//! ```text
//!   allocator ─► bytes held (most at a time), bytes asked for in all       what is copied over and over is asked for
//!   Counted   ─► reads and writes of a disk, and their bytes               each time; what is read, is read each time;
//!   steps     ─► turns of the readers' own loops                           what is only looked at, is a step
//! ```
//!
//! No seconds: the same input gives the same figures on any machine. [`Limit`] names what a target may cost: a sum for
//! itself and a factor for each byte of its input. Factors are several times what the corpora cost, and far below what a
//! product of two lengths would be.

use disk_io::{ReadAt, WriteAt, steps};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    io,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
};

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);
static ASKED: AtomicU64 = AtomicU64::new(0);
static DISK: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(bytes: usize) {
    let held = HELD.fetch_add(bytes, Relaxed) + bytes;
    MOST.fetch_max(held, Relaxed);
    ASKED.fetch_add(bytes as u64, Relaxed);
}

// SAFETY: every call goes to the system's allocator as it came; only numbers are kept beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// A disk whose reads and writes are counted.
pub struct Counted<D>(pub D);

/// What one call costs besides its bytes.
const CALL: u64 = 64;

impl<D: ReadAt> ReadAt for Counted<D> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        DISK.fetch_add(CALL + buf.len() as u64, Relaxed);
        self.0.read_at(buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }
}

impl<D: WriteAt> WriteAt for Counted<D> {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        DISK.fetch_add(CALL + buf.len() as u64, Relaxed);
        self.0.write_at(buf, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

/// What a target may cost: for itself, and for each byte of its input.
pub struct Limit {
    /// Most bytes held at a time.
    pub held: (u64, u64),
    /// Bytes asked of the allocator in all.
    pub asked: (u64, u64),
    /// Bytes read from and written to disks, with a sum for each call.
    pub disk: (u64, u64),
    /// Turns of loops.
    pub steps: (u64, u64),
}

impl Limit {
    /// Runs `work` on `input` bytes and holds what it cost against the limit. With `LCOW_FUZZ_COSTS` set, it is printed.
    ///
    /// # Panics
    /// If it cost more.
    pub fn hold<T>(&self, input: usize, work: impl FnOnce() -> T) -> T {
        steps::taken();
        DISK.store(0, Relaxed);
        ASKED.store(0, Relaxed);
        let before = HELD.load(Relaxed);
        MOST.store(before, Relaxed);
        let result = work();
        let most = MOST.load(Relaxed).saturating_sub(before) as u64;
        let costs = [
            ("bytes held", most, self.held),
            ("bytes asked for", ASKED.load(Relaxed), self.asked),
            ("bytes of disks", DISK.load(Relaxed), self.disk),
            ("steps", steps::taken(), self.steps),
        ];
        if std::env::var_os("LCOW_FUZZ_COSTS").is_some() {
            let text: Vec<String> = costs.iter().map(|(what, cost, _)| format!("{cost} {what}")).collect();
            eprintln!("COST of {input} bytes: {}", text.join(", "));
        }
        for (what, cost, (base, factor)) in costs {
            let limit = base + factor * input as u64;
            assert!(cost <= limit, "an input of {input} bytes cost {cost} {what}, more than {limit}");
        }
        result
    }
}
