//! The input tar: a file or standard input, compressed or not, with a progress bar on a terminal.
//!
//! ```text
//!   file, stdin ──► bytes counted for the bar ──► first bytes examined ──► gzip │ zstd │ as it is ──► tar
//! ```

use super::failure::{failed, shown};
use crate::cli::{CliError, confined};
use flate2::bufread::GzDecoder;
#[cfg(target_os = "linux")]
use indicatif::ProgressDrawTarget;
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    fs::File,
    io::{self, BufRead, BufReader, Cursor, IsTerminal, Read},
    path::Path,
};

/// Bytes read at a time from a compressed input.
const BUFFER: usize = 256 << 10;
/// Bytes of the head that distinguish the kinds of compression.
const HEAD: usize = 6;

/// How the input is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Packing {
    None,
    Gzip,
    Zstd,
}

/// Compression formats that are recognized by their first bytes but not supported, with the command that decompresses
/// them.
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

/// Opens the input and detects its compression.
pub(super) fn open(path: &Path) -> Result<Input, CliError> {
    let file = if path.as_os_str() == "-" {
        refuse_terminal(path)?;
        confined::open(path).unwrap_or_else(standard_input).map_err(|e| failed("read", path, &e))?
    } else {
        open_file(path).map_err(|e| failed("open", path, &e))?
    };
    let metadata = file.metadata().map_err(|e| failed("open", path, &e))?;
    if metadata.is_dir() {
        return Err(format!(
            "{0} is a directory, not a tar; make one with `tar -C {0} -c . | lcow-graphdriver layer pack - OUT.vhd`",
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
            "{} has an unsupported compression; run `{tool} {} | lcow-graphdriver layer pack - OUT.vhd`",
            shown(path),
            path.display()
        )
        .into());
    }
    let packing = packing(&head);
    let whole = Cursor::new(head).chain(raw);
    let tar: Box<dyn Read> = match packing {
        Packing::None => Box::new(whole),
        Packing::Gzip => Box::new(Members::new(BufReader::with_capacity(BUFFER, whole))),
        Packing::Zstd => Box::new(
            zstd::stream::read::Decoder::with_buffer(BufReader::with_capacity(BUFFER, whole))
                .map_err(|e| failed("unpack", path, &e))?,
        ),
    };
    Ok(Input { tar, packing, bar })
}

/// Whether a tar would come from a terminal. A jailed process cannot see that, so its parent asks before.
pub(super) fn refuse_terminal(path: &Path) -> Result<(), CliError> {
    if path.as_os_str() == "-" && io::stdin().is_terminal() {
        return Err("standard input is a terminal; pipe a tar into it, or name a file".into());
    }
    Ok(())
}

/// Opens a file for reading; in a jailed process, its parent does.
pub(super) fn open_file(path: &Path) -> io::Result<File> {
    confined::open(path).unwrap_or_else(|| File::open(path))
}

/// The members of a gzip file, one after the other. Zeros after a member are skipped, as gzip and GNU tar do: they come
/// from tapes and from files that were padded to a block.
struct Members<R> {
    /// `None` between two members; the input is then in `rest`.
    member: Option<GzDecoder<R>>,
    rest: Option<R>,
}

impl<R: BufRead> Members<R> {
    fn new(input: R) -> Self {
        Self { member: Some(GzDecoder::new(input)), rest: None }
    }

    /// Advances to the next member; false if there is none.
    fn next(&mut self) -> io::Result<bool> {
        let Some(input) = &mut self.rest else { return Ok(false) };
        loop {
            let buffer = input.fill_buf()?;
            if buffer.is_empty() {
                return Ok(false);
            }
            let zeros = buffer.iter().take_while(|b| **b == 0).count();
            let last = zeros < buffer.len();
            input.consume(zeros);
            if last {
                break;
            }
        }
        self.member = self.rest.take().map(GzDecoder::new);
        Ok(true)
    }
}

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            if let Some(member) = &mut self.member {
                let n = member.read(buf)?;
                if n > 0 {
                    return Ok(n);
                }
                self.rest = self.member.take().map(GzDecoder::into_inner);
            }
            if !self.next()? {
                return Ok(0);
            }
        }
    }
}

/// Standard input as a file, read without a lock or a buffer in between.
pub(in crate::cli) fn standard_input() -> io::Result<File> {
    #[cfg(unix)]
    let own = std::os::fd::AsFd::as_fd(&io::stdin()).try_clone_to_owned()?;
    #[cfg(windows)]
    let own = std::os::windows::io::AsHandle::as_handle(&io::stdin()).try_clone_to_owned()?;
    let file = own.into();
    widen_pipe(&file);
    Ok(file)
}

/// Lets a pipe hold a MiB instead of 64 KiB, where the system allows it: both ends then wait for each other less often.
pub(in crate::cli) fn widen_pipe(file: &File) {
    #[cfg(target_os = "linux")]
    {
        /// What an unprivileged process may ask for (fs.pipe-max-size).
        const PIPE_BYTES: usize = 1 << 20;
        // Fails for anything but a pipe, and beyond the user's limit; the size then stays as it is.
        let _ = rustix::pipe::fcntl_setpipe_size(file, PIPE_BYTES);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = file;
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

/// A progress bar on standard error, hidden unless that is a terminal. Without a length it only counts.
pub(in crate::cli) fn bar(length: Option<u64>) -> ProgressBar {
    let (bar, template) = match length {
        Some(length) => (
            ProgressBar::new(length),
            "{wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
        ),
        None => (ProgressBar::no_length(), "{spinner} {binary_bytes} {binary_bytes_per_sec} {elapsed}"),
    };
    #[cfg(target_os = "linux")]
    if let Some(columns) = confined::columns() {
        bar.set_draw_target(ProgressDrawTarget::term_like(Box::new(confined::Blind { columns })));
    }
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_of_gzip_may_have_zeros_behind_them_and_nothing_else() {
        use std::io::Write;
        let member = |text: &[u8]| {
            let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            out.write_all(text).unwrap();
            out.finish().unwrap()
        };
        let read = |packed: &[u8]| {
            let mut out = Vec::new();
            // A member may end anywhere in a buffer.
            for capacity in [1, 7, BUFFER] {
                out.clear();
                Members::new(BufReader::with_capacity(capacity, packed)).read_to_end(&mut out)?;
            }
            Ok::<_, io::Error>(out)
        };
        for (between, behind) in [(0, 0), (0, 1), (1, 0), (512, 10_240), (3, 300_000)] {
            let packed =
                [member(b"one "), vec![0; between], member(b""), member(b"two"), vec![0; behind]].concat();
            assert_eq!(read(&packed).unwrap(), b"one two", "{between} {behind}");
        }
        assert!(read(&[member(b"one"), vec![0; 9], b"junk".to_vec()].concat()).is_err());
        let cut = member(b"one");
        assert!(read(&cut[..cut.len() - 1]).is_err());
    }

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
