//! Archives: tars whose members are found by name, in any order.
//!
//! ```text
//!   tar │ hdr │ data │ hdr │ data │ …      scan reads the headers and seeks over the data
//!         └► members: name ─► File { offset, len } │ Link { target }
//! ```
//!
//! Nothing is unpacked: a member is a range of the archive's file. Links lead to other members only (old versions of `docker
//! save` made `<id>/layer.tar` a link to an equal layer of another image). A member whose name leaves the archive makes the
//! whole archive invalid. If a name occurs twice, the last one counts, as it would for one who unpacks. Called by `source`
//! and `docker`.

use crate::{
    Blob, Blobs, Descriptor, Digest, ImageError, LayoutFile, Limits, blobs::Part, spool::ArchiveFile,
    text::shown,
};
use disk_io::ReadAt;
use layer_tar::{BLOCK, Chunks, EntryKind, Event, TarReader};
use std::{
    collections::HashMap,
    io::{self, Read},
    sync::Arc,
};

/// How messages name an archive; which one, their reader knows.
pub(crate) const ARCHIVE: &str = "the archive";
/// Bytes that are read for a header.
const HEADER_BYTES: usize = 8 * BLOCK;
/// Longest name of a member. Blobs have 78 characters.
const MAX_NAME: usize = 4096;
/// Links that follow each other.
const MAX_LINKS: usize = 40;

/// A member.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Member {
    File {
        offset: u64,
        len: u64,
    },
    /// The name of another member; `None` if it leads out of the archive.
    Link(Option<String>),
    /// A file with holes.
    Sparse,
    /// A directory or a device.
    Other,
}

/// What a header says.
struct Header {
    name: Vec<u8>,
    link: Vec<u8>,
    kind: EntryKind,
    size: u64,
    stored: u64,
}

/// An archive.
#[derive(Debug)]
pub(crate) struct Archive {
    file: Arc<ArchiveFile>,
    members: HashMap<String, Member>,
}

impl Archive {
    /// Reads the headers of an archive.
    pub(crate) fn scan(file: Arc<ArchiveFile>, limits: &Limits) -> Result<Self, ImageError> {
        let size = file.size().map_err(|e| ImageError::reading(ARCHIVE, e))?;
        if size == 0 {
            return Err(ImageError::corrupt(ARCHIVE, "it is empty"));
        }
        let mut members = HashMap::new();
        let (mut at, mut count) = (0, 0);
        while at < size {
            let part = Part::new(Arc::clone(&file), at, size - at);
            let mut reader = TarReader::from_source(Chunks::with_chunk_bytes(part, HEADER_BYTES));
            let Some(header) = header(&mut reader).map_err(|e| match e {
                layer_tar::TarError::Io { source, .. } => ImageError::reading(ARCHIVE, source),
                e => ImageError::corrupt(ARCHIVE, format!("the member at byte {at}: {e}")),
            })?
            else {
                break;
            };
            count += 1;
            if count > limits.members {
                let reason = format!("more than {} members are not accepted", limits.members);
                return Err(ImageError::limit(ARCHIVE, reason));
            }
            let offset = at + reader.offset();
            let end = offset.checked_add(header.stored);
            let Some(end) = end.filter(|end| *end <= size) else {
                let name = shown(&String::from_utf8_lossy(&header.name));
                return Err(ImageError::corrupt(ARCHIVE, format!("it ends inside of the member {name}")));
            };
            at = end.next_multiple_of(BLOCK as u64);
            let (name, member) =
                member(&header, offset).map_err(|reason| ImageError::corrupt(ARCHIVE, reason))?;
            members.insert(name, member);
        }
        Ok(Self { file, members })
    }

