//! Sources: how an image is named on a command line, and how it is opened.
//!
//! ```text
//!   oci:DIR[:REF]               a layout                          index.json ─► resolve
//!   docker://HOST/NAME[:TAG]    an image in a registry        its manifest or index ─► resolve
//!   oci-archive:FILE[:REF]      a layout in a tar  ─┐ scanned,    index.json ─► resolve
//!   docker-archive:FILE[:NAME]  `docker save`      ─┤ not         manifest.json ─► docker
//!   -                           either, on stdin   ─┘ unpacked
//!                                   not a plain regular file? ─► spooled to unnamed files, within their room
//! ```
//!
//! REF is a tag, a name or a digest; `oci:DIR@sha256:…` is a digest, too. An image of a registry is one for which the
//! [`Files`] fetch what is asked for; this crate fetches nothing. As with skopeo, the first colon ends the path (a
//! drive's colon on Windows does not). Called by users of this crate.

use crate::{
    Blob, Blobs, CONTAINERD_NAME, Descriptor, Digest, Direct, Files, Image, ImageError, Index, LayoutFile,
    Limits, Place, Platform, RegistryName, RegistryReference, RemotePart,
    archive::{ARCHIVE, Archive, ArchiveBlobs},
    blobs::{Part, reason},
    digest::Hasher,
    docker,
    layer::foreign,
    media::OCI_INDEX,
    registry::RegistryBlobs,
    resolve::{self, Wanted},
    spool::{ArchiveFile, Spool},
    text::shown,
};
use disk_io::ReadAt;
use layer_recode::{Compression, ExpandLimits, Expander, sniff};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{self, Read, Seek},
    path::{Path, PathBuf},
    sync::Arc,
};

/// Bytes that are spooled at a time.
const SPOOL_BYTES: usize = 256 << 10;
/// Bytes at the start of an archive that are looked at.
const HEAD_BYTES: usize = 6;
/// The forms of a source, for messages.
const FORMS: &str = "oci:DIR[:REF], oci-archive:FILE[:REF], docker-archive:FILE[:NAME], \
                     docker://HOST[:PORT]/NAME[:TAG|@DIGEST] or - (an archive on standard input)";
/// The version of layouts that is known (`imageLayoutVersion`), up to its first dot.
const LAYOUT_VERSION: &str = "1";

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// An OCI layout in a directory.
    Layout {
        /// The directory.
        directory: PathBuf,
        /// Tag, name or digest.
        reference: Option<String>,
    },
    /// An OCI layout in a tar.
    OciArchive {
        /// The tar, which may be compressed.
        file: PathBuf,
        /// Tag, name or digest.
        reference: Option<String>,
    },
    /// An archive of `docker save`.
    DockerArchive {
        /// The tar, which may be compressed.
        file: PathBuf,
        /// Name, or digest of the configuration.
        reference: Option<String>,
    },
    /// Either archive on standard input.
    Stdin,
    /// An image in a registry.
    Registry(RegistryName),
}

/// What to open, and how much of it.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The platform that is wanted. `None`: Linux on this machine's processor if there is a choice, and whatever is there
    /// if there is none.
    pub platform: Option<Platform>,
    /// What is accepted.
    pub limits: Limits,
    /// Directory for unnamed scratch files; `None`: the system's.
    pub scratch: Option<PathBuf>,
}

impl Source {
    /// Reads a source.
    ///
    /// # Errors
    /// [`ImageError::Usage`] for any other form, without the text itself.
    pub fn parse(text: &str) -> Result<Self, ImageError> {
        if text == "-" {
            return Ok(Self::Stdin);
        }
        let usage = |reason: &str| ImageError::Usage(reason.to_owned());
        let (transport, rest) = text
            .split_once(':')
            .filter(|(transport, _)| transport.len() > 1)
            .ok_or_else(|| usage(&format!("expected {FORMS}")))?;
        if transport == "docker" {
            let name = rest.strip_prefix("//").ok_or_else(|| usage(&format!("expected {FORMS}")))?;
            return RegistryName::parse(name).map(Self::Registry).map_err(|reason| usage(&reason));
        }
        let (path, reference) = split(rest);
        if path.is_empty() || reference.is_some_and(str::is_empty) {
            return Err(usage(&format!("the path or the reference is empty; expected {FORMS}")));
        }
        let (path, reference) = (PathBuf::from(path), reference.map(str::to_owned));
        match transport {
            "oci" => Ok(Self::Layout { directory: path, reference }),
            "oci-archive" => Ok(Self::OciArchive { file: path, reference }),
            "docker-archive" => Ok(Self::DockerArchive { file: path, reference }),
            _ => Err(usage(&format!("unknown kind of source; expected {FORMS}"))),
        }
    }

