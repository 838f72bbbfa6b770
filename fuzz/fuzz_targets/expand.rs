//! Any bytes as a compressed stream, and changed ones of sound streams: plain bytes within the limit, or an error.
//! And any bytes as a plain stream, which must come back.
//!
//! ```text
//!   input:  0 │ stream                1, 2 │ u16 offset │ u8 value │ u16 offset │ u8 value │ …  of a sound gzip, zstd
//!           3, 4 │ plain bytes for gzip, zstd
//! ```
#![no_main]

use bound::Limit;
use libfuzzer_sys::fuzz_target;
use std::{
    io::{self, Write},
    sync::LazyLock,
};
use svm_agent::recode::{compress, expand};
use svm_protocol::{Compression, ErrorKind, ExpandLimits};

mod bound;

/// Buffers and a decoder's state, once; a stream of plain bytes is held by the target itself. The library of zstd has an
/// allocator of its own, whose use the window bounds.
const LIMIT: Limit = Limit { held: (4 << 20, 64), asked: (8 << 20, 256), disk: (0, 0), steps: (4096, 8) };
/// Most plain bytes.
const OUTPUT: u64 = 4 << 20;
/// 2 MiB, the window of the level at which this project compresses.
const WINDOW_LOG: u32 = 21;

static PLAIN: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..6000u32).map(|n| (n.wrapping_mul(n) >> 5) as u8 & 0x3f).collect());

/// Several members or frames.
static SOUND: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| {
    let skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc";
    [Compression::Gzip, Compression::Zstd].map(|format| {
        let mut stream = Vec::new();
        for part in [&PLAIN[..], b"second"] {
            compress(&mut &part[..], format, format.level(), &mut stream).expect("a sound stream");
            if format == Compression::Zstd {
                stream.extend_from_slice(skippable);
            }
        }
        stream
    })
});

/// Counts the bytes, and keeps those of a sound stream.
struct Out(u64, Vec<u8>);

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        if self.1.len() < 2 * PLAIN.len() {
            self.1.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|input: &[u8]| {
    LazyLock::force(&SOUND);
    LIMIT.hold(input.len(), || one(input));
});

fn one(input: &[u8]) {
    let Some((&kind, rest)) = input.split_first() else { return };
    match kind {
        1 | 2 => {
            let mut stream = SOUND[usize::from(kind) - 1].clone();
            for change in rest.chunks_exact(3) {
                let offset = usize::from(u16::from_le_bytes([change[0], change[1]])) % stream.len();
                stream[offset] = change[2];
            }
            let format = [Compression::Gzip, Compression::Zstd][usize::from(kind) - 1];
            if let Some(found) = expanded(&stream, Some(format)) {
                // Checksums of 32 bits do not hold up a fuzzer that looks for it, but it changes a few bytes only.
                let sound = stream == SOUND[usize::from(kind) - 1];
                assert!(
                    !sound || found.1 == [&PLAIN[..], b"second"].concat(),
                    "other bytes of a sound stream"
                );
            }
        }
        3 | 4 => {
            let format = [Compression::Gzip, Compression::Zstd][usize::from(kind) - 3];
            let mut stream = Vec::new();
            compress(&mut &rest[..], format, format.level(), &mut stream)
                .expect("any bytes can be compressed");
            let found = expanded(&stream, None).expect("a stream of our own");
            assert!(
                found.0 == rest.len() as u64 && rest.starts_with(&found.1[..found.1.len().min(rest.len())])
            );
        }
        _ => {
            expanded(rest, None);
        }
    }
}

fn expanded(stream: &[u8], format: Option<Compression>) -> Option<Out> {
    let limits = ExpandLimits { output_bytes: OUTPUT, window_log: WINDOW_LOG };
    let mut out = Out(0, Vec::new());
    let result = expand(&mut &stream[..], format, &limits, &mut out);
    assert!(out.0 <= OUTPUT, "{} bytes, more than the limit", out.0);
    match result {
        Ok(summary) => {
            assert_eq!((summary.bytes_in, summary.bytes_out), (stream.len() as u64, out.0));
            Some(out)
        }
        Err(e) => {
            let known = [ErrorKind::Corrupt, ErrorKind::Unsupported, ErrorKind::Limit];
            assert!(known.contains(&e.kind), "{:?}: {e}", e.kind);
            None
        }
    }
}
