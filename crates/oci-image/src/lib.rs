//! Container images as files: OCI layouts, OCI archives and Docker archives, read layer by layer without unpacking anything.
//!
//! ```text
//!   Source::parse("oci-archive:app.tar:1.0") ─► open ─► Image ─┬─ config()      what a container runs
//!                                                 │            ├─ layers()      descriptors and diff ids
//!        Files: what may be opened ───────────────┘            └─ open_layer(i) plain tar bytes, verified at their end
//!
//!   document, config, media, platform, name, registry      parsing, no I/O
//!   resolve (index ─► manifest), docker (manifest.json), archive (members)
//!   files (opens), blobs (checks), layer (expands)
//! ```
//!
//! # Guarantees
//!
//! * An image is untrusted. Whatever it says of sizes, digests, counts and depths is checked or limited ([`Limits`]), in its
//!   documents, archives and compressed streams.
//! * No path of an image reaches the file system: blobs are found by their digests, members of archives are ranges of one
//!   file, and symbolic links inside a layout are not followed.
//! * A layer's plain bytes have an end only if size and digest of the blob and its diff id are right.
//! * What is ambiguous (two images that fit, a document that is an index and a manifest) is an error, never a choice.
//! * Only `files` opens anything; [`Files`] and [`Blobs`] can be implemented by a process that may not open files itself.
//!
//! # Limits
//!
//! gzip and zstd (zstd:chunked and eStargz included) and plain layers; OCI 1.0 and 1.1, Docker schema 2 and `docker save` since
//! Docker 1.10. Images of registries if [`Files::remote`] fetches them; this crate does not. Not: schema 1, encrypted layers,
//! other compressions. [`Limits`] has the numbers.
//!
//! # Stability
//!
//! Errors are non-exhaustive; their messages may change.

#![forbid(unsafe_code)]

mod archive;
mod blobs;
mod config;
mod digest;
mod docker;
mod document;
mod error;
mod files;
mod image;
mod layer;
mod limits;
pub mod media;
mod name;
mod platform;
mod registry;
mod resolve;
mod source;
mod spool;
mod sum;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod text;
pub mod tree;
pub mod write;

pub use blobs::{Blob, Blobs};
pub use config::{History, ImageConfig, RunConfig};
pub use digest::{Algorithm, Digest, DigestError, Hasher};
pub use document::{CONTAINERD_NAME, Descriptor, Document, Index, Manifest, REF_NAME, REFERENCE_TYPE};
pub use error::{ImageError, ImageErrorKind};
pub use files::{Direct, Files, LayoutFile, Place, RemotePart, Scratch};
pub use image::{Image, Listed, RawManifest};
pub use layer::{Layer, LayerReader, LayerSummary};
pub use layer_recode::Compression;
pub use limits::{Limits, RATIO_FLOOR};
pub use media::{MediaKind, MediaType};
pub use platform::Platform;
pub use registry::{RegistryName, RegistryReference};
pub use source::{Options, Source};
pub use text::shown;

#[cfg(test)]
mod tests;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
