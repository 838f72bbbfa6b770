//! `layer.json`: the state of a layer and the facts about its files.

use super::marker::IdRange;
use layer_codec::TarDigest;
use serde::{Deserialize, Serialize, de::Error as _};
use svm_protocol::RootHash;

/// State of a layer. Every change is one atomic rename of `layer.json`.
///
/// ```text
///            Create ──► created ──ApplyDiff──► applying ──commit──► applied
///                          │                      │ cut, kill -9, error
///                          │ first Get            └──► stays applying: every ApplyDiff and Get is refused
///                          ▼                           until the layer is removed and created anew
///   CreateReadWrite ──► sandbox
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerState {
    /// Has a chain and nothing else: ApplyDiff or the first Get decides what it becomes.
    Created,
    /// ApplyDiff has begun to read; what a broken connection left of its stream must never be taken for a layer.
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
    /// What was asked for when the layer was created: inode numbers of its own merged view (`xino=on|off`); `None` for
    /// what the store's option says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xino: Option<bool>,
    /// Facts about an applied layer's files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied: Option<AppliedMeta>,
    /// Version of the canonical tar that this written layer has for life, noted before the first byte of its first Diff
    /// against its own parent leaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub canonical_version: Option<u32>,
    /// Why the first ApplyDiff that was refused or cut was; said again to each that follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// The sandbox was handed to a virtual machine, which may have written any bytes into it: the host never mounts
    /// it again, nor anything that stands on it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub handed_out: bool,
}

impl LayerMeta {
    /// That of a layer created now.
    pub(super) fn new(state: LayerState, created: u64, wishes: LayerWishes) -> Self {
        Self {
            state,
            created,
            sandbox_bytes: wishes.sandbox_bytes,
            xino: wishes.xino,
            applied: None,
            canonical_version: None,
            refused: None,
            handed_out: false,
        }
    }
}

/// What a layer's creator asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerWishes {
    /// [`LayerMeta::sandbox_bytes`]
    pub sandbox_bytes: Option<u64>,
    /// [`LayerMeta::xino`]
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
    /// Sum of regular-file bytes and of the lengths of symlinks' targets, a hard-linked inode once: what `docker images`
    /// and `docker history` show. Layers of the first release have it without the symlinks.
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
    /// A second, fresh service VM found the image's metadata sound.
    pub checked: bool,
    /// Version of the rules by which the tar became this image; none is 1, that of release 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writer: Option<u32>,
    /// With userns-remap: the containers' ids ([`owners_note`]) that all owners in the image were found to be of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owners: Option<String>,
}

impl AppliedMeta {
    /// Version of the rules by which the image was made.
    pub fn writer(&self) -> u32 {
        self.writer.unwrap_or(1)
    }
}

/// The containers' ids of some maps in one line; nothing without maps.
pub fn owners_note(uids: &[IdRange], gids: &[IdRange]) -> Option<String> {
    let list = |maps: &[IdRange]| {
        let ranges: Vec<String> = maps.iter().map(|m| format!("{}+{}", m.container_id, m.size)).collect();
        ranges.join(",")
    };
    (!uids.is_empty() || !gids.is_empty()).then(|| format!("users {} groups {}", list(uids), list(gids)))
}
