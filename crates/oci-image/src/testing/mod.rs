//! Images for tests: tars, compressed in every way that layers come in, and the layouts and archives around them.
//!
//! ```text
//!   Tar ─► bytes ─pack(Packing)─► blob ─┐
//!   Store: blobs, entries ─manifest()───┴─► files() ─► directory(…) │ archive(…)
//!                                       └─► docker() ─► archive(…)
//! ```
//!
//! Called by the tests of this crate and, with the feature `testing`, by those of others. What goes wrong panics.
#![allow(clippy::missing_panics_doc, reason = "for tests only")]

mod tar;

pub use tar::Tar;

use crate::{Descriptor, Digest, Platform, media};
use layer_recode::{Compression, compress};
use serde_json::{Value, json};
use std::{collections::BTreeMap, fs, path::Path};

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Not at all.
    Plain,
    /// One member.
    Gzip,
    /// Several members, and zeros behind them.
    GzipMembers,
    /// A member for each part and an empty one with an extra field at the end, as eStargz has its footer.
    Estargz,
    /// One frame.
    Zstd,
    /// Frames with skippable ones between and behind them, as zstd:chunked has its index.
    ZstdChunked,
}

/// Every packing.
pub const PACKINGS: [Packing; 6] = [
    Packing::Plain,
    Packing::Gzip,
    Packing::GzipMembers,
    Packing::Estargz,
    Packing::Zstd,
    Packing::ZstdChunked,
];

impl Packing {
    /// The suffix of a media type.
    fn suffix(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Gzip | Self::GzipMembers | Self::Estargz => "+gzip",
            Self::Zstd | Self::ZstdChunked => "+zstd",
        }
    }
}

/// One member or frame.
fn packed(format: Compression, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    compress(&mut &bytes[..], format, format.level(), &mut out).expect("memory takes everything");
    out
}

