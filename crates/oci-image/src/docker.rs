//! `manifest.json` of `docker save`: a list of images, whose configuration and layers are members of the archive.
//!
//! ```text
//!   [ { "Config": "<hex>.json" | "blobs/sha256/<hex>", "RepoTags": ["name:tag"], "Layers": ["<id>/layer.tar", …] } ]
//! ```
//!
//! Layers have no descriptors: their blobs are named by the diff ids of the configuration if they are plain, and digested
//! otherwise. (`image/spec/v1.2.md` and `image/tarexport` of moby.) Called by `source`.

use crate::{
    Blob, Blobs, Descriptor, Digest, Image, ImageConfig, ImageError, Layer, Limits, Listed,
    archive::Archive,
    digest::{Algorithm, Hasher},
    document::{json, nullable},
    media::{DOCKER_CONFIG, DOCKER_LAYER},
    name,
    resolve::Wanted,
    sum::PlainSum,
    text::{shown, shown_list},
};
use layer_recode::{Compression, SNIFF_BYTES, sniff};
use serde::Deserialize;
use std::{
    collections::{BTreeSet, HashMap},
    io::{self, Read},
    sync::Arc,
};

/// The member with the list of images.
pub(crate) const MANIFEST: &str = "manifest.json";
/// A member that only archives of Docker before 1.10 have without the list.
pub(crate) const REPOSITORIES: &str = "repositories";

/// An image of the list.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    config: String,
    #[serde(default, deserialize_with = "nullable")]
    repo_tags: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    layers: Vec<String>,
}

/// The blobs of a Docker archive: ranges of it, by digest.
#[derive(Debug)]
struct DockerBlobs {
    archive: Archive,
    places: HashMap<Digest, (u64, u64)>,
}

impl Blobs for DockerBlobs {
    fn open(&self, descriptor: &Descriptor) -> io::Result<Blob> {
        let place = *self.places.get(&descriptor.digest).ok_or(io::ErrorKind::NotFound)?;
        Ok(Blob { size: place.1, bytes: Box::new(self.archive.part(place)) })
    }

    fn keep(&self, digests: &[Digest]) {
        self.archive.keep(digests.iter().filter_map(|digest| self.places.get(digest).copied()));
    }
}

/// Finds an image in an archive.
pub(crate) fn find(archive: Archive, wanted: &Wanted<'_>, limits: &Limits) -> Result<Image, ImageError> {
    let Some(bytes) = archive.document(MANIFEST, limits.document_bytes)? else {
        let known = if archive.has(REPOSITORIES) {
            "; Docker before 1.10 saved it, so load and save it with a later one"
        } else {
            "; it is no archive of `docker save`"
        };
        return Err(ImageError::NotFound { what: MANIFEST.to_owned(), known: known.to_owned() });
    };
    let entries: Vec<Entry> = json(MANIFEST, &bytes)?;
    if entries.len() > limits.documents {
        let reason = format!("{} images, at most {} are accepted", entries.len(), limits.documents);
        return Err(ImageError::limit(MANIFEST, reason));
    }
    let mut images = Vec::with_capacity(entries.len());
    for entry in entries {
        if entry.layers.len() > limits.layers {
            let reason = format!("{} layers, at most {} are accepted", entry.layers.len(), limits.layers);
            return Err(ImageError::limit(MANIFEST, reason));
        }
        let (config, place) = config(&archive, &entry, limits)?;
        images.push((entry, config, place));
    }
    let listed = images
        .iter()
        .map(|(entry, config, _)| Listed {
            names: entry.repo_tags.clone(),
            digest: config.digest,
            platform: Some(config.platform.clone()),
        })
        .collect();
    let chosen = choose(&images, wanted)?;
    let (entry, config, place) = images.swap_remove(chosen);
    let mut places = HashMap::from([(config.digest, place)]);
    let layers = layers(&archive, &entry, &config, &mut places)?;
    Ok(Image {
        config_descriptor: Descriptor::new(DOCKER_CONFIG, config.digest, config.raw.len() as u64),
        config,
        manifest: None,
        sum: Arc::new(PlainSum::new(layers.iter().map(|layer| layer.descriptor.size), limits)),
        layers,
        names: entry.repo_tags,
        listed,
        blobs: Arc::new(DockerBlobs { archive, places }),
        limits: *limits,
    })
}

