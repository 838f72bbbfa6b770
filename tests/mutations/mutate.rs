//! One mutation: a seed decides which piece is changed, where and how; checksums are made right afterwards.
//!
//! ```text
//!   bytes    fields of one piece set, flipped, counted up or down, copied about       (half of all)
//!   splice   parts of one piece copied over another of its kind                      (a fifth)
//!   meaning  what a hostile writer would try: fields and names by what they mean      (the rest)
//! ```

use super::image::{Image, Kind, Unit, put16, put32, u16_at, u32_at};
use std::{collections::BTreeMap, ops::Range};

/// A generator whose numbers depend on its seed alone.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64, number: u64) -> Self {
        // SplitMix64, so that neighbouring numbers give unlike streams.
        let mut z =
            seed.wrapping_mul(0xD1B5_4A32_D192_ED03).wrapping_add(number.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        Self((z ^ z >> 31) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    pub(crate) fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

/// Pieces by their kinds, so that rare kinds are chosen as often as common ones.
pub(crate) struct Choice(Vec<Vec<usize>>);

impl Choice {
    pub(crate) fn new(image: &Image) -> Self {
        let mut kinds: BTreeMap<Kind, Vec<usize>> = BTreeMap::new();
        for (i, unit) in image.units.iter().enumerate() {
            kinds.entry(unit.kind).or_default().push(i);
        }
        Self(kinds.into_values().collect())
    }
}

/// An image with one mutation at a time.
pub(crate) struct Mutant<'a> {
    pub(crate) image: &'a mut Image,
    good: &'a [u8],
    /// What differs from the good image.
    pub(crate) changed: Vec<Range<usize>>,
    touched: Vec<Unit>,
    /// For people.
    pub(crate) what: Vec<String>,
}

impl<'a> Mutant<'a> {
    pub(crate) fn new(image: &'a mut Image, good: &'a [u8]) -> Self {
        Self { image, good, changed: Vec::new(), touched: Vec::new(), what: Vec::new() }
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        let range = at..at + bytes.len();
        self.image.bytes[range.clone()].copy_from_slice(bytes);
        self.changed.push(range);
    }

    fn touch(&mut self, unit: &Unit, what: &str) {
        self.what.push(format!("{:?} of {} {what}", unit.kind, unit.owner));
        self.touched.push(unit.clone());
    }

    /// Makes the mutation that these numbers choose; false if it changes nothing.
    pub(crate) fn mutate(&mut self, choice: &Choice, random: &mut Random) -> bool {
        match random.below(10) {
            0..5 => self.bytes(choice, random),
            5..7 => self.splice(choice, random),
            _ => self.meaning(choice, random),
        }
        for unit in std::mem::take(&mut self.touched) {
            let sealed = self.image.seal(&unit);
            self.changed.extend(sealed);
        }
        self.changed.iter().any(|r| self.image.bytes[r.clone()] != self.good[r.clone()])
    }

    /// Puts the good bytes back.
    pub(crate) fn restore(&mut self) {
        for range in self.changed.drain(..) {
            self.image.bytes[range.clone()].copy_from_slice(&self.good[range]);
        }
        self.what.clear();
    }

    fn unit(&self, kind: &[usize], random: &mut Random) -> Unit {
        self.image.units[kind[random.below(kind.len())]].clone()
    }

    fn bytes(&mut self, choice: &Choice, random: &mut Random) {
        let kind = &choice.0[random.below(choice.0.len())];
        let count = if random.below(4) == 0 { 1 + random.below(3) } else { 1 };
        for _ in 0..count {
            let unit = self.unit(kind, random);
            let len = unit.len;
            let mut offset = random.below(len);
            if len >= 256 && random.below(2) == 0 {
                offset = random.below(96);
            }
            if unit.kind == Kind::Inode {
                match random.below(6) {
                    0 | 1 => offset = 40 + random.below(60),
                    2 | 3 => offset = 128 + random.below(len - 128),
                    _ => {}
                }
            }
            let width = random.one_of(&[1usize, 2, 4]);
            let at = unit.at + (offset / width * width).min(len - width);
            let old = self.image.bytes[at..at + width].to_vec();
            let mut new = old.clone();
            match random.below(8) {
                0 => new[0] ^= 1 << random.below(8),
                1 => new.fill(0),
                2 => new.fill(0xFF),
                3 => new.copy_from_slice(&random.next().to_le_bytes()[..width]),
                4 => new[0] = new[0].wrapping_add(1),
                5 => new[0] = new[0].wrapping_sub(1),
                6 => {
                    let from = unit.at + (random.below(len) / width * width).min(len - width);
                    new.copy_from_slice(&self.image.bytes[from..from + width]);
                }
                _ => {
                    let values =
                        [1u32, 2, 3, 4, 8, 10, 11, 12, 16, 32, 64, 256, 1024, 4096, 0x8000, 0xF30A, 0xFFFF];
                    new.copy_from_slice(&random.one_of(&values).to_le_bytes()[..width]);
                }
            }
            self.set(at, &new);
            self.touch(&unit, &format!("+{:#x} {old:02x?} -> {new:02x?}", at - unit.at));
        }
    }

    fn splice(&mut self, choice: &Choice, random: &mut Random) {
        const INODE: [(usize, usize); 10] =
            [(0, 40), (40, 60), (26, 2), (28, 4), (32, 4), (4, 4), (100, 28), (104, 8), (128, 28), (0, 0)];
        const DESCRIPTOR: [(usize, usize); 7] = [(0, 12), (0, 4), (4, 4), (8, 4), (12, 6), (18, 2), (28, 2)];
        for _ in 0..=random.below(2) {
            let kind = &choice.0[random.below(choice.0.len())];
            let (from, to) = (self.unit(kind, random), self.unit(kind, random));
            let whole = from.len.min(to.len);
            let (offset, len) = match from.kind {
                Kind::Super => continue,
                Kind::Inode => random.one_of(&INODE),
                Kind::Descriptor => random.one_of(&DESCRIPTOR),
                _ => {
                    let len = random.one_of(&[4, 8, 12, 16, 24, 32, 64, 0]).min(whole);
                    (random.below(whole - len + 1) / 4 * 4, len)
                }
            };
            let (offset, len) = if len == 0 { (0, whole) } else { (offset, len) };
            let part = self.image.bytes[from.at + offset..from.at + offset + len].to_vec();
            self.set(to.at + offset, &part);
            self.touch(&to, &format!("+{offset:#x}: {len} bytes of that of {}", from.owner));
            // Swapped, so that what is counted may still be right.
            if random.below(3) == 0 {
                let other = self.good[to.at + offset..to.at + offset + len].to_vec();
                self.set(from.at + offset, &other);
                self.touch(&from, "swapped");
            }
        }
    }

    fn meaning(&mut self, choice: &Choice, random: &mut Random) {
        let kind = &choice.0[random.below(choice.0.len())];
        let unit = self.unit(kind, random);
        let mut b = self.image.bytes[unit.span()].to_vec();
        let what = match unit.kind {
            Kind::Super => super_block(&mut b, random),
            Kind::Descriptor => descriptor(&mut b, random),
            Kind::Inode => inode(&mut b, random),
            Kind::DirectoryLeaf => {
                let end = b.len() - 12;
                entry(&mut b[..end], random)
            }
            Kind::XattrBlock => xattr(&mut b, 32, 0, random),
            Kind::ExtentNode => extent(&mut b, random),
            Kind::HashNode(first) => hash_entry(&mut b, first, random),
            Kind::BlockBitmap | Kind::InodeBitmap => {
                let bit = random.below(b.len() * 8);
                b[bit / 8] ^= 1 << (bit % 8);
                format!("bit {bit}")
            }
        };
        self.set(unit.at, &b);
        self.touch(&unit, &what);
    }
}

fn flip(b: &mut [u8], at: usize, bits: usize, random: &mut Random) -> String {
    let bit = random.below(bits);
    b[at + bit / 8] ^= 1 << (bit % 8);
    format!("+{at:#x} bit {bit}")
}

fn super_block(b: &mut [u8], random: &mut Random) -> String {
    match random.below(5) {
        0 => flip(b, 0x5C, 32, random),
        1 => flip(b, 0x60, 32, random),
        2 => flip(b, 0x64, 32, random),
        3 => {
            // Fields of two bytes.
            let at =
                random.one_of(&[0x3A, 0x3C, 0x50, 0x52, 0x58, 0x5A, 0xCE, 0xFE, 0x15C, 0x15E, 0x164, 0x166]);
            let value = random.one_of(&[0u32, 1, 2, 3, 5, 6, 32, 64, 128, 0xFFFF]);
            put16(b, at, value);
            format!("+{at:#x} = {value}")
        }
        _ => {
            let at = random.one_of(&[
                0x00, 0x04, 0x08, 0x0C, 0x10, 0x14, 0x18, 0x1C, 0x20, 0x24, 0x28, 0x2C, 0x30, 0x40, 0x44,
                0x48, 0x4C, 0x54, 0xE0, 0xE4, 0xE8, 0xFC, 0x100, 0x104, 0x108, 0x150, 0x154, 0x158, 0x160,
                0x168, 0x170, 0x174, 0x178, 0x17C, 0x194, 0x240, 0x248, 0x24C, 0x250, 0x268, 0x26C, 0x270,
                0x274, 0x278, 0x27C, 0x280, 0x284,
            ]);
            let old = u32_at(b, at);
            let value = random.one_of(&[
                0,
                1,
                2,
                3,
                old.wrapping_add(1),
                old.wrapping_sub(1),
                old.wrapping_mul(2),
                old / 2,
                !0,
            ]);
            put32(b, at, value);
            format!("+{at:#x} = {value}")
        }
    }
}

fn descriptor(b: &mut [u8], random: &mut Random) -> String {
    if random.below(2) == 0 {
        return flip(b, 0x12, 16, random);
    }
    let at = random.one_of(&[0x0, 0x4, 0x8, 0xC, 0xE, 0x10, 0x14, 0x1C]);
    let value = random.one_of(&[0, 1, u16_at(b, at).wrapping_add(1), u16_at(b, at).wrapping_sub(1), 0xFFFF]);
    put16(b, at, value);
    format!("+{at:#x} = {value}")
}

fn inode(b: &mut [u8], random: &mut Random) -> String {
    match random.below(9) {
        0 => flip(b, 32, 32, random),
        1 => {
            let kind = random.one_of(&[0x1000u32, 0x2000, 0x4000, 0x6000, 0x8000, 0xA000, 0xC000, 0]);
            let mode = u16_at(b, 0) & 0xFFF | kind;
            put16(b, 0, mode);
            format!("mode {mode:#x}")
        }
        2 => {
            // Times with every epoch.
            let (time, extra) = random.one_of(&[(8, 140), (12, 132), (16, 136), (144, 148)]);
            let (secs, epoch) = (random.next() as u32, random.below(4) as u32);
            put32(b, time, secs);
            let kept = u32_at(b, extra) & !3;
            put32(b, extra, kept | epoch);
            format!("time +{time} {secs:#x}, epoch {epoch}")
        }
        3 => {
            // A node of an extent tree, whatever the inode holds.
            let depth = random.one_of(&[0u32, 1, 4, 5, 6]);
            for (at, value) in [
                (40, 0xF30A),
                (42, random.one_of(&[0, 1, 4, 5])),
                (44, random.one_of(&[1, 2, 3, 4])),
                (46, depth),
            ] {
                put16(b, at, value);
            }
            format!("root of depth {depth}")
        }
        4 => {
            let at =
                random.one_of(&[2, 4, 20, 24, 28, 36, 100, 104, 108, 112, 116, 118, 120, 122, 126, 152, 156]);
            let value = random.one_of(&[0u32, 1, 2, 59, 60, 61, 0x7FFF, 0x8000, !0]);
            put16(b, at, value);
            format!("+{at} = {value}")
        }
        5 => {
            let links = random.one_of(&[0u32, 1, 2, 3, 65000, 65001, 65535]);
            put16(b, 26, links);
            format!("links {links}")
        }
        6 => {
            let size = random.one_of(&[0u32, 1, 59, 60, 61, 63, 64, 72, 1023, 1024, 1 << 31, !0]);
            put32(b, 4, size);
            format!("size {size}")
        }
        _ => {
            let start = 128 + u16_at(b, 128) as usize;
            if start + 8 < b.len() && u32_at(b, start) == 0xEA02_0000 {
                let first = start + 4;
                xattr(&mut b[first..], 0, 0, random)
            } else {
                entry(&mut b[44..100], random)
            }
        }
    }
}

/// Changes an entry of a directory.
fn entry(b: &mut [u8], random: &mut Random) -> String {
    let mut starts = Vec::new();
    let mut at = 0;
    while at + 8 <= b.len() {
        let len = u16_at(b, at + 4) as usize;
        if len < 8 || at + len > b.len() {
            break;
        }
        starts.push(at);
        at += len;
    }
    if starts.is_empty() {
        return "no entry".into();
    }
    let at = random.one_of(&starts);
    let other = random.one_of(&starts);
    match random.below(9) {
        0 => {
            let number =
                random.one_of(&[0, 1, 2, 3, 7, 8, 10, 11, u32_at(b, other), u32_at(b, at).wrapping_add(1)]);
            put32(b, at, number);
            format!("entry {at}: inode {number}")
        }
        1 => {
            b[at + 7] = random.below(10) as u8;
            format!("entry {at}: type {}", b[at + 7])
        }
        2 => {
            b[at + 6] =
                random.one_of(&[0, 1, 2, 3, 255, b[at + 6].wrapping_add(1), b[at + 6].wrapping_sub(1)]);
            format!("entry {at}: name of {}", b[at + 6])
        }
        3 => {
            let len = random.one_of(&[
                0,
                8,
                12,
                16,
                u16_at(b, at + 4) + 4,
                u16_at(b, at + 4).wrapping_sub(4),
                0xFFFC,
            ]);
            put16(b, at + 4, len);
            format!("entry {at}: length {len}")
        }
        4 => {
            let end = (at + 8 + (b[at + 6] as usize).max(1)).min(b.len());
            let place = at + 8 + random.below(end - at - 8);
            b[place.min(end - 1)] = random.one_of(&[0, b'/', b'.', 0xFF]);
            format!("entry {at}: a byte of the name")
        }
        5 => {
            // What fills the name up.
            let place = at + 8 + b[at + 6] as usize;
            if place < b.len() {
                b[place] = 0x41;
            }
            format!("entry {at}: behind the name")
        }
        6 => {
            let len = (u16_at(b, at + 4).min(u16_at(b, other + 4)) as usize).min(b.len() - at.max(other));
            let part = b[other + 6..other + len].to_vec();
            b[at + 6..at + len].copy_from_slice(&part);
            format!("entry {at}: the name of {other}")
        }
        7 => {
            let (a, o) = (u32_at(b, at), u32_at(b, other));
            put32(b, at, o);
            put32(b, other, a);
            format!("entries {at} and {other}: inodes swapped")
        }
        _ => {
            for (i, c) in b"..".iter().enumerate() {
                if at + 8 + i < b.len() {
                    b[at + 8 + i] = *c;
                }
            }
            b[at + 6] = random.one_of(&[1, 2]);
            format!("entry {at}: dots")
        }
    }
}

/// Changes an xattr; `first` is where entries begin, and offsets of values count from `base`.
fn xattr(b: &mut [u8], first: usize, base: usize, random: &mut Random) -> String {
    let mut starts = Vec::new();
    let mut at = first;
    while at + 16 <= b.len() && u32_at(b, at) != 0 {
        starts.push(at);
        at += 16 + (b[at] as usize).next_multiple_of(4);
    }
    if starts.is_empty() || first == 32 && random.below(6) == 0 {
        if first == 32 {
            let at = random.one_of(&[0, 4, 8, 12, 20, 24, 28]);
            let value = random.one_of(&[0u32, 1, 2, 3, 1024, 1025, !0]);
            put32(b, at, value);
            return format!("header +{at} = {value}");
        }
        return "no xattr".into();
    }
    let at = random.one_of(&starts);
    let what = match random.below(8) {
        0 => {
            b[at] = random.one_of(&[0, 1, 255, b[at].wrapping_add(1), b[at].wrapping_sub(1)]);
            format!("name of {}", b[at])
        }
        1 => {
            b[at + 1] = random.below(10) as u8;
            format!("name space {}", b[at + 1])
        }
        2 => {
            let old = u16_at(b, at + 2);
            let value =
                random.one_of(&[0, old + 4, old.wrapping_sub(4), old + 1, 0xFFFC, b.len() as u32 - 4]);
            put16(b, at + 2, value);
            format!("value at {value}")
        }
        3 => {
            let value = random.one_of(&[1, 2, 11, 12, 20, u32_at(b, at + 4).wrapping_add(1), !0]);
            put32(b, at + 4, value);
            format!("value in inode {value}")
        }
        4 => {
            let old = u32_at(b, at + 8);
            let value = random.one_of(&[
                0,
                old.wrapping_add(1),
                old.wrapping_sub(1),
                old.wrapping_add(4),
                65536,
                65537,
                !0,
            ]);
            put32(b, at + 8, value);
            format!("value of {value}")
        }
        5 => {
            // What fills the value up to whole words, which counts in the hash.
            let end = base + u16_at(b, at + 2) as usize + u32_at(b, at + 8) as usize;
            if end < b.len() && u32_at(b, at + 4) == 0 {
                b[end] = 0x41;
            }
            "behind the value".into()
        }
        6 => {
            if b[at] > 0 {
                let place = at + 16 + random.below(b[at] as usize);
                if place < b.len() {
                    b[place] = random.one_of(&[0, b'.', 0xFF]);
                }
            }
            "a byte of the name".into()
        }
        _ => {
            put32(b, at + 12, 0);
            "no hash".into()
        }
    };
    // In most cases the hash fits, so that the change itself must be seen.
    let sum = random.below(4);
    if sum != 0 && u32_at(b, at + 4) == 0 {
        let name = b.get(at + 16..at + 16 + b[at] as usize).unwrap_or(&[]).to_vec();
        let mut hash = name.iter().fold(0u32, |h, c| h.rotate_left(5) ^ u32::from(*c));
        let (from, len) = (base + u16_at(b, at + 2) as usize, u32_at(b, at + 8) as usize);
        if sum != 1 || b.len() < from + len.min(b.len()) {
            // Padding counts as zeros.
            for word in b.get(from..from + len.min(b.len())).unwrap_or(&[]).chunks(4) {
                let mut four = [0; 4];
                four[..word.len()].copy_from_slice(word);
                hash = hash.rotate_left(16) ^ u32::from_le_bytes(four);
            }
        } else {
            for word in b.get(from..from + len.next_multiple_of(4)).unwrap_or(&[]).chunks_exact(4) {
                hash = hash.rotate_left(16) ^ u32_at(word, 0);
            }
        }
        put32(b, at + 12, hash);
        if first == 32 {
            let mut all = 0u32;
            for at in starts {
                all = all.rotate_left(16) ^ u32_at(b, at + 12);
            }
            put32(b, 12, all);
        }
    }
    format!("xattr {at}: {what}")
}

fn extent(b: &mut [u8], random: &mut Random) -> String {
    let entries = u16_at(b, 2) as usize;
    if entries == 0 || random.below(4) == 0 {
        let at = random.one_of(&[0, 2, 4, 6, 8]);
        let value = random.one_of(&[0, 1, u16_at(b, at) + 1, u16_at(b, at).wrapping_sub(1), 0xF30A]);
        put16(b, at, value);
        return format!("header +{at} = {value}");
    }
    let at = 12 + 12 * random.below(entries);
    match random.below(4) {
        0 => {
            let len =
                random.one_of(&[0, 1, 2, u16_at(b, at + 4) + 1, u16_at(b, at + 4) | 0x8000, 0x8000, 0xFFFF]);
            put16(b, at + 4, len);
            format!("extent {at}: length {len}")
        }
        1 => {
            let block = u32_at(b, at).wrapping_add(random.one_of(&[1, !0, 8]));
            put32(b, at, block);
            format!("extent {at}: from {block}")
        }
        2 => {
            let block =
                random.one_of(&[0, 1, u32_at(b, at + 8).wrapping_add(1), u32_at(b, at + 8).wrapping_sub(1)]);
            put32(b, at + 8, block);
            format!("extent {at}: block {block}")
        }
        _ => {
            put16(b, at + 6, 1);
            format!("extent {at}: beyond 2^32")
        }
    }
}

fn hash_entry(b: &mut [u8], first: usize, random: &mut Random) -> String {
    if first == 32 && random.below(4) == 0 {
        let at = 24 + random.below(8);
        b[at] = random.below(9) as u8;
        return format!("root +{at} = {}", b[at]);
    }
    let count = u16_at(b, first + 2) as usize;
    match random.below(4) {
        0 => {
            let at = first + random.one_of(&[0, 2]);
            let value = random.one_of(&[0, 1, u16_at(b, at) + 1, u16_at(b, at).wrapping_sub(1), 0xFFFF]);
            put16(b, at, value);
            format!("count or limit {value}")
        }
        n => {
            let at = first + 8 * random.below(count.max(1));
            let at = if n == 1 { at } else { at + 4 };
            if at + 4 > b.len() || at == first {
                return "nothing".into();
            }
            let value = random.one_of(&[
                0,
                1,
                u32_at(b, at) ^ 1,
                u32_at(b, at).wrapping_add(2),
                u32_at(b, at).wrapping_sub(2),
                !0,
            ]);
            put32(b, at, value);
            format!("hash entry +{at} = {value:#x}")
        }
    }
}
