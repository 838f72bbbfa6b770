//! The exact-diff record, part of store format 1: what of an applied tar the image does not hold, and where the image
//! holds the rest, so that the very bytes of the tar come back.
//!
//! ```text
//!   ┌────────────────────── header, 16 bytes ──────────────────────┐
//!   │ magic "LCOWDIFF"          │ version u32 = 1 │ flags u32 = 0   │
//!   ├────────────────────── frame, 20 bytes + payload ─────────────┤
//!   │ kind u32 "FRM1" │ ops u32 │ literals u32 │ packed u32 │ crc u32│
//!   │ payload: packed bytes = zstd( ops bytes ‖ literal bytes )     │
//!   ├──────────────────────  … more frames …  ─────────────────────┤
//!   ├────────────────────── trailer, 80 bytes ─────────────────────┤
//!   │ kind u32 "END1" │ digest u32 │ frames u64 │ tar bytes u64      │
//!   │ image bytes u64 │ record bytes u64 │ digest of the tar [32]    │
//!   │ crc u32 │ reserved u32 = 0                                     │
//!   └──────────────────────────────────────────────────────────────┘
//!
//!   an op is  varint( len << 1 | is_image ), and for an image op  varint( zigzag( offset − end of the previous image op ) )
//!   literal op: the next len literal bytes of this frame       image op: image[offset .. offset + len]
//! ```
//!
//! `digest` names the function: 1 is BLAKE3, which is written; 0 is SHA-256, which the first records have.
//! All numbers are little-endian; varints are LEB128 of at most 10 bytes. Each `crc` is CRC-32C over the bytes before
//! it in its part (and the payload), *seeded with the `crc` of the part before* (the header's own for the first), so
//! that lost, doubled or swapped frames are found as well as flipped bits.
//!
//! Invariants:
//! * Concatenating the ops gives exactly `tar bytes` bytes with that digest.
//! * A frame has at most `MAX_FRAME_OPS` (128 KiB) + `MAX_FRAME_LITERALS` (512 KiB) unpacked bytes: reader and writer need one such
//!   buffer whatever the layer's size. No op is empty; the literals of a frame are used up by its ops.
//! * `record bytes` is the size of the record: nothing follows the trailer.
//!
//! A record that was broken off (`RecordWriter::break_off`) has no trailer; `PartialTar` reads it by what its writer
//! remembers.
//!
//! `RecordWriter` is called by `apply`; [`replay`] and [`inspect`] by whoever has a layer and its record.

mod partial;
mod replay;
mod writer;

pub(crate) use partial::PartialTar;
pub use replay::{RecordInfo, ReplaySummary, inspect, replay, replay_for_digesting_reader};
pub(crate) use writer::{Broken, RecordWriter};

/// The most unpacked op bytes of a frame.
const MAX_FRAME_OPS: usize = 128 << 10;
/// The most literal bytes of a frame.
const MAX_FRAME_LITERALS: usize = 512 << 10;

const MAGIC: [u8; 8] = *b"LCOWDIFF";
const VERSION: u32 = 1;
const FRAME: u32 = u32::from_le_bytes(*b"FRM1");
const END: u32 = u32::from_le_bytes(*b"END1");
/// The digest functions by their numbers in the trailer.
const DIGESTS: [DigestKind; 2] = [DigestKind::Sha256, DigestKind::Blake3];

use super::digest::DigestKind;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    flags: U32,
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawFrame {
    kind: U32,
    ops: U32,
    literals: U32,
    packed: U32,
    crc: U32,
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawTrailer {
    kind: U32,
    digest_kind: U32,
    frames: U64,
    tar_bytes: U64,
    image_bytes: U64,
    record_bytes: U64,
    digest: [u8; 32],
    crc: U32,
    reserved: U32,
}

const HEADER_BYTES: usize = size_of::<RawHeader>();
const FRAME_BYTES: usize = size_of::<RawFrame>();
const TRAILER_BYTES: usize = size_of::<RawTrailer>();
const _: () = assert!(HEADER_BYTES == 16 && FRAME_BYTES == 20 && TRAILER_BYTES == 80);

impl RawHeader {
    fn crc(&self) -> u32 {
        crc32c::crc32c(self.as_bytes())
    }
}

impl RawFrame {
    fn crc_after(&self, previous: u32, payload: &[u8]) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c_append(previous, &self.as_bytes()[..FRAME_BYTES - 4]), payload)
    }
}

impl RawTrailer {
    fn crc_after(&self, previous: u32) -> u32 {
        crc32c::crc32c_append(previous, &self.as_bytes()[..TRAILER_BYTES - 8])
    }
}

/// Appends a LEB128 number.
fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Takes a LEB128 number off the front; `None` if it is cut or does not fit 64 bits.
fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&b, rest) = bytes.split_first()?;
        *bytes = rest;
        let bits = u64::from(b & 0x7f);
        if shift == 63 && bits > 1 {
            return None;
        }
        value |= bits << shift;
        if b & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -((value & 1).cast_signed())
}

#[cfg(test)]
mod tests;
