//! Little-endian fields of hostile buffers, and the two checksums of ext4.
//!
//! A field outside the buffer reads as 0: callers check lengths where a missing field must be told from a zero one.
//! No function here panics. Used by the reader and the checker only.

/// The byte at `at`.
pub(crate) fn u8_at(buf: &[u8], at: usize) -> u8 {
    buf.get(at).copied().unwrap_or(0)
}

/// The 16-bit field at `at`.
pub(crate) fn u16_at(buf: &[u8], at: usize) -> u16 {
    buf.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_le_bytes(*b))
}

/// The 32-bit field at `at`.
pub(crate) fn u32_at(buf: &[u8], at: usize) -> u32 {
    buf.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

/// A 64-bit value whose halves are stored apart.
pub(crate) fn wide(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// Continues ext4's CRC-32C.
pub(crate) use crate::layout::checksum::crc32c as chksum;

/// Continues the CRC-16 of `uninit_bg` descriptors (`lib/crc16.c`, polynomial 0xA001).
pub(crate) fn crc16(seed: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(seed, |mut crc, byte| {
        crc ^= u16::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xA001 } else { crc >> 1 };
        }
        crc
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_outside_the_buffer_are_zero() {
        let buf = [1, 2, 3];
        assert_eq!((u8_at(&buf, 2), u8_at(&buf, 3)), (3, 0));
        assert_eq!((u16_at(&buf, 1), u16_at(&buf, 2)), (0x0302, 0));
        assert_eq!((u32_at(&buf, 0), u32_at(&buf, usize::MAX)), (0, 0));
    }

    #[test]
    fn checksums_have_the_known_check_values() {
        assert_eq!(!chksum(!0, b"123456789"), 0xE306_9283);
        assert_eq!(crc16(0, b"123456789"), 0xBB3D);
    }
}
