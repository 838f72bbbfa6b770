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
//! that are not logged change nothing and are not kept. A wrong checksum of a copy in a committed transaction is
//! corruption; a commit block that is missing or wrong ends the log, as in the kernel. Orphan inodes are ignored: an
//! unlinked one cannot be reached, and a truncate in progress leaves a readable file. Called by [`super::Ext4::open`].

use super::{
    Ext4,
    extent::Extent,
    overlay::{Copy, Overlay},
};
use crate::{
    Ext4Error, Place,
    error::JournalFault,
    layout::{
        checksum::{CRC32_BE, crc32c, crc32c_without},
        journal::{
            BLOCK_TAIL_SIZE, CommitHeader, JBD2_COMMIT_BLOCK, JBD2_CRC32_CHKSUM, JBD2_CRC32_CHKSUM_SIZE,
            JBD2_DESCRIPTOR_BLOCK, JBD2_MAGIC_NUMBER, JBD2_REVOKE_BLOCK, JBD2_SUPERBLOCK_V1,
            JBD2_SUPERBLOCK_V2, JournalBlockTag, JournalBlockTag3, JournalCompat, JournalHeader,
            JournalIncompat, JournalSuperblock, RevokeHeader, TAG_UUID_SIZE, TagFlags,
        },
    },
};
use disk_io::ReadAt;
use std::{collections::HashMap, mem::offset_of};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// The incompatible features that recovery understands; fast commits are not among them.
const KNOWN: JournalIncompat = JournalIncompat::JBD2_FEATURE_INCOMPAT_REVOKE
    .union(JournalIncompat::JBD2_FEATURE_INCOMPAT_64BIT)
    .union(JournalIncompat::JBD2_FEATURE_INCOMPAT_ASYNC_COMMIT)
    .union(CHECKSUMS);
/// Two kinds of checksums, of which a journal has at most one.
const CHECKSUMS: JournalIncompat =
    JournalIncompat::JBD2_FEATURE_INCOMPAT_CSUM_V2.union(JournalIncompat::JBD2_FEATURE_INCOMPAT_CSUM_V3);

/// Most blocks of a journal: the most that mke2fs makes. Its extents may name one block of the disk many times, so the
/// size of the disk is no bound.
const MAX_BLOCKS: u32 = 10_240_000;

/// A broken rule of the journal as a whole.
fn bad(inode: u32, fault: JournalFault) -> Ext4Error {
    Ext4Error::corrupt(fault, Place::inode(inode))
}

/// The journal, opened.
struct Journal<'a, R> {
    fs: &'a Ext4<R>,
    inode: u32,
    extents: Vec<Extent>,
    first: u32,
    end: u32,
    incompat: JournalIncompat,
    compat: JournalCompat,
    seed: u32,
}

