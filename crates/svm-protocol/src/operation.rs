//! Messages on a data channel: the operation, its events and its summary.
//!
//! ```text
//!   daemon ─► Operation ─► agent ─► OperationEvent ◄► Resume … ─► summary, or WireError
//! ```
//!
//! Options and summary of an apply, id ranges and digests are the types of `layer-codec`. Called by `svm` of the daemon
//! and by the agent's `operation`.

use crate::{Compression, ExpandLimits};
use layer_codec::{
    BlankRoot, Change, ChangeKind, IdMaps, LayerKind, LiveFile, RootHash, TarDigest,
    apply::{ApplyOptions, Profile},
};
use serde::{Deserialize, Serialize};

/// A disk of a VM, by the number under which it was attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DiskId(pub u32);

/// Format of a disk's file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The bytes of the disk in their order.
    #[default]
    Raw,
    /// A VHDX, which is only read. A VM to which the host attaches the VHDX sees a raw disk.
    Vhdx,
}

/// A layer as an operation sees it: an attached disk and what is on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRef {
    /// The attached disk.
    pub disk: DiskId,
    /// Where the layer is on it.
    pub kind: LayerKind,
    /// A sandbox whose file system the agent's reader does not support may be mounted with the guest's kernel
    /// (`lcow.guestmount`).
    #[serde(default)]
    pub guest_mount: bool,
}

/// What a layer is compared with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ParentRef {
    /// Nothing: the whole merged view of the target is new.
    None,
    /// `target[1..]`: the contents of `target[0]` are the diff.
    Own,
    /// Another chain, nearest first; merged views are compared by content.
    Chain(Vec<LayerRef>),
}

/// What one data channel is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Does nothing; answers `null`.
    Ping,
    /// Tar in (Data frames, End); image and record out on disks. Answers [`ApplySummary`](crate::ApplySummary).
    Apply {
        /// Writable, empty.
        image: DiskId,
        /// Writable, empty: the exact-diff record.
        record: DiskId,
        /// Writable, empty: takes the leaves of a large hash tree; useless afterwards.
        scratch: Option<DiskId>,
        /// The parents, nearest first, for what [`ApplyOptions::lowers`] takes from them: attached one after the other
        /// by [`OperationEvent::Lower`].
        lowers: Vec<LayerKind>,
        /// Layout, block size, limits and owners.
        options: ApplyOptions,
    },
    /// Strict check of an image's metadata. Answers [`CheckSummary`].
    Check {
        /// The image.
        image: DiskId,
        /// A hash tree follows the file system on the disk: every block is checked against it.
        tree: bool,
        /// The version of the writer that made it (`ext4::check::CheckLimits::writer`).
        writer: u32,
        /// With userns-remap: an owner outside of these also fails the check. Empty: every owner is accepted.
        #[serde(default)]
        owners: IdMaps,
    },
    /// Makes the file system on a disk larger, durably; a journal in use is replayed first. Answers [`GrowSummary`].
    Grow {
        /// Writable, at least `bytes` long.
        disk: DiskId,
        /// The size that the file system is to have.
        bytes: u64,
        /// Byte ranges of the disk, ascending, that may not be zeros: start and end.
        data: Vec<(u64, u64)>,
    },
    /// The bytes of the tar that was applied (Data frames). Answers [`ExportSummary`].
    ExportExact {
        /// The image.
        image: DiskId,
        /// Its record.
        record: DiskId,
    },
    /// The canonical tar of a difference (Data frames). Answers [`ExportSummary`].
    ExportCanonical {
        /// The layer and its ancestors, nearest first.
        target: Vec<LayerRef>,
        /// What it is compared with.
        parent: ParentRef,
        /// Version of the canonical format.
        format: u32,
        /// Host ids found in sandboxes are mapped back to these containers' ids.
        id_maps: IdMaps,
        /// Sandboxes among the layers are mounted and in use: Events are sent.
        live: bool,
        /// What of them is copied while they are frozen.
        #[serde(default)]
        copies: Option<CopyJob>,
        /// The latest time of an entry, in seconds since 1970 ([`layer_codec::ExportOptions::source_date_epoch`]).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        source_date_epoch: Option<i64>,
    },
    /// Paths that differ (Data frames of [`encode_change`]). Answers `null`.
    Changes {
        /// The layer and its ancestors, nearest first.
        target: Vec<LayerRef>,
        /// What it is compared with.
        parent: ParentRef,
        /// Sandboxes among the layers are mounted and in use: Events are sent.
        live: bool,
    },
    /// Sum of the regular-file sizes of a difference, in bytes. Answers `u64`.
    DiffSize {
        /// The layer and its ancestors, nearest first.
        target: Vec<LayerRef>,
        /// What it is compared with.
        parent: ParentRef,
        /// Sandboxes among the layers are mounted and in use: Events are sent.
        live: bool,
    },
    /// Whether a sandbox differs from a blank one on the same ancestors. Answers `bool`.
    Written {
        /// The sandbox and its ancestors, nearest first.
        target: Vec<LayerRef>,
        /// The root directory of a blank sandbox.
        blank: BlankRoot,
        /// Sandboxes among them may be in use: Events are sent.
        live: bool,
    },
    /// Compressed bytes in (Data frames, End), plain bytes out (Data frames), both at once. Answers [`RecodeSummary`](crate::RecodeSummary).
    Expand {
        /// How the input is compressed; `None` to let its first bytes tell ([`sniff`](crate::sniff)).
        format: Option<Compression>,
        /// What it may take.
        limits: ExpandLimits,
    },
    /// Plain bytes in (Data frames, End), compressed bytes out (Data frames), both at once. Answers
    /// [`RecodeSummary`](crate::RecodeSummary).
    Compress {
        /// The format to write.
        format: Compression,
        /// Its level ([`Compression::level`]).
        level: u32,
    },
}

