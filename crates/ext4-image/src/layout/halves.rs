//! 64-bit numbers that ext4 keeps in two fields, `…_lo` and `…_hi`. Called by the structures of `layout`.

use zerocopy::little_endian::U32;

/// Joins the halves of a 64-bit number.
pub(crate) fn join(lo: U32, hi: U32) -> u64 {
    u64::from(lo.get()) | u64::from(hi.get()) << 32
}

/// Halves of a 64-bit number, low one first.
pub(crate) fn split(n: u64) -> (U32, U32) {
    (U32::new(n as u32), U32::new((n >> 32) as u32))
}
