//! PAX extended headers: `"%d %s=%s\n"` records (POSIX.1-2017 pax, "pax Extended Header") and the keywords that layers
//! use.
//!
//! ```text
//!   30 mtime=1700000000.123456789\n│29 SCHILY.xattr.user.a=\0\n\xff│…
//!   └┬┘└──────────┬─────────────┘
//!   length of the whole record, itself and the newline included: values may hold any byte
//! ```
//!
//! Invariant: a record means what it means to Go's archive/tar, which container engines and scanners of layers use. An
//! empty value cancels the keyword, so that the header block counts. Keywords without effect on a file system (`comment`,
//! `charset`, `uname`, ACLs as text, device numbers of star, …) are ignored; their bytes are still reported.
//!
//! # Attributes
//! The name in `SCHILY.xattr.NAME` ends at the first `=` and is not encoded, so a name with `=` cannot be written this way.
//! `LIBARCHIVE.xattr.NAME` (percent-encoded name, base64 value) is ignored, as in Go, except for names with `=`: this
//! crate's writer has no other way to write them.

use super::{
    entry::{Time, Xattr},
    number,
    sparse::{self, MapError, Segment},
};

/// Largest extended header or GNU long name, in bytes (the limit of Go's archive/tar).
pub const MAX_PAX_BYTES: u64 = 1 << 20;

/// Most extended attributes of one entry.
pub const MAX_XATTRS: usize = 1024;

/// Why an extended header was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PaxError {
    Corrupt(&'static str),
    TooManyXattrs,
    TooManySegments,
}

impl From<MapError> for PaxError {
    fn from(e: MapError) -> Self {
        match e {
            MapError::Corrupt(reason) => Self::Corrupt(reason),
            MapError::TooMany => Self::TooManySegments,
        }
    }
}

/// The values of an extended header.
#[derive(Debug, Clone, Default)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) linkpath: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<Time>,
    pub(super) atime: Option<Time>,
    pub(super) ctime: Option<Time>,
    /// star's keywords for device numbers are present; other readers ignore them.
    pub(super) has_device: bool,
    xattrs: Vec<Xattr>,
    /// For each of them, whether it comes from a `SCHILY` keyword.
    schily: Vec<bool>,
    /// There is a malformed `LIBARCHIVE` keyword.
    odd_libarchive: bool,
    pub(super) sparse: SparseKeys,
}

/// The `GNU.sparse.*` keywords.
#[derive(Debug, Clone, Default)]
pub(super) struct SparseKeys {
    major: Option<Version>,
    minor: Option<Version>,
    pub(super) name: Option<Vec<u8>>,
    /// `GNU.sparse.size`, which takes precedence over `real_size`.
    pub(super) size: Option<u64>,
    /// `GNU.sparse.realsize`.
    pub(super) real_size: Option<u64>,
    pub(super) numblocks: Option<u64>,
    pub(super) map: Option<Vec<Segment>>,
    /// Format 0.0: an offset whose `numbytes` has not come yet.
    offset: Option<u64>,
}

/// A part of the version of the sparse format; anything but the digit 0 or 1 is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    Zero,
    One,
    Other,
}

impl Version {
    fn parse(value: &[u8]) -> Option<Self> {
        Some(match value {
            b"" => return None,
            b"0" => Self::Zero,
            b"1" => Self::One,
            _ => Self::Other,
        })
    }
}

/// The place of an entry's sparse map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SparseForm {
    /// No known format: a plain file, whatever the other keywords say.
    None,
    /// In the header: formats 0.0 and 0.1.
    InHeader,
    /// Before the data: format 1.0.
    InData,
}

impl SparseKeys {
    /// The format that the keywords describe, by Go's rules.
    pub(super) fn form(&self) -> SparseForm {
        use Version::{One, Zero};
        match (self.major, self.minor) {
            (Some(Zero), Some(Zero | One)) => SparseForm::InHeader,
            (Some(One), Some(Zero)) => SparseForm::InData,
            (None, None) if self.map.as_ref().is_some_and(|map| !map.is_empty()) => SparseForm::InHeader,
            _ => SparseForm::None,
        }
    }
}

