//! Recovery of the journal, in memory: what `jbd2_journal_recover` would write is kept as an overlay.
//!
//! ```text
//!  pass 1 scan:   s_start ─► descriptor, data…, commit ─► … ─► the first block that is not of the next transaction
//!                 and which blocks are logged at all
//!  pass 2 revoke: logged block ─► last transaction that revoked it
//!  pass 3 replay: block ─► place of its newest copy in the journal (Overlay)
//! ```
//!
//! Invariants: nothing is written; no more blocks are visited in a pass than the journal has; the overlay has at most
//! one entry for each journal block, and so have the revocations, of which a block can hold a thousand: those of blocks
//! that are not logged change nothing and are not kept. A copy whose checksum is wrong in a committed transaction is corruption; a commit
//! block that is missing or wrong ends the log, as in the kernel. Orphan inodes are not looked at: an unlinked one
//! can't be reached, and a truncate in progress leaves a file that reads well. Called by [`super::Ext4::open`].

use super::{Ext4, bytes::chksum, corrupt, unsupported};
pub(crate) use crate::layout::journal::MAGIC;
use crate::{
    Ext4Error,
    layout::journal::{
        COMMIT_CHKSUM_AT, COMPAT_CHECKSUM, CRC32_TYPE, HEADER_LEN, REVOKE_HEADER_LEN, SUPERBLOCK_LEN,
        block_type, feature, tag_flag,
    },
    reader::extent::Extent,
};
use disk_io::ReadAt;
use std::collections::HashMap;

/// Most blocks of a journal: the most that mke2fs makes. Its extents may name one block of the disk many times, so the
/// size of the disk is no bound.
const MAX_BLOCKS: u32 = 10_240_000;

/// Where the journal's newest copy of a block is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Copy {
    /// Block of the disk.
    pub(crate) block: u64,
    /// Its first four bytes are jbd2's magic number.
    pub(crate) escaped: bool,
}

/// Blocks that the journal has newer than the disk.
#[derive(Debug, Default)]
pub(crate) struct Overlay(HashMap<u64, Copy>);

impl Overlay {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn get(&self, block: u64) -> Option<Copy> {
        self.0.get(&block).copied()
    }
}

/// Big-endian fields; outside the buffer they are 0.
fn be32(buf: &[u8], at: usize) -> u32 {
    buf.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_be_bytes(*b))
}

fn be16(buf: &[u8], at: usize) -> u16 {
    buf.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_be_bytes(*b))
}

fn bad(reason: &'static str) -> Ext4Error {
    corrupt("journal", reason)
}

/// The journal, opened.
struct Journal<'a, R> {
    fs: &'a Ext4<R>,
    extents: Vec<Extent>,
    first: u32,
    end: u32,
    incompat: u32,
    compat: u32,
    seed: u32,
}

/// One tag of a descriptor.
struct Tag {
    target: u64,
    flags: u32,
    checksum: u32,
}

/// Reads the journal of `fs` and gives the overlay that brings it up to date.
pub(crate) fn recover<R: ReadAt>(fs: &Ext4<R>) -> Result<Overlay, Ext4Error> {
    match open(fs)? {
        Some((journal, start, sequence)) => journal.replay(start, sequence),
        None => Ok(Overlay::default()),
    }
}

