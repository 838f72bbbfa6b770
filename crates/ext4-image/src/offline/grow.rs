//! Makes a file system larger.
//!
//! ```text
//!   old groups                  │ old last group   │ new groups: ┌ head │ bitmaps │ inode table (zeros) │ free … ┐ … last
//!   nothing is moved            │ longer, if short │             └ descriptor in its block
//!
//!   descriptors  old file system: blocks behind the super block, and from the next block on where meta_bg has them:
//!                in the first block of the first group of 64, which is a new one          (s_first_meta_bg)
//!                new one: in meta_bg's places from the beginning
//! ```
//!
//! New groups are not in use until the super block counts them, so they are written first. If the old last group was
//! full, the super block is all that changes then: one sector. Otherwise that group's bitmap and descriptor change with it,
//! which the journal makes one step.
//!
//! Of a new group only the descriptor is written: bitmaps are made by the kernel when it uses the group (BLOCK_UNINIT,
//! INODE_UNINIT), except that of the last one. Copies of the super block are kept up to date where a valid one is; blanks
//! have none. Called by `layer grow`, `layer clone` and the agent.

use super::{flush, log, log::Log, replay::replay, superblock, write};
use crate::{
    Ext4Error, Place,
    error::GroupFault,
    layout::{
        checksum::crc32c,
        group::{GroupDesc, GroupFlags, desc_checksum},
        superblock::{
            Compat, EXT4_ERROR_FS, EXT4_SUPER_MAGIC, Incompat, RoCompat, SUPERBLOCK_OFFSET, SUPERBLOCK_SIZE,
            Superblock,
        },
    },
    reader::{Ext4, Geometry},
};
use disk_io::WriteAt;
use std::ops::Range;
use zerocopy::{FromBytes, IntoBytes};

/// Free blocks that the last group must have at least, or it is left out (`mke2fs`).
const LEAST_FREE: u64 = 50;
/// Zeros written at a time, in bytes.
const ZEROS: usize = 1 << 20;

/// How to grow.
#[derive(Debug, Clone, Default)]
pub struct GrowOptions {
    /// Byte ranges of the disk, ascending, behind the file system that may not be zeros.
    pub dirty: Vec<Range<u64>>,
    /// The disk is a new file that nobody uses before it is complete: a cut need not leave the old size. A file system
    /// without a journal whose last group is not full grows only so.
    pub unfinished: bool,
}

/// What has grown; sizes of the file system in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grown {
    /// Size before.
    pub old_bytes: u64,
    /// Size afterwards: at most what was asked for.
    pub new_bytes: u64,
    /// Groups before and afterwards.
    pub groups: (u32, u32),
    /// A journal was replayed before.
    pub replayed: bool,
}

