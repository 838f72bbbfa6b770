//! Tar archives as streams that keep every byte: the dialects that container layers come in, parsed in place, and a writer
//! whose headers are reproducible.
//!
//! [`TarReader`] turns a stream into events. It reads ustar, GNU (long names, base-256 numbers, sparse files), PAX (`x` and
//! `g` headers, binary extended attributes, sparse files 0.0, 0.1 and 1.0), star and v7 archives. [`writer`] writes ustar
//! headers, with a PAX header in front where ustar cannot hold a value. Neither knows layers: whiteouts, unsafe paths and
//! the targets of hard links are up to the caller.
//!
//! ```text
//!  stream   │ hdr │ pax data+pad │ hdr │ file data ········ │pad│ hdr │ … │ 0 │ 0 │ trailing │
//!           └──┬──┴──────┬───────┴──┬──┴─────────┬──────────┴─┬─┴─ …
//!  events     Raw       Raw       Raw, Entry    Data …       Raw       …    Raw  …   End
//! ```
//!
//! # Guarantees of the reader
//!
//! * **Every byte is reported once, in order**, as [`Event::Raw`] or [`Event::Data`]: concatenated, they are the stream. A
//!   caller can store the parts separately and reproduce the archive exactly.
//! * Slices point into the read buffer ([`ChunkSource`]). Only names, extended attributes and sparse maps are copied.
//! * **Fields mean what they mean to Go's archive/tar**, which container engines and scanners of images use. Where the
//!   reader accepts something that Go reads differently, [`Entry::go_differs`] says so.
//! * Input is untrusted: no number in it is trusted with memory or arithmetic, and each error names the entry and the
//!   offset.
//!
//! # Limits
//!
//! Extended headers and GNU long names: 1 MiB each ([`MAX_PAX_BYTES`]). Extended attributes: 1024 per entry
//! ([`MAX_XATTRS`]). Sparse segments: 524,288 per file ([`MAX_SPARSE_SEGMENTS`]). Multi-volume archives and unknown types of
//! entries are refused. Compression is not handled: give the reader a decompressed stream.
//!
//! # Byte stability
//!
//! The headers written by [`writer::append`] are frozen per [`writer::Version`]: the same [`writer::Header`] and version
//! yield the same bytes, on every system and in every release. A change of the rules adds a version.

#![forbid(unsafe_code)]

mod chunk;
mod entry;
mod error;
mod header;
mod layout;
mod number;
mod pax;
mod reader;
mod sparse;
pub mod writer;

pub use chunk::{CHUNK_BYTES, ChunkSource, Chunks, fill};
pub use entry::{Entry, EntryKind, Time, Xattr};
pub use error::{EntryName, TarError};
pub use layout::BLOCK;
pub use pax::{MAX_PAX_BYTES, MAX_XATTRS};
pub use reader::{Event, TarReader};
pub use sparse::MAX_SPARSE_SEGMENTS;

#[cfg(test)]
mod tests;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
