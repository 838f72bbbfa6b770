//! Sparse files: the map from stored bytes to offsets in the file.
//!
//! ```text
//!   file    0 ── hole ── │ segment 0 │ ── hole ── │ segment 1 │ ── hole ── realsize
//!   stored               │ segment 0 │ segment 1 │
//! ```
//!
//! Invariant of a checked map: segments ascend, do not overlap, end inside the file, and their lengths add up to the stored
//! size. All four encodings of the map (old GNU header fields; PAX 0.0, 0.1, 1.0) are checked here.

use super::{layout::RawSparse, number};

/// Most segments of one file; each takes 16 bytes of memory while the file is read.
pub const MAX_SPARSE_SEGMENTS: usize = 1 << 19;

/// One run of stored bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// Why a map was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MapError {
    Corrupt(&'static str),
    TooMany,
}

/// Adds a segment.
pub(super) fn push(map: &mut Vec<Segment>, offset: u64, len: u64) -> Result<(), MapError> {
    if map.len() >= MAX_SPARSE_SEGMENTS {
        return Err(MapError::TooMany);
    }
    map.push(Segment { offset, len });
    Ok(())
}

/// Adds the used fields of a GNU header or extension block; the first empty one ends the list.
pub(super) fn push_gnu(map: &mut Vec<Segment>, fields: &[RawSparse]) -> Result<(), MapError> {
    for field in fields {
        if field.offset[0] == 0 {
            break;
        }
        let number = |f: &[u8]| {
            number::numeric(f)
                .and_then(|n| u64::try_from(n).ok())
                .ok_or(MapError::Corrupt("sparse map holds a bad number"))
        };
        push(map, number(&field.offset)?, number(&field.numbytes)?)?;
    }
    Ok(())
}

/// Checks `map` against the size of the file and the number of stored bytes.
pub(super) fn check(map: &[Segment], size: u64, stored: u64) -> Result<(), MapError> {
    let (mut end, mut sum) = (0u64, 0u64);
    for s in map {
        if s.offset < end {
            return Err(MapError::Corrupt("sparse segments overlap or descend"));
        }
        end = s.offset.checked_add(s.len).ok_or(MapError::Corrupt("sparse segment overflows"))?;
        sum += s.len;
    }
    if end > size {
        return Err(MapError::Corrupt("sparse segment ends past the file's size"));
    }
    // The sum cannot overflow: the ranges are disjoint and below 2^64.
    if sum != stored {
        return Err(MapError::Corrupt("sparse segments do not add up to the stored size"));
    }
    Ok(())
}

/// The map of PAX sparse format 1.0: decimal lines at the start of the entry's data, padded to a block.
#[derive(Debug, Default)]
pub(super) struct DataMap {
    line: Vec<u8>,
    /// Remaining segments, once the first line is known.
    left: Option<u64>,
    offset: Option<u64>,
}

impl DataMap {
    /// Digits of the largest 64-bit number.
    const MAX_LINE: usize = 20;

    /// Parses bytes of one block; returns whether the map is complete.
    pub(super) fn feed(&mut self, block: &[u8], map: &mut Vec<Segment>) -> Result<bool, MapError> {
        const BAD: MapError = MapError::Corrupt("sparse map holds a bad number");
        for &b in block {
            if b != b'\n' {
                if self.line.len() >= Self::MAX_LINE {
                    return Err(BAD);
                }
                self.line.push(b);
                continue;
            }
            let value = number::decimal(&self.line).ok_or(BAD)?;
            self.line.clear();
            match (self.left, self.offset.take()) {
                (None, _) if value > MAX_SPARSE_SEGMENTS as u64 => return Err(MapError::TooMany),
                (None, _) => self.left = Some(value),
                (Some(_), None) => self.offset = Some(value),
                (Some(n), Some(offset)) => {
                    push(map, offset, value)?;
                    self.left = Some(n - 1);
                }
            }
            if self.left == Some(0) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_checked() {
        let seg = |pairs: &[(u64, u64)]| {
            pairs.iter().map(|&(offset, len)| Segment { offset, len }).collect::<Vec<_>>()
        };
        type Case<'a> = (&'a [(u64, u64)], u64, u64, bool);
        let cases: &[Case<'_>] = &[
            (&[], 10, 0, true),
            (&[(0, 5), (5, 5)], 10, 10, true),
            (&[(0, 5), (10, 0)], 10, 5, true),
            (&[(0, 5), (4, 5)], 10, 10, false),
            (&[(6, 5)], 10, 5, false),
            (&[(0, 5)], 10, 4, false),
            (&[(u64::MAX, 5)], u64::MAX, 5, false),
            (&[(5, 1), (0, 1)], 10, 2, false),
        ];
        for (map, size, stored, good) in cases {
            assert_eq!(check(&seg(map), *size, *stored).is_ok(), *good, "{map:?}");
        }
    }

    #[test]
    fn data_maps_may_be_split_anywhere() {
        let text = b"2\n0\n512\n1048576\n100\n";
        for cut in 0..text.len() {
            let (mut map, mut parser) = (Vec::new(), DataMap::default());
            assert!(!parser.feed(&text[..cut], &mut map).unwrap());
            assert!(parser.feed(&text[cut..], &mut map).unwrap());
            assert_eq!(map, [Segment { offset: 0, len: 512 }, Segment { offset: 1 << 20, len: 100 }]);
        }
        for bad in [&b"x\n"[..], b"\n", b"999999999\n", b"1\n-1\n", b"111111111111111111111111"] {
            assert!(DataMap::default().feed(bad, &mut Vec::new()).is_err());
        }
    }
}
