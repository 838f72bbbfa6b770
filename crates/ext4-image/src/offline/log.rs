//! The journal of a file system that is not mounted: one transaction is written into it, or it is emptied.
//!
//! ```text
//!   s_first ─► descriptor │ copy of a block … │ commit ─flush─► s_start = s_first ─flush       (needs_recovery: the caller)
//! ```
//!
//! A transaction has the form that the journal's own features ask for (checksums, 64-bit numbers), so that kernel, e2fsck
//! and reader replay it. Its number is the next one of the journal. Called by [`super::grow`] and [`super::replay`].

use super::{flush, write};
use crate::{
    Ext4Error, Place,
    error::JournalFault,
    layout::{
        checksum::{crc32c, crc32c_without},
        journal::{
            BLOCK_TAIL_SIZE, CommitHeader, JBD2_COMMIT_BLOCK, JBD2_DESCRIPTOR_BLOCK, JBD2_MAGIC_NUMBER,
            JBD2_SUPERBLOCK_V2, JournalBlockTag, JournalBlockTag3, JournalHeader, JournalIncompat,
            JournalSuperblock, TagFlags,
        },
        superblock::SUPERBLOCK_OFFSET,
    },
    reader::{Ext4, Extent, Geometry},
};
use disk_io::ReadAt;
use disk_io::WriteAt;
use std::mem::offset_of;
use zerocopy::{FromZeros, IntoBytes};

/// Bytes of the journal's super block that change: one sector, with its checksum.
const CHANGING: usize = 512;
const _: () = assert!(offset_of!(JournalSuperblock, s_checksum) + 4 <= CHANGING);

/// The byte of the primary super block in its block.
pub(super) fn superblock_in_block(geometry: &Geometry) -> usize {
    (SUPERBLOCK_OFFSET % u64::from(geometry.block_size)) as usize
}

/// The journal.
pub(super) struct Log {
    inode: u32,
    block_size: u64,
    extents: Vec<Extent>,
    pub(super) superblock: JournalSuperblock,
}

impl Log {
    /// Opens the journal of `fs`.
    pub(super) fn open<R: ReadAt>(fs: &Ext4<R>) -> Result<Self, Ext4Error> {
        let inode = fs.geometry().journal_inum;
        if inode == 0 {
            return Err(Ext4Error::unsupported("a journal on another disk", Place::default()));
        }
        let extents = fs.extents(&fs.inode(inode)?)?;
        let block_size = u64::from(fs.geometry().block_size);
        let mut log = Self { inode, block_size, extents, superblock: JournalSuperblock::new_zeroed() };
        let at = log.place(0)?;
        fs.source.read(at, log.superblock.as_mut_bytes())?;
        if log.superblock.s_header.h_magic.get() != JBD2_MAGIC_NUMBER {
            return Err(Ext4Error::corrupt(JournalFault::Magic, Place::inode(inode)));
        }
        Ok(log)
    }

    /// The byte of the disk at which block `number` of the journal begins.
    fn place(&self, number: u32) -> Result<u64, Ext4Error> {
        let inside = |e: &&Extent| number >= e.logical_block && number - e.logical_block < e.blocks;
        match self.extents.iter().find(inside) {
            Some(e) if !e.unwritten => {
                Ok((e.physical_block + u64::from(number - e.logical_block)) * self.block_size)
            }
            _ => Err(Ext4Error::corrupt(JournalFault::Hole, Place::inode(self.inode))),
        }
    }

    fn has(&self, feature: JournalIncompat) -> bool {
        JournalIncompat::from_bits_retain(self.superblock.s_feature_incompat.get()).contains(feature)
    }

    fn checksummed(&self) -> bool {
        self.has(JournalIncompat::JBD2_FEATURE_INCOMPAT_CSUM_V2)
            || self.has(JournalIncompat::JBD2_FEATURE_INCOMPAT_CSUM_V3)
    }

    fn seed(&self) -> u32 {
        crc32c(!0, &self.superblock.s_uuid)
    }

    /// Writes the changed super block, which is one sector.
    pub(super) fn write_superblock<D: WriteAt>(&mut self, disk: &D) -> Result<(), Ext4Error> {
        if self.checksummed() {
            let at = offset_of!(JournalSuperblock, s_checksum);
            let sum = crc32c_without(!0, self.superblock.as_bytes(), at, 4);
            self.superblock.s_checksum.set(sum);
        }
        write(disk, &self.superblock.as_bytes()[..CHANGING], self.place(0)?)?;
        flush(disk)
    }

