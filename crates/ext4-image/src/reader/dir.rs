//! Directories: linear blocks, hashed directories read as linear ones, and directories inside the inode.
//!
//! ```text
//!  inode u32 │ rec_len u16 │ name_len u8 │ file_type u8 │ name … (padded to 4)
//!  hashed: block 0 holds `.`, `..` and hides its index in the rec_len of `..`; other index blocks are one empty entry
//!  inline: i_block = parent's inode u32, entries (56 bytes); more entries in the xattr `system.data`
//! ```
//!
//! Every entry is checked (length, alignment, name, inode number); `.` and `..` are not reported. A directory may have
//! at most [`MAX_DIR_BYTES`]. Called by [`super::Ext4::read_dir`], `visit_dir` and `lookup`.

use super::{
    Ext4,
    inode::{FileKind, Inode},
    superblock::Geometry,
    xattr,
};
use crate::{
    Ext4Error, Place,
    error::DirFault,
    layout::{
        EXT4_NAME_LEN,
        dir::{
            DX_NODE_OFFSET, DX_ROOT_OFFSET, DirEntryHead, HEAD_SIZE, INLINE_DOTDOT_SIZE, dx_checksum_matches,
            entry_size, leaf_checksum_matches,
        },
        inode::InodeFlags,
        superblock::Incompat,
    },
};
use disk_io::ReadAt;
use zerocopy::FromBytes;

/// The largest directory that is read, in bytes: more than ten million short names.
pub(crate) const MAX_DIR_BYTES: u64 = 512 << 20;

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name, 1 to 255 bytes without NUL and `/`.
    pub name: Vec<u8>,
    /// Its inode.
    pub ino: u32,
    /// What it is, as the directory says; `None` where the directory does not say.
    pub kind: Option<FileKind>,
}

/// An entry inside a buffer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawEntry<'a> {
    /// Offset in the buffer.
    pub(crate) at: usize,
    pub(crate) ino: u32,
    pub(crate) rec_len: usize,
    pub(crate) file_type: u8,
    pub(crate) name: &'a [u8],
}

/// Reads the entry at `at`; the error is the rule that it breaks.
pub(crate) fn entry<'a>(buf: &'a [u8], at: usize, geometry: &Geometry) -> Result<RawEntry<'a>, DirFault> {
    let rest = buf.get(at..).unwrap_or(&[]);
    let Ok((head, after)) = DirEntryHead::ref_from_prefix(rest) else {
        return Err(DirFault::EntryCutOff);
    };
    let stored = usize::from(head.rec_len.get());
    // Blocks of 64 KiB need a length that 16 bits do not hold (`ext4_rec_len_from_disk`).
    let rec_len =
        if geometry.block_size == 65536 && (stored == 65535 || stored == 0) { 65536 } else { stored };
    let (name_len, file_type) = if geometry.has(Incompat::EXT4_FEATURE_INCOMPAT_FILETYPE) {
        (usize::from(head.name_len), head.file_type)
    } else {
        (usize::from(u16::from_le_bytes([head.name_len, head.file_type])), 0)
    };
    if rec_len < entry_size(1)
        || !rec_len.is_multiple_of(4)
        || rec_len > rest.len()
        || HEAD_SIZE + name_len > rec_len
    {
        return Err(DirFault::EntryLength);
    }
    let ino = head.inode.get();
    let name = after.get(..name_len).unwrap_or(&[]);
    if ino != 0 {
        if ino > geometry.inodes_count {
            return Err(DirFault::EntryInode);
        }
        if name.is_empty() || name.len() > EXT4_NAME_LEN || name.iter().any(|b| *b == 0 || *b == b'/') {
            return Err(DirFault::EntryName);
        }
    }
    Ok(RawEntry { at, ino, rec_len, file_type, name })
}

/// Where the entries of an index block begin, if this is one.
pub(crate) fn index_at(block: &[u8], first: bool, indexed: bool) -> Option<usize> {
    if first {
        return indexed.then_some(DX_ROOT_OFFSET);
    }
    let (head, _) = DirEntryHead::ref_from_prefix(block).ok()?;
    let fake = usize::from(head.rec_len.get()) == block.len() % 65536 && head.inode.get() == 0;
    (indexed && fake).then_some(DX_NODE_OFFSET)
}

/// Checks the checksum of a directory block: of an index block whose entries begin at `index`, or of a leaf.
pub(crate) fn checksum_matches(block: &[u8], index: Option<usize>, seed: u32) -> bool {
    match index {
        Some(at) => dx_checksum_matches(seed, block, at),
        None => leaf_checksum_matches(seed, block),
    }
}

