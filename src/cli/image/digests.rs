//! The digests that `pack` left beside a disk, to compare another disk with: what each file of the image holds.
//!
//! ```text
//!   OUT.json         version, image: the layers by their diff ids ─► those of --base?
//!   OUT.b3sums.zst   path ─► BLAKE3 (the form is in `files`)       ─► of each path
//! ```
//!
//! Called by `commit`.

use super::{
    files::{FILES_SUFFIX, JSON_SUFFIX},
    open::Opened,
    pack::DESCRIPTION_VERSION,
};
use crate::cli::{
    CliError, confined,
    layer::failure::{failed, shown},
};
use serde::Deserialize;
use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

/// Largest description that is read; an image's configuration is at most this long.
const MAX_DESCRIPTION: u64 = 8 << 20;
/// Longest line: twice the longest path, whose bytes may be escaped.
const MAX_LINE: u64 = 160 << 10;
/// Plain bytes of a list.
const MAX_LIST: u64 = 4 << 30;
/// Base-2 logarithm of the largest window of zstd; lists have small ones.
const WINDOW_LOG: u32 = 24;
/// Digits of a digest.
const DIGITS: usize = 64;

/// What is read of OUT.json.
#[derive(Debug, Deserialize)]
struct Description {
    version: u32,
    image: DescribedImage,
    files_listed: u64,
}

#[derive(Debug, Deserialize)]
struct DescribedImage {
    config_digest: String,
    layers: Vec<DescribedLayer>,
}

#[derive(Debug, Deserialize)]
struct DescribedLayer {
    diff_id: String,
}

/// BLAKE3 of the files of an image, by path.
#[derive(Debug)]
pub(super) struct BaseDigests(HashMap<Vec<u8>, [u8; 32]>);

/// The description beside a list.
pub(super) fn description_of(list: &Path) -> Result<PathBuf, CliError> {
    let name = list.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let stem = name.strip_suffix(FILES_SUFFIX).filter(|stem| !stem.is_empty()).ok_or_else(|| {
        format!("{} does not end with {FILES_SUFFIX}; name the list that `image pack` left", shown(list))
    })?;
    Ok(list.with_file_name(format!("{stem}{JSON_SUFFIX}")))
}

fn open(path: &Path) -> Result<File, CliError> {
    confined::open(path).unwrap_or_else(|| File::open(path)).map_err(|e| failed("open", path, &e))
}

impl BaseDigests {
    /// Reads a list, and the description beside it, which must be those of the image; at most `entries` lines.
    pub(super) fn read(list: &Path, base: &Opened, entries: usize) -> Result<Self, CliError> {
        let description = description_of(list)?;
        let mut text = Vec::new();
        let file = open(&description)?.take(MAX_DESCRIPTION + 1);
        BufReader::new(file).read_to_end(&mut text).map_err(|e| failed("read", &description, &e))?;
        if text.len() as u64 > MAX_DESCRIPTION {
            return Err(format!("{} is too long to be what `image pack` left", shown(&description)).into());
        }
        let known: Description =
            serde_json::from_slice(&text).map_err(|e| failed("read", &description, &e))?;
        if known.version != DESCRIPTION_VERSION {
            return Err(format!(
                "{} has version {}; {DESCRIPTION_VERSION} is known",
                shown(&description),
                known.version
            )
            .into());
        }
        let layers = base.image.layers().iter().map(|layer| layer.diff_id.to_string());
        if !layers.eq(known.image.layers.into_iter().map(|layer| layer.diff_id)) {
            let other =
                known.image.config_digest.chars().take(80).collect::<String>().escape_debug().to_string();
            return Err(format!(
                "{} belongs to another image ({other}) than {} ({})",
                shown(&description),
                base.name,
                base.image.config().digest
            )
            .into());
        }
        let digests = parse(open(list)?, entries).map_err(|e| failed("read", list, &e))?;
        if digests.len() as u64 != known.files_listed {
            return Err(format!(
                "{} has {} files, and {} has {}; one of them was changed",
                shown(list),
                digests.len(),
                shown(&description),
                known.files_listed
            )
            .into());
        }
        Ok(Self(digests))
    }

