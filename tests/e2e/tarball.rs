//! Tar streams, written and read by the tests' own few lines, so that a fault of the product's tar code cannot hide
//! itself.
//!
//! ```text
//!   [PAX header, if needed: path linkpath mtime SCHILY.xattr.*] [ustar header] [data, padded to 512] … [1024 zeros]
//! ```
//!
//! Called by every module of the suite; it knows nothing of engines.

/// Bytes of a tar block.
const BLOCK: usize = 512;
/// A time for everything that the tests make: 2021-03-04T05:06:07.123456789Z, which needs nanoseconds.
pub(crate) const TIME: (i64, u32) = (1_614_834_367, 123_456_789);

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    File(Vec<u8>),
    Symlink(Vec<u8>),
    /// Path of another entry, without a leading slash.
    HardLink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// One entry of a tar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// As it stands in the tar, a folder's with or without its last slash.
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    /// Permissions, 07777.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    /// Full names.
    pub(crate) xattrs: Vec<(String, Vec<u8>)>,
}

impl Entry {
    pub(crate) fn new(path: impl AsRef<[u8]>, kind: Kind, mode: u32) -> Self {
        Self { path: path.as_ref().to_vec(), kind, mode, uid: 0, gid: 0, mtime: TIME, xattrs: Vec::new() }
    }
    pub(crate) fn dir(path: impl AsRef<[u8]>) -> Self {
        Self::new(path, Kind::Directory, 0o755)
    }
    pub(crate) fn file(path: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        Self::new(path, Kind::File(data.as_ref().to_vec()), 0o644)
    }
    pub(crate) fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self::new(path, Kind::Symlink(target.as_ref().to_vec()), 0o777)
    }
    pub(crate) fn hard_link(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self::new(path, Kind::HardLink(target.as_ref().to_vec()), 0o644)
    }
    pub(crate) fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }
    pub(crate) fn owner(self, uid: u32, gid: u32) -> Self {
        Self { uid, gid, ..self }
    }
    pub(crate) fn mtime(self, secs: i64, nanos: u32) -> Self {
        Self { mtime: (secs, nanos), ..self }
    }
    pub(crate) fn xattr(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.xattrs.push((name.to_owned(), value.as_ref().to_vec()));
        self
    }
}

fn octal(field: &mut [u8], value: u64) {
    let width = field.len() - 1;
    let text = format!("{value:0width$o}");
    assert!(text.len() <= width, "{value} does not fit a tar field");
    field[..width].copy_from_slice(text.as_bytes());
}

fn header(name: &[u8], link: &[u8], kind: u8, entry: &Entry, size: usize) -> [u8; BLOCK] {
    let mut block = [0_u8; BLOCK];
    block[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
    octal(&mut block[100..108], entry.mode.into());
    octal(&mut block[108..116], entry.uid.into());
    octal(&mut block[116..124], entry.gid.into());
    octal(&mut block[124..136], size as u64);
    octal(&mut block[136..148], u64::try_from(entry.mtime.0).unwrap_or(0));
    block[156] = kind;
    block[157..157 + link.len().min(100)].copy_from_slice(&link[..link.len().min(100)]);
    block[257..265].copy_from_slice(b"ustar\x0000");
    if let Kind::CharDevice(major, minor) | Kind::BlockDevice(major, minor) = entry.kind {
        octal(&mut block[329..337], major.into());
        octal(&mut block[337..345], minor.into());
    }
    block[148..156].fill(b' ');
    let sum: u64 = block.iter().map(|b| u64::from(*b)).sum();
    octal(&mut block[148..155], sum);
    block
}

fn pax(out: &mut Vec<u8>, key: &str, value: &[u8]) {
    let body = key.len() + value.len() + 3;
    let mut length = body + 1;
    while length != body + length.to_string().len() {
        length = body + length.to_string().len();
    }
    out.extend_from_slice(format!("{length} {key}=").as_bytes());
    out.extend_from_slice(value);
    out.push(b'\n');
}

fn data(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(bytes);
    out.resize(out.len().next_multiple_of(BLOCK), 0);
}

/// The tar of `entries`, without end blocks.
pub(crate) fn members(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        let (kind, link, bytes): (u8, &[u8], &[u8]) = match &entry.kind {
            Kind::Directory => (b'5', b"", b""),
            Kind::File(bytes) => (b'0', b"", bytes),
            Kind::Symlink(target) => (b'2', target, b""),
            Kind::HardLink(target) => (b'1', target, b""),
            Kind::CharDevice(..) => (b'3', b"", b""),
            Kind::BlockDevice(..) => (b'4', b"", b""),
            Kind::Fifo => (b'6', b"", b""),
        };
        let mut records = Vec::new();
        if entry.path.len() > 100 {
            pax(&mut records, "path", &entry.path);
        }
        if link.len() > 100 {
            pax(&mut records, "linkpath", link);
        }
        if entry.mtime.1 != 0 || entry.mtime.0 < 0 {
            assert!(entry.mtime.0 >= 0, "negative times are not written here");
            pax(&mut records, "mtime", format!("{}.{:09}", entry.mtime.0, entry.mtime.1).as_bytes());
        }
        for (name, value) in &entry.xattrs {
            pax(&mut records, &format!("SCHILY.xattr.{name}"), value);
        }
        if !records.is_empty() {
            let carrier = Entry::new("PaxHeaders/x", Kind::Fifo, 0o644).mtime(0, 0);
            out.extend_from_slice(&header(b"PaxHeaders/x", b"", b'x', &carrier, records.len()));
            data(&mut out, &records);
        }
        out.extend_from_slice(&header(&entry.path, link, kind, entry, bytes.len()));
        data(&mut out, bytes);
    }
    out
}

