//! From an index to the image that is wanted.
//!
//! ```text
//!   index.json ─► entries ─ reference ─► those of this name ─► nested indexes ─► manifests ─ platform ─► the best
//!                    └ attestations, signatures, artifacts: left out                          manifest ─► config, layers
//! ```
//!
//! Every document is read by its digest, verified, and counted; indexes lie at most [`Limits::index_depth`] deep. If two
//! images fit equally well, that is an error and never a choice. Called by `source`.

use crate::{
    Blobs, Descriptor, Digest, Document, Image, ImageConfig, ImageError, Index, Layer, Limits, Listed,
    Manifest, MediaKind, Platform, RawManifest, blobs,
    media::OCI_MANIFEST,
    name,
    sum::PlainSum,
    text::{shown, shown_list},
};
use std::{
    collections::{BTreeSet, HashSet},
    fmt,
    sync::Arc,
};

/// Which image of a source.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted<'a> {
    /// Its name, tag or digest.
    pub(crate) reference: Option<&'a str>,
    /// What it must run on.
    pub(crate) platform: Option<&'a Platform>,
}

impl Wanted<'_> {
    /// What it must run on: Linux on this machine, if nothing else was said.
    pub(crate) fn platform_or_own(&self) -> Platform {
        self.platform.cloned().unwrap_or_else(Platform::linux)
    }
}

impl fmt::Display for Wanted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reference {
            Some(reference) => write!(f, "the image {}", shown(reference)),
            None => f.write_str("an image"),
        }
    }
}

/// A manifest that may be the one.
#[derive(Debug, Clone)]
struct Leaf {
    descriptor: Descriptor,
    names: Vec<String>,
}

/// The way through the indexes.
struct Walk<'a> {
    blobs: &'a dyn Blobs,
    limits: &'a Limits,
    /// Documents read.
    documents: usize,
    /// Indexes above the current one.
    path: Vec<Digest>,
    /// Indexes that were read.
    seen: HashSet<Digest>,
    leaves: Vec<Leaf>,
    /// Why entries were left out.
    left_out: Vec<String>,
}

/// Finds the image that is wanted in the index `what`.
pub(crate) fn find(
    what: &str,
    index: &[u8],
    blobs: Arc<dyn Blobs>,
    wanted: &Wanted<'_>,
    limits: &Limits,
) -> Result<Image, ImageError> {
    let Document::Index(index) = Document::parse(what, index, &crate::media::OCI_INDEX.into(), limits)?
    else {
        return Err(ImageError::corrupt(what, "it is not an index"));
    };
    let mut walk = Walk {
        blobs: &*blobs,
        limits,
        documents: 0,
        path: Vec::new(),
        seen: HashSet::new(),
        leaves: Vec::new(),
        left_out: Vec::new(),
    };
    let digest = wanted.reference.and_then(|text| text.parse::<Digest>().ok());
    for entry in named(&index, wanted, digest)? {
        walk.add(entry, &[])?;
    }
    if let Some(digest) = digest
        && walk.leaves.iter().any(|leaf| leaf.descriptor.digest == digest)
    {
        walk.leaves.retain(|leaf| leaf.descriptor.digest == digest);
    }
    let listed = walk
        .leaves
        .iter()
        .map(|leaf| Listed {
            names: leaf.names.clone(),
            digest: leaf.descriptor.digest,
            platform: leaf.descriptor.platform.clone(),
        })
        .collect();
    let leaf = walk.choose(wanted)?;
    let (manifest, raw) = walk.manifest(&leaf.descriptor)?;
    let config = walk.config(&manifest)?;
    if let Some(platform) = wanted.platform
        && leaf.descriptor.platform.is_none()
        && platform.rank(&config.platform).is_none()
    {
        let known = format!("; it is for {}", config.platform);
        return Err(ImageError::NotFound { what: format!("{wanted} for {platform}"), known });
    }
    let layers = layers(&manifest, &config)?;
    Ok(Image {
        config,
        config_descriptor: manifest.config,
        manifest: Some(raw),
        sum: Arc::new(PlainSum::new(layers.iter().map(|layer| layer.descriptor.size), limits)),
        layers,
        names: leaf.names,
        listed,
        blobs,
        limits: *limits,
    })
}