/// One tag of a descriptor.
struct Tag {
    target: u64,
    flags: TagFlags,
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
        return Err(Ext4Error::unsupported("a journal on another disk", Place::default()));
    }
    let bad = |fault| Err(bad(inum, fault));
    let inode = fs.inode(inum)?;
    let extents = fs.extents(&inode)?;
    let block_size = fs.geometry().block_size;
    let Ok(blocks) = u32::try_from(inode.size / u64::from(block_size)) else {
        return bad(JournalFault::TooLong);
    };
    if blocks > MAX_BLOCKS {
        let what = format!("a journal of {blocks} blocks (at most {MAX_BLOCKS})");
        return Err(Ext4Error::unsupported(what, Place::inode(inum)));
    }
    let mut journal = Journal {
        fs,
        inode: inum,
        extents,
        first: 0,
        end: blocks,
        incompat: JournalIncompat::empty(),
        compat: JournalCompat::empty(),
        seed: 0,
    };
    let mut sb = JournalSuperblock::new_zeroed();
    fs.source.read(journal.place(0)? * u64::from(block_size), sb.as_mut_bytes())?;
    if sb.s_header.h_magic.get() != JBD2_MAGIC_NUMBER {
        return bad(JournalFault::Magic);
    }
    match sb.s_header.h_blocktype.get() {
        JBD2_SUPERBLOCK_V1 => {}
        JBD2_SUPERBLOCK_V2 => {
            journal.compat = JournalCompat::from_bits_retain(sb.s_feature_compat.get());
            journal.incompat = JournalIncompat::from_bits_retain(sb.s_feature_incompat.get());
        }
        _ => return bad(JournalFault::Type),
    }
    let unknown = journal.incompat.difference(KNOWN).bits();
    if unknown != 0 {
        let what = format!("journal feature bits {unknown:#x}");
        return Err(Ext4Error::unsupported(what, Place::inode(inum)));
    }
    if journal.incompat.contains(CHECKSUMS) {
        return bad(JournalFault::TwoChecksums);
    }
    if journal.checksummed() {
        let sum = crc32c_without(!0, sb.as_bytes(), offset_of!(JournalSuperblock, s_checksum), 4);
        if sum != sb.s_checksum.get() {
            return bad(JournalFault::SuperblockChecksum);
        }
        journal.seed = crc32c(!0, &sb.s_uuid);
    }
    journal.first = sb.s_first.get();
    journal.end = sb.s_maxlen.get();
    if sb.s_blocksize.get() != block_size {
        return bad(JournalFault::BlockSize);
    }
    if journal.end > blocks || journal.first == 0 || journal.first >= journal.end {
        return bad(JournalFault::Bounds);
    }
    let start = sb.s_start.get();
    if start == 0 {
        return Ok(None);
    }
    if start < journal.first || start >= journal.end {
        return bad(JournalFault::Start);
    }
    Ok(Some((journal, start, sb.s_sequence.get())))
}

/// The blocks that are logged, and the last transaction that revoked each.
type Logged = HashMap<u64, Option<u32>>;

