//! An ext4 image taken apart: where each piece of metadata stands, and how its checksum is made right again.
//!
//! Written from the format's documentation and on purpose without this project's own reader: whatever that overlooks, it
//! would overlook here too.
//!
//! ```text
//!   image ──► units: super block, descriptors, bitmaps, inodes, extent nodes, directory leaves, hash tree nodes,
//!             xattr blocks          each with its place, its length and its kind of checksum
//! ```

use std::{collections::BTreeMap, ops::Range};

const SUPER: usize = 1024;
const META_BG: u32 = 0x10;
const BIT64: u32 = 0x80;
const CSUM_SEED: u32 = 0x2000;
const METADATA_CSUM: u32 = 0x400;
const SPARSE_SUPER2: u32 = 0x200;

/// A kind of metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Super,
    Descriptor,
    BlockBitmap,
    InodeBitmap,
    Inode,
    ExtentNode,
    DirectoryLeaf,
    /// A block of a hash tree whose entries begin at this byte.
    HashNode(usize),
    XattrBlock,
}

/// One piece of metadata.
#[derive(Debug, Clone)]
pub(crate) struct Unit {
    pub(crate) kind: Kind,
    pub(crate) at: usize,
    pub(crate) len: usize,
    /// The number of its group, inode or block, whichever its checksum counts in.
    pub(crate) owner: u32,
}

impl Unit {
    pub(crate) fn span(&self) -> Range<usize> {
        self.at..self.at + self.len
    }
}

/// An image and its pieces.
pub(crate) struct Image {
    pub(crate) bytes: Vec<u8>,
    pub(crate) block_size: usize,
    pub(crate) units: Vec<Unit>,
    /// Where the group descriptors stand.
    descriptors: Vec<usize>,
    descriptor_size: usize,
    pub(crate) inode_size: usize,
    /// Where the inodes in use stand.
    inodes: BTreeMap<u32, usize>,
    seed: u32,
    checksums: bool,
}

pub(crate) fn u16_at(b: &[u8], at: usize) -> u32 {
    u32::from(u16::from_le_bytes([b[at], b[at + 1]]))
}

pub(crate) fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

