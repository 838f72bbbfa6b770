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
    bytes::{chksum, u8_at, u16_at, u32_at},
    corrupt,
    inode::{FileKind, Inode, flags},
    superblock::{Geometry, incompat},
    unsupported, xattr,
};
use crate::Ext4Error;
use disk_io::ReadAt;

/// The largest directory that is read, in bytes: more than ten million short names.
pub(crate) const MAX_DIR_BYTES: u64 = 512 << 20;
/// Bytes of an entry before its name.
const HEAD: usize = 8;
/// `EXT4_FT_DIR_CSUM`.
const CHECKSUM_TYPE: u8 = 0xDE;

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

/// Reads the entry at `at`; the error says what is wrong with it.
pub(crate) fn entry<'a>(buf: &'a [u8], at: usize, geometry: &Geometry) -> Result<RawEntry<'a>, &'static str> {
    let rest = buf.get(at..).unwrap_or(&[]);
    if rest.len() < HEAD {
        return Err("a directory entry is cut off");
    }
    let stored = usize::from(u16_at(rest, 4));
    // Blocks of 64 KiB need a length that 16 bits do not hold (`ext4_rec_len_from_disk`).
    let rec_len =
        if geometry.block_size == 65536 && (stored == 65535 || stored == 0) { 65536 } else { stored };
    let (name_len, file_type) = if geometry.has(incompat::FILETYPE) {
        (usize::from(u8_at(rest, 6)), u8_at(rest, 7))
    } else {
        (usize::from(u16_at(rest, 6)), 0)
    };
    if rec_len < HEAD + 4 || !rec_len.is_multiple_of(4) || rec_len > rest.len() || HEAD + name_len > rec_len {
        return Err("a directory entry has an impossible length");
    }
    let ino = u32_at(rest, 0);
    let name = rest.get(HEAD..HEAD + name_len).unwrap_or(&[]);
    if ino != 0 {
        if ino > geometry.inodes_count {
            return Err("a directory entry names an inode outside the file system");
        }
        if name.is_empty() || name.len() > 255 || name.iter().any(|b| *b == 0 || *b == b'/') {
            return Err("a directory entry has an impossible name");
        }
    }
    Ok(RawEntry { at, ino, rec_len, file_type, name })
}

/// Whether the last twelve bytes of a leaf block are its checksum entry.
pub(crate) fn has_tail(block: &[u8]) -> bool {
    let Some(at) = block.len().checked_sub(12) else { return false };
    u32_at(block, at) == 0
        && u16_at(block, at + 4) == 12
        && u16_at(block, at + 6) == u16::from(CHECKSUM_TYPE) << 8
}

/// Where the count and limit of an index block stand, if this is one.
pub(crate) fn index_at(block: &[u8], first: bool, indexed: bool) -> Option<usize> {
    if first {
        return indexed.then_some(32);
    }
    (indexed && usize::from(u16_at(block, 4)) == block.len() % 65536 && u32_at(block, 0) == 0).then_some(8)
}

/// Checks the checksum of a directory block.
pub(crate) fn checksum_matches(block: &[u8], index: Option<usize>, seed: u32) -> bool {
    let Some(at) = index else {
        let end = block.len().saturating_sub(12);
        return has_tail(block) && chksum(seed, &block[..end]) == u32_at(block, end + 8);
    };
    let limit = usize::from(u16_at(block, at));
    let count = usize::from(u16_at(block, at + 2));
    let tail = at + limit * 8;
    let (Some(used), Some(reserved)) = (block.get(..at + count * 8), block.get(tail..tail + 4)) else {
        return false;
    };
    if count > limit || tail + 8 > block.len() {
        return false;
    }
    chksum(chksum(chksum(seed, used), reserved), &[0; 4]) == u32_at(block, tail + 4)
}

impl<R: ReadAt> Ext4<R> {
    /// Calls `visit(name, inode, kind)` for each name of `dir` but `.` and `..`, in stored order.
    ///
    /// # Errors
    /// `Corrupt` if it is no directory or breaks the format; what `visit` gives back.
    pub fn visit_dir<E: From<Ext4Error>>(
        &self,
        dir: &Inode,
        mut visit: impl FnMut(&[u8], u32, Option<FileKind>) -> Result<(), E>,
    ) -> Result<(), E> {
        let geometry = self.geometry();
        if dir.kind != FileKind::Directory {
            return Err(corrupt(format!("inode {}", dir.ino), "it is not a directory").into());
        }
        if dir.has(flags::INLINE_DATA) {
            let place = || format!("inode {}, inline directory", dir.ino);
            let head = dir.i_block().get(4..).unwrap_or(&[]);
            visit_entries(head, geometry, &place, &mut visit)?;
            if let Some(rest) = xattr::inline_data(dir)?
                && !rest.is_empty()
            {
                visit_entries(rest, geometry, &place, &mut visit)?;
            }
            return Ok(());
        }
        let place = || format!("inode {}, directory", dir.ino);
        let block_size = u64::from(geometry.block_size);
        if !dir.size.is_multiple_of(block_size) || dir.size == 0 {
            return Err(corrupt(place(), "its size is no whole number of blocks").into());
        }
        if dir.size > MAX_DIR_BYTES {
            return Err(unsupported(format!("inode {}: a directory of {} bytes", dir.ino, dir.size)).into());
        }
        let seed = dir.seed(geometry);
        let blocks = (dir.size / block_size) as u32;
        let mut next = 0u32;
        for extent in self.extents(dir)? {
            if extent.logical_block >= blocks {
                break;
            }
            if extent.logical_block != next || extent.unwritten {
                return Err(corrupt(place(), "it has a hole").into());
            }
            for i in 0..extent.blocks.min(blocks - next) {
                let number = extent.physical_block + u64::from(i);
                self.source.visit(1)?;
                let block = self.source.block(number)?;
                let index = index_at(&block, extent.logical_block + i == 0, dir.has(flags::INDEX));
                let place = || format!("inode {}, directory block {number}", dir.ino);
                if geometry.metadata_csum() && !checksum_matches(&block, index, seed) {
                    return Err(corrupt(place(), "checksum does not match").into());
                }
                visit_entries(&block, geometry, &place, &mut visit)?;
            }
            next = extent.logical_block.saturating_add(extent.blocks);
        }
        if next < blocks {
            return Err(corrupt(place(), "it has a hole").into());
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

    /// The inode that `name` stands for in `dir`. Reads the whole directory.
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
    place: &dyn Fn() -> String,
    visit: &mut impl FnMut(&[u8], u32, Option<FileKind>) -> Result<(), E>,
) -> Result<(), E> {
    let mut at = 0;
    while at < buf.len() {
        disk_io::steps::add(1);
        let entry = entry(buf, at, geometry).map_err(|reason| corrupt(place(), reason))?;
        if entry.ino != 0 && entry.name != b"." && entry.name != b".." {
            visit(entry.name, entry.ino, FileKind::from_dirent(entry.file_type))?;
        }
        at += entry.rec_len;
    }
    Ok(())
}
