//! Numbers in headers: octal text, GNU base-256, PAX decimals, PAX times.
//!
//! Invariant: every function is total; anything that is not a number, or does not fit, is `None`.

use super::entry::Time;
use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, NO_PAD},
};

/// Decodes as libarchive does: bits after the last whole byte are ignored.
const BASE64: GeneralPurpose = GeneralPurpose::new(&STANDARD, DECODE);
const DECODE: GeneralPurposeConfig = NO_PAD.with_decode_allow_trailing_bits(true);

/// Octal digits after blanks or NULs, ended by a blank, a NUL or the field's end. An empty field is 0.
pub(super) fn octal(field: &[u8]) -> Option<i64> {
    let start = field.iter().position(|&b| b != b' ' && b != 0).unwrap_or(field.len());
    let mut value: i64 = 0;
    for &b in &field[start..] {
        match b {
            b'0'..=b'7' => value = value.checked_mul(8)?.checked_add(i64::from(b - b'0'))?,
            b' ' | 0 => break,
            _ => return None,
        }
    }
    Some(value)
}

/// A numeric field: base-256 (first bit set, two's complement in the rest) or octal.
pub(super) fn numeric(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(&first) if first & 0x80 != 0 => {
            // Bit 7 marks base-256; bit 6 is the sign.
            let top = i128::from(first & 0x3f) - i128::from(first & 0x40);
            // At most 12 bytes: 95 bits.
            let value = field[1..].iter().fold(top, |v, &b| (v << 8) | i128::from(b));
            i64::try_from(value).ok()
        }
        _ => octal(field),
    }
}

/// An id from a header: its low 32 bits, which is what chown(2) uses of the number that moby and containerd pass.
pub(super) fn id(value: i64) -> u32 {
    value as u32
}

/// Decimal digits only.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |v, &b| {
        let digit = b.is_ascii_digit().then(|| u64::from(b - b'0'))?;
        v.checked_mul(10)?.checked_add(digit)
    })
}

/// A decimal that may be negative.
pub(super) fn signed_decimal(text: &[u8]) -> Option<i64> {
    match text.strip_prefix(b"-") {
        Some(digits) => 0i64.checked_sub_unsigned(decimal(digits)?),
        None => i64::try_from(decimal(text)?).ok(),
    }
}

/// A PAX time: seconds since 1970 with a fraction, possibly negative. Digits past the nanosecond are dropped.
pub(super) fn pax_time(text: &[u8]) -> Option<Time> {
    let (negative, digits) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let dot = digits.iter().position(|&b| b == b'.').unwrap_or(digits.len());
    let whole = decimal(&digits[..dot])?;
    let fraction = digits.get(dot + 1..).unwrap_or_default();
    let mut nanos: u32 = 0;
    for (i, &b) in fraction.iter().enumerate() {
        if !b.is_ascii_digit() {
            return None;
        }
        if i < 9 {
            nanos += u32::from(b - b'0') * 10u32.pow(8 - i as u32);
        }
    }
    if !negative {
        return Some(Time { secs: i64::try_from(whole).ok()?, nanos });
    }
    let secs = 0i64.checked_sub_unsigned(whole)?;
    if nanos == 0 {
        return Some(Time { secs, nanos });
    }
    // -1.25 s is two seconds before 1970 and then 0.75 s forward.
    Some(Time { secs: secs.checked_sub(1)?, nanos: 1_000_000_000 - nanos })
}

/// RFC 4648 base64, padding optional, as libarchive writes xattr values.
pub(super) fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let body = text.trim_ascii_end();
    let body = body.strip_suffix(b"==").or_else(|| body.strip_suffix(b"=")).unwrap_or(body);
    // Some writers break lines; libarchive skips the breaks.
    let body: Vec<u8> = body.iter().copied().filter(|b| !b.is_ascii_whitespace()).collect();
    BASE64.decode(body).ok()
}

/// Decodes `%41` to `A`, as in libarchive's xattr names. A percent sign without two digits is kept.
pub(super) fn percent_decode(text: &[u8]) -> Vec<u8> {
    let hex = |b: u8| (b as char).to_digit(16);
    let mut out = Vec::with_capacity(text.len());
    let mut i = 0;
    while let Some(&b) = text.get(i) {
        let pair = (b == b'%').then(|| Some((hex(*text.get(i + 1)?)?, hex(*text.get(i + 2)?)?))).flatten();
        if let Some((high, low)) = pair {
            out.push((high * 16 + low) as u8);
            i += 3;
        } else {
            out.push(b);
            i += 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_numbers() {
        let cases: &[(&[u8], Option<i64>)] = &[
            (b"0000644\0", Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"644 junk", Some(0o644)),
            (b"\0\0\0\0", Some(0)),
            (b"", Some(0)),
            (b"0000648\0", None),
            (b"-1", None),
            (b"77777777777777777777777", None),
            (b"\x80\0\0\0\0\x20\0\x01", Some(0x0020_0001)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\xff\xff\xff\xff\x80\0\0\0\0\0\0\0", Some(i64::MIN)),
            (b"\xff\xff\xff\xff\x7f\0\0\0\0\0\0\0", None),
        ];
        for (field, want) in cases {
            assert_eq!(numeric(field), *want, "{field:?}");
        }
        assert_eq!([id(-2), id(1 << 22), id((1 << 32) + 7), id(-1)], [u32::MAX - 1, 1 << 22, 7, u32::MAX]);
    }

    #[test]
    fn pax_times() {
        type Case<'a> = (&'a [u8], Option<(i64, u32)>);
        let cases: &[Case<'_>] = &[
            (b"0", Some((0, 0))),
            (b"1.5", Some((1, 500_000_000))),
            (b"1.", Some((1, 0))),
            (b"12345.1234567899", Some((12345, 123_456_789))),
            (b"-1", Some((-1, 0))),
            (b"-1.25", Some((-2, 750_000_000))),
            (b"-0.000000001", Some((-1, 999_999_999))),
            (b"4294967296.000000001", Some((1 << 32, 1))),
            (b"-9223372036854775808", Some((i64::MIN, 0))),
            (b"-9223372036854775808.5", None),
            (b"9223372036854775808", None),
            (b"", None),
            (b"-", None),
            (b".5", None),
            (b"1.x", None),
            (b"1e5", None),
            (b"--1", None),
        ];
        for (text, want) in cases {
            let got = pax_time(text).map(|t| (t.secs, t.nanos));
            assert_eq!(got, *want, "{}", String::from_utf8_lossy(text));
        }
    }

    #[test]
    fn libarchive_encodings() {
        let cases: &[(&[u8], Option<&[u8]>)] = &[
            (b"", Some(b"")),
            (b"AAo=", Some(b"\0\n")),
            (b"AAo", Some(b"\0\n")),
            (b"AP8KPQ==", Some(b"\0\xff\n=")),
            (b"AP8K\nPQ==\n", Some(b"\0\xff\n=")),
            // Bits after the last whole byte are ignored, as they were before this used a crate.
            (b"AAp", Some(b"\0\n")),
            (b"AB==", Some(b"\0")),
            (b"A", None),
            (b"AA*o", None),
            (b"A=Ao", None),
            (b"AAo===", None),
        ];
        for (text, want) in cases {
            assert_eq!(base64(text).as_deref(), *want, "{text:?}");
        }
        assert_eq!(percent_decode(b"user.a%3Db%%41%4"), b"user.a=b%A%4");
    }
}