    /// Empties the log. The next transaction gets a number that none of those in the log can have.
    pub(super) fn clear<D: WriteAt>(mut self, disk: &D) -> Result<(), Ext4Error> {
        let next = self.superblock.s_sequence.get().wrapping_add(self.superblock.s_maxlen.get());
        self.superblock.s_sequence.set(next);
        self.superblock.s_start.set(0);
        self.write_superblock(disk)
    }

    /// Writes a transaction with the new content of `blocks`, durably, and lets the log begin with it. It takes effect once
    /// the file system is marked as needing recovery.
    pub(super) fn commit<D: WriteAt>(mut self, disk: &D, blocks: &[(u64, Vec<u8>)]) -> Result<(), Ext4Error> {
        if self.superblock.s_header.h_blocktype.get() != JBD2_SUPERBLOCK_V2 {
            return Err(Ext4Error::unsupported("a journal of the first version", Place::inode(self.inode)));
        }
        let (first, sequence) = (self.superblock.s_first.get(), self.superblock.s_sequence.get());
        let mut at = first + 1;
        let mut tags = Vec::new();
        for (n, (target, bytes)) in blocks.iter().enumerate() {
            let mut copy = bytes.clone();
            let mut flags = TagFlags::JBD2_FLAG_SAME_UUID;
            if copy.starts_with(&JBD2_MAGIC_NUMBER.to_be_bytes()) {
                copy[..4].fill(0);
                flags |= TagFlags::JBD2_FLAG_ESCAPE;
            }
            if n + 1 == blocks.len() {
                flags |= TagFlags::JBD2_FLAG_LAST_TAG;
            }
            self.tag(&mut tags, *target, flags, sequence, &copy);
            write(disk, &copy, self.place(at)?)?;
            at += 1;
        }
        let header = JournalHeader::new(JBD2_DESCRIPTOR_BLOCK, sequence);
        let mut descriptor = header.as_bytes().to_vec();
        descriptor.extend(tags);
        if descriptor.len() + BLOCK_TAIL_SIZE > self.block_size as usize {
            return Err(Ext4Error::usage("a transaction of more blocks than one descriptor holds"));
        }
        descriptor.resize(self.block_size as usize, 0);
        if self.checksummed() {
            let sum = crc32c(self.seed(), &descriptor);
            let end = descriptor.len() - BLOCK_TAIL_SIZE;
            descriptor[end..].copy_from_slice(&sum.to_be_bytes());
        }
        write(disk, &descriptor, self.place(first)?)?;
        let mut commit = vec![0; self.block_size as usize];
        let header = JournalHeader::new(JBD2_COMMIT_BLOCK, sequence);
        commit[..header.as_bytes().len()].copy_from_slice(header.as_bytes());
        if self.checksummed() {
            let sum = crc32c(self.seed(), &commit);
            commit[offset_of!(CommitHeader, h_chksum)..][..4].copy_from_slice(&sum.to_be_bytes());
        }
        write(disk, &commit, self.place(at)?)?;
        flush(disk)?;
        self.superblock.s_start.set(first);
        self.write_superblock(disk)
    }

    /// Appends the tag of one block.
    fn tag(&self, tags: &mut Vec<u8>, target: u64, flags: TagFlags, sequence: u32, copy: &[u8]) {
        let sum = crc32c(crc32c(self.seed(), &sequence.to_be_bytes()), copy);
        let high = (target >> 32) as u32;
        if self.has(JournalIncompat::JBD2_FEATURE_INCOMPAT_CSUM_V3) {
            let mut tag = JournalBlockTag3::new_zeroed();
            tag.t_blocknr.set(target as u32);
            tag.t_blocknr_high.set(high);
            tag.t_flags.set(flags.bits());
            tag.t_checksum.set(sum);
            tags.extend_from_slice(tag.as_bytes());
            return;
        }
        let mut tag = JournalBlockTag::new_zeroed();
        tag.t_blocknr.set(target as u32);
        tag.t_blocknr_high.set(high);
        tag.t_flags.set(flags.bits() as u16);
        let old_checksum = self.has(JournalIncompat::JBD2_FEATURE_INCOMPAT_CSUM_V2);
        if old_checksum {
            tag.t_checksum.set(sum as u16);
        }
        let wide = self.has(JournalIncompat::JBD2_FEATURE_INCOMPAT_64BIT);
        let len = if wide { size_of_val(&tag) } else { offset_of!(JournalBlockTag, t_blocknr_high) };
        tags.extend_from_slice(&tag.as_bytes()[..len]);
        if old_checksum {
            // `journal_tag_bytes`: two bytes more, which have no meaning.
            tags.extend([0; 2]);
        }
    }
}
