//! The worker process: the agent behind the jail, on Linux.
//!
//! ```text
//!   descriptor 0  control socket (messages with descriptors)      2  its messages, kept by the daemon
//!   worker ─ jail ─ Hello ─ serve … end of control ─ exit, whatever still runs
//! ```
//!
//! Started by `svm::embedded` as `lcow-graphdriver worker`; not meant for interactive use, except for
//! `worker --self-test NAME [--without-seccomp]`, which enters the jail, attempts one forbidden action and prints
//! the result.

use crate::{
    channel::AgentChannel,
    codec::Codec,
    serve::{self, ControlTransport},
};
use lcow_sys::{
    linux::{
        fdpass,
        jail::{self, Spec},
        probe::{self, Outcome},
        process,
    },
    splice,
};
use std::{
    fs::File,
    io::{self, IoSlice, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};
use svm_protocol::{
    ControlReply, ControlRequest, ErrorKind, FrameType, Hello, JailReport, PROTOCOL_VERSION, WireError,
    worker::{
        FILE_SIZE_VARIABLE, JAIL_VARIABLE, MAX_CONTROL, MEMORY_VARIABLE, STRICT, USER_VARIABLE, parse_message,
    },
};

/// Address space if the variable is unset; bytes.
const DEFAULT_MEMORY: u64 = 8 << 30;
/// The maximum number of descriptors of a worker: disks and channels, see [`MAX_DISKS`](svm_protocol::MAX_DISKS) and [`MAX_OPERATIONS`](svm_protocol::MAX_OPERATIONS).
const DESCRIPTORS: u64 = 4096;

/// Runs a worker to its end; the process's exit status. `args` is what follows `worker`.
pub fn worker_main(args: &[String], codec: &Arc<dyn Codec>) -> i32 {
    let number = |variable| std::env::var(variable).ok().and_then(|v| v.parse::<u64>().ok());
    let mut spec = Spec {
        memory: number(MEMORY_VARIABLE).unwrap_or(DEFAULT_MEMORY),
        descriptors: DESCRIPTORS,
        file_size: number(FILE_SIZE_VARIABLE),
        user: number(USER_VARIABLE).and_then(|n| u32::try_from(n).ok()).unwrap_or(jail::NOBODY),
        strict: std::env::var(JAIL_VARIABLE).is_ok_and(|v| v == STRICT),
        relax: "lcow.jail=best-effort",
        without_seccomp: false,
    };
    let self_test = match args {
        [] => None,
        [flag, name, rest @ ..] if flag == "--self-test" => {
            spec.without_seccomp = rest == ["--without-seccomp"];
            Some(name)
        }
        _ => {
            eprintln!("worker: unexpected arguments {args:?}");
            return 2;
        }
    };
    let report = match jail::enter(&spec) {
        Ok(report) => report,
        Err(e) => {
            eprintln!("worker: {e}");
            return 1;
        }
    };
    if let Some(name) = self_test {
        return run_self_test(name, &report);
    }
    match run(report, codec) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("worker: control channel: {e}");
            1
        }
    }
}

fn run_self_test(name: &str, report: &JailReport) -> i32 {
    let text = match probe::attempt(name) {
        Some(Outcome::Allowed) => format!("{name}: ALLOWED\n"),
        Some(Outcome::Refused(errno)) => {
            format!("{name}: refused: {}\n", io::Error::from_raw_os_error(errno))
        }
        None => format!("{name}: unknown; expected one of {}\n", probe::ATTEMPTS.join(" ")),
    };
    let text = if report.notes.is_empty() { text } else { format!("{text}{}\n", report.notes.join("; ")) };
    i32::from(io::stdout().write_all(text.as_bytes()).is_err())
}

fn run(report: JailReport, codec: &Arc<dyn Codec>) -> io::Result<()> {
    let mut transport =
        Messages { socket: io::stdin().as_fd().try_clone_to_owned()?, buffer: vec![0; MAX_CONTROL] };
    let hello = Hello { version: PROTOCOL_VERSION, jail: report, nonce: 0, transfer: false, witness: None };
    transport.send(FrameType::Hello, &serde_json::to_vec(&hello)?)?;
    serve::serve(&mut transport, codec)
}

/// Control over a message socket: one datagram, one frame.
struct Messages {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Messages {
    fn send(&mut self, kind: FrameType, payload: &[u8]) -> io::Result<()> {
        let mut message = svm_protocol::header(kind, payload.len()).to_vec();
        message.extend_from_slice(payload);
        // One write is one message; `sendmsg` is not on the filter's list.
        let sent = rustix::io::retry_on_intr(|| rustix::io::write(&self.socket, &message))?;
        if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

impl ControlTransport for Messages {
    type Beside = Vec<OwnedFd>;

    fn receive(&mut self) -> io::Result<Option<(ControlRequest, Vec<OwnedFd>)>> {
        let (n, fds) = fdpass::receive(self.socket.as_fd(), &mut self.buffer)?;
        if n == 0 {
            return Ok(None);
        }
        match parse_message(&self.buffer[..n]).map_err(io::Error::other)? {
            (FrameType::Control, payload) => Ok(Some((serde_json::from_slice(payload)?, fds))),
            (other, _) => Err(io::Error::other(format!("unexpected {other:?} frame"))),
        }
    }

    fn reply(&mut self, reply: &ControlReply) -> io::Result<()> {
        self.send(FrameType::Reply, &serde_json::to_vec(reply)?)
    }

    fn disk(&mut self, beside: Vec<OwnedFd>, _: Option<&str>, _: bool) -> Result<File, WireError> {
        Ok(File::from(one(beside)?))
    }

    fn channel(&mut self, beside: Vec<OwnedFd>, _: u32) -> Result<Arc<dyn AgentChannel>, WireError> {
        Ok(Arc::new(Socket(UnixStream::from(one(beside)?))))
    }
}

fn one(fds: Vec<OwnedFd>) -> Result<OwnedFd, WireError> {
    let [fd]: [OwnedFd; 1] = fds.try_into().map_err(|v: Vec<_>| {
        WireError::new(ErrorKind::Usage, format!("{} descriptors where one was expected", v.len()))
    })?;
    Ok(fd)
}

struct Socket(UnixStream);

impl AgentChannel for Socket {
    fn receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(buf)
    }

    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        (&self.0).write_vectored(bufs)
    }

    fn peer_gone(&self) -> bool {
        process::peer_gone(self.0.as_fd())
    }

    fn send_file(&self, file: &File, offset: u64, len: u64) -> io::Result<u64> {
        splice::send_file(&self.0, file, offset, len)
    }

    fn sends_files(&self) -> bool {
        true
    }
}
