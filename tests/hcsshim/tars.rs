//! Tars made by code: entry by entry, and at random from a seed.

use std::fmt::Write as _;

/// An archive in the making.
#[derive(Default, Clone)]
pub(crate) struct Tar(Vec<u8>);

/// What a header says beside name, type and size.
#[derive(Clone)]
pub(crate) struct Meta {
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) mtime: u64,
    pub(crate) device: (u32, u32),
    /// PAX records in front.
    pub(crate) pax: Vec<(String, Vec<u8>)>,
}

impl Default for Meta {
    fn default() -> Self {
        Self { mode: 0o644, uid: 1000, gid: 100, mtime: 1_600_000_000, device: (0, 0), pax: Vec::new() }
    }
}

impl Meta {
    pub(crate) fn mode(mode: u32) -> Self {
        Self { mode, ..Self::default() }
    }

    pub(crate) fn pax(mut self, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax.push((key.to_owned(), value.as_ref().to_vec()));
        self
    }

    pub(crate) fn xattr(self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax(&format!("SCHILY.xattr.{name}"), value)
    }
}

fn number(block: &mut [u8], at: usize, len: usize, value: u64) {
    let text = format!("{value:0width$o}", width = len - 1);
    if text.len() < len {
        block[at..at + text.len()].copy_from_slice(text.as_bytes());
    } else {
        // GNU's base 256.
        block[at..at + len].fill(0);
        block[at + len - 8..at + len].copy_from_slice(&value.to_be_bytes());
        block[at] |= 0x80;
    }
}

fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let mut len = body + 1;
    while len != body + len.to_string().len() {
        len += 1;
    }
    [len.to_string().as_bytes(), b" ", key.as_bytes(), b"=", value, b"\n"].concat()
}

impl Tar {
    fn header(&mut self, name: &[u8], flag: u8, link: &[u8], size: u64, meta: &Meta) {
        let mut b = [0u8; 512];
        b[..name.len()].copy_from_slice(name);
        number(&mut b, 100, 8, u64::from(meta.mode));
        number(&mut b, 108, 8, meta.uid);
        number(&mut b, 116, 8, meta.gid);
        number(&mut b, 124, 12, size);
        number(&mut b, 136, 12, meta.mtime);
        b[156] = flag;
        b[157..157 + link.len()].copy_from_slice(link);
        b[257..265].copy_from_slice(b"ustar\x0000");
        number(&mut b, 329, 8, u64::from(meta.device.0));
        number(&mut b, 337, 8, u64::from(meta.device.1));
        b[148..156].fill(b' ');
        let sum: u32 = b.iter().map(|&b| u32::from(b)).sum();
        b[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&b);
    }

    fn body(&mut self, data: &[u8]) {
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }

    /// Any entry; long names and links go into PAX records.
    pub(crate) fn add(mut self, name: &[u8], flag: u8, link: &[u8], data: &[u8], meta: &Meta) -> Self {
        self.claim(name, flag, link, data.len() as u64, meta);
        self.body(data);
        self
    }

