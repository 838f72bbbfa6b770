//! Tests of the reader on archives made here byte by byte. Archives of foreign tools: `tests/apply`.

mod damage;

use super::*;
use super::{
    chunk::Chunks,
    layout::{BLOCK, MAGIC_GNU, MAGIC_USTAR},
};

/// An archive in the making.
#[derive(Default, Clone)]
struct Builder(Vec<u8>);

fn field(block: &mut [u8], at: usize, text: &[u8]) {
    block[at..at + text.len()].copy_from_slice(text);
}

fn seal(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
    field(block, 148, format!("{sum:06o}\0 ").as_bytes());
}

fn header(name: &[u8], flag: u8, size: u64) -> Vec<u8> {
    let mut b = vec![0; BLOCK];
    field(&mut b, 0, name);
    field(&mut b, 100, b"0000644\0");
    field(&mut b, 108, b"0001750\0");
    field(&mut b, 116, b"0000144\0");
    field(&mut b, 124, format!("{size:011o}\0").as_bytes());
    field(&mut b, 136, b"14000000000\0");
    b[156] = flag;
    field(&mut b, 257, MAGIC_USTAR);
    seal(&mut b);
    b
}

fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let mut len = body + 1;
    while len != body + len.to_string().len() {
        len += 1;
    }
    [len.to_string().as_bytes(), b" ", key.as_bytes(), b"=", value, b"\n"].concat()
}

impl Builder {
    fn block(mut self, block: &[u8]) -> Self {
        assert_eq!(block.len(), BLOCK);
        self.0.extend_from_slice(block);
        self
    }

    fn data(mut self, data: &[u8], padding: u8) -> Self {
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), padding);
        self
    }

    fn entry(self, name: &str, flag: u8, data: &[u8]) -> Self {
        self.block(&header(name.as_bytes(), flag, data.len() as u64)).data(data, 0)
    }

    fn pax(self, flag: u8, records: &[(&str, &[u8])]) -> Self {
        let data: Vec<u8> = records.iter().flat_map(|(k, v)| pax_record(k, v)).collect();
        let name = "PaxHeaders/x";
        self.entry(name, flag, &data)
    }

    /// A header with some bytes changed before the checksum is made.
    fn odd(self, mut block: Vec<u8>, patches: &[(usize, &[u8])]) -> Self {
        for (at, text) in patches {
            field(&mut block, *at, text);
        }
        seal(&mut block);
        self.block(&block)
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 2 * BLOCK, 0);
        self.0
    }
}

/// Runs of data and where they go in their file.
type Runs = Vec<(u64, Vec<u8>)>;

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Seen {
    entries: Vec<(Entry, Runs)>,
    bytes: Vec<u8>,
}

/// Reads all of `tar` in chunks of some size.
fn read_in(tar: &[u8], chunk: usize) -> (Seen, Result<(), TarError>) {
    let mut reader = TarReader::from_source(Chunks::with_chunk_bytes(tar, chunk));
    let mut seen = Seen::default();
    loop {
        let event = match reader.next_event() {
            Ok(event) => event,
            Err(e) => return (seen, Err(e)),
        };
        match event {
            Event::Raw(bytes) => seen.bytes.extend_from_slice(bytes),
            Event::Entry(entry) => seen.entries.push((entry.clone(), Vec::new())),
            Event::Data { offset, bytes } => {
                assert!(!bytes.is_empty());
                seen.bytes.extend_from_slice(bytes);
                let data = &mut seen.entries.last_mut().expect("data follow an entry").1;
                match data.last_mut() {
                    Some((start, run)) if *start + run.len() as u64 == offset => run.extend_from_slice(bytes),
                    _ => data.push((offset, bytes.to_vec())),
                }
            }
            Event::End => break,
        }
        assert_eq!(reader.offset(), seen.bytes.len() as u64);
    }
    assert_eq!(reader.next_event().unwrap(), Event::End);
    (seen, Ok(()))
}

/// Reads a good archive: all bytes come by, whatever the chunks.
fn read(tar: &[u8]) -> Vec<(Entry, Runs)> {
    let (seen, result) = read_in(tar, CHUNK_BYTES);
    result.unwrap();
    assert!(seen.bytes == tar, "all bytes are reported once, in order");
    let (small, result) = read_in(tar, BLOCK);
    result.unwrap();
    assert_eq!(small, seen);
    seen.entries
}

fn only(tar: &[u8]) -> Entry {
    let mut entries = read(tar);
    assert_eq!(entries.len(), 1);
    entries.remove(0).0
}