/// The entries of an index that a reference names; all, if there is none.
fn named<'a>(
    index: &'a Index,
    wanted: &Wanted<'_>,
    digest: Option<Digest>,
) -> Result<Vec<&'a Descriptor>, ImageError> {
    let all: Vec<&Descriptor> = index.manifests.iter().collect();
    let Some(reference) = wanted.reference else { return Ok(all) };
    if let Some(digest) = digest {
        let top: Vec<_> = all.iter().copied().filter(|entry| entry.digest == digest).collect();
        // A manifest of a nested index has no entry here.
        return Ok(if top.is_empty() { all } else { top });
    }
    let found: Vec<_> = all
        .iter()
        .copied()
        .filter(|entry| entry.names().any(|listed| name::matches(listed, reference)))
        .collect();
    if found.is_empty() {
        let names: BTreeSet<&str> = all.iter().flat_map(|entry| entry.names()).collect();
        let known = if names.is_empty() {
            "; no image of the index has a name".to_owned()
        } else {
            format!("; there are {}", shown_list(names))
        };
        return Err(ImageError::NotFound { what: wanted.to_string(), known });
    }
    Ok(found)
}

impl Walk<'_> {
    /// Reads a document of an index.
    fn read(&mut self, what: &str, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        self.documents += 1;
        if self.documents > self.limits.documents {
            let reason = format!("more than {} documents to read", self.limits.documents);
            return Err(ImageError::limit("the index", reason));
        }
        blobs::document(self.blobs, what, descriptor, self.limits.document_bytes)
    }

    /// Collects the manifests that an entry leads to.
    fn add(&mut self, entry: &Descriptor, inherited: &[String]) -> Result<(), ImageError> {
        if entry.is_attachment() {
            self.left_out.push(format!("{} is an attachment", entry.digest));
            return Ok(());
        }
        let mut names: Vec<String> = entry.names().map(str::to_owned).collect();
        names.dedup();
        if names.is_empty() {
            names = inherited.to_vec();
        }
        match entry.media_type.kind() {
            MediaKind::Manifest => self.leaf(entry, names),
            MediaKind::Index => return self.index(entry, &names),
            MediaKind::Schema1 => {
                self.left_out
                    .push(format!("{} is a manifest of schema 1, which is not supported", entry.digest));
            }
            // The document itself must tell.
            MediaKind::Other if entry.media_type.0.is_empty() => {
                let what = format!("the document {}", entry.digest);
                let bytes = self.read(&what, entry)?;
                match Document::parse(&what, &bytes, &entry.media_type, self.limits)? {
                    Document::Manifest(_) => self.leaf(entry, names),
                    Document::Index(_) => return self.index(entry, &names),
                }
            }
            _ => self.left_out.push(format!("{} has the type '{}'", entry.digest, entry.media_type)),
        }
        Ok(())
    }

    fn leaf(&mut self, entry: &Descriptor, names: Vec<String>) {
        match self.leaves.iter_mut().find(|leaf| leaf.descriptor.digest == entry.digest) {
            Some(known) => known.names.extend(names),
            None => self.leaves.push(Leaf { descriptor: entry.clone(), names }),
        }
    }

    fn index(&mut self, entry: &Descriptor, names: &[String]) -> Result<(), ImageError> {
        let what = format!("the index {}", entry.digest);
        if self.path.contains(&entry.digest) {
            return Err(ImageError::corrupt(what, "it contains itself"));
        }
        if self.path.len() >= self.limits.index_depth {
            let reason = format!("indexes lie deeper than {} in each other", self.limits.index_depth);
            return Err(ImageError::limit(what, reason));
        }
        if !self.seen.insert(entry.digest) {
            return Ok(());
        }
        let bytes = match self.read(&what, entry) {
            // A copy of some platforms may leave out the others' indexes.
            Err(ImageError::NotFound { .. }) => {
                self.left_out.push(format!("{what} is not there"));
                return Ok(());
            }
            other => other?,
        };
        let Document::Index(index) = Document::parse(&what, &bytes, &entry.media_type, self.limits)? else {
            return Err(ImageError::corrupt(what, "it is a manifest"));
        };
        self.path.push(entry.digest);
        for inner in &index.manifests {
            self.add(inner, names)?;
        }
        self.path.pop();
        Ok(())
    }

    /// The manifest that fits best.
    fn choose(&mut self, wanted: &Wanted<'_>) -> Result<Leaf, ImageError> {
        let mut leaves = self.leaves.clone();
        match leaves.len() {
            0 => {
                let known = match &self.left_out[..] {
                    [] => "; the index is empty".to_owned(),
                    reasons => {
                        format!("; {}", reasons.iter().take(5).cloned().collect::<Vec<_>>().join("; "))
                    }
                };
                return Err(ImageError::NotFound { what: wanted.to_string(), known });
            }
            1 if wanted.platform.is_none() || leaves[0].descriptor.platform.is_none() => {
                return Ok(leaves.swap_remove(0));
            }
            _ => {}
        }
        let platform = wanted.platform_or_own();
        let mut known = BTreeSet::new();
        let mut ranked = Vec::new();
        for leaf in leaves {
            let offered = match &leaf.descriptor.platform {
                Some(platform) => platform.clone(),
                None => match self.platform_of(&leaf.descriptor) {
                    // Another one may be the right one.
                    Err(ImageError::NotFound { .. } | ImageError::Unsupported { .. }) => continue,
                    other => other?,
                },
            };
            known.insert(offered.to_string());
            if let Some(rank) = platform.rank(&offered) {
                ranked.push((rank, leaf));
            }
        }
        let Some(best) = ranked.iter().map(|(rank, _)| *rank).min() else {
            let known = known.into_iter().collect::<Vec<_>>().join(", ");
            let what = format!("{wanted} for {platform}");
            return Err(ImageError::NotFound {
                what,
                known: format!("; there is {known}; choose with --platform"),
            });
        };
        ranked.retain(|(rank, _)| *rank == best);
        if ranked.len() > 1 {
            let names: Vec<String> = ranked
                .iter()
                .map(|(_, leaf)| {
                    leaf.names.first().cloned().unwrap_or_else(|| leaf.descriptor.digest.to_string())
                })
                .collect();
            let known = format!(
                "it may be any of {}; name one of them, or a digest",
                shown_list(names.iter().map(String::as_str))
            );
            return Err(ImageError::Ambiguous { what: wanted.to_string(), known });
        }
        Ok(ranked.swap_remove(0).1)
    }

    fn platform_of(&mut self, descriptor: &Descriptor) -> Result<Platform, ImageError> {
        let (manifest, _) = self.manifest(descriptor)?;
        Ok(self.config(&manifest)?.platform)
    }

    fn manifest(&mut self, descriptor: &Descriptor) -> Result<(Manifest, RawManifest), ImageError> {
        let what = format!("the manifest {}", descriptor.digest);
        let bytes = self.read(&what, descriptor)?;
        match Document::parse(&what, &bytes, &descriptor.media_type, self.limits)? {
            Document::Index(_) => Err(ImageError::corrupt(what, "it is an index")),
            Document::Manifest(manifest) => {
                let own =
                    if manifest.media_type.0.is_empty() { OCI_MANIFEST } else { &manifest.media_type.0 };
                let mut named = Descriptor::new(own, descriptor.digest, descriptor.size);
                named.platform.clone_from(&descriptor.platform);
                Ok((*manifest, RawManifest { descriptor: named, bytes }))
            }
        }
    }

    fn config(&mut self, manifest: &Manifest) -> Result<ImageConfig, ImageError> {
        let descriptor = &manifest.config;
        let what = format!("the configuration {}", descriptor.digest);
        if descriptor.media_type.kind() != MediaKind::Config {
            let kind = manifest.artifact_type.as_deref().unwrap_or(&descriptor.media_type.0);
            let reason = format!("it is an artifact of type {}, no image", shown(kind));
            return Err(ImageError::unsupported("the manifest", reason));
        }
        let bytes = self.read(&what, descriptor)?;
        ImageConfig::parse(&what, bytes)
    }
}

/// The layers of an image.
fn layers(manifest: &Manifest, config: &ImageConfig) -> Result<Vec<Layer>, ImageError> {
    if manifest.layers.len() != config.diff_ids.len() {
        let (layers, ids) = (manifest.layers.len(), config.diff_ids.len());
        let reason = format!("{layers} layers, but {ids} diff ids in the configuration");
        return Err(ImageError::corrupt("the manifest", reason));
    }
    let pairs = manifest.layers.iter().zip(&config.diff_ids).enumerate();
    pairs
        .map(|(index, (descriptor, diff_id))| {
            if matches!(descriptor.media_type.kind(), MediaKind::Layer { .. }) {
                return Ok(Layer { descriptor: descriptor.clone(), diff_id: *diff_id });
            }
            let what = format!("layer {index} ({})", descriptor.digest);
            let reason = format!("its media type is '{}', which is no tar", descriptor.media_type);
            Err(ImageError::unsupported(what, reason))
        })
        .collect()
}
