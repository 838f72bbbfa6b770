//! File bytes from their places on the disk into the tar, through one buffer.
//!
//! ```text
//!  disk ──pread──► buffer 512 KiB (headers, data, padding, in order) ──write──► out
//!    └───────────── long ranges of layers that never change ───────────splice──► out
//! ```
//!
//! Called by [`super::export`].

use super::{
    DiffError,
    fs::{Fs, Range},
};
use disk_io::{ReadAt, StreamOut, WriteAt};
use ext4_image::Inode;
use layer_tar::writer::{Header, Version, append};
use std::{borrow::Cow, fs::File};

/// Bytes gathered before they are written.
const BUFFER: usize = 512 << 10;
/// Ranges of at least this size are spliced from the layer's file if possible; bytes.
const SPLICE_BYTES: u64 = 64 << 10;
/// Bytes compared at once.
const COMPARE: usize = 256 << 10;

/// A file to be read from front to back.
pub(super) struct FileBytes<'a, R> {
    fs: &'a Fs<R>,
    ino: u32,
    size: u64,
    inline: Option<Cow<'a, [u8]>>,
    ranges: Cow<'a, [Range]>,
    /// The first range that does not end before the last offset.
    next: usize,
    /// The layer never changes, so its bytes may be spliced.
    fixed: bool,
    /// Where the ranges are, if not on the layer's disk.
    copy: Option<&'a dyn WriteAt>,
}

impl<'a, R: ReadAt> FileBytes<'a, R> {
    pub(super) fn new(fs: &'a Fs<R>, ino: u32, size: u64, ranges: &'a [Range]) -> Self {
        Self { fs, ino, size, inline: None, ranges: ranges.into(), next: 0, fixed: false, copy: None }
    }

    /// A file whose ranges are places in a copy.
    pub(super) fn copied(fs: &'a Fs<R>, copy: &'a dyn WriteAt, size: u64, ranges: &'a [Range]) -> Self {
        Self { copy: Some(copy), ..Self::new(fs, 0, size, ranges) }
    }

    pub(super) fn inline(fs: &'a Fs<R>, bytes: &'a [u8]) -> Self {
        Self {
            fs,
            // The bytes are inline, so the inode is not read.
            ino: 0,
            size: bytes.len() as u64,
            inline: Some(bytes.into()),
            ranges: Cow::default(),
            next: 0,
            fixed: false,
            copy: None,
        }
    }

    /// Reads the metadata now.
    pub(super) fn open(fs: &'a Fs<R>, inode: &Inode) -> Result<Self, DiffError> {
        let inline = fs.inline_bytes(inode)?.map(Cow::Owned);
        let mut ranges = Vec::new();
        fs.ranges(inode, &mut ranges)?;
        Ok(Self {
            fs,
            ino: inode.ino,
            size: inode.size,
            inline,
            ranges: ranges.into(),
            next: 0,
            fixed: false,
            copy: None,
        })
    }

    /// Sets whether the layer never changes.
    pub(super) fn fixed(self, fixed: bool) -> Self {
        Self { fixed, ..self }
    }

    /// The file that holds the bytes from `offset` on, where in it, and how many up to `len`: those of one range.
    fn in_file(&mut self, offset: u64, len: u64) -> Option<(&File, u64, u64)> {
        if !self.fixed || self.inline.is_some() || self.copy.is_some() {
            return None;
        }
        while self.ranges.get(self.next).is_some_and(|r| r.offset + r.len <= offset) {
            self.next += 1;
        }
        let range = self.ranges.get(self.next).filter(|r| r.offset <= offset)?;
        let skip = offset - range.offset;
        let n = len.min(range.len - skip);
        let (file, at) = self.fs.in_file(range.disk + skip, n)?;
        Some((file, at, n))
    }

    /// Whether it is without holes and one range at most.
    pub(super) fn is_dense(&self) -> bool {
        match &self.ranges[..] {
            [] => self.size == 0,
            [range] => range.offset == 0 && range.len == self.size,
            _ => false,
        }
    }

    /// The data ranges, those that touch joined.
    pub(super) fn joined(&self) -> Vec<(u64, u64)> {
        let mut out: Vec<(u64, u64)> = Vec::new();
        for range in self.ranges.iter() {
            match out.last_mut() {
                Some((offset, len)) if *offset + *len == range.offset => *len += range.len,
                _ => out.push((range.offset, range.len)),
            }
        }
        out
    }

