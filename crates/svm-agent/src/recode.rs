//! Decompression and compression of a stream, with the errors of the protocol.
//!
//! ```text
//!   Data… End ─► layer_recode::expand │ compress ─► Data…             RecodeError ─► WireError
//! ```
//!
//! The daemon sends and receives at the same time, so that neither can wait for the other. Called by `operation` through
//! [`Codec`](crate::codec::Codec), and by tests.

use crate::channel::sending;
use layer_recode::RecodeError;
use std::io::{Read, Write};
use svm_protocol::{Compression, ErrorKind, ExpandLimits, RecodeSummary, WireError, with_causes};

/// Decompresses `input` to its end. `format` is how it is compressed; `None` lets its first bytes tell.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for a stream that breaks its format, is cut off or fails its checksum, [`ErrorKind::Limit`] for
/// more plain bytes or a larger window than `limits` allow, [`ErrorKind::Unsupported`] for what the format reserves,
/// [`ErrorKind::Cancelled`] if `input` or `out` fails.
pub fn expand(
    input: &mut dyn Read,
    format: Option<Compression>,
    limits: &ExpandLimits,
    out: &mut dyn Write,
) -> Result<RecodeSummary, WireError> {
    layer_recode::expand(input, format, limits, out).map_err(|e| wire(&e))
}

/// Compresses `input` to its end.
///
/// # Errors
/// [`ErrorKind::Usage`] for a level that the format does not have; [`ErrorKind::Cancelled`] if `input` or `out` fails.
pub fn compress(
    input: &mut dyn Read,
    format: Compression,
    level: u32,
    out: &mut dyn Write,
) -> Result<RecodeSummary, WireError> {
    layer_recode::compress(input, format, level, out).map_err(|e| wire(&e))
}

/// The error that the daemon reads.
fn wire(error: &RecodeError) -> WireError {
    let kind = match error {
        RecodeError::Corrupt { .. } => ErrorKind::Corrupt,
        RecodeError::Unsupported { .. } => ErrorKind::Unsupported,
        RecodeError::Output(_) | RecodeError::Window { .. } | RecodeError::Memory { .. } => ErrorKind::Limit,
        RecodeError::Usage(_) => ErrorKind::Usage,
        // The daemon closed the channel, in either direction.
        RecodeError::Read(e) => {
            return WireError::new(ErrorKind::Cancelled, format!("the stream was cut: {e}"));
        }
        RecodeError::Write(e) => return sending(e),
        _ => ErrorKind::Internal,
    };
    WireError::new(kind, with_causes(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    /// An end that fails.
    struct Broken;

    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn errors_keep_their_kind_on_the_wire() {
        let limits = ExpandLimits::of_output(4);
        let mut gzip = Vec::new();
        compress(&mut &b"text"[..], Compression::Gzip, 4, &mut gzip).unwrap();
        let whole = expand(&mut &gzip[..], None, &limits, &mut io::sink()).unwrap();
        assert_eq!((whole.bytes_in, whole.bytes_out), (gzip.len() as u64, 4));
        let kind = |input: &mut dyn Read, limits: &ExpandLimits, out: &mut dyn Write| {
            expand(input, Some(Compression::Gzip), limits, out).unwrap_err().kind
        };
        let small = ExpandLimits::of_output(3);
        assert_eq!(kind(&mut &gzip[..gzip.len() - 1], &limits, &mut io::sink()), ErrorKind::Corrupt);
        assert_eq!(kind(&mut &gzip[..], &small, &mut io::sink()), ErrorKind::Limit);
        assert_eq!(kind(&mut (&gzip[..9]).chain(Broken), &limits, &mut io::sink()), ErrorKind::Cancelled);
        assert_eq!(kind(&mut &gzip[..], &limits, &mut Broken), ErrorKind::Cancelled);
        let reserved = [0x1f, 0x8b, 7, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(kind(&mut &reserved[..], &limits, &mut io::sink()), ErrorKind::Unsupported);
        let level = compress(&mut &b""[..], Compression::Zstd, 99, &mut io::sink()).unwrap_err();
        assert_eq!(level.kind, ErrorKind::Usage);
    }
}