fn refused(tar: &[u8]) -> TarError {
    read_in(tar, CHUNK_BYTES).1.expect_err("the archive is refused")
}

fn time(secs: i64, nanos: u32) -> Time {
    Time { secs, nanos }
}

#[test]
fn a_plain_file() {
    let tar = Builder::default().entry("a/b", b'0', b"hello").end();
    let entries = read(&tar);
    let e = &entries[0].0;
    assert_eq!(e.path, b"a/b");
    assert_eq!((e.kind, e.mode, e.uid, e.gid, e.size, e.offset), (EntryKind::File, 0o644, 1000, 100, 5, 0));
    assert_eq!(e.mtime, time(0o14_000_000_000, 0));
    assert_eq!(entries[0].1, [(0, b"hello".to_vec())]);
}

#[test]
fn kinds() {
    let cases: &[(u8, &str, EntryKind)] = &[
        (0, "a", EntryKind::File),
        (b'0', "a", EntryKind::File),
        (b'7', "a", EntryKind::File),
        (0, "a/", EntryKind::Directory),
        (b'0', "a/", EntryKind::File),
        (b'5', "a", EntryKind::Directory),
        (b'D', "a", EntryKind::Directory),
        (b'1', "a", EntryKind::HardLink),
        (b'2', "a", EntryKind::Symlink),
        (b'3', "a", EntryKind::CharDevice),
        (b'4', "a", EntryKind::BlockDevice),
        (b'6', "a", EntryKind::Fifo),
    ];
    for &(flag, name, kind) in cases {
        let block = header(name.as_bytes(), flag, 0);
        let tar = Builder::default()
            .odd(block, &[(157, b"target"), (329, b"0000010\0"), (337, b"0000003\0")])
            .end();
        let e = only(&tar);
        assert_eq!((e.kind, &e.link[..]), (kind, &b"target"[..]), "{}", flag as char);
        if matches!(kind, EntryKind::CharDevice | EntryKind::BlockDevice) {
            assert_eq!((e.major, e.minor), (8, 3));
        }
    }
}

#[test]
fn links_and_devices_have_no_data_whatever_their_size_says() {
    for flag in b'1'..=b'6' {
        let tar = Builder::default().block(&header(b"a", flag, 5000)).entry("b", b'0', b"x").end();
        assert_eq!(read(&tar).len(), 2, "{}", flag as char);
    }
}

#[test]
fn data_of_what_is_no_file_pass_by() {
    let tar = Builder::default()
        .entry("label", b'V', b"")
        .entry("dump", b'D', b"Yname\0\0")
        .entry("folder/", b'0', b"data")
        // Of an old folder Go reads no data: the next block is a header.
        .block(&header(b"old/", 0, 5000))
        .entry("b", b'0', b"x")
        .end();
    let entries = read(&tar);
    assert_eq!(
        entries.iter().map(|(e, _)| &e.path[..]).collect::<Vec<_>>(),
        [&b"dump"[..], b"folder/", b"old/", b"b"]
    );
    assert!(entries[0].0.size == 0 && entries[0].1.is_empty());
    assert_eq!((entries[1].0.kind, &entries[1].1[..]), (EntryKind::File, &[(0, b"data".to_vec())][..]));
    assert_eq!((entries[2].0.kind, entries[2].0.size), (EntryKind::Directory, 0));
}

#[test]
fn long_names() {
    let long = "d/".repeat(100) + "file";
    let target = "t".repeat(300);
    let gnu = Builder::default()
        .entry("././@LongLink", b'L', format!("{long}\0").as_bytes())
        .entry("././@LongLink", b'K', format!("{target}\0").as_bytes())
        .entry("clipped", b'2', b"")
        .end();
    let pax = Builder::default()
        .pax(b'x', &[("path", long.as_bytes()), ("linkpath", target.as_bytes())])
        .entry("clipped", b'2', b"")
        .end();
    for tar in [gnu, pax] {
        let e = only(&tar);
        assert_eq!((&e.path[..], &e.link[..]), (long.as_bytes(), target.as_bytes()));
    }
    let prefix = Builder::default().odd(header(b"file", b'0', 0), &[(345, b"some/prefix")]).end();
    assert_eq!(only(&prefix).path, b"some/prefix/file");
}

