//! The end of a writable image: a journal, room to write, and tables for inodes that do not exist yet.
//!
//! ```text
//!   super │ GDT 0 │ file data, directories … │ journal │ inode tables of all groups │ bitmaps of all groups │ free …
//!                                              only its    only what is in use        only those of groups
//!                                              first block                            in use, and the last
//! ```
//!
//! What is not written reads as zeros: the file stays sparse, and every table is marked INODE_ZEROED, so that a kernel that
//! mounts the image has nothing to initialize. Descriptors lie in meta groups and copies of the super block where feature
//! sparse_super has them: Linux grows such a file system while it is mounted (`EXT4_IOC_RESIZE_FS`) without blocks reserved
//! in advance, to any size. It refuses that with feature sparse_super2.
//!
//! Invariants: `e2fsck -fn` is clean; kernels from 5.10 on mount it read-write; no reserved blocks, no lost+found; the same
//! calls give the same bytes. Called by `finish`.

use super::{
    CHECKSUM_SEED, Content, ImageSummary, ImageWriter, Result, WriterOptions, extents,
    finish::{MIN_INODES_PER_GROUP, Shape, clear_range},
    inodes,
    space::Space,
};
use crate::{
    BlockSize, Ext4Error, Timestamp,
    layout::{
        EXT4_JOURNAL_INO, SECTOR, checksum,
        group::{GroupDesc, GroupFlags},
        inode::{EXTRA_ISIZE, InodeFlags, RawInode, S_IFREG, seal_inode},
        journal::{JBD2_SUPERBLOCK_V2, JournalHeader, JournalSuperblock},
        superblock::{EXT4_DEFM_ACL, EXT4_DEFM_XATTR_USER, SUPERBLOCK_OFFSET, Superblock},
    },
};
use disk_io::WriteAt;
use sha2::{Digest, Sha256};
use zerocopy::{FromZeros, IntoBytes, little_endian::U32};

/// Smallest writable image in bytes: room for the smallest journal and something else.
pub const MIN_WRITABLE_BYTES: u64 = 16 << 20;
/// Largest writable image in bytes.
pub const MAX_WRITABLE_BYTES: u64 = 16 << 40;
/// One inode for so many bytes, as `mke2fs` has it.
const BYTES_PER_INODE: u64 = 16_384;
/// Fewest blocks of a journal that the kernel takes (`JBD2_MIN_JOURNAL_BLOCKS`).
const MIN_JOURNAL_BLOCKS: u64 = 1024;
/// Most blocks of a journal: `mke2fs` makes none that is larger.
const MAX_JOURNAL_BLOCKS: u64 = 262_144;
/// A last group of fewer blocks is left out, as `mke2fs` does.
const MIN_LAST_GROUP: u64 = 64;
/// The size that follows from a headroom is a multiple of this; bytes.
const ROUND: u64 = 1 << 20;
/// `s_jnl_backup_type`: `s_jnl_blocks` holds the journal inode's `i_block` and size.
const JOURNAL_BACKUP: u8 = 1;

/// The size of a writable image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageSize {
    /// So many bytes (16 MiB to 16 TiB), rounded down to whole blocks.
    Bytes(u64),
    /// As much as the content takes and so much of that again, in percent, left free; 16 MiB at least.
    Headroom(u32),
}

/// The journal of a writable image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum JournalSize {
    /// Chosen by the size of the image, as `mke2fs` does: 4 to 128 MiB.
    #[default]
    Chosen,
    /// So many bytes: 4 MiB to 1 GiB.
    Bytes(u64),
    /// No journal.
    None,
}

/// What makes an image writable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Writable {
    /// Its size.
    pub size: ImageSize,
    /// Its journal.
    pub journal: JournalSize,
}

/// Where the journal is.
#[derive(Debug, Clone, Copy)]
pub(super) struct JournalFile {
    content: Content,
    bytes: u64,
}

/// Checks what can be known before there is any content; gives the most bytes that the image may have.
pub(super) fn check(options: &WriterOptions) -> Result<u64> {
    let Some(writable) = options.writable else { return Ok(options.max_image_bytes) };
    if options.block_size != BlockSize::B4096 {
        return Err(Ext4Error::usage("a writable image has blocks of 4096 bytes"));
    }
    let most = options.max_image_bytes.min(MAX_WRITABLE_BYTES);
    if let JournalSize::Bytes(bytes) = writable.journal {
        let blocks = bytes / u64::from(options.block_size.bytes());
        if !(MIN_JOURNAL_BLOCKS..=MAX_JOURNAL_BLOCKS).contains(&blocks) {
            return Err(Ext4Error::usage(format!("a journal of {bytes} bytes; expected 4 MiB to 1 GiB")));
        }
    }
    match writable.size {
        ImageSize::Bytes(bytes) if !(MIN_WRITABLE_BYTES..=most).contains(&bytes) => Err(Ext4Error::usage(
            format!("a writable image of {bytes} bytes; expected {MIN_WRITABLE_BYTES} to {most}"),
        )),
        ImageSize::Bytes(bytes) => Ok(bytes),
        ImageSize::Headroom(_) => Ok(most),
    }
}

