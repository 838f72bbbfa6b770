//! Indexes and manifests: JSON documents that name blobs by digest.
//!
//! ```text
//!   bytes ─parse─► Document::Index    { manifests: [Descriptor, …] }            OCI index, Docker manifest list
//!              └─► Document::Manifest { config: Descriptor, layers: […] }       OCI manifest, Docker schema 2
//!   Descriptor { mediaType, digest, size, platform?, annotations?, urls? }
//! ```
//!
//! Parsing only, no I/O. A document that could be read as an index *and* as a manifest is refused, because two programs
//! could then take it for two different images (CVE-2021-41190). Unknown fields are ignored. Called by `resolve`.

use crate::{
    Digest, ImageError, Limits, MediaKind, MediaType, Platform,
    media::{DOCKER_INDEX, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST},
    text::shown,
};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeOwned, IgnoredAny, MapAccess, Visitor},
};
use std::{collections::BTreeMap, fmt};

/// Annotation with the tag or name of an image in an index.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Annotation with the full name of an image, which containerd writes.
pub const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// Annotation that marks what is no image but says something about one (BuildKit).
pub const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

/// JSON's `null` means the same as an absent field, as it does for Go.
pub(crate) fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Names a blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the blob is.
    #[serde(default, deserialize_with = "nullable")]
    pub media_type: MediaType,
    /// Digest of its bytes.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Where else it can be had, for foreign layers.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Notes.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// In an index: what the image runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Type of an artifact that is no image (OCI 1.1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
}

impl Descriptor {
    /// A descriptor with the three fields that every one has.
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.into(),
            digest,
            size,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
            platform: None,
            artifact_type: None,
        }
    }

    /// Whether it marks itself as something that belongs to an image and is none: an attestation, a signature.
    pub fn is_attachment(&self) -> bool {
        self.annotations.contains_key(REFERENCE_TYPE)
            || self.platform.as_ref().is_some_and(Platform::is_unknown)
            || self
                .artifact_type
                .as_deref()
                .is_some_and(|kind| !kind.is_empty() && MediaType::from(kind).kind() != MediaKind::Config)
    }

    /// The names under which an index lists it.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        [CONTAINERD_NAME, REF_NAME]
            .into_iter()
            .filter_map(|key| self.annotations.get(key))
            .map(String::as_str)
    }
}

/// A list of manifests and of other indexes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// 2.
    pub schema_version: u32,
    /// What it is; old layouts leave it out.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "is_empty")]
    pub media_type: MediaType,
    /// The entries.
    #[serde(default, deserialize_with = "nullable")]
    pub manifests: Vec<Descriptor>,
    /// Notes.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// One image for one platform.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// 2.
    pub schema_version: u32,
    /// What it is.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "is_empty")]
    pub media_type: MediaType,
    /// Type of an artifact that is no image (OCI 1.1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The configuration.
    pub config: Descriptor,
    /// The layers, the lowest first.
    #[serde(default, deserialize_with = "nullable")]
    pub layers: Vec<Descriptor>,
    /// Notes.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

fn is_empty(media_type: &MediaType) -> bool {
    media_type.0.is_empty()
}

/// An index or a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// An index.
    Index(Index),
    /// A manifest.
    Manifest(Box<Manifest>),
}

/// The fields that decide what a document is.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    schema_version: Option<u32>,
    media_type: Option<MediaType>,
    manifests: Option<IgnoredAny>,
    config: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
    fs_layers: Option<IgnoredAny>,
}

/// Fields whose names must be written as they are: Go takes `Layers` for `layers`, and other readers do not.
const FIELDS: [&str; 6] = ["schemaVersion", "mediaType", "manifests", "config", "layers", "fsLayers"];

/// The names of an object's fields.
struct Names(Vec<String>);

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Names;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Names, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = map.next_key()? {
                    names.push(name);
                    map.next_value::<IgnoredAny>()?;
                }
                Ok(Names(names))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// Refuses a document with a field that only some readers would take for one of ours.
