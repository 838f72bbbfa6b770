//! The worker process: the agent behind the jail, on Windows.
//!
//! ```text
//!   standard input  control pipe (frames; a handle's number beside)      2  its messages, kept by the daemon
//!   worker ─ jail ─ Hello ─ serve … end of control ─ exit, whatever still runs
//! ```
//!
//! Started by `svm::embedded` as `lcow-graphdriver worker`; not meant for interactive use. The daemon duplicates every
//! handle into this process before it sends its number.

use crate::{
    channel::AgentChannel,
    codec::Codec,
    serve::{self, ControlTransport},
};
use lcow_sys::windows::{
    jail,
    pipe::PipeStream,
    process::{take_given, take_standard_input},
};
use std::{
    fs::File,
    io::{self, IoSlice, Read, Write},
    os::windows::io::OwnedHandle,
    sync::Arc,
};
use svm_protocol::{
    ControlReply, ControlRequest, ErrorKind, FrameType, Hello, JailReport, PROTOCOL_VERSION, WireError,
    worker::{GivenRequest, MAX_CONTROL},
};

/// Runs a worker to its end; the process's exit status. `args` is what follows `worker`.
pub fn worker_main(args: &[String], codec: &Arc<dyn Codec>) -> i32 {
    if !args.is_empty() {
        eprintln!("worker: unexpected arguments {args:?}");
        return 2;
    }
    let report = match jail::enter() {
        Ok(report) => report,
        Err(e) => {
            eprintln!("worker: {e}");
            return 1;
        }
    };
    match run(report, codec) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("worker: control channel: {e}");
            1
        }
    }
}

fn run(report: JailReport, codec: &Arc<dyn Codec>) -> io::Result<()> {
    let mut transport = Frames { pipe: PipeStream::from_handle(take_standard_input()?)? };
    let hello = Hello { version: PROTOCOL_VERSION, jail: report, nonce: 0, transfer: false, witness: None };
    svm_protocol::write_json(&mut &transport.pipe, FrameType::Hello, &hello)?;
    serve::serve(&mut transport, codec)
}

/// Control over a pipe of frames.
struct Frames {
    pipe: PipeStream,
}

impl ControlTransport for Frames {
    type Beside = Option<u64>;

    fn receive(&mut self) -> io::Result<Option<(ControlRequest, Option<u64>)>> {
        let mut payload = Vec::new();
        match svm_protocol::read_frame(&mut &self.pipe, &mut payload) {
            Ok(FrameType::Control) if payload.len() <= MAX_CONTROL => {
                let given: GivenRequest = serde_json::from_slice(&payload)?;
                Ok(Some((given.request, given.handle)))
            }
            Ok(other) => Err(io::Error::other(format!("unexpected {other:?} frame"))),
            Err(svm_protocol::FrameError::Closed) => Ok(None),
            Err(e) => Err(io::Error::other(e)),
        }
    }

    fn reply(&mut self, reply: &ControlReply) -> io::Result<()> {
        svm_protocol::write_json(&mut &self.pipe, FrameType::Reply, reply)
    }

    fn disk(&mut self, beside: Option<u64>, _: Option<&str>, _: bool) -> Result<File, WireError> {
        Ok(File::from(taken(beside)?))
    }

    fn channel(&mut self, beside: Option<u64>, _: u32) -> Result<Arc<dyn AgentChannel>, WireError> {
        let stream = PipeStream::from_handle(taken(beside)?);
        Ok(Arc::new(Pipe(stream.map_err(|e| WireError::new(ErrorKind::Io, e.to_string()))?)))
    }
}

fn taken(number: Option<u64>) -> Result<OwnedHandle, WireError> {
    let number =
        number.ok_or_else(|| WireError::new(ErrorKind::Usage, "no handle where one was expected"))?;
    take_given(number).map_err(|e| WireError::new(ErrorKind::Usage, format!("handle {number:#x}: {e}")))
}

/// A data channel over a pipe.
pub(super) struct Pipe(pub(super) PipeStream);

impl AgentChannel for Pipe {
    fn receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(buf)
    }

    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        /// Header and payload go in one call, so that small frames are one message for the peer.
        const GATHER: usize = 64 << 10;
        let all: usize = bufs.iter().map(|b| b.len()).sum();
        if bufs.len() > 1 && all <= GATHER {
            return (&self.0).write(&bufs.iter().flat_map(|b| b.iter().copied()).collect::<Vec<u8>>());
        }
        bufs.iter().find(|b| !b.is_empty()).map_or(Ok(0), |first| (&self.0).write(first))
    }

    fn peer_gone(&self) -> bool {
        self.0.peer_gone()
    }
}
