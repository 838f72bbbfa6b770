//! The tar that comes in: a file or standard input, packed or not, with a progress bar on a terminal.
//!
//! ```text
//!   file, stdin ──► bytes counted for the bar ──► first bytes looked at ──► gzip │ zstd │ as it is ──► tar
//! ```

use super::failure::{failed, shown};
use crate::cli::CliError;
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    fs::File,
    io::{self, BufReader, Cursor, IsTerminal, Read},
    path::Path,
};

/// Bytes read at a time from a packed input.
const BUFFER: usize = 256 << 10;
/// Bytes of the head that tell the kinds apart.
const HEAD: usize = 6;

/// How the input is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Packing {
    None,
    Gzip,
    Zstd,
}

/// A kind of packing that is known by its first bytes but not read: what unpacks it.
const FOREIGN: &[(&[u8], &str)] = &[
    (b"\xFD7zXZ\0", "xz -dc"),
    (b"BZh", "bzip2 -dc"),
    (b"\x04\x22\x4D\x18", "lz4 -dc"),
    (b"\x1F\x9D", "gzip -dc"),
    (b"PK\x03\x04", "unzip -p"),
];

/// The opened input.
pub(super) struct Input {
    pub(super) tar: Box<dyn Read>,
    pub(super) packing: Packing,
    pub(super) bar: ProgressBar,
}

/// Opens the input and finds out how it is packed.
pub(super) fn open(path: &Path) -> Result<Input, CliError> {
    let file = if path.as_os_str() == "-" {
        if io::stdin().is_terminal() {
            return Err("standard input is a terminal: pipe a tar into it, or name a file".into());
        }
        standard_input().map_err(|e| failed("read", path, &e))?
    } else {
        File::open(path).map_err(|e| failed("open", path, &e))?
    };
    let metadata = file.metadata().map_err(|e| failed("open", path, &e))?;
    if metadata.is_dir() {
        return Err(format!(
            "{0} is a folder, not a tar: make one with `tar -C {0} -c . | lcow-graphdriver layer pack - OUT.vhd`",
            shown(path)
        )
        .into());
    }
    let bar = bar(metadata.is_file().then_some(metadata.len()));
    let mut raw = bar.wrap_read(file);
    let mut head = Vec::with_capacity(HEAD);
    let begun = raw.by_ref().take(HEAD as u64).read_to_end(&mut head);
    begun.map_err(|e| failed("read", path, &e))?;
    if let Some((_, tool)) = FOREIGN.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Err(format!(
            "{} is packed in a way that is not read here: `{tool} {} | lcow-graphdriver layer pack - OUT.vhd`",
            shown(path),
            path.display()
        )
        .into());
    }
    let packing = packing(&head);
    let whole = Cursor::new(head).chain(raw);
    let tar: Box<dyn Read> = match packing {
        Packing::None => Box::new(whole),
        Packing::Gzip => {
            Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::with_capacity(BUFFER, whole)))
        }
        Packing::Zstd => Box::new(
            zstd::stream::read::Decoder::with_buffer(BufReader::with_capacity(BUFFER, whole))
                .map_err(|e| failed("unpack", path, &e))?,
        ),
    };
    Ok(Input { tar, packing, bar })
}

/// Standard input as a file: read without a lock and a buffer between.
fn standard_input() -> io::Result<File> {
    #[cfg(unix)]
    let own = std::os::fd::AsFd::as_fd(&io::stdin()).try_clone_to_owned()?;
    #[cfg(windows)]
    let own = std::os::windows::io::AsHandle::as_handle(&io::stdin()).try_clone_to_owned()?;
    Ok(own.into())
}

fn packing(head: &[u8]) -> Packing {
    // A zstd stream may begin with a skippable frame: 0x184D2A50 to 0x184D2A5F.
    let skippable = matches!(head, [0x50..=0x5F, 0x2A, 0x4D, 0x18, ..]);
    if head.starts_with(&[0x1F, 0x8B]) {
        Packing::Gzip
    } else if head.starts_with(&[0x28, 0xB5, 0x2F, 0xFD]) || skippable {
        Packing::Zstd
    } else {
        Packing::None
    }
}

/// A bar on standard error; invisible where that is no terminal. Without a length it counts only.
pub(super) fn bar(length: Option<u64>) -> ProgressBar {
    let (bar, template) = match length {
        Some(length) => (
            ProgressBar::new(length),
            "{wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
        ),
        None => (ProgressBar::no_length(), "{spinner} {binary_bytes} {binary_bytes_per_sec} {elapsed}"),
    };
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packings_are_known_by_their_first_bytes() {
        for (head, expected) in [
            (&b"\x1F\x8B\x08\0\0\0"[..], Packing::Gzip),
            (b"\x28\xB5\x2F\xFD\x04\0", Packing::Zstd),
            (b"\x53\x2A\x4D\x18\0\0", Packing::Zstd),
            (b"./\0\0\0\0", Packing::None),
            (b"(", Packing::None),
            (b"", Packing::None),
        ] {
            assert_eq!(packing(head), expected, "{head:?}");
        }
        assert!(FOREIGN.iter().all(|(magic, _)| magic.len() <= HEAD));
    }
}
