//! Reads of file-system bytes: the disk, the journal's overlay, and a small cache for metadata.
//!
//! ```text
//!  read(offset) ──► overlay has the block? ──yes──► the journal's copy (escaped magic put back)
//!                          │no
//!                          └──► disk
//! ```
//!
//! The overlay holds places, not bytes. The cache is direct-mapped and of fixed size. Used by every part of the reader.

use super::{overlay::Overlay, superblock::Geometry};
use crate::{
    Ext4Error, Place,
    error::BlockFault,
    layout::{
        journal::JBD2_MAGIC_NUMBER,
        superblock::{SUPERBLOCK_OFFSET, Superblock},
    },
};
use disk_io::ReadAt;
use parking_lot::Mutex;
use std::{
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use zerocopy::{FromZeros, IntoBytes};

/// Bytes read at once for metadata, at least.
const CHUNK: usize = 16 * 1024;
/// Chunks kept.
const SLOTS: usize = 64;

/// Visits to each block of the file system, all together: see [`Source::visit`].
const VISITS_PER_BLOCK: u64 = 64;
/// Visits that even the smallest file system has.
const LEAST_VISITS: u64 = 1 << 12;

/// A place in the cache: the chunk's number and bytes.
type Slot = Option<(u64, Arc<[u8]>)>;

/// Bytes of the file system as they are after recovery.
#[derive(Debug)]
pub(crate) struct Source<R> {
    disk: R,
    pub(crate) overlay: Overlay,
    pub(crate) geometry: Geometry,
    chunk: usize,
    cache: Mutex<Vec<Slot>>,
    /// Blocks that may still be visited of what no two inodes share in a sound file system.
    visits: AtomicU64,
}

/// A block inside a cached chunk.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    chunk: Arc<[u8]>,
    at: usize,
    len: usize,
}

impl std::ops::Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.chunk.get(self.at..self.at + self.len).unwrap_or(&[])
    }
}

/// The error for a disk that fails at byte `offset`.
fn io_error(offset: u64) -> impl FnOnce(std::io::Error) -> Ext4Error {
    move |source| Ext4Error::io("reading the image", Place::offset(offset), source)
}

impl<R: ReadAt> Source<R> {
    pub(crate) fn new(disk: R, geometry: Geometry) -> Self {
        let chunk = CHUNK.max(geometry.block_size as usize);
        let visits = AtomicU64::new(geometry.blocks_count.saturating_mul(VISITS_PER_BLOCK).max(LEAST_VISITS));
        Self {
            disk,
            overlay: Overlay::default(),
            geometry,
            chunk,
            cache: Mutex::new(vec![None; SLOTS]),
            visits,
        }
    }

    /// Counts visits to blocks of directories, extent trees and block maps, and to xattr values with inodes of their own.
    /// Each block belongs to one inode in a sound file system, and one operation visits it a few times at most; where all
    /// inodes of a hostile one point to the same few, the work and the memory would be the product of both.
    pub(crate) fn visit(&self, blocks: u64) -> Result<(), Ext4Error> {
        disk_io::steps::add(blocks);
        let take = |left: u64| left.checked_sub(blocks);
        match self.visits.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            Ok(_) => Ok(()),
            Err(_) => Err(Ext4Error::unsupported(
                "many inodes share the blocks of their directories, extent trees or xattrs",
                Place::default(),
            )),
        }
    }

    /// Forgets cached chunks (after the overlay changed).
    pub(crate) fn forget(&self) {
        self.cache.lock().fill(None);
    }

    /// Fills `buf` with file-system bytes from `offset`, past the cache.
    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Ext4Error> {
        if self.overlay.is_empty() {
            return self.disk.read_exact_at(buf, offset).map_err(io_error(offset));
        }
        let block_size = u64::from(self.geometry.block_size);
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (block, within) = (at / block_size, at % block_size);
            let n = (buf.len() - done).min((block_size - within) as usize);
            let part = &mut buf[done..done + n];
            match self.overlay.get(block) {
                None => self.disk.read_exact_at(part, at).map_err(io_error(at))?,
                Some(copy) => {
                    let place = copy.block * block_size + within;
                    self.disk.read_exact_at(part, place).map_err(io_error(place))?;
                    if copy.escaped && within < 4 {
                        let magic = JBD2_MAGIC_NUMBER.to_be_bytes();
                        for (byte, m) in part.iter_mut().zip(&magic[within as usize..]) {
                            *byte = *m;
                        }
                    }
                }
            }
            done += n;
        }
        Ok(())
    }

    /// The primary superblock as it is after recovery.
    pub(crate) fn superblock(&self) -> Result<Superblock, Ext4Error> {
        let mut sb = Superblock::new_zeroed();
        self.read(SUPERBLOCK_OFFSET, sb.as_mut_bytes())?;
        Ok(sb)
    }

    /// Where the bytes that [`Self::read`] would give lie in an open file, if they do.
    pub(crate) fn in_file(&self, offset: u64, len: u64) -> Option<(&File, u64)> {
        if self.overlay.is_empty() { self.disk.in_file(offset, len) } else { None }
    }

    /// One metadata block.
    pub(crate) fn block(&self, number: u64) -> Result<Block, Ext4Error> {
        if number >= self.geometry.blocks_count {
            return Err(Ext4Error::corrupt(BlockFault::Outside, Place::block(number)));
        }
        let len = self.geometry.block_size as usize;
        let offset = number * len as u64;
        let index = offset / self.chunk as u64;
        let at = (offset % self.chunk as u64) as usize;
        let slot = (index % SLOTS as u64) as usize;
        if let Some(Some((cached, chunk))) = self.cache.lock().get(slot)
            && *cached == index
        {
            return Ok(Block { chunk: chunk.clone(), at, len });
        }
        let start = index * self.chunk as u64;
        let end = (start + self.chunk as u64).min(self.geometry.blocks_count * len as u64);
        let mut bytes = vec![0; (end - start) as usize];
        self.read(start, &mut bytes)?;
        let chunk: Arc<[u8]> = bytes.into();
        if let Some(place) = self.cache.lock().get_mut(slot) {
            *place = Some((index, chunk.clone()));
        }
        Ok(Block { chunk, at, len })
    }
}
