//! Parts of an image: from the cache, or from the registry into the cache.
//!
//! ```text
//!   Named ─────► manifest or index, limited ─ digest ─┐ its digests may be asked for from now on
//!   Document ──► the same, by digest ─────────────────┴─► cache ─► File
//!   Blob ──────► part ─ GET, Range from its end, again if the connection is lost ─ size ─ digest of the whole ─► cache ─► File
//! ```
//!
//! What was fetched in one piece is digested on its way. After any resumption the file is read again from its start, and if
//! its digest is wrong, fetched once more as a whole. Called by users of this crate.

use crate::{
    RegistryError,
    cache::{Cache, Part, default_cache},
    client::Client,
};
use oci_image::{
    Algorithm, Digest, Direct, Files, Hasher, LayoutFile, Place, RegistryName, RegistryReference, RemotePart,
    Scratch, media,
};
use std::{
    collections::HashSet,
    fmt,
    fs::File,
    io::{self, Read, Seek},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};
use ureq::{
    Body,
    http::{
        Response,
        header::{CONTENT_LENGTH, CONTENT_RANGE},
    },
};

/// Bytes that are written at a time.
const BUFFER: usize = 256 << 10;
/// Attempts in a row that may bring no byte.
const FRUITLESS: u32 = 3;
/// Attempts for one blob, whatever they bring.
const ATTEMPTS: u32 = 1000;
/// Time before an attempt after a fruitless one.
const PAUSE: Duration = Duration::from_millis(300);
/// Documents of one image that are asked for; the reader has a lower limit.
const MAX_DOCUMENTS: usize = 2000;
/// The header with the digest of a manifest.
const CONTENT_DIGEST: &str = "docker-content-digest";

/// How images are fetched.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Directory of the cache; `None`: [`default_cache`].
    pub cache: Option<PathBuf>,
    /// HTTP without TLS.
    pub plain_http: bool,
    /// A PEM file with certificates of authorities that are trusted besides the system's.
    pub ca: Option<PathBuf>,
    /// Directory for unnamed scratch files; `None`: the system's.
    pub scratch: Option<PathBuf>,
    /// Bytes of an index or a manifest.
    pub document_bytes: u64,
    /// Bytes of a configuration or a layer.
    pub blob_bytes: u64,
}

/// Who is told how far a blob is.
pub trait Progress: fmt::Debug + Send + Sync {
    /// A blob of `size` bytes is fetched.
    fn begin(&self, digest: &Digest, size: u64);
    /// It has `have` bytes.
    fn advance(&self, have: u64);
    /// It is complete, or it failed.
    fn end(&self);
}

/// The parts of one image of a registry, as files.
#[derive(Debug)]
pub struct Registry {
    name: RegistryName,
    settings: Settings,
    progress: Option<Box<dyn Progress>>,
    client: Mutex<Option<Arc<Client>>>,
    asked: Mutex<Asked>,
}

/// What was fetched.
#[derive(Debug, Default)]
struct Asked {
    documents: usize,
    /// Digests that stand in documents, or in the name.
    named: HashSet<Digest>,
}

/// How an attempt ended.
enum Attempt {
    /// The part has this many bytes.
    Reached(u64),
    /// The connection was lost.
    Lost(u64, io::Error),
}

impl Registry {
    /// The image `name`. Nothing is read or fetched before a part is asked for.
    pub fn new(name: &RegistryName, settings: Settings, progress: Option<Box<dyn Progress>>) -> Self {
        let mut asked = Asked::default();
        if let RegistryReference::Digest(digest) = name.reference() {
            asked.named.insert(*digest);
        }
        Self { name: name.clone(), settings, progress, client: Mutex::new(None), asked: Mutex::new(asked) }
    }

