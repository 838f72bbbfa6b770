//! Writes reproducible tar headers: ustar, with a PAX header in front where ustar's fields cannot hold a value.
//!
//! ```text
//!  [ x header 512 │ PAX records, padded ]  header 512 │ data, padded │ … │ 1024 zeros
//! ```
//!
//! **Frozen: versions 1 and 2.** The rules, which leave the choice and order of entries to the caller:
//! * Numbers are octal, zero-padded, terminated by NUL: `mode` has only the bits of 07777; `uname`, `gname` and `prefix` are
//!   empty; `devmajor` and `devminor` are 0 except for devices; `chksum` is six digits, NUL, space.
//! * A name or link target that is ASCII and at most 100 bytes long is in the header. Any other is in the PAX record `path`
//!   or `linkpath`, and the header has its first 100 bytes with `_` for each byte that is not ASCII.
//! * `uid` and `gid` above 2097151 and `size` above 8589934591 are in PAX records, and the field is 0. An `mtime` that has
//!   nanoseconds, is before 1970 or above 8589934591 s is in a PAX record (`-1.5`, no trailing zeros); the field then has
//!   the whole seconds, or 0 if they do not fit.
//! * Records are sorted bytewise by keyword; only `hdrcharset=BINARY` comes first, if a name or target that needs a record
//!   is not UTF-8.
//! * Xattrs are in `SCHILY.xattr.<name>`, with any bytes in the value. A name with `=`, which would end the keyword, is
//!   written differently. Version 1: `=` as `%3D` and `%` as `%25`, as GNU tar does; the engines' readers see another name.
//!   Version 2: `LIBARCHIVE.xattr.<name>`, in which `%`, `=` and bytes that are not printable ASCII are `%XX`, with the
//!   value in base64 without padding, as libarchive does; the engines' readers ignore it, this crate's does not.
//! * A sparse file is in GNU's PAX format 1.0: records `GNU.sparse.major`, `.minor`, `.name` (instead of `path`) and
//!   `.realsize`; the data begins with the map in decimal lines, padded with NULs to 512.
//! * The header of the PAX header: name `PaxHeaders`, mode 0644, everything else 0.
//!
//! No I/O: headers are appended to a buffer. The caller writes data, [`padding`], and at the end 1024 zeros.

use super::layout::{BLOCK, MAGIC_USTAR, RawHeader, typeflag};
use base64::{Engine as _, prelude::BASE64_STANDARD_NO_PAD};
use std::io::Write as _;
use zerocopy::{FromZeros, IntoBytes};

/// The largest value of an octal field of 8 bytes.
const MAX_OCTAL_8: u64 = 0o7_777_777;
/// The largest value of an octal field of 12 bytes.
const MAX_OCTAL_12: u64 = 0o77_777_777_777;

/// A version of the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Version {
    /// The rules of release 0.1.0, kept so that its archives can be reproduced.
    V1,
    /// The current rules.
    #[default]
    V2,
}

/// The type of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Regular file.
    File,
    /// Another name of an earlier entry, which [`Header::link`] names.
    HardLink,
    /// Symbolic link to [`Header::link`].
    Symlink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Directory; its path ends with a slash.
    Directory,
    /// Named pipe.
    Fifo,
}

/// The metadata of an entry.
#[derive(Debug, Clone, Copy)]
pub struct Header<'a> {
    /// Its type.
    pub kind: Kind,
    /// Path, without a leading `./`.
    pub path: &'a [u8],
    /// Target of a symbolic link, or first path of a hard link.
    pub link: &'a [u8],
    /// Permissions: the bits of 07777.
    pub mode: u16,
    /// User id of the owner.
    pub uid: u32,
    /// Group id of the owner.
    pub gid: u32,
    /// Modification time: seconds since 1970, and nanoseconds after that second.
    pub mtime: (i64, u32),
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Size of a regular file in bytes, including holes; 0 for all other types.
    pub size: u64,
    /// Extended attributes: name and value, sorted by name.
    pub xattrs: &'a [(&'a [u8], &'a [u8])],
    /// The ranges (offset, length) of a sparse file that hold data; `None` for a plain file.
    pub sparse: Option<&'a [(u64, u64)]>,
}

/// Appends one PAX record: its length in decimal (including the length itself), keyword, value, newline.
fn record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.ilog10() as usize + 1 {
        len = rest + len.ilog10() as usize + 1;
    }
    out.extend_from_slice(len.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

/// Fills an octal field; the caller has checked that the value fits.
fn octal(field: &mut [u8], mut value: u64) {
    let Some((_, digits)) = field.split_last_mut() else { return };
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (value & 7) as u8;
        value >>= 3;
    }
}

