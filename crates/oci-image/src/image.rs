//! An image that was found: its configuration, its layers, and the blobs behind them.
//!
//! ```text
//!   Source ─open─► Image { config, layers: [{ descriptor, diff_id }], blobs } ─open_layer(i)─► plain tar bytes
//! ```
//!
//! Nothing of a layer has been read when an image exists, except that a Docker archive's compressed layers were digested,
//! because nothing else names them. Made by `source`; called by users of this crate.

use crate::{
    Blobs, Descriptor, Digest, ImageConfig, ImageError, Layer, LayerReader, Limits, MediaKind, Platform,
    sum::PlainSum,
};
use std::{ops::Range, sync::Arc};

/// A manifest with its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawManifest {
    /// Its digest, size and type.
    pub descriptor: Descriptor,
    /// The document as it is.
    pub bytes: Vec<u8>,
}

/// Another image beside the one that was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Names under which it is listed.
    pub names: Vec<String>,
    /// Digest of its manifest; of its configuration in a Docker archive.
    pub digest: Digest,
    /// What it runs on, if that is known without reading its configuration.
    pub platform: Option<Platform>,
}

/// An image.
#[derive(Debug, Clone)]
pub struct Image {
    pub(crate) config: ImageConfig,
    pub(crate) config_descriptor: Descriptor,
    pub(crate) manifest: Option<RawManifest>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) names: Vec<String>,
    pub(crate) listed: Vec<Listed>,
    pub(crate) blobs: Arc<dyn Blobs>,
    pub(crate) limits: Limits,
    /// Of all who read its layers.
    pub(crate) sum: Arc<PlainSum>,
}

impl Image {
    /// The configuration.
    pub fn config(&self) -> &ImageConfig {
        &self.config
    }

    /// The descriptor of the configuration.
    pub fn config_descriptor(&self) -> &Descriptor {
        &self.config_descriptor
    }

    /// The manifest; Docker archives have none.
    pub fn manifest(&self) -> Option<&RawManifest> {
        self.manifest.as_ref()
    }

    /// The layers, the lowest first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Names under which the source lists this image.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// All images of the source, the chosen one included.
    pub fn listed(&self) -> &[Listed] {
        &self.listed
    }

    /// The blobs, for copies of the image.
    pub fn blobs(&self) -> &Arc<dyn Blobs> {
        &self.blobs
    }

    /// The limits that hold for it.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// From now on, only these layers are opened, and no other blob: the copy of an archive that came through a pipe or was
    /// compressed gives the space of the rest back.
    pub fn keep_layers(&self, layers: Range<usize>) {
        let kept = self.layers.get(layers).unwrap_or_default();
        self.blobs.keep(&kept.iter().map(|layer| layer.descriptor.digest).collect::<Vec<_>>());
    }

    /// Opens layer `index`, counted from 0, the lowest. A layer can be opened several times, also at once. Reading fails where
    /// all layers together exceed a limit.
    ///
    /// # Errors
    /// [`ImageError::Usage`] if there is no such layer; [`ImageError::NotFound`] if its blob is missing;
    /// [`ImageError::Size`] if the blob has another size than its descriptor says; [`ImageError::Unsupported`] for types and
    /// compressions of layers that are not read.
    pub fn open_layer(&self, index: usize) -> Result<LayerReader, ImageError> {
        let Some(layer) = self.layers.get(index) else {
            let count = self.layers.len();
            return Err(ImageError::Usage(format!(
                "the image has {count} layers, and none of number {index}"
            )));
        };
        let what = layer_name(index, layer);
        let opened = LayerReader::open(&*self.blobs, &what, layer, &self.limits, (&self.sum, index));
        match opened {
            Err(ImageError::NotFound { .. }) if is_foreign(&layer.descriptor) => {
                let reason = "its blob is not part of the image and must be fetched from its publisher; this is a layer \
                              that may not be distributed";
                Err(ImageError::unsupported(what, reason))
            }
            other => other,
        }
    }
}

fn is_foreign(descriptor: &Descriptor) -> bool {
    descriptor.media_type.kind() == MediaKind::Layer { foreign: true } || !descriptor.urls.is_empty()
}

/// How messages name a layer.
pub(crate) fn layer_name(index: usize, layer: &Layer) -> String {
    format!("layer {index} ({})", layer.descriptor.digest)
}