#[test]
fn extended_headers_hold_for_one_entry_and_global_ones_for_none() {
    let tar = Builder::default()
        .pax(
            b'g',
            &[
                ("mtime", b"5.5"),
                ("uid", b"3000000"),
                ("path", b"etc/ld.so.preload"),
                ("size", b"512"),
                ("linkpath", b"x"),
                ("SCHILY.xattr.user.x", b"1"),
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
            ],
        )
        .pax(b'x', &[("mtime", b"-1.25"), ("atime", b"7"), ("ctime", b"8.000000001"), ("gid", b"4000000000")])
        .entry("a", b'0', b"")
        .pax(b'x', &[("uid", b"")])
        .entry("b", b'0', b"")
        // A local header is forgotten at a global one, as by Go.
        .entry("././@LongLink", b'L', b"long\0")
        .pax(b'x', &[("uid", b"7"), ("path", b"local")])
        .pax(b'g', &[("comment", b"c")])
        .entry("c", b'0', b"")
        .end();
    let e: Vec<_> = read(&tar).into_iter().map(|(e, _)| e).collect();
    assert_eq!(
        (e[0].mtime, e[0].atime, e[0].ctime),
        (time(-2, 750_000_000), Some(time(7, 0)), Some(time(8, 1)))
    );
    assert_eq!((e[0].uid, e[0].gid), (1000, 4_000_000_000));
    let plain = time(0o14_000_000_000, 0);
    assert_eq!((e[1].mtime, e[1].uid, e[1].gid, e[1].atime), (plain, 1000, 100, None));
    assert_eq!((&e[2].path[..], e[2].mtime, e[2].uid), (&b"c"[..], plain, 1000));
    assert!(e.iter().all(|e| e.xattrs.is_empty() && e.link.is_empty()));
}

#[test]
fn values_that_pax_replaces_may_be_junk_in_the_block() {
    let tar = Builder::default()
        .pax(b'x', &[("uid", b"5"), ("gid", b"6"), ("mtime", b"7")])
        .odd(header(b"a", b'0', 0), &[(108, b"????????"), (116, b"????????"), (136, b"????????????")])
        .end();
    let e = only(&tar);
    assert_eq!((e.uid, e.gid, e.mtime), (5, 6, time(7, 0)));
}

#[test]
fn binary_xattrs() {
    let value = b"\0\n\xff=1";
    let tar = Builder::default()
        .pax(
            b'x',
            &[
                ("SCHILY.xattr.security.capability", value),
                ("SCHILY.xattr.user.empty", b""),
                ("LIBARCHIVE.xattr.user.a%3Db", b"AAo"),
                ("LIBARCHIVE.xattr.user.empty", b"AAo"),
            ],
        )
        .entry("a", b'0', b"")
        .entry("b", b'0', b"")
        .end();
    let entries = read(&tar);
    let x = |name: &[u8], value: &[u8]| Xattr { name: name.to_vec(), value: value.to_vec() };
    assert_eq!(
        entries[0].0.xattrs,
        [x(b"security.capability", value), x(b"user.empty", b""), x(b"user.a=b", b"\0\n")]
    );
    assert_eq!(entries[1].0.xattrs, []);
}

#[test]
fn gnu_headers_with_times_and_with_the_prefix_of_old_go() {
    let gnu: (usize, &[u8]) = (257, MAGIC_GNU);
    let tar = Builder::default()
        .odd(header(b"a", b'0', 0), &[gnu, (345, b"00000000007\0"), (357, b"00000000010\0")])
        .end();
    let e = only(&tar);
    assert_eq!((&e.path[..], e.atime, e.ctime), (&b"a"[..], Some(time(7, 0)), Some(time(8, 0))));
    let tar = Builder::default().odd(header(b"a", b'0', 0), &[gnu, (345, b"a/prefix/that/is/long")]).end();
    assert_eq!(only(&tar).path, b"a/prefix/that/is/long/a");
}

#[test]
fn star_headers() {
    let tar = Builder::default()
        .odd(
            header(b"a", b'0', 0),
            &[(345, b"dir"), (476, b"00000000007\0"), (488, b"00000000010\0"), (508, b"tar\0")],
        )
        .end();
    let e = only(&tar);
    assert_eq!((&e.path[..], e.atime, e.ctime), (&b"dir/a"[..], Some(time(7, 0)), Some(time(8, 0))));
}