/// Lets the file system on `disk` grow to `bytes`, durably. A last group that would have almost no room is left out. If it is
/// that large already, nothing changes.
///
/// # Errors
/// `Usage`: `bytes` is less than the file system has, or more than the disk. `Unsupported`: no metadata checksums, reserved
/// descriptors (resize_inode), errors that a kernel recorded, a short last group without a journal. `Corrupt`, `Io`.
pub fn grow<D: WriteAt>(disk: &D, bytes: u64, options: &GrowOptions) -> Result<Grown, Ext4Error> {
    let replayed = replay(disk)?.was_dirty;
    let fs = Ext4::open(disk)?;
    let old_sb = superblock::read(disk)?;
    refuse(&fs, &old_sb)?;
    let size = disk.size().map_err(|e| Ext4Error::io("asking for the disk's size", Place::default(), e))?;
    if bytes > size {
        return Err(Ext4Error::usage(format!(
            "the disk has {size} bytes, fewer than the {bytes} that the file system is to have"
        )));
    }
    let old = fs.geometry();
    let block_size = u64::from(old.block_size);
    let old_bytes = old.blocks_count * block_size;
    if bytes < old_bytes {
        return Err(Ext4Error::usage(format!(
            "the file system has {old_bytes} bytes already; it cannot shrink to {bytes}"
        )));
    }
    let new = grown(old, bytes / block_size)?;
    let done = |new: &Geometry| Grown {
        old_bytes,
        new_bytes: new.blocks_count * block_size,
        groups: (old.groups, new.groups),
        replayed,
    };
    if new.blocks_count <= old.blocks_count {
        return Ok(done(old));
    }
    let last = LastGroup::of(&fs, &new)?;
    let journal = if last.is_some() && !options.unfinished {
        if !old.has_journal() {
            return Err(Ext4Error::unsupported(
                "a file system without a journal whose last group is not full; mount it and use resize2fs",
                Place::group(old.groups - 1),
            ));
        }
        Some(Log::open(&fs)?)
    } else {
        None
    };

    let copies = has_copies(disk, old)?;
    let added = new_groups(disk, &new, old.groups, copies, &options.dirty)?;
    flush(disk)?;
    let sb = new_superblock(&fs, &old_sb, &new, added + last.as_ref().map_or(0, |last| last.added));
    match (last, journal) {
        (None, _) => {
            superblock::commit(disk, &old_sb, sb)?;
        }
        (Some(last), None) => {
            for (block, bytes) in last.blocks(disk, old)? {
                write(disk, &bytes, block * block_size)?;
            }
            superblock::commit(disk, &old_sb, sb)?;
        }
        (Some(last), Some(journal)) => {
            let marked = |sb: &Superblock| {
                let mut sb = *sb;
                let flags = sb.incompat() | Incompat::EXT4_FEATURE_INCOMPAT_RECOVER;
                sb.s_feature_incompat.set(flags.bits());
                sb.seal();
                sb
            };
            let mut blocks = last.blocks(disk, old)?;
            let first = u64::from(old.first_data_block);
            let mut block = vec![0; block_size as usize];
            fs.source.read(first * block_size, &mut block)?;
            let at = log::superblock_in_block(old);
            block[at..at + SUPERBLOCK_SIZE].copy_from_slice(marked(&sb).as_bytes());
            blocks.push((first, block));
            journal.commit(disk, &blocks)?;
            superblock::commit(disk, &old_sb, marked(&old_sb))?;
            replay(disk)?;
        }
    }
    if copies {
        refresh_copies(disk, &new)?;
    }
    Ok(done(&new))
}

/// Refuses what this module does not know how to enlarge.
fn refuse<D: WriteAt>(fs: &Ext4<&D>, sb: &Superblock) -> Result<(), Ext4Error> {
    let geometry = fs.geometry();
    let unsupported = |what: &str| Err(Ext4Error::unsupported(what, Place::offset(SUPERBLOCK_OFFSET)));
    if !geometry.metadata_csum() {
        return unsupported("growing a file system without metadata checksums; mount it and use resize2fs");
    }
    if geometry.has_compat(Compat::EXT4_FEATURE_COMPAT_RESIZE_INODE) || sb.s_reserved_gdt_blocks.get() != 0 {
        return unsupported(
            "growing a file system with reserved descriptors (resize_inode); mount it and use resize2fs",
        );
    }
    if sb.s_state.get() & EXT4_ERROR_FS != 0 || sb.s_error_count.get() != 0 {
        return unsupported("a file system with errors that a kernel recorded; run e2fsck first");
    }
    if geometry.has_ro(RoCompat::EXT4_FEATURE_RO_COMPAT_READONLY) {
        return unsupported(
            "growing a read-only file system; `layer clone --writable` makes a writable copy",
        );
    }
    Ok(())
}

