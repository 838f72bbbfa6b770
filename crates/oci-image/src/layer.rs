//! A layer as a stream of plain tar bytes, which has no end unless everything about it is right.
//!
//! ```text
//!   Blobs ─► Checked: size, digest ─► Expander: gzip, zstd, plain; limits ─► LayerReader: diff id ─► Read, finish
//! ```
//!
//! A layer that is shorter or longer than its descriptor says, or has another digest or diff id, ends in an error instead of
//! an end, so a consumer that reads to the end cannot miss it. A consumer that stops before the end calls
//! [`LayerReader::finish`]. Called by `image`.

use crate::{Blobs, Descriptor, Digest, ImageError, Limits, blobs, digest::Hasher, sum::PlainSum};
use layer_recode::{Compression, ExpandLimits, Expander, RecodeError};
use std::{
    fmt,
    io::{self, Read},
    sync::Arc,
};

/// Bytes that are read at a time where nothing but the end is of interest.
const DRAIN_BYTES: usize = 256 << 10;

/// Compressions that are recognized and not supported, with the command that decompresses them.
const FOREIGN: &[(&[u8], &str, &str)] = &[
    (b"\xFD7zXZ\0", "xz", "xz -dc"),
    (b"BZh", "bzip2", "bzip2 -dc"),
    (b"\x04\x22\x4D\x18", "lz4", "lz4 -dc"),
];

/// The compression of a stream that begins with `first`, if it is recognized and not supported.
pub(crate) fn foreign(first: &[u8]) -> Option<(&'static str, &'static str)> {
    FOREIGN.iter().find(|(magic, ..)| first.starts_with(magic)).map(|(_, name, tool)| (*name, *tool))
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Its blob.
    pub descriptor: Descriptor,
    /// Digest of its plain bytes.
    pub diff_id: Digest,
}

/// What was found at the end of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSummary {
    /// How the blob is compressed.
    pub compression: Compression,
    /// Length of the blob in bytes.
    pub blob_bytes: u64,
    /// Number of plain bytes.
    pub plain_bytes: u64,
}

/// The plain bytes of a layer.
pub struct LayerReader {
    expander: Expander<blobs::Checked>,
    /// Digests the plain bytes; `None` if they are the blob, whose digest is the diff id, and after the end.
    hasher: Option<Hasher>,
    diff_id: Digest,
    /// Counts the plain bytes, with the number of the layer.
    sum: (Arc<PlainSum>, usize),
    what: String,
    ended: bool,
    failed: bool,
}

impl LayerReader {
    /// Opens the layer `what`.
    pub(crate) fn open(
        blobs: &dyn Blobs,
        what: &str,
        layer: &Layer,
        limits: &Limits,
        (sum, index): (&Arc<PlainSum>, usize),
    ) -> Result<Self, ImageError> {
        let blob = blobs::open(blobs, what, &layer.descriptor)?;
        let expand = ExpandLimits {
            output_bytes: limits.plain_bytes(layer.descriptor.size),
            window_log: limits.window_log,
        };
        let expander = Expander::new(blob, None, &expand).map_err(|e| ImageError::expanding(what, e))?;
        if let Some((name, _)) = foreign(expander.ahead()) {
            let reason = format!("it is compressed with {name}; gzip, zstd and plain layers are read");
            return Err(ImageError::unsupported(what, reason));
        }
        let same = expander.format() == Compression::Plain && layer.descriptor.digest == layer.diff_id;
        let hasher = (!same).then(|| Hasher::new(layer.diff_id.algorithm()));
        Ok(Self {
            expander,
            hasher,
            diff_id: layer.diff_id,
            sum: (Arc::clone(sum), index),
            what: what.to_owned(),
            ended: false,
            failed: false,
        })
    }

    /// How the blob is compressed.
    pub fn compression(&self) -> Compression {
        self.expander.format()
    }

    /// Reads what is left and verifies it.
    ///
    /// # Errors
    /// [`ImageError::Digest`] and [`ImageError::Size`] if blob or plain bytes are others than the image says, and all
    /// errors of reading.
    pub fn finish(mut self) -> Result<LayerSummary, ImageError> {
        if !self.ended {
            let mut buffer = vec![0; DRAIN_BYTES];
            while self.next(&mut buffer)? > 0 {}
        }
        let summary = self.expander.summary();
        Ok(LayerSummary {
            compression: summary.format,
            blob_bytes: summary.bytes_in,
            plain_bytes: summary.bytes_out,
        })
    }

    /// As `read`, with the typed error.
    fn next(&mut self, buf: &mut [u8]) -> Result<usize, ImageError> {
        if buf.is_empty() || self.ended {
            return Ok(0);
        }
        if self.failed {
            return Err(ImageError::corrupt(self.what.as_str(), "it failed before"));
        }
        let result = self.step(buf);
        self.failed = result.is_err();
        result
    }

    fn step(&mut self, buf: &mut [u8]) -> Result<usize, ImageError> {
        let n = match self.expander.expand(buf) {
            Ok(n) => n,
            Err(e) => return Err(self.broken(e)),
        };
        if n > 0 {
            let (sum, index) = &self.sum;
            sum.add(*index, self.expander.summary().bytes_out)
                .map_err(|reason| ImageError::limit(self.what.as_str(), reason))?;
            if let Some(hasher) = &mut self.hasher {
                hasher.update(&buf[..n]);
            }
            return Ok(n);
        }
        if let Some(hasher) = self.hasher.take() {
            let found = hasher.finish();
            if found != self.diff_id {
                let what = format!("the plain bytes of {}", self.what);
                return Err(ImageError::mismatch(what, self.diff_id, found));
            }
        }
        self.ended = true;
        Ok(0)
    }

    /// The error of a stream that does not expand: a wrong digest of its blob, if it has one, because that explains it.
    fn broken(&mut self, error: RecodeError) -> ImageError {
        if let RecodeError::Corrupt { .. } = error {
            let mut buffer = vec![0; DRAIN_BYTES];
            loop {
                match self.expander.input().read(&mut buffer) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return ImageError::reading(&self.what, e),
                }
            }
        }
        ImageError::expanding(&self.what, error)
    }
}

impl Read for LayerReader {
    /// The next plain bytes. The error holds the [`ImageError`].
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(self.next(buf)?)
    }
}

impl fmt::Debug for LayerReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerReader").field("what", &self.what).finish_non_exhaustive()
    }
}