/// Whether a name fits the header.
fn fits(name: &[u8]) -> bool {
    name.len() <= 100 && name.is_ascii()
}

fn put_name(field: &mut [u8; 100], name: &[u8]) {
    for (to, from) in field.iter_mut().zip(name) {
        *to = if from.is_ascii() { *from } else { b'_' };
    }
}

/// A time in the form of PAX.
fn pax_time(secs: i64, nanos: u32) -> String {
    // Below 1970 the seconds are rounded down: -2 s + 0.5e9 ns is -1.5.
    let total = i128::from(secs) * 1_000_000_000 + i128::from(nanos);
    let (whole, fraction) = (total.unsigned_abs() / 1_000_000_000, total.unsigned_abs() % 1_000_000_000);
    let sign = if total < 0 { "-" } else { "" };
    if fraction == 0 {
        return format!("{sign}{whole}");
    }
    format!("{sign}{whole}.{fraction:09}").trim_end_matches('0').to_owned()
}

/// Keyword and value of an xattr's record.
fn xattr_record(name: &[u8], value: &[u8], version: Version) -> (Vec<u8>, Vec<u8>) {
    let key = b"SCHILY.xattr.";
    match version {
        _ if !name.contains(&b'=') => ([&key[..], name].concat(), value.to_vec()),
        Version::V1 => (gnu_key(name), value.to_vec()),
        Version::V2 => (libarchive_key(name), BASE64_STANDARD_NO_PAD.encode(value).into_bytes()),
    }
}

fn libarchive_key(name: &[u8]) -> Vec<u8> {
    let mut key = b"LIBARCHIVE.xattr.".to_vec();
    for byte in name {
        if byte.is_ascii_graphic() && !matches!(byte, b'=' | b'%') {
            key.push(*byte);
        } else {
            let _ = write!(key, "%{byte:02X}");
        }
    }
    key
}

fn gnu_key(name: &[u8]) -> Vec<u8> {
    let mut key = b"SCHILY.xattr.".to_vec();
    for byte in name {
        match byte {
            b'=' => key.extend_from_slice(b"%3D"),
            b'%' => key.extend_from_slice(b"%25"),
            other => key.push(*other),
        }
    }
    key
}

/// The sparse map before the data, padded.
fn sparse_map(ranges: &[(u64, u64)], size: u64) -> Vec<u8> {
    // GNU tar finds the end of a file with a hole at its end by an empty range at its size.
    let ends_in_hole = ranges.last().is_none_or(|(offset, len)| offset + len < size);
    let mut map = format!("{}\n", ranges.len() + usize::from(ends_in_hole)).into_bytes();
    for (offset, len) in ranges.iter().copied().chain(ends_in_hole.then_some((size, 0))) {
        let _ = write!(map, "{offset}\n{len}\n");
    }
    map.resize(map.len().next_multiple_of(BLOCK), 0);
    map
}

/// Number of padding bytes after `len` bytes of data.
pub fn padding(len: u64) -> usize {
    (len.next_multiple_of(BLOCK as u64) - len) as usize
}

/// Size of a sparse map before the data, in bytes, without its padding. Go's readers refuse more than 1 MiB.
pub fn sparse_map_bytes(ranges: &[(u64, u64)], size: u64) -> u64 {
    let digits = |n: u64| u64::from(n.checked_ilog10().unwrap_or(0)) + 1;
    let line = |n: u64| digits(n) + 1;
    let ends_in_hole = ranges.last().is_none_or(|(offset, len)| offset + len < size);
    let end = if ends_in_hole { line(size) + line(0) } else { 0 };
    let count = line(ranges.len() as u64 + u64::from(ends_in_hole));
    count + end + ranges.iter().map(|(offset, len)| line(*offset) + line(*len)).sum::<u64>()
}

