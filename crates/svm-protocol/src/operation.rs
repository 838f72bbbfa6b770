//! What a data channel carries: the operation that is asked for, the events on its way, and what it gives.

use layer_codec::{
    BlankRoot, Change, ChangeKind, IdMaps, LayerKind, LiveFile, RootHash, TarDigest,
    apply::{ApplyOptions, Profile},
};
use serde::{Deserialize, Serialize};

/// A disk of a VM, by the number under which it was attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DiskId(pub u32);

/// How a disk's bytes lie in its file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// One after the other.
    #[default]
    Raw,
    /// In the blocks of a VHDX, which is read only. A VM to which the host attaches the VHDX sees a raw disk.
    Vhdx,
}

/// A layer as an operation sees it: an attached disk and what is on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRef {
    /// The attached disk.
    pub disk: DiskId,
    /// What lies on it.
    pub kind: LayerKind,
    /// A sandbox that the agent's reader does not know may be mounted with the guest's kernel (`lcow.guestmount`).
    #[serde(default)]
    pub guest_mount: bool,
}

/// What a layer is compared with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ParentRef {
    /// Nothing: all of the target's merged view is new.
    None,
    /// `target[1..]`: what lies in `target[0]` is the diff.
    Own,
    /// Another chain, nearest first; merged views are compared by content.
    Chain(Vec<LayerRef>),
}

/// What one data channel is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Nothing; answers `null`.
    Ping,
    /// Tar in (Data frames, End); image and record out on disks. Answers [`ApplySummary`](crate::ApplySummary).
    Apply {
        /// Writable, empty.
        image: DiskId,
        /// Writable, empty: the exact-diff record.
        record: DiskId,
        /// Writable, empty, of no use afterwards: the leaves of a large hash tree go there.
        scratch: Option<DiskId>,
        /// The parents, nearest first, for hard links into them: lent one after the other by [`OperationEvent::Lower`].
        lowers: Vec<LayerKind>,
        /// Options.
        options: ApplyOptions,
    },
    /// Strict check of an image's metadata. Answers [`CheckSummary`].
    Check {
        /// The image.
        image: DiskId,
        /// The disk goes on behind the file system with a hash tree: every block is held against it.
        tree: bool,
        /// The version of the writer that made it (`ext4::check::CheckLimits::writer`).
        writer: u32,
        /// With userns-remap: an owner outside of these fails the check, too. Empty: all are fine.
        #[serde(default)]
        owners: IdMaps,
    },
    /// The very tar that was applied (Data frames). Answers [`ExportSummary`].
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
        /// What of them is copied while they stand still.
        #[serde(default)]
        copies: Option<CopyJob>,
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
    /// Sum of the regular-file bytes of a difference. Answers `u64`.
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
        /// A blank sandbox's root directory.
        blank: BlankRoot,
        /// Sandboxes among them may be in use: Events are sent.
        live: bool,
    },
}

/// What an export copies of live sandboxes before [`OperationEvent::MetadataRead`], and reads from there afterwards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyJob {
    /// Writable, empty, of no use afterwards.
    pub scratch: DiskId,
    /// Files that changed since (ctime), seconds since 1970 by the clock of the kernel that has them mounted;
    pub since: i64,
    /// and these, by which a former attempt failed.
    pub changed: Vec<LiveFile>,
    /// Most bytes in all. Smaller files come first.
    pub most_bytes: u64,
    /// Most milliseconds in all.
    pub most_millis: u64,
}

impl Operation {
    /// Its name in logs and metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ping => "ping",
            Self::Apply { .. } => "apply",
            Self::Check { .. } => "check",
            Self::ExportExact { .. } => "export-exact",
            Self::ExportCanonical { .. } => "export-canonical",
            Self::Changes { .. } => "changes",
            Self::DiffSize { .. } => "diff-size",
            Self::Written { .. } => "written",
        }
    }
}

/// Something the daemon must do before an operation goes on. Resume answers, with the [`DiskId`] of a lent layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationEvent {
    /// All metadata are in memory: the file system may be thawed.
    MetadataRead,
    /// Files are about to be looked at again: freeze once more.
    BeforeRecheck,
    /// An apply has read its tar and looks for a link's target in the next of its lowers, which is to be lent now.
    /// Few tars ever ask, and a machine takes long for each disk.
    Lower,
    /// An apply met something that needs larger blocks and begins anew on a second pair of disks, [`LargerDisks`] in the
    /// Resume. It may be asked while the tar is being sent, once; Data that are under way are kept for later.
    LargerBlocks,
    /// An apply reads what it wrote and will take no Data for a while. Nobody answers.
    Replaying {
        /// Bytes of the tar that it has read so far: more than it said before, and no more than were sent.
        bytes: u64,
    },
    /// An apply no longer needs its first pair of disks. Nobody answers.
    Replayed,
}

/// The second pair of disks of an apply: both writable and empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LargerDisks {
    /// For the image.
    pub image: DiskId,
    /// For the exact-diff record.
    pub record: DiskId,
}

/// What a check found (an image that fails it is an error of kind [`ErrorKind::Corrupt`](crate::ErrorKind::Corrupt)).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckSummary {
    /// Bytes of the file system.
    pub image_bytes: u64,
    /// Whose layout it has.
    pub profile: Profile,
    /// Inodes in use.
    pub inodes: u64,
    /// Blocks in use.
    pub blocks: u64,
    /// UUID of the file system.
    pub uuid: uuid::Uuid,
    /// Root hash of the tree that every block was held against, where that was asked for.
    pub verity: Option<RootHash>,
}

/// What an export gave.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportSummary {
    /// Bytes of tar sent.
    pub tar_bytes: u64,
    /// Their digest, where it is known: of an exact tar.
    pub tar_digest: Option<TarDigest>,
    /// Names that begin with `.wh.`, and what lies below them, that a canonical tar left out.
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
/// A reason, if the bytes are not what [`encode_change`] writes.
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