/// Blocks of the journal of a file system of `bytes`, as `mke2fs` chooses.
fn journal_blocks(bytes: u64) -> u64 {
    match bytes >> 20 {
        ..128 => 1024,
        128..1024 => 4096,
        1024..2048 => 8192,
        2048..131_072 => 16_384,
        _ => 32_768,
    }
}

/// The size of the whole.
#[derive(Debug, Clone, Copy)]
struct Plan {
    blocks: u64,
    shape: Shape,
}

impl Plan {
    /// Blocks without a last group that is too short to be of use.
    fn whole(space: &Space, blocks: u64) -> u64 {
        let g = space.geometry;
        let last = (blocks - g.first) % g.group;
        if last > 0 && last < MIN_LAST_GROUP { blocks - last } else { blocks }
    }

    /// Inode tables for a file system of `blocks`, of which the content has `space.cursor` and `inodes`.
    fn shape(space: &Space, blocks: u64, inodes: u64, inode_size: u64) -> Option<Shape> {
        let g = space.geometry;
        let groups = (blocks - g.first).div_ceil(g.group);
        let free = blocks.saturating_sub(space.cursor);
        let wanted = (blocks * g.bs / BYTES_PER_INODE).max(inodes + free * g.bs / BYTES_PER_INODE);
        let unit = MIN_INODES_PER_GROUP.max(g.bs / inode_size);
        // A short last group has as many as the others.
        let inodes_per_group = wanted.div_ceil(groups).max(1).next_multiple_of(unit).min(8 * g.bs);
        let fits = groups * inodes_per_group >= inodes && u32::try_from(groups * inodes_per_group).is_ok();
        fits.then_some(Shape { groups, inodes_per_group, table_blocks: inodes_per_group * inode_size / g.bs })
    }

    /// The end of tables and bitmaps.
    fn end(space: &Space, shape: Shape) -> Result<u64> {
        let mut trial = space.trial();
        for _ in 0..shape.groups {
            trial.take_adjacent(shape.table_blocks)?;
        }
        let mut left = 2 * shape.groups;
        while left > 0 {
            left -= trial.take(left)?.1;
        }
        Ok(trial.cursor)
    }

    fn new(space: &Space, size: ImageSize, inodes: u64, inode_size: u64) -> Result<Self> {
        let g = space.geometry;
        let too_many = || Ext4Error::Full { limit: space.most() };
        let percent = match size {
            ImageSize::Bytes(bytes) => {
                let blocks = Self::whole(space, bytes / g.bs);
                let shape = Self::shape(space, blocks, inodes, inode_size).ok_or_else(too_many)?;
                if Self::end(space, shape)? > blocks {
                    return Err(too_many());
                }
                return Ok(Self { blocks, shape });
            }
            ImageSize::Headroom(percent) => u64::from(percent),
        };
        let room = (space.cursor * percent).div_ceil(100);
        let mut blocks =
            (MIN_WRITABLE_BYTES / g.bs).max((space.cursor + room).next_multiple_of(ROUND / g.bs));
        loop {
            let shape = Self::shape(space, blocks, inodes, inode_size);
            // More groups have room for more inodes.
            let need = match shape {
                Some(shape) => (Self::end(space, shape)? + room).next_multiple_of(ROUND / g.bs),
                None => blocks + g.group,
            };
            match shape {
                Some(shape) if need <= blocks => return Ok(Self { blocks, shape }),
                _ if need * g.bs > space.most() => return Err(too_many()),
                _ => blocks = need,
            }
        }
    }
}

