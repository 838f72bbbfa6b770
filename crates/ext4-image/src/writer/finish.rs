//! The end of an image: directories, attributes, inode tables, bitmaps, descriptors, super block.

use super::{
    CHECKSUM_SEED, HASH_SEED, ImageSummary, ImageWriter, NodeId, Overflow, Result, UuidSource, extents,
    inodes,
    space::{Geometry, Space},
    tree::{EaValue, NONE, Node, Payload},
    xattrs,
};
use crate::{
    Ext4Error,
    layout::{
        EXT4_GOOD_OLD_FIRST_INO, EXT4_JOURNAL_INO, checksum,
        group::{DESC_SIZE, GroupDesc, GroupFlags},
        inode::{EXTRA_ISIZE, S_IFREG},
        superblock::{self, Compat, Incompat, RoCompat, SUPERBLOCK_OFFSET, Superblock},
        xattr::{
            BLOCK_HEADER_SIZE, EXT4_XATTR_MAGIC, XattrHeader, block_hash, ea_inode_hash, xattr_block_checksum,
        },
    },
};
use disk_io::WriteAt;
use sha2::{Digest, Sha256};
use zerocopy::{FromZeros, IntoBytes, little_endian::U32};

/// `s_log_groups_per_flex`: only a hint where the kernel looks for bitmaps to read ahead.
pub(super) const LOG_GROUPS_PER_FLEX: u8 = 4;
/// Fewest inodes of a group: the reserved ones are in the first group.
pub(super) const MIN_INODES_PER_GROUP: u64 = 16;

/// How many groups of how many inodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) groups: u64,
    pub(super) inodes_per_group: u64,
    pub(super) table_blocks: u64,
}

/// The groups that an image of `inodes` needs: tables and bitmaps themselves may begin a further group, so the answer
/// is tried until it holds.
fn shape(space: &Space, inodes: u64, inode_size: u64) -> Result<Shape> {
    let g = space.geometry;
    let unit = MIN_INODES_PER_GROUP.max(g.bs / inode_size);
    let mut groups = g.group_of(space.cursor - 1) + 1;
    loop {
        let inodes_per_group = inodes.div_ceil(groups).max(1).next_multiple_of(unit);
        let shape = Shape { groups, inodes_per_group, table_blocks: inodes_per_group * inode_size / g.bs };
        if inodes_per_group > 8 * g.bs {
            groups += 1;
            continue;
        }
        let mut trial = space.trial();
        for _ in 0..groups {
            trial.take_adjacent(shape.table_blocks)?;
        }
        let mut left = 2 * groups;
        while left > 0 {
            left -= trial.take(left)?.1;
        }
        let need = g.group_of(trial.cursor - 1) + 1;
        if need <= groups {
            return Ok(shape);
        }
        groups = need;
    }
}

/// Blocks from `start` to `end` marked as free in the bitmap of a group of `group` blocks that begins at block `base`.
pub(super) fn clear_range(bitmap: &mut [u8], base: u64, group: u64, start: u64, end: u64) {
    let (start, end) = (start.max(base) - base, end.min(base + group).saturating_sub(base));
    for bit in start..end {
        bitmap[(bit / 8) as usize] &= !(1 << (bit % 8));
    }
}

impl<W: WriteAt> ImageWriter<W> {
    /// Long targets of symbolic links, attribute blocks and attribute values of one node.
    fn write_extras(&mut self, id: u32) -> Result<()> {
        let bs = self.space.geometry.bs as usize;
        let node = &self.tree.nodes[id as usize];
        if let Payload::Symlink { at, len, .. } = node.payload
            && usize::from(len) > inodes::FAST_SYMLINK_MAX
        {
            let (block, _) = self.space.take(1)?;
            self.sink.put(block * bs as u64, self.tree.stored(at, usize::from(len)))?;
            self.tree.nodes[id as usize].payload = Payload::Symlink { at, len, block };
        }
        let node = &self.tree.nodes[id as usize];
        if node.xattrs == NONE {
            return Ok(());
        }
        let set = node.xattrs;
        let room = self.xattr_room(self.inline_len(id));
        let mut plan = xattrs::plan(self.sets.get(set), room, bs)?;
        if plan.block.is_empty() {
            return Ok(());
        }
        let mut value_blocks = 0;
        for &i in &plan.ea {
            value_blocks += plan.block[i].value.len().div_ceil(bs) as u64;
            plan.block[i].ea = Some(self.write_value(&plan.block[i].value)?);
        }
        let (block, _) = self.space.take(1)?;
        let mut bytes = vec![0; bs];
        let hashes = xattrs::lay(&mut bytes, BLOCK_HEADER_SIZE, &plan.block);
        let mut header = XattrHeader::new_zeroed();
        header.h_magic.set(EXT4_XATTR_MAGIC);
        header.h_refcount.set(1);
        header.h_blocks.set(1);
        header.h_hash.set(block_hash(hashes));
        bytes[..BLOCK_HEADER_SIZE].copy_from_slice(header.as_bytes());
        header.h_checksum.set(xattr_block_checksum(CHECKSUM_SEED, block, &bytes));
        bytes[..BLOCK_HEADER_SIZE].copy_from_slice(header.as_bytes());
        self.sink.put(block * bs as u64, &bytes)?;
        self.overflow.insert(id, Overflow { block, value_blocks });
        Ok(())
    }

