//! Inodes in their on-disk form.

use super::{
    CHECKSUM_SEED, ImageWriter, Result,
    tree::{Content, NONE, Node, Payload},
    xattrs::{self, Item},
};
use crate::{
    Xattr,
    layout::{
        EXT4_GOOD_OLD_FIRST_INO, EXT4_LINK_MAX, EXT4_ROOT_INO, SECTOR,
        inode::{
            EXT4_GOOD_OLD_INODE_SIZE, EXTRA_ISIZE, I_BLOCK_SIZE, InodeFlags, RAW_INODE_SIZE, RawInode,
            encode_device, encode_large_device, seal_inode,
        },
        xattr::{
            EXT4_XATTR_INDEX_SYSTEM, EXT4_XATTR_MAGIC, EXT4_XATTR_SYSTEM_DATA, INODE_HEADER_SIZE, value_size,
            xattr_entry_size,
        },
    },
};
use disk_io::WriteAt;
use zerocopy::{FromZeros, IntoBytes};

/// Where extended attributes begin in a slot.
pub(super) const XATTR_AT: usize = EXT4_GOOD_OLD_INODE_SIZE + EXTRA_ISIZE as usize;
/// The longest target that is kept in `i_block`.
pub(super) const FAST_SYMLINK_MAX: usize = I_BLOCK_SIZE - 1;

/// Inode number of a node.
pub(super) fn ino_of(node: u32) -> u32 {
    if node == 0 { EXT4_ROOT_INO } else { EXT4_GOOD_OLD_FIRST_INO - 1 + node }
}

/// Bytes of entries and values that a slot holds, the terminator included.
fn slot_room(inode_size: usize) -> usize {
    inode_size - XATTR_AT - INODE_HEADER_SIZE
}

/// Bytes of value that inline data may have in the slot, beside the attributes that fit there now: they come first, as
/// attributes would else need a block more often. `None` if not even an empty value fits.
pub(super) fn inline_value_room(inode_size: usize, set: &[Xattr]) -> Option<usize> {
    const TERMINATOR: usize = 4;
    let used: usize =
        set.iter().map(|x| xattr_entry_size(x.name.len()) + value_size(x.value.len())).sum::<usize>();
    (slot_room(inode_size) & !3)
        .checked_sub(TERMINATOR + xattr_entry_size(EXT4_XATTR_SYSTEM_DATA.len()) + used)
}

/// The contents of an inode besides its attributes.
struct Body {
    size: u64,
    blocks: u64,
    flags: InodeFlags,
    i_block: [u8; I_BLOCK_SIZE],
    /// Value of `system.data`, for inline data.
    inline: Option<Vec<u8>>,
    links: u32,
}

fn inline_halves(bytes: &[u8]) -> ([u8; I_BLOCK_SIZE], Vec<u8>) {
    let mut block = [0; I_BLOCK_SIZE];
    let n = bytes.len().min(I_BLOCK_SIZE);
    block[..n].copy_from_slice(&bytes[..n]);
    (block, bytes[n..].to_vec())
}

impl<W: WriteAt> ImageWriter<W> {
    /// Bytes of the slot for attributes of a node, given the length of its inline value.
    pub(super) fn xattr_room(&self, inline: Option<usize>) -> usize {
        let data = inline.map_or(0, |len| xattr_entry_size(EXT4_XATTR_SYSTEM_DATA.len()) + value_size(len));
        (slot_room(self.inode_size) & !3).saturating_sub(data)
    }

    /// Length of the inline value of a node, if it has inline data.
    pub(super) fn inline_len(&self, node: u32) -> Option<usize> {
        match self.tree.nodes[node as usize].payload {
            Payload::File { size, content: Content::Inline(_) } => {
                Some((size as usize).saturating_sub(I_BLOCK_SIZE))
            }
            Payload::Dir { .. } => self.inline_directory(node),
            _ => None,
        }
    }

    pub(super) fn mapped(&self, content: Content) -> ([u8; I_BLOCK_SIZE], u64) {
        match content {
            Content::Run { start, blocks } => {
                (super::extents::simple_root(Some((start, blocks))), u64::from(blocks))
            }
            Content::Tree(i) => {
                self.roots.get(i as usize).map_or(([0; I_BLOCK_SIZE], 0), |r| (r.i_block, r.blocks))
            }
            Content::Empty | Content::Inline(_) => (super::extents::simple_root(None), 0),
        }
    }