/// The shape with `blocks` blocks, or somewhat fewer.
fn grown(old: &Geometry, blocks: u64) -> Result<Geometry, Ext4Error> {
    let too_large = |what: String| Ext4Error::usage(what);
    let mut new = old.clone();
    new.blocks_count = blocks;
    let is_64bit = old.has(Incompat::EXT4_FEATURE_INCOMPAT_64BIT);
    if !is_64bit && blocks > u64::from(u32::MAX) {
        return Err(too_large(format!("{blocks} blocks need the feature 64bit")));
    }
    let first = u64::from(old.first_data_block);
    let groups = (blocks - first).div_ceil(u64::from(old.blocks_per_group));
    let inodes = groups.checked_mul(u64::from(old.inodes_per_group)).and_then(|n| u32::try_from(n).ok());
    let (Ok(groups), Some(inodes)) = (u32::try_from(groups), inodes) else {
        return Err(too_large(format!("{blocks} blocks: more than 2^32 inodes")));
    };
    (new.groups, new.inodes_count) = (groups, inodes);
    if !old.has(Incompat::EXT4_FEATURE_INCOMPAT_META_BG)
        && new.plain_descriptor_blocks() > old.plain_descriptor_blocks()
    {
        new.first_meta_bg = old.plain_descriptor_blocks();
        new.s_feature_incompat |= Incompat::EXT4_FEATURE_INCOMPAT_META_BG;
    }
    let last = new.groups - 1;
    if last >= old.groups && u64::from(new.group_blocks(last)) < fixed_blocks(&new, last) + LEAST_FREE {
        // At least the group before it is whole.
        return grown(old, new.group_first_block(last));
    }
    Ok(new)
}

/// Blocks of a new group that are in use.
fn fixed_blocks(geometry: &Geometry, group: u32) -> u64 {
    geometry.group_head_blocks(group) + 2 + u64::from(geometry.inode_table_blocks())
}

/// The old last group, if it was short, in its new form.
struct LastGroup {
    group: u32,
    desc: GroupDesc,
    bitmap: Vec<u8>,
    /// Free blocks that it has more.
    added: u64,
}

impl LastGroup {
    fn of<D: WriteAt>(fs: &Ext4<&D>, new: &Geometry) -> Result<Option<Self>, Ext4Error> {
        let old = fs.geometry();
        let group = old.groups - 1;
        let (before, after) = (old.group_blocks(group), new.group_blocks(group));
        if before == after {
            return Ok(None);
        }
        let added = after - before;
        let mut desc = fs.group(group)?;
        let bad = |fault| Ext4Error::corrupt(fault, Place::group(group));
        if desc.flags().contains(GroupFlags::EXT4_BG_BLOCK_UNINIT) {
            return Err(bad(GroupFault::LastUninit));
        }
        if !old.holds(desc.block_bitmap(), 1) {
            return Err(bad(GroupFault::PlacesOutside));
        }
        let mut bitmap = fs.source.block(desc.block_bitmap())?.to_vec();
        let covered = old.blocks_per_group as usize / 8;
        for bit in before..after {
            bitmap[bit as usize / 8] &= !(1 << (bit % 8));
        }
        desc.set_free_blocks(desc.free_blocks() + added);
        desc.set_block_bitmap_csum(crc32c(old.checksum_seed, &bitmap[..covered]));
        Ok(Some(Self { group, desc, bitmap, added: added.into() }))
    }

    /// Its bitmap, and the block of descriptors as it is on the disk now, with its own changed: it may hold those of new
    /// groups.
    fn blocks<D: WriteAt>(self, disk: &D, geometry: &Geometry) -> Result<Vec<(u64, Vec<u8>)>, Ext4Error> {
        let (block, at) = geometry.descriptor_place(self.group);
        let mut descriptors = vec![0; geometry.block_size as usize];
        let offset = block * u64::from(geometry.block_size);
        disk.read_exact_at(&mut descriptors, offset)
            .map_err(|e| Ext4Error::io("reading descriptors", Place::offset(offset), e))?;
        put(&mut descriptors, at, &self.desc, geometry, self.group);
        Ok(vec![(self.desc.block_bitmap(), self.bitmap), (block, descriptors)])
    }
}