    /// The headers of an entry.
    fn claim(&mut self, name: &[u8], flag: u8, link: &[u8], size: u64, meta: &Meta) {
        let mut records: Vec<u8> = meta.pax.iter().flat_map(|(k, v)| record(k, v)).collect();
        let (mut short, mut short_link) = (name, link);
        if name.len() > 100 {
            records.extend(record("path", name));
            short = b"long";
        }
        if link.len() > 100 {
            records.extend(record("linkpath", link));
            short_link = b"long";
        }
        if !records.is_empty() {
            self.header(b"pax", b'x', b"", records.len() as u64, &Meta::default());
            self.body(&records);
        }
        self.header(short, flag, short_link, size, meta);
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Self {
        self.add(name.as_bytes(), b'0', b"", data, &Meta::default())
    }

    pub(crate) fn dir(self, name: &str) -> Self {
        self.add(name.as_bytes(), b'5', b"", b"", &Meta::mode(0o755))
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.add(name.as_bytes(), b'2', target.as_bytes(), b"", &Meta::mode(0o777))
    }

    pub(crate) fn link(self, name: &str, target: &str) -> Self {
        self.add(name.as_bytes(), b'1', target.as_bytes(), b"", &Meta::default())
    }

    /// A sparse file in PAX format 1.0: pieces of data by their offsets.
    pub(crate) fn sparse(mut self, name: &str, size: u64, pieces: &[(u64, &[u8])], meta: Meta) -> Self {
        let mut map = format!("{}\n", pieces.len());
        for (offset, data) in pieces {
            // Writing to a String cannot fail.
            let _ = write!(map, "{offset}\n{}\n", data.len());
        }
        let mut data = map.into_bytes();
        data.resize(data.len().next_multiple_of(512), 0);
        data.extend(pieces.iter().flat_map(|(_, data)| data.iter().copied()));
        let meta = meta
            .pax("GNU.sparse.major", "1")
            .pax("GNU.sparse.minor", "0")
            .pax("GNU.sparse.name", name)
            .pax("GNU.sparse.realsize", size.to_string());
        self = self.add(b"GNUSparseFile.0/x", b'0', b"", &data, &meta);
        self
    }

    /// Without an end.
    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0
    }

