//! Zstandard (RFC 8878) by the reference library.
//!
//! ```text
//!   stream: frame │ skippable frame │ frame …       window ≤ limit │ blocks ≤ 128 KiB │ checksum
//! ```
//!
//! The library reads frames one after the other and skips the skippable ones; what this adds is their end: a stream must
//! end between two frames. Frames that need a dictionary are refused, and so are those of versions before 0.8. Called by
//! `expand` and `compress`.

use crate::{Compression::Zstd, RecodeError, sink::Sink, source::Source};
use std::{fmt, io::Read};
use zstd::zstd_safe::{
    CCtx, CParameter, DCtx, DParameter, ErrorCode, InBuffer, OutBuffer, get_error_name,
    zstd_sys::ZSTD_EndDirective,
};

/// The limits of windows that can be set (`ZSTD_WINDOWLOG_ABSOLUTEMIN`, `ZSTD_WINDOWLOG_MAX_64`).
const WINDOW_LOGS: std::ops::RangeInclusive<u32> = 10..=31;
/// Levels with windows that every reader accepts; beyond these, `zstd` wants `--ultra`.
const LEVELS: std::ops::RangeInclusive<u32> = 1..=19;

/// `zstd_errors.h`, whose numbers below 100 are fixed: a dictionary is needed, or a feature that is not built in.
const UNSUPPORTED: [usize; 4] = [12, 14, 30, 32];
/// `ZSTD_error_frameParameter_windowTooLarge`.
const WINDOW_TOO_LARGE: usize = 16;
/// `ZSTD_error_memory_allocation`.
const NO_MEMORY: usize = 64;

/// The error of a decoder, at a byte of the stream.
fn failed(code: ErrorCode, offset: u64, log: u32) -> RecodeError {
    // The library returns the number negated.
    let number = 0usize.wrapping_sub(code);
    let what = get_error_name(code).to_owned();
    match number {
        WINDOW_TOO_LARGE => RecodeError::Window { log, offset },
        NO_MEMORY => RecodeError::Memory { what, offset },
        number if UNSUPPORTED.contains(&number) => RecodeError::Unsupported { format: Zstd, what, offset },
        _ => RecodeError::corrupt(Zstd, what, offset),
    }
}

fn internal(what: &str) -> RecodeError {
    RecodeError::Internal(format!("zstd: {what}"))
}

/// Decodes a stream of frames.
pub(crate) struct Frames {
    decoder: DCtx<'static>,
    window_log: u32,
    between: bool,
}

impl fmt::Debug for Frames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frames").field("between", &self.between).finish_non_exhaustive()
    }
}

impl Frames {
    /// A decoder of frames with windows of up to 2^`window_log` bytes.
    pub(crate) fn new(window_log: u32) -> Result<Self, RecodeError> {
        if !WINDOW_LOGS.contains(&window_log) {
            let message = format!("zstd has no window of 2^{window_log} bytes, only 2^10 to 2^31");
            return Err(RecodeError::Usage(message));
        }
        let mut decoder = DCtx::try_create().ok_or_else(|| internal("no memory for a decoder"))?;
        decoder
            .set_parameter(DParameter::WindowLogMax(window_log))
            .map_err(|e| internal(get_error_name(e)))?;
        Ok(Self { decoder, window_log, between: false })
    }

    /// Fills the front of `out`, which is not empty; 0 at the end of the stream.
    pub(crate) fn decode<R: Read>(
        &mut self,
        source: &mut Source<R>,
        out: &mut [u8],
    ) -> Result<usize, RecodeError> {
        loop {
            disk_io::steps::add(1);
            let bytes = source.bytes()?;
            let at_end = bytes.is_empty();
            if at_end && self.between {
                return Ok(0);
            }
            let mut input = InBuffer::around(bytes);
            let mut output = OutBuffer::around(&mut *out);
            let result = self.decoder.decompress_stream(&mut output, &mut input);
            let (taken, given) = (input.pos(), output.pos());
            source.consume(taken);
            // 0: the frame is complete, and all of its bytes are out.
            self.between = result.map_err(|code| failed(code, source.offset(), self.window_log))? == 0;
            if given > 0 {
                return Ok(given);
            }
            if taken == 0 && !(at_end && self.between) {
                let what = if at_end { "cut off inside a frame" } else { "a frame that leads nowhere" };
                return Err(RecodeError::corrupt(Zstd, what, source.offset()));
            }
        }
    }
}

pub(crate) fn compress<R: Read>(
    source: &mut Source<R>,
    sink: &mut Sink<'_>,
    level: u32,
) -> Result<(), RecodeError> {
    if !LEVELS.contains(&level) {
        return Err(RecodeError::Usage(format!("zstd has no level {level}, only 1 to 19")));
    }
    let mut encoder = CCtx::try_create().ok_or_else(|| internal("no memory for an encoder"))?;
    for parameter in [CParameter::CompressionLevel(level as i32), CParameter::ChecksumFlag(true)] {
        encoder.set_parameter(parameter).map_err(|e| internal(get_error_name(e)))?;
    }
    loop {
        source.block()?;
        let last = source.ended();
        let step = if last { ZSTD_EndDirective::ZSTD_e_end } else { ZSTD_EndDirective::ZSTD_e_continue };
        loop {
            let mut input = InBuffer::around(source.rest());
            let mut output = OutBuffer::around(sink.room());
            let left = encoder.compress_stream2(&mut output, &mut input, step);
            let (taken, given) = (input.pos(), output.pos());
            source.consume(taken);
            sink.filled(given)?;
            let left = left.map_err(|e| internal(get_error_name(e)))?;
            match last {
                true if left == 0 => return Ok(()),
                true if taken == 0 && given == 0 => return Err(internal("the end is not written")),
                false if source.rest().is_empty() => break,
                _ => {}
            }
        }
    }
}
