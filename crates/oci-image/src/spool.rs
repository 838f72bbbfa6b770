//! The file of an archive, or what it was copied to: unnamed files that go one by one as they are no longer needed.
//!
//! ```text
//!   archive    │ layer 0 ········ │ layer 1 ··· │ layer 2 ···················· │
//!   segments   │ 64 MiB │ 64 MiB │ 64 MiB │ 64 MiB │ 64 MiB │ 64 MiB │ …
//!   keep(layer 1)              closed: ─┘  kept: ─┘   closed: the others, and their space is free
//! ```
//!
//! An unnamed file gives its space back when it is closed, on every system and from within a jail that may not punch holes.
//! Later segments are larger, so that a terabyte needs a few hundred descriptors. Made by `source`; called by `archive`.

use crate::{Files, ImageError};
use disk_io::ReadAt;
use std::{
    fs::File,
    io::{self, Write},
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

/// Bytes of the first segments; fewer in tests of this crate.
const SEGMENT: u64 = if cfg!(test) { 1 << 20 } else { 64 << 20 };
/// So many segments have the same size; the next ones have twice that.
const EQUAL: usize = 64;

/// The file of an archive.
#[derive(Debug)]
pub(crate) enum ArchiveFile {
    /// Its own.
    File(File),
    /// Copies of its parts.
    Spool(Spool),
}

impl ArchiveFile {
    /// From now on, only these bytes are read; the space of others is given back where that is possible.
    pub(crate) fn keep(&self, ranges: &[Range<u64>]) {
        if let Self::Spool(spool) = self {
            spool.keep(ranges);
        }
    }
}

impl ReadAt for ArchiveFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        match self {
            Self::File(file) => file.read_at(buf, offset),
            Self::Spool(spool) => spool.read_at(buf, offset),
        }
    }

    fn size(&self) -> io::Result<u64> {
        match self {
            Self::File(file) => file.size(),
            Self::Spool(spool) => Ok(spool.segments.last().map_or(0, |segment| segment.bytes.end)),
        }
    }
}

/// Unnamed files with the bytes of an archive, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Spool {
    segments: Vec<Segment>,
}

#[derive(Debug)]
struct Segment {
    /// Which bytes of the archive it has.
    bytes: Range<u64>,
    /// `None`: given up.
    file: Mutex<Option<Arc<File>>>,
}

impl Segment {
    fn file(&self) -> Option<Arc<File>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Spool {
    /// Appends bytes; segments after the first are made by `files`. `first` is taken for the first.
    pub(crate) fn append(
        &mut self,
        mut bytes: &[u8],
        files: &dyn Files,
        first: &mut Option<File>,
    ) -> Result<(), ImageError> {
        let failed = |source| ImageError::Write { what: "a scratch file".to_owned(), source };
        while !bytes.is_empty() {
            let count = self.segments.len();
            let full = self
                .segments
                .last()
                .is_none_or(|last| last.bytes.end - last.bytes.start >= segment_bytes(count - 1));
            if full {
                let file = match first.take() {
                    Some(file) => file,
                    None => files.scratch().map_err(|e| ImageError::reading("a scratch file", e))?.file,
                };
                let start = self.segments.last().map_or(0, |last| last.bytes.end);
                self.segments.push(Segment { bytes: start..start, file: Mutex::new(Some(Arc::new(file))) });
            }
            let (number, Some(last)) = (self.segments.len() - 1, self.segments.last_mut()) else { break };
            let room = segment_bytes(number) - (last.bytes.end - last.bytes.start);
            let n = usize::try_from(room).map_or(bytes.len(), |room| room.min(bytes.len()));
            let (head, rest) = bytes.split_at(n);
            if let Some(file) = last.file() {
                (&*file).write_all(head).map_err(failed)?;
            }
            last.bytes.end += n as u64;
            bytes = rest;
        }
        Ok(())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let at = self.segments.partition_point(|segment| segment.bytes.end <= offset);
        let Some(segment) = self.segments.get(at) else { return Ok(0) };
        let file = segment.file().ok_or_else(|| io::Error::other("this part of the archive was given up"))?;
        let rest = segment.bytes.end - offset;
        let n = usize::try_from(rest).map_or(buf.len(), |rest| rest.min(buf.len()));
        file.read_at(&mut buf[..n], offset - segment.bytes.start)
    }

    fn keep(&self, ranges: &[Range<u64>]) {
        for segment in &self.segments {
            let needed =
                |range: &Range<u64>| range.start < segment.bytes.end && segment.bytes.start < range.end;
            if !ranges.iter().any(needed) {
                *segment.file.lock().unwrap_or_else(PoisonError::into_inner) = None;
            }
        }
    }

    /// Segments that take space.
    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        self.segments.iter().filter(|segment| segment.file().is_some()).count()
    }
}

/// Bytes of a segment.
fn segment_bytes(number: usize) -> u64 {
    SEGMENT << (number / EQUAL).min(32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Direct, Place};

    #[test]
    fn segments_that_are_not_needed_go() {
        let files = Direct::new(Place::Stdin, None);
        let mut spool = Spool::default();
        let mut first = Some(files.scratch().unwrap().file);
        let block: Vec<u8> = (0..(1 << 16)).map(|n| (n >> 10) as u8).collect();
        let blocks = 3 * SEGMENT / block.len() as u64 + 5;
        for n in 0..blocks {
            let mut own = block.clone();
            own[0] = n as u8;
            spool.append(&own, &files, &mut first).unwrap();
        }
        let archive = ArchiveFile::Spool(spool);
        let held = |archive: &ArchiveFile| match archive {
            ArchiveFile::Spool(spool) => spool.held(),
            ArchiveFile::File(_) => 0,
        };
        assert_eq!((archive.size().unwrap(), held(&archive)), (blocks << 16, 4));
        // Across the border of two segments.
        let mut across = vec![0; 2 << 16];
        archive.read_exact_at(&mut across, SEGMENT - (1 << 16)).unwrap();
        assert_eq!((across[0], across[1 << 16], across[(1 << 16) + 4096]), (15, 16, 4));
        let second = SEGMENT + 5..SEGMENT + 6;
        archive.keep(&[second.clone(), 4 * SEGMENT..4 * SEGMENT + 1]);
        assert_eq!(held(&archive), 1);
        assert!(archive.read_exact_at(&mut across[..1], second.start).is_ok());
        assert!(archive.read_exact_at(&mut across[..1], 0).is_err());
        archive.keep(&[]);
        assert_eq!(held(&archive), 0);
        assert_eq!(segment_bytes(64), 2 * SEGMENT);
    }
}