#[test]
fn base_256_numbers_and_signed_checksums() {
    let tar = Builder::default()
        .odd(
            header(b"a", b'0', 0),
            &[
                (108, b"\x80\0\0\0\xee\x6b\x28\0"),
                (116, b"\xff\xff\xff\xff\xff\xff\xff\xfe"),
                (136, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xf0"),
            ],
        )
        .end();
    let e = only(&tar);
    assert_eq!((e.uid, e.gid, e.mtime), (4_000_000_000, u32::MAX - 1, time(-16, 0)));

    let mut block = header(b"a\xff\xfe", b'0', 0);
    block[148..156].fill(b' ');
    let sum: i32 = block.iter().map(|&b| i32::from(b.cast_signed())).sum();
    field(&mut block, 148, format!("{sum:06o}\0 ").as_bytes());
    assert_eq!(only(&Builder::default().block(&block).end()).path, b"a\xff\xfe");
}

#[test]
fn sparse_keywords_of_no_known_version_make_a_plain_file() {
    let stored = b"2\n0\n1\n9\n1\n";
    let known: &[(&str, &[u8])] = &[("GNU.sparse.name", b"other"), ("GNU.sparse.realsize", b"100")];
    for version in [
        &[("GNU.sparse.major", &b"1"[..])][..],
        &[("GNU.sparse.major", b"01"), ("GNU.sparse.minor", b"0")],
        &[("GNU.sparse.major", b"2"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.map", b"0,1")],
        &[("GNU.sparse.major", b"0"), ("GNU.sparse.minor", b"2"), ("GNU.sparse.map", b"0,1")],
        &[("GNU.sparse.map", b"")],
        &[],
    ] {
        let tar = Builder::default().pax(b'x', &[version, known].concat()).entry("f", b'0', stored).end();
        let entries = read(&tar);
        assert_eq!((&entries[0].0.path[..], &entries[0].1[..]), (&b"f"[..], &[(0, stored.to_vec())][..]));
    }
    // Where no size is told, it is that of what is stored.
    let tar = Builder::default().pax(b'x', &[("GNU.sparse.map", b"1,3")]).entry("f", b'0', b"abcd").end();
    assert!(matches!(refused(&tar), TarError::Corrupt { .. }));
    let tar = Builder::default().pax(b'x', &[("GNU.sparse.map", b"0,4")]).entry("f", b'0', b"abcd").end();
    assert_eq!(read(&tar)[0].0.size, 4);
}

#[test]
fn an_empty_long_name_says_nothing() {
    let tar = Builder::default().entry("././@LongLink", b'L', b"\0").entry("f", b'0', b"").end();
    assert_eq!(only(&tar).path, b"f");
}

#[test]
fn v7_has_no_prefix_and_no_devices() {
    let device = Builder::default()
        .odd(header(b"c", b'3', 0), &[(257, b"junk\0\0\0\0"), (329, b"0000010\0"), (337, b"0000003\0")])
        .end();
    assert_eq!((only(&device).major, only(&device).minor), (0, 0));

    let tar = Builder::default()
        .odd(header(b"a", 0, 3), &[(257, b"junk\0\0\0\0"), (345, b"junk")])
        .data(b"abc", 0)
        .end();
    assert_eq!(only(&tar).path, b"a");
}

const HOLES: [(u64, &[u8]); 3] = [(512, b"abc"), (1 << 20, b"defg"), (1 << 33, b"")];

fn sparse_variants() -> Vec<(&'static str, Vec<u8>)> {
    let size = 1u64 << 33;
    let stored = b"abcdefg";
    let octal = |n: u64| format!("{n:011o}\0");
    let big = |n: u64| {
        if n < 1 << 33 { octal(n).into_bytes() } else { [&[0x80, 0, 0, 0], &n.to_be_bytes()[..]].concat() }
    };
    let at = |i: usize| [big(HOLES[i].0), big(HOLES[i].1.len() as u64)].concat();
    let (seg0, seg1, seg2, real) = (at(0), at(1), at(2), big(size));
    let mut extension = vec![0; BLOCK];
    field(&mut extension, 0, &seg1);
    field(&mut extension, 24, &seg2);
    let old = |patches: &[(usize, &[u8])]| {
        let mut all: Vec<(usize, &[u8])> = vec![(257, MAGIC_GNU), (483, &real)];
        all.extend_from_slice(patches);
        Builder::default().odd(header(b"f", b'S', 7), &all)
    };
    let text = |n: u64| n.to_string().into_bytes();
    let (real_text, o): (_, Vec<_>) =
        (text(size), HOLES.iter().map(|h| (text(h.0), text(h.1.len() as u64))).collect());
    let v00 = [
        ("GNU.sparse.size", &real_text[..]),
        ("GNU.sparse.numblocks", b"3"),
        ("GNU.sparse.offset", &o[0].0),
        ("GNU.sparse.numbytes", &o[0].1),
        ("GNU.sparse.offset", &o[1].0),
        ("GNU.sparse.numbytes", &o[1].1),
        ("GNU.sparse.offset", &o[2].0),
        ("GNU.sparse.numbytes", &o[2].1),
    ];
    let map = HOLES.map(|h| format!("{},{}", h.0, h.1.len())).join(",");
    let v01 = [
        ("GNU.sparse.size", &real_text[..]),
        ("GNU.sparse.numblocks", b"3"),
        ("GNU.sparse.map", map.as_bytes()),
        ("GNU.sparse.name", b"f"),
    ];
    let v10 = [
        ("GNU.sparse.major", &b"1"[..]),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"f"),
        ("GNU.sparse.realsize", &real_text),
    ];
    let data_map = format!("3\n{}\n", HOLES.map(|h| format!("{}\n{}", h.0, h.1.len())).join("\n"));
    let mut v10_data = data_map.into_bytes();
    v10_data.resize(BLOCK, 0);
    v10_data.extend_from_slice(stored);
    vec![
        ("old", old(&[(386, &seg0), (410, &seg1), (434, &seg2)]).data(stored, 0).end()),
        ("old, extended", old(&[(386, &seg0), (482, b"\x01")]).block(&extension).data(stored, 0).end()),
        ("0.0", Builder::default().pax(b'x', &v00).entry("f", b'0', stored).end()),
        ("0.1", Builder::default().pax(b'x', &v01).entry("GNUSparseFile.0/f", b'0', stored).end()),
        ("1.0", Builder::default().pax(b'x', &v10).entry("GNUSparseFile.0/f", b'0', &v10_data).end()),
    ]
}

#[test]
fn sparse_files_in_all_formats() {
    for (what, tar) in sparse_variants() {
        let entries = read(&tar);
        let (e, data) = &entries[0];
        assert_eq!((&e.path[..], e.size), (&b"f"[..], 1 << 33), "{what}");
        let want: Vec<_> = HOLES.iter().filter(|h| !h.1.is_empty()).map(|h| (h.0, h.1.to_vec())).collect();
        assert_eq!(*data, want, "{what}");
    }
}

#[test]
fn ends_of_archives() {
    let one = Builder::default().entry("a", b'0', b"x");
    let zero = vec![0; BLOCK];
    let cases: Vec<(&str, Vec<u8>, usize)> = vec![
        ("empty layer", vec![0; 1024], 0),
        ("GNU's empty archive", vec![0; 10_240], 0),
        ("no end blocks", one.0.clone(), 1),
        ("one end block", [&one.0[..], &zero].concat(), 1),
        ("blocked", [&one.clone().end()[..], &[0; 7168]].concat(), 1),
        ("garbage behind the end", [&one.clone().end()[..], b"garbage \xff"].concat(), 1),
        ("archive behind the end", [one.clone().end(), one.clone().end()].concat(), 1),
        ("non-zero padding", Builder::default().block(&header(b"a", b'0', 1)).data(b"x", 0xaa).end(), 1),
    ];
    for (what, tar, count) in cases {
        assert_eq!(read(&tar).len(), count, "{what}");
    }
}

#[test]
fn a_stream_that_fails_tells_where() {
    /// Gives some bytes, then fails.
    struct Failing<'a>(&'a [u8]);
    impl std::io::Read for Failing<'_> {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            if self.0.is_empty() {
                return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "no gzip header"));
            }
            let most = buf.len().min(1000);
            std::io::Read::read(&mut self.0, &mut buf[..most])
        }
    }
    let tar = Builder::default().entry("a", b'0', &[7; 5000]).end();
    for cut in [0, 1000, 5000] {
        let mut reader = TarReader::new(Failing(&tar[..cut]));
        let error = loop {
            match reader.next_event() {
                Ok(event) => assert_ne!(event, Event::End),
                Err(e) => break e,
            }
        };
        let TarError::Io { offset, source } = error else { panic!("{error}") };
        assert_eq!((offset, source.kind()), (cut as u64, std::io::ErrorKind::InvalidData));
        assert_eq!(source.to_string(), "no gzip header");
    }
}

#[test]
fn trailing_bytes_are_counted() {
    let tar = [Builder::default().end(), vec![7; 1000]].concat();
    let mut reader = TarReader::new(&tar[..]);
    assert_eq!(reader.trailing_bytes(), None);
    while reader.next_event().unwrap() != Event::End {}
    assert_eq!(reader.trailing_bytes(), Some(1000));
}