impl Pax {
    /// Parses all records of `data`.
    pub(super) fn parse(&mut self, mut data: &[u8]) -> Result<(), PaxError> {
        while let Some((key, value, rest)) = record(data)? {
            data = rest;
            self.set(key, value)?;
        }
        if self.sparse.offset.is_some() {
            return Err(PaxError::Corrupt("sparse segment without its length"));
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), PaxError> {
        match key {
            b"path" => self.path = name(value)?,
            b"linkpath" => self.linkpath = name(value)?,
            b"size" => self.size = parsed(value, number::decimal, "bad size in a pax header")?,
            b"uid" => self.uid = parsed(value, id, "bad uid in a pax header")?,
            b"gid" => self.gid = parsed(value, id, "bad gid in a pax header")?,
            b"mtime" => self.mtime = parsed(value, number::pax_time, "bad mtime in a pax header")?,
            b"atime" => self.atime = parsed(value, number::pax_time, "bad atime in a pax header")?,
            b"ctime" => self.ctime = parsed(value, number::pax_time, "bad ctime in a pax header")?,
            b"SCHILY.devmajor" | b"SCHILY.devminor" => self.has_device = true,
            _ => {
                if let Some(key) = key.strip_prefix(b"SCHILY.xattr.") {
                    // star's format cannot cancel an attribute: empty is a value.
                    self.set_xattr(key, value.to_vec(), true)?;
                } else if let Some(key) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    let name = number::percent_decode(key);
                    // Go ignores this keyword, so a malformed one is not an error.
                    if !name.is_empty()
                        && !name.contains(&0)
                        && let Some(value) = number::base64(value)
                    {
                        self.set_xattr(&name, value, false)?;
                    } else {
                        self.odd_libarchive = true;
                    }
                } else if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.set(key, value)?;
                }
            }
        }
        Ok(())
    }

    /// Adds an xattr. The later of two with the same name wins, but `SCHILY` wins over `LIBARCHIVE` (bsdtar writes both).
    fn set_xattr(&mut self, name: &[u8], value: Vec<u8>, replace: bool) -> Result<(), PaxError> {
        if name.is_empty() || name.contains(&0) {
            return Err(PaxError::Corrupt("bad xattr name in a pax header"));
        }
        disk_io::steps::add(self.xattrs.len() as u64);
        if let Some(known) = self.xattrs.iter().position(|x| x.name == name) {
            if replace {
                self.xattrs[known].value = value;
                self.schily[known] = true;
            }
            return Ok(());
        }
        if self.xattrs.len() >= MAX_XATTRS {
            return Err(PaxError::TooManyXattrs);
        }
        self.xattrs.push(Xattr { name: name.to_vec(), value });
        self.schily.push(replace);
        Ok(())
    }

    /// Whether an xattr comes only from a `LIBARCHIVE` keyword.
    pub(super) fn has_libarchive_only(&self) -> bool {
        self.odd_libarchive || self.schily.contains(&false)
    }

    /// Moves the xattrs to `out`, without the ignored ones.
    pub(super) fn take_xattrs(&mut self, out: &mut Vec<Xattr>) {
        let given = self.xattrs.drain(..).zip(self.schily.drain(..));
        out.extend(given.filter(|(x, schily)| *schily || x.name.contains(&b'=')).map(|(x, _)| x));
    }
}

impl SparseKeys {
    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), PaxError> {
        const BAD: &str = "bad sparse number in a pax header";
        let number = || number::decimal(value).ok_or(PaxError::Corrupt(BAD));
        match key {
            b"major" => self.major = Version::parse(value),
            b"minor" => self.minor = Version::parse(value),
            b"size" => self.size = parsed(value, number::decimal, BAD)?,
            b"realsize" => self.real_size = parsed(value, number::decimal, BAD)?,
            b"numblocks" => self.numblocks = Some(number()?),
            b"name" => self.name = name(value)?,
            b"offset" => match self.offset.replace(number()?) {
                None => {}
                Some(_) => return Err(PaxError::Corrupt("sparse segment without its length")),
            },
            b"numbytes" => {
                let offset =
                    self.offset.take().ok_or(PaxError::Corrupt("sparse segment without its offset"))?;
                sparse::push(self.map.get_or_insert_default(), offset, number()?)?;
            }
            b"map" => {
                let mut map = Vec::new();
                if !value.is_empty() {
                    let mut numbers = value.split(|&b| b == b',').map(number::decimal);
                    while let Some(offset) = numbers.next() {
                        let (Some(offset), Some(Some(len))) = (offset, numbers.next()) else {
                            return Err(PaxError::Corrupt(BAD));
                        };
                        sparse::push(&mut map, offset, len)?;
                    }
                }
                self.map = Some(map);
            }
            _ => {}
        }
        Ok(())
    }
}

fn id(value: &[u8]) -> Option<u32> {
    number::signed_decimal(value).map(number::id)
}

/// Checks the syntax of records whose content is ignored.
pub(super) fn check_records(mut data: &[u8]) -> Result<(), PaxError> {
    while let Some((.., rest)) = record(data)? {
        data = rest;
    }
    Ok(())
}

/// A name: any bytes but NUL; an empty one cancels the keyword.
fn name(value: &[u8]) -> Result<Option<Vec<u8>>, PaxError> {
    if value.contains(&0) {
        return Err(PaxError::Corrupt("name with a NUL in a pax header"));
    }
    Ok((!value.is_empty()).then(|| value.to_vec()))
}

fn parsed<T>(
    value: &[u8],
    parse: impl Fn(&[u8]) -> Option<T>,
    reason: &'static str,
) -> Result<Option<T>, PaxError> {
    if value.is_empty() {
        return Ok(None);
    }
    parse(value).map(Some).ok_or(PaxError::Corrupt(reason))
}

