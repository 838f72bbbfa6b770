//! One inode: fields, flags, extents, devices, symbolic links.
//!
//! Called by [`super::Checker::inode_table`] for each inode that the bitmap calls used.

use super::{Checker, Layout, kind};
use crate::{
    Ext4Error, Extent, FileKind, Inode, Place,
    error::{ExtentFault, InodeFault},
    layout::{
        EXT4_BAD_INO, EXT4_GOOD_OLD_FIRST_INO, EXT4_ROOT_INO, SECTOR,
        dir::file_type,
        extent::{ENTRY_SIZE, ExtentHeader, ROOT_MAX, looks_like_root},
        inode::{EXTRA_ISIZE, I_BLOCK_SIZE, InodeFlags, RAW_INODE_SIZE, RawInode},
        superblock::{Compat, Incompat, RoCompat},
        xattr::XATTR_SIZE_MAX,
    },
    reader::{dir, extent, inode::checksum_matches, xattr},
};
use disk_io::ReadAt;
use zerocopy::{FromBytes, IntoBytes};

/// `i_flags` that the writers of this crate set.
const FLAGS: InodeFlags = HCSSHIM_FLAGS.union(InodeFlags::EXT4_INDEX_FL).union(InodeFlags::EXT4_EA_INODE_FL);

/// Those of profile hcsshim, which has no hash trees and no values in inodes.
const HCSSHIM_FLAGS: InodeFlags =
    InodeFlags::EXT4_EXTENTS_FL.union(InodeFlags::EXT4_INLINE_DATA_FL).union(InodeFlags::EXT4_HUGE_FILE_FL);

/// `i_extra_isize`: at least what this crate writes, at most what `struct ext4_inode` has.
const EXTRA_ISIZES: std::ops::RangeInclusive<u16> =
    EXTRA_ISIZE..=(RAW_INODE_SIZE - crate::layout::inode::EXT4_GOOD_OLD_INODE_SIZE) as u16;

/// Collects the blocks of an inode.
struct Claims {
    extents: Vec<Extent>,
    nodes: Vec<u64>,
}

impl extent::Visitor for Claims {
    fn strict(&self) -> bool {
        true
    }

    fn node(&mut self, block: u64) -> Result<(), Ext4Error> {
        self.nodes.push(block);
        Ok(())
    }

    fn extent(&mut self, extent: Extent) -> Result<(), Ext4Error> {
        if extent.unwritten {
            let place = Place::block(extent.physical_block);
            return Err(Ext4Error::corrupt(ExtentFault::Unwritten, place));
        }
        extent::Visitor::extent(&mut self.extents, extent)
    }
}

/// Whether a reserved inode is empty. mke2fs gives the bad-blocks inode times, and every inode a checksum: both are
/// harmless.
fn is_empty(ino: u32, raw: &RawInode) -> bool {
    // The list of bad blocks has no owner either.
    let owner = ino == EXT4_BAD_INO && (raw.i_uid.get(), raw.i_gid.get()) != (0, 0);
    raw.i_mode.get() == 0
        && raw.size() == 0
        && raw.i_dtime.get() == 0
        && raw.i_links_count.get() == 0
        && raw.blocks() == 0
        && raw.i_flags.get() == 0
        && raw.i_block == [0; I_BLOCK_SIZE]
        && raw.file_acl() == 0
        && !owner
}

/// Whether all times have less than a second of nanoseconds.
fn nanoseconds_fit(raw: &RawInode) -> bool {
    [raw.i_ctime_extra, raw.i_mtime_extra, raw.i_atime_extra, raw.i_crtime_extra]
        .iter()
        .all(|extra| crate::Timestamp::decode(0, extra.get()).nanos <= 999_999_999)
}

