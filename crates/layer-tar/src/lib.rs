//! Tar archives: every dialect that layer tars come in, read as a stream and parsed in place.
//!
//! [`TarReader`] turns a stream of bytes into events. It knows ustar, GNU (long names, base-256 numbers, sparse
//! files), PAX (`x` and `g` headers, binary xattrs, sparse files 0.0, 0.1 and 1.0), star and v7. It knows nothing of
//! layers: whiteouts, path safety and hard links are the business of `diff`.
//!
//! ```text
//!  stream   │ hdr │ pax data+pad │ hdr │ file data ········ │pad│ hdr │ … │ 0 │ 0 │ trailing │
//!           └──┬──┴──────┬───────┴──┬──┴─────────┬──────────┴─┬─┴─ …
//!  events     Raw       Raw       Raw, Entry    Data …       Raw       …    Raw  …   End
//! ```
//!
//! Invariants:
//! * **Every byte is reported once, in order**, as [`Event::Raw`] or [`Event::Data`]: their concatenation is the stream.
//! * Slices point into the read buffer (see [`ChunkSource`]); nothing is copied but names, xattrs and sparse maps, and
//!   all of these are bounded by constants of this module.
//! * The bytes are hostile: no size in them is trusted with memory or arithmetic, and each error names the entry and
//!   the offset.
//!
//! Called by `diff::apply`.

mod chunk;
mod entry;
mod error;
mod header;
pub mod layout;
mod number;
mod pax;
mod reader;
mod sparse;
pub mod writer;

pub use chunk::fill;
pub use chunk::{CHUNK_BYTES, ChunkSource, Chunks};
pub use entry::{Entry, EntryKind, Time, Xattr};
pub use error::{EntryName, TarError};
pub use pax::{MAX_PAX_BYTES, MAX_XATTRS};
pub use reader::{Event, TarReader};
pub use sparse::MAX_SPARSE_SEGMENTS;

#[cfg(test)]
mod tests;
