//! Groups: descriptors, fixed blocks, inode tables read front to back, bitmaps against what was found.
//!
//! Called by [`super::check`].

use super::{Checker, Layout, kind};
use crate::{
    Ext4Error, Place,
    error::{GroupFault, InodeFault},
    layout::{
        EXT4_GOOD_OLD_FIRST_INO, EXT4_ROOT_INO,
        checksum::crc32c,
        group::{DESC_SIZE, GroupDesc, GroupFlags},
        superblock::Incompat,
    },
};
use disk_io::ReadAt;

/// Bytes of inode tables read at once.
const READ: usize = 256 << 10;

/// Sums over all groups.
#[derive(Debug, Default)]
pub(super) struct Totals {
    pub(super) free_blocks: u64,
    pub(super) free_inodes: u64,
}

/// A broken rule about group `number`.
fn bad(number: u32, fault: GroupFault) -> Ext4Error {
    Ext4Error::corrupt(fault, Place::group(number))
}

/// A bitmap's bit.
fn bit(bitmap: &[u8], at: u32) -> bool {
    bitmap.get((at / 8) as usize).is_some_and(|byte| byte >> (at % 8) & 1 == 1)
}

impl<R: ReadAt> Checker<R> {
    fn descriptor(&self, number: u32) -> Result<GroupDesc, Ext4Error> {
        let desc = self.fs.group(number)?;
        let known = match self.layout {
            Layout::Default => {
                GroupFlags::EXT4_BG_INODE_UNINIT
                    | GroupFlags::EXT4_BG_BLOCK_UNINIT
                    | GroupFlags::EXT4_BG_INODE_ZEROED
            }
            // Without checksums nothing shows whether the others are true.
            Layout::Hcsshim => GroupFlags::EXT4_BG_INODE_ZEROED,
        };
        if !known.contains(desc.flags())
            || desc.bg_exclude_bitmap_lo.get() != 0
            || desc.bg_exclude_bitmap_hi.get() != 0
            || desc.bg_reserved.get() != 0
        {
            return Err(bad(number, GroupFault::Flags));
        }
        Ok(desc)
    }

    /// The checksum that a descriptor should hold for a bitmap; 0 without checksums.
    fn bitmap_checksum(&self, covered: &[u8]) -> u32 {
        match self.layout {
            Layout::Default => crc32c(self.fs.geometry().checksum_seed, covered),
            Layout::Hcsshim => 0,
        }
    }

    /// Claims superblocks, descriptors, bitmaps and inode tables.
    pub(super) fn claim_fixed(&mut self) -> Result<(), Ext4Error> {
        let geometry = self.fs.geometry().clone();
        if geometry.first_data_block == 1 {
            // The block before the superblock belongs to no group and is in no bitmap.
            self.blocks.claim(0, 1, Place::block(0))?;
            self.blocks.used -= 1;
        }
        for number in 0..geometry.groups {
            let place = Place::group(number);
            let first = geometry.group_first_block(number);
            let blocks = u64::from(geometry.group_blocks(number));
            let fixed = geometry.group_head_blocks(number);
            if fixed > blocks {
                return Err(bad(number, GroupFault::TooSmall));
            }
            self.blocks.claim(first, fixed, place)?;
            let desc = self.descriptor(number)?;
            let table = u64::from(geometry.inode_table_blocks());
            for (start, count) in
                [(desc.block_bitmap(), 1), (desc.inode_bitmap(), 1), (desc.inode_table(), table)]
            {
                if !geometry.holds(start, count) {
                    return Err(bad(number, GroupFault::PlacesOutside));
                }
                let inside = start >= first && start + count <= first + blocks;
                if !inside && !geometry.has(Incompat::EXT4_FEATURE_INCOMPAT_FLEX_BG) {
                    return Err(bad(number, GroupFault::PlacesInOtherGroup));
                }
                self.blocks.claim(start, count, place)?;
            }
        }
        Ok(())
    }

