//! Reassembles a layer's tar from its files and from what the engine kept of the tar.
//!
//! ```text
//!   tar-split.json.gz, one object a line           the tar
//!   {"type":2,"payload":"<base64>","position":0}   ──► headers, padding, ends: as they are
//!   {"type":1,"name":"bin/sh","size":77,           ──► 77 bytes of the layer's own bin/sh,
//!    "payload":"<CRC-64 of them>","position":1}        which must have this checksum
//! ```
//!
//! Source: vbatts/tar-split, `tar/storage/entry.go` and `tar/asm/assemble.go`. Names that are not UTF-8 come as
//! `name_raw` in base64. Memory: one line and one buffer. No path is opened here: the caller of [`rebuild`] opens
//! files.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;
use std::io::{self, BufRead, BufReader, Read, Write};

/// Longest line. A segment holds everything between the data of two files: headers with their extended attributes, or
/// any data after a tar's end.
const MAX_LINE: u64 = 96 << 20;
/// Bytes of a file copied at a time.
const BUFFER: usize = 256 << 10;
/// Go's `crc64.ISO`, the checksum of tar-split.
const CRC: crc::Crc<u64, crc::Table<16>> = crc::Crc::<u64, crc::Table<16>>::new(&crc::CRC_64_GO_ISO);
/// A file's data.
const FILE: u32 = 1;
/// Bytes of the tar itself.
const SEGMENT: u32 = 2;