pub(crate) fn put16(b: &mut [u8], at: usize, value: u32) {
    b[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
}

pub(crate) fn put32(b: &mut [u8], at: usize, value: u32) {
    b[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// CRC-32C as ext4 uses it: the caller's seed, and no inversion at the end.
fn crc(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

fn has_super(sb: &[u8], group: u32) -> bool {
    let power = |base: u32| {
        let mut p = base;
        while p < group {
            p *= base;
        }
        p == group
    };
    if group == 0 {
        true
    } else if u32_at(sb, 0x5C) & SPARSE_SUPER2 != 0 {
        u32_at(sb, 0x24C) == group || u32_at(sb, 0x250) == group
    } else {
        group == 1 || [3, 5, 7].into_iter().any(power)
    }
}

impl Image {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let sb = bytes[SUPER..2 * SUPER].to_vec();
        let block_size = 1024usize << u32_at(&sb, 0x18);
        let (incompat, ro) = (u32_at(&sb, 0x60), u32_at(&sb, 0x64));
        let seed = if incompat & CSUM_SEED == 0 { crc(!0, &sb[0x68..0x78]) } else { u32_at(&sb, 0x270) };
        let descriptor_size = if incompat & BIT64 == 0 { 32 } else { u16_at(&sb, 0xFE) as usize };
        let mut image = Self {
            block_size,
            units: vec![Unit { kind: Kind::Super, at: SUPER, len: SUPER, owner: 0 }],
            descriptors: Vec::new(),
            descriptor_size,
            inode_size: u16_at(&sb, 0x58) as usize,
            inodes: BTreeMap::new(),
            seed,
            checksums: ro & METADATA_CSUM != 0,
            bytes,
        };
        let (per_group, inodes_per_group, first) = (u32_at(&sb, 0x20), u32_at(&sb, 0x28), u32_at(&sb, 0x14));
        let groups = (u32_at(&sb, 4) - first).div_ceil(per_group);
        let per_block = (block_size / descriptor_size) as u32;
        for group in 0..groups {
            let number = group / per_block;
            let block = if incompat & META_BG == 0 || number < u32_at(&sb, 0x104) {
                first + 1 + number
            } else {
                let leader = number * per_block;
                first + leader * per_group + u32::from(has_super(&sb, leader))
            };
            let at = block as usize * block_size + (group % per_block) as usize * descriptor_size;
            image.descriptors.push(at);
            image.units.push(Unit { kind: Kind::Descriptor, at, len: descriptor_size, owner: group });
        }
        for group in 0..groups {
            image.group(group, per_group as usize / 8, inodes_per_group);
        }
        image
    }

    fn group(&mut self, group: u32, block_bits: usize, inodes: u32) {
        let at = self.descriptors[group as usize];
        let place = |field| u32_at(&self.bytes, at + field) as usize * self.block_size;
        let (blocks, bitmap, table) = (place(0), place(4), place(8));
        let flags = u16_at(&self.bytes, at + 0x12);
        if flags & 2 == 0 {
            self.units.push(Unit { kind: Kind::BlockBitmap, at: blocks, len: block_bits, owner: group });
        }
        if flags & 1 != 0 {
            return;
        }
        let len = inodes as usize / 8;
        self.units.push(Unit { kind: Kind::InodeBitmap, at: bitmap, len, owner: group });
        for i in 0..inodes as usize {
            if self.bytes[bitmap + i / 8] >> (i % 8) & 1 == 1 {
                let (at, owner) = (table + i * self.inode_size, group * inodes + i as u32 + 1);
                self.inodes.insert(owner, at);
                self.units.push(Unit { kind: Kind::Inode, at, len: self.inode_size, owner });
                self.contents(at, owner);
            }
        }
    }

    fn contents(&mut self, at: usize, ino: u32) {
        const INDEX: u32 = 0x1000;
        const EXTENTS: u32 = 0x8_0000;
        const INLINE: u32 = 0x1000_0000;
        let (mode, flags) = (u16_at(&self.bytes, at) & 0xF000, u32_at(&self.bytes, at + 32));
        let xattrs = u32_at(&self.bytes, at + 104);
        let (len, block) = (self.block_size, xattrs as usize * self.block_size);
        if xattrs != 0 && !self.units.iter().any(|u| u.kind == Kind::XattrBlock && u.at == block) {
            self.units.push(Unit { kind: Kind::XattrBlock, at: block, len, owner: xattrs });
        }
        if flags & EXTENTS == 0 || flags & INLINE != 0 {
            return;
        }
        let mut blocks = Vec::new();
        self.extents(at + 40, ino, &mut blocks);
        if mode != 0x4000 {
            return;
        }
        for (i, block) in blocks.into_iter().enumerate() {
            let at = block as usize * self.block_size;
            let index = flags & INDEX != 0;
            let empty = u32_at(&self.bytes, at) == 0 && u16_at(&self.bytes, at + 4) as usize == len;
            let kind = match (index, i) {
                (true, 0) => Kind::HashNode(32),
                (true, _) if empty => Kind::HashNode(8),
                _ => Kind::DirectoryLeaf,
            };
            self.units.push(Unit { kind, at, len, owner: ino });
        }
    }

    fn extents(&mut self, at: usize, ino: u32, blocks: &mut Vec<u32>) {
        let (entries, depth) = (u16_at(&self.bytes, at + 2) as usize, u16_at(&self.bytes, at + 6));
        for entry in (0..entries).map(|i| at + 12 + 12 * i) {
            if depth == 0 {
                let (len, start) = (u16_at(&self.bytes, entry + 4), u32_at(&self.bytes, entry + 8));
                blocks.extend(start..start + (if len > 32768 { len - 32768 } else { len }));
            } else {
                let child = u32_at(&self.bytes, entry + 4) as usize * self.block_size;
                self.units.push(Unit { kind: Kind::ExtentNode, at: child, len: self.block_size, owner: ino });
                self.extents(child, ino, blocks);
            }
        }
    }

    /// The image with the padding of its inode bitmaps set: profile hcsshim leaves it clear, as the tool does whose bytes
    /// it makes, and that is the one thing that e2fsck does not take of its images.
    pub(crate) fn for_e2fsck(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        for unit in self.units.iter().filter(|unit| unit.kind == Kind::InodeBitmap) {
            bytes[unit.at + unit.len..unit.at + self.block_size].fill(0xFF);
        }
        bytes
    }

    /// Seed of the checksums of an inode and of its blocks.
    fn inode_seed(&self, ino: u32) -> u32 {
        let at = self.inodes[&ino];
        crc(crc(self.seed, &ino.to_le_bytes()), &self.bytes[at + 100..at + 104])
    }

    /// Makes the checksum of a piece right; gives the places that were written.
    pub(crate) fn seal(&mut self, unit: &Unit) -> Vec<Range<usize>> {
        let Unit { at, len, owner, kind } = *unit;
        let mut written = Vec::new();
        if !self.checksums {
            return written;
        }
        let mut put = |bytes: &mut [u8], at: usize, sum: &[u8]| {
            bytes[at..at + sum.len()].copy_from_slice(sum);
            written.push(at..at + sum.len());
        };
        match kind {
            Kind::Super => {
                let sum = crc(!0, &self.bytes[at..at + 0x3FC]);
                put(&mut self.bytes, at + 0x3FC, &sum.to_le_bytes());
            }
            Kind::Descriptor => {
                let b = &self.bytes[at..at + len];
                let sum = crc(crc(crc(self.seed, &owner.to_le_bytes()), &b[..0x1E]), &[0; 2]);
                let sum = crc(sum, &b[0x20..]);
                put(&mut self.bytes, at + 0x1E, &(sum as u16).to_le_bytes());
            }
            Kind::BlockBitmap | Kind::InodeBitmap => {
                let sum = crc(self.seed, &self.bytes[at..at + len]).to_le_bytes();
                let descriptor = self.descriptors[owner as usize];
                let (low, high) = if kind == Kind::BlockBitmap { (0x18, 0x38) } else { (0x1A, 0x3A) };
                put(&mut self.bytes, descriptor + low, &sum[..2]);
                if self.descriptor_size >= 64 {
                    put(&mut self.bytes, descriptor + high, &sum[2..]);
                }
                let unit = Unit { kind: Kind::Descriptor, at: descriptor, len: self.descriptor_size, owner };
                written.extend(self.seal(&unit));
            }
            Kind::Inode => {
                let high = u16_at(&self.bytes, at + 128) >= 4;
                put(&mut self.bytes, at + 124, &[0; 2]);
                if high {
                    put(&mut self.bytes, at + 130, &[0; 2]);
                }
                let sum = crc(self.inode_seed(owner), &self.bytes[at..at + len]).to_le_bytes();
                put(&mut self.bytes, at + 124, &sum[..2]);
                if high {
                    put(&mut self.bytes, at + 130, &sum[2..]);
                }
            }
            Kind::ExtentNode => {
                let tail = 12 + 12 * u16_at(&self.bytes, at + 4) as usize;
                if tail + 4 <= len {
                    let sum = crc(self.inode_seed(owner), &self.bytes[at..at + tail]);
                    put(&mut self.bytes, at + tail, &sum.to_le_bytes());
                }
            }
            Kind::DirectoryLeaf => {
                let sum = crc(self.inode_seed(owner), &self.bytes[at..at + len - 12]);
                put(&mut self.bytes, at + len - 4, &sum.to_le_bytes());
            }
            Kind::HashNode(first) => {
                let limit = u16_at(&self.bytes, at + first) as usize;
                let count = u16_at(&self.bytes, at + first + 2) as usize;
                let (tail, used) = (first + limit * 8, first + count * 8);
                if tail + 8 <= len && used <= len {
                    let b = &self.bytes[at..at + len];
                    let sum = crc(crc(self.inode_seed(owner), &b[..used]), &b[tail..tail + 4]);
                    let sum = crc(sum, &[0; 4]);
                    put(&mut self.bytes, at + tail + 4, &sum.to_le_bytes());
                }
            }
            Kind::XattrBlock => {
                let b = &self.bytes[at..at + len];
                let sum = crc(crc(self.seed, &u64::from(owner).to_le_bytes()), &b[..16]);
                let sum = crc(crc(sum, &[0; 4]), &b[20..]);
                put(&mut self.bytes, at + 16, &sum.to_le_bytes());
            }
        }
        written
    }
}
