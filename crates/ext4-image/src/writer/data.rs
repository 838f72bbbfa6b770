//! File data on its way to its place.

use super::{
    ImageWriter, NodeId, Placed, Result,
    extents::{self, Extent},
    inodes,
    tree::{Content, Payload},
};
use crate::{
    Ext4Error, Place,
    layout::{extent::looks_like_root, inode::I_BLOCK_SIZE},
};
use disk_io::WriteAt;

/// The file being written.
#[derive(Debug)]
pub(super) struct OpenFile {
    node: u32,
    size: u64,
    /// End of what was written.
    pos: u64,
    /// First logical block without a place yet.
    mapped: u64,
    /// Byte of the image where `pos` lies, if `pos` is inside a mapped block.
    target: u64,
    extents: Vec<Extent>,
    /// Where the content begins in the inline spool.
    inline: Option<u64>,
}

/// Whether a file's data, as inline data, look like the root of an extent tree.
fn looks_like_root_of(data: &[u8]) -> bool {
    let mut i_block = [0; I_BLOCK_SIZE];
    let n = data.len().min(I_BLOCK_SIZE);
    i_block[..n].copy_from_slice(&data[..n]);
    looks_like_root(&i_block)
}

/// A block of zeros, of the largest size.
static ZEROS: [u8; 4096] = [0; 4096];

impl<W: WriteAt> ImageWriter<W> {
    pub(super) fn open_file(&mut self, node: NodeId, size: u64) -> Result<()> {
        if self.open.is_some() {
            return Err(Ext4Error::usage("a file is open already"));
        }
        let bs = self.space.geometry.bs;
        let place = Place::inode(inodes::ino_of(node.0));
        let Some(n) = self.tree.nodes.get_mut(node.0 as usize) else {
            return Err(Ext4Error::usage("no such node"));
        };
        let Payload::File { content, .. } = n.payload else {
            return Err(Ext4Error::usage(format!("not a regular file ({place})")));
        };
        // Logical blocks are 32 bits wide and the last one is not used.
        let most = u64::from(u32::MAX) * bs;
        if size > most {
            return Err(Ext4Error::FileSize { bytes: size, most });
        }
        n.payload = Payload::File { size, content: Content::Empty };
        self.release(content);
        let xattrs = self.tree.nodes[node.0 as usize].xattrs;
        let inline = (size > 0 && size <= self.inline_room(xattrs)).then_some(self.spool.len() as u64);
        let extents = std::mem::take(&mut self.extent_buffer);
        self.open = Some(OpenFile { node: node.0, size, pos: 0, mapped: 0, target: 0, extents, inline });
        Ok(())
    }

    pub(super) fn write_open(
        &mut self,
        offset: u64,
        data: &[u8],
        placed: &mut dyn FnMut(Placed),
    ) -> Result<()> {
        let Some(file) = self.open.as_mut() else {
            return Err(Ext4Error::usage("no file is open"));
        };
        let end = offset.checked_add(data.len() as u64).filter(|&end| end <= file.size && offset >= file.pos);
        let Some(end) = end else {
            return Err(Ext4Error::usage(format!(
                "{} bytes at {offset} of a file of {} bytes, written to {}",
                data.len(),
                file.size,
                file.pos
            )));
        };
        if data.is_empty() {
            return Ok(());
        }
        if let Some(start) = file.inline {
            self.spool.resize((start + offset) as usize, 0);
            self.spool.extend_from_slice(data);
            file.pos = end;
            placed(Placed::Inline { len: data.len() as u64 });
            return Ok(());
        }
        let bs = self.space.geometry.bs;
        if offset > file.pos {
            let mapped_end = file.mapped * bs;
            if offset < mapped_end {
                let gap = (offset - file.pos) as usize;
                self.sink.put(file.target, &ZEROS[..gap])?;
                file.target += gap as u64;
            } else {
                // What is left of the last block stays zero: nothing was ever written there.
                let logical = offset / bs;
                let head = offset % bs;
                file.mapped = logical;
                if head > 0 {
                    let (start, n) = self.space.take(1)?;
                    extents::append(&mut file.extents, logical, start, n);
                    file.mapped += 1;
                    self.sink.put(start * bs, &ZEROS[..head as usize])?;
                    file.target = start * bs + head;
                }
            }
            file.pos = offset;
        }
        let mut rest = data;
        let mut run: Option<(u64, u64)> = None;
        while !rest.is_empty() {
            let mut room = file.mapped * bs - file.pos;
            if room == 0 {
                let (start, n) = self.space.take((rest.len() as u64).div_ceil(bs))?;
                extents::append(&mut file.extents, file.mapped, start, n);
                file.mapped += n;
                file.target = start * bs;
                room = n * bs;
            }
            let (now, later) = rest.split_at(rest.len().min(usize::try_from(room).unwrap_or(usize::MAX)));
            self.sink.put(file.target, now)?;
            run = match run {
                Some((at, len)) if at + len == file.target => Some((at, len + now.len() as u64)),
                other => {
                    if let Some((image_offset, len)) = other {
                        placed(Placed::At { image_offset, len });
                    }
                    Some((file.target, now.len() as u64))
                }
            };
            file.target += now.len() as u64;
            file.pos += now.len() as u64;
            rest = later;
        }
        if let Some((image_offset, len)) = run {
            placed(Placed::At { image_offset, len });
        }
        Ok(())
    }

    pub(super) fn close_file(&mut self) -> Result<()> {
        let Some(mut file) = self.open.take() else {
            return Err(Ext4Error::usage("no file is open"));
        };
        if let Some(start) = file.inline {
            self.spool.resize((start + file.size) as usize, 0);
            if looks_like_root_of(&self.spool[start as usize..]) {
                self.give_blocks(&mut file, start)?;
            }
        }
        let content = if let Some(start) = file.inline {
            if self.sink.crc.is_some() {
                self.data_crc = crc32c::crc32c_append(self.data_crc, &self.spool[start as usize..]);
            }
            Content::Inline(start)
        } else {
            extents::store(
                &file.extents,
                inodes::ino_of(file.node),
                super::CHECKSUM_SEED,
                &mut self.space,
                &mut self.sink,
                &mut self.roots,
            )?
        };
        self.tree.nodes[file.node as usize].payload = Payload::File { size: file.size, content };
        file.extents.clear();
        self.extent_buffer = file.extents;
        Ok(())
    }

    /// Moves inline data from the spool into blocks: e2fsck would take them for the root of an extent tree.
    fn give_blocks(&mut self, file: &mut OpenFile, start: u64) -> Result<()> {
        let bs = self.space.geometry.bs;
        let data = self.spool.split_off(start as usize);
        for (i, part) in data.chunks(bs as usize).enumerate() {
            let (block, n) = self.space.take(1)?;
            extents::append(&mut file.extents, i as u64, block, n);
            self.sink.put(block * bs, part)?;
        }
        file.inline = None;
        Ok(())
    }

    /// Counts the blocks of dropped content free.
    pub(super) fn release(&mut self, content: Content) {
        match content {
            Content::Empty | Content::Inline(_) => {}
            Content::Run { start, blocks } => self.space.free.push((start, start + u64::from(blocks))),
            // One file is written at a time, so all between its first and last block is its own (or fixed).
            Content::Tree(i) => {
                if let Some(root) = self.roots.get(i as usize) {
                    self.space.free.push(root.span);
                }
            }
        }
    }
}
