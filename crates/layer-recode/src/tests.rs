//! Expansion and compression of streams: round trips, members and frames, cuts at every byte, limits, and bytes that must not
//! change with an update of a library.

use super::{
    Compression::{self, Gzip, Plain, Zstd},
    ExpandLimits, Expander, MAX_WINDOW_LOG, PIECE_BYTES, RecodeError, RecodeSummary, compress, expand, sniff,
};
use sha2::{Digest, Sha256};
use std::io::{self, Read};

/// What callers tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ErrorKind {
    Corrupt,
    Unsupported,
    Limit,
    Usage,
    Cancelled,
    Other,
}

fn kind(error: &RecodeError) -> ErrorKind {
    match error {
        RecodeError::Corrupt { .. } => ErrorKind::Corrupt,
        RecodeError::Unsupported { .. } => ErrorKind::Unsupported,
        RecodeError::Output(_) | RecodeError::Window { .. } | RecodeError::Memory { .. } => ErrorKind::Limit,
        RecodeError::Usage(_) => ErrorKind::Usage,
        RecodeError::Read(_) | RecodeError::Write(_) => ErrorKind::Cancelled,
        RecodeError::Internal(_) => ErrorKind::Other,
    }
}

/// Gives at most so many bytes per read.
struct Chunks<'a>(&'a [u8], usize);

impl Read for Chunks<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.1.min(buf.len());
        self.0.read(&mut buf[..n])
    }
}

const NO_LIMIT: ExpandLimits = ExpandLimits { output_bytes: u64::MAX, window_log: MAX_WINDOW_LOG };

fn packed(plain: &[u8], format: Compression, level: u32, chunk: usize) -> Vec<u8> {
    let mut out = Vec::new();
    let summary = compress(&mut Chunks(plain, chunk), format, level, &mut out).unwrap();
    let (bytes_in, bytes_out) = (plain.len() as u64, out.len() as u64);
    assert_eq!(summary, RecodeSummary { format, bytes_in, bytes_out });
    out
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    packed(plain, Gzip, Gzip.level(), usize::MAX)
}

fn zstd(plain: &[u8]) -> Vec<u8> {
    packed(plain, Zstd, Zstd.level(), usize::MAX)
}

fn unpacked(packed: &[u8], format: Option<Compression>) -> Result<(Vec<u8>, RecodeSummary), RecodeError> {
    let mut out = Vec::new();
    let summary = expand(&mut Chunks(packed, usize::MAX), format, &NO_LIMIT, &mut out)?;
    assert_eq!((summary.bytes_in, summary.bytes_out), (packed.len() as u64, out.len() as u64));
    Ok((out, summary))
}

/// The plain bytes of a stream whose kind is found out.
fn plain(packed: &[u8]) -> Result<Vec<u8>, RecodeError> {
    unpacked(packed, None).map(|(bytes, _)| bytes)
}

/// Bytes of which parts repeat near, far or not at all, the same on every run.
fn sample(len: usize) -> Vec<u8> {
    let mut state = 0x1234_5678_9abc_def1u64;
    let mut noise = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u8
    };
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        match bytes.len() >> 12 & 3 {
            0 => bytes.extend(format!("usr/lib/file-{:07}.so ", bytes.len() / 977).bytes()),
            1 => bytes.extend((0..512).map(|_| noise())),
            2 => bytes.extend([0; 512]),
            _ => bytes.extend((0..64).map(|n| n ^ noise() & 3)),
        }
    }
    bytes.truncate(len);
    bytes
}

/// A frame of another program's data: RFC 8878, section 3.1.2.
fn skippable(number: u8, content: &[u8]) -> Vec<u8> {
    let len = (content.len() as u32).to_le_bytes();
    [&[0x50 + number, 0x2a, 0x4d, 0x18][..], &len, content].concat()
}

#[test]
fn what_is_compressed_expands_to_the_same_bytes_and_chunks_leave_no_trace() {
    for len in [0, 1, 3, 4, 5, 1000, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3_000_001] {
        let bytes = sample(len);
        for format in [Plain, Gzip, Zstd] {
            let whole = packed(&bytes, format, format.level(), usize::MAX);
            for chunk in [1, 7, 4096, 100_003] {
                if chunk > 1 || len < 10_000 {
                    assert!(packed(&bytes, format, format.level(), chunk) == whole, "{format} {len} {chunk}");
                }
            }
            for (asked, chunk) in [(None, 1), (Some(format), 4097), (None, usize::MAX)] {
                let mut out = Vec::new();
                let found = expand(&mut Chunks(&whole, chunk), asked, &NO_LIMIT, &mut out).unwrap();
                assert!(out == bytes, "{format} {len} {chunk}");
                let (bytes_in, bytes_out) = (whole.len() as u64, len as u64);
                assert_eq!(found, RecodeSummary { format, bytes_in, bytes_out });
            }
        }
    }
}

