//! The super block, changed by one write of one sector.
//!
//! ```text
//!   byte 1024             1536                 2044  2048
//!   │ counts, features, … │ overhead, …        │ sum │      sectors of 512 bytes: both may be written, or only one
//!                  └ 4 bytes behind the end of `s_last_mounted`: chosen so that the sum stays what it is
//! ```
//!
//! The super block spans two sectors of a disk with sectors of 512 bytes, and its checksum, at the end of the second one,
//! covers both: a write that is cut between them leaves a file system that no kernel mounts. All fields that change are in
//! the first sector. CRC-32C is linear, so for any content there are four bytes that keep the checksum. They are the last
//! ones of `s_last_mounted`, a text that ends before them and that the next mount replaces.

use super::{flush, write};
use crate::{
    Ext4Error, Place,
    layout::{
        checksum::crc32c,
        superblock::{RoCompat, SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE, Superblock},
    },
};
use disk_io::WriteAt;
use std::mem::offset_of;
use zerocopy::{FromZeros, IntoBytes, little_endian::U32};

/// Bytes that a disk writes whole or not at all.
const SECTOR: usize = 512;
/// Bytes that the checksum covers.
const COVERED: usize = SUPERBLOCK_SIZE - 4;
/// Where in `s_last_mounted` the four bytes are that keep the checksum; the text ends before them.
const SPARE: usize = 60;
const _: () = assert!(
    offset_of!(Superblock, s_last_mounted) + SPARE + 4 <= SECTOR
        && offset_of!(Superblock, s_overhead_clusters) >= SECTOR
);

/// Reads the primary super block.
pub(super) fn read<D: WriteAt>(disk: &D) -> Result<Superblock, Ext4Error> {
    let mut sb = Superblock::new_zeroed();
    disk.read_exact_at(sb.as_mut_bytes(), SUPERBLOCK_OFFSET)
        .map_err(|e| Ext4Error::io("reading the super block", Place::offset(SUPERBLOCK_OFFSET), e))?;
    Ok(sb)
}

/// Turns the primary super block, which is `old`, into `new`, and makes it durable: afterwards and after a power cut it is
/// one of the two, but for `s_overhead_clusters`, a figure for `df` alone, which may be the new one already. Returns what was
/// written.
pub(super) fn commit<D: WriteAt>(
    disk: &D,
    old: &Superblock,
    mut new: Superblock,
) -> Result<Superblock, Ext4Error> {
    if !new.ro_compat().contains(RoCompat::EXT4_FEATURE_RO_COMPAT_METADATA_CSUM) {
        write(disk, new.as_bytes(), SUPERBLOCK_OFFSET)?;
        flush(disk)?;
        return Ok(new);
    }
    let mut current = *old;
    if current.as_bytes()[SECTOR..COVERED] != new.as_bytes()[SECTOR..COVERED] {
        current.as_mut_bytes()[SECTOR..COVERED].copy_from_slice(&new.as_bytes()[SECTOR..COVERED]);
        current.seal();
        write(disk, &current.as_bytes()[SECTOR..], SUPERBLOCK_OFFSET + SECTOR as u64)?;
        flush(disk)?;
    }
    keep_checksum(&mut new, current.s_checksum.get());
    write(disk, &new.as_bytes()[..SECTOR], SUPERBLOCK_OFFSET)?;
    flush(disk)?;
    Ok(new)
}

/// Gives `sb` the checksum `wanted` by a choice of the spare bytes.
pub(super) fn keep_checksum(sb: &mut Superblock, wanted: u32) {
    sb.s_last_mounted[SPARE - 1..].fill(0);
    let sum = |sb: &Superblock| crc32c(!0, &sb.as_bytes()[..COVERED]);
    let base = sum(sb);
    // What each of the 32 bits changes in the checksum.
    let mut effects: Vec<(u32, u32)> = (0..u32::BITS)
        .map(|n| {
            let bit = 1u32 << n;
            let mut changed = *sb;
            changed.s_last_mounted[SPARE..].copy_from_slice(&bit.to_le_bytes());
            (sum(&changed) ^ base, bit)
        })
        .collect();
    let (mut missing, mut chosen) = (wanted ^ base, 0);
    for n in (0..u32::BITS).rev() {
        let Some(at) = effects.iter().position(|(effect, _)| effect >> n & 1 == 1) else { continue };
        let (effect, bits) = effects.swap_remove(at);
        for other in effects.iter_mut().filter(|(other, _)| other >> n & 1 == 1) {
            other.0 ^= effect;
            other.1 ^= bits;
        }
        if missing >> n & 1 == 1 {
            missing ^= effect;
            chosen ^= bits;
        }
    }
    sb.s_last_mounted[SPARE..].copy_from_slice(&u32::to_le_bytes(chosen));
    sb.s_checksum = U32::new(wanted);
    debug_assert!(sb.computed_checksum() == wanted, "four bytes reach every checksum");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_content_can_have_any_checksum() {
        let mut sb = Superblock::new_zeroed();
        for (n, wanted) in [0, 1, 0x8000_0000, 0xdead_beef, !0].into_iter().enumerate() {
            sb.set_blocks_count(77 << n);
            sb.s_last_mounted[..64].fill(b'/');
            keep_checksum(&mut sb, wanted);
            assert_eq!((sb.computed_checksum(), sb.s_checksum.get()), (wanted, wanted));
            assert_eq!((sb.s_last_mounted[58], sb.s_last_mounted[59]), (b'/', 0));
        }
    }
}
