//! How much of an image is accepted.
//!
//! An image is untrusted: every number in it that costs memory, time or space has a limit here. Called by all readers.

use layer_recode::MAX_WINDOW_LOG;

/// Plain bytes of an image that are accepted whatever the ratio: below this, a ratio says nothing.
pub const RATIO_FLOOR: u64 = 64 << 20;

/// The limits of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Bytes of an index, a manifest or a configuration. Registries accept manifests of 4 MiB.
    pub document_bytes: u64,
    /// Documents that are read to find an image.
    pub documents: usize,
    /// Indexes that lie in each other.
    pub index_depth: usize,
    /// Layers of an image. Engines stop at 127, overlayfs at 500.
    pub layers: usize,
    /// Members of an archive.
    pub members: usize,
    /// Plain bytes of all layers together, and of an archive that is compressed as a whole.
    pub image_bytes: u64,
    /// Plain bytes for each compressed byte, of a layer and of all layers together, beyond [`RATIO_FLOOR`]. gzip cannot exceed
    /// 1032.
    pub ratio: u64,
    /// Base-2 logarithm of the largest window of zstd, in bytes.
    pub window_log: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            document_bytes: 8 << 20,
            documents: 1000,
            index_depth: 8,
            layers: 1000,
            members: 200_000,
            image_bytes: 1 << 40,
            ratio: 1100,
            window_log: MAX_WINDOW_LOG,
        }
    }
}

impl Limits {
    /// The most plain bytes of `size` compressed ones, by their ratio.
    pub(crate) fn expanded(&self, size: u64) -> u64 {
        size.saturating_mul(self.ratio).max(RATIO_FLOOR)
    }

    /// The most plain bytes of `size` compressed ones.
    pub(crate) fn plain_bytes(&self, size: u64) -> u64 {
        self.expanded(size).min(self.image_bytes)
    }
}