impl<W: WriteAt> ImageWriter<W> {
    pub(super) fn finish_writable(
        mut self,
        writable: Writable,
        max_ino: u64,
        source: &[u8],
    ) -> Result<ImageSummary> {
        let g = self.space.geometry;
        self.place_journal(writable)?;
        let Plan { blocks, shape } = Plan::new(&self.space, writable.size, max_ino, self.inode_size as u64)?;
        let mut content = Sha256::new();
        let mut descs = vec![GroupDesc::new_zeroed(); shape.groups as usize];
        // Inode bitmaps of the groups with inodes: the others have none on the disk.
        let mut inode_bitmaps = Vec::new();
        let mut tables = Vec::with_capacity(descs.len());
        for (group, desc) in descs.iter_mut().enumerate() {
            if group as u64 * shape.inodes_per_group < max_ino {
                let (table, bitmap) = self.write_table(group as u64, shape, desc, &mut content)?;
                tables.push(table);
                inode_bitmaps.push(bitmap);
            } else {
                tables.push(self.space.take_adjacent(shape.table_blocks)?);
                desc.set_free_inodes(shape.inodes_per_group as u32);
                desc.set_itable_unused(shape.inodes_per_group as u32);
                let flags = GroupFlags::EXT4_BG_INODE_ZEROED | GroupFlags::EXT4_BG_INODE_UNINIT;
                desc.bg_flags.set(flags.bits());
            }
        }
        let mut places = Vec::with_capacity(descs.len() * 2);
        while places.len() < descs.len() * 2 {
            let (start, n) = self.space.take((descs.len() * 2 - places.len()) as u64)?;
            places.extend(start..start + n);
        }
        if blocks > self.space.cursor {
            self.space.free.push((self.space.cursor, blocks));
        }
        let (block_places, inode_places) = places.split_at(descs.len());
        for (group, desc) in descs.iter_mut().enumerate() {
            desc.set_places(block_places[group], inode_places[group], tables[group]);
        }
        let covered = (shape.inodes_per_group / 8) as usize;
        for ((desc, place), bitmap) in descs.iter_mut().zip(inode_places).zip(&inode_bitmaps) {
            desc.set_inode_bitmap_csum(checksum::crc32c(CHECKSUM_SEED, &bitmap[..covered]));
            self.sink.put(place * g.bs, bitmap)?;
        }
        let free_blocks = self.write_block_bitmaps(&mut descs, blocks, block_places)?;
        self.write_descriptors(&mut descs)?;
        let uuid = self.uuid(content, source, blocks);
        let free_inodes: u64 = descs.iter().map(|d| u64::from(d.free_inodes())).sum();
        let mut sb = self.superblock(shape, blocks, free_blocks, free_inodes, uuid);
        for group in (1..shape.groups).filter(|group| g.has_super(*group)) {
            sb.s_block_group_nr.set(group as u16);
            sb.seal();
            self.sink.put(g.group_start(group) * g.bs, sb.as_bytes())?;
        }
        sb.s_block_group_nr.set(0);
        sb.seal();
        self.sink.put(SUPERBLOCK_OFFSET, sb.as_bytes())?;
        self.sink.close(blocks * g.bs)?;
        Ok(ImageSummary {
            image_bytes: blocks * g.bs,
            uuid,
            inodes: shape.groups * shape.inodes_per_group - free_inodes,
            blocks_used: blocks - free_blocks,
            blocks,
        })
    }

    /// Gives the journal its blocks; only its super block is written.
    fn place_journal(&mut self, writable: Writable) -> Result<()> {
        let g = self.space.geometry;
        let blocks = match (writable.journal, writable.size) {
            (JournalSize::None, _) => return Ok(()),
            (JournalSize::Bytes(bytes), _) => bytes / g.bs,
            (JournalSize::Chosen, ImageSize::Bytes(bytes)) => journal_blocks(bytes),
            (JournalSize::Chosen, ImageSize::Headroom(percent)) => {
                journal_blocks(self.space.cursor * g.bs / 100 * (100 + u64::from(percent)))
            }
        };
        let (mut list, mut mapped) = (Vec::new(), 0);
        while mapped < blocks {
            let (start, n) = self.space.take(blocks - mapped)?;
            extents::append(&mut list, mapped, start, n);
            mapped += n;
        }
        let mut sb = JournalSuperblock::new_zeroed();
        sb.s_header = JournalHeader::new(JBD2_SUPERBLOCK_V2, 0);
        sb.s_blocksize.set(g.bs as u32);
        sb.s_maxlen.set(blocks as u32);
        sb.s_first.set(1);
        sb.s_sequence.set(1);
        sb.s_nr_users.set(1);
        let mut first = vec![0; g.bs as usize];
        first[..sb.as_bytes().len()].copy_from_slice(sb.as_bytes());
        let place = list.first().map_or(0, |extent| extent.start);
        self.sink.put(place * g.bs, &first)?;
        let content = extents::store(
            &list,
            EXT4_JOURNAL_INO,
            CHECKSUM_SEED,
            &mut self.space,
            &mut self.sink,
            &mut self.roots,
        )?;
        self.journal = Some(JournalFile { content, bytes: blocks * g.bs });
        Ok(())
    }