    fn body(&self, id: u32, node: &Node) -> Body {
        let mut body = Body {
            size: 0,
            blocks: 0,
            flags: InodeFlags::empty(),
            i_block: [0; I_BLOCK_SIZE],
            inline: None,
            links: node.links,
        };
        let dir_links = |subdirs: u32| if subdirs + 2 > EXT4_LINK_MAX { 1 } else { subdirs + 2 };
        match node.payload {
            Payload::File { size, content: Content::Inline(at) } => {
                body.size = size;
                let (block, rest) = inline_halves(&self.spool[at as usize..(at + size) as usize]);
                (body.i_block, body.inline, body.flags) =
                    (block, Some(rest), InodeFlags::EXT4_INLINE_DATA_FL);
            }
            Payload::Dir { parent, subdirs, .. } => {
                let second = self.inline_directory(id).unwrap_or(0);
                let (block, value) = self.inline_directory_bytes(id, parent, second);
                body.i_block.copy_from_slice(&block);
                body.size = (I_BLOCK_SIZE + second) as u64;
                (body.inline, body.flags) = (Some(value), InodeFlags::EXT4_INLINE_DATA_FL);
                body.links = dir_links(subdirs);
            }
            Payload::DirDone(i) => {
                let dir = &self.tree.written_dirs[i as usize];
                body.size = dir.size;
                body.flags = InodeFlags::EXT4_EXTENTS_FL;
                body.flags.set(InodeFlags::EXT4_INDEX_FL, dir.indexed);
                (body.i_block, body.blocks) = self.mapped(dir.content);
                body.links = dir_links(dir.subdirs);
            }
            Payload::File { size, content } => {
                (body.size, body.flags) = (size, InodeFlags::EXT4_EXTENTS_FL);
                (body.i_block, body.blocks) = self.mapped(content);
            }
            Payload::EaValue(i) => {
                let value = &self.tree.ea_values[i as usize];
                body.size = u64::from(value.size);
                body.flags = InodeFlags::EXT4_EXTENTS_FL | InodeFlags::EXT4_EA_INODE_FL;
                (body.i_block, body.blocks) = self.mapped(value.content);
            }
            Payload::Symlink { at, len, block } => {
                body.size = u64::from(len);
                if block == 0 {
                    let target = self.tree.stored(at, usize::from(len));
                    body.i_block[..target.len()].copy_from_slice(target);
                } else {
                    body.flags = InodeFlags::EXT4_EXTENTS_FL;
                    (body.i_block, body.blocks) = self.mapped(Content::Run { start: block, blocks: 1 });
                }
            }
            Payload::Device { major, minor } => {
                let mut words = encode_device(major, minor).unwrap_or_default();
                if node.links != 1 {
                    // In the old form, with several names, e2fsck takes the number for that of a directory's block and
                    // looks there; what it finds can be a file's own choice. The kernel reads both forms.
                    words = encode_large_device(major, minor);
                }
                body.i_block[..4].copy_from_slice(&words[0].to_le_bytes());
                body.i_block[4..8].copy_from_slice(&words[1].to_le_bytes());
            }
            Payload::Plain | Payload::Gone => {}
        }
        body
    }

    /// Writes a node into its slot (zeros before); gives the inode's checksum.
    pub(super) fn encode(&self, id: u32, slot: &mut [u8]) -> Result<u32> {
        let node = &self.tree.nodes[id as usize];
        let ino = ino_of(id);
        let mut body = self.body(id, node);
        let mut raw = RawInode::new_zeroed();
        raw.i_mode.set(node.mode);
        raw.set_owner(node.uid, node.gid);
        raw.set_size(body.size);
        raw.i_links_count.set(body.links as u16);
        raw.i_extra_isize.set(EXTRA_ISIZE);
        let time = |(low, extra): (u32, u32)| (low.into(), extra.into());
        let other = self.tree.other_times(node);
        (raw.i_atime, raw.i_atime_extra) = time(other.atime);
        (raw.i_ctime, raw.i_ctime_extra) = time(other.ctime);
        (raw.i_mtime, raw.i_mtime_extra) = time(node.mtime);
        (raw.i_crtime, raw.i_crtime_extra) = time(node.mtime);
        if let Payload::EaValue(i) = node.payload {
            let hash = self.tree.ea_values[i as usize].hash;
            // The kernel keeps the hash in the access time and the number of users in the change time and version.
            (raw.i_atime, raw.i_atime_extra) = time((hash, u32::from(hash >> 31 != 0)));
            raw.i_version.set(1);
        }
        if node.xattrs != NONE || body.inline.is_some() {
            let place = self.overflow.get(&id);
            if let Some(place) = place {
                raw.i_file_acl_lo.set(place.block as u32);
                raw.i_file_acl_high.set((place.block >> 32) as u16);
                body.blocks += 1 + place.value_blocks;
            }
            let room = self.xattr_room(body.inline.as_ref().map(Vec::len));
            let mut items = Vec::new();
            if let Some(value) = body.inline.take() {
                items.push(Item {
                    index: EXT4_XATTR_INDEX_SYSTEM,
                    name: EXT4_XATTR_SYSTEM_DATA.to_vec(),
                    value,
                    ea: None,
                });
            }
            items.extend(
                xattrs::plan(self.sets.get(node.xattrs), room, self.space.geometry.bs as usize)?.inode,
            );
            if !items.is_empty() {
                slot[XATTR_AT..XATTR_AT + INODE_HEADER_SIZE].copy_from_slice(&EXT4_XATTR_MAGIC.to_le_bytes());
                xattrs::lay(&mut slot[XATTR_AT + INODE_HEADER_SIZE..], 0, &items);
            }
        }
        let sectors = body.blocks * (self.space.geometry.bs / SECTOR);
        raw.i_blocks_lo.set(sectors as u32);
        raw.i_blocks_high.set((sectors >> 32) as u16);
        raw.i_flags.set(body.flags.bits());
        raw.i_block = body.i_block;
        slot[..XATTR_AT].copy_from_slice(&raw.as_bytes()[..XATTR_AT]);
        const { assert!(XATTR_AT <= RAW_INODE_SIZE) };
        Ok(seal_inode(CHECKSUM_SEED, ino, slot))
    }
}