/// A whole tar.
pub(crate) fn build(entries: &[Entry]) -> Vec<u8> {
    let mut out = members(entries);
    out.resize(out.len() + 2 * BLOCK, 0);
    out
}

fn number(field: &[u8]) -> u64 {
    if field[0] & 0x80 != 0 {
        return field[1..].iter().fold(u64::from(field[0] & 0x7f), |n, b| n << 8 | u64::from(*b));
    }
    let text = String::from_utf8_lossy(field);
    let text = text.trim_matches(|c| c == '\0' || c == ' ');
    if text.is_empty() { 0 } else { u64::from_str_radix(text, 8).expect("octal number in a tar header") }
}

fn text(field: &[u8]) -> Vec<u8> {
    field.split(|b| *b == 0).next().unwrap_or_default().to_vec()
}

/// Reads a tar that an engine wrote (ustar, PAX and GNU long names).
pub(crate) fn parse(tar: &[u8]) -> Vec<Entry> {
    let mut entries = Vec::new();
    let (mut at, mut extra): (usize, Vec<(String, Vec<u8>)>) = (0, Vec::new());
    while at + BLOCK <= tar.len() && tar[at..at + BLOCK].iter().any(|b| *b != 0) {
        let block = &tar[at..at + BLOCK];
        let mut name = text(&block[..100]);
        if &block[257..263] == b"ustar\0" && block[345] != 0 {
            name = [text(&block[345..500]), name].join(&b'/');
        }
        let (flag, size) = (block[156], number(&block[124..136]) as usize);
        let bytes = &tar[at + BLOCK..at + BLOCK + size];
        at += BLOCK + size.next_multiple_of(BLOCK);
        match flag {
            b'x' => {
                let mut rest = bytes;
                while !rest.is_empty() {
                    let space = rest.iter().position(|b| *b == b' ').expect("PAX length");
                    let length: usize = String::from_utf8_lossy(&rest[..space]).parse().expect("PAX length");
                    let record = &rest[space + 1..length - 1];
                    let equals = record.iter().position(|b| *b == b'=').expect("PAX key");
                    let key = String::from_utf8_lossy(&record[..equals]).into_owned();
                    extra.push((key, record[equals + 1..].to_vec()));
                    rest = &rest[length..];
                }
                continue;
            }
            b'g' => continue,
            b'L' => {
                extra.push(("path".into(), text(bytes)));
                continue;
            }
            b'K' => {
                extra.push(("linkpath".into(), text(bytes)));
                continue;
            }
            _ => {}
        }
        let mut link = text(&block[157..257]);
        let mut mtime = (number(&block[136..148]) as i64, 0);
        let (mut uid, mut gid) = (number(&block[108..116]) as u32, number(&block[116..124]) as u32);
        let mut xattrs = Vec::new();
        for (key, value) in extra.drain(..) {
            let shown = String::from_utf8_lossy(&value).into_owned();
            match key.as_str() {
                "path" => name = value,
                "linkpath" => link = value,
                "uid" => uid = shown.parse().expect("PAX uid"),
                "gid" => gid = shown.parse().expect("PAX gid"),
                "mtime" => {
                    let (secs, nanos) = shown.split_once('.').unwrap_or((&shown, "0"));
                    mtime =
                        (secs.parse().expect("PAX mtime"), format!("{nanos:0<9}").parse().expect("nanos"));
                }
                _ => {
                    if let Some(name) = key.strip_prefix("SCHILY.xattr.") {
                        xattrs.push((name.to_owned(), value));
                    }
                }
            }
        }
        let rdev = (number(&block[329..337]) as u32, number(&block[337..345]) as u32);
        let kind = match flag {
            b'5' => Kind::Directory,
            b'0' | 0 => Kind::File(bytes.to_vec()),
            b'1' => Kind::HardLink(link),
            b'2' => Kind::Symlink(link),
            b'3' => Kind::CharDevice(rdev.0, rdev.1),
            b'4' => Kind::BlockDevice(rdev.0, rdev.1),
            b'6' => Kind::Fifo,
            other => panic!("tar entry {} has type {other}", String::from_utf8_lossy(&name)),
        };
        let mode = number(&block[100..108]) as u32 & 0o7777;
        entries.push(Entry { path: name, kind, mode, uid, gid, mtime, xattrs });
    }
    entries
}

#[test]
fn what_is_written_is_read() {
    let entries = vec![
        Entry::dir("d/").mode(0o1777).owner(5, 6),
        Entry::file("d/f", vec![7; 1000]).mode(0o4755).xattr("user.b", b"\0\n="),
        Entry::file(vec![b'n'; 180], b"long name").mtime(1, 0),
        Entry::symlink("d/s", vec![b't'; 150]),
        Entry::hard_link("d/h", "d/f"),
        Entry::new("d/c", Kind::CharDevice(1, 3), 0o666),
        Entry::new("d/p", Kind::Fifo, 0o600),
    ];
    assert_eq!(parse(&build(&entries)), entries);
}