/// An update of `flate2`, `zlib-rs` or `zstd` that fails this changes what `docker push` uploads for a layer that was
/// pushed before: it needs the same decision as a change of the canonical format.
#[test]
fn compressed_bytes_are_frozen() {
    /// Of the sample, and of what gzip and zstd make of it.
    const FROZEN: [&str; 3] = [
        "sha256:7fbbad16a681f4e50948cd94d5c6caa43f960fca81be7273b31cdf993767ffe9",
        "sha256:dc489b0c7a1c493d04c8fcd5f323011e71db330a4616fff5010fb90230e3dd54",
        "sha256:39125d118b320deed4881cdd923cb84058e9100ffe58e95ef85923486c8cedcb",
    ];
    let bytes = sample(3_000_001);
    let digest = |bytes: &[u8]| {
        let digest = Sha256::digest(bytes);
        digest.iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
    };
    let found = [&bytes, &gzip(&bytes), &zstd(&bytes)].map(|bytes| digest(bytes));
    assert_eq!(found, FROZEN);
    assert_eq!(gzip(b"")[..10], *b"\x1f\x8b\x08\0\0\0\0\0\0\xff");
}

#[test]
fn every_level_of_a_format_works_and_others_are_refused() {
    let bytes = sample(300_000);
    for (format, levels) in [(Gzip, 1..=9), (Zstd, 1..=19)] {
        for level in levels.clone() {
            assert!(plain(&packed(&bytes, format, level, 9999)).unwrap() == bytes, "{format} {level}");
        }
        for level in [0, levels.end() + 1, u32::MAX] {
            let e = compress(&mut &bytes[..], format, level, &mut io::sink()).unwrap_err();
            assert_eq!(kind(&e), ErrorKind::Usage, "{e}");
        }
    }
}

#[test]
fn several_members_and_frames_are_one_stream() {
    let (a, b) = (sample(70_000), sample(1234));
    let both = [&a[..], &b].concat();
    for stream in [
        [gzip(&a), gzip(&b)].concat(),
        [gzip(&a), gzip(b""), gzip(&b)].concat(),
        [zstd(&a), zstd(&b)].concat(),
        [skippable(0, b""), zstd(&a), skippable(15, &vec![7; 300_000]), zstd(b""), zstd(&b)].concat(),
        [zstd(&a), zstd(&b), skippable(3, b"index")].concat(),
    ] {
        assert!(plain(&stream).unwrap() == both);
    }
    assert_eq!(plain(&skippable(9, b"alone")).unwrap(), b"");
}

#[test]
fn zeros_may_follow_a_gzip_stream_and_nothing_else_may() {
    let stream = gzip(b"text");
    for zeros in [1, 9, 10, 512, 1 << 20] {
        assert_eq!(plain(&[&stream[..], &vec![0; zeros]].concat()).unwrap(), b"text");
        for behind in [&b"x"[..], &stream, b"\x1f\x8b"] {
            let e = plain(&[&stream[..], &vec![0; zeros], behind].concat()).unwrap_err();
            assert_eq!(kind(&e), ErrorKind::Corrupt);
            let place = format!("garbage after a member, at byte {}", stream.len() + zeros);
            assert!(e.to_string().ends_with(&place), "{e}");
        }
    }
    for (stream, garbage) in
        [(&stream, &b"garbage garbage"[..]), (&zstd(b"text"), b"garbage"), (&zstd(b"text"), &[0; 9])]
    {
        let e = plain(&[stream, garbage].concat()).unwrap_err();
        assert_eq!(kind(&e), ErrorKind::Corrupt, "{e}");
    }
}

