//! PAX extended headers: `"%d %s=%s\n"` records (POSIX.1-2017 pax, "pax Extended Header") and the keywords that layers
//! use.
//!
//! ```text
//!   30 mtime=1700000000.123456789\n│29 SCHILY.xattr.user.a=\0\n\xff│…
//!   └┬┘└──────────┬─────────────┘
//!   length of the whole record, itself and the newline included: values may hold any byte
//! ```
//!
//! Invariant: an empty value takes the keyword back (to what the header block says), also one of a global header.
//! Keywords that change nothing in an image (`comment`, `charset`, `uname`, ACLs as text, …) are passed over; their
//! bytes live on in the exact record.

use super::{
    entry::{Time, Xattr},
    number,
    sparse::{self, MapError, Segment},
};

/// The most bytes of one extended header or GNU long name (Go's archive/tar has the same bound).
pub const MAX_PAX_BYTES: u64 = 1 << 20;

/// The most xattrs of one entry.
pub const MAX_XATTRS: usize = 1024;

/// Why extended headers were refused.
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

/// What extended headers say of an entry.
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
    pub(super) devmajor: Option<u32>,
    pub(super) devminor: Option<u32>,
    pub(super) xattrs: Vec<Xattr>,
    /// For each of these, whether a `SCHILY` keyword gave it.
    schily: Vec<bool>,
    pub(super) sparse: SparseKeys,
}

/// The `GNU.sparse.*` keywords.
#[derive(Debug, Clone, Default)]
pub(super) struct SparseKeys {
    pub(super) major: Option<u64>,
    pub(super) minor: Option<u64>,
    pub(super) name: Option<Vec<u8>>,
    /// `GNU.sparse.size` (0.x) or `GNU.sparse.realsize` (1.0).
    pub(super) size: Option<u64>,
    pub(super) numblocks: Option<u64>,
    pub(super) map: Option<Vec<Segment>>,
    /// 0.0: an offset that waits for its numbytes.
    offset: Option<u64>,
}

impl SparseKeys {
    /// True if any keyword was given.
    pub(super) fn any(&self) -> bool {
        self.major.is_some() || self.size.is_some() || self.map.is_some() || self.name.is_some()
    }
}

impl Pax {
    /// Takes all records of `data`.
    pub(super) fn parse(&mut self, mut data: &[u8], global: bool) -> Result<(), PaxError> {
        while let Some((key, value, rest)) = record(data)? {
            data = rest;
            self.set(key, value, global)?;
        }
        if self.sparse.offset.is_some() {
            return Err(PaxError::Corrupt("sparse segment without its length"));
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8], global: bool) -> Result<(), PaxError> {
        match key {
            b"path" => self.path = name(value)?,
            b"linkpath" => self.linkpath = name(value)?,
            b"size" => self.size = parsed(value, number::decimal, "bad size in a pax header")?,
            b"uid" => self.uid = parsed(value, id, "bad uid in a pax header")?,
            b"gid" => self.gid = parsed(value, id, "bad gid in a pax header")?,
            b"mtime" => self.mtime = parsed(value, number::pax_time, "bad mtime in a pax header")?,
            b"atime" => self.atime = parsed(value, number::pax_time, "bad atime in a pax header")?,
            b"ctime" => self.ctime = parsed(value, number::pax_time, "bad ctime in a pax header")?,
            b"SCHILY.devmajor" => self.devmajor = parsed(value, id, "bad device number in a pax header")?,
            b"SCHILY.devminor" => self.devminor = parsed(value, id, "bad device number in a pax header")?,
            _ => {
                if let Some(key) = key.strip_prefix(b"SCHILY.xattr.") {
                    // star's format has no way to take an attribute back: empty is a value.
                    self.set_xattr(key, value.to_vec(), true)?;
                } else if let Some(key) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    let value = number::base64(value).ok_or(PaxError::Corrupt("xattr is not base64"))?;
                    self.set_xattr(&number::percent_decode(key), value, false)?;
                } else if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    if global {
                        return Err(PaxError::Corrupt("sparse keyword in a global pax header"));
                    }
                    self.sparse.set(key, value)?;
                }
            }
        }
        Ok(())
    }

    /// Adds an xattr; of two with one name the later wins, but `SCHILY` before `LIBARCHIVE` (bsdtar writes both).
    fn set_xattr(&mut self, name: &[u8], value: Vec<u8>, replace: bool) -> Result<(), PaxError> {
        if name.is_empty() || name.contains(&0) {
            return Err(PaxError::Corrupt("bad xattr name in a pax header"));
        }
        crate::io::steps::add(self.xattrs.len() as u64);
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

    /// Whether an xattr is given by a `LIBARCHIVE` keyword alone.
    pub(super) fn has_libarchive_only(&self) -> bool {
        self.schily.contains(&false)
    }
}

impl SparseKeys {
    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), PaxError> {
        const BAD: &str = "bad sparse number in a pax header";
        let number = || number::decimal(value).ok_or(PaxError::Corrupt(BAD));
        match key {
            b"major" => self.major = Some(number()?),
            b"minor" => self.minor = Some(number()?),
            b"size" | b"realsize" => self.size = Some(number()?),
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

/// An id, where negative ones of odd writers mean the same 32 bits.
fn id(value: &[u8]) -> Option<u32> {
    number::id(number::signed_decimal(value)?)
}

/// A name: any bytes but NUL; empty takes it back.
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

/// Splits the first record off: (keyword, value, rest); `None` at the end. NULs after the last record are an end, too:
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
        pax.parse(&data, false).unwrap();
        assert_eq!(pax.xattrs, [Xattr { name: b"user.b".to_vec(), value: value.to_vec() }]);
        assert_eq!(pax.path.as_deref(), Some(&b"a b"[..]));
    }

    #[test]
    fn empty_takes_back_and_later_wins() {
        let mut pax = Pax::default();
        pax.parse(&[rec("path", b"a"), rec("uid", b"5"), rec("gid", b"1"), rec("gid", b"2")].concat(), true)
            .unwrap();
        pax.parse(&[rec("path", b""), rec("uid", b"")].concat(), false).unwrap();
        assert_eq!((pax.path, pax.uid, pax.gid), (None, None, Some(2)));
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
            assert!(Pax::default().parse(data, false).is_err(), "{:?}", String::from_utf8_lossy(data));
        }
        for (key, value) in [
            ("path", &b"a\0b"[..]),
            ("size", b"-1"),
            ("uid", b"4294967296"),
            ("mtime", b"now"),
            ("SCHILY.xattr.", b"x"),
            ("LIBARCHIVE.xattr.user.a", b"*"),
            ("GNU.sparse.map", b"1,2,3"),
            ("GNU.sparse.numbytes", b"1"),
            ("GNU.sparse.offset", b"1"),
        ] {
            assert!(Pax::default().parse(&rec(key, value), false).is_err(), "{key}");
        }
    }

    #[test]
    fn xattr_bombs_are_bounded() {
        let data: Vec<u8> =
            (0..=MAX_XATTRS).flat_map(|i| rec(&format!("SCHILY.xattr.user.{i}"), b"v")).collect();
        assert_eq!(Pax::default().parse(&data, false), Err(PaxError::TooManyXattrs));
    }
}
