//! Access to blobs: the one thing that readers of images need from the world.
//!
//! ```text
//!   Blobs::open(descriptor) ─► Blob { size, Read }       a directory, an archive, descriptors passed into a jail, a cache
//!   Checked: Read ─► at most the declared size, and the declared digest at the end, or an error
//! ```
//!
//! What an implementation returns is not trusted: sizes and digests are verified here. Called by `resolve` and `layer`.

use crate::{Descriptor, Digest, ImageError, digest::Hasher, spool::ArchiveFile};
use disk_io::ReadAt;
use std::{
    fmt,
    io::{self, Read},
    sync::Arc,
};

/// An open blob.
pub struct Blob {
    /// Its length in bytes.
    pub size: u64,
    /// Its bytes from the start.
    pub bytes: Box<dyn Read + Send>,
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blob").field("size", &self.size).finish_non_exhaustive()
    }
}

/// Something that has blobs.
pub trait Blobs: fmt::Debug + Send + Sync {
    /// Opens the blob with the descriptor's digest, at its start; it may be opened several times.
    ///
    /// # Errors
    /// `NotFound` if there is none of this digest, with a reason inside if there is one; any error of the system, or one with
    /// an [`ImageError`] inside.
    fn open(&self, descriptor: &Descriptor) -> io::Result<Blob>;

    /// From now on, only these blobs are opened: what the others take in scratch files can be given back.
    fn keep(&self, _digests: &[Digest]) {}
}

/// Bytes of an archive as a stream, whatever else reads the archive.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    file: Arc<ArchiveFile>,
    at: u64,
    end: u64,
}

impl Part {
    /// The `len` bytes at `offset`.
    pub(crate) fn new(file: Arc<ArchiveFile>, offset: u64, len: u64) -> Self {
        Self { file, at: offset, end: offset.saturating_add(len) }
    }
}

impl Read for Part {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.end - self.at).map_or(buf.len(), |left| left.min(buf.len()));
        let n = self.file.read_at(&mut buf[..most], self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

/// Opens the blob of a descriptor and compares its size. `what`, for messages, has the digest in it.
pub(crate) fn open(blobs: &dyn Blobs, what: &str, descriptor: &Descriptor) -> Result<Checked, ImageError> {
    let blob = match blobs.open(descriptor) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(ImageError::NotFound { what: what.to_owned(), known: reason(&e) });
        }
        other => other.map_err(|e| ImageError::reading(what, e))?,
    };
    if blob.size != descriptor.size {
        let (expected, found) = (descriptor.size, blob.size);
        return Err(ImageError::Size { what: what.to_owned(), expected, found });
    }
    Ok(Checked {
        bytes: blob.bytes,
        hasher: Some(Hasher::new(descriptor.digest.algorithm())),
        expected: descriptor.digest,
        size: descriptor.size,
        read: 0,
        failed: false,
        what: what.to_owned(),
    })
}

/// The reason inside an error of the system, as it follows "not found".
pub(crate) fn reason(error: &io::Error) -> String {
    error.get_ref().map(|inner| format!("; {inner}")).unwrap_or_default()
}

/// The whole blob of a descriptor, which must not be larger than `limit`.
pub(crate) fn document(
    blobs: &dyn Blobs,
    what: &str,
    descriptor: &Descriptor,
    limit: u64,
) -> Result<Vec<u8>, ImageError> {
    if descriptor.size > limit {
        let reason = format!("{} bytes, at most {limit} are accepted", descriptor.size);
        return Err(ImageError::limit(what, reason));
    }
    let mut bytes = Vec::with_capacity(descriptor.size as usize);
    let mut checked = open(blobs, what, descriptor)?;
    checked.read_to_end(&mut bytes).map_err(|e| ImageError::reading(what, e))?;
    Ok(bytes)
}

/// A blob whose size and digest are verified at its end.
pub(crate) struct Checked {
    bytes: Box<dyn Read + Send>,
    /// `None` once the end was seen and found right.
    hasher: Option<Hasher>,
    expected: Digest,
    size: u64,
    read: u64,
    /// An error was reported: there is no end any more.
    failed: bool,
    what: String,
}

impl Checked {
    /// Compares what was read with the descriptor.
    fn finish(&mut self) -> Result<(), ImageError> {
        let Some(hasher) = self.hasher.take() else { return Ok(()) };
        let what = self.what.clone();
        if self.read != self.size {
            return Err(ImageError::Size { what, expected: self.size, found: self.read });
        }
        let found = hasher.finish();
        if found != self.expected {
            return Err(ImageError::mismatch(what, self.expected, found));
        }
        Ok(())
    }
}

impl Checked {
    fn step(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.bytes.read(buf)?;
        if n == 0 {
            self.finish()?;
            return Ok(0);
        }
        self.read += n as u64;
        if self.read > self.size {
            let (what, expected, found) = (self.what.clone(), self.size, self.read);
            return Err(ImageError::Size { what, expected, found }.into());
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buf[..n]);
        }
        Ok(n)
    }
}

impl Read for Checked {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        if self.failed {
            return Err(io::Error::other("reading the blob failed before"));
        }
        let result = self.step(buf);
        self.failed = result.as_ref().is_err_and(|e| e.kind() != io::ErrorKind::Interrupted);
        result
    }
}

impl fmt::Debug for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checked").field("what", &self.what).field("read", &self.read).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ImageErrorKind, media};

    /// One blob, which says that it has `size` bytes.
    #[derive(Debug)]
    struct One(&'static [u8], u64);

    impl Blobs for One {
        fn open(&self, _: &Descriptor) -> io::Result<Blob> {
            Ok(Blob { size: self.1, bytes: Box::new(self.0) })
        }
    }

    #[test]
    fn bytes_that_do_not_have_their_size_or_digest_have_no_end() {
        let digest = Digest::sha256(b"text");
        let descriptor = Descriptor::new(media::OCI_LAYER, digest, 4);
        assert_eq!(document(&One(b"text", 4), "it", &descriptor, 4).unwrap(), b"text");
        for (bytes, size, limit, kind) in [
            (&b"text"[..], 4, 3, ImageErrorKind::Limit),
            (b"texts", 5, 9, ImageErrorKind::Corrupt),
            (b"texts", 4, 9, ImageErrorKind::Corrupt),
            (b"tex", 4, 9, ImageErrorKind::Corrupt),
            (b"Text", 4, 9, ImageErrorKind::Corrupt),
        ] {
            let e = document(&One(bytes, size), "it", &descriptor, limit).unwrap_err();
            assert_eq!(e.kind(), kind, "{e}");
        }
    }
}