    /// Where its files are.
    pub fn place(&self) -> Place {
        match self {
            Self::Layout { directory, .. } => Place::Directory(directory.clone()),
            Self::OciArchive { file, .. } | Self::DockerArchive { file, .. } => Place::File(file.clone()),
            Self::Stdin => Place::Stdin,
            Self::Registry(_) => Place::Registry,
        }
    }

    /// Tag, name or digest by which an image is chosen from an index; a registry chooses itself.
    pub fn reference(&self) -> Option<&str> {
        match self {
            Self::Layout { reference, .. }
            | Self::OciArchive { reference, .. }
            | Self::DockerArchive { reference, .. } => reference.as_deref(),
            Self::Stdin | Self::Registry(_) => None,
        }
    }

    /// Opens the image; one in a registry needs other means, [`Source::open_with`].
    ///
    /// # Errors
    /// Every kind of [`ImageError`].
    pub fn open(&self, options: &Options) -> Result<Image, ImageError> {
        let files: Arc<dyn Files> = Arc::new(Direct::new(self.place(), options.scratch.as_deref()));
        self.open_with(&files, options)
    }

    /// As [`Source::open`], with other means to open its files.
    ///
    /// # Errors
    /// Every kind of [`ImageError`].
    pub fn open_with(&self, files: &Arc<dyn Files>, options: &Options) -> Result<Image, ImageError> {
        let wanted = Wanted { reference: self.reference(), platform: options.platform.as_ref() };
        let limits = &options.limits;
        match self {
            Self::Layout { .. } => {
                let read = |name: LayoutFile| small(&**files, &name, limits.document_bytes);
                check_layout(&read(LayoutFile::Layout)?)?;
                let index = read(LayoutFile::Index)?;
                let blobs = Arc::new(LayoutBlobs { files: Arc::clone(files) });
                resolve::find("index.json", &index, blobs, &wanted, limits)
            }
            Self::OciArchive { .. } => oci(archive(&**files, limits)?, &wanted, limits),
            Self::DockerArchive { .. } => docker::find(archive(&**files, limits)?, &wanted, limits),
            Self::Stdin => {
                let archive = archive(&**files, limits)?;
                // Docker 25 and later write both, and then the layout says more.
                if archive.has(&LayoutFile::Index.path()) {
                    oci(archive, &wanted, limits)
                } else {
                    docker::find(archive, &wanted, limits)
                }
            }
            Self::Registry(name) => remote(files, name, &wanted, limits),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (transport, path) = match self {
            Self::Layout { directory, .. } => ("oci", directory),
            Self::OciArchive { file, .. } => ("oci-archive", file),
            Self::DockerArchive { file, .. } => ("docker-archive", file),
            Self::Stdin => return f.write_str("standard input"),
            Self::Registry(name) => return write!(f, "docker://{name}"),
        };
        let text = match self.reference() {
            None => format!("{transport}:{}", path.display()),
            Some(reference) => format!("{transport}:{}:{reference}", path.display()),
        };
        f.write_str(&shown(&text))
    }
}

/// Path and reference of a source, behind its transport.
fn split(rest: &str) -> (&str, Option<&str>) {
    let drive = if cfg!(windows) && drive(rest) { 2 } else { 0 };
    if let Some(at) = rest.find("@sha256:").or_else(|| rest.find("@sha512:")) {
        let digest = &rest[at + 1..];
        if digest.parse::<Digest>().is_ok() && !rest[drive..at].contains(':') {
            return (&rest[..at], Some(digest));
        }
    }
    match rest[drive..].find(':') {
        None => (rest, None),
        Some(at) => (&rest[..drive + at], Some(&rest[drive + at + 1..])),
    }
}

/// Whether a path begins with a drive: `C:\` or `C:/`.
fn drive(path: &str) -> bool {
    matches!(path.as_bytes(), [letter, b':', b'\\' | b'/', ..] if letter.is_ascii_alphabetic())
}

/// The blobs of a layout in a directory.
#[derive(Debug)]
struct LayoutBlobs {
    files: Arc<dyn Files>,
}

impl Blobs for LayoutBlobs {
    fn open(&self, descriptor: &Descriptor) -> io::Result<Blob> {
        let file = self.files.layout(&LayoutFile::Blob(descriptor.digest))?;
        Ok(Blob { size: file.metadata()?.len(), bytes: Box::new(file) })
    }
}

/// A small file of a layout.
fn small(files: &dyn Files, name: &LayoutFile, limit: u64) -> Result<Vec<u8>, ImageError> {
    let what = name.path();
    let file = match files.layout(name) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(ImageError::NotFound {
                what,
                known: "; the directory is no OCI layout, or it does not exist".to_owned(),
            });
        }
        other => other.map_err(|e| ImageError::reading(&what, e))?,
    };
    limited(&what, file, limit)
}