/// Puts a descriptor with its checksum into its block.
fn put(block: &mut [u8], at: usize, desc: &GroupDesc, geometry: &Geometry, group: u32) {
    let len = usize::from(geometry.desc_size).min(size_of::<GroupDesc>());
    let slot = &mut block[at..at + usize::from(geometry.desc_size)];
    slot[..len].copy_from_slice(&desc.as_bytes()[..len]);
    let sum = desc_checksum(geometry.checksum_seed, group, slot);
    let place = std::mem::offset_of!(GroupDesc, bg_checksum);
    slot[place..place + 2].copy_from_slice(&sum.to_le_bytes());
}

/// Writes the new groups, without a flush; returns the number of their free blocks.
fn new_groups<D: WriteAt>(
    disk: &D,
    geometry: &Geometry,
    first_new: u32,
    copies: bool,
    dirty: &[Range<u64>],
) -> Result<u64, Ext4Error> {
    let block_size = u64::from(geometry.block_size);
    let per_block = geometry.descriptors_per_block();
    let table = u64::from(geometry.inode_table_blocks());
    let mut free_blocks = 0;
    let mut group = first_new;
    while group < geometry.groups {
        let begin = group;
        let end = ((group / per_block + 1) * per_block).min(geometry.groups);
        let mut slots = vec![0; (end - begin) as usize * usize::from(geometry.desc_size)];
        for number in begin..end {
            let head = geometry.group_first_block(number) + geometry.group_head_blocks(number);
            let free = u64::from(geometry.group_blocks(number)) - fixed_blocks(geometry, number);
            free_blocks += free;
            let mut desc = GroupDesc::from_slot(&[]);
            desc.set_places(head, head + 1, head + 2);
            desc.set_free_blocks(free as u32);
            desc.set_free_inodes(geometry.inodes_per_group);
            desc.set_itable_unused(geometry.inodes_per_group);
            let mut flags = GroupFlags::EXT4_BG_INODE_ZEROED | GroupFlags::EXT4_BG_INODE_UNINIT;
            if number + 1 < geometry.groups {
                flags |= GroupFlags::EXT4_BG_BLOCK_UNINIT;
            } else {
                let bits = bitmap(geometry, number);
                let covered = geometry.blocks_per_group as usize / 8;
                desc.set_block_bitmap_csum(crc32c(geometry.checksum_seed, &bits[..covered]));
                write(disk, &bits, head * block_size)?;
            }
            desc.bg_flags.set(flags.bits());
            let at = (number - begin) as usize * usize::from(geometry.desc_size);
            put(&mut slots, at, &desc, geometry, number);
            clear(disk, (head + 2) * block_size..(head + 2 + table) * block_size, dirty)?;
        }
        let (block, at) = geometry.descriptor_place(begin);
        write(disk, &slots, block * block_size + at as u64)?;
        if copies && geometry.in_meta_group(begin) {
            let first = begin / per_block * per_block;
            for copy in [first + 1, first + per_block - 1].into_iter().filter(|g| *g < geometry.groups) {
                let place = geometry.group_first_block(copy) + u64::from(geometry.group_has_super(copy));
                write(disk, &slots, place * block_size + at as u64)?;
            }
        }
        group = end;
    }
    Ok(free_blocks)
}

/// The block bitmap of a new group.
fn bitmap(geometry: &Geometry, group: u32) -> Vec<u8> {
    let mut bits = vec![0; geometry.block_size as usize];
    let (used, blocks) = (fixed_blocks(geometry, group) as usize, geometry.group_blocks(group) as usize);
    for bit in (0..used).chain(blocks..bits.len() * 8) {
        bits[bit / 8] |= 1 << (bit % 8);
    }
    bits
}

/// Writes zeros where `range` meets the ranges that may hold something else.
fn clear<D: WriteAt>(disk: &D, range: Range<u64>, dirty: &[Range<u64>]) -> Result<(), Ext4Error> {
    let from = dirty.partition_point(|other| other.end <= range.start);
    for other in dirty[from..].iter().take_while(|other| other.start < range.end) {
        let (mut at, end) = (other.start.max(range.start), other.end.min(range.end));
        while at < end {
            let n = (end - at).min(ZEROS as u64);
            write(disk, &vec![0; n as usize], at)?;
            at += n;
        }
    }
    Ok(())
}