type Record<'a> = (&'a [u8], &'a [u8], &'a [u8]);

/// Splits off the first record: (keyword, value, rest); `None` at the end. NULs after the last record are an end too, since
/// some writers count their padding.
fn record(data: &[u8]) -> Result<Option<Record<'_>>, PaxError> {
    const BAD: PaxError = PaxError::Corrupt("bad record in a pax header");
    if data.iter().all(|&b| b == 0) {
        return Ok(None);
    }
    let space = data.iter().take(21).position(|&b| b == b' ').ok_or(BAD)?;
    let len = number::decimal(&data[..space]).and_then(|n| usize::try_from(n).ok()).ok_or(BAD)?;
    let body = data.get(space + 1..len).ok_or(BAD)?;
    let body = body.strip_suffix(b"\n").ok_or(BAD)?;
    let equals = body.iter().position(|&b| b == b'=').ok_or(BAD)?;
    if equals == 0 {
        return Err(BAD);
    }
    Ok(Some((&body[..equals], &body[equals + 1..], &data[len..])))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rec(key: &str, value: &[u8]) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let mut len = body + 1;
        while len != body + len.to_string().len() {
            len += 1;
        }
        [len.to_string().as_bytes(), b" ", key.as_bytes(), b"=", value, b"\n"].concat()
    }

    #[test]
    fn binary_values_survive() {
        let value = b"\0\n=\xff 12 x=\n";
        let data = [rec("SCHILY.xattr.user.b", value), rec("path", b"a b"), rec("comment", b"x")].concat();
        let mut pax = Pax::default();
        pax.parse(&data).unwrap();
        assert_eq!(pax.xattrs, [Xattr { name: b"user.b".to_vec(), value: value.to_vec() }]);
        assert_eq!(pax.path.as_deref(), Some(&b"a b"[..]));
    }

    #[test]
    fn an_empty_value_cancels_and_the_later_wins() {
        let mut pax = Pax::default();
        let records = [
            rec("path", b"a"),
            rec("uid", b"5"),
            rec("gid", b"1"),
            rec("gid", b"2"),
            rec("path", b""),
            rec("uid", b""),
        ];
        pax.parse(&records.concat()).unwrap();
        assert_eq!((pax.path, pax.uid, pax.gid), (None, None, Some(2)));
    }

    #[test]
    fn attributes_are_those_that_go_reads_and_names_with_an_equals_sign() {
        let mut pax = Pax::default();
        let records = [
            rec("SCHILY.xattr.user.a%3Db", b"1"),
            rec("LIBARCHIVE.xattr.user.c%3Dd", b"AAo"),
            rec("LIBARCHIVE.xattr.user.plain", b"AAo"),
            rec("LIBARCHIVE.xattr.user.a%3Db", b"AP8K\nPQ=="),
            rec("LIBARCHIVE.xattr.com.apple.signed", b"no base64: *"),
            rec("LIBARCHIVE.xattr.", b""),
            rec("LIBARCHIVE.xattr.%00=", b""),
        ];
        pax.parse(&records.concat()).unwrap();
        assert!(pax.has_libarchive_only());
        let mut out = Vec::new();
        pax.take_xattrs(&mut out);
        let x = |name: &[u8], value: &[u8]| Xattr { name: name.to_vec(), value: value.to_vec() };
        assert_eq!(out, [x(b"user.a%3Db", b"1"), x(b"user.c=d", b"\0\n"), x(b"user.a=b", b"\0\xff\n=")]);
    }

    #[test]
    fn bad_records_are_refused() {
        let cases: &[&[u8]] = &[
            b"x",
            b"5 a=b",
            b"6 a=b\n7",
            b"0 a=b\n",
            b"3 a=b\n",
            b"99999999999999999999999 a=b\n",
            b"7 a=b\n",
            b"5 ab\n",
            b"5 =b\n",
            b"-6 a=b\n",
        ];
        for data in cases {
            assert!(Pax::default().parse(data).is_err(), "{:?}", String::from_utf8_lossy(data));
        }
        for (key, value) in [
            ("path", &b"a\0b"[..]),
            ("size", b"-1"),
            ("uid", b"9223372036854775808"),
            ("mtime", b"now"),
            ("SCHILY.xattr.", b"x"),
            ("GNU.sparse.map", b"1,2,3"),
            ("GNU.sparse.numbytes", b"1"),
            ("GNU.sparse.offset", b"1"),
        ] {
            assert!(Pax::default().parse(&rec(key, value)).is_err(), "{key}");
        }
    }

    #[test]
    fn xattr_bombs_are_bounded() {
        let data: Vec<u8> =
            (0..=MAX_XATTRS).flat_map(|i| rec(&format!("SCHILY.xattr.user.{i}"), b"v")).collect();
        assert_eq!(Pax::default().parse(&data), Err(PaxError::TooManyXattrs));
    }
}