/// All bytes of a file, at most `limit`.
fn limited(what: &str, file: File, limit: u64) -> Result<Vec<u8>, ImageError> {
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| ImageError::reading(what, e))?;
    if bytes.len() as u64 > limit {
        return Err(ImageError::limit(what, format!("more than {limit} bytes")));
    }
    Ok(bytes)
}

/// Finds an image in a registry: as in a layout whose index has one entry, to which the name leads.
fn remote(
    files: &Arc<dyn Files>,
    name: &RegistryName,
    wanted: &Wanted<'_>,
    limits: &Limits,
) -> Result<Image, ImageError> {
    let what = "the manifest";
    let file = match files.remote(&RemotePart::Named) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(ImageError::NotFound { what: what.to_owned(), known: reason(&e) });
        }
        other => other.map_err(|e| ImageError::reading(what, e))?,
    };
    let bytes = limited(what, file, limits.document_bytes)?;
    let digest = match name.reference() {
        RegistryReference::Tag(_) => Digest::sha256(&bytes),
        RegistryReference::Digest(expected) => {
            let mut hasher = Hasher::new(expected.algorithm());
            hasher.update(&bytes);
            let found = hasher.finish();
            if found != *expected {
                return Err(ImageError::mismatch(what, *expected, found));
            }
            found
        }
    };
    // The document itself says what it is.
    let mut entry = Descriptor::new("", digest, bytes.len() as u64);
    entry.annotations.insert(CONTAINERD_NAME.to_owned(), name.to_string());
    let index = Index {
        schema_version: 2,
        media_type: OCI_INDEX.into(),
        manifests: vec![entry],
        annotations: BTreeMap::new(),
    };
    let index = serde_json::to_vec(&index)
        .map_err(|e| ImageError::corrupt(what, format!("it cannot be listed: {e}")))?;
    let blobs = Arc::new(RegistryBlobs { files: Arc::clone(files) });
    resolve::find("the reference", &index, blobs, wanted, limits)
}

/// `oci-layout`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LayoutVersion {
    image_layout_version: String,
}

/// Whether the layout has a version that is known.
fn check_layout(bytes: &[u8]) -> Result<(), ImageError> {
    let what = LayoutFile::Layout.path();
    let version: LayoutVersion = crate::document::json(&what, bytes)?;
    let version = version.image_layout_version;
    if version.split('.').next() == Some(LAYOUT_VERSION) {
        return Ok(());
    }
    Err(ImageError::unsupported(
        what,
        format!("version {} of the layout; {LAYOUT_VERSION} is known", shown(&version)),
    ))
}

/// Finds an image in an OCI archive.
fn oci(archive: Archive, wanted: &Wanted<'_>, limits: &Limits) -> Result<Image, ImageError> {
    let document = |name: &LayoutFile| archive.document(&name.path(), limits.document_bytes);
    let missing = |name: &LayoutFile| {
        let known = if archive.has(docker::MANIFEST) {
            "; it is an archive of `docker save`, so name it docker-archive:FILE"
        } else {
            "; the archive holds no OCI layout"
        };
        ImageError::NotFound { what: name.path(), known: known.to_owned() }
    };
    let index = document(&LayoutFile::Index)?.ok_or_else(|| missing(&LayoutFile::Index))?;
    let layout = document(&LayoutFile::Layout)?.ok_or_else(|| missing(&LayoutFile::Layout))?;
    check_layout(&layout)?;
    resolve::find("index.json", &index, Arc::new(ArchiveBlobs(archive)), wanted, limits)
}

