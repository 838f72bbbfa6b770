//! What of a disk has to be copied: the units that hold anything but zeros.
//!
//! ```text
//!   data ranges   ──[====]──[=]────────[==]──          ranges that may hold something
//!   units         │    │    │    │    │    │    │      touched: each unit that a range meets, once
//! ```
//!
//! Where a disk has no data it reads as zeros, and so do its units that are full of zeros: which of both a zero is depends
//! on the file system below and must not reach a copy. Pure but for [`read_padded`]. Called by `vhdx::create` and `qcow2`.

use disk_io::ReadAt;
use std::{io, ops::Range};

/// Runs of zeros of at least this size, and at multiples of it, are not written.
const GRAIN: usize = 4096;

/// Numbers of the units of `unit` bytes that `data` meets, ascending; `data` ascends and ends at `end` at the latest.
pub(crate) fn touched(data: &[Range<u64>], unit: u64, end: u64) -> impl Iterator<Item = u64> + '_ {
    let mut next = 0;
    data.iter().flat_map(move |range| {
        let units = next.max(range.start / unit)..range.end.min(end).div_ceil(unit);
        next = next.max(units.end);
        units
    })
}

/// Ranges of whole grains (the last may be short) that are not all zero.
pub(crate) fn nonzero_runs(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (n, grain) in bytes.chunks(GRAIN).enumerate() {
        if is_zero(grain) {
            continue;
        }
        let (start, end) = (n * GRAIN, n * GRAIN + grain.len());
        match runs.last_mut() {
            Some(run) if run.end == start => run.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

/// Whether all bytes are zero.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// Fills `buf` from `at`; zeros from the end of the disk on.
pub(crate) fn read_padded<R: ReadAt + ?Sized>(disk: &R, buf: &mut [u8], at: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match disk.read_at(&mut buf[done..], at + done as u64) {
            Ok(0) => {
                buf[done..].fill(0);
                return Ok(());
            }
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_unit_that_a_range_meets_comes_once() {
        let data = [0..1, 5..6, 9..21, 40..41, 90..200];
        let units: Vec<u64> = touched(&data, 10, 100).collect();
        assert_eq!(units, [0, 1, 2, 4, 9]);
    }

    #[test]
    fn zeros_are_left_out_by_grains() {
        let mut bytes = vec![0; GRAIN * 5 + 10];
        assert!(nonzero_runs(&bytes).is_empty());
        for at in [1, GRAIN * 2, GRAIN * 3 + 5, GRAIN * 5 + 9] {
            bytes[at] = 1;
        }
        let expected = [0..GRAIN, GRAIN * 2..GRAIN * 4, GRAIN * 5..GRAIN * 5 + 10];
        assert_eq!(nonzero_runs(&bytes), expected);
    }
}