fn refuse_other_cases(what: &str, bytes: &[u8]) -> Result<(), ImageError> {
    let fields: Names = json(what, bytes)?;
    let other = fields
        .0
        .iter()
        .find(|name| FIELDS.iter().any(|field| field.eq_ignore_ascii_case(name) && field != name));
    match other {
        None => Ok(()),
        Some(name) => Err(ImageError::corrupt(what, format!("ambiguous field {}", shown(name)))),
    }
}

/// Reads JSON.
pub(crate) fn json<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, ImageError> {
    serde_json::from_slice(bytes)
        .map_err(|e| ImageError::corrupt(what, format!("not the expected JSON: {e}")))
}

impl Document {
    /// Reads the document `what`. `expected` is the media type of its descriptor, or empty.
    ///
    /// # Errors
    /// [`ImageError::Corrupt`] for anything but one of the two kinds, or for the wrong one; [`ImageError::Unsupported`] for
    /// manifests of schema 1; [`ImageError::Limit`] for too many layers.
    pub fn parse(
        what: &str,
        bytes: &[u8],
        expected: &MediaType,
        limits: &Limits,
    ) -> Result<Self, ImageError> {
        refuse_other_cases(what, bytes)?;
        let shape: Shape = json(what, bytes)?;
        let corrupt = |reason: &str| Err(ImageError::corrupt(what, reason));
        let own = shape.media_type.unwrap_or_default();
        let schema1 = own.kind() == MediaKind::Schema1 || expected.kind() == MediaKind::Schema1;
        if schema1 || shape.schema_version == Some(1) && shape.fs_layers.is_some() {
            let reason = "it is a manifest of schema 1; convert the image, for example with `skopeo copy --format oci`";
            return Err(ImageError::unsupported(what, reason));
        }
        if shape.schema_version != Some(2) {
            return corrupt("its schemaVersion is not 2");
        }
        let index = shape.manifests.is_some();
        if index && (shape.config.is_some() || shape.layers.is_some()) {
            return corrupt("it is both an index and a manifest");
        }
        for (media_type, whose) in [(&own, "own"), (expected, "descriptor's")] {
            match media_type.kind() {
                MediaKind::Index if !index => {
                    return corrupt(&format!(
                        "its {whose} media type is an index, and it lists no manifests"
                    ));
                }
                MediaKind::Manifest if index => {
                    return corrupt(&format!("its {whose} media type is a manifest, and it is an index"));
                }
                _ => {}
            }
        }
        if index {
            let known = ["", OCI_INDEX, DOCKER_INDEX];
            if !known.contains(&own.0.as_str()) {
                return Err(ImageError::unsupported(what, format!("unknown type of index '{own}'")));
            }
            return Ok(Self::Index(json(what, bytes)?));
        }
        if shape.config.is_none() {
            return corrupt("it has neither manifests nor a config");
        }
        let known = ["", OCI_MANIFEST, DOCKER_MANIFEST];
        if !known.contains(&own.0.as_str()) {
            return Err(ImageError::unsupported(what, format!("unknown type of manifest '{own}'")));
        }
        let manifest: Box<Manifest> = json(what, bytes)?;
        if manifest.layers.len() > limits.layers {
            let reason = format!("{} layers, at most {} are accepted", manifest.layers.len(), limits.layers);
            return Err(ImageError::limit(what, reason));
        }
        Ok(Self::Manifest(manifest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ImageErrorKind;

    fn parse(text: &str, expected: &str) -> Result<Document, ImageError> {
        let limits = Limits { layers: 2, ..Limits::default() };
        Document::parse("document", text.as_bytes(), &expected.into(), &limits)
    }

    #[test]
    fn documents_are_one_thing_or_refused() {
        use ImageErrorKind::{Corrupt, Limit, Unsupported};
        let blob = r#"{"mediaType":"x","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":0}"#;
        let with = |text: &str| text.replace("BLOB", blob);
        for (text, expected, result) in [
            (r#"{"schemaVersion":2,"manifests":[BLOB]}"#, "", Ok("index")),
            (r#"{"schemaVersion":2,"manifests":[]}"#, OCI_INDEX, Ok("index")),
            (r#"{"schemaVersion":2,"manifests":[],"config":null,"annotations":null}"#, "", Ok("index")),
            (r#"{"schemaVersion":2,"config":BLOB,"layers":[BLOB]}"#, OCI_MANIFEST, Ok("manifest")),
            (r#"{"schemaVersion":2,"config":BLOB,"layers":null}"#, "", Ok("manifest")),
            (r#"{"schemaVersion":2,"config":BLOB,"layers":[BLOB,BLOB,BLOB]}"#, "", Err(Limit)),
            (r#"{"schemaVersion":2,"config":BLOB,"layers":[],"manifests":[]}"#, "", Err(Corrupt)),
            (r#"{"schemaVersion":2,"layers":[],"manifests":[]}"#, "", Err(Corrupt)),
            (r#"{"schemaVersion":2,"config":BLOB,"layers":[]}"#, OCI_INDEX, Err(Corrupt)),
            (r#"{"schemaVersion":2,"manifests":[]}"#, DOCKER_MANIFEST, Err(Corrupt)),
            (r#"{"schemaVersion":2,"mediaType":"application/x","manifests":[]}"#, "", Err(Unsupported)),
            (r#"{"schemaVersion":2,"mediaType":"application/x","config":BLOB}"#, "", Err(Unsupported)),
            (r#"{"schemaVersion":1,"fsLayers":[],"name":"x"}"#, "", Err(Unsupported)),
            (r#"{"schemaVersion":3,"manifests":[]}"#, "", Err(Corrupt)),
            (r#"{"schemaVersion":2}"#, "", Err(Corrupt)),
            (r#"{"schemaVersion":2,"manifests":[{"digest":"sha256:../x","size":1}]}"#, "", Err(Corrupt)),
            (r#"{"schemaVersion":2,"manifests":[{"size":1}]}"#, "", Err(Corrupt)),
            (r#"{"schemaVersion":2,"schemaVersion":2,"manifests":[]}"#, "", Err(Corrupt)),
            (r#"{"schemaVersion":2,"config":BLOB,"layers":[],"layers":[BLOB]}"#, "", Err(Corrupt)),
            (r#"{"schemaVersion":2,"manifests":[],"Layers":[]}"#, "", Err(Corrupt)),
            ("[]", "", Err(Corrupt)),
            ("", "", Err(Corrupt)),
        ] {
            let found = parse(&with(text), expected);
            let found = match &found {
                Ok(Document::Index(_)) => Ok("index"),
                Ok(Document::Manifest(_)) => Ok("manifest"),
                Err(e) => Err(e.kind()),
            };
            assert_eq!(found, result, "{text} as {expected:?}");
        }
        let deep = format!(r#"{{"schemaVersion":2,"x":{}"#, "[".repeat(100_000));
        assert_eq!(parse(&deep, "").unwrap_err().kind(), Corrupt);
    }

    #[test]
    fn attestations_are_no_images() {
        let digest = Digest::sha256(b"");
        let plain = Descriptor::new(OCI_MANIFEST, digest, 0);
        assert!(!plain.is_attachment());
        let mut marked = plain.clone();
        marked.annotations.insert(REFERENCE_TYPE.to_owned(), "attestation-manifest".to_owned());
        assert!(marked.is_attachment());
        let unknown = Descriptor { platform: Some(Platform::new("unknown", "unknown", "")), ..plain.clone() };
        assert!(unknown.is_attachment());
        let artifact =
            Descriptor { artifact_type: Some("application/spdx+json".to_owned()), ..plain.clone() };
        assert!(artifact.is_attachment());
        let image = Descriptor { artifact_type: Some(crate::media::OCI_CONFIG.to_owned()), ..plain };
        assert!(!image.is_attachment());
    }
}