impl<R: ReadAt> Checker<R> {
    /// Checks inode `ino` in its slot of the table, with its directory and xattrs.
    pub(super) fn inode(&mut self, ino: u32, slot: &[u8]) -> Result<(), Ext4Error> {
        let place = Place::inode(ino);
        let bad = |fault| Err(Ext4Error::corrupt(fault, place));
        let raw = RawInode::from_slot(slot);
        if ino < EXT4_GOOD_OLD_FIRST_INO && ino != EXT4_ROOT_INO {
            if !is_empty(ino, &raw) {
                return bad(InodeFault::ReservedInUse);
            }
            if self.layout == Layout::Default
                && slot.iter().any(|b| *b != 0)
                && !checksum_matches(ino, slot, &raw, self.fs.geometry())
            {
                return bad(InodeFault::Checksum);
            }
            if let Some(node) = self.node(ino) {
                node.kind = kind::RESERVED;
            }
            return Ok(());
        }
        let inode = Inode::parse(ino, slot, self.fs.geometry())?;
        self.fields(&inode, &raw)?;
        let sectors = self.xattrs(&inode)?;
        let claims = self.contents(&inode, &raw)?;
        self.claim(&inode, &raw, &claims, sectors)?;
        let geometry = self.fs.geometry();
        match inode.kind {
            FileKind::Symlink => {
                self.fs.symlink_target(&inode)?;
                if inode.size >= u64::from(geometry.block_size) {
                    return bad(InodeFault::SymlinkLength);
                }
            }
            FileKind::File if inode.has(InodeFlags::EXT4_INLINE_DATA_FL) => {
                self.fs.inline_bytes(&inode)?;
            }
            FileKind::Directory => self.directory(&inode)?,
            _ => {}
        }
        let is_ea = inode.has(InodeFlags::EXT4_EA_INODE_FL);
        if is_ea && (inode.size > XATTR_SIZE_MAX as u64 || inode.links != 1) {
            return bad(InodeFault::XattrValue);
        }
        let Some(node) = self.node(ino) else { return bad(InodeFault::Number) };
        node.kind = if is_ea { kind::EA } else { file_type(inode.mode) };
        node.links = if is_ea {
            // The reference count of a value: low half in i_version, high half in i_ctime (fs/ext4/xattr.c).
            if raw.i_ctime.get() == 0 { raw.i_version.get() } else { u32::MAX }
        } else {
            u32::from(inode.links)
        };
        Ok(())
    }

    /// Fields and flags, and whether they fit each other and the file system's features.
    fn fields(&self, inode: &Inode, raw: &RawInode) -> Result<(), Ext4Error> {
        let bad = |fault| Err(Ext4Error::corrupt(fault, Place::inode(inode.ino)));
        let geometry = self.fs.geometry();
        if !EXTRA_ISIZES.contains(&raw.i_extra_isize.get()) {
            return bad(InodeFault::ExtraSize);
        }
        if raw.i_dtime.get() != 0 || inode.links == 0 {
            return bad(InodeFault::Deleted);
        }
        let hcsshim = self.layout == Layout::Hcsshim;
        let known = if hcsshim { HCSSHIM_FLAGS } else { FLAGS };
        let always = self.always();
        if !known.contains(inode.flags) || !inode.has(always) {
            return bad(InodeFault::Flags);
        }
        if !nanoseconds_fit(raw) {
            return bad(InodeFault::Nanoseconds);
        }
        if raw.i_reserved.get() != 0 || raw.i_obso_faddr.get() != 0 || raw.i_projid.get() != 0 {
            return bad(InodeFault::UnknownFields);
        }
        let large = match inode.kind {
            FileKind::File => true,
            FileKind::Directory => geometry.has(Incompat::EXT4_FEATURE_INCOMPAT_LARGEDIR),
            _ => false,
        };
        if !large && raw.i_size_high.get() != 0 {
            return bad(InodeFault::SizeTooLarge);
        }
        let index = inode.has(InodeFlags::EXT4_INDEX_FL);
        let inline_data = inode.has(InodeFlags::EXT4_INLINE_DATA_FL);
        let ea_inode = inode.has(InodeFlags::EXT4_EA_INODE_FL);
        // What an inode uses, its file system must declare; the kernel and e2fsck look there first.
        let compat = |feature| geometry.has_compat(feature);
        let ro_compat = |feature| geometry.has_ro(feature);
        if inode.file_acl != 0 && !compat(Compat::EXT4_FEATURE_COMPAT_EXT_ATTR) {
            return bad(InodeFault::NoExtAttr);
        }
        if index && !compat(Compat::EXT4_FEATURE_COMPAT_DIR_INDEX) {
            return bad(InodeFault::NoDirIndex);
        }
        if inode.has(InodeFlags::EXT4_HUGE_FILE_FL) && !ro_compat(RoCompat::EXT4_FEATURE_RO_COMPAT_HUGE_FILE)
        {
            return bad(InodeFault::NoHugeFile);
        }
        let is_large = inode.kind == FileKind::File && inode.size >= 1 << 31;
        if is_large && !ro_compat(RoCompat::EXT4_FEATURE_RO_COMPAT_LARGE_FILE) {
            return bad(InodeFault::NoLargeFile);
        }
        if self.writer > 1
            && matches!(inode.kind, FileKind::File | FileKind::Directory)
            && !inode.has(InodeFlags::EXT4_EXTENTS_FL)
            && looks_like_root(inode.i_block())
        {
            return bad(InodeFault::LooksLikeExtents);
        }
        if inline_data && !geometry.has(Incompat::EXT4_FEATURE_INCOMPAT_INLINE_DATA)
            || ea_inode
                && (!geometry.has(Incompat::EXT4_FEATURE_INCOMPAT_EA_INODE) || inode.kind != FileKind::File)
            || index && inode.kind != FileKind::Directory
            || inline_data && inode.flags.difference(always) != InodeFlags::EXT4_INLINE_DATA_FL
            || hcsshim && inline_data && inode.kind != FileKind::File
        {
            return bad(InodeFault::FlagCombination);
        }
        Ok(())
    }

