//! Checksums as the kernel chains them: no inversion at either end, so that a running value can be the next seed.
//!
//! CRC-32C covers all metadata (feature metadata_csum); CRC-16 group descriptors of older file systems (feature
//! uninit_bg); a CRC-32 of the other polynomial the transactions of old journals. Used by writers, reader and checker.

use crc::{CRC_16_MODBUS, CRC_32_MPEG_2, Crc, Table};

/// `crc16` of the kernel (lib/crc16.c) with seed `!0`.
pub(crate) static CRC16: Crc<u16, Table<1>> = Crc::<u16, Table<1>>::new(&CRC_16_MODBUS);

/// `crc32_be` of the kernel with seed `!0`, the checksum of a transaction (jbd2, feature checksum).
pub(crate) static CRC32_BE: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_MPEG_2);

/// The kernel's `crc32c(seed, bytes)`.
pub(crate) fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// `bytes` with the field of `len` bytes at `at` taken as zero, which is how most structures exclude their own checksum.
/// Without such a field it is the checksum of all bytes.
pub(crate) fn crc32c_without(seed: u32, bytes: &[u8], at: usize, len: usize) -> u32 {
    const ZEROS: [u8; 4] = [0; 4];
    match (bytes.get(..at), bytes.get(at + len..)) {
        (Some(head), Some(rest)) => crc32c(crc32c(crc32c(seed, head), &ZEROS[..len]), rest),
        _ => crc32c(seed, bytes),
    }
}

/// Seed of the checksums of what belongs to an inode: its number and generation.
pub(crate) fn inode_seed(fs_seed: u32, ino: u32, generation: u32) -> u32 {
    crc32c(crc32c(fs_seed, &ino.to_le_bytes()), &generation.to_le_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_have_the_known_check_values() {
        // RFC 3720 B.4: crc32c("123456789") is e3069283 with inversion at both ends.
        assert_eq!(!crc32c(!0, b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(crc32c(!0, b"1234"), b"56789"), crc32c(!0, b"123456789"));
        assert_eq!(crc32c_without(!0, b"12ab56789", 2, 2), crc32c(!0, b"12\0\x0056789"));
        assert_eq!(CRC16.checksum(b"123456789"), 0x4B37);
        assert_eq!(CRC32_BE.checksum(b"123456789"), 0x0376_E6E7);
    }
}
