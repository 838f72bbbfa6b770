//! Link frames: layout and limits. Called by both ends of a link.

use std::io::{self, Read};

/// The start of a session; also recognized in place of a frame. Its first nine bytes are not a valid header.
pub const SYNC: [u8; 16] = *b"\xff\xffLCOW\xff\xff\xff SYNC\r\n";
/// Bytes of a frame header.
pub const HEADER_LEN: usize = 9;
/// The most bytes of a channel, each way, that are sent and not yet consumed; four data frames of the upper protocol.
pub const WINDOW: usize = 1 << 20;
/// Credit is given back in steps of this; bytes.
pub const CREDIT_STEP: usize = WINDOW / 4;
/// The most payload bytes of one frame: a long frame would delay the other channels.
pub const MAX_INLINE: usize = 64 << 10;
/// Fewer bytes than this are not worth a request to the transfer disk.
pub const MIN_STORED: usize = 16 << 10;

/// Kind of a link frame; the number is its byte on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Bytes.
    Data = 1,
    /// The sender has closed the channel.
    Close = 2,
    /// u32: number of bytes that the receiver has consumed.
    Credit = 3,
    /// u32 slot, u32 length: bytes that lie in a slot of the transfer disk.
    Stored = 4,
    /// u32 slot: it was emptied. On channel 0.
    Free = 5,
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Payload bytes.
    pub len: usize,
    /// Channel.
    pub channel: u32,
    /// Kind of the frame.
    pub kind: Kind,
}

/// What a header announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    /// A frame.
    Frame(Header),
    /// The first bytes of [`SYNC`]: the peer starts a new session.
    Sync,
}

/// Reads a header.
///
/// # Errors
/// `InvalidData` if it is neither a valid header nor the start of [`SYNC`].
pub fn parse(bytes: [u8; HEADER_LEN]) -> io::Result<Parsed> {
    if bytes == SYNC[..HEADER_LEN] {
        return Ok(Parsed::Sync);
    }
    let len = number(&bytes, 0)? as usize;
    let channel = number(&bytes, 1)?;
    let (kind, wanted) = match bytes[HEADER_LEN - 1] {
        1 => (Kind::Data, None),
        2 => (Kind::Close, Some(0)),
        3 => (Kind::Credit, Some(4)),
        4 => (Kind::Stored, Some(8)),
        5 => (Kind::Free, Some(4)),
        _ => return Err(invalid("unknown kind of link frame")),
    };
    if wanted.is_some_and(|w| w != len) || len > MAX_INLINE {
        return Err(invalid("link frame of a wrong length"));
    }
    // An empty frame costs no credit, so their number would be unbounded, and its reader would see an end of file.
    if kind == Kind::Data && len == 0 {
        return Err(invalid("link frame with 0 bytes"));
    }
    Ok(Parsed::Frame(Header { len, channel, kind }))
}

/// A header's bytes.
pub fn header(channel: u32, kind: Kind, len: usize) -> [u8; HEADER_LEN] {
    debug_assert!(len <= MAX_INLINE);
    let mut bytes = [kind as u8; HEADER_LEN];
    bytes[..4].copy_from_slice(&(len as u32).to_le_bytes());
    bytes[4..8].copy_from_slice(&channel.to_le_bytes());
    bytes
}

/// A whole frame whose payload is numbers.
pub fn numbers(channel: u32, kind: Kind, values: &[u32]) -> Vec<u8> {
    let mut bytes = header(channel, kind, values.len() * 4).to_vec();
    for value in values {
        bytes.extend_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// The `n`th number of a payload whose length was checked.
///
/// # Errors
/// `InvalidData` if there is none.
pub fn number(payload: &[u8], n: usize) -> io::Result<u32> {
    let bytes = payload.get(n * 4..).and_then(|rest| rest.first_chunk::<4>());
    bytes.map(|b| u32::from_le_bytes(*b)).ok_or_else(|| invalid("link frame cut off"))
}

/// Slot and length of a Stored frame.
///
/// # Errors
/// `InvalidData` if it is cut off or its length is 0 (see [`parse`]).
pub fn stored(payload: &[u8]) -> io::Result<(u32, usize)> {
    match (number(payload, 0)?, number(payload, 1)?) {
        (_, 0) => Err(invalid("a slot with 0 bytes")),
        (slot, len) => Ok((slot, len as usize)),
    }
}

/// Bytes of a Credit frame.
///
/// # Errors
/// `InvalidData` if it is cut off or its credit is 0.
pub fn credit(payload: &[u8]) -> io::Result<usize> {
    match number(payload, 0)? {
        0 => Err(invalid("a credit of 0 bytes")),
        bytes => Ok(bytes as usize),
    }
}

/// The error for a peer that broke the protocol.
pub fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.to_owned())
}

/// Finds [`SYNC`] in a stream, byte by byte.
#[derive(Debug, Default)]
pub struct Hunt {
    tail: Vec<u8>,
}

impl Hunt {
    /// Takes a byte; true if it was the last of SYNC.
    pub fn take(&mut self, byte: u8) -> bool {
        if self.tail.len() == SYNC.len() {
            self.tail.remove(0);
        }
        self.tail.push(byte);
        self.tail == SYNC
    }
}

/// Reads up to and including the next SYNC; false if the stream ends first.
///
/// # Errors
/// Errors of the stream.
pub fn hunt(input: &mut dyn Read) -> io::Result<bool> {
    let (mut hunt, mut byte) = (Hunt::default(), [0]);
    loop {
        match input.read(&mut byte) {
            Ok(0) => return Ok(false),
            Ok(_) if hunt.take(byte[0]) => return Ok(true),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip_and_hostile_ones_are_refused() {
        for (kind, len) in [(Kind::Data, 7), (Kind::Close, 0), (Kind::Credit, 4), (Kind::Stored, 8)] {
            let parsed = parse(header(9, kind, len)).unwrap();
            assert_eq!(parsed, Parsed::Frame(Header { len, channel: 9, kind }));
        }
        for (len, kind) in
            [(MAX_INLINE as u32 + 1, 1), (1, 2), (5, 3), (4, 4), (8, 5), (0, 0), (0, 1), (0, 6)]
        {
            let mut bytes = [0; HEADER_LEN];
            bytes[..4].copy_from_slice(&len.to_le_bytes());
            bytes[8] = kind;
            assert!(parse(bytes).is_err(), "len {len} kind {kind}");
        }
        assert_eq!(parse(*SYNC.first_chunk().unwrap()).unwrap(), Parsed::Sync);
        let frame = numbers(3, Kind::Stored, &[7, 8]);
        assert_eq!(
            (number(&frame[HEADER_LEN..], 1).unwrap(), number(&frame[HEADER_LEN..], 2).is_err()),
            (8, true)
        );
    }

    #[test]
    fn sync_is_found_behind_garbage_that_begins_like_it() {
        let mut stream = b"\xff\xffLCOW\xff\xff\xff SYNC\r\xff\xff".to_vec();
        stream.extend_from_slice(&SYNC);
        stream.extend_from_slice(b"rest");
        let mut input = stream.as_slice();
        assert!(hunt(&mut input).unwrap());
        assert_eq!(input, b"rest");
        assert!(!hunt(&mut &b"nothing here"[..]).unwrap());
    }
}
