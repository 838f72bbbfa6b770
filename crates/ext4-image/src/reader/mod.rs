//! Reads ext4: images of our own writer and file systems that the Linux kernel wrote.
//!
//! ```text
//!  disk ─► superblock (Geometry) ─► journal? ─► overlay in memory
//!                 │
//!        group descriptor ─► inode ─┬─► extents ─► data_map, read_file_at
//!                                   ├─► read_dir, lookup
//!                                   └─► xattrs, symlink_target
//! ```
//!
//! **Hostile input is the normal case.** No function panics, loops or takes memory beyond stated bounds, whatever the
//! disk holds: counts are checked against the disk's size, trees by rising keys, lists by their buffers. Checksums are
//! verified where the file system has them. Nothing is ever written: a dirty journal is replayed into memory.
//! Errors name the inode or block. Called by `diff`, `agent` and `ext4::check`.

pub(crate) mod bytes;
pub(crate) mod dir;
pub(crate) mod extent;
mod file;
pub(crate) mod inode;
mod journal;
mod owners;
pub(crate) mod source;
pub(crate) mod superblock;
#[cfg(test)]
mod tests;
pub(crate) mod xattr;

pub use dir::DirEntry;
pub use extent::Extent;
pub use file::DataRange;
pub use inode::{FileKind, Inode};
pub use owners::{MAX_NAMED, Owners};
pub use superblock::Geometry;

use super::{Ext4Error, Place};
use bytes::{chksum, crc16, u16_at, u32_at, wide};
use disk_io::ReadAt;
use source::{Block, Source};
use superblock::{SUPERBLOCK_LEN, SUPERBLOCK_OFFSET, compat, incompat, ro_compat};

/// `EXT4_ROOT_INO`.
pub const ROOT_INO: u32 = 2;

/// The error for an image that breaks the format; `place` names the inode, block or structure.
pub(crate) fn corrupt(place: impl AsRef<str>, reason: impl AsRef<str>) -> Ext4Error {
    Ext4Error::corrupt(format!("{}: {}", place.as_ref(), reason.as_ref()), Place::default())
}

/// The error for an image that uses what this program does not know, or is larger than it takes.
pub(crate) fn unsupported(what: impl Into<String>) -> Ext4Error {
    Ext4Error::unsupported(what, Place::default())
}

/// The error for a disk that fails at byte `offset`.
pub(crate) fn io_error(doing: &'static str, offset: u64, source: std::io::Error) -> Ext4Error {
    Ext4Error::io(doing, Place::offset(offset), source)
}

/// An ext4 file system, opened for reading.
#[derive(Debug)]
pub struct Ext4<R> {
    pub(crate) source: Source<R>,
}

/// A group descriptor, parsed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Group {
    pub(crate) inode_table: u64,
}

impl<R: ReadAt> Ext4<R> {
    /// Opens a file system. A journal that needs recovery is replayed into memory.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported` or `Io`; see [`Geometry`] for what is checked.
    pub fn open(disk: R) -> Result<Self, Ext4Error> {
        Self::open_with(disk, true)
    }

    /// As [`Ext4::open`], for images that must not need recovery: the disk is taken as it is.
    pub(crate) fn open_without_recovery(disk: R) -> Result<Self, Ext4Error> {
        Self::open_with(disk, false)
    }

    fn open_with(disk: R, recovery: bool) -> Result<Self, Ext4Error> {
        let size = disk.size().map_err(|e| io_error("asking for the image's size", 0, e))?;
        let mut sb = vec![0; SUPERBLOCK_LEN];
        disk.read_exact_at(&mut sb, SUPERBLOCK_OFFSET)
            .map_err(|e| io_error("reading the superblock", SUPERBLOCK_OFFSET, e))?;
        let geometry = Geometry::parse(&sb, size)?;
        let recover =
            recovery && geometry.has(incompat::RECOVER) && geometry.feature_compat & compat::HAS_JOURNAL != 0;
        if recover && geometry.feature_compat & compat::FAST_COMMIT != 0 {
            return Err(unsupported("recovery of fast commits"));
        }
        let mut fs = Self { source: Source::new(disk, geometry) };
        if recover {
            fs.source.overlay = journal::recover(&fs)?;
            fs.source.forget();
            fs.source.read(SUPERBLOCK_OFFSET, &mut sb)?;
            let geometry = Geometry::parse(&sb, size)?;
            if geometry.block_size != fs.source.geometry.block_size {
                return Err(corrupt("journal", "it changes the block size"));
            }
            fs.source.geometry = geometry;
        }
        Ok(fs)
    }

