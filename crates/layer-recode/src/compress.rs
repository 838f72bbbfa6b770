//! Compression of a stream, with the same result on every host.
//!
//! ```text
//!   Read ─► Source::block (always whole) ─► gzip │ zst │ copy ─► Sink ─► Write
//! ```
//!
//! Called by the agent of a service VM, which pushes layers, and by writers of images.

use crate::{Compression, RecodeError, RecodeSummary, gzip, sink::Sink, source::Source, zst};
use std::io::{Read, Write};

/// Compresses `input` to its end.
///
/// # Errors
/// [`RecodeError::Usage`] for a level that the format does not have; [`RecodeError::Read`] and [`RecodeError::Write`] if
/// `input` or `out` fails.
pub fn compress(
    input: &mut dyn Read,
    format: Compression,
    level: u32,
    out: &mut dyn Write,
) -> Result<RecodeSummary, RecodeError> {
    let (mut source, mut sink) = (Source::new(input), Sink::new(out));
    match format {
        Compression::Plain => copy(&mut source, &mut sink)?,
        Compression::Gzip => gzip::compress(&mut source, &mut sink, level)?,
        Compression::Zstd => zst::compress(&mut source, &mut sink, level)?,
    }
    sink.finish()?;
    Ok(RecodeSummary { format, bytes_in: source.offset(), bytes_out: sink.total() })
}

fn copy<R: Read>(source: &mut Source<R>, sink: &mut Sink<'_>) -> Result<(), RecodeError> {
    loop {
        let bytes = source.bytes()?;
        let n = bytes.len();
        if n == 0 {
            return Ok(());
        }
        sink.put(bytes)?;
        source.consume(n);
    }
}