#[test]
fn fields_of_a_gzip_header_are_skipped_and_checked() {
    let stream = gzip(b"text");
    let member = |method: u8, flags: u8, fields: &[u8]| {
        [&[0x1f, 0x8b, method, flags, 1, 2, 3, 4, 2, 3][..], fields, &stream[10..]].concat()
    };
    let extra = [&[0xff, 0xff][..], &vec![0x1f; 0xffff]].concat();
    let name = [vec![b'n'; 300_000], vec![0]].concat();
    for (flags, fields) in [
        (0, vec![]),
        (1, vec![]),
        (1 << 2, vec![0, 0]),
        (1 << 2, extra.clone()),
        (1 << 3, name.clone()),
        (1 << 4, vec![0]),
        (0b1_1100, [&extra[..], &name, b"comment\0"].concat()),
    ] {
        assert_eq!(plain(&member(8, flags, &fields)).unwrap(), b"text", "{flags:#b}");
        // With the checksum of the header, right and wrong.
        let mut head = member(8, flags | 1 << 1, &fields);
        head.truncate(10 + fields.len());
        let mut crc = flate2::Crc::new();
        crc.update(&head);
        let crc = (crc.sum() as u16).to_le_bytes();
        assert_eq!(plain(&[&head[..], &crc, &stream[10..]].concat()).unwrap(), b"text", "{flags:#b}");
        let e = plain(&[&head[..], &[crc[0] ^ 1, crc[1]], &stream[10..]].concat()).unwrap_err();
        assert!(kind(&e) == ErrorKind::Corrupt && e.to_string().contains("header checksum"), "{e}");
    }
    for bad in [member(7, 0, b""), member(8, 0x20, b""), member(8, 0x80, b"")] {
        assert_eq!(kind(&plain(&bad).unwrap_err()), ErrorKind::Unsupported);
    }
}

#[test]
fn a_stream_that_was_cut_anywhere_is_corrupt_and_says_where() {
    let (a, b) = (sample(5000), sample(300));
    let named = {
        let stream = gzip(&a);
        [&[0x1f, 0x8b, 8, 1 << 3, 0, 0, 0, 0, 0, 3][..], b"name\0", &stream[10..]].concat()
    };
    for (format, parts) in
        [(Gzip, vec![named, gzip(&b)]), (Zstd, vec![zstd(&a), skippable(1, &[7; 40]), zstd(&b)])]
    {
        let ends: Vec<usize> = parts
            .iter()
            .scan(0, |at, part| {
                *at += part.len();
                Some(*at)
            })
            .collect();
        let stream = parts.concat();
        for cut in 0..stream.len() {
            let result = unpacked(&stream[..cut], Some(format));
            if ends.contains(&cut) {
                assert!(result.is_ok(), "{format} at {cut}");
                continue;
            }
            let e = result.unwrap_err();
            assert!(
                kind(&e) == ErrorKind::Corrupt && e.to_string().contains("cut off"),
                "{format} at {cut}: {e}"
            );
            assert!(e.to_string().ends_with(&format!("at byte {cut}")), "{format} at {cut}: {e}");
        }
    }
}

#[test]
fn a_changed_byte_never_gives_other_bytes() {
    let bytes = &sample(8000)[3000..];
    for stream in [[gzip(bytes), gzip(b"second")].concat(), [zstd(bytes), zstd(b"second")].concat()] {
        let expected = [bytes, b"second"].concat();
        let format = sniff(&stream);
        let mut refused = 0;
        for at in 0..stream.len() {
            for bit in 0..8 {
                let mut changed = stream.clone();
                changed[at] ^= 1 << bit;
                match unpacked(&changed, Some(format)) {
                    Ok((found, _)) => assert!(found == expected, "{format} byte {at} bit {bit}"),
                    Err(e) => {
                        let known = [ErrorKind::Corrupt, ErrorKind::Unsupported, ErrorKind::Limit];
                        assert!(known.contains(&kind(&e)), "{format} byte {at} bit {bit}: {e}");
                        refused += 1;
                    }
                }
            }
        }
        assert!(refused > stream.len() * 7, "{format}: {refused}");
    }
}

#[test]
fn a_checksum_that_differs_is_corrupt() {
    let bytes = sample(3000);
    for (stream, behind, what) in [
        (gzip(&bytes), 8, "checksum mismatch"),
        (gzip(&bytes), 4, "length mismatch"),
        (zstd(&bytes), 4, "checksum"),
    ] {
        let mut changed = stream.clone();
        let at = stream.len() - behind;
        changed[at] ^= 1;
        let e = plain(&changed).unwrap_err();
        assert!(kind(&e) == ErrorKind::Corrupt && e.to_string().contains(what), "{e}");
    }
}

/// Counts what passes; 10 GB do not fit memory.
struct Count(u64, usize);

