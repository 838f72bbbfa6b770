//! A disk that forgets: what a power cut may leave of the writes since the last flush.
//!
//! ```text
//!   set_len, write, write, sync, write, write │ power cut
//!   └─────── durable ──────────┘ └─ in the cache ─┘ ──► each write kept, lost or torn, in any combination ──► images
//! ```
//!
//! Assumptions, those of a disk with a volatile cache: a flush makes everything before it durable; after it, writes may
//! reach the medium in any order or not at all; a write that is cut has a whole number of sectors, from its begin on or up
//! to its end. A change of the length is a write like the others.
//!
//! Invariants: the images of a moment include that in which nothing is lost and that in which all is; equal images are
//! visited once. Called by tests of what writes in place.

use crate::{MemDisk, ReadAt, WriteAt};
use parking_lot::Mutex;
use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hasher},
    io,
    ops::Range,
};

/// Sizes of the sectors at which a write may be torn, in bytes: of the old disks and of today's.
pub const SECTORS: [u64; 2] = [512, 4096];
/// Most writes since a flush of which all combinations are visited.
pub const ALL: usize = 12;
/// Combinations that are drawn beyond that, by a fixed seed.
pub const SAMPLES: usize = 10_000;
/// Begin of the sequence from which they are drawn; not 0.
const SEED: u64 = 0x6469_736b;

/// Something that happened to a [`CrashDisk`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Bytes were written at an offset.
    Write(u64, Vec<u8>),
    /// The length in bytes was set.
    SetLen(u64),
    /// Everything before became durable.
    Flush,
}

/// What became of one write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Lost,
    /// Only this many of its first bytes.
    First(usize),
    /// Only its bytes from here on.
    Last(usize),
    Whole,
}

/// A disk in memory that notes all writes and flushes.
#[derive(Debug, Default)]
pub struct CrashDisk {
    begin: Vec<u8>,
    now: MemDisk,
    events: Mutex<Vec<Event>>,
}

/// What was visited.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Visited {
    /// Moments of a power cut: one before each flush, and the end.
    pub cuts: usize,
    /// Of these, moments at which not all combinations were visited.
    pub sampled: usize,
    /// Most writes between two flushes.
    pub most: usize,
    /// Different images.
    pub images: usize,
}

impl CrashDisk {
    /// A disk with durable content.
    pub fn new(content: Vec<u8>) -> Self {
        Self { now: MemDisk::from(content.clone()), begin: content, events: Mutex::default() }
    }

    /// What was written so far.
    pub fn events(&self) -> Vec<Event> {
        self.events.lock().clone()
    }

    /// The bytes without a power cut.
    pub fn to_vec(&self) -> Vec<u8> {
        self.now.to_vec()
    }

    /// Calls `visit` with each image that a power cut may leave, and the number of flushes before it.
    pub fn images(&self, visit: impl FnMut(&[u8], usize)) -> Visited {
        images(&self.begin, &self.events(), visit)
    }

    /// As [`CrashDisk::images`], as if the flush `left_out` (from 0) had never been called.
    pub fn images_without(&self, left_out: usize, visit: impl FnMut(&[u8], usize)) -> Visited {
        let mut flushes = 0;
        let mut events = self.events();
        events.retain(|event| {
            flushes += usize::from(*event == Event::Flush);
            *event != Event::Flush || flushes - 1 != left_out
        });
        images(&self.begin, &events, visit)
    }
}

impl ReadAt for CrashDisk {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.now.read_at(buf, offset)
    }

    fn size(&self) -> io::Result<u64> {
        self.now.size()
    }
}

impl WriteAt for CrashDisk {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        let mut events = self.events.lock();
        let written = self.now.write_at(buf, offset)?;
        if written > 0 {
            events.push(Event::Write(offset, buf[..written].to_vec()));
        }
        Ok(written)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut events = self.events.lock();
        self.now.set_len(len)?;
        events.push(Event::SetLen(len));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.events.lock().push(Event::Flush);
        Ok(())
    }
}