    /// Flags that every inode has: hcsshim's tar2ext4 counts `i_blocks` in blocks.
    fn always(&self) -> InodeFlags {
        match self.layout {
            Layout::Hcsshim => InodeFlags::EXT4_HUGE_FILE_FL,
            Layout::Default => InodeFlags::empty(),
        }
    }

    /// What `i_block` holds; gives the blocks of the inode.
    fn contents(&self, inode: &Inode, raw: &RawInode) -> Result<Claims, Ext4Error> {
        let bad = |fault| Err(Ext4Error::corrupt(fault, Place::inode(inode.ino)));
        let only_always = inode.flags == self.always();
        let has_extents = inode.has(InodeFlags::EXT4_EXTENTS_FL);
        let mut claims = Claims { extents: Vec::new(), nodes: Vec::new() };
        match inode.kind {
            FileKind::File | FileKind::Directory | FileKind::Symlink
                if inode.has(InodeFlags::EXT4_INLINE_DATA_FL) => {}
            FileKind::Symlink if inode.size < I_BLOCK_SIZE as u64 => {
                if has_extents {
                    return bad(InodeFault::SymlinkShort);
                }
                let rest = raw.i_block.get(inode.size as usize..).unwrap_or(&[]);
                if rest.iter().any(|b| *b != 0) {
                    return bad(InodeFault::SymlinkEnd);
                }
            }
            FileKind::File if self.layout == Layout::Hcsshim && inode.size == 0 && !has_extents => {
                if raw.i_block != [0; I_BLOCK_SIZE] {
                    return bad(InodeFault::EmptyFile);
                }
            }
            FileKind::File | FileKind::Directory | FileKind::Symlink => {
                if !has_extents {
                    return bad(InodeFault::NoExtents);
                }
                extent::walk(&self.fs.source, inode, &mut claims)?;
            }
            FileKind::CharDevice | FileKind::BlockDevice => {
                let [old, new, rest @ ..] = raw.i_block_words();
                if self.writer > 1 && inode.links != 1 && self.looks_like_directory(inode.ino, old)? {
                    return bad(InodeFault::DeviceLooksLikeDirectory);
                }
                if !only_always
                    || inode.size != 0
                    || old > 0xFFFF
                    || old != 0 && new != 0
                    || rest.iter().any(|word| *word != 0)
                {
                    return bad(InodeFault::Device);
                }
            }
            FileKind::Fifo | FileKind::Socket => {
                if !only_always || inode.size != 0 || raw.i_block != [0; I_BLOCK_SIZE] {
                    return bad(InodeFault::PipeContents);
                }
            }
        }
        Ok(claims)
    }

