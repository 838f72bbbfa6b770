//! Layers as differences: tar stream ⇄ ext4 image.
//!
//! ```text
//!                 ┌──────────────── apply ────────────────┐
//!   tar stream ─► TarReader ─► tree, whiteouts ─► ImageWriter ─► hash tree, VHD footer      = layer.vhd
//!                 │                                       │ where the bytes went
//!                 └── all other bytes ─► RecordWriter ◄───┘                                 = exact record
//!
//!   layer.vhd + exact record ──► record::replay ──► the very tar stream
//!
//!            ┌─ view: layers as overlayfs shows them
//!   layers ──┤  walk: two trees side by side ──┬─► export ──► canonical tar
//!            └─────────────────────────────────┴─► changes, diff_size
//! ```
//!
//! Everything here works on [`ReadAt`](disk_io::ReadAt), [`WriteAt`](disk_io::WriteAt), `Read` and `Write`, and
//! treats every byte it reads as hostile: images and tars alike. Memory is bounded by the number of entries, never by
//! their data. Called by `svm-agent`, inside the jail, and by the `layer` commands.
//!
//! # Limits
//! [`limits`] has the table: names, paths, attributes and sparse ranges of a layer. [`apply::ApplyLimits`] lowers them.
//!
//! # Byte stability
//! Every version of the canonical tar ([`canonical`]) is frozen, and every version of the exact record ([`record`]) stays
//! readable: image and record give back the bytes of the tar. `CHANGELOG.md` has the promise for each version.

#![forbid(unsafe_code)]

pub mod apply;
pub mod canonical;
mod changes;
mod details;
mod digest;
mod error;
mod export;
mod fs;
mod hash;
mod ids;
pub mod limits;
mod live;
pub mod record;
mod root_hash;
mod stream;
#[cfg(test)]
mod tests;
mod upper;
mod view;
mod walk;

pub use apply::flat;
pub use changes::{BlankRoot, Change, ChangeKind, changes, diff_size, written};
pub use digest::{DigestKind, Hasher, NoDigest, TarDigest};
pub use error::DiffError;
pub use export::{ExportOptions, ExportSummary, LiveHooks, NoHooks, export};
pub use fs::{Foreign, ForeignFs, Mounter, VisitName};
pub use ids::{IdMaps, IdRange, OutsideId};
pub use live::{Copies, LiveFile};
pub use root_hash::{NoRootHash, RootHash};
pub use upper::{BadContainerId, ContainerId};
pub use view::{LayerKind, LayerSource};

/// A layer of a parent's stack.
#[derive(Debug)]
pub enum ParentLayer<R> {
    /// The target's layer of this index: shared, so equal subtrees are skipped unread.
    OfTarget(usize),
    /// A layer that the target does not have.
    Other(LayerSource<R>),
}

/// What a diff is relative to.
#[derive(Debug)]
pub enum ParentSpec<'a, R> {
    /// The target's own parent: what stands in `target[0]` is the diff.
    Own,
    /// Any other stack, nearest layer first.
    Layers(&'a [ParentLayer<R>]),
}

impl<R> Clone for ParentSpec<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R> Copy for ParentSpec<'_, R> {}

/// The error for what is sound but beyond the limits here.
fn unsupported(what: &'static str, reason: &str) -> DiffError {
    DiffError::Unsupported { what, reason: reason.to_owned() }
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
