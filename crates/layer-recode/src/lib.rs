//! Expansion and compression of the streams that container layers come in: gzip, zstd, or bytes that pass unchanged.
//!
//! ```text
//!   Read ─► Source (one buffer, counts) ─► inflate │ zstd │ copy ─► Expander: Read, counts, limit      expand
//!   Read ─► Source ─► deflate │ zstd │ copy ─► Sink (one piece of memory) ─► Write                     compress
//! ```
//!
//! * One thread that reads, computes and writes in turns. It waits for its input or for its output, never for both.
//! * Memory is two buffers of [`PIECE_BYTES`], the decoder's window (32 KiB for gzip; for zstd what the limits allow) and the
//!   encoder's state; it does not depend on the length of a stream. A block of input causes a bounded amount of work
//!   between two writes.
//! * What is compressed is a function of the plain bytes, the format and the level alone: one implementation, blocks of
//!   fixed size whatever pieces they came in, no time, no name, and no code that depends on the processor's features
//!   (`zlib-rs` hashes the same way everywhere; zstd uses its single-threaded path).
//!
//! Formats as Go's `compress/gzip` and the `zstd` program read them: members of gzip and frames of zstd follow each other,
//! skippable frames are skipped. Garbage after a gzip member is an error; zeros up to the end are not, which `gzip` and
//! `unpigz` accept and Go does not: some registries hold blobs that were padded to a tape's block.
//!
//! It is a crate of its own because two programs' parts need it that must not depend on each other: the agent of a service
//! VM, which answers with errors of its protocol, and the readers of images, which know no protocol.
//!
//! # Limits
//!
//! [`ExpandLimits`] bounds the plain bytes and the zstd window ([`MAX_WINDOW_LOG`] by default). Frames that need a dictionary
//! and those of zstd before 0.8 are refused.
//!
//! # Byte stability
//!
//! The bytes that [`compress`] writes for a format and level are pinned by digests in the tests: a library that would
//! change them is not updated without a new major version.

#![forbid(unsafe_code)]

mod compress;
mod error;
mod expand;
mod format;
mod gzip;
mod sink;
mod source;
mod zst;

pub use compress::compress;
pub use error::RecodeError;
pub use expand::{Expander, expand};
pub use format::{
    Compression, ExpandLimits, GZIP_LEVEL, MAX_WINDOW_LOG, RecodeSummary, SNIFF_BYTES, ZSTD_LEVEL, sniff,
};

/// Bytes of the input's buffer, of what is compressed at a time, and of a piece of output. Part of the reproducible output.
pub const PIECE_BYTES: usize = 256 << 10;

#[cfg(test)]
mod tests;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
