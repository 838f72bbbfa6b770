//! Builds the tree while the image is being written.
//!
//! ```text
//!   writer ─ write_at ─► TreeDisk ─┬─► disk
//!                                  ├─ next in order ──► chunk of 256 KiB ──► hashing thread ─► leaves
//!                                  ├─ gap ────────────► leaves of zeros
//!                                  └─ before the front ─► block recorded, read back and hashed at the end
//! ```
//!
//! Image writers write nearly everything in ascending order and go back for little (super block, group descriptors).
//! Memory: four chunks, 2 MiB of leaves with a scratch disk (without one, 32 bytes per 4 KiB of image), and a number for
//! each recorded block.

use super::{
    BLOCK, HASH, Hash, Levels, PER_BLOCK, SALT, SuperBlock, VerityError, hash_block, leaves::Leaves,
};
use disk_io::{ReadAt, WriteAt};
use parking_lot::Mutex;
use std::{
    collections::BTreeSet,
    io, mem,
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    thread::{self, JoinHandle},
};

/// Bytes handed to the hashing thread at a time.
const CHUNK: usize = 256 << 10;
/// Chunks queued for it; one more is being filled and one is being hashed.
const QUEUED: usize = 2;

/// The appended tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeSummary {
    /// The root hash.
    pub root: Hash,
    /// Offset of the super block, in bytes.
    pub hash_offset: u64,
    /// End of the tree, in bytes: the size of the disk without a footer.
    pub end: u64,
}

/// Work of the hashing thread.
enum Job {
    /// Whole blocks.
    Chunk(Vec<u8>),
    /// A number of blocks of zeros.
    Zeros(u64),
}

/// The end of the bytes that were written in order.
struct Front<S> {
    /// Bytes of the blocks from `start`, not yet handed over.
    chunk: Vec<u8>,
    start: u64,
    /// Blocks before the front that were written again.
    again: BTreeSet<u64>,
    jobs: SyncSender<Job>,
    back: Receiver<Vec<u8>>,
    thread: JoinHandle<io::Result<Leaves<S>>>,
}

/// A disk whose blocks are hashed as they are written. [`TreeDisk::plain`] only passes everything through.
pub struct TreeDisk<W, S> {
    disk: W,
    /// `None` without a tree, and once the tree has been written.
    front: Mutex<Option<Front<S>>>,
}

impl<W: WriteAt, S: WriteAt + 'static> TreeDisk<W, S> {
    /// A disk without a tree.
    pub fn plain(disk: W) -> Self {
        Self { disk, front: Mutex::new(None) }
    }

    /// Hashes everything that is written to `disk`, which must be empty.
    ///
    /// `scratch` holds the leaves of images of more than 256 MiB, so that memory stays below 4 MiB; without it, 32 bytes
    /// per 4 KiB of image are kept in memory.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn hashing(disk: W, scratch: Option<S>) -> io::Result<Self> {
        let (jobs, work) = sync_channel(QUEUED);
        let (emptied, back) = channel();
        let thread = thread::Builder::new()
            .name("verity".into())
            .spawn(move || hash_jobs(&work, &emptied, Leaves::new(scratch)))?;
        let front =
            Front { chunk: Vec::with_capacity(CHUNK), start: 0, again: BTreeSet::new(), jobs, back, thread };
        Ok(Self { disk, front: Mutex::new(Some(front)) })
    }

    /// The disk below.
    pub fn disk(&self) -> &W {
        &self.disk
    }

    /// Abandons the tree; the scratch disk is unused when this returns.
    pub fn abandon(&self) {
        if let Some(Front { jobs, thread, .. }) = self.front.lock().take() {
            drop(jobs);
            // The leaves are not needed, so neither is the error.
            let _ = thread.join();
        }
    }

    /// Appends the tree to a file system of `fs_bytes`, with `uuid` in its super block. Returns `None` for a disk without a
    /// tree, and if the tree has already been written or abandoned.
    ///
    /// # Errors
    /// [`VerityError::Io`] if the disk or the scratch disk fails.
    pub fn finish(&self, fs_bytes: u64, uuid: [u8; 16]) -> Result<Option<TreeSummary>, VerityError> {
        let Some(mut front) = self.front.lock().take() else { return Ok(None) };
        let disk = &self.disk;
        let failed = |offset| VerityError::io("hashing the image", offset);
        let data_blocks = fs_bytes.div_ceil(BLOCK as u64);
        front
            .skip_to(data_blocks * BLOCK as u64)
            .and_then(|()| front.hand_over())
            .map_err(failed(fs_bytes))?;
        drop(front.jobs);
        let leaves = front.thread.join().unwrap_or_else(|_| Err(lost()));
        let mut leaves = leaves.map_err(failed(fs_bytes))?;
        let mut block = [0; BLOCK];
        for &number in &front.again {
            let at = number * BLOCK as u64;
            let len = fs_bytes.saturating_sub(at).min(BLOCK as u64) as usize;
            block.fill(0);
            disk.read_exact_at(&mut block[..len], at).map_err(VerityError::io("reading a block back", at))?;
            leaves.set(number, hash_block(&[0; SALT], &block)).map_err(failed(at))?;
        }
        debug_assert_eq!(leaves.len(), data_blocks);
        let superblock = SuperBlock::new(data_blocks, uuid);
        let write = |bytes: &[u8], at: u64| {
            disk.write_all_at(bytes, at).map_err(VerityError::io("writing the hash tree", at))
        };
        write(&superblock.to_block(), superblock.offset)?;
        let levels = Levels::new(data_blocks);
        let tree = superblock.offset + BLOCK as u64;
        let mut above = Vec::new();
        if levels.levels.is_empty() {
            leaves.block(0, &mut block).map_err(failed(0))?;
            above.push(block[..HASH].try_into().unwrap_or([0; HASH]));
        }
        for (level, &(first, count)) in levels.levels.iter().enumerate() {
            let below: Vec<Hash> = mem::take(&mut above);
            let mut out = Vec::with_capacity(CHUNK);
            let mut at = tree + first * BLOCK as u64;
            for number in 0..count {
                if level == 0 {
                    leaves.block(number * PER_BLOCK, &mut block).map_err(failed(at))?;
                } else {
                    let from = (number * PER_BLOCK) as usize;
                    let hashes = &below[from..below.len().min(from + PER_BLOCK as usize)];
                    block.fill(0);
                    block[..hashes.len() * HASH].copy_from_slice(hashes.as_flattened());
                }
                above.push(hash_block(&superblock.salt, &block));
                out.extend_from_slice(&block);
                if out.len() >= CHUNK {
                    write(&out, at)?;
                    at += out.len() as u64;
                    out.clear();
                }
            }
            write(&out, at)?;
        }
        let root = above.first().copied().unwrap_or([0; HASH]);
        Ok(Some(TreeSummary {
            root,
            hash_offset: superblock.offset,
            end: tree + levels.blocks() * BLOCK as u64,
        }))
    }
}

