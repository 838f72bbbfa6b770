//! The codec as a trait: everything that interprets layer bytes.
//!
//! ```text
//!   operation ──► Codec ──► real::RealCodec ──► layer_codec::{apply, record, export, changes}, ext4_image::check
//!                       └─► recode (gzip, zstd), space (larger file systems)
//! ```
//!
//! The trait exists so that channels, pool and jail can be tested with a double. Called by `operation`.
//!
//! Contract: each call is one operation, on a thread of its own that may block; several run at once and share nothing but
//! their disks, which are only read unless the operation names them as its output. A call ends soon after its input or
//! output reports an error (the daemon closed the channel); whatever it has written by then is discarded by the daemon. No
//! result refers to bytes that are still on their way: outputs are complete when a call returns.

pub use layer_codec::{Copies, apply::ToldDigest};

use super::{disk::OpDisk, recode, space};
use disk_io::StreamOut;
use std::{
    io::{Read, Write},
    ops::Range,
};
use svm_protocol::{
    ApplyOptions, ApplySummary, BlankRoot, Change, CheckSummary, Compression, ExpandLimits, ExportSummary,
    GrowSummary, IdMaps, LayerKind, RecodeSummary, WireError,
};

/// A layer to read.
#[derive(Clone)]
pub struct AttachedLayer {
    /// Its file system.
    pub disk: OpDisk,
    /// Where the layer is in it.
    pub kind: LayerKind,
    /// It may be mounted with the guest's kernel: [`LayerRef::guest_mount`](svm_protocol::LayerRef).
    pub guest_mount: bool,
}

/// A tar to apply.
pub struct TarInput<'a> {
    /// Its bytes.
    pub bytes: &'a mut dyn Read,
    /// Present if the daemon digests the tar: set at the end of the bytes.
    pub told: Option<ToldDigest>,
}

/// The layers below an applied one, nearest first. The daemon attaches their disks on demand.
pub trait Lowers {
    /// The number of layers.
    fn count(&self) -> usize;
    /// The next layer; called at most [`Lowers::count`] times, and only after the tar was read to its end.
    ///
    /// # Errors
    /// The daemon could not provide it, or closed the channel.
    fn next(&mut self) -> Result<AttachedLayer, WireError>;
}

/// The daemon's part in an apply that starts again with larger blocks.
pub trait Growing {
    /// A second pair of disks, for image and record; called at most once.
    ///
    /// # Errors
    /// The daemon could not provide it, or closed the channel.
    fn disks(&mut self) -> Result<(OpDisk, OpDisk), WireError>;
    /// The first pair is being read back, and the tar is not read: called often, with the number of bytes read so far.
    ///
    /// # Errors
    /// The daemon closed the channel.
    fn replaying(&mut self, bytes: u64) -> Result<(), WireError>;
    /// The first pair is no longer needed.
    ///
    /// # Errors
    /// The daemon closed the channel.
    fn replayed(&mut self) -> Result<(), WireError>;
}

/// What a layer is compared with.
#[derive(Clone)]
pub enum Parent {
    /// Nothing.
    None,
    /// The rest of its own chain.
    Own,
    /// Another chain, nearest first.
    Chain(Vec<AttachedLayer>),
}

/// Which canonical tar.
#[derive(Debug, Clone)]
pub struct CanonicalTar {
    /// Version of the format.
    pub format: u32,
    /// Host ids found in sandboxes are mapped back to these containers' ids.
    pub id_maps: IdMaps,
    /// The latest time of an entry, in seconds since 1970.
    pub source_date_epoch: Option<i64>,
}

/// The daemon's part in reading a live sandbox.
pub trait Live {
    /// What is to be copied before [`Live::metadata_read`].
    fn copies(&mut self) -> Option<Copies> {
        None
    }
    /// All metadata are in memory: the file system may be thawed.
    ///
    /// # Errors
    /// The daemon closed the channel.
    fn metadata_read(&mut self) -> Result<(), WireError>;
    /// Metadata are about to be read again: the file system must be frozen.
    ///
    /// # Errors
    /// The daemon closed the channel.
    fn before_recheck(&mut self) -> Result<(), WireError>;
}

