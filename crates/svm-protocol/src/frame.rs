//! Frames: the form of messages and bytes on a channel.
//!
//! ```text
//!   ┌────────────┬──────┬──────────────────┐
//!   │ u32 LE len │ type │ len bytes        │   len ≤ 1 MiB
//!   └────────────┴──────┴──────────────────┘
//!   one channel = one operation:
//!     daemon ► Request(JSON) Data* End            agent ► Data* (Event ◄► Resume)* Result(JSON) │ Error(JSON)
//!     Expand, Compress: the agent's Data flow while the daemon's still do, so the daemon reads whatever it waits to send
//!   control (one per VM):
//!     agent ► Hello(JSON)         daemon ► Control(JSON, descriptors beside it) ◄► Reply(JSON)
//! ```
//!
//! A stream without its explicit `Result` or `Error` was cut and is an error, whatever came before. Both ends treat
//! the other as hostile: lengths are checked before memory is allocated, unknown types end the channel. This module does
//! I/O through `Read` and `Write` only; `svm` reads the same frames asynchronously with [`parse_header`].

use serde::Serialize;
use std::io::{self, IoSlice, Read, Write};

/// Bytes of a frame header.
pub const HEADER_LEN: usize = 5;
/// The most payload bytes of any frame.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Payload bytes of the data frames that both sides send: large enough that a frame's fixed cost vanishes, small enough that
/// hundreds of streams fit in memory.
pub const DATA_PAYLOAD: usize = 256 << 10;

/// Type of a frame; the number is its byte on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameType {
    /// agent: version and state of the jail, first frame of a control channel.
    Hello = 1,
    /// daemon: an [`Operation`](crate::Operation), first frame of a data channel.
    Request = 2,
    /// either: bytes of the stream.
    Data = 3,
    /// daemon: the stream is complete. Over a [`link`](crate::link) it carries the text of its digest.
    End = 4,
    /// agent: a request during the operation ([`OperationEvent`](crate::OperationEvent)).
    Event = 5,
    /// daemon: answers one `Event`; the operation continues.
    Resume = 6,
    /// agent: the operation failed ([`WireError`](crate::WireError)); last frame.
    Error = 7,
    /// agent: the operation is complete (its summary in JSON); last frame.
    Result = 8,
    /// daemon: a [`Control`](crate::Control) request.
    Control = 9,
    /// agent: answer to a `Control`.
    Reply = 10,
    /// daemon: first frame of a link's control channel ([`Wake`](crate::Wake)).
    Wake = 11,
}

impl FrameType {
    fn from_byte(b: u8) -> Option<Self> {
        Some(match b {
            1 => Self::Hello,
            2 => Self::Request,
            3 => Self::Data,
            4 => Self::End,
            5 => Self::Event,
            6 => Self::Resume,
            7 => Self::Error,
            8 => Self::Result,
            9 => Self::Control,
            10 => Self::Reply,
            11 => Self::Wake,
            _ => return None,
        })
    }
}