    /// The journal's inode, without its checksum.
    fn journal_inode(&self, journal: JournalFile) -> RawInode {
        let (i_block, blocks) = self.mapped(journal.content);
        let mut raw = RawInode::new_zeroed();
        raw.i_mode.set(S_IFREG | 0o600);
        raw.i_links_count.set(1);
        raw.set_size(journal.bytes);
        raw.i_blocks_lo.set((blocks * (self.space.geometry.bs / SECTOR)) as u32);
        raw.i_flags.set(InodeFlags::EXT4_EXTENTS_FL.bits());
        raw.i_block = i_block;
        raw.i_extra_isize.set(EXTRA_ISIZE);
        let made = Timestamp { secs: i64::from(self.options.made_at), nanos: 0 }.encode();
        let time = || (U32::new(made.0), U32::new(made.1));
        (raw.i_atime, raw.i_atime_extra) = time();
        (raw.i_ctime, raw.i_ctime_extra) = time();
        (raw.i_mtime, raw.i_mtime_extra) = time();
        (raw.i_crtime, raw.i_crtime_extra) = time();
        raw
    }

    /// Writes the journal's inode into its slot; gives its checksum.
    pub(super) fn encode_journal(&self, slot: &mut [u8]) -> u32 {
        let Some(journal) = self.journal else { return 0 };
        let raw = self.journal_inode(journal);
        let known = inodes::XATTR_AT;
        slot[..known].copy_from_slice(&raw.as_bytes()[..known]);
        seal_inode(CHECKSUM_SEED, EXT4_JOURNAL_INO, slot)
    }

    /// Puts what a writable file system has besides into the super block.
    pub(super) fn note_journal(&self, sb: &mut Superblock) {
        if self.options.writable.is_none() {
            return;
        }
        sb.s_default_mount_opts.set(EXT4_DEFM_XATTR_USER | EXT4_DEFM_ACL);
        let Some(journal) = self.journal else { return };
        let raw = self.journal_inode(journal);
        sb.s_journal_inum.set(EXT4_JOURNAL_INO);
        sb.s_jnl_backup_type = JOURNAL_BACKUP;
        for (slot, word) in sb.s_jnl_blocks.iter_mut().zip(raw.i_block.as_chunks::<4>().0) {
            *slot = U32::from_bytes(*word);
        }
        sb.s_jnl_blocks[15] = raw.i_size_high;
        sb.s_jnl_blocks[16] = raw.i_size_lo;
    }

    /// The block bitmaps of groups with blocks in use, and that of the last group; gives the number of free blocks.
    fn write_block_bitmaps(&mut self, descs: &mut [GroupDesc], blocks: u64, places: &[u64]) -> Result<u64> {
        let g = self.space.geometry;
        self.space.free.sort_unstable();
        let mut free = self.space.free.iter().copied().peekable();
        let mut pending: Vec<(u64, u64)> = Vec::new();
        let mut total = 0;
        let last = descs.len() - 1;
        let mut bitmap = vec![0xffu8; (g.group / 8) as usize];
        for (i, desc) in descs.iter_mut().enumerate() {
            let base = g.group_start(i as u64);
            while let Some(range) = free.next_if(|r| r.0 < base + g.group) {
                pending.push(range);
            }
            let fixed = g.fixed(i as u64);
            if i != last && self.space.cursor <= base + fixed {
                let count = g.group - fixed;
                desc.set_free_blocks(count as u32);
                desc.bg_flags.set(desc.bg_flags.get() | GroupFlags::EXT4_BG_BLOCK_UNINIT.bits());
                total += count;
                continue;
            }
            bitmap.fill(0xff);
            for &(start, end) in &pending {
                clear_range(&mut bitmap, base, g.group, start, end.min(blocks));
            }
            pending.retain(|r| r.1 > base + g.group);
            bitmap[0] |= (1u8 << fixed) - 1;
            let count: u32 = bitmap.iter().map(|b| b.count_zeros()).sum();
            total += u64::from(count);
            desc.set_free_blocks(count);
            desc.set_block_bitmap_csum(checksum::crc32c(CHECKSUM_SEED, &bitmap));
            self.sink.put(places[i] * g.bs, &bitmap)?;
        }
        Ok(total)
    }
}