/// The journal, where its log begins, and with which transaction; `None` if there is nothing to replay.
fn open<R: ReadAt>(fs: &Ext4<R>) -> Result<Option<(Journal<'_, R>, u32, u32)>, Ext4Error> {
    let inum = fs.geometry().journal_inum;
    if inum == 0 {
        return Err(unsupported("a journal on another disk".to_owned()));
    }
    let inode = fs.inode(inum)?;
    let extents = fs.extents(&inode)?;
    let block_size = fs.geometry().block_size;
    let blocks = u32::try_from(inode.size / u64::from(block_size)).map_err(|_| bad("it is too long"))?;
    if blocks > MAX_BLOCKS {
        return Err(unsupported(format!("a journal of {blocks} blocks (at most {MAX_BLOCKS})")));
    }
    let mut journal = Journal { fs, extents, first: 0, end: blocks, incompat: 0, compat: 0, seed: 0 };
    let sb = journal.read(0)?;
    if be32(&sb, 0) != MAGIC {
        return Err(bad("its superblock has no magic number"));
    }
    match be32(&sb, 4) {
        block_type::SUPERBLOCK_V1 => {}
        block_type::SUPERBLOCK_V2 => {
            journal.compat = be32(&sb, 0x24);
            journal.incompat = be32(&sb, 0x28);
        }
        _ => return Err(bad("its superblock has an unknown type")),
    }
    let unknown = journal.incompat & !feature::KNOWN;
    if unknown != 0 {
        return Err(unsupported(format!("journal feature bits {unknown:#x}")));
    }
    let checksums = journal.incompat & (feature::CSUM_V2 | feature::CSUM_V3);
    if checksums == feature::CSUM_V2 | feature::CSUM_V3 {
        return Err(bad("it has two kinds of checksums"));
    }
    if checksums != 0 {
        let mut covered = sb.get(..SUPERBLOCK_LEN).ok_or_else(|| bad("its superblock is cut off"))?.to_vec();
        let stored = be32(&covered, 0xFC);
        if let Some(field) = covered.get_mut(0xFC..0x100) {
            field.fill(0);
        }
        if chksum(!0, &covered) != stored {
            return Err(bad("checksum of its superblock does not match"));
        }
        journal.seed = chksum(!0, sb.get(0x30..0x40).unwrap_or(&[]));
    }
    journal.first = be32(&sb, 0x14);
    journal.end = be32(&sb, 0x10);
    if be32(&sb, 0x0C) != block_size {
        return Err(bad("its blocks have another size"));
    }
    if journal.end > blocks || journal.first == 0 || journal.first >= journal.end {
        return Err(bad("its bounds lie outside its inode"));
    }
    let start = be32(&sb, 0x1C);
    if start == 0 {
        return Ok(None);
    }
    if start < journal.first || start >= journal.end {
        return Err(bad("its start lies outside its bounds"));
    }
    Ok(Some((journal, start, be32(&sb, 0x18))))
}

/// The blocks that are logged, and the last transaction that revoked each.
type Logged = HashMap<u64, Option<u32>>;

