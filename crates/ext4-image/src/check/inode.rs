//! One inode: fields, flags, extents, devices, symbolic links.
//!
//! Called by [`super::Checker::inode_table`] for each inode that the bitmap calls used.

use super::{Checker, FIRST_INO, Layout, ROOT_INO, file_type, kind};
use crate::{
    Ext4Error, Extent, FileKind, Inode,
    layout::{BAD_INO, extent::looks_like_root},
    reader::{
        bytes::{u16_at, u32_at},
        corrupt, dir, extent,
        inode::{checksum_matches, flags},
        superblock::{compat, incompat, ro_compat},
        xattr,
    },
};
use disk_io::ReadAt;

/// `i_flags` that our writer sets.
const FLAGS: u32 = flags::EXTENTS | flags::INDEX | flags::INLINE_DATA | flags::EA_INODE | flags::HUGE_FILE;

/// Those of profile hcsshim, which has no hash trees and no values in inodes.
const HCSSHIM_FLAGS: u32 = flags::EXTENTS | flags::INLINE_DATA | flags::HUGE_FILE;

/// Bytes of inline data in `i_block`.
const INLINE: usize = 60;

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
            return Err(corrupt(format!("block {}", extent.physical_block), "an unwritten extent"));
        }
        extent::Visitor::extent(&mut self.extents, extent)
    }
}