/// Appends the header blocks of an entry, and for a sparse file its map, so that the data comes next. Returns the number of
/// data bytes that must follow (and be followed by [`padding`] for what is stored, the map included).
pub fn append(out: &mut Vec<u8>, h: &Header<'_>, version: Version) -> u64 {
    let map = h.sparse.map(|ranges| sparse_map(ranges, h.size));
    let data = match h.sparse {
        Some(ranges) => ranges.iter().map(|(_, len)| len).sum(),
        None => h.size,
    };
    let stored = data + map.as_ref().map_or(0, |m| m.len() as u64);
    let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut add = |key: &[u8], value: &[u8]| records.push((key.to_vec(), value.to_vec()));
    let mut binary = false;
    if h.sparse.is_some() {
        add(b"GNU.sparse.major", b"1");
        add(b"GNU.sparse.minor", b"0");
        add(b"GNU.sparse.name", h.path);
        add(b"GNU.sparse.realsize", h.size.to_string().as_bytes());
        binary |= str::from_utf8(h.path).is_err();
    } else if !fits(h.path) {
        add(b"path", h.path);
        binary |= str::from_utf8(h.path).is_err();
    }
    if !fits(h.link) {
        add(b"linkpath", h.link);
        binary |= str::from_utf8(h.link).is_err();
    }
    if u64::from(h.uid) > MAX_OCTAL_8 {
        add(b"uid", h.uid.to_string().as_bytes());
    }
    if u64::from(h.gid) > MAX_OCTAL_8 {
        add(b"gid", h.gid.to_string().as_bytes());
    }
    if stored > MAX_OCTAL_12 {
        add(b"size", stored.to_string().as_bytes());
    }
    let (secs, nanos) = h.mtime;
    let field_secs = u64::try_from(secs).ok().filter(|s| *s <= MAX_OCTAL_12);
    if nanos != 0 || field_secs.is_none() {
        add(b"mtime", pax_time(secs, nanos).as_bytes());
    }
    for (name, value) in h.xattrs {
        let (key, value) = xattr_record(name, value, version);
        add(&key, &value);
    }
    if !records.is_empty() {
        records.sort();
        let mut body = Vec::new();
        if binary {
            record(&mut body, b"hdrcharset", b"BINARY");
        }
        for (key, value) in &records {
            record(&mut body, key, value);
        }
        let mut pax = RawHeader::new_zeroed();
        put_name(&mut pax.name, b"PaxHeaders");
        octal(&mut pax.mode, 0o644);
        finish(&mut pax, typeflag::PAX, body.len() as u64, 0, 0, 0);
        out.extend_from_slice(pax.as_bytes());
        let pad = padding(body.len() as u64);
        out.extend_from_slice(&body);
        out.resize(out.len() + pad, 0);
    }
    let mut raw = RawHeader::new_zeroed();
    put_name(&mut raw.name, h.path);
    put_name(&mut raw.linkname, h.link);
    octal(&mut raw.mode, u64::from(h.mode & 0o7777));
    let id = |id: u32| Some(u64::from(id)).filter(|id| *id <= MAX_OCTAL_8).unwrap_or(0);
    octal(&mut raw.devmajor, u64::from(h.device.0));
    octal(&mut raw.devminor, u64::from(h.device.1));
    let flag = match h.kind {
        Kind::File => typeflag::REGULAR,
        Kind::HardLink => typeflag::LINK,
        Kind::Symlink => typeflag::SYMLINK,
        Kind::CharDevice => typeflag::CHAR,
        Kind::BlockDevice => typeflag::BLOCK,
        Kind::Directory => typeflag::DIRECTORY,
        Kind::Fifo => typeflag::FIFO,
    };
    let size = if stored > MAX_OCTAL_12 { 0 } else { stored };
    finish(&mut raw, flag, size, id(h.uid), id(h.gid), field_secs.unwrap_or(0));
    out.extend_from_slice(raw.as_bytes());
    if let Some(map) = map {
        out.extend_from_slice(&map);
    }
    data
}