    /// The digest of the file at a path; `None` for a file that has none, because of its holes, or is not there.
    pub(super) fn get(&self, path: &[u8]) -> Option<[u8; 32]> {
        self.0.get(path).copied()
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

fn parse(file: impl Read, entries: usize) -> io::Result<HashMap<Vec<u8>, [u8; 32]>> {
    let mut plain = zstd::stream::read::Decoder::new(file)?;
    plain.window_log_max(WINDOW_LOG)?;
    let mut lines = BufReader::new(plain.take(MAX_LIST));
    let (mut digests, mut line) = (HashMap::new(), Vec::new());
    loop {
        line.clear();
        if lines.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)? == 0 {
            return Ok(digests);
        }
        let (path, digest) = entry(&line).ok_or_else(|| bad("a line is not in the form of b3sum"))?;
        if digests.insert(path, digest).is_some() {
            return Err(bad("a file is listed twice"));
        }
        if digests.len() > entries {
            return Err(bad("more files than are accepted; raise --max-entries"));
        }
    }
}

/// Path and digest of a line.
fn entry(line: &[u8]) -> Option<(Vec<u8>, [u8; 32])> {
    let line = line.strip_suffix(b"\n")?;
    let (line, escaped) = line.strip_prefix(b"\\").map_or((line, false), |line| (line, true));
    let (digits, rest) = line.split_at_checked(DIGITS)?;
    let digest = blake3::Hash::from_hex(digits).ok()?;
    let path = rest.strip_prefix(b"  ").filter(|path| !path.is_empty())?;
    let path = if escaped { unescaped(path)? } else { path.to_vec() };
    Some((path, *digest.as_bytes()))
}

fn unescaped(path: &[u8]) -> Option<Vec<u8>> {
    let mut plain = Vec::with_capacity(path.len());
    let mut bytes = path.iter();
    while let Some(byte) = bytes.next() {
        plain.push(match byte {
            b'\\' => match bytes.next()? {
                b'n' => b'\n',
                b'\\' => b'\\',
                _ => return None,
            },
            byte => *byte,
        });
    }
    Some(plain)
}

#[cfg(test)]
mod tests {
    use super::{super::files::FileList, *};
    use layer_codec::flat::FlatFile;

    #[test]
    fn a_list_is_read_as_it_was_written() {
        let mut out = Vec::new();
        let mut list = FileList::new(&mut out).unwrap();
        let names: [&[u8]; 4] = [b"etc/passwd", b"a\\b\nc", b"\xff", b"  x "];
        for (n, path) in names.iter().enumerate() {
            list.add(&FlatFile { path, size: 1, blake3: Some([n as u8; 32]) }).unwrap();
        }
        list.finish().unwrap();
        let read = parse(&out[..], 4).unwrap();
        assert_eq!(read.len(), 4);
        for (n, path) in names.iter().enumerate() {
            assert_eq!(read[*path], [n as u8; 32]);
        }
        assert!(parse(&out[..], 3).unwrap_err().to_string().contains("--max-entries"));
        assert!(parse(&out[..out.len() - 3], 4).is_err(), "cut");
        let digits = "ab".repeat(32);
        let twice = format!("{digits}  a\n{digits}  a\n");
        for plain in [
            twice.as_str(),
            "x",
            "\n",
            &format!("{digits}  a"),
            &format!("{digits} a\n"),
            &format!("{digits}  \n"),
        ] {
            assert!(parse(&zstd::encode_all(plain.as_bytes(), 1).unwrap()[..], 4).is_err(), "{plain:?}");
        }
    }

    #[test]
    fn the_description_lies_beside_the_list() {
        let beside = |list: &str| description_of(Path::new(list)).map_err(|e| e.to_string());
        assert_eq!(beside("d/app.img.b3sums.zst"), Ok("d/app.img.json".into()));
        assert!(beside("app.img").is_err() && beside("d/.b3sums.zst").is_err());
    }
}