    /// Checks the inodes of a group, and its inode bitmap.
    pub(super) fn inode_table(&mut self, number: u32, totals: &mut Totals) -> Result<(), Ext4Error> {
        let geometry = self.fs.geometry().clone();
        let desc = self.descriptor(number)?;
        let per_group = geometry.inodes_per_group;
        let unused = desc.itable_unused();
        if unused > per_group {
            return Err(bad(number, GroupFault::UnusedInodes));
        }
        let uninit = desc.flags().contains(GroupFlags::EXT4_BG_INODE_UNINIT);
        if uninit && unused != per_group && unused != 0 {
            return Err(bad(number, GroupFault::UninitInodes));
        }
        let mut bitmap = Vec::new();
        if !uninit {
            bitmap = self.fs.source.block(desc.inode_bitmap())?.to_vec();
            let covered = bitmap.get(..per_group as usize / 8).unwrap_or(&[]);
            let computed = self.bitmap_checksum(covered);
            let stored = stored_checksum(desc.inode_bitmap_csum(), geometry.desc_size, computed);
            let place = Place::group(number).at_block(desc.inode_bitmap());
            if !per_group.is_multiple_of(8) || computed != stored {
                return Err(Ext4Error::corrupt(GroupFault::InodeBitmapChecksum, place));
            }
            // hcsshim's tar2ext4 leaves it clear, and neither the kernel nor any writer of a bitmap reads it.
            let padding = self.layout == Layout::Default;
            if (per_group..geometry.block_size * 8).any(|i| bit(&bitmap, i) != padding) {
                return Err(Ext4Error::corrupt(GroupFault::InodeBitmapPadding, place));
            }
        }
        let (mut free, mut dirs) = (per_group, 0);
        if !uninit {
            let size = usize::from(geometry.inode_size);
            let start = desc.inode_table() * u64::from(geometry.block_size);
            let mut buf = vec![0; READ.min(per_group as usize * size)];
            let per_read = buf.len() / size;
            let first = number * per_group + 1;
            let mut index = 0;
            while index < per_group {
                let n = per_read.min((per_group - index) as usize);
                // After the last used inode the table is not read at all.
                if (index..index + n as u32).all(|i| !bit(&bitmap, i)) && index >= per_group - unused {
                    index += n as u32;
                    continue;
                }
                let bytes = buf.get_mut(..n * size).unwrap_or(&mut []);
                self.fs.source.read(start + u64::from(index) * size as u64, bytes)?;
                let bytes = std::mem::take(&mut buf);
                for raw in bytes.chunks_exact(size).take(n) {
                    let ino = first + index;
                    let inode = |fault| Ext4Error::corrupt(fault, Place::inode(ino));
                    if bit(&bitmap, index) {
                        if index >= per_group - unused {
                            return Err(inode(InodeFault::CountedUnused));
                        }
                        free -= 1;
                        self.report.inodes += 1;
                        self.inode(ino, raw)?;
                        dirs += u32::from(self.node(ino).is_some_and(|n| n.kind == kind::DIRECTORY));
                    } else if ino < EXT4_GOOD_OLD_FIRST_INO {
                        return Err(inode(InodeFault::ReservedFree));
                    } else if raw.iter().any(|b| *b != 0) {
                        return Err(inode(InodeFault::FreeNotEmpty));
                    }
                    index += 1;
                }
                buf = bytes;
            }
        } else if number * per_group < EXT4_ROOT_INO {
            return Err(bad(number, GroupFault::FirstUninit));
        }
        if desc.free_inodes() != free || desc.used_dirs() != dirs {
            return Err(bad(number, GroupFault::InodeCounts));
        }
        self.report.directories += u64::from(dirs);
        totals.free_inodes += u64::from(free);
        Ok(())
    }

    /// Compares a group's block bitmap with the blocks that were claimed.
    pub(super) fn block_bitmap(&mut self, number: u32, totals: &mut Totals) -> Result<(), Ext4Error> {
        let geometry = self.fs.geometry();
        let desc = self.descriptor(number)?;
        let first = geometry.group_first_block(number);
        let blocks = geometry.group_blocks(number);
        let uninit = desc.flags().contains(GroupFlags::EXT4_BG_BLOCK_UNINIT);
        let free = (0..blocks).filter(|i| !self.blocks.is_used(first + u64::from(*i))).count() as u32;
        if uninit && number + 1 == geometry.groups {
            // Its end may be inside the group, which only a bitmap can show.
            return Err(bad(number, GroupFault::LastUninit));
        }
        if uninit {
            // The kernel builds the bitmap from the descriptor: only the group's own tables may be in use.
            let own = self.own_blocks(number, &desc);
            if blocks - free != own {
                return Err(bad(number, GroupFault::UninitBlocks));
            }
        } else {
            let bitmap = self.fs.source.block(desc.block_bitmap())?;
            let covered = bitmap.get(..geometry.blocks_per_group as usize / 8).unwrap_or(&[]);
            let computed = self.bitmap_checksum(covered);
            let place = Place::group(number);
            if computed != stored_checksum(desc.block_bitmap_csum(), geometry.desc_size, computed) {
                let place = place.at_block(desc.block_bitmap());
                return Err(Ext4Error::corrupt(GroupFault::BlockBitmapChecksum, place));
            }
            for i in 0..geometry.block_size * 8 {
                let block = first + u64::from(i);
                if bit(&bitmap, i) != (i >= blocks || self.blocks.is_used(block)) {
                    return Err(Ext4Error::corrupt(GroupFault::BlockBitmap, place.at_block(block)));
                }
            }
        }
        if desc.free_blocks() != free {
            return Err(bad(number, GroupFault::FreeBlocks));
        }
        totals.free_blocks += u64::from(free);
        Ok(())
    }

    /// Blocks of a group that hold its superblock copy, descriptors, or any group's bitmaps and tables.
    fn own_blocks(&self, number: u32, desc: &GroupDesc) -> u32 {
        let geometry = self.fs.geometry();
        let first = geometry.group_first_block(number);
        let end = first + u64::from(geometry.group_blocks(number));
        let mut own = geometry.group_head_blocks(number);
        let table = u64::from(geometry.inode_table_blocks());
        for (start, count) in
            [(desc.block_bitmap(), 1), (desc.inode_bitmap(), 1), (desc.inode_table(), table)]
        {
            if start >= first && start + count <= end {
                own += count;
            }
        }
        own as u32
    }
}

/// A stored bitmap checksum; where only its low half is stored, the high half of `computed` is taken for it.
fn stored_checksum(stored: u32, desc_size: u16, computed: u32) -> u32 {
    if usize::from(desc_size) >= DESC_SIZE { stored } else { stored & 0xFFFF | computed & 0xFFFF_0000 }
}
