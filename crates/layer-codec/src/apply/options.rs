//! What an apply is asked for, what it may use, and what it gives: the same types here, in messages and at the command line.
//!
//! ```text
//!   configuration ─► ApplyOptions ── message to a service VM (feature serde) ──► apply ─► ApplySummary ─► message back
//!                                    scratch disk, digest of the sender ──────► ApplyResources
//! ```
//!
//! A message leaves out what has its default, except for what every message has had from the first version on. Called by
//! whoever applies; `svm-protocol` has these types in its messages.

use crate::{IdMaps, RootHash, TarDigest, limits};
use disk_io::WriteAt;
use ext4_image::{check::Layout, hcsshim};
use std::{
    fmt,
    str::FromStr,
    sync::{Arc, OnceLock},
};
use uuid::Uuid;
use vhd_image::vhd;

/// The largest image without a VHD footer: 16 TiB.
pub const MAX_RAW_BYTES: u64 = 16 << 40;

/// What [`ApplyLimits::entries`] counts, as [`DiffError::Limit`](crate::DiffError::Limit) says it.
pub const NAMES: &str = "names in a layer";
/// What [`ApplyLimits::tar_bytes`] counts, as [`DiffError::Limit`](crate::DiffError::Limit) says it.
pub const TAR_BYTES: &str = "bytes of tar";

/// The layout of an image, and what the entries of a tar mean. Its text form is its name in lower case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum Profile {
    /// This project's own: clean for e2fsck, with checksums, small files inside their inodes.
    #[default]
    Default,
    /// What hcsshim's `tar2ext4` writes, byte for byte; what that tool refuses is refused.
    Hcsshim,
}

impl Profile {
    /// Its name in options, messages and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Hcsshim => "hcsshim",
        }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that names no [`Profile`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("unknown profile: expected default or hcsshim")]
pub struct UnknownProfile;

impl FromStr for Profile {
    type Err = UnknownProfile;

    fn from_str(text: &str) -> Result<Self, UnknownProfile> {
        [Self::Default, Self::Hcsshim].into_iter().find(|p| p.name() == text).ok_or(UnknownProfile)
    }
}

impl From<Layout> for Profile {
    fn from(layout: Layout) -> Self {
        match layout {
            Layout::Default => Self::Default,
            Layout::Hcsshim => Self::Hcsshim,
        }
    }
}

/// What hcsshim's `tar2ext4` has flags for. The default is what LCOW uses: 128 GiB, whiteouts converted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct HcsshimProfile {
    /// Maximum disk size in bytes: its room for descriptors is reserved in any image, so the root hash depends on it.
    pub max_disk_bytes: u64,
    /// Files of up to 136 bytes lie in their inodes (`-inline`).
    pub inline_data: bool,
    /// `.wh.` names become overlayfs' whiteouts (`-overlay`); else they are names like others.
    pub convert_whiteouts: bool,
    /// Backslashes in names and targets become slashes (`-convert-slash`).
    pub convert_backslashes: bool,
}

impl Default for HcsshimProfile {
    fn default() -> Self {
        Self {
            max_disk_bytes: hcsshim::LCOW_MAX_DISK,
            inline_data: false,
            convert_whiteouts: true,
            convert_backslashes: false,
        }
    }
}

/// The most that a tar may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default))]
pub struct ApplyLimits {
    /// The most names in the layer, implied directories and whiteouts included.
    pub entries: u64,
    /// The most bytes of an entry's name and of a link's target.
    pub path_bytes: usize,
    /// The most components of a path.
    pub depth: usize,
    /// The most bytes of one entry's xattrs, names and values together.
    pub xattr_bytes: usize,
    /// The most bytes of tar.
    pub tar_bytes: u64,
    /// The most bytes behind the end-of-archive blocks.
    pub trailing_bytes: u64,
}

impl Default for ApplyLimits {
    fn default() -> Self {
        Self {
            entries: limits::NAMES,
            path_bytes: limits::PATH_BYTES,
            depth: limits::DEPTH,
            xattr_bytes: limits::XATTR_BYTES,
            tar_bytes: 16 << 40,
            trailing_bytes: 1 << 30,
        }
    }
}

/// What a layer takes from the layers below it (default profile; profile [`Profile::Hcsshim`] takes nothing).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum LowerUse {
    /// The targets of hard links that the layer itself does not have. Directories that no entry describes are 0755, root,
    /// time 0.
    #[default]
    Links,
    /// Also the attributes of directories that no entry describes, as containerd's unpack does; 0755, root, time 0 where no
    /// layer below has the directory.
    LinksAndDirectories,
    /// The layers below are not known yet: a tar that has such a directory or such a link is refused with
    /// [`DiffError::NeedsLowers`](crate::DiffError::NeedsLowers), at its end, since every later entry may still describe
    /// the one or be the target of the other.
    Unknown,
}

/// How a tar becomes an image, and what is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ApplyOptions {
    /// The layout.
    pub profile: Profile,
    /// Block size of the default profile: 1024, 2048 or 4096 bytes. An entry that needs larger blocks is a reason to
    /// begin anew with 4096, if the caller has disks for that.
    pub block_size: u32,
    /// Whether a dm-verity tree follows the file system.
    pub verity: bool,
    /// The most bytes of the file system.
    pub max_image_bytes: u64,
    /// With userns-remap: an entry whose owner is outside of these is refused. Ids stay as the tar has them.
    pub id_maps: IdMaps,
    /// A VHD footer follows the image. Without one an image may be larger than a VHD.
    #[cfg_attr(feature = "serde", serde(default = "yes", skip_serializing_if = "is_default_switch"))]
    pub footer: bool,
    /// Default profile: small files and directories lie in their inodes.
    #[cfg_attr(feature = "serde", serde(default = "yes", skip_serializing_if = "is_default_switch"))]
    pub inline_data: bool,
    /// The flags of profile [`Profile::Hcsshim`].
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "is_default"))]
    pub hcsshim: HcsshimProfile,
    /// What else is refused.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "is_default"))]
    pub limits: ApplyLimits,
    /// What is taken from the layers below.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "is_default"))]
    pub lowers: LowerUse,
}