impl<R: ReadAt> Checker<R> {
    pub(super) fn inode(&mut self, ino: u32, raw: &[u8]) -> Result<(), Ext4Error> {
        let place = || format!("inode {ino}");
        let bad = |reason: &'static str| Err(corrupt(place(), reason));
        if ino < FIRST_INO && ino != ROOT_INO {
            // mke2fs gives the bad-blocks inode times, and every inode a checksum: both are harmless.
            let empty = [(0, 2), (4, 4), (20, 4), (26, 2), (28, 4), (32, 4), (40, 60), (104, 8), (116, 4)];
            // The list of bad blocks has no owner either.
            let owner: &[(usize, usize)] = if ino == BAD_INO { &[(2, 2), (24, 2)] } else { &[] };
            if empty
                .iter()
                .chain(owner)
                .any(|(at, len)| raw.get(*at..at + len).is_none_or(|f| f.iter().any(|b| *b != 0)))
            {
                return bad("a reserved inode is in use");
            }
            if self.layout == Layout::Default
                && raw.iter().any(|b| *b != 0)
                && !checksum_matches(ino, raw, self.fs.geometry())
            {
                return bad("checksum does not match");
            }
            if let Some(node) = self.node(ino) {
                node.kind = kind::RESERVED;
            }
            return Ok(());
        }
        let geometry = self.fs.geometry().clone();
        let inode = Inode::parse(ino, raw, &geometry)?;
        let extra = usize::from(u16_at(raw, 128));
        if !(24..=32).contains(&extra) {
            return bad("unusual i_extra_isize");
        }
        if u32_at(raw, 20) != 0 || inode.links == 0 {
            return bad("used, but deleted");
        }
        let hcsshim = self.layout == Layout::Hcsshim;
        let known = if hcsshim { HCSSHIM_FLAGS } else { FLAGS };
        // That tool marks every inode so: its count is in blocks.
        let always = if hcsshim { flags::HUGE_FILE } else { 0 };
        if inode.flags & !known != 0 || inode.flags & always != always {
            return bad("flags that our writer does not set");
        }
        if [132, 136, 140, 148].iter().any(|at| u32_at(raw, *at) >> 2 > 999_999_999) {
            return bad("more nanoseconds than a second has");
        }
        if u16_at(raw, 126) != 0 || u32_at(raw, 112) != 0 || (extra >= 32 && u32_at(raw, 156) != 0) {
            return bad("unknown fields are not zero");
        }
        let large = match inode.kind {
            FileKind::File => true,
            FileKind::Directory => geometry.has(incompat::LARGEDIR),
            _ => false,
        };
        if !large && u32_at(raw, 108) != 0 {
            return bad("its size is too large");
        }
        // What an inode uses, its file system must say it has; the kernel and e2fsck look there first.
        for (uses, has, missing) in [
            (
                inode.file_acl != 0,
                geometry.feature_compat & compat::EXT_ATTR,
                "xattrs in a block, but no such feature",
            ),
            (
                inode.has(flags::INDEX),
                geometry.feature_compat & compat::DIR_INDEX,
                "a hash tree, but no such feature",
            ),
            (
                inode.has(flags::HUGE_FILE),
                geometry.feature_ro_compat & ro_compat::HUGE_FILE,
                "a count in blocks, but no such feature",
            ),
            (
                inode.kind == FileKind::File && inode.size >= 1 << 31,
                geometry.feature_ro_compat & ro_compat::LARGE_FILE,
                "2 GiB or more, but no feature large_file",
            ),
        ] {
            if uses && has == 0 {
                return bad(missing);
            }
        }
        if self.writer > 1
            && matches!(inode.kind, FileKind::File | FileKind::Directory)
            && !inode.has(flags::EXTENTS)
            && looks_like_root(inode.i_block())
        {
            return bad("inline data that look like an extent tree");
        }
        if inode.has(flags::INLINE_DATA) && !geometry.has(incompat::INLINE_DATA)
            || inode.has(flags::EA_INODE)
                && (!geometry.has(incompat::EA_INODE) || inode.kind != FileKind::File)
            || inode.has(flags::INDEX) && inode.kind != FileKind::Directory
            || inode.has(flags::INLINE_DATA) && inode.flags & !always != flags::INLINE_DATA
            || hcsshim && inode.has(flags::INLINE_DATA) && inode.kind != FileKind::File
        {
            return bad("flags that do not go together");
        }
        let mut sectors = self.xattrs(&inode)?;
        let block_sectors = u64::from(geometry.block_size) / 512;
        let mut claims = Claims { extents: Vec::new(), nodes: Vec::new() };
        match inode.kind {
            FileKind::File | FileKind::Directory | FileKind::Symlink if inode.has(flags::INLINE_DATA) => {}
            FileKind::Symlink if inode.size < 60 => {
                if inode.has(flags::EXTENTS) {
                    return bad("a short symbolic link with blocks");
                }
                let rest = inode.i_block().get(inode.size as usize..).unwrap_or(&[]);
                if rest.iter().any(|b| *b != 0) {
                    return bad("a symbolic link's target is longer than its size");
                }
            }
            FileKind::File if hcsshim && inode.size == 0 && !inode.has(flags::EXTENTS) => {
                if inode.i_block().iter().any(|b| *b != 0) {
                    return bad("an empty file with contents");
                }
            }
            FileKind::File | FileKind::Directory | FileKind::Symlink => {
                if !inode.has(flags::EXTENTS) {
                    return bad("it has no extents");
                }
                extent::walk(&self.fs.source, &inode, &mut claims)?;
            }
            FileKind::CharDevice | FileKind::BlockDevice => {
                let old = u32_at(raw, 40);
                if self.writer > 1 && inode.links != 1 && self.looks_like_directory(ino, old)? {
                    return bad("a device whose number is that of a block that looks like its folder");
                }
                let rest = if old != 0 { raw.get(44..100) } else { raw.get(48..100) };
                if inode.flags != always
                    || inode.size != 0
                    || old > 0xFFFF
                    || rest.is_none_or(|r| r.iter().any(|b| *b != 0))
                {
                    return bad("a device that is malformed");
                }
            }
            FileKind::Fifo | FileKind::Socket => {
                if inode.flags != always || inode.size != 0 || inode.i_block().iter().any(|b| *b != 0) {
                    return bad("a pipe or socket with contents");
                }
            }
        }
        for block in &claims.nodes {
            self.blocks.claim(*block, 1, &place)?;
            sectors += block_sectors;
        }
        for extent in &claims.extents {
            self.blocks.claim(extent.physical_block, u64::from(extent.blocks), &place)?;
            sectors += u64::from(extent.blocks) * block_sectors;
        }
        if inode.kind == FileKind::Symlink
            && inode.has(flags::EXTENTS)
            && (!claims.nodes.is_empty() || claims.extents.len() != 1 || claims.extents[0].blocks != 1)
        {
            return bad("a symbolic link of more than one block");
        }
        if let (FileKind::Symlink, [extent]) = (inode.kind, claims.extents.as_slice()) {
            // Whoever takes the target for a string must come to the same end.
            let block = self.fs.source.block(extent.physical_block)?;
            if block.get(inode.size as usize) != Some(&0) {
                return bad("a symbolic link whose target goes on behind its size");
            }
        }
        if inode.kind == FileKind::Symlink && inode.has(flags::INLINE_DATA) {
            let rest = xattr::inline_data(&inode)?.unwrap_or(&[]);
            if inode.size != (INLINE + rest.len()) as u64 {
                return bad("a symbolic link whose target ends elsewhere than its inline data");
            }
        }
        let depth = u16_at(inode.i_block(), 6);
        if inode.has(flags::EXTENTS)
            && (depth > max_depth(geometry.block_size) || depth > 0 && claims.nodes.is_empty())
        {
            return bad("its extent tree is too deep");
        }
        let end = claims.extents.last().map_or(0, |e| u64::from(e.logical_block) + u64::from(e.blocks));
        if !inode.has(flags::INLINE_DATA) && end > inode.size.div_ceil(u64::from(geometry.block_size)) {
            return bad("blocks behind its end");
        }
        if inode.size >= u64::from(geometry.block_size) << 32 {
            return bad("its size is too large");
        }
        let stored =
            if inode.has(flags::HUGE_FILE) { inode.i_blocks() * block_sectors } else { inode.i_blocks() };
        if stored != sectors {
            return bad("its count of blocks is wrong");
        }
        let is_ea = inode.has(flags::EA_INODE);
        match inode.kind {
            FileKind::Symlink => {
                self.fs.symlink_target(&inode)?;
                if inode.size >= u64::from(geometry.block_size) {
                    return bad("a symbolic link's target is too long");
                }
            }
            FileKind::File if inode.has(flags::INLINE_DATA) => {
                self.fs.inline_bytes(&inode)?;
            }
            FileKind::Directory => self.directory(&inode)?,
            _ => {}
        }
        if is_ea && (inode.size > u64::from(super::xattr::MAX_VALUE) || inode.links != 1) {
            return bad("an xattr's value of impossible size");
        }
        let Some(node) = self.node(ino) else { return bad("it lies outside the file system") };
        node.kind = if is_ea { kind::EA } else { file_type(inode.kind) };
        node.links = if is_ea {
            // The reference count of a value: low half in i_version, high half in i_ctime (fs/ext4/xattr.c).
            if u32_at(raw, 12) == 0 { u32_at(raw, 36) } else { u32::MAX }
        } else {
            u32::from(inode.links)
        };
        Ok(())
    }

    /// Whether the block with a device's number could be taken for the first one of a folder that is inode `ino`
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
    const ENTRY: u32 = 12;
    const ROOT_ENTRIES: u32 = 4;
    let in_block = (block_size - ENTRY) / ENTRY;
    (1 + (31 - ROOT_ENTRIES.ilog2()) / in_block.ilog2()) as u16
}
