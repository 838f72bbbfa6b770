//! Extents of a file or directory, and the tree that holds them.

use super::{Content, Result, Root, sink::Sink, space::Space};
use crate::{
    Ext4Error, Place,
    layout::{
        checksum::inode_seed,
        extent::{
            ENTRY_SIZE, EXT_INIT_MAX_LEN, EXT4_MAX_EXTENT_DEPTH, ExtentHeader, ROOT_MAX, RawExtent, RawIndex,
            TAIL_SIZE, block_max, node_checksum, tail_offset,
        },
        inode::I_BLOCK_SIZE,
    },
};
use disk_io::WriteAt;
use zerocopy::IntoBytes;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// First logical block.
    pub(super) logical: u32,
    /// First physical block.
    pub(super) start: u64,
    /// 1 to `EXT_INIT_MAX_LEN`.
    pub(super) blocks: u32,
}

/// Adds blocks after the others, joined to the last extent where they continue it.
pub(super) fn append(extents: &mut Vec<Extent>, mut logical: u64, mut start: u64, mut blocks: u64) {
    if let Some(last) = extents.last_mut()
        && u64::from(last.logical) + u64::from(last.blocks) == logical
        && last.start + u64::from(last.blocks) == start
    {
        let n = blocks.min(u64::from(EXT_INIT_MAX_LEN - last.blocks));
        last.blocks += n as u32;
        (logical, start, blocks) = (logical + n, start + n, blocks - n);
    }
    while blocks > 0 {
        let n = blocks.min(u64::from(EXT_INIT_MAX_LEN));
        extents.push(Extent { logical: logical as u32, start, blocks: n as u32 });
        (logical, start, blocks) = (logical + n, start + n, blocks - n);
    }
}

/// `i_block` of a node with up to four entries.
fn root_node(entries: &[[u8; ENTRY_SIZE]], depth: u16) -> [u8; I_BLOCK_SIZE] {
    let mut out = [0; I_BLOCK_SIZE];
    out[..ENTRY_SIZE].copy_from_slice(ExtentHeader::new(entries.len() as u16, ROOT_MAX, depth).as_bytes());
    for (slot, e) in out[ENTRY_SIZE..].chunks_exact_mut(ENTRY_SIZE).zip(entries) {
        slot.copy_from_slice(e);
    }
    out
}

/// `i_block` of at most one extent from logical block 0.
pub(super) fn simple_root(run: Option<(u64, u32)>) -> [u8; I_BLOCK_SIZE] {
    match run {
        Some((start, blocks)) => root_node(&[entry(RawExtent::new(0, start, blocks).as_bytes())], 0),
        None => root_node(&[], 0),
    }
}

fn entry(bytes: &[u8]) -> [u8; ENTRY_SIZE] {
    let mut out = [0; ENTRY_SIZE];
    out.copy_from_slice(bytes);
    out
}

/// Stores the extents of inode `ino`: in the node where they are simple, else in `roots` and blocks at the cursor.
pub(super) fn store<W: WriteAt>(
    extents: &[Extent],
    ino: u32,
    fs_seed: u32,
    space: &mut Space,
    sink: &mut Sink<W>,
    roots: &mut Vec<Root>,
) -> Result<Content> {
    let first = match extents {
        [] => return Ok(Content::Empty),
        [Extent { logical: 0, start, blocks }] => return Ok(Content::Run { start: *start, blocks: *blocks }),
        [first, ..] => first.start,
    };
    let mut blocks: u64 = extents.iter().map(|e| u64::from(e.blocks)).sum();
    let seed = inode_seed(fs_seed, ino, 0);
    let bs = space.geometry.bs as usize;
    let max = block_max(bs);
    let mut level: Vec<(u32, [u8; ENTRY_SIZE])> = extents
        .iter()
        .map(|e| (e.logical, entry(RawExtent::new(e.logical, e.start, e.blocks).as_bytes())))
        .collect();
    let mut depth = 0;
    let mut node = vec![0; bs];
    while level.len() > usize::from(ROOT_MAX) {
        let mut upper = Vec::with_capacity(level.len() / usize::from(max) + 1);
        for chunk in level.chunks(usize::from(max)) {
            let (block, _) = space.take(1)?;
            node.fill(0);
            node[..ENTRY_SIZE].copy_from_slice(ExtentHeader::new(chunk.len() as u16, max, depth).as_bytes());
            for (slot, (_, e)) in node[ENTRY_SIZE..].chunks_exact_mut(ENTRY_SIZE).zip(chunk) {
                slot.copy_from_slice(e);
            }
            let tail = tail_offset(max);
            let sum = node_checksum(seed, &node[..tail]);
            node[tail..tail + TAIL_SIZE].copy_from_slice(&sum.to_le_bytes());
            sink.put(block * bs as u64, &node)?;
            blocks += 1;
            upper.push((chunk[0].0, entry(RawIndex::new(chunk[0].0, block).as_bytes())));
        }
        level = upper;
        depth += 1;
    }
    if depth > EXT4_MAX_EXTENT_DEPTH {
        return Err(Ext4Error::unsupported("an extent tree of more than 5 levels", Place::inode(ino)));
    }
    let entries: Vec<_> = level.iter().map(|(_, e)| *e).collect();
    let index = u32::try_from(roots.len())
        .map_err(|_| Ext4Error::unsupported("too many files of several extents", Place::default()))?;
    roots.push(Root { i_block: root_node(&entries, depth), blocks, span: (first, space.cursor) });
    Ok(Content::Tree(index))
}