    /// Fills `buf` with the bytes at `offset`, which must not be before the last one asked for.
    pub(super) fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), DiffError> {
        if let Some(inline) = &self.inline {
            let at = offset as usize;
            match inline.get(at..at + buf.len()) {
                Some(bytes) => buf.copy_from_slice(bytes),
                None => buf.fill(0),
            }
            return Ok(());
        }
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let part = &mut buf[(at - offset) as usize..];
            let Some(range) = self.ranges.get(self.next).copied().filter(|r| r.offset < end) else {
                part.fill(0);
                return Ok(());
            };
            if range.offset + range.len <= at {
                self.next += 1;
            } else if at < range.offset {
                part[..(range.offset - at) as usize].fill(0);
                at = range.offset;
            } else {
                let n = (range.offset + range.len).min(end) - at;
                let (place, part) = (range.disk + (at - range.offset), &mut part[..n as usize]);
                match self.copy {
                    Some(copy) => {
                        copy.read_exact_at(part, place).map_err(DiffError::io("reading a copied file"))?;
                    }
                    None => self.fs.read(self.ino, place, part)?,
                }
                at += n;
            }
        }
        Ok(())
    }
}

/// Whether two files of equal size hold the same bytes.
pub(super) fn same_bytes<R: ReadAt, S: ReadAt>(
    a: &mut FileBytes<'_, R>,
    b: &mut FileBytes<'_, S>,
) -> Result<bool, DiffError> {
    if a.size != b.size {
        return Ok(false);
    }
    let len = COMPARE.min(usize::try_from(a.size).unwrap_or(COMPARE));
    let (mut left, mut right) = (vec![0; len], vec![0; len]);
    let mut at = 0;
    while at < a.size {
        let n = (a.size - at).min(len as u64) as usize;
        a.read(at, &mut left[..n])?;
        b.read(at, &mut right[..n])?;
        if left[..n] != right[..n] {
            return Ok(false);
        }
        at += n as u64;
    }
    Ok(true)
}

/// BLAKE3 of a file's bytes, holes as zeros.
pub(super) fn digest<R: ReadAt>(file: &mut FileBytes<'_, R>) -> Result<[u8; 32], DiffError> {
    let mut buffer = vec![0; COMPARE.min(usize::try_from(file.size).unwrap_or(COMPARE))];
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    while at < file.size {
        let n = (file.size - at).min(buffer.len() as u64) as usize;
        file.read(at, &mut buffer[..n])?;
        hasher.update(&buffer[..n]);
        at += n as u64;
    }
    Ok(hasher.finalize().into())
}

/// The tar being written.
pub(super) struct Out<'a> {
    sink: &'a mut dyn StreamOut,
    version: Version,
    buf: Vec<u8>,
    written: u64,
}

impl<'a> Out<'a> {
    pub(super) fn new(out: &'a mut dyn StreamOut, version: Version) -> Self {
        Self { sink: out, version, buf: Vec::with_capacity(BUFFER + 4096), written: 0 }
    }

    fn flush(&mut self) -> Result<(), DiffError> {
        self.sink.write_all(&self.buf).map_err(DiffError::io("writing the tar"))?;
        self.written += self.buf.len() as u64;
        self.buf.clear();
        Ok(())
    }

    /// Writes an entry's header; gives how many bytes of data belong to it.
    pub(super) fn header(&mut self, header: &Header<'_>) -> Result<u64, DiffError> {
        let data = append(&mut self.buf, header, self.version);
        if self.buf.len() >= BUFFER {
            self.flush()?;
        }
        Ok(data)
    }

    /// Writes zeros.
    pub(super) fn zeros(&mut self, len: usize) -> Result<(), DiffError> {
        self.buf.resize(self.buf.len() + len, 0);
        if self.buf.len() >= BUFFER {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes `len` bytes of a file from `offset`.
    pub(super) fn copy<R: ReadAt>(
        &mut self,
        file: &mut FileBytes<'_, R>,
        mut offset: u64,
        mut len: u64,
    ) -> Result<(), DiffError> {
        while len > 0 {
            if len >= SPLICE_BYTES {
                let sent = self.splice(file, offset, len)?;
                if sent > 0 {
                    offset += sent;
                    len -= sent;
                    continue;
                }
            }
            if self.buf.len() >= BUFFER {
                self.flush()?;
            }
            let n = len.min((BUFFER - self.buf.len()) as u64) as usize;
            let at = self.buf.len();
            self.buf.resize(at + n, 0);
            file.read(offset, &mut self.buf[at..])?;
            offset += n as u64;
            len -= n as u64;
        }
        Ok(())
    }

    /// Splices a part of the `len` bytes of a file from `offset`; gives the number of bytes, 0 if that is not possible.
    fn splice<R: ReadAt>(
        &mut self,
        file: &mut FileBytes<'_, R>,
        offset: u64,
        len: u64,
    ) -> Result<u64, DiffError> {
        let Some((source, at, n)) = file.in_file(offset, len).filter(|(.., n)| *n >= SPLICE_BYTES) else {
            return Ok(0);
        };
        self.flush()?;
        let sent = self.sink.splice(source, at, n).map_err(DiffError::io("sending the tar"))?.min(n);
        self.written += sent;
        Ok(sent)
    }

    /// Writes what is left; gives the bytes of the whole tar.
    pub(super) fn finish(&mut self) -> Result<u64, DiffError> {
        self.flush()?;
        self.sink.flush().map_err(DiffError::io("writing the tar"))?;
        Ok(self.written)
    }
}
