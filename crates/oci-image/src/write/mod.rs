//! Writes images: into a layout, and as OCI and Docker archives.
//!
//! ```text
//!   base Image + append_layer(config) + a new layer ─► NewImage ─┬─► write_layout(DIR, REF)      blobs, then index.json
//!                                                                ├─► write_oci_archive(Write)    layout, index, blobs
//!                                                                └─► write_docker_archive(Write) config, layers, manifest.json
//! ```
//!
//! The bytes are a function of the image: keys and blobs are sorted, headers have no owner and the time that the caller gives.
//! Blobs are copied as they are, and verified. Called by users of this crate.

mod archives;
mod layout;

pub use archives::{write_docker_archive, write_oci_archive};
pub use layout::{DirectLayout, Fill, LayoutOut, write_layout};

use crate::{
    Blobs, Descriptor, Digest, Image, ImageConfig, ImageError, Layer, Manifest, MediaKind, MediaType,
    Platform, REF_NAME, Source, document::json, media, text::shown,
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, fmt, path::PathBuf, sync::Arc};

/// Where an image is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// A layout in a directory, which is made or extended.
    Layout {
        /// The directory.
        directory: PathBuf,
        /// The tag.
        reference: String,
    },
    /// An OCI archive.
    OciArchive {
        /// The file.
        file: PathBuf,
        /// The tag.
        reference: Option<String>,
    },
    /// An archive for `docker load`.
    DockerArchive {
        /// The file.
        file: PathBuf,
        /// The name, with a tag.
        reference: Option<String>,
    },
}

impl Destination {
    /// Reads `oci:DIR:REF`, `oci-archive:FILE[:REF]` or `docker-archive:FILE[:NAME]`.
    ///
    /// # Errors
    /// [`ImageError::Usage`] for any other form, without the text itself.
    pub fn parse(text: &str) -> Result<Self, ImageError> {
        let usage = |reason: &str| ImageError::Usage(reason.to_owned());
        if text.contains("@sha256:") || text.contains("@sha512:") {
            return Err(usage("an image is written under a tag, not under a digest"));
        }
        match Source::parse(text)? {
            Source::Layout { directory, reference: Some(reference) } => {
                Ok(Self::Layout { directory, reference })
            }
            Source::Layout { .. } => {
                Err(usage("expected oci:DIR:REF, with the tag under which the image is written"))
            }
            Source::OciArchive { file, reference } => Ok(Self::OciArchive { file, reference }),
            Source::DockerArchive { file, reference } => Ok(Self::DockerArchive { file, reference }),
            Source::Registry(_) => Err(usage(
                "nothing is pushed to registries; write oci:DIR:REF, and push it, for example with `skopeo copy`",
            )),
            Source::Stdin => {
                Err(usage("expected oci:DIR:REF, oci-archive:FILE[:REF] or docker-archive:FILE[:NAME]"))
            }
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, path) = match self {
            Self::Layout { directory, .. } => ("oci", directory),
            Self::OciArchive { file, .. } => ("oci-archive", file),
            Self::DockerArchive { file, .. } => ("docker-archive", file),
        };
        f.write_str(&shown(&format!("{kind}:{}", path.display())))
    }
}

/// A layer of a new image, and where its blob is.
#[derive(Debug, Clone)]
pub struct NewLayer {
    /// The layer.
    pub layer: Layer,
    /// Has its blob.
    pub blobs: Arc<dyn Blobs>,
}

impl NewLayer {
    /// The layers of an image, for a new image that contains them.
    pub fn all_of(image: &Image) -> Vec<Self> {
        let new = |layer: &Layer| Self { layer: layer.clone(), blobs: Arc::clone(image.blobs()) };
        image.layers().iter().map(new).collect()
    }
}

/// An image to write.
#[derive(Debug, Clone)]
pub struct NewImage {
    /// The configuration.
    pub config: Vec<u8>,
    /// The layers, the lowest first.
    pub layers: Vec<NewLayer>,
}

/// What a new layer's step of the history says.
#[derive(Debug, Clone, Default)]
pub struct Step {
    /// When, RFC 3339.
    pub created: String,
    /// By which command.
    pub created_by: String,
    /// A note.
    pub comment: String,
}