/// Takes changes as they are found.
pub type ChangeSink<'a> = &'a mut dyn FnMut(&Change) -> Result<(), WireError>;

/// Everything that interprets layer bytes.
#[allow(
    clippy::missing_errors_doc,
    clippy::too_many_arguments,
    reason = "all fail alike: what the bytes, the disks or the caller did wrong; each argument is a stream or a disk"
)]
pub trait Codec: Send + Sync + 'static {
    /// tar → image and record. Must read `input` to its end. The result is on the disks that `growing` gave, if it was
    /// called.
    fn apply(
        &self,
        input: TarInput<'_>,
        image: OpDisk,
        record: OpDisk,
        scratch: Option<OpDisk>,
        lowers: &mut dyn Lowers,
        growing: &mut dyn Growing,
        options: &ApplyOptions,
    ) -> Result<ApplySummary, WireError>;

    /// Strict check of metadata, by the rules of that version of the writer; with `tree` also of all bytes against the hash
    /// tree; with `owners` also of all owners.
    fn check(
        &self,
        image: OpDisk,
        tree: bool,
        writer: u32,
        owners: &IdMaps,
    ) -> Result<CheckSummary, WireError>;

    /// Lets the file system on a disk grow to `bytes`, durably. `data` are the ranges of the disk that may not be zeros.
    fn grow(&self, disk: &OpDisk, bytes: u64, data: Vec<Range<u64>>) -> Result<GrowSummary, WireError> {
        space::grow(disk, bytes, data)
    }

    /// image and record → the applied tar. With `digested` the daemon compares it with the digest of the summary, so that
    /// bytes may be sent before they are verified here.
    fn export_exact(
        &self,
        image: OpDisk,
        record: OpDisk,
        digested: bool,
        out: &mut dyn StreamOut,
    ) -> Result<ExportSummary, WireError>;

    /// difference → canonical tar. `live` is given for a sandbox in use.
    fn export_canonical(
        &self,
        target: Vec<AttachedLayer>,
        parent: Parent,
        tar: &CanonicalTar,
        live: Option<&mut dyn Live>,
        out: &mut dyn StreamOut,
    ) -> Result<ExportSummary, WireError>;

    /// Paths that differ.
    fn changes(
        &self,
        target: Vec<AttachedLayer>,
        parent: Parent,
        live: Option<&mut dyn Live>,
        sink: ChangeSink<'_>,
    ) -> Result<(), WireError>;

    /// Whether anything was ever written into the nearest layer, a sandbox.
    fn written(
        &self,
        target: Vec<AttachedLayer>,
        blank: BlankRoot,
        live: Option<&mut dyn Live>,
    ) -> Result<bool, WireError>;

    /// Regular-file bytes of the difference.
    fn diff_size(
        &self,
        target: Vec<AttachedLayer>,
        parent: Parent,
        live: Option<&mut dyn Live>,
    ) -> Result<u64, WireError>;

    /// Compressed bytes → plain bytes: [`recode::expand`]. Must read `input` to its end.
    fn expand(
        &self,
        input: &mut dyn Read,
        format: Option<Compression>,
        limits: &ExpandLimits,
        out: &mut dyn Write,
    ) -> Result<RecodeSummary, WireError> {
        recode::expand(input, format, limits, out)
    }

    /// Plain bytes → compressed bytes: [`recode::compress`]. Must read `input` to its end.
    fn compress(
        &self,
        input: &mut dyn Read,
        format: Compression,
        level: u32,
        out: &mut dyn Write,
    ) -> Result<RecodeSummary, WireError> {
        recode::compress(input, format, level, out)
    }
}