    /// An attribute's value in an inode of its own: inode number and hash.
    fn write_value(&mut self, value: &[u8]) -> Result<(u32, u32)> {
        let bs = self.space.geometry.bs;
        let hash = ea_inode_hash(CHECKSUM_SEED, value);
        let total = (value.len() as u64).div_ceil(bs);
        let (mut list, mut mapped) = (Vec::new(), 0);
        while mapped < total {
            let (start, n) = self.space.take(total - mapped)?;
            extents::append(&mut list, mapped, start, n);
            let from = (mapped * bs) as usize;
            let to = value.len().min(((mapped + n) * bs) as usize);
            self.sink.put(start * bs, &value[from..to])?;
            mapped += n;
        }
        let mut node = Node::new(S_IFREG | 0o600, Payload::EaValue(self.tree.ea_values.len() as u32));
        node.links = 1;
        let id = self.tree.add_node(node)?;
        let ino = inodes::ino_of(id);
        let content =
            extents::store(&list, ino, CHECKSUM_SEED, &mut self.space, &mut self.sink, &mut self.roots)?;
        self.tree.ea_values.push(EaValue { size: value.len() as u32, hash, content });
        Ok((ino, hash))
    }

    pub(super) fn finish_image(mut self, source: &[u8]) -> Result<ImageSummary> {
        if self.open.is_some() {
            return Err(Ext4Error::usage("a file is still open"));
        }
        // The memory is of use to what is built from here on.
        self.tree.drop_index();
        let nodes = self.tree.nodes.len() as u32;
        for id in 0..nodes {
            self.write_directory(NodeId(id))?;
        }
        for id in 0..nodes {
            self.write_extras(id)?;
        }
        let g = self.space.geometry;
        let max_ino = u64::from(inodes::ino_of(self.tree.nodes.len() as u32 - 1))
            .max(u64::from(EXT4_GOOD_OLD_FIRST_INO));
        if let Some(writable) = self.options.writable {
            return self.finish_writable(writable, max_ino, source);
        }
        let shape = shape(&self.space, max_ino, self.inode_size as u64)?;
        if shape.groups * shape.inodes_per_group > u64::from(u32::MAX) {
            return Err(Ext4Error::unsupported("more than 2^32 inodes", crate::Place::default()));
        }
        let mut content = Sha256::new();
        let mut descs = vec![GroupDesc::new_zeroed(); shape.groups as usize];
        let mut tables = Vec::with_capacity(descs.len());
        for (group, desc) in descs.iter_mut().enumerate() {
            tables.push(self.write_table(group as u64, shape, desc, &mut content)?);
        }
        let mut bitmaps = Vec::with_capacity(descs.len() * 2);
        while bitmaps.len() < descs.len() * 2 {
            let (start, n) = self.space.take((descs.len() * 2 - bitmaps.len()) as u64)?;
            bitmaps.extend(start..start + n);
        }
        let last = shape.groups - 1;
        let blocks = self.space.cursor.max(g.group_start(last) + g.fixed(last).max(1));
        if blocks > self.space.cursor {
            self.space.free.push((self.space.cursor, blocks));
        }
        let free_blocks = self.write_bitmaps(&mut descs, shape, blocks, &bitmaps, &tables)?;
        self.write_descriptors(&mut descs)?;
        let uuid = self.uuid(content, source, blocks);
        let free_inodes: u64 = descs.iter().map(|d| u64::from(d.free_inodes())).sum();
        let sb = self.superblock(shape, blocks, free_blocks, free_inodes, uuid);
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

    /// The UUID of an image of so many blocks, the checksums of whose inodes went into `content`.
    pub(super) fn uuid(&self, mut content: Sha256, source: &[u8], blocks: u64) -> [u8; 16] {
        if let UuidSource::Fixed(uuid) = self.options.uuid {
            return uuid;
        }
        content.update(self.sink.crc.unwrap_or_default().to_le_bytes());
        content.update(self.data_crc.to_le_bytes());
        if self.options.uuid == UuidSource::FromSource {
            content.update(source);
        }
        content.update(blocks.to_le_bytes());
        let digest = content.finalize();
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&digest[..16]);
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        uuid
    }