    /// Whether there is a member of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.members.contains_key(name)
    }

    /// Where the bytes of a member are, behind all links: offset and length; `None` if there is no such member.
    pub(crate) fn find(&self, name: &str) -> Result<Option<(u64, u64)>, ImageError> {
        let bad = |reason: &str| Err(ImageError::corrupt(format!("the member {}", shown(name)), reason));
        let mut at = name;
        for _ in 0..=MAX_LINKS {
            match self.members.get(at) {
                None if at == name => return Ok(None),
                None => return bad(&format!("it is a link to {}, which is not there", shown(at))),
                Some(Member::File { offset, len }) => return Ok(Some((*offset, *len))),
                Some(Member::Link(Some(target))) => at = target,
                Some(Member::Link(None)) => return bad("it is a link that leads out of the archive"),
                Some(Member::Sparse) => return bad("it has holes; archive the image without --sparse"),
                Some(Member::Other) => return bad("it is not a file"),
            }
        }
        bad("its links form a loop")
    }

    /// The bytes of a range that [`Archive::find`] gave.
    pub(crate) fn part(&self, (offset, len): (u64, u64)) -> Part {
        Part::new(Arc::clone(&self.file), offset, len)
    }

    /// From now on, only these ranges are read.
    pub(crate) fn keep(&self, places: impl IntoIterator<Item = (u64, u64)>) {
        let ranges = places.into_iter().map(|(offset, len)| offset..offset.saturating_add(len));
        self.file.keep(&ranges.collect::<Vec<_>>());
    }

    /// The bytes of a small member.
    pub(crate) fn document(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, ImageError> {
        let Some(place) = self.find(name)? else { return Ok(None) };
        if place.1 > limit {
            let reason = format!("{} bytes, at most {limit} are accepted", place.1);
            return Err(ImageError::limit(format!("the member {}", shown(name)), reason));
        }
        let mut bytes = Vec::with_capacity(place.1 as usize);
        self.part(place).read_to_end(&mut bytes).map_err(|e| ImageError::reading(ARCHIVE, e))?;
        Ok(Some(bytes))
    }
}

/// The next header; `None` at the end of the archive.
fn header<S: layer_tar::ChunkSource>(
    reader: &mut TarReader<S>,
) -> Result<Option<Header>, layer_tar::TarError> {
    loop {
        match reader.next_event()? {
            Event::Raw(_) => {}
            Event::Entry(entry) => {
                return Ok(Some(Header {
                    name: std::mem::take(&mut entry.path),
                    link: std::mem::take(&mut entry.link),
                    kind: entry.kind,
                    size: entry.size,
                    stored: entry.stored,
                }));
            }
            Event::Data { .. } | Event::End => return Ok(None),
        }
    }
}

/// The name and the member that a header describes; an error is a reason.
fn member(header: &Header, offset: u64) -> Result<(String, Member), String> {
    if header.name.len() > MAX_NAME {
        return Err(format!("the name of a member is longer than {MAX_NAME} bytes"));
    }
    let dots = header.name.split(|b| *b == b'/').any(|part| part == b"..");
    let Some(name) = below(&[], &header.name).filter(|_| !dots) else {
        let name = shown(&String::from_utf8_lossy(&header.name));
        return Err(format!("the name of the member {name} has '..' in it or is not UTF-8"));
    };
    let member = match header.kind {
        EntryKind::File if header.stored != header.size => Member::Sparse,
        EntryKind::File => Member::File { offset, len: header.size },
        EntryKind::HardLink => Member::Link(below(&[], &header.link).map(|parts| parts.join("/"))),
        EntryKind::Symlink if header.link.starts_with(b"/") => Member::Link(None),
        EntryKind::Symlink => {
            let folder = &name[..name.len().saturating_sub(1)];
            Member::Link(below(folder, &header.link).map(|parts| parts.join("/")))
        }
        _ => Member::Other,
    };
    Ok((name.join("/"), member))
}

/// The parts of `path`, seen from `folder`; `None` if it leaves the archive or is not UTF-8.
fn below(folder: &[String], path: &[u8]) -> Option<Vec<String>> {
    let mut parts = folder.to_vec();
    for part in std::str::from_utf8(path).ok()?.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part.to_owned()),
        }
    }
    Some(parts)
}

/// The blobs of an OCI archive.
#[derive(Debug)]
pub(crate) struct ArchiveBlobs(pub(crate) Archive);

impl Blobs for ArchiveBlobs {
    fn open(&self, descriptor: &Descriptor) -> io::Result<Blob> {
        let place =
            self.0.find(&LayoutFile::Blob(descriptor.digest).path())?.ok_or(io::ErrorKind::NotFound)?;
        Ok(Blob { size: place.1, bytes: Box::new(self.0.part(place)) })
    }

    fn keep(&self, digests: &[Digest]) {
        let find = |digest: &Digest| self.0.find(&LayoutFile::Blob(*digest).path()).ok().flatten();
        self.0.keep(digests.iter().filter_map(find));
    }
}