/// The super block of the larger file system.
fn new_superblock<D: WriteAt>(fs: &Ext4<&D>, old: &Superblock, new: &Geometry, free: u64) -> Superblock {
    let geometry = fs.geometry();
    let mut sb = *old;
    sb.set_blocks_count(new.blocks_count);
    sb.set_free_blocks_count(old.free_blocks_count() + free);
    sb.s_inodes_count.set(new.inodes_count);
    let added = new.inodes_count - geometry.inodes_count;
    sb.s_free_inodes_count.set(old.s_free_inodes_count.get() + added);
    sb.s_feature_incompat.set(new.s_feature_incompat.bits());
    sb.s_first_meta_bg.set(new.first_meta_bg);
    // As large a part as before; at most half, so the product does not overflow in 128 bits.
    let reserved = u128::from(old.r_blocks_count()) * u128::from(new.blocks_count)
        / u128::from(geometry.blocks_count.max(1));
    sb.set_r_blocks_count(u64::try_from(reserved).unwrap_or(0));
    // 0: not known, the next mount computes it.
    let overhead = old.s_overhead_clusters.get();
    if overhead != 0 {
        let added: u64 = (geometry.groups..new.groups).map(|group| fixed_blocks(new, group)).sum();
        sb.s_overhead_clusters.set(u32::try_from(u64::from(overhead) + added).unwrap_or(0));
    }
    sb
}

/// The groups with a copy of the super block, but for the primary one.
fn copy_groups(geometry: &Geometry) -> impl Iterator<Item = u32> + '_ {
    (1..geometry.groups).filter(|group| geometry.group_has_super(*group))
}

fn copy_place(geometry: &Geometry, group: u32) -> u64 {
    geometry.group_first_block(group) * u64::from(geometry.block_size)
}

/// Whether the file system has copies of its super block; the places of a blank's are empty.
fn has_copies<D: WriteAt>(disk: &D, geometry: &Geometry) -> Result<bool, Ext4Error> {
    let Some(group) = copy_groups(geometry).next() else { return Ok(false) };
    let place = copy_place(geometry, group);
    let mut bytes = vec![0; SUPERBLOCK_SIZE];
    disk.read_exact_at(&mut bytes, place)
        .map_err(|e| Ext4Error::io("reading a copy of the super block", Place::offset(place), e))?;
    Ok(Superblock::read_from_bytes(&bytes).is_ok_and(|sb| sb.s_magic.get() == EXT4_SUPER_MAGIC))
}

/// Brings copies of super block and descriptors up to date.
pub(super) fn refresh_copies<D: WriteAt>(disk: &D, geometry: &Geometry) -> Result<(), Ext4Error> {
    let block_size = u64::from(geometry.block_size);
    let sb = superblock::read(disk)?;
    let plain = u64::from(geometry.plain_descriptor_blocks());
    let mut descriptors = vec![0; (plain * block_size) as usize];
    let first = (u64::from(geometry.first_data_block) + 1) * block_size;
    disk.read_exact_at(&mut descriptors, first)
        .map_err(|e| Ext4Error::io("reading descriptors", Place::offset(first), e))?;
    for group in copy_groups(geometry) {
        let mut copy = sb;
        copy.s_block_group_nr.set(group as u16);
        copy.seal();
        let place = copy_place(geometry, group);
        write(disk, copy.as_bytes(), place)?;
        if !geometry.in_meta_group(group) {
            write(disk, &descriptors, place + block_size)?;
        }
    }
    flush(disk)
}

/// As [`refresh_copies`], where there are any.
pub(super) fn refresh_existing_copies<D: WriteAt>(disk: &D, geometry: &Geometry) -> Result<(), Ext4Error> {
    if has_copies(disk, geometry)? { refresh_copies(disk, geometry) } else { Ok(()) }
}