    /// A part, at its start.
    ///
    /// # Errors
    /// Every kind of [`RegistryError`].
    pub fn fetch(&self, part: &RemotePart) -> Result<File, RegistryError> {
        match *part {
            RemotePart::Named => {
                let (wanted, shown) = match self.name.reference() {
                    RegistryReference::Tag(tag) => (None, format!("manifest {tag:?}")),
                    RegistryReference::Digest(digest) => (Some(*digest), format!("manifest {digest}")),
                };
                self.document(
                    wanted,
                    &self.name.reference().to_string(),
                    &shown,
                    self.settings.document_bytes,
                )
            }
            RemotePart::Document { digest, size } => {
                self.check(&digest)?;
                let limit = size.min(self.settings.document_bytes);
                self.document(Some(digest), &digest.to_string(), &format!("manifest {digest}"), limit)
            }
            RemotePart::Blob { digest, size } => {
                self.check(&digest)?;
                self.blob(&digest, size)
            }
        }
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses a digest that no document names.
    fn check(&self, digest: &Digest) -> Result<(), RegistryError> {
        if self.asked().named.contains(digest) {
            return Ok(());
        }
        Err(RegistryError::Unnamed(Box::new(*digest)))
    }

    fn cache(&self) -> Result<Cache, RegistryError> {
        let named = self.settings.cache.clone().or_else(default_cache);
        named.map(Cache::new).ok_or_else(|| RegistryError::Configuration {
            what: "the cache".to_owned(),
            reason: "the environment names no directory for it; name one with --cache".to_owned(),
        })
    }

    fn client(&self) -> Result<Arc<Client>, RegistryError> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = &*client {
            return Ok(Arc::clone(client));
        }
        let made = Client::new(&self.name, self.settings.plain_http, self.settings.ca.clone())?;
        Ok(Arc::clone(client.insert(Arc::new(made))))
    }

    fn limit(&self, what: &str, reason: String) -> RegistryError {
        RegistryError::Limit { host: self.name.host().to_owned(), what: what.to_owned(), reason }
    }

    fn invalid(&self, what: &str, reason: String) -> RegistryError {
        RegistryError::Protocol { host: self.name.host().to_owned(), what: what.to_owned(), reason }
    }

    fn mismatch(&self, what: &str, expected: Digest, found: Digest) -> RegistryError {
        RegistryError::Digest {
            host: self.name.host().to_owned(),
            what: what.to_owned(),
            expected: Box::new(expected),
            found: Box::new(found),
        }
    }

    /// A manifest or an index; its digests may be asked for from now on.
    fn document(
        &self,
        wanted: Option<Digest>,
        reference: &str,
        what: &str,
        limit: u64,
    ) -> Result<File, RegistryError> {
        let cache = self.cache()?;
        if let Some(digest) = wanted
            && let Some((mut file, size)) = cache.open(&digest)?
            && size <= limit
        {
            let mut bytes = Vec::new();
            let read = file.by_ref().take(limit).read_to_end(&mut bytes);
            let rewound = file.rewind();
            // A file that was damaged is fetched anew.
            if read.is_ok() && rewound.is_ok() && digest_of(&digest, &bytes) == digest {
                self.learn(digest, &bytes)?;
                return Ok(file);
            }
        }
        let bytes = self.download(reference, what, limit, wanted)?;
        let digest = wanted.unwrap_or_else(|| Digest::sha256(&bytes));
        self.learn(digest, &bytes)?;
        let mut part = cache.part(&digest)?;
        part.clear()?;
        part.write(0, &bytes)?;
        part.commit()
    }

    /// The bytes of a manifest or an index.
    fn download(
        &self,
        reference: &str,
        what: &str,
        limit: u64,
        wanted: Option<Digest>,
    ) -> Result<Vec<u8>, RegistryError> {
        let client = self.client()?;
        let accept =
            [media::OCI_INDEX, media::OCI_MANIFEST, media::DOCKER_INDEX, media::DOCKER_MANIFEST].join(", ");
        let mut attempt = 1;
        loop {
            let response = client.get(&format!("manifests/{reference}"), what, Some(&accept), 0)?;
            let length = length(&response);
            if length.is_some_and(|length| length > limit) {
                return Err(self.limit(what, format!("more than {limit} bytes")));
            }
            let header = response.headers().get(CONTENT_DIGEST).and_then(|value| value.to_str().ok());
            let header = header.and_then(|text| text.parse::<Digest>().ok());
            let mut bytes = Vec::new();
            let read =
                response.into_body().into_reader().take(limit.saturating_add(1)).read_to_end(&mut bytes);
            if bytes.len() as u64 > limit {
                return Err(self.limit(what, format!("more than {limit} bytes")));
            }
            if let Err(source) = read {
                if attempt < FRUITLESS {
                    thread::sleep(PAUSE * attempt);
                    attempt += 1;
                    continue;
                }
                let (have, size) = (bytes.len() as u64, length.unwrap_or(limit));
                return Err(RegistryError::Interrupted {
                    host: client.host(),
                    what: what.to_owned(),
                    have,
                    size,
                    source,
                });
            }
            if let Some(expected) = wanted.or(header) {
                let found = digest_of(&expected, &bytes);
                if found != expected {
                    return Err(self.mismatch(what, expected, found));
                }
            }
            return Ok(bytes);
        }
    }