/// Visits the images that a power cut may leave of a disk that held `begin` before `events`; the second argument of
/// `visit` is the number of flushes before the cut.
pub fn images(begin: &[u8], events: &[Event], mut visit: impl FnMut(&[u8], usize)) -> Visited {
    let mut visited = Visited::default();
    let mut durable = begin.to_vec();
    for (flushes, cached) in events.split(|event| *event == Event::Flush).enumerate() {
        visited.cuts += 1;
        visited.most = visited.most.max(cached.len());
        visited.sampled += usize::from(cached.len() > ALL);
        // Images of one moment differ only here.
        let touched = touched(cached, durable.len());
        let (mut seen, mut image) = (HashSet::new(), durable.clone());
        for_each_combination(cached, &mut |fates| {
            apply(&mut image, cached, fates);
            if seen.insert(number(&image, &touched)) {
                visit(&image, flushes);
            }
            image.resize(durable.len(), 0);
            for range in &touched {
                let range = range.start..range.end.min(durable.len());
                if !range.is_empty() {
                    image[range.clone()].copy_from_slice(&durable[range]);
                }
            }
        });
        visited.images += seen.len();
        apply(&mut durable, cached, &vec![Fate::Whole; cached.len()]);
    }
    visited
}

/// The bytes that events may change in a disk of `len` bytes.
fn touched(cached: &[Event], len: usize) -> Vec<Range<usize>> {
    let range = |event: &Event| match event {
        Event::Write(offset, bytes) => *offset as usize..*offset as usize + bytes.len(),
        Event::SetLen(new) => *new as usize..len,
        Event::Flush => 0..0,
    };
    cached.iter().map(range).filter(|range| !range.is_empty()).collect()
}

/// A number for an image, of 128 bits, so that different images do not meet.
fn number(image: &[u8], touched: &[Range<usize>]) -> u128 {
    let hash = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        hasher.write_u8(salt);
        hasher.write_usize(image.len());
        for range in touched {
            hasher.write(&image[range.start.min(image.len())..range.end.min(image.len())]);
        }
        u128::from(hasher.finish())
    };
    hash(0) << 64 | hash(1)
}

fn for_each_combination(cached: &[Event], one: &mut impl FnMut(&[Fate])) {
    let whole = vec![Fate::Whole; cached.len()];
    if cached.len() <= ALL {
        for chosen in 0_u32..1 << cached.len() {
            let kept = |n: usize| if chosen >> n & 1 == 1 { Fate::Whole } else { Fate::Lost };
            one(&(0..cached.len()).map(kept).collect::<Vec<_>>());
        }
    } else {
        for first in 0..cached.len() {
            for second in first..cached.len() {
                let mut fates = whole.clone();
                (fates[first], fates[second]) = (Fate::Lost, Fate::Lost);
                one(&fates);
            }
        }
        let mut random = SEED;
        for _ in 0..SAMPLES {
            let fates: Vec<Fate> = cached
                .iter()
                .map(|_| {
                    // xorshift64: the same draws in every run.
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    if random >> 40 & 1 == 1 { Fate::Whole } else { Fate::Lost }
                })
                .collect();
            one(&fates);
        }
    }
    // Prefixes, the last write of each torn, with and without what came after it.
    for (n, event) in cached.iter().enumerate() {
        for fate in tears(event).into_iter().chain([Fate::Lost]) {
            for later in [Fate::Lost, Fate::Whole] {
                let mut fates = whole.clone();
                fates[n] = fate;
                fates[n + 1..].fill(later);
                one(&fates);
            }
        }
    }
}

/// The ways in which a write can be torn: behind its first and before its last sector, and in its middle, for each size.
fn tears(event: &Event) -> Vec<Fate> {
    let Event::Write(offset, bytes) = event else { return Vec::new() };
    let end = offset + bytes.len() as u64;
    let mut fates = Vec::new();
    for sector in SECTORS {
        let first = (offset + 1).next_multiple_of(sector);
        let last = (end - 1) / sector * sector;
        let middle = (offset.midpoint(end)) / sector * sector;
        for at in [first, middle, last] {
            if at > *offset && at < end {
                let at = (at - offset) as usize;
                fates.extend([Fate::First(at), Fate::Last(at)]);
            }
        }
    }
    fates
}

