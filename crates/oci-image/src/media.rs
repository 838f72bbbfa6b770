//! Media types of what an image consists of: OCI's and Docker's.
//!
//! ```text
//!   index, manifest list ─► manifest ─► config
//!                                   └─► layers: tar, tar+gzip, tar+zstd, foreign or not
//! ```
//!
//! How a layer is compressed is decided by its first bytes, as containerd does, not by its media type. Called by
//! `document` and `resolve`.

use serde::{Deserialize, Serialize};
use std::fmt;

/// `application/vnd.oci.image.index.v1+json`.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// `application/vnd.oci.image.manifest.v1+json`.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// `application/vnd.oci.image.config.v1+json`.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// `application/vnd.oci.image.layer.v1.tar`, to which `+gzip` or `+zstd` is appended.
pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
/// Layers that registries must not be given, in OCI 1.0.
const OCI_FOREIGN: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar";
/// `application/vnd.docker.distribution.manifest.list.v2+json`.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// `application/vnd.docker.distribution.manifest.v2+json`.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// `application/vnd.docker.container.image.v1+json`.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// `application/vnd.docker.image.rootfs.diff.tar`, to which `.gzip` or `.zstd` is appended.
pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
/// Layers that registries must not be given.
const DOCKER_FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar";
/// Prefix of the first kind of manifests, whose layers have no diff ids.
const SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1+";

/// What a blob is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MediaKind {
    /// A list of manifests and indexes.
    Index,
    /// A manifest.
    Manifest,
    /// A manifest of schema 1.
    Schema1,
    /// The configuration of an image.
    Config,
    /// A layer.
    Layer {
        /// Its blob may only be had from its URLs.
        foreign: bool,
    },
    /// Anything else.
    Other,
}

/// A media type.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MediaType(pub String);

impl MediaType {
    /// What a blob of this type is.
    pub fn kind(&self) -> MediaKind {
        match self.0.as_str() {
            OCI_INDEX | DOCKER_INDEX => MediaKind::Index,
            OCI_MANIFEST | DOCKER_MANIFEST => MediaKind::Manifest,
            OCI_CONFIG | DOCKER_CONFIG => MediaKind::Config,
            text if text.starts_with(SCHEMA1) => MediaKind::Schema1,
            text => {
                let of = |base: &str| {
                    text.strip_prefix(base)
                        .is_some_and(|end| matches!(end, "" | "+gzip" | "+zstd" | ".gzip" | ".zstd"))
                };
                if of(OCI_LAYER) || of(DOCKER_LAYER) {
                    MediaKind::Layer { foreign: false }
                } else if of(OCI_FOREIGN) || of(DOCKER_FOREIGN) {
                    MediaKind::Layer { foreign: true }
                } else {
                    MediaKind::Other
                }
            }
        }
    }
}

impl From<&str> for MediaType {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Display for MediaType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.escape_debug().take(200).collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_told_apart() {
        use MediaKind::{Config, Index, Layer, Manifest, Other, Schema1};
        for (text, kind) in [
            (OCI_INDEX, Index),
            (DOCKER_INDEX, Index),
            (OCI_MANIFEST, Manifest),
            (DOCKER_MANIFEST, Manifest),
            (OCI_CONFIG, Config),
            (DOCKER_CONFIG, Config),
            ("application/vnd.docker.distribution.manifest.v1+prettyjws", Schema1),
            (OCI_LAYER, Layer { foreign: false }),
            ("application/vnd.oci.image.layer.v1.tar+zstd", Layer { foreign: false }),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", Layer { foreign: false }),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Layer { foreign: true }),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", Layer { foreign: true }),
            ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", Other),
            ("application/vnd.oci.empty.v1+json", Other),
            ("", Other),
        ] {
            assert_eq!(MediaType::from(text).kind(), kind, "{text}");
        }
    }
}