/// What one pass does with the blocks it meets.
enum Pass<'a> {
    Scan(&'a mut Logged),
    Revoke(&'a mut Logged),
    Replay(&'a Logged, &'a mut HashMap<u64, Copy>),
}

impl<R: ReadAt> Journal<'_, R> {
    fn replay(&self, start: u32, sequence: u32) -> Result<Overlay, Ext4Error> {
        let (logged, end) = self.logged(start, sequence)?;
        let mut overlay = HashMap::new();
        self.pass(start, sequence, Some(end), &mut Pass::Replay(&logged, &mut overlay))?;
        Ok(Overlay(overlay))
    }

    /// The blocks that are logged with their revocations, and the number behind the last complete transaction.
    fn logged(&self, start: u32, sequence: u32) -> Result<(Logged, u32), Ext4Error> {
        let mut logged = Logged::new();
        let end = self.pass(start, sequence, None, &mut Pass::Scan(&mut logged))?;
        self.pass(start, sequence, Some(end), &mut Pass::Revoke(&mut logged))?;
        Ok((logged, end))
    }

    /// The disk's block that holds block `number` of the journal.
    fn place(&self, number: u32) -> Result<u64, Ext4Error> {
        let i = self.extents.partition_point(|e| e.logical_block <= number);
        let extent = i.checked_sub(1).and_then(|i| self.extents.get(i));
        match extent {
            Some(e) if number - e.logical_block < e.blocks && !e.unwritten => {
                Ok(e.physical_block + u64::from(number - e.logical_block))
            }
            _ => Err(bad("it has a hole")),
        }
    }

    fn read(&self, number: u32) -> Result<Vec<u8>, Ext4Error> {
        let block_size = u64::from(self.fs.geometry().block_size);
        let mut block = vec![0; block_size as usize];
        self.fs.source.read(self.place(number)? * block_size, &mut block)?;
        Ok(block)
    }

    fn next(&self, number: u32) -> u32 {
        if number + 1 >= self.end { self.first } else { number + 1 }
    }

    fn has(&self, bit: u32) -> bool {
        self.incompat & bit != 0
    }

    fn checksummed(&self) -> bool {
        self.has(feature::CSUM_V2 | feature::CSUM_V3)
    }

    /// Walks the log from `at`; gives the sequence number behind the last complete transaction.
    fn pass(&self, mut at: u32, first: u32, end: Option<u32>, pass: &mut Pass<'_>) -> Result<u32, Ext4Error> {
        let mut sequence = first;
        // A log that goes round more than once would overwrite its own start.
        let mut budget = self.end - self.first;
        let mut crc32 = !0u32;
        while end != Some(sequence) && budget > 0 {
            budget -= 1;
            let block = self.read(at)?;
            if be32(&block, 0) != MAGIC || be32(&block, 8) != sequence {
                break;
            }
            match be32(&block, 4) {
                block_type::DESCRIPTOR => {
                    if self.checksummed() && !self.tail_matches(&block) {
                        // The kernel takes this for the end of the log while it scans.
                        if matches!(pass, Pass::Scan(_)) {
                            break;
                        }
                        return Err(bad("checksum of a descriptor block does not match"));
                    }
                    let tags = self.tags(&block)?;
                    let check_v1 = matches!(pass, Pass::Scan(_)) && self.compat & COMPAT_CHECKSUM != 0;
                    if check_v1 {
                        crc32 = crc32_be(crc32, &block);
                    }
                    for tag in tags {
                        at = self.next(at);
                        budget = budget.saturating_sub(1);
                        if budget == 0 {
                            break;
                        }
                        if check_v1 {
                            crc32 = crc32_be(crc32, &self.read(at)?);
                        }
                        match pass {
                            Pass::Scan(logged) => {
                                logged.insert(tag.target, None);
                            }
                            Pass::Replay(logged, overlay) => {
                                self.copy(&tag, at, sequence, logged, overlay)?;
                            }
                            Pass::Revoke(_) => {}
                        }
                    }
                    at = self.next(at);
                }
                block_type::COMMIT => {
                    if matches!(pass, Pass::Scan(_)) && !self.commit_matches(&block, crc32) {
                        break;
                    }
                    crc32 = !0;
                    sequence = sequence.wrapping_add(1);
                    at = self.next(at);
                }
                block_type::REVOKE => {
                    if let Pass::Revoke(logged) = pass {
                        self.revoke(&block, sequence, logged)?;
                    }
                    at = self.next(at);
                }
                _ => break,
            }
        }
        Ok(sequence)
    }

    /// Checks the checksum in the last four bytes of a descriptor or revoke block.
    fn tail_matches(&self, block: &[u8]) -> bool {
        let Some(end) = block.len().checked_sub(4) else { return false };
        let crc = chksum(chksum(self.seed, &block[..end]), &[0; 4]);
        crc == be32(block, end)
    }

    fn commit_matches(&self, block: &[u8], crc32: u32) -> bool {
        if self.checksummed() {
            let stored = be32(block, COMMIT_CHKSUM_AT);
            let (Some(head), Some(rest)) = (block.get(..COMMIT_CHKSUM_AT), block.get(COMMIT_CHKSUM_AT + 4..))
            else {
                return false;
            };
            return chksum(chksum(chksum(self.seed, head), &[0; 4]), rest) == stored;
        }
        if self.compat & COMPAT_CHECKSUM != 0 {
            let (kind, size) = (block.get(12).copied(), block.get(13).copied());
            let stored = be32(block, COMMIT_CHKSUM_AT);
            // A commit written before the feature was switched on has neither.
            return (kind == Some(CRC32_TYPE) && size == Some(4) && stored == crc32)
                || (kind == Some(0) && size == Some(0) && stored == 0);
        }
        true
    }

    fn tags(&self, block: &[u8]) -> Result<Vec<Tag>, Ext4Error> {
        let v3 = self.has(feature::CSUM_V3);
        // `journal_tag_bytes`: the 2 bytes more of the second version are a mistake that became the format.
        let len = match (v3, self.has(feature::CSUM_V2), self.has(feature::BIT64)) {
            (true, _, _) => 16,
            (false, v2, wide) => 8 + if v2 { 2 } else { 0 } + if wide { 4 } else { 0 },
        };
        let end = block.len() - if self.checksummed() { 4 } else { 0 };
        let mut tags = Vec::new();
        let mut at = HEADER_LEN;
        loop {
            if at + len > end {
                return Ok(tags);
            }
            let low = be32(block, at);
            let (flags, checksum, high) = if v3 {
                (be32(block, at + 4), be32(block, at + 12), be32(block, at + 8))
            } else {
                let checksum = u32::from(be16(block, at + 4));
                (u32::from(be16(block, at + 6)), checksum, be32(block, at + 8))
            };
            let high = if self.has(feature::BIT64) { high } else { 0 };
            tags.push(Tag { target: u64::from(low) | u64::from(high) << 32, flags, checksum });
            at += len;
            if flags & tag_flag::SAME_UUID == 0 {
                at += 16;
            }
            if flags & tag_flag::LAST != 0 {
                return Ok(tags);
            }
        }
    }

    fn copy(
        &self,
        tag: &Tag,
        at: u32,
        sequence: u32,
        logged: &Logged,
        overlay: &mut HashMap<u64, Copy>,
    ) -> Result<(), Ext4Error> {
        let revoked = logged.get(&tag.target).copied().flatten();
        if revoked.is_some_and(|last| last.wrapping_sub(sequence) as i32 >= 0) {
            return Ok(());
        }
        if tag.target >= self.fs.geometry().blocks_count {
            return Err(bad("it holds a block outside the file system"));
        }
        if self.checksummed() {
            let crc = chksum(chksum(self.seed, &sequence.to_be_bytes()), &self.read(at)?);
            let matches =
                if self.has(feature::CSUM_V3) { crc == tag.checksum } else { crc & 0xFFFF == tag.checksum };
            if !matches {
                return Err(bad("checksum of a logged block does not match"));
            }
        }
        let copy = Copy { block: self.place(at)?, escaped: tag.flags & tag_flag::ESCAPE != 0 };
        overlay.insert(tag.target, copy);
        Ok(())
    }

    fn revoke(&self, block: &[u8], sequence: u32, logged: &mut Logged) -> Result<(), Ext4Error> {
        if self.checksummed() && !self.tail_matches(block) {
            return Err(bad("checksum of a revoke block does not match"));
        }
        let used = be32(block, HEADER_LEN) as usize;
        let room = block.len() - if self.checksummed() { 4 } else { 0 };
        if used < REVOKE_HEADER_LEN || used > room {
            return Err(bad("a revoke block has an impossible length"));
        }
        let wide = self.has(feature::BIT64);
        let len = if wide { 8 } else { 4 };
        for at in (REVOKE_HEADER_LEN..=used.saturating_sub(len)).step_by(len) {
            let target = if wide {
                u64::from(be32(block, at)) << 32 | u64::from(be32(block, at + 4))
            } else {
                u64::from(be32(block, at))
            };
            if let Some(last) = logged.get_mut(&target) {
                *last = Some(sequence);
            }
        }
        Ok(())
    }
}