#[cfg(feature = "serde")]
fn yes() -> bool {
    true
}

#[cfg(feature = "serde")]
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_default_switch(switch: &bool) -> bool {
    *switch
}

#[cfg(feature = "serde")]
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Default for ApplyOptions {
    fn default() -> Self {
        Self {
            profile: Profile::Default,
            block_size: 1024,
            verity: false,
            max_image_bytes: vhd::MAX_DISK_BYTES,
            id_maps: IdMaps::default(),
            footer: true,
            inline_data: true,
            hcsshim: HcsshimProfile::default(),
            limits: ApplyLimits::default(),
            lowers: LowerUse::default(),
        }
    }
}

/// The digest of a tar that its sender computes: set once the stream has ended. The sender knows the bytes best, so a
/// wrong digest harms only the sender.
pub type ToldDigest = Arc<OnceLock<TarDigest>>;

/// What an apply may use besides its disks.
#[derive(Clone, Default)]
pub struct ApplyResources {
    /// An empty disk for the leaves of the hash tree of an image over 256 MiB; without it they stay in memory. Useless
    /// afterwards.
    pub scratch: Option<Arc<dyn WriteAt>>,
    /// Present if the sender of the tar digests it: then nothing is hashed here.
    pub told_digest: Option<ToldDigest>,
}

impl fmt::Debug for ApplyResources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApplyResources")
            .field("scratch", &self.scratch.is_some())
            .field("told_digest", &self.told_digest)
            .finish()
    }
}

/// The result of an apply.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ApplySummary {
    /// Bytes of the ext4 file system.
    pub image_bytes: u64,
    /// Bytes of the file: the file system, its hash tree if it has one, and the VHD footer.
    pub file_bytes: u64,
    /// Sum of the sizes of regular files and of the lengths of symlinks' targets, a hard-linked inode once, whiteouts 0:
    /// the layer's size as engines count.
    pub diff_size: u64,
    /// Bytes of the tar, all of it.
    pub tar_bytes: u64,
    /// Digest of these bytes.
    pub tar_digest: TarDigest,
    /// Bytes of the exact record.
    pub record_bytes: u64,
    /// UUID of the file system.
    pub uuid: Uuid,
    /// Entries of the tar, extended headers not counted.
    pub entries: u64,
    /// Root hash of the dm-verity tree, if the image has one.
    pub verity_root: Option<RootHash>,
    /// Directories that no entry describes, whether or not a layer below has them, unless the layer itself hides what lies
    /// below. The root directory does not count: without an entry it is 0755, root, time 0 on any parent. 0 with profile
    /// [`Profile::Hcsshim`].
    #[cfg_attr(feature = "serde", serde(default))]
    pub implied_directories: u64,
    /// Hard links whose targets were copied from layers below. 0 with profile [`Profile::Hcsshim`].
    #[cfg_attr(feature = "serde", serde(default))]
    pub lower_links: u64,
    /// What the layer would take as the upper directory of an overlay on an ext4 in blocks of 4 KiB: `st_blocks × 512` of
    /// each inode once, the root included, as containerd's overlayfs snapshotter counts; a directory of more names than
    /// one block holds is estimated. 0 with profile [`Profile::Hcsshim`], where it is not counted.
    #[cfg_attr(feature = "serde", serde(default))]
    pub usage_bytes: u64,
    /// Inodes of the layer, its root included; 0 with profile [`Profile::Hcsshim`], where they are not counted.
    #[cfg_attr(feature = "serde", serde(default))]
    pub usage_inodes: u64,
}

impl ApplySummary {
    /// Whether the image may depend on the layers below, that is, whether on other parents the same tar could become
    /// another image with [`LowerUse::LinksAndDirectories`].
    pub fn depends_on_lowers(&self) -> bool {
        self.implied_directories > 0 || self.lower_links > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_have_their_names_as_text() {
        for profile in [Profile::Default, Profile::Hcsshim] {
            assert_eq!(profile.to_string().parse(), Ok(profile));
        }
        assert_eq!("Default".parse::<Profile>(), Err(UnknownProfile));
    }

    #[cfg(feature = "serde")]
    #[test]
    fn messages_have_the_fields_of_the_first_version_and_what_differs_from_the_default() {
        let options = ApplyOptions::default();
        let value = serde_json::to_value(&options).unwrap();
        let names: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(names, ["block_size", "id_maps", "max_image_bytes", "profile", "verity"]);
        assert_eq!(serde_json::from_value::<ApplyOptions>(value).unwrap(), options);
        let limits = ApplyLimits { tar_bytes: 7, ..ApplyLimits::default() };
        let lowers = LowerUse::LinksAndDirectories;
        let options = ApplyOptions { footer: false, limits, profile: Profile::Hcsshim, lowers, ..options };
        let text = serde_json::to_string(&options).unwrap();
        assert!(text.contains(r#""profile":"hcsshim""#) && text.contains(r#""footer":false"#), "{text}");
        assert!(text.contains(r#""lowers":"links_and_directories""#), "{text}");
        assert_eq!(serde_json::from_str::<ApplyOptions>(&text).unwrap(), options);
    }
}
