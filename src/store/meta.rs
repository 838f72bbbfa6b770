//! `layer.json`: the state of a layer and the facts about its files.

use super::{LayerId, SnapshotMeta, SnapshotUsage};
use layer_codec::{IdRange, RootHash, TarDigest};
use serde::{Deserialize, Serialize, de::Error as _};

/// State of a layer. Every change is one atomic rename of `layer.json`.
///
/// ```text
///            Create ──► created ──ApplyDiff──► applying ──commit──► applied
///                          │                      │ cut, kill -9, error
///                          │ first Get            └──► stays applying: every ApplyDiff and Get is refused
///                          ▼                           until the layer is removed and created again
///   CreateReadWrite ──► sandbox
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerState {
    /// Only has a chain; ApplyDiff or the first Get decides what it becomes.
    Created,
    /// ApplyDiff has begun to read. After a broken connection the rest of its stream must never be accepted as a layer.
    Applying,
    /// Immutable: `layer.vhd` and `layer.exact`.
    Applied,
    /// Writable: `sandbox.vhd` or `sandbox.vhdx`.
    Sandbox,
}

/// Reads a digest; the first stores wrote it without its prefix, which was always `sha256:`.
fn tar_digest<'de, D: serde::Deserializer<'de>>(input: D) -> Result<TarDigest, D::Error> {
    let text = String::deserialize(input)?;
    let digest = if text.contains(':') { text.parse() } else { format!("sha256:{text}").parse() };
    digest.map_err(|e| D::Error::custom(format_args!("tar_digest '{}': {e}", text.escape_debug())))
}

/// Content of `layer.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerMeta {
    /// State.
    pub state: LayerState,
    /// Seconds since 1970 when the layer was created.
    pub created: u64,
    /// Size of the sandbox's file system in bytes: what it has, or what it will get at the first Get.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_bytes: Option<u64>,
    /// A size that the sandbox is to have from its next mount on, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grow_to: Option<u64>,
    /// `xino=on|off` of the layer's own merged view, if it was given at Create; otherwise the store's option applies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xino: Option<bool>,
    /// Facts about an applied layer's files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied: Option<AppliedMeta>,
    /// Version of the canonical tar of this written layer, fixed before the first byte of its first Diff against its
    /// own parent is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canonical_version: Option<u32>,
    /// Why the first ApplyDiff was refused or cut; repeated to every later one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// The sandbox was handed to a virtual machine, which may have written any bytes into it: the host never mounts it
    /// again, nor any layer above it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub handed_out: bool,
    /// What makes the layer a snapshot, in a store of snapshots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotMeta>,
}

impl LayerMeta {
    /// The metadata of a new layer.
    pub(super) fn new(state: LayerState, created: u64, wishes: LayerWishes) -> Self {
        Self {
            state,
            created,
            sandbox_bytes: wishes.sandbox_bytes,
            grow_to: None,
            xino: wishes.xino,
            applied: None,
            canonical_version: None,
            refused: None,
            handed_out: false,
            snapshot: None,
        }
    }
}

/// Options of a single layer, from Create.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerWishes {
    /// See [`LayerMeta::sandbox_bytes`].
    pub sandbox_bytes: Option<u64>,
    /// See [`LayerMeta::xino`].
    pub xino: Option<bool>,
}

/// Facts about `layer.vhd` and `layer.exact`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppliedMeta {
    /// Bytes of the ext4 file system: the mount's size limit.
    pub image_bytes: u64,
    /// Bytes of `layer.vhd`.
    pub file_bytes: u64,
    /// Bytes of `layer.exact`.
    pub record_bytes: u64,
    /// Sum of regular-file bytes and of the lengths of symlinks' targets, a hard-linked inode once: what `docker
    /// images` and `docker history` show. Layers of the first release have it without the symlinks.
    pub diff_size: u64,
    /// Bytes of the tar that was applied.
    pub tar_bytes: u64,
    /// Digest of that tar. The first stores have SHA-256 in a field `tar_sha256`, without a prefix.
    #[serde(alias = "tar_sha256", deserialize_with = "tar_digest")]
    pub tar_digest: TarDigest,
    /// UUID of the file system.
    pub uuid: uuid::Uuid,
    /// Entries of the tar.
    pub entries: u64,
    /// Root hash of the dm-verity tree behind the file system, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verity_root: Option<RootHash>,
    /// A second, fresh service VM has checked the image's metadata.
    pub checked: bool,
    /// Version of the image writer; absent for 1, that of release 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writer: Option<u32>,
    /// With userns-remap: the container ids ([`owners_note`]) within which all owners in the image were found to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owners: Option<String>,
    /// Facts that only snapshots have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<SharedMeta>,
}

/// Facts about an applied layer by which snapshots share one image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedMeta {
    /// SHA-256 of the tar, computed by the daemon over what it sent to the service VM: the layer's diffID.
    pub diff_id: TarDigest,
    /// The snapshot for which the image was made. Snapshots of one image name the same one, and the image is mounted
    /// under this name, so it has one loop device and one page cache.
    pub image: LayerId,
    /// The images of the layers below that it was made on, nearest first, if on others it could be another: the tar has
    /// directories that it does not describe, or hard links into lower layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depends_on: Option<Vec<LayerId>>,
    /// What the files take.
    pub usage: SnapshotUsage,
}

impl AppliedMeta {
    /// Version of the writer that made the image.
    pub fn writer(&self) -> u32 {
        self.writer.unwrap_or(1)
    }
}

/// The container ids of the maps in one line; `None` without maps.
pub fn owners_note(uids: &[IdRange], gids: &[IdRange]) -> Option<String> {
    let list = |maps: &[IdRange]| {
        let ranges: Vec<String> = maps.iter().map(|m| format!("{}+{}", m.container_id, m.size)).collect();
        ranges.join(",")
    };
    (!uids.is_empty() || !gids.is_empty()).then(|| format!("users {} groups {}", list(uids), list(gids)))
}