/// Scans an archive, which is spooled first if it cannot be read in any order.
fn archive(files: &dyn Files, limits: &Limits) -> Result<Archive, ImageError> {
    let reading = |e| ImageError::reading(ARCHIVE, e);
    let mut file = files.archive().map_err(reading)?;
    let metadata = file.metadata().map_err(reading)?;
    if metadata.is_dir() {
        return Err(ImageError::unsupported(ARCHIVE, "it is a directory; a layout is named oci:DIR"));
    }
    let file = if metadata.is_file() && file.stream_position().map_err(reading)? == 0 {
        let mut head = [0; HEAD_BYTES];
        let n = file.read_at(&mut head, 0).map_err(reading)?;
        refuse_foreign(&head[..n])?;
        let file = ArchiveFile::File(file);
        if sniff(&head[..n]) == Compression::Plain {
            Arc::new(file)
        } else {
            let size = metadata.len();
            spool(files, Part::new(Arc::new(file), 0, size), limits)?
        }
    } else {
        spool(files, file, limits)?
    };
    Archive::scan(file, limits)
}

/// Refuses an archive whose compression is recognized and not supported.
fn refuse_foreign(head: &[u8]) -> Result<(), ImageError> {
    let Some((name, tool)) = foreign(head) else { return Ok(()) };
    let reason = format!("it is compressed with {name}; pipe it through `{tool}` and name it -");
    Err(ImageError::unsupported(ARCHIVE, reason))
}

/// Copies the plain bytes of an archive to unnamed files.
fn spool(files: &dyn Files, input: impl Read, limits: &Limits) -> Result<Arc<ArchiveFile>, ImageError> {
    let scratch = files.scratch().map_err(|e| ImageError::reading("a scratch file", e))?;
    let expanding = |e| ImageError::expanding(ARCHIVE, e);
    let expand = ExpandLimits { output_bytes: limits.image_bytes, window_log: limits.window_log };
    let mut expander = Expander::new(input, None, &expand).map_err(expanding)?;
    refuse_foreign(expander.ahead())?;
    let (mut spool, mut first) = (Spool::default(), Some(scratch.file));
    let mut buffer = vec![0; SPOOL_BYTES];
    loop {
        let n = expander.expand(&mut buffer).map_err(expanding)?;
        if n == 0 {
            break;
        }
        let summary = expander.summary();
        if summary.bytes_out > scratch.room {
            return Err(ImageError::NoSpace { room: scratch.room });
        }
        if summary.bytes_out > limits.plain_bytes(summary.bytes_in) {
            let reason = format!("it expands to more than {} times its size", limits.ratio);
            return Err(ImageError::limit(ARCHIVE, reason));
        }
        spool.append(&buffer[..n], files, &mut first)?;
    }
    Ok(Arc::new(ArchiveFile::Spool(spool)))
}

/// The file or directory of a source, for those that must know before it is opened.
impl Source {
    /// The path that it names; `None` for standard input and registries.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Layout { directory: path, .. }
            | Self::OciArchive { file: path, .. }
            | Self::DockerArchive { file: path, .. } => Some(path),
            Self::Stdin | Self::Registry(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_as_skopeo_reads_them() {
        let digest = Digest::sha256(b"");
        let at = format!("oci:d@{digest}");
        let behind = format!("oci:d:{digest}");
        let layout = |directory: &str, reference: Option<&str>| Source::Layout {
            directory: directory.into(),
            reference: reference.map(str::to_owned),
        };
        for (text, expected) in [
            ("-", Source::Stdin),
            ("oci:d", layout("d", None)),
            ("oci:/a/b:1.0", layout("/a/b", Some("1.0"))),
            ("oci:a:docker.io/library/busybox:1", layout("a", Some("docker.io/library/busybox:1"))),
            (&at, layout("d", Some(&digest.to_string()))),
            (&behind, layout("d", Some(&digest.to_string()))),
            (
                "docker-archive:a.tar:busybox:latest",
                Source::DockerArchive { file: "a.tar".into(), reference: Some("busybox:latest".into()) },
            ),
            ("oci-archive:a.tar", Source::OciArchive { file: "a.tar".into(), reference: None }),
            ("docker://h.x:5000/a/b:1", Source::Registry("h.x:5000/a/b:1".parse().unwrap())),
        ] {
            assert_eq!(Source::parse(text).unwrap(), expected, "{text}");
        }
        for bad in [
            "",
            "a.tar",
            "oci:",
            "oci::x",
            "oci:d:",
            "docker://busybox",
            "docker:h.x/a",
            "docker:///a",
            "dir:x",
            "C:\\x",
            "oci",
        ] {
            let e = Source::parse(bad).unwrap_err();
            assert!(matches!(e, ImageError::Usage(_)), "{bad}: {e}");
        }
    }

    #[test]
    fn drives_are_part_of_a_path() {
        assert!(drive(r"C:\x") && drive("c:/x") && !drive("c:x") && !drive("/c:/") && !drive("ab:/"));
    }
}
