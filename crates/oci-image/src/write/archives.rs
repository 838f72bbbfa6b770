//! Archives: tars with the documents in front, or behind as `docker save` has them.
//!
//! ```text
//!   OCI     blobs/ blobs/sha256/ │ <blobs, sorted by digest> │ index.json │ oci-layout
//!   Docker  <config>.json │ <digest>.tar …, sorted │ manifest.json
//! ```

use super::{NewImage, NewLayer, Written, to_json};
use crate::{Digest, ImageError, Index, LayoutFile, blobs, image::layer_name, media::OCI_INDEX};
use layer_tar::writer::{Header, Kind, Version, append, padding};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read, Write},
};

/// Zeros at the end of a tar.
const END: [u8; 1024] = [0; 1024];
/// Bytes that are copied at a time.
const COPY_BYTES: usize = 256 << 10;
/// `oci-layout`.
pub(super) const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// A tar of files without owner.
struct Tar<'a> {
    out: &'a mut dyn Write,
    /// Time of all members, in seconds since 1970.
    mtime: i64,
}

fn writing(source: io::Error) -> ImageError {
    ImageError::Write { what: "the archive".to_owned(), source }
}

impl Tar<'_> {
    fn header(&mut self, kind: Kind, name: &str, size: u64) -> Result<(), ImageError> {
        let mut bytes = Vec::new();
        let header = Header {
            kind,
            path: name.as_bytes(),
            link: b"",
            mode: if kind == Kind::Directory { 0o755 } else { 0o644 },
            uid: 0,
            gid: 0,
            mtime: (self.mtime, 0),
            device: (0, 0),
            size,
            xattrs: &[],
            sparse: None,
        };
        append(&mut bytes, &header, Version::V2);
        self.out.write_all(&bytes).map_err(writing)
    }

    fn pad(&mut self, size: u64) -> Result<(), ImageError> {
        self.out.write_all(&END[..padding(size)]).map_err(writing)
    }

    fn file(&mut self, name: &str, bytes: &[u8]) -> Result<(), ImageError> {
        self.header(Kind::File, name, bytes.len() as u64)?;
        self.out.write_all(bytes).map_err(writing)?;
        self.pad(bytes.len() as u64)
    }

    fn blob(&mut self, name: &str, index: usize, new: &NewLayer) -> Result<(), ImageError> {
        let size = new.layer.descriptor.size;
        self.header(Kind::File, name, size)?;
        copy_blob(index, new, self.out)?;
        self.pad(size)
    }

    fn finish(self) -> Result<(), ImageError> {
        self.out.write_all(&END).map_err(writing)
    }
}

/// Copies the blob of a layer as it is, and verifies it.
pub(super) fn copy_blob(index: usize, new: &NewLayer, out: &mut dyn Write) -> Result<(), ImageError> {
    let what = layer_name(index, &new.layer);
    let mut blob = blobs::open(&*new.blobs, &what, &new.layer.descriptor)?;
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        match blob.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                out.write_all(&buffer[..n])
                    .map_err(|source| ImageError::Write { what: what.clone(), source })?;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(ImageError::reading(&what, e)),
        }
    }
}

/// The index with one entry.
pub(super) fn index(manifest: &Written) -> Index {
    Index {
        schema_version: 2,
        media_type: OCI_INDEX.into(),
        manifests: vec![manifest.descriptor.clone()],
        annotations: BTreeMap::new(),
    }
}

/// Writes an OCI archive. `mtime` is the time of its members, in seconds since 1970.
///
/// # Errors
/// [`ImageError::Write`]; those of the blobs that are copied.
pub fn write_oci_archive(
    out: &mut dyn Write,
    reference: Option<&str>,
    image: &NewImage,
    mtime: i64,
) -> Result<(), ImageError> {
    let (config, manifest) = image.documents(reference)?;
    let mut tar = Tar { out, mtime };
    tar.header(Kind::Directory, "blobs/", 0)?;
    tar.header(Kind::Directory, "blobs/sha256/", 0)?;
    let documents: BTreeMap<Digest, &Written> =
        [&config, &manifest].into_iter().map(|document| (document.descriptor.digest, document)).collect();
    let layers = image.blobs();
    let all: BTreeSet<&Digest> = documents.keys().chain(layers.keys()).collect();
    for digest in all {
        let name = LayoutFile::Blob(*digest).path();
        match (documents.get(digest), layers.get(digest)) {
            (Some(document), _) => tar.file(&name, &document.bytes)?,
            (None, Some((index, new))) => tar.blob(&name, *index, new)?,
            (None, None) => {}
        }
    }
    tar.file(&LayoutFile::Index.path(), &to_json(&index(&manifest))?)?;
    tar.file(&LayoutFile::Layout.path(), LAYOUT)?;
    tar.finish()
}

/// Writes an archive for `docker load`. `name` has a tag; `mtime` is the time of its members, in seconds since 1970.
///
/// # Errors
/// [`ImageError::Write`]; those of the blobs that are copied.
pub fn write_docker_archive(
    out: &mut dyn Write,
    name: Option<&str>,
    image: &NewImage,
    mtime: i64,
) -> Result<(), ImageError> {
    image.platform()?;
    let member = |digest: &Digest| format!("{}.tar", digest.hex());
    let config = format!("{}.json", Digest::sha256(&image.config).hex());
    let list = json!([{
        "Config": config,
        "RepoTags": name.into_iter().collect::<Vec<_>>(),
        "Layers": image.layers.iter().map(|new| member(&new.layer.descriptor.digest)).collect::<Vec<_>>(),
    }]);
    let mut tar = Tar { out, mtime };
    tar.file(&config, &image.config)?;
    for (digest, (index, new)) in image.blobs() {
        tar.blob(&member(&digest), index, new)?;
    }
    tar.file("manifest.json", &to_json(&list)?)?;
    tar.finish()
}