impl io::Write for Count {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        (self.0, self.1) = (self.0 + buf.len() as u64, self.1.max(buf.len()));
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_bomb_is_stopped_at_the_limit() {
    const LIMIT: u64 = 64 << 20;
    let zeros = vec![0; 16 << 20];
    for member in [gzip(&zeros), zstd(&zeros)] {
        let stream = member.repeat(640);
        let (mut input, mut out) = (&stream[..], Count(0, 0));
        let e = expand(&mut input, None, &ExpandLimits::of_output(LIMIT), &mut out).unwrap_err();
        assert!(kind(&e) == ErrorKind::Limit && e.to_string().contains(&LIMIT.to_string()), "{e}");
        assert!(out.0 <= LIMIT && out.1 <= PIECE_BYTES, "{} bytes came out", out.0);
        assert!(stream.len() - input.len() <= PIECE_BYTES.max(5 * member.len()), "the rest was read");
    }
    // Exactly the limit is allowed, of any kind.
    let bytes = sample(300_000);
    for stream in [bytes.clone(), gzip(&bytes), zstd(&bytes)] {
        for (limit, good) in [(300_000, true), (299_999, false), (0, false)] {
            let result = expand(&mut &stream[..], None, &ExpandLimits::of_output(limit), &mut io::sink());
            assert_eq!(result.as_ref().err().map(kind), (!good).then_some(ErrorKind::Limit));
        }
    }
}

#[test]
fn a_window_beyond_the_limit_is_refused() {
    // A frame with a window of 2^31, 2^28, 2^27 and 2^20 bytes: RFC 8878, section 3.1.1.1.2; one empty last block.
    let frame = |log: u8| vec![0x28, 0xb5, 0x2f, 0xfd, 0, (log - 10) << 3, 1, 0, 0];
    for (log, limit, good) in
        [(31, 27, false), (28, 27, false), (27, 27, true), (20, 27, true), (20, 19, false)]
    {
        let limits = ExpandLimits { window_log: limit, ..NO_LIMIT };
        let result = expand(&mut &frame(log)[..], None, &limits, &mut io::sink());
        assert_eq!(result.as_ref().err().map(kind), (!good).then_some(ErrorKind::Limit), "{log}: {result:?}");
    }
    for window_log in [0, 9, 32, u32::MAX] {
        let limits = ExpandLimits { window_log, ..NO_LIMIT };
        let e = expand(&mut &frame(20)[..], None, &limits, &mut io::sink()).unwrap_err();
        assert_eq!(kind(&e), ErrorKind::Usage);
    }
}

#[test]
fn a_frame_that_needs_a_dictionary_is_unsupported() {
    // Its number, 1, is in the header: RFC 8878, section 3.1.1.1.3.
    let e = plain(&[0x28, 0xb5, 0x2f, 0xfd, 0b01, 0x50, 1, 1, 0, 0]).unwrap_err();
    assert_eq!(kind(&e), ErrorKind::Unsupported, "{e}");
}

#[test]
fn an_input_or_output_that_fails_cancels() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }
    impl io::Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let bytes = sample(3_000_000);
    for format in [Plain, Gzip, Zstd] {
        let stream = packed(&bytes, format, format.level(), usize::MAX);
        let half = &stream[..stream.len() / 2];
        let cancelled = [
            expand(&mut half.chain(Broken), None, &NO_LIMIT, &mut io::sink()),
            expand(&mut &stream[..], None, &NO_LIMIT, &mut Broken),
            compress(&mut half.chain(Broken), format, format.level(), &mut io::sink()),
            compress(&mut &bytes[..], format, format.level(), &mut Broken),
        ];
        for result in cancelled {
            assert_eq!(kind(&result.unwrap_err()), ErrorKind::Cancelled);
        }
    }
}

#[test]
fn a_reader_may_take_what_it_likes_and_gets_no_end_before_the_checks() {
    let bytes = sample(300_000);
    for format in [Plain, Gzip, Zstd] {
        let stream = packed(&bytes, format, format.level(), usize::MAX);
        for piece in [1, 13, 4096, 1 << 20] {
            let mut expander = Expander::new(Chunks(&stream, 100_003), None, &NO_LIMIT).unwrap();
            assert_eq!(expander.format(), format);
            let (mut found, mut buffer) = (Vec::new(), vec![0; piece]);
            assert_eq!(expander.read(&mut []).unwrap(), 0);
            loop {
                let n = expander.read(&mut buffer).unwrap();
                found.extend_from_slice(&buffer[..n]);
                if n == 0 {
                    break;
                }
            }
            assert!(found == bytes, "{format} {piece}");
            assert_eq!(expander.read(&mut buffer).unwrap(), 0);
            let (bytes_in, bytes_out) = (stream.len() as u64, bytes.len() as u64);
            assert_eq!(expander.summary(), RecodeSummary { format, bytes_in, bytes_out });
        }
    }
    // The last bytes of the data are there, but their checksum is wrong: all reads fail from then on.
    let mut stream = gzip(&bytes);
    let crc = stream.len() - 8;
    stream[crc] ^= 1;
    let mut expander = Expander::new(&stream[..], None, &NO_LIMIT).unwrap();
    let e = expander.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::InvalidData);
    let inner = e.get_ref().unwrap().downcast_ref::<RecodeError>().unwrap();
    assert_eq!(kind(inner), ErrorKind::Corrupt);
    assert!(expander.read(&mut [0]).is_err());
}