    /// Remembers a document and the digests that stand in it. It is not parsed for that.
    fn learn(&self, digest: Digest, bytes: &[u8]) -> Result<(), RegistryError> {
        let mut asked = self.asked();
        asked.documents += 1;
        if asked.documents > MAX_DOCUMENTS {
            drop(asked);
            return Err(self.limit("the image", format!("more than {MAX_DOCUMENTS} documents")));
        }
        asked.named.insert(digest);
        asked.named.extend(digests(bytes));
        Ok(())
    }

    /// A configuration or a layer.
    fn blob(&self, digest: &Digest, size: u64) -> Result<File, RegistryError> {
        let what = format!("blob {digest}");
        if size > self.settings.blob_bytes {
            let reason = format!("{size} bytes, at most {} are accepted", self.settings.blob_bytes);
            return Err(self.limit(&what, reason));
        }
        let cache = self.cache()?;
        let cached = || -> Result<Option<File>, RegistryError> {
            // One of another size was damaged, or the image is wrong, which fetching it shows.
            Ok(cache.open(digest)?.filter(|(_, found)| *found == size).map(|(file, _)| file))
        };
        if let Some(file) = cached()? {
            return Ok(file);
        }
        let mut part = cache.part(digest)?;
        // Another process may have had the lock and the blob.
        if let Some(file) = cached()? {
            return Ok(file);
        }
        if let Some(progress) = &self.progress {
            progress.begin(digest, size);
        }
        let filled = self.fill(&mut part, digest, size, &what);
        if let Some(progress) = &self.progress {
            progress.end();
        }
        filled?;
        part.commit()
    }

    /// Fills a part with the right bytes.
    fn fill(&self, part: &mut Part, digest: &Digest, size: u64, what: &str) -> Result<(), RegistryError> {
        let mut again = true;
        loop {
            if part.len()? > size {
                part.clear()?;
            }
            let mut resumed = part.len()? > 0;
            let mut hasher = (!resumed).then(|| Hasher::new(digest.algorithm()));
            resumed |= self.stream(part, digest, size, what, &mut hasher)?;
            let found = match hasher {
                Some(hasher) => hasher.finish(),
                None => part.digest(digest)?,
            };
            if found == *digest {
                return Ok(());
            }
            part.clear()?;
            if !resumed || !again {
                return Err(self.mismatch(what, *digest, found));
            }
            // Bytes of an earlier attempt may have been wrong.
            again = false;
        }
    }

    /// Fetches what a part lacks; gives whether that took more than one attempt. The hasher is taken away if it did not see
    /// all bytes in their order.
    fn stream(
        &self,
        part: &mut Part,
        digest: &Digest,
        size: u64,
        what: &str,
        hasher: &mut Option<Hasher>,
    ) -> Result<bool, RegistryError> {
        let mut have = part.len()?;
        let (mut attempts, mut fruitless) = (0, 0);
        while have < size {
            if attempts > 0 {
                *hasher = None;
            }
            attempts += 1;
            match self.attempt(part, digest, size, have, what, hasher)? {
                Attempt::Reached(reached) => have = reached,
                Attempt::Lost(reached, source) => {
                    fruitless = if reached > have { 0 } else { fruitless + 1 };
                    have = reached;
                    if fruitless >= FRUITLESS || attempts >= ATTEMPTS {
                        let (host, what) = (self.name.host().to_owned(), what.to_owned());
                        return Err(RegistryError::Interrupted { host, what, have, size, source });
                    }
                    thread::sleep(PAUSE * fruitless);
                }
            }
        }
        Ok(attempts > 1)
    }