/// A tar that cannot be reassembled.
#[derive(Debug, thiserror::Error)]
pub enum SplitError {
    /// The tar data are damaged.
    #[error("entry {entry} of its tar data is damaged: {reason}")]
    Corrupt {
        /// Counted from 0.
        entry: u64,
        /// What is wrong.
        reason: String,
    },
    /// A file is missing, too short, or not a file.
    #[error("its file '{name}' cannot be read")]
    File {
        /// The name in the tar.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file was changed since the layer was made.
    #[error("its file '{name}' was changed since the layer was made")]
    Changed {
        /// The name in the tar.
        name: String,
    },
    /// The reader of the tar is gone.
    #[error("cannot pass on its tar")]
    Output(#[source] io::Error),
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: u32,
    #[serde(default)]
    name: String,
    #[serde(default)]
    name_raw: Option<String>,
    #[serde(default)]
    size: i64,
    #[serde(default)]
    payload: Option<String>,
    #[serde(default)]
    position: u64,
}

/// Writes the tar that `split` (unpacked JSON lines) and the layer's files make; returns its length. `open` gives a
/// regular file of the layer by its name in the tar.
///
/// # Errors
/// Damaged tar data; a file that is missing, short or changed; an error of `out`.
pub(super) fn rebuild<F: Read>(
    split: impl Read,
    mut open: impl FnMut(&[u8]) -> io::Result<F>,
    out: &mut dyn Write,
) -> Result<u64, SplitError> {
    let mut lines = BufReader::with_capacity(BUFFER, split);
    let (mut line, mut buffer) = (Vec::new(), vec![0; BUFFER]);
    let mut total = 0_u64;
    for entry in 0_u64.. {
        let corrupt = |reason: String| SplitError::Corrupt { entry, reason };
        line.clear();
        let read = lines.by_ref().take(MAX_LINE + 1).read_until(b'\n', &mut line);
        read.map_err(|e| corrupt(e.to_string()))?;
        if line.is_empty() {
            return Ok(total);
        }
        if line.len() as u64 > MAX_LINE {
            return Err(corrupt(format!("it is longer than {MAX_LINE} bytes")));
        }
        let parsed: Entry = serde_json::from_slice(&line).map_err(|e| corrupt(e.to_string()))?;
        if parsed.position != entry {
            return Err(corrupt(format!("its position is {}", parsed.position)));
        }
        let decode = |text: &str| STANDARD.decode(text).map_err(|e| corrupt(format!("base64: {e}")));
        let payload = decode(parsed.payload.as_deref().unwrap_or_default())?;
        match parsed.kind {
            SEGMENT => {
                out.write_all(&payload).map_err(SplitError::Output)?;
                total += payload.len() as u64;
            }
            // Hard links, directories and so on have no data.
            FILE if parsed.size == 0 => {}
            FILE => {
                let name = match &parsed.name_raw {
                    Some(raw) if !raw.is_empty() => decode(raw)?,
                    _ => parsed.name.into_bytes(),
                };
                let size = u64::try_from(parsed.size)
                    .map_err(|_| corrupt(format!("its size is {} bytes", parsed.size)))?;
                let sum = copy(&name, size, &mut open, &mut buffer, out)?;
                if payload != sum.to_be_bytes() {
                    return Err(SplitError::Changed { name: shown(&name) });
                }
                total += size;
            }
            other => return Err(corrupt(format!("its kind is unknown: {other}"))),
        }
    }
    Ok(total)
}

/// Copies a file's `size` bytes; returns their checksum.
fn copy<F: Read>(
    name: &[u8],
    size: u64,
    open: &mut impl FnMut(&[u8]) -> io::Result<F>,
    buffer: &mut [u8],
    out: &mut dyn Write,
) -> Result<u64, SplitError> {
    let unreadable = |source| SplitError::File { name: shown(name), source };
    let mut file = open(name).map_err(unreadable)?;
    let mut sum = CRC.digest();
    let mut left = size;
    while left > 0 {
        let wanted = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let n = match file.read(&mut buffer[..wanted]) {
            Ok(0) => return Err(SplitError::Changed { name: shown(name) }),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(unreadable(e)),
        };
        sum.update(&buffer[..n]);
        out.write_all(&buffer[..n]).map_err(SplitError::Output)?;
        left -= n as u64;
    }
    Ok(sum.finalize())
}

/// A name as it is shown in messages.
fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `hello\n` has the CRC-64/ISO that Go's hash/crc64 gives, as tar-split stores it.
    fn split(size: i64, name: &str, sum: u64) -> String {
        let base64 = |bytes: &[u8]| STANDARD.encode(bytes);
        format!(
            "{{\"type\":2,\"payload\":\"{}\",\"position\":0}}\n\
             {{\"type\":1,{name},\"size\":{size},\"payload\":\"{}\",\"position\":1}}\n\
             {{\"type\":1,\"name\":\"empty\",\"payload\":null,\"position\":2}}\n\
             {{\"type\":2,\"payload\":\"{}\",\"position\":3}}\n",
            base64(b"head"),
            base64(&sum.to_be_bytes()),
            base64(b"tail")
        )
    }

    fn made(split: &str, files: &[(&[u8], &[u8])]) -> Result<Vec<u8>, SplitError> {
        let mut out = Vec::new();
        let open = |name: &[u8]| {
            let found = files.iter().find(|(n, _)| *n == name);
            found.map(|(_, data)| *data).ok_or(io::ErrorKind::NotFound.into())
        };
        let total = rebuild(split.as_bytes(), open, &mut out)?;
        assert_eq!(total, out.len() as u64);
        Ok(out)
    }

    #[test]
    fn the_checksum_is_the_one_of_tar_split() {
        // Check value of CRC-64/GO-ISO.
        assert_eq!(CRC.checksum(b"123456789"), 0xb909_56c7_75a4_1001);
    }

    #[test]
    fn segments_and_files_make_the_tar() {
        let sum = CRC.checksum(b"hello\n");
        let tar = made(&split(6, "\"name\":\"a/b\"", sum), &[(b"a/b", b"hello\nand more")]).unwrap();
        assert_eq!(tar, b"headhello\ntail");
        let raw = STANDARD.encode(b"\xff\xfe");
        let tar = made(&split(6, &format!("\"name_raw\":\"{raw}\""), sum), &[(b"\xff\xfe", b"hello\n")]);
        assert_eq!(tar.unwrap(), b"headhello\ntail");
        assert_eq!(made("", &[]).unwrap(), b"");
    }

    #[test]
    fn damage_is_told_with_its_place() {
        let good = split(6, "\"name\":\"f\"", CRC.checksum(b"hello\n"));
        let said = |split: &str, data: &[u8]| made(split, &[(b"f", data)]).unwrap_err().to_string();
        assert!(said(&good, b"hellO\n").contains("'f' was changed"));
        assert!(said(&good, b"hell").contains("'f' was changed"));
        assert!(made(&good, &[]).unwrap_err().to_string().contains("'f' cannot be read"));
        for (from, to, place) in [
            ("\"size\":6", "\"size\":-6", "entry 1"),
            ("\"type\":2", "\"type\":3", "entry 0"),
            ("\"position\":3", "\"position\":2", "entry 3"),
            ("\"payload\":\"aGVhZA==\"", "\"payload\":\"a\"", "entry 0"),
            ("{\"type\":1,\"name\":\"empty\"", "nonsense", "entry 2"),
        ] {
            assert!(good.contains(from), "{from}");
            assert!(said(&good.replace(from, to), b"hello\n").contains(place), "{from}");
        }
    }
}
