//! Media types of layers.
//!
//! ```text
//!   application/vnd.oci.image.layer[.nondistributable].v1.tar[+gzip|+zstd]
//!   application/vnd.docker.image.rootfs.{diff,foreign.diff}.tar[.gzip|.zstd]
//! ```
//!
//! For Apply the type only says whether the blob is a layer: its first bytes decide how it is expanded, because blobs of
//! Docker's plain type may be compressed all the same. Types with other suffixes (`+encrypted`) need a processor that
//! another differ may have. Pure functions. Called by `differ`.

use crate::driver::snapshots::Compression;

/// Type of an uncompressed layer: what Apply reports.
pub(super) const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
const TAR_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const TAR_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// The beginnings of types of layers; an ending of [`ENDINGS`] follows.
const LAYERS: [&str; 4] = [
    TAR,
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
];
const ENDINGS: [&str; 5] = ["", "+gzip", "+zstd", ".gzip", ".zstd"];

/// Whether a blob of this type is a layer that Apply can take.
pub(super) fn is_layer(media_type: &str) -> bool {
    LAYERS.iter().any(|layer| media_type.strip_prefix(layer).is_some_and(|rest| ENDINGS.contains(&rest)))
}

/// The compression of a diff of this type, and the type that is reported; no type means gzip, as for containerd's own
/// differ (`plugins/diff/walking`). `None` for types that are not made here.
pub(super) fn packing(media_type: &str) -> Option<(Compression, &'static str)> {
    match media_type {
        "" | TAR_GZIP => Some((Compression::Gzip, TAR_GZIP)),
        TAR => Some((Compression::Plain, TAR)),
        TAR_ZSTD => Some((Compression::Zstd, TAR_ZSTD)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_known_by_their_types_and_nothing_else() {
        for media_type in [
            TAR,
            TAR_GZIP,
            TAR_ZSTD,
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            "application/vnd.docker.image.rootfs.diff.tar",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "application/vnd.docker.image.rootfs.diff.tar.zstd",
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        ] {
            assert!(is_layer(media_type), "{media_type}");
        }
        for media_type in [
            "",
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            "application/vnd.oci.image.layer.v1.tar+encrypted",
            "application/vnd.oci.image.config.v1+json",
            "application/vnd.erofs.layer.v1",
            "application/vnd.oci.image.layer.v1.targzip",
        ] {
            assert!(!is_layer(media_type), "{media_type}");
        }
        assert_eq!(packing("").unwrap(), (Compression::Gzip, TAR_GZIP));
        assert_eq!(packing(TAR).unwrap().0, Compression::Plain);
        assert_eq!(packing(TAR_ZSTD).unwrap().0, Compression::Zstd);
        assert_eq!(packing("application/vnd.docker.image.rootfs.diff.tar.gzip"), None);
    }
}