/// Fills the fields that all headers have, and the checksum.
fn finish(raw: &mut RawHeader, flag: u8, size: u64, uid: u64, gid: u64, mtime: u64) {
    octal(&mut raw.uid, uid);
    octal(&mut raw.gid, gid);
    octal(&mut raw.size, size);
    octal(&mut raw.mtime, mtime);
    for field in [&mut raw.devmajor, &mut raw.devminor] {
        if field[0] == 0 {
            octal(field, 0);
        }
    }
    raw.typeflag = flag;
    raw.magic = *MAGIC_USTAR;
    raw.chksum = *b"        ";
    let sum: u64 = raw.as_bytes().iter().map(|b| u64::from(*b)).sum();
    raw.chksum[6] = 0;
    octal(&mut raw.chksum[..7], sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(path: &[u8]) -> Header<'_> {
        Header {
            kind: Kind::File,
            path,
            link: b"",
            mode: 0o644,
            uid: 1,
            gid: 2,
            mtime: (5, 0),
            device: (0, 0),
            size: 3,
            xattrs: &[],
            sparse: None,
        }
    }

    #[test]
    fn a_records_length_counts_itself() {
        for len in [1, 90, 91, 92, 93, 94, 95, 990, 991, 992, 993] {
            let mut out = Vec::new();
            record(&mut out, b"k", &vec![b'v'; len]);
            let digits = out.iter().position(|b| *b == b' ').unwrap();
            let said: usize = str::from_utf8(&out[..digits]).unwrap().parse().unwrap();
            assert_eq!(said, out.len(), "value of {len}");
        }
    }

    #[test]
    fn times_are_decimal_fractions() {
        assert_eq!(pax_time(1, 500_000_000), "1.5");
        assert_eq!(pax_time(-2, 500_000_000), "-1.5");
        assert_eq!(pax_time(-1, 0), "-1");
        assert_eq!(pax_time(0, 1), "0.000000001");
        assert_eq!(pax_time(-1, 999_999_999), "-0.000000001");
    }

    #[test]
    fn a_plain_file_is_one_block_and_others_have_a_pax_header() {
        let mut out = Vec::new();
        assert_eq!(append(&mut out, &header(b"a/b"), Version::V2), 3);
        assert_eq!(out.len(), 512);
        assert_eq!(&out[..4], b"a/b\0");
        assert_eq!(&out[100..136], b"0000644\x000000001\x000000002\x0000000000003\0");
        let sum: u64 = out
            .iter()
            .enumerate()
            .map(|(i, b)| if (148..156).contains(&i) { 32 } else { u64::from(*b) })
            .sum();
        assert_eq!(&out[148..156], format!("{sum:06o}\0 ").as_bytes());
        for (h, record) in [
            (header("é".as_bytes()), "11 path=é\n".as_bytes().to_vec()),
            (Header { uid: 2_097_152, ..header(b"a") }, b"15 uid=2097152\n".to_vec()),
            (Header { mtime: (-1, 0), ..header(b"a") }, b"12 mtime=-1\n".to_vec()),
            (Header { size: 1 << 33, ..header(b"a") }, b"19 size=8589934592\n".to_vec()),
            (
                Header { xattrs: &[(b"user.x", b"\0\n=")], ..header(b"a") },
                b"27 SCHILY.xattr.user.x=\0\n=\n".to_vec(),
            ),
            (header(b"\xFF"), b"21 hdrcharset=BINARY\n9 path=\xFF\n".to_vec()),
        ] {
            let mut out = Vec::new();
            append(&mut out, &h, Version::V2);
            assert_eq!(out.len(), 1536);
            assert_eq!(out[156], b'x');
            assert_eq!(&out[512..512 + record.len()], record);
        }
    }

    #[test]
    fn a_name_with_an_equals_sign_is_gnus_in_version_1_and_libarchives_in_version_2() {
        let xattrs: &[(&[u8], &[u8])] = &[(b"user.a=b \xC3\xA9%", b"\0\n\xFF="), (b"user.c%3Dd", b"1")];
        let h = Header { xattrs, ..header(b"a") };
        let body = |version| {
            let mut out = Vec::new();
            append(&mut out, &h, version);
            out[512..1024].to_vec()
        };
        let (one, two) = (body(Version::V1), body(Version::V2));
        assert!(
            one.starts_with(b"38 SCHILY.xattr.user.a%3Db \xC3\xA9%25=\0\n\xFF=\n"),
            "{}",
            one.escape_ascii()
        );
        assert!(
            two.starts_with(
                b"50 LIBARCHIVE.xattr.user.a%3Db%20%C3%A9%25=AAr/PQ\n29 SCHILY.xattr.user.c%3Dd=1\n"
            ),
            "{}",
            two.escape_ascii()
        );
        for (value, want) in [(&b""[..], ""), (b"\0", "AA"), (b"ab", "YWI"), (b"abc", "YWJj")] {
            let (_, written) = xattr_record(b"user.=", value, Version::V2);
            assert_eq!(written, want.as_bytes());
        }
    }

    #[test]
    fn a_sparse_map_ends_at_the_size() {
        for (ranges, size) in
            [(&[(4096, 10)][..], 8192), (&[(0, 10)], 10), (&[], 7), (&[(0, 1), (100, 100)], 200), (&[], 0)]
        {
            let map = sparse_map(ranges, size);
            let end = map.iter().rposition(|b| *b != 0).unwrap() as u64 + 1;
            assert_eq!(sparse_map_bytes(ranges, size), end, "{ranges:?} {size}");
        }
        assert_eq!(&sparse_map(&[(4096, 10)], 8192)[..18], b"2\n4096\n10\n8192\n0\n\0");
        assert_eq!(&sparse_map(&[(0, 10)], 10)[..8], b"1\n0\n10\n\0");
    }
}