/// The configuration of an image with one more layer: `rootfs.diff_ids` and `history` gain an entry, `created` is that of the
/// step, and everything else is kept.
///
/// # Errors
/// [`ImageError::Corrupt`] for a configuration that is none.
pub fn append_layer(config: &[u8], diff_id: &Digest, step: &Step) -> Result<Vec<u8>, ImageError> {
    const WHAT: &str = "the configuration";
    let corrupt = |reason: &str| ImageError::corrupt(WHAT, reason);
    ImageConfig::parse(WHAT, config.to_vec())?;
    let mut value: Value = json(WHAT, config)?;
    let fields = value.as_object_mut().ok_or_else(|| corrupt("it is no object"))?;
    let ids =
        fields.get_mut("rootfs").and_then(Value::as_object_mut).ok_or_else(|| corrupt("it has no rootfs"))?;
    let ids = ids.entry("diff_ids").or_insert(Value::Null);
    if ids.is_null() {
        *ids = json!([]);
    }
    ids.as_array_mut().ok_or_else(|| corrupt("its diff_ids are no list"))?.push(json!(diff_id));
    let history = fields.entry("history").or_insert(Value::Null);
    if history.is_null() {
        *history = json!([]);
    }
    let mut entry =
        BTreeMap::from([("created", step.created.as_str()), ("created_by", step.created_by.as_str())]);
    if !step.comment.is_empty() {
        entry.insert("comment", &step.comment);
    }
    history.as_array_mut().ok_or_else(|| corrupt("its history is no list"))?.push(json!(entry));
    fields.insert("created".to_owned(), json!(step.created));
    serde_json::to_vec(&value).map_err(|e| corrupt(&e.to_string()))
}

/// A document and its descriptor.
struct Written {
    descriptor: Descriptor,
    bytes: Vec<u8>,
}

fn written(media_type: &str, bytes: Vec<u8>) -> Written {
    Written { descriptor: Descriptor::new(media_type, Digest::sha256(&bytes), bytes.len() as u64), bytes }
}

/// The OCI media type of a layer.
fn layer_type(media_type: &MediaType) -> String {
    let text = media_type.0.as_str();
    let suffix = match () {
        () if text.ends_with("gzip") => "+gzip",
        () if text.ends_with("zstd") => "+zstd",
        () => "",
    };
    match media_type.kind() {
        MediaKind::Layer { foreign: false } => format!("{}{suffix}", media::OCI_LAYER),
        _ => text.to_owned(),
    }
}

impl NewImage {
    /// Checks that configuration and layers belong together; gives what the image runs on.
    fn platform(&self) -> Result<Platform, ImageError> {
        let config = ImageConfig::parse("the new configuration", self.config.clone())?;
        if !config.diff_ids.iter().eq(self.layers.iter().map(|new| &new.layer.diff_id)) {
            let reason = "its diff ids are not those of the layers";
            return Err(ImageError::corrupt("the new configuration", reason));
        }
        Ok(config.platform)
    }

    /// The documents of an OCI image: configuration, manifest with its entry for an index.
    fn documents(&self, reference: Option<&str>) -> Result<(Written, Written), ImageError> {
        let platform = self.platform()?;
        let config = written(media::OCI_CONFIG, self.config.clone());
        let layers = self.layers.iter().map(|new| Descriptor {
            media_type: layer_type(&new.layer.descriptor.media_type).as_str().into(),
            ..new.layer.descriptor.clone()
        });
        let manifest = Manifest {
            schema_version: 2,
            media_type: media::OCI_MANIFEST.into(),
            artifact_type: None,
            config: config.descriptor.clone(),
            layers: layers.collect(),
            annotations: BTreeMap::new(),
        };
        let mut manifest = written(media::OCI_MANIFEST, to_json(&manifest)?);
        manifest.descriptor.platform = Some(platform);
        if let Some(reference) = reference {
            manifest.descriptor.annotations.insert(REF_NAME.to_owned(), reference.to_owned());
        }
        Ok((config, manifest))
    }

    /// The layers whose blobs must be written, each once, sorted by digest.
    fn blobs(&self) -> BTreeMap<Digest, (usize, &NewLayer)> {
        self.layers.iter().enumerate().map(|(n, new)| (new.layer.descriptor.digest, (n, new))).collect()
    }
}

fn to_json(value: &impl serde::Serialize) -> Result<Vec<u8>, ImageError> {
    serde_json::to_vec(value).map_err(|e| ImageError::corrupt("the new image", e.to_string()))
}

#[cfg(test)]
mod tests;