    /// One group's inode table; fills the inode half of its descriptor. Gives the table's block and the inode bitmap.
    pub(super) fn write_table(
        &mut self,
        group: u64,
        shape: Shape,
        desc: &mut GroupDesc,
        content: &mut Sha256,
    ) -> Result<(u64, Vec<u8>)> {
        let bs = self.space.geometry.bs;
        let table = self.space.take_adjacent(shape.table_blocks)?;
        let mut bitmap = vec![0xff; bs as usize];
        bitmap[..(shape.inodes_per_group / 8) as usize].fill(0);
        let mut bytes = vec![0; (shape.inodes_per_group as usize) * self.inode_size];
        let first = group * shape.inodes_per_group + 1;
        let (mut used, mut dirs, mut end) = (0, 0, 0);
        for (i, slot) in bytes.chunks_exact_mut(self.inode_size).enumerate() {
            let ino = first + i as u64;
            if ino == u64::from(EXT4_JOURNAL_INO) && self.journal.is_some() {
                content.update(self.encode_journal(slot).to_le_bytes());
            }
            let id = match ino {
                2 => Some(0),
                ino if ino >= u64::from(EXT4_GOOD_OLD_FIRST_INO) => {
                    Some(ino as u32 - (EXT4_GOOD_OLD_FIRST_INO - 1))
                }
                _ => None,
            };
            if let Some(id) = id {
                match self.tree.nodes.get(id as usize) {
                    None => break,
                    Some(Node { payload: Payload::Gone, .. }) => continue,
                    Some(node) => dirs += u32::from(node.is_dir()),
                }
                content.update(self.encode(id, slot)?.to_le_bytes());
            }
            bitmap[i / 8] |= 1 << (i % 8);
            used += 1;
            end = i as u32 + 1;
        }
        let inodes = shape.inodes_per_group as u32;
        desc.set_free_inodes(inodes - used);
        desc.set_itable_unused(inodes - end);
        desc.set_used_dirs(dirs);
        desc.bg_flags.set(GroupFlags::EXT4_BG_INODE_ZEROED.bits());
        // The rest of the table stays a hole: it reads as zeros.
        self.sink.put(table * bs, &bytes[..end as usize * self.inode_size])?;
        Ok((table, bitmap))
    }

    /// All bitmaps; completes the descriptors. Gives the number of free blocks.
    fn write_bitmaps(
        &mut self,
        descs: &mut [GroupDesc],
        shape: Shape,
        blocks: u64,
        places: &[u64],
        tables: &[(u64, Vec<u8>)],
    ) -> Result<u64> {
        let g = self.space.geometry;
        self.space.free.sort_unstable();
        let mut free = self.space.free.iter().copied().peekable();
        let mut pending: Vec<(u64, u64)> = Vec::new();
        let mut total = 0;
        let (block_places, inode_places) = places.split_at(descs.len());
        let mut bitmap = vec![0xffu8; g.bs as usize];
        for (i, desc) in descs.iter_mut().enumerate() {
            let base = g.group_start(i as u64);
            bitmap.fill(0xff);
            while let Some(range) = free.next_if(|r| r.0 < base + g.group) {
                pending.push(range);
            }
            for &(start, end) in &pending {
                clear_range(&mut bitmap, base, g.group, start, end.min(blocks));
            }
            pending.retain(|r| r.1 > base + g.group);
            // Fixed blocks are the first of a group, at most two.
            bitmap[0] |= (1u8 << g.fixed(i as u64)) - 1;
            let covered = (g.group / 8) as usize;
            let count: u32 = bitmap[..covered].iter().map(|b| b.count_zeros()).sum();
            total += u64::from(count);
            let (table, inode_bitmap) = &tables[i];
            desc.set_free_blocks(count);
            desc.set_places(block_places[i], inode_places[i], *table);
            desc.set_block_bitmap_csum(checksum::crc32c(CHECKSUM_SEED, &bitmap[..covered]));
            let covered = (shape.inodes_per_group / 8) as usize;
            desc.set_inode_bitmap_csum(checksum::crc32c(CHECKSUM_SEED, &inode_bitmap[..covered]));
            self.sink.put(block_places[i] * g.bs, &bitmap)?;
        }
        for (place, (_, inode_bitmap)) in inode_places.iter().zip(tables) {
            self.sink.put(place * g.bs, inode_bitmap)?;
        }
        Ok(total)
    }