fn lost() -> io::Error {
    io::Error::other("the hashing thread ended early")
}

impl<S> Front<S> {
    /// End of what was written in order.
    fn end(&self) -> u64 {
        self.start + self.chunk.len() as u64
    }

    fn written(&mut self, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        let end = self.end();
        if offset < end {
            let behind = usize::try_from(end - offset).map_or(bytes.len(), |n| n.min(bytes.len()));
            if behind > 0 {
                let last = (offset + behind as u64 - 1) / BLOCK as u64;
                self.again.extend(offset / BLOCK as u64..=last);
            }
            bytes = &bytes[behind..];
            offset += behind as u64;
        }
        if bytes.is_empty() {
            return Ok(());
        }
        self.skip_to(offset)?;
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(CHUNK - self.chunk.len()));
            self.chunk.extend_from_slice(now);
            bytes = rest;
            if self.chunk.len() == CHUNK {
                self.hand_over()?;
            }
        }
        Ok(())
    }

    /// Hashes the bytes between the front and `offset` as zeros, which is how they read.
    fn skip_to(&mut self, offset: u64) -> io::Result<()> {
        let end = self.end();
        let gap = offset.saturating_sub(end);
        let block_end = end.next_multiple_of(BLOCK as u64);
        if offset < block_end {
            self.chunk.resize(self.chunk.len() + gap as usize, 0);
        } else if gap > 0 {
            self.chunk.resize((block_end - self.start) as usize, 0);
            self.hand_over()?;
            let zeros = (offset - block_end) / BLOCK as u64;
            if zeros > 0 {
                self.jobs.send(Job::Zeros(zeros)).map_err(|_| lost())?;
            }
            self.start = block_end + zeros * BLOCK as u64;
            self.chunk.resize((offset - self.start) as usize, 0);
        }
        if self.chunk.len() == CHUNK { self.hand_over() } else { Ok(()) }
    }

    /// Passes the chunk, which consists of whole blocks, to the thread.
    fn hand_over(&mut self) -> io::Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let mut next = self.back.try_recv().unwrap_or_else(|_| Vec::with_capacity(CHUNK));
        next.clear();
        let chunk = mem::replace(&mut self.chunk, next);
        self.start += chunk.len() as u64;
        self.jobs.send(Job::Chunk(chunk)).map_err(|_| lost())
    }
}

fn hash_jobs<S: WriteAt>(
    work: &Receiver<Job>,
    emptied: &Sender<Vec<u8>>,
    mut leaves: Leaves<S>,
) -> io::Result<Leaves<S>> {
    let salt = [0; SALT];
    let zeros = hash_block(&salt, &[0; BLOCK]);
    for job in work {
        match job {
            Job::Zeros(n) => (0..n).try_for_each(|_| leaves.push(zeros))?,
            Job::Chunk(chunk) => {
                chunk.chunks_exact(BLOCK).try_for_each(|block| leaves.push(hash_block(&salt, block)))?;
                // The writer may no longer receive chunks; it still needs the leaves.
                let _ = emptied.send(chunk);
            }
        }
    }
    Ok(leaves)
}

impl<W: WriteAt, S: WriteAt> ReadAt for TreeDisk<W, S> {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.disk.read_at(buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        self.disk.size()
    }
}

impl<W: WriteAt, S: WriteAt> WriteAt for TreeDisk<W, S> {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let n = self.disk.write_at(buf, offset)?;
        if let Some(front) = self.front.lock().as_mut() {
            front.written(&buf[..n], offset)?;
        }
        Ok(n)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.sync()
    }
}