    /// Fetches what a part lacks behind its first `have` bytes, as far as one connection goes.
    fn attempt(
        &self,
        part: &mut Part,
        digest: &Digest,
        size: u64,
        have: u64,
        what: &str,
        hasher: &mut Option<Hasher>,
    ) -> Result<Attempt, RegistryError> {
        let response = self.client()?.get(&format!("blobs/{digest}"), what, None, have)?;
        let mut at = have;
        match response.status().as_u16() {
            206 if have > 0 => {
                let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
                if range.and_then(start_of) != Some(have) {
                    return Err(self.invalid(what, format!("not the bytes from {have} on")));
                }
            }
            // It ignores the range, or has fewer bytes: all of them, from the start.
            200 | 416 if have > 0 => {
                part.clear()?;
                *hasher = None;
                at = 0;
                if response.status().as_u16() == 416 {
                    return Ok(Attempt::Lost(0, io::Error::other("the registry has fewer bytes")));
                }
            }
            200 => {}
            status => return Err(self.invalid(what, format!("status {status}"))),
        }
        if let Some(length) = length(&response)
            && at.saturating_add(length) != size
        {
            let found = at.saturating_add(length);
            return Err(self.invalid(what, format!("size mismatch: expected {size} bytes, found {found}")));
        }
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; BUFFER];
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) if at < size => {
                    return Ok(Attempt::Lost(at, io::ErrorKind::UnexpectedEof.into()));
                }
                Ok(0) => return Ok(Attempt::Reached(at)),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Ok(Attempt::Lost(at, e)),
            };
            if at + n as u64 > size {
                return Err(self.invalid(what, format!("size mismatch: expected {size} bytes, found more")));
            }
            part.write(at, &buffer[..n])?;
            if let Some(hasher) = hasher {
                hasher.update(&buffer[..n]);
            }
            at += n as u64;
            if let Some(progress) = &self.progress {
                progress.advance(at);
            }
        }
    }
}

impl Files for Registry {
    fn archive(&self) -> io::Result<File> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn layout(&self, _: &LayoutFile) -> io::Result<File> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn remote(&self, part: &RemotePart) -> io::Result<File> {
        Ok(self.fetch(part)?)
    }

    fn scratch(&self) -> io::Result<Scratch> {
        Direct::new(Place::Registry, self.settings.scratch.as_deref()).scratch()
    }
}

/// The length of a reply, if it says so.
fn length(response: &Response<Body>) -> Option<u64> {
    response.headers().get(CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}

/// The first byte of `Content-Range: bytes FIRST-LAST/SIZE`.
fn start_of(range: &str) -> Option<u64> {
    let (first, _) = range.trim().strip_prefix("bytes")?.trim_start().split_once('-')?;
    first.parse().ok()
}

/// The digest of bytes, by the algorithm of another one.
fn digest_of(like: &Digest, bytes: &[u8]) -> Digest {
    let mut hasher = Hasher::new(like.algorithm());
    hasher.update(bytes);
    hasher.finish()
}

/// The digests that stand in a text.
fn digests(text: &[u8]) -> impl Iterator<Item = Digest> {
    let colons = text.iter().enumerate().filter(|(_, byte)| **byte == b':').map(|(at, _)| at);
    colons.filter_map(|colon| {
        let (before, after) = (&text[..colon], &text[colon + 1..]);
        let (algorithm, digits) = if before.ends_with(b"sha256") {
            (Algorithm::Sha256, 64)
        } else if before.ends_with(b"sha512") {
            (Algorithm::Sha512, 128)
        } else {
            return None;
        };
        Digest::from_hex(algorithm, std::str::from_utf8(after.get(..digits)?).ok()?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_found_without_parsing() {
        let (a, b) = (Digest::sha256(b"a"), Digest::sha256(b"b"));
        let text = format!(r#"{{"config":{{"digest":"{a}"}},"x":"sha256:00","y":"{b}"}} sha256:"#);
        assert_eq!(digests(text.as_bytes()).collect::<Vec<_>>(), [a, b]);
        assert_eq!(digests(b":sha512:\xff").count(), 0);
    }

    #[test]
    fn a_digest_that_no_document_names_is_not_fetched() {
        let settings = Settings {
            cache: None,
            plain_http: true,
            ca: None,
            scratch: None,
            document_bytes: 1,
            blob_bytes: 1,
        };
        // Nobody listens there, and nobody is asked.
        let registry = Registry::new(&"127.0.0.1:1/a".parse().unwrap(), settings, None);
        let (digest, size) = (Digest::sha256(b""), 0);
        for part in [RemotePart::Blob { digest, size }, RemotePart::Document { digest, size }] {
            assert!(matches!(registry.fetch(&part), Err(RegistryError::Unnamed(_))));
        }
    }

    #[test]
    fn ranges_begin_where_they_say() {
        assert_eq!(start_of("bytes 5-9/10"), Some(5));
        assert_eq!(start_of("bytes 5-9/*"), Some(5));
        for bad in ["", "bytes", "bytes */10", "items 5-9/10", "bytes -5/10"] {
            assert_eq!(start_of(bad), None, "{bad}");
        }
    }
}