impl<R: ReadAt> Ext4<R> {
    /// Calls `visit(name, inode, kind)` for each name of `dir` but `.` and `..`, in stored order.
    ///
    /// # Errors
    /// `Corrupt` if it is not a directory or breaks the format; the errors of `visit`.
    pub fn visit_dir<E: From<Ext4Error>>(
        &self,
        dir: &Inode,
        mut visit: impl FnMut(&[u8], u32, Option<FileKind>) -> Result<(), E>,
    ) -> Result<(), E> {
        let geometry = self.geometry();
        let place = Place::inode(dir.ino);
        let bad = |fault| Err(Ext4Error::corrupt(fault, place).into());
        if dir.kind != FileKind::Directory {
            return bad(DirFault::NotADirectory);
        }
        if dir.has(InodeFlags::EXT4_INLINE_DATA_FL) {
            let head = dir.i_block().get(INLINE_DOTDOT_SIZE..).unwrap_or(&[]);
            visit_entries(head, geometry, place, &mut visit)?;
            if let Some(rest) = xattr::inline_data(dir)?
                && !rest.is_empty()
            {
                visit_entries(rest, geometry, place, &mut visit)?;
            }
            return Ok(());
        }
        let block_size = u64::from(geometry.block_size);
        if !dir.size.is_multiple_of(block_size) || dir.size == 0 {
            return bad(DirFault::Size);
        }
        if dir.size > MAX_DIR_BYTES {
            let what = format!("a directory of {} bytes (at most {MAX_DIR_BYTES})", dir.size);
            return Err(Ext4Error::unsupported(what, place).into());
        }
        let seed = dir.seed(geometry);
        let blocks = (dir.size / block_size) as u32;
        let mut next = 0u32;
        for extent in self.extents(dir)? {
            if extent.logical_block >= blocks {
                break;
            }
            if extent.logical_block != next || extent.unwritten {
                return bad(DirFault::Hole);
            }
            for i in 0..extent.blocks.min(blocks - next) {
                let number = extent.physical_block + u64::from(i);
                self.source.visit(1)?;
                let block = self.source.block(number)?;
                let indexed = dir.has(InodeFlags::EXT4_INDEX_FL);
                let index = index_at(&block, extent.logical_block + i == 0, indexed);
                let place = place.at_block(number);
                if geometry.metadata_csum() && !checksum_matches(&block, index, seed) {
                    return Err(Ext4Error::corrupt(DirFault::Checksum, place).into());
                }
                visit_entries(&block, geometry, place, &mut visit)?;
            }
            next = extent.logical_block.saturating_add(extent.blocks);
        }
        if next < blocks {
            return bad(DirFault::Hole);
        }
        Ok(())
    }

    /// All names of `dir` but `.` and `..`, in stored order.
    ///
    /// # Errors
    /// As [`Ext4::visit_dir`].
    pub fn read_dir(&self, dir: &Inode) -> Result<Vec<DirEntry>, Ext4Error> {
        let mut entries = Vec::new();
        self.visit_dir(dir, |name, ino, kind| {
            entries.push(DirEntry { name: name.to_vec(), ino, kind });
            Ok::<(), Ext4Error>(())
        })?;
        Ok(entries)
    }

    /// The inode of `name` in `dir`. Reads the whole directory.
    ///
    /// # Errors
    /// As [`Ext4::visit_dir`].
    pub fn lookup(&self, dir: &Inode, name: &[u8]) -> Result<Option<u32>, Ext4Error> {
        let mut found = None;
        self.visit_dir(dir, |other, ino, _| {
            if other == name {
                found = Some(ino);
            }
            Ok::<(), Ext4Error>(())
        })?;
        Ok(found)
    }
}

fn visit_entries<E: From<Ext4Error>>(
    buf: &[u8],
    geometry: &Geometry,
    place: Place,
    visit: &mut impl FnMut(&[u8], u32, Option<FileKind>) -> Result<(), E>,
) -> Result<(), E> {
    let mut at = 0;
    while at < buf.len() {
        disk_io::steps::add(1);
        let entry = entry(buf, at, geometry)
            .map_err(|fault| Ext4Error::corrupt(fault, place.at_offset(at as u64)))?;
        if entry.ino != 0 && entry.name != b"." && entry.name != b".." {
            visit(entry.name, entry.ino, FileKind::from_dirent(entry.file_type))?;
        }
        at += entry.rec_len;
    }
    Ok(())
}