/// Compresses a layer.
pub fn pack(plain: &[u8], packing: Packing) -> Vec<u8> {
    let parts: Vec<&[u8]> = plain.chunks(plain.len().div_ceil(3).max(1)).collect();
    let each = |format| parts.iter().map(move |part| packed(format, part));
    match packing {
        Packing::Plain => plain.to_vec(),
        Packing::Gzip => packed(Compression::Gzip, plain),
        Packing::GzipMembers => each(Compression::Gzip).chain([vec![0; 700]]).flatten().collect(),
        Packing::Estargz => {
            let mut footer = vec![0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0, b'S', b'G', 22, 0];
            footer.extend_from_slice(b"0000000000000000STARGZ");
            footer.extend_from_slice(&[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
            each(Compression::Gzip).chain([footer]).flatten().collect()
        }
        Packing::Zstd => packed(Compression::Zstd, plain),
        Packing::ZstdChunked => {
            let skippable = |content: &[u8]| {
                let len = (content.len() as u32).to_le_bytes();
                [&[0x50, 0x2a, 0x4d, 0x18][..], &len, content].concat()
            };
            each(Compression::Zstd)
                .flat_map(|frame| [frame, skippable(b"position")])
                .chain([skippable(b"a manifest of chunks"), skippable(b"footer")])
                .flatten()
                .collect()
        }
    }
}

/// A blob store with an index.
#[derive(Debug, Clone, Default)]
pub struct Store {
    /// The blobs.
    pub blobs: BTreeMap<Digest, Vec<u8>>,
    /// The entries of `index.json`.
    pub entries: Vec<Descriptor>,
    /// For `docker save`: configuration, names, and layers by digest.
    pub saved: Vec<(Digest, Vec<String>, Vec<Digest>)>,
}

impl Store {
    /// Adds a blob.
    pub fn add(&mut self, bytes: Vec<u8>) -> Digest {
        let digest = Digest::sha256(&bytes);
        self.blobs.insert(digest, bytes);
        digest
    }

    /// Adds a JSON document and gives its descriptor.
    pub fn document(&mut self, media_type: &str, value: &Value) -> Descriptor {
        let bytes = value.to_string().into_bytes();
        let size = bytes.len() as u64;
        Descriptor::new(media_type, self.add(bytes), size)
    }

    /// Adds an image of these layers and gives the descriptor of its manifest, which is in no index yet.
    pub fn manifest(&mut self, platform: &str, layers: &[(&[u8], Packing)]) -> Descriptor {
        let run =
            json!({ "Entrypoint": ["/init"], "Env": ["PATH=/bin"], "Labels": { "made": "for a test" } });
        self.manifest_with(platform, layers, &run)
    }

    /// As [`Store::manifest`], with the field `config` of the configuration.
    pub fn manifest_with(&mut self, platform: &str, layers: &[(&[u8], Packing)], run: &Value) -> Descriptor {
        let platform: Platform = platform.parse().expect("a platform");
        let mut digests = Vec::new();
        let mut diff_ids = Vec::new();
        let mut descriptors = Vec::new();
        for (plain, packing) in layers {
            let blob = pack(plain, *packing);
            let (size, digest) = (blob.len() as u64, self.add(blob));
            let media_type = format!("{}{}", media::OCI_LAYER, packing.suffix());
            descriptors.push(Descriptor::new(&media_type, digest, size));
            diff_ids.push(Digest::sha256(plain));
            digests.push(digest);
        }
        let mut config = json!({
            "created": "1970-01-01T00:00:00Z",
            "os": platform.os,
            "architecture": platform.architecture,
            "config": run,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": diff_ids.iter().map(|_| json!({ "created_by": "a test" })).collect::<Vec<_>>(),
        });
        if !platform.variant.is_empty() {
            config["variant"] = json!(platform.variant);
        }
        let config = self.document(media::OCI_CONFIG, &config);
        self.saved.push((config.digest, Vec::new(), digests));
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media::OCI_MANIFEST,
            "config": config,
            "layers": descriptors,
        });
        Descriptor { platform: Some(platform), ..self.document(media::OCI_MANIFEST, &manifest) }
    }

    /// Adds a nested index and gives its descriptor, which is in no index yet.
    pub fn index(&mut self, entries: &[Descriptor]) -> Descriptor {
        let value = json!({ "schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": entries });
        self.document(media::OCI_INDEX, &value)
    }

    /// Lists a descriptor under a name, or none.
    pub fn list(&mut self, mut entry: Descriptor, name: &str) {
        if !name.is_empty() {
            entry.annotations.insert(crate::REF_NAME.to_owned(), name.to_owned());
            if let Some(last) = self.saved.last_mut() {
                last.1.push(if name.contains(':') { name.to_owned() } else { format!("test:{name}") });
            }
        }
        self.entries.push(entry);
    }

    /// The files of a layout.
    pub fn files(&self) -> Vec<(String, Vec<u8>)> {
        let index = json!({ "schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": self.entries });
        let mut files: Vec<(String, Vec<u8>)> = self
            .blobs
            .iter()
            .map(|(digest, bytes)| (format!("blobs/sha256/{}", digest.hex()), bytes.clone()))
            .collect();
        files.push(("index.json".to_owned(), index.to_string().into_bytes()));
        files.push(("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
        files
    }

    /// The files of an archive of `docker save`, as Docker before 25 wrote it; `manifest.json` is the last.
    pub fn docker(&self) -> Vec<(String, Vec<u8>)> {
        let mut files = Vec::new();
        let mut list = Vec::new();
        for (config, names, layers) in &self.saved {
            files.push((format!("{}.json", config.hex()), self.blobs[config].clone()));
            let members: Vec<String> =
                layers.iter().map(|layer| format!("{}/layer.tar", &layer.hex()[..12])).collect();
            for (layer, member) in layers.iter().zip(&members) {
                files.push((member.clone(), self.blobs[layer].clone()));
            }
            list.push(json!({
                "Config": format!("{}.json", config.hex()),
                "RepoTags": names,
                "Layers": members,
            }));
        }
        files.push(("manifest.json".to_owned(), Value::Array(list).to_string().into_bytes()));
        files
    }
}

/// Writes files below a directory.
pub fn directory(at: &Path, files: &[(String, Vec<u8>)]) {
    for (name, bytes) in files {
        let path = at.join(name);
        fs::create_dir_all(path.parent().expect("a file below a directory")).expect("a directory");
        fs::write(path, bytes).expect("a file");
    }
}

/// A tar of files.
pub fn archive(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut tar = Tar::default();
    for (name, bytes) in files {
        tar.file(name, bytes);
    }
    tar.finish()
}
