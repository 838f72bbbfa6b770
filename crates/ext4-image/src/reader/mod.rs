//! Reads ext4: images of this crate's writers, and file systems that the Linux kernel wrote.
//!
//! ```text
//!  disk ─► superblock (Geometry) ─► journal? ─► overlay in memory
//!                 │
//!        group descriptor ─► inode ─┬─► extents ─► data_map, read_file_at
//!                                   ├─► read_dir, lookup
//!                                   └─► xattrs, symlink_target
//! ```
//!
//! **Hostile input is the normal case.** No function panics, loops or takes memory beyond stated bounds, whatever is on
//! the disk: counts are checked against the disk's size, trees by rising keys, lists by their buffers. Checksums are
//! verified where the file system has them. Nothing is ever written: a dirty journal is replayed into memory.
//! Every [`Ext4Error::Corrupt`] names the rule and the group, inode, block or byte. Called by `layer-codec`, `svm-agent`,
//! `layer inspect` and [`crate::check`].

pub(crate) mod dir;
pub(crate) mod extent;
mod file;
pub(crate) mod inode;
mod journal;
#[cfg(all(test, target_os = "linux"))]
mod journal_tests;
mod overlay;
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
use crate::{
    error::{GroupFault, InodeFault, JournalFault},
    layout::{
        EXT4_ROOT_INO,
        group::{GroupDesc, desc_checksum, desc_checksum_crc16},
        inode::{I_BLOCK_SIZE, InodeFlags},
        superblock::{Compat, Incompat, RoCompat, SUPERBLOCK_OFFSET, Superblock},
    },
};
use disk_io::ReadAt;
use source::Source;
use zerocopy::{FromZeros, IntoBytes};

/// An ext4 file system, opened for reading.
#[derive(Debug)]
pub struct Ext4<R> {
    pub(crate) source: Source<R>,
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
        let io = |doing| move |e| Ext4Error::io(doing, Place::offset(SUPERBLOCK_OFFSET), e);
        let size = disk.size().map_err(io("asking for the image's size"))?;
        let mut sb = Superblock::new_zeroed();
        disk.read_exact_at(sb.as_mut_bytes(), SUPERBLOCK_OFFSET).map_err(io("reading the superblock"))?;
        let geometry = Geometry::parse(&sb, size)?;
        let recover = recovery
            && geometry.has(Incompat::EXT4_FEATURE_INCOMPAT_RECOVER)
            && geometry.has_compat(Compat::EXT4_FEATURE_COMPAT_HAS_JOURNAL);
        if recover && geometry.has_compat(Compat::EXT4_FEATURE_COMPAT_FAST_COMMIT) {
            return Err(Ext4Error::unsupported(
                "recovery of fast commits",
                Place::inode(geometry.journal_inum),
            ));
        }
        let mut fs = Self { source: Source::new(disk, geometry) };
        if recover {
            fs.source.overlay = journal::recover(&fs)?;
            fs.source.forget();
            let geometry = Geometry::parse(&fs.source.superblock()?, size)?;
            if geometry.block_size != fs.source.geometry.block_size {
                let place = Place::inode(geometry.journal_inum);
                return Err(Ext4Error::corrupt(JournalFault::ChangesBlockSize, place));
            }
            fs.source.geometry = geometry;
        }
        Ok(fs)
    }

    /// The number of the root directory's inode.
    pub fn root(&self) -> u32 {
        EXT4_ROOT_INO
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
        let slot = block.get(at..at + usize::from(self.geometry().inode_size)).unwrap_or(&[]);
        let inode = Inode::parse(ino, slot, self.geometry())?;
        if inode.flags.intersects(InodeFlags::EXT4_ENCRYPT_FL | InodeFlags::EXT4_COMPR_FL) {
            return Err(Ext4Error::unsupported("an encrypted or compressed inode", Place::inode(ino)));
        }
        Ok(inode)
    }

    /// The block of inode `ino`, and the byte in it.
    fn inode_place(&self, ino: u32) -> Result<(u64, usize), Ext4Error> {
        let geometry = self.geometry();
        if ino == 0 || ino > geometry.inodes_count {
            return Err(Ext4Error::corrupt(InodeFault::Number, Place::inode(ino)));
        }
        let group = self.group((ino - 1) / geometry.inodes_per_group)?;
        let byte = u64::from((ino - 1) % geometry.inodes_per_group) * u64::from(geometry.inode_size);
        let block_size = u64::from(geometry.block_size);
        Ok((group.inode_table() + byte / block_size, (byte % block_size) as usize))
    }

    /// The descriptor of group `number`: its checksum and the place of its inode table are right.
    pub(crate) fn group(&self, number: u32) -> Result<GroupDesc, Ext4Error> {
        let geometry = self.geometry();
        let (number_of_block, at) = geometry.descriptor_place(number);
        let block = self.source.block(number_of_block)?;
        let slot = block.get(at..at + usize::from(geometry.desc_size)).unwrap_or(&[]);
        let desc = GroupDesc::from_slot(slot);
        let bad = |fault| Err(Ext4Error::corrupt(fault, Place::group(number).at_block(number_of_block)));
        if !descriptor_checksum_matches(geometry, number, slot, desc.bg_checksum.get()) {
            return bad(GroupFault::Checksum);
        }
        if !geometry.holds(desc.inode_table(), u64::from(geometry.inode_table_blocks())) {
            return bad(GroupFault::InodeTable);
        }
        Ok(desc)
    }

    /// All extents of `inode` in logical order, neighbors joined; empty for inodes without blocks.
    ///
    /// # Errors
    /// `Corrupt` where the tree is broken.
    pub fn extents(&self, inode: &Inode) -> Result<Vec<Extent>, Ext4Error> {
        let mut extents = Vec::new();
        let inline = inode.has(InodeFlags::EXT4_INLINE_DATA_FL);
        let has_blocks = match inode.kind {
            FileKind::File | FileKind::Directory => !inline,
            // A short target is where the tree would be.
            FileKind::Symlink => {
                !inline && (inode.size >= I_BLOCK_SIZE as u64 || inode.has(InodeFlags::EXT4_EXTENTS_FL))
            }
            _ => false,
        };
        if has_blocks {
            extent::walk(&self.source, inode, &mut extents)?;
        }
        Ok(extents)
    }
}

/// Checks `bg_checksum`, where the file system has it.
fn descriptor_checksum_matches(geometry: &Geometry, number: u32, slot: &[u8], stored: u16) -> bool {
    if geometry.metadata_csum() {
        return desc_checksum(geometry.checksum_seed, number, slot) == stored;
    }
    if geometry.has_ro(RoCompat::EXT4_FEATURE_RO_COMPAT_GDT_CSUM) {
        return desc_checksum_crc16(&geometry.uuid, number, slot) == stored;
    }
    true
}
