//! crc32c as the kernel chains it: no inversion at either end, so that a running value can be the next seed.

/// The kernel's `crc32c(seed, bytes)`.
pub fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// Seed of the checksums of what belongs to an inode: its number and generation.
pub fn inode_seed(fs_seed: u32, ino: u32, generation: u32) -> u32 {
    crc32c(crc32c(fs_seed, &ino.to_le_bytes()), &generation.to_le_bytes())
}

/// Checksum of an extended attribute block; `bytes` is the whole block with `h_checksum` zero.
pub fn xattr_block(fs_seed: u32, block: u64, bytes: &[u8]) -> u32 {
    crc32c(crc32c(fs_seed, &block.to_le_bytes()), bytes)
}

#[cfg(test)]
mod tests {
    #[test]
    fn check_value_of_crc32c() {
        // RFC 3720 B.4: crc32c("123456789") is e3069283 with inversion at both ends.
        assert_eq!(!super::crc32c(!0, b"123456789"), 0xe306_9283);
        assert_eq!(super::crc32c(super::crc32c(!0, b"1234"), b"56789"), super::crc32c(!0, b"123456789"));
    }
}