    /// Group descriptors, in each meta group at its first, second and last group.
    pub(super) fn write_descriptors(&mut self, descs: &mut [GroupDesc]) -> Result<()> {
        let g: Geometry = self.space.geometry;
        for (i, desc) in descs.iter_mut().enumerate() {
            desc.seal(CHECKSUM_SEED, i as u32);
        }
        let groups = descs.len() as u64;
        for (meta, chunk) in descs.chunks(g.per_meta as usize).enumerate() {
            let first = meta as u64 * g.per_meta;
            let mut bytes = chunk.as_bytes().to_vec();
            bytes.resize(g.per_meta as usize * DESC_SIZE, 0);
            for group in [first, first + 1, first + g.per_meta - 1] {
                if group < groups {
                    // The descriptors are the last fixed block.
                    let block = g.group_start(group) + g.fixed(group) - 1;
                    self.sink.put(block * g.bs, &bytes)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn superblock(
        &self,
        shape: Shape,
        blocks: u64,
        free: u64,
        free_inodes: u64,
        uuid: [u8; 16],
    ) -> Superblock {
        let size = self.options.block_size;
        let mut incompat = Incompat::EXT4_FEATURE_INCOMPAT_FILETYPE
            | Incompat::EXT4_FEATURE_INCOMPAT_META_BG
            | Incompat::EXT4_FEATURE_INCOMPAT_EXTENTS
            | Incompat::EXT4_FEATURE_INCOMPAT_64BIT
            | Incompat::EXT4_FEATURE_INCOMPAT_FLEX_BG
            | Incompat::EXT4_FEATURE_INCOMPAT_EA_INODE
            | Incompat::EXT4_FEATURE_INCOMPAT_CSUM_SEED;
        incompat.set(Incompat::EXT4_FEATURE_INCOMPAT_INLINE_DATA, self.options.inline_data);
        incompat.set(Incompat::EXT4_FEATURE_INCOMPAT_LARGEDIR, self.large_dir);
        let mut compat = Compat::EXT4_FEATURE_COMPAT_EXT_ATTR | Compat::EXT4_FEATURE_COMPAT_DIR_INDEX;
        let mut ro = RoCompat::EXT4_FEATURE_RO_COMPAT_LARGE_FILE
            | RoCompat::EXT4_FEATURE_RO_COMPAT_HUGE_FILE
            | RoCompat::EXT4_FEATURE_RO_COMPAT_DIR_NLINK
            | RoCompat::EXT4_FEATURE_RO_COMPAT_EXTRA_ISIZE
            | RoCompat::EXT4_FEATURE_RO_COMPAT_METADATA_CSUM;
        if self.options.writable.is_some() {
            // What the content does not need is left out: more tools then take the file system.
            incompat.set(Incompat::EXT4_FEATURE_INCOMPAT_EA_INODE, !self.tree.ea_values.is_empty());
            compat.set(Compat::EXT4_FEATURE_COMPAT_HAS_JOURNAL, self.journal.is_some());
            ro |= RoCompat::EXT4_FEATURE_RO_COMPAT_SPARSE_SUPER;
        } else {
            compat |= Compat::EXT4_FEATURE_COMPAT_SPARSE_SUPER2;
            ro |= RoCompat::EXT4_FEATURE_RO_COMPAT_READONLY;
        }
        let mut sb = Superblock::new(&superblock::Shape {
            blocks_count: blocks,
            free_blocks_count: free,
            inodes_count: (shape.groups * shape.inodes_per_group) as u32,
            free_inodes_count: free_inodes as u32,
            first_data_block: size.first_data_block(),
            log_block_size: size.log(),
            blocks_per_group: self.space.geometry.group as u32,
            inodes_per_group: shape.inodes_per_group as u32,
            inode_size: self.inode_size as u16,
            extra_isize: EXTRA_ISIZE,
            compat,
            incompat,
            ro_compat: ro,
        });
        sb.set_checksums_and_hash(HASH_SEED.map(U32::new));
        sb.s_uuid = uuid;
        sb.s_log_groups_per_flex = LOG_GROUPS_PER_FLEX;
        sb.s_checksum_seed.set(CHECKSUM_SEED);
        sb.s_mkfs_time.set(self.options.made_at);
        sb.s_lastcheck.set(self.options.made_at);
        sb.s_wtime.set(self.options.made_at);
        self.note_journal(&mut sb);
        sb.seal();
        sb
    }
}