    /// Claims the blocks of an inode and checks their number and end; `sectors` is what its xattrs add to `i_blocks`.
    fn claim(
        &mut self,
        inode: &Inode,
        raw: &RawInode,
        claims: &Claims,
        mut sectors: u64,
    ) -> Result<(), Ext4Error> {
        let place = Place::inode(inode.ino);
        let bad = |fault| Err(Ext4Error::corrupt(fault, place));
        let block_size = self.fs.geometry().block_size;
        let block_sectors = u64::from(block_size) / SECTOR;
        for block in &claims.nodes {
            self.blocks.claim(*block, 1, place)?;
            sectors += block_sectors;
        }
        for extent in &claims.extents {
            self.blocks.claim(extent.physical_block, u64::from(extent.blocks), place)?;
            sectors += u64::from(extent.blocks) * block_sectors;
        }
        let inline_data = inode.has(InodeFlags::EXT4_INLINE_DATA_FL);
        let has_extents = inode.has(InodeFlags::EXT4_EXTENTS_FL);
        if inode.kind == FileKind::Symlink && has_extents {
            let ([], [extent @ Extent { blocks: 1, .. }]) = (&claims.nodes[..], &claims.extents[..]) else {
                return bad(InodeFault::SymlinkBlocks);
            };
            // Programs that take the target for a string must find the same end.
            let block = self.fs.source.block(extent.physical_block)?;
            if block.get(inode.size as usize) != Some(&0) {
                return bad(InodeFault::SymlinkEnd);
            }
        }
        if inode.kind == FileKind::Symlink && inline_data {
            let rest = xattr::inline_data(inode)?.unwrap_or(&[]);
            if inode.size != (I_BLOCK_SIZE + rest.len()) as u64 {
                return bad(InodeFault::SymlinkEnd);
            }
        }
        if has_extents {
            let depth =
                ExtentHeader::read_from_prefix(raw.i_block.as_bytes()).map_or(0, |(h, _)| h.eh_depth.get());
            if depth > max_depth(block_size) || depth > 0 && claims.nodes.is_empty() {
                return Err(Ext4Error::corrupt(ExtentFault::TooDeep, place));
            }
        }
        let end = claims.extents.last().map_or(0, |e| u64::from(e.logical_block) + u64::from(e.blocks));
        if !inline_data && end > inode.size.div_ceil(u64::from(block_size)) {
            return bad(InodeFault::BlocksBeyondEnd);
        }
        if inode.size >= u64::from(block_size) << 32 {
            return bad(InodeFault::SizeTooLarge);
        }
        let unit = if inode.has(InodeFlags::EXT4_HUGE_FILE_FL) { block_sectors } else { 1 };
        if raw.blocks() * unit != sectors {
            return bad(InodeFault::BlocksCount);
        }
        Ok(())
    }

    /// Whether the block with a device's number could be taken for the first one of a directory that is inode `ino`
    /// (e2fsck, `check_is_really_dir`).
    fn looks_like_directory(&self, ino: u32, number: u32) -> Result<bool, Ext4Error> {
        let geometry = self.fs.geometry();
        if !geometry.holds(u64::from(number), 1) {
            return Ok(false);
        }
        let block = self.fs.source.block(u64::from(number))?;
        let Ok(dot) = dir::entry(&block, 0, geometry) else { return Ok(false) };
        Ok(dot.name == b"." && dot.ino == ino)
    }
}

/// The deepest extent tree that a file of blocks of this size can need (e2fsck, `ext2fs_max_extent_depth`).
fn max_depth(block_size: u32) -> u16 {
    let in_block = (block_size - ENTRY_SIZE as u32) / ENTRY_SIZE as u32;
    (1 + (31 - ROOT_MAX.ilog2()) / in_block.ilog2()) as u16
}