/// The CRC-32 of the first version (`crc32_be`, polynomial 0x04C11DB7, most significant bit first).
fn crc32_be(seed: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(seed, |mut crc, byte| {
        crc ^= u32::from(*byte) << 24;
        for _ in 0..8 {
            crc = if crc >> 31 == 1 { crc << 1 ^ 0x04C1_1DB7 } else { crc << 1 };
        }
        crc
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{BlankOptions, blank};
    use disk_io::{MemDisk, WriteAt};

    const BLOCK: usize = 4096;

    fn block(kind: u32, sequence: u32, words: &[u32]) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            [MAGIC, kind, sequence].iter().chain(words).flat_map(|word| word.to_be_bytes()).collect();
        bytes.resize(BLOCK, 0);
        bytes
    }

    #[test]
    fn revocations_of_blocks_that_are_not_logged_are_not_kept() {
        let disk = MemDisk::new();
        for (offset, bytes) in blank(16 << 20, &BlankOptions::default()).unwrap() {
            disk.write_all_at(&bytes, offset).unwrap();
        }
        disk.set_len(16 << 20).unwrap();
        let fs = Ext4::open(&disk).unwrap();
        let inode = fs.inode(fs.geometry().journal_inum).unwrap();
        let first = fs.extents(&inode).unwrap()[0].physical_block * BLOCK as u64;
        // One transaction logs blocks 3000 and 3001; fifty revoke the first one and a thousand others each.
        let last_tag = tag_flag::SAME_UUID | tag_flag::LAST;
        let mut log = vec![
            block(block_type::DESCRIPTOR, 1, &[3000, tag_flag::SAME_UUID, 3001, last_tag]),
            vec![b'a'; BLOCK],
            vec![b'b'; BLOCK],
            block(block_type::COMMIT, 1, &[]),
        ];
        for sequence in 2..52 {
            let mut words = vec![16 + 4 * 1001, 3000];
            words.extend((0..1000).map(|i| 100_000 + sequence * 1000 + i));
            log.push(block(block_type::REVOKE, sequence, &words));
            log.push(block(block_type::COMMIT, sequence, &[]));
        }
        for (i, bytes) in log.iter().enumerate() {
            disk.write_all_at(bytes, first + (1 + i as u64) * BLOCK as u64).unwrap();
        }
        for (at, value) in [(0x18u64, 1u32), (0x1C, 1)] {
            disk.write_all_at(&value.to_be_bytes(), first + at).unwrap();
        }
        let fs = Ext4::open(&disk).unwrap();
        let (journal, start, sequence) = open(&fs).unwrap().expect("there is something to replay");
        let (logged, end) = journal.logged(start, sequence).unwrap();
        assert_eq!((logged.len(), end), (2, 52));
        assert_eq!((logged[&3000], logged[&3001]), (Some(51), None));
        let overlay = recover(&fs).unwrap();
        assert!(overlay.get(3000).is_none() && overlay.get(3001).is_some());
    }
}