    /// A file whose data do not follow.
    pub(crate) fn claims(mut self, name: &str, size: u64) -> Vec<u8> {
        self.claim(name.as_bytes(), b'0', b"", size, &Meta::default());
        self.0
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// `SplitMix64`: the same numbers from the same seed, for good.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

/// How wild a random tar is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wildness {
    /// What real tools write: no name twice, links after their targets, whiteouts of other layers' names.
    Tame,
    /// The same, without what the default profile refuses: names that begin above the root, and symlinks that need
    /// blocks of 4 KiB.
    Inside,
    /// Anything.
    Wild,
}

fn name(r: &mut Random, known: &[String], wild: bool) -> String {
    let parent = match r.below(4) {
        0 => String::new(),
        _ if known.is_empty() => String::new(),
        _ => r.pick(known).clone() + "/",
    };
    let last = match r.below(12) {
        0 => format!("{:x}", r.next()).repeat(1 + r.below(13) as usize),
        1 => "ü".repeat(1 + r.below(30) as usize),
        2 if wild && r.one_in(8) => (*r.pick(&["a", "b", "c", "lost+found", "..x", "a b"])).to_owned(),
        _ => format!("n{}", r.below(if wild { 4000 } else { u64::MAX })),
    };
    format!("{parent}{last}")
}

fn disguise(r: &mut Random, name: &str, wildness: Wildness) -> String {
    match r.below(8) {
        3 if wildness == Wildness::Inside => format!("x/../{name}"),
        0 => format!("./{name}"),
        1 => format!("/{name}"),
        2 => name.replace('/', "//"),
        3 => format!("../x/../{name}"),
        _ => name.to_owned(),
    }
}

fn meta(r: &mut Random, wild: bool) -> Meta {
    let minors = if wild && r.one_in(9) { 1 << 21 } else { 1 << 18 };
    let mut meta = Meta {
        mode: r.below(0o10000) as u32,
        uid: if r.one_in(8) { r.below(1 << 32) } else { r.below(3000) },
        gid: if r.one_in(8) { r.below(1 << 21) } else { r.below(3000) },
        mtime: r.below(1 << 31),
        device: (r.below(300) as u32, r.below(minors) as u32),
        pax: Vec::new(),
    };
    if r.one_in(3) {
        meta = meta.pax("mtime", format!("{}.{:09}", r.below(1 << 31), r.below(1_000_000_000)));
    } else if r.one_in(6) {
        let big = if wild && r.one_in(20) {
            r.below(1 << 36) as i64 - (1 << 34)
        } else {
            (1 << 32) + r.below(1 << 31) as i64
        };
        meta = meta.pax("mtime", big.to_string());
    }
    if r.one_in(4) {
        meta = meta.pax("atime", format!("{}.5", r.below(1 << 31)));
    }
    if r.one_in(4) {
        meta = meta.pax("ctime", r.below(1 << 31).to_string());
    }
    meta
}

fn xattrs(r: &mut Random, mut meta: Meta, wild: bool) -> Meta {
    if !r.one_in(4) {
        return meta;
    }
    let odd = wild && r.one_in(20);
    let spaces: &[&str] = if odd {
        &["user.", "trusted.", "security.", "system.", "btrfs.", "trusted.overlay.opaque"]
    } else {
        &["user.", "trusted.", "security."]
    };
    for i in 0..=r.below(if odd { 16 } else { 4 }) {
        let len = if r.one_in(6) { r.below(if odd { 5000 } else { 1200 }) } else { r.below(40) } as usize;
        let space = *r.pick(spaces);
        let name_len = 1 + r.below(20) as usize;
        let letters: String = (0..name_len).map(|_| (b'a' + r.below(26) as u8) as char).collect();
        let value = r.bytes(len);
        meta = meta.xattr(&format!("{space}{letters}{i}"), value);
    }
    meta
}

/// A tar of `entries` entries from a seed.
pub(crate) fn random(seed: u64, entries: u64, wildness: Wildness) -> Vec<u8> {
    let r = &mut Random(seed);
    let wild = wildness == Wildness::Wild;
    let mut tar = Tar::default();
    let mut dirs: Vec<String> = Vec::new();
    let mut files: Vec<String> = Vec::new();
    for _ in 0..entries {
        let again = wild && r.one_in(30) && !files.is_empty();
        let name = if again { r.pick(&files).clone() } else { name(r, &dirs, wild) };
        let path = disguise(r, &name, wildness);
        let mut m = meta(r, wild);
        m = xattrs(r, m, wild);
        match r.below(16) {
            0..=3 if wild && !dirs.is_empty() && r.one_in(3) => {
                // A folder that is there already.
                tar = tar.add(r.pick(&dirs).clone().as_bytes(), b'5', b"", b"", &m);
            }
            0..=3 => {
                let slash = if r.one_in(2) { "/" } else { "" };
                tar = tar.add(format!("{path}{slash}").as_bytes(), b'5', b"", b"", &m);
                dirs.push(name);
            }
            4..=9 => {
                let len = match r.below(6) {
                    0 => 0,
                    1 => r.below(140),
                    2 => 130 + r.below(10),
                    3 => 4096 * r.below(4),
                    4 => r.below(9000),
                    _ => r.below(200_000),
                };
                let data = r.bytes(len as usize);
                let flag = *r.pick(b"000\x007");
                tar = tar.add(path.as_bytes(), flag, b"", &data, &m);
                files.push(name);
            }
            10 => {
                let longest = if wildness == Wildness::Inside { 1023 } else { 4095 };
                let len = *r.pick(&[1usize, 58, 59, 60, 61, 200, longest]);
                let target: Vec<u8> = (0..len).map(|_| b'a' + r.below(26) as u8).collect();
                tar = tar.add(path.as_bytes(), b'2', &target, b"", &m);
                files.push(name);
            }
            11 | 12 if !files.is_empty() => {
                let target = r.pick(&files).clone();
                let target = disguise(r, &target, wildness);
                tar = tar.add(path.as_bytes(), b'1', target.as_bytes(), b"", &m);
                files.push(name);
            }
            13 => {
                let flag = *r.pick(b"346");
                tar = tar.add(path.as_bytes(), flag, b"", b"", &m);
                files.push(name);
            }
            14 => {
                let (dir, last) = path.rsplit_once('/').unwrap_or(("", &path));
                let hidden = match r.below(if wild { 24 } else { 2 }) {
                    0 => ".wh..opq".to_owned(),
                    2 => (*r.pick(&["", ".", "..", ".wh.plnk"])).to_owned(),
                    _ => format!("w{last}").chars().take(60).collect(),
                };
                tar = tar.add(format!("{dir}/.wh.{hidden}").as_bytes(), b'0', b"", b"", &Meta::default());
            }
            _ => {
                let data = r.bytes(1000);
                tar = tar.sparse(&path, 20_000, &[(0, &data[..500]), (8192, &data[500..])], m);
                files.push(name);
            }
        }
        if r.one_in(30) {
            tar = tar.add(b"./", b'5', b"", b"", &meta(r, wild));
        }
    }
    tar.end()
}
