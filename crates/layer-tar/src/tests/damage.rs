//! Streams that are cut, damaged, hostile, or no archive at all.

use super::*;
use proptest::prelude::*;
use std::io::{self, Read};

#[test]
fn streams_that_are_no_archive() {
    assert!(matches!(refused(b""), TarError::Empty));
    assert!(matches!(refused(b"x"), TarError::Truncated { .. }));
    assert!(matches!(refused(&[0; 511]), TarError::Truncated { .. }));
    assert!(matches!(refused(&[7; 4096]), TarError::Corrupt { offset: 0, .. }));
    assert!(matches!(refused(&[0x1f, 0x8b].repeat(600)), TarError::Corrupt { offset: 0, .. }));
}

#[test]
fn bad_archives_name_entry_and_place() {
    let first = || Builder::default().entry("first", b'0', b"x");
    let huge = |n: u64| header(b"bomb", b'x', n);
    let sparse =
        |records: &[(&str, &[u8])], data: &[u8]| first().pax(b'x', records).entry("s", b'0', data).end();
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        (
            "checksum",
            first()
                .block(&{
                    let mut b = header(b"a", b'0', 0);
                    b[0] = b'b';
                    b
                })
                .end(),
            "checksum",
        ),
        ("lone zero block", first().block(&[0; BLOCK]).entry("a", b'0', b"").end(), "lone zero block"),
        ("unknown type", first().entry("a", b'A', b"").end(), "type flag"),
        ("multi-volume", first().entry("a", b'M', b"").end(), "multi-volume"),
        ("bad mode", first().odd(header(b"a", b'0', 0), &[(100, b"000064x\0")]).end(), "bad mode"),
        ("negative size", first().odd(header(b"a", b'0', 0), &[(124, &[0xff; 12])]).end(), "bad size"),
        (
            "size past 2^63",
            first().odd(header(b"a", b'0', 0), &[(124, b"\x80\0\0\0\x80\0\0\0\0\0\0\0")]).end(),
            "bad size",
        ),
        (
            "uid that is no number",
            first().odd(header(b"a", b'0', 0), &[(108, b"000x750\0")]).end(),
            "bad owner",
        ),
        ("pax bomb", first().block(&huge(1 << 40)).end(), "extended header"),
        ("long name bomb", first().block(&header(b"a", b'L', (1 << 20) + 1)).end(), "extended header"),
        ("pax syntax", first().entry("p", b'x', b"99 path=a\n").entry("a", b'0', b"").end(), "pax header"),
        ("pax without entry", first().pax(b'x', &[("path", b"a")]).end(), "without its entry"),
        ("long name without entry", first().entry("p", b'L', b"abc\0").end(), "without its entry"),
        (
            "sparse past its size",
            sparse(&[("GNU.sparse.size", b"3"), ("GNU.sparse.map", b"3,1")], b"x"),
            "past the file's size",
        ),
        (
            "sparse overlap",
            sparse(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"3,2,4,2")], b"abcd"),
            "overlap",
        ),
        ("sparse sum", sparse(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"3,2")], b"abcd"), "add up"),
        (
            "sparse count",
            sparse(
                &[("GNU.sparse.size", b"9"), ("GNU.sparse.numblocks", b"2"), ("GNU.sparse.map", b"3,2")],
                b"ab",
            ),
            "number of segments",
        ),
        (
            "sparse map in too little data",
            sparse(
                &[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"9")],
                b"1\n0\n1\n",
            ),
            "does not fit",
        ),
        (
            "sparse directory",
            first().pax(b'x', &[("GNU.sparse.map", b"0,0")]).entry("s", b'5', b"").end(),
            "not a file",
        ),
        ("global header of no records", first().entry("g", b'g', b"12 size=512").end(), "bad record"),
        (
            "empty sparse block",
            first()
                .odd(header(b"s", b'S', 0), &[(257, MAGIC_GNU), (482, b"\x01")])
                .block(&{
                    let mut b = vec![0; BLOCK];
                    b[504] = 1;
                    b
                })
                .end(),
            "empty sparse map block",
        ),
        (
            "exabytes",
            first().odd(header(b"a", b'0', 0), &[(124, b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff")]).end(),
            "ends at byte",
        ),
    ];
    for (what, tar, text) in cases {
        let message = refused(&tar).to_string();
        assert!(message.contains(text), "{what}: {message}");
        assert!(message.contains("byte") && message.contains("entry"), "{what}: {message}");
        let Err(in_blocks) = read_in(&tar, BLOCK).1 else { panic!("{what}") };
        assert_eq!(in_blocks.to_string(), message, "{what}: whatever the chunks");
    }
}

#[test]
fn a_fault_before_the_first_entry_names_none() {
    let message = refused(&[7; 4096]).to_string();
    assert!(message.contains("byte 0 (before the first entry)"), "{message}");
    let message = refused(&[0; 511]).to_string();
    assert!(message.contains("(before the first entry)") && !message.contains(r#""""#), "{message}");
    let behind = Builder::default().entry("first", b'0', b"x").block(&[7; BLOCK]).end();
    let message = refused(&behind).to_string();
    assert!(message.contains(r#"(entry "first")"#), "{message}");
}

#[test]
fn sparse_map_bombs_are_bounded() {
    let mut tar = Builder::default().odd(header(b"s", b'S', 0), &[(257, MAGIC_GNU), (482, b"\x01")]);
    let mut block = vec![0; BLOCK];
    for i in 0..21 {
        field(&mut block, i * 24, b"00000000000\x0000000000000\x00");
    }
    block[504] = 1;
    for _ in 0..=MAX_SPARSE_SEGMENTS / 21 {
        tar = tar.block(&block);
    }
    assert!(matches!(refused(&tar.0), TarError::Limit { what: "sparse segments", .. }));
}

/// Archives that have a bit of everything.
fn mixed() -> Vec<u8> {
    let mut all = Builder::default()
        .pax(b'g', &[("comment", b"x")])
        .entry("dir/", b'5', b"")
        .entry("dir/a", b'0', b"hello")
        .pax(b'x', &[("path", b"dir/\xff"), ("SCHILY.xattr.user.x", b"\0\n")])
        .entry("b", b'0', &[7; 700])
        .entry("././@LongLink", b'L', b"some/long/name\0")
        .entry("c", b'2', b"");
    for (_, tar) in sparse_variants() {
        all.0.extend_from_slice(&tar[..tar.len() - 2 * BLOCK]);
    }
    all.entry("last", b'0', b"!").end()
}

#[test]
fn truncation_at_every_byte_is_an_error_unless_the_rest_is_an_archive() {
    let tar = mixed();
    let whole = read(&tar);
    let mut legal = Vec::new();
    for len in 0..tar.len() {
        let (seen, result) = read_in(&tar[..len], CHUNK_BYTES);
        match result {
            Err(TarError::Empty) => assert_eq!(len, 0),
            Err(TarError::Truncated { offset, .. }) => assert_eq!(offset, len as u64),
            Err(e) => panic!("{len}: {e}"),
            Ok(()) => {
                assert!(whole.starts_with(&seen.entries), "{len}");
                legal.push(len);
            }
        }
    }
    // Only where an entry is complete, or an end block is.
    assert!(legal.iter().all(|l| l % BLOCK == 0), "{legal:?}");
    assert_eq!(legal.iter().filter(|&&l| l > tar.len() - 2 * BLOCK).count(), 1);
    let entries = whole.len();
    // Behind each entry, behind the global header, and behind the first end block.
    assert_eq!(legal.len(), entries + 2, "{legal:?}");
}

#[test]
fn a_failing_stream_is_an_io_error() {
    struct Broken<'a>(&'a [u8]);
    impl Read for Broken<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buf)? {
                0 => Err(io::ErrorKind::ConnectionReset.into()),
                n => Ok(n),
            }
        }
    }
    let tar = mixed();
    let mut reader = TarReader::from_source(Chunks::with_chunk_bytes(Broken(&tar), BLOCK));
    let error = loop {
        match reader.next_event() {
            Ok(event) => assert_ne!(event, Event::End),
            Err(e) => break e,
        }
    };
    assert!(matches!(error, TarError::Io { offset, .. } if offset == tar.len() as u64), "{error}");
}

#[test]
fn short_reads_make_no_difference() {
    struct Dribble<'a>(&'a [u8], usize);
    impl Read for Dribble<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.1 += 1;
            if self.1.is_multiple_of(7) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let n = (self.1 % 97 + 1).min(buf.len());
            self.0.read(&mut buf[..n])
        }
    }
    let tar = mixed();
    let mut reader = TarReader::new(Dribble(&tar, 0));
    let mut bytes = Vec::new();
    loop {
        match reader.next_event().unwrap() {
            Event::Raw(b) | Event::Data { bytes: b, .. } => bytes.extend_from_slice(b),
            Event::Entry(_) => {}
            Event::End => break,
        }
    }
    assert!(bytes == tar);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// Random damage, with the checksums made right again half of the time so that it gets past them.
    #[test]
    fn mutated_archives_are_refused_or_read_whole(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        reseal in any::<bool>(),
    ) {
        let mut tar = mixed();
        for (at, byte) in changes {
            let at = at.index(tar.len());
            tar[at] = byte;
            let block = at / BLOCK * BLOCK;
            if reseal && tar[block + 257..].starts_with(b"ustar") {
                seal(&mut tar[block..block + BLOCK]);
            }
        }
        let (seen, result) = read_in(&tar, CHUNK_BYTES);
        prop_assert!(tar.starts_with(&seen.bytes));
        if result.is_ok() {
            prop_assert!(seen.bytes == tar);
        }
        let (small, small_result) = read_in(&tar, BLOCK);
        prop_assert_eq!(small, seen);
        prop_assert_eq!(small_result.map_err(|e| e.to_string()), result.map_err(|e| e.to_string()));
    }

    #[test]
    fn any_header_is_refused_or_read(block in prop::collection::vec(any::<u8>(), BLOCK)) {
        let mut block = block;
        for flag in [block[156], b'0', b'x', b'S', b'3'] {
            block[156] = flag;
            seal(&mut block);
            let _ = read_in(&[&block[..], &[0; 4096]].concat(), CHUNK_BYTES);
        }
    }
}