/// The peer broke the protocol, or the channel broke.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The channel failed.
    #[error("channel: {0}")]
    Io(#[from] io::Error),
    /// The channel ended between frames.
    #[error("channel closed")]
    Closed,
    /// An unknown type, or one that is not allowed here.
    #[error("unexpected frame type {0}")]
    Type(u8),
    /// A length beyond [`MAX_PAYLOAD`].
    #[error("frame of {0} bytes exceeds the limit of {MAX_PAYLOAD}")]
    TooLong(u32),
    /// The JSON of a frame does not match its type.
    #[error("malformed message: {0}")]
    Json(#[from] serde_json::Error),
}

/// Splits a header into type and payload length.
///
/// # Errors
/// [`FrameError::Type`], [`FrameError::TooLong`].
pub fn parse_header(header: [u8; HEADER_LEN]) -> Result<(FrameType, usize), FrameError> {
    let [len @ .., byte] = header;
    let len = u32::from_le_bytes(len);
    let kind = FrameType::from_byte(byte).ok_or(FrameError::Type(byte))?;
    if len as usize > MAX_PAYLOAD {
        return Err(FrameError::TooLong(len));
    }
    Ok((kind, len as usize))
}

/// The header of a frame with `len` payload bytes.
pub fn header(kind: FrameType, len: usize) -> [u8; HEADER_LEN] {
    debug_assert!(len <= MAX_PAYLOAD);
    let [a, b, c, d] = (len as u32).to_le_bytes();
    [a, b, c, d, kind as u8]
}

/// Reads one frame into `buffer` (cleared first; never grows beyond [`MAX_PAYLOAD`]).
///
/// # Errors
/// [`FrameError::Closed`] if the channel ends before a frame begins, `UnexpectedEof` if it ends inside one.
pub fn read_frame(input: &mut dyn Read, buffer: &mut Vec<u8>) -> Result<FrameType, FrameError> {
    let mut head = [0u8; HEADER_LEN];
    let mut have = 0;
    while have < HEADER_LEN {
        match input.read(&mut head[have..]) {
            Ok(0) if have == 0 => return Err(FrameError::Closed),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    let (kind, len) = parse_header(head)?;
    buffer.clear();
    buffer.resize(len, 0);
    input.read_exact(buffer)?;
    Ok(kind)
}

/// Writes one frame, header and payload in one system call where the channel allows it.
///
/// # Errors
/// Errors of the channel; `InvalidInput` for a payload beyond [`MAX_PAYLOAD`].
pub fn write_frame(output: &mut dyn Write, kind: FrameType, payload: &[u8]) -> io::Result<()> {
    if payload.len() > MAX_PAYLOAD {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "frame payload beyond the limit"));
    }
    let head = header(kind, payload.len());
    let mut sent = 0;
    while sent < HEADER_LEN {
        match output.write_vectored(&[IoSlice::new(&head[sent..]), IoSlice::new(payload)]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => sent += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    output.write_all(&payload[sent - HEADER_LEN..])
}

/// Writes `message` as JSON in one frame.
///
/// # Errors
/// As [`write_frame`]; `InvalidData` if it cannot be represented in JSON.
pub fn write_json<T: Serialize>(output: &mut dyn Write, kind: FrameType, message: &T) -> io::Result<()> {
    write_frame(output, kind, &serde_json::to_vec(message)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_round_trip_and_limits_hold() {
        let mut wire = Vec::new();
        write_frame(&mut wire, FrameType::Data, b"abc").unwrap();
        write_frame(&mut wire, FrameType::End, b"").unwrap();
        let (mut input, mut buffer) = (wire.as_slice(), Vec::new());
        assert_eq!(read_frame(&mut input, &mut buffer).unwrap(), FrameType::Data);
        assert_eq!(buffer, b"abc");
        assert_eq!(read_frame(&mut input, &mut buffer).unwrap(), FrameType::End);
        assert!(matches!(read_frame(&mut input, &mut buffer), Err(FrameError::Closed)));
        assert!(write_frame(&mut wire, FrameType::Data, &vec![0; MAX_PAYLOAD + 1]).is_err());
    }

    #[test]
    fn hostile_headers_take_no_memory() {
        let mut buffer = Vec::new();
        for bytes in
            [&[0xff, 0xff, 0xff, 0xff, 3][..], &[1, 0, 0x10, 0, 3], &[0, 0, 0, 0, 0], &[0, 0, 0, 0, 99]]
        {
            assert!(matches!(
                read_frame(&mut &bytes[..], &mut buffer),
                Err(FrameError::TooLong(_) | FrameError::Type(_))
            ));
            assert!(buffer.capacity() == 0);
        }
        for cut in 1..9 {
            let bytes = [4, 0, 0, 0, 3, b'a', b'b', b'c', b'd'];
            assert!(
                matches!(read_frame(&mut &bytes[..cut], &mut buffer), Err(FrameError::Io(_))),
                "cut at {cut}"
            );
        }
    }
}
