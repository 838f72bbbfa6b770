//! The bytes of files and symbolic links.
//!
//! ```text
//!  inline data:  i_block (60) ++ system.data        fast symlink: i_block
//!  else:         extents ─► data ranges; holes and unwritten extents read as zeros
//! ```
//!
//! Called by `layer-codec` (streams by [`Ext4::data_map`]) and by the reader itself for xattr values.

use super::{
    Ext4,
    extent::Extent,
    inode::{FileKind, Inode},
    xattr,
};
use crate::{
    Ext4Error, Place,
    error::InodeFault,
    layout::inode::{I_BLOCK_SIZE, InodeFlags},
};
use disk_io::ReadAt;
use std::fs::File;

/// The longest target of a symbolic link (`PATH_MAX` with its NUL left out).
const MAX_TARGET: u64 = 4095;

/// A byte range of a file that holds data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataRange {
    /// Offset in the file.
    pub offset: u64,
    /// Length in bytes, at least 1.
    pub len: u64,
    /// Offset on the disk; `None` for inline data, which [`Ext4::inline_bytes`] gives.
    pub disk_offset: Option<u64>,
}

impl<R: ReadAt> Ext4<R> {
    /// The bytes of a file whose data is inside its inode; `None` for all others.
    ///
    /// # Errors
    /// `Corrupt` where fewer bytes are stored than the size says.
    pub fn inline_bytes(&self, inode: &Inode) -> Result<Option<Vec<u8>>, Ext4Error> {
        if !inode.has(InodeFlags::EXT4_INLINE_DATA_FL) || inode.kind == FileKind::Directory {
            return Ok(None);
        }
        let mut bytes = inode.i_block().to_vec();
        if let Some(rest) = xattr::inline_data(inode)? {
            bytes.extend_from_slice(rest);
        }
        match usize::try_from(inode.size) {
            Ok(size) if size <= bytes.len() => {
                bytes.truncate(size);
                Ok(Some(bytes))
            }
            _ => Err(Ext4Error::corrupt(InodeFault::InlineSize, Place::inode(inode.ino))),
        }
    }

    /// The byte ranges of a file that hold data, in order, clipped to its size; neighbors on disk are joined.
    ///
    /// # Errors
    /// `Corrupt` where the extents are broken.
    pub fn data_map(&self, inode: &Inode) -> Result<Vec<DataRange>, Ext4Error> {
        if inode.has(InodeFlags::EXT4_INLINE_DATA_FL) {
            let len = inode.size;
            return Ok(if len == 0 {
                Vec::new()
            } else {
                vec![DataRange { offset: 0, len, disk_offset: None }]
            });
        }
        let block_size = u64::from(self.geometry().block_size);
        let mut ranges = Vec::new();
        for Extent { logical_block, physical_block, blocks, unwritten } in self.extents(inode)? {
            let offset = u64::from(logical_block) * block_size;
            if unwritten || offset >= inode.size {
                continue;
            }
            let len = (u64::from(blocks) * block_size).min(inode.size - offset);
            ranges.push(DataRange { offset, len, disk_offset: Some(physical_block * block_size) });
        }
        Ok(ranges)
    }

    /// Reads file bytes from `offset`; short only at the end of the file.
    ///
    /// # Errors
    /// `Corrupt` where the format is broken, `Io` where the disk fails.
    pub fn read_file_at(&self, inode: &Inode, offset: u64, buf: &mut [u8]) -> Result<usize, Ext4Error> {
        let left = inode.size.saturating_sub(offset);
        let want = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let buf = &mut buf[..want];
        if let Some(bytes) = self.inline_bytes(inode)? {
            if let Some(part) = bytes.get(offset as usize..offset as usize + want) {
                buf.copy_from_slice(part);
            }
            return Ok(want);
        }
        buf.fill(0);
        let end = offset + want as u64;
        for range in self.data_map(inode)? {
            let from = range.offset.max(offset);
            let to = (range.offset + range.len).min(end);
            let (true, Some(place)) = (from < to, range.disk_offset) else { continue };
            let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
            self.read_disk(place + (from - range.offset), part)?;
        }
        Ok(want)
    }

    /// Reads bytes of the file system as they are after recovery, at the places that [`Ext4::data_map`] gives.
    ///
    /// # Errors
    /// `Io` where the disk fails or ends.
    pub fn read_disk(&self, disk_offset: u64, buf: &mut [u8]) -> Result<(), Ext4Error> {
        self.source.read(disk_offset, buf)
    }

    /// Where an open file holds the bytes that [`Ext4::read_disk`] would give, if one does.
    pub fn in_file(&self, disk_offset: u64, len: u64) -> Option<(&File, u64)> {
        self.source.in_file(disk_offset, len)
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// `Corrupt` if it is not a link, or its target is empty, too long or contains NUL.
    pub fn symlink_target(&self, inode: &Inode) -> Result<Vec<u8>, Ext4Error> {
        let bad = |fault| Err(Ext4Error::corrupt(fault, Place::inode(inode.ino)));
        if inode.kind != FileKind::Symlink || inode.size == 0 || inode.size > MAX_TARGET {
            return bad(InodeFault::SymlinkLength);
        }
        if inode.has(InodeFlags::EXT4_ENCRYPT_FL) {
            return Err(Ext4Error::unsupported("an encrypted symbolic link", Place::inode(inode.ino)));
        }
        let mut target = vec![0; inode.size as usize];
        // `ext4_inode_is_fast_symlink`: short targets are in i_block, unless they are inline data.
        let elsewhere = InodeFlags::EXT4_INLINE_DATA_FL | InodeFlags::EXT4_EXTENTS_FL;
        if target.len() < I_BLOCK_SIZE && !inode.flags.intersects(elsewhere) {
            let Some(stored) = inode.i_block().get(..target.len()) else { return bad(InodeFault::CutOff) };
            target.copy_from_slice(stored);
        } else {
            self.read_file_at(inode, 0, &mut target)?;
        }
        if target.contains(&0) {
            return bad(InodeFault::SymlinkNul);
        }
        Ok(target)
    }
}