/// The configuration of an image, and where it is.
fn config(
    archive: &Archive,
    entry: &Entry,
    limits: &Limits,
) -> Result<(ImageConfig, (u64, u64)), ImageError> {
    let what = format!("the configuration {}", shown(&entry.config));
    let missing = || ImageError::NotFound { what: what.clone(), known: String::new() };
    let place = archive.find(&entry.config)?.ok_or_else(missing)?;
    let bytes = archive.document(&entry.config, limits.document_bytes)?.ok_or_else(missing)?;
    let config = ImageConfig::parse(&what, bytes)?;
    let last = entry.config.rsplit('/').next().unwrap_or_default();
    let named = Digest::from_hex(Algorithm::Sha256, last.strip_suffix(".json").unwrap_or(last));
    match named {
        Some(expected) if expected != config.digest => {
            Err(ImageError::mismatch(what, expected, config.digest))
        }
        _ => Ok((config, place)),
    }
}

/// The place of the image that is wanted.
fn choose(images: &[(Entry, ImageConfig, (u64, u64))], wanted: &Wanted<'_>) -> Result<usize, ImageError> {
    let fits = |entry: &Entry, config: &ImageConfig| match wanted.reference {
        None => true,
        Some(reference) => {
            reference.parse::<Digest>() == Ok(config.digest)
                || entry.repo_tags.iter().any(|tag| name::matches(tag, reference))
        }
    };
    let names =
        || shown_list(images.iter().flat_map(|(entry, ..)| entry.repo_tags.iter().map(String::as_str)));
    let named: Vec<usize> = (0..images.len()).filter(|n| fits(&images[*n].0, &images[*n].1)).collect();
    if named.is_empty() {
        let known = if images.is_empty() {
            "; the archive is empty".to_owned()
        } else {
            format!("; there are {}", names())
        };
        return Err(ImageError::NotFound { what: wanted.to_string(), known });
    }
    let digests: BTreeSet<Digest> = named.iter().map(|n| images[*n].1.digest).collect();
    if digests.len() == 1 && wanted.platform.is_none() {
        return Ok(named[0]);
    }
    let platform = wanted.platform_or_own();
    let ranked: Vec<(usize, usize)> =
        named.iter().filter_map(|n| Some((platform.rank(&images[*n].1.platform)?, *n))).collect();
    let Some((best, first)) = ranked.iter().min().copied() else {
        let known = named.iter().map(|n| images[*n].1.platform.to_string()).collect::<BTreeSet<_>>();
        let known = format!("; there is {}", known.into_iter().collect::<Vec<_>>().join(", "));
        return Err(ImageError::NotFound { what: format!("{wanted} for {platform}"), known });
    };
    let same = images[first].1.digest;
    if ranked.iter().any(|(rank, n)| *rank == best && images[*n].1.digest != same) {
        let known = format!("the archive has {}; name one of them behind the file", names());
        return Err(ImageError::Ambiguous { what: wanted.to_string(), known });
    }
    Ok(first)
}

/// The layers of an image; their places are added.
fn layers(
    archive: &Archive,
    entry: &Entry,
    config: &ImageConfig,
    places: &mut HashMap<Digest, (u64, u64)>,
) -> Result<Vec<Layer>, ImageError> {
    if entry.layers.len() != config.diff_ids.len() {
        let (layers, ids) = (entry.layers.len(), config.diff_ids.len());
        return Err(ImageError::corrupt(
            MANIFEST,
            format!("{layers} layers, but {ids} diff ids in the configuration"),
        ));
    }
    let mut layers = Vec::with_capacity(entry.layers.len());
    for (index, (member, diff_id)) in entry.layers.iter().zip(&config.diff_ids).enumerate() {
        let what = format!("layer {index} ({})", shown(member));
        let place = archive
            .find(member)?
            .ok_or_else(|| ImageError::NotFound { what: what.clone(), known: String::new() })?;
        let reading = |e| ImageError::reading(&what, e);
        let mut first = Vec::new();
        archive.part(place).take(SNIFF_BYTES as u64).read_to_end(&mut first).map_err(reading)?;
        let (media_type, digest) = match sniff(&first) {
            Compression::Plain => (DOCKER_LAYER.to_owned(), *diff_id),
            Compression::Gzip => {
                (format!("{DOCKER_LAYER}.gzip"), hash(archive.part(place)).map_err(reading)?)
            }
            Compression::Zstd => {
                (format!("{DOCKER_LAYER}.zstd"), hash(archive.part(place)).map_err(reading)?)
            }
        };
        places.insert(digest, place);
        layers.push(Layer { descriptor: Descriptor::new(&media_type, digest, place.1), diff_id: *diff_id });
    }
    Ok(layers)
}

/// The digest of a stream.
fn hash(mut bytes: impl Read) -> io::Result<Digest> {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    let mut buffer = vec![0; 256 << 10];
    loop {
        match bytes.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(n) => hasher.update(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}