/// Lets events happen to an image.
fn apply(image: &mut Vec<u8>, cached: &[Event], fates: &[Fate]) {
    for (event, fate) in cached.iter().zip(fates) {
        match (event, fate) {
            (_, Fate::Lost) | (Event::Flush, _) => {}
            (Event::SetLen(len), _) => image.resize(*len as usize, 0),
            (Event::Write(offset, bytes), fate) => {
                let range = match fate {
                    Fate::First(end) => 0..*end,
                    Fate::Last(start) => *start..bytes.len(),
                    _ => 0..bytes.len(),
                };
                let at = *offset as usize + range.start;
                let part = &bytes[range];
                if image.len() < at + part.len() {
                    image.resize(at + part.len(), 0);
                }
                image[at..at + part.len()].copy_from_slice(part);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(disk: &CrashDisk) -> HashSet<(Vec<u8>, usize)> {
        let mut found = HashSet::new();
        let visited = disk.images(|image, flushes| assert!(found.insert((image.to_vec(), flushes)), "twice"));
        assert_eq!(visited.images, found.len());
        found
    }

    #[test]
    fn unflushed_writes_come_in_every_combination_and_flushed_ones_stay() {
        let disk = CrashDisk::new(vec![0; 4]);
        disk.write_all_at(&[1], 0).unwrap();
        disk.sync().unwrap();
        disk.write_all_at(&[2], 1).unwrap();
        disk.write_all_at(&[3], 2).unwrap();
        let expected = [
            ([0, 0, 0, 0], 0),
            ([1, 0, 0, 0], 0),
            ([1, 0, 0, 0], 1),
            ([1, 2, 0, 0], 1),
            ([1, 0, 3, 0], 1),
            ([1, 2, 3, 0], 1),
        ];
        assert_eq!(all(&disk), expected.map(|(image, flushes)| (image.to_vec(), flushes)).into());
        assert_eq!(disk.to_vec(), [1, 2, 3, 0]);
        let mut without = HashSet::new();
        disk.images_without(0, |image, _| {
            without.insert(image.to_vec());
        });
        assert!(without.contains(&vec![0, 2, 3, 0]), "a flush that is left out orders nothing");
    }

    #[test]
    fn a_write_is_torn_at_sectors_only() {
        let disk = CrashDisk::new(vec![0; 16384]);
        disk.write_all_at(&[1; 10000], 100).unwrap();
        let edges: HashSet<(usize, usize)> = all(&disk)
            .iter()
            .map(|(image, _)| {
                let first = image.iter().position(|b| *b == 1).unwrap_or(0);
                (first, image.iter().rposition(|b| *b == 1).map_or(0, |last| last + 1))
            })
            .collect();
        let whole = (100, 10100);
        let torn: Vec<_> = edges.iter().filter(|e| **e != whole && **e != (0, 0)).collect();
        assert!(edges.contains(&whole) && edges.contains(&(0, 0)) && torn.len() >= 8, "{edges:?}");
        assert!(torn.iter().all(|(first, end)| first % 512 == 0 || end % 512 == 0), "{torn:?}");
        assert!(
            edges.contains(&(100, 512)) && edges.contains(&(100, 4096)) && edges.contains(&(8192, 10100))
        );
    }

    #[test]
    fn a_length_may_be_lost_and_many_writes_are_sampled() {
        let disk = CrashDisk::new(vec![7; 8]);
        disk.set_len(4).unwrap();
        assert_eq!(all(&disk), [(vec![7; 8], 0), (vec![7; 4], 0)].into());
        let disk = CrashDisk::new(vec![0; 20]);
        for at in 0..20 {
            disk.write_all_at(&[1], at).unwrap();
        }
        let mut lost_two = false;
        let visited = disk.images(|image, _| {
            lost_two |= image.iter().map(|b| usize::from(*b)).sum::<usize>() == 18;
        });
        assert_eq!((visited.cuts, visited.sampled, visited.most), (1, 1, 20));
        assert!(lost_two && visited.images > 9000, "{visited:?}");
    }
}