/// What an export copies of live sandboxes before [`OperationEvent::MetadataRead`], and reads from there afterwards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyJob {
    /// Writable, empty; useless afterwards.
    pub scratch: DiskId,
    /// Files whose ctime is at or after this are copied: seconds since 1970 by the clock of the kernel that has them mounted.
    pub since: i64,
    /// These are copied too: an earlier attempt failed because they changed.
    pub changed: Vec<LiveFile>,
    /// The most bytes in total. Smaller files are copied first.
    pub most_bytes: u64,
    /// The most milliseconds in total.
    pub most_millis: u64,
}

impl Operation {
    /// Its name in logs and metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ping => "ping",
            Self::Apply { .. } => "apply",
            Self::Check { .. } => "check",
            Self::Grow { .. } => "grow",
            Self::ExportExact { .. } => "export-exact",
            Self::ExportCanonical { .. } => "export-canonical",
            Self::Changes { .. } => "changes",
            Self::DiffSize { .. } => "diff-size",
            Self::Written { .. } => "written",
            Self::Expand { .. } => "expand",
            Self::Compress { .. } => "compress",
        }
    }
}

/// A request of the agent during an operation. Unless stated otherwise, the operation waits for a Resume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationEvent {
    /// All metadata are in memory: the file system may be thawed.
    MetadataRead,
    /// Files are about to be checked for changes: freeze the file system again.
    BeforeRecheck,
    /// An apply has read its tar and looks for a link's target, or for a directory that no entry describes, in its next
    /// lower layer: attach it and send its [`DiskId`] in the Resume. Few tars need this, and attaching a disk to a VM is
    /// slow.
    Lower,
    /// An apply has an entry that needs larger blocks and starts again on a second pair of disks, [`LargerDisks`] in the
    /// Resume. Sent at most once, possibly while the tar is being sent; Data frames that are in transit are kept.
    LargerBlocks,
    /// An apply reads back what it wrote and takes no Data for a while. There is no Resume.
    Replaying {
        /// Bytes of the tar that it has read back: more than in the previous event, and no more than were sent.
        bytes: u64,
    },
    /// An apply no longer needs its first pair of disks. There is no Resume.
    Replayed,
}

/// The second pair of disks of an apply: both writable and empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LargerDisks {
    /// Takes the image.
    pub image: DiskId,
    /// Takes the exact record.
    pub record: DiskId,
}

/// The result of a check (an image that fails it is an error of kind [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt)).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckSummary {
    /// Bytes of the file system.
    pub image_bytes: u64,
    /// Its layout.
    pub profile: Profile,
    /// Inodes in use.
    pub inodes: u64,
    /// Blocks in use.
    pub blocks: u64,
    /// UUID of the file system.
    pub uuid: uuid::Uuid,
    /// Root hash of the tree that every block was checked against, if that was requested.
    pub verity: Option<RootHash>,
}

/// The sizes of a file system that has grown, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrowSummary {
    /// Before.
    pub old_bytes: u64,
    /// Afterwards: at most what was asked for.
    pub new_bytes: u64,
}

/// The result of an export.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportSummary {
    /// Bytes of tar that were sent.
    pub tar_bytes: u64,
    /// Their digest, for an exact tar.
    pub tar_digest: Option<TarDigest>,
    /// Number of names that begin with `.wh.`, or are below such a name, which a canonical tar leaves out.
    #[serde(default)]
    pub hidden: u64,
    /// The first of them, printable.
    #[serde(default)]
    pub first_hidden: Option<String>,
}

/// Appends a change as `{kind u8, u32 LE length, path}`.
pub fn encode_change(out: &mut Vec<u8>, change: &Change) {
    out.push(change.kind as u8);
    out.extend_from_slice(&(change.path.len() as u32).to_le_bytes());
    out.extend_from_slice(&change.path);
}

/// Takes the next change off `bytes`; `None` at their end.
///
/// # Errors
/// A reason if [`encode_change`] does not write such bytes.
pub fn decode_change(bytes: &mut &[u8]) -> Result<Option<Change>, &'static str> {
    let Some((kind, rest)) = bytes.split_first() else { return Ok(None) };
    let kind = match kind {
        0 => ChangeKind::Modified,
        1 => ChangeKind::Added,
        2 => ChangeKind::Deleted,
        _ => return Err("unknown kind of change"),
    };
    let (len, rest) = rest.split_first_chunk::<4>().ok_or("change without length")?;
    let len = u32::from_le_bytes(*len) as usize;
    let (path, rest) = rest.split_at_checked(len).ok_or("change cut off")?;
    *bytes = rest;
    Ok(Some(Change { path: path.to_vec(), kind }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_round_trip_and_hostile_ones_are_refused() {
        let all = [
            Change { path: b"/a\xff".to_vec(), kind: ChangeKind::Added },
            Change { path: vec![], kind: ChangeKind::Deleted },
        ];
        let mut bytes = Vec::new();
        for change in &all {
            encode_change(&mut bytes, change);
        }
        let mut rest = bytes.as_slice();
        assert_eq!(decode_change(&mut rest).unwrap().as_ref(), Some(&all[0]));
        assert_eq!(decode_change(&mut rest).unwrap().as_ref(), Some(&all[1]));
        assert_eq!(decode_change(&mut rest).unwrap(), None);
        for bad in [&[7, 0, 0, 0, 0][..], &[0, 1], &[0, 0xff, 0xff, 0xff, 0xff, 1]] {
            assert!(decode_change(&mut &bad[..]).is_err());
        }
    }
}