/// What one pass does with the blocks of the log.
enum Pass<'a> {
    Scan(&'a mut Logged),
    Revoke(&'a mut Logged),
    Replay(&'a Logged, &'a mut Overlay),
}

impl<R: ReadAt> Journal<'_, R> {
    fn replay(&self, start: u32, sequence: u32) -> Result<Overlay, Ext4Error> {
        let (logged, end) = self.logged(start, sequence)?;
        let mut overlay = Overlay::default();
        self.pass(start, sequence, Some(end), &mut Pass::Replay(&logged, &mut overlay))?;
        Ok(overlay)
    }

    /// The blocks that are logged with their revocations, and the number after the last complete transaction.
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
            _ => Err(bad(self.inode, JournalFault::Hole)),
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

    fn has(&self, feature: JournalIncompat) -> bool {
        self.incompat.contains(feature)
    }

    fn checksummed(&self) -> bool {
        self.incompat.intersects(CHECKSUMS)
    }

    /// A broken rule in block `number` of the journal.
    fn bad_block(&self, number: u32, fault: JournalFault) -> Ext4Error {
        let place = Place::inode(self.inode);
        Ext4Error::corrupt(fault, self.place(number).map_or(place, |block| place.at_block(block)))
    }

    /// Walks the log from `at`; gives the sequence number after the last complete transaction.
    fn pass(&self, mut at: u32, first: u32, end: Option<u32>, pass: &mut Pass<'_>) -> Result<u32, Ext4Error> {
        let mut sequence = first;
        // A log that goes round more than once would overwrite its own start.
        let mut budget = self.end - self.first;
        let mut crc32 = CRC32_BE.digest();
        while end != Some(sequence) && budget > 0 {
            budget -= 1;
            let block = self.read(at)?;
            let Ok((header, _)) = JournalHeader::ref_from_prefix(&block) else { break };
            if header.h_magic.get() != JBD2_MAGIC_NUMBER || header.h_sequence.get() != sequence {
                break;
            }
            match header.h_blocktype.get() {
                JBD2_DESCRIPTOR_BLOCK => {
                    if self.checksummed() && !self.tail_matches(&block) {
                        // The kernel takes this for the end of the log while it scans.
                        if matches!(pass, Pass::Scan(_)) {
                            break;
                        }
                        return Err(self.bad_block(at, JournalFault::DescriptorChecksum));
                    }
                    let tags = self.tags(&block);
                    let check_v1 = matches!(pass, Pass::Scan(_))
                        && self.compat.contains(JournalCompat::JBD2_FEATURE_COMPAT_CHECKSUM);
                    if check_v1 {
                        crc32.update(&block);
                    }
                    for tag in tags {
                        at = self.next(at);
                        budget = budget.saturating_sub(1);
                        if budget == 0 {
                            break;
                        }
                        if check_v1 {
                            crc32.update(&self.read(at)?);
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
                JBD2_COMMIT_BLOCK => {
                    let sum = std::mem::replace(&mut crc32, CRC32_BE.digest()).finalize();
                    if matches!(pass, Pass::Scan(_)) && !self.commit_matches(&block, sum) {
                        break;
                    }
                    sequence = sequence.wrapping_add(1);
                    at = self.next(at);
                }
                JBD2_REVOKE_BLOCK => {
                    if let Pass::Revoke(logged) = pass {
                        self.revoke(&block, at, sequence, logged)?;
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
        let Some((covered, stored)) = block.split_last_chunk::<BLOCK_TAIL_SIZE>() else { return false };
        crc32c(crc32c(self.seed, covered), &[0; BLOCK_TAIL_SIZE]) == u32::from_be_bytes(*stored)
    }

    /// Checks a commit block; `crc32` is that of its transaction.
    fn commit_matches(&self, block: &[u8], crc32: u32) -> bool {
        let Ok((commit, _)) = CommitHeader::ref_from_prefix(block) else { return false };
        let stored = commit.h_chksum.get();
        if self.checksummed() {
            return crc32c_without(self.seed, block, offset_of!(CommitHeader, h_chksum), 4) == stored;
        }
        if self.compat.contains(JournalCompat::JBD2_FEATURE_COMPAT_CHECKSUM) {
            return match (commit.h_chksum_type, commit.h_chksum_size) {
                (JBD2_CRC32_CHKSUM, JBD2_CRC32_CHKSUM_SIZE) => stored == crc32,
                // A commit written before the feature was switched on has no checksum.
                (0, 0) => stored == 0,
                _ => false,
            };
        }
        true
    }

    /// Reads the tag at the start of `bytes`; gives its length too.
    fn tag(&self, bytes: &[u8]) -> Option<(Tag, usize)> {
        let wide = self.has(JournalIncompat::JBD2_FEATURE_INCOMPAT_64BIT);
        let (low, high, flags, checksum, len);
        if self.has(JournalIncompat::JBD2_FEATURE_INCOMPAT_CSUM_V3) {
            let (tag, _) = JournalBlockTag3::ref_from_prefix(bytes).ok()?;
            (low, high) = (tag.t_blocknr.get(), tag.t_blocknr_high.get());
            (flags, checksum, len) = (tag.t_flags.get(), tag.t_checksum.get(), size_of::<JournalBlockTag3>());
        } else {
            // `journal_tag_bytes`: the 2 bytes more of the second version are a mistake that became the format.
            let more = if self.has(JournalIncompat::JBD2_FEATURE_INCOMPAT_CSUM_V2) { 2 } else { 0 };
            len = offset_of!(JournalBlockTag, t_blocknr_high) + if wide { 4 } else { 0 } + more;
            // The last tag may be shorter than the structure, whose end is the block's then.
            let mut tag = JournalBlockTag::new_zeroed();
            let stored = bytes.get(..len)?;
            let n = stored.len().min(size_of::<JournalBlockTag>());
            tag.as_mut_bytes()[..n].copy_from_slice(&stored[..n]);
            (low, high) = (tag.t_blocknr.get(), tag.t_blocknr_high.get());
            (flags, checksum) = (u32::from(tag.t_flags.get()), u32::from(tag.t_checksum.get()));
        }
        let target = u64::from(low) | if wide { u64::from(high) << 32 } else { 0 };
        Some((Tag { target, flags: TagFlags::from_bits_retain(flags), checksum }, len))
    }

    /// The tags of a descriptor.
    fn tags(&self, block: &[u8]) -> Vec<Tag> {
        let end = block.len() - if self.checksummed() { BLOCK_TAIL_SIZE } else { 0 };
        let mut rest = block.get(size_of::<JournalHeader>()..end).unwrap_or(&[]);
        let mut tags = Vec::new();
        while let Some((tag, len)) = self.tag(rest) {
            let uuid = if tag.flags.contains(TagFlags::JBD2_FLAG_SAME_UUID) { 0 } else { TAG_UUID_SIZE };
            let last = tag.flags.contains(TagFlags::JBD2_FLAG_LAST_TAG);
            tags.push(tag);
            rest = rest.get(len + uuid..).unwrap_or(&[]);
            if last {
                break;
            }
        }
        tags
    }

    fn copy(
        &self,
        tag: &Tag,
        at: u32,
        sequence: u32,
        logged: &Logged,
        overlay: &mut Overlay,
    ) -> Result<(), Ext4Error> {
        let revoked = logged.get(&tag.target).copied().flatten();
        if revoked.is_some_and(|last| last.wrapping_sub(sequence) as i32 >= 0) {
            return Ok(());
        }
        if tag.target >= self.fs.geometry().blocks_count {
            return Err(self.bad_block(at, JournalFault::TargetOutside));
        }
        if self.checksummed() {
            let crc = crc32c(crc32c(self.seed, &sequence.to_be_bytes()), &self.read(at)?);
            let v3 = self.has(JournalIncompat::JBD2_FEATURE_INCOMPAT_CSUM_V3);
            if tag.checksum != if v3 { crc } else { crc & 0xFFFF } {
                return Err(self.bad_block(at, JournalFault::TargetChecksum));
            }
        }
        let escaped = tag.flags.contains(TagFlags::JBD2_FLAG_ESCAPE);
        overlay.insert(tag.target, Copy { block: self.place(at)?, escaped });
        Ok(())
    }

    fn revoke(&self, block: &[u8], at: u32, sequence: u32, logged: &mut Logged) -> Result<(), Ext4Error> {
        if self.checksummed() && !self.tail_matches(block) {
            return Err(self.bad_block(at, JournalFault::RevokeChecksum));
        }
        let room = block.len() - if self.checksummed() { BLOCK_TAIL_SIZE } else { 0 };
        let used = match RevokeHeader::ref_from_prefix(block) {
            Ok((header, _)) if header.r_count.get() as usize <= room => {
                block.get(size_of::<RevokeHeader>()..header.r_count.get() as usize)
            }
            _ => None,
        };
        let Some(used) = used else {
            return Err(self.bad_block(at, JournalFault::RevokeLength));
        };
        let wide = self.has(JournalIncompat::JBD2_FEATURE_INCOMPAT_64BIT);
        for number in used.chunks_exact(if wide { 8 } else { 4 }) {
            let target = number.iter().fold(0, |target, byte| target << 8 | u64::from(*byte));
            if let Some(last) = logged.get_mut(&target) {
                *last = Some(sequence);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{BlankOptions, blank};
    use disk_io::{MemDisk, WriteAt};

    const BLOCK: usize = 4096;

    fn block(kind: u32, sequence: u32, words: &[u32]) -> Vec<u8> {
        let mut bytes: Vec<u8> = [JBD2_MAGIC_NUMBER, kind, sequence]
            .iter()
            .chain(words)
            .flat_map(|word| word.to_be_bytes())
            .collect();
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
        let same_uuid = TagFlags::JBD2_FLAG_SAME_UUID.bits();
        let last_tag = same_uuid | TagFlags::JBD2_FLAG_LAST_TAG.bits();
        let mut log = vec![
            block(JBD2_DESCRIPTOR_BLOCK, 1, &[3000, same_uuid, 3001, last_tag]),
            vec![b'a'; BLOCK],
            vec![b'b'; BLOCK],
            block(JBD2_COMMIT_BLOCK, 1, &[]),
        ];
        for sequence in 2..52 {
            let mut words = vec![16 + 4 * 1001, 3000];
            words.extend((0..1000).map(|i| 100_000 + sequence * 1000 + i));
            log.push(block(JBD2_REVOKE_BLOCK, sequence, &words));
            log.push(block(JBD2_COMMIT_BLOCK, sequence, &[]));
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