    /// The number of the root directory's inode.
    pub fn root(&self) -> u32 {
        ROOT_INO
    }

    /// The shape of the file system.
    pub fn geometry(&self) -> &Geometry {
        &self.source.geometry
    }

    /// Reads inode `ino`.
    ///
    /// # Errors
    /// `Corrupt` for a number outside the file system, a wrong checksum, or a free or malformed inode.
    pub fn inode(&self, ino: u32) -> Result<Inode, Ext4Error> {
        let (block, at) = self.inode_place(ino)?;
        let block = self.source.block(block)?;
        let raw = block.get(at..at + usize::from(self.geometry().inode_size)).unwrap_or(&[]);
        let inode = Inode::parse(ino, raw, self.geometry())?;
        if inode.has(inode::flags::ENCRYPT | inode::flags::COMPRESSED) {
            return Err(unsupported(format!("inode {ino} is encrypted or compressed")));
        }
        Ok(inode)
    }

    /// The block and the byte in it where inode `ino` stands.
    fn inode_place(&self, ino: u32) -> Result<(u64, usize), Ext4Error> {
        let geometry = self.geometry();
        if ino == 0 || ino > geometry.inodes_count {
            return Err(corrupt(format!("inode {ino}"), "it lies outside the file system"));
        }
        let group = self.group((ino - 1) / geometry.inodes_per_group)?;
        let byte = u64::from((ino - 1) % geometry.inodes_per_group) * u64::from(geometry.inode_size);
        let block_size = u64::from(geometry.block_size);
        Ok((group.inode_table + byte / block_size, (byte % block_size) as usize))
    }

    /// The descriptor of group `number`, checked.
    pub(crate) fn group(&self, number: u32) -> Result<Group, Ext4Error> {
        let (_, raw) = self.raw_descriptor(number)?;
        let geometry = self.geometry();
        let is_wide = raw.len() >= 64;
        let field =
            |low: usize, high: usize| wide(u32_at(&raw, low), if is_wide { u32_at(&raw, high) } else { 0 });
        let group = Group { inode_table: field(8, 0x28) };
        if !descriptor_checksum_matches(geometry, number, &raw) {
            return Err(corrupt(format!("group {number}"), "checksum of its descriptor does not match"));
        }
        if !geometry.holds(group.inode_table, u64::from(geometry.inode_table_blocks())) {
            return Err(corrupt(format!("group {number}"), "its inode table lies outside the file system"));
        }
        Ok(group)
    }

    /// The block of group `number`'s descriptor, and the descriptor's bytes.
    pub(crate) fn raw_descriptor(&self, number: u32) -> Result<(Block, Vec<u8>), Ext4Error> {
        let (block, at) = self.geometry().descriptor_place(number);
        let block = self.source.block(block)?;
        let raw = block.get(at..at + usize::from(self.geometry().desc_size)).unwrap_or(&[]).to_vec();
        Ok((block, raw))
    }

    /// All extents of `inode` in logical order, neighbours joined; empty for inodes without blocks.
    ///
    /// # Errors
    /// `Corrupt` where the tree is broken.
    pub fn extents(&self, inode: &Inode) -> Result<Vec<Extent>, Ext4Error> {
        let mut extents = Vec::new();
        let has_blocks = match inode.kind {
            FileKind::File | FileKind::Directory => !inode.has(inode::flags::INLINE_DATA),
            // A short target stands where the tree would.
            FileKind::Symlink => {
                !inode.has(inode::flags::INLINE_DATA)
                    && (inode.size >= 60 || inode.has(inode::flags::EXTENTS))
            }
            _ => false,
        };
        if has_blocks {
            extent::walk(&self.source, inode, &mut extents)?;
        }
        Ok(extents)
    }
}

/// Checks `bg_checksum` (`ext4_group_desc_csum` of `fs/ext4/super.c`).
pub(crate) fn descriptor_checksum_matches(geometry: &Geometry, number: u32, raw: &[u8]) -> bool {
    let (Some(head), rest) = (raw.get(..0x1E), raw.get(0x20..).unwrap_or(&[])) else { return false };
    let stored = u16_at(raw, 0x1E);
    if geometry.metadata_csum() {
        let crc = chksum(geometry.checksum_seed, &number.to_le_bytes());
        return chksum(chksum(chksum(crc, head), &[0; 2]), rest) as u16 == stored;
    }
    if geometry.feature_ro_compat & ro_compat::GDT_CSUM != 0 {
        return crc16(crc16(crc16(crc16(!0, &geometry.uuid), &number.to_le_bytes()), head), rest) == stored;
    }
    true
}
